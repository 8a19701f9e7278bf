"""Drawn tests of a convolution that keeps codes: fake_quantize and quantize bit for bit, PyTorch's conv2d."""

import torch
import torch.nn.functional as F
from draw import Draw, check, drawn, same, same_bits
from drawn_batch_norm import regular
from drawn_fake_quant import straight_through
from drawn_fqt import compare
from reference import fake_quant as rounding

ops = torch.ops.quantrain


def grid(d: Draw, dim):
    """(scale, zero_point or None, quant_min, quant_max) of one scale and codes of at most 8 bits."""
    low, high = d.range()
    while low < -128 or high > (255 if low >= 0 else 127):
        low, high = d.range()
    scale = d.scale(d.choice(([], [1], [1] * dim)), low, high)
    point = d.integers(list(scale.shape), low, high, torch.int32) if d.chance(0.5) else None
    d.notes |= {"scale": scale, "zero_point": point, "range": (low, high)}
    return scale, point, low, high


@drawn("fake_quantize_codes")
def fake_quantize_codes(d: Draw):
    x = d.tensor(d.shape(low=2), d.dtype())
    scale, point, low, high = grid(d, x.dim())
    d.notes["input"] = x
    code_type = torch.int8 if low < 0 else torch.uint8
    expected = rounding.fake_quantize(x, scale, point, low, high)
    codes = rounding.codes(rounding.unclamped_code(x, scale, point), point, low, high, code_type)
    inside = rounding.inside(x, scale, point, low, high)
    g = d.tensor(list(x.shape), x.dtype, d.choice(("normal", "special")))
    grad = torch.where(inside, g, torch.zeros((), dtype=g.dtype))
    limits = {"quant_min": low, "quant_max": high}
    kept = []
    for device in d.devices:
        what = f"fake_quantize_codes on {device}"
        cx, cs, cp, cg = (d.on(device, t) for t in (x, scale, point, g))
        values, found = ops.fake_quantize_codes(cx, cs, cp, **limits)
        same(values, expected, what)
        same(found, codes, f"{what}: codes")
        same_bits(values, ops.fake_quantize(cx, cs, cp, **limits).cpu(), f"{what} and fake_quantize")
        same_bits(found, ops.quantize(cx, cs, cp, **limits, dtype=code_type).cpu(), f"{what} and quantize")
        regular(values, what)
        check(found.stride() == values.stride(), f"{what}: expected codes of the result's strides")

        def run(leaf, cs=cs, cp=cp, what=what):
            values, again = ops.fake_quantize_codes(leaf, cs, cp, **limits)
            check(not again.requires_grad, f"{what}: expected codes without a gradient")
            same(again, codes, f"{what}: codes with a gradient")
            return values

        kept.append((values, found, straight_through(d, run, cx, cg, expected, grad, what)))
        if d.chance(0.4):
            learned(d, (cx, cs, cp, cg), limits, expected, codes, what)
    for one, other in zip(kept[-1], kept[0], strict=True):
        same_bits(one, other, "fake_quantize_codes on CPU and CUDA")


def learned(d: Draw, tensors, limits, expected, codes, what):
    """With a scale that requires a gradient: fake_quantize_learnable's, to the bit."""
    x, scale, point, g = tensors
    factor, needs_input = d.choice((1.0, 0.25, 0.0123)), d.chance(0.7)
    d.notes |= {"grad_factor": factor, "gradient of input": needs_input}
    x, scale = x.detach().requires_grad_(needs_input), scale.detach().requires_grad_()
    limits = limits | {"grad_factor": factor}
    values, again = ops.fake_quantize_codes(x, scale, point, **limits)
    check(not again.requires_grad, f"{what}: expected codes without a gradient")
    same(values.detach(), expected, f"{what} with a learned scale")
    same(again, codes, f"{what}: codes with a learned scale")
    plain = ops.fake_quantize_learnable(x, scale, point, **limits)
    leaves = [x, scale] if needs_input else [scale]
    found, wanted = (torch.autograd.grad(y, leaves, g) for y in (values, plain))
    for name, one, want in zip(("scale", "input"), found[::-1], wanted[::-1], strict=False):
        same(one, want.cpu(), f"{what}: gradient of {name} with a learned scale")


