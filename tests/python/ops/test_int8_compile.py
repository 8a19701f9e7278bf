"""Every operator of the family under opcheck, torch.compile (static and dynamic), torch.export, autocast and inference mode."""

import pytest
import torch
from samples.int8 import FEW, Sample, assert_all_same, assert_same, codes, each, on_each_device, scales
from torch.library import opcheck

import quantrain

ops = torch.ops.quantrain
RANDOM = ("int8_quantize_rows", "int8_quantize_columns", "int8_quantize_rows_and_columns")


@each([s for s in FEW if s.name in ("odd", "tokens", "transposed")])
@on_each_device
def test_opcheck_quantizers(sample, device):
    x, (column_factor, row_factor) = sample.make(device), sample.factors(device)
    rows, columns = dict(column_factor=column_factor), dict(row_factor=row_factor)
    seeded = dict(seed=1, offset=2)
    opcheck(ops.int8_quantize_rows.default, (x,), rows)
    opcheck(ops.int8_quantize_rows.nearest, (x,), rows)
    opcheck(ops.int8_quantize_rows.seeded, (x,), rows | seeded)
    opcheck(ops.int8_quantize_columns.default, (x,), columns)
    opcheck(ops.int8_quantize_columns.nearest, (x,), columns)
    opcheck(ops.int8_quantize_columns.seeded, (x,), columns | seeded)
    opcheck(ops.int8_quantize_rows_and_columns.default, (x,), rows | columns)
    opcheck(ops.int8_quantize_rows_and_columns.nearest, (x,), rows | columns)
    opcheck(ops.int8_quantize_rows_and_columns.seeded, (x,), rows | columns | seeded)


@on_each_device
def test_opcheck_transposes(device):
    opcheck(ops.int8_transpose, (codes((7, 70), device=device),))
    opcheck(ops.int8_transpose, (codes((7, 70), device=device).t(),))
    weight = torch.randn(9, 40, device=device)
    for scheme in ("fold", "columns", "auto"):
        opcheck(ops.int8_weight_transpose, (weight, scales(9, device=device)), dict(scheme=scheme))
    opcheck(ops.int8_weight_transpose, (codes((9, 40), device=device), scales(9, device=device)))


@on_each_device
def test_opcheck_products(device):
    a, b = codes((2, 6, 40), device=device), codes((9, 40), 1, device=device)
    bias = torch.randn(9, device=device)
    opcheck(ops.int8_mm.default, (a, b))
    arguments = (a, b, scales(12, device=device), scales(9, 1, device), bias)
    opcheck(ops.int8_mm.default, arguments, dict(out_dtype=torch.bfloat16))
    opcheck(ops.int8_mm.typed, arguments, dict(out_dtype="bfloat16"))
    total = torch.randn(12, 9, device=device)
    opcheck(ops.int8_mm_accumulate_, (total, a.view(12, 40), b, scales(12, device=device), scales(9, 1, device)))


@on_each_device
def test_opcheck_fused(device):
    x, residual = torch.randn(2, 5, 24, device=device), torch.randn(2, 5, 24, device=device)
    weight, bias = torch.randn(24, device=device), torch.randn(24, device=device)
    opcheck(ops.int8_layer_norm, (x, weight, bias))
    opcheck(ops.int8_rms_norm, (x, weight))
    opcheck(ops.int8_add_layer_norm, (x, residual, weight, bias))
    opcheck(ops.int8_add_rms_norm, (x, residual, weight), dict(post_norm=True))
    opcheck(ops.int8_gelu, (x,), dict(approximate="tanh"))
    opcheck(ops.int8_relu, (x,))
    opcheck(ops.int8_relu, (x,), dict(column_factor=weight.abs()))
    opcheck(ops.int8_silu_mul, (x, residual))
    opcheck(ops.int8_silu_mul, (x[..., :12], x[..., 12:]))


def test_random_operators_say_so():
    for name in RANDOM:
        packet = getattr(ops, name)
        assert torch.Tag.nondeterministic_seeded in packet.default.tags
        assert torch.Tag.nondeterministic_seeded not in packet.seeded.tags


