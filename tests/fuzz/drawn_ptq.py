"""Drawn tests of int8 products with outlier columns, and of the choices of post-training quantization."""

import torch
from draw import FLOATS, Draw, check, close, drawn, named, same_bits
from reference import ptq as reference

ops = torch.ops.quantrain


def outliers(d: Draw, k):
    """Columns, some negative ones among them, of either integer type."""
    count = d.choice((0, 1, 2, min(16, k), k)) if k else 0
    columns = torch.randperm(k, generator=torch.Generator().manual_seed(d.getrandbits(31)))[:count]
    padding = torch.full((d.choice((0, 0, 1, 3)),), -1)
    return torch.cat([columns, padding]).to(d.choice((torch.int32, torch.int64)))


@drawn("int8_quantize_rows_outliers", "int8_mm_outliers")
def int8_outliers(d: Draw):
    x = d.tensor([*d.shape(high=3, cap=d.choice((8, 70, 300)), empty=0), d.size()], d.dtype())
    k, n = x.shape[-1], d.size()
    columns = outliers(d, k)
    real = columns[columns >= 0].long()
    factor = d.scale([k], -8, 7) if d.chance(0.3) else None
    codes = d.integers([n, k], -127, 127, torch.int8)
    scale = d.scale(d.choice(([n], [n, 1], [1])), -8, 7)
    bias = d.tensor([n], d.choice(FLOATS), "normal") if d.chance(0.5) else None
    d.notes |= {"input": x, "columns": columns, "column_factor": factor, "codes": codes, "scale": scale}
    apart = codes.index_select(1, columns.long().clamp_min(0))
    wide = x.float() if factor is None else x.float() * factor
    rows = wide.reshape(-1, k)
    fine = torch.isfinite(rows).all(1)
    dtype, kept = d.dtype(), []
    for device in d.devices:
        args = [d.on(device, t) for t in (x, columns, factor, codes, apart, scale, bias)]
        a, planes, s = ops.int8_quantize_rows_outliers(args[0], args[1], column_factor=args[2])
        check(a.shape == x.shape and planes.shape[-1] == 2 * len(columns), "int8_quantize_rows_outliers: shapes")
        y = ops.int8_mm_outliers(a, planes, s, *args[3:], out_dtype=named(dtype))
        flat_a, flat_s = a.cpu().reshape(-1, k), s.cpu().reshape(-1, 2)
        bad = ~torch.isfinite(flat_s).all(1)
        check(bool((bad | fine).all()), "a row that is not finite has a scale")
        good = fine & ~bad
        # Codes are the nearest of what the scale says, within float32's rounding of the quotient.
        back = flat_a.double() * flat_s[:, :1]
        rest = rows.double().index_fill(1, real, 0)
        room = (0.5 + 1e-4) * flat_s[:, :1].double()
        close(back[good], rest[good], room[good], f"int8_quantize_rows_outliers: main on {device}")
        hi, lo = planes.cpu().reshape(len(rows), 2 * len(columns)).double().tensor_split(2, 1)
        value = (128 * hi + lo) * flat_s[:, 1:].double()
        wanted = torch.where(columns >= 0, rows[:, columns.long().clamp_min(0)].double(), 0.0)
        close(value[good], wanted[good], (0.5 + 4e-3) * flat_s[good, 1:].double(), f"planes on {device}")
        exact = flat_a.double() @ codes.double().t() * flat_s[:, :1] + value @ apart.double().t()
        exact = exact * scale.double().flatten() + (0 if bias is None else bias.double())
        size = flat_a.double().abs() @ codes.double().abs().t() * flat_s[:, :1] + value.abs() @ apart.double().abs().t()
        size = size * scale.double().flatten() + (0 if bias is None else bias.double().abs())
        step = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        # The sum times b_scale may overflow where that times a_scale does not.
        fits = (exact.abs() < torch.finfo(dtype).max / 2) & (size / flat_s[:, :1].clamp_max(1.0) < 1e38)
        off = (y.cpu().double().reshape(-1, n) - exact).abs()
        within = (off <= step * exact.abs() + 1e-5 * size + 1e-7) | ~fits
        check(
            bool(within[good].all()),
            f"int8_mm_outliers on {device}: off by {float(off[good].max()) if good.any() else 0}",
        )
        kept.append((a, planes, s, y))
    for one, cpu in zip(kept[-1], kept[0], strict=True):
        same_bits(one, cpu, "int8_quantize_rows_outliers and int8_mm_outliers on CPU and CUDA")


