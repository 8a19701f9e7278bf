"""How large a model is, and how much quantization changes it: one table each."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantrain.tables import Table

from .calibrate import enable_fake_quant, evaluating, fake_quants, keeping_fake_quant, run_batch
from .fake_quantize import FakeQuantize
from .layers import QuantLayer
from .quantized import QuantizedLayer, kPackedBits

__all__ = ["ErrorTable", "SizeTable", "model_size", "quantization_error"]


class SizeTable(Table):
    """Rows of :func:`model_size`; ``total`` sums them and holds ``float32_bytes``."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.total = {key: sum(row[key] for row in rows) for key in ("elements", "bytes", "converted_bytes")}
        self.total["float32_bytes"] = 4 * self.total["elements"]
        columns = {
            "layer": "layer",
            "type": "type",
            "bits": "bits",
            "elements": "elements",
            "bytes": "bytes",
            "converted_bytes": "converted",
        }
        ratio = self.total["float32_bytes"] / max(self.total["converted_bytes"], 1)
        note = (
            f"total: {self.total['elements']:,} elements, {self.total['bytes']:,} bytes as held, "
            f"{self.total['converted_bytes']:,} converted, {self.total['float32_bytes']:,} in float32 ({ratio:.2f}x)"
        )
        super().__init__(columns, rows, notes=[note])


class ErrorTable(Table):
    """Rows of :func:`quantization_error`."""

    def __init__(self, rows: list[dict[str, Any]]):
        columns = {
            "layer": "layer",
            "type": "type",
            "weight_bits": "weight bits",
            "weight_sqnr_db": "SQNR dB",
            "weight_saturation_pct": "saturated %",
            "input_bits": "input bits",
            "input_sqnr_db": "SQNR dB",
            "input_saturation_pct": "saturated %",
            "output_sqnr_db": "output SQNR dB",
        }
        super().__init__(columns, rows)


def model_size(model: nn.Module) -> SizeTable:
    """Bytes of every layer of a float, prepared or converted model.

    Returns:
        A table; ``rows`` is a list of dicts with ``layer``, ``type``, ``bits`` (of the weight as quantized, else of its
        dtype), ``elements`` (weights, biases, statistics; quantization state not counted), ``bytes`` (as held now: a
        prepared layer holds float weights, scales and ranges) and ``converted_bytes`` (after ``convert``: codes, two
        per byte at 4 bits and fewer, scales, float32 bias). ``total`` holds their sums and ``float32_bytes`` = 4 *
        elements. Tied tensors count once, at the first layer that holds them.

    >>> print(model_size(nn.Sequential(nn.Linear(4, 2))))
    layer  type    bits  elements  bytes  converted
    0      Linear    32        10     40         40
    total: 10 elements, 40 bytes as held, 40 converted, 40 in float32 (1.00x)
    """
    seen: set[int] = set()
    inside: set[int] = set()
    rows = []
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        whole = isinstance(module, (QuantLayer, QuantizedLayer))
        if whole:
            inside.update(id(child) for child in module.modules())
        tensors = [t for t in _tensors(module, recurse=whole) if id(t) not in seen]
        fresh_weight = not isinstance(module, QuantLayer) or id(module.weight) not in seen
        seen.update(id(t) for t in tensors)
        if tensors:
            rows.append(_size_row(name, module, tensors, fresh_weight))
    return SizeTable(rows)


def _tensors(module: nn.Module, recurse: bool) -> list[Tensor]:
    return [*module.parameters(recurse=recurse), *module.buffers(recurse=recurse)]


def _size_row(name: str, module: nn.Module, tensors: list[Tensor], fresh_weight: bool) -> dict[str, Any]:
    held = sum(t.numel() * t.element_size() for t in tensors)
    row = {"layer": name or "(model)", "type": type(module).__name__, "bytes": held, "converted_bytes": held}
    if isinstance(module, QuantizedLayer):
        row["bits"] = module.bits
        row["elements"] = math.prod(module.weight_shape) + (0 if module.bias is None else module.bias.numel())
    elif isinstance(module, QuantLayer):
        state = sum(t.numel() for fq in fake_quants(module) for t in _tensors(fq, recurse=True))
        row["elements"] = sum(t.numel() for t in tensors) - state
        row["bits"] = (
            module.weight_fake_quant.spec.bits if module.weight_fake_quant else 8 * module.weight.element_size()
        )
        if module.weight_fake_quant is not None and module.weight_fake_quant.spec.bits <= 8:
            row["converted_bytes"] = _converted_bytes(module, fresh_weight)
    else:
        row["elements"] = sum(t.numel() for t in tensors)
        row["bits"] = 8 * max(tensors, key=Tensor.numel).element_size()
    return row


