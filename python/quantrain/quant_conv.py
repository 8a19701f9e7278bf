"""A convolution that keeps its fake-quantized input as codes for the backward pass: a byte per element."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantrain import _arguments

__all__ = ["fake_quantize_codes", "quant_conv2d"]

_ops = torch.ops.quantrain


def fake_quantize_codes(
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None = None,
    *,
    quant_min: int = -128,
    quant_max: int = 127,
    grad_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``(fake_quantize(input), codes)`` in one pass over ``input`` ``[N, C, ...]`` (float32, float16 or bfloat16).

    One scale and zero point for the tensor; codes of at most 8 bits: int8, or uint8 where ``quant_min >= 0``. Contiguous or channels
    last, as ``input`` is. Gradient: :func:`quantrain.fake_quantize`'s; where ``scale`` requires one,
    :func:`quantrain.fake_quantize_learnable`'s, that of scale times ``grad_factor``. Errors are ``ValueError`` and ``TypeError``.

    >>> fake_quantize_codes(torch.tensor([[0.3, -9.0]]), 0.25, quant_min=-8, quant_max=7)
    (tensor([[ 0.2500, -2.0000]]), tensor([[ 1, -8]], dtype=torch.int8))
    """
    op = "fake_quantize_codes"
    input, scale, zero_point = _arguments.qparams(op, input, scale, zero_point)
    return _ops.fake_quantize_codes(
        input, scale, zero_point, **_arguments.code_range(op, quant_min, quant_max), grad_factor=grad_factor
    )


def quant_conv2d(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """``conv2d(input, weight, bias)`` of an ``input = (codes - zero_point) * scale`` ``[N, C, H, W]``.

    The output and all gradients are ``torch.nn.functional.conv2d``'s. For the gradient of ``weight``
    (``[O, C / groups, kh, kw]``) the codes (int8 or uint8) are kept and decoded in the backward pass, where conv2d
    would keep ``input``. That the codes are those of ``input`` is the caller's to see to: :func:`fake_quantize_codes`
    and :func:`quantrain.batch_norm_act_fake_quantize` give both. ``scale`` (float32, one element) and ``zero_point``
    have no gradient. Under autocast as conv2d. Second derivatives raise ``NotImplementedError``; errors are
    ``ValueError`` (values and shapes) and ``TypeError`` (element types and devices).

    >>> x = torch.tensor([[[[0.3, 1.0]]]])
    >>> scale = torch.tensor([0.5])
    >>> quant_conv2d(*fake_quantize_codes(x, scale), scale, None, torch.ones(1, 1, 1, 1))
    tensor([[[[0.5000, 1.0000]]]])
    """
    _arguments.tensor("quant_conv2d", "input", input)
    window = map(_arguments.pair, (stride, padding, dilation))
    return _ops.quant_conv2d(input, codes, scale, zero_point, weight, bias, *window, groups)
