"""Drawn tests of norms and activations that are rounded for a linear layer: codes and gradients against float64, and
identity and relu bit for bit against fake_quantize's formula."""

import math

import torch
from draw import FLOATS, Draw, check, close, drawn, named, same, same_bits
from drawn_batch_norm import leaf, near, wide
from drawn_fake_quant import bits_of
from reference import fake_quant as rounding
from reference import norm_act as reference

ops = torch.ops.quantrain
FUNCTIONS = ("identity", "relu", "silu", "gelu", "gelu_tanh", "silu_mul", "layer_norm", "rms_norm")
EXACT = ("identity", "relu")
KINDS = ("normal", "normal", "normal", "heavy", "ties", "constant", "zero", "subnormal")
WILD = ("special", "special", "finite", "huge")
HALF = 2.0**-24


# ---- operands -------------------------------------------------------------------------------------------------------


class Case:
    """What a call takes, and what float64 makes of it."""

    def __init__(self, d: Draw, empty=0.04):
        self.function = d.choice(FUNCTIONS)
        columns = d.size() if d.chance(0.85) else d.choice((96, 200, 513, 1030, 2048))
        columns = 0 if d.chance(empty / 2) else columns
        shape = [*d.shape(high=3, cap=d.choice((4, 40, 200)), empty=empty), columns]
        dtype, kind = d.dtype(), d.choice(KINDS if d.chance(0.7) else WILD)
        self.x = d.tensor(shape, dtype, kind)
        self.other = self.weight = self.bias = None
        if self.function == "silu_mul":
            self.other = d.tensor(shape, dtype, "normal" if d.chance(0.7) else kind)
        parameter = d.choice((dtype, torch.float32))
        if self.function.endswith("norm") and d.chance(0.7):
            self.weight = d.tensor([columns], parameter, "normal")
        if self.function == "layer_norm" and d.chance(0.7):
            self.bias = d.tensor([columns], d.choice((dtype, torch.float32)), "normal")
        self.eps = d.choice((1e-5, 1e-6, 0.1))
        self.dtype = d.choice((None, None, *FLOATS)) if dtype == torch.float32 else d.choice((None, dtype))
        self.out = self.dtype or dtype
        self.grad = d.tensor(shape, self.out, d.choice(("normal", "normal", "zero")))
        d.notes |= {"function": self.function, "input": self.x, "other": self.other, "weight": self.weight}
        d.notes |= {"bias": self.bias, "eps": self.eps, "dtype": self.dtype, "grad": self.grad}
        self.name = "" if self.dtype is None else named(self.dtype)
        self.exact = [wide(t, True) for t in self.tensors]
        self.z = reference.norm_act(self.function, *self.exact, self.eps)
        self.value = self.z.detach()
        self.room, self.of_normalized = self.rooms()

    @property
    def tensors(self):
        return self.x, self.other, self.weight, self.bias

    @property
    def norm(self):
        return self.function.endswith("norm")

    def on(self, d, device):
        return [d.on(device, t) for t in self.tensors]

    def rooms(self):
        """How far float32 may be off z, and off (x - m) r of a norm; infinite where it may overflow."""
        y, f = self.x.double(), self.value.abs()
        if self.function in EXACT:
            return torch.zeros_like(f), None
        if not self.norm:
            # of the exponential and of Abramowitz and Stegun's polynomial; CUDA's exponential is off by a unit for
            # each unit of its argument
            room = (y.abs() * 4e-7 + 1e-37) * (1 if self.other is None else self.other.double().abs() + 1e-37)
            room = room + 2.0**-20 * f
            return torch.where((f < 1e37) | ~f.isfinite(), room, torch.inf), None
        mean = y.mean(-1, keepdim=True) if self.function == "layer_norm" else torch.zeros_like(y[..., :1])
        self.inverse = 1 / ((y - mean).square().mean(-1, keepdim=True) + self.eps).sqrt()
        self.tol = HALF * (y.shape[-1] / 4 + 32)
        slip = self.tol * y.abs().mean(-1, keepdim=True) * (self.function == "layer_norm")
        # The variance about a mean that is off is too large by the square of that.
        self.relative = self.tol + (slip * self.inverse).square()
        away = (y - mean).abs()
        room = self.inverse * (away * (self.relative + 2.0**-22) + slip)
        largest = y.abs().amax(-1, keepdim=True) if y.shape[-1] else torch.zeros_like(y[..., :1])
        calm = (largest < 1e17) | ~largest.isfinite()  # else squares overflow in float32
        room = torch.where(calm & (slip * self.inverse < 0.1) | ~largest.isfinite(), room, torch.inf)
        gain = 1.0 if self.weight is None else self.weight.double().abs()
        shift = 0.0 if self.bias is None else self.bias.double().abs()
        total = room * gain + 2.0**-22 * (away * self.inverse * gain + shift) + 1e-37
        return torch.where(room.isinf(), torch.inf, total), room

    def backward(self, grad):
        """(gradients, rooms) of the tensors, given the gradient of z, in float64; rows of infinite room count not."""
        leaves = [t for t in self.exact if t is not None]
        g = grad.double()
        found = iter(torch.autograd.grad(self.z, leaves, g, retain_graph=True))
        found = [None if t is None else next(found) for t in self.exact]
        return found, self.norm_rooms(g) if self.norm else self.slope_rooms(g)

    def slope_rooms(self, g):
        y = self.x.double()
        if self.other is None:
            off = 0.0 if self.function in EXACT else 4e-6
            return [g.abs() * off, None, None, None]
        other = self.other.double()
        wild = (y.abs() > 1e12) | (other.abs() > 1e12)
        of_value = g.abs() * (4e-7 * y.abs() + 2.0**-20 * (y * y.sigmoid()).abs())
        of_input = g.abs() * other.abs() * 4e-6
        return [torch.where(wild, torch.inf, of_input), torch.where(wild, torch.inf, of_value), None, None]

    def norm_rooms(self, g):
        y, inverse, room = self.x.double(), self.inverse, self.of_normalized
        mean = y.mean(-1, keepdim=True) if self.function == "layer_norm" else torch.zeros_like(inverse)
        xhat = (y - mean) * inverse
        gw = g if self.weight is None else g * self.weight.double()
        mean_abs, along = gw.abs().mean(-1, keepdim=True), (gw * xhat).mean(-1, keepdim=True).abs()
        along_abs = (gw * xhat).abs().mean(-1, keepdim=True)
        total = gw.abs() + mean_abs + xhat.abs() * along
        of_input = inverse * (
            (self.relative + 2.0**-21) * total
            + self.tol * mean_abs
            + xhat.abs() * (self.tol * along_abs + (gw.abs() * room).mean(-1, keepdim=True))
            + room * along
        )
        lead = list(range(y.dim() - 1))
        rows = HALF * (math.prod(y.shape[:-1]) + 32)
        of_weight = (g.abs() * room).sum(lead) + rows * (g * xhat).abs().sum(lead)
        return [of_input, None, of_weight, rows * g.abs().sum(lead)]


