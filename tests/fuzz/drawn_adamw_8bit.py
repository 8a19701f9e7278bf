"""Drawn tests of the adamw_8bit family: block-wise codes, and steps over lists."""

import torch
from draw import FLOATS, Draw, check, close, drawn, in_memory, same, same_bits
from reference import adamw_8bit as reference
from reference import amp
from reference.gradient_quant import philox4x32_10

ops = torch.ops.quantrain


def contiguous(x):
    return x.contiguous().reshape(-1)


@drawn("quantize_8bit_blockwise")
def quantize(d: Draw):
    x, signed = d.tensor(d.shape(), d.dtype()), d.chance(0.5)
    d.notes |= {"signed": signed, "input": x}
    expected, scale = reference.encode(contiguous(x).float(), signed)
    codes, found_scale = ops.quantize_8bit_blockwise(x, signed=signed)
    same(found_scale, scale, "scale")
    check(codes.shape == x.shape and codes.is_contiguous(), "codes: expected the input's shape, contiguous")
    # x times the inverse of the scale is x over the scale but for two roundings: at a midpoint another code is as near.
    table = reference.dynamic_map(signed).double()
    flat = codes.reshape(-1).long()
    between = (table[expected] + table[flat]) / 2
    r = contiguous(x).double() / reference.spread(scale, x.numel()).double()
    near = (r - between).abs() <= 3e-7 * between.abs()
    check(bool(((flat == expected) | near).all()), "codes: expected the nearest")
    for device in d.devices[1:]:
        on = ops.quantize_8bit_blockwise(d.on(device, x), signed=signed)
        same_bits(on[0], codes, f"codes on {device}")
        same_bits(on[1], found_scale, f"scale on {device}")


