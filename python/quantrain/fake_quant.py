"""Simulated and stored integer quantization.

    q = clamp(rint(input * (1 / scale)) + zero_point, quant_min, quant_max)
    y = (q - zero_point) * scale

in float32, rounding half to even, for ``input`` of float32, float16, bfloat16 or float64 (rounded to float32 first)
with any strides.

**Granularity is the scale's shape.** ``scale`` (float32) has one element, or the rank of ``input`` with sizes that
divide the input's: along each dimension element ``i`` uses scale index ``i // (input size // scale size)``.
``[O, 1, 1, 1]`` is per output channel of a convolution's weight, ``[O, K // 32]`` groups of 32, ``[B, T, 1]`` per
token. ``zero_point`` (any integer type) has the scale's shape or one element; without it quantization is symmetric.
Either may be a plain number, for the whole tensor. ``axis=`` takes a 1-D scale (and zero point) for that dimension, and
no other.

NaN gives NaN in simulated results and an infinity saturates. On CPU a scale that is not positive raises; on CUDA, where
the check would wait for the device, it makes its group NaN. Results are deterministic, and equal on CPU and CUDA bit
for bit where no sum is involved. Under ``torch.autocast`` every operator keeps its input's element type; scales are
always float32.

Errors are ``ValueError`` (values and shapes) and ``TypeError`` (element types and devices).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantrain import _arguments

_ops = torch.ops.quantrain


def _shape(op: str, scale_shape: Sequence[int]) -> list[int]:
    if not isinstance(scale_shape, Sequence) or isinstance(scale_shape, str):
        raise TypeError(f"{op}: expected scale_shape to be a sequence of integers, got {scale_shape!r}")
    return [_arguments.integer(op, "scale_shape", size) for size in scale_shape]


def fake_quantize(
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None = None,
    *,
    quant_min: int = -128,
    quant_max: int = 127,
    axis: int | None = None,
) -> Tensor:
    """Fake quantization: round to codes of 1 to 16 bits and back to real numbers, at any granularity.

    This is ``y`` above, with the element type and strides of ``input``.

    Gradient: straight-through (Bengio et al. 2013, arXiv:1308.3432): that of ``y`` where
    ``quant_min <= unclamped code <= quant_max``, else 0. One bit per element is kept for it. Forward-mode
    differentiation and ``torch.func.grad`` give the same derivative. ``scale`` gets none and may not require one:
    :func:`fake_quantize_learnable` learns it.

    >>> x = torch.tensor([-1.0, 0.26, 0.74, 9.0], requires_grad=True)
    >>> y = fake_quantize(x, torch.tensor([0.5]), quant_min=-8, quant_max=7)
    >>> y
    tensor([-1.0000,  0.5000,  0.5000,  3.5000], grad_fn=<...>)
    >>> y.sum().backward(); x.grad
    tensor([1., 1., 1., 0.])
    """
    input, scale, zero_point = _arguments.qparams("fake_quantize", input, scale, zero_point, axis)
    return _ops.fake_quantize(input, scale, zero_point, **_arguments.code_range("fake_quantize", quant_min, quant_max))


def fake_quantize_learnable(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | int | None = None,
    *,
    quant_min: int = -128,
    quant_max: int = 127,
    grad_factor: float = 1.0,
    axis: int | None = None,
) -> Tensor:
    """Fake quantization whose scale is trained (LSQ), and whose zero point may be (LSQ+).

    Forward as :func:`fake_quantize`; LSQ is Esser et al. 2020, arXiv:1902.08153, eq. 3.

    ``zero_point`` may be int32 (fixed) or float32: then it is learned too (LSQ+, Bhalgat et al. 2020,
    arXiv:2004.09576), rounded and held in ``[quant_min, quant_max]`` by the forward pass.

    Gradients: ``grad_input`` as in :func:`fake_quantize`; ``grad_scale = grad_factor * sum(grad_output *
    t)`` over each group with ``t = q - zero_point - input / scale`` inside the range and ``end code -
    zero_point`` outside; ``grad_zero_point = grad_factor * sum(grad_output * (0 inside, -scale
    outside))``. Esser et al. take ``grad_factor = 1 / sqrt(group size * quant_max)``. The sums are deterministic. A
    second derivative, forward mode and ``torch.func`` raise ``NotImplementedError``.

    >>> scale = torch.tensor([0.5], requires_grad=True)
    >>> fake_quantize_learnable(torch.tensor([0.2, 9.0]), scale, quant_min=-8, quant_max=7).sum().backward()
    >>> scale.grad
    tensor([6.6000])
    """
    op = "fake_quantize_learnable"
    _arguments.tensor(op, "scale", scale)
    input, scale, zero_point = _arguments.qparams(op, input, scale, zero_point, axis)
    return _ops.fake_quantize_learnable(
        input, scale, zero_point, **_arguments.code_range(op, quant_min, quant_max), grad_factor=grad_factor
    )


def fake_quantize_dynamic(
    input: Tensor,
    scale_shape: Sequence[int],
    *,
    quant_min: int = -128,
    quant_max: int = 127,
    symmetric: bool = True,
) -> Tensor:
    """Fake quantization whose scale comes from the input itself, for example one per token.

    :func:`choose_qparams` and :func:`fake_quantize` in one call.

    A NaN or infinity makes its group NaN (and does not raise). Gradient: straight-through, the scale held constant.

    >>> fake_quantize_dynamic(torch.tensor([[1.0, 3.0], [10.0, 30.0]]), [2, 1], quant_min=-8, quant_max=7)
    tensor([[ 0.8571,  3.0000],
            [ 8.5714, 30.0000]])
    """
    op = "fake_quantize_dynamic"
    _arguments.tensor(op, "input", input)
    return _ops.fake_quantize_dynamic(
        input, _shape(op, scale_shape), **_arguments.code_range(op, quant_min, quant_max), symmetric=symmetric
    )


def choose_qparams(
    input: Tensor,
    scale_shape: Sequence[int],
    *,
    quant_min: int = -128,
    quant_max: int = 127,
    symmetric: bool = True,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point from the minimum and maximum of each group, in one pass over the input.

    Both have the shape ``scale_shape``; the scale is float32, the zero point int32.

    Symmetric: ``scale = absmax / d`` with ``d = min(-quant_min, quant_max)`` (127 for int8: neither end clips),
    ``zero_point`` 0. Affine: the range is widened to hold 0, ``scale = (max - min) / (quant_max -
    quant_min)``, ``zero_point = clamp(quant_min - rint(min / scale))``. An all-zero group has scale 1; NaN or an
    infinity gives scale NaN and zero_point 0. The results carry no gradient.

    >>> choose_qparams(torch.tensor([[1.0, -2.54], [0.0, 0.0]]), [2, 1])
    (tensor([[0.0200],
            [1.0000]]), tensor([[0],
            [0]], dtype=torch.int32))
    """
    op = "choose_qparams"
    _arguments.tensor(op, "input", input)
    return _ops.choose_qparams(
        input, _shape(op, scale_shape), **_arguments.code_range(op, quant_min, quant_max), symmetric=symmetric
    )


