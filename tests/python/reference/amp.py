"""Float64 oracles of the amp family."""

from __future__ import annotations

import torch
from torch import Tensor


def norm(grads: list[Tensor], scale: float) -> float:
    """sqrt(sum (g / scale)^2) over all elements."""
    return float(sum((grad.double() / scale).square().sum() for grad in grads).sqrt()) if grads else 0.0


def non_finite(grads: list[Tensor]) -> list[float]:
    """1 for each tensor that holds Inf or NaN."""
    return [float(not bool(torch.isfinite(grad).all())) for grad in grads]


def scaled(grad: Tensor, scale: float, total_norm: float, max_norm: float) -> Tensor:
    """g / scale * min(1, max_norm / (norm + 1e-6)), not rounded."""
    return grad.double() / scale * min(1.0, max_norm / (total_norm + 1e-6))


def neighbours(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest value of ``dtype`` not above and the smallest not below each element, as float64."""
    nearest = master.to(dtype)
    down = torch.where(
        nearest.double() > master.double(), torch.nextafter(nearest, nearest.new_tensor(-torch.inf)), nearest
    )
    up = torch.where(
        nearest.double() < master.double(), torch.nextafter(nearest, nearest.new_tensor(torch.inf)), nearest
    )
    return down.double(), up.double()
