"""A linear layer that keeps its fake-quantized input as codes for the backward pass: a byte per element."""

from __future__ import annotations

import torch
from torch import Tensor

from quantrain import _arguments

__all__ = ["quant_linear"]

_ops = torch.ops.quantrain


def quant_linear(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_groups: int = 0,
    weight_min: int = -128,
    weight_max: int = 127,
) -> Tensor:
    """``linear(input, weight, bias)`` of an ``input = (codes - zero_point) * scale`` ``[..., K]``.

    The output and all gradients are ``torch.nn.functional.linear``'s. For the gradient of ``weight`` (``[N, K]``) the codes
    (int8 or uint8) are kept and decoded in the backward pass, where linear would keep ``input``. That the codes are those of
    ``input`` is the caller's to see to: :func:`quantrain.norm_act_fake_quantize`, its dynamic form and
    :func:`quantrain.fake_quantize_codes` give both. ``scale`` (float32; one element, or ``[..., 1]``) and ``zero_point`` have
    no gradient.

    ``weight_groups``: 0, ``weight`` is taken as it is; else it is fake-quantized first, each row in so many equal parts with
    a symmetric scale of its own (:func:`quantrain.fake_quantize_dynamic`), to codes of ``weight_min`` to ``weight_max``.
    Then it may be float32 beside a 16-bit input, and it is rounded anew in the backward pass: nothing but ``weight`` itself
    is kept.

    Under autocast as linear. Second derivatives raise ``NotImplementedError``; errors are ``ValueError``
    (values and shapes) and ``TypeError`` (element types and devices).

    >>> from quantrain import norm_act_fake_quantize_dynamic
    >>> x, codes, scale, _ = norm_act_fake_quantize_dynamic(torch.tensor([[0.5, 1.0]]))
    >>> quant_linear(x, codes, scale, None, torch.tensor([[0.0, 1.0]]))
    tensor([[1.]])
    """
    _arguments.tensor("quant_linear", "input", input)
    limits = {"weight_min": weight_min, "weight_max": weight_max}
    return _ops.quant_linear(input, codes, scale, zero_point, weight, bias, weight_groups=weight_groups, **limits)
