"""Drawn tests of norms and activations that end in int8 rows: half a step, and float32's rounding, off float64."""

import torch
from draw import Draw, check, close, drawn, same
from reference import int8 as reference

ops = torch.ops.quantrain
KINDS = ("normal", "normal", "normal", "heavy", "zero", "constant", "ties", "not finite")


def operands(d: Draw):
    """(x, another of its shape and type, weight or None, bias or None, column factor or None)."""
    shape, kind = (
        [*d.shape(high=3, cap=d.choice((4, 40))), d.size() if d.chance(0.9) else d.choice((200, 1000, 1030))],
        d.choice(KINDS),
    )
    dtype = d.dtype()
    x, other = (d.tensor(shape, dtype, "special" if kind == "not finite" else kind) for _ in range(2))
    parameter = d.choice((dtype, torch.float32))
    weight, bias = (d.tensor([shape[-1]], parameter, "normal") if d.chance(0.6) else None for _ in range(2))
    # At most 1: what a result is off is not made larger.
    factor = d.integers([shape[-1]], 1, 32, torch.int32).float() / 32 if d.chance(0.4) else None
    d.notes |= {"input": x, "weight": weight, "bias": bias, "column_factor": factor}
    return x, other, weight, bias, factor


def with_factor(expected, factor):
    """The rows that are quantized."""
    return expected if factor is None else expected * factor.double()


def room_of(x, expected, noise):
    """What float32 may lose of the result's largest element."""
    absmax = expected.abs().amax(-1, keepdim=True)
    return (1e-4 if noise else 2e-5) * absmax + 4e-6  # CUDA's fast exponential and quotient too


def rows(found, expected, x, what, noise=None):
    """codes and scale of rows `expected` [..., K] in float64. `noise` [..., 1]: more that a row may be off."""
    codes, scale = found[0].cpu(), found[1].cpu()
    check(
        codes.dtype == torch.int8 and codes.shape == expected.shape and codes.is_contiguous(),
        f"{what}: expected int8 codes of the input's shape",
    )
    check(
        scale.dtype == torch.float32 and list(scale.shape) == [*expected.shape[:-1], 1],
        f"{what}: expected a float32 scale a row",
    )
    if expected.numel() == 0:
        return
    absmax = expected.abs().amax(-1, keepdim=True)
    bad = ~absmax.isfinite()
    known = bad | (absmax < 1e37)  # beyond, float32 may overflow; so may the squares of a norm
    if noise is not None:
        known &= ~noise.isinf() | ~x.double().abs().amax(-1, keepdim=True).isfinite()
    same(scale.isnan() & known, bad, f"{what}: NaN for a row that is not finite")
    check(bool((codes[scale.isnan().expand_as(codes)] == 0).all()), f"{what}: expected codes 0 beside a scale NaN")
    room = room_of(x, expected, noise is not None) + (0.0 if noise is None else noise)
    live = ~bad & known & (absmax > 2e-5) & (room < 0.2 * absmax) & (absmax > 1e-30)
    step = scale.double()
    close(
        torch.where(live, step * 127, 0.0),
        torch.where(live, absmax, 0.0),
        torch.where(live, room, 1.0),
        f"{what}: scale",
    )
    close(
        torch.where(live, codes.double() * step, 0.0),
        torch.where(live, expected, 0.0),
        torch.where(live, 0.501 * step + room, 1.0),
        what,
    )


def norm_noise(x, weight, eps, rms):
    """How far a float32 norm may be off: the rounding of a mean of large numbers, over their spread."""
    value = x.double()
    spread = value.square().mean(-1, keepdim=True) if rms else value.var(-1, unbiased=False, keepdim=True)
    largest = value.abs().amax(-1, keepdim=True)
    gain = 1.0 if weight is None else weight.double().abs().max()
    noise = 2.0**-19 * largest / (spread + eps).sqrt() * gain
    # Squares beyond float32, or of numbers so small that they vanish, are not compared.
    return torch.where((largest < 1e17) & ((largest > 1e-15) | (largest == 0)), noise, torch.inf)


