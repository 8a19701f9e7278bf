"""Drawn tests of keys and values kept as int8 codes: what is kept bit for bit, attention to it against float64."""

import torch
from draw import Draw, close, drawn, same
from drawn_int8_transformer import rotation

ops = torch.ops.quantrain
ROOM = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the largest value kept


def cache_of(d: Draw, b, key_heads, capacity, size):
    """key_codes, key_scale, value_codes, value_scale."""
    shape = [b, key_heads, capacity]
    tensors = []
    for _ in range(2):
        tensors += [d.integers([*shape, size], -127, 127, torch.int8), torch.rand(shape) * 0.1]
    return [torch.empty(t.shape, dtype=t.dtype).copy_(t) for t in tensors]


def positions(d: Draw, b, capacity):
    count = d.choice((1, b))
    return torch.tensor([d.randint(0, capacity) for _ in range(count)])


@drawn("kv_cache_append_")
def append(d: Draw):
    b, t, heads, key_heads = d.randint(1, 3), d.randint(1, 6), d.randint(1, 4), d.randint(1, 3)
    capacity, size = d.randint(1, 12), 2 * d.randint(1, 40)
    qkv = d.tensor([b, t, heads + 2 * key_heads, size], d.dtype(), d.choice(("normal", "heavy")), expanded=False)
    cos, sin = rotation(d, b, t, size) if d.chance(0.6) else (None, None)
    kept, position = cache_of(d, b, key_heads, capacity, size), positions(d, b, capacity)
    d.notes |= {"qkv": qkv, "cos": cos, "capacity": capacity, "position": position}
    for device in d.devices:
        x, found = d.on(device, qkv).clone(memory_format=torch.preserve_format), [k.clone().to(device) for k in kept]
        turned = x.clone(memory_format=torch.preserve_format)
        angles = [None if a is None else d.on(device, a) for a in (cos, sin)]
        if cos is not None:
            ops.rotate_heads_(turned, *angles, heads + key_heads)
        ops.kv_cache_append_(x, *found, position.to(device), *angles)
        same(x.cpu().contiguous(), turned.cpu().contiguous(), f"kv_cache_append_'s rotated heads on {device}")
        expected = [k.clone() for k in kept]
        for part, first in ((0, heads), (2, heads + key_heads)):
            rows = turned[:, :, first : first + key_heads].transpose(1, 2).contiguous()
            codes, scale = (r.cpu() for r in ops.int8_quantize_rows(rows))
            for sequence in range(b):
                place = int(position[sequence % len(position)])
                fits = min(t, capacity - place)
                expected[part][sequence, :, place : place + fits] = codes[sequence, :, :fits]
                expected[part + 1][sequence, :, place : place + fits] = scale[sequence, :, :fits, 0]
        for name, one, other in zip(
            ("key_codes", "key_scale", "value_codes", "value_scale"), found, expected, strict=True
        ):
            same(one.cpu(), other, f"kv_cache_append_'s {name} on {device}")


@drawn("kv_cache_attention")
def attention(d: Draw):
    b, t, key_heads, group = d.randint(1, 3), d.randint(1, 6), d.randint(1, 3), d.randint(1, 4)
    capacity, size = d.randint(1, 40), d.randint(1, 80)
    q = d.tensor([b, t, key_heads * group, size], d.dtype(), "normal", expanded=False)
    kept, position = cache_of(d, b, key_heads, capacity, size), positions(d, b, capacity)
    mask, scale = (torch.rand(b, capacity) < 0.7) if d.chance(0.4) else None, d.choice((0.05, 0.3, 1.0))
    d.notes |= {"q": q, "capacity": capacity, "position": position, "mask": mask, "scale": scale}
    keys, values = (
        (codes.double() * of.double()[..., None]).repeat_interleave(group, 1) for codes, of in (kept[:2], kept[2:])
    )
    score = torch.einsum("bthd,bhkd->bhtk", q.double(), keys) * scale
    reached = position.view(-1, 1) + torch.arange(t)
    seen = (torch.arange(capacity) <= reached[:, :, None]).expand(b, t, capacity)
    seen = seen if mask is None else seen & mask[:, None]
    share = torch.softmax(score.masked_fill(~seen[:, None], -torch.inf), -1).nan_to_num(0)
    expected = torch.einsum("bhtk,bhkd->bthd", share, values)
    room = ROOM[q.dtype] * (1 + score.abs().amax() * 2**-4) * values.abs().amax() + 1e-30
    for device in d.devices:
        given = [k.to(device) for k in kept]
        found = ops.kv_cache_attention(
            d.on(device, q), *given, position.to(device), scale=scale, mask=None if mask is None else mask.to(device)
        )
        close(found.cpu().double(), expected, room.expand_as(expected), f"kv_cache_attention on {device}")