def eight_bits(d: Draw):
    low, high = d.range()
    while low < -128 or high > (255 if low >= 0 else 127):
        low, high = d.range()
    d.notes["range"] = (low, high)
    return low, high


# ---- what a result must be ------------------------------------------------------------------------------------------


def expanded(parameter, like):
    return (
        None
        if parameter is None
        else parameter.cpu().expand(like.shape)
        if parameter.dim() == like.dim()
        else parameter
    )


def rounded(case, found, codes, scale, point, low, high, what):
    """output and codes of z on the grid: values those of the codes, codes those of a z that float32 may have got."""
    x, z = case.x, case.value
    output, codes, scale = found.cpu(), codes.cpu(), scale.cpu()
    point = None if point is None else point.cpu()
    check(output.dtype == case.out and output.shape == x.shape, f"{what}: expected {case.out} of the input's shape")
    check(codes.dtype == (torch.int8 if low < 0 else torch.uint8) and codes.shape == x.shape, f"{what}: codes' type")
    check(found.is_contiguous() and codes.is_contiguous(), f"{what}: expected contiguous results")
    if case.function in EXACT:
        z32 = x.float() if case.function == "identity" else x.float().clamp(min=0)
        same(output, rounding.fake_quantize(z32, scale, point, low, high).to(case.out), what)
        unclamped = rounding.unclamped_code(z32, scale, point)
        same(codes, rounding.codes(unclamped, point, low, high, codes.dtype), f"{what}: codes")
        return
    s = rounding.expand(scale, z).expand(z.shape)
    zero = rounding.expand(point, z).expand(z.shape)
    known = case.room.isfinite() & ~s.isnan() & (1 / s.float()).isfinite()
    nan, lost = z.isnan(), output.isnan()
    check(bool((lost == nan)[known].all()), f"{what}: NaN where z is, and nowhere else")
    values = ((codes.float() - zero.float()) * s.float()).to(case.out)
    same(torch.where(lost, torch.zeros_like(output), output), torch.where(lost, torch.zeros_like(values), values), what)
    nearest = zero.clamp(low, high)
    same(torch.where(lost, codes.double(), 0.0), torch.where(lost, nearest, 0.0), f"{what}: codes of NaN")
    live = known & ~nan
    v = z / s
    off = case.room / s + 2.0**-22 * v.abs()
    off = torch.where(live & v.isfinite(), off, 0.0)
    v = torch.where(live, v, 0.0)
    least = ((v - off - 0.5).ceil() + zero).clamp(low, high)
    most = ((v + off + 0.5).floor() + zero).clamp(low, high)
    wrong = live & ((codes.double() < least) | (codes.double() > most))
    check(not wrong.any(), lambda: f"{what}: {int(wrong.sum())} codes, first at {wrong.nonzero()[0].tolist()}")


