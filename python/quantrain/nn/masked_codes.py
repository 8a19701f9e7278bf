"""Masks of pruned weights in checkpoints: buffers ``weight_mask`` (:mod:`quantrain.pruning`), and the codes of converted
layers without those that a mask drops.

A converted layer whose mask drops codes of 0 is written as ``weight_mask`` and ``weight_codes_kept``, the codes that are kept,
in row-major order: of a weight half of which is dropped 5 bits an element in place of 8. C++ reads and writes the same
(nn/masked_codes.h).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor, nn

from quantrain.pruning import unpack_mask

_CODES, _KEPT, _MASK = "weight_codes", "weight_codes_kept", "weight_mask"


def keep_codes(tensors: dict[str, Tensor]) -> None:
    """In place, what a file holds: kept codes where a layer's codes are of a byte each and dropped ones are 0."""
    for prefix in _prefixes(tensors, _MASK):
        codes, mask = tensors.get(prefix + _CODES), tensors[prefix + _MASK]
        if codes is None or not _fits(mask, codes.numel()):  # none, or two codes to a byte
            continue
        kept = unpack_mask(mask, codes.shape)
        if not bool(codes[~kept].any()):
            tensors[prefix + _KEPT] = codes[kept]
            del tensors[prefix + _CODES]


def spread_codes(source: str, tensors: dict[str, Tensor], shapes: Mapping[str, list[int]]) -> None:
    """In place, and back: zeros where a mask drops. ``shapes`` are of converted layers' weights, by the layer's name.

    Raises:
        ValueError: no mask or shape, a mask or a number of codes that do not fit.
    """
    for prefix in _prefixes(tensors, _KEPT):
        layer = prefix.removesuffix(".")
        if layer not in shapes or prefix + _MASK not in tensors:
            _fail(source, f"mask and shape of the layer {layer!r}, whose kept codes it has", "none")
        shape, mask, codes = shapes[layer], tensors[prefix + _MASK], tensors[prefix + _KEPT]
        if not _fits(mask, math.prod(shape)):
            _fail(source, f"a mask of a bit for each of {math.prod(shape)} codes of {layer!r}", list(mask.shape))
        kept = unpack_mask(mask, shape)
        count = int(kept.sum())
        if codes.dim() != 1 or codes.numel() != count or codes.is_floating_point():
            _fail(source, f"{count} kept codes of {layer!r}", list(codes.shape))
        tensors[prefix + _CODES] = torch.zeros(shape, dtype=codes.dtype).masked_scatter_(kept, codes)
        del tensors[prefix + _KEPT]


def take_new_masks(source: str, tensors: dict[str, Tensor], model: nn.Module) -> dict[nn.Module, Tensor]:
    """Takes the masks out of ``tensors`` that belong to modules without one.

    Raises:
        ValueError: a mask that does not fit the weight beside it.
    """
    modules, masks = dict(model.named_modules()), {}
    for prefix in _prefixes(tensors, _MASK):
        owner = modules.get(prefix.removesuffix("."))
        if owner is None or _MASK in owner._buffers:
            continue
        mask, weight, codes = tensors[prefix + _MASK], tensors.get(prefix + "weight"), tensors.get(prefix + _CODES)
        packed = weight is None and codes is not None  # two codes to a byte: fewer bytes than there are bits
        fits = (
            mask.dtype == torch.uint8
            and mask.dim() == 1
            and (packed or (weight is not None and _fits(mask, weight.numel())))
        )
        if not fits:
            _fail(source, f"a mask of the weight beside {prefix + _MASK!r}", list(mask.shape))
        masks[owner] = tensors.pop(prefix + _MASK)
    return masks


def add_masks(masks: Mapping[nn.Module, Tensor]) -> None:
    """Registers them, each where its module's tensors are."""
    for owner, mask in masks.items():
        place = next((t.device for t in (*owner.parameters(recurse=False), *owner.buffers(recurse=False))), mask.device)
        owner.register_buffer(_MASK, mask.to(place))


def _prefixes(tensors: Mapping[str, Tensor], end: str) -> list[str]:
    """Of "a.weight_mask" "a."."""
    return [name.removesuffix(end) for name in tensors if name == end or name.endswith(f".{end}")]


def _fits(mask: Tensor, numel: int) -> bool:
    return mask.dtype == torch.uint8 and list(mask.shape) == [(numel + 7) // 8]


def _fail(source: str, rule: str, value: object) -> NoReturn:
    raise ValueError(f"load_checkpoint: {source}: expected {rule}, got {value}")
