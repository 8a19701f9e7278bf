"""Drawn tests of the fake_quant family: simulated values, gradients and codes."""

import functools

import torch
from draw import FLOATS, Draw, check, close, drawn, in_memory, named, same, same_bits
from reference import fake_quant as reference

ops = torch.ops.quantrain


def operands(d: Draw, codes=None):
    """(input, scale, zero_point or None, quant_min, quant_max)."""
    shape = d.shape()
    quant_min, quant_max = d.range()
    scale_shape = d.scale_shape(shape)
    dtype = d.dtype()
    x = d.tensor(shape, dtype) if codes is None else d.integers(shape, quant_min, quant_max, codes)
    scale = d.scale(scale_shape, quant_min, quant_max)
    zero_point = d.integers(scale_shape, quant_min, quant_max, torch.int32) if d.chance(0.5) else None
    d.notes |= {"input": x, "scale": scale, "zero_point": zero_point, "range": (quant_min, quant_max)}
    return x, scale, zero_point, quant_min, quant_max


def bits_of(mask, n):
    """bool [n] of a mask of one bit an element."""
    return (mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[:n].bool()


def strides_kept(found, x, what):
    expected = torch.empty_like(x).stride()
    check(found.stride() == expected, lambda: f"{what}: expected strides {expected}, got {found.stride()}")


def straight_through(d: Draw, run, x, g, expected, grad, what):
    """The gradient of run(x) for g: `grad`. Sometimes the second derivative too: linear in g, with the same mask."""
    leaf, twice = x.detach().requires_grad_(), d.chance(0.2)
    y = run(leaf)
    same(y.detach(), expected, f"{what} with a gradient")
    given = g.detach().requires_grad_(twice)
    (found,) = torch.autograd.grad(y, leaf, given, create_graph=twice)
    same(found.detach(), grad, f"{what}: gradient")
    if twice:
        (again,) = torch.autograd.grad(found, given, g)
        same(again, grad, f"{what}: second derivative")
    return found.detach()


@drawn("fake_quantize", "_fake_quantize_mask", "_fake_quantize_backward")
def fake_quantize(d: Draw):
    x, scale, zero_point, low, high = operands(d)
    expected = reference.fake_quantize(x, scale, zero_point, low, high)
    inside = reference.inside(x, scale, zero_point, low, high)
    g = d.tensor(x.shape, x.dtype, d.choice(("normal", "special")))
    grad = torch.where(inside, g, torch.zeros((), dtype=g.dtype))
    keep = []
    for device in d.devices:
        cx, cs, cz, cg = (d.on(device, t) for t in (x, scale, zero_point, g))
        plain = ops.fake_quantize(cx, cs, cz, quant_min=low, quant_max=high)
        same(plain, expected, f"fake_quantize on {device}")
        strides_kept(plain, x, f"fake_quantize on {device}")
        run = functools.partial(ops.fake_quantize, scale=cs, zero_point=cz, quant_min=low, quant_max=high)
        found = straight_through(d, run, cx, cg, expected, grad, f"fake_quantize on {device}")
        if d.device == "cpu" and d.chance(0.3) or device != "cpu":
            _mask(cx, cs, cz, low, high, expected, inside, g, cg, grad, device)
        keep.append((plain, found))
    for found, cpu in zip(keep[-1], keep[0], strict=True):
        same_bits(found, cpu, "fake_quantize on CPU and CUDA")


def _mask(cx, cs, cz, low, high, expected, inside, g, cg, grad, device):
    output, mask = ops._fake_quantize_mask(cx, cs, cz, low, high, True)
    same(output, expected, f"_fake_quantize_mask on {device}")
    like = torch.empty_like(cx, device="cpu")
    there = torch.empty_strided(like.shape, like.stride(), dtype=torch.bool).copy_(inside)
    check(
        torch.equal(bits_of(mask.cpu(), inside.numel()), in_memory(there)),
        f"_fake_quantize_mask on {device}: expected bits of the codes inside the range in the order of memory",
    )
    back = ops._fake_quantize_backward(cg, mask, output.stride())
    same(back, grad, f"_fake_quantize_backward on {device}")
    check(back.stride() == output.stride(), f"_fake_quantize_backward on {device}: expected the strides asked for")


@drawn("fake_quantize_learnable", "_fake_quantize_learnable_backward")
def fake_quantize_learnable(d: Draw):
    x, scale, zero_point, low, high = operands(d)
    factor = d.choice((1.0, 0.25, 0.0123))
    if zero_point is not None and d.chance(0.5):  # learned: a float32, rounded and held in the range
        zero_point = zero_point.float() + d.choice((0.0, 0.3, 0.5, 1.5, -700.0))
        d.notes["zero_point"] = zero_point
    learned = zero_point is not None and zero_point.is_floating_point()
    fixed = zero_point.round().clamp(low, high) if learned else zero_point
    expected = reference.fake_quantize(x, scale, fixed, low, high)
    g = d.tensor(x.shape, x.dtype, "normal")
    grad, grad_scale, grad_point, terms = reference.learnable_gradients(g, x, scale, zero_point, low, high, factor)
    for device in d.devices:
        cx, cs, cz, cg = (d.on(device, t) for t in (x, scale, zero_point, g))
        leaf, leaf_scale = cx.detach().requires_grad_(), cs.detach().requires_grad_()
        leaves = [leaf, leaf_scale]
        if learned:
            cz = cz.detach().requires_grad_()
            leaves.append(cz)
        y = ops.fake_quantize_learnable(leaf, leaf_scale, cz, quant_min=low, quant_max=high, grad_factor=factor)
        same(y.detach(), expected, f"fake_quantize_learnable on {device}")
        strides_kept(y, x, f"fake_quantize_learnable on {device}")
        found = torch.autograd.grad(y, leaves, cg, retain_graph=True)
        same(found[0], grad, f"fake_quantize_learnable's gradient on {device}")
        if d.chance(0.1):
            second_derivative(d, y, leaf, cg, grad, device)
        # float32 sums of differences of numbers up to the largest code: an error of 2^-24 of it in each.
        count = max(1, x.numel() // max(1, scale.numel()))
        codes = max(abs(low), abs(high)) + 1
        each = reference.sum_to_scale((g.double().abs() * codes * factor).expand(x.shape), scale)
        room = 2.0**-22 * each + 2.0**-24 * count * terms + 1e-30
        _sums(found[1], grad_scale, room, f"fake_quantize_learnable's gradient of the scale on {device}")
        if learned:
            size = reference.sum_to_scale(
                (g.double().abs() * reference.expand(scale, x) * factor).expand(x.shape), scale
            )
            room = 2.0**-24 * (count + 4) * size + 1e-30
            _sums(found[2], grad_point, room, f"fake_quantize_learnable's gradient of the zero point on {device}")


def second_derivative(d, y, leaf, g, grad, device):
    """Right, or refused; never silently missing."""
    d.tags.add("second derivative")
    given = g.detach().requires_grad_()
    (found,) = torch.autograd.grad(y, leaf, given, create_graph=True)
    check(
        found.requires_grad,
        f"fake_quantize_learnable on {device}: expected a second derivative or an error, got neither",
    )
    try:
        (again,) = torch.autograd.grad(found, given, g, allow_unused=True)
    except NotImplementedError:
        return
    check(again is not None, f"fake_quantize_learnable on {device}: the second derivative is silently missing")
    same(again, grad, f"fake_quantize_learnable's second derivative on {device}")


def _sums(found, expected, room, what):
    """Sums of float32: those beyond its range, and of NaN, are not compared."""
    fair = expected.isfinite() & room.isfinite() & (expected.abs() + room < 1e37)
    fair &= found.cpu().isfinite() | (expected.abs() < 1e30)
    close(
        torch.where(fair, found.detach().cpu().double(), 0.0),
        torch.where(fair, expected, 0.0),
        torch.where(fair, room, 1.0),
        what,
    )


@drawn("quantize", "quantize.nearest", "quantize.seeded")
def quantize(d: Draw):
    x, scale, zero_point, low, high = operands(d)
    types = [t for t in (torch.int8, torch.uint8, torch.int16, torch.int32) if _holds(t, low, high)]
    dtype, seed, offset = d.choice(types), d.choice((0, -1, d.getrandbits(63))), d.choice((0, 1, d.getrandbits(62)))
    nearest = reference.codes(reference.unclamped_code(x, scale, zero_point), zero_point, low, high, dtype)
    drawn_codes = None
    if d.chance(0.5):
        uniform = reference.uniforms(seed, offset, torch.empty_like(x))
        drawn_codes = reference.stochastic_codes(x, scale, zero_point, low, high, dtype, uniform)
    keep = []
    for device in d.devices:
        cx, cs, cz = (d.on(device, t) for t in (x, scale, zero_point))
        found = ops.quantize(cx, cs, cz, quant_min=low, quant_max=high, dtype=dtype)
        same(found, nearest, f"quantize on {device}")
        check(found.stride() == torch.empty_like(x).stride(), f"quantize on {device}: expected the input's strides")
        keep.append(found)
        if hasattr(ops.quantize, "nearest"):
            again = ops.quantize.nearest(cx, cs, cz, quant_min=low, quant_max=high, dtype=named(dtype))
            same(again, nearest, f"quantize.nearest on {device}")
        if d.chance(0.2):
            stochastic(cx, cs, cz, low, high, dtype, device)
        if drawn_codes is not None:
            random = ops.quantize.seeded(
                cx, cs, cz, quant_min=low, quant_max=high, dtype=dtype, seed=seed, offset=offset
            )
            same(random, drawn_codes, f"quantize.seeded(seed={seed}, offset={offset}) on {device}")


def stochastic(x, scale, zero_point, low, high, dtype, device):
    """Of the device's generator: a code next to the value, and the same codes again from the same seed."""
    codes = []
    for _ in range(2):
        torch.manual_seed(7)
        codes.append(
            ops.quantize(x, scale, zero_point, quant_min=low, quant_max=high, dtype=dtype, stochastic=True).cpu()
        )
    same(codes[1], codes[0], f"quantize on {device}: the same seed")
    x, scale, zero_point = (None if t is None else t.cpu() for t in (x, scale, zero_point))
    value = x.float() * (1.0 / reference.expand(scale, x).float())
    point = reference.expand(zero_point, x).float()
    ends = [reference.codes(end + point, zero_point, low, high, torch.int32) for end in (value.floor(), value.ceil())]
    right = ((codes[0].int() == ends[0]) | (codes[0].int() == ends[1])).all()
    check(bool(right), f"quantize on {device}, stochastic: expected a code next to the value")


def _holds(dtype, low, high):
    info = torch.iinfo(dtype)
    return info.min <= low and high <= info.max


@drawn("dequantize", "dequantize.typed")
def dequantize(d: Draw):
    code_type = d.choice((torch.int8, torch.uint8, torch.int16, torch.int32))
    x, scale, zero_point, low, high = operands(d, code_type)
    out = d.choice(FLOATS)
    # What another program stored may have any zero point and scale, a NaN too.
    value = (x.float() - reference.expand(zero_point, x).float()) * reference.expand(scale, x).float()
    expected = value.expand(x.shape).to(out)
    for device in d.devices:
        cx, cs, cz = (d.on(device, t) for t in (x, scale, zero_point))
        found = ops.dequantize(cx, cs, cz, dtype=out)
        same(found, expected, f"dequantize on {device}")
        if hasattr(ops.dequantize, "typed"):
            same(ops.dequantize.typed(cx, cs, cz, dtype=named(out)), expected, f"dequantize.typed on {device}")
        check(found.stride() == torch.empty_like(x).stride(), f"dequantize on {device}: expected the input's strides")


@drawn("pack_int4", "unpack_int4")
def pack_int4(d: Draw):
    signed = d.chance(0.5)
    shape = d.shape(low=1)
    codes = d.integers(shape, -8 if signed else 0, 7 if signed else 15, torch.int8 if signed else torch.uint8)
    d.notes["input"] = codes
    packed = reference.pack_int4(codes)
    for device in d.devices:
        found = ops.pack_int4(d.on(device, codes))
        same(found, packed, f"pack_int4 on {device}")
        back = ops.unpack_int4(found, size=shape[-1], signed=signed)
        same(back, codes.contiguous(), f"unpack_int4 on {device}")
    strided = d.integers(list(packed.shape), 0, 255, torch.uint8)
    for device in d.devices:
        found = ops.unpack_int4(d.on(device, strided), size=shape[-1], signed=signed)
        same(found, reference.unpack_int4(strided, shape[-1], signed), f"unpack_int4 of other strides on {device}")
