"""Masks: every pattern against float64, ties, packing, zeros in place on every type and layout, SparseGPT, refusals."""

import pytest
import torch
from reference import pruning as reference
from torch.library import opcheck

import quantrain

ops = torch.ops.quantrain
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
SHAPES = [(1, 4), (3, 8), (5, 12), (7, 33 * 4), (4, 3, 2, 2), (16,), (2, 4096), (40, 64, 3, 4)]
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int8, torch.int32, torch.int64)


def weight_of(shape, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to(dtype).to(device)


@DEVICES
@DTYPES
@pytest.mark.parametrize("pattern", ["layer", "row", "2:4", "1:4", "1:2", "3:8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks(device, dtype, shape, pattern):
    weight = weight_of(shape, dtype, device)
    columns = weight[0].numel()
    if ":" in pattern and columns % int(pattern[2:]):
        pytest.skip("columns in no groups")
    norm = torch.rand(columns, generator=torch.Generator().manual_seed(1)).to(device)
    for sparsity in (0.0, 0.3, 0.5, 0.9):
        for given in (None, norm):
            found = quantrain.prune_mask(weight, given, sparsity=sparsity, pattern=pattern)
            want = reference.mask(weight.cpu(), sparsity, pattern, None if given is None else given.cpu())
            assert torch.equal(found.cpu(), reference.pack(want))


@DEVICES
@pytest.mark.parametrize("pattern", ["layer", "row", "2:4"])
def test_ties_zeros_nan_and_infinity(device, pattern):
    weight = torch.tensor(
        [[0.0, -0.0, 1.0, -1.0, 1.0, 1.0, 0.0, 0.0], [float("nan"), 1.0, -torch.inf, 0.0, 2.0, 2.0, 2.0, 2.0]]
    )
    for sparsity in (0.25, 0.5, 0.75, 0.9):
        found = quantrain.prune_mask(weight.to(device), sparsity=sparsity, pattern=pattern)
        assert torch.equal(found.cpu(), reference.pack(reference.mask(weight, sparsity, pattern)))
    zeros = torch.zeros(4, 8, device=device)
    kept = quantrain.unpack_mask(quantrain.prune_mask(zeros, sparsity=0.5), zeros.shape)
    assert kept[:2].all() and not kept[2:].any()  # of equal ones the later go


@DEVICES
def test_a_weight_that_is_not_contiguous_is_its_copy(device):
    weight = weight_of((6, 8, 3, 3), device=device)
    for view in (weight.to(memory_format=torch.channels_last), weight.transpose(0, 1), weight[:, ::2]):
        assert torch.equal(quantrain.prune_mask(view), quantrain.prune_mask(view.contiguous()))


@DEVICES
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.8])
def test_one_threshold_for_all(device, sparsity):
    weights = [weight_of((4, 9), seed=1), 3 * weight_of((17,), seed=2), 0.1 * weight_of((5, 2, 3), seed=3)]
    found = quantrain.prune_masks([w.to(device) for w in weights], sparsity=sparsity)
    for one, two in zip(found, reference.global_masks(weights, sparsity), strict=True):
        assert torch.equal(one.cpu(), reference.pack(two))
    assert quantrain.prune_masks([], sparsity=sparsity) == []


@DEVICES
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 64, 1000])
def test_packing(device, numel):
    mask = (torch.rand(numel, generator=torch.Generator().manual_seed(numel)) < 0.5).to(device)
    packed = quantrain.pack_mask(mask)
    assert packed.dtype == torch.uint8 and torch.equal(packed.cpu(), reference.pack(mask.cpu()))
    assert torch.equal(quantrain.unpack_mask(packed, (numel,)), mask)
    assert torch.equal(quantrain.pack_mask(mask.float()), packed)


