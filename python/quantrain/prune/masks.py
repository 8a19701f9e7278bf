"""Masks by magnitude, and what a model's masks are: read, loaded, removed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantrain.nn.prepare import check_model, some
from quantrain.pruning import prune_mask, prune_masks

from .report import SparsityTable, table_of
from .selection import (
    MaskWrites,
    Weight,
    apply_masks,
    check_mask,
    check_pattern,
    check_sparsity,
    is_distributed_tensor,
    masked_weights,
    prunable_weights,
    write_masks,
)

__all__ = ["load_masks", "magnitude", "masks_of", "remove_masks"]

_SUFFIX = "_mask"


def magnitude(
    model: nn.Module,
    sparsity: float,
    *,
    scope: str = "layer",
    pattern: str | None = None,
    layers: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    embeddings: bool = False,
) -> SparsityTable:
    """Zeroes the weights of least magnitude (Han et al., arXiv:1506.02626) and keeps their masks in the model.

    Each module that holds a pruned parameter ``weight`` gets a buffer ``weight_mask``: uint8 ``[ceil(numel / 8)]``, bit
    ``i % 8`` of byte ``i // 8`` 1 where element i in row-major order is kept; the weight is 0 where it is 0. A parameter
    that several modules hold is pruned once, and all of them get the mask. What was pruned before is 0 and so pruned
    first.

    Args:
        model: float layers, or what ``prepare`` made of them: nn.Linear, nn.Conv1d to 3d and their transposed twins,
            transformers' Conv1D, the projections of nn.MultiheadAttention, quantrain's layers before conversion. In
            place; the Parameters stay the same objects.
        sparsity: share of each weight's elements to drop, in [0, 1): exactly round(sparsity * count) of them, of equal
            magnitudes the later ones.
        scope: ``"layer"``: that share of every weight; ``"global"``: of all together, by one threshold.
        pattern: None: the least of the weight; ``"row"``: of each output's row; ``"2:4"`` (or another n:m): n kept of
            every m along the row, ``[O, K]`` after flattening, at sparsity 1 - n / m. With scope ``"layer"`` only.
        layers: names of layers (fnmatch patterns) to prune; None: all.
        skip: names of layers to leave.
        embeddings: prune nn.Embedding too, and layers whose weight is an embedding's (a tied head).

    Returns:
        A row for each pruned weight (:func:`sparsity` gives those of the whole model).

    Raises:
        TypeError: not a module; patterns that are no list.
        ValueError: sparsity outside [0, 1), an unknown scope or pattern, a pattern that names no layer, rows that m does
            not divide (naming the layer), NaN or Inf in a weight, a DTensor. The model is unchanged.

    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> table = magnitude(model, 0.5, skip=["2"])
    >>> [(row["weight"], row["zeros"]) for row in table.rows], model[0].weight_mask.shape
    ([('0.weight', 16)], torch.Size([4]))
    """
    weights = prunable_weights("magnitude", model, layers, skip, embeddings)
    check_magnitude("magnitude", weights, sparsity, scope, pattern)
    write_masks(magnitude_masks(weights, sparsity, scope, pattern))
    return table_of(weights)


def check_magnitude(op: str, weights: Sequence[Weight], sparsity: float, scope: str, pattern: str | None) -> None:
    check_sparsity(op, sparsity)
    if scope not in ("layer", "global"):
        raise ValueError(f"{op}: expected scope 'layer' or 'global', got {scope!r}")
    if pattern is None:
        if scope == "global" and len(devices := {str(weight.parameter.device) for weight in weights}) > 1:
            raise ValueError(f"{op}: expected the weights of scope 'global' on one device, got {sorted(devices)}")
        return
    check_pattern(op, pattern, sparsity, weights)
    if scope == "global":
        raise ValueError(f"{op}: expected no pattern with scope 'global', which has one threshold, got {pattern!r}")


@torch.no_grad()
def magnitude_masks(
    weights: Sequence[Weight],
    sparsity: float,
    scope: str = "layer",
    pattern: str | None = None,
    values: Sequence[Tensor] | None = None,
) -> dict[Weight, Tensor]:
    """Packed masks of the weights, or of ``values`` of their shapes."""
    values = [weight.parameter.detach() for weight in weights] if values is None else values
    if scope == "global":
        return dict(zip(weights, prune_masks(list(values), sparsity=sparsity), strict=True))
    masks = {}
    for weight, value in zip(weights, values, strict=True):
        rows = value if pattern is None else weight.rows(value)
        mask = prune_mask(rows, sparsity=sparsity, pattern=pattern or "layer")
        masks[weight] = mask if pattern is None else weight.mask_from_rows(mask, rows)
    return masks


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's masks: name of a pruned parameter -> its packed mask, the buffer itself.

    A parameter that several modules hold appears once, under its first name.

    >>> model = nn.Sequential(nn.Linear(8, 2))
    >>> _ = magnitude(model, 0.5)
    >>> {name: mask.shape for name, mask in masks_of(model).items()}
    {'0.weight': torch.Size([2])}
    """
    check_model("masks_of", model)
    return {name: weight.mask for name, weight in masked_weights(model).items()}