def step(x, w, bias):
    """A training step's products, as int8_linear makes them, and the fused producers."""
    xq, xs = ops.int8_quantize_rows(x * 2)
    wq, ws = ops.int8_quantize_rows(w)
    y = ops.int8_mm(xq, wq, xs, ws, bias, out_dtype=x.dtype)
    wt, factor, st = ops.int8_weight_transpose(wq, ws)
    gq, gs, gt, gts = ops.int8_quantize_rows_and_columns.seeded(
        y, column_factor=factor, row_factor=xs, seed=3, offset=4
    )
    dx = ops.int8_mm(gq, wt, gs, st)
    dw = torch.zeros_like(w)
    ops.int8_mm_accumulate_(dw, gt, ops.int8_transpose(xq.flatten(0, -2)), gts)
    normed = ops.int8_add_layer_norm(x, y[..., : x.shape[-1]], bias[: x.shape[-1]])
    activated = (
        ops.int8_gelu(y),
        ops.int8_relu(y),
        ops.int8_silu_mul(y, y),
        ops.int8_rms_norm(y),
        ops.int8_layer_norm(y),
    )
    return y.sin(), dx + 1, dw, *normed, *(t for pair in activated for t in pair)


@on_each_device
@pytest.mark.parametrize("dynamic", [True, False])
def test_compiles_without_a_break(device, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    g = torch.Generator().manual_seed(5)
    for tokens, k, n in ((6, 20, 33), (10, 24, 40), (131, 20, 33)) if dynamic else ((6, 20, 33),):
        x, w, bias = (torch.randn(s, generator=g).to(device) for s in ((2, tokens, k), (n, k), (n,)))
        assert_all_same(compiled(x, w, bias), step(x, w, bias))


@on_each_device
def test_compiles_with_inductor(device):
    torch.compiler.reset()

    def function(x, w):  # operators alone: nothing for inductor's C++ compiler to do
        xq, xs = quantrain.int8_quantize_rows(x)
        wq, ws = quantrain.int8_quantize_rows(w)
        return quantrain.int8_mm(quantrain.int8_transpose(xq), quantrain.int8_transpose(wq)), xs, ws

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for n in (8, 12):
        x, w = torch.randn(n, 16, device=device), torch.randn(n, 24, device=device)
        assert_all_same(compiled(x, w), function(x, w))


@on_each_device
def test_compiled_random_operators_draw_afresh(device):
    torch.compiler.reset()
    x = torch.randn(20, 30, device=device)

    def function(x):
        return tuple(quantrain.int8_quantize_rows(x, stochastic=True)[0] for _ in range(2))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    first, second = compiled(x)
    assert not torch.equal(first, second)  # two draws are not merged into one
    assert not torch.equal(compiled(x)[0], first)
    torch.manual_seed(3)
    assert_all_same(compiled(x), (first, second))
    torch.manual_seed(3)
    assert_all_same(function(x), (first, second))


def test_exports():
    class Model(torch.nn.Module):
        def forward(self, x, wq, ws, bias):
            xq, xs = quantrain.int8_quantize_rows(x)
            y = quantrain.int8_mm(xq, wq, xs, ws, bias, out_dtype=torch.bfloat16)
            return y, *quantrain.int8_gelu(y), *quantrain.int8_quantize_columns(x)

    wq, ws, bias = codes((12, 8)), scales(12), torch.randn(12)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        Model(), (torch.randn(5, 4, 8), wq, ws, bias), dynamic_shapes=({0: batch}, None, None, None)
    )
    x = torch.randn(140, 4, 8)
    assert_all_same(program.module()(x, wq, ws, bias), Model()(x, wq, ws, bias))


def test_meta_gives_the_shapes_of_eager():
    for shape in ((6, 4, 8), (5, 8), (8,)):
        for dtype in (torch.float32, torch.bfloat16):
            eager, meta = (self_products(torch.randn(shape, device=d).to(dtype)) for d in ("cpu", "meta"))
            for a, b in zip(eager, meta, strict=True):
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def self_products(x):
    xq, xs, xt, xts = quantrain.int8_quantize_rows_and_columns(x)
    square = xq.view(-1, xq.shape[-1])
    return (
        *(xq, xs, xt, xts),
        *quantrain.int8_weight_transpose(square, xs),
        quantrain.int8_transpose(square),
        quantrain.int8_mm(xq, square, xs, out_dtype=torch.float16),
        *quantrain.int8_add_rms_norm(x, x),
        *quantrain.int8_layer_norm(x),
        *quantrain.int8_gelu(x),
        *quantrain.int8_relu(x),
        *quantrain.int8_silu_mul(x, x),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(dtype):
    """Codes are taken from the type that is given: rounding to 16 bits first would be a second rounding."""
    x = torch.randn(6, 8)
    plain = self_products(x)
    with torch.autocast("cpu", dtype=dtype):
        assert_all_same(self_products(x), plain)


def test_inference_mode_and_no_gradients():
    x = Sample("", (6, 9)).make()
    expected = self_products(x)
    with torch.inference_mode():
        assert_all_same(self_products(x), expected)
    assert not any(t.requires_grad for t in self_products(x.clone().requires_grad_()) if t.dtype == torch.int8)
    assert_same(x, Sample("", (6, 9)).make())
