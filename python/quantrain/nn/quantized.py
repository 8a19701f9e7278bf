"""Converted layers: codes and scales in buffers; float arithmetic on the dequantized weight or integer products.

What the prepared layer computed in evaluation, its converted twin computes bit for bit: codes and scales come from the
same formula, so the dequantized weight equals the fake-quantized one.

Buffers: ``weight_codes`` (int8 where symmetric, uint8 where affine; of 4 bits and fewer uint8, two codes per byte,
packed along the flattened row: ``[O, ceil(row / 2)]``), ``weight_scale`` (float32, the granularity is its shape),
``weight_zero_point`` (int32, only where affine), ``bias`` (float32, only where the layer has one). Older state dicts
and pickles, which call the codes ``weight``, load.

``weight`` is no buffer: reading it gives the dequantized tensor in the layer's float type, because other libraries read
it from any layer (for its dtype, for a tied head, for a merge).
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantrain._arguments import float_name

from .calibrate import evaluating
from .convolutions import QuantConv1d, QuantConvTranspose2d, transposed_from_rows
from .fake_quantize import FakeQuantize
from .layers import (
    QuantConv2d,
    QuantEmbedding,
    QuantLayer,
    QuantLinear,
    QuantTransposedLinear,
    Transposed,
    gathered_qparams,
)
from .observers import Float32State
from .schemes import handler_of
from .weight_hooks import computes_weight, run_weight_hooks

__all__ = [
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConvTranspose2d",
    "QuantizedEmbedding",
    "QuantizedInt8Linear",
    "QuantizedLayer",
    "QuantizedLinear",
    "quantized_layer",
]

kPackedBits = 4  # codes of at most this many bits are stored two per byte


class QuantizedLayer(Float32State):
    """What the converted layers share: the stored integers and how to read them back.

    Made by ``convert`` or ``from_quant``; a converted layer has no parameters and is not trained.

    Args:
        layer: the prepared layer to convert; it is not changed.
        check_observed: False lets a weight scale that was never set pass, as NaN, to be loaded later.
    """

    rounds_input_itself = False  # the forward pass does not call input_fake_quant
    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None
    input_fake_quant: FakeQuantize | None
    output_fake_quant: FakeQuantize | None

    def __init__(self, layer: QuantLayer, *, check_observed: bool = True):
        super().__init__()
        self.weight_dtype = layer.weight.dtype
        with evaluating(layer):
            self._store_weight(layer, check_observed)
        for child in ("input_fake_quant", "output_fake_quant"):
            fake_quant = getattr(layer, child)
            self.add_module(child, fake_quant and fake_quant.frozen())
        self.recipe = layer.recipe
        self.eval()

    @classmethod
    def from_quant(cls, layer: QuantLayer, *, check_observed: bool = True) -> QuantizedLayer:
        """The converted twin of a prepared layer.

        Raises:
            ValueError: a weight without spec or with more than 8 bits; a scale that was never observed.
        """
        return cls(layer, check_observed=check_observed)

    @torch.no_grad()
    def _store_weight(self, layer: QuantLayer, check_observed: bool) -> None:
        run_weight_hooks(layer)
        fake_quant, weight = check_convertible(layer), layer.weight_to_quantize()
        self.bits, self.signed = fake_quant.spec.bits, fake_quant.symmetric
        self.weight_shape = tuple(weight.shape)
        if check_observed and not bool(torch.isfinite(weight).all()):
            raise ValueError(f"convert: {type(layer).__name__}: expected finite weights, got NaN or Inf")
        low, high = fake_quant.quant_min, fake_quant.quant_max
        if (scheme := layer.recipe.scheme) is not None and scheme.has_weight_rule:
            scale, zero_point, low, high = scheme.weight_qparams(weight)
        elif fake_quant.ready or check_observed:
            scale, zero_point = fake_quant.calculate_qparams(weight)
        else:
            scale, zero_point = torch.ones_like(fake_quant.scale), fake_quant.zero_point
        codes = torch.ops.quantrain.quantize.nearest(
            weight,
            scale,
            zero_point,
            quant_min=low,
            quant_max=high,
            dtype="int8" if self.signed else "uint8",
        )
        if self.packed:
            codes = torch.ops.quantrain.pack_int4(codes.reshape(codes.shape[0], -1).contiguous())
        self.register_buffer("weight_codes", codes)
        self.register_buffer("weight_scale", scale.clone() if fake_quant.ready else torch.full_like(scale, math.nan))
        self.register_buffer("weight_zero_point", None if zero_point is None else zero_point.clone())
        bias = layer.bias_to_store()
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    @property
    def weight(self) -> Tensor:
        """The float weight that the layer stands for, in the float layer's shape and of type ``weight_dtype``.

        ``weight_dtype`` is the type that the float weight had, or what ``.to(dtype)`` set since. Each read makes a new
        tensor: nothing is kept, so a model takes the memory of its codes and a read costs a pass over them. Writing
        into it changes nothing; assigning to it raises.
        """
        return self._from_rows(self.dequantized_weight(self.weight_dtype))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__}: expected no assignment to weight, which a converted layer computes from its codes, "
                f"got one of {type(value).__name__} (assign and tie weights before convert)"
            )
        super().__setattr__(name, value)

    def _from_rows(self, rows: Tensor) -> Tensor:
        """``[O, ...]``, as the codes are stored, in the float layer's shape."""
        return rows

    @property
    def packed(self) -> bool:
        """Whether ``weight_codes`` holds two codes per byte."""
        return self.bits <= kPackedBits

    def codes(self) -> Tensor:
        """The integer codes, one per element, in the shape ``weight_shape``: int8 (symmetric) or uint8 (affine)."""
        return self._unpacked(self.weight_codes).reshape(self.weight_shape) if self.packed else self.weight_codes

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(codes - zero_point) * scale, in the shape ``weight_shape``."""
        return torch.ops.quantrain.dequantize.typed(
            self.codes(), self.weight_scale, self.weight_zero_point, dtype=float_name("dequantize", dtype)
        )

    def _apply(self, fn, recurse=True):
        probe = torch.empty(0, dtype=self.weight_dtype, device=self.weight_codes.device)
        super()._apply(fn, recurse)
        self.weight_dtype = fn(probe).dtype
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        _name_codes(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _name_codes(self._buffers)
        self.__dict__.setdefault("weight_dtype", self.__dict__.pop("output_dtype", torch.float32))

    def _unpacked(self, rows: Tensor) -> Tensor:
        return torch.ops.quantrain.unpack_int4(rows, size=math.prod(self.weight_shape[1:]), signed=self.signed)

    def _cast_bias(self, x: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(x.dtype)

    def _quantized_input(self, x: Tensor) -> Tensor:
        return x if self.input_fake_quant is None else self.input_fake_quant(x)

    def _quantized_output(self, y: Tensor) -> Tensor:
        return y if self.output_fake_quant is None else self.output_fake_quant(y)

    def extra_repr(self) -> str:
        return f"weight_shape={self.weight_shape}, bits={self.bits}, signed={self.signed}, bias={self.bias is not None}"


class QuantizedLinear(QuantizedLayer):
    """y = fq_out(fq_in(x) @ ((codes - zero_point) * scale)^T + bias) with stored codes ``[out_features, in_features]``.

    Shapes: x ``[..., in_features]`` -> ``[..., out_features]``. Dtype: x's (the weight is dequantized to it).
    Gradient: to x only.

    >>> layer = QuantizedLinear.from_quant(QuantLinear(4, 2, recipe="qat-w8a8-token"))
    >>> layer.weight_codes.dtype, layer.weight.dtype, layer(torch.ones(3, 4)).shape
    (torch.int8, torch.float32, torch.Size([3, 2]))
    """

    transposed = False  # whether the float layer's weight is [in_features, out_features]

    def __init__(
        self,
        layer: QuantLayer,
        *,
        check_observed: bool = True,
    ):
        super().__init__(layer, check_observed=check_observed)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.transposed = isinstance(layer, Transposed)

    def _from_rows(self, rows: Tensor) -> Tensor:
        return rows.t() if self.transposed else rows

    def forward(self, input: Tensor) -> Tensor:
        x = self._quantized_input(input)
        if self._multiplies_codes:
            return self._quantized_output(
                torch.ops.quantrain.int8_weight_mm(x, self.weight_codes, self.weight_scale, self.bias)
            )
        return self._quantized_output(F.linear(x, self.dequantized_weight(x.dtype), self._cast_bias(x)))

    @property
    def _multiplies_codes(self) -> bool:
        """Whether the input is as it comes, so that no simulation has to be met bit for bit: recipe w8a16."""
        per_row = self.weight_scale.numel() in (1, self.out_features)
        return self.input_fake_quant is None and self.signed and not self.packed and per_row


class QuantizedInt8Linear(QuantizedLinear):
    """y = fq_out(float(xq Wq^T) * weight_scale * x_scale + bias), an integer product (:func:`quantrain.int8_mm`):
    scheme ``int8``.

    xq and x_scale: :func:`quantrain.int8_quantize_rows` of x (dynamic, one scale per token), or
    :func:`quantrain.quantize` with the stored scale of ``input_fake_quant`` (static). What ``QuantizedLinear`` computes
    by dequantizing, within float32 rounding of the sum.

    Shapes: x ``[..., in_features]`` -> ``[..., out_features]``. Dtype: x's, under autocast the autocast type. No
    gradient. NaN in x makes its row NaN where the scale is dynamic; a stored scale cannot say so, and NaN becomes 0.

    >>> layer = quantized_layer(QuantLinear(4, 2, recipe="int8-static"), check_observed=False)
    >>> type(layer).__name__
    'QuantizedInt8Linear'
    """

    rounds_input_itself = True

    def forward(self, input: Tensor) -> Tensor:
        fake_quant = self.input_fake_quant
        if not fake_quant.fake_quant_enabled:
            return super().forward(input)
        if fake_quant.dynamic:
            codes, scale = torch.ops.quantrain.int8_quantize_rows.nearest(input)
        else:
            scale, low, high = fake_quant.scale, fake_quant.quant_min, fake_quant.quant_max
            codes = torch.ops.quantrain.quantize.nearest(input, scale, quant_min=low, quant_max=high)
        dtype = input.dtype
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
        y = torch.ops.quantrain.int8_mm.typed(
            codes, self.weight_codes, scale, self.weight_scale, self.bias, out_dtype=float_name("int8_mm", dtype)
        )
        return self._quantized_output(y)


class QuantizedConv1d(QuantizedLayer):
    """y = fq_out(conv1d(fq_in(x), (codes - zero_point) * scale) + bias) with stored codes ``[O, C / groups, k]``.

    Shapes: x ``[B, C, L]`` or ``[C, L]``. Dtype: x's. Gradient: to x only.
    """

    convolution = staticmethod(F.conv1d)

    def __init__(self, layer: QuantConv1d | QuantConv2d, *, check_observed: bool = True):
        super().__init__(layer, check_observed=check_observed)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, name, getattr(layer, name))
        self.padding_mode, self._reversed_padding = layer.padding_mode, layer._reversed_padding_repeated_twice

    def forward(self, input: Tensor) -> Tensor:
        x, padding = self._quantized_input(input), self.padding
        weight, bias = self.dequantized_weight(x.dtype), self._cast_bias(x)
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding, mode=self.padding_mode), 0
        y = self.convolution(x, weight, bias, self.stride, padding, self.dilation, self.groups)
        return self._quantized_output(y)


class QuantizedConv2d(QuantizedConv1d):
    """y = fq_out(conv2d(fq_in(x), (codes - zero_point) * scale) + bias) with stored codes ``[O, C / groups, kh, kw]``.

    Also what :class:`QuantConvBn2d` converts to, the batch norm folded into weight and bias.

    Shapes: x ``[B, C, H, W]`` or ``[C, H, W]``. Dtype: x's. Gradient: to x only.
    """

    convolution = staticmethod(F.conv2d)


class QuantizedConvTranspose2d(QuantizedLayer):
    """y = fq_out(conv_transpose2d(fq_in(x), (codes - zero_point) * scale) + bias) with stored codes
    ``[O, C / groups, kh, kw]``.

    Shapes: x ``[B, C, H, W]`` or ``[C, H, W]``; ``weight`` reads as ``[C, O / groups, kh, kw]``. Dtype: x's. Gradient:
    to x only.
    """

    def __init__(self, layer: QuantConvTranspose2d, *, check_observed: bool = True):
        super().__init__(layer, check_observed=check_observed)
        names = (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "output_padding",
            "dilation",
            "groups",
        )
        for name in names:
            setattr(self, name, getattr(layer, name))

    def _from_rows(self, rows: Tensor) -> Tensor:
        return transposed_from_rows(rows, self.groups)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        x = self._quantized_input(input)
        weight, bias = self._from_rows(self.dequantized_weight(x.dtype)), self._cast_bias(x)
        output_padding = nn.ConvTranspose2d._output_padding(
            self, input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        y = F.conv_transpose2d(x, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation)
        return self._quantized_output(y)


class QuantizedEmbedding(QuantizedLayer):
    """Rows of a stored integer table, dequantized after the gather: y = fq_out((codes[index] - zero_point) * scale).

    Shapes: index, any shape, int32 or int64 -> ``[*index.shape, embedding_dim]``. Dtype: that of the float table when
    it was converted, or as ``.to(dtype)`` sets it since. No gradient.
    """

    def __init__(self, layer: QuantEmbedding, *, check_observed: bool = True):
        super().__init__(layer, check_observed=check_observed)
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim

    def forward(self, input: Tensor) -> Tensor:
        rows = F.embedding(input, self.weight_codes)
        codes = self._unpacked(rows) if self.packed else rows
        scale, zero_point = gathered_qparams(input, self.weight_scale, self.weight_zero_point)
        return self._quantized_output(
            torch.ops.quantrain.dequantize.typed(
                codes, scale, zero_point, dtype=float_name("dequantize", self.weight_dtype)
            )
        )


_TWINS: Sequence[tuple[type[QuantLayer], type[QuantizedLayer]]] = (
    (QuantLinear, QuantizedLinear),
    (QuantTransposedLinear, QuantizedLinear),
    (QuantConv1d, QuantizedConv1d),
    (QuantConv2d, QuantizedConv2d),
    (QuantConvTranspose2d, QuantizedConvTranspose2d),
    (QuantEmbedding, QuantizedEmbedding),
)


def _name_codes(tensors: MutableMapping[str, Any], prefix: str = "") -> None:
    """Renames codes in ``tensors`` from ``weight``, their name in older files; a float ``weight`` is left to be refused."""
    old, new = f"{prefix}weight", f"{prefix}weight_codes"
    if new not in tensors and old in tensors and not tensors[old].is_floating_point():
        tensors[new] = tensors.pop(old)


def name_codes(model: nn.Module, tensors: MutableMapping[str, Any]) -> None:
    """Gives the codes of ``model``'s converted layers in the state dict ``tensors`` the name that they have now."""
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, QuantizedLayer):
            _name_codes(tensors, f"{name}." if name else "")


