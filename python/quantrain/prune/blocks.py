"""The parts of transformer blocks that removals cut: attention, feed-forward parts, the chain of blocks itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantrain.distillation import hidden_cosine
from quantrain.nn.block_forms import FORMS, inside

from .calibrated import running
from .cuts import Chosen, Group, Part, Surgery
from .selection import is_transposed

__all__ = [
    "Attention",
    "attention_of",
    "config_notes",
    "feed_forward_of",
    "handing_on",
    "heads_in_config",
    "indices_of",
    "influences",
    "join",
    "rows_in_config",
    "shortened",
]

Forward = Callable[[nn.Module, Any], Any]
Change = tuple[Any, str, Any]  # object, attribute, value to set

_SELF_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkv")
# (projections to queries, keys and values; the one back; the module that counts heads), below a block
_ATTENTIONS = [(form.qkv, form.out, form.attention) for form in FORMS]
_ATTENTIONS += [(_SELF_ATTENTION, "self_attn.out_proj", "self_attn")]  # OPT, Whisper, BART, CLIP, SigLIP
# (layers up, the gate first where there is one; the layer down)
_FEED_FORWARDS = [(form.up, form.down) for form in FORMS]
_FEED_FORWARDS += [(("fc1",), "fc2"), (("linear1",), "linear2"), (("mlp.fc1",), "mlp.fc2"), (("mlp.0",), "mlp.3")]
_HEADS = ("num_attention_heads", "num_heads", "n_heads")
_SHARED_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size")
_ALL_HEADS_SIZES = ("all_head_size", "split_size", "dim", "inner_dim")
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HIDDEN_SIZES = ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim")


def indices_of(op: str, name: str, indices: Any, count: int) -> list[int]:
    """Distinct ones, of which at least one is left."""
    try:
        found = sorted({int(index) for index in indices})
    except (TypeError, ValueError):
        raise TypeError(f"{op}: expected indices of '{name}', got {indices!r}") from None
    if not found or found[0] < 0 or found[-1] >= count or len(found) == count:
        raise ValueError(f"{op}: expected some of 0 to {count - 1} of '{name}', not all, got {list(indices)}")
    return found


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


@dataclass
class Attention:
    """shared: heads of queries per head of keys and values; a unit of the group is such a set."""

    group: Group
    module: nn.Module
    heads: int
    shared: int
    size: int

    def units(self, op: str, name: str, heads: Sequence[int]) -> list[int]:
        gone = set(indices_of(op, name, heads, self.heads))
        units = sorted({head // self.shared for head in gone})
        for unit in units:
            whole = set(range(unit * self.shared, (unit + 1) * self.shared))
            if not whole <= gone:
                raise ValueError(
                    f"{op}: expected all {self.shared} heads of '{name}' that share keys and values, {min(whole)} to "
                    f"{max(whole)}, got {sorted(whole & gone)} of them"
                )
        return units


def _plain_layers(op: str, block: nn.Module, name: str, paths: Sequence[str]) -> list[nn.Module]:
    layers = [inside(block, path) for path in paths]
    for layer, path in zip(layers, paths, strict=True):
        plain = isinstance(layer, nn.Linear) or is_transposed(layer)
        if not plain or not isinstance(layer._parameters.get("weight"), nn.Parameter):
            raise ValueError(f"{op}: expected a plain linear layer '{join(name, path)}', got {type(layer).__name__}")
    return layers


def _found(block: nn.Module, paths: Sequence[str]) -> bool:
    return all(isinstance(inside(block, path), nn.Module) for path in paths)


def _rows_and_columns(layer: nn.Module) -> tuple[int, int]:
    """Dimensions of a linear layer's weight: outputs, inputs."""
    return (1, 0) if is_transposed(layer) else (0, 1)


