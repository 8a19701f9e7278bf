"""The four_bit family in plain PyTorch: what the operators are held against. Nothing here imports quantrain.

Codes and scales depend on the rounding of float32 numbers, so they are computed in float32, one operation at a time;
products and gradients in float64. A block is a run of block_size elements of the flattened tensor; the last one may be
short.

NF4 and double quantization: Dettmers, Pagnoni, Holtzman, Zettlemoyer, "QLoRA: Efficient Finetuning of Quantized LLMs"
(NeurIPS 2023).
"""

import math

import numpy as np
import torch

TINY = 2.0**-126  # a block of nothing but smaller magnitudes has scale 0; no other scale is smaller
SCALE_BLOCK = 256  # scales that share a scale where they are compressed
FACTORS = torch.tensor([(64 + i) / 80 for i in range(25)])  # 0.8, 0.8125, ..., 1.1
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


# ---- tables of values ----


def floats(bits):
    """float32 of words in hexadecimal."""
    return torch.from_numpy(np.array([int(word, 16) for word in bits.split()], dtype=np.uint32).view(np.float32))


NF4 = floats(
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
    "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)
_FP4 = floats(
    "00000000 3baaaaab 3f2aaaab 3f800000 3eaaaaab 3f000000 3e2aaaab 3e800000"
)  # {0, 1/16, 8, 12, 4, 6, 2, 3} / 12
_E2M1 = floats(
    "00000000 3daaaaab 3e2aaaab 3e800000 3eaaaaab 3f000000 3f2aaaab 3f800000"
)  # {0, 1/2, 1, 3/2, 2, 3, 4, 6} / 6
FP4, E2M1 = torch.cat([_FP4, -_FP4]), torch.cat([_E2M1, -_E2M1])
INT4 = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1])
UINT4 = torch.arange(16.0)
# Yoshida, "NF4 Isn't Information Theoretically Optimal (and that's Good)" (2023): for blocks of 64.
AF4 = torch.tensor([-1, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0,
                    0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1])  # fmt: skip


def code_values(format, table=None):
    """float32 [16]."""
    return {"nf4": NF4, "fp4": FP4, "e2m1": E2M1, "int4": INT4, "uint4": UINT4, "table": table}[format]


def midpoints(values):
    """float32 midpoints of neighbors of an ascending list."""
    return (values[:-1] + values[1:]) * 0.5