def check_convertible(layer: QuantLayer, name: str = "") -> FakeQuantize:
    """The layer's ``weight_fake_quant`` if its integers can be stored.

    Raises:
        ValueError: no weight spec, or more than 8 bits.
    """
    label = f"convert: layer '{name}'" if name else f"convert: {type(layer).__name__}"
    if layer.weight_fake_quant is None:
        raise ValueError(f"{label}: expected a recipe with a weight spec, got none")
    bits = layer.weight_fake_quant.spec.bits
    if bits > 8:
        raise ValueError(f"{label}: expected weights of at most 8 bits, got {bits}")
    return layer.weight_fake_quant


def quantized_layer(layer: nn.Module, *, check_observed: bool = True) -> QuantizedLayer:
    """The converted twin of a prepared layer.

    Raises:
        TypeError: another module.
        ValueError: as :meth:`QuantizedLayer.from_quant`.
    """
    twin = None
    if isinstance(layer, QuantLayer):
        twin = next((twin for kind, twin in _TWINS if isinstance(layer, kind)), None)
        twin = handler_of(layer.recipe).converted_class(layer, twin)
    if twin is None:
        raise TypeError(f"convert: expected a prepared layer, got {type(layer).__name__}")
    return with_hooks_of(layer, twin(layer, check_observed=check_observed))


def with_hooks_of(layer: nn.Module, converted: QuantizedLayer) -> QuantizedLayer:
    """Keeps the forward hooks that users put on the layer; those that computed its weight are done."""
    computing = {key for key, hook in layer._forward_pre_hooks.items() if computes_weight(hook)}
    for name in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        getattr(converted, name).update(getattr(layer, name))
    for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        kept = {key: hook for key, hook in getattr(layer, name).items() if key not in computing}
        getattr(converted, name).update(kept)
    return converted
