"""The gradient_quant family in plain float64: what the operators are held against. Nothing here imports quantrain.

StatQuant: Chen, Gai, Yao, Mahoney, Gonzalez, "A Statistical Framework for Low-bitwidth Training of Deep Neural Networks" (NeurIPS 2020).
A gradient is X [N, D]; B = 2^bits - 1; codes c in [-2^(bits-1), 2^(bits-1) - 1] stand for c * scale + offset. The transform T of the block
Householder quantizer is a dense N x N matrix here.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

PER_TENSOR, PER_SAMPLE, PER_CHANNEL, HOUSEHOLDER = "per_tensor", "per_sample", "per_channel", "householder"
SECOND_ROUNDING = 1 << 62  # the bit of the Philox index that a second rounding, to float16 or bfloat16, sets


def flatten(grad, rows="sample"):
    """X [N, D]."""
    if rows == "token":
        return grad.reshape(-1, grad.shape[-1])
    return grad.reshape(grad.shape[0], -1)


# ---- random bits ----


def philox4x32_10(seed, offset, index):
    """uint32 [n, 4]: Philox4x32 with ten rounds (Salmon et al., SC 2011) of key `seed` and counter (`index`, `offset`)."""
    mask = np.uint64(0xFFFFFFFF)
    index = np.asarray(index, dtype=np.uint64).reshape(-1)
    offset, seed = offset % 2**64, seed % 2**64
    c0, c1 = index & mask, index >> np.uint64(32)
    c2, c3 = np.full_like(index, offset & 0xFFFFFFFF), np.full_like(index, offset >> 32)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & mask,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & mask,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniforms(seed, offset, n, d, second=False):
    """u [n, d] float64 = (h + 1/2) / 2^16: one block of eight half-words serves eight neighbours of a row, the low half first."""
    blocks = -(-d // 8)
    index = np.arange(n * blocks, dtype=np.uint64)
    if second:
        index |= np.uint64(SECOND_ROUNDING)
    words = philox4x32_10(seed, offset, index)
    halves = np.stack([words & 0xFFFF, words >> 16], axis=2).reshape(n, blocks * 8)[:, :d]
    return torch.from_numpy((halves.astype(np.float64) + 0.5) / 2.0**16)


# ---- grids ----


def low_code(bits):
    return -(2 ** (bits - 1))


def _plain(low, high, bits):
    scale = (high - low) / (2**bits - 1)
    return scale, low - low_code(bits) * scale


def _with_zero(low, high, bits):
    """The smallest grid over the range and 0 that holds 0: every place z of 0 among the B + 1 codes is tried."""
    steps = 2**bits - 1
    low, high = low.clamp(max=0).unsqueeze(-1), high.clamp(min=0).unsqueeze(-1)
    zero = torch.arange(steps + 1, dtype=torch.float64)
    below = torch.where(low < 0, -low / zero, torch.zeros_like(low))  # infinite for z = 0
    above = torch.where(high > 0, high / (steps - zero), torch.zeros_like(low))
    scale, place = torch.maximum(below, above).min(-1)
    return scale, -(place + low_code(bits)) * scale


def grid(x, bits, quantizer, preserve_zero=False):
    """(scale, offset) in float64 of the blocks of x [N, D]: [1, 1], [N, 1] or [1, D]."""
    x = x.double()
    if quantizer == PER_TENSOR:
        return _with_zero(x.amin().reshape(1, 1), x.amax().reshape(1, 1), bits)
    dim = 0 if quantizer == PER_CHANNEL else 1
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    return (_with_zero if preserve_zero else _plain)(low, high, bits)


# ---- the block Householder transform ----


@dataclass
class Group:
    rows: list  # the leader first
    scales: list  # s_1 for the leader, 1 for the others


def _small_rows_of_leaders(ranges):
    """How many small rows each leader gets: ranges descending, the authors' rule with a strict >, rounding half away from zero."""
    n, total, small = len(ranges), sum(ranges), 0
    while True:
        small += 1
        total = math.fsum(ranges[: n - small])
        if small * ranges[n - small - 1] > total:
            break
    taken, part, counts = 0, 0.0, []
    for leader in range(n - small):
        part += small * ranges[leader] / total
        cumulative = small if leader == n - small - 1 else min(int(math.floor(part + 0.5)), small)
        counts.append(cumulative - taken)
        taken = cumulative
    return counts


