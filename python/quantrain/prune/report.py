"""How sparse a model is, what that saves, and what it gains in time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantrain.nn.prepare import check_model
from quantrain.tables import Table

from .selection import Weight, all_weights, in_embedding, is_distributed_tensor, masked_weights

__all__ = ["SparsityTable", "sparsity"]

kRows = 1024  # of the input that products are measured with
kTimes = 20  # calls of a measurement, of which the median counts
kFlushed = 256 << 20  # bytes written between calls, so that no weight lies in a cache


class SparsityTable(Table):
    """A row per weight: ``weight`` (the parameter's name), ``elements``, ``zeros``, ``sparsity`` (a fraction),
    ``dense_bytes`` and ``packed_bytes`` (the mask and the kept values); where measured ``dense_us`` and ``sparse_us``.

    ``total`` sums them. ``scales``, of :func:`sparsegpt` with ``quantize``: parameter's name -> scale ``[O, 1]`` of the
    grid that its kept weights lie on.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], scales: Mapping[str, Tensor] | None = None):
        columns = {
            "weight": "weight",
            "elements": "elements",
            "zeros": "zeros",
            "sparsity": "sparsity",
            "dense_bytes": "dense bytes",
            "packed_bytes": "packed bytes",
        }
        if any("dense_us" in row for row in rows):
            columns |= {"dense_us": "dense us", "sparse_us": "2:4 us"}
        self.total = {
            key: sum(row[key] for row in rows) for key in ("elements", "zeros", "dense_bytes", "packed_bytes")
        }
        self.total["sparsity"] = self.total["zeros"] / max(self.total["elements"], 1)
        self.scales = dict(scales or {})
        note = (
            f"total: {self.total['zeros']:,} of {self.total['elements']:,} are zero ({100 * self.total['sparsity']:.1f} %), "
            f"{self.total['dense_bytes']:,} bytes dense, {self.total['packed_bytes']:,} packed"
        )
        super().__init__(columns, rows, notes=[note])


@torch.no_grad()
def sparsity(model: nn.Module, *, measure: bool = False, rows: int = kRows) -> SparsityTable:
    """Zeros and bytes of every weight that can be pruned, or has a mask.

    Packed is a mask of one bit per element and the kept values in the weight's type; a weight without a mask counts as
    dense.

    Args:
        model: any model.
        measure: also time each linear layer's product with ``rows`` rows of random input, as ``F.linear`` and, where the
            weight keeps at most 2 of every 4 and cuSPARSELt takes it (CUDA, 16 bits), as a 2:4 product: microseconds,
            the median of 20 calls with cold caches. Other cells stay empty.
        rows: of that input.

    Raises:
        ValueError: a model without such weights.

    >>> import quantrain.prune as prune
    >>> model = nn.Linear(8, 4, bias=False)
    >>> _ = prune.magnitude(model, 0.5)
    >>> print(prune.sparsity(model))
    weight  elements  zeros  sparsity  dense bytes  packed bytes
    weight        32     16      0.50          128            68
    total: 16 of 32 are zero (50.0 %), 128 bytes dense, 68 packed
    """
    check_model("sparsity", model)
    weights = {weight.name: weight for weight in all_weights(model) if not in_embedding(weight)} | masked_weights(model)
    if not weights:
        raise ValueError("sparsity: expected a model with a layer that can be pruned, got none")
    return table_of(list(weights.values()), measure=measure, rows=rows)


@torch.no_grad()
def table_of(
    weights: Sequence[Weight],
    scales: Mapping[str, Tensor] | None = None,
    *,
    measure: bool = False,
    rows: int = kRows,
) -> SparsityTable:
    counts = [torch.count_nonzero(_local(weight.parameter)).cpu() for weight in weights]
    table = []
    for weight, kept in zip(weights, torch.stack(counts).tolist(), strict=True):
        parameter = weight.parameter
        elements, size = parameter.numel(), parameter.element_size()
        packed = elements * size if weight.mask is None else weight.mask.numel() + kept * size
        row = {
            "weight": weight.name,
            "elements": elements,
            "zeros": elements - kept,
            "sparsity": (elements - kept) / max(elements, 1),
            "dense_bytes": elements * size,
            "packed_bytes": packed,
        }
        if measure:
            row |= _measured(weight, rows)
        table.append(row)
    return SparsityTable(table, scales)


def _local(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_distributed_tensor(tensor) else tensor


# ---- time ------------------------------------------------------------------------------------------------------------


def _measured(weight: Weight, rows: int) -> dict[str, float | None]:
    """Microseconds of the weight's product."""
    matrix = weight.rows(weight.parameter.detach())
    if matrix.dim() != 2 or isinstance(weight.module, nn.Embedding):
        return {"dense_us": None, "sparse_us": None}
    x = torch.randn(rows, matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    sparse = _two_of_four(matrix)
    return {
        "dense_us": _median_us(lambda: F.linear(x, matrix), matrix.device),
        "sparse_us": None if sparse is None else _median_us(lambda: F.linear(x, sparse), matrix.device),
    }


def _two_of_four(matrix: Tensor) -> Tensor | None:
    """The weight as torch's 2:4 tensor, or None where it is none or has no kernel."""
    if not matrix.is_cuda or matrix.dtype not in (torch.float16, torch.bfloat16) or matrix.shape[1] % 4:
        return None
    if bool((matrix.unflatten(1, (-1, 4)).count_nonzero(-1) > 2).any()):
        return None
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

    try:
        sparse = SparseSemiStructuredTensorCUSPARSELT.from_dense(matrix)
        F.linear(torch.zeros(16, matrix.shape[1], dtype=matrix.dtype, device=matrix.device), sparse)
    except (RuntimeError, NotImplementedError):  # a shape or a device without a kernel
        return None
    return sparse


def _median_us(call: Callable[[], Any], device: torch.device) -> float:
    call()
    if device.type != "cuda":
        times = []
        for _ in range(kTimes):
            start = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - start))
        return statistics.median(times)
    flushed = torch.empty(kFlushed, dtype=torch.uint8, device=device)
    pairs = []
    for _ in range(kTimes):
        flushed.zero_()
        pairs.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        pairs[-1][0].record()
        call()
        pairs[-1][1].record()
    torch.cuda.synchronize(device)
    return statistics.median(1e3 * start.elapsed_time(end) for start, end in pairs)
