"""Layers in fixed point in int64: what quantrain.fixed_point_conv2d and its family must give, bit for bit.

Written from the definition: a number is code * 2^-FL, sums are exact, a shift by n rounds half to even and left shifts saturate at int32.
"""

import torch
from torch import Tensor
from torch.nn.functional import unfold

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, groups: int) -> Tensor:
    """int64 sums, by unfolding in float64 (exact) and an int64 product."""
    n, c, h, w = input.shape
    o, per_group, kh, kw = weight.shape
    columns = unfold(input.double(), (kh, kw), padding=padding, stride=stride).long()
    columns = columns.view(n, groups, per_group * kh * kw, -1)
    sums = torch.einsum("gok,ngkp->ngop", weight.long().reshape(groups, o // groups, -1), columns)
    oh = (h + 2 * padding[0] - kh) // stride[0] + 1
    sums = sums.reshape(n, o, oh, -1)
    return sums if bias is None else sums + bias.long().view(1, -1, 1, 1)


def shift_round(value: Tensor, shift: Tensor) -> Tensor:
    """value / 2^shift, half to even; to the left saturating. int64."""
    value, shift = torch.broadcast_tensors(value, shift)
    right, left = shift.clamp(min=1), (-shift).clamp(min=0)
    floor = value >> right
    rest, half = value - (floor << right), torch.ones_like(value) << (right - 1)
    rounded = floor + ((rest > half) | ((rest == half) & (floor % 2 == 1))).long()
    shifted = value.clamp(INT32_MIN, INT32_MAX) << left
    return torch.where(shift > 0, rounded, shifted).clamp(INT32_MIN, INT32_MAX)


def requantize(
    sums: Tensor, shift: Tensor, residual: Tensor | None, residual_shift: Tensor | None, signed: bool
) -> Tensor:
    n = shift.long().view(1, -1, 1, 1)
    total = sums
    if residual is not None:
        d = residual_shift.long().view(1, -1, 1, 1)
        total = (sums << (-d).clamp(min=0)) + (residual.long() << d.clamp(min=0))
        n = n + (-d).clamp(min=0)
    codes = shift_round(total, n)
    return codes.clamp(-127, 127).to(torch.int8) if signed else codes.clamp(0, 255).to(torch.uint8)


def add(a: Tensor, b: Tensor, a_fraction_length: Tensor, b_fraction_length: Tensor) -> Tensor:
    d = a_fraction_length.long() - b_fraction_length.long()
    total = (a.long() << (-d).clamp(min=0)) + (b.long() << d.clamp(min=0))
    return total.clamp(INT32_MIN, INT32_MAX).int()


def max_pool2d(input: Tensor, kernel_size, stride, padding) -> Tensor:
    return torch.nn.functional.max_pool2d(input.double(), kernel_size, stride, padding).to(input.dtype)


def sum_pool2d(input: Tensor) -> Tensor:
    return input.long().sum((2, 3), keepdim=True).int()
