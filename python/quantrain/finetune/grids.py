"""What the histograms show: the values that meet a quantizer, measured in its codes, and the codes themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MAX_VALUES = 200_000  # a histogram of this many values has bins that are exact to well under a percent


@dataclass(frozen=True)
class Grid:
    """Values of one tensor of one layer in units of its quantizer's codes: ``value / scale + zero_point``, not rounded.

    Attributes:
        layer: The layer's name.
        tensor: ``"weight"`` or ``"input"``.
        codes: float32 ``[n]``, at most MAX_VALUES of the tensor's elements, evenly spaced.
        quant_min: The smallest code.
        quant_max: The largest code.
        scale: The step between codes where one scale serves the whole tensor, else None.
        zero_point: The code of 0.0 where one scale serves the whole tensor, else 0.
    """

    layer: str
    tensor: str
    codes: Tensor
    quant_min: int
    quant_max: int
    scale: float | None
    zero_point: int

    @property
    def bits(self) -> int:
        """The width of a code."""
        return round(math.log2(self.quant_max - self.quant_min + 1))

    @property
    def saturated(self) -> float:
        """The part of the values whose code lies outside the grid."""
        rounded = self.codes.round()
        return float(((rounded < self.quant_min) | (rounded > self.quant_max)).float().mean())


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a prepared model that fake-quantize their weight or their input, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "weight_fake_quant", None) is not None
        or getattr(module, "input_fake_quant", None) is not None
    }


def choose_layers(names: list[str], count: int) -> list[str]:
    """``count`` names spread evenly from the first to the last."""
    if len(names) <= count:
        return names
    return [names[round(place * (len(names) - 1) / (count - 1))] for place in range(count)]


def _in_codes(layer: str, tensor: str, values: Tensor, fake_quant: nn.Module) -> Grid:
    scale, zero_point = fake_quant.calculate_qparams(values)
    scale = scale.detach()
    one_scale = scale.numel() == 1
    codes = values.float() / _spread(scale, values.shape)
    if zero_point is not None:
        codes = codes + _spread(zero_point, values.shape)
    step = max(1, math.ceil(codes.numel() / MAX_VALUES))
    return Grid(
        layer=layer,
        tensor=tensor,
        codes=codes.flatten()[::step].cpu(),
        quant_min=fake_quant.quant_min,
        quant_max=fake_quant.quant_max,
        scale=float(scale) if one_scale else None,
        zero_point=int(zero_point) if one_scale and zero_point is not None else 0,
    )


def _spread(per_block: Tensor, shape: torch.Size) -> Tensor:
    """A tensor whose sizes divide ``shape``, repeated blockwise to it (one element broadcasts as it is)."""
    if per_block.numel() == 1:
        return per_block.reshape(())
    for dim, size in enumerate(shape):
        per_block = per_block.repeat_interleave(size // per_block.shape[dim], dim)
    return per_block


@torch.inference_mode()
def weight_grids(model: nn.Module, count: int = 3) -> list[Grid]:
    """Weights of ``count`` layers of a prepared model, spread from its first to its last."""
    model.eval()
    layers = {name: layer for name, layer in quantized_layers(model).items() if layer.weight_fake_quant is not None}
    grids = []
    for name in choose_layers(list(layers), count):
        layer = layers[name]
        grids.append(_in_codes(name, "weight", layer.weight_to_quantize(), layer.weight_fake_quant))
    return grids


@torch.inference_mode()
def input_grids(model: nn.Module, inputs: tuple[Tensor, ...], count: int = 3) -> list[Grid]:
    """What ``count`` layers of a prepared model get as input when it runs on ``inputs``."""
    model.eval()
    layers = {name: layer for name, layer in quantized_layers(model).items() if layer.input_fake_quant is not None}
    chosen = choose_layers(list(layers), count)
    grids: dict[str, Grid] = {}

    def keep(name: str):
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            grids[name] = _in_codes(name, "input", arguments[0], module)

        return hook

    handles = [layers[name].input_fake_quant.register_forward_pre_hook(keep(name)) for name in chosen]
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [grids[name] for name in chosen if name in grids]
