"""Units cut out of a model: rows of producers and columns of consumers together, checked, and taken back on errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quantrain.adamw_8bit import dequantize_8bit_blockwise
from quantrain.nn.layers import QuantLayer
from quantrain.nn.prepare import check_model
from quantrain.nn.quantized import QuantizedLayer
from quantrain.optim import AdamW8bit
from quantrain.pruning import pack_mask, unpack_mask
from quantrain.tables import Table

from .selection import is_distributed_tensor, is_transposed

__all__ = [
    "Chosen",
    "Group",
    "Part",
    "Removal",
    "Surgery",
    "check_float",
    "coarsest",
    "cut_groups",
    "cut_optimizer",
    "kept_units",
    "tried",
]

# of the output's norm: sums of fewer terms are added up in another order
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


# ---- what is cut -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Where a unit lies in a tensor of a module: unit u is ``start + u * width`` and the width - 1 places after it."""

    module: nn.Module
    name: str
    dim: int
    start: int = 0
    width: int = 1

    @property
    def tensor(self) -> Tensor | None:
        found = self.module._parameters.get(self.name)
        return self.module._buffers.get(self.name) if found is None else found

    def places(self, units: Sequence[int]) -> list[int]:
        return [self.start + unit * self.width + place for unit in units for place in range(self.width)]

    def energy(self, units: int, norms: Tensor | None = None) -> Tensor:
        """float32 ``[units]``: the sum of squares of each unit's elements, of columns each times its norm."""
        tensor = self.tensor.detach().float()
        if norms is not None:
            tensor = tensor * norms
        squares = tensor.square().movedim(self.dim, 0).flatten(1).sum(1)
        return squares.narrow(0, self.start, units * self.width).view(units, self.width).sum(1)


@dataclass(eq=False)
class Group:
    """Units that go together: channels of one or more producers, heads, rows of a feed-forward part.

    Attributes:
        names: the layers that make them.
        size: how many there are.
        what: "channels", "heads" or "rows".
        producers: the weights' rows that make them.
        followers: whatever else has an entry per unit: biases, batch norms, depthwise convolutions.
        consumers: the columns that read them.
        settle: called with the number of units left, gives (object, attribute, value) to set.
    """

    names: list[str]
    size: int
    what: str = "channels"
    producers: list[Part] = field(default_factory=list)
    followers: list[Part] = field(default_factory=list)
    consumers: list[Part] = field(default_factory=list)
    settle: Callable[[int], list[tuple[Any, str, Any]]] = lambda left: []

    @property
    def name(self) -> str:
        return ", ".join(self.names)

    def scores(self, norms: Mapping[nn.Module, Tensor] | None = None) -> Tensor:
        """float32 ``[size]``: the L2 norm of a unit's rows in all producers; given the norms of what consumers read, that
        of ``W_ij ||x_j||`` over its columns in all of them."""
        if norms is None:
            parts = [part.energy(self.size) for part in self.producers]
        else:
            parts = [part.energy(self.size, norms[part.module]) for part in self.consumers if part.module in norms]
            parts = parts or [part.energy(self.size) for part in self.producers]
        return torch.stack([part.to(parts[0].device) for part in parts]).sum(0).sqrt()


def kept_units(scores: Tensor, fraction: float, multiple: int = 1) -> list[int]:
    """Units of the largest scores, in order: all but round(fraction * count), at least one, a multiple of ``multiple``
    where that leaves more than fraction says; of equal scores the first."""
    count = len(scores)
    left = max(count - round(fraction * count), 1)
    left = min(math.ceil(left / multiple) * multiple, count)
    order = torch.argsort(scores, descending=True, stable=True)
    return sorted(order[:left].tolist())


# ---- the change ------------------------------------------------------------------------------------------------------