@DEVICES
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_zeros_in_place(device, dtype):
    shapes = [(3,), (8,), (5, 7), (2, 3, 4, 5), (20000,), (0, 4)] * 20  # more than a launch takes
    tensors = [weight_of(shape, seed=i).mul(100).to(dtype).to(device) for i, shape in enumerate(shapes)]
    masks = [weight_of(shape, seed=1000 + i).to(device) > 0 for i, shape in enumerate(shapes)]
    want = [torch.where(mask, tensor, torch.zeros_like(tensor)) for tensor, mask in zip(tensors, masks, strict=True)]
    quantrain.apply_masks_(tensors, [quantrain.pack_mask(mask) for mask in masks])
    for one, two in zip(tensors, want, strict=True):
        assert torch.equal(one, two)


@DEVICES
def test_zeros_in_place_of_nan_and_in_every_layout(device):
    weight = weight_of((6, 8, 3, 3), device=device)
    mask = weight_of((6, 8, 3, 3), device=device, seed=5) > 0
    packed = quantrain.pack_mask(mask)
    for make in (
        torch.Tensor.contiguous,
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
        lambda t: torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape),
    ):
        tensor = make(weight.masked_fill(~mask, float("nan")).clone())
        quantrain.apply_masks_([tensor], [packed])
        assert torch.equal(tensor, weight * mask)


@DEVICES
@pytest.mark.parametrize("pattern", ["layer", "row", "2:4", "4:8"])
@pytest.mark.parametrize("shape", [(3, 8), (16, 40), (9, 264)], ids=str)
def test_sparsegpt(device, shape, pattern):
    weight = weight_of(shape)
    x = weight_of((4 * shape[1], shape[1]), seed=3)
    x[:, 1] *= 5
    hessian = x.T @ x
    hessian[2] = hessian[:, 2] = 0  # an input that was never there
    scale = weight.abs().amax(1, keepdim=True) / 7
    for given in (None, scale):
        want, kept = reference.sparsegpt(weight, hessian, 0.5, pattern, scale=given, low=-8, high=7)
        found, mask = quantrain.sparsegpt_prune(
            weight.to(device),
            hessian.to(device),
            sparsity=0.5,
            pattern=pattern,
            scale=None if given is None else given.to(device),
            quant_min=-8,
            quant_max=7,
        )
        bits = quantrain.unpack_mask(mask.cpu(), shape)
        assert torch.equal(bits, kept) and (found.cpu()[~bits] == 0).all()
        torch.testing.assert_close(found.cpu().double(), want, rtol=1e-4, atol=1e-6)


def test_sparsegpt_is_better_than_magnitude():
    weight, x = weight_of((32, 64)), weight_of((400, 16), seed=2) @ weight_of((16, 64), seed=3)
    x = x + weight_of((400, 64), seed=4)
    error = {}
    for name, pruned in (
        ("magnitude", weight * quantrain.unpack_mask(quantrain.prune_mask(weight), weight.shape)),
        (
            "wanda",
            weight * quantrain.unpack_mask(quantrain.prune_mask(weight, x.norm(dim=0), pattern="row"), weight.shape),
        ),
        ("sparsegpt", quantrain.sparsegpt_prune(weight, x.T @ x)[0]),
    ):
        error[name] = (x @ (pruned - weight).T).square().sum().item()
    assert error["sparsegpt"] < 0.7 * min(error["wanda"], error["magnitude"]), error


@DEVICES
def test_opcheck(device):
    weight = weight_of((4, 8), device=device)
    opcheck(ops.prune_mask.default, (weight, None), {"sparsity": 0.5, "pattern": "2:4"})
    opcheck(ops.prune_mask.default, (weight, weight[0].abs()), {"sparsity": 0.25, "pattern": "row"})
    opcheck(ops.prune_masks.default, ([weight, weight[0].clone()],), {"sparsity": 0.5})
    opcheck(ops.pack_mask.default, (weight > 0,))
    mask = quantrain.pack_mask(weight > 0)
    opcheck(ops.unpack_mask.default, (mask, [4, 8]))
    opcheck(ops.apply_masks_.default, ([weight.clone(), weight.clone()], [mask, mask]))
    opcheck(ops.sparsegpt_prune.default, (weight, torch.eye(8, device=device)), {"sparsity": 0.5})


