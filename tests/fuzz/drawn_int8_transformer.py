"""Drawn tests of a transformer layer in one call: within the rounding of its products off float64, each of its steps held alone.

Codes that fall to the other side of a tie make a bound on the whole layer loose, so what is compared with the oracle are the parts: qkv, rotation,
attention, and what follows attention; then the whole with its parts, bit for bit, and CPU with CUDA.
"""

import torch
from draw import Draw, check, close, drawn, same
from reference import int8_transformer as reference

ops = torch.ops.quantrain
PRODUCTS = ("qkv", "out", "up", "down")
TENSORS = ("codes", "scale", "bias", "input_factor", "input_scale", "outlier_columns", "outlier_codes", "outlier_scale")
NAMES = (
    *(f"norm_{n}_{part}" for n in (1, 2) for part in ("weight", "bias")),
    *(f"{product}_{tensor}" for product in PRODUCTS for tensor in TENSORS),
)
# A layer's products beyond their own rounding: codes one step off where float32, or the type, falls to the other side.
ROOM = {torch.float32: 0.03, torch.float16: 0.04, torch.bfloat16: 0.08}
OWN = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def rotation(d: Draw, b, t, size):
    """cos and sin of angles, of one type."""
    dtype = d.dtype()
    halves = d.tensor([d.choice((1, b)), t, size], kind="normal", expanded=False)
    return halves.cos().to(dtype), halves.sin().to(dtype)


def attention_mask(d: Draw, b, heads, queries, keys, dtype):
    """None, or of any shape that broadcasts: who attends to whom, or what is added."""
    kind = d.choice(("none", "bool", "bool", "added", "added", "nothing"))
    if kind == "none":
        return None
    sizes = [size if d.chance(0.6) else 1 for size in (b, heads, queries, keys)][d.choice((0, 0, 0, 1, 2)) :]
    if kind == "added":
        mask = d.tensor(sizes, d.choice((dtype, torch.float32)), "normal")
        return torch.where(mask < -(2.0**-3), -torch.inf, mask) if d.chance(0.5) else mask
    layout = d.layout(sizes)
    values = d.values(layout[2], "normal") > (0.0 if kind == "bool" else 10.0**3)
    return d.place(values, sizes, layout)


