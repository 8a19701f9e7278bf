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


def round_stochastic(master: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 rounded for the given 32-bit words (int64): up in magnitude where dropped part and draw reach a step."""
    value = master.double()
    mantissa, least, drawn = {torch.float16: (10, -14, 13), torch.bfloat16: (7, -126, 16)}[dtype]
    exponent = (torch.frexp(value.abs())[1].double() - 1).clamp(min=least)
    step = torch.exp2(exponent - mantissa)
    whole = torch.floor(value.abs() / step)
    part = value.abs() / step - whole
    up = part + (words >> (32 - drawn)).double() * 2.0**-drawn >= 1
    if dtype == torch.float16:  # below the normal halves all 24 bits of a uniform number are compared
        up = torch.where(value.abs() < 2.0**-14, (words >> 8).double() * 2.0**-24 < part, up)
    rounded = torch.copysign((whole + up) * step, value)
    largest = torch.finfo(dtype).max
    at_end = ~value.isfinite() | (rounded.abs() > largest) | ((value.abs() >= largest) & (dtype == torch.float16))
    return torch.where(at_end, master.to(dtype), rounded.to(dtype))
