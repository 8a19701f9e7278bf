"""Which parameters are pruned, how their rows lie, and how their masks are written."""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from quantrain._arguments import is_number
from quantrain.nn.convolutions import transposed_from_rows, transposed_rows
from quantrain.nn.layers import Transposed
from quantrain.nn.prepare import check_model, check_patterns, some
from quantrain.pruning import apply_masks_, pack_mask, unpack_mask

__all__ = [
    "MaskWrites",
    "Weight",
    "all_weights",
    "apply_masks",
    "check_mask",
    "check_pattern",
    "check_sparsity",
    "in_embedding",
    "is_distributed_tensor",
    "is_transposed",
    "masked_weights",
    "prunable_weights",
    "write_masks",
]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of nn.MultiheadAttention
_PATTERN = re.compile(r"([1-9]\d*):([1-9]\d*)")


class MaskWrites:
    """Counts writes of masks, of all models: what holds masks elsewhere looks them up anew where it moved."""

    count = 0


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter that can be pruned.

    Attributes:
        layer: path of the module that holds it; of tied ones the first.
        module, key: the module, and the parameter's name in it.
        owners: every module and name that hold this Parameter.
    """

    layer: str
    module: nn.Module
    key: str
    owners: tuple[tuple[nn.Module, str], ...]

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.key}" if self.layer else self.key

    @property
    def parameter(self) -> nn.Parameter:
        return self.module._parameters[self.key]

    @property
    def mask(self) -> Tensor | None:
        return self.module._buffers.get(f"{self.key}_mask")

    @property
    def groups(self) -> int:
        return getattr(self.module, "groups", 1)

    @property
    def calibrates(self) -> bool:
        """Whether its columns are those of what its module is called with."""
        return self.key == "weight" and not isinstance(
            self.module, (*_TRANSPOSED_CONVOLUTIONS, nn.MultiheadAttention, nn.Embedding)
        )

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as ``[O, ...]``, one row per output."""
        if is_transposed(self.module):
            return tensor.t().contiguous()
        if isinstance(self.module, _TRANSPOSED_CONVOLUTIONS):
            return transposed_rows(tensor, self.groups)
        return tensor

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows`."""
        if is_transposed(self.module):
            return rows.t().contiguous()
        if isinstance(self.module, _TRANSPOSED_CONVOLUTIONS):
            return transposed_from_rows(rows, self.groups)
        return rows

    def mask_from_rows(self, mask: Tensor, rows: Tensor) -> Tensor:
        """A packed mask of the rows as one of the weight."""
        if is_transposed(self.module) or isinstance(self.module, _TRANSPOSED_CONVOLUTIONS):
            return pack_mask(self.from_rows(unpack_mask(mask, rows.shape)))
        return mask


# ---- which parameters ------------------------------------------------------------------------------------------------


def is_transposed(module: nn.Module) -> bool:
    """Whether it is a linear layer with a weight ``[K, O]``: transformers' Conv1D and its quantized twins."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    return isinstance(module, Transposed) or (transformers is not None and isinstance(module, transformers.Conv1D))


def is_distributed_tensor(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _keys(module: nn.Module) -> Sequence[str]:
    """Names of the parameters of a module that are weights with rows."""
    if isinstance(module, nn.MultiheadAttention):
        return _PROJECTIONS
    kinds = (nn.Linear, nn.Embedding, *_CONVOLUTIONS, *_TRANSPOSED_CONVOLUTIONS)
    return ("weight",) if isinstance(module, kinds) or is_transposed(module) else ()


def all_weights(model: nn.Module) -> list[Weight]:
    """Every weight of a known kind of layer that is a plain Parameter, once each, in order of registration."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, key))
    found: dict[int, Weight] = {}
    for layer, module in model.named_modules():
        for key in _keys(module):
            parameter = module._parameters.get(key)
            if parameter is not None and parameter.is_floating_point() and id(parameter) not in found:
                found[id(parameter)] = Weight(layer, module, key, tuple(owners[id(parameter)]))
    return list(found.values())


def prunable_weights(
    op: str,
    model: nn.Module,
    layers: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    embeddings: bool = False,
) -> list[Weight]:
    """The weights of the layers that ``layers`` names (None: all) and ``skip`` does not.

    An embedding's weight, and one that is tied to it, is among them with ``embeddings`` alone.

    Raises:
        TypeError: not a module; patterns that are no list.
        ValueError: a pattern that names no layer; no layer at all; a weight that is not finite or is sharded.
    """
    check_model(op, model)
    every = [w for w in all_weights(model) if embeddings or not in_embedding(w)]
    every_layer = list(dict.fromkeys(weight.layer for weight in every))
    chosen = set(every_layer) if layers is None else set(_matching(op, "layers", layers, every_layer, model))
    chosen -= set(_matching(op, "skip", skip, every_layer, model))
    weights = [weight for weight in every if weight.layer in chosen]
    if not weights:
        raise ValueError(f"{op}: expected at least one layer to prune, got none ({_what_there_is(model)})")
    for weight in weights:
        _check_weight(op, weight)
    return weights


def in_embedding(weight: Weight) -> bool:
    """Whether it is an embedding's table, alone or too."""
    return any(isinstance(module, nn.Embedding) for module, _ in weight.owners)


def matching(
    op: str, argument: str, patterns: Iterable[str], names: Sequence[str], rule: str, there_is: Callable[[str], str]
) -> list[str]:
    """The names that each pattern matches, in the patterns' order; ``there_is`` says what a pattern without one could be."""
    check_patterns(op, argument, patterns)
    found: list[str] = []
    for pattern in patterns:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            raise ValueError(f"{op}: expected every {rule}, got {pattern!r} ({there_is(pattern)})")
        found += matches
    return found


def _matching(op: str, argument: str, patterns: Iterable[str], names: Sequence[str], model: nn.Module) -> list[str]:
    rule = f"pattern of {argument} to name a layer that can be pruned"
    return matching(op, argument, patterns, names, rule, lambda pattern: _nearest(pattern, names, model))


def _nearest(pattern: str, names: Sequence[str], model: nn.Module) -> str:
    module = dict(model.named_modules()).get(pattern)
    if module is not None and not any(name.startswith(f"{pattern}.") for name in names):
        return f"a {type(module).__name__}, {_why_not(module)}"
    close = difflib.get_close_matches(pattern, names, n=5, cutoff=0.3) or list(names)
    return (
        f"of {len(names)} layers the nearest are {some(repr(name) for name in close[:5])}" if names else "no layer can"
    )


def _why_not(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "which needs embeddings=True"
    weight = module._parameters.get("weight")
    if _keys(module) and not isinstance(weight, nn.Parameter):
        return "whose weight is computed, or is no parameter"
    if _keys(module):
        return "whose weight is an embedding's too, which needs embeddings=True"
    return "which has no rows and columns"


def _what_there_is(model: nn.Module) -> str:
    first = [f"{name!r} ({type(module).__name__})" for name, module in model.named_modules() if name]
    return f"first modules: {some(first)}" if first else f"a {type(model).__name__}, {_why_not(model)}"


def _check_weight(op: str, weight: Weight) -> None:
    parameter = weight.parameter
    if is_distributed_tensor(parameter):
        raise ValueError(
            f"{op}: expected whole tensors, got a shard in '{weight.name}' (a DTensor): prune before fully_shard"
        )
    if parameter.is_meta:
        raise ValueError(f"{op}: expected '{weight.name}' to have values, got a tensor on the meta device")
    if not bool(torch.isfinite(parameter).all()):
        raise ValueError(f"{op}: expected finite weights, got NaN or Inf in '{weight.name}'")
    for module, key in weight.owners:
        held = getattr(module, f"{key}_mask", None)
        if held is not None and f"{key}_mask" not in module._buffers:
            raise ValueError(
                f"{op}: expected no attribute '{key}_mask' but a packed mask beside '{weight.name}', got {type(held).__name__}"
            )
        if held is not None:
            check_mask(op, f"{weight.name}_mask", held, parameter)


def check_mask(op: str, name: str, mask: Tensor, parameter: Tensor) -> None:
    """Raises where ``mask`` has another shape or type than a packed mask of ``parameter``."""
    expected = [-(-parameter.numel() // 8)]
    if mask.dtype != torch.uint8 or list(mask.shape) != expected:
        raise ValueError(
            f"{op}: expected '{name}' to be uint8 {expected}, one bit per element of {list(parameter.shape)}, got "
            f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
        )


# ---- sparsity and pattern --------------------------------------------------------------------------------------------


def check_sparsity(op: str, sparsity: float, name: str = "sparsity") -> float:
    if not is_number(sparsity):
        raise TypeError(f"{op}: expected {name} to be a number, got {type(sparsity).__name__}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"{op}: expected {name} in [0, 1), got {sparsity}")
    return float(sparsity)


def check_pattern(op: str, pattern: str, sparsity: float, weights: Sequence[Weight]) -> None:
    """Raises for an unknown pattern, another sparsity than n:m says, or rows that m does not divide."""
    found = _PATTERN.fullmatch(pattern) if isinstance(pattern, str) else None
    if found is None:
        if pattern in ("layer", "row"):
            return
        raise ValueError(f"{op}: expected pattern None, 'row' or 'n:m' such as '2:4', got {pattern!r}")
    kept, of = int(found[1]), int(found[2])
    if kept >= of or not math.isclose(sparsity, 1 - kept / of, rel_tol=1e-6):
        raise ValueError(
            f"{op}: expected pattern '{pattern}' to keep fewer than it is of, at its sparsity {1 - kept / of:g}, got "
            f"{sparsity:g}"
        )
    for weight in weights:
        rows = weight.rows(weight.parameter.detach())
        columns = rows[:1].numel()
        if columns % of:
            raise ValueError(
                f"{op}: expected rows of a multiple of {of} for '{pattern}', got {columns} in '{weight.name}' "
                f"(skip=[{weight.layer!r}] leaves it dense)"
            )


# ---- masks -----------------------------------------------------------------------------------------------------------


def masked_weights(model: nn.Module) -> dict[str, Weight]:
    """The parameters beside which a packed mask lies, by their names, once each."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    found: dict[int, tuple[str, nn.Module, str]] = {}
    for layer, module in model.named_modules():
        for key, parameter in module._parameters.items():
            mask = module._buffers.get(f"{key}_mask")
            if parameter is None or mask is None or mask.dtype != torch.uint8:
                continue
            owners.setdefault(id(parameter), []).append((module, key))
            found.setdefault(id(parameter), (layer, module, key))
    weights = [Weight(*place, tuple(owners[identity])) for identity, place in found.items()]
    return {weight.name: weight for weight in weights}


@torch.no_grad()
def write_masks(masks: Mapping[Weight, Tensor]) -> None:
    """Registers ``weight_mask`` beside every weight, for each module that holds it, and zeroes what is pruned.

    A mask that is there already is overwritten in place, so that whoever holds it (DDP, an optimizer) sees the new one.
    """
    for weight, mask in masks.items():
        held = weight.mask
        if held is None:
            held = mask.to(weight.parameter.device)
        else:
            held.copy_(mask)
        for module, key in weight.owners:
            if module._buffers.get(f"{key}_mask") is not held:
                module.register_buffer(f"{key}_mask", held)
    MaskWrites.count += 1
    apply_masks([(weight.parameter, weight.mask) for weight in masks])


@torch.no_grad()
def apply_masks(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Zeroes each tensor where its mask's bit is 0: one launch per device."""
    by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for tensor, mask in pairs:
        tensors, masks = by_device.setdefault(tensor.device, ([], []))
        tensors.append(tensor)
        masks.append(mask)
    for tensors, masks in by_device.values():
        apply_masks_(tensors, masks)
        increment_version(tensors)  # layers that keep a rounded weight look at it
