"""column_statistics_, smooth_factor, gptq_round, awq_scale: against float64, edges and refusals."""

import pytest
import torch
from reference import ptq as reference
from torch.library import opcheck

from quantrain import ptq

ops = torch.ops.quantrain
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def empty(k, device="cpu", hessian=True):
    square = torch.zeros(k, k, device=device) if hessian else None
    return [
        torch.zeros(k, device=device),
        torch.zeros(k, device=device),
        square,
        torch.zeros(1, dtype=torch.int64, device=device),
    ]


def inputs(rows, k, seed=0, spread=1.0):
    """Rows with correlated columns, some of them large."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=g) / k**0.5
    return torch.randn(rows, k, generator=g) @ (torch.eye(k) + mix) * torch.exp(spread * torch.randn(k, generator=g))


def hessian_of(x):
    return (2 * x.double().t() @ x.double() / len(x)).float()


@DEVICES
@DTYPES
def test_statistics(device, dtype):
    batches = [inputs(rows, 24, seed).to(device, dtype) for seed, rows in enumerate((7, 1, 64))]
    found = empty(24, device)
    for batch in batches:
        ptq.column_statistics_(*found, batch)
    absmax, mean_abs, hessian = reference.statistics(torch.cat([b.float() for b in batches]))
    assert torch.equal(found[0].double(), absmax) and found[3].item() == 72
    torch.testing.assert_close(found[1].double(), mean_abs, rtol=1e-5, atol=0)
    torch.testing.assert_close(found[2].double(), hessian, rtol=1e-4, atol=1e-5 * hessian.abs().max().item())


def test_statistics_of_any_shape_and_of_nothing():
    x = inputs(12, 8).view(3, 4, 8)
    found, flat = empty(8), empty(8)
    ptq.column_statistics_(*found, x.transpose(0, 1))
    ptq.column_statistics_(*flat, x.transpose(0, 1).reshape(12, 8))
    ptq.column_statistics_(*found, x[:0])
    for a, b in zip(found, flat, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_keep_what_is_not_a_number(value):
    x = inputs(4, 8)
    x[2, 3] = value
    found = empty(8)
    ptq.column_statistics_(*found, x)
    assert not torch.isfinite(found[0][3]) and torch.isfinite(found[0][:3]).all()
    ptq.column_statistics_(*found, inputs(4, 8))
    assert not torch.isfinite(found[0][3])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gptq_wants_finite_scales(value):
    weight, scale = torch.randn(3, 8), torch.ones(3, 1)
    scale[1] = value
    with pytest.raises(ValueError, match="gptq_round: expected finite scales, got NaN or Inf"):
        ops.gptq_round(weight, torch.eye(8), scale, group_size=8)


@pytest.mark.cuda
def test_statistics_in_host_memory():
    x = torch.randn(3, 50, 24)
    near = [torch.zeros(24), torch.zeros(24), torch.zeros(24, 24), torch.zeros(1, dtype=torch.int64)]
    host = [t.clone() for t in near]
    near = [t.cuda() for t in near]
    for batch in x.cuda():
        ops.column_statistics_(*near, batch)
        ops.column_statistics_(*host, batch)
    for a, b in zip(near, host, strict=True):
        assert b.device.type == "cpu"
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-6)
    with pytest.raises(TypeError, match="hessian on absmax's device cpu"):
        ops.column_statistics_(host[0], host[1], near[2], host[3], x[0].cuda())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_smooth_factor(alpha):
    a, w = torch.rand(33) * 10, torch.rand(33)
    a[3] = w[5] = a[7] = w[7] = 0
    found = ptq.smooth_factor(a, w, alpha=alpha)
    torch.testing.assert_close(found.double(), reference.smooth(a, w, alpha), rtol=1e-5, atol=0)
    assert found[3] == found[5] == found[7] == 1


def test_smoothing_leaves_the_product():
    x, w = inputs(16, 32), torch.randn(8, 32)
    s = ptq.smooth_factor(x.abs().amax(0), w.abs().amax(0), alpha=0.5)
    torch.testing.assert_close((x / s) @ (w * s).t(), x @ w.t(), rtol=1e-4, atol=1e-3)


def scales(w, group, bits=4):
    parts = w.split(group, 1)
    return torch.stack([p.abs().amax(1) / (2 ** (bits - 1) - 1) for p in parts], 1)


@DEVICES
@pytest.mark.parametrize("k, group", [(48, 16), (40, 16), (160, 160), (1, 1), (130, 32)])
def test_gptq_codes_are_those_of_float64(device, k, group):
    """Cholesky's form against updates of the inverse. A code may differ where a value lies on the border of two, at one
    place in 10,000 say; with these seeds none does."""
    x, w = inputs(4 * k + 8, k, seed=k), torch.randn(6, k, generator=torch.Generator().manual_seed(k))
    h, scale = hessian_of(x), scales(w, group)
    codes, error = ptq.gptq_round(w.to(device), h.to(device), scale.to(device), group_size=group)
    want = reference.gptq(w, h, scale, group, -8, 7, 0.01)
    assert torch.equal(codes.cpu().double(), want)
    q = want * scale.double().repeat_interleave(group, 1)[:, :k]
    d = w.double() - q
    exact = (d @ h.double() * d).sum() / (w.double() @ h.double() * w.double()).sum()
    assert error == pytest.approx(float(exact), rel=1e-6)


def test_gptq_is_better_than_nearest_and_activation_order_than_natural():
    worse = 0
    for seed in range(5):
        x, w = inputs(512, 96, seed), torch.randn(32, 96, generator=torch.Generator().manual_seed(seed))
        h, scale = hessian_of(x), scales(w, 32)
        found = {
            order: ptq.gptq_round(w, h, scale, group_size=32, order=order)[1] for order in ("activation", "natural")
        }
        d = (w - (w / scale.repeat_interleave(32, 1)).round().clamp(-8, 7) * scale.repeat_interleave(32, 1)).double()
        nearest = float((d @ h.double() * d).sum() / (w.double() @ h.double() * w.double()).sum())
        assert found["activation"] < 0.9 * nearest
        worse += found["activation"] > found["natural"]
    assert worse <= 1


def test_gptq_with_columns_kept_at_8_bits():
    x, w = inputs(512, 64, 3), torch.randn(16, 64)
    x[:, 9] *= 300
    h, keep = hessian_of(x), torch.tensor([9, 40])
    rest = w.index_fill(1, keep, 0)
    scale, keep_scale = scales(rest, 32), w[:, keep].abs().amax(1, keepdim=True) / 127
    codes, error = ptq.gptq_round(w, h, scale, group_size=32, keep=keep, keep_scale=keep_scale)
    assert codes[:, keep].abs().max() > 8 and codes.index_fill(1, keep, 0).abs().max() <= 8
    assert error < ptq.gptq_round(w, h, scales(w, 32), group_size=32)[1]


def test_gptq_of_columns_without_input():
    x, w = inputs(64, 24), torch.randn(4, 24)
    x[:, 5] = 0
    codes, _ = ptq.gptq_round(w, hessian_of(x), scales(w, 24), group_size=24)
    assert (codes[:, 5] == 0).all()


def test_gptq_raises_the_damping_and_gives_up_by_name():
    x, w = inputs(64, 24), torch.randn(4, 24)
    low_rank = hessian_of(x[:3])  # not definite before damping
    ptq.gptq_round(w, low_rank, scales(w, 24), group_size=24)
    bad = hessian_of(x)
    bad[0, 1] = bad[1, 0] = 1e6
    with pytest.raises(ValueError, match="gptq_round: expected a hessian that is positive definite after damping"):
        ptq.gptq_round(w, bad, scales(w, 24), group_size=24)


@DEVICES
def test_awq_lowers_the_error_and_has_the_identity(device):
    x, w = inputs(512, 64, 1, spread=1.5), torch.randn(32, 64)
    h, mean_abs = hessian_of(x), x.abs().mean(0)
    factor, error = ptq.awq_scale(w.to(device), h.to(device), mean_abs.to(device), bits=4, group_size=32)

    def error_of(s):
        scaled = w * s
        scale = scales(scaled, 32).repeat_interleave(32, 1)
        d = (w - (scaled / scale).round().clamp(-8, 7) * scale / s).double()
        return float((d @ h.double() * d).sum() / (w.double() @ h.double() * w.double()).sum())

    assert error == pytest.approx(error_of(factor.cpu()), rel=1e-3)
    assert error < 0.9 * error_of(torch.ones(64))
    same, _ = ptq.awq_scale(w, torch.eye(64), torch.ones(64), bits=4, group_size=32, steps=1)
    assert error_of(same) <= error_of(torch.ones(64)) or torch.equal(same, torch.ones(64))


def test_opcheck():
    x = inputs(8, 16)
    for test in ("test_schema", "test_faketensor"):
        opcheck(ops.column_statistics_, (*empty(16), x), test_utils=test)
        opcheck(ops.smooth_factor, (torch.rand(16), torch.rand(16)), {"alpha": 0.5}, test_utils=test)
    opcheck(
        ops.gptq_round,
        (torch.randn(4, 16), hessian_of(x), torch.ones(4, 1)),
        {"group_size": 16},
        test_utils="test_schema",
    )
    opcheck(
        ops.awq_scale,
        (torch.randn(4, 16), hessian_of(x), torch.rand(16)),
        {"bits": 4, "group_size": 16},
        test_utils="test_schema",
    )


W, H, S = torch.randn(4, 8), torch.eye(8), torch.ones(4, 1)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: ptq.column_statistics_(*empty(8), torch.randn(3, 9)), ValueError, "absmax of 9 elements"),
        (lambda: ptq.column_statistics_(*empty(8), torch.ones(3, 8, dtype=torch.int64)), TypeError, "input of float32"),
        (lambda: ptq.smooth_factor(torch.ones(3), torch.ones(4), alpha=0.5), ValueError, "weight_absmax of 3 elements"),
        (lambda: ptq.smooth_factor(torch.ones(3), torch.ones(3), alpha=1.5), ValueError, r"alpha in \[0, 1\], got 1.5"),
        (lambda: ptq.gptq_round(W, torch.eye(7), S, group_size=8), ValueError, r"hessian \[8, 8\]"),
        (lambda: ptq.gptq_round(W, H, S, group_size=4), ValueError, r"scale \[4, 2\]"),
        (lambda: ptq.gptq_round(W, H, S, group_size=8, order="random"), ValueError, "'activation' or 'natural', got 'random'"),
        (lambda: ptq.gptq_round(W, H, S, group_size=8, damping=0.0), ValueError, "damping above 0, got 0"),
        (lambda: ptq.gptq_round(W * float("nan"), H, S, group_size=8), ValueError, "finite weight and hessian, got NaN"),
        (lambda: ptq.gptq_round(W, H, S, group_size=8, keep=torch.tensor([1])), ValueError, "keep and keep_scale together"),
        (lambda: ptq.awq_scale(W, H, torch.ones(7), bits=4, group_size=8), ValueError, "mean_abs of 8 elements"),
        (lambda: ptq.awq_scale(W, H, torch.ones(8), bits=1, group_size=8), ValueError, "bits in 2 to 8, got 1"),
    ],
)  # fmt: skip
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
