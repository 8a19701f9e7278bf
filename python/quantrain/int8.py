"""Int8 codes with one scale per row, and matrix products of them on integer tensor cores.

::

    scale = absmax(row) / 127        codes = rint(row / scale), int8 in [-127, 127]        row ~ codes * scale

An all-zero row has scale 1; a row with NaN or Inf has scale NaN and codes 0, so that every product with it is NaN and a
loss scaler sees it. Rounded to nearest, codes and scales are those of :func:`quantrain.choose_qparams` and
:func:`quantrain.quantize`; stochastic codes have mean ``x / scale`` within 2e-4 steps. Random numbers are Philox's by
(seed, offset, row, column of the input): the same on CPU and CUDA, as are the codes, bit for bit.

The products need both operands with the summed dimension last, so a training step needs transposed codes of weight,
input and gradient. A scale along the summed dimension cannot leave the sum; it is multiplied into the other operand
before that one is quantized (``column_factor``, ``row_factor``), which is exact and called folding. For Y = X W^T with
codes and scales Xq, sx, Wq, sw of rows::

    dX = dY W   = (dY * sw) Wq            dW = dY^T X = (dY * sx)^T Xq

float32, float16 and bfloat16; any strides and sizes. Nothing waits for the device. Rounding to nearest calls the
overloads ``.nearest``, which do not count as random. No gradients except :func:`int8_linear`'s: a backward pass through
any other raises ``NotImplementedError``. Products on CUDA need compute capability 8.0. Errors are ``ValueError``
(values and shapes) and ``TypeError`` (element types and devices).
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from quantrain import _arguments

_ops = torch.ops.quantrain


def _scale(name: str, scale: Tensor | float | None, like: Tensor) -> Tensor | None:
    return _arguments.parameter("int8_mm", name, scale, like) if _arguments.is_number(scale) else scale


def int8_quantize_rows(
    input: Tensor, *, column_factor: Tensor | None = None, stochastic: bool = False, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Int8 codes and one scale per row, rounded to nearest or stochastically.

    Rows of ``input * column_factor``. Shapes: input ``[..., K]``, column_factor float32 ``[K]`` -> codes int8
    ``[..., K]``, scale float32 ``[..., 1]``.

    >>> codes, scale = int8_quantize_rows(torch.tensor([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0]]))
    >>> codes.tolist(), scale[1].item()
    ([[127, -64, 32], [0, 0, 0]], 1.0)
    """
    _arguments.tensor("int8_quantize_rows", "input", input)
    if not stochastic:
        return _ops.int8_quantize_rows.nearest(input, column_factor=column_factor)
    return _ops.int8_quantize_rows(input, column_factor=column_factor, stochastic=True, generator=generator)


