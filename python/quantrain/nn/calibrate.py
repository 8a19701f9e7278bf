"""Calibration, and the switches that hold for a whole model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .fake_quantize import FakeQuantize
from .fixed_point import begin_calibration, end_calibration, has_fixed_point
from .layers import QuantLayer

__all__ = ["calibrate", "calibration", "enable_fake_quant", "enable_gradient_quant", "enable_observer"]


def fake_quants(model: nn.Module) -> list[FakeQuantize]:
    """Every FakeQuantize of ``model``, once each."""
    return [module for module in model.modules() if isinstance(module, FakeQuantize)]


def enable_observer(model: nn.Module, enabled: bool = True) -> None:
    """Turns every observer of ``model`` on or off; off freezes the ranges.

    >>> enable_observer(nn.Sequential(), False)
    """
    for fake_quant in fake_quants(model):
        fake_quant.enable_observer(enabled)


def enable_fake_quant(model: nn.Module, enabled: bool = True) -> None:
    """Turns every fake-quantisation of ``model`` on or off; off, the model computes in floating point.

    >>> enable_fake_quant(nn.Sequential(), False)
    """
    for fake_quant in fake_quants(model):
        fake_quant.enable_fake_quant(enabled)


def enable_gradient_quant(model: nn.Module, enabled: bool = True) -> None:
    """Turns the quantisation of gradients in every layer of ``model`` on or off; off, the gradients are those of QAT.

    >>> enable_gradient_quant(nn.Sequential(), False)
    """
    for module in model.modules():
        if isinstance(module, QuantLayer):
            module.enable_gradient_quant(enabled)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` in eval mode; afterwards each module's mode is what it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def calibration(model: nn.Module) -> Iterator[nn.Module]:
    """Within it, forward passes set ranges: eval mode, no gradients, observers on, fake-quantisation off.

    Afterwards the modes are what they were, every observer is off and every fake-quantisation on, so that fine-tuning
    starts from fixed ranges (or learned scales). ``enable_observer(model)`` lets moving averages go on in training.
    If the block raises, the switches too are what they were.

    >>> import quantrain.nn as qnn
    >>> model = qnn.QuantLinear(4, 2, recipe="qat-w8a8")
    >>> with calibration(model):
    ...     _ = model(torch.randn(8, 4))
    >>> model.input_fake_quant.ready
    True
    """
    quants = fake_quants(model)
    switches = [(quant.observer_enabled, quant.fake_quant_enabled) for quant in quants]
    for quant in quants:
        quant.observer_enabled, quant.fake_quant_enabled, quant.calibrating = True, False, True
    begin_calibration(model)
    done = False
    try:
        with evaluating(model), torch.no_grad():
            yield model
        switches, done = [(False, True)] * len(quants), True
    finally:
        end_calibration(model, keep=done)
        for quant, (observing, quantizing) in zip(quants, switches, strict=True):
            quant.observer_enabled, quant.fake_quant_enabled, quant.calibrating = observing, quantizing, False


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int | None = None,
) -> nn.Module:
    """Sets the ranges of a prepared model from ``batches``; see :func:`calibration` for the state before and after.

    Args:
        model: a prepared model; its weights and batch-norm statistics stay as they are.
        batches: what ``forward`` takes, e.g. a DataLoader.
        forward: called as ``forward(model, batch)``; by default ``model(batch)`` for a tensor, ``model(*batch)`` for a
            tuple or list, ``model(**batch)`` for a mapping. For (image, label) pairs: ``lambda m, b: m(b[0])``.
        max_batches: stop after so many.

    Returns:
        The model.

    Raises:
        ValueError: a model without fake-quantisers or fixed-point activations, no batch at all, or a non-finite batch under ``nan_policy="raise"``.

    >>> import quantrain.nn as qnn
    >>> model = qnn.prepare(nn.Sequential(nn.Linear(4, 2)), "ptq-w8a8")
    >>> _ = calibrate(model, [torch.randn(8, 4) for _ in range(3)])
    """
    if not fake_quants(model) and not has_fixed_point(model):
        raise ValueError("calibrate: expected a prepared model, got one without a FakeQuantize")
    forward = forward or run_batch
    count = 0
    with calibration(model):
        for batch in itertools.islice(batches, max_batches):
            forward(model, batch)
            count += 1
        if count == 0:
            raise ValueError("calibrate: expected at least one batch, got none")
    return model


def run_batch(model: nn.Module, batch: Any) -> Any:
    """``model`` called with a tensor, a tuple or list of arguments, or a mapping of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)
