"""Calibration, and the switches that hold for a whole model."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .calibrates import Calibrates
from .fake_quantize import FakeQuantize
from .layers import QuantLayer
from .schemes import handler_of, handlers

__all__ = [
    "CalibrationReport",
    "calibrate",
    "calibration",
    "enable_fake_quant",
    "enable_gradient_quant",
    "enable_observer",
]

_MEASURED_BATCHES = 4  # the losses before and after are means over the first ones


def fake_quants(model: nn.Module) -> list[FakeQuantize]:
    """Every FakeQuantize of ``model``, once each."""
    return [module for module in model.modules() if isinstance(module, FakeQuantize)]


def calibrating_modules(model: nn.Module) -> list[Calibrates]:
    """Every module of ``model`` that rounds or that calibration changes, once each."""
    return [module for module in model.modules() if isinstance(module, Calibrates)]


def enable_observer(model: nn.Module, enabled: bool = True) -> None:
    """Turns every observer of ``model`` on or off; off freezes the ranges, for the last part of training.

    On, they follow training again; learned scales, which belong to the optimizer once they have a first value, do not.

    >>> enable_observer(nn.Sequential(), False)
    """
    for module in calibrating_modules(model):
        module.enable_observer(enabled)


def enable_fake_quant(model: nn.Module, enabled: bool = True) -> None:
    """Turns every fake-quantization of ``model`` on or off; off, the model computes in floating point.

    >>> enable_fake_quant(nn.Sequential(), False)
    """
    for module in calibrating_modules(model):
        module.enable_fake_quant(enabled)


def enable_gradient_quant(model: nn.Module, enabled: bool = True) -> None:
    """Turns the quantization of gradients in every layer of ``model`` on or off; off, the gradients are those of QAT.

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
def keeping_fake_quant(model: nn.Module) -> Iterator[nn.Module]:
    """Afterwards each fake-quantizer of ``model`` rounds, or does not, as before."""
    switches = [(fake_quant, fake_quant.fake_quant_enabled) for fake_quant in fake_quants(model)]
    try:
        yield model
    finally:
        for fake_quant, enabled in switches:
            fake_quant.enable_fake_quant(enabled)


