"""Drawn tests of the gradient_quant family, for the same random bits as the oracle's."""

import torch
from draw import FLOATS, Draw, check, close, drawn, same, same_bits
from drawn_fake_quant import strides_kept
from reference import gradient_quant as reference

ops = torch.ops.quantrain
HOUSEHOLDER = "householder"


def operands(
    d: Draw, kinds=("normal", "normal", "normal", "heavy", "zero", "constant", "special", "finite", "subnormal")
):
    """(gradient, positional arguments, keywords)."""
    rows, quantizer = d.choice(("sample", "token")), d.choice(("per_tensor", "per_sample", "per_channel", HOUSEHOLDER))
    shape = d.shape(low=1, high=4, cap=d.choice((200, 200, 1500)), empty=0)
    grad = d.tensor(shape, d.dtype(), d.choice(kinds))
    if d.chance(0.3) and len(shape) > 1:  # rows of very different size, and rows of zeros
        grad = torch.empty_like(grad).copy_(grad)
        for _ in range(3):
            grad.select(0, d.randrange(shape[0])).mul_(d.choice((0.0, 0.0, 1e-3, 30.0)))
    keywords = {
        "rows": rows,
        "preserve_zero": quantizer in ("per_sample", "per_channel") and d.chance(0.4),
        "max_group": d.choice((3, 7, 128, 256)),
    }
    bits = d.randint(2, 8)
    d.notes |= {"grad": grad, "quantizer": quantizer, "bits": bits, **keywords}
    return grad, (bits, quantizer), keywords


def blocks_finite(x, quantizer):
    """bool, of the shape of the grid: whether each block is finite and its range too."""
    x = x.float()
    if quantizer == "per_tensor":
        low, high = x.amin().reshape(1, 1).clamp(max=0), x.amax().reshape(1, 1).clamp(min=0)
    else:
        dim = 0 if quantizer == "per_channel" else 1
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    return (high - low).isfinite()


@drawn(
    "quantize_gradient_codes",
    "quantize_gradient_codes.seeded",
    "dequantize_gradient",
    "quantize_gradient",
    "quantize_gradient.seeded",
)
def quantize_gradient(d: Draw):
    grad, (bits, quantizer), keywords = operands(d)
    x = reference.flatten(grad.contiguous(), keywords["rows"])
    seed, offset = d.choice((0, -1, d.getrandbits(63))), d.choice((0, 7, d.getrandbits(62)))
    u = reference.uniforms(seed, offset, *x.shape)
    out = d.choice(FLOATS)
    kept = []
    for device in d.devices:
        there = d.on(device, grad)
        found = ops.quantize_gradient_codes.seeded(there, bits, quantizer, **keywords, seed=seed, offset=offset)
        codes, scale, low, order, reflector = (t.cpu() for t in found)
        simulated = ops.quantize_gradient.seeded(there, bits, quantizer, **keywords, seed=seed, offset=offset)
        strides_kept(simulated, grad, f"quantize_gradient on {device}")
        check(
            simulated.dtype == grad.dtype and codes.dtype == torch.int8,
            f"quantize_gradient on {device}: expected the gradient's type",
        )
        values = ops.dequantize_gradient(*found, dtype=torch.float32)
        same(
            ops.dequantize_gradient(*found, dtype=out),
            values.to(out).cpu(),
            f"dequantize_gradient to {out} on {device}",
        )
        if quantizer == HOUSEHOLDER:
            householder(d, x, found, values, bits, u, device)
        else:
            finite = blocks_finite(x, quantizer)
            grid(x, bits, quantizer, keywords["preserve_zero"], finite, scale, low, device)
            wanted_codes, wanted = reference.round_to_grid(x, scale, low, bits, u)
            same(
                torch.where(finite, codes, 0),
                torch.where(finite, wanted_codes, 0),
                f"quantize_gradient_codes' codes on {device}",
            )
            same(values, torch.where(finite, wanted, torch.nan), f"quantize_gradient_codes' values on {device}")
            if grad.is_contiguous():
                _, wanted = reference.round_to_grid(x, scale, low, bits, u, grad.dtype)
                wanted = torch.where(finite, wanted.float(), torch.nan).to(grad.dtype)
                same(
                    reference.flatten(simulated.cpu(), keywords["rows"]),
                    wanted,
                    f"quantize_gradient.seeded on {device}",
                )
        nearest(d, there, x, bits, quantizer, keywords, device)
        kept.append((*found, values, simulated))
    for one, cpu in zip(kept[-1], kept[0], strict=True):
        same_bits(one, cpu, "quantize_gradient on CPU and CUDA")


def grid(x, bits, quantizer, preserve_zero, finite, scale, low, device):
    """Against the float64 grid; one block that is not finite gives NaN and no other."""
    same(scale.isnan(), ~finite, f"quantize_gradient's scale on {device}: NaN where a block is not finite")
    same(low.isnan(), ~finite, f"quantize_gradient's offset on {device}: NaN where a block is not finite")
    if not x.isfinite().all():
        return
    wanted, offset = reference.grid(x, bits, quantizer, preserve_zero)
    slack = 2.0**-22 * (x.double().abs().amax() + offset.abs()) + 2.0**-125
    live = finite & (wanted > slack) & (wanted < 1e36)
    close(
        torch.where(live, scale, 0),
        torch.where(live, wanted, 0.0),
        1e-6 * wanted.nan_to_num(0.0, 0.0) + slack,
        f"quantize_gradient's scale on {device}",
    )


