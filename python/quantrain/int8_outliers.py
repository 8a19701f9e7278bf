"""Products of int8 rows some of whose columns are far larger than the others (LLM.int8(), Dettmers et al.,
arXiv:2208.07339).

Those columns enter as two int8 planes of 15 bits together, on the other columns' grid but for a power of two, so that
the whole product is one int32 sum, of fixed shapes, and waits for nothing::

    main      codes of the row with its outlier columns as 0, scale s1 = absmax of the others / 127
    planes    q = rint(x / s2), s2 = s1 2^e with the least e >= 0 for which |q| <= 16256;
              hi = floor((q + 64) / 128), lo = q - 128 hi
    product   float(main b^T + ((128 hi + lo) bo^T) 2^e) b_scale s1 + bias

``b`` holds all columns of the weight, ``bo`` its outlier columns again. e is at most log2(512 / Ko), so that the sum
fits: in a row whose outliers would need more (more than 4096 times as large as all others, for 16 columns), s1 is
larger. A row of zeros has scales 1; a NaN or Inf in a row makes the row NaN. The bits are the same on CPU and CUDA, for
up to 512 outlier columns and K up to 65536; beyond, the product is three products whose sum is float32. No gradients.
Errors are ``ValueError`` (values and shapes) and ``TypeError`` (element types and devices).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantrain import _arguments

_ops = torch.ops.quantrain


def int8_quantize_rows_outliers(
    input: Tensor, outlier_columns: Tensor, *, column_factor: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Int8 codes of rows without their outlier columns, and those columns as two planes.

    Rows of ``input * column_factor``. Shapes: input ``[..., K]`` of float32, float16 or bfloat16, outlier_columns
    int32 or int64 ``[Ko]``, none twice, a negative one for a column of zeros (on CUDA also one beyond K, which is an
    error on the CPU); column_factor float32 ``[K]`` -> codes int8 ``[..., K]``, planes int8 ``[..., 2 Ko]`` (hi, then
    lo), scale float32 ``[..., 2]`` (s1, s2).

    >>> x = torch.tensor([[1.0, 100.0, -0.5]])
    >>> codes, planes, scale = int8_quantize_rows_outliers(x, torch.tensor([1]))
    >>> codes.tolist(), planes.tolist()
    ([[127, 0, -64]], [[99, 28]])
    """
    _arguments.tensor("int8_quantize_rows_outliers", "input", input)
    return _ops.int8_quantize_rows_outliers(input, outlier_columns, column_factor=column_factor)


def int8_mm_outliers(
    a: Tensor,
    a_planes: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_outlier: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The product of :func:`int8_quantize_rows_outliers`' rows with an int8 weight.

    Shapes: a, a_planes, a_scale as that function gives them (of other scales' quotient the power of two below it counts,
    at most the limit above); b int8 ``[N, K]``, b_outlier int8 ``[N, Ko]``, b's outlier
    columns; b_scale float32 of N elements or of one; bias ``[N]`` of a floating type -> ``[..., N]``. out_dtype:
    float32, float16 or bfloat16.

    >>> x, w = torch.randn(3, 64), torch.randn(5, 64)
    >>> x[:, 7] *= 100
    >>> columns = torch.tensor([7])
    >>> wq, ws = torch.ops.quantrain.int8_quantize_rows.nearest(w)
    >>> y = int8_mm_outliers(*int8_quantize_rows_outliers(x, columns), wq, wq[:, columns], ws)
    >>> bool((y - x @ (wq * ws).T).abs().max() < 0.5)
    True
    """
    return _ops.int8_mm_outliers(
        _arguments.tensor("int8_mm_outliers", "a", a),
        a_planes,
        a_scale,
        b,
        b_outlier,
        b_scale,
        bias,
        out_dtype=_arguments.type_name("int8_mm_outliers", "out_dtype", out_dtype, _arguments.FLOATS),
    )


def int8_outlier_columns(input: Tensor, *, threshold: float, capacity: int) -> Tensor:
    """The columns that hold an element of magnitude at least ``threshold``, the largest first, at most ``capacity``.

    Of the rows of this call together, as LLM.int8() chooses them: a row's result then depends on the others. Shapes:
    input ``[..., K]`` -> int64 ``[capacity]``, -1 where there are fewer.

    >>> int8_outlier_columns(torch.tensor([[1.0, -7.0, 0.0], [9.0, 2.0, 0.0]]), threshold=6.0, capacity=3).tolist()
    [0, 1, -1]
    """
    return _ops.int8_outlier_columns(
        _arguments.tensor("int8_outlier_columns", "input", input), threshold=threshold, capacity=capacity
    )
