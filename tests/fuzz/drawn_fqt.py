"""Drawn tests of the layers that quantize their gradients: PyTorch's outputs, gradients of the stated draws."""

import torch
import torch.nn.functional as F
from draw import Draw, check, close, drawn, same

ops = torch.ops.quantrain
QUANTIZERS = ("none", "none", "per_tensor", "per_sample", "per_channel", "householder")
EPSILON = {torch.float64: 2.0**-48, torch.float32: 2.0**-19, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


def quantizers(d: Draw, dtype, rows):
    """Keywords of both quantizers; float64 takes none."""
    result = {}
    for side in ("grad_input", "grad_weight"):
        result[side] = d.choice(QUANTIZERS) if dtype != torch.float64 else "none"
        result[f"{side}_bits"], result[f"{side}_rows"] = d.randint(2, 8), d.choice(rows)
        result[f"{side}_max_group"] = d.choice((3, 7, 128))
        result[f"{side}_preserve_zero"] = result[side] in ("per_sample", "per_channel") and d.chance(0.3)
    d.notes |= result
    return result


def draw_of(keywords, side, grad):
    """One draw of the default generator."""
    if keywords[side] == "none" or grad.numel() == 0:
        return grad
    names = ("rows", "max_group", "preserve_zero")
    return ops.quantize_gradient(
        grad, keywords[f"{side}_bits"], keywords[side], **{n: keywords[f"{side}_{n}"] for n in names}
    )


def leaves_of(d: Draw, device, tensors):
    return [None if t is None else d.on(device, t).detach().requires_grad_() for t in tensors]


def backward(d: Draw, y, leaves, g, seed):
    torch.manual_seed(seed)
    return torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], g)


def compare(found, expected, size, dtype, count, what):
    """A product of `count` terms in another order of summation, then rounded to the type."""
    check(found.dtype == dtype and found.shape == expected.shape, f"{what}: expected {dtype} of {list(expected.shape)}")
    room = (EPSILON[dtype] + (count + 4) * 2.0**-23 * (dtype != torch.float64)) * size.cpu() + 1e-30
    room = room + (2.0**-23 if dtype == torch.float16 else 0.0)
    fair = expected.cpu().abs() + room < torch.finfo(dtype).max * 0.9
    close(
        torch.where(fair, found.detach().cpu().double(), 0.0),
        torch.where(fair, expected.cpu().double(), 0.0),
        torch.where(fair, room, 1.0),
        what,
    )


@drawn("fqt_linear")
def fqt_linear(d: Draw):
    dtype, k, outputs = (
        d.choice((torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)),
        d.size(),
        d.size(),
    )
    kind = d.choice(("normal", "normal", "heavy", "zero"))
    x = d.tensor([*d.shape(high=3, cap=100), k], dtype, kind)
    weight = d.tensor([outputs, k], dtype, "normal")
    bias = d.tensor([outputs], dtype, "normal") if d.chance(0.5) else None
    keywords = quantizers(d, dtype, ("token", "sample"))
    g = d.tensor([*x.shape[:-1], outputs], dtype, "normal")
    d.notes |= {"input": x, "weight": weight, "bias": bias, "grad": g}
    seed = d.getrandbits(31)
    for device in d.devices:
        leaves = leaves_of(d, device, (x, weight, bias))
        cx, cw, cb = (None if leaf is None else leaf.detach() for leaf in leaves)
        cg = d.on(device, g)
        y = ops.fqt_linear(*leaves, **keywords)
        same(y.detach().cpu(), F.linear(cx, cw, cb).cpu(), f"fqt_linear on {device}")
        found = backward(d, y, leaves, cg, seed)
        torch.manual_seed(seed)
        first, second = (draw_of(keywords, side, cg).double() for side in ("grad_input", "grad_weight"))
        rows, columns = second.reshape(-1, outputs), cx.double().reshape(-1, k)
        what = f"fqt_linear's gradient of the {{}} on {device}"
        compare(found[0], first @ cw.double(), first.abs() @ cw.double().abs(), dtype, outputs, what.format("input"))
        compare(found[1], rows.t() @ columns, rows.abs().t() @ columns.abs(), dtype, len(rows), what.format("weight"))
        if bias is not None:
            whole = cg.double().reshape(-1, outputs)
            compare(found[2], whole.sum(0), whole.abs().sum(0), dtype, len(rows), what.format("bias"))


