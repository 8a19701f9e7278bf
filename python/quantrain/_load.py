"""Loads the compiled library, once, with the checks that turn a linker's message into a sentence."""

from __future__ import annotations

import torch

_BUILT_FOR = "2.11"


def load():
    """Import ``quantrain._C``, which registers the operators in ``torch.ops.quantrain``."""
    if not torch.__version__.startswith(_BUILT_FOR + "."):
        raise ImportError(f"quantrain: expected torch {_BUILT_FOR}.*, got {torch.__version__}")
    from quantrain import _C

    return _C