def _converted_bytes(layer: QuantLayer, fresh_weight: bool) -> int:
    """What the layer's twin will hold; a tied weight is stored by each layer that quantizes it."""
    weight, spec = layer.weight, layer.weight_fake_quant.spec
    channels = layer.rows(weight).shape[0]
    row = weight.numel() // max(channels, 1)
    codes = channels * ((row + 1) // 2) if spec.bits <= kPackedBits else weight.numel()
    scales = math.prod(layer.weight_fake_quant.scale_shape) * (4 if spec.symmetric else 8)
    bias = layer.bias_to_store()
    total = codes + scales + (0 if bias is None else 4 * bias.numel())
    for fake_quant in (layer.input_fake_quant, layer.output_fake_quant):
        if fake_quant is not None and not fake_quant.dynamic:
            total += math.prod(fake_quant.scale_shape) * (4 if fake_quant.symmetric else 8)
    return total


def _to_blocks(x: Tensor, scale_shape: Sequence[int]) -> Tensor:
    """``x`` as a matrix [number of scales, elements per scale], row i being the block of scale element i (row-major).

    Args:
        x: any tensor.
        scale_shape: one element of any rank, or the rank of ``x`` with sizes that divide its sizes.
    """
    if math.prod(scale_shape) == 1:
        return x.reshape(1, -1)
    split = [size for s, n in zip(scale_shape, x.shape, strict=True) for size in (s, n // s)]
    order = [*range(0, 2 * x.dim(), 2), *range(1, 2 * x.dim(), 2)]
    return x.reshape(split).permute(order).reshape(math.prod(scale_shape), -1)


@dataclass
class _Error:
    """Sums over one tensor or many: signal and noise power, and how many elements saturated."""

    signal: float = 0.0
    noise: float = 0.0
    saturated: int = 0
    elements: int = 0

    def add(self, exact: Tensor, rounded: Tensor) -> None:
        self.signal += float(exact.float().square().sum(dtype=torch.float64))
        self.noise += float((exact.float() - rounded.float()).square().sum(dtype=torch.float64))
        self.elements += exact.numel()

    def add_saturation(self, x: Tensor, fake_quant: FakeQuantize) -> None:
        scale, zero_point = fake_quant.calculate_qparams(x)
        codes = torch.round(_to_blocks(x, scale.shape).float() * (1 / scale).reshape(-1, 1))
        if zero_point is not None:
            codes = codes + zero_point.reshape(-1, 1)
        self.saturated += int(((codes < fake_quant.quant_min) | (codes > fake_quant.quant_max)).sum())

    @property
    def sqnr_db(self) -> float | None:
        if self.elements == 0 or self.signal == 0:
            return None
        return math.inf if self.noise == 0 else 10 * math.log10(self.signal / self.noise)

    @property
    def saturation_pct(self) -> float | None:
        return 100 * self.saturated / self.elements if self.elements else None


@torch.no_grad()
def quantization_error(
    model: nn.Module, batch: Any, *, forward: Callable[[nn.Module, Any], Any] | None = None
) -> ErrorTable:
    """What quantization costs on one batch, layer by layer, with the model in eval mode; the model is left as it was.

    Signal-to-quantization-noise ratio: SQNR = 10 log10(sum x^2 / sum (x - q(x))^2) in dB, about 6 dB per bit, more is
    better; saturation: percent of elements whose code was clamped.

    Args:
        model: prepared, with ranges observed; or converted (then only the inputs can be compared).
        batch: one input, as :func:`calibrate` takes it.
        forward: called as ``forward(model, batch)``.

    Returns:
        A table; ``rows`` is a list of dicts with ``layer``, ``type``, and, None where the layer has no such tensor:
        ``weight_bits``, ``weight_sqnr_db``, ``weight_saturation_pct``, ``input_bits``, ``input_sqnr_db``,
        ``input_saturation_pct``, and ``output_sqnr_db``: the layer's output in the quantized model against the float
        model. Every layer's float output is held at once.

    Raises:
        ValueError: no quantized layer, or a range that was never observed.

    >>> import quantrain.nn as qnn
    >>> model = qnn.prepare(nn.Sequential(nn.Linear(4, 2)), "qat-w8a8-token")
    >>> quantization_error(model, torch.randn(8, 4)).rows[0]["weight_sqnr_db"] > 30
    True
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (QuantLayer, QuantizedLayer))}
    if not layers:
        raise ValueError("quantization_error: expected a prepared or converted model, got one without quantized layers")
    forward = forward or run_batch
    prepared = {name: layer for name, layer in layers.items() if isinstance(layer, QuantLayer)}
    inputs: dict[str, _Error] = defaultdict(_Error)
    outputs: dict[str, _Error] = defaultdict(_Error)
    with keeping_fake_quant(model), evaluating(model):
        exact = _float_outputs(model, prepared, lambda: forward(model, batch))
        _quantized_pass(model, layers, exact, inputs, outputs, lambda: forward(model, batch))
        rows = [_error_row(name, layer, inputs[name], outputs[name]) for name, layer in layers.items()]
    return ErrorTable(rows)


def _float_outputs(model: nn.Module, layers: dict[str, QuantLayer], run: Callable[[], Any]) -> dict[str, list[Tensor]]:
    """The output of every call of every layer with fake-quantization off, in order of call."""
    if not layers:
        return {}
    exact: dict[str, list[Tensor]] = defaultdict(list)
    enable_fake_quant(model, False)
    handles = [
        layer.register_forward_hook(lambda module, args, y, name=name: exact[name].append(y))
        for name, layer in layers.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return exact


def _quantized_pass(
    model: nn.Module,
    layers: dict[str, nn.Module],
    exact: dict[str, list[Tensor]],
    inputs: dict[str, _Error],
    outputs: dict[str, _Error],
    run: Callable[[], Any],
) -> None:
    """Sums the error of every layer's input (against itself before rounding) and output (against ``exact``)."""
    enable_fake_quant(model, True)

    def on_input(fake_quant: FakeQuantize, args: tuple, y: Tensor, name: str) -> None:
        inputs[name].add(args[0], y)
        inputs[name].add_saturation(args[0], fake_quant)

    def on_output(layer: nn.Module, args: tuple, y: Tensor, name: str) -> None:
        if exact.get(name):
            outputs[name].add(exact[name].pop(0), y)

    handles = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_hook(lambda m, args, y, name=name: on_output(m, args, y, name)))
        if layer.rounds_input_itself:
            hook = layer.register_forward_pre_hook
            handles.append(
                hook(lambda m, args, name=name: on_input(m.input_fake_quant, args, m.input_fake_quant(args[0]), name))
            )
        elif layer.input_fake_quant is not None:
            hook = layer.input_fake_quant.register_forward_hook
            handles.append(hook(lambda m, args, y, name=name: on_input(m, args, y, name)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()


def _error_row(name: str, layer: nn.Module, input: _Error, output: _Error) -> dict[str, Any]:
    weight, bits = _Error(), getattr(layer, "bits", None)
    fake_quant = getattr(layer, "weight_fake_quant", None)
    if fake_quant is not None:
        exact = layer.weight_to_quantize()
        weight.add(exact, fake_quant(exact))
        weight.add_saturation(exact, fake_quant)
        bits = fake_quant.spec.bits
    return {
        "layer": name or "(model)",
        "type": type(layer).__name__,
        "weight_bits": bits,
        "weight_sqnr_db": weight.sqnr_db,
        "weight_saturation_pct": weight.saturation_pct,
        "input_bits": layer.input_fake_quant.spec.bits if layer.input_fake_quant is not None else None,
        "input_sqnr_db": input.sqnr_db,
        "input_saturation_pct": input.saturation_pct,
        "output_sqnr_db": output.sqnr_db,
    }
