"""Heads, rows of feed-forward parts, channels and whole layers removed: smaller tensors, not zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from quantrain._arguments import is_number
from quantrain.nn.calibrate import check_batches, run_batch
from quantrain.nn.prepare import check_patterns, some
from quantrain.ptq.blocks import block_names

from .blocks import (
    attention_of,
    config_notes,
    feed_forward_of,
    handing_on,
    heads_in_config,
    indices_of,
    influences,
    join,
    rows_in_config,
    shortened,
)
from .calibrated import InputNorms, observed, running
from .channels import trace_channels
from .cuts import Chosen, Group, Removal, check_float, coarsest, cut_groups, kept_units, tried
from .selection import Weight, check_sparsity, is_transposed, matching

__all__ = ["remove_channels", "remove_ffn_rows", "remove_heads", "remove_layers"]

Forward = Callable[[nn.Module, Any], Any]
Indices = Mapping[str, Sequence[int]]


def remove_channels(
    model: nn.Module,
    channels: float | Indices,
    *,
    batch: Any = None,
    batches: Iterable[Any] | None = None,
    layers: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    multiple: int = 1,
    forward: Forward | None = None,
) -> Removal:
    """Removes output channels of convolutions and linear layers with the columns that read them, entries of batch norms
    and depthwise convolutions between (Li et al., arXiv:1608.08710).

    torch.fx traces who reads whom. Channels that an addition joins go together, in all their producers, or not at all:
    a residual stream is cut where every layer that writes to it can be. The model's input and output, channels that a
    function pads, mixes or normalizes together, and grouped convolutions stay. What is left is an ordinary float model
    with the same Parameters, of new shapes, ready for ``prepare``.

    Before the change is kept, ``batch`` goes through the model with the columns of what goes at zero, and through the
    smaller model: the outputs agree to 1e-5 of their norm (float64 1e-9, float16 5e-3, bfloat16 4e-2).

    Args:
        model: a float model that torch.fx can trace, in place; in evaluation mode while this runs.
        channels: share of each group's channels to remove, in [0, 1), those of the least score; at least one stays. Or
            the channels themselves: a layer's name -> which of its outputs go.
        batch: one input, as :func:`quantrain.nn.calibrate` takes a batch, to check on; None: the first of ``batches``.
        batches: scores are ``||W_ij ||x_j||||`` over the columns that read a channel, x_j what they read. Without them the L2
            norm of the channel's own weights, in all of its producers.
        layers: names of layers (fnmatch patterns) whose channels go, refused where one cannot; None: all that can.
        skip: names of layers that keep theirs, and so does what is joined with them.
        multiple: as many channels stay as this divides, where the layer had as many.
        forward: called as ``forward(model, batch)``.

    Returns:
        A row per group; ``left`` says of each other layer why nothing was removed.

    Raises:
        TypeError: not a module; one batch in place of an iterable of them.
        ValueError: a model that torch.fx cannot trace; a layer named in ``layers`` or ``channels`` that cannot be cut,
            with the addition or whatever fixes it; a share outside [0, 1), a channel that is not there; nothing to
            remove; quantized layers, adapters, shards, NaN; an output that differs. The model is unchanged.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    >>> removal = remove_channels(model, 0.25, batch=torch.randn(2, 3, 8, 8))
    >>> model[0].out_channels, model[1].num_features, model[4].in_features
    (6, 6, 216)
    """
    op = "remove_channels"
    check_float(op, model)
    share = _share(op, channels)
    run = _Run(op, model, batch, batches, forward)
    with running(model):
        found = trace_channels(op, model, run.arguments())
    free = {name: group for group in found.free for name in group.names}
    known = [*free, *found.fixed]
    wanted = _wanted(op, layers, None if share is not None else channels, known)
    skipped = {id(free[name]) for name in _named(op, "skip", skip, known) if name in free}
    for name in wanted or ():
        if name in found.fixed:
            raise ValueError(f"{op}: expected channels that can be cut, got those of '{name}': {found.fixed[name]}")
    groups = [g for g in found.free if id(g) not in skipped and (wanted is None or set(g.names) & set(wanted))]
    left = dict(found.fixed)
    if not groups:
        reasons = some(f"'{name}' ({reason})" for name, reason in left.items()) or "no layer"
        raise ValueError(f"{op}: expected channels that can be cut, got none: {reasons}")
    chosen = _chosen(op, groups, channels, multiple, run)
    return run.cut(chosen, left)


def remove_heads(
    model: nn.Module,
    heads: float | Indices,
    *,
    batch: Any = None,
    batches: Iterable[Any] | None = None,
    blocks: Sequence[str] | None = None,
    forward: Forward | None = None,
) -> Removal:
    """Removes attention heads: rows of the projections to queries, keys and values, columns of the one back (Michel et
    al., arXiv:1905.10650).

    Where several heads of queries share keys and values, they go with these, whole groups only. Attributes of the
    attention modules that count heads follow; so does the model's ``config``, where all blocks are left with the same
    number. One that takes heads to be hidden_size / heads wide cannot say what is left: a note of the result says so.
    The change is checked as :func:`remove_channels` does.

    Args:
        model: blocks of the kinds of BERT, DistilBERT, GPT-2, Llama (Mistral, Qwen), ViT, OPT, Whisper, CLIP.
        heads: share of each block's heads to remove, in [0, 1), at least one stays; or a block's name -> which heads.
        batch, batches, forward: as in :func:`remove_channels`.
        blocks: names of the blocks; None: the members of the longest nn.ModuleList of one class.

    Returns:
        A row per block.

    Raises:
        TypeError, ValueError: as :func:`remove_channels`; a block without attention of a known kind; a head that is not
            there, or part of a group of shared keys and values; all heads. The model is unchanged.

    >>> from quantrain.finetune.minilm import BertConfig, SentenceClassifier
    >>> model, ids = SentenceClassifier(BertConfig(50, 32, 2, 4, 64, 16), 2), torch.arange(12).view(1, 12)
    >>> batch = (ids, torch.ones_like(ids, dtype=torch.bool))
    >>> removal = remove_heads(model, {"bert.encoder.layer.0": [1, 3]}, batch=batch)
    >>> [layer.attention.self.query.out_features for layer in model.bert.encoder.layer]
    [16, 32]
    """
    op = "remove_heads"
    check_float(op, model)
    share = _share(op, heads)
    run = _Run(op, model, batch, batches, forward)
    names = _blocks(op, model, blocks, None if share is not None else heads)
    attentions = {name: attention_of(op, model, name) for name in names}
    if share is None:
        heads = {name: attentions[name].units(op, name, heads[name]) for name in names}
    chosen = _chosen(op, [attention.group for attention in attentions.values()], heads, 1, run)
    return run.cut(chosen, changes=heads_in_config(model, attentions, chosen))


def remove_ffn_rows(
    model: nn.Module,
    rows: float | Indices,
    *,
    batch: Any = None,
    batches: Iterable[Any] | None = None,
    blocks: Sequence[str] | None = None,
    multiple: int = 1,
    forward: Forward | None = None,
) -> Removal:
    """Removes hidden units of the blocks' feed-forward parts: rows of the layers up (and of the gate), columns of the
    layer down.

    ``intermediate_size``, or whatever the attention to it is called in ``config`` and modules, follows, where all blocks
    are left with the same number. The change is checked as :func:`remove_channels` does.

    Args:
        model: blocks as in :func:`remove_heads`, and nn.TransformerEncoderLayer.
        rows: share of each block's units to remove, in [0, 1); or a block's name -> which units.
        batch, batches, multiple, forward: as in :func:`remove_channels`.
        blocks: as in :func:`remove_heads`.

    Returns:
        A row per block.

    Raises:
        TypeError, ValueError: as :func:`remove_heads`. The model is unchanged.

    >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), 2)
    >>> removal = remove_ffn_rows(model, 0.25, batch=torch.randn(1, 4, 16))
    >>> [(layer.linear1.out_features, layer.linear2.in_features) for layer in model.layers]
    [(48, 48), (48, 48)]
    """
    op = "remove_ffn_rows"
    check_float(op, model)
    share = _share(op, rows)
    run = _Run(op, model, batch, batches, forward)
    names = _blocks(op, model, blocks, None if share is not None else rows)
    groups = {name: feed_forward_of(op, model, name) for name in names}
    chosen = _chosen(op, list(groups.values()), rows, multiple, run)
    return run.cut(chosen, changes=rows_in_config(model, chosen))


def remove_layers(
    model: nn.Module,
    layers: int | Sequence[int],
    batches: Iterable[Any],
    *,
    blocks: Sequence[str] | None = None,
    mask: Callable[[Any], Tensor | None] | None = None,
    forward: Forward | None = None,
) -> Removal:
    """Removes whole blocks of a chain, those that change their input least: of least mean 1 - cos(x_in, x_out) over the
    batches' tokens (ShortGPT, Men et al., arXiv:2403.03853, eq. 1).

    ``layer_idx`` of the blocks behind, ``num_hidden_layers`` and lists per layer of ``config`` follow. Before the change
    is kept, the first batch goes through the model with the blocks handing on their input, and through the shorter
    model: the outputs agree as in :func:`remove_channels`.

    Args:
        model: it has an nn.ModuleList of blocks, each of which gets the hidden states first and gives them (first).
        layers: how many to remove, or which: indices in the list.
        batches: what ``forward`` takes.
        blocks: names of the list's members; None: as in :func:`remove_heads`.
        mask: called with a batch, gives ``[B, T]``, 0 at tokens that do not count, or None; by default the
            ``attention_mask`` of a batch that is a mapping and has one.
        forward: called as ``forward(model, batch)``.

    Returns:
        A row for the list; ``scores`` is 1 - cos of every block (empty where ``layers`` are indices), ``dropped`` the
        Parameters that went.

    Raises:
        TypeError, ValueError: as :func:`remove_heads`; as many layers as there are, or one that is not there. The model
            is unchanged.

    >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), 4)
    >>> removal = remove_layers(model, [1, 2], [torch.randn(1, 4, 16)])
    >>> len(model.layers), model.num_layers
    (2, 2)
    """
    op = "remove_layers"
    check_float(op, model)
    check_batches(op, batches)
    batches = list(batches)
    run = _Run(op, model, None, batches, forward)
    names = _blocks(op, model, blocks, None)
    parent = names[0].rpartition(".")[0]
    holder = model.get_submodule(parent)
    if not isinstance(holder, nn.ModuleList) or names != [join(parent, str(i)) for i in range(len(holder))]:
        raise ValueError(f"{op}: expected blocks to be all members of one nn.ModuleList, got {some(map(repr, names))}")
    scores: list[float] = []
    if isinstance(layers, int) and not isinstance(layers, bool):
        count = layers
        if not 0 < count < len(names):
            raise ValueError(f"{op}: expected to remove at least one of {len(names)} layers and not all, got {count}")
        scores = influences(model, [model.get_submodule(name) for name in names], batches, run.forward, mask)
        gone = sorted(sorted(range(len(names)), key=lambda index: (scores[index], -index))[:count])
    else:
        gone = indices_of(op, "layers", layers, len(names))
    removal = _shorten(run, holder, parent, gone)
    removal.scores = scores
    return removal


# ---- arguments -------------------------------------------------------------------------------------------------------


class _Run:
    """The model, and what goes through it."""

    def __init__(self, op: str, model: nn.Module, batch: Any, batches: Iterable[Any] | None, forward: Forward | None):
        self.op, self.model, self.forward = op, model, forward or run_batch
        if batches is not None:
            check_batches(op, batches)
        self.batches = None if batches is None else list(batches)
        if batch is None and not self.batches:
            raise ValueError(f"{op}: expected batch, one input to check the change on, or batches, got none")
        self.batch = self.batches[0] if batch is None else batch

    def arguments(self) -> Sequence[Any] | Mapping[str, Any]:
        """Of one call of the model."""
        return self.batch if isinstance(self.batch, (Mapping, tuple, list)) else (self.batch,)

    def output(self) -> Tensor:
        """All floating-point tensors of the model's output, float64, as one vector."""
        found = [t.detach().double().flatten().cpu() for t in _tensors(self.forward(self.model, self.batch))]
        if not found:
            raise ValueError(
                f"{self.op}: expected an output with floating-point tensors to check the change on, got none"
            )
        return torch.cat(found)

    def norms(self, groups: Sequence[Group]) -> dict[nn.Module, Tensor] | None:
        """Of what consumers read, over the batches: shaped to multiply their weights."""
        if self.batches is None:
            return None
        modules = {part.module: None for group in groups for part in group.consumers}
        weights = [Weight("", module, "weight", ((module, "weight"),)) for module in modules]
        weights = [weight for weight in weights if weight.calibrates]
        with running(self.model):
            seen = observed(weights, InputNorms, lambda: [self.forward(self.model, batch) for batch in self.batches])
        missing = [weight for weight in weights if not seen[weight].calls or not seen[weight].finite()]
        if missing:
            name = next(n for n, m in self.model.named_modules() if m is missing[0].module)
            what = "finite inputs" if seen[missing[0]].calls else "a call by the batches"
            raise ValueError(f"{self.op}: layer '{name}': expected {what}, got none")
        return {
            weight.module: norms[0][:, None] if is_transposed(weight.module) else norms[0]
            for weight in weights
            if (norms := seen[weight].norms)
        }

    def cut(
        self,
        chosen: Chosen,
        left: Mapping[str, str] | None = None,
        changes: Sequence[tuple[Any, str, Any]] = (),
    ) -> Removal:
        with running(self.model):
            surgery = cut_groups(self.op, chosen, self.output, coarsest(self.model), changes)
        return Removal.of_groups(chosen, surgery, left, config_notes(self.model))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for inner in value for tensor in _tensors(inner)]