class Surgery:
    """Changes to a model that can be taken back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        # parameter -> its shape before, (dimension, places kept) of each cut
        self.cuts: dict[Tensor, tuple[torch.Size, list[tuple[int, Tensor]]]] = {}

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()
        self.cuts.clear()

    def set(self, owner: Any, attribute: str, value: Any) -> None:
        before = getattr(owner, attribute)
        setattr(owner, attribute, value)
        self._undo.append(lambda: setattr(owner, attribute, before))

    def select(self, places: Sequence[tuple[nn.Module, str]], dim: int, kept: Tensor) -> None:
        """Leaves ``kept`` of a buffer, or of a parameter with its gradient and its mask, which all of ``places`` hold."""
        module, name = places[0]
        parameter = module._parameters.get(name)
        if parameter is None:
            self._set_buffer(module, name, _selected(module._buffers[name], dim, kept))
            return
        shape = parameter.shape
        mask = module._buffers.get(f"{name}_mask")
        if mask is not None:
            bits = pack_mask(unpack_mask(mask, shape).index_select(dim, kept.to(mask.device)))
            for owner, key in places:
                self._set_buffer(owner, f"{key}_mask", bits)
        grad = None if parameter.grad is None else _selected(parameter.grad, dim, kept)
        self._set_data(parameter, _selected(parameter.detach(), dim, kept), grad)
        self.cuts.setdefault(parameter, (shape, []))[1].append((dim, kept))

    def _set_buffer(self, module: nn.Module, name: str, value: Tensor) -> None:
        before = module._buffers[name]
        module._buffers[name] = value
        self._undo.append(lambda: module._buffers.__setitem__(name, before))

    def _set_data(self, parameter: nn.Parameter, value: Tensor, grad: Tensor | None) -> None:
        """The same Parameter, which an optimizer may hold, with other data."""
        before = parameter.data, parameter.grad
        _put(parameter, value, grad)
        self._undo.append(lambda: _put(parameter, *before))


def _put(parameter: nn.Parameter, value: Tensor, grad: Tensor | None) -> None:
    parameter.grad = None
    # By way of another type: an output that is still alive else keeps a node that adds up gradients of the old shape.
    other = torch.float32 if value.dtype == torch.float64 else torch.float64
    parameter.data = torch.empty(0, dtype=other, device=value.device)
    parameter.data = value
    parameter.grad = grad


def _selected(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    """The kept entries, in the tensor's own order of memory."""
    selected = tensor.index_select(dim, kept.to(tensor.device))
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        return selected.contiguous(memory_format=torch.channels_last)
    return selected


Chosen = Sequence[tuple[Group, Sequence[int]]]  # with the units that stay


def _dropped(chosen: Chosen, kinds: Sequence[str]) -> list[tuple[list[Part], set[int]]]:
    """Of each tensor and dimension the parts in it, and the places to drop for all groups together."""
    found: dict[tuple[int, int], tuple[list[Part], set[int]]] = {}
    for group, kept in chosen:
        gone = sorted(set(range(group.size)) - set(kept))
        for part in (part for kind in kinds for part in getattr(group, kind)):
            if part.tensor is not None and gone:
                parts, places = found.setdefault((id(part.tensor), part.dim), ([], set()))
                parts.append(part)
                places.update(part.places(gone))
    return list(found.values())


def _cut(chosen: Chosen, changes: Sequence[tuple[Any, str, Any]] = ()) -> Surgery:
    surgery = Surgery()
    try:
        dropped = _dropped(chosen, ("producers", "followers", "consumers"))
        modules = {part.module: _depthwise(part.module) for parts, _ in dropped for part in parts}
        for parts, places in dropped:
            part = parts[0]
            kept = [place for place in range(part.tensor.shape[part.dim]) if place not in places]
            holders = list(dict.fromkeys((part.module, part.name) for part in parts))
            surgery.select(holders, part.dim, torch.tensor(kept, dtype=torch.int64))
        for module, multiplier in modules.items():
            for attribute, value in _sizes(module, multiplier):
                surgery.set(module, attribute, value)
        for group, kept in chosen:
            for change in group.settle(len(kept)):
                surgery.set(*change)
        for change in changes:
            surgery.set(*change)
    except BaseException:
        surgery.undo()
        raise
    return surgery


def _depthwise(module: nn.Module) -> int:
    """Outputs per input of a depthwise convolution, 0 of other modules."""
    groups = getattr(module, "groups", 1)
    depthwise = isinstance(module, nn.modules.conv._ConvNd) and groups > 1 and groups == module.in_channels
    return module.out_channels // groups if depthwise else 0