def dynamic_map():
    """float32 [256], ascending: the signed dynamic map.

    Of both signs, for i = 0..6, the midpoints of 2^i equal parts of [0.1, 1], times 10^(i - 6); 0; and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        middle = midpoints(torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32))
        middle = middle * torch.tensor(10.0 ** (i - 6), dtype=torch.float32)
        values += middle.tolist() + (-middle).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


MAP = dynamic_map()


# ---- codes of numbers ----


def nearest(r, values):
    """Index of the nearest of ascending values; of a tie the lower."""
    return torch.bucketize(r, midpoints(values), right=False)  # how many thresholds r is above


def encode(x, scale, format, table=None, zero_point=None):
    """int64 codes 0..15 of x under `scale`, which broadcasts; of 0 where the scale is 0."""
    inverse = torch.where(scale == 0, torch.zeros_like(scale), torch.ones_like(scale) / scale)
    r = x * inverse
    r = torch.where(r.isnan(), torch.zeros_like(r), r)  # its scale says so
    if format == "int4":
        return r.round().clamp(-8, 7).long() & 15
    if format == "uint4":
        return (r.round() + zero_point).clamp(0, 15).long()
    if format in ("fp4", "e2m1"):
        values, order = code_values(format)[:8].sort()
        codes = order[nearest(r.abs(), values)]
        return torch.where((x < 0) & (inverse != 0), codes | 8, codes)
    values, order = code_values(format, table).sort(stable=True)
    return order[nearest(r, values)]


def code_of_zero(format, table=None):
    return int(encode(torch.zeros(1), torch.ones(1), format, table, torch.zeros(1)))


def decode(codes, scale, format, table=None, zero_point=None):
    """float32: code_value * scale, or (code - zero_point) * scale."""
    value = code_values(format, table)[codes]
    return (value if zero_point is None else value - zero_point.float()) * scale


# ---- blocks and bytes ----


def by_rows(shape, block_size):
    """Whether codes are [..., K / 2] and scales [..., K / block_size]; else both have one dimension."""
    return len(shape) > 0 and shape[-1] % block_size == 0 and shape[-1] % 2 == 0


def packed_shape(shape, block_size):
    shape = tuple(shape)
    if by_rows(shape, block_size):
        return (*shape[:-1], shape[-1] // 2)
    return ((math.prod(shape) + 1) // 2,)


def scale_shape(shape, block_size):
    shape = tuple(shape)
    if by_rows(shape, block_size):
        return (*shape[:-1], shape[-1] // block_size)
    return (-(-math.prod(shape) // block_size),)


def is_high_first(format):
    return format not in ("int4", "uint4")


def pack(codes, format, padding=0):
    """uint8 [(n + 1) / 2] of codes [n]; `padding` is in the unused nibble."""
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_tensor([padding])])
    first, second = codes[::2], codes[1::2]
    return (first << 4 | second if is_high_first(format) else second << 4 | first).to(torch.uint8)


def unpack(packed, n, format):
    """int64 [n] of bytes of any shape."""
    packed = packed.reshape(-1).long()
    nibbles = (packed >> 4, packed & 15) if is_high_first(format) else (packed & 15, packed >> 4)
    return torch.stack(nibbles, 1).flatten()[:n]


def blocks_of(x, block_size):
    """(float32 [blocks, block_size], the same shape: whether there is an element); 0 where there is none."""
    x = x.float().reshape(-1)
    count = -(-x.numel() // block_size)
    padded = torch.zeros(count * block_size)
    padded[: x.numel()] = x
    exists = torch.arange(count * block_size) < x.numel()
    return padded.view(count, block_size), exists.view(count, block_size)


# ---- quantizers ----


def absmax_scale(absmax, format):
    scale = (absmax / 7).clamp(min=TINY) if format == "int4" else absmax
    scale = torch.where(absmax < TINY, torch.zeros_like(scale), scale)
    return torch.where(absmax.isfinite(), scale, torch.full_like(scale, torch.nan))


def signed_scale(blocks):
    """The first element of the largest magnitude / -8."""
    magnitude = blocks.abs().nan_to_num(nan=torch.inf)
    first = torch.from_numpy(magnitude.numpy().argmax(1))
    largest = blocks.gather(1, first[:, None])[:, 0]
    scale = largest / -8
    scale = torch.where(scale.abs() < TINY, torch.copysign(torch.full_like(scale, TINY), scale), scale)
    scale = torch.where(largest.abs() < TINY, torch.zeros_like(scale), scale)
    return torch.where(largest.isfinite(), scale, torch.full_like(scale, torch.nan))


def search_scale(blocks, exists, format, table=None):
    """The factor of the absmax scale with the least squared error, a float32 sum in the order of the elements."""
    found = []
    for part, present in zip(blocks.split(4096), exists.split(4096), strict=True):
        base = absmax_scale(part.abs().amax(1), format)
        scales = base[:, None] * FACTORS
        codes = encode(part[:, None], scales[..., None], format, table)
        error = part[:, None] - decode(codes, scales[..., None], format, table)
        square = torch.where(present[:, None], error * error, torch.zeros_like(error))
        total = torch.zeros_like(scales)
        for j in range(part.shape[1]):
            total = total + square[..., j]
        best = torch.from_numpy(total.nan_to_num(nan=torch.inf, posinf=torch.inf).numpy().argmin(1))  # the first
        found.append(scales.gather(1, best[:, None])[:, 0])
    return torch.cat(found) if found else torch.zeros(0)


def quantize(x, block_size=64, format="nf4", table=None, scale_rule="absmax"):
    """(codes, scale). The codes of a block whose scale is NaN are not specified: here they are those of 0."""
    blocks, exists = blocks_of(x, block_size)
    if scale_rule == "signed":
        scale = signed_scale(blocks)
    elif scale_rule == "search":
        scale = search_scale(blocks, exists, format, table)
    else:
        scale = absmax_scale(blocks.abs().amax(1), format)
    codes = encode(blocks, scale[:, None], format, table).flatten()[: x.numel()]
    codes = pack(codes, format, code_of_zero(format, table))
    return codes.view(packed_shape(x.shape, block_size)), scale.view(scale_shape(x.shape, block_size))


def quantize_affine(x, block_size=64):
    """(codes, scale, zero_point int32) of uint4, with 0 in the range: its code is the block's zero point."""
    blocks, _ = blocks_of(x, block_size)
    low, high = blocks.amin(1), blocks.amax(1)
    finite, tiny = low.isfinite() & high.isfinite(), (low.abs() < TINY) & (high.abs() < TINY)
    low, high = low.clamp(max=0), high.clamp(min=0)
    width = high - low
    scale = torch.where(width.isinf(), (0.5 * high - 0.5 * low) / 7.5, width / 15).clamp(min=TINY)
    zero_point = (-low / scale).round().clamp(0, 15)
    zero_point = torch.where(finite & ~tiny, zero_point, torch.zeros_like(zero_point))
    scale = torch.where(tiny, torch.zeros_like(scale), scale)
    scale = torch.where(finite, scale, torch.full_like(scale, torch.nan))
    codes = encode(blocks, scale[:, None], "uint4", zero_point=zero_point[:, None]).flatten()[: x.numel()]
    shape = scale_shape(x.shape, block_size)
    codes = pack(codes, "uint4", int(zero_point[-1]) if len(zero_point) else 0).view(packed_shape(x.shape, block_size))
    return codes, scale.view(shape), zero_point.int().view(shape)