def masked(case, mask, codes, scale, point, low, high, what):
    """bool of the input's shape: which gradients the mask lets through, held against the codes."""
    passes = bits_of(mask.cpu(), case.x.numel()).view(case.x.shape)
    check(mask.numel() == (case.x.numel() + 7) // 8, f"{what}: expected a bit per element")
    if case.function in EXACT:
        z32 = case.x.float()
        through = rounding.inside(z32 if case.function == "identity" else z32.clamp(min=0), scale, point, low, high)
        through = through & (z32 > 0) if case.function == "relu" else through
        same(passes, through, f"{what}: mask")
        return passes
    codes, lost = codes.cpu(), case.value.isnan()
    check(not (passes & lost & case.room.isfinite()).any(), f"{what}: the mask lets a NaN through")
    s = rounding.expand(scale, case.value).expand(case.x.shape)
    inner = (codes > low) & (codes < high) & ~lost & case.room.isfinite() & (1 / s.float()).isfinite()
    check(not (inner & ~passes).any(), f"{what}: the mask misses a code within the range")
    v = case.value / s + rounding.expand(point, case.value)
    off = case.room / s + 2.0**-22 * (v.abs() + 256) + 0.5
    beyond = (v - off > high) | (v + off < low)
    check(not (passes & beyond & (1 / s.float()).isfinite()).any(), f"{what}: the mask lets through what clips")
    return passes


def gradients(d, case, device, run, passes, what):
    """The gradients through run(tensors), of z that passes(codes) lets through, against float64."""
    leaves = [leaf(t) for t in case.on(d, device)]
    output = run(leaves)
    given = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(output, given, d.on(device, case.grad)))
    found = [None if t is None else next(found) for t in leaves]
    through = torch.where(passes, case.grad, torch.zeros((), dtype=case.grad.dtype))
    for one, tensor in zip(found, leaves, strict=True):
        check(one is None or one.dtype == tensor.dtype, f"{what}: expected gradients of the tensors' types")
    if case.function in EXACT:
        same(found[0], through.to(case.x.dtype), f"{what}: gradient of input")
        return output.detach(), found
    exact, rooms = case.backward(through)
    for name, one, want, room in zip(("input", "other", "weight", "bias"), found, exact, rooms, strict=True):
        if one is None:
            continue
        fair = room.isfinite() & want.isfinite()
        near(
            torch.where(fair, one.cpu(), torch.zeros((), dtype=one.dtype)),
            torch.where(fair, want, 0.0),
            torch.where(fair, room, 0.0),
            f"{what}: gradient of {name}",
        )
    return output.detach(), found


