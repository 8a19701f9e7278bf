"""Layer-by-layer knowledge distillation (ZeroQuant's LKD, Yao et al., arXiv:2206.01861, section 4.3).

For each block k alone::

    min || f_k(h) - f^_k(h) ||^2        h: the hidden state that the teacher's block k gets

f is the float block, f^ the quantized one, trained through its straight-through estimators. No labels and no loss of
the whole network are needed, and a block's error does not depend on the blocks before it. So one pass of the teacher
gives the inputs and targets of all blocks, and one pass of the student, each of whose blocks gets the teacher's input
in place of its own, trains all of them; a block's activations live no longer than its own backward pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantrain.nn.calibrate import evaluating, measured_and_all, run_batch
from quantrain.nn.prepare import check_model
from quantrain.tables import Table

from .blocks import block_names, without_cache

__all__ = ["LayerDistillation", "distill_layers"]

kSinkRatio = 10.0  # a token whose norm is that many times the median is a sink; ordinary tokens stay below 3 times

Forward = Callable[[nn.Module, Any], Any]
Mask = Callable[[Any], "Tensor | None"]


class LayerDistillation(Table):
    """What :func:`distill_layers` did: a row per block, ``layer``, ``before`` and ``after``.

    The losses are mean squared errors over elements of unmasked tokens, weighted as in training, of the same first
    batches.
    """

    def __init__(self, names: Sequence[str], before: Sequence[float], after: Sequence[float], steps: int):
        rows = [
            {"layer": name, "before": first, "after": last}
            for name, first, last in zip(names, before, after, strict=True)
        ]
        columns = {"layer": "layer", "before": "loss before", "after": "loss after"}
        super().__init__(columns, rows, title=f"layer-by-layer distillation, {steps} steps")

    def __str__(self) -> str:
        rows = [{**row, **{key: f"{row[key]:.4g}" for key in ("before", "after")}} for row in self.rows]
        return str(Table(self.columns, rows, title=self.title, notes=self.notes))


def distill_layers(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    blocks: Sequence[str] | None = None,
    steps: int = 100,
    lr: float = 5e-6,
    forward: Forward | None = None,
    mask: Mask | None = None,
    normalize: bool | str = "auto",
    progress: Callable[[int, float], None] | None = None,
) -> LayerDistillation:
    """Trains each block of a prepared model to give what the float model's block gives for the same input.

    AdamW without weight decay trains every parameter of the blocks that has ``requires_grad``: weights, norms, biases,
    learned scales. Both models run in eval mode. Afterwards modes, hooks and gradients are what they were, also where
    an error is raised; the teacher and what lies outside of the blocks do not change.

    Args:
        student: what ``prepare`` (and ``calibrate``) made of a copy of the teacher. Its parameters are float32.
        teacher: the float model of the same structure.
        batches: what ``forward`` takes; begun again where there are fewer than ``steps``. Labels are not needed.
        blocks: names of the modules to train; None: the members of the longest nn.ModuleList whose members share a
            class (BERT's ``encoder.layer``, Llama's ``model.layers``, GPT-2's ``transformer.h``). Of a block's result
            the first floating-point tensor counts.
        steps: one batch each.
        lr: 5e-6 is the published value for 8-bit weights; 4-bit weights of small models want 1e-4.
        forward: called as ``forward(model, batch)`` with either model; by default as in :func:`quantrain.nn.calibrate`.
        mask: called with a batch, gives ``[B, T]``, 0 at tokens that do not count, or None; by default the
            ``attention_mask`` of a batch that is a mapping and has one.
        normalize: "auto" multiplies the error of a token by ``(m / n)^2`` where its norm n (of the teacher's output) is
            more than 10 times the median m: an attention sink of norm 1e3 would else be the whole loss. True does so
            for every token (n at least m / 10), False for none.
        progress: called as ``progress(step, loss)`` after each step, from 1; loss is the mean over blocks.

    Shapes: hidden states ``[..., D]``, the mask has as many elements as they have tokens.

    Raises:
        TypeError: no modules, or one batch in place of an iterable of them.
        ValueError: no blocks; a block that the teacher lacks, or whose parameters have other names or shapes; no batch;
            a block that a pass does not reach; a loss that is not finite, naming the block (that step changes nothing).

    >>> import quantrain.nn as qnn
    >>> teacher = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    >>> student = qnn.prepare(teacher, "qat-w8a8-token", inplace=False)
    >>> result = distill_layers(student, teacher, [torch.randn(16, 8)], blocks=["0", "2"], steps=2)
    >>> [row["layer"] for row in result.rows]
    ['0', '2']
    """
    check_model("distill_layers", student)
    check_model("distill_layers", teacher)
    if not (isinstance(normalize, bool) or normalize == "auto"):
        raise ValueError(f"distill_layers: expected normalize to be True, False or 'auto', got {normalize!r}")
    if steps < 1:
        raise ValueError(f"distill_layers: expected at least one step, got {steps}")
    names = _block_names(teacher, blocks)
    pairs = _pairs(student, teacher, names)
    parameters = _trained(pairs)
    measured, source = measured_and_all("distill_layers", batches, steps)
    passes = _Passes(student, teacher, pairs, forward or run_batch, mask or _attention_mask, normalize)

    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    with ExitStack() as stack:
        for model in (student, teacher):
            stack.enter_context(evaluating(model))
            stack.enter_context(without_cache(model))
        stack.enter_context(_own_gradients(parameters))
        stack.enter_context(_plain_attention())
        before = passes.mean_losses(measured)
        for step, batch in enumerate(itertools.islice(source, steps), start=1):
            losses = passes.losses(batch, train=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if progress is not None:
                progress(step, sum(losses) / len(losses))
        after = passes.mean_losses(measured)
    return LayerDistillation(names, before, after, steps)


@dataclass
class _Call:
    """One call of a teacher's block: its tensor arguments, its result, and the versions of all, which writes raise."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor | None = None
    versions: list[int] = field(default_factory=list)

    def keep(self, value: Any) -> None:
        self.versions += [tensor._version for tensor in _tensors(value)]

    def written(self) -> bool:
        return self.versions != [tensor._version for tensor in _tensors((self.args, self.kwargs, self.output))]


class _Passes:
    """The passes of teacher and student over a batch."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairs: Mapping[str, tuple[nn.Module, nn.Module]],
        forward: Forward,
        mask: Mask,
        normalize: bool | str,
    ):
        self.student, self.teacher, self.pairs = student, teacher, pairs
        self.forward, self.mask, self.normalize = forward, mask, normalize

    def mean_losses(self, batches: Sequence[Any]) -> list[float]:
        """Of every block, the mean over ``batches``."""
        every = [self.losses(batch, train=False) for batch in batches]
        return [sum(of_block) / len(every) for of_block in zip(*every, strict=True)]

    def losses(self, batch: Any, *, train: bool) -> list[float]:
        """Of every block; with ``train`` their gradients are added to the parameters'."""
        calls = self._teach(batch)
        losses = self._learn(batch, calls, train)
        missing = [name for name in self.pairs if name not in losses or calls[name]]
        if missing:
            raise ValueError(
                f"distill_layers: expected the student to call block {missing[0]!r} as often as the teacher, got fewer "
                "calls"
            )
        values = torch.stack([losses[name] for name in self.pairs]).tolist()
        for name, value in zip(self.pairs, values, strict=True):
            if not math.isfinite(value):
                raise ValueError(f"distill_layers: expected a finite loss of block {name!r}, got {value}")
        return values

    @torch.no_grad()
    def _teach(self, batch: Any) -> dict[str, list[_Call]]:
        calls: dict[str, list[_Call]] = {name: [] for name in self.pairs}

        def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = _Call(_detached(args), _detached(kwargs))
            call.keep((call.args, call.kwargs))
            calls[name].append(call)

        def after(name: str, output: Any) -> None:
            call = calls[name][-1]
            call.output = _hidden(name, output).detach()
            call.keep(call.output)

        with _hooked({name: teacher for name, (_, teacher) in self.pairs.items()}, before, after):
            self.forward(self.teacher, batch)
        for name, made in calls.items():
            if not made:
                raise ValueError(f"distill_layers: expected the teacher to call block {name!r}, got no call")
            if any(call.written() for call in made):
                raise ValueError(
                    f"distill_layers: expected input and output of block {name!r} to stay as they are, got them "
                    "written in place"
                )
        return calls

    @torch.no_grad()
    def _learn(self, batch: Any, calls: Mapping[str, list[_Call]], train: bool) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        mask = self.mask(batch)

        def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if not calls[name]:
                raise ValueError(
                    f"distill_layers: expected the student to call block {name!r} as often as the teacher, got more "
                    "calls"
                )
            call = calls[name][0]
            torch.set_grad_enabled(train)  # back off in after(), or by this function's no_grad where an error is raised
            return _injected(args, call.args), _injected(kwargs, call.kwargs)

        def after(name: str, output: Any) -> None:
            target = calls[name].pop(0).output
            loss = _loss(name, _hidden(name, output), target, mask, self.normalize)
            if train:
                loss.backward()
            torch.set_grad_enabled(False)
            losses[name] = losses.get(name, 0) + loss.detach()

        with _hooked({name: student for name, (student, _) in self.pairs.items()}, before, after):
            self.forward(self.student, batch)
        return losses


@contextmanager
def _hooked(
    blocks: Mapping[str, nn.Module],
    before: Callable[[str, tuple[Any, ...], dict[str, Any]], tuple[Any, Any] | None],
    after: Callable[[str, Any], None],
) -> Iterator[None]:
    """In it ``before(name, args, kwargs)`` is called before a block is, and may give other arguments; ``after(name,
    output)`` after."""
    with ExitStack() as hooks:
        for name, block in blocks.items():
            pre = block.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True
            )
            hooks.callback(pre.remove)
            post = block.register_forward_hook(lambda _, args, output, name=name: after(name, output))
            hooks.callback(post.remove)
        yield


def _loss(name: str, output: Tensor, target: Tensor, mask: Tensor | None, normalize: bool | str) -> Tensor:
    """The mean over tokens and columns of the squared error, in float32."""
    if output.shape != target.shape:
        raise ValueError(
            f"distill_layers: expected block {name!r} to give {list(target.shape)} as the teacher's does, got "
            f"{list(output.shape)}"
        )
    output, target = (rows.flatten(0, -2).float() for rows in (output, target))
    error = (output - target).square().sum(-1)
    counts = _token_mask(name, mask, target)
    if normalize is not False:
        norm = target.norm(dim=-1)
        median = norm.median() if counts is None else torch.where(counts, norm, math.nan).nanmedian()
        factor = (median / norm.clamp_min(median / kSinkRatio).clamp_min(torch.finfo(norm.dtype).tiny)).square()
        sink = (norm > kSinkRatio * median) & (median > 0)
        error = torch.where(sink, factor * error, error) if normalize == "auto" else factor * error
    if counts is None:
        return error.mean() / target.shape[-1]
    # a product: NaN in padding would make the gradient NaN and so must the loss be
    return (error * counts).sum() / counts.sum() / target.shape[-1]


def _token_mask(name: str, mask: Tensor | None, rows: Tensor) -> Tensor | None:
    """bool, one per row of ``rows``."""
    if mask is None:
        return None
    if mask.numel() != rows.shape[0]:
        raise ValueError(
            f"distill_layers: expected a mask of as many elements as block {name!r} has tokens, {rows.shape[0]}, got "
            f"{list(mask.shape)}"
        )
    return mask.to(rows.device).flatten().ne(0)


def _attention_mask(batch: Any) -> Tensor | None:
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


def _hidden(name: str, output: Any) -> Tensor:
    """The first floating-point tensor of a block's result."""
    found = next((t for t in _tensors(output) if t.is_floating_point()), None)
    if found is None or found.dim() < 2:
        got = "none" if found is None else f"one of shape {list(found.shape)}"
        raise ValueError(f"distill_layers: expected block {name!r} to give a tensor [..., D], got {got}")
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors(inner)


def _detached(value: Any) -> Any:
    """Tensors, and containers of them; None for all else, such as a cache, of which each model has its own."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detached(inner) for key, inner in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_detached(inner) for inner in value)
    return None


def _injected(own: Any, taught: Any) -> Any:
    """``own`` with the teacher's tensors in place of its own."""
    if isinstance(own, Tensor) and isinstance(taught, Tensor):
        return taught
    if isinstance(own, dict) and isinstance(taught, dict):
        return {key: _injected(inner, taught.get(key)) for key, inner in own.items()}
    if type(own) in (tuple, list) and isinstance(taught, (tuple, list)) and len(own) == len(taught):
        return type(own)(_injected(mine, theirs) for mine, theirs in zip(own, taught, strict=True))
    return own


def _block_names(model: nn.Module, blocks: Sequence[str] | None) -> list[str]:
    if blocks is None:
        if not (found := block_names(model)):
            raise ValueError(
                "distill_layers: expected an nn.ModuleList of blocks of one class in the teacher, got none "
                "(blocks=[...] names them)"
            )
        return found
    if isinstance(blocks, str):  # whose characters would be names
        raise TypeError(f"distill_layers: expected blocks to be a list of names, got the str {blocks!r}")
    names = list(dict.fromkeys(blocks))
    if not names:
        raise ValueError("distill_layers: expected at least one block, got none")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in modules:
            raise ValueError(f"distill_layers: expected every block to be a module of the teacher, got {name!r}")
        outer = next((other for other in names if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise ValueError(f"distill_layers: expected blocks beside each other, got {name!r} within {outer!r}")
    return names


def _pairs(student: nn.Module, teacher: nn.Module, names: Sequence[str]) -> dict[str, tuple[nn.Module, nn.Module]]:
    """name -> (the student's block, the teacher's), of the same parameters but for those that the student has new."""
    modules = dict(student.named_modules(remove_duplicate=False))
    own = dict(teacher.named_modules(remove_duplicate=False))
    teachers = {id(parameter): name for name, parameter in teacher.named_parameters()}
    for name, parameter in student.named_parameters():
        if id(parameter) in teachers:
            raise ValueError(
                f"distill_layers: expected a teacher of its own, got one that shares {name!r} with the student "
                "(prepare(model, recipe, inplace=False) copies)"
            )
    pairs = {}
    for name in names:
        if name not in modules:
            raise ValueError(f"distill_layers: expected a student with the teacher's block {name!r}, got none")
        found = {key: list(p.shape) for key, p in modules[name].named_parameters()}
        for key, parameter in own[name].named_parameters():
            if found.get(key) != list(parameter.shape):
                raise ValueError(
                    f"distill_layers: expected the student's block {name!r} to have a parameter {key!r} of shape "
                    f"{list(parameter.shape)} as the teacher's has, got {found.get(key, 'none')} (a prepared model is "
                    "trained, a converted one cannot be)"
                )
        pairs[name] = (modules[name], own[name])
    return pairs


def _trained(pairs: Mapping[str, tuple[nn.Module, nn.Module]]) -> list[nn.Parameter]:
    """The blocks' parameters that require a gradient, once each."""
    found: dict[int, nn.Parameter] = {}
    for name, (block, _) in pairs.items():
        mine = {key: p for key, p in block.named_parameters() if p.requires_grad}
        if not mine:
            raise ValueError(f"distill_layers: expected block {name!r} to have parameters that train, got none")
        for key, parameter in mine.items():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"distill_layers: expected parameters in float32, got {name}.{key} in {parameter.dtype}, whose "
                    "rounding swallows steps of this size (student.float() casts; autocast may compute in 16 bits)"
                )
            found[id(parameter)] = parameter
    return list(found.values())


@contextmanager
def _own_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """No gradients at first; afterwards those that there were."""
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient


@contextmanager
def _plain_attention() -> Iterator[None]:
    """nn.TransformerEncoder's inference path hands its layers nested tensors, which a student cannot train on."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
