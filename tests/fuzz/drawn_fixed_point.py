"""Drawn tests of the fixed_point family: quantization, its strict gradient, fraction lengths and shifts."""

import functools

import torch
from draw import Draw, check, drawn, in_memory, same, same_bits
from drawn_fake_quant import bits_of, straight_through, strides_kept
from reference import fixed_point as reference

ops = torch.ops.quantrain


@drawn("fixed_point_quantize", "_fixed_point_quantize_mask")
def fixed_point_quantize(d: Draw):
    shape, signed, word_length = d.shape(), d.chance(0.5), d.choice((2, 3, 4, 8, 8, 8, 12, 16))
    x = d.tensor(shape, d.dtype())
    lengths = d.integers(d.scale_shape(shape), 0, word_length - signed, torch.int32)
    d.notes |= {"input": x, "fraction_length": lengths, "word_length": word_length, "signed": signed}
    expected = reference.quantize(x, lengths, word_length, signed)
    inside = reference.passes(x, lengths, word_length, signed)
    g = d.tensor(shape, x.dtype, d.choice(("normal", "special")))
    grad = torch.where(inside, g, torch.zeros((), dtype=g.dtype))
    keywords, kept = {"word_length": word_length, "signed": signed}, []
    for device in d.devices:
        cx, cl, cg = d.on(device, x), d.on(device, lengths), d.on(device, g)
        plain = ops.fixed_point_quantize(cx, cl, **keywords)
        same(plain, expected, f"fixed_point_quantize on {device}")
        strides_kept(plain, x, f"fixed_point_quantize on {device}")
        run = functools.partial(ops.fixed_point_quantize, fraction_length=cl, **keywords)
        found = straight_through(d, run, cx, cg, expected, grad, f"fixed_point_quantize on {device}")
        if device != "cpu" or d.device == "cpu" and d.chance(0.3):
            output, mask = ops._fixed_point_quantize_mask(cx, cl, word_length, signed)
            same(output, expected, f"_fixed_point_quantize_mask on {device}")
            there = torch.empty_strided(shape, torch.empty_like(x).stride(), dtype=torch.bool).copy_(inside)
            check(
                torch.equal(bits_of(mask.cpu(), inside.numel()), in_memory(there)),
                f"_fixed_point_quantize_mask on {device}: expected a bit for each code within the ends",
            )
        kept.append((plain, found))
    for found, cpu in zip(kept[-1], kept[0], strict=True):
        same_bits(found, cpu, "fixed_point_quantize on CPU and CUDA")


@drawn("fixed_point_fraction_length")
def fixed_point_fraction_length(d: Draw):
    shape = d.shape(low=1, cap=d.choice((100, 500, 10000)))
    axis = d.choice((None, None, d.randrange(-len(shape), len(shape))))
    while axis is not None and shape[axis] > 6:
        shape[axis] = d.randint(1, 6)
    signed, word_length, method = d.chance(0.5), d.choice((2, 4, 8, 8, 8, 16)), d.choice(("std", "rms", "mse"))
    x = d.tensor(shape, d.dtype())
    keywords = {"axis": axis, "word_length": word_length, "signed": signed, "method": method}
    d.notes |= {"input": x, **keywords}
    expected = reference.fraction_length(x, **keywords)
    previous, hysteresis = None, 0.0
    if d.chance(0.4):
        previous = d.integers(list(expected.shape), 0, word_length - signed, torch.int32)
        hysteresis = d.choice((0.0, 0.3, 1.0, 2.5))
        d.notes |= {"previous": previous, "hysteresis": hysteresis}
    rows = (
        x.double().reshape(1, -1)
        if axis is None
        else x.double().movedim(axis, 0).flatten(1)
        if x.dim() > 1
        else x.double().reshape(-1, 1)
    )
    lengths = expected.flatten().tolist()
    before = [None] * len(lengths) if previous is None else previous.flatten().tolist()
    for device in d.devices:
        found = ops.fixed_point_fraction_length(
            d.on(device, x), **keywords, previous=d.on(device, previous), hysteresis=hysteresis
        )
        check(
            found.shape == expected.shape and found.dtype == torch.int32,
            "fixed_point_fraction_length: expected int32, one a group",
        )
        for row, length, p, answer in zip(rows, lengths, before, found.flatten().tolist(), strict=True):
            wanted = reference.with_previous(row, length, p, hysteresis, word_length, signed, method)
            check(answer in wanted, f"fixed_point_fraction_length on {device}: expected {sorted(wanted)}, got {answer}")


@drawn("fixed_point_requantize")
def fixed_point_requantize(d: Draw):
    shape, signed = d.shape(), d.chance(0.5)
    limit = d.choice((2**31 - 1, 2**31 - 1, 2**20, 300))
    x = d.integers(shape, -limit - 1, limit, torch.int32)
    lengths = d.integers(d.scale_shape(shape), 0, 31, torch.int32)
    length = d.randint(0, 8 - signed)
    d.notes |= {"accumulator": x, "lengths": lengths, "fraction_length": length, "signed": signed}
    expected = reference.requantize(x, lengths, length, signed)
    for device in d.devices:
        found = ops.fixed_point_requantize(d.on(device, x), d.on(device, lengths), length, signed=signed)
        same(found, expected, f"fixed_point_requantize on {device}")
        strides_kept(found, x, f"fixed_point_requantize on {device}")