@drawn("rotate_heads_")
def rotate_heads(d: Draw):
    b, heads, size = d.randint(1, 4), d.randint(1, 6), 2 * d.randint(1, 40)
    t = min(d.size(), max(1, 20000 // (b * heads * size)))
    rotated = d.randint(0, heads)
    x = d.tensor([b, t, heads, size], d.dtype(), d.choice(("normal", "heavy", "special", "zero")), expanded=False)
    cos, sin = rotation(d, b, t, size)
    d.notes |= {"x": x, "cos": cos, "heads": rotated}
    expected = reference.rotate(x, cos, sin, rotated)
    # As large as the two products, of which each may overflow.
    both = x.double().abs() + torch.cat(x.double().abs().chunk(2, -1)[::-1], -1)
    fits = (both < torch.finfo(x.dtype).max / 2) & expected.isfinite() | (torch.arange(heads)[:, None] >= rotated)
    for device in d.devices:
        y = d.on(device, x)
        y = y.clone(memory_format=torch.preserve_format) if y is x else y
        ops.rotate_heads_(y, d.on(device, cos), d.on(device, sin), rotated)
        room = OWN[x.dtype] / 2 * expected.abs() + 1e-6 * both + 1e-38 + (2**-25 if x.dtype == torch.float16 else 0)
        close(
            torch.where(fits, y.cpu().double(), 0.0),
            torch.where(fits, expected, 0.0),
            torch.where(fits, room, 1.0),
            f"rotate_heads_ on {device}",
        )
        same(y[:, :, rotated:].cpu().contiguous(), x[:, :, rotated:].contiguous(), f"heads that stay on {device}")


@drawn("_attention")
def attention(d: Draw):
    dtype, b, kv_heads = d.dtype(), d.randint(1, 3), d.randint(1, 3)
    heads, size = kv_heads * d.randint(1, 3), d.choice((d.size(), 32, 64, 80, 128))
    most = max(1, 20000 // (b * heads * size))  # of a layout, gaps and all
    queries, keys = (min(n, most) for n in (d.choice((1, d.size())), d.size()))
    if d.chance(0.3):  # slices of one tensor
        keys = queries
        whole = d.tensor([b, queries, heads + 2 * kv_heads, size], dtype, "normal", expanded=False)
        q, k, v = whole.split([heads, kv_heads, kv_heads], 2)
    else:
        q = d.tensor([b, queries, heads, size], dtype, "normal")
        k, v = (d.tensor([b, keys, kv_heads, size], dtype, d.choice(("normal", "zero", "ties"))) for _ in range(2))
    mask = attention_mask(d, b, heads, queries, keys, dtype)
    mask = mask if mask is None or mask.dim() >= 2 else mask.expand(1, *mask.shape)
    causal, scale = mask is None and d.chance(0.4), d.choice((1.0, size**-0.5, 0.01))
    d.notes |= {"q": q, "k": k, "v": v, "mask": mask, "causal": causal, "scale": scale}
    added = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
    expected = reference.attention(q, k, v, added, causal, scale)
    largest = v.double().abs().amax() if v.numel() else 0.0
    # Probabilities are exponentials of sums, of which float32 keeps 24 bits.
    score = scale * q.double().abs().amax() * k.double().abs().amax() * size
    room = OWN[dtype] * (2 * largest + expected.abs()) + 4e-7 * score * largest + 1e-6
    for device in d.devices:
        args = [d.on(device, t) for t in (q, k, v, mask)]
        found = ops._attention(*args, causal, scale=scale)
        check(found.dtype == dtype and found.is_contiguous(), "_attention: type and layout")
        close(found, expected, room, f"_attention on {device}")


def weights_of(d: Draw, shapes, dtype, layer_norm):
    """By name: every product with results of about one."""
    weights = {}
    factors = d.chance(0.25)
    for name, (rows, columns) in shapes.items():
        codes = d.integers([rows, columns], -127, 127, torch.int8)
        scale = d.tensor([rows, 1], kind="normal").abs().clamp(0.1, 2.0) / (73 * columns**0.5)
        weights |= {f"{name}_codes": codes, f"{name}_scale": scale}
        if d.chance(0.6):
            weights[f"{name}_bias"] = d.tensor([rows], kind="normal").clamp(-2, 2)
        if factors and d.chance(0.5):
            weights[f"{name}_input_factor"] = d.integers([columns], 8, 32, torch.int32).float() / 32
    for n in (1, 2):
        parameter = d.choice((dtype, torch.float32))
        width = shapes["up"][1]
        if d.chance(0.7):
            weights[f"norm_{n}_weight"] = d.tensor([width], parameter, "normal").abs().clamp(0.25, 2)
        if layer_norm and d.chance(0.6):
            weights[f"norm_{n}_bias"] = d.tensor([width], parameter, "normal").clamp(-1, 1)
    # One type for both of a norm.
    for n in (1, 2):
        if f"norm_{n}_weight" in weights and f"norm_{n}_bias" in weights:
            weights[f"norm_{n}_bias"] = weights[f"norm_{n}_bias"].to(weights[f"norm_{n}_weight"].dtype)
    return weights


@drawn("int8_transformer_layer", "int8_transformer_qkv", "int8_transformer_output")
def transformer_layer(d: Draw):
    dtype, kv_heads = d.dtype(), d.randint(1, 3)
    heads, size = kv_heads * d.randint(1, 3), 2 * d.choice((1, 3, 4, 8, 8, 16, d.randint(1, 20)))
    b, t, width, inner = d.randint(1, 3), d.choice((1, 2, 7, 9, 33, d.size())), d.randint(4, 80), d.randint(4, 100)
    norm, activation = d.choice(("layer_norm", "rms_norm")), d.choice(("gelu", "gelu_tanh", "relu", "silu_mul"))
    options = {
        "heads": heads,
        "kv_heads": kv_heads,
        "norm": norm,
        "pre_norm": d.chance(0.5),
        "activation": activation,
        "eps": d.choice((1e-5, 1e-3, 0.1)),
        "few_rows_float": d.chance(0.3),
    }
    shapes = {
        "qkv": ((heads + 2 * kv_heads) * size, width),
        "out": (width, heads * size),
        "up": (inner * (2 if activation == "silu_mul" else 1), width),
        "down": (width, inner),
    }
    x = d.tensor([b, t, width], dtype, d.choice(("normal", "normal", "ties")))
    weights = weights_of(d, shapes, dtype, norm == "layer_norm")
    angles = dict(zip(("cos", "sin"), rotation(d, b, t, size), strict=True)) if d.chance(0.4) else {}
    mask = attention_mask(d, b, heads, t, t, dtype)
    mask = mask if mask is None or mask.dim() >= 2 else mask.expand(1, *mask.shape)
    causal, scale = d.chance(0.4), d.choice((0.0, 0.3))
    spoiled = d.randrange(b) if d.chance(0.15) else None
    d.notes |= {"input": x, **options, "size": size, "inner": inner, "mask": mask, "causal": causal, **angles}
    d.notes |= {"weights": sorted(weights), "softmax_scale": scale, "not finite": spoiled}
    if spoiled is not None:
        x = x.clone(memory_format=torch.contiguous_format)
        x[spoiled, d.randrange(t), d.randrange(width)] = d.choice((torch.nan, torch.inf, -torch.inf))
    kept = []
    for device in d.devices:
        dx, dm = d.on(device, x), d.on(device, mask)
        dw = [d.on(device, weights.get(name)) for name in NAMES]
        da = {name: d.on(device, tensor) for name, tensor in angles.items()}
        qkv = ops.int8_transformer_qkv(dx, dw, **options, **da)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], 2)
        attended = ops._attention(q, k, v, dm, causal and mask is None and t > 1, scale=scale or size**-0.5).flatten(2)
        after = ops.int8_transformer_output(dx, attended, dw, **options)
        whole = ops.int8_transformer_layer(dx, dw, **options, **da, mask=dm, causal=causal, softmax_scale=scale)
        for one, other in zip(after, whole, strict=True):
            same(one.cpu(), other.cpu(), f"the layer and its parts on {device}")
        compare(d, device, x, weights, options, angles, qkv.cpu(), attended.cpu(), whole, spoiled)
        kept.append((qkv.cpu(), whole[0].cpu()))
    fine = [row for row in range(b) if row != spoiled]
    if len(kept) > 1 and fine:
        for one, cpu, what in zip(kept[-1], kept[0], ("qkv", "the layer"), strict=True):
            one, cpu = one[fine].double(), cpu[fine].double()
            off = float((one - cpu).norm() / (cpu.norm() + 1e-6))
            check(off < 2 * ROOM[dtype], f"{what} on CPU and CUDA: {off:.3g} of it apart")


def compare(d, device, x, weights, options, angles, qkv, attended, whole, spoiled):
    """qkv, and what follows attention, with the oracle's of the same input; the codes with the output."""
    output, codes, scale = (t.cpu() for t in whole)
    check(output.dtype == x.dtype and output.shape == x.shape and output.is_contiguous(), "type, shape and layout")
    fine = [row for row in range(len(x)) if row != spoiled]
    limit = 8 if device == "cpu" else 32
    rounded = not (options["few_rows_float"] and x.shape[0] * x.shape[1] <= limit)
    named = {name: value for name, value in options.items() if name not in ("few_rows_float", "heads", "kv_heads")}
    wanted = reference.qkv(
        x[fine], weights, heads=options["heads"], kv_heads=options["kv_heads"], **named,
        **{name: a if len(a) == 1 else a[fine] for name, a in angles.items()}, rounded=rounded, dtype=x.dtype,
    )  # fmt: skip
    after = reference.output(x[fine], attended[fine], weights, **named, rounded=rounded, dtype=x.dtype)
    if fine:
        near(qkv[fine], wanted, x.dtype, f"int8_transformer_qkv on {device}")
        base = x[fine].double() if options["pre_norm"] else 0.0
        near(output[fine].double() - base, after - base, x.dtype, f"int8_transformer_output on {device}")
    if spoiled is not None:
        check(not bool(qkv[spoiled].isfinite().all()), f"a row that is not finite has finite qkv on {device}")
        check(bool(output[spoiled].isnan().any()), f"a row that is not finite gives no NaN on {device}")
    if codes.dim() == 3 and fine:
        back, step = codes[fine].double() * scale[fine].double(), scale[fine].double()
        room = 0.501 * step + 2 * OWN[x.dtype] * output[fine].double().abs() + 1e-5 * 127 * step
        close(back, output[fine].double(), room, f"codes of the output on {device}")


def near(found, expected, dtype, what):
    """By the whole's size: single codes may be a step off."""
    check(bool(found.isfinite().all()), f"{what}: expected finite numbers")
    size = float(expected.double().norm())
    off = float((found.double() - expected.double()).norm())
    room = ROOM[dtype] * size + OWN[dtype] * 10 * expected.numel() ** 0.5
    check(off <= room, f"{what}: {off:.3g} off of {size:.3g}")
