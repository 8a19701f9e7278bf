"""Drawn tests of the four_bit family: codes, scales and products."""

import numpy as np
import torch
from draw import Draw, check, close, drawn, same, same_bits
from reference import four_bit as reference
from reference.gradient_quant import philox4x32_10

ops = torch.ops.quantrain
FORMATS = ("nf4", "fp4", "e2m1", "int4", "table")
KINDS = ("normal", "ties", "heavy", "zero", "constant", "subnormal", "special")


def drawn_table(d: Draw):
    values = d.values(16, "normal")
    return values / values.abs().max()


def drawn_input(d: Draw):
    shape = d.shape(low=1)
    if d.chance(0.3):
        shape[-1] = d.choice((32, 64, 128, 192, 256))
    return d.tensor(shape, d.dtype(), d.choice(KINDS))


def bytes_where_known(codes, scale, format, n, block_size):
    """Codes as one per element, 0 in blocks without a number as scale: theirs say nothing."""
    known = ~scale.reshape(-1).isnan().repeat_interleave(block_size)[:n]
    return torch.where(known, reference.unpack(codes.reshape(-1), n, format).long(), 0)


@drawn("quantize_4bit")
def quantize(d: Draw):
    x, format = drawn_input(d), d.choice(FORMATS)
    block_size = d.choice((32, 64, 64, 128, 256, 4096))
    table = drawn_table(d) if format == "table" else None
    rule = "signed" if format == "int4" and d.chance(0.3) else "absmax"
    d.notes |= {"format": format, "block_size": block_size, "rule": rule, "input": x}
    keywords = {"block_size": block_size, "format": format, "scale_rule": rule}
    codes, scale = reference.quantize(x.contiguous(), block_size, format, table, rule)
    found, found_scale = ops.quantize_4bit(x, table=table, **keywords)
    same(found_scale, scale, "scale")
    check(found.shape == codes.shape, f"codes: expected {list(codes.shape)}, got {list(found.shape)}")
    n = x.numel()
    same(
        bytes_where_known(found, scale, format, n, block_size),
        bytes_where_known(codes, scale, format, n, block_size),
        "codes",
    )
    for device in d.devices[1:]:
        on = ops.quantize_4bit(d.on(device, x), table=None if table is None else table.to(device), **keywords)
        same_bits(on[0], found, f"codes on {device}")
        same_bits(on[1], found_scale, f"scale on {device}")


@drawn("quantize_4bit_affine")
def quantize_affine(d: Draw):
    x, block_size = drawn_input(d), d.choice((32, 64, 64, 128, 256, 4096))
    d.notes |= {"block_size": block_size, "input": x}
    codes, scale, zero_point = reference.quantize_affine(x.contiguous(), block_size)
    found = ops.quantize_4bit_affine(x, block_size=block_size)
    same(found[1], scale, "scale")
    same(found[2], zero_point, "zero_point")
    n = x.numel()
    same(
        bytes_where_known(found[0], scale, "uint4", n, block_size),
        bytes_where_known(codes, scale, "uint4", n, block_size),
        "codes",
    )
    for device in d.devices[1:]:
        for mine, other in zip(ops.quantize_4bit_affine(d.on(device, x), block_size=block_size), found, strict=True):
            same_bits(mine, other, f"on {device}")


