"""Unbiased quantizers of gradients for fully quantized training (StatQuant).

Chen, Gai, Yao, Mahoney, Gonzalez, "A statistical framework for low-bitwidth training of deep neural networks", NeurIPS
2020, arXiv:2010.14298. A gradient is a matrix X ``[N, D]``: ``rows="sample"`` takes size 0 as N and the rest as D,
``rows="token"`` the last size as D and the rest as N. With B = 2^bits - 1 and R(.) the range (largest minus smallest
value):

=================  ===============  ==================================================================================
quantizer          block            expected sum of squared errors, at most
=================  ===============  ==================================================================================
``per_tensor``     X                N D R(X)^2 / (4 B^2); zero is on the grid
``per_sample``     row x_i          D sum_i R(x_i)^2 / (4 B^2)
``per_channel``    column of X      likewise over the columns
``householder``    row of T X       D (lambda_1^(2/3) k^(-1/3) + lambda_2^(2/3) k^(1/3))^3 / (4 B^2) for a group of k rows
=================  ===============  ==================================================================================

``householder`` joins each large row (range lambda_1) to k - 1 small ones (ranges up to lambda_2) and spreads it over
them by a reflection T, rounds the rows and reflects back: X^ = T^-1 Q(T X), in O(N D). Rows ordered by range are dealt
to blocks of at most ``max_group`` rows, in which the authors' rule forms the groups; a block of fewer than three rows
is ``per_sample``.

**Unbiased**: E[Q(X)] = X for float32, float16 and bfloat16 (results are drawn from the values of the type, with
probabilities exact to 2^-17). Random numbers are Philox's by (seed, offset, row, column) under ``torch.manual_seed``'s
rules, and results equal on CPU and CUDA bit for bit. A block with NaN or Inf becomes NaN (``householder``: the row's
group), so that a loss scaler sees it; rows of zeros stay zeros. Nothing waits for the device. Under ``torch.autocast``
the element type is kept. These operators have no gradient.

Errors are ``ValueError`` (values and shapes) and ``TypeError`` (element types and devices).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ops = torch.ops.quantrain


class QuantizedGradient(NamedTuple):
    """A gradient X ``[N, D]`` in integers: T X = codes * scale + offset, T the identity except for ``householder``.

    X W = T^-1 [scale * (codes W) + offset * (1^T W)], so a product with a matrix W runs on int8.

    ``codes`` int8 ``[N, D]``; ``scale`` and ``offset`` float32 ``[1, 1]``, ``[N, 1]`` or ``[1, D]`` (``offset`` is the
    value of code 0: minus the zero point times the scale); ``order`` int32 ``[N]``, the row at each position, groups
    one after the other, leaders first; ``reflector`` float32 ``[N, 4]`` by position, (s, n, m, t) of (T X)_p = s x_p -
    m sum_q(n_q s_q x_q) over the rows q of the group, t = 1 / s. ``order`` and ``reflector`` have no rows without a
    reflection.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    order: Tensor
    reflector: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Turn a gradient's codes back into real numbers: T^-1 (codes * scale + offset).

        ``[N, D]`` as float32, float16 or bfloat16, rounded to nearest.
        """
        return _ops.dequantize_gradient(*self, dtype=dtype)


def quantize_gradient(
    grad: Tensor,
    bits: int,
    quantizer: str,
    *,
    rows: str = "sample",
    preserve_zero: bool = False,
    max_group: int = 128,
    stochastic: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Round a gradient without bias to 2 to 8 bits and back (StatQuant): per tensor, sample or channel, or Householder.

    The result has the shape, element type and strides of ``grad``.

    Args:
        grad: float32, float16 or bfloat16, at least one row, any strides.
        bits: 2 to 8.
        quantizer: ``per_tensor``, ``per_sample``, ``per_channel`` or ``householder``.
        rows: ``sample`` or ``token``.
        preserve_zero: put zero on every grid of ``per_sample`` or ``per_channel`` (``per_tensor`` always does): less
            noise where many elements are zero.
        max_group: rows of a ``householder`` block, 3 to 256.
        stochastic: False rounds to nearest, which is biased.
        generator: of the gradient's device.

    ``torch.ops.quantrain.quantize_gradient.seeded(..., seed=, offset=)`` is a pure function of its arguments.

    >>> grad = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 10.0, 20.0, 30.0]])
    >>> quantize_gradient(grad, 2, "per_sample")
    tensor([[ 0.,  1.,  2.,  3.],
            [ 0., 10., 20., 30.]])
    """
    return _ops.quantize_gradient(
        grad,
        bits,
        quantizer,
        rows=rows,
        preserve_zero=preserve_zero,
        max_group=max_group,
        stochastic=stochastic,
        generator=generator,
    )


def quantize_gradient_codes(
    grad: Tensor,
    bits: int,
    quantizer: str,
    *,
    rows: str = "sample",
    preserve_zero: bool = False,
    max_group: int = 128,
    stochastic: bool = True,
    generator: torch.Generator | None = None,
) -> QuantizedGradient:
    """Round a gradient without bias to int8 codes, with their scales and reflection, for an integer product.

    The integer form of :func:`quantize_gradient`, with the same arguments; for float32 gradients the same values.
    Here float16 and bfloat16 gradients are rounded on the float32 grid; there they are drawn from values of their own
    type.

    >>> quantize_gradient_codes(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), 2, "per_sample").codes
    tensor([[-2, -1,  0,  1]], dtype=torch.int8)
    """
    return QuantizedGradient(
        *_ops.quantize_gradient_codes(
            grad,
            bits,
            quantizer,
            rows=rows,
            preserve_zero=preserve_zero,
            max_group=max_group,
            stochastic=stochastic,
            generator=generator,
        )
    )
