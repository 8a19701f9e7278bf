"""Which weights stay, and weights that stay at zero.

A mask is packed, uint8 ``[ceil(numel / 8)]``: bit ``i % 8`` of byte ``i // 8`` is element i of the weight in row-major
order, 1 where it is kept. Scores are ``|w|`` (Han et al., arXiv:1506.02626), or ``|w| n_j`` with n_j the norm of input
column j (Wanda, Sun et al., arXiv:2306.11695, eq. 1); a weight ``[O, ...]`` is taken as a matrix ``[O, K]``. Exactly as many
elements are dropped as the sparsity says, rounded half to even; of equal scores the later element goes first; NaN is kept.
CPU and CUDA agree. No gradients. Errors are ``ValueError`` (values and shapes) and ``TypeError`` (element types and devices).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantrain import _arguments

__all__ = ["apply_masks_", "pack_mask", "prune_mask", "prune_masks", "sparsegpt_prune", "unpack_mask"]

_ops = torch.ops.quantrain


def prune_mask(
    weight: Tensor, input_norm: Tensor | None = None, *, sparsity: float = 0.5, pattern: str = "layer"
) -> Tensor:
    """The packed mask of one weight.

    ``pattern``: "layer" drops the lowest scores of the whole weight, "row" those of each output row, "n:m" (such as "2:4")
    keeps n of m neighbours along K, whatever ``sparsity``. ``input_norm``: float32 ``[K]``, or None for ``|w|``.

    >>> prune_mask(torch.tensor([[3.0, -1.0, 2.0, 0.5]]), sparsity=0.5).tolist()  # elements 0 and 2
    [5]
    """
    _arguments.tensor("prune_mask", "weight", weight)
    return _ops.prune_mask(weight, input_norm, sparsity=sparsity, pattern=pattern)


def prune_masks(weights: Sequence[Tensor], *, sparsity: float) -> list[Tensor]:
    """A packed mask per weight with one threshold for all: the lowest ``|w|`` of all of them together.

    All on one device.

    >>> [mask.tolist() for mask in prune_masks([torch.tensor([1.0, 4.0]), torch.tensor([2.0, 3.0])], sparsity=0.5)]
    [[2], [2]]
    """
    return _ops.prune_masks(list(weights), sparsity=sparsity) if weights else []


def pack_mask(mask: Tensor) -> Tensor:
    """A mask of bool or numbers, of any shape, as bits; 0 is dropped.

    >>> pack_mask(torch.tensor([[True, False], [True, True]])).tolist()
    [13]
    """
    _arguments.tensor("pack_mask", "mask", mask)
    return _ops.pack_mask(mask)


def unpack_mask(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A packed mask as bool of that shape.

    >>> unpack_mask(torch.tensor([13], dtype=torch.uint8), (2, 2)).tolist()
    [[True, False], [True, True]]
    """
    _arguments.tensor("unpack_mask", "mask", mask)
    return _ops.unpack_mask(mask, list(shape))


def apply_masks_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Zero, in place, where the bit is 0 (NaN too); what is kept is not touched.

    Tensors of any real type on one device, each with its packed mask; on CUDA one launch for up to 96 contiguous ones.

    >>> weight = torch.tensor([1.0, float("nan"), 3.0, 4.0])
    >>> apply_masks_([weight], [torch.tensor([13], dtype=torch.uint8)])
    >>> weight.tolist()
    [1.0, 0.0, 3.0, 4.0]
    """
    if tensors or masks:
        _ops.apply_masks_(list(tensors), list(masks))


def check_mask(op: str, tensor: Tensor, mask: Tensor) -> None:
    """Raises where ``mask`` is no packed mask of ``tensor``: TypeError for its type or device, ValueError for its size."""
    _arguments.tensor(op, "mask", mask)
    if mask.dtype != torch.uint8:
        raise TypeError(f"{op}: expected a mask of uint8, got {mask.dtype}")
    if mask.device != tensor.device:
        raise TypeError(f"{op}: expected a mask on {tensor.device}, got {mask.device}")
    size = (tensor.numel() + 7) // 8
    if list(mask.shape) != [size]:
        raise ValueError(
            f"{op}: expected a mask of {size} bytes, a bit for each element of {list(tensor.shape)}, got {list(mask.shape)}"
        )


def sparsegpt_prune(
    weight: Tensor,
    hessian: Tensor,
    *,
    sparsity: float = 0.5,
    pattern: str = "layer",
    damping: float = 0.01,
    scale: Tensor | None = None,
    quant_min: int = -128,
    quant_max: int = 127,
) -> tuple[Tensor, Tensor]:
    """``(weight, mask)`` of SparseGPT (Frantar and Alistarh, arXiv:2301.00774, algorithm 1).

    Columns in turn; the error of what is dropped or rounded is spread over the columns after it. The score is
    ``w^2 / U_jj^2`` with ``U^T U`` the damped inverse of the hessian, ``[K, K]`` float32 or float64: the sum of ``x x^T`` up
    to a factor. ``pattern``: "layer" is a share of each block of 128 columns, as published, "row" of each row in it, or "n:m".
    ``scale`` float32 ``[O, 1]``: kept weights are rounded to codes times it on the way. Arithmetic in float64; waits for the
    device.

    >>> weight, mask = sparsegpt_prune(torch.tensor([[1.0, 0.1]]), torch.eye(2))
    >>> weight.tolist(), mask.tolist()
    ([[1.0, 0.0]], [1])
    """
    _arguments.tensor("sparsegpt_prune", "weight", weight)
    _arguments.tensor("sparsegpt_prune", "hessian", hessian)
    return _ops.sparsegpt_prune(
        weight,
        hessian,
        sparsity=sparsity,
        pattern=pattern,
        damping=damping,
        scale=scale,
        quant_min=quant_min,
        quant_max=quant_max,
    )
