"""The int8 family in plain PyTorch: what the operators are held against. Nothing here imports quantrain.

Codes depend on the rounding of float32 products, so they are computed in float32, one elementwise operation at a time; the products of codes
and the norms in float64, where the sums are exact or as good as.
"""

import torch
from reference.gradient_quant import uniforms

LARGEST_CODE = 127
SHRINK = 1 - 2.0**-20  # of stochastic rounding: the largest element stays below 127.5 with any dither


def flatten(x):
    return x.reshape(-1, x.shape[-1])


def row_scale(x):
    """float32 [..., 1]: absmax / 127; 1 for an all-zero row, NaN where the row holds NaN or Inf."""
    if x.shape[-1] == 0:
        return torch.ones(*x.shape[:-1], 1)
    absmax = x.float().abs().amax(-1, keepdim=True)
    scale = (absmax / LARGEST_CODE).clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.where(absmax > 0, scale, torch.ones_like(scale))
    return torch.where(absmax.isfinite(), scale, torch.full_like(scale, torch.nan))


def encode(x, scale, dither=None):
    """int8 codes of x under `scale`, to nearest, or with a dither in [-1/2, 1/2) an element."""
    inverse = 1.0 / scale
    if dither is None:
        scaled = x.float() * inverse
    else:
        scaled = x.float() * (inverse * SHRINK) + dither.float()
    return torch.where(scale.isnan(), torch.zeros_like(scaled), scaled.round()).to(torch.int8)


def dither(x, seed, offset):
    """float64 [rows, columns]: exact in float32."""
    rows, columns = flatten(x).shape
    return uniforms(seed, offset, rows, columns) - 0.5 - 2.0**-17  # n 2^-16 - 1/2


def quantize_rows(x, factor=None, seed=None, offset=None):
    """(codes [..., K], scale [..., 1]) of x * factor; stochastic with a seed."""
    value = x.float() if factor is None else x.float() * factor.float()
    scale = row_scale(value)
    return encode(value, scale, None if seed is None else dither(x, seed, offset).view(x.shape)), scale


def quantize_columns(x, factor=None, seed=None, offset=None):
    """(codes [K, M], scale [K, 1]) of the columns of x [..., K], each row of it times its factor."""
    value = flatten(x).float()
    if factor is not None:
        value = value * factor.float().reshape(-1, 1)
    value = value.t().contiguous()
    scale = row_scale(value)
    return encode(value, scale, None if seed is None else dither(x, seed, offset).t()), scale


def folds(scale):
    """The rule of scheme "auto" in dX = dY W."""
    square = scale.double().flatten().square()
    return not bool(square.max() > 4 * square.mean())


def weight_transpose(weight, scale, scheme="auto"):
    """(codes [K, O], column_factor [O], scale [K, 1]); the weight in floating point or as codes."""
    scale = scale.reshape(-1, 1)
    is_codes = weight.dtype == torch.int8
    if scheme == "fold" or scheme == "auto" and folds(scale):
        codes = weight if is_codes else encode(weight, scale)
        return codes.t(), scale.flatten(), torch.ones(weight.shape[1], 1)
    codes, columns = quantize_columns(weight.float() * scale if is_codes else weight)
    return codes, torch.ones(weight.shape[0]), columns


def mm(a, b, a_scale=None, b_scale=None, bias=None, out_dtype=torch.float32, accumulator=None):
    """The exact sums, then one float32 operation at a time."""
    value = (a.double() @ b.double().t()).float()  # below 2^53: exact, then rounded once
    if b_scale is not None:
        value = value * b_scale.flatten()
    if a_scale is not None:
        value = value * (a_scale.reshape(()) if a_scale.numel() == 1 else a_scale.reshape(*a.shape[:-1], 1))
    if bias is not None:
        value = value + bias.float()
    if accumulator is not None:
        return (accumulator.float() + value).to(accumulator.dtype)
    return value.to(out_dtype)


def add(x, residual):
    """The sum, rounded to x's type."""
    return (x.float() + residual.float()).to(x.dtype)


def layer_norm(x, weight=None, bias=None, eps=1e-5):
    """float64."""
    x = x.double()
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return y * (1 if weight is None else weight.double()) + (0 if bias is None else bias.double())


def rms_norm(x, weight=None, eps=1e-6):
    x = x.double()
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return y * (1 if weight is None else weight.double())


def gelu(x, approximate="none"):
    return torch.nn.functional.gelu(x.double(), approximate=approximate)


def relu(x):
    return x.double().relu()


def silu_mul(gate, up):
    return torch.nn.functional.silu(gate.double()) * up.double()
