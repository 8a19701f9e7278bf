"""The fixed_point family in plain float64 and int64 PyTorch: what the operators are held against. Nothing here imports quantrain."""

import math

import torch
from reference.fake_quant import expand, groups

# Where a Gaussian, in steps of the quantizer, is rounded equally well with a fraction length and with the next shorter one: signed words
# of 2 to 16 bits, then the unsigned word of 16. An unsigned word is the positive half of a signed one that is a bit longer.
GAUSSIAN = [
    *(1.18862, 2.1361, 3.78574, 6.70404, 11.9572, 21.5431, 39.224, 72.1181, 133.753, 249.931, 470.036, 888.857),
    *(1688.81, 3221.75, 6167.82, 11844.2),
]


def code_range(word_length, signed):
    largest = 2 ** (word_length - signed) - 1
    return (-largest if signed else 0), largest


def unclamped_code(input, fraction_length):
    return torch.round(input.double() * torch.exp2(expand(fraction_length, input)))


def quantize(input, fraction_length, word_length=8, signed=True):
    code = unclamped_code(input, fraction_length).clamp(*code_range(word_length, signed))
    return (code * torch.exp2(-expand(fraction_length, input))).to(input.dtype)


def passes(input, fraction_length, word_length=8, signed=True):
    low, high = code_range(word_length, signed)
    code = unclamped_code(input, fraction_length)
    return (low < code) & (code < high)


def constant(method, word_length, signed):
    if word_length == 8:
        return 40 if signed else 50 if method == "rms" else 70
    c = GAUSSIAN[word_length - (2 if signed else 1)]
    return c * math.sqrt(0.5) if method == "rms" and not signed else c


def fraction_length(input, axis=None, word_length=8, signed=True, method="std"):
    """int32, by the closed form of the threshold rule (a different one from the operator's), or by trying every fraction length."""
    shape = [1] if axis is None else [input.shape[d] if d == axis % input.dim() else 1 for d in range(input.dim())]
    longest = word_length - signed
    rows = groups(input, shape).double() if input.numel() else input.double().reshape(math.prod(shape), 0)
    result = [_fraction_length(row, word_length, signed, method, longest) for row in rows]
    return torch.tensor(result, dtype=torch.int32).reshape(shape)


def _fraction_length(row, word_length, signed, method, longest):
    if row.numel() == 0:
        return longest
    if not torch.isfinite(row).all():
        return 0
    if method == "mse":
        errors = squared_errors(row, word_length, signed)
        return max(f for f in range(longest + 1) if errors[f] == min(errors))
    if method == "rms":
        statistic = row.square().mean().sqrt().item()
    else:
        statistic = row.std().item() if row.numel() > 1 else 0.0
    if statistic == 0:
        return longest
    return min(max(math.floor(math.log2(constant(method, word_length, signed) / statistic)), 0), longest)


NEAR = 1e-9  # in octaves: so close to a threshold the order of a sum in float64 decides


def with_previous(row, length, previous, hysteresis, word_length, signed, method):
    """What a row may have: `length` (fraction_length's), or `previous` (or None), kept within `hysteresis` octaves."""
    longest = word_length - signed
    if row.numel() == 0:
        return {longest} if previous is None or hysteresis == 0.0 else {longest, previous}
    if not torch.isfinite(row).all():
        return {0}
    if method == "mse":
        errors = squared_errors(row, word_length, signed)
        least = min(errors)
        room = 2.0**-40 * row.square().sum().item()
        answers = {f for f in range(longest + 1) if errors[f] <= least * (1 + 2.0**-30) + room}
        if hysteresis == 0.0 and previous in answers:
            return answers  # of equal errors the longer fraction, or the previous one
        kept, lost = (
            previous is not None and _keeps(errors[previous], least, h, room)
            for h in (hysteresis + NEAR, hysteresis - NEAR)
        )
    else:
        if method == "rms":
            statistic = row.square().mean().sqrt().item()
        else:
            statistic = row.std().item() if row.numel() > 1 else 0.0
        octaves = math.log2(constant(method, word_length, signed) / statistic) if statistic > 0 else math.inf
        # A difference of sums of squares keeps 2^-53 of them.
        near = (
            NEAR if method == "rms" or statistic == 0 else NEAR + 2.0**-46 * row.square().mean().item() / statistic**2
        )
        if statistic == 0 or near > 1:
            return set(range(length if near <= 1 or statistic > 0 else 0, longest + 1)) | ({previous} - {None})
        answers = {min(max(math.floor(octaves + e), 0), longest) for e in (-near, 0.0, near)}
        kept, lost = (
            previous is not None and _within(previous, octaves, h, longest)
            for h in (hysteresis + near, hysteresis - near)
        )
    return ({previous} if lost else answers | {previous}) if kept else answers


def _keeps(error, least, hysteresis, room):
    return math.sqrt(error + room) <= math.sqrt(least + room) * 2.0**hysteresis or error <= least + room


def _within(previous, octaves, hysteresis, longest):
    """No more than `hysteresis` octaves past the threshold that separates `previous` from the answer."""
    answer = min(max(math.floor(octaves), 0), longest)
    if previous == answer:
        return True
    past = previous - octaves if previous > answer else octaves - (previous + 1)
    return past <= hysteresis


def squared_errors(row, word_length, signed):
    lengths = range(word_length - signed + 1)
    quantized = [quantize(row.double(), torch.tensor([f]), word_length, signed) for f in lengths]
    return [(y - row.double()).square().sum().item() for y in quantized]


def shift_round(accumulator, shift):
    """int64 in, int64 out: the published code's form, which adds before it shifts."""
    result = torch.empty_like(accumulator)
    for n in shift.unique().tolist():
        at = shift == n
        acc = accumulator[at]
        if n > 0:
            half = 1 << (n - 1)
            up = (acc + half) >> n
            tie = (acc & ((1 << n) - 1)) == half
            result[at] = torch.where(tie, ((acc + half) >> (n + 1)) << 1, up)
        else:
            result[at] = acc * 2 ** min(-n, 31)  # |acc| <= 2^31: it fits
    return result


def requantize(accumulator, accumulator_fraction_length, fraction_length, signed=True):
    lengths = expand(accumulator_fraction_length, accumulator).long()
    shift = (lengths - fraction_length).expand(accumulator.shape)
    codes = shift_round(accumulator.long(), shift).clamp(*code_range(8, signed))
    return codes.to(torch.int8 if signed else torch.uint8)
