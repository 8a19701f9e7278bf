"""Drawn tests of the amp family: lists of gradients."""

import math

import torch
from draw import FLOATS, Draw, check, close, drawn, in_memory, same
from reference import amp as reference
from reference.gradient_quant import philox4x32_10

ops = torch.ops.quantrain


def gradients(d: Draw, dtypes=FLOATS):
    """A list of tensors of any layout; no element lies in memory twice."""
    kind = d.choice(("normal", "normal", "normal", "heavy", "special", "huge", "subnormal"))
    tensors = [
        d.tensor(d.shape(cap=d.choice((5, 300, 3000))), d.choice(dtypes), kind, expanded=False)
        for _ in range(d.randint(0, 5))
    ]
    d.notes["list"] = [f"{t.dtype} {list(t.shape)} {t.stride()}" for t in tensors]
    return tensors


def copies(d: Draw, device, tensors):
    """With their strides and offsets, in memory of their own."""
    if device != "cpu":
        return [d.on(device, t) for t in tensors]
    return [
        torch.empty(0, dtype=t.dtype)
        .set_(t.untyped_storage())
        .clone()
        .as_strided(t.shape, t.stride(), t.storage_offset())
        for t in tensors
    ]


@drawn("_amp_check_norm")
def amp_check_norm(d: Draw):
    grads, scale = gradients(d), d.choice((1.0, 65536.0, 3.7, 2.0**-10))
    max_norm = d.choice((None, 0.5, 10.0, 1e9))
    d.notes |= {"scale": scale, "max_norm": max_norm}
    bad, norm = reference.non_finite(grads), reference.norm(grads, scale)
    fair = not any(bad) and norm < 1e18  # beyond, the float32 sum of squares of a chunk overflows
    for device in d.devices:
        found_inf, found, grad_scale, non_finite = ops._amp_check_norm(
            [d.on(device, g) for g in grads], torch.tensor(scale, device=device), max_norm=max_norm
        )
        check(
            non_finite.tolist() == bad,
            lambda n=non_finite: f"_amp_check_norm's non_finite: expected {bad}, got {n.tolist()}",
        )
        check(
            found_inf.item() == float(any(bad)),
            "_amp_check_norm's found_inf: expected 1 where some tensor is not finite, else 0",
        )
        if any(bad):
            check(not math.isfinite(found.item()), "_amp_check_norm's norm: expected Inf or NaN")
        elif fair:
            room = 4e-6 * norm + 1e-22  # squares below 2^-149 are lost
            check(
                abs(found.item() - norm) <= room,
                f"_amp_check_norm's norm on {device}: expected {norm}, got {found.item()}",
            )
            wanted = scale / min(1.0, (max_norm or math.inf) / (norm + 1e-6))
            check(
                abs(grad_scale.item() - wanted) <= 8e-6 * wanted,
                f"_amp_check_norm's grad_scale on {device}: expected {wanted}, got {grad_scale.item()}",
            )


@drawn("_amp_scale_")
def amp_scale(d: Draw):
    grads, scale = gradients(d), d.choice((1.0, 65536.0, 3.7, 2.0**-10))
    norm, max_norm = d.choice((None, 0.3, 5.0, 1e4)), d.choice((None, 0.5, 10.0))
    d.notes |= {"scale": scale, "norm": norm, "max_norm": max_norm}
    clip = (
        1.0
        if norm is None or max_norm is None
        else min(1.0, float(torch.tensor(max_norm) / (torch.tensor(norm) + 1e-6)))
    )
    for device in d.devices:
        mine = copies(d, device, grads)
        norms = None if norm is None else torch.tensor(norm, device=device)
        ops._amp_scale_(mine, torch.tensor(scale, device=device), norms, max_norm=max_norm)
        for found, old in zip(mine, grads, strict=True):
            wanted = old.double() / scale * clip
            step = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[old.dtype]
            least = {torch.float32: 2.0**-148, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-132}[old.dtype]
            fair = ((old.double() / scale).abs() < 3.3e38) & (wanted.abs() < torch.finfo(old.dtype).max * 0.99)
            room = step * wanted.abs() + least
            close(
                torch.where(fair, found.cpu().double(), 0.0),
                torch.where(fair, wanted, 0.0),
                torch.where(fair, room, 1.0),
                f"_amp_scale_ on {device}",
            )
            check(
                bool((found.cpu().isnan() == old.isnan())[fair | old.isnan()].all()),
                f"_amp_scale_ on {device}: expected NaN where NaN was",
            )


@drawn("_amp_round_stochastic_", "_amp_round_stochastic_.seeded")
def amp_round_stochastic(d: Draw):
    masters = [*gradients(d, (torch.float32,)), d.tensor(d.shape(cap=300), torch.float32, "normal", expanded=False)]
    parameters = [
        d.tensor(list(m.shape), d.choice((torch.float16, torch.bfloat16)), "zero", expanded=False) for m in masters
    ]
    seed, offset = d.getrandbits(63), d.choice((0, 4, d.getrandbits(60)))
    expected, first = [], 0
    for master, parameter in zip(masters, parameters, strict=True):
        n = master.numel()
        like = torch.empty_like(parameter)
        words = torch.from_numpy(
            philox4x32_10(seed, offset, range(first // 4, first // 4 + (n + 3) // 4)).reshape(-1)[:n].astype("int64")
        )
        placed = torch.empty_strided(like.shape, like.stride(), dtype=torch.int64)
        in_memory(placed).copy_(words)
        expected.append(reference.round_stochastic(master, placed, parameter.dtype))
        first += (n + 3) // 4 * 4
    for device in d.devices:
        mine = copies(d, device, parameters)
        ops._amp_round_stochastic_.seeded(mine, [d.on(device, m) for m in masters], seed=seed, offset=offset)
        for found, wanted in zip(mine, expected, strict=True):
            same(found, wanted, f"_amp_round_stochastic_.seeded on {device}")
    if d.chance(0.2):
        mine = copies(d, "cpu", parameters)
        ops._amp_round_stochastic_(mine, masters)
        for found, master in zip(mine, masters, strict=True):
            down, up = reference.neighbours(master, found.dtype)
            right = (found.double() == down) | (found.double() == up) | master.isnan()
            check(bool(right.all()), "_amp_round_stochastic_: expected a neighbour of the master")
