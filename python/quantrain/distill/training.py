"""Quantization-aware distillation in one call: a prepared model trained on what the float model gives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from quantrain.nn.calibrate import calibrate, evaluating, fake_quants, measured_and_all, run_batch
from quantrain.nn.prepare import check_model
from quantrain.tables import Table

from .distiller import DistillationLoss, Distiller
from .hooks import unwrapped
from .offline import TopkTeacher
from .outputs import without_labels
from .projections import reshard

__all__ = ["Distillation", "distill"]

kLearningRate = 1e-4  # of AdamW, for a model that prepare has just made of a trained one


class Distillation(Table):
    """What :func:`distill` did: a row per loss, ``loss``, ``before`` and ``after``, of the same first batches in
    evaluation mode.

    Attributes:
        before, after: name of a loss -> its value, ``"loss"`` the weighted sum.
        history: the sum of each step, in training mode.
    """

    def __init__(self, before: Mapping[str, float], after: Mapping[str, float], history: Sequence[float]):
        self.before, self.after, self.history = dict(before), dict(after), list(history)
        rows = [{"loss": name, "before": before[name], "after": after[name]} for name in before]
        columns = {"loss": "loss", "before": "before", "after": "after"}
        super().__init__(columns, rows, title=f"distillation, {len(self.history)} steps")

    def __str__(self) -> str:
        rows = [{**row, **{key: f"{row[key]:.4g}" for key in ("before", "after")}} for row in self.rows]
        return str(Table(self.columns, rows, title=self.title, notes=self.notes))


def distill(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    teacher: nn.Module | TopkTeacher,
    steps: int = 100,
    lr: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    max_norm: float | None = 1.0,
    progress: Callable[[int, float], None] | None = None,
    **options: Any,
) -> Distillation:
    """Trains a model, such as one that ``prepare`` made, to give what the teacher gives.

    AdamW without weight decay trains every parameter that has ``requires_grad`` (under ``qlora`` those of LoRA alone),
    and the distiller's projections; the learning rate falls along half a cosine to 0. The model runs in training mode,
    so ranges follow and dropout drops. Afterwards modes are what they were and gradients are gone. No seed is set.
    A prepared model that has no ranges yet is calibrated on the first batches.

    Args:
        model: the student, with trainable parameters.
        batches: as :func:`quantrain.nn.calibrate` takes them; begun again where there are fewer than ``steps``.
        teacher: the float model, or a :class:`TopkTeacher`.
        steps: one batch each.
        lr: at the first step; None: 1e-4.
        optimizer: in place of AdamW, with its own learning rate, which stays as it is. Projections that it lacks are
            trained by AdamW.
        max_norm: gradients longer than that are cut to it, those of projections not; None: they are not.
        progress: called as ``progress(step, loss)`` after each step, from 1.
        options: of :class:`Distiller`: ``pairs``, ``losses``, ``temperature``, ``kl_weight``, ``task_weight``,
            ``forward``, ...

    Returns:
        A table of the losses before and after.

    Raises:
        TypeError: no modules, or one batch in place of an iterable of them.
        ValueError: no batch; nothing to train; float16 or bfloat16 parameters without an optimizer for them; a loss
            that is not finite, naming it (that step changes nothing); what :class:`Distiller` refuses.

    >>> import quantrain.nn as qnn
    >>> teacher = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> student = qnn.prepare(teacher, "qat-w4a4", inplace=False)
    >>> result = distill(student, [torch.randn(32, 8)], teacher=teacher, steps=2)
    >>> list(result.after)
    ['loss', 'kl']
    """
    check_model("distill", model)
    if steps < 1:
        raise ValueError(f"distill: expected at least one step, got {steps}")
    if optimizer is not None and lr is not None:
        raise ValueError(f"distill: expected lr or an optimizer, which has its own, got lr={lr} beside one")
    measured, source = measured_and_all("distill", batches, steps)
    parameters = _trained(model, optimizer)
    with Distiller(model, teacher, **options) as distiller, _training(model):
        _calibrate_fresh(model, measured, options.get("forward"))
        before = _means(distiller, measured)
        lr = kLearningRate if lr is None else lr
        own = distiller.parameters() + (parameters if optimizer is None else [])
        adamw = torch.optim.AdamW(own, lr=lr, weight_decay=0.0) if own else None
        optimizers = [each for each in (optimizer, adamw) if each is not None]
        history = []
        for step, batch in enumerate(itertools.islice(source, steps)):
            for group in adamw.param_groups if adamw else ():
                group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            history.append(_step(distiller, batch, optimizers, parameters, max_norm))
            if progress is not None:
                progress(step + 1, history[-1])
        after = _means(distiller, measured)
    return Distillation(before, after, history)


def _step(
    distiller: Distiller,
    batch: Any,
    optimizers: Sequence[torch.optim.Optimizer],
    parameters: Sequence[nn.Parameter],
    max_norm: float | None,
) -> float:
    """One step of the optimizers; the loss before it."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    losses = distiller(batch)
    values = _checked(losses)
    losses.backward()
    if max_norm is not None:
        nn.utils.clip_grad_norm_(parameters, max_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return values["loss"]


def _means(distiller: Distiller, batches: Sequence[Any]) -> dict[str, float]:
    """Of every loss, the mean over ``batches``."""
    with evaluating(distiller.student), torch.no_grad():
        every = [_checked(distiller(batch)) for batch in batches]
    reshard(distiller.student)
    return {name: sum(losses[name] for losses in every) / len(every) for name in every[0]}


def _checked(losses: DistillationLoss) -> dict[str, float]:
    values = losses.floats()
    for name, value in reversed(values.items()):  # the sum, which is first, says least
        if not math.isfinite(value):
            raise ValueError(f"distill: expected a finite loss {name!r}, got {value}")
    return values


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[nn.Parameter]:
    if optimizer is not None:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise ValueError(
            "distill: expected a model with parameters that train, got none (a prepared model is trained, a converted "
            "one cannot be; of 4-bit weights those of LoRA are: recipe 'qlora')"
        )
    for name, parameter in found.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"distill: expected parameters in float32, got {name!r} in {parameter.dtype}, whose rounding swallows "
                "small steps (an optimizer with master weights may be given, and autocast may compute in 16 bits)"
            )
    return list(found.values())


def _calibrate_fresh(model: nn.Module, batches: Sequence[Any], forward: Callable | None) -> None:
    """Ranges for a prepared model that has none: evaluation needs them; in training they follow."""
    inner = unwrapped(model)
    if any(not fake_quant.ready for fake_quant in fake_quants(inner)):
        run = forward or run_batch
        calibrate(inner, batches, forward=lambda network, batch: run(network, without_labels(batch, network)))


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """The model in training mode; afterwards each module's mode is what it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
