"""Every operator under opcheck, torch.compile (static and dynamic) and torch.export."""

import pytest
import torch
from samples.fake_quant import FEW, assert_same, each, on_each_device
from torch.library import opcheck

import quantrain

ops = torch.ops.quantrain


@each(FEW)
@on_each_device
def test_opcheck_fake_quantize(sample, device):
    x, scale, zero_point = sample.make(device)
    opcheck(ops.fake_quantize, (x.requires_grad_(), scale, zero_point), sample.range)


@each(FEW)
@on_each_device
@pytest.mark.parametrize("learned_zero_point", [False, True])
def test_opcheck_fake_quantize_learnable(sample, device, learned_zero_point):
    x, scale, zero_point = sample.make(device)
    if learned_zero_point:
        zero_point = torch.zeros_like(scale).requires_grad_()
    opcheck(
        ops.fake_quantize_learnable,
        (x.requires_grad_(), scale.requires_grad_(), zero_point),
        dict(grad_factor=0.5, **sample.range),
    )


@each(FEW)
@on_each_device
@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck_ranges_and_dynamic(sample, device, symmetric):
    x, _, _ = sample.make(device)
    shape = list(sample.scale_shape)
    keywords = dict(symmetric=symmetric, **sample.range)
    opcheck(ops.choose_qparams, (x, shape), keywords)
    opcheck(ops._min_max, (x, shape))
    opcheck(ops._mse_range, (x, shape), dict(steps=5, **keywords))
    opcheck(ops._percentile_range, (x, shape), dict(percentile=90.0))
    low, high = ops._min_max(x, shape)
    seen = (torch.full_like(low, -0.5), torch.full_like(low, 0.5))
    opcheck(ops._observe_, (*seen, low, high, torch.isfinite(low)), dict(averaging_constant=0.1))
    opcheck(ops._qparams_from_range, ops._min_max(x, shape), keywords)
    opcheck(ops.fake_quantize_dynamic, (x.requires_grad_(), shape), keywords)


@each(FEW)
@on_each_device
def test_opcheck_codes(sample, device):
    x, scale, zero_point = sample.make(device)
    keywords = dict(dtype=torch.int32, **sample.range)
    opcheck(ops.quantize.default, (x, scale, zero_point), keywords)
    opcheck(ops.quantize.nearest, (x, scale, zero_point), keywords | dict(dtype="int32"))
    opcheck(ops.quantize.seeded, (x, scale, zero_point), dict(seed=1, offset=2, **keywords))
    codes = ops.quantize(x, scale, zero_point, **keywords)
    opcheck(ops.dequantize.default, (codes, scale, zero_point), dict(dtype=torch.bfloat16))
    opcheck(ops.dequantize.typed, (codes, scale, zero_point), dict(dtype="bfloat16"))


@on_each_device
def test_opcheck_int4(device):
    codes = torch.randint(-8, 8, (3, 7), dtype=torch.int8, device=device)
    opcheck(ops.pack_int4, (codes,))
    opcheck(ops.unpack_int4, (ops.pack_int4(codes),), dict(size=7))


def step(x, scale, learned):
    y = quantrain.fake_quantize(x * 2, scale, quant_min=-8, quant_max=7)
    z = quantrain.fake_quantize_dynamic(y + x, [1, 1], symmetric=False, quant_min=0, quant_max=255)
    return quantrain.fake_quantize_learnable(z, learned, grad_factor=0.1)


@on_each_device
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_break(device, dynamic, backend):
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    for rows in (6, 10, 12) if dynamic else (6,):
        results = []
        for function in (step, compiled):
            g = torch.Generator().manual_seed(rows)
            x = torch.randn(rows, 16, generator=g).to(device).requires_grad_()
            learned = torch.tensor([0.07], device=device, requires_grad=True)
            y = function(x, torch.tensor([0.21], device=device), learned)
            y.square().sum().backward()
            results.append((y.detach(), x.grad, learned.grad))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-5, atol=1e-6)


def test_compiles_channels_last():
    torch.compiler.reset()
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    scale = torch.rand(1, 8, 1, 1) * 0.05 + 0.01

    def function(x):
        return quantrain.fake_quantize(x.relu() + x, scale).sin()

    expected = torch.autograd.grad(function(x).sum(), x)[0]
    actual = torch.autograd.grad(torch.compile(function, fullgraph=True, backend="aot_eager")(x).sum(), x)[0]
    assert_same(actual, expected)


def test_exports():
    class Model(torch.nn.Module):
        def forward(self, x, scale):
            return quantrain.fake_quantize(x, scale) + quantrain.fake_quantize_dynamic(x, [1, 1])

    x, scale = torch.randn(4, 8), torch.tensor([0.1])
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Model(), (x, scale), dynamic_shapes=({0: batch}, None))
    other = torch.randn(7, 8)
    assert_same(program.module()(other, scale), Model()(other, scale))


def test_meta_device_gives_shapes():
    x = torch.empty(4, 6, device="meta")
    assert quantrain.fake_quantize(x, torch.empty(4, 1, device="meta")).shape == x.shape
    scale, zero_point = quantrain.choose_qparams(x, [4, 3])
    assert scale.shape == (4, 3) and zero_point.dtype == torch.int32