def images(d: Draw):
    """(codes, scale, zero_point or None, weight, bias or None, (stride, padding, dilation, groups), dtype)."""
    groups = d.choice((1, 1, 2, 3))
    channels, outputs = groups * d.randint(1, 6), groups * d.randint(1, 6)
    kernel, dilation = [d.randint(1, 4), d.randint(1, 4)], [d.choice((1, 1, 2)) for _ in range(2)]
    dtype = d.choice((torch.float32, torch.float32, torch.float16, torch.bfloat16))
    if dtype == torch.bfloat16:  # PyTorch 2.11's own convolution dies of some dilated ones on the CPU
        dilation = [1, 1]
    padding, stride = ([d.randint(low, 3) for _ in range(2)] for low in (0, 1))
    least = [m * (k - 1) + 1 for k, m in zip(kernel, dilation, strict=True)]
    code_type = d.choice((torch.int8, torch.uint8))
    low, high = (-128, 127) if code_type == torch.int8 else (0, 255)
    shape = [d.randint(1, 4), channels, *(n + d.randint(0, 8) for n in least)]
    codes = d.integers(shape, low, high, code_type)
    weight = d.tensor([outputs, channels // groups, *kernel], dtype, "normal")
    # Of channels_last tensors with one pixel in a row or dilated, PyTorch 2.11's own convolution is wrong on the CPU.
    if 1 in (*kernel, *shape[-2:]) or dilation != [1, 1]:
        codes, weight = codes.contiguous(), weight.contiguous()
    bias = d.tensor([outputs], dtype, "normal") if d.chance(0.5) else None
    scale = torch.full(d.choice(([], [1], [1] * 4)), d.choice((2.0**-7, 0.02, 0.37)))
    point_type = d.choice((torch.int32, torch.int32, torch.int64, torch.uint8))
    point = d.integers(list(scale.shape), max(low, 0), high, point_type) if d.chance(0.6) else None
    where = (stride, padding, dilation, groups)
    d.notes |= {"codes": codes, "scale": scale, "zero_point": point, "weight": weight, "bias": bias}
    d.notes["stride, padding, dilation, groups"] = where
    return codes, scale, point, weight, bias, where, dtype


def leaves_of(d: Draw, device, tensors, needed):
    """On the device, those that are `needed` with requires_grad."""
    return [
        None if t is None else d.on(device, t).detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)
    ]


@drawn("quant_conv2d")
def quant_conv2d(d: Draw):
    codes, scale, point, weight, bias, where, dtype = images(d)
    values = ops.dequantize(codes, scale, point, dtype=dtype)
    if d.chance(0.3):  # the input and its codes need not lie alike
        other = d.choice((torch.contiguous_format, torch.channels_last))
        if codes.is_contiguous() and 1 not in (*weight.shape[2:], *codes.shape[-2:]) and where[2] == [1, 1]:
            values = values.contiguous(memory_format=other)
    needed = [d.chance(0.7) for _ in range(3)]
    tensors = (values, weight, bias)
    shape = list(F.conv2d(values, weight.contiguous(), bias, *where).shape)
    g = d.tensor(shape, dtype, "normal")
    d.notes |= {"input": values, "grad": g, "gradients of": needed}
    sizes = [None if t is None else t.double().abs().contiguous().requires_grad_() for t in tensors]
    sizes64 = F.conv2d(*sizes, *where)
    count = weight[0].numel()
    for device in d.devices:
        what = f"quant_conv2d on {device}"
        cc, cs, cp, cg = (d.on(device, t) for t in (codes, scale, point, g))
        # PyTorch 2.11's own convolution crashes, or is wrong, on the CPU with a weight of other strides.
        alike = [t if i != 1 or ordered(t) else t.contiguous() for i, t in enumerate(tensors)]
        mirror = leaves_of(d, device, alike, needed)
        plain = F.conv2d(*mirror, *where)
        ours = leaves_of(d, device, tensors, needed)
        y = ops.quant_conv2d(ours[0], cc, cs, cp, *ours[1:], *where)
        same(y.detach(), plain.detach().cpu(), what) if device == "cpu" else compare(
            y, plain.detach(), sizes64.detach(), dtype, count, what
        )
        check(y.stride() == plain.stride(), f"{what}: expected the strides of conv2d")
        wanting = [i for i, t in enumerate(ours) if t is not None and t.requires_grad]
        check(y.requires_grad == bool(wanting), f"{what}: expected a gradient where one is asked for")
        if not wanting:
            continue
        found = torch.autograd.grad(y, [ours[i] for i in wanting], cg, create_graph=d.chance(0.1))
        if found[0].requires_grad:
            refused(found[0], what)
        wanted = torch.autograd.grad(plain, [mirror[i] for i in wanting], cg)
        rooms = torch.autograd.grad(sizes64, [sizes[i] for i in wanting], g.double().abs().contiguous())
        for place, one, want, room in zip(wanting, found, wanted, rooms, strict=True):
            terms = g.numel() if place else shape[1] * weight[0, 0].numel()
            name = ("input", "weight", "bias")[place]
            compare(one.detach(), want, room, dtype, terms, f"{what}: gradient of {name}")


def ordered(weight):
    return any(weight.is_contiguous(memory_format=f) for f in (torch.contiguous_format, torch.channels_last))


def refused(gradient, what, op="quant_conv2d"):
    try:
        gradient.float().sum().backward()
    except NotImplementedError as error:
        check(f"{op}: expected one derivative" in str(error), f"{what}: a second derivative's error {error}")
    else:
        check(False, f"{what}: expected a second derivative to be refused, got none")
