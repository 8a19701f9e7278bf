"""SharedPass: what layers that share one input's fake-quantizer have of one tensor together."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

__all__ = ["SharedPass"]


class SharedPass:
    """A tensor that several layers read in one pass: which have read it, its range, and its rounded form for those to come.

    The rounded form is dropped with the tensor, and as a gradient reaches it: a later call would find its graph freed.
    """

    def __init__(self, x: Tensor):
        this = weakref.ref(self)
        self.x = weakref.ref(x, lambda _: _drop(this))
        self.version, self.thread = x._version, threading.get_ident()
        self.served: set[int] = set()
        self.observed: tuple[Tensor, Tensor | None] | None = None
        self.dtype: torch.dtype | None = None
        self.result: Any = None  # Quantized

    def is_of(self, x: Tensor) -> bool:
        return self.x() is x and self.version == x._version and self.thread == threading.get_ident()

    def keep(self, result: Any, dtype: torch.dtype) -> None:
        self.result, self.dtype = result, dtype
        if result.values.requires_grad:
            this = weakref.ref(self)
            result.values.register_hook(lambda _: _drop(this))


def _drop(latest: weakref.ref[SharedPass]) -> None:
    this = latest()
    if this is not None:
        this.result = None