def packed(d: Draw, shape, kinds=("normal", "special")):
    """(arguments of a weight, keywords, the float32 weight) from drawn codes and scales."""
    format = d.choice((*FORMATS, "uint4"))
    block_size = d.choice((32, 64, 128))
    codes = d.integers(reference.packed_shape(shape, block_size), 0, 255, torch.uint8, expanded=False)
    scale = d.tensor(reference.scale_shape(shape, block_size), torch.float32, d.choice(kinds))
    table = drawn_table(d) if format == "table" else None
    zero_point = d.integers(scale.shape, 0, 15, torch.int32) if format == "uint4" else None
    nested, flat_scale = [None, None], scale
    if format != "uint4" and d.chance(0.4):
        scale = d.integers(scale.shape, 0, 255, torch.uint8)
        nested = [d.tensor([-(-scale.numel() // 256)], kind=d.choice(kinds)), torch.tensor(d.choice((0.0, 1.5)))]
        flat_scale = reference.decompress_scale(scale, *nested)
    w = reference.dequantize(
        codes.contiguous().reshape(-1),
        flat_scale.contiguous(),
        shape,
        format,
        block_size=block_size,
        table=table,
        zero_point=zero_point,
    )
    d.notes |= {"format": format, "block_size": block_size, "size": list(shape)}
    return (codes, scale, zero_point), nested, {"format": format, "table": table}, w


def on(d: Draw, device, values):
    if isinstance(values, dict):
        return {key: on(d, device, [value])[0] for key, value in values.items()}
    return [d.on(device, value) if isinstance(value, torch.Tensor) else value for value in values]


@drawn("dequantize_4bit")
def dequantize(d: Draw):
    shape = d.shape(low=1)
    arguments, nested, keywords, w = packed(d, shape)
    name = d.choice(("float32", "float16", "bfloat16"))
    for device in d.devices:
        found = ops.dequantize_4bit(
            *on(d, device, arguments), *on(d, device, nested), size=shape, dtype=name, **on(d, device, keywords)
        )
        same(found, w.to(getattr(torch, name)), f"values on {device}")


@drawn("compress_scale", "decompress_scale")
def compress(d: Draw):
    scale = d.tensor(d.shape(low=1), torch.float32, d.choice(("normal", "zero", "constant", "special")))
    found = ops.compress_scale(scale)
    codes, scale_scale, _ = reference.compress_scale(scale.contiguous(), found[2])
    mean = scale.double().mean() if scale.numel() else torch.zeros(())
    close(found[2], mean.double(), 1e-6 * scale.double().abs().mean().nan_to_num() + 1e-30, "offset")
    if scale.isfinite().all():
        same(found[0], codes, "codes")
        same(found[1], scale_scale, "scale_scale")
    for device in d.devices[1:]:
        for mine, other in zip(ops.compress_scale(d.on(device, scale)), found, strict=True):
            same_bits(
                mine.nan_to_num() if mine.is_floating_point() else mine,
                other.nan_to_num() if other.is_floating_point() else other,
                f"on {device}",
            )
    same(ops.decompress_scale(*found), reference.decompress_scale(*found), "decompressed")


def rows_of_a_weight(d: Draw):
    shape = [d.randint(1, 40), d.choice((1, 2, 33, 64, 65, 96, 128, 192))]
    arguments, nested, keywords, w = packed(d, shape, ("normal",))
    return shape, arguments, nested, keywords, w


@drawn("linear_4bit", "_linear_4bit_grad_input")
def linear(d: Draw):
    (n, k), arguments, nested, keywords, w = rows_of_a_weight(d)
    dtype = d.choice((torch.float32, torch.bfloat16))
    x = d.tensor([d.randint(1, 40), k], dtype, "normal")
    bias = d.tensor([n], dtype, "normal") if d.chance(0.5) else None
    exact = reference.linear(x, w, bias)
    part = 4e-3 if dtype == torch.float32 else 2e-2
    room = part * (reference.spread(x, w, bias).nan_to_num() + exact.abs()) + 1e-30
    for device in d.devices:
        codes, scale, zero_point = on(d, device, arguments)
        weight = (codes, scale, zero_point, *on(d, device, nested))
        y = ops.linear_4bit(
            d.on(device, x),
            *weight[:3],
            None if bias is None else d.on(device, bias),
            *weight[3:],
            out_features=n,
            **on(d, device, keywords),
        )
        check(y.dtype == dtype and y.shape == exact.shape, f"expected {list(exact.shape)} of {dtype}")
        close(y, exact, room, f"product on {device}")
        g = d.on(device, x.new_ones(x.shape[0], n))
        dx = ops._linear_4bit_grad_input(g, *weight, in_features=k, **on(d, device, keywords))
        size = w.abs().double().sum(0).expand(x.shape[0], k)
        close(dx, w.double().sum(0).expand(x.shape[0], k), 2e-2 * size + 1e-30, f"gradient on {device}")


@drawn("linear_4bit_lora", "linear_4bit_lora.seeded")
def lora(d: Draw):
    (n, k), arguments, nested, keywords, w = rows_of_a_weight(d)
    x, rank = d.tensor([d.randint(1, 20), k], torch.float32, "normal"), d.randint(1, 5)
    a, b = d.tensor([rank, k], torch.float32, "normal"), d.tensor([n, rank], torch.float32, "normal")
    exact = reference.lora(x, w, a, b, 0.5)
    size = reference.spread(x, w) + 0.5 * (x.double().abs() @ a.double().abs().t()) @ b.double().abs().t()
    for device in d.devices:
        codes, scale, zero_point = on(d, device, arguments)
        call = (d.on(device, x), codes, scale, zero_point, None, *on(d, device, nested))
        adapter = {"lora_a": d.on(device, a), "lora_b": d.on(device, b), "scaling": 0.5, "out_features": n}
        for y in (
            ops.linear_4bit_lora(*call, **adapter, **on(d, device, keywords)),
            ops.linear_4bit_lora.seeded(*call, **adapter, **on(d, device, keywords), seed=3, offset=4),
        ):
            close(y, exact, 4e-3 * size.nan_to_num() + 1e-30, f"sum on {device}")


@drawn("_dropout", "_dropout_state", "_dropout_state.seeded")
def dropout(d: Draw):
    x, p = d.tensor(d.shape(), d.dtype(), "normal"), d.choice((0.0, 0.1, 0.5, 0.9))
    seed, offset = d.randint(0, 2**31), d.randint(0, 1000)
    numbers = philox4x32_10(seed, offset, np.arange(-(-x.numel() // 4))).astype(np.int64)
    words = torch.from_numpy(numbers).reshape(-1)[: x.numel()]
    keep = (words >> 8).double() * 2.0**-24 >= torch.tensor(p, dtype=torch.float32)
    factor = torch.tensor(1.0 / (1.0 - p), dtype=torch.float32)
    flat = x.contiguous().reshape(-1).float()
    expected = torch.where(keep, flat * factor, 0.0).to(x.dtype).view(x.shape)
    for device in d.devices:
        there = d.on(device, x)
        state = ops._dropout_state.seeded(there, seed=seed, offset=offset)
        same(ops._dropout(there, state, p=p), expected, f"kept on {device}")
        check(ops._dropout_state(there).shape == (2,), "state: expected a seed and an offset")