def parts(d, case, device, scale, point, limits, symmetric, found, what):
    """The operators that results and gradients are made of, called by themselves: the same bits."""
    output, codes, *rest, of = found
    low, high = limits
    tensors = case.on(d, device)
    results = ops._norm_act_forward(
        *tensors, scale, point, case.function, case.eps, low, high, symmetric, case.name, True, True
    )
    same(results[0], output.cpu(), f"_norm_act_forward for {what}")
    same(results[1], codes.cpu(), f"_norm_act_forward's codes for {what}")
    for one, want in zip(results[4:], rest, strict=False):
        same(one, want.cpu(), f"_norm_act_forward's grid for {what}")
    plain = ops._norm_act_forward(
        *tensors, scale, point, case.function, case.eps, low, high, symmetric, case.name, False, False
    )
    same(plain[0], output.cpu(), f"_norm_act_forward without codes for {what}")
    check(plain[1].numel() == 0 and plain[2].numel() == 0, f"_norm_act_forward for {what}: codes or mask unasked for")
    grad = d.on(device, case.grad)
    back = ops._norm_act_backward(grad, *tensors[:3], results[3], results[2], case.function)
    if case.function == "relu":  # whose derivative the mask holds
        return results[2]
    for name, one, want in zip(("input", "other", "weight", "bias"), back, of, strict=True):
        if want is not None:
            same(one.to(want.dtype), want.cpu(), f"_norm_act_backward's gradient of {name} for {what}")
    return results[2]


# ---- one scale ------------------------------------------------------------------------------------------------------


@drawn("norm_act_fake_quantize", "_norm_act_forward", "_norm_act_backward")
def norm_act_fake_quantize(d: Draw):
    case = Case(d)
    low, high = eight_bits(d)
    scale = d.scale(d.choice(([], [1], [1] * case.x.dim())), low, high)
    point = d.integers(list(scale.shape), low, high, torch.int32) if d.chance(0.5) else None
    d.notes |= {"scale": scale, "zero_point": point}
    keywords = {"function": case.function, "eps": case.eps, "quant_min": low, "quant_max": high, "dtype": case.name}
    kept = []
    for device in d.devices:
        what = f"norm_act_fake_quantize({case.function}) on {device}"
        cs, cp = d.on(device, scale), d.on(device, point)
        tensors = case.on(d, device)
        output, codes = ops.norm_act_fake_quantize(*tensors, cs, cp, **keywords)
        rounded(case, output, codes, scale, point, low, high, what)
        if case.function == "identity" and case.dtype in (None, case.x.dtype):
            limits = {"quant_min": low, "quant_max": high}
            same_bits(output, ops.fake_quantize(tensors[0], cs, cp, **limits).cpu(), f"{what} and fake_quantize")
            want = ops.quantize(tensors[0], cs, cp, **limits, dtype=codes.dtype)
            same_bits(codes, want.cpu(), f"{what} and quantize")
        mask = ops._norm_act_forward(
            *tensors, cs, cp, case.function, case.eps, low, high, point is None, case.name, True, True
        )[2]
        passes = masked(case, mask, codes, scale, point, low, high, what)

        def run(leaves, cs=cs, cp=cp, codes=codes, what=what):
            output, again = ops.norm_act_fake_quantize(*leaves, cs, cp, **keywords)
            check(not again.requires_grad, f"{what}: expected codes without a gradient")
            same(again, codes.cpu(), f"{what}: codes with a gradient")
            return output

        again, of = gradients(d, case, device, run, passes, what)
        same(again, output.cpu(), f"{what} with a gradient")
        parts(d, case, device, cs, cp, (low, high), point is None, (output, codes, of), what)
        kept.append((output, codes, of[0]))
    if case.function in EXACT:
        for one, other in zip(kept[-1], kept[0], strict=True):
            same_bits(one, other, "norm_act_fake_quantize on CPU and CUDA")


# ---- a scale per row ------------------------------------------------------------------------------------------------


