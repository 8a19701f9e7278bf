"""What a benchmark checks before it times: references in PyTorch's operators, on fresh random operands.

Operators run under :func:`poisoned`: memory that they allocate holds NaN (floating point) or the largest integer before they write.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors hold NaN, or the largest integer of their type."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def require(condition: bool | Tensor, what: str) -> None:
    """Raises:
    AssertionError: the condition does not hold.
    """
    if not bool(condition):
        raise AssertionError(what)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())