def leader_scale(v_lead, v_small, k):
    q_max = max(1 / math.sqrt(k), abs(1 - (1 / k) / (1 - 1 / math.sqrt(k))), (1 / k) / (1 - 1 / math.sqrt(k)) * (k > 2))
    v_small = max(v_small, v_lead * 2.0**-30)
    return ((v_small * q_max * math.sqrt(k)) / ((k - 1) * v_lead)) ** (1 / 3)


def groups(x, max_group=128):
    """The groups of finite x [N, D], block after block; rows are ordered by their ranges in float32."""
    ranges = (x.float().amax(1) - x.float().amin(1)).tolist()
    descending = sorted(range(len(ranges)), key=lambda i: -ranges[i])  # stable
    blocks = -(-len(ranges) // max_group)
    result = []
    for b in range(blocks):
        rows = descending[b::blocks]
        v = [ranges[i] for i in rows]
        if len(rows) < 3:
            result += [Group([i], [1.0]) for i in rows]
            continue
        counts = _small_rows_of_leaders(v) if v[0] > 0 else [len(rows) - 1]  # constant rows alone: one group, s = 1
        start = len(counts)
        for leader, count in enumerate(counts):
            members = [rows[leader], *rows[start : start + count]]
            first = leader_scale(v[leader], v[start], len(members)) if v[leader] > 0 else 1.0
            result.append(Group(members, [first] + [1.0] * count))
            start += count
    return result


def plan(x, max_group=128):
    """(order [N], reflector [N, 4]) of the integer form, in float64."""
    order, rows = [], []
    zero = (x == 0).all(1).tolist()
    for group in groups(x, max_group):
        k = len(group.rows)
        for position, (row, s) in enumerate(zip(group.rows, group.scales, strict=True)):
            n = 0.0 if k == 1 else 1 / math.sqrt(k) - (position == 0)
            m = 0.0 if k == 1 else n / (1 - 1 / math.sqrt(k))
            order.append(row)
            rows.append([s, n, m, 0.0 if zero[row] else 1 / s])
    return torch.tensor(order), torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)


def group_starts(reflector):
    """Positions at which a group starts: a leader's n is negative, a group of one has n = 0."""
    return [p for p, n in enumerate(reflector[:, 1].tolist()) if n <= 0] + [len(reflector)]


def dense(order, reflector):
    """(T, T^-1) [N, N] float64 of a plan: Q_k diag(s) and diag(t) Q_k in each group, rows and columns those of x."""
    order, r = order.long().cpu(), reflector.double().cpu()
    size = len(order)
    forward, inverse = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    starts = group_starts(r)
    for a, b in zip(starts, starts[1:], strict=False):
        k, rows = b - a, order[a:b]
        normal = torch.full((k,), 1 / math.sqrt(k), dtype=torch.float64)
        normal[0] -= 1
        q = torch.eye(k, dtype=torch.float64)
        if k > 1:
            q -= 2 * torch.outer(normal, normal) / normal.square().sum()
        forward[rows[:, None], rows[None, :]] = q * r[a:b, 0][None, :]
        inverse[rows[:, None], rows[None, :]] = r[a:b, 3][:, None] * q
    return forward, inverse


# ---- the roundings, in the operators' own arithmetic ----


def in_type(value, dtype):
    """float32 as `dtype` holds it, in float32; a grid's last point beyond the largest half is that half."""
    if dtype == torch.float16:
        value = value.clamp(-65504.0, 65504.0)
    return value.to(dtype).float()


def round_to_grid(x, scale, offset, bits, u, dtype=torch.float32):
    """(codes, values in `dtype`) of x on a given grid, every step rounded to float32: equal to the operators' bit for bit."""
    x, u = x.float(), u.float()
    code = torch.round((x - offset) * (1.0 / scale) - 0.5).clamp(low_code(bits), -low_code(bits) - 2)
    low, high = (in_type(c * scale + offset, dtype) for c in (code, code + 1))
    up = x - low > u * (high - low)
    return (code + up).to(torch.int8), torch.where(up, high, low).to(dtype)


def dithered_code(y, scale, offset, bits, u):
    """(codes, values) of y = T x on a given grid, every step rounded to float32: householder's, bit for bit."""
    code = torch.round((y - offset) * (1.0 / scale) + (u.float() - 0.5)).clamp(low_code(bits), -low_code(bits) - 1)
    return code.to(torch.int8), code * scale + offset


