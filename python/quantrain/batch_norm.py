"""Batch norm in training, with what surrounds it under quantization-aware training, in two passes over memory.

With y the ``input`` ``[N, C, ...]``, per channel m and v its batch's mean and biased variance, and s a factor (``conv_scale``)
that the weight of the convolution before was multiplied by:

    r = sign(s) / sqrt(v + eps s^2)
    z = activation((y - m) (weight r) + bias + residual)

z is the batch norm of y / s, exactly but for rounding, so a convolution whose weight was folded for quantization (Jacob et al. 2018,
arXiv:1712.05877, section 3.2) needs no division of its output.

``input`` is float32, float16 or bfloat16, contiguous or channels last (anything else is copied); the arithmetic is in float32, the
result is rounded once. Statistics and parameters are ``[C]``. ``activation`` is "identity", "relu", "relu6", "hardswish" or "silu";
a residual goes with the first three. Sums go in a fixed order: results repeat. Under ``torch.autocast`` results keep input's type.

Gradients: of input, weight, bias, conv_scale and residual. With ``batch_statistics`` mean and variance are taken to be those of
input (:func:`batch_norm_statistics`) and gradients go through them; without, they are constants. Kept for the backward pass: the
input, and one bit per element where the activation bends or the result is rounded. Second derivatives raise
``NotImplementedError``.

Errors are ``ValueError`` (values and shapes) and ``TypeError`` (element types and devices).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quantrain import _arguments

__all__ = [
    "BatchStatistics",
    "batch_norm_act",
    "batch_norm_act_fake_quantize",
    "batch_norm_statistics",
    "fold_fake_quantize",
]

_ops = torch.ops.quantrain


class BatchStatistics(NamedTuple):
    """Of each channel, ``[C]``, float32: mean, biased variance, minimum and maximum."""

    mean: Tensor
    variance: Tensor
    minimum: Tensor
    maximum: Tensor


def batch_norm_statistics(input: Tensor) -> BatchStatistics:
    """Statistics of each channel of ``input`` ``[N, C, ...]``, in one pass. They carry no gradient.

    >>> batch_norm_statistics(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).variance
    tensor([1., 0.])
    """
    return BatchStatistics(*_ops._batch_norm_statistics(_arguments.tensor("batch_norm_statistics", "input", input)))


def batch_norm_act(
    input: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    conv_scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "identity",
    eps: float = 1e-5,
    batch_statistics: bool = True,
) -> Tensor:
    """Batch norm in training with residual and activation in the same pass. The result has the type of ``input``.

    >>> x = torch.tensor([[1.0, 5.0], [3.0, 7.0]])
    >>> mean, variance, *_ = batch_norm_statistics(x)
    >>> batch_norm_act(x, mean, variance, activation="relu", eps=0.0)
    tensor([[0., 0.],
            [1., 1.]])
    """
    _arguments.tensor("batch_norm_act", "input", input)
    return _ops.batch_norm_act(
        input,
        mean,
        variance,
        weight,
        bias,
        conv_scale,
        residual,
        activation=activation,
        eps=eps,
        batch_statistics=batch_statistics,
    )


def batch_norm_act_fake_quantize(
    input: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_scale: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | float,
    zero_point: Tensor | int | None = None,
    *,
    activation: str = "identity",
    eps: float = 1e-5,
    batch_statistics: bool = True,
    quant_min: int = -128,
    quant_max: int = 127,
) -> tuple[Tensor, Tensor]:
    """Batch norm in training, fake-quantized in the same pass: z is not rounded to the type of ``input`` in between.

    Returns ``(fake_quantize(z), codes)``. One scale and zero point for the tensor; codes of at most 8 bits, int8, or uint8 where ``quant_min >= 0``.
    ``activation`` is "identity", "relu" or "relu6". Gradient: straight-through, as :func:`quantrain.fake_quantize`.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> mean, variance, *_ = batch_norm_statistics(x)
    >>> batch_norm_act_fake_quantize(x, mean, variance, None, None, None, None, 0.75, eps=0.0)
    (tensor([[-0.7500],
            [ 0.7500]]), tensor([[-1],
            [ 1]], dtype=torch.int8))
    """
    op = "batch_norm_act_fake_quantize"
    input, scale, zero_point = _arguments.qparams(op, input, scale, zero_point)
    return _ops.batch_norm_act_fake_quantize(
        input,
        mean,
        variance,
        weight,
        bias,
        conv_scale,
        residual,
        scale,
        zero_point,
        activation=activation,
        eps=eps,
        batch_statistics=batch_statistics,
        **_arguments.code_range(op, quant_min, quant_max),
    )


def fold_fake_quantize(
    weight: Tensor,
    bn_weight: Tensor,
    running_var: Tensor,
    *,
    eps: float = 1e-5,
    quant_min: int = -128,
    quant_max: int = 127,
    symmetric: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The weight of a convolution, folded with the batch norm behind it and fake-quantized, and the factor of the fold.

    Returns ``(output, conv_scale)`` for a weight ``[O, ...]``. ``conv_scale = bn_weight / sqrt(running_var + eps)``, 1 where that is 0, is the ``[O]`` factor that :func:`batch_norm_act`
    takes; ``output`` is :func:`quantrain.fake_quantize_dynamic` of ``weight * conv_scale`` with one scale per row, in ``dtype``
    (default: that of ``weight``). A NaN or infinity makes its row NaN.

    Gradients: of ``weight`` straight-through, times conv_scale; of ``bn_weight`` through both results. ``running_var`` is a
    constant, of which a copy is kept, beside one bit per element.

    >>> output, conv_scale = fold_fake_quantize(torch.tensor([[1.27, 0.004]]), torch.tensor([2.0]), torch.tensor([4.0]), eps=0.0)
    >>> output, conv_scale
    (tensor([[1.2700, 0.0000]]), tensor([1.]))
    """
    op = "fold_fake_quantize"
    _arguments.tensor(op, "weight", weight)
    return _ops.fold_fake_quantize(
        weight,
        bn_weight,
        running_var,
        eps=eps,
        **_arguments.code_range(op, quant_min, quant_max),
        symmetric=symmetric,
        dtype="" if dtype is None else _arguments.type_name(op, "dtype", dtype, _arguments.FLOATS),
    )
