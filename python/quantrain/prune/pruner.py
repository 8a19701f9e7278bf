"""Pruning while a model trains: masks by a schedule, and optimizers that leave what is pruned at zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quantrain._arguments import is_number
from quantrain._C import PruneSpec
from quantrain.nn.calibrate import check_batches
from quantrain.nn.prepare import check_model
from quantrain.pruning import unpack_mask

from .calibrated import called_weights, sparsegpt, wanda_masks
from .masks import check_magnitude, magnitude_masks
from .schedule import ConstantSchedule, SpecSchedule
from .selection import (
    MaskWrites,
    Weight,
    apply_masks,
    check_pattern,
    is_distributed_tensor,
    masked_weights,
    prunable_weights,
    write_masks,
)

__all__ = ["KeptPruned", "Pruner", "keep_pruned"]


class Schedule(Protocol):
    """What a :class:`Pruner` asks; :class:`CubicSchedule` and :class:`ConstantSchedule` are some."""

    sparsity: float
    end: int

    def sparsity_at(self, step: int) -> float: ...

    def renews_at(self, step: int) -> bool: ...


# ---- optimizers ------------------------------------------------------------------------------------------------------


class KeptPruned:
    """What :func:`keep_pruned` returns: ``remove()`` ends it, ``apply()`` zeroes now."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, masters: Mapping[Tensor, Tensor] | None):
        self.optimizer, self.model = optimizer, model
        self._masters = {id(parameter): master for parameter, master in (masters or {}).items()}
        self._weights: list[Weight] = []
        self._seen = -1
        self._given: dict[Tensor, Tensor] = {}  # what set_masks was told
        # AdamW8bit's own pass over its state takes the masks; other states have no form that says where zero is.
        self._takes_masks: Callable | None = getattr(optimizer, "set_masks", None)
        if self._takes_masks is not None:
            self._tell()
            # load_state_dict begins anew, without masks
            self._handles = [
                optimizer.register_step_pre_hook(lambda *_: self._tell()),
                optimizer.register_load_state_dict_post_hook(lambda _: self._given.clear()),
            ]
        else:
            self._handles = [optimizer.register_step_post_hook(lambda *_: self.apply())]

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each masked parameter that the optimizer holds now, and its mask."""
        if self._seen != MaskWrites.count:
            self._weights, self._seen = list(masked_weights(self.model).values()), MaskWrites.count
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        for weight in self._weights:
            parameter, mask = weight.module._parameters.get(weight.key), weight.mask
            if parameter is None or mask is None:
                continue
            parameter = self._masters.get(id(parameter), parameter)
            if id(parameter) in held:
                yield parameter, mask

    @torch.no_grad()
    def apply(self) -> None:
        """Zeroes pruned weights and whatever floating-point state of the optimizer has their shape."""
        pairs = list(self.pairs())
        if self._takes_masks is None:
            pairs += [(moment, mask) for parameter, mask in pairs for moment in self._moments(parameter)]
        apply_masks(pairs)

    def _moments(self, parameter: Tensor) -> list[Tensor]:
        state = self.optimizer.state.get(parameter, {})
        return [
            tensor
            for tensor in state.values()
            if isinstance(tensor, Tensor)
            and tensor.shape == parameter.shape
            and tensor.is_floating_point()
            and tensor.device == parameter.device
        ]

    def _tell(self) -> None:
        """Gives the optimizer the masks where they are not those that it has."""
        masks = dict(self.pairs())
        same = masks.keys() == self._given.keys() and all(masks[p] is mask for p, mask in self._given.items())
        if not same:
            self._takes_masks({**dict.fromkeys(self._given, None), **masks})
            self._given = masks

    def remove(self) -> None:
        """From now on the optimizer moves all weights."""
        for handle in self._handles:
            handle.remove()
        if self._takes_masks is not None:
            self._takes_masks(dict.fromkeys(self._given, None))
            self._given = {}


def keep_pruned(
    optimizer: Optimizer, model: nn.Module, *, masters: Mapping[Tensor, Tensor] | None = None
) -> KeptPruned:
    """Has every step of ``optimizer`` leave the model's pruned weights at exactly zero, their momentum too.

    :class:`quantrain.optim.AdamW8bit` takes the masks into its own pass; any other optimizer gets a hook behind its step
    that zeroes weights and states of their shape (``momentum_buffer``, ``exp_avg``, ...) in one launch per device. Masks
    are looked up at every step: renewed or new ones, parameter groups and states that are added or loaded later count,
    and so does what was skipped by a gradient scaler.

    Args:
        optimizer: it holds at least one pruned parameter.
        model: a model with masks (:func:`magnitude`, ...).
        masters: where the optimizer holds other tensors than the model: the model's parameter -> the optimizer's (of
            :class:`quantrain.amp.MasterWeights`: ``dict(zip(parameters, masters.parameters()))``).

    Returns:
        A handle with ``remove()``.

    Raises:
        TypeError: no optimizer, or no module.
        ValueError: a model without masks, an optimizer without any of its pruned parameters, a sharded parameter.

    >>> import quantrain.prune as prune
    >>> model = nn.Linear(8, 2)
    >>> _ = prune.magnitude(model, 0.5)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> handle = keep_pruned(optimizer, model)
    >>> model(torch.randn(4, 8)).square().sum().backward()
    >>> optimizer.step()
    >>> int((model.weight == 0).sum()), int((optimizer.state[model.weight]["momentum_buffer"] == 0).sum())
    (8, 8)
    """
    check_model("keep_pruned", model)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"keep_pruned: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    weights = masked_weights(model)
    if not weights:
        raise ValueError("keep_pruned: expected a model with masks, got none")
    for name, weight in weights.items():
        if is_distributed_tensor(weight.parameter):
            raise ValueError(f"keep_pruned: expected whole tensors, got a shard in '{name}' (a DTensor)")
    of = {id(parameter): master for parameter, master in (masters or {}).items()}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(of.get(id(weight.parameter), weight.parameter)) in held for weight in weights.values()):
        raise ValueError(
            "keep_pruned: expected an optimizer that holds pruned parameters of the model, got none of them (was one of the "
            "two made from a copy?)"
        )
    return KeptPruned(optimizer, model, masters)


# ---- the schedule ----------------------------------------------------------------------------------------------------


class Pruner:
    """Prunes a model by a schedule while it trains.

    Made before training, it gives each weight a mask that keeps everything. ``step()``, called after each
    ``optimizer.step()``, renews the masks where the schedule says so; what is pruned stays at zero, with its momentum.
    After the schedule's end the masks are fixed. What is pruned never comes back, but for ``regrow``.

    Every rank of a DDP model comes to the same masks, since its weights and gradients are the same, and Wanda's norms
    are summed over the ranks; the first time they are compared.

    Args:
        model: as :func:`magnitude` takes it; masks that it has already are kept and grow.
        schedule: :class:`CubicSchedule` or :class:`ConstantSchedule`.
        optimizer: gets :func:`keep_pruned`. None: ``step()`` zeroes the weights alone, and momentum revives them until
            it is called.
        score: ``"magnitude"``; or ``"wanda"``, with ``batches``: the norms are measured anew at each renewal.
        scope, pattern, layers, skip, embeddings: as in :func:`magnitude`; of ``"wanda"`` scope is ``"layer"`` and pattern
            "row" by default. An n:m pattern wants a :class:`ConstantSchedule`.
        batches, forward: as in :func:`wanda`.
        regrow: share of the weights kept that a renewal exchanges, the least of them for as many pruned ones of the
            largest gradients (Evci et al., arXiv:1911.11134), which start at zero. Gradients are read in ``step()``,
            before ``zero_grad``. With ``score="magnitude"``, without n:m.
        masters: as in :func:`keep_pruned`.

    Raises:
        TypeError, ValueError: as :func:`magnitude`, :func:`wanda`, :func:`keep_pruned`; a combination that is excluded
            above. The model is unchanged.

    >>> import quantrain.prune as prune
    >>> model = nn.Linear(8, 2)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> pruner = Pruner(model, prune.CubicSchedule(0.75, begin=2, end=8, every=2), optimizer)
    >>> for _ in range(10):
    ...     model(torch.randn(4, 8)).square().sum().backward()
    ...     optimizer.step()
    ...     _ = pruner.step()
    ...     optimizer.zero_grad()
    >>> int((model.weight == 0).sum()), pruner.finished
    (12, True)
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        optimizer: Optimizer | None = None,
        *,
        score: str = "magnitude",
        scope: str = "layer",
        pattern: str | None = None,
        layers: Iterable[str] | None = None,
        skip: Iterable[str] = (),
        embeddings: bool = False,
        batches: Iterable[Any] | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        regrow: float = 0.0,
        masters: Mapping[Tensor, Tensor] | None = None,
    ):
        if not all(hasattr(schedule, name) for name in ("sparsity_at", "renews_at", "end", "sparsity")):
            raise TypeError(f"Pruner: expected a CubicSchedule or a ConstantSchedule, got {type(schedule).__name__}")
        self.model, self.schedule, self.steps = model, schedule, 0
        self.score, self.scope, self.pattern = score, scope, pattern
        self.forward, self.regrow = forward, regrow
        self._weights = prunable_weights("Pruner", model, layers, skip, embeddings)
        self._batches = self._checked_batches(batches)
        self._check()
        self._compared = False
        new = [weight for weight in self._weights if weight.mask is None]
        write_masks(magnitude_masks(new, 0.0))
        try:
            self.kept = None if optimizer is None else keep_pruned(optimizer, model, masters=masters)
            if schedule.renews_at(0):
                self._renew()
        except BaseException:
            for weight in new:
                for module, key in weight.owners:
                    delattr(module, f"{key}_mask")
            MaskWrites.count += 1
            raise

    @classmethod
    def from_spec(
        cls,
        model: nn.Module,
        spec: PruneSpec,
        steps: int,
        optimizer: Optimizer | None = None,
        *,
        batches: Iterable[Any] | None = None,
        skip: Iterable[str] = (),
        **options: Any,
    ) -> Pruner:
        """What a recipe's ``prune`` asks for, over ``steps`` steps of training.

        ``batches`` are for the scores "wanda" and "sparsegpt"; of the latter the masks are made here, and kept.

        Raises:
            TypeError, ValueError: as the class; no batches where the score needs some.

        >>> from quantrain import Recipe
        >>> model = nn.Linear(8, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = Pruner.from_spec(model, Recipe.from_name("prune-2of4").prune, 10, optimizer)
        >>> (model.weight.view(-1, 4) == 0).sum(1).tolist()
        [2, 2, 2, 2]
        """
        schedule = SpecSchedule(spec, steps)
        if spec.needs_batches and batches is None:
            raise ValueError(f"Pruner: expected batches for the score '{spec.score}', got none")
        if spec.score == "sparsegpt":
            sparsegpt(model, spec.sparsity, batches, pattern=spec.pattern, skip=skip)
            return cls(model, ConstantSchedule(0.0), optimizer, skip=skip, **options)  # the masks stay
        pattern = None if spec.pattern == "layer" else spec.pattern
        chosen = {"score": spec.score, "scope": spec.scope, "pattern": pattern, "skip": skip}
        return cls(model, schedule, optimizer, batches=batches if spec.needs_batches else None, **chosen, **options)

    def _checked_batches(self, batches: Iterable[Any] | None) -> list[Any] | None:
        if self.score not in ("magnitude", "wanda"):
            raise ValueError(f"Pruner: expected score 'magnitude' or 'wanda', got {self.score!r}")
        if (self.score == "wanda") != (batches is not None):
            got = "none" if batches is None else "some with score 'magnitude'"
            raise ValueError(f"Pruner: expected batches with score 'wanda', and with no other, got {got}")
        if batches is None:
            return None
        check_batches("Pruner", batches)
        return list(batches)

    def _check(self) -> None:
        final = self.schedule.sparsity
        if not is_number(self.regrow) or not 0 <= self.regrow < 1:
            raise ValueError(f"Pruner: expected regrow in [0, 1), got {self.regrow!r}")
        if self.score == "wanda":
            self.pattern = self.pattern or "row"
            self._weights = called_weights("Pruner", self.model, self._weights)
            if self.scope != "layer":
                raise ValueError(f"Pruner: expected scope 'layer' with score 'wanda', got {self.scope!r}")
            check_pattern("Pruner", self.pattern, final, self._weights)
        else:
            check_magnitude("Pruner", self._weights, final, self.scope, self.pattern)
        groups = self.pattern is not None and ":" in self.pattern
        if groups and self.schedule.sparsity_at(self.schedule.end - 1) not in (0.0, final):
            raise ValueError(
                f"Pruner: expected a ConstantSchedule with pattern '{self.pattern}', got {type(self.schedule).__name__}"
            )
        if self.regrow and (groups or self.score == "wanda"):
            raise ValueError("Pruner: expected no regrow with score 'wanda' or an n:m pattern, got one with it")

    @property
    def finished(self) -> bool:
        """Whether the masks are fixed."""
        return self.steps >= self.schedule.end

    @property
    def sparsity(self) -> float:
        """What the schedule says now."""
        return self.schedule.sparsity_at(self.steps)

    @torch.no_grad()
    def step(self) -> bool:
        """Counts a step of the optimizer; returns whether it renewed the masks."""
        self.steps += 1
        renews = self.schedule.renews_at(self.steps)
        if renews:
            self._renew()
        elif self.kept is None:
            apply_masks([(weight.parameter, weight.mask) for weight in self._weights])
        return renews

    # ---- masks ----

    @torch.no_grad()
    def _renew(self) -> None:
        sparsity = self.schedule.sparsity_at(self.steps)
        if self.score == "wanda":
            masks = wanda_masks(
                "Pruner", self.model, self._weights, sparsity, self._batches, self.pattern, None, self.forward
            )
        elif self.regrow and self.steps:
            masks = self._regrown(sparsity)
        else:
            masks = magnitude_masks(self._weights, sparsity, self.scope, self.pattern)
        if not (self.regrow and self.steps):  # monotone, also where weights that are kept came to zero by themselves
            masks = {weight: mask & weight.mask for weight, mask in masks.items()}
        write_masks(masks)
        if self.kept is not None:
            self.kept.apply()
        if not self._compared:
            compare_ranks(self._weights)
            self._compared = True

    def _regrown(self, sparsity: float) -> dict[Weight, Tensor]:
        """Of the weights that stay, all but the least ``regrow`` by magnitude; in their place the largest gradients."""
        kept = magnitude_masks(self._weights, 1 - (1 - sparsity) * (1 - self.regrow), self.scope, self.pattern)
        values = []
        for weight in self._weights:
            grad = weight.parameter.grad
            if grad is None:
                raise ValueError(
                    f"Pruner: expected '{weight.name}' to have a gradient to regrow by, got none (call step() before "
                    "zero_grad)"
                )
            finite = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)  # a scaler skipped the step
            values.append(finite.masked_fill(unpack_mask(kept[weight], grad.shape), math.inf))
        return magnitude_masks(self._weights, sparsity, self.scope, self.pattern, values)

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """The count of steps; masks are in the model's state dict."""
        return {"steps": self.steps, "sparsity": self.sparsity}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where another stopped; load the model's state dict, which has the masks, too.

        Raises:
            ValueError: not what :meth:`state_dict` gave.
        """
        steps = state_dict.get("steps") if isinstance(state_dict, Mapping) else None
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"Pruner.load_state_dict: expected a state with steps, got {state_dict!r}")
        self.steps = steps


def compare_ranks(weights: Sequence[Weight]) -> None:
    """Raises on every rank where one has other masks than rank 0."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()) or not weights:
        return
    mine = torch.cat([weight.mask for weight in weights])
    first = mine.clone()
    torch.distributed.broadcast(first, 0)
    place = (mine != first).nonzero().flatten()
    found = torch.full((1,), -1, dtype=torch.int64, device=mine.device)
    if len(place):
        found[0] = place[0]
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    at = int(found)
    if at < 0:
        return
    for weight in weights:
        if at < weight.mask.numel():
            raise ValueError(
                f"Pruner: expected equal masks on all ranks, got other ones of '{weight.name}': the ranks' weights differ"
            )
        at -= weight.mask.numel()
