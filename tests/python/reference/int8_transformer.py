"""A transformer layer in float64: what the fused operators are held against. Nothing here imports quantrain.

A product's weight is codes times scale. `rounded` takes each row that a product reads to int8 with the step absmax / 127, as the operators do;
without it nothing is rounded. `dtype` is the type in which results are written between kernels: they are rounded to it.
"""

import torch
import torch.nn.functional as F
from reference import int8


def weight(codes, scale):
    return codes.double() * scale.double().reshape(-1, 1)


def to_int8(x):
    """Rows of x [..., K] on their int8 grid, float64; a row that is not finite is NaN, one of zeros stays."""
    absmax = x.abs().amax(-1, keepdim=True)
    step = torch.where(absmax > 0, absmax / 127, torch.ones_like(absmax))
    return torch.where(absmax.isfinite(), (x / step).round() * step, torch.nan)


def product(x, weights, name, rounded):
    """x W^T + bias."""
    factor = weights.get(f"{name}_input_factor")
    if factor is not None:
        x = x * factor.double()
    y = (to_int8(x) if rounded else x) @ weight(weights[f"{name}_codes"], weights[f"{name}_scale"]).t()
    bias = weights.get(f"{name}_bias")
    return y if bias is None else y + bias.double()


def rotate(x, cos, sin, heads):
    """x [B, T, H, D] with its first heads rotated."""
    first, second = x.double().chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    y = x.double() * cos.double()[:, :, None] + turned * sin.double()[:, :, None]
    return torch.cat([y[:, :, :heads], x.double()[:, :, heads:]], 2)


def attention(q, k, v, mask=None, causal=False, scale=1.0):
    """q [B, Tq, H, D], k and v [B, Tk, Hk, D] -> [B, Tq, H, D]; 0 for a query that attends to nothing."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = scale * q @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if causal:
        earlier = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~earlier, -torch.inf)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    y = torch.softmax(scores.masked_fill(nothing, 0.0), -1) @ v
    return torch.where(nothing, 0.0, y).transpose(1, 2)


def normalized(x, weights, number, norm, eps):
    w, b = weights.get(f"norm_{number}_weight"), weights.get(f"norm_{number}_bias")
    return int8.layer_norm(x, w, b, eps) if norm == "layer_norm" else int8.rms_norm(x, w, eps)


def activated(x, activation):
    if activation == "silu_mul":
        return int8.silu_mul(*x.chunk(2, -1))
    if activation == "relu":
        return x.relu()
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def qkv(
    x, weights, *, heads, kv_heads=0, norm="layer_norm", pre_norm=False, eps=1e-5, cos=None, sin=None, rounded=False,
    dtype=torch.float64, **_,
):  # fmt: skip
    """Queries, keys and values, rotated, [B, T, heads + 2 kv_heads, D], float64."""
    kv_heads = kv_heads or heads
    read = normalized(x.double(), weights, 1, norm, eps) if pre_norm else x.double()
    y = product(read, weights, "qkv", rounded).to(dtype).double()
    y = y.unflatten(-1, (heads + 2 * kv_heads, -1))
    return y if cos is None else rotate(y, cos, sin, heads + kv_heads).to(dtype).double()


def output(
    x, attended, weights, *, norm="layer_norm", pre_norm=False, activation="gelu", eps=1e-5, rounded=False,
    dtype=torch.float64, **_,
):  # fmt: skip
    """What follows attention, float64 [B, T, C]."""

    def written(t):
        return t.to(dtype).double()

    middle = written(x.double() + written(product(attended.double(), weights, "out", rounded)))
    if pre_norm:
        read = normalized(middle, weights, 2, norm, eps)
    else:
        read = middle = written(normalized(middle, weights, 1, norm, eps))
    up = activated(written(product(read, weights, "up", rounded)), activation)
    y = written(middle + written(product(up, weights, "down", rounded)))
    return y if pre_norm else normalized(y, weights, 2, norm, eps)


def layer(x, weights, *, heads, kv_heads=0, causal=False, softmax_scale=0.0, mask=None, dtype=torch.float64, **options):
    """x [B, T, C] -> float64 [B, T, C]. `weights` by the operators' names: codes, scale, bias and input_factor of each
    product, weight and bias of the norms."""
    kv_heads = kv_heads or heads
    y = qkv(x, weights, heads=heads, kv_heads=kv_heads, dtype=dtype, **options)
    q, k, v = y.split([heads, kv_heads, kv_heads], 2)
    scale = softmax_scale or y.shape[-1] ** -0.5
    mixed = attention(q, k, v, mask, causal and mask is None, scale).to(dtype).double()
    return output(x, mixed.flatten(2), weights, dtype=dtype, **options)
