"""Drawn tests of the int8 family: codes of rows and columns, transposes and products."""

import torch
from draw import FLOATS, Draw, check, drawn, named, same, same_bits
from reference import int8 as reference

ops = torch.ops.quantrain


def matrix(d: Draw):
    """(input [..., K], column_factor [K] or None, row_factor [M] or None)."""
    x = d.tensor([*d.shape(high=3, cap=d.choice((8, 70, 300))), d.size()], d.dtype())
    k = x.shape[-1]
    column_factor = d.scale([k], -8, 7) if d.chance(0.4) else None
    row_factor = d.scale([x.numel() // k], -8, 7) if d.chance(0.4) else None
    d.notes |= {"input": x, "column_factor": column_factor, "row_factor": row_factor}
    return x, column_factor, row_factor


NAMES = ("int8_quantize_rows", "int8_quantize_columns", "int8_quantize_rows_and_columns")


@drawn(*NAMES, *(f"{name}.{overload}" for name in NAMES for overload in ("nearest", "seeded")))
def int8_quantize(d: Draw):
    x, column_factor, row_factor = matrix(d)
    seed, offset = (
        (None, None) if d.chance(0.5) else (d.choice((0, -1, d.getrandbits(63))), d.choice((0, 5, d.getrandbits(62))))
    )
    random = {} if seed is None else {"seed": seed, "offset": offset}
    d.notes |= random
    rows = reference.quantize_rows(x, column_factor, seed, offset)
    columns = reference.quantize_columns(x, row_factor, seed, offset)
    overload = "default" if seed is None else "seeded"
    if seed is None and hasattr(ops.int8_quantize_rows, "nearest") and d.chance(0.5):
        overload = "nearest"
    by_rows, by_columns, both = (
        getattr(getattr(ops, f"int8_quantize_{name}"), overload) for name in ("rows", "columns", "rows_and_columns")
    )
    kept = []
    for device in d.devices:
        cx, cc, cr = (d.on(device, t) for t in (x, column_factor, row_factor))
        found = (
            *by_rows(cx, column_factor=cc, **random),
            *by_columns(cx, row_factor=cr, **random),
            *by_rows_and_columns(both, cx, cc, cr, random),
        )
        names = ("rows", "rows' scale", "columns", "columns' scale") * 2
        for one, wanted, name in zip(found, (*rows, *columns) * 2, names, strict=True):
            same(one, wanted.contiguous(), f"int8_quantize: {name} on {device}")
            check(one.is_contiguous(), f"int8_quantize: expected contiguous {name} on {device}")
        kept.append(found)
    for one, cpu in zip(kept[-1], kept[0], strict=True):
        same_bits(one, cpu, "int8_quantize on CPU and CUDA")


def by_rows_and_columns(both, x, column_factor, row_factor, random):
    return both(x, column_factor=column_factor, row_factor=row_factor, **random)


@drawn("int8_transpose", "int8_weight_transpose")
def int8_transpose(d: Draw):
    codes = d.integers([d.size(), d.size()], -128, 127, torch.int8)
    weight = d.tensor(list(codes.shape), d.dtype()) if d.chance(0.6) else codes
    if weight.is_floating_point():
        scale = reference.row_scale(weight)
        scale = (
            d.place(scale.flatten().repeat_interleave(3), [len(scale), 1], ([3, 1], 1, 0))
            if d.chance(0.5)
            else scale.flatten()
        )
    else:
        scale = d.scale([codes.shape[0], 1] if d.chance(0.5) else [codes.shape[0]], -128, 127)
    scheme = d.choice(("auto", "fold", "columns"))
    d.notes |= {"codes": codes, "weight": weight, "scale": scale, "scheme": scheme}
    square = scale.double().flatten().square()
    # At the threshold the order of a sum decides, and squares beyond float32 decide nothing; NaN folds not.
    decided = (
        abs(float(square.max() / square.mean()) - 4) > 1e-4
        and 1e-36 < float(square.max()) < 1e36
        or bool(scale.isnan().any())
    )
    expected = reference.weight_transpose(weight, scale, scheme)
    kept = []
    for device in d.devices:
        found = ops.int8_transpose(d.on(device, codes))
        same(found, codes.t().contiguous(), f"int8_transpose on {device}")
        check(found.is_contiguous(), f"int8_transpose on {device}: expected a contiguous result")
        parts = ops.int8_weight_transpose(d.on(device, weight), d.on(device, scale), scheme=scheme)
        if decided or scheme != "auto":
            for one, wanted, name in zip(parts, expected, ("codes", "column_factor", "scale"), strict=True):
                same(one, wanted.contiguous(), f"int8_weight_transpose's {name} on {device}")
        kept.append(parts)
    if decided or scheme != "auto":
        for one, cpu in zip(kept[-1], kept[0], strict=True):
            same_bits(one, cpu, "int8_weight_transpose on CPU and CUDA")


@drawn("int8_weight_mm")
def int8_weight_mm(d: Draw):
    k, n = d.choice((0, 1, 15, 16, 48, 63, 64, 80, 128, 400, d.size())), d.size()
    dtype = d.dtype()
    x = d.tensor([*d.shape(high=3, cap=d.choice((1, 8, 33, 150))), k], dtype, "normal")
    codes = d.integers([n, k], -128, 127, torch.int8)
    scale = d.scale(d.choice(([n], [n, 1], [1])), -8, 7)
    bias = d.tensor([n], d.choice(FLOATS), "normal") if d.chance(0.5) else None
    d.notes |= {"input": x, "codes": codes, "scale": scale, "bias": bias}
    factor = scale.double().flatten()
    exact = (x.double() @ codes.double().t()) * factor + (0 if bias is None else bias.double())
    size = (x.double().abs() @ codes.double().abs().t()) * factor
    part = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    room = part * (exact.abs() + size) + 1e-6 * size + 6e-8
    for device in d.devices:
        y = ops.int8_weight_mm(*(None if t is None else d.on(device, t) for t in (x, codes, scale, bias)))
        check(y.dtype == dtype and y.shape == exact.shape, f"expected {list(exact.shape)} of {dtype}")
        # float16 may overflow where the exact sum does not fit.
        fits = exact.abs() < torch.finfo(dtype).max
        off = (y.cpu().double() - exact).abs()
        check(bool((off <= room)[fits].all()), f"int8_weight_mm on {device}: {float(off[fits].sum())} off in all")


@drawn("int8_mm", "int8_mm.typed", "int8_mm_accumulate_")
def int8_mm(d: Draw):
    rows = d.shape(high=3, cap=d.choice((1, 20, 150)))
    k, n = d.choice((0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 200, d.size(), d.size())), d.size()
    a, b = d.integers([*rows, k], -128, 127, torch.int8), d.integers([n, k], -128, 127, torch.int8)
    m = a.numel() // k if k else torch.empty(rows).numel()
    a_scale = d.scale(d.choice(([m], [m, 1], [1])), -8, 7) if d.chance(0.7) else None
    b_scale = d.scale(d.choice(([n], [n, 1], [1])), -8, 7) if d.chance(0.7) else None
    bias = d.tensor([n], d.choice((*FLOATS, torch.float64)), "normal") if d.chance(0.5) else None
    if n == 1 and b.stride(0) != k:
        d.tags.add("one row of another stride")
    if d.chance(0.1) and a_scale is not None and m:
        a_scale = a_scale.clone(memory_format=torch.contiguous_format)
        if k == 0:
            d.tags.add("NaN without columns")
        a_scale.view(-1)[d.randrange(a_scale.numel())] = torch.nan
    out_dtype = d.dtype()
    d.notes |= {"a": a, "b": b, "a_scale": a_scale, "b_scale": b_scale, "bias": bias, "out_dtype": out_dtype}
    expected = reference.mm(a, b, a_scale, b_scale, bias, out_dtype)
    accumulator = d.tensor([m, n], d.dtype(), "normal", expanded=False)
    two = a.reshape(m, k)
    added = reference.mm(two, b, a_scale, b_scale, accumulator=accumulator)
    for device in d.devices:
        ca, cb, sa, sb, cbias = (d.on(device, t) for t in (a, b, a_scale, b_scale, bias))
        found = ops.int8_mm(ca, cb, sa, sb, cbias, out_dtype=out_dtype)
        same(found, expected, f"int8_mm on {device}")
        if hasattr(ops.int8_mm, "typed"):
            found = ops.int8_mm.typed(ca, cb, sa, sb, cbias, out_dtype=named(out_dtype))
            same(found, expected, f"int8_mm.typed on {device}")
        check(found.is_contiguous(), f"int8_mm on {device}: expected a contiguous result")
        if d.chance(0.4):
            mine = (
                d.on(device, accumulator)
                if device != "cpu"
                else torch.empty_strided((m, n), accumulator.stride(), dtype=accumulator.dtype).copy_(accumulator)
            )
            ops.int8_mm_accumulate_(mine, ca.reshape(m, k), cb, sa, sb)
            same(mine, added, f"int8_mm_accumulate_ on {device}")
