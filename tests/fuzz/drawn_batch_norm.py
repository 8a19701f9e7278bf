"""Drawn tests of the batch_norm family: values and gradients against float64, fake-quantized results against their parts."""

import torch
from draw import FLOATS, Draw, check, close, drawn, in_memory, named, same, same_bits
from drawn_fake_quant import bits_of
from reference import batch_norm as reference
from reference import fake_quant as rounding

ops = torch.ops.quantrain
TAME = ("normal", "normal", "normal", "heavy", "ties", "constant", "zero", "subnormal")
BENDS = {"relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}
PIECEWISE = ("identity", "relu", "relu6")
HALF_STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 0.0}


# ---- operands -------------------------------------------------------------------------------------------------------


def batch(d: Draw, kinds=TAME, empty=0.02):
    """[N, C, ...] of any layout, now and then of few channels with many elements."""
    if d.chance(0.1):
        shape = [d.randint(1, 9), d.randint(1, 3), d.randint(10, 40), d.randint(10, 40)]
    else:
        shape = d.shape(low=2, empty=empty)
    x = d.tensor(shape, d.dtype(), d.choice(kinds))
    d.notes["input"] = x
    return x


def parameters(d: Draw, channels):
    """(weight, bias, conv_scale), each None now and then; the factor of either sign and not near 0."""
    result = []
    for name in ("weight", "bias", "conv_scale"):
        given = d.tensor([channels], d.choice((torch.float32, d.dtype())), "normal") if d.chance(0.7) else None
        if given is not None and name == "conv_scale":
            given = torch.where(given < 0, given.float() - 0.2, given.float() + 0.2).to(given.dtype)
        result.append(given)
        d.notes[name] = given
    return result


def over(x):
    return [dim for dim in range(x.dim()) if dim != 1]


def exact_statistics(x):
    """Mean and biased variance of each channel by float64, as float32."""
    wide = x.double()
    return wide.mean(over(x)).float(), wide.var(over(x), unbiased=False).float()


def statistics(d: Draw, x):
    """(mean, variance, whether they are those of the batch)."""
    if x.numel() and d.chance(0.6):
        return *exact_statistics(x), True
    channels = x.shape[1]
    mean, variance = (d.tensor([channels], torch.float32, "normal") for _ in range(2))
    return mean, variance.abs(), False


def wide(tensor, needs_grad=False):
    return None if tensor is None else tensor.detach().double().requires_grad_(needs_grad)


def leaf(tensor):
    return None if tensor is None else tensor.detach().requires_grad_()