@DEVICES
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(device, dynamic):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def masked(weight):
        mask = quantrain.prune_mask(weight, sparsity=0.5, pattern="row")
        return weight * quantrain.unpack_mask(mask, weight.shape)

    for rows in (3, 5):
        weight = weight_of((rows, 16), device=device)
        kept = quantrain.unpack_mask(quantrain.prune_mask(weight, sparsity=0.5, pattern="row"), weight.shape)
        assert torch.equal(masked(weight), weight * kept)


REFUSED = [
    (lambda w: quantrain.prune_mask(w, sparsity=1.0), ValueError, r"prune_mask: expected sparsity in \[0, 1\), got 1"),
    (lambda w: quantrain.prune_mask(w, sparsity=-0.1), ValueError, r"prune_mask: expected sparsity in \[0, 1\)"),
    (lambda w: quantrain.prune_mask(w, sparsity=float("nan")), ValueError, "expected sparsity"),
    (lambda w: quantrain.prune_mask(w, pattern="columns"), ValueError, "expected pattern layer, row or n:m"),
    (lambda w: quantrain.prune_mask(w, pattern="4:2"), ValueError, "expected pattern layer, row or n:m"),
    (lambda w: quantrain.prune_mask(w, pattern="2:4 "), ValueError, "expected pattern layer, row or n:m"),
    (
        lambda w: quantrain.prune_mask(w, pattern="2:4"),
        ValueError,
        "prune_mask: expected columns in groups of 4, got 6",
    ),
    (lambda w: quantrain.prune_mask(w, torch.ones(5)), ValueError, r"expected input_norm of 6 columns, got \[5\]"),
    (lambda w: quantrain.prune_mask(w, torch.ones(6).double()), TypeError, "expected input_norm of float32"),
    (lambda w: quantrain.prune_mask(w.long()), TypeError, "expected a dense weight of a floating type"),
    (lambda w: quantrain.prune_mask(torch.tensor(1.0)), ValueError, r"expected weight \[O, ...\], got a scalar"),
    (lambda w: quantrain.prune_masks([w], sparsity=2.0), ValueError, "prune_masks: expected sparsity"),
    (
        lambda w: quantrain.unpack_mask(torch.zeros(4, dtype=torch.uint8), (3, 6)),
        ValueError,
        "mask of 3 bytes .*got .4.",
    ),
    (lambda w: quantrain.unpack_mask(torch.zeros(3), (3, 6)), TypeError, "unpack_mask: expected mask of uint8"),
    (lambda w: quantrain.unpack_mask(torch.zeros(3, dtype=torch.uint8), (-3, 6)), ValueError, "sizes of at least 0"),
    (lambda w: quantrain.apply_masks_([w], []), ValueError, "expected a mask for each tensor, got 0 for 1"),
    (
        lambda w: quantrain.apply_masks_([w, w], [quantrain.pack_mask(w), torch.zeros(2, dtype=torch.uint8)]),
        ValueError,
        r"apply_masks_: expected a mask of 2 bytes|of 3 bytes for 18 elements of tensor 1, got \[2\]",
    ),
    (lambda w: quantrain.sparsegpt_prune(w, torch.eye(5)), ValueError, r"expected hessian \[6, 6\], got \[5, 5\]"),
    (lambda w: quantrain.sparsegpt_prune(w, torch.eye(6), pattern="3:6"), ValueError, "groups that divide 128 columns"),
    (
        lambda w: quantrain.sparsegpt_prune(w, torch.eye(6) * float("nan")),
        ValueError,
        "expected a finite weight and hessian",
    ),
    (lambda w: quantrain.sparsegpt_prune(w, -torch.eye(6)), ValueError, "positive definite after damping"),
    (lambda w: quantrain.sparsegpt_prune(w, torch.eye(6), scale=torch.ones(3)), ValueError, r"expected scale \[3, 1\]"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_refused(call, error, message):
    weight = weight_of((3, 6))
    before = weight.clone()
    with pytest.raises(error, match=message):
        call(weight)
    assert torch.equal(weight, before)