def grid(case, scale, point, low, high, symmetric, what):
    """The rows' scale and zero_point: to the bit where z is x or relu's, else those of a z that float32 may have got."""
    rows = [*case.x.shape[:-1], 1]
    check(scale.dtype == torch.float32 and list(scale.shape) == rows, f"{what}: expected a float32 scale per row")
    check(point.dtype == torch.int32 and list(point.shape) == rows, f"{what}: expected an int32 zero_point per row")
    scale, point = scale.cpu(), point.cpu()
    if case.x.numel() == 0:
        check(bool((scale == 1).all() and (point == 0).all()), f"{what}: expected scale 1 of an empty row")
        return
    if case.function in EXACT:
        z32 = case.x.float() if case.function == "identity" else case.x.float().clamp(min=0)
        want = rounding.qparams_from_range(z32.amin(-1, keepdim=True), z32.amax(-1, keepdim=True), low, high, symmetric)
        same(scale, want[0], f"{what}: scale")
        same(point, want[1], f"{what}: zero_point")
        return
    z = case.value
    room = case.room.amax(-1, keepdim=True)
    known = room.isfinite()
    bad = ~z.isfinite().all(-1, keepdim=True)
    same(scale.isnan() & known, bad & known, f"{what}: a scale NaN for a row that is not finite")
    check(bool((point[scale.isnan()] == 0).all()), f"{what}: expected zero_point 0 beside a scale NaN")
    live = known & ~bad & (room < 1e37)
    clean = torch.where(live, z, 1.0)
    least, most = clean.amin(-1, keepdim=True), clean.amax(-1, keepdim=True)
    if symmetric:
        check(bool((point == 0).all()), f"{what}: expected zero_point 0 where symmetric")
        steps = min(-low, high) if low < 0 < high else max(abs(low), abs(high))
        width = torch.maximum(least.abs(), most.abs())
    else:
        least, most, steps = least.clamp(max=0), most.clamp(min=0), high - low
        width = most - least
    room = torch.where(live, room, 0.0)
    fair = live & (width > 2 * room) & (width > 1e-30)  # else a width may be 0, and its scale 1
    off = 2 * room / steps + 2.0**-22 * width / steps
    close(
        torch.where(fair, scale.double(), 0.0),
        torch.where(fair, width / steps, 0.0),
        torch.where(fair, off, 1.0),
        f"{what}: scale",
    )
    if symmetric:
        return
    v = -least / scale.double()
    slack = 2 * room / scale.double() + 2.0**-21 * v.abs() + 0.5
    first, last = ((low + v - slack).floor().clamp(low, high), (low + v + slack).ceil().clamp(low, high))
    check(bool(((point >= first) & (point <= last) | ~fair).all()), f"{what}: zero_point")


def rows_alone(d, case, device, scale, point, codes, limits, symmetric, what):
    """One row with its own scale given, and its range by itself: the same bits, where the same kernel takes it."""
    if case.x.numel() == 0:
        return
    row = d.randrange(case.x[..., 0].numel())
    x, other, weight, bias = case.on(d, device)
    columns = x.shape[-1]
    x, other = (None if t is None else t.reshape(-1, columns)[row : row + 1] for t in (x, other))
    own, zero = scale.reshape(-1)[row], point.reshape(-1)[row]
    settings = {"function": case.function, "eps": case.eps}
    ends = ops._norm_act_range(x, other, weight, bias, **settings)
    check(ends.dtype == torch.float32 and list(ends.shape) == [2], f"{what}: expected a float32 range [2]")
    again, point_again = ops._qparams_from_range(
        ends[:1], ends[1:], quant_min=limits[0], quant_max=limits[1], symmetric=symmetric
    )
    if device != "cpu" and case.function not in EXACT:  # other kernels take a row that lies elsewhere
        return
    same(again[0], own.cpu(), f"{what}: a scale and _norm_act_range")
    same(point_again[0], zero.cpu(), f"{what}: a zero_point and _norm_act_range")
    if own.isnan():
        return
    given = None if symmetric else zero  # 0 may lie outside the range
    _, alone = ops.norm_act_fake_quantize(
        x, other, weight, bias, own, given, quant_min=limits[0], quant_max=limits[1], **settings
    )
    same(alone[0], codes.reshape(-1, columns)[row].cpu(), f"{what}: a row's codes and norm_act_fake_quantize's")