def dequantize(codes, scale, size, format="nf4", *, block_size, table=None, zero_point=None, dtype=torch.float32):
    """Of shape `size`; scale float32. Rounded once."""
    n = math.prod(size)
    element = torch.arange(n) // block_size
    zero_point = None if zero_point is None else zero_point.reshape(-1)[element]
    return decode(unpack(codes, n, format), scale.reshape(-1)[element], format, table, zero_point).view(size).to(dtype)


# ---- scales of scales ----


def compress_scale(scale, offset=None):
    """(codes uint8, scale_scale, scale_offset). The mean is a float64 sum, rounded once; `offset` takes its place."""
    if offset is None:
        offset = scale.double().mean().float() if scale.numel() else torch.zeros(())
    blocks, exists = blocks_of(scale - offset, SCALE_BLOCK)
    scale_scale = absmax_scale(blocks.abs().amax(1), "nf4")
    inverse = torch.where(scale_scale == 0, torch.zeros_like(scale_scale), torch.ones_like(scale_scale) / scale_scale)
    codes = nearest((blocks * inverse[:, None]).nan_to_num(nan=0.0), MAP)[exists]
    return codes.to(torch.uint8).view(scale.shape), scale_scale, offset


def decompress_scale(codes, scale_scale, scale_offset):
    block = torch.arange(codes.numel()) // SCALE_BLOCK
    return (MAP[codes.reshape(-1).long()] * scale_scale[block] + scale_offset).view(codes.shape)


# ---- products, in float64 ----


def linear(x, weight, bias=None):
    y = x.double() @ weight.double().t()
    return y if bias is None else y + bias.double()


def spread(x, weight, bias=None):
    """The size of the sums of a product where their terms do not cancel: what rounding errors go by."""
    square = x.double().square() @ weight.double().square().t()
    return (square if bias is None else square + bias.double().square()).sqrt()


def linear_gradients(grad_output, weight):
    """(grad_input, grad_bias)."""
    g = grad_output.double()
    return g @ weight.double(), g.reshape(-1, g.shape[-1]).sum(0)


def lora(x, weight, lora_a, lora_b, scaling, bias=None, mask=None):
    """y = x W^T + bias + scaling (x' A^T) B^T, where x' = x, or x * mask of a dropout's factors 0 and 1 / (1 - p)."""
    kept = x.double() if mask is None else x.double() * mask.double()
    return linear(x, weight, bias) + scaling * (kept @ lora_a.double().t()) @ lora_b.double().t()


def lora_gradients(grad_output, x, weight, lora_a, lora_b, scaling, mask=None):
    """(grad_input, grad_lora_a, grad_lora_b, grad_bias)."""
    g, factor = grad_output.double(), 1 if mask is None else mask.double()
    kept = (x.double() * factor).reshape(-1, x.shape[-1])
    inner = g @ lora_b.double()  # [..., r]
    grad_input, grad_bias = linear_gradients(g, weight)
    grad_input = grad_input + scaling * (inner @ lora_a.double()) * factor
    grad_a = scaling * inner.reshape(-1, inner.shape[-1]).t() @ kept
    grad_b = scaling * g.reshape(-1, g.shape[-1]).t() @ (kept @ lora_a.double().t())
    return grad_input, grad_a, grad_b, grad_bias


# ---- measures ----


def sqnr(x, y):
    """Signal to quantization noise, dB."""
    x, y = x.double(), y.double()
    return float(10 * torch.log10(x.square().sum() / (x - y).square().sum()))
