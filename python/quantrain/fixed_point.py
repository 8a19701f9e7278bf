"""Fixed-point numbers (F8Net, Jin et al., ICLR 2022, arXiv:2202.05239).

    value = code * 2**-FL
    code in [-(2**(WL-1) - 1), 2**(WL-1) - 1] (signed) or [0, 2**WL - 1] (unsigned)

with ``word_length`` WL in 2..16 and a fraction length ``0 <= FL <= WL - signed``. Codes are rounded half to even;
rescaling between fraction lengths is a shift.

A fraction length is a tensor of any integer type whose shape is the granularity, as a scale's in
:mod:`quantrain.fake_quant`: one element, or the rank of the input with sizes that divide the input's; or an ``int``, or
a 1-D tensor with ``axis=``. Out of range it raises on CPU; on CUDA, where the check would wait for the device,
:func:`fixed_point_quantize` gives NaN and :func:`fixed_point_requantize` saturates. Results are deterministic and equal
on CPU and CUDA, except for a statistic within 1e-12 of a threshold. Under ``torch.autocast`` every operator keeps its
input's element type.

Errors are ``ValueError`` (values and shapes) and ``TypeError`` (element types and devices).

Layers read 8-bit codes, sum exactly in int32 and shift once to 8 bits; no scale and no float.

Codes are uint8 in [0, 255] or int8 in [-127, 127]; weights are int8. The sums of a
convolution have ``FL_acc = FL_input + FL_weight`` (per output channel where the weight's is), and so has the bias.
Codes of fraction length FL_out come from sums by ``shift = FL_acc - FL_out``: ``acc / 2**shift`` rounded half to even
(``acc * 2**-shift`` for ``shift <= 0``), then clamped to the codes. A convolution followed by a shift alone is F8Net's
(Jin et al., ICLR 2022, section 3).

Images are ``[N, C, H, W]`` in any strides; results are channels_last. CPU and CUDA give the same bits, whatever the
number of threads. A sum that overflows int32 wraps: whoever builds a network must prove that none does. No gradients.
Errors are ``ValueError`` (values and shapes) and ``TypeError`` (element types and devices).
"""

from __future__ import annotations

from collections.abc import Sequence

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
    >>> y.tolist()
    [-1.0, 0.5, 0.5, 3.5]
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

    - ``"std"``: the number of ``f`` in ``1..WL - signed`` with ``s <= c / 2**f`` for the unbiased standard deviation
      ``s`` over all elements, ``c = 40`` signed and 70 unsigned at 8 bits (unsigned: for the tensor before its ReLU).
      For equal elements, or one, the longest.
    - ``"rms"``: the same with the root mean square, ``c = 40`` and 50 (unsigned: for the tensor after its ReLU).
    - ``"mse"``: the fraction length of least squared error, the longer of two that tie.

    For other word lengths ``c`` is where a Gaussian is rounded equally well with ``f`` and ``f - 1``. Sums are float64,
    in a fixed order. ``previous`` (int32, the shape of the result) is kept unless the statistic is more than
    ``hysteresis`` octaves past the threshold between it and the answer; with ``"mse"``, unless its root mean squared
    error exceeds the least by more. An infinity or NaN gives 0, a group without elements the longest. No gradient, and
    no wait for the device.

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


def _pair(op: str, name: str, size: int | Sequence[int]) -> tuple[int, int]:
    """One size for both dimensions, or two."""
    sizes = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sizes) != 2:
        raise ValueError(f"{op}: expected {name} to be one size or two, got {size!r}")
    return tuple(_arguments.integer(op, name, one) for one in sizes)


def _lengths(op: str, name: str, value: Tensor | int, input: Tensor) -> Tensor:
    return _arguments.parameter(op, name, value, input, dtype=torch.int32)


def fixed_point_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    groups: int = 1,
) -> Tensor:
    """Convolution of 8-bit codes with exact int32 sums as its result.

    Shapes: input uint8 or int8 ``[N, C, H, W]``, weight int8 ``[O, C / groups, KH, KW]``, bias int32 ``[O]`` -> int32
    ``[N, O, OH, OW]``. The padding is zeros. Fraction length of the result and of the bias: the input's plus the
    weight's.

    >>> x = torch.full((1, 1, 3, 3), 200, dtype=torch.uint8)
    >>> fixed_point_conv2d(x, torch.full((1, 1, 3, 3), -2, dtype=torch.int8), padding=1)[0, 0].tolist()
    [[-1600, -2400, -1600], [-2400, -3600, -2400], [-1600, -2400, -1600]]
    """
    op = "fixed_point_conv2d"
    return _ops.fixed_point_conv2d(
        _arguments.tensor(op, "input", input),
        _arguments.tensor(op, "weight", weight),
        bias,
        stride=_pair(op, "stride", stride),
        padding=_pair(op, "padding", padding),
        groups=_arguments.integer(op, "groups", groups),
    )