def quantize(
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None = None,
    *,
    quant_min: int = -128,
    quant_max: int = 127,
    dtype: torch.dtype = torch.int8,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
    axis: int | None = None,
) -> Tensor:
    """Integer codes of 1 to 16 bits, rounded to nearest or stochastically.

    This is ``q`` above, as int8, uint8, int16 or int32. ``stochastic`` rounds up with probability equal to the
    fraction, from Philox numbers by (seed, offset, element index): unbiased for elements that do not saturate, under
    ``torch.manual_seed``'s rules. NaN becomes the code nearest to zero. The overload
    ``torch.ops.quantrain.quantize.seeded(..., seed=, offset=)`` gives the same bits on CPU and CUDA. Rounding to
    nearest calls ``quantize.nearest``, which does not count as random, so activation checkpointing may repeat it. No
    gradient.

    >>> quantize(torch.tensor([-1.0, 0.26, 9.0]), torch.tensor([0.5]), quant_min=-8, quant_max=7)
    tensor([-2,  1,  7], dtype=torch.int8)
    """
    input, scale, zero_point = _arguments.qparams("quantize", input, scale, zero_point, axis)
    limits = _arguments.code_range("quantize", quant_min, quant_max)
    name = _arguments.type_name("quantize", "dtype", dtype, _arguments.CODES)
    if not stochastic:
        return _ops.quantize.nearest(input, scale, zero_point, **limits, dtype=name)
    return _ops.quantize(input, scale, zero_point, **limits, dtype=dtype, stochastic=True, generator=generator)


def dequantize(
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    axis: int | None = None,
) -> Tensor:
    """Integer codes back to real numbers: ``(codes - zero_point) * scale``.

    The result is float32, float16, bfloat16 or float64. A backward pass raises ``NotImplementedError``.

    >>> dequantize(torch.tensor([-2, 1, 7], dtype=torch.int8), torch.tensor([0.5]))
    tensor([-1.0000,  0.5000,  3.5000])
    """
    input, scale, zero_point = _arguments.qparams("dequantize", input, scale, zero_point, axis)
    return _ops.dequantize.typed(input, scale, zero_point, dtype=_arguments.float_name("dequantize", dtype))


def pack_int4(input: Tensor) -> Tensor:
    """Pack 4-bit codes, two per byte along the last dimension, element ``2i`` in the low half.

    int8 (-8..7) or uint8 (0..15) ``[..., K]`` to uint8 ``[..., ceil(K / 2)]``; an odd row ends in a zero half.

    >>> pack_int4(torch.tensor([1, -1, 7], dtype=torch.int8))
    tensor([241,   7], dtype=torch.uint8)
    """
    return _ops.pack_int4(_arguments.tensor("pack_int4", "input", input))


def unpack_int4(input: Tensor, *, size: int, signed: bool = True) -> Tensor:
    """Unpack the bytes of :func:`pack_int4` to one 4-bit code per element.

    int8 (``signed``) or uint8 codes ``[..., size]``.

    >>> unpack_int4(torch.tensor([241, 7], dtype=torch.uint8), size=3)
    tensor([ 1, -1,  7], dtype=torch.int8)
    """
    _arguments.tensor("unpack_int4", "input", input)
    return _ops.unpack_int4(input, size=_arguments.integer("unpack_int4", "size", size), signed=signed)