def int8_quantize_columns(
    input: Tensor, *, row_factor: Tensor | None = None, stochastic: bool = False, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Int8 codes and one scale per column, written transposed: the operand of a weight's gradient.

    Columns of ``input * row_factor[:, None]``. Shapes: input ``[..., K]`` taken as ``[M, K]``, row_factor float32 of M
    elements -> codes int8 ``[K, M]``, scale float32 ``[K, 1]``.

    >>> codes, scale = int8_quantize_columns(torch.tensor([[1.0, 4.0], [-0.5, 2.0]]))
    >>> codes.tolist()
    [[127, -64], [127, 64]]
    """
    _arguments.tensor("int8_quantize_columns", "input", input)
    if not stochastic:
        return _ops.int8_quantize_columns.nearest(input, row_factor=row_factor)
    return _ops.int8_quantize_columns(input, row_factor=row_factor, stochastic=True, generator=generator)


def int8_quantize_rows_and_columns(
    input: Tensor,
    *,
    column_factor: Tensor | None = None,
    row_factor: Tensor | None = None,
    stochastic: bool = False,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Int8 codes of a gradient by rows and by columns, from one draw and in two reads.

    :func:`int8_quantize_rows` and :func:`int8_quantize_columns` in fewer passes over the input: what the gradient of an
    output needs for the two products it enters. Each has the right mean; their errors are not independent.

    >>> codes, scale, codes_t, scale_t = int8_quantize_rows_and_columns(torch.randn(8, 4), stochastic=True)
    >>> codes.shape, scale.shape, codes_t.shape, scale_t.shape
    (torch.Size([8, 4]), torch.Size([8, 1]), torch.Size([4, 8]), torch.Size([4, 1]))
    """
    _arguments.tensor("int8_quantize_rows_and_columns", "input", input)
    factors = {"column_factor": column_factor, "row_factor": row_factor}
    if not stochastic:
        return _ops.int8_quantize_rows_and_columns.nearest(input, **factors)
    return _ops.int8_quantize_rows_and_columns(input, **factors, stochastic=True, generator=generator)


def int8_transpose(codes: Tensor) -> Tensor:
    """Transpose int8 codes: ``[M, K]`` to contiguous ``[K, M]``.

    >>> int8_transpose(torch.tensor([[1, 2, 3]], dtype=torch.int8)).tolist()
    [[1], [2], [3]]
    """
    return _ops.int8_transpose(codes)


def int8_weight_transpose(weight: Tensor, scale: Tensor, *, scheme: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """A weight's int8 operand in the gradient of its layer's input, with scales folded or columns quantized anew.

    That is W in dX = dY W, from the weight and the scale of its rows in the forward pass.

    scheme:

    - ``"fold"``: codes are those of the forward pass, transposed; column_factor = scale; the result's scale is 1;
    - ``"columns"``: columns are quantized anew; column_factor is 1;
    - ``"auto"``: fold where max(s^2) <= 4 mean(s^2) over the row scales s, which bounds how much folding can raise the
      variance of dX; decided on the device, without waiting.

    Shapes: weight ``[O, K]`` (float, or its int8 codes), scale float32 of O elements -> codes int8 ``[K, O]``,
    column_factor ``[O]`` for dY, scale ``[K, 1]``.

    >>> weight = torch.randn(6, 4)
    >>> _, scale = int8_quantize_rows(weight)
    >>> codes, column_factor, scale_t = int8_weight_transpose(weight, scale, scheme="fold")
    >>> codes.shape, torch.equal(column_factor, scale.flatten()), scale_t.flatten().tolist()
    (torch.Size([4, 6]), True, [1.0, 1.0, 1.0, 1.0])
    """
    return _ops.int8_weight_transpose(weight, scale, scheme=scheme)


def int8_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Int8 matrix product a b^T with exact sums; scales, bias and result type are applied where the sums are made.

    (float(a b^T) * b_scale) * a_scale + bias, computed in float32, then rounded to out_dtype. Sums longer than 131056
    are split and their parts added in float32.

    Shapes: a int8 ``[..., K]``, b int8 ``[N, K]``; scales float32 of as many elements as the operand has rows, or of
    one (None: 1); bias ``[N]`` of any floating type -> ``[..., N]``. out_dtype: float32, float16 or bfloat16.

    Raises:
        ValueError: shapes that do not fit; a GPU older than compute capability 8.0.
        TypeError: other element types; operands on different devices.

    >>> x, w = torch.randn(3, 64), torch.randn(5, 64)
    >>> (xq, xs), (wq, ws) = int8_quantize_rows(x), int8_quantize_rows(w)
    >>> bool((int8_mm(xq, wq, xs, ws) - x @ w.T).abs().max() < 0.5)
    True
    """
    return _ops.int8_mm.typed(
        _arguments.tensor("int8_mm", "a", a),
        _arguments.tensor("int8_mm", "b", b),
        _scale("a_scale", a_scale, a),
        _scale("b_scale", b_scale, b),
        bias,
        out_dtype=_arguments.type_name("int8_mm", "out_dtype", out_dtype, _arguments.FLOATS),
    )


def int8_weight_mm(input: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Product of a floating-point input with an int8 weight, y = (x codes^T) * scale + bias: inference with 8-bit
    weights and 16-bit activations.

    Sums are float32, of a fixed order. On CUDA float16 and bfloat16 input of at most 32 rows with K a multiple of 16 is
    multiplied without decoding the weight first, at the rate at which its bytes are read; on the CPU input of at most 64
    rows. Otherwise the weight is decoded once. Under autocast the input is cast.

    Shapes: input ``[..., K]`` of float32, float16 or bfloat16, codes int8 ``[N, K]``, scale float32 of N elements or of
    one, bias ``[N]`` of a floating type -> ``[..., N]`` of input's type.
    Gradient: to input and bias, any number of times.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: other element types; tensors on different devices.

    >>> x, w = torch.randn(3, 64), torch.randn(5, 64)
    >>> bool((int8_weight_mm(x, *int8_quantize_rows(w)) - x @ w.T).abs().max() < 0.3)
    True
    """
    return _ops.int8_weight_mm(_arguments.tensor("int8_weight_mm", "input", input), codes, scale, bias)


def int8_mm_accumulate_(
    accumulator: Tensor, a: Tensor, b: Tensor, a_scale: Tensor | None = None, b_scale: Tensor | None = None
) -> None:
    """Add an int8 matrix product to a floating-point matrix in place.

    accumulator += the product of :func:`int8_mm`, added in float32 and rounded once.

    Shapes: accumulator ``[M, N]`` of float32, float16 or bfloat16, a ``[M, K]``, b ``[N, K]``.

    >>> total, a, b = torch.ones(1, 1), torch.full((1, 2), 3, dtype=torch.int8), torch.full((1, 2), 5, dtype=torch.int8)
    >>> int8_mm_accumulate_(total, a, b)
    >>> total.item()
    31.0
    """
    _ops.int8_mm_accumulate_(accumulator, a, b, a_scale, b_scale)


def int8_layer_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    column_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Layer norm whose result leaves as int8 codes with one scale per row.

    (x - mean) / sqrt(var + eps) * weight + bias over the last dimension.

    This function and those below quantize a result where it is computed, token by token (Yao et al., "ZeroQuant",
    NeurIPS 2022, section 4.3): no floating-point copy of it is written. The result is float32 until it is rounded to
    nearest, times ``column_factor`` where one is given: the inverse of a smoothing factor that the next weight took
    (SmoothQuant, Xiao et al., arXiv:2211.10438, eq. 3), at no pass of its own. Sums over a row are float32, each device
    in its own order, so codes on CPU and CUDA may differ by one. For inference: no gradients.

    Shapes: input ``[..., K]``, weight and bias ``[K]`` of input's type or float32, column_factor float32 of K elements
    -> codes ``[..., K]``, scale ``[..., 1]``.

    >>> codes, scale = int8_layer_norm(torch.randn(2, 8))
    >>> codes.abs().amax(-1).tolist()
    [127, 127]
    """
    return _ops.int8_layer_norm(input, weight, bias, eps, column_factor=column_factor)


def int8_rms_norm(
    input: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, column_factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """RMS norm whose result leaves as int8 codes with one scale per row.

    x / sqrt(mean(x^2) + eps) * weight over the last dimension; shapes as :func:`int8_layer_norm`.

    >>> int8_rms_norm(torch.tensor([[3.0, -4.0]]))[0].tolist()
    [[95, -127]]
    """
    return _ops.int8_rms_norm(input, weight, eps, column_factor=column_factor)


def int8_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    post_norm: bool = False,
    column_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual sum and layer norm in one pass, the norm as int8 codes with one scale per row.

    :func:`int8_layer_norm` of s = input + residual (rounded to input's type), and what the next residual needs. Returns
    codes, scale and ``carried`` of input's shape and type: s (a pre-norm block adds to it), or with post_norm the
    normalized value (a post-norm block adds to that), without ``column_factor`` either way.

    >>> codes, scale, carried = int8_add_layer_norm(torch.ones(2, 8), torch.randn(2, 8))
    >>> carried.shape
    torch.Size([2, 8])
    """
    return _ops.int8_add_layer_norm(
        input, residual, weight, bias, eps, post_norm=post_norm, column_factor=column_factor
    )


def int8_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    post_norm: bool = False,
    column_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual sum and RMS norm in one pass, the norm as int8 codes with one scale per row.

    :func:`int8_rms_norm` of input + residual; results as :func:`int8_add_layer_norm`.

    >>> codes, scale, carried = int8_add_rms_norm(torch.ones(1, 2), torch.tensor([[2.0, -5.0]]))
    >>> codes.tolist(), carried.tolist()
    ([[95, -127]], [[3.0, -4.0]])
    """
    return _ops.int8_add_rms_norm(input, residual, weight, eps, post_norm=post_norm, column_factor=column_factor)


def int8_gelu(
    input: Tensor, *, approximate: str = "none", column_factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """GELU whose result leaves as int8 codes with one scale per row.

    approximate: ``"none"`` (erf) or ``"tanh"``. column_factor as in :func:`int8_layer_norm`; shapes as
    :func:`int8_quantize_rows`.

    >>> int8_gelu(torch.tensor([[0.0, 10.0, -10.0]]))[0].tolist()
    [[0, 127, 0]]
    """
    return _ops.int8_gelu(input, approximate=approximate, column_factor=column_factor)


def int8_relu(input: Tensor, *, column_factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """ReLU whose result leaves as int8 codes with one scale per row.

    column_factor as in :func:`int8_layer_norm`; shapes as :func:`int8_quantize_rows`.

    >>> int8_relu(torch.tensor([[2.0, -10.0]]))[0].tolist()
    [[127, 0]]
    """
    return _ops.int8_relu(input, column_factor=column_factor)


def int8_silu_mul(gate: Tensor, up: Tensor, *, column_factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """SiLU of a gate times another input, leaving as int8 codes with one scale per row.

    gate * sigmoid(gate) * up. Shapes: gate and up ``[..., K]``; column_factor as in :func:`int8_layer_norm`.

    >>> int8_silu_mul(torch.tensor([[20.0, 0.0]]), torch.tensor([[2.0, 3.0]]))[0].tolist()
    [[127, 0]]
    """
    return _ops.int8_silu_mul(gate, up, column_factor=column_factor)


def int8_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    output: str = "int8",
    grad_input: str = "int8",
    grad_weight: str = "int8",
    weight_scheme: str = "auto",
    simulate: bool = False,
    weight_codes: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """Linear layer whose three matrix products run in int8, each by choice or where measured times say it pays.

    y = input weight^T + bias, differentiable::

        output       Y  = Xq Wq^T * sw * sx + b     Xq, sx and Wq, sw: int8_quantize_rows of X and W
        grad_input   dX = (dY * sw) Wq              dY * sw rounded stochastically, one scale per row
        grad_weight  dW = (dY * sx)^T Xq            dY * sx rounded stochastically, one scale per column
        grad_bias    sum of dY

    The mean of dX and dW over the draws is the gradient at the rounded X and W (the setting of StatQuant, Chen et al.
    2020, arXiv:2010.14298). Kept for the backward pass: Xq and sx, 1 byte per element, instead of X where grad_weight
    is int8. The draw comes from the device's default generator when the gradients are computed, one for dX and dW
    together (their errors are not independent); where nothing needs them nothing is drawn. NaN and Inf make NaN in
    every product they enter. The gradients have no derivative: asking for one (double backward) raises
    NotImplementedError.

    Args:
        input, weight, bias: float32, float16 or bfloat16 each. Under ``torch.autocast`` the input is cast; the weight
            is rounded as it is, and cast only for a product in floating point.
        output, grad_input, grad_weight: ``"int8"``, ``"none"`` (floating point, as ``F.linear``) or ``"auto"``
            (whichever is faster for the shape by a model of the device's times).
        weight_scheme: how the weight enters grad_input, as ``scheme`` of :func:`int8_weight_transpose`.
        simulate: multiply the same codes, of the same draws, in float32; runs on every device.
        weight_codes, weight_scale: ``int8_quantize_rows(weight)``, made once for several calls with one weight.

    Shapes: input ``[..., K]``, weight and weight_codes ``[O, K]``, bias ``[O]``, weight_scale O elements ->
    ``[..., O]`` of input's type; gradients have their tensor's type.

    Raises:
        ValueError: a shape or value outside these rules; a GPU without int8 tensor cores (below compute capability
            8.0).
        TypeError: an element type or device outside them.
        NotImplementedError: a second derivative.

    >>> x, w = torch.randn(16, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    >>> int8_linear(x, w, grad_weight="none").sum().backward()
    >>> x.grad.shape, w.grad.shape
    (torch.Size([16, 8]), torch.Size([4, 8]))
    """
    return _ops.int8_linear(
        input,
        weight,
        bias,
        output=output,
        grad_input=grad_input,
        grad_weight=grad_weight,
        weight_scheme=weight_scheme,
        simulate=simulate,
        weight_codes=weight_codes,
        weight_scale=weight_scale,
    )