def fixed_point_conv2d_requantize(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | int,
    residual: Tensor | None = None,
    residual_shift: Tensor | int | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    groups: int = 1,
    signed: bool = False,
) -> Tensor:
    """Convolution of 8-bit codes with 8-bit codes as its result: sums, residual, one shift and ReLU in one pass.

    ``clamp(round((acc + residual) / 2**shift))``.

    Shapes: as :func:`fixed_point_conv2d`; shift an int, or integers of one element or O, in [-31, 31] -> uint8
    (``signed=False``: clamped at 0, which includes a ReLU) or int8. residual is uint8, int8 or int32 of the result's
    shape, with ``residual_shift = FL_acc - FL_residual`` int32 of one element or O; whichever of the two has fewer
    fraction bits is shifted left before they are added, so there is one rounding. Give ``residual`` and the output
    different memory.

    >>> x = torch.tensor([[[[3, 5, 255]]]], dtype=torch.uint8)
    >>> w, shift = torch.ones(1, 1, 1, 1, dtype=torch.int8), torch.tensor([1], dtype=torch.int32)
    >>> fixed_point_conv2d_requantize(x, w, None, shift).flatten().tolist()  # 1.5, 2.5 and 127.5, half to even
    [2, 2, 128]
    >>> fixed_point_conv2d_requantize(x, w, None, shift, x, shift, signed=True).flatten().tolist()  # (x + 2 x) / 2
    [4, 8, 127]
    """
    op = "fixed_point_conv2d_requantize"
    _arguments.tensor(op, "input", input)
    return _ops.fixed_point_conv2d_requantize(
        input,
        _arguments.tensor(op, "weight", weight),
        bias,
        _lengths(op, "shift", shift, input),
        residual,
        None if residual_shift is None else _lengths(op, "residual_shift", residual_shift, input),
        stride=_pair(op, "stride", stride),
        padding=_pair(op, "padding", padding),
        groups=_arguments.integer(op, "groups", groups),
        signed=signed,
    )


def fixed_point_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer of 8-bit codes with exact int32 sums as its result.

    Shapes: input uint8 or int8 ``[..., K]``, weight int8 ``[O, K]``, bias int32 ``[O]`` -> int32 ``[..., O]``.

    >>> w, bias = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8), torch.tensor([10, 0], dtype=torch.int32)
    >>> fixed_point_linear(torch.tensor([[255, 1]], dtype=torch.uint8), w, bias).tolist()
    [[263, 769]]
    """
    return _ops.fixed_point_linear(input, weight, bias)


def fixed_point_add(a: Tensor, b: Tensor, a_fraction_length: Tensor | int, b_fraction_length: Tensor | int) -> Tensor:
    """The exact sum of two fixed-point tensors: int32 of fraction length ``max(a_fraction_length, b_fraction_length)``.

    Shapes: a and b uint8, int8 or int32 of one shape; fraction lengths an int, or integers of one element, or of a's
    rank with one size other than 1 (``[1, C, 1, 1]``: per channel). Saturates at the ends of int32.

    >>> a, b = torch.tensor([1, 255], dtype=torch.uint8), torch.tensor([-3, 4], dtype=torch.int8)
    >>> fixed_point_add(a, b, torch.tensor([2], dtype=torch.int32), torch.tensor([5], dtype=torch.int32)).tolist()
    [5, 2044]
    """
    op = "fixed_point_add"
    _arguments.tensor(op, "a", a)
    return _ops.fixed_point_add(
        a,
        _arguments.tensor(op, "b", b),
        _lengths(op, "a_fraction_length", a_fraction_length, a),
        _lengths(op, "b_fraction_length", b_fraction_length, a),
    )


def fixed_point_max_pool2d(
    input: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: int | tuple[int, int] = 0,
) -> Tensor:
    """Max pooling of 8-bit codes.

    The padding never wins, and is at most half the kernel.

    Shapes: input uint8 or int8 ``[N, C, H, W]`` -> codes of the same type ``[N, C, OH, OW]``.

    >>> x = torch.tensor([[[[-5, -4], [-3, -100]]]], dtype=torch.int8)
    >>> fixed_point_max_pool2d(x, 3, 2, 1).tolist()
    [[[[-3]]]]
    """
    op = "fixed_point_max_pool2d"
    return _ops.fixed_point_max_pool2d(
        _arguments.tensor(op, "input", input),
        _pair(op, "kernel_size", kernel_size),
        _pair(op, "stride", stride),
        _pair(op, "padding", padding),
    )


def fixed_point_sum_pool2d(input: Tensor) -> Tensor:
    """The int32 sum of each channel's 8-bit codes over the image: an average pool is this and a shift.

    Shapes: input uint8 or int8 ``[N, C, H, W]`` -> int32 ``[N, C, 1, 1]``.

    >>> fixed_point_sum_pool2d(torch.full((1, 2, 8, 8), 255, dtype=torch.uint8)).flatten().tolist()
    [16320, 16320]
    """
    return _ops.fixed_point_sum_pool2d(input)
