"""What quantization changed in a model: predictions, layers, bytes, times."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantrain import _C
from quantrain.nn import Linear4bit, QuantizedInt8Linear, QuantizedLayer, QuantizedPtqLinear
from quantrain.nn.calibrate import evaluating, run_batch
from quantrain.nn.schemes import handler_of
from quantrain.tables import Table

__all__ = ["QuantizationReport", "divergence", "log_probabilities", "quantization_report"]

_FLOAT_BYTES = 2  # of a weight in 16 bits


class QuantizationReport(Table):
    """Rows of :func:`quantization_report`.

    Attributes:
        kl: mean over positions of KL(float || quantized), nats; None without a reference.
        top1: share of positions whose likeliest class is the same; None without a reference.
        total: sums of ``bytes`` and ``float_bytes``.
        absmax: layer -> the largest magnitudes of its input's columns in calibration, float32 ``[K]``.
    """

    def __init__(self, rows: list[dict[str, Any]], kl: float | None, top1: float | None, absmax: dict[str, Tensor]):
        self.kl, self.top1, self.absmax = kl, top1, absmax
        self.total = {key: sum(row[key] for row in rows) for key in ("bytes", "float_bytes")}
        columns = {
            "layer": "layer",
            "type": "type",
            "weight": "weight",
            "input": "input",
            "product": "product",
            "error": "output error",
            "ms": "ms",
            "bytes": "bytes",
        }
        ratio = self.total["float_bytes"] / max(self.total["bytes"], 1)
        notes = [
            f"total: {self.total['bytes']:,} bytes, {self.total['float_bytes']:,} in 16 bits ({ratio:.2f}x); "
            "output error: relative, of the layer alone"
        ]
        if kl is not None:
            notes.append(f"against the float model: KL {kl:.5f} nats, the same likeliest class at {100 * top1:.1f} %")
        super().__init__(columns, rows, notes=notes)


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    if isinstance(logits, (tuple, list)):
        logits = logits[0]
    if isinstance(logits, Mapping):
        logits = next(iter(logits.values()))
    if not isinstance(logits, Tensor):
        raise TypeError(f"quantization_report: expected logits from the model, got {type(logits).__name__}")
    return logits


@torch.no_grad()
def log_probabilities(
    model: nn.Module, batch: Any, *, forward: Callable[[nn.Module, Any], Any] | None = None
) -> Tensor:
    """The model's log-probabilities on a batch, in evaluation: float32 ``[positions, classes]``, padding left out.

    Args:
        batch: as :func:`quantrain.nn.calibrate` takes it. Where it is a mapping with ``attention_mask`` and the logits
            are of every position, masked positions do not count.
        forward: called as ``forward(model, batch)``; gives the logits, or an object that has them.
    """
    with evaluating(model):
        logits = _logits((forward or run_batch)(model, batch)).float()
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and logits.shape[:-1] == mask.shape:
        logits = logits[mask.bool()]
    return torch.log_softmax(logits.reshape(-1, logits.shape[-1]), -1)


def divergence(exact: Tensor, found: Tensor) -> tuple[float, float]:
    """Mean KL(exact || found) in nats, and the share of rows whose largest entry is the same; of log-probabilities.

    >>> divergence(torch.log_softmax(torch.eye(3), -1), torch.log_softmax(torch.eye(3), -1))
    (0.0, 1.0)
    """
    kl, same = 0.0, 0
    for a, b in zip(exact.split(1024), found.split(1024), strict=True):
        kl += float((a.exp() * (a - b)).double().sum())
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
    return max(kl, 0.0) / max(len(exact), 1), same / max(len(exact), 1)


def quantization_report(
    model: nn.Module,
    batch: Any,
    reference: nn.Module | Tensor | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> QuantizationReport:
    """What a converted model's layers are, and how far its predictions are from the float model's on one batch.

    Args:
        model: converted.
        batch: as :func:`quantrain.nn.calibrate` takes it.
        reference: the float model, or its :func:`log_probabilities` on the batch.
        forward: called as ``forward(model, batch)``; gives logits, or an object that has them.

    Returns:
        A table; ``rows`` is a list of dicts: ``layer``, ``type``, ``weight``, ``input``, ``product`` (what multiplies),
        ``error`` (of GPTQ and AWQ: of the layer's output on the calibration data, relative, root mean square; None where
        nothing measured it), ``ms`` (of the layer's calls in this one pass, on CUDA of the device), ``bytes``, ``float_bytes`` (in 16 bits). ``kl`` and ``top1``: see
        :class:`QuantizationReport`.

    Raises:
        ValueError: a model without converted layers.

    >>> import quantrain.nn as qnn
    >>> model = qnn.convert(qnn.prepare(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), "zeroquant-w8a8"))
    >>> quantization_report(model, torch.randn(3, 8)).rows[0]["weight"]
    'int8 per channel'
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    recipe = getattr(getattr(model, "quantization_summary", None), "recipe", None)
    if not layers and (recipe is None or not handler_of(recipe).leaves_layers(recipe)):
        raise ValueError("quantization_report: expected a converted model, got one without converted layers")
    found, times = _timed(model, batch, forward, layers)
    kl = top1 = None
    if reference is not None:
        exact = reference if isinstance(reference, Tensor) else log_probabilities(reference, batch, forward=forward)
        kl, top1 = divergence(exact, found)
    rows = [_row(name, layer, times.get(name)) for name, layer in layers.items()]
    absmax = {
        name: layer.input_absmax for name, layer in layers.items() if getattr(layer, "input_absmax", None) is not None
    }
    return QuantizationReport(rows, kl, top1, absmax)