@drawn("norm_act_fake_quantize_dynamic")
def norm_act_fake_quantize_dynamic(d: Draw):
    case = Case(d)
    low, high = eight_bits(d)
    while low == high:
        low, high = eight_bits(d)
    symmetric = d.chance(0.5)
    d.notes["symmetric"] = symmetric
    limits = {"quant_min": low, "quant_max": high, "symmetric": symmetric}
    keywords = {"function": case.function, "eps": case.eps, "dtype": case.name, **limits}
    rows = [*case.x.shape[:-1], 1]
    kept = []
    for device in d.devices:
        what = f"norm_act_fake_quantize_dynamic({case.function}) on {device}"
        tensors = case.on(d, device)
        output, codes, scale, point = ops.norm_act_fake_quantize_dynamic(*tensors, **keywords)
        grid(case, scale, point, low, high, symmetric, what)
        own, zero = scale.cpu(), point.cpu()
        rounded(case, output, codes, own, zero, low, high, what)
        bad = own.isnan().expand(case.x.shape)
        check(bool(output.cpu()[bad].isnan().all()), f"{what}: expected NaN beside a scale NaN")
        rows_alone(d, case, device, scale, point, codes, (low, high), symmetric, what)
        if case.function == "identity" and case.x.numel():
            if case.dtype in (None, case.x.dtype):
                want = ops.fake_quantize_dynamic(tensors[0], rows, **limits)
                same_bits(output, want.cpu(), f"{what} and fake_quantize_dynamic")
            for one, want in zip((scale, point), ops.choose_qparams(tensors[0], rows, **limits), strict=True):
                same_bits(one, want.cpu(), f"{what} and choose_qparams")
        forward = ops._norm_act_forward(
            *tensors, None, None, case.function, case.eps, low, high, symmetric, case.name, True, True
        )
        passes = masked(case, forward[2], codes, own, zero, low, high, what)
        if symmetric and low < 0 < high and case.function != "relu":  # no bit is kept: a NaN row's gradient passes
            passes = passes | bad
            check(bool(passes.all()), f"{what}: a symmetric row clips")

        def run(leaves, codes=codes, own=own, what=what):
            output, again, step, zero = ops.norm_act_fake_quantize_dynamic(*leaves, **keywords)
            check(not (again.requires_grad or step.requires_grad or zero.requires_grad), f"{what}: a gradient too many")
            same(again, codes.cpu(), f"{what}: codes with a gradient")
            same(step, own, f"{what}: scale with a gradient")
            return output

        again, of = gradients(d, case, device, run, passes, what)
        same(again, output.cpu(), f"{what} with a gradient")
        kept.append((output, codes, scale, point, of[0]))
    if case.function in EXACT:
        for one, other in zip(kept[-1], kept[0], strict=True):
            same_bits(one, other, "norm_act_fake_quantize_dynamic on CPU and CUDA")


# ---- the range ------------------------------------------------------------------------------------------------------


@drawn("_norm_act_range")
def norm_act_range(d: Draw):
    case = Case(d, empty=0)
    z, room = case.value, case.room
    known = bool(room.isfinite().all())
    kept = []
    for device in d.devices:
        what = f"_norm_act_range({case.function}) on {device}"
        tensors = case.on(d, device)
        found = ops._norm_act_range(*tensors, function=case.function, eps=case.eps)
        same(ops._norm_act_range(*tensors, function=case.function, eps=case.eps), found.cpu(), f"{what}: again")
        check(found.dtype == torch.float32 and list(found.shape) == [2], f"{what}: expected float32 [2]")
        if not known:
            continue
        if z.isnan().any():
            check(bool(found.isnan().all()), f"{what}: expected NaN of a NaN, got {found.tolist()}")
        else:
            close(found[0], z.min(), room.max() + 1e-37, f"{what}: minimum")
            close(found[1], z.max(), room.max() + 1e-37, f"{what}: maximum")
        kept.append(found)
    if case.function in EXACT and kept:
        same_bits(kept[-1], kept[0], "_norm_act_range on CPU and CUDA")