def round_to_type(value, u, dtype):
    """float32 to float16 or bfloat16, down or up in magnitude: up with probability p, the part of the step dropped."""
    mantissa, least = {torch.float16: (10, -14), torch.bfloat16: (7, -126)}[dtype]
    magnitude = value.double().abs()
    exponent = torch.frexp(magnitude)[1].double() - 1
    step = 2.0 ** (exponent.clamp(min=least) - mantissa)
    whole = torch.floor(magnitude / step)
    part = magnitude / step - whole
    # bfloat16 adds h to the 16 bits that are dropped: up where h >= 2^16 (1 - p), with u = (h + 1/2) / 2^16.
    up = part > u if dtype == torch.float16 else u > 1 - part
    return (torch.copysign((whole + up) * step, value.double())).to(dtype)


# ---- quantization ----


@dataclass
class Quantized:
    value: torch.Tensor  # x^ [N, D]
    codes: torch.Tensor  # [N, D]
    scale: torch.Tensor
    offset: torch.Tensor
    rounded: torch.Tensor  # what the codes stand for: x itself, or y = T x
    margin: torch.Tensor  # [N, D]: |p - u|, how far the draw was from falling the other way, in steps
    inverse: torch.Tensor | None = None  # T^-1


def _prepare(x, bits, quantizer, preserve_zero, max_group):
    x = x.double()
    if quantizer != HOUSEHOLDER:
        return x, None, *grid(x, bits, quantizer, preserve_zero)
    forward, inverse = dense(*plan(x, max_group))
    y = forward @ x
    return y, inverse, *grid(y, bits, PER_SAMPLE)


def _neighbours(y, bits, scale, offset, dtype=torch.float64):
    """(code below, value below, value above): the grid values as rounded to `dtype`, in float64."""
    step = torch.where(scale > 0, scale, torch.ones_like(scale))
    code = torch.floor((y - offset) / step).clamp(low_code(bits), -low_code(bits) - 2)
    low, high = ((c * scale + offset).to(dtype).double() for c in (code, code + 1))
    return code, low, high


def quantize(x, bits, quantizer, u, preserve_zero=False, max_group=128):
    """x^ of finite x [N, D] for uniforms u [N, D]: up where p > u, with householder where p > 1 - u (p + u is rounded down)."""
    y, inverse, scale, offset = _prepare(x, bits, quantizer, preserve_zero, max_group)
    code, low, high = _neighbours(y, bits, scale, offset)
    p = torch.where(
        high > low, (y - low) / torch.where(high > low, high - low, torch.ones_like(y)), torch.zeros_like(y)
    )
    threshold = 1 - u if quantizer == HOUSEHOLDER else u
    code = code + (p > threshold)
    value = code * scale + offset
    return Quantized(
        value if inverse is None else inverse @ value, code, scale, offset, y, (p - threshold).abs(), inverse
    )


def variance(x, bits, quantizer, preserve_zero=False, max_group=128, dtype=torch.float64):
    """Var[x^] [N, D] given x: (y - below)(above - y) an element, that is p (1 - p) step^2, and for householder (T^-1)^2 times that.

    `dtype` rounds the neighbours to float16 or bfloat16 as the simulated form does (not householder).
    """
    y, inverse, scale, offset = _prepare(x, bits, quantizer, preserve_zero, max_group)
    _, low, high = _neighbours(y, bits, scale, offset, dtype)
    own = ((y - low) * (high - y)).clamp(min=0)
    return own if inverse is None else inverse.square() @ own


def bound(x, bits, quantizer, preserve_zero=False, max_group=128):
    """Theorem T3: D / 4 ||S^-1||_F^2 for S = diag(1 / scale) T, a step of 1 after the transform."""
    n, d = x.shape
    y, inverse, scale, _ = _prepare(x, bits, quantizer, preserve_zero, max_group)
    if inverse is None:
        return (scale.square().expand(n, d).sum() / 4).item()
    return d / 4 * (inverse * scale.reshape(1, -1)).square().sum().item()


def closed_form_bound(x, bits, quantizer):
    """T3's closed forms: (D / 4 B^2) times N R(X)^2, sum R(x_i)^2, or the cube of the paper's denominator for one big row."""
    x = x.double()
    n, d = x.shape
    ranges = x.amax(1) - x.amin(1)
    factor = d / (4 * (2**bits - 1) ** 2)
    if quantizer == PER_TENSOR:
        return factor * n * (x.amax() - x.amin()).item() ** 2
    if quantizer == PER_SAMPLE:
        return factor * ranges.square().sum().item()
    leader = int(ranges.argmax())
    others = torch.cat([x[:leader], x[leader + 1 :]])
    l1, l2 = ranges[leader].item(), 2 * others.abs().amax().item()
    return factor * (l1 ** (2 / 3) * n ** (-1 / 3) + l2 ** (2 / 3) * n ** (1 / 3)) ** 3
