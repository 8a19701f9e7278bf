"""The arithmetic of post-training quantization: statistics of an input's columns, and what is chosen from them.

A column is an input channel: dimension 1 of a weight ``[O, K]``, the last of an input ``[..., K]``. C++ has the same
functions in ``<quantrain/ops/ptq.h>``. No gradients. Errors are ``ValueError`` and ``TypeError``.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.quantrain


def column_statistics_(absmax: Tensor, mean_abs: Tensor, hessian: Tensor | None, rows: Tensor, input: Tensor) -> None:
    """Takes the rows of ``input`` into running statistics, in place and without waiting for the device.

    The statistics lie on input's device or, for lack of its memory, all on the CPU, which waits for the device.

    absmax: the largest magnitudes; mean_abs: the means of ``|x|``; hessian: the mean of ``2 x x^T``, or None; rows: how
    many rows there were. NaN and Inf stay in what they enter.

    Shapes: absmax, mean_abs float32 ``[K]``, hessian float32 ``[K, K]``, rows int64 ``[1]``, input ``[..., K]`` of
    float32, float16 or bfloat16.

    >>> absmax, mean_abs, rows = torch.zeros(2), torch.zeros(2), torch.zeros(1, dtype=torch.int64)
    >>> column_statistics_(absmax, mean_abs, None, rows, torch.tensor([[1.0, -4.0], [3.0, 0.0]]))
    >>> absmax.tolist(), mean_abs.tolist(), rows.item()
    ([3.0, 4.0], [2.0, 2.0], 2)
    """
    _ops.column_statistics_(absmax, mean_abs, hessian, rows, input)


def smooth_factor(input_absmax: Tensor, weight_absmax: Tensor, *, alpha: float) -> Tensor:
    """SmoothQuant's factor per column (Xiao et al., arXiv:2211.10438, eq. 4): x / s and W * s have the product of x, W.

    s = input_absmax^alpha / weight_absmax^(1 - alpha), at least 1e-5, and 1 where either is 0.

    Shapes: float32 ``[K]`` each.

    >>> smooth_factor(torch.tensor([4.0, 0.0]), torch.tensor([1.0, 2.0]), alpha=0.5).tolist()
    [2.0, 1.0]
    """
    return _ops.smooth_factor(input_absmax, weight_absmax, alpha=alpha)


def gptq_round(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    group_size: int,
    quant_min: int = -8,
    quant_max: int = 7,
    order: str = "activation",
    damping: float = 0.01,
    keep: Tensor | None = None,
    keep_scale: Tensor | None = None,
) -> tuple[Tensor, float]:
    """GPTQ's codes (Frantar et al., arXiv:2210.17323): columns not yet rounded make up for the error of those that are.

    In float64, by the Cholesky factor of the inverse Hessian. Scales are those given, of the weight before any change.
    A column that the inputs never use has codes of 0.

    Args:
        order: ``"activation"``, columns by falling diagonal of the Hessian; or ``"natural"``.
        damping: added to the Hessian's diagonal, times its mean over the columns not kept; doubled up to ten times
            where there is no factor.
        keep, keep_scale: int64 ``[Ko]``, columns of 8 bits, -127 to 127, with scales float32 ``[O, 1]``.

    Shapes: weight ``[O, K]``, hessian ``[K, K]``, scale float32 and zero_point int32 ``[O, ceil(K / group_size)]`` ->
    codes int8 ``[O, K]``, and the error tr((W - Q) H (W - Q)^T) / tr(W H W^T).

    Raises:
        ValueError: a weight or Hessian with NaN or Inf; one that no damping makes positive definite.

    >>> x, w = torch.randn(256, 64), torch.randn(8, 64)
    >>> codes, error = gptq_round(w, 2 * x.T @ x / 256, w.abs().amax(1, keepdim=True) / 7, group_size=64)
    >>> codes.shape, error < 0.02
    (torch.Size([8, 64]), True)
    """
    codes, error = _ops.gptq_round(
        weight,
        hessian,
        scale,
        zero_point,
        group_size=group_size,
        quant_min=quant_min,
        quant_max=quant_max,
        order=order,
        damping=damping,
        keep=keep,
        keep_scale=keep_scale,
    )
    return codes, float(error)


def awq_scale(
    weight: Tensor, hessian: Tensor, mean_abs: Tensor, *, bits: int, group_size: int, steps: int = 20
) -> tuple[Tensor, float]:
    """AWQ's factor per column (Lin et al., arXiv:2306.00978): W * factor is rounded, x / factor multiplies it.

    Of mean_abs^r and mean_abs^r / u^(1 - r), r = 1 / steps, ..., 1, u the mean of |w| over its group's largest, each
    divided by sqrt(max min), and of 1, the one whose nearest codes have the least tr((W - Q) H (W - Q)^T). In float32.

    Shapes: weight ``[O, K]``, hessian ``[K, K]``, mean_abs float32 ``[K]`` -> factor float32 ``[K]``, and that error
    over tr(W H W^T).

    Raises:
        ValueError: a weight or Hessian with NaN or Inf.

    >>> x, w = torch.randn(256, 64) * torch.linspace(0.1, 10, 64), torch.randn(8, 64)
    >>> factor, error = awq_scale(w, 2 * x.T @ x / 256, x.abs().mean(0), bits=4, group_size=32)
    >>> bool(factor[-1] > factor[0])
    True
    """
    factor, error = _ops.awq_scale(weight, hessian, mean_abs, bits=bits, group_size=group_size, steps=steps)
    return factor, float(error)
