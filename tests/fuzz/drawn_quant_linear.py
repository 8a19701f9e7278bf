"""Drawn tests of a linear layer that keeps codes: PyTorch's linear, with its gradients."""

import torch
import torch.nn.functional as F
from draw import Draw, check, drawn, same
from drawn_fqt import compare
from drawn_quant_conv import leaves_of, refused

ops = torch.ops.quantrain


@drawn("quant_linear")
def quant_linear(d: Draw):
    dtype, columns, outputs = d.dtype(), d.size(), d.size()
    shape = [*d.shape(high=3, cap=100, empty=0.04), columns]
    code_type = d.choice((torch.int8, torch.uint8))
    low, high = (-128, 127) if code_type == torch.int8 else (0, 255)
    codes = d.integers(shape, low, high, code_type)
    weight = d.tensor([outputs, columns], dtype, d.choice(("normal", "normal", "heavy", "zero")))
    bias = d.tensor([outputs], dtype, "normal") if d.chance(0.5) else None
    of_scale = d.choice(([], [1], [1] * len(shape), [*shape[:-1], 1]))
    scale = d.integers(of_scale, 1, 64, torch.int32).float() * d.choice((2.0**-11, 0.0017))
    point_type = d.choice((torch.int32, torch.int32, torch.int64, torch.uint8))
    point = d.integers(of_scale, max(low, 0), high, point_type) if d.chance(0.5) else None
    values = ops.dequantize(codes, scale, point, dtype=dtype)
    if d.chance(0.3):  # the input and its codes need not lie alike
        values = values.contiguous()
    needed, tensors = [d.chance(0.7) for _ in range(3)], (values, weight, bias)
    g = d.tensor([*shape[:-1], outputs], dtype, "normal")
    cast = dtype == torch.float32 and d.chance(0.2)  # under autocast
    d.notes |= {"codes": codes, "scale": scale, "zero_point": point, "input": values, "weight": weight, "bias": bias}
    d.notes |= {"grad": g, "gradients of": needed, "autocast": cast}
    kind = torch.bfloat16 if cast else dtype
    groups = 0
    if d.chance(0.4) and columns > 0 and weight.numel() > 0 and not cast:  # the weight is rounded by the operator
        groups = d.choice([n for n in range(1, columns + 1) if columns % n == 0])
    least, most = d.choice(((-128, 127), (-8, 7), (-127, 127)))
    rounding = {"weight_groups": groups, "weight_min": least, "weight_max": most}
    d.notes |= rounding
    if groups:
        limits = {"quant_min": least, "quant_max": most}
        tensors = (values, ops.fake_quantize_dynamic(weight, [outputs, groups], **limits).contiguous(), bias)
    sizes = [None if t is None else t.double().abs().contiguous().requires_grad_() for t in tensors]
    sizes64 = F.linear(*sizes)
    exact = [None if t is None else t.to(kind).double().contiguous().requires_grad_() for t in tensors]
    exact64 = F.linear(*exact)
    given = g.to(kind)
    for device in d.devices:
        what = f"quant_linear on {device}"
        cc, cs, cp, cg = (d.on(device, t) for t in (codes, scale, point, given))
        ours = leaves_of(d, device, (values, weight, bias), needed)
        product = [None if t is None else d.on(device, t) for t in tensors]
        with torch.autocast(device, torch.bfloat16, enabled=cast):
            y = ops.quant_linear(ours[0], cc, cs, cp, *ours[1:], **rounding)
            # without gradients: PyTorch's own product goes another way where a strided input's weight requires one
            plain = F.linear(*product)
        same(y.detach(), plain.cpu(), what)
        check(y.stride() == plain.stride(), f"{what}: expected the strides of linear")
        compare(y, exact64.detach(), sizes64.detach(), kind, columns, what)
        wanting = [i for i, t in enumerate(ours) if t is not None and t.requires_grad]
        check(y.requires_grad == bool(wanting), f"{what}: expected a gradient where one is asked for")
        if not wanting:
            continue
        found = torch.autograd.grad(y, [ours[i] for i in wanting], cg, create_graph=d.chance(0.1))
        if found[0].requires_grad:
            refused(found[0], what, "quant_linear")
        wanted = torch.autograd.grad(exact64, [exact[i] for i in wanting], given.double(), retain_graph=True)
        rooms = torch.autograd.grad(
            sizes64, [sizes[i] for i in wanting], given.double().abs().contiguous(), retain_graph=True
        )
        for place, one, want, room in zip(wanting, found, wanted, rooms, strict=True):
            name, tensor = ("input", "weight", "bias")[place], tensors[place]
            check(one.dtype == tensor.dtype, f"{what}: expected gradients of the tensors' types")
            terms = outputs if place == 0 else max(1, y.numel() // outputs)
            compare(one.detach().to(kind), want, room, kind, terms, f"{what}: gradient of {name}")