def householder(d: Draw, x, found, values, bits, u, device):
    codes, scale, low, order, reflector = (t.cpu() for t in found)
    if not x.isfinite().all():
        return  # CPU against CUDA, by the caller
    plan, rows = reference.plan(x, d.notes["max_group"])
    ranges = (x.float().amax(1) - x.float().amin(1)).tolist()
    # Whether equal ranges are more than half a sum of them is for the last bit of the sum.
    distinct = len({r for r in ranges if r}) == len([r for r in ranges if r])
    if distinct and max(ranges) < 1e37:
        check(
            order.tolist() == plan.tolist(),
            lambda: f"quantize_gradient_codes' order on {device}: expected {plan.tolist()}, got {order.tolist()}",
        )
        close(reflector, rows, 4e-7 * rows.abs(), f"quantize_gradient_codes' reflector on {device}")
    reflected = ops._reflect_rows(d.on(device, x.float().contiguous()), found[3], found[4])
    wanted_codes, wanted = reference.dithered_code(reflected.cpu(), scale, low, bits, u)
    finite = (scale.isfinite() & low.isfinite()).expand(codes.shape)
    same(torch.where(finite, codes, 0), torch.where(finite, wanted_codes, 0), f"householder's codes on {device}")
    back = ops._reflect_rows(wanted.to(values.device), found[3], found[4], inverse=True)
    same(values, back.cpu(), f"householder's values on {device}")


def nearest(d: Draw, there, x, bits, quantizer, keywords, device):
    """stochastic=False: within half a step."""
    if quantizer == HOUSEHOLDER or not x.isfinite().all() or x.abs().max() > 1e30:
        return
    found = ops.quantize_gradient_codes(there, bits, quantizer, **keywords, stochastic=False)
    codes, scale, low = (t.cpu().double() for t in found[:3])
    room = scale / 2 + 2.0**-22 * (x.double().abs().amax() + low.abs()) + 2.0**-126
    close(codes * scale + low, x.double(), room, f"quantize_gradient_codes to nearest on {device}")


@drawn("_reflect_rows")
def reflect_rows(d: Draw):
    grad = d.tensor([d.randint(1, 70), d.randint(1, 40)], torch.float32, d.choice(("normal", "heavy")))
    max_group = d.choice((3, 7, 128, 256))
    *_, order, reflector = ops.quantize_gradient_codes.seeded(
        grad, 8, HOUSEHOLDER, max_group=max_group, seed=1, offset=0
    )
    columns = d.choice((0, 1, 3, grad.shape[1], d.randint(1, 70)))
    x = d.tensor([grad.shape[0], columns], torch.float32, d.choice(("normal", "heavy", "zero")))
    d.notes |= {"input": x, "rows from": grad, "max_group": max_group}
    forward, inverse = reference.dense(order, reflector)
    starts = reference.group_starts(reflector)
    longest = max((b - a for a, b in zip(starts, starts[1:], strict=False)), default=1)
    kept = []
    for device in d.devices:
        both = []
        for matrix, way in ((forward, False), (inverse, True)):
            found = ops._reflect_rows(d.on(device, x), d.on(device, order), d.on(device, reflector), inverse=way)
            size = matrix.abs() @ x.double().abs() + x.double().abs()
            room = 2.0**-23 * (longest + 8) * (size + (size.amax(0) if columns else 0.0)) + 1e-37
            close(found, matrix @ x.double(), room, f"_reflect_rows(inverse={way}) on {device}")
            check(found.is_contiguous(), f"_reflect_rows on {device}: expected a contiguous result")
            both.append(found)
        kept.append(both)
    for one, cpu in zip(kept[-1], kept[0], strict=True):
        same_bits(one, cpu, "_reflect_rows on CPU and CUDA")


@drawn("_quantize_gradient_both")
def quantize_gradient_both(d: Draw):
    grad, _, keywords = operands(d)
    rows, keeps, bits = keywords["rows"], [d.chance(0.4) for _ in "ab"], [d.randint(2, 8) for _ in "ab"]
    seed = d.getrandbits(31)
    d.notes |= {"bits of rows and columns": bits, "preserve_zero": keeps}
    for device in d.devices:
        there = d.on(device, grad)
        torch.manual_seed(seed)
        found = ops._quantize_gradient_both(there, bits[0], keeps[0], bits[1], keeps[1], rows=rows)
        torch.manual_seed(seed)
        for name, one, kind, k in zip(("rows", "columns"), found, ("per_sample", "per_channel"), (0, 1), strict=True):
            want = ops.quantize_gradient(there, bits[k], kind, rows=rows, preserve_zero=keeps[k])
            same_bits(one, want.cpu(), f"_quantize_gradient_both on {device}, by {name}")
            strides_kept(one, grad, f"_quantize_gradient_both on {device}")