def _share(op: str, units: float | Indices) -> float | None:
    """The share, or None where units are named."""
    if isinstance(units, Mapping):
        if not units:
            raise ValueError(f"{op}: expected a share in [0, 1) or names and what goes of them, got no name")
        return None
    if not is_number(units):
        raise TypeError(f"{op}: expected a share in [0, 1) or a mapping of names, got {type(units).__name__}")
    return check_sparsity(op, units, "the share to remove")


def _named(op: str, argument: str, patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    rule = f"name of {argument} to be a layer's that makes channels"
    return matching(op, argument, patterns, names, rule, lambda _: f"there are {some(map(repr, names))}")


def _wanted(op: str, layers: Iterable[str] | None, units: Indices | None, known: Sequence[str]) -> list[str] | None:
    if units is not None:
        if layers is not None:
            raise ValueError(f"{op}: expected layers with a share, got them with channels by name")
        unknown = [name for name in units if name not in known]
        if unknown:
            raise ValueError(
                f"{op}: expected names of layers that make channels, got {unknown[0]!r} (there are {some(map(repr, known))})"
            )
        return list(units)
    return None if layers is None else _named(op, "layers", layers, known)


def _chosen(
    op: str, groups: Sequence[Group], units: float | Indices, multiple: int, run: _Run
) -> list[tuple[Group, list[int]]]:
    """Each group with the units that stay; those that lose none are left out."""
    if multiple < 1:
        raise ValueError(f"{op}: expected multiple of at least 1, got {multiple}")
    norms = None if isinstance(units, Mapping) else run.norms(groups)
    chosen = []
    for group in groups:
        if isinstance(units, Mapping):
            gone: set[int] = set()
            for name in (name for name in group.names if name in units):
                gone |= set(indices_of(op, name, units[name], group.size))
            kept = [unit for unit in range(group.size) if unit not in gone]
            if not kept:
                raise ValueError(f"{op}: expected some of '{group.name}' to stay, got all of them to remove")
        else:
            kept = kept_units(group.scores(norms), units, multiple)
        if len(kept) < group.size:
            chosen.append((group, kept))
    if not chosen:
        largest = max(group.size for group in groups)
        raise ValueError(f"{op}: expected at least one of {groups[0].what} to remove, got none of {largest} at {units}")
    return chosen


def _blocks(op: str, model: nn.Module, blocks: Sequence[str] | None, units: Indices | None) -> list[str]:
    """Names of blocks: those of ``units``, else of ``blocks``, else those that the model has."""
    check_patterns(op, "blocks", blocks)
    names = list(units) if units is not None else block_names(model) if blocks is None else list(blocks)
    if not names:
        raise ValueError(
            f"{op}: expected an nn.ModuleList of blocks of one class in the model, got none (blocks=[...] names them)"
        )
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ValueError(
                f"{op}: expected names of blocks, got {name!r} (there are {some(map(repr, block_names(model))) or 'none'})"
            )
    return names


def _shorten(run: _Run, holder: nn.ModuleList, parent: str, gone: Sequence[int]) -> Removal:
    members = list(holder)
    kept = [index for index in range(len(members)) if index not in gone]
    with running(run.model):
        with ExitStack() as hooks:
            for index in gone:
                handle = members[index].register_forward_hook(handing_on, with_kwargs=True)
                hooks.callback(handle.remove)
            try:
                expected = run.output()
            except RuntimeError as error:
                raise ValueError(
                    f"{run.op}: expected layers that give what they get in shape, got an error where {list(gone)} of '{parent}' "
                    f"hand on their input: {str(error).splitlines()[0]}"
                ) from error
        surgery, why = tried(
            lambda: shortened(run.model, holder, parent, kept), expected, run.output, coarsest(run.model)
        )
    if surgery is None:
        raise ValueError(
            f"{run.op}: expected the model without layers {list(gone)} of '{parent}' to give what it gives where they hand "
            f"on their input, got {why} (the model is as it was)"
        )
    alive = {id(parameter) for parameter in run.model.parameters()}
    dropped = [p for index in gone for p in members[index].parameters() if id(p) not in alive]
    row = {"layer": parent, "what": "layers", "before": len(members), "after": len(kept)}
    kept_layers = {parent: torch.tensor(kept, dtype=torch.int64)}
    return Removal([row], kept_layers, dropped=dropped, notes=config_notes(run.model))
