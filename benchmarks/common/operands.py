"""Random operands of integer kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def random_codes(rows: int, columns: int, device: str) -> Tensor:
    """int8 codes in [-127, 127]: rounded normal numbers, as weights and activations have them."""
    return torch.randn(rows, columns, device=device).mul_(32).round_().clamp_(-127, 127).to(torch.int8)


def random_scale(rows: int, device: str) -> Tensor:
    """float32 scales ``[rows, 1]``."""
    return torch.rand(rows, 1, device=device) * 0.01 + 0.001


def codes(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    low, high = {torch.uint8: (0, 256), torch.int8: (-127, 128), torch.int32: (-(2**18), 2**18)}[dtype]
    x = torch.randint(low, high, shape, dtype=dtype, device="cuda")
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x
