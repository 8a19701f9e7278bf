"""Pruning in float64: masks of every pattern, packed masks, the cubic schedule, SparseGPT by the inverse Hessian itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 128  # SparseGPT's columns that share a choice


def all_but_lowest(scores: Tensor, dropped: int) -> Tensor:
    """bool of a vector: False at as many of the lowest, of equal ones at the later; NaN counts as the highest."""
    scores = torch.where(scores.isnan(), math.inf, scores.double())
    kept = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    later_first = torch.argsort(scores.flip(0), stable=True)
    kept[len(scores) - 1 - later_first[:dropped]] = False
    return kept


def dropped_of(sparsity: float, count: int) -> int:
    return round(sparsity * count)


def mask(weight: Tensor, sparsity: float, pattern: str = "layer", input_norm: Tensor | None = None) -> Tensor:
    """bool of the weight's shape: True is kept. Scores |w|, or |w| times the norm of the column of ``[O, K]``."""
    rows = weight.detach().reshape(len(weight), -1).float().abs().double()  # scores are float32 in the operator
    if input_norm is not None:
        rows = (rows.float() * input_norm.float()).double()
    return _choice(rows, sparsity, pattern).view(weight.shape)


def _choice(scores: Tensor, sparsity: float, pattern: str) -> Tensor:
    """bool ``[O, K]``."""
    if pattern == "layer":
        return all_but_lowest(scores.flatten(), dropped_of(sparsity, scores.numel())).view(scores.shape)
    if pattern == "row":
        count = dropped_of(sparsity, scores.shape[1])
        return torch.stack([all_but_lowest(row, count) for row in scores])
    kept, of = map(int, pattern.split(":"))
    return torch.stack([all_but_lowest(group, of - kept) for group in scores.reshape(-1, of)]).view(scores.shape)


def global_masks(weights: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """One threshold for all of them together."""
    flat = torch.cat([weight.detach().float().abs().flatten() for weight in weights])
    kept = all_but_lowest(flat, dropped_of(sparsity, len(flat)))
    return [
        part.view(weight.shape) for part, weight in zip(kept.split([w.numel() for w in weights]), weights, strict=True)
    ]


def pack(mask: Tensor) -> Tensor:
    """uint8 ``[ceil(numel / 8)]``: bit i % 8 of byte i // 8 is element i in row-major order."""
    bits = [int(bit != 0) for bit in mask.flatten().tolist()]
    bits += [0] * (-len(bits) % 8)
    packed = [sum(bit << place for place, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)]
    return torch.tensor(packed, dtype=torch.uint8, device=mask.device)


def unpack(mask: Tensor, shape: Sequence[int]) -> Tensor:
    bits = [byte >> place & 1 for byte in mask.tolist() for place in range(8)]
    return torch.tensor(bits[: math.prod(shape)], dtype=torch.bool, device=mask.device).view(*shape)


def cubic(step: int, sparsity: float, initial: float, begin: int, end: int) -> float:
    """Zhu and Gupta, arXiv:1710.01878, eq. 1, with end = t_0 + n dt."""
    t = min(max(step, begin), end)
    return sparsity + (initial - sparsity) * (1 - (t - begin) / (end - begin)) ** 3


def damped(hessian: Tensor, damping: float) -> Tensor:
    """With the columns that were never there at 1, and damping times the mean of the diagonal on it."""
    h = hessian.double().clone()
    h.diagonal()[h.diagonal() == 0] = 1
    h.diagonal().add_(damping * h.diagonal().mean())
    return h


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    pattern: str = "layer",
    damping: float = 0.01,
    scale: Tensor | None = None,
    low: int = -128,
    high: int = 127,
) -> tuple[Tensor, Tensor]:
    """(weight, bool mask), float64. After each column the inverse Hessian of the columns left is updated (Frantar and
    Alistarh, arXiv:2301.00774, algorithm 1), without a Cholesky factor: U_jj^2 is that inverse's first element."""
    w = weight.detach().double().clone()
    w[:, hessian.diagonal() == 0] = 0
    inverse = torch.linalg.inv(damped(hessian, damping))
    pivots, rows = _eliminated(inverse)
    kept = torch.ones(w.shape, dtype=torch.bool)
    groups = 0 if pattern in ("layer", "row") else int(pattern.split(":")[1])
    for j in range(w.shape[1]):
        begin = j - j % (groups or BLOCK)
        if j == begin:
            end = min(begin + (groups or BLOCK), w.shape[1])
            kept[:, begin:end] = _choice(w[:, begin:end].square() / pivots[begin:end], sparsity, pattern)
        value = w[:, j]
        if scale is not None:
            s = scale.double().flatten()
            value = torch.round(value / s).clamp(low, high) * s
        value = torch.where(kept[:, j], value, 0.0)
        error = (w[:, j] - value) / pivots[j]
        w[:, j] = value
        w[:, j + 1 :] -= error[:, None] * rows[j][None, j + 1 :]
    return w, kept


def _eliminated(inverse: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Of each column, when those before it are gone: the inverse Hessian's element on the diagonal, and its row."""
    inverse, pivots, rows = inverse.clone(), [], []
    for j in range(len(inverse)):
        pivots.append(inverse[j, j].clone())
        rows.append(inverse[j].clone())
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return torch.stack(pivots), rows
