"""Drawn tests of the fake_quant family: ranges, and quantization under a range of the input's own."""

import functools
import math

import torch
from draw import NAN, Draw, check, close, drawn, same, same_bits
from drawn_fake_quant import straight_through, strides_kept
from reference import fake_quant as reference

ops = torch.ops.quantrain


def operands(d: Draw):
    """(input of at least one element, scale shape, quant_min, quant_max, symmetric)."""
    shape = d.shape(empty=0)
    quant_min, quant_max = d.range()
    x, scale_shape, symmetric = d.tensor(shape, d.dtype()), d.scale_shape(shape), d.chance(0.5)
    d.notes |= {"input": x, "scale_shape": scale_shape, "range": (quant_min, quant_max), "symmetric": symmetric}
    if not x.isfinite().all():
        d.tags.add("not finite")
    return x, scale_shape, quant_min, quant_max, symmetric


@drawn("_min_max")
def min_max(d: Draw):
    x, scale_shape, *_ = operands(d)
    d.tags.clear()
    expected = reference.min_max(x, scale_shape)
    for device in d.devices:
        for found, one, name in zip(ops._min_max(d.on(device, x), scale_shape), expected, ("min", "max"), strict=True):
            same(found, one, f"_min_max's {name} on {device}")


@drawn("choose_qparams", "_qparams_from_range")
def choose_qparams(d: Draw):
    x, scale_shape, low, high, symmetric = operands(d)
    keywords = {"quant_min": low, "quant_max": high, "symmetric": symmetric}
    ends = reference.min_max(x, scale_shape)
    expected = reference.qparams_from_range(*ends, low, high, symmetric)
    kept = []
    for device in d.devices:
        found = ops.choose_qparams(d.on(device, x), scale_shape, **keywords)
        from_range = ops._qparams_from_range(*(d.on(device, end) for end in ends), **keywords)
        for name, one, other, wanted in zip(("scale", "zero_point"), found, from_range, expected, strict=True):
            same(one, wanted, f"choose_qparams' {name} on {device}")
            same(other, wanted, f"_qparams_from_range's {name} on {device}")
        kept.append(found)
    for found, cpu in zip(kept[-1], kept[0], strict=True):
        same_bits(found, cpu, "choose_qparams on CPU and CUDA")


@drawn("fake_quantize_dynamic")
def fake_quantize_dynamic(d: Draw):
    x, scale_shape, low, high, symmetric = operands(d)
    keywords = {"quant_min": low, "quant_max": high, "symmetric": symmetric}
    scale, zero_point = reference.qparams_from_range(*reference.min_max(x, scale_shape), low, high, symmetric)
    expected = reference.fake_quantize(x, scale, zero_point, low, high)
    inside = reference.inside(x, scale, zero_point, low, high)
    g = d.tensor(x.shape, x.dtype, "normal")
    grad = torch.where(inside, g, torch.zeros((), dtype=g.dtype))
    kept = []
    for device in d.devices:
        cx, cg = d.on(device, x), d.on(device, g)
        plain = ops.fake_quantize_dynamic(cx, scale_shape, **keywords)
        same(plain, expected, f"fake_quantize_dynamic on {device}")
        strides_kept(plain, x, f"fake_quantize_dynamic on {device}")
        run = functools.partial(ops.fake_quantize_dynamic, scale_shape=scale_shape, **keywords)
        found = straight_through(d, run, cx, cg, expected, grad, f"fake_quantize_dynamic on {device}")
        kept.append((plain, found))
    for found, cpu in zip(kept[-1], kept[0], strict=True):
        same_bits(found, cpu, "fake_quantize_dynamic on CPU and CUDA")


@drawn("_percentile_range")
def percentile_range(d: Draw):
    """The elements of those ranks, by sorting."""
    x, scale_shape, *_ = operands(d)
    percentile = d.choice((50.5, 60.0, 75.0, 99.0, 99.99, 100.0))
    rows = reference.groups(x, scale_shape).float()
    n = rows.shape[1]
    k = min(max(math.ceil(percentile / 100.0 * n), 1), n)
    ranked, known = rows.sort(1).values, ~rows.isnan().any(1)
    for device in d.devices:
        found = ops._percentile_range(d.on(device, x), scale_shape, percentile=percentile)
        for one, rank, name in zip(found, (n - k, k - 1), ("min", "max"), strict=True):
            check(list(one.shape) == list(scale_shape), f"_percentile_range's {name}: expected scale_shape")
            wanted = ranked[:, rank]
            same(
                torch.where(known, one.cpu().flatten(), 0.0),
                torch.where(known, wanted, 0.0),
                f"_percentile_range's {name} on {device}",
            )


@drawn("_observe_")
def observe(d: Draw):
    """The rule a block at a time, in Python."""
    count, c = d.randint(1, 12), d.choice((0.0, 0.1, 0.5, 1.0))
    some = (0.0, 0.0, 1.0, -2.0, 0.3, math.inf)
    state = torch.tensor([[d.choice((math.inf, 0.0, -1.5, 0.25)), d.choice((0.0, 2.0, 7.5))] for _ in range(count)])
    state = torch.where(torch.isinf(state[:, :1]), torch.tensor([math.inf, -math.inf]), state)
    batch = torch.tensor([[d.choice(some), d.choice(some)] for _ in range(count)])
    finite = batch.isfinite().all(1)
    expected = state.clone()
    for i in range(count):
        zero, nothing = bool((batch[i] == 0).all()), math.isinf(state[i, 0])
        if not finite[i] or (zero and not nothing):
            continue
        if nothing or bool((state[i] == 0).all()):
            expected[i] = batch[i]
        elif c > 0:
            expected[i] = state[i] + c * (batch[i] - state[i])
        else:
            expected[i] = torch.stack(
                [torch.minimum(state[i, 0], batch[i, 0]), torch.maximum(state[i, 1], batch[i, 1])]
            )
    for device in d.devices:
        low, high = (t.clone().to(device) for t in state.unbind(1))
        ends = [t.contiguous().to(device) for t in (*batch.unbind(1), finite)]
        ops._observe_(low, high, *ends, averaging_constant=c)
        same(torch.stack([low, high], 1).cpu(), expected, f"_observe_ on {device}")