@drawn("int8_outlier_columns")
def outlier_columns(d: Draw):
    x = d.tensor([*d.shape(high=3, cap=100), d.size()], d.dtype(), d.choice(("normal", "heavy", "zero", "finite")))
    threshold, capacity = d.choice((0.5, 1.0, 6.0, 1e4)), d.choice((1, 3, 16, 100))
    d.notes |= {"input": x, "threshold": threshold, "capacity": capacity}
    absmax = x.float().abs().reshape(-1, x.shape[-1]).amax(0) if x.numel() else torch.zeros(x.shape[-1])
    above = absmax[absmax >= threshold].sort(descending=True).values
    for device in d.devices:
        found = ops.int8_outlier_columns(d.on(device, x), threshold=threshold, capacity=capacity).cpu()
        count = min(len(above), capacity)
        check(found.shape == (capacity,) and bool((found[count:] == -1).all()), "int8_outlier_columns: padding")
        check(len(set(found[:count].tolist())) == count, "int8_outlier_columns: a column twice")
        close(absmax[found[:count]], above[:count], 0.0, "int8_outlier_columns")


@drawn("column_statistics_")
def column_statistics(d: Draw):
    k, batches = d.size(), []
    for _ in range(d.choice((1, 2, 4))):
        batches.append(
            d.tensor([*d.shape(high=2, cap=60), k], d.dtype(), d.choice(("normal", "heavy", "zero", "ties")))
        )
    with_hessian = d.chance(0.6)
    d.notes |= {f"input {i}": batch for i, batch in enumerate(batches)}
    rows = torch.cat([batch.float().reshape(-1, k) for batch in batches])
    for device in d.devices:
        state = [torch.zeros(k, device=device) for _ in range(2)]
        hessian = torch.zeros(k, k, device=device) if with_hessian else None
        count = torch.zeros(1, dtype=torch.int64, device=device)
        for batch in batches:
            ops.column_statistics_(*state, hessian, count, d.on(device, batch))
        check(count.item() == len(rows), "column_statistics_: rows")
        if not len(rows):
            continue
        absmax, mean_abs, exact = reference.statistics(rows)
        close(state[0], absmax, 0.0, f"absmax on {device}")
        close(state[1], mean_abs, 1e-5 * absmax, f"mean_abs on {device}")
        if with_hessian:
            close(hessian, exact, 1e-4 * absmax[:, None] * absmax + 1e-30, f"hessian on {device}")


@drawn("smooth_factor")
def smooth_factor(d: Draw):
    k, alpha = d.size(), d.choice((0.0, 0.3, 0.5, 0.85, 1.0))
    a, w = (d.tensor([k], kind=d.choice(("normal", "heavy", "zero"))).abs() for _ in range(2))
    d.notes |= {"input_absmax": a, "weight_absmax": w, "alpha": alpha}
    exact = reference.smooth(a, w, alpha)
    for device in d.devices:
        found = ops.smooth_factor(d.on(device, a), d.on(device, w), alpha=alpha)
        close(found, exact, 1e-5 * exact, f"smooth_factor on {device}")


def layer(d: Draw):
    """(weight [O, K], Hessian of inputs of unlike columns, mean of |x|)."""
    k, o = d.choice((1, 4, 8, 17, 32, 40)), d.choice((1, 3, 8))
    g = torch.Generator().manual_seed(d.getrandbits(31))
    x = torch.randn(3 * k + 5, k, generator=g) * torch.exp(torch.randn(k, generator=g))
    if d.chance(0.2):
        x[:, d.randrange(k)] = 0
    weight = torch.randn(o, k, generator=g).to(d.dtype())
    return weight, 2 * x.t() @ x / len(x), x.abs().mean(0)


def error_of(weight, value, hessian):
    w, h = weight.double(), hessian.double()
    whole = (w @ h * w).sum()
    return float(((w - value) @ h * (w - value)).sum() / whole) if whole > 0 else 0.0