@torch.no_grad()
def load_masks(model: nn.Module, state_dict: Mapping[str, Any]) -> list[str]:
    """Gives a model the masks of a state dict, so that ``model.load_state_dict(state_dict)`` finds a place for each.

    A new model has no ``weight_mask``, and PyTorch calls such a key unexpected. What the masks drop is set to zero at
    once; the other weights are left to ``load_state_dict``.

    Args:
        model: of the structure that was pruned; masks that it has already and the state dict has too are overwritten.
        state_dict: of a pruned model, or any mapping with its masks. Of keys that begin with ``module.`` (DDP) it is as
            strict as ``load_state_dict``.

    Returns:
        Names of the parameters that have masks now.

    Raises:
        ValueError: no mask in the state dict; a mask of no parameter, or of another shape or type. The model is
            unchanged.

    >>> pruned, fresh = (nn.Sequential(nn.Linear(8, 2)) for _ in range(2))
    >>> _ = magnitude(pruned, 0.5)
    >>> load_masks(fresh, pruned.state_dict())
    ['0.weight']
    >>> fresh.load_state_dict(pruned.state_dict())
    <All keys matched successfully>
    """
    check_model("load_masks", model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    own = {name for name, _ in model.named_buffers(remove_duplicate=False)} - {
        f"{name}{_SUFFIX}" for name in parameters
    }
    given = {
        key: mask
        for key, mask in state_dict.items()
        if key.endswith(_SUFFIX) and isinstance(mask, Tensor) and mask.dtype == torch.uint8 and key not in own
    }
    if not given:
        raise ValueError(
            f"load_masks: expected masks (keys that end with '{_SUFFIX}', of uint8) in the state dict, got {len(state_dict)} "
            "other entries"
        )
    found: dict[int, tuple[list[tuple[nn.Module, str]], str, Tensor]] = {}
    for key, mask in given.items():
        name = key.removesuffix(_SUFFIX)
        if name not in parameters:
            raise ValueError(
                f"load_masks: expected every mask to be of a parameter of the model, got '{key}' (its parameters: "
                f"{some(map(repr, parameters))})"
            )
        parameter = parameters[name]
        if is_distributed_tensor(parameter):
            raise ValueError(f"load_masks: expected whole tensors, got a shard in '{name}': load before fully_shard")
        check_mask("load_masks", key, mask, parameter)
        path, _, attribute = name.rpartition(".")
        owners, _, _ = found.setdefault(id(parameter), ([], name, mask))
        owners.append((modules[path], attribute))
    masks = {}
    for owners, name, mask in found.values():
        owners = list(dict.fromkeys(owners))
        module, attribute = owners[0]
        masks[Weight(name.rpartition(".")[0], module, attribute, tuple(owners))] = mask.clone()
    write_masks(masks)
    return [weight.name for weight in masks]


def remove_masks(model: nn.Module) -> list[str]:
    """Makes pruned weights plain ones: what is zero stays zero until somebody trains it, and the buffers go.

    Returns:
        Names of the parameters that had masks.

    >>> model = nn.Sequential(nn.Linear(8, 2))
    >>> _ = magnitude(model, 0.5)
    >>> remove_masks(model), sorted(model.state_dict()), int((model[0].weight == 0).sum())
    (['0.weight'], ['0.bias', '0.weight'], 8)
    """
    check_model("remove_masks", model)
    weights = masked_weights(model)
    apply_masks([(weight.parameter, weight.mask) for weight in weights.values()])
    for weight in weights.values():
        for module, key in weight.owners:
            delattr(module, f"{key}{_SUFFIX}")
    MaskWrites.count += 1
    return list(weights)
