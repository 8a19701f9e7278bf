"""What ``prepare`` will do with a model, found on a copy without memory, before any work."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from quantrain import Recipe, ptq
from quantrain import nn as qnn

_NAMED = 5  # layers in an error


@dataclass(frozen=True)
class Plan:
    """What becomes of a model's layers.

    Attributes:
        linear: ``(out_features, in_features)`` of the linear layers that are quantized, by name.
        others: The classes of the other layers that are, by name: embeddings, transposed layers.
        calibrates: Whether a layer has to be shown inputs before it can be converted.
        distills: Whether the blocks are trained to give what the float model's give.
    """

    linear: Mapping[str, tuple[int, int]]
    others: Mapping[str, str]
    calibrates: bool
    distills: bool = False

    @property
    def use(self) -> str:
        """What happens to the model on texts: it is ``"calibrated"`` or ``"distilled"``, or both; "" where the recipe
        needs none."""
        return self._joined("calibrated", "distilled")

    @property
    def purpose(self) -> str:
        """What the first texts of a file are there for, as errors have it."""
        use = self._joined("calibrate", "distill")
        return f"to {use} on" if use else "that other recipes calibrate on"

    def _joined(self, calibrate: str, distill: str) -> str:
        return " and ".join([calibrate] * self.calibrates + [distill] * self.distills)


def plan_of(model: nn.Module, recipe: Recipe, skip: Sequence[str] = ()) -> Plan:
    """What ``prepare`` and ``calibrate`` will do under ``recipe``; the model is not changed.

    Raises:
        ValueError: As quantrain.nn.prepare: a pattern of ``skip`` that names no layer, nothing to quantize.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the real prepare gives them
        prepared = qnn.prepare(_without_memory(model), recipe, skip=skip)
    linear, others, calibrates = {}, {}, False
    for name, layer in prepared.named_modules():
        if not isinstance(layer, (qnn.QuantLayer, qnn.QuantizedLayer)):
            continue
        before = model.get_submodule(name)
        if isinstance(before, nn.Linear):
            linear[name] = (before.out_features, before.in_features)
        else:
            others[name] = type(before).__name__
        calibrates |= isinstance(layer, qnn.QuantLayer) and layer.needs_range
    return Plan(linear, others, calibrates, getattr(recipe.scheme, "distill_steps", 0) > 0)


def check_target(plan: Plan, recipe: Recipe, target: str) -> None:
    """Make sure that the files of ``target`` can hold the layers.

    Raises:
        ValueError: They cannot; layers are named.
    """
    if plan.others:
        names = list(plan.others)
        named = ", ".join(f"{name!r} ({plan.others[name]})" for name in names[:_NAMED])
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        raise ValueError(
            f"--target {target}: expected Linear layers alone to be quantized, got {named}{more}; --skip "
            f"{' '.join(names[:_NAMED])} leaves {'it' if len(names) == 1 else 'them'} in floating point"
        )
    ptq.check_target(plan.linear, recipe, target)


def _without_memory(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the meta device; tensors that are shared stay so."""
    memo: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        meta = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
    return copy.deepcopy(model, memo)
