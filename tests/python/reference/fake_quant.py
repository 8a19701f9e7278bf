"""The fake_quant family in plain float64 PyTorch: what the operators are held against. Nothing here imports quantrain."""

import math

import torch
from reference.gradient_quant import philox4x32_10


def expand(parameter, input):
    """A parameter of the scale's shape, one value an element of the input."""
    if parameter is None:
        return torch.zeros((), dtype=torch.float64, device=input.device)
    if parameter.numel() == 1:
        return parameter.double().reshape(())
    result = parameter.double()
    for d in range(input.dim()):
        if parameter.shape[d] > 0:
            result = result.repeat_interleave(input.shape[d] // parameter.shape[d], dim=d)
    return result


def unclamped_code(input, scale, zero_point=None):
    """In float32, as the rule says: the product with the reciprocal is rounded to float32 before it is rounded to a code."""
    s, z = expand(scale, input).float(), expand(zero_point, input).float()
    return torch.round(input.float() * (1.0 / s)) + z


def fake_quantize(input, scale, zero_point=None, quant_min=-128, quant_max=127):
    code = unclamped_code(input, scale, zero_point).double().clamp(quant_min, quant_max)
    return ((code - expand(zero_point, input)) * expand(scale, input)).to(input.dtype)


def inside(input, scale, zero_point=None, quant_min=-128, quant_max=127):
    code = unclamped_code(input, scale, zero_point)
    return (code >= quant_min) & (code <= quant_max)


def sum_to_scale(values, scale):
    """Sums a value an element over each group, in float64."""
    if scale.numel() == 1 or values.numel() == 0:
        return values.double().sum().expand(scale.shape)
    split = [n for d in range(values.dim()) for n in (scale.shape[d], values.shape[d] // scale.shape[d])]
    return values.double().reshape(split).sum(dim=list(range(1, 2 * values.dim(), 2)))


def learnable_gradients(grad_output, input, scale, zero_point=None, quant_min=-128, quant_max=127, grad_factor=1.0):
    """(grad_input, grad_scale, grad_zero_point, sum of magnitudes of grad_scale's terms)."""
    if zero_point is not None and zero_point.is_floating_point():
        zero_point = zero_point.round().clamp(quant_min, quant_max)
    code = unclamped_code(input, scale, zero_point).double()
    within = inside(input, scale, zero_point, quant_min, quant_max)
    s, z = expand(scale, input), expand(zero_point, input)
    distance = code.clamp(quant_min, quant_max) - z
    term = torch.where(within, distance - input.double() / s, distance) * grad_output.double() * grad_factor
    point = torch.where(within, torch.zeros_like(term), -s.expand_as(term)) * grad_output.double() * grad_factor
    return (
        torch.where(within, grad_output, torch.zeros_like(grad_output)),
        sum_to_scale(term, scale),
        sum_to_scale(point, scale),
        sum_to_scale(term.abs(), scale),
    )


def groups(input, scale_shape):
    """[groups, elements of a group]."""
    if math.prod(scale_shape) == 1:
        return input.reshape(1, -1)
    split = [n for d in range(input.dim()) for n in (scale_shape[d], input.shape[d] // scale_shape[d])]
    order = [*range(0, 2 * input.dim(), 2), *range(1, 2 * input.dim(), 2)]
    return input.reshape(split).permute(order).reshape(math.prod(scale_shape), -1)


def choose_qparams(input, scale_shape, quant_min=-128, quant_max=127, symmetric=True):
    rows = groups(input, scale_shape).double()
    low, high = rows.amin(1), rows.amax(1)
    if symmetric:
        straddles = quant_min < 0 < quant_max
        steps = min(-quant_min, quant_max) if straddles else max(abs(quant_min), abs(quant_max))
        scale = torch.maximum(low.abs(), high.abs()) / steps
        zero_point = torch.zeros_like(scale)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / (quant_max - quant_min)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    if not symmetric:
        zero_point = (quant_min - torch.round(low.float() / scale.float())).clamp(quant_min, quant_max)
    return scale.float().reshape(scale_shape), zero_point.int().reshape(scale_shape)


def mse_ratio_errors(input, scale_shape, quant_min, quant_max, symmetric, steps):
    """[steps, groups]: the squared error of the range times (k + 1) / steps."""
    rows = groups(input, scale_shape)
    low, high = rows.float().amin(1, keepdim=True), rows.float().amax(1, keepdim=True)
    errors = []
    for k in range(steps):
        ratio = (k + 1) / steps  # the ends in float32: at a tie the last bit of a scale decides a code
        scale, zero_point = qparams_from_range(low * ratio, high * ratio, quant_min, quant_max, symmetric)
        y = fake_quantize(rows.float(), scale, None if symmetric else zero_point, quant_min, quant_max)
        errors.append((y.double() - rows.double()).square().sum(1))
    return torch.stack(errors)


# ---- codes ----


def codes(code, zero_point, quant_min, quant_max, dtype):
    """Unclamped float32 codes as they are stored: NaN is the code nearest to the zero point."""
    zero = expand(zero_point, code).float().clamp(quant_min, quant_max)
    return torch.where(code.isnan(), zero, code.clamp(quant_min, quant_max)).to(dtype)


def uniforms(seed, offset, like):
    """float32 in [0, 1) of 24 bits for a dense tensor: element i in memory takes word i % 4 of block i / 4."""
    result = torch.empty_strided(like.shape, like.stride())
    n = result.numel()
    words = philox4x32_10(seed, offset, range((n + 3) // 4)).reshape(-1)[:n]
    result.as_strided((n,), (1,)).copy_(torch.from_numpy(words.astype("int64")).bitwise_right_shift_(8)).mul_(2.0**-24)
    return result


def stochastic_codes(input, scale, zero_point, quant_min, quant_max, dtype, uniform):
    """Up with probability equal to the fraction, for the given uniforms."""
    value = input.float() * (1.0 / expand(scale, input).float())
    low = value.floor()
    rounded = low + (uniform < value - low).float() + expand(zero_point, input).float()
    return codes(rounded, zero_point, quant_min, quant_max, dtype)


def pack_int4(codes):
    """uint8 [..., ceil(K / 2)]: element 2i in the low half of byte i."""
    nibbles = torch.nn.functional.pad(codes.int() & 15, (0, codes.shape[-1] % 2))
    return (nibbles[..., ::2] | nibbles[..., 1::2] << 4).to(torch.uint8)


def unpack_int4(packed, size, signed):
    nibbles = torch.stack((packed.int() & 15, packed.int() >> 4), -1).flatten(-2)[..., :size]
    return ((nibbles ^ 8) - 8).to(torch.int8) if signed else nibbles.to(torch.uint8)


# ---- ranges, in the operators' own float32 ----

FLOAT32 = torch.finfo(torch.float32)


def min_max(input, scale_shape):
    rows = groups(input.float(), scale_shape)
    return rows.amin(1).reshape(scale_shape), rows.amax(1).reshape(scale_shape)


def qparams_from_range(low, high, quant_min, quant_max, symmetric):
    """(scale, zero_point). A range that is not finite: scale NaN, zero point 0."""
    bad = ~(low.isfinite() & high.isfinite())
    if symmetric:
        straddles = quant_min < 0 < quant_max
        steps = min(-quant_min, quant_max) if straddles else max(abs(quant_min), abs(quant_max))
        width = torch.maximum(low.abs(), high.abs())
    else:
        low, high, steps = low.clamp(max=0), high.clamp(min=0), quant_max - quant_min
        width = high - low
    scale = width / steps
    if not symmetric:  # by halves where the difference of the ends overflows
        scale = torch.where(width.isinf(), (0.5 * high - 0.5 * low) / (0.5 * steps), scale).clamp(max=FLOAT32.max)
    scale = torch.where(width > 0, scale.clamp(min=FLOAT32.tiny), torch.ones_like(width))
    zero_point = torch.zeros_like(scale)
    if not symmetric:
        zero_point = (quant_min - torch.round(low / scale)).clamp(quant_min, quant_max)
    scale, zero_point = scale.masked_fill(bad, torch.nan), zero_point.masked_fill(bad, 0)
    return scale, zero_point.int()