@drawn("int8_layer_norm", "int8_rms_norm")
def int8_norms(d: Draw):
    x, _, weight, bias, factor = operands(d)
    eps = d.choice((1e-5, 1e-6, 0.1))
    layer, rms = reference.layer_norm(x, weight, bias, eps), reference.rms_norm(x, weight, eps)
    noise = [norm_noise(x, weight, eps, r) for r in (False, True)]
    for device in d.devices:
        cx, cw, cb, cf = (d.on(device, t) for t in (x, weight, bias, factor))
        for name, found, expected, off in (
            ("int8_layer_norm", ops.int8_layer_norm(cx, cw, cb, eps, column_factor=cf), layer, noise[0]),
            ("int8_rms_norm", ops.int8_rms_norm(cx, cw, eps, column_factor=cf), rms, noise[1]),
        ):
            rows(found, with_factor(expected, factor), x, f"{name} on {device}", off)


@drawn("int8_add_layer_norm", "int8_add_rms_norm")
def int8_add_norms(d: Draw):
    x, residual, weight, bias, factor = operands(d)
    eps, post_norm = d.choice((1e-5, 0.1)), d.chance(0.5)
    summed = reference.add(x, residual)
    layer, rms = reference.layer_norm(summed, weight, bias, eps), reference.rms_norm(summed, weight, eps)
    d.notes |= {"residual": residual, "post_norm": post_norm}
    for device in d.devices:
        cx, cr, cw, cb, cf = (d.on(device, t) for t in (x, residual, weight, bias, factor))
        for expected, found, is_rms in (
            (layer, ops.int8_add_layer_norm(cx, cr, cw, cb, eps, post_norm=post_norm, column_factor=cf), False),
            (rms, ops.int8_add_rms_norm(cx, cr, cw, eps, post_norm=post_norm, column_factor=cf), True),
        ):
            what = f"int8_add_{'rms' if is_rms else 'layer'}_norm on {device}"
            noise = norm_noise(summed, weight, eps, is_rms)
            rows(found, with_factor(expected, factor), summed, what, noise)
            carried = found[2].cpu()
            if not post_norm:
                same(carried, summed, f"{what}: carried")
                continue
            check(
                carried.dtype == x.dtype and carried.shape == x.shape, f"{what}: expected carried of the input's type"
            )
            if x.numel():
                room = room_of(summed, expected, True) + noise + torch.finfo(x.dtype).eps * expected.abs()
                fair = expected.isfinite() & room.isfinite() & (expected.abs() < torch.finfo(x.dtype).max * 0.9)
                close(
                    torch.where(fair, carried.double(), 0.0),
                    torch.where(fair, expected, 0.0),
                    torch.where(fair, room, 1.0),
                    f"{what}: carried",
                )


def halves(x, up):
    """Gate and up as a product gives them: one tensor's halves."""
    whole = torch.cat([x, up], -1)
    return whole[..., : x.shape[-1]], whole[..., x.shape[-1] :]


@drawn("int8_gelu", "int8_silu_mul", "int8_relu")
def int8_activations(d: Draw):
    x, up, _, _, factor = operands(d)
    if d.chance(0.3):
        x, up = halves(x, up)
        d.notes |= {"halves": True}
    if bool((x < -1e30).any()):
        d.tags.add("far from zero")
    approximate = d.choice(("none", "tanh"))
    gelu, silu, relu = reference.gelu(x, approximate), reference.silu_mul(x, up), reference.relu(x)
    for device in d.devices:
        cx, cu, cf = (d.on(device, t) for t in (x, up, factor))
        for name, found, expected in (
            (f"int8_gelu({approximate})", ops.int8_gelu(cx, approximate=approximate, column_factor=cf), gelu),
            ("int8_relu", ops.int8_relu(cx, column_factor=cf), relu),
            ("int8_silu_mul", ops.int8_silu_mul(cx, cu, column_factor=cf), silu),
        ):
            rows(found, with_factor(expected, factor), x, f"{name} on {device}")