@drawn("gptq_round")
def gptq_round(d: Draw):
    weight, hessian, _ = layer(d)
    k, group = weight.shape[1], d.choice((1, 4, 16, 64))
    order = d.choice(("activation", "natural"))
    d.notes |= {"weight": weight, "hessian": hessian, "group_size": group, "order": order}
    scale = torch.stack([p.abs().amax(1) for p in weight.float().split(group, 1)], 1) / 7
    spread = scale.double().repeat_interleave(group, 1)[:, :k]
    for device in d.devices:
        args = [d.on(device, t) for t in (weight, hessian, scale)]
        codes, error = ops.gptq_round(*args, group_size=group, order=order)
        error = float(error)
        check(codes.shape == weight.shape and codes.dtype == torch.int8, "gptq_round: shape")
        check(int(codes.min()) >= -8 and int(codes.max()) <= 7, "gptq_round: codes out of range")
        exact = error_of(weight, codes.cpu().double() * spread, hessian)
        check(abs(error - exact) <= 1e-5 + 1e-3 * exact, f"gptq_round on {device}: error {error}, in fact {exact}")


@drawn("awq_scale")
def awq_scale(d: Draw):
    weight, hessian, mean_abs = layer(d)
    k, group, bits = weight.shape[1], d.choice((4, 16, 64)), d.choice((3, 4, 8))
    d.notes |= {"weight": weight, "hessian": hessian, "group_size": group, "bits": bits}

    def error_with(factor):
        scaled, most = weight.float() * factor, 2 ** (bits - 1) - 1
        scale = torch.stack([p.abs().amax(1) for p in scaled.split(group, 1)], 1) / most
        spread = scale.repeat_interleave(group, 1)[:, :k]
        inverse = torch.where(spread == 0, 0.0, 1 / spread)
        low = -most if bits == 8 else -most - 1
        return error_of(weight, ((scaled * inverse).round().clamp(low, most) * spread / factor).double(), hessian)

    for device in d.devices:
        args = [d.on(device, t) for t in (weight, hessian, mean_abs)]
        factor, error = ops.awq_scale(*args, bits=bits, group_size=group, steps=d.choice((1, 5, 20)))
        error = float(error)
        check(factor.shape == (k,) and bool((factor > 0).all()), "awq_scale: factor")
        check(error <= error_with(torch.ones(k)) + 1e-6, "awq_scale: worse than no change")
        check(abs(error - error_with(factor.cpu())) <= 1e-6 + 0.05 * error, f"awq_scale on {device}: error")


@drawn("_ptq_linear")
def ptq_linear(d: Draw):
    """Weights of 8 bits in each of its forms, against the product with the decoded weight."""
    k, n = d.size(), d.size()
    x = d.tensor([*d.shape(high=3, cap=200, empty=0.02), k], d.dtype(), "normal")
    codes = d.integers([n, k], -127, 127, torch.int8)
    scale = d.scale([n, 1], -8, 7)
    factor = d.scale([k], -1, 1) if d.chance(0.5) else None
    bias = d.tensor([n], kind="normal") if d.chance(0.5) else None
    d.notes |= {"input": x, "codes": codes, "scale": scale, "input_factor": factor, "bias": bias}
    wide = x.double() if factor is None else x.double() * factor.double()
    weight = codes.double() * scale.double()
    exact = wide @ weight.t() + (0 if bias is None else bias.double())
    size = wide.abs() @ weight.abs().t() + 1e-6
    # A row's rounding: half a step of its largest element, at each column.
    rounding = (wide.abs().amax(-1, keepdim=True) / 127 * weight.abs().sum(1)) if wide.numel() else 0
    own = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[x.dtype]
    # float16 has 2^-24 as its step below 2^-14: in x times the factor, where that is not quantized, and in y.
    step = 2**-24 if x.dtype == torch.float16 else 0.0
    least = step * (1 + weight.abs().sum(1))
    quantize = d.chance(0.7)
    for device in d.devices:
        args = [d.on(device, t) for t in (x, codes, scale, bias)]
        y = ops._ptq_linear(
            *args, input_factor=d.on(device, factor), quantize_input=quantize, few_rows_float=d.chance(0.5)
        )
        check(y.dtype == x.dtype and y.shape == exact.shape, "_ptq_linear: shape")
        fits = exact.abs() < torch.finfo(x.dtype).max / 2
        off = (y.cpu().double() - exact).abs()
        within = off <= own * (size + exact.abs()) + least + (rounding if quantize else 0)
        check(bool((within | ~fits).all()), f"_ptq_linear on {device}")
