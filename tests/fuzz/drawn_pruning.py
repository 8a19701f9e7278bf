"""Drawn tests of the pruning family: masks and zeros bit for bit, SparseGPT against float64."""

import torch
from draw import FLOATS, Draw, close, drawn, same
from reference import pruning as reference

ops = torch.ops.quantrain
TYPES = (*FLOATS, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64)


def pattern_of(d: Draw, columns):
    of = d.choice((2, 4, 8))
    return d.choice(("layer", "row", f"{d.randint(1, of - 1)}:{of}" if columns % of == 0 else "layer"))


def columns_of(shape):
    result = 1
    for size in shape[1:]:
        result *= size
    return result


@drawn("prune_mask")
def mask(d: Draw):
    weight = d.tensor(d.shape(low=1, cap=2000), d.dtype())
    columns = columns_of(weight.shape)
    pattern, sparsity = pattern_of(d, columns), d.choice((0.0, 0.25, 0.5, 0.9, d.random()))
    norm = torch.rand(columns) if d.chance(0.4) else None
    d.notes |= {"weight": weight, "pattern": pattern, "sparsity": sparsity, "norm": norm}
    want = reference.pack(reference.mask(weight, sparsity, pattern, norm)) if weight.numel() else torch.empty(0).byte()
    for device in d.devices:
        on = None if norm is None else norm.to(device)
        found = ops.prune_mask(d.on(device, weight), on, sparsity=sparsity, pattern=pattern)
        same(found.cpu(), want, f"prune_mask on {device}")


@drawn("prune_masks")
def masks(d: Draw):
    weights = [d.tensor(d.shape(low=1, cap=300), d.dtype()) for _ in range(d.randint(1, 4))]
    sparsity = d.choice((0.0, 0.5, d.random()))
    d.notes |= {"weights": [list(w.shape) for w in weights], "sparsity": sparsity}
    want = [reference.pack(m) for m in reference.global_masks(weights, sparsity)]
    for device in d.devices:
        found = ops.prune_masks([d.on(device, w) for w in weights], sparsity=sparsity)
        for i, (one, two) in enumerate(zip(found, want, strict=True)):
            same(one.cpu(), two, f"prune_masks {i} on {device}")


@drawn("pack_mask", "unpack_mask")
def packing(d: Draw):
    kept = d.integers(d.shape(), 0, 1, d.choice((torch.bool, torch.uint8, torch.float32)))
    d.notes["mask"] = kept
    want = reference.pack(kept)
    for device in d.devices:
        found = ops.pack_mask(d.on(device, kept))
        same(found.cpu(), want, f"pack_mask on {device}")
        back = ops.unpack_mask(found, list(kept.shape))
        same(back.cpu(), (kept != 0).contiguous(), f"unpack_mask on {device}")


@drawn("apply_masks_")
def zeros(d: Draw):
    tensors, kept = [], []
    for _ in range(d.randint(1, 5)):
        shape = d.shape()
        whole = d.tensor(shape, kind="normal", expanded=False)
        tensors.append(torch.empty_like(whole, dtype=d.choice(TYPES)).copy_(whole * 50) if d.chance(0.6) else whole)
        kept.append(d.integers(shape, 0, 1, torch.bool))
    d.notes["tensors"] = [list(t.shape) for t in tensors]
    want = [torch.where(k, t, torch.zeros_like(t)) for t, k in zip(tensors, kept, strict=True)]
    for device in d.devices:
        placed = [d.on(device, t).clone(memory_format=torch.preserve_format) for t in tensors]
        ops.apply_masks_(placed, [reference.pack(k).to(device) for k in kept])
        for i, (one, two) in enumerate(zip(placed, want, strict=True)):
            same(one.cpu(), two, f"apply_masks_ {i} on {device}")


@drawn("sparsegpt_prune")
def sparsegpt(d: Draw):
    n, k = d.randint(1, 6), 8 * d.randint(1, 20)
    weight, pattern = d.tensor([n, k], d.dtype(), "normal"), pattern_of(d, k)
    x = d.tensor([2 * k, k], kind="normal").contiguous()
    hessian, sparsity, damping = x.T @ x, d.choice((0.0, 0.25, 0.5, 0.75)), d.choice((0.01, 0.1))
    scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-6) / 7 if d.chance(0.5) else None
    d.notes |= {"weight": weight, "pattern": pattern, "sparsity": sparsity, "scale": scale, "damping": damping}
    want, kept = reference.sparsegpt(weight, hessian, sparsity, pattern, damping, scale, -8, 7)
    for device in d.devices:
        found, mask = ops.sparsegpt_prune(
            d.on(device, weight),
            hessian.to(device),
            sparsity=sparsity,
            pattern=pattern,
            damping=damping,
            scale=None if scale is None else scale.to(device),
            quant_min=-8,
            quant_max=7,
        )
        # Where two scores are the same but for float64's last bits, another choice is as good, and changes all after it.
        if not torch.equal(mask.cpu(), reference.pack(kept)):
            d.tags.add("another choice")
            continue
        if scale is not None:
            codes = (found.cpu().double() - want).abs() / scale.double()
            off = codes > 0.5  # next to a midpoint
            if off.any():
                d.tags.add("another code")
                continue
        room = torch.finfo(weight.dtype).eps * want.abs() + 1e-5 * want.abs().max() + 1e-6
        close(found, want, room, f"sparsegpt_prune on {device}")