def _timed(
    model: nn.Module, batch: Any, forward: Callable | None, layers: Mapping[str, nn.Module]
) -> tuple[Tensor, dict[str, float]]:
    """The log-probabilities, and milliseconds of each layer's calls."""
    marks: dict[str, list] = defaultdict(list)
    cuda = any(buffer.is_cuda for layer in layers.values() for buffer in layer.buffers())

    def mark(name: str) -> None:
        if cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks[name].append(event)
        else:
            marks[name].append(time.perf_counter())

    handles = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(lambda m, args, name=name: mark(name)))
        handles.append(layer.register_forward_hook(lambda m, args, y, name=name: mark(name)))
    try:
        found = log_probabilities(model, batch, forward=forward)
    finally:
        for handle in handles:
            handle.remove()
    if cuda:
        torch.cuda.synchronize()
        spent = {
            name: sum(a.elapsed_time(b) for a, b in zip(m[::2], m[1::2], strict=True)) for name, m in marks.items()
        }
    else:
        spent = {name: 1e3 * (sum(m[1::2]) - sum(m[::2])) for name, m in marks.items()}
    return found, spent


def _row(name: str, layer: QuantizedLayer, ms: float | None) -> dict[str, Any]:
    held = sum(t.numel() * t.element_size() for t in layer.buffers())
    weight = 1
    for size in layer.weight_shape:
        weight *= size
    bias = 0 if layer.bias is None else layer.bias.numel()
    error = getattr(layer, "error", 0.0)
    return {
        "layer": name or "(model)",
        "type": type(layer).__name__,
        "weight": _weight_text(layer),
        "input": _input_text(layer),
        "product": _product_text(layer),
        "error": error**0.5 if error else None,
        "ms": ms,
        "bytes": held,
        "float_bytes": _FLOAT_BYTES * (weight + bias),
    }


def _weight_text(layer: QuantizedLayer) -> str:
    if isinstance(layer, Linear4bit):
        return f"{layer.format} blocks of {layer.block_size}"
    group = getattr(layer, "group_size", 0)
    text = f"int{layer.bits} " + (f"groups of {group}" if group else "per channel")
    if getattr(layer, "outlier_scale", None) is not None:
        text += f", {layer.outlier_columns.numel()} columns at 8 bits"
    return text


def _input_text(layer: QuantizedLayer) -> str:
    spec = layer.recipe.input
    if spec is None:
        return "float"
    text = f"int{spec.bits} {spec.granularity.replace('_', ' ')}"
    if isinstance(layer, QuantizedPtqLinear) and layer.bits == 8:
        scheme = layer.recipe.scheme
        if scheme.outlier_threshold:
            text += f", columns above {scheme.outlier_threshold:g} at 15 bits"
        elif layer.outlier_columns is not None:
            text += f", {layer.outlier_columns.numel()} columns at 15 bits"
    return text


def _product_text(layer: QuantizedLayer) -> str:
    if isinstance(layer, Linear4bit):
        return "linear_4bit"
    if isinstance(layer, QuantizedInt8Linear):
        return "int8_mm"
    if not isinstance(layer, QuantizedPtqLinear):
        return "float"
    product = layer.product
    if layer.bits < 8:
        return "linear_4bit, method int8" if product["quantize_input"] else "linear_4bit"
    if not product["quantize_input"]:
        return "int8_weight_mm"
    outliers = layer.outlier_columns is not None or product["outlier_threshold"]
    main = "int8_mm_outliers" if outliers else "int8_mm"
    rows = _C.PTQ_FEW_ROWS[layer.weight_codes.device.type == "cpu"]
    return f"{main}; int8_weight_mm up to {rows} rows" if product["few_rows_float"] else main