@drawn("_observe_qparams_")
def observe_qparams(d: Draw):
    """_observe_, then _qparams_from_range, in one."""
    shape = d.scale_shape(d.shape(empty=0))
    kinds = ("normal", "normal", "zero", "special", "finite", "ties")
    low, high = (d.tensor(shape, torch.float32, d.choice(kinds)) for _ in range(2))
    state = [d.tensor(shape, torch.float32, d.choice(("normal", "zero")), expanded=False) for _ in range(2)]
    if d.chance(0.3):  # nothing was seen
        state[0].fill_(math.inf), state[1].fill_(-math.inf)
    quant_min, quant_max = d.range()
    symmetric, marks, c = d.chance(0.5), d.chance(0.5), d.choice((0.0, 0.01, 0.5, 1.0))
    counts = low.isfinite() & high.isfinite()
    finite = None
    if d.chance(0.5):
        finite = counts = d.integers(shape, 0, 1, torch.uint8).bool() & counts
    points = None if symmetric and d.chance(0.5) else d.integers(shape, -9, 9, torch.int32, expanded=False)
    scale = d.tensor(shape, torch.float32, "constant", expanded=False)
    d.notes |= {"low": low, "min_val": state[0], "finite": finite, "averaging_constant": c, "symmetric": symmetric}
    keywords = {"quant_min": quant_min, "quant_max": quant_max, "symmetric": symmetric}
    kept = []
    for device in d.devices:
        what = f"_observe_qparams_ on {device}"
        plain = [t.to(device, copy=True) for t in state]
        ends = [d.on(device, t) for t in (low, high)]
        ops._observe_(*plain, *ends, d.on(device, counts), averaging_constant=c)
        expected = ops._qparams_from_range(*plain, **keywords)
        moved = [d.on(device, t.clone(memory_format=torch.preserve_format)) for t in (*state, scale)]
        written = None if points is None else d.on(device, points.clone(memory_format=torch.preserve_format))
        in_force, point_in_force = ops._observe_qparams_(
            *moved, written, *ends, d.on(device, finite), averaging_constant=c, **keywords, marks_nonfinite=marks
        )
        for name, one, want in zip(("min_val", "max_val"), moved, plain, strict=False):
            same(one, want.cpu(), f"{what}: {name}")
        same(moved[2], expected[0].cpu(), f"{what}: scale")
        if written is not None:
            same(written, expected[1].cpu(), f"{what}: zero_point")
        nan = torch.where(counts, expected[0].cpu(), NAN) if marks else expected[0].cpu()
        same(in_force, nan, f"{what}: the scale in force")
        same(point_in_force, expected[1].cpu(), f"{what}: the zero point in force")
        kept.append((*moved, in_force, point_in_force))
    for one, other in zip(kept[-1], kept[0], strict=True):
        same_bits(one, other, "_observe_qparams_ on CPU and CUDA")


@drawn("_mse_range")
def mse_range(d: Draw):
    """The errors of all ratios in float64: the chosen ratio has the least, but for the rounding of a float32 sum."""
    x, scale_shape, low, high, symmetric = operands(d)
    steps = d.choice((1, 2, 5, 9, 16))
    least, most = reference.min_max(x, scale_shape)
    errors = reference.mse_ratio_errors(x, scale_shape, low, high, symmetric, steps)
    size = reference.groups(x, scale_shape).double().square().sum(1)
    groups = torch.arange(errors.shape[1])
    keywords = {"quant_min": low, "quant_max": high, "symmetric": symmetric, "steps": steps}
    for device in d.devices:
        found = [t.cpu() for t in ops._mse_range(d.on(device, x), scale_shape, **keywords)]
        end = torch.where(most.abs() > least.abs(), most, least).flatten()
        chosen = torch.where(most.abs() > least.abs(), *(found[1], found[0])).flatten()
        k = torch.where(end == 0, 1.0, (chosen / end * steps).round()).nan_to_num(1.0).clamp(1, steps)
        ratio = (k / steps).reshape(scale_shape)
        finite = (least.isfinite() & most.isfinite()).reshape(scale_shape)
        for name, one, extreme in zip(("min", "max"), found, (least, most), strict=True):
            check(
                one.shape == extreme.shape and one.dtype == torch.float32, f"_mse_range's {name}: expected scale_shape"
            )
            same(
                torch.where(finite, one, 0), torch.where(finite, extreme * ratio, 0), f"_mse_range's {name} on {device}"
            )
            check(bool((one.isfinite() | ~finite).all()), f"_mse_range's {name} on {device}: expected a finite end")
            nan = least.isnan()
            same(torch.where(nan, one, 0), torch.where(nan, NAN, torch.zeros_like(one)), f"_mse_range's {name} of NaN")
        taken, best = errors[(k.long() - 1), groups], errors.amin(0)
        room = 2.0**-20 * best + 2.0**-40 * size + 1e-36
        fair = finite.flatten() & (
            errors.amax(0) < 1e37
        )  # a float32 sum of squares beyond it is infinite for every ratio
        close(
            torch.where(fair, taken, 0.0),
            torch.where(fair, best, 0.0),
            torch.where(fair, room, 0.0),
            f"_mse_range's error on {device}",
        )
