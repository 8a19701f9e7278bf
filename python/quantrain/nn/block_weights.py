"""The weights of a block's layers as the operator of a whole block takes them: layers that read one tensor joined."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quantrain.int8_transformer import PRODUCT_TENSORS

from .block_forms import BlockForm, NotFused, inside
from .quantized import QuantizedInt8Linear, QuantizedLayer

_BUFFERS = {"codes": "weight_codes", "scale": "weight_scale"}


def _input_scale(layer: QuantizedLayer) -> Tensor | None:
    fake_quant = layer.input_fake_quant
    return None if fake_quant is None or fake_quant.dynamic else fake_quant.scale


def _float_part(module: nn.Module, name: str) -> Tensor | None:
    """Of a layer that is not quantized, whose weight stands in the place of codes."""
    attention = isinstance(module, nn.MultiheadAttention)
    if name == "codes":
        return module.in_proj_weight if attention else module.weight
    return (module.in_proj_bias if attention else module.bias) if name == "bias" else None


def _part(layer: nn.Module, name: str) -> Tensor | None:
    if not isinstance(layer, QuantizedLayer):
        return _float_part(layer, name)
    if name == "input_scale" and isinstance(layer, QuantizedInt8Linear):
        return _input_scale(layer)
    tensor = getattr(layer, _BUFFERS.get(name, name), None)
    if name == "scale" and tensor.numel() == 1:  # one for all rows
        return tensor.reshape(1, 1).expand(layer.out_features, 1).contiguous()
    return tensor.reshape(-1, 1) if name == "scale" and tensor.dim() != 2 else tensor


def _adjacent(tensors: Sequence[Tensor]) -> bool:
    """Whether they lie one behind the other in one storage."""
    following = tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != following or not tensor.is_contiguous():
            return False
        if tensor.untyped_storage().data_ptr() != tensors[0].untyped_storage().data_ptr():
            return False
        following += tensor.nbytes
    return True


def _joined(layers: Sequence[QuantizedLayer], name: str, share: bool) -> Tensor | None:
    """The rows of several layers' buffers as one tensor; with ``share`` the layers' own lie in it from then on."""
    tensors = [_part(layer, name) for layer in layers]
    if len(layers) == 1:
        return tensors[0]
    if all(tensor is None for tensor in tensors):
        return None
    if name in ("input_factor", "input_scale", "outlier_columns"):
        if any(tensor is None or not torch.equal(tensor, tensors[0]) for tensor in tensors):
            raise NotFused(f"layers that read one tensor do not share their {name}")
        return tensors[0]
    if name == "bias":
        tensors = [
            layer.weight_scale.new_zeros(layer.out_features) if tensor is None else tensor
            for layer, tensor in zip(layers, tensors, strict=True)
        ]
    if name == "scale":
        tensors = [tensor.expand(layer.out_features, -1) for layer, tensor in zip(layers, tensors, strict=True)]
    if any(tensor is None or tensor.shape[1:] != tensors[0].shape[1:] for tensor in tensors):
        raise NotFused("layers that read one tensor are stored differently")
    if not share:
        return torch.cat(tensors)
    if _adjacent(tensors):
        rows = sum(tensor.shape[0] for tensor in tensors)
        return tensors[0].as_strided((rows, *tensors[0].shape[1:]), tensors[0].stride())
    whole = torch.cat(tensors)
    first = 0
    for layer, tensor in zip(layers, tensors, strict=True):
        buffer = _BUFFERS.get(name, name)
        held = layer._buffers.get(buffer)
        if held is not None and held.shape == tensor.shape:
            layer._buffers[buffer] = whole[first : first + tensor.shape[0]]
        first += tensor.shape[0]
    return whole


def joined_weights(block: nn.Module, form: BlockForm, share: bool) -> list[Tensor | None]:
    """In the order of WEIGHT_NAMES."""
    norms = [inside(block, path) for path in form.norms]
    weights = [tensor for norm in norms for tensor in (norm.weight, getattr(norm, "bias", None))]
    for paths in form.products.values():
        layers = [inside(block, path) for path in paths]
        weights += [_joined(layers, name, share) for name in PRODUCT_TENSORS]
    return [None if tensor is None else tensor.detach() for tensor in weights]