@drawn("fqt_conv2d", "fqt_conv2d.padding")
def fqt_conv2d(d: Draw):
    dtype, groups = d.choice((torch.float32, torch.float32, torch.float64)), d.choice((1, 1, 2, 3))
    channels, outputs = groups * d.randint(1, 6), groups * d.randint(1, 6)
    kernel, dilation = [d.randint(1, 4), d.randint(1, 4)], [d.choice((1, 1, 2)) for _ in range(2)]
    named = d.chance(0.3)
    padding = d.choice(("same", "valid")) if named else [d.randint(0, 3), d.randint(0, 3)]
    stride = [1, 1] if padding == "same" else [d.randint(1, 3), d.randint(1, 3)]
    least = [m * (k - 1) + 1 for k, m in zip(kernel, dilation, strict=True)]
    batch = [] if d.chance(0.15) else [d.randint(1, 4)]
    x = d.tensor([*batch, channels, *(least[i] + d.randint(0, 8) for i in range(2))], dtype, "normal")
    weight = d.tensor([outputs, channels // groups, *kernel], dtype, "normal")
    # Of a weight in other strides, as (9, 1, 3, 3), and of channels_last tensors with one pixel in a row or dilated, PyTorch 2.11's own
    # convolution crashes or is wrong on the CPU.
    weight = weight.contiguous(memory_format=d.choice((torch.contiguous_format, torch.channels_last)))
    if 1 in (*kernel, *x.shape[-2:]) or dilation != [1, 1]:
        x, weight = x.contiguous(), weight.contiguous()
    bias = d.tensor([outputs], dtype, "normal") if d.chance(0.5) else None
    keywords = quantizers(d, dtype, ("sample",))
    where = (stride, padding, dilation, groups)
    d.notes |= {"input": x, "weight": weight, "bias": bias, "stride, padding, dilation, groups": where}
    operator = ops.fqt_conv2d.padding if named else ops.fqt_conv2d.default
    seed, shape = d.getrandbits(31), F.conv2d(x, weight, bias, *where).shape
    g = d.tensor(list(shape), dtype, "normal")
    size = [None if t is None else t.double().abs().contiguous().requires_grad_() for t in (x, weight, bias)]
    sizes64 = F.conv2d(*size, *where)
    for device in d.devices:
        leaves = leaves_of(d, device, (x, weight, bias))
        y = operator(*leaves, *where, **keywords)
        mirror = leaves_of(d, device, (x, weight, bias))
        plain = F.conv2d(*mirror, *where)
        count = weight[0].numel()
        compare(y, plain.detach(), sizes64.detach(), dtype, count, f"fqt_conv2d on {device}")
        check(y.stride() == plain.stride(), f"fqt_conv2d on {device}: expected the strides of conv2d")
        cg = d.on(device, g)
        found = backward(d, y, leaves, cg, seed)
        torch.manual_seed(seed)
        batched = cg if cg.dim() == 4 else cg.unsqueeze(0)
        draws = [draw_of(keywords, side, batched).view(cg.shape) for side in ("grad_input", "grad_weight")]
        for place, (name, draw) in enumerate(zip(("input", "weight", "bias"), (*draws, cg), strict=True)):
            if mirror[place] is None:
                continue
            (wanted,) = torch.autograd.grad(plain, mirror[place], draw, retain_graph=True)
            bound = draw.double().abs().cpu().contiguous()
            (room,) = torch.autograd.grad(sizes64, size[place], bound, retain_graph=True)
            terms = shape.numel() if place else outputs * kernel[0] * kernel[1]
            compare(found[place], wanted, room, dtype, terms, f"fqt_conv2d's gradient of the {name} on {device}")