def regular(found, what):
    """Contiguous or channels last."""
    formats = [torch.contiguous_format] + {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(found.dim(), [])
    check(any(found.is_contiguous(memory_format=f) for f in formats), f"{what}: got strides {found.stride()}")


def near(found, expected, room, what):
    """Within `room` and the rounding to found's type; what lies beyond that type is not compared."""
    fair = (expected.abs() + room < torch.finfo(found.dtype).max / 2) & room.isfinite()
    least = torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps
    least += 1e-35  # products of subnormal numbers lose digits
    room = room + HALF_STEP[found.dtype] * (expected.abs() + room) + least
    found = found.detach().cpu().double()
    check(found.shape == expected.shape, f"{what}: expected shape {list(expected.shape)}, got {list(found.shape)}")
    close(torch.where(fair, found, 0.0), torch.where(fair, expected, 0.0), torch.where(fair, room, 1.0), what)


# ---- the oracle -----------------------------------------------------------------------------------------------------


class Exact:
    """Result and gradients in float64, and how far float32 may be from them."""

    def __init__(self, x, mean, variance, own, params, residual, activation, eps, grad):
        y, weight, bias, scale = (wide(t, True) for t in (x, *params))
        more = torch.zeros_like(y) if residual is None else wide(residual)
        more.requires_grad_()
        given = None if own else (wide(mean), wide(variance))
        z = reference.batch_norm(y, weight, bias, scale, more, activation, eps, given)
        leaves = [t for t in (y, more, weight, bias, scale) if t is not None]
        found = dict(zip(map(id, leaves), torch.autograd.grad(z, leaves, wide(grad)), strict=True))
        self.z = z.detach()
        self.of_input, self.of_residual = found[id(y)], found[id(more)]
        self.of_parameters = [None if t is None else found[id(t)] for t in (weight, bias, scale)]

        view, dims = [1, -1] + [1] * (x.dim() - 2), over(x)
        n = max(1, x.numel() // max(1, x.shape[1]))
        y, more = y.detach(), more.detach()
        gamma, beta, s = (
            torch.full_like(wide(mean), fill) if t is None else t.detach()
            for t, fill in ((weight, 1.0), (bias, 0.0), (scale, 1.0))
        )
        m, r = wide(mean).view(view), 1 / (wide(variance) + eps * s**2).sqrt().view(view)
        factor, slip = gamma.abs().view(view) * r, 2.0**-24 * m.abs() * own  # the mean given was rounded
        c = (y - m).abs() + slip
        self.pre = reference.batch_norm(y, weight, bias, scale, more, "identity", eps, given).detach()
        self.pre_room = 2.0**-20 * (c * factor + beta.abs().view(view) + more.abs()) + slip * factor
        # hardswish and silu have slopes of at most 1.5, and multiply by what they round.
        self.z_room = 2 * self.pre_room if activation not in PIECEWISE else self.pre_room

        # Of the gradient at the norm's output: on either side of a bend, and by the slope at another place.
        g, total = self.of_residual.abs(), wide(grad).abs()
        bent = torch.zeros_like(total, dtype=torch.bool)
        for bend in BENDS.get(activation, ()):
            bent |= (self.pre - bend).abs() <= 2 * self.pre_room + 1e-30
        off = 2.0**-21 * g + bent * total + (activation not in PIECEWISE) * total * (self.pre_room + 2.0**-20)
        tol = 2.0**-24 * (n / 4 + 32)  # of sums in float32
        # Those sums, and the terms that they end in.
        sum_off, along_off = off.sum(dims, True), (off * c).sum(dims, True)
        sums, along = g.sum(dims, True), (g * c).sum(dims, True)
        self.of_residual_room = off
        self.of_input_room = factor * (off + 2.0**-20 * g)
        if own:
            constant = sum_off + tol * sums
            slope = (along_off + tol * along + slip * sums) * r**2
            self.of_input_room += factor * (constant + c * slope + slip * along * r**2) / n
        of_weight = ((along_off + tol * along + slip * sums) * r).flatten()
        of_scale = eps * gamma.abs() * s.abs() * r.flatten() ** 2 * of_weight
        noise = 1e-12 * (along * r).flatten() * gamma.abs() / s.abs()  # of the oracle's own sums
        self.rooms = [of_weight, (sum_off + tol * sums).flatten(), of_scale * 1.01 + noise]


# ---- values and gradients -------------------------------------------------------------------------------------------


def case(d: Draw, activations, kinds=TAME):
    """Everything that a call takes, as keywords in the schema's order, and a gradient."""
    x = batch(d, kinds)
    mean, variance, own = statistics(d, x)
    params = parameters(d, x.shape[1])
    activation = d.choice(activations)
    residual = None
    if activation in PIECEWISE and d.chance(0.4):
        residual = d.tensor(list(x.shape), x.dtype, "normal")
    eps, grad = d.choice((1e-5, 1e-3, 0.1)), d.tensor(list(x.shape), x.dtype, "normal")
    d.notes |= {"residual": residual, "activation": activation, "eps": eps, "batch_statistics": own, "grad": grad}
    return x, mean, variance, own, params, residual, activation, eps, grad


def gradients(d: Draw, device, run, tensors, grad, what):
    """(result, gradients of the tensors in their order, None for None), all detached."""
    leaves = [leaf(d.on(device, t)) for t in tensors]
    z = run(*leaves)
    given = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(z, given, d.on(device, grad)))
    found = [None if t is None else next(found) for t in leaves]
    for one, tensor in zip(found, leaves, strict=True):
        check(one is None or one.dtype == tensor.dtype, f"{what}: expected gradients of the tensors' types")
    return z.detach(), found


@drawn("batch_norm_act", "_batch_norm_forward", "_batch_norm_backward")
def batch_norm_act(d: Draw):
    if d.chance(0.2):
        return _values(d)
    x, mean, variance, own, params, residual, activation, eps, grad = case(d, sorted(reference.ACTIVATIONS))
    exact = Exact(x, mean, variance, own, params, residual, activation, eps, grad)
    keywords = {"activation": activation, "eps": eps, "batch_statistics": own}
    kept = []
    for device in d.devices:
        what = f"batch_norm_act on {device}"
        m, v = d.on(device, mean), d.on(device, variance)

        def run(y, weight, bias, scale, more, m=m, v=v):
            return ops.batch_norm_act(y, m, v, weight, bias, scale, more, **keywords)

        plain = run(*(d.on(device, t) for t in (x, *params, residual)))
        check(plain.dtype == x.dtype, f"{what}: expected the input's type")
        regular(plain, what)
        near(plain, exact.z, exact.z_room, what)
        z, found = gradients(d, device, run, (x, *params, residual), grad, what)
        same(z, plain.cpu(), f"{what} with a gradient")
        near(found[0], exact.of_input, exact.of_input_room, f"{what}: gradient of input")
        for name, one, want, room in zip(
            ("weight", "bias", "conv_scale"), found[1:4], exact.of_parameters, exact.rooms, strict=True
        ):
            if one is not None:
                near(one, want, room, f"{what}: gradient of {name}")
        if residual is not None:
            near(found[4], exact.of_residual, exact.of_residual_room, f"{what}: gradient of residual")
        if d.chance(0.3):
            _parts(d, device, (x, mean, variance, *params, residual), keywords, grad, z, found)
        kept.append((plain, found))
    here, there = kept[0], kept[-1]
    same_bits(there[0], here[0], "batch_norm_act on CPU and CUDA")
    if not own:
        same_bits(there[1][0], here[1][0], "batch_norm_act's gradient of input on CPU and CUDA")
    if residual is not None:
        same_bits(there[1][4], here[1][4], "batch_norm_act's gradient of residual on CPU and CUDA")


def _parts(d: Draw, device, tensors, keywords, grad, z, found):
    """The two operators that the gradient is made of, called by themselves."""
    x, *norm, residual = (d.on(device, t) for t in tensors)
    activation, eps, own = keywords.values()
    masks = activation in BENDS and activation in PIECEWISE
    output, codes, mask = ops._batch_norm_forward(
        x, *norm, residual, None, None, activation, eps, -128, 127, masks or d.chance(0.3) and activation in PIECEWISE
    )
    same(output, z.cpu(), f"_batch_norm_forward on {device}")
    check(codes.numel() == 0, f"_batch_norm_forward on {device}: expected no codes")
    if mask.numel():
        passes = bits_of(mask.cpu(), x.numel())
        wide_output = in_memory(output.cpu()).double()
        if activation != "identity":  # a positive number may round to 0, and one below 6 to 6
            low, high = wide_output > 0, wide_output < (6 if activation == "relu6" else float("inf"))
            check(not (low & high & ~passes).any(), f"_batch_norm_forward's mask on {device}: a bit is missing")
            check(not (passes & (wide_output < 0)).any(), f"_batch_norm_forward's mask on {device}: a bit too many")
        else:
            check(bool(passes.all()), f"_batch_norm_forward's mask on {device}: expected every bit")
    g = d.on(device, grad)
    back = ops._batch_norm_backward(g, x, mask, *norm, activation, eps, own, residual is not None)
    for name, one, want in zip(
        ("input", "residual", "weight", "bias", "conv_scale"), back[:5], (found[0], found[4], *found[1:4]), strict=True
    ):
        if want is not None:
            same(one.to(want.dtype), want.cpu(), f"_batch_norm_backward's gradient of {name} on {device}")
    check(back[1].numel() == 0 or residual is not None, f"_batch_norm_backward on {device}: a residual too many")
    check(back[5].numel() == 0, f"_batch_norm_backward on {device}: the gradient of a scale that is not there")


def _values(d: Draw):
    """Under given statistics NaN and Inf are their element's own, and what is far out stays far out."""
    x = batch(d, ("special", "special", "finite", "huge"))
    mean, variance = (d.tensor([x.shape[1]], torch.float32, "normal") for _ in range(2))
    params, activation, eps = parameters(d, x.shape[1]), d.choice(sorted(reference.ACTIVATIONS)), d.choice((1e-3, 0.1))
    d.notes |= {"activation": activation, "eps": eps}
    variance = variance.abs()
    y, weight, bias, scale = (wide(t) for t in (x, *params))
    given = (wide(mean), wide(variance))
    exact, before = (
        reference.batch_norm(y, weight, bias, scale, None, name, eps, given) for name in (activation, "identity")
    )
    parts = (y.abs() + given[0].abs().view(1, -1, *[1] * (x.dim() - 2)), weight, bias, scale, None)
    size = reference.batch_norm(
        *(None if t is None else t.abs() for t in parts), "identity", eps, (0 * given[0], given[1])
    )
    calm = before.abs() + size < 1e30
    kept = []
    for device in d.devices:
        what = f"batch_norm_act on {device}"
        tensors = (d.on(device, t) for t in (x, mean, variance, *params))
        found = ops.batch_norm_act(*tensors, activation=activation, eps=eps)
        here = found.cpu()
        check(bool(here[x.isnan()].isnan().all()), f"{what}: expected NaN where the input is")
        check(not here[calm].isnan().any(), f"{what}: a NaN where none is")
        near(torch.where(calm, here, 0.0), torch.where(calm, exact, 0.0), 2.0**-19 * torch.where(calm, size, 0.0), what)
        kept.append(found)
    same_bits(kept[-1], kept[0], "batch_norm_act on CPU and CUDA")


@drawn("batch_norm_act_fake_quantize")
def batch_norm_act_fake_quantize(d: Draw):
    """Bit for bit the norm in float32 followed by fake_quantize's formula, and its mask before the norm's gradient."""
    x, mean, variance, own, params, residual, activation, eps, grad = case(d, PIECEWISE)
    low, high = d.range()
    while low < -128 or high > (255 if low >= 0 else 127):
        low, high = d.range()
    scale = d.scale(d.choice(([], [1], [1] * x.dim())), low, high)
    point = d.integers(list(scale.shape), low, high, torch.int32) if d.chance(0.5) else None
    d.notes |= {"scale": scale, "zero_point": point, "range": (low, high)}
    keywords = {"eps": eps, "batch_statistics": own}
    limits = {"quant_min": low, "quant_max": high}
    kept = []
    for device in d.devices:
        what = f"batch_norm_act_fake_quantize on {device}"
        m, v, cs, cp = (d.on(device, t) for t in (mean, variance, scale, point))
        tensors = (x, *params, residual)
        y, *rest = (d.on(device, t) for t in tensors)
        more = rest[-1] if rest[-1] is None else rest[-1].float()
        before = ops.batch_norm_act(y.float(), m, v, *rest[:3], more, **keywords).cpu()
        z = ops.batch_norm_act(y.float(), m, v, *rest[:3], more, activation=activation, **keywords).cpu()
        expected = rounding.fake_quantize(z, scale, point, low, high).to(x.dtype)
        plain, codes = ops.batch_norm_act_fake_quantize(
            y, m, v, *rest, cs, cp, activation=activation, **keywords, **limits
        )
        same(plain, expected, what)
        regular(plain, what)
        code_type = torch.int8 if low < 0 else torch.uint8
        wanted = rounding.codes(rounding.unclamped_code(z, scale, point), point, low, high, code_type)
        same(codes, wanted, f"{what}: codes")
        check(codes.stride() == plain.stride(), f"{what}: expected codes of the result's strides")

        def run(y, weight, bias, conv_scale, more, m=m, v=v, cs=cs, cp=cp):
            return ops.batch_norm_act_fake_quantize(
                y, m, v, weight, bias, conv_scale, more, cs, cp, activation=activation, **keywords, **limits
            )[0]

        result, found = gradients(d, device, run, tensors, grad, what)
        same(result, expected, f"{what} with a gradient")
        passes = rounding.inside(z, scale, point, low, high)
        if activation != "identity":
            passes = passes & (before > 0) & (before < (6 if activation == "relu6" else float("inf")))
        let = torch.empty_like(plain, device="cpu").copy_(torch.where(passes, grad, torch.zeros((), dtype=grad.dtype)))

        def alone(y, weight, bias, conv_scale, more, m=m, v=v):
            return ops.batch_norm_act(y, m, v, weight, bias, conv_scale, more, **keywords)

        _, wanted = gradients(d, device, alone, tensors, let, what)
        for name, one, want in zip(("input", "weight", "bias", "conv_scale", "residual"), found, wanted, strict=True):
            if want is not None:
                same(one, want.cpu(), f"{what}: gradient of {name}")
        if residual is None:
            tensors = (d.on(device, grad), y, m, v, *rest[:3], cs, cp)
            learned_step(tensors, z, activation, eps, own, (scale, point, low, high), grad, found, what)
        kept.append((plain, codes))
    for one, other in zip(kept[-1], kept[0], strict=True):
        same_bits(one, other, "batch_norm_act_fake_quantize on CPU and CUDA")


def step_sums(grad, x, scale, low, high, point=None):
    """(float64 gradient of each element of scale by LSQ, how far float32 may be off): x as the operator rounded it."""
    _, want, _, terms = rounding.learnable_gradients(grad, x, scale, point, low, high)
    count, codes = max(1, x.numel() // max(1, scale.numel())), max(abs(low), abs(high)) + 1
    each = rounding.sum_to_scale(grad.double().abs() * codes, scale)
    return want.flatten(), (2.0**-22 * each + 2.0**-24 * (count + 32) * terms + 1e-30).flatten()


def learned_step(tensors, z, activation, eps, own, grid, grad, found, what):
    """The gradient that a learned scale of the result gets from each channel; the others are those of a given scale."""
    g, y, m, v, weight, bias, conv_scale, cs, cp = tensors
    scale, point, low, high = grid
    mask = ops._batch_norm_forward(y, m, v, weight, bias, conv_scale, None, cs, cp, activation, eps, low, high, True)[2]
    back = ops._batch_norm_backward(
        g, y, mask, m, v, weight, bias, conv_scale, activation, eps, own, False, cs, cp, low, high
    )
    for name, one, want in zip(
        ("input", "weight", "bias", "conv_scale"), (back[0], *back[2:5]), found[:4], strict=True
    ):
        if want is not None:
            same(one.to(want.dtype), want.cpu(), f"{what}: gradient of {name} with a learned scale")
    channels = [1, z.shape[1], *[1] * (z.dim() - 2)]
    check(back[5].dtype == torch.float32 and back[5].shape == z.shape[1:2], f"{what}: expected a sum per channel")
    if z.numel() == 0:
        return same(back[5], torch.zeros(z.shape[1]), f"{what}: gradient of a learned scale")
    zeros = None if point is None else point.reshape(-1)[:1].expand(z.shape[1]).view(channels)
    steps = scale.reshape(-1)[:1].expand(z.shape[1]).reshape(channels)
    close_sums(back[5], *step_sums(grad, z, steps, low, high, zeros), f"{what}: gradient of a learned scale")


def close_sums(found, want, room, what):
    """Those of NaN, or beyond float32, are not compared."""
    fair = want.isfinite() & room.isfinite() & (want.abs() + room < 1e37)
    found = found.cpu().double()
    close(torch.where(fair, found, 0.0), torch.where(fair, want, 0.0), torch.where(fair, room, 1.0), what)


# ---- statistics -----------------------------------------------------------------------------------------------------


@drawn("_batch_norm_statistics")
def batch_norm_statistics(d: Draw):
    x = batch(d, (*TAME, "special", "finite", "huge"), empty=0)
    dims, y = over(x), x.double()
    view = [1, -1] + [1] * (x.dim() - 2)
    first = y.flatten(2)[0, :, 0] if x.dim() > 2 else y[0]
    finite, nan = x.isfinite().float().amin(dims).bool(), x.isnan().float().amax(dims).bool()
    away = (y - first.view(view)).abs()
    calm = finite & (away.nan_to_num(1e38).amax(dims) < 1e15) & (y.abs().nan_to_num(1e38).amax(dims) < 1e30)
    tol = 2.0**-24 * (x.numel() // x.shape[1] / 4 + 32)
    want = (y.mean(dims), y.var(dims, unbiased=False), y.amin(dims), y.amax(dims))
    rooms = (
        tol * away.mean(dims) + 2.0**-23 * want[0].abs() + 1e-37,
        2 * tol * away.square().mean(dims) + 2.0**-22 * want[1] + 1e-37,
        torch.zeros_like(first),
        torch.zeros_like(first),
    )
    kept = []
    for device in d.devices:
        given = d.on(device, x)
        found = ops._batch_norm_statistics(given)
        what = f"_batch_norm_statistics on {device}"
        check(list(found.shape) == [4, x.shape[1]] and found.dtype == torch.float32, f"{what}: expected float32 [4, C]")
        same(ops._batch_norm_statistics(given), found.cpu(), f"{what}: the same again")
        for name, one, exact, room in zip(
            ("mean", "variance", "minimum", "maximum"), found.cpu(), want, rooms, strict=True
        ):
            close(
                torch.where(calm, one.double(), 0.0),
                torch.where(calm, exact, 0.0),
                torch.where(calm, room, 1.0),
                f"{what}: {name}",
            )
        check(bool(found.cpu()[:, nan].isnan().all()), f"{what}: expected NaN throughout a channel that holds one")
        lost = ~finite
        ends = found.cpu()[2:].isfinite().all(0) | found.cpu()[0].isfinite()
        check(not (ends & lost).any(), f"{what}: expected no finite mean and range of a channel that is not finite")
        kept.append(found)
    same_bits(
        torch.where(calm, kept[-1][2:].cpu(), 0.0), torch.where(calm, kept[0][2:], 0.0), "extremes on CPU and CUDA"
    )


@drawn("_batch_norm_update_")
def batch_norm_update(d: Draw):
    x = batch(d, empty=0)
    weight, bias, scale = parameters(d, x.shape[1])
    channels, count = x.shape[1], x.numel() // x.shape[1]
    momentum, eps = d.choice((0.0, 0.1, 0.37, 1.0)), d.choice((1e-5, 1e-3, 0.1))
    activation, ranges, moves = d.choice(PIECEWISE), d.chance(0.6), d.chance(0.8)
    d.notes |= {"momentum": momentum, "eps": eps, "activation": activation, "range": ranges, "moves": moves}
    running = [
        d.tensor([channels], torch.float32, "normal", expanded=False),
        d.tensor([channels], d.choice((torch.float32, torch.float32, torch.float64)), "normal", expanded=False).abs(),
    ]
    given = torch.stack([*exact_statistics(x), x.float().amin(over(x)), x.float().amax(over(x))])
    s = torch.ones(channels, dtype=torch.float64) if scale is None else scale.double()
    mean, variance = given[0].double() / s, given[1].double() / s**2 * (count / max(1, count - 1))
    wanted = [r.double() + momentum * (new - r.double()) for r, new in zip(running, (mean, variance), strict=True)]
    rooms = [
        2.0**-21 * (r.double().abs() + momentum * (new.abs() + r.double().abs())) + 1e-37
        for r, new in zip(running, (mean, variance), strict=True)
    ]
    kept = []
    for device in d.devices:
        what = f"_batch_norm_update_ on {device}"
        cs, cw, cb, cv = (d.on(device, t) for t in (given, weight, bias, scale))
        moved = [r.to(device, copy=True) for r in running] if moves else [None, None]
        found = ops._batch_norm_update_(
            cs, cw, cb, cv, *moved, count=count, momentum=momentum, eps=eps, activation=activation, range=ranges
        )
        if moves:
            for name, one, want, room in zip(("mean", "variance"), moved, wanted, rooms, strict=True):
                close(one, want, room, f"{what}: running {name}")
        check(list(found.shape) == [2 if ranges else 0], f"{what}: got a range of shape {list(found.shape)}")
        if ranges:
            z = ops.batch_norm_act(d.on(device, x).float(), *cs[:2], cw, cb, cv, activation=activation, eps=eps).cpu()
            same(found, torch.stack([z.min(), z.max()]), f"{what}: range")
        kept.append((found, moved))
    same_bits(kept[-1][0], kept[0][0], "_batch_norm_update_'s range on CPU and CUDA")
    if moves:
        for one, other in zip(kept[-1][1], kept[0][1], strict=True):
            same_bits(one, other, "_batch_norm_update_ on CPU and CUDA")


# ---- the folded weight ----------------------------------------------------------------------------------------------


@drawn("fold_fake_quantize", "_fold_fake_quantize", "_fold_fake_quantize_backward")
def fold_fake_quantize(d: Draw):
    shape = d.shape(low=2, empty=0)
    weight = d.tensor(shape, d.dtype(), d.choice(("normal", "normal", "heavy", "ties", "zero", "constant", "special")))
    gamma = d.tensor(shape[:1], d.choice((torch.float32, d.dtype())), d.choice(("normal", "normal", "ties", "zero")))
    variance = d.tensor(shape[:1], torch.float32, d.choice(("normal", "zero"))).abs()
    low, high = d.range()
    symmetric, eps, dtype = d.chance(0.5), d.choice((1e-5, 1e-3)), d.choice((None, *FLOATS))
    d.notes |= {"weight": weight, "bn_weight": gamma, "running_var": variance, "range": (low, high), "eps": eps}
    d.notes |= {"symmetric": symmetric, "dtype": dtype}
    out = weight.dtype if dtype is None else dtype
    view = [shape[0], *[1] * (len(shape) - 1)]
    exact = gamma.double() / (variance.double() + eps).sqrt()
    exact = torch.where(exact == 0, 1.0, exact)
    g = d.tensor(shape, out, "normal")
    of_scale = d.tensor(shape[:1], torch.float32, "normal")
    settings = {"eps": eps, "quant_min": low, "quant_max": high, "symmetric": symmetric}
    kept = []
    for device in d.devices:
        what = f"fold_fake_quantize on {device}"
        cw, cg, cv, grad, grad_scale = (d.on(device, t) for t in (weight, gamma, variance, g, of_scale))
        name = "" if dtype is None else named(dtype)
        output, scale = ops.fold_fake_quantize(cw, cg, cv, **settings, dtype=name)
        close(scale, exact, 2.0**-21 * exact.abs(), f"{what}: conv_scale")
        folded = weight.float() * scale.cpu().view(view)
        qparams = rounding.qparams_from_range(*rounding.min_max(folded, view), low, high, symmetric)
        same(output, rounding.fake_quantize(folded, *qparams, low, high).to(out), what)
        regular(output, what)

        leaves = [leaf(cw), leaf(cg)]
        results = ops.fold_fake_quantize(*leaves, cv, **settings, dtype=name)
        same(results[0].detach(), output.cpu(), f"{what} with a gradient")
        of_weight, of_gamma = torch.autograd.grad(results, leaves, (grad, grad_scale))
        inside = rounding.inside(folded, *qparams, low, high)
        let = torch.where(inside, g, torch.zeros((), dtype=g.dtype)).float()
        same(of_weight, (let * scale.cpu().view(view)).to(weight.dtype), f"{what}: gradient of weight")
        terms = (let.double() * torch.where(inside, weight, torch.zeros((), dtype=weight.dtype)).double()).flatten(1)
        deviation = (variance.double() + eps).sqrt()
        live = gamma.double() != 0
        want = torch.where(live, (terms.sum(1) + of_scale.double()) / deviation, 0.0)
        tol = 2.0**-24 * (terms.shape[1] / 4 + 32)
        room = tol * (terms.abs().sum(1) + of_scale.double().abs()) / deviation
        whole = weight.flatten(1).isfinite().all(1) & (terms.abs().sum(1) < 1e37)  # other sums are not compared
        near(
            torch.where(whole, of_gamma.cpu(), 0.0),
            torch.where(whole, want, 0.0),
            torch.where(whole, room, 0.0),
            f"{what}: gradient of bn_weight",
        )
        if d.chance(0.3):
            again, factor, mask, folded_with = ops._fold_fake_quantize(cw, cg, cv, eps, low, high, symmetric, name)
            same(again, output.cpu(), f"_fold_fake_quantize on {device}")
            same(factor, scale.cpu(), f"_fold_fake_quantize's conv_scale on {device}")
            same(folded_with, variance, f"_fold_fake_quantize's variance on {device}")
            check(folded_with.data_ptr() != cv.data_ptr(), f"_fold_fake_quantize on {device}: expected a copy")
            there = torch.empty_like(output, dtype=torch.bool, device="cpu").copy_(inside)
            rows = there.as_strided((shape[0], terms.shape[1]), (terms.shape[1], 1))
            for row, bits in zip(rows, mask.cpu(), strict=True):
                check(torch.equal(bits_of(bits, len(row)), row), f"_fold_fake_quantize's mask on {device}")
            back = ops._fold_fake_quantize_backward(grad, grad_scale, cw, mask, cg, cv, eps)
            check(back[2].numel() == 0, f"_fold_fake_quantize_backward on {device}: a scale that is not there")
            same(back[0], of_weight.cpu(), f"_fold_fake_quantize_backward on {device}")
            same(back[1].to(gamma.dtype), of_gamma.cpu(), f"_fold_fake_quantize_backward's bn_weight on {device}")
        if d.chance(0.5):
            folded_step(d, device, (weight, gamma, variance, g, of_scale), scale.cpu(), settings, out, view)
        kept.append((output, scale, of_weight))
    for one, other in zip(kept[-1], kept[0], strict=True):
        same_bits(one, other, "fold_fake_quantize on CPU and CUDA")


def folded_step(d: Draw, device, tensors, factor, settings, out, view):
    """With a learned scale, one per row: fake_quantize of the folded weight, and LSQ's gradient of the scale."""
    weight, gamma, variance, g, of_scale = tensors
    eps, low, high, symmetric = settings.values()
    step = d.scale(d.choice((view, view[:1])), low, high)
    d.notes["scale"] = step
    what = f"_fold_fake_quantize with a scale on {device}"
    cw, cg, cv, grad, grad_scale, cs = (d.on(device, t) for t in (*tensors, step))
    output, again, mask, kept = ops._fold_fake_quantize(cw, cg, cv, eps, low, high, symmetric, named(out), cs)
    same(again, factor, f"{what}: conv_scale")
    same(kept, variance, f"{what}: variance")
    folded, steps = weight.float() * factor.view(view), step.reshape(view)
    same(output, rounding.fake_quantize(folded, steps, None, low, high).to(out), what)
    inside = rounding.inside(folded, steps, None, low, high)
    back = ops._fold_fake_quantize_backward(grad, grad_scale, cw, mask, cg, cv, eps, cs, low, high)
    let = torch.where(inside, g, torch.zeros((), dtype=g.dtype)).float()
    same(back[0], (let * factor.view(view)).to(weight.dtype), f"{what}: gradient of weight")
    without = ops._fold_fake_quantize_backward(grad, grad_scale, cw, mask, cg, cv, eps)
    same(back[1], without[1].cpu(), f"{what}: gradient of bn_weight")
    check(back[2].dtype == torch.float32 and list(back[2].shape) == view[:1], f"{what}: expected a gradient per row")
    close_sums(back[2], *step_sums(g, folded, steps, low, high), f"{what}: gradient of scale")
