"""What lies before a linear layer, and the rounding of its input, in one pass over memory.

With ``input`` ``[..., K]`` a ``function`` makes z of it:

    identity, relu, silu, gelu (of erf), gelu_tanh      z = f(input)
    silu_mul                                            z = silu(input) other
    layer_norm                                          z = (input - m) r weight + bias,  r = 1 / sqrt(variance + eps)
    rms_norm                                            z = input r weight,  r = 1 / sqrt(mean(input^2) + eps)

and the results are fake_quantize(z) and its codes. ``input`` is float32, float16 or bfloat16, ``other`` like it, ``weight`` and
``bias`` ``[K]`` of its type or float32. The arithmetic is in float32 and z is not rounded in between; the output is contiguous, of
``dtype`` (None: input's; a float32 input also takes the 16-bit types, as autocast's products want them). Codes have at most 8 bits: int8, or
uint8 where ``quant_min >= 0``. :func:`quantrain.quant_linear` keeps them in place of its input.

Gradients: straight-through as :func:`quantrain.fake_quantize`'s, then the function's, of input, other, weight and bias. Kept for them: input
and other, a norm's two moments per row, and one bit per element where a code may clip. Second derivatives raise
``NotImplementedError``. Sums go in a fixed order: results repeat.

Errors are ``ValueError`` (values and shapes) and ``TypeError`` (element types and devices).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantrain import _arguments

__all__ = ["norm_act_fake_quantize", "norm_act_fake_quantize_dynamic"]

_ops = torch.ops.quantrain


def norm_act_fake_quantize(
    input: Tensor,
    other: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | float,
    zero_point: Tensor | int | None = None,
    *,
    function: str = "identity",
    eps: float = 1e-5,
    quant_min: int = -128,
    quant_max: int = 127,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``(output, codes)`` with one ``scale`` and ``zero_point`` for the tensor. A NaN is NaN in the output.

    >>> norm_act_fake_quantize(torch.tensor([[-1.0, 0.4]]), None, None, None, 0.25, function="relu")
    (tensor([[0.0000, 0.5000]]), tensor([[0, 2]], dtype=torch.int8))
    """
    op = "norm_act_fake_quantize"
    input, scale, zero_point = _arguments.qparams(op, input, scale, zero_point)
    limits = _arguments.code_range(op, quant_min, quant_max)
    name = "" if dtype is None else _arguments.type_name(op, "dtype", dtype, _arguments.FLOATS)
    return _ops.norm_act_fake_quantize(
        input, other, weight, bias, scale, zero_point, function=function, eps=eps, dtype=name, **limits
    )


def norm_act_fake_quantize_dynamic(
    input: Tensor,
    other: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    function: str = "identity",
    eps: float = 1e-5,
    quant_min: int = -128,
    quant_max: int = 127,
    symmetric: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(output, codes, scale, zero_point)`` with a scale per row, ``[..., 1]``, taken from z.

    As :func:`quantrain.fake_quantize_dynamic` takes it; ``zero_point`` (int32) is 0 where ``symmetric``. A NaN or infinity
    makes its row NaN, with a NaN scale.

    >>> output, codes, scale, _ = norm_act_fake_quantize_dynamic(torch.tensor([[-1.0, 0.6]]), quant_min=-8, quant_max=7)
    >>> codes, scale
    (tensor([[-7,  4]], dtype=torch.int8), tensor([[0.1429]]))
    """
    op = "norm_act_fake_quantize_dynamic"
    _arguments.tensor(op, "input", input)
    limits = _arguments.code_range(op, quant_min, quant_max)
    name = "" if dtype is None else _arguments.type_name(op, "dtype", dtype, _arguments.FLOATS)
    return _ops.norm_act_fake_quantize_dynamic(
        input, other, weight, bias, function=function, eps=eps, symmetric=symmetric, dtype=name, **limits
    )
