"""Fixed-point numbers (F8Net, Jin et al., ICLR 2022, arXiv:2202.05239).

    value = code * 2**-FL
    code in [-(2**(WL-1) - 1), 2**(WL-1) - 1] (signed) or [0, 2**WL - 1] (unsigned)

with ``word_length`` WL in 2..16 and a fraction length ``0 <= FL <= WL - signed``. Codes are rounded half to even; rescaling between
fraction lengths is a shift.

A fraction length is a tensor of any integer type whose shape is the granularity, as a scale's in :mod:`quantrain.fake_quant`: one element, or the
rank of the input with sizes that divide the input's; or an ``int``, or a 1-D tensor with ``axis=``. Out of range it
raises on CPU; on CUDA, where the check would wait for the device, :func:`fixed_point_quantize` gives NaN and
:func:`fixed_point_requantize` saturates. Results are deterministic and equal on CPU and CUDA, but for a statistic within 1e-12 of a
threshold. Under ``torch.autocast`` every operator keeps its input's element type.

Errors are ``ValueError`` (values and shapes) and ``TypeError`` (element types and devices).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantrain import _arguments

_ops = torch.ops.quantrain


def fixed_point_quantize(
    input: Tensor,
    fraction_length: Tensor | int,
    *,
    word_length: int = 8,
    signed: bool = True,
    axis: int | None = None,
) -> Tensor:
    """Round to fixed-point numbers of 2 to 16 bits, which are codes times a power of two.

    ``clamp(rint(input * 2**FL)) * 2**-FL`` with the element type (float32, float16, bfloat16, float64) and strides of
    ``input``. NaN stays and an infinity saturates. Gradient: the paper's straight-through estimator, which is strict:
    that of the result where ``lowest code < unclamped code < highest code``, else 0. The end codes do not pass, unlike
    in :func:`quantrain.fake_quantize`. One bit per element is kept for it; the fraction length gets none. Forward mode
    and ``torch.func.grad`` give the same derivative.

    >>> x = torch.tensor([-1.0, 0.26, 0.74, 9.0], requires_grad=True)
    >>> y = fixed_point_quantize(x, 1, word_length=4)
    >>> y
    tensor([-1.0000,  0.5000,  0.5000,  3.5000], grad_fn=<...>)
    >>> y.sum().backward(); x.grad
    tensor([1., 1., 1., 0.])
    """
    op = "fixed_point_quantize"
    _arguments.tensor(op, "input", input)
    lengths = _arguments.parameter(op, "fraction_length", fraction_length, input, axis, dtype=torch.int32)
    return _ops.fixed_point_quantize(
        input, lengths, word_length=_arguments.integer(op, "word_length", word_length), signed=signed
    )


def fixed_point_fraction_length(
    input: Tensor,
    *,
    axis: int | None = None,
    word_length: int = 8,
    signed: bool = True,
    method: str = "std",
    previous: Tensor | None = None,
    hysteresis: float = 0.0,
) -> Tensor:
    """The fraction length that suits a tensor or each of its channels, from a statistic of its values.

    int32 of shape ``[1]``, or ``[1, .., C, .., 1]`` with one for each index of dimension ``axis``. By ``method``:

    - ``"std"``: the number of ``f`` in ``1..WL - signed`` with ``s <= c / 2**f`` for the unbiased standard deviation ``s`` over all
      elements, ``c = 40`` signed and 70 unsigned at 8 bits (unsigned: meant of the tensor before its ReLU). Equal elements, or one:
      the longest.
    - ``"rms"``: the same with the root mean square, ``c = 40`` and 50 (unsigned: of the tensor after its ReLU).
    - ``"mse"``: the fraction length of least squared error, the longer one where two are equal.

    For other word lengths ``c`` is where a Gaussian is rounded equally well with ``f`` and ``f - 1``. Sums are float64, in a fixed order.
    ``previous`` (int32, the shape of the result) is kept unless the statistic is more than ``hysteresis`` octaves past the threshold
    between it and the answer; with ``"mse"``, unless its root mean squared error exceeds the least by more. An infinity or NaN gives 0,
    a group without elements the longest. No gradient, and no wait for the device.

    >>> x = torch.tensor([-1.0, 1.0]) * 0.5
    >>> fixed_point_fraction_length(x)
    tensor([5], dtype=torch.int32)
    >>> fixed_point_fraction_length(torch.stack([x, x * 8]), axis=0, method="rms")
    tensor([[6],
            [3]], dtype=torch.int32)
    """
    return _ops.fixed_point_fraction_length(
        input,
        axis=axis,
        word_length=word_length,
        signed=signed,
        method=method,
        previous=previous,
        hysteresis=hysteresis,
    )


def fixed_point_requantize(
    accumulator: Tensor,
    accumulator_fraction_length: Tensor | int,
    fraction_length: int,
    *,
    signed: bool = True,
    axis: int | None = None,
) -> Tensor:
    """Turn int32 sums into 8-bit codes of another fraction length by one shift, rounded half to even.

    The sums are at ``accumulator_fraction_length`` (0..31), the codes at ``fraction_length``. With ``n`` their
    difference: ``accumulator / 2**n`` rounded half to even, or times ``2**-n``, clamped to [-127, 127] (int8) or to
    [0, 255] (uint8). Exact for every accumulator. No gradient.

    >>> fixed_point_requantize(torch.tensor([24, 40, -40, 1000000], dtype=torch.int32), 9, 5)
    tensor([  2,   2,  -2, 127], dtype=torch.int8)
    """
    op = "fixed_point_requantize"
    _arguments.tensor(op, "accumulator", accumulator)
    lengths = _arguments.parameter(
        op, "accumulator_fraction_length", accumulator_fraction_length, accumulator, axis, dtype=torch.int32
    )
    return _ops.fixed_point_requantize(
        accumulator, lengths, _arguments.integer(op, "fraction_length", fraction_length), signed=signed
    )