def attention_of(op: str, model: nn.Module, name: str) -> Attention:
    block = model.get_submodule(name)
    if isinstance(block, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        raise ValueError(
            f"{op}: expected attention whose heads may be fewer than its width holds, got nn.MultiheadAttention in '{name}', "
            "which divides embed_dim by num_heads"
        )
    form = next((form for form in _ATTENTIONS if _found(block, (*form[0], form[1], form[2]))), None)
    if form is None:
        raise ValueError(
            f"{op}: expected attention of the kind of BERT's, GPT-2's or Llama's in block '{name}', got none in "
            f"{type(block).__name__}"
        )
    paths, out_path, module_path = form
    *qkv, out = _plain_layers(op, block, name, (*paths, out_path))
    module = inside(block, module_path)
    rows, columns = _rows_and_columns(qkv[0])[0], _rows_and_columns(out)[1]
    width = out.weight.shape[columns]
    config = getattr(module, "config", None)
    heads = _number(module, _HEADS) or _number(config, _HEADS)
    size = _number(module, _HEAD_SIZES) or (width // heads if heads else 0)
    if not size or width % size or (heads and len(paths) == 3 and heads * size != qkv[0].weight.shape[rows]):
        raise ValueError(
            f"{op}: expected '{join(name, module_path)}' to say how many heads it has, got {heads} of {width}"
        )
    heads = width // size
    fused = len(qkv) == 1
    kv_heads = heads if fused else qkv[1].weight.shape[rows] // size
    if fused and qkv[0].weight.shape[rows] != 3 * width or not kv_heads or heads % kv_heads:
        raise ValueError(f"{op}: expected queries, keys and values of whole heads in '{name}', got other sizes")
    shared = heads // kv_heads
    group = Group([name], kv_heads, "heads", settle=lambda left: _attention_sizes(module, heads, kv_heads, size, left))
    for index in range(3):
        layer = qkv[0] if fused else qkv[index]
        start, per_unit = (index * width if fused else 0), size * (shared if index == 0 else 1)
        group.producers.append(Part(layer, "weight", rows, start, per_unit))
        if layer.bias is not None:
            group.followers.append(Part(layer, "bias", 0, start, per_unit))
    group.consumers.append(Part(out, "weight", columns, 0, size * shared))
    return Attention(group, module, heads, shared, size)


def _number(owner: Any, names: Sequence[str]) -> int:
    """The first of the attributes that is a number above 0, else 0."""
    found = (getattr(owner, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), 0)


def _attention_sizes(module: nn.Module, heads: int, kv_heads: int, size: int, left: int) -> list[Change]:
    """What an attention module's attributes are when ``left`` heads of keys and values are left."""
    shared = heads // kv_heads
    changes = _sized([module], _HEADS, heads, left * shared)
    changes += _sized([module], _SHARED_HEADS, kv_heads, left)
    return changes + _sized([module], _ALL_HEADS_SIZES, heads * size, left * shared * size)


def _sized(
    owners: Sequence[Any], names: Sequence[str], before: int, after: int, unset: Mapping[str, Any] | None = None
) -> list[Change]:
    """(owner, attribute, after) of each attribute that says ``before``, or is as ``unset`` has it."""
    missing = object()
    return [
        (owner, name, after)
        for owner in owners
        for name in names
        if (value := getattr(owner, name, missing)) == before
        or (unset is not None and name in unset and value is unset[name])
    ]


def feed_forward_of(op: str, model: nn.Module, name: str) -> Group:
    block = model.get_submodule(name)
    form = next((form for form in _FEED_FORWARDS if _found(block, (*form[0], form[1]))), None)
    if form is None:
        raise ValueError(
            f"{op}: expected a feed-forward part of the kind of BERT's, GPT-2's or Llama's in block '{name}', got none in "
            f"{type(block).__name__}"
        )
    *up, down = _plain_layers(op, block, name, (*form[0], form[1]))
    size = up[0].weight.shape[_rows_and_columns(up[0])[0]]
    holders = [inside(block, path.rpartition(".")[0]) if "." in path else block for path in (*form[0], form[1])]
    owners = list({id(holder): holder for holder in holders}.values())
    group = Group([name], size, "rows", settle=lambda left: _sized(owners, _HIDDEN_SIZES, size, left))
    for layer in up:
        group.producers.append(Part(layer, "weight", _rows_and_columns(layer)[0]))
        if layer.bias is not None:
            group.followers.append(Part(layer, "bias", 0))
    group.consumers.append(Part(down, "weight", _rows_and_columns(down)[1]))
    return group


# ---- what else says how large a model is -----------------------------------------------------------------------------


def _configs(model: nn.Module, where: str) -> list[Any]:
    """transformers' configurations of the module at path ``where``, and the model's where it is of their class."""
    found = {id(c): c for m in model.get_submodule(where).modules() if (c := getattr(m, "config", None)) is not None}
    known = [config for config in found.values() if type(config).__module__.startswith("transformers")]
    own = getattr(model, "config", None)
    if type(own) in {type(config) for config in known} and id(own) not in found:
        known.append(own)
    return known


def _names(config: Any, what: str, where: str) -> tuple[str, ...]:
    """By which attributes a configuration may count the heads, rows or layers of the blocks at path ``where``."""
    part = {"heads": "attention_heads", "rows": "ffn_dim", "layers": "layers"}[what]
    side = "decoder" if "decoder" in where else "encoder"
    if hasattr(config, f"encoder_{part}") and hasattr(config, f"decoder_{part}"):
        return (f"{side}_{part}",)
    if what == "layers" and side == "decoder" and hasattr(config, "num_decoder_layers"):
        return ("num_decoder_layers",)
    return {"heads": _HEADS, "rows": _HIDDEN_SIZES, "layers": _COUNTS}[what]


def _uniform(model: nn.Module, chosen: Chosen) -> bool:
    """Whether all blocks beside one another are left with the same number."""
    names = {group.name for group, _ in chosen}
    lists = {name.rpartition(".")[0] for name in names}
    members = {join(path, key) for path in lists for key in model.get_submodule(path)._modules}
    return len({(group.size, len(kept)) for group, kept in chosen}) == 1 and len(lists) == 1 and names == members


def heads_in_config(model: nn.Module, attentions: Mapping[str, Attention], chosen: Chosen) -> list[Change]:
    """What to set in configurations, which count the heads of all blocks at once."""
    if not _uniform(model, chosen):
        return []
    first, left = next(iter(attentions.values())), len(chosen[0][1])
    where = chosen[0][0].name.rpartition(".")[0]
    changes: list[Change] = []
    for config in _configs(model, where):
        changes += _sized([config], _names(config, "heads", where), first.heads, left * first.shared)
        changes += _sized([config], _SHARED_HEADS, first.group.size, left)
        changes += [(config, "head_dim", first.size)] if hasattr(config, "head_dim") else []
    return changes


def rows_in_config(model: nn.Module, chosen: Chosen) -> list[Change]:
    """As :func:`heads_in_config`."""
    if not _uniform(model, chosen):
        return []
    (group, kept), where = chosen[0], chosen[0][0].name.rpartition(".")[0]
    changes: list[Change] = []
    for config in _configs(model, where):
        changes += _sized([config], _names(config, "rows", where), group.size, len(kept), {"n_inner": None})
    return changes


def config_notes(model: nn.Module) -> list[str]:
    """A note where a model that is made from the configuration, as ``from_pretrained`` does, has other sizes."""
    config = getattr(model, "config", None)
    if config is None or not type(model).__module__.startswith("transformers"):
        return []
    try:
        with torch.random.fork_rng(), torch.device("meta"):
            made = type(model)(copy.deepcopy(config))
        shapes = [{name: p.shape for name, p in each.named_parameters()} for each in (model, made)]
    except Exception:  # a configuration may refuse numbers that do not divide one another
        shapes = [{}, None]
    if shapes[0] == shapes[1]:
        return []
    return [f"config: {type(config).__name__} cannot say what is left, from_pretrained makes other sizes from it"]


# ---- whole layers ----------------------------------------------------------------------------------------------------


def shortened(model: nn.Module, holder: nn.ModuleList, parent: str, kept: Sequence[int]) -> Surgery:
    members, count = list(holder), len(holder)
    surgery = Surgery()
    surgery.set(holder, "_modules", {str(new): members[old] for new, old in enumerate(kept)})
    for new, old in enumerate(kept):
        for module in members[old].modules():
            if getattr(module, "layer_idx", None) == old and isinstance(module.layer_idx, int):
                surgery.set(module, "layer_idx", new)
    owner = model.get_submodule(parent.rpartition(".")[0]) if parent else model
    for change in _sized([owner], _COUNTS, count, len(kept)):
        surgery.set(*change)
    for config in _configs(model, parent.rpartition(".")[0]):
        for change in _sized([config], _names(config, "layers", parent), count, len(kept)):
            surgery.set(*change)
        for name, value in list(vars(config).items()):
            if "layer" in name and isinstance(value, (list, tuple)) and len(value) == count:
                surgery.set(config, name, type(value)(value[index] for index in kept))
    return surgery


def _hidden_given(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    if args:
        return args[0]
    return kwargs.get("hidden_states", next((v for v in kwargs.values() if isinstance(v, Tensor)), None))


def handing_on(module: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Any:
    """The output with the input in place of the hidden states."""
    hidden = _hidden_given(args, kwargs)
    return type(output)((hidden, *output[1:])) if isinstance(output, (tuple, list)) else hidden


def influences(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[Any],
    forward: Forward,
    mask: Callable[[Any], Tensor | None] | None,
) -> list[float]:
    """Mean 1 - cos between what each block gets and gives."""
    sums: list[list[Tensor]] = [[] for _ in blocks]
    tokens: list[list[Tensor]] = [[] for _ in blocks]
    counted: Tensor | None = None

    def watch(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
            before = _hidden_given(args, kwargs)
            after = output[0] if isinstance(output, (tuple, list)) else output
            rows = before.shape[:-1]
            if after.shape != before.shape:
                raise ValueError(
                    f"remove_layers: expected layers that give what they get in shape, got {list(after.shape)} for "
                    f"{list(before.shape)} at layer {index}"
                )
            if counted is not None and counted.numel() != rows.numel():
                raise ValueError(
                    f"remove_layers: expected a mask of as many elements as there are tokens, {rows.numel()}, got "
                    f"{list(counted.shape)}"
                )
            of_rows = None if counted is None else counted.to(before.device).reshape(rows)
            after, before = (t.float() if t.dtype == torch.float64 else t for t in (after, before))
            sums[index].append(hidden_cosine(after, before, mask=of_rows, reduction="sum"))
            tokens[index].append(torch.as_tensor(rows.numel()) if of_rows is None else of_rows.ne(0).sum())

        return hook

    with running(model), ExitStack() as hooks:
        for index, block in enumerate(blocks):
            hooks.callback(block.register_forward_hook(watch(index), with_kwargs=True).remove)
        for batch in batches:
            counted = mask(batch) if mask is not None else _attention_mask(batch)
            forward(model, batch)
    missing = [index for index, of_block in enumerate(sums) if not of_block]
    if missing:
        raise ValueError(f"remove_layers: expected every layer to be called by the batches, got none for {missing}")
    scores = [
        float(torch.stack(total).sum()) / max(float(torch.stack(count).sum()), 1)
        for total, count in zip(sums, tokens, strict=True)
    ]
    wrong = [index for index, score in enumerate(scores) if not math.isfinite(score)]
    if wrong:
        raise ValueError(f"remove_layers: expected finite hidden states, got NaN or Inf at layer {wrong[0]}")
    return scores


def _attention_mask(batch: Any) -> Tensor | None:
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None