@drawn("dequantize_8bit_blockwise")
def dequantize(d: Draw):
    codes, signed = d.integers(d.shape(), 0, 255, torch.uint8), d.chance(0.5)
    blocks = -(-codes.numel() // 256)
    scale = d.tensor([blocks], torch.float32, d.choice(("normal", "special", "zero")))
    d.notes |= {"signed": signed, "codes": codes, "scale": scale}
    expected = reference.decode(contiguous(codes), scale, signed).view(codes.shape)
    for device in d.devices:
        found = ops.dequantize_8bit_blockwise(d.on(device, codes), d.on(device, scale), signed=signed)
        same(found, expected, f"values on {device}")


def like(d: Draw, tensor, dtype, fill=None):
    """Of that shape, in its memory's order or another; no element lies in memory twice."""
    result = torch.empty_like(tensor, dtype=dtype)
    if tensor.dim() > 1 and d.chance(0.2):
        result = torch.empty_like(tensor.contiguous(), dtype=dtype)
    return result if fill is None else result.copy_(fill)


def lists(d: Draw, dtypes):
    """(params, grads, m, m_scale, v, v_scale, steps) of a few parameters, some with moments in 32 bits."""
    result = [[] for _ in range(7)]
    for _ in range(d.randint(1, 4)):
        p = d.tensor(d.shape(cap=d.choice((5, 300, 3000))), d.choice(dtypes), "normal", expanded=False)
        n, blocks, codes = p.numel(), -(-p.numel() // 256), d.chance(0.7)
        g = d.tensor(list(p.shape), d.choice(FLOATS), d.choice(("normal", "heavy", "zero")), expanded=False)
        if codes:
            m, v = (
                like(d, p, torch.uint8, d.integers(list(p.shape), low, 255, torch.uint8, expanded=False))
                for low in (0, 1)
            )
            scales = [d.values(blocks, "normal").abs() + 1e-3 for _ in range(2)]
        else:
            m, v = (like(d, p, torch.float32, d.values(n, "normal").abs().add_(1e-3).view(p.shape)) for _ in range(2))
            scales = [torch.zeros(0), torch.zeros(0)]
        step = torch.tensor(float(d.choice((0, 1, 7, 1000))))
        for values, one in zip(result, (p, g, m, scales[0], v, scales[1], step), strict=True):
            values.append(one)
    d.notes["list"] = [
        f"{p.dtype} {list(p.shape)} {p.stride()} {m.dtype}" for p, m in zip(*result[::2][:2], strict=True)
    ]
    return result


def copies(tensors, device):
    """With their strides and offsets, in memory of their own."""
    return [
        torch.empty(0, dtype=t.dtype)
        .set_(t.untyped_storage())
        .to(device, copy=True)
        .as_strided(t.shape, t.stride(), t.storage_offset())
        for t in tensors
    ]


def options(d: Draw):
    return {
        "beta1": d.choice((0.9, 0.0, 0.95)),
        "beta2": d.choice((0.999, 0.95)),
        "eps": d.choice((1e-8, 1e-6, 1e-3)),
        "weight_decay": d.choice((0.0, 0.01, 0.5)),
    }


def flat_of(x, p):
    """x in the order of p's memory: that of a dense tensor like p."""
    placed = torch.empty_like(p, dtype=x.dtype)
    return in_memory(placed.copy_(x))


@drawn("adamw_8bit_")
def step(d: Draw):
    before, numbers, lr = lists(d, FLOATS), options(d), d.choice((1e-3, 0.0, 0.1))
    scale = d.choice((None, 1.0, 1024.0, 3.0))
    skip = d.choice((None, 0.0, 0.0, 1.0))
    d.notes |= numbers | {"lr": lr, "grad_scale": scale, "found_inf": skip}
    results = []
    for device in d.devices:
        mine = [copies(tensors, device) for tensors in before]
        scalars = {
            name: None if value is None else torch.tensor(value, device=device)
            for name, value in (("lr", lr), ("grad_scale", scale), ("found_inf", skip))
        }
        ops.adamw_8bit_(*mine, **scalars, **numbers)
        results.append(mine)
    for name, first, *others in zip(["p", "g", "m", "m_scale", "v", "v_scale", "step"], *results, strict=True):
        for other in others:
            for a, b in zip(first, other, strict=True):
                same_bits(b, a, f"{name} on {d.device}")
    for i, (p, g, m, m_scale, v, v_scale, t) in enumerate(zip(*before, strict=True)):
        found = [tensors[i] for tensors in results[0]]
        if skip:
            for one, was in zip(found, (p, g, m, m_scale, v, v_scale, t), strict=True):
                same(one, was, "a step that is skipped")
            continue
        codes = m.dtype == torch.uint8
        one = reference.Adam(flat_of(p, p), 8 if codes else 32, lr=float(torch.tensor(lr)), betas=(numbers["beta1"], numbers["beta2"]),
                             eps=numbers["eps"], weight_decay=numbers["weight_decay"], steps=int(t))  # fmt: skip
        for field, moment, factor, signed in (("m", m, m_scale, True), ("v", v, v_scale, False)):
            flat = flat_of(moment, p)
            setattr(one, field, reference.decode(flat, factor.double(), signed) if codes else flat.double())
        one.step(flat_of(g, p).double() / (scale or 1.0))
        spacing = torch.finfo(p.dtype).eps / 2
        least = {torch.float32: 2.0**-140, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-130}[p.dtype]
        room = (spacing + 2.0**-22) * (one.param.abs() + one.moved.abs()) + 4e-6 * one.moved.abs() + least
        close(flat_of(found[0], p), one.param, room, f"parameter {i}")
        check(float(found[6]) == float(t) + 1, "steps: expected one more")
        if codes:
            close(found[3], one.m_scale, 1e-5 * one.m_scale.abs() + 1e-30, f"scale of exp_avg {i}")
            close(found[5], one.v_scale, 1e-5 * one.v_scale.abs() + 1e-30, f"scale of exp_avg_sq {i}")
            for field, moment, wanted in (("exp_avg", found[2], one.m_codes), ("exp_avg_sq", found[4], one.v_codes)):
                away = (flat_of(moment, p).long() - wanted).abs()
                check(not bool((away > 1).any()), f"{field} {i}: expected the nearest codes, or their neighbours")
        check(found[1] is not None and torch.equal(found[1].nan_to_num(3.0), g.nan_to_num(3.0)), "gradients stay")


@drawn("adamw_8bit_.seeded")
def seeded(d: Draw):
    """The random numbers: what float32 would be, rounded with 16 bits of Philox for each element."""
    before, numbers = lists(d, (torch.bfloat16, torch.bfloat16, torch.float32)), options(d)
    seed, offset = d.getrandbits(63), d.choice((0, 4, d.getrandbits(60)))
    exact = [copies(tensors, "cpu") for tensors in before]
    exact[0] = [torch.empty_like(p, dtype=torch.float32).copy_(p) for p in exact[0]]
    ops.adamw_8bit_(*exact, lr=torch.tensor(1e-3), **numbers)
    expected, first = [], 0
    for p, wide in zip(before[0], exact[0], strict=True):
        n = p.numel()
        blocks = -(-n // 256)
        draws = torch.from_numpy(philox4x32_10(seed, offset, range(32 * first, 32 * (first + blocks))).astype("int64"))
        halves = torch.stack((draws << 16 & 0xFFFF0000, draws & 0xFFFF0000), -1).reshape(-1)[:n]
        words = torch.empty_like(p, dtype=torch.int64)
        in_memory(words).copy_(halves)
        expected.append(amp.round_stochastic(wide, words, torch.bfloat16) if p.dtype == torch.bfloat16 else wide)
        first += blocks
    for device in d.devices:
        mine = [copies(tensors, device) for tensors in before]
        ops.adamw_8bit_.seeded(*mine, lr=torch.tensor(1e-3, device=device), seed=seed, offset=offset, **numbers)
        for found, wanted in zip(mine[0], expected, strict=True):
            same(found, wanted, f"adamw_8bit_.seeded on {device}")