def check_batches(op: str, batches: object) -> None:
    if isinstance(batches, (torch.Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{op}: expected batches to be an iterable of batches, got one {type(batches).__name__} (a list of one is fine)"
        )


def measured_and_all(op: str, batches: Iterable[Any], steps: int) -> tuple[list[Any], Iterator[Any]]:
    """The batches to measure a training's losses with, before and after, and as many as are asked for."""
    check_batches(op, batches)
    if isinstance(batches, Iterator):  # read once, so what is read is kept
        batches = list(itertools.islice(batches, steps))
    measured = list(itertools.islice(batches, min(steps, _MEASURED_BATCHES)))
    if not measured:
        raise ValueError(f"{op}: expected at least one batch, got none")
    return measured, itertools.chain.from_iterable(itertools.repeat(batches))


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration missed: names of fake-quantizers (``layer.input_fake_quant``) and fixed-point activations.

    Attributes:
        unreached: No tensor came by: a layer that is not called as a module, an expert or a head that no batch used.
            Evaluation raises there.
        only_zeros: Only tensors of zeros came by. Evaluation keeps zeros as they are, and rounds others to whole
            numbers.
    """

    unreached: tuple[str, ...] = ()
    only_zeros: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.unreached or self.only_zeros)

    def __str__(self) -> str:
        parts = []
        for names, what in ((self.unreached, "never reached"), (self.only_zeros, "seen only as zeros")):
            if names:
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                parts.append(f"{what}: {', '.join(names[:8])}{more}")
        return "; ".join(parts) or "every range was seen"


@contextmanager
def calibration(model: nn.Module) -> Iterator[nn.Module]:
    """Within it, forward passes set ranges: eval mode, no gradients, observers on, fake-quantization off.

    Afterwards modes and switches are what they were: in training the ranges go on following the tensors (learned scales
    belong to the optimizer) until ``enable_observer(model, False)`` freezes them. Layers whose recipe is not for
    training (``ptq-...``, ``int8-static``) have their ranges frozen here, except those that saw nothing or only zeros.
    If the block raises, ranges and scales are restored too.

    At the end ``model.calibration_report`` (:class:`CalibrationReport`) names what no batch reached. Under
    ``torch.distributed`` the ranks then agree on the widest of their ranges, so each must calibrate.

    Warns:
        UserWarning: a batch norm that has not seen a batch: the ranges behind it are those of an untrained network; a
            fake-quantizer that was not reached or saw only zeros.

    >>> import quantrain.nn as qnn
    >>> model = qnn.QuantLinear(4, 2, recipe="qat-w8a8")
    >>> with calibration(model):
    ...     _ = model(torch.randn(8, 4))
    >>> model.input_fake_quant.ready
    True
    """
    _warn_of_fresh_batch_norms(model)
    modules = calibrating_modules(model)
    switches = [(module, module.fake_quant_enabled) for module in modules]
    for module in modules:
        module.enable_fake_quant(False)
        module.begin_calibration()
    done = False
    try:
        with evaluating(model), torch.no_grad():
            yield model
            _observe_weights(model)
            for module in modules:
                module.agree()
        done = True
    finally:
        for module, rounds in switches:
            module.enable_fake_quant(rounds)
        for module in sorted(modules, key=lambda module: module.end_order):
            module.end_calibration(done)
    _freeze_for_inference(model)
    for handler in handlers():
        if handler.is_prepared(model):
            handler.calibrated(model)
    model.calibration_report = _report(model)
    if model.calibration_report:
        warnings.warn(f"calibrate: {model.calibration_report}", stacklevel=_outside())


def _outside() -> int:
    """``stacklevel`` of the first frame outside of this file and contextlib."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename in (__file__, contextlib.__file__):
        frame, level = frame.f_back, level + 1
    return level


def _warn_of_fresh_batch_norms(model: nn.Module) -> None:
    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    fresh = [name for name, norm in norms if _is_fresh(norm)]
    if fresh:
        warnings.warn(
            f"calibrate: {len(fresh)} batch norms have seen no batch (num_batches_tracked is 0; the first is '{fresh[0]}'): the "
            "ranges seen now are those of an untrained network. Train a new network before, or leave calibrate out: the "
            "ranges follow training until enable_observer(model, False)",
            stacklevel=_outside(),
        )


def _is_fresh(norm: nn.Module) -> bool:
    """Whether it has seen no batch; statistics without a count, from older releases, are not fresh."""
    if norm.num_batches_tracked is None or int(norm.num_batches_tracked) > 0:
        return False
    return bool((norm.running_mean == 0).all()) and bool((norm.running_var == 1).all())


def _observe_weights(model: nn.Module) -> None:
    """A weight's range needs no batch, so it is set even where no batch reached the layer."""
    for module in model.modules():
        fake_quant = module.weight_fake_quant if isinstance(module, QuantLayer) else None
        if fake_quant is not None and not fake_quant.ready:
            fake_quant.observe(module.weight_to_quantize())


def _freeze_for_inference(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, QuantLayer) and not module.recipe.training:
            for fake_quant in fake_quants(module):
                if fake_quant.ready and not (fake_quant.sees_only_zeros() and not fake_quant.of_weight):
                    fake_quant.enable_observer(False)


def _report(model: nn.Module) -> CalibrationReport:
    unreached, zeros = [], []
    for name, module in model.named_modules():
        reached = module.reached_by_calibration() if isinstance(module, Calibrates) else None
        if reached == "nothing":
            unreached.append(name)
        elif reached == "zeros":
            zeros.append(name)
    return CalibrationReport(tuple(unreached), tuple(zeros))


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int | None = None,
) -> nn.Module:
    """Sets the ranges of a prepared model from ``batches``; see :func:`calibration` for the state before and after.

    A model whose layers ``prepare`` packed in 4 bits has no ranges and is returned as it is. Calibrate a network whose batch norms have seen data. A new one needs no calibration: its ranges follow training.

    Args:
        model: a prepared model; its weights and batch-norm statistics stay as they are.
        batches: what ``forward`` takes, e.g. a DataLoader.
        forward: called as ``forward(model, batch)``; by default ``model(batch)`` for a tensor, ``model(**batch)`` for a
            mapping, ``model(*batch)`` for a tuple or list. Where a batch has more items than ``model.forward`` has
            positional parameters, as a DataLoader's pairs (images, labels) do, the first ones are used.
        max_batches: stop after this many.

    Returns:
        The model, with the attribute ``calibration_report`` (:class:`CalibrationReport`).

    Raises:
        TypeError: one batch in place of an iterable of them.
        ValueError: a model without fake-quantizers or fixed-point activations, no batch at all, or a non-finite batch
            under ``nan_policy="raise"``.

    Warns:
        UserWarning: as :func:`calibration`.

    >>> import quantrain.nn as qnn
    >>> model = qnn.prepare(nn.Sequential(nn.Linear(4, 2)), "ptq-w8a8")
    >>> print(calibrate(model, [torch.randn(8, 4) for _ in range(3)]).calibration_report)
    every range was seen
    """
    if is_packed(model):
        model.calibration_report = CalibrationReport((), ())
        return model
    if not calibrating_modules(model) or _is_converted(model):
        raise ValueError(_not_prepared(model))
    check_batches("calibrate", batches)
    forward = forward or run_batch
    count = 0
    with calibration(model):
        for batch in itertools.islice(batches, max_batches):
            forward(model, batch)
            count += 1
        if count == 0:
            raise ValueError("calibrate: expected at least one batch, got none")
    return model


def _is_converted(model: nn.Module) -> bool:
    """Whether layers of ``model`` are converted and none is left to calibrate."""
    from .convert import is_converted  # late: the converted layers import this module

    return is_converted(model) and not any(isinstance(module, QuantLayer) for module in model.modules())


def is_packed(model: nn.Module) -> bool:
    """Whether all quantized layers of ``model`` were packed by ``prepare``."""
    from .quantized import QuantizedLayer  # late, as above

    if any(isinstance(module, QuantLayer) for module in model.modules()):
        return False
    recipes = [module.recipe for module in model.modules() if isinstance(module, QuantizedLayer)]
    return bool(recipes) and all(handler_of(recipe).packs for recipe in recipes)


def _not_prepared(model: nn.Module) -> str:
    state = (
        "one that is converted already"
        if _is_converted(model)
        else "one without a FakeQuantize (use what prepare returned)"
    )
    return f"calibrate: expected a prepared model, got {state}"


def run_batch(model: nn.Module, batch: Any) -> Any:
    """``model`` called with a tensor, a mapping of keyword arguments, or as many items of a sequence as it takes."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch[: _most_arguments(model)])
    return model(batch)


def _most_arguments(model: nn.Module) -> int | None:
    """How many positional arguments ``model.forward`` takes; None: any number."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