def _sizes(module: nn.Module, multiplier: int) -> list[tuple[str, int]]:
    """The attributes that say how large a module's tensors are."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return [("out_features", weight.shape[0]), ("in_features", weight.shape[1])]
    if is_transposed(module):
        return [("nx", weight.shape[0]), ("nf", weight.shape[1])]
    if isinstance(module, nn.modules.conv._ConvNd):
        if multiplier:
            groups = weight.shape[0] // multiplier
            return [("groups", groups), ("in_channels", groups), ("out_channels", weight.shape[0])]
        transposed = module.transposed
        outputs, inputs = (weight.shape[1], weight.shape[0]) if transposed else (weight.shape[0], weight.shape[1])
        return [("out_channels", outputs), ("in_channels", inputs)]
    if isinstance(module, nn.modules.batchnorm._NormBase):
        entries = weight if weight is not None else module.running_mean
        return [] if entries is None else [("num_features", entries.shape[0])]
    if isinstance(module, nn.PReLU):
        return [("num_parameters", weight.shape[0])]
    return []


# ---- the check -------------------------------------------------------------------------------------------------------


@contextmanager
def _without_columns(chosen: Chosen) -> Iterator[None]:
    """In it the columns that read what goes are zero: what a model without these units gives."""
    saved = []
    try:
        for parts, places in _dropped(chosen, ("consumers",)):
            part = parts[0]
            index = torch.tensor(sorted(places), dtype=torch.int64, device=part.tensor.device)
            tensor = part.tensor.detach()
            saved.append((tensor, part.dim, index, tensor.index_select(part.dim, index)))
            tensor.index_fill_(part.dim, index, 0)
        yield
    finally:
        for tensor, dim, index, values in reversed(saved):
            tensor.index_copy_(dim, index, values)


@torch.no_grad()
def cut_groups(
    op: str,
    chosen: Chosen,
    run: Callable[[], Tensor],
    dtype: torch.dtype,
    changes: Sequence[tuple[Any, str, Any]] = (),
) -> Surgery:
    """Cuts, and keeps the cut where ``run()`` gives what it gave with the columns that read these units set to zero.

    Args:
        run: the model's output for one input, as one vector.
        dtype: the least precise of the model's parameters.
        changes: (object, attribute, value) to set besides.

    Raises:
        ValueError: where it gives something else, or fails, naming the first group that does so alone. The model is then
            unchanged.
    """
    with _without_columns(chosen):
        expected = run()
    if not bool(torch.isfinite(expected).all()):
        raise ValueError(f"{op}: expected a finite output to check the change on, got NaN or Inf")
    surgery, why = tried(lambda: _cut(chosen, changes), expected, run, dtype)
    if surgery is not None:
        return surgery
    if len(chosen) > 1:
        for one in chosen:
            with _without_columns([one]):
                expected = run()
            alone, reason = tried(lambda one=one: _cut([one]), expected, run, dtype)
            if alone is None:
                chosen, why = [one], reason
                break
            alone.undo()
    group = chosen[0][0]
    raise ValueError(
        f"{op}: expected the model without some {group.what} of '{group.name}' to give what it gives with these at zero, got "
        f"{why} (the model is as it was)"
    )


def tried(
    change: Callable[[], Surgery], expected: Tensor, run: Callable[[], Tensor], dtype: torch.dtype
) -> tuple[Surgery | None, str]:
    """The change where ``run()`` then gives what is expected; else None, with the change taken back, and why."""
    surgery = change()
    try:
        found = run()
    except Exception as error:  # any module may refuse the new sizes in its own way
        surgery.undo()
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    except BaseException:
        surgery.undo()
        raise
    if found.shape != expected.shape:
        surgery.undo()
        return None, f"{found.numel()} numbers for {expected.numel()}"
    error, norm = float((found - expected).norm()), float(expected.norm())
    if error <= _TOLERANCE[dtype] * norm:
        return surgery, ""
    surgery.undo()
    return None, f"a difference of {error / max(norm, 1e-30):.3g} of its norm"


def check_float(op: str, model: nn.Module) -> None:
    """Raises for layers whose rows cannot be cut: quantized ones, adapters, shards."""
    check_model(op, model)
    from quantrain.nn.fixed_point.layers import FixedPointLayer

    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ValueError(
            f"{op}: expected the model itself, got it in {type(model).__name__}, which keeps the old sizes"
        )
    for name, module in model.named_modules():
        if isinstance(module, (QuantLayer, QuantizedLayer, FixedPointLayer)):
            raise ValueError(
                f"{op}: expected a float model, got '{name}' as {type(module).__name__}: remove before prepare"
            )
        if type(module).__module__.startswith("peft.") and hasattr(module, "base_layer"):
            raise ValueError(
                f"{op}: expected layers without adapters, got '{name}' as {type(module).__name__}: merge first"
            )
    for name, parameter in model.named_parameters():
        if is_distributed_tensor(parameter):
            raise ValueError(
                f"{op}: expected whole tensors, got a shard in '{name}' (a DTensor): remove before fully_shard"
            )
        if parameter.is_meta:
            raise ValueError(f"{op}: expected '{name}' to have values, got a tensor on the meta device")
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{op}: expected finite weights, got NaN or Inf in '{name}'")


def coarsest(model: nn.Module) -> torch.dtype:
    """The least precise floating type of the model's parameters."""
    return max(
        (p.dtype for p in model.parameters() if p.dtype in _TOLERANCE), key=_TOLERANCE.get, default=torch.float32
    )


# ---- what was done ---------------------------------------------------------------------------------------------------


