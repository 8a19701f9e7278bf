"""Every operator under opcheck, torch.compile (static and dynamic) and torch.export."""

import pytest
import torch
from samples.fake_quant import assert_same, on_each_device
from samples.fixed_point import FEW
from torch.library import opcheck

import quantrain

ops = torch.ops.quantrain
each_of_few = pytest.mark.parametrize("sample", FEW, ids=str)


@each_of_few
@on_each_device
def test_opcheck_quantize(sample, device):
    x, lengths = sample.make(device)
    opcheck(ops.fixed_point_quantize, (x.requires_grad_(), lengths), sample.keywords)


@each_of_few
@on_each_device
def test_opcheck_fraction_length(sample, device):
    x, _ = sample.make(device)
    opcheck(ops.fixed_point_fraction_length, (x,), dict(method="mse", **sample.keywords))
    previous = ops.fixed_point_fraction_length(x, axis=1)
    opcheck(ops.fixed_point_fraction_length, (x,), dict(axis=1, previous=previous, hysteresis=0.2))


@each_of_few
@on_each_device
def test_opcheck_requantize(sample, device):
    accumulator, lengths = sample.make_accumulator(device)
    opcheck(ops.fixed_point_requantize, (accumulator, lengths, 5), {"signed": sample.signed})


def step(x, weight):
    lengths = quantrain.fixed_point_fraction_length(weight, axis=0)
    w = quantrain.fixed_point_quantize(weight * 2, lengths)
    y = torch.nn.functional.linear(quantrain.fixed_point_quantize(x.relu(), 4, signed=False), w)
    length = quantrain.fixed_point_fraction_length(y, method="mse")
    return quantrain.fixed_point_quantize(y, length).sin()


@on_each_device
@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", True)])
def test_compiles_without_a_break(device, backend, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    for rows in (6, 10) if dynamic else (6,):
        results = []
        for function in (step, compiled):
            g = torch.Generator().manual_seed(rows)
            x = torch.randn(rows, 16, generator=g).to(device).requires_grad_()
            weight = torch.randn(5, 16, generator=g).to(device).requires_grad_()
            y = function(x, weight)
            y.square().sum().backward()
            results.append((y.detach(), x.grad, weight.grad))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-5, atol=1e-6)


def test_compiles_channels_last():
    torch.compiler.reset()
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    lengths = torch.arange(8, dtype=torch.int32).view(1, 8, 1, 1)

    def function(x):
        return quantrain.fixed_point_quantize(x.relu() + x, lengths).sin()

    expected = torch.autograd.grad(function(x).sum(), x)[0]
    actual = torch.autograd.grad(torch.compile(function, fullgraph=True, backend="aot_eager")(x).sum(), x)[0]
    assert_same(actual, expected)


def test_exports():
    class Model(torch.nn.Module):
        def forward(self, x):
            y = quantrain.fixed_point_quantize(x, quantrain.fixed_point_fraction_length(x, axis=1))
            return quantrain.fixed_point_requantize((y * 128).int(), 7, 5)

    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Model(), (torch.randn(4, 8),), dynamic_shapes=({0: batch},))
    other = torch.randn(7, 8)
    assert_same(program.module()(other), Model()(other))


def test_meta_device_gives_shapes():
    x = torch.empty(4, 6, device="meta")
    lengths = quantrain.fixed_point_fraction_length(x, axis=0)
    assert lengths.shape == (4, 1) and lengths.dtype == torch.int32
    assert quantrain.fixed_point_quantize(x, lengths).shape == x.shape
    assert quantrain.fixed_point_requantize(x.int(), lengths, 3, signed=False).dtype == torch.uint8
