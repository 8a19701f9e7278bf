"""Students of fewer layers: a teacher's layers chosen by what they do, and copied.

    importance = 1 - mean over tokens of cos(x_in, x_out)

is ShortGPT's Block Influence (Men et al., arXiv:2403.03853, eq. 1): a block that hardly turns its input goes
first.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantrain._arguments import integer
from quantrain.nn.calibrate import check_batches, evaluating, run_batch
from quantrain.nn.prepare import check_model
from quantrain.nn.weight_hooks import run_weight_hooks
from quantrain.ptq.blocks import block_names, without_cache
from quantrain.tables import Table

from .hooks import floating_tensors
from .outputs import attention_mask_of, fitted_mask, without_labels

__all__ = ["LayerImportance", "layer_importance", "shallow_student"]

_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")  # how configs of transformers' models call it
_PLACES = ("layer_idx", "layer_id", "layer_index", "layer_number")  # and their blocks their own place


class LayerImportance(Table):
    """What :func:`layer_importance` found: a row per block, ``layer`` and ``importance``.

    Attributes:
        scores: in the blocks' order; 0: the block leaves the direction of its input as it is.
    """

    def __init__(self, names: Sequence[str], scores: Sequence[float], tokens: int):
        self.scores = list(scores)
        rows = [{"layer": name, "importance": score} for name, score in zip(names, scores, strict=True)]
        columns = {"layer": "layer", "importance": "1 - cos"}
        super().__init__(columns, rows, title=f"importance of {len(rows)} layers, {tokens:,} tokens")

    def __str__(self) -> str:
        rows = [{**row, "importance": f"{row['importance']:.4f}"} for row in self.rows]
        return str(Table(self.columns, rows, title=self.title))

    def most(self, count: int) -> list[int]:
        """The places of the ``count`` most important blocks, rising; of equals the earlier.

        >>> LayerImportance(["a", "b", "c"], [0.5, 0.1, 0.3], 8).most(2)
        [0, 2]
        """
        return sorted(sorted(range(len(self.scores)), key=lambda place: -self.scores[place])[:count])


@torch.no_grad()
def layer_importance(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    blocks: str | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    mask: Callable[[Any], Tensor | None] | None = None,
) -> LayerImportance:
    """How far each block turns its input, in evaluation mode: ShortGPT's Block Influence.

    Args:
        model: left as it was.
        batches: as :func:`quantrain.nn.calibrate` takes them.
        blocks: name of the nn.ModuleList or nn.Sequential of blocks; None: the longest nn.ModuleList whose members
            share a class (``encoder.layer``, ``model.layers``).
        forward, mask: as in :class:`Distiller`.

    Shapes: of a block's arguments and of its result the first floating-point tensor counts, ``[.., D]`` both; rows of
    zeros in one of them count as turned by 90 degrees.

    Raises:
        TypeError: one batch in place of an iterable of them.
        ValueError: no blocks; no batch; a block that no batch reaches, or whose result has another shape than its
            input.

    >>> model = nn.Sequential(nn.Identity(), nn.ReLU(), nn.Identity())
    >>> print(layer_importance(model, [torch.eye(4) - 0.25], blocks=""))
    importance of 3 layers, 4 tokens
    layer  1 - cos
    0      0.0000
    1      0.1340
    2      0.0000
    """
    check_model("layer_importance", model)
    check_batches("layer_importance", batches)
    _, names = _blocks("layer_importance", model, blocks)
    turned = _Turned(names)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(without_cache(model))
        for name in names:
            block = model.get_submodule(name)
            pre = block.register_forward_pre_hook(turned.before(name), with_kwargs=True)
            stack.callback(pre.remove)
            stack.callback(block.register_forward_hook(turned.after(name)).remove)
        for batch in batches:
            turned.mask = (mask or attention_mask_of)(batch)
            (forward or run_batch)(model, without_labels(batch, model))
    return LayerImportance(names, *turned.result())


def shallow_student(
    teacher: nn.Module,
    layers: int | Sequence[int],
    batches: Iterable[Any] | None = None,
    *,
    blocks: str | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    mask: Callable[[Any], Tensor | None] | None = None,
) -> nn.Module:
    """A copy of the teacher with some of its blocks, to be distilled.

    The kept blocks are renumbered (``layer_idx`` of transformers' attention) and the copy's config counts them
    (``num_hidden_layers``, ``layer_types``), so that saving and generating work.

    Args:
        teacher: left as it was.
        layers: how many, or which, counted from 0 in rising order. DistilBERT (arXiv:1910.01108) has 0, 2, 4, 7, 9, 11.
        batches: with a number of layers: the most important by :func:`layer_importance`; None: evenly spaced, the first
            and the last among them.
        blocks, forward, mask: as in :func:`layer_importance`.

    Returns:
        The student, in the teacher's mode; its attribute ``teacher_layers`` says which blocks it has.

    Raises:
        TypeError: layers that are not integers.
        ValueError: no blocks; fewer than one layer or more than there are; places outside, twice or not rising; batches
            beside places.

    >>> class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
    ...
    ...     def forward(self, x):
    ...         for layer in self.layers:
    ...             x = layer(x)
    ...         return x
    >>> student = shallow_student(Model(), 3, [torch.randn(8, 4)])
    >>> len(student.layers), len(student.teacher_layers)
    (3, 3)
    """
    check_model("shallow_student", teacher)
    path, names = _blocks("shallow_student", teacher, blocks)
    places = _places(layers, len(names), batches)
    if batches is not None:
        places = layer_importance(teacher, batches, blocks=path, forward=forward, mask=mask).most(len(places))
    run_weight_hooks(teacher)
    old = teacher.get_submodule(path)
    memo: dict[int, Any] = {}
    kept = [copy.deepcopy(old[place], memo) for place in places]
    memo[id(old)] = new = type(old)(*kept) if isinstance(old, nn.Sequential) else type(old)(kept)
    new.training = old.training
    student = copy.deepcopy(teacher, memo)
    for number, (place, block) in enumerate(zip(places, new, strict=True)):
        _renumber(block, place, number)
    _recount(student, path, len(names), places)
    student.teacher_layers = tuple(places)
    return student


class _Turned:
    """Sums of 1 - cos(x_in, x_out) over the tokens of every block."""

    def __init__(self, names: Sequence[str]):
        self.names, self.mask = names, None
        self.inputs: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}

    def before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = kwargs.get("hidden_states") if not args else None
            hidden = _hidden(name, (args, kwargs) if given is None else given, "take")
            self.inputs[name] = hidden.clone()  # which the block may write in place

        return hook

    def after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x, y = self.inputs.pop(name), _hidden(name, output, "give")
            if x.shape != y.shape:
                raise ValueError(
                    f"layer_importance: expected {name!r} to give {list(x.shape)}, as it takes, got {list(y.shape)}"
                )
            turned = 1 - F.cosine_similarity(x.double(), y.double(), -1).clamp(-1, 1)
            counts = fitted_mask(self.mask, turned.shape, f"the rows of {name!r}", op="layer_importance")
            counts = torch.ones_like(turned) if counts is None else counts.to(turned.device).ne(0).double()
            kept = torch.where(counts != 0, turned, 0.0).sum()
            self.sums[name] = self.sums.get(name, 0) + kept
            self.tokens[name] = self.tokens.get(name, 0) + counts.sum()

        return hook

    def result(self) -> tuple[list[float], int]:
        """The mean of every block, and how many tokens the first one saw."""
        if not self.sums:
            raise ValueError("layer_importance: expected at least one batch that reaches the layers, got none")
        for name in self.names:
            if name not in self.sums:
                raise ValueError(f"layer_importance: expected a batch to reach {name!r}, got none")
        scores = [float(self.sums[name] / self.tokens[name]) for name in self.names]
        for name, score in zip(self.names, scores, strict=True):
            if not math.isfinite(score):
                raise ValueError(
                    f"layer_importance: expected finite hidden states at {name!r}, got an importance of {score}"
                )
        return scores, int(self.tokens[self.names[0]])


def _hidden(name: str, value: Any, verb: str) -> Tensor:
    found = next(floating_tensors(value), None)
    if found is None or found.dim() < 2:
        raise ValueError(f"layer_importance: expected {name!r} to {verb} a tensor [.., D], got none")
    return found.detach()


def _blocks(op: str, model: nn.Module, path: str | None) -> tuple[str, list[str]]:
    """The path of the list of blocks, and the blocks' names."""
    if path is None:
        names = block_names(model)
        if not names:
            raise ValueError(
                f"{op}: expected an nn.ModuleList of blocks of one class in the model, got none (blocks='...' names a "
                "list)"
            )
        return names[0].rpartition(".")[0], names
    found = dict(model.named_modules(remove_duplicate=False)).get(path)
    if not isinstance(found, (nn.ModuleList, nn.Sequential)) or len(found) == 0:
        got = "no such module" if found is None else f"{type(found).__name__} of {len(list(found.children()))} modules"
        raise ValueError(
            f"{op}: expected blocks to name an nn.ModuleList or nn.Sequential with modules, got {path!r}: {got}"
        )
    return path, [f"{path}.{key}" if path else key for key in found._modules]


def _places(layers: int | Sequence[int], total: int, batches: object) -> list[int]:
    """The places asked for; of a number, evenly spaced ones."""
    if not isinstance(layers, Iterable):
        count = integer("shallow_student", "layers", layers)
        if not 1 <= count <= total:
            raise ValueError(f"shallow_student: expected 1 to {total} layers, got {count}")
        return [round(place * (total - 1) / max(count - 1, 1)) for place in range(count)]
    places = [integer("shallow_student", "layers", place) for place in layers]
    if not places or places != sorted(set(places)) or not 0 <= places[0] <= places[-1] < total:
        raise ValueError(f"shallow_student: expected rising places of layers in 0 to {total - 1}, got {places}")
    if batches is not None:
        raise ValueError(
            "shallow_student: expected batches where a number of layers is to be chosen, got the places as well"
        )
    return places


def _renumber(block: nn.Module, old: int, new: int) -> None:
    for module in block.modules():
        for name in _PLACES:
            if module.__dict__.get(name) == old:
                setattr(module, name, new)


def _recount(model: nn.Module, path: str, total: int, places: Sequence[int]) -> None:
    """The number of layers, and what there is a list of by layer, in the configs of the modules around the blocks."""
    parts = path.split(".")
    around = [model.get_submodule(".".join(parts[:length])) for length in range(len(parts))]
    for config in {id(m.config): m.config for m in around if getattr(m, "config", None) is not None}.values():
        changes: dict[str, Any] = {name: len(places) for name in _counts(config, path, total)}
        for name, value in vars(config).items():
            if "layer" in name and isinstance(value, (list, tuple)) and len(value) == total:
                changes[name] = type(value)(value[place] for place in places)
        _change(model, config, changes)


def _counts(config: Any, path: str, total: int) -> list[str]:
    """The config's attributes that count these blocks; encoders and decoders of one model have one each."""
    side = "decoder" if "decoder" in path.split(".") else "encoder"
    own = [name for name in (f"{side}_layers", f"num_{side}_layers") if getattr(config, name, None) == total]
    if own and side == "decoder":
        return own
    return own + [name for name in _COUNTS if getattr(config, name, None) == total]


def _change(model: nn.Module, config: Any, changes: Mapping[str, Any]) -> None:
    if not changes:
        return
    if not (dataclasses.is_dataclass(config) and type(config).__dataclass_params__.frozen):
        for name, value in changes.items():
            setattr(config, name, value)
        return
    changed = dataclasses.replace(config, **changes)
    for module in model.modules():
        if getattr(module, "config", None) is config:
            module.config = changed
