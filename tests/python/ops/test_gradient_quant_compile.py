"""Every operator of the family under opcheck, torch.compile (static and dynamic), torch.export, autocast and inference mode."""

import pytest
import torch
from samples.gradient_quant import (
    FEW,
    QUANTIZERS,
    Sample,
    assert_same,
    encode,
    on_each_device,
    simulate,
    with_each_quantizer,
)
from torch.library import opcheck

import quantrain

ops = torch.ops.quantrain


# Every sample with the quantizer that has most to do, every quantizer with one sample.
CHECKED = [(s, q) for s in FEW for q in QUANTIZERS if q.quantizer == "householder" or s.name == "odd"]
with_each_pair = pytest.mark.parametrize(("sample", "quantizer"), CHECKED, ids=str)


@with_each_pair
@on_each_device
def test_opcheck_quantize_gradient(sample, quantizer, device):
    grad = sample.make(device)
    arguments = (grad, quantizer.bits, quantizer.quantizer)
    keywords = dict(preserve_zero=quantizer.preserve_zero, **sample.options)
    opcheck(ops.quantize_gradient.seeded, arguments, dict(seed=1, offset=2, **keywords))
    opcheck(ops.quantize_gradient_codes.seeded, arguments, dict(seed=1, offset=2, **keywords))
    # Random: opcheck leaves out comparing values for an operator tagged nondeterministic_seeded.
    opcheck(ops.quantize_gradient.default, arguments, keywords)
    opcheck(ops.quantize_gradient_codes.default, arguments, dict(stochastic=False, **keywords))


@with_each_pair
@on_each_device
def test_opcheck_dequantize_and_reflect(sample, quantizer, device):
    found = encode(sample.make(device), quantizer, sample, seed=1, offset=2)
    opcheck(ops.dequantize_gradient, tuple(found), dict(dtype=torch.bfloat16))
    x = torch.randn(found.codes.shape[0], 7, device=device)
    opcheck(ops._reflect_rows, (x, found.order, found.reflector))
    opcheck(ops._reflect_rows, (x, found.order, found.reflector), dict(inverse=True))


def test_random_operators_say_so():
    for name in ("quantize_gradient", "quantize_gradient_codes"):
        packet = getattr(ops, name)
        assert torch.Tag.nondeterministic_seeded in packet.default.tags
        assert torch.Tag.nondeterministic_seeded not in packet.seeded.tags


def step(grad, quantizer, rows):
    keywords = dict(preserve_zero=quantizer.preserve_zero, rows=rows)
    values = ops.quantize_gradient.seeded(grad * 2, quantizer.bits, quantizer.quantizer, seed=3, offset=4, **keywords)
    found = ops.quantize_gradient_codes.seeded(
        grad + 1, quantizer.bits, quantizer.quantizer, seed=3, offset=4, **keywords
    )
    return values.sin(), found[0].float(), ops.dequantize_gradient(*found) - 1


@on_each_device
@pytest.mark.parametrize(("quantizer", "dynamic"), [(q, True) for q in QUANTIZERS] + [(QUANTIZERS[-1], False)], ids=str)
def test_compiles_without_a_break(device, quantizer, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (6, 10, 131) if dynamic else (6,):
        grad = torch.randn(n, 3, 5, generator=torch.Generator().manual_seed(n)).to(device)
        for rows in ("sample", "token"):
            for eager, other in zip(step(grad, quantizer, rows), compiled(grad, quantizer, rows), strict=True):
                assert_same(other, eager)


@on_each_device
def test_compiles_with_inductor(device):
    torch.compiler.reset()

    def function(grad):  # operators alone: nothing for inductor's C++ compiler to do
        first = quantrain.quantize_gradient(grad, 5, "householder", stochastic=False)
        return quantrain.quantize_gradient_codes(first, 4, "per_sample", stochastic=False).dequantize()

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for n in (8, 12):
        grad = torch.randn(n, 16, device=device)
        assert_same(compiled(grad), function(grad))


@on_each_device
@with_each_quantizer
def test_compiled_random_operators_draw_afresh(device, quantizer):
    torch.compiler.reset()
    grad = torch.randn(20, 30, device=device)
    compiled = torch.compile(
        lambda g: (simulate(g, quantizer), simulate(g, quantizer)), fullgraph=True, backend="aot_eager"
    )
    torch.manual_seed(3)
    first, second = compiled(grad)
    assert not torch.equal(first, second)  # two draws are not merged into one
    assert not torch.equal(compiled(grad)[0], first)
    torch.manual_seed(3)
    assert_same(compiled(grad)[0], first)


def test_compiles_channels_last():
    torch.compiler.reset()
    grad = torch.randn(4, 8, 3, 3).contiguous(memory_format=torch.channels_last)

    def function(grad):
        return ops.quantize_gradient.seeded(grad, 4, "householder", seed=1, offset=0)

    result = torch.compile(function, fullgraph=True, backend="aot_eager")(grad)
    assert_same(result, function(grad))
    assert result.stride() == grad.stride()


@with_each_quantizer
def test_exports(quantizer):
    class Model(torch.nn.Module):
        def forward(self, grad):
            return simulate(grad, quantizer, rows="token", seed=1, offset=0), *encode(grad, quantizer, seed=1, offset=0)

    grad = torch.randn(5, 4, 8)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Model(), (grad,), dynamic_shapes=({0: batch},))
    other = torch.randn(140, 4, 8)
    for a, b in zip(program.module()(other), Model()(other), strict=True):
        assert_same(a, b)


@with_each_quantizer
@pytest.mark.parametrize("rows", ["sample", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_meta_gives_the_shapes_of_eager(quantizer, rows, dtype):
    for shape, layout in (((6, 4, 3, 3), torch.channels_last), ((6, 4, 3), torch.contiguous_format), ((5,), None)):
        grad = torch.randn(shape).to(dtype)
        grad = grad if layout is None else grad.contiguous(memory_format=layout)
        meta = grad.to("meta")
        values, shape_only = simulate(grad, quantizer, rows=rows), simulate(meta, quantizer, rows=rows)
        assert (values.shape, values.stride(), values.dtype) == (
            shape_only.shape,
            shape_only.stride(),
            shape_only.dtype,
        )
        for a, b in zip(encode(grad, quantizer, rows=rows), encode(meta, quantizer, rows=rows), strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        found = encode(meta, quantizer, rows=rows)
        assert found.dequantize(torch.bfloat16).shape == found.codes.shape


@with_each_quantizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_element_type(quantizer, dtype):
    grad = torch.randn(6, 8)
    for given in (grad, grad.to(dtype)):
        plain = simulate(given, quantizer, seed=1, offset=0)
        codes = encode(given, quantizer, seed=1, offset=0)
        with torch.autocast("cpu", dtype=dtype):
            assert_same(simulate(given, quantizer, seed=1, offset=0), plain)
            for a, b in zip(encode(given, quantizer, seed=1, offset=0), codes, strict=True):
                assert_same(a, b)
            assert codes.dequantize().dtype == torch.float32


@with_each_quantizer
def test_inference_mode_and_no_grad(quantizer):
    grad = Sample("", (6, 9)).make()
    expected = simulate(grad, quantizer, seed=1, offset=0)
    with torch.inference_mode():
        assert_same(simulate(grad, quantizer, seed=1, offset=0), expected)
        assert encode(grad, quantizer, seed=1, offset=0).dequantize().shape == grad.shape
    with torch.no_grad():
        assert not simulate(grad.clone().requires_grad_(), quantizer).requires_grad
    assert simulate(grad, quantizer).requires_grad is False
