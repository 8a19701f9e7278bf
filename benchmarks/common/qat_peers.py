"""Quantization-aware training by other libraries, for a training step beside ours: what each makes of a float model.

Each quantizes the layers that ``quantrain.nn.prepare`` does: convolutions and linear layers, weight and input, not a
vision transformer's attention. None folds a batch norm into the weight before rounding it, but torch.ao.

    torchao    linear layers alone. Weight: int8 per channel or int4 per group of 32, symmetric, ranges taken anew in each
               step. Input: int8 per token, affine, range taken anew
    brevitas   weight: per channel, symmetric, range taken anew. Input: per tensor, symmetric, its scale a parameter that
               learns from its second step on (brevitas observes 300 steps first, by sorting, which is slower). At 4 bits the
               weight's scale learns too. Eager, without its BREVITAS_JIT, which builds C++ on import
    torch.ao   by torch.fx, "fbgemm", its default: weight int8 per channel, activations 7 bits of uint8 per tensor, moving
               average; batch norm folded, convolution, batch norm and ReLU as one module

Whatever is not installed is left out with a note:
``pip install --no-deps torchao==0.17.0 brevitas==0.13.4 dependencies==2.0.1 unfoldNd==0.2.3 packaging``.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Peer:
    """Another library's form of one of our recipes.

    Attributes:
        name: in rows, with the bits of weight and input.
        package: what must be installed.
        prepare: of a float model and an input of it, on one device; may change the model.
        weight_levels: how many values a weight's row may take, or its group of ``group``.
        input_levels: how many values an input may take, or one token of it.
        per_token: whether inputs have a scale for each token.
        group: elements of a weight under one scale; 0: a row.
        autocast: whether it runs under autocast.
    """

    name: str
    package: str
    prepare: Callable[[nn.Module, Tensor], nn.Module]
    weight_levels: int = 256
    input_levels: int = 256
    per_token: bool = False
    group: int = 0
    autocast: bool = True

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


def _replaced(model: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    for name, layer in list(model.named_modules()):
        new = make(layer) if type(layer) in (nn.Conv2d, nn.Linear) else None
        if new is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
    return model


# ---- torchao ---------------------------------------------------------------------------------------------------------


def _torchao(model: nn.Module, weight: torch.dtype, group: int) -> nn.Module:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    of_weight = {"group_size": group} if group else {"granularity": "per_channel"}
    config = QATConfig(
        activation_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        weight_config=IntxFakeQuantizeConfig(weight, is_symmetric=True, **of_weight),
        step="prepare",
    )
    quantize_(model, config, filter_fn=lambda layer, _: type(layer) is nn.Linear)
    return model


TORCHAO_W8 = Peer("torchao 8/8", "torchao", lambda model, _: _torchao(model, torch.int8, 0), per_token=True)
TORCHAO_W4 = Peer(
    "torchao 4/8", "torchao", lambda model, _: _torchao(model, torch.int4, 32), 16, per_token=True, group=32
)


# ---- brevitas --------------------------------------------------------------------------------------------------------


def _brevitas(model: nn.Module, bits: int) -> nn.Module:
    import brevitas.nn as bnn
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    class OfWeight(Int8WeightPerChannelFloat):
        bit_width = bits
        scaling_impl_type = ScalingImplType.STATS if bits == 8 else ScalingImplType.PARAMETER_FROM_STATS

    class OfInput(Int8ActPerTensorFloat):
        bit_width = bits
        collect_stats_steps = 1

    quantizers = {"weight_quant": OfWeight, "input_quant": OfInput, "return_quant_tensor": False}

    def quantized(layer: nn.Module) -> nn.Module:
        has_bias = layer.bias is not None
        if isinstance(layer, nn.Linear):
            new = bnn.QuantLinear(layer.in_features, layer.out_features, has_bias, **quantizers)
        else:
            window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
            new = bnn.QuantConv2d(layer.in_channels, layer.out_channels, *window, bias=has_bias, **quantizers)
        new.to(layer.weight.device)
        new.weight = layer.weight
        if has_bias:
            new.bias = layer.bias
        return new

    return _replaced(model, quantized)


BREVITAS_W8 = Peer("brevitas 8/8", "brevitas", lambda model, _: _brevitas(model, 8))
BREVITAS_W4 = Peer("brevitas 4/4", "brevitas", lambda model, _: _brevitas(model, 4), 16, 16)


# ---- torch.ao --------------------------------------------------------------------------------------------------------


def _torch_ao(model: nn.Module, x: Tensor) -> nn.Module:
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("fbgemm"), (x,))


# "expected scalar type Float but found BFloat16" under autocast, of its fused observer
TORCH_AO = Peer("torch.ao 8/7", "torch.ao.quantization", _torch_ao, autocast=False)

_CONVOLUTIONS = {"qat-w8a8": (TORCH_AO, BREVITAS_W8), "qat-w4a4": (BREVITAS_W4,)}
_LLAMA = {"qat-w8a8-token": (TORCHAO_W8,), "qat-w4a8": (TORCHAO_W4,)}
PEERS = {  # model -> our recipe -> what stands beside it
    "resnet18": _CONVOLUTIONS,
    "resnet20": _CONVOLUTIONS,
    "resnet50": _CONVOLUTIONS,
    "mobilenet_v2": _CONVOLUTIONS,
    "efficientnet_b0": _CONVOLUTIONS,
    "convnext_tiny": {"qat-w8a8": (BREVITAS_W8,)},
    "vit_b_16": {"qat-w8a8": (BREVITAS_W8,), "qat-w4a8": (TORCHAO_W4,)},
    "llama": _LLAMA,
    "llama-tiny": _LLAMA,
}


# ---- that they round -------------------------------------------------------------------------------------------------


class _Products(TorchFunctionMode):
    """Looks at the operands of every convolution and linear product: how many of those that hold more values than a grid
    has levels, and so can tell, keep to so many values.
    """

    CALLS = (torch.nn.functional.linear, torch.conv2d, torch.nn.functional.conv2d)

    def __init__(self, peer: Peer) -> None:
        super().__init__()
        self.peer, self.products = peer, 0
        self.rounded, self.telling = [0, 0], [0, 0]  # weights, inputs

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.CALLS:
            kwargs = kwargs or {}
            operands = [*args[:2], *(kwargs[key] for key in ("input", "weight") if key in kwargs)]
            with torch._C.DisableTorchFunction():
                x, weight = (getattr(operand, "value", operand).detach() for operand in operands)  # of a QuantTensor
                self.products += 1
                self._count(0, self._blocks_of(weight), self.peer.weight_levels)
                self._count(1, x.flatten(0, -2)[:4] if self.peer.per_token else [x], self.peer.input_levels)
        return function(*args, **(kwargs or {}))

    def _blocks_of(self, weight: Tensor) -> Tensor:
        """What has a scale of its own, of the first rows."""
        rows, group = weight[:4].flatten(1), self.peer.group
        return rows.reshape(-1, group) if group and rows.size(1) % group == 0 else rows

    def _count(self, operand: int, blocks: Iterable[Tensor], levels: int) -> None:
        tells = all(block.numel() > levels for block in blocks)
        self.telling[operand] += tells
        self.rounded[operand] += tells and all(len(block.unique()) <= levels for block in blocks)


def products_that_round(peer: Peer, run: Callable[[], object]) -> str:
    """Of how many products of ``run`` weight and input are rounded: their values are counted.

    Raises:
        AssertionError: fewer than nine in ten of either.
    """
    with _Products(peer) as found:
        run()
    (weights, inputs), (of_weights, of_inputs) = found.rounded, found.telling
    line = (
        f"{found.products} products; of those large enough to tell, {weights} of {of_weights} weights and "
        f"{inputs} of {of_inputs} inputs are rounded"
    )
    for rounded, telling in zip(found.rounded, found.telling, strict=True):
        assert telling and rounded >= 0.9 * telling, f"expected {peer.name} to round what it multiplies, got {line}"
    return line


def prepared_by(peer: Peer, model: nn.Module, x: Tensor) -> nn.Module:
    """The float model as the peer quantizes it, in training mode; ``model`` is copied where the peer traces it."""
    return peer.prepare(copy.deepcopy(model) if peer is TORCH_AO else model, x).train()
