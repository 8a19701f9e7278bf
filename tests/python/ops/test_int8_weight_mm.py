"""int8_weight_mm: against float64, gradients, layouts, autocast, compilers and refusals; the layer of recipe w8a16."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck

import quantrain
import quantrain.nn as qnn

op = torch.ops.quantrain.int8_weight_mm
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
ROUNDING = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def operands(device, m, n, k, dtype, seed=0, bias=True, one_scale=False):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g).to(device, dtype)
    codes = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=g).to(device)
    scale = torch.rand(1 if one_scale else n, generator=g).add(0.5).to(device)
    return x, codes, scale, torch.randn(n, generator=g).to(device, dtype) if bias else None


def exact(x, codes, scale, bias):
    y = (x.double() @ codes.double().t()) * scale.double().flatten()
    return y if bias is None else y + bias.double()


def check(found, x, codes, scale, bias):
    want = exact(x, codes, scale, bias)
    # The output's rounding; of the sums what float32 and, decoded first, a 16-bit weight leave.
    size = (x.double().abs() @ codes.double().abs().t()) * scale.double().flatten()
    room = ROUNDING[x.dtype] * (want.abs() + 0.3 * size) + 1e-6 * size
    assert found.dtype == x.dtype and found.shape == want.shape
    assert ((found.double() - want).abs() <= room).all()


@DEVICES
@DTYPES
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 70])
@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (5, 16), (33, 63), (64, 64), (130, 400), (1, 1040), (257, 3420), (8500, 80)]
)
def test_products(device, dtype, m, n, k):
    check(op(*(given := operands(device, m, n, k, dtype, seed=m + n + k))), *given)
    given = operands(device, m, n, k, dtype, bias=False, one_scale=True)
    check(op(*given), *given)


@DEVICES
def test_layouts_and_empty_tensors(device):
    x, codes, scale, bias = operands(device, 6, 48, 64, torch.bfloat16)
    want = op(x, codes, scale, bias)
    assert torch.equal(op(x.view(2, 3, 64), codes, scale.view(-1, 1), bias), want.view(2, 3, 48))
    assert torch.equal(op(x[0], codes, scale, bias), op(x[:1], codes, scale, bias)[0])
    assert torch.equal(op(x.t().contiguous().t(), codes.t().contiguous().t(), scale, bias.float()), want)
    shifted = torch.empty(x.numel() + 1, device=device, dtype=x.dtype)[1:].view_as(x).copy_(x)
    off = torch.empty(codes.numel() + 3, device=device, dtype=torch.int8)[3:].view_as(codes).copy_(codes)
    check(op(shifted, off, scale, bias), x, codes, scale, bias)
    assert op(x[:0], codes, scale, bias).shape == (0, 48)
    assert op(x, codes[:0], scale[:0], bias[:0]).shape == (6, 0)
    nothing = op(x[:, :0], codes[:, :0], scale, bias)
    assert torch.equal(nothing, bias.expand(6, 48))


@DEVICES
@pytest.mark.parametrize("m", [1, 40])
def test_nan_is_seen(device, m):
    x, codes, scale, bias = operands(device, m, 16, 64, torch.float16)
    x[0, 3] = torch.nan
    y = op(x, codes, scale, bias)
    assert y[0].isnan().all() and y[1:].isfinite().all()
    scale[5] = torch.nan
    assert op(x, codes, scale, bias)[:, 5].isnan().all()


@DEVICES
@DTYPES
def test_gradients_any_number_of_times(device, dtype):
    x, codes, scale, bias = operands(device, 5, 24, 64, dtype)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    seed = torch.randn(5, 24, device=device, dtype=dtype)
    dx, db = torch.autograd.grad(op(x, codes, scale, bias), (x, bias), seed)
    weight = codes.double() * scale.double().view(-1, 1)
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    want = seed.double() @ weight
    assert (dx.double() - want).norm() <= tolerance * want.norm()
    assert (db.double() - seed.double().sum(0)).norm() <= tolerance * seed.double().sum(0).norm() + 1e-6
    if dtype == torch.float32:
        (first,) = torch.autograd.grad(op(x, codes, scale, bias).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        want = 2 * (torch.ones_like(x).double() @ weight.t()) @ weight
        assert (second.double() - want).norm() <= 1e-5 * want.norm()


@DEVICES
def test_opcheck_and_compile(device):
    x, codes, scale, bias = operands(device, 5, 24, 64, torch.float32)
    opcheck(op, (x.requires_grad_(), codes, scale, bias))
    compiled = torch.compile(lambda x: op(x, codes, scale, bias), fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (3, 40):
        y = torch.randn(m, 64, device=device)
        torch.testing.assert_close(compiled(y), op(y, codes, scale, bias))
    with torch.autocast(device, torch.bfloat16):
        assert op(x, codes, scale, bias).dtype == torch.bfloat16


@DEVICES
def test_the_same_bits_again(device):
    given = operands(device, 20, 512, 1024, torch.bfloat16)
    first = op(*given)
    assert all(torch.equal(op(*given), first) for _ in range(5))


BAD = [
    ({"codes": torch.zeros(3, 64, dtype=torch.uint8)}, TypeError, "codes of int8"),
    ({"scale": torch.zeros(3, dtype=torch.float16)}, TypeError, "scale of float32"),
    ({"scale": torch.zeros(2)}, ValueError, "scale of 3 elements, the rows of codes, or of one"),
    ({"input": torch.zeros(2, 63)}, ValueError, "input of 64 columns"),
    ({"input": torch.zeros(2, 64, dtype=torch.int8)}, TypeError, "input"),
    ({"bias": torch.zeros(2)}, ValueError, "bias of 3 elements"),
    ({"codes": torch.zeros(3, 64, 1, dtype=torch.int8)}, ValueError, r"codes \[N, K\]"),
]


@pytest.mark.parametrize(("change", "kind", "rule"), BAD, ids=[b[2] for b in BAD])
def test_refusals(change, kind, rule):
    good = {
        "input": torch.zeros(2, 64),
        "codes": torch.zeros(3, 64, dtype=torch.int8),
        "scale": torch.ones(3),
        "bias": None,
    }
    with pytest.raises(kind, match=f"int8_weight_mm: expected {rule}"):
        quantrain.int8_weight_mm(**(good | change))


@DEVICES
@pytest.mark.parametrize("m", [1, 50])
def test_the_layer_of_w8a16(device, m):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 40), nn.GELU(), nn.Linear(40, 8)).to(device)
    x = torch.randn(m, 96, device=device)
    qnn.prepare(model, "w8a16")
    simulated = model.eval()(x)
    qnn.convert(model)
    torch.testing.assert_close(model(x), simulated, rtol=1e-5, atol=1e-6)
    layer = model[0]
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-6)
    assert model.half()(x.half()).dtype == torch.float16