class Removal(Table):
    """What was removed: a row per group of layers, ``layer`` (the producers' names), ``what``, ``before`` and ``after``.

    Attributes:
        kept: producers' names -> int64 tensor of the units that stayed (of heads that share keys and values, the sets).
        left: name of a layer that nothing was removed from -> why.
        cuts: Parameter -> (its shape before, [(dimension, places kept), ...]); the Parameters are the same objects.
        dropped: Parameters that are no longer in the model.
        scores: of ``remove_layers``, of every layer.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        kept: Mapping[str, Tensor],
        left: Mapping[str, str] | None = None,
        cuts: Mapping[Tensor, tuple[torch.Size, list[tuple[int, Tensor]]]] | None = None,
        dropped: Sequence[Tensor] = (),
        notes: Sequence[str] = (),
    ):
        self.kept, self.left = dict(kept), dict(left or {})
        self.cuts, self.dropped = dict(cuts or {}), list(dropped)
        self.scores: list[float] = []
        columns = {"layer": "layer", "what": "what", "before": "before", "after": "after"}
        lines = [f"left as it is: {name} ({reason})" for name, reason in self.left.items()]
        super().__init__(columns, rows, notes=[*lines, *notes])

    @classmethod
    def of_groups(
        cls, chosen: Chosen, surgery: Surgery, left: Mapping[str, str] | None = None, notes: Sequence[str] = ()
    ) -> Removal:
        rows = [
            {"layer": group.name, "what": group.what, "before": group.size, "after": len(kept)}
            for group, kept in chosen
        ]
        kept = {group.name: torch.tensor(list(units), dtype=torch.int64) for group, units in chosen}
        return cls(rows, kept, left, surgery.cuts, notes=notes)


@torch.no_grad()
def cut_optimizer(optimizer: Optimizer, removal: Removal) -> None:
    """Brings an optimizer that was made before a removal up to date: its states keep the entries that stayed, parameters
    that are gone leave their groups.

    Without it the next step fails on states of the old shapes. 8-bit moments of :class:`quantrain.optim.AdamW8bit` are
    decoded, cut and rounded to codes anew.

    Args:
        optimizer: it holds the model's Parameters, which are the same objects after a removal.
        removal: what ``remove_channels``, ``remove_heads``, ``remove_ffn_rows`` or ``remove_layers`` returned. After
            several removals, once for each in their order.

    Raises:
        TypeError: no optimizer, or no :class:`Removal`.
        ValueError: a state of another shape than the parameter had. Nothing is changed.

    >>> import quantrain.prune as prune
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> model(torch.randn(3, 4)).sum().backward()
    >>> optimizer.step()
    >>> prune.cut_optimizer(optimizer, prune.remove_channels(model, 0.5, batch=torch.randn(3, 4)))
    >>> optimizer.state[model[0].weight]["exp_avg"].shape
    torch.Size([4, 4])
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"cut_optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not isinstance(removal, Removal):
        raise TypeError(f"cut_optimizer: expected what a removal returned, got {type(removal).__name__}")
    states = {
        parameter: _cut_state(optimizer, optimizer.state[parameter], *cut)
        for parameter, cut in removal.cuts.items()
        if optimizer.state.get(parameter)
    }
    gone = {id(parameter) for parameter in removal.dropped}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
    for parameter in removal.dropped:
        optimizer.state.pop(parameter, None)
    optimizer.state.update(states)
    if isinstance(optimizer, AdamW8bit) and states:  # which rounds moments that come as numbers
        optimizer.load_state_dict(optimizer.state_dict())


def _cut_state(
    optimizer: Optimizer, state: Mapping[str, Any], shape: torch.Size, cuts: Sequence[tuple[int, Tensor]]
) -> dict[str, Any]:
    """The state with its tensors of the parameter's old shape cut as the parameter was."""
    result: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or name.endswith("_scale"):
            if not name.endswith("_scale"):
                result[name] = value
            continue
        if value.shape != shape:
            raise ValueError(
                f"cut_optimizer: expected the state '{name}' to be of its parameter's shape before, {list(shape)}, got "
                f"{list(value.shape)}"
            )
        if isinstance(optimizer, AdamW8bit) and value.dtype == torch.uint8:
            value = _decoded(value, state[f"{name}_scale"], signed=name == "exp_avg")
        for dim, kept in cuts:
            value = _selected(value, dim, kept)
        result[name] = value
    return result


def _decoded(codes: Tensor, scale: Tensor, *, signed: bool) -> Tensor:
    """An 8-bit moment's values; its blocks go along the parameter's memory."""
    flat = codes.as_strided((codes.numel(),), (1,))
    values = torch.empty_like(codes, dtype=torch.float32)
    values.as_strided((codes.numel(),), (1,)).copy_(dequantize_8bit_blockwise(flat, scale, signed=signed))
    return values
