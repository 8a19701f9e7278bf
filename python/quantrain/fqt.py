"""Linear and convolution with gradients from a quantized gradient of the output: fully quantized training (FQT).

StatQuant, Chen et al. 2020 (arXiv:2010.14298), sections 3.1 and 3.2. With dY the gradient of the output::

    grad_input  = Q_b2(dY) W        grad_weight = Q_b1(dY)^T X        grad_bias = sum of dY

where Q is :func:`quantrain.quantize_gradient` and the two draws are independent ("gradient bifurcation"). Q is unbiased
and both products are linear in dY, so the expectation of a gradient is the gradient without Q. The forward pass is that
of ``F.linear`` and ``F.conv2d``, computed once; X and W are taken as they are (the layers of ``quantrain.nn`` pass them
through ``fake_quantize``).

Draws come from the default generator of the device when the gradient is computed, first for grad_input, then for
grad_weight; a gradient that nobody needs draws nothing. NaN and Inf in dY make NaN in the gradients, so that a loss
scaler sees them. An empty dY is not quantized. float32, float16 and bfloat16 (with both quantizers "none" also
float64); under ``torch.autocast`` as ``F.linear`` and ``F.conv2d``. The gradients have no derivative: asking for one
(double backward) raises NotImplementedError.

Arguments that both functions share, once for ``grad_input`` and once for ``grad_weight``:

- ``grad_*``: the quantizer, ``"none"``, ``"per_tensor"``, ``"per_sample"``, ``"per_channel"`` or ``"householder"``;
- ``grad_*_bits``: 2 to 8;
- ``grad_*_rows``: what a row of dY is, ``"sample"`` (dimension 0) or ``"token"`` (all dimensions but the last);
- ``grad_*_preserve_zero``, ``grad_*_max_group``: as for :func:`quantrain.quantize_gradient`.

Errors are ``ValueError`` (values and shapes) and ``TypeError`` (element types and devices), raised by the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantrain import _arguments

_ops = torch.ops.quantrain


def fqt_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grad_input: str = "none",
    grad_input_bits: int = 8,
    grad_input_rows: str = "token",
    grad_input_preserve_zero: bool = False,
    grad_input_max_group: int = 128,
    grad_weight: str = "none",
    grad_weight_bits: int = 8,
    grad_weight_rows: str = "token",
    grad_weight_preserve_zero: bool = False,
    grad_weight_max_group: int = 128,
) -> Tensor:
    """Linear layer whose gradients come from two independent stochastic quantizations of the output's gradient.

    y = input weight^T + bias, with the gradients above.

    Shapes: input ``[..., K]``, weight ``[O, K]``, bias ``[O]`` -> ``[..., O]``.

    >>> x, w = torch.randn(16, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    >>> fqt_linear(x, w, grad_input="householder", grad_input_bits=5, grad_weight="per_channel").sum().backward()
    >>> x.grad.shape, w.grad.shape
    (torch.Size([16, 4]), torch.Size([3, 4]))
    """
    return _ops.fqt_linear(
        input,
        weight,
        bias,
        grad_input=grad_input,
        grad_input_bits=grad_input_bits,
        grad_input_rows=grad_input_rows,
        grad_input_preserve_zero=grad_input_preserve_zero,
        grad_input_max_group=grad_input_max_group,
        grad_weight=grad_weight,
        grad_weight_bits=grad_weight_bits,
        grad_weight_rows=grad_weight_rows,
        grad_weight_preserve_zero=grad_weight_preserve_zero,
        grad_weight_max_group=grad_weight_max_group,
    )


def fqt_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    grad_input: str = "none",
    grad_input_bits: int = 8,
    grad_input_rows: str = "sample",
    grad_input_preserve_zero: bool = False,
    grad_input_max_group: int = 128,
    grad_weight: str = "none",
    grad_weight_bits: int = 8,
    grad_weight_rows: str = "sample",
    grad_weight_preserve_zero: bool = False,
    grad_weight_max_group: int = 128,
) -> Tensor:
    """2-D convolution whose gradients come from two independent stochastic quantizations of the output's gradient.

    The gradients are those above. Shapes: input ``[N, C, H, W]`` or ``[C, H, W]``, weight ``[O, C / groups, kh, kw]``,
    bias ``[O]``. padding: sizes, ``"valid"`` or ``"same"`` (stride 1).

    >>> x, w = torch.randn(4, 3, 8, 8, requires_grad=True), torch.randn(6, 3, 3, 3, requires_grad=True)
    >>> fqt_conv2d(x, w, padding="same", grad_input="per_sample", grad_input_bits=5, grad_weight="per_tensor").sum().backward()
    >>> x.grad.shape, w.grad.shape
    (torch.Size([4, 3, 8, 8]), torch.Size([6, 3, 3, 3]))
    """
    return _ops.fqt_conv2d(
        input,
        weight,
        bias,
        _arguments.pair(stride),
        padding if isinstance(padding, str) else _arguments.pair(padding),
        _arguments.pair(dilation),
        groups,
        grad_input=grad_input,
        grad_input_bits=grad_input_bits,
        grad_input_rows=grad_input_rows,
        grad_input_preserve_zero=grad_input_preserve_zero,
        grad_input_max_group=grad_input_max_group,
        grad_weight=grad_weight,
        grad_weight_bits=grad_weight_bits,
        grad_weight_rows=grad_weight_rows,
        grad_weight_preserve_zero=grad_weight_preserve_zero,
        grad_weight_max_group=grad_weight_max_group,
    )
