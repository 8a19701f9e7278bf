"""Drawn tests of the layers in fixed point: int64 arithmetic, bit for bit."""

import torch
from draw import Draw, check, drawn, same
from reference import fixed_point_conv as reference

ops = torch.ops.quantrain
INT32 = 2**31 - 1


def images(d: Draw, channels, low=1):
    """uint8 or int8 codes [N, C, H, W] in any layout; now and then an image of several bands."""
    signed = d.chance(0.4)
    height, width = (d.choice((1, 2, 3, 5, 7, 8, 12, 14, 20, 28, 33, d.randint(1, 40))) for _ in range(2))
    while channels * height * width > 20000:
        height = height // 2 + 1
    shape = [d.randint(1, 3), channels, max(height, low), max(width, low)]
    return d.integers(shape, -128 if signed else 0, 127 if signed else 255, torch.int8 if signed else torch.uint8)


def convolution(d: Draw):
    """(input, weight, bias or None, keywords)."""
    kind, per_group = d.random(), d.choice((1, 2, 3, 4, 5, 8, 12, 16, 20, 28, 32, 33, 64))
    groups = 1 if kind < 0.6 else d.choice((2, 3, 4, 8, 20, 33))
    if groups > 1:
        per_group = 1 if kind > 0.8 else d.choice((1, 2, 3, 4, 5))
    outputs = groups * (
        d.choice((1, 1, 2, 4)) if groups > 1 else d.choice((1, 3, 4, 8, 12, 16, 17, 20, 28, 32, 33, 64, 70))
    )
    kernel = d.choice(((1, 1), (3, 3), (d.randint(1, 5), d.randint(1, 5))))
    stride = d.choice(((1, 1), (2, 2), (d.randint(1, 4), d.randint(1, 4))))
    padding = d.choice(((0, 0), tuple(k // 2 for k in kernel), (d.randint(0, 4), d.randint(0, 4))))
    x = images(d, groups * per_group, low=max(1, *(k - 2 * p for k, p in zip(kernel, padding, strict=True))))
    weight = d.integers([outputs, per_group, *kernel], -128, 127, torch.int8)
    bias = d.integers([outputs], -(2**29), 2**29, torch.int32) if d.chance(0.5) else None
    keywords = {"stride": list(stride), "padding": list(padding), "groups": groups}
    d.notes |= {"input": x, "weight": weight, "bias": bias, **keywords}
    return x, weight, bias, keywords


def channels_last(found, what):
    check(
        found.is_contiguous(memory_format=torch.channels_last),
        f"{what}: expected a channels_last result, got strides {found.stride()}",
    )


@drawn("fixed_point_conv2d")
def fixed_point_conv2d(d: Draw):
    x, weight, bias, keywords = convolution(d)
    expected = reference.conv2d(x, weight, bias, **keywords).int()
    for device in d.devices:
        found = ops.fixed_point_conv2d(*(d.on(device, t) for t in (x, weight, bias)), **keywords)
        same(found, expected, f"fixed_point_conv2d on {device}")
        channels_last(found, f"fixed_point_conv2d on {device}")


@drawn("fixed_point_conv2d_requantize")
def fixed_point_conv2d_requantize(d: Draw):
    x, weight, bias, keywords = convolution(d)
    sums = reference.conv2d(x, weight, bias, **keywords)
    signed, outputs = d.chance(0.5), weight.shape[0]
    low, high = d.choice(((4, 14), (4, 14), (-31, 31), (0, 0)))
    shift = d.integers([d.choice((1, outputs))], low, high, torch.int32)
    residual = residual_shift = None
    if d.chance(0.5):
        dtype, least, most = d.choice(((torch.uint8, 0, 255), (torch.int8, -127, 127), (torch.int32, -(2**30), 2**30)))
        residual = d.integers(list(sums.shape), least, most, dtype)
        least, most = d.choice(((-4, 8), (-31, 31), (0, 6)))
        residual_shift = d.integers([d.choice((1, outputs))], least, most, torch.int32)
    d.notes |= {"shift": shift, "residual": residual, "residual_shift": residual_shift, "signed": signed}
    expected = reference.requantize(sums, shift, residual, residual_shift, signed)
    tensors = (x, weight, bias, shift, residual, residual_shift)
    for device in d.devices:
        found = ops.fixed_point_conv2d_requantize(*(d.on(device, t) for t in tensors), **keywords, signed=signed)
        same(found, expected, f"fixed_point_conv2d_requantize on {device}")
        channels_last(found, f"fixed_point_conv2d_requantize on {device}")


@drawn("fixed_point_linear")
def fixed_point_linear(d: Draw):
    signed, k, outputs = d.chance(0.5), d.size() if d.chance(0.9) else 0, d.size()
    shape = [*d.shape(high=3, cap=200), k]
    x = d.integers(shape, -128 if signed else 0, 127 if signed else 255, torch.int8 if signed else torch.uint8)
    weight = d.integers([outputs, k], -128, 127, torch.int8)
    bias = d.integers([outputs], -(2**30), 2**30, torch.int32) if d.chance(0.5) else None
    d.notes |= {"input": x, "weight": weight, "bias": bias}
    expected = (x.double() @ weight.double().t()).long()
    expected = (expected if bias is None else expected + bias.long()).int()
    for device in d.devices:
        found = ops.fixed_point_linear(*(d.on(device, t) for t in (x, weight, bias)))
        same(found, expected, f"fixed_point_linear on {device}")
        check(found.is_contiguous(), f"fixed_point_linear on {device}: expected a contiguous result")


@drawn("fixed_point_add")
def fixed_point_add(d: Draw):
    shape, axis = d.shape(), None
    kinds = {
        torch.uint8: (0, 255),
        torch.int8: (-128, 127),
        torch.int32: d.choice(((-INT32 - 1, INT32), (-5000, 5000))),
    }
    a, b = (d.integers(shape, *kinds[dtype], dtype) for dtype in d.choices(list(kinds), k=2))
    if shape and d.chance(0.5):
        axis = d.randrange(len(shape))
    lengths = []
    for _ in range(2):
        many = [shape[i] if i == axis else 1 for i in range(len(shape))] if axis is not None and d.chance(0.7) else [1]
        lengths.append(d.integers(many, 0, d.choice((8, 15, 31)), torch.int32))
    d.notes |= {"a": a, "b": b, "a_fraction_length": lengths[0], "b_fraction_length": lengths[1]}
    one = [length.reshape(()) if length.numel() == 1 else length for length in lengths]
    expected = reference.add(a, b, *one)
    for device in d.devices:
        found = ops.fixed_point_add(*(d.on(device, t) for t in (a, b, *lengths)))
        same(found, expected, f"fixed_point_add on {device}")
        if a.dim() == 4:
            channels_last(found, f"fixed_point_add on {device}")


@drawn("fixed_point_max_pool2d")
def fixed_point_max_pool2d(d: Draw):
    kernel = [d.randint(1, 5), d.randint(1, 5)]
    stride, padding = [d.randint(1, 4), d.randint(1, 4)], [d.randint(0, k // 2) for k in kernel]
    x = images(d, d.size(), low=max(kernel))
    d.notes |= {"input": x, "kernel_size": kernel, "stride": stride, "padding": padding}
    expected = reference.max_pool2d(x, kernel, stride, padding)
    for device in d.devices:
        found = ops.fixed_point_max_pool2d(d.on(device, x), kernel, stride, padding)
        same(found, expected, f"fixed_point_max_pool2d on {device}")
        channels_last(found, f"fixed_point_max_pool2d on {device}")


@drawn("fixed_point_sum_pool2d")
def fixed_point_sum_pool2d(d: Draw):
    x = images(d, d.size())
    d.notes["input"] = x
    expected = reference.sum_pool2d(x)
    for device in d.devices:
        found = ops.fixed_point_sum_pool2d(d.on(device, x))
        same(found, expected, f"fixed_point_sum_pool2d on {device}")
        channels_last(found, f"fixed_point_sum_pool2d on {device}")
