"""Norms and activations that end in int8 rows, against float64."""

import pytest
import torch
from reference import int8 as reference
from samples.int8 import (
    EMPTY,
    INF,
    NAN,
    SAMPLES,
    Sample,
    assert_all_same,
    assert_same,
    each,
    in_each_dtype,
    on_each_device,
)

import quantrain

FUSED = [s for s in SAMPLES if s.kind in ("normal", "heavy", "zeros", "constant") and s.name != "many_rows"]


def parameters(sample, device, dtype, seed=1):
    g = torch.Generator().manual_seed(seed)
    n = sample.shape[-1]
    return (1 + 0.3 * torch.randn(n, generator=g)).to(device, dtype), torch.randn(n, generator=g).to(device, dtype)


def check(found, expected, slack=1e-5):
    """codes and scale of `expected` [..., K] float64, from values in float32: within half a step and a little."""
    codes, scale = (t.cpu() for t in found[:2])
    assert codes.dtype == torch.int8 and codes.shape == expected.shape and codes.is_contiguous()
    assert scale.dtype == torch.float32 and scale.shape == (*expected.shape[:-1], 1)
    absmax = expected.abs().amax(-1, keepdim=True)
    # Where a row is nothing but the rounding errors of a difference, they are all there is to compare with.
    noise = slack * absmax + 1e-6
    step = scale.double()
    assert ((step * 127 - absmax).abs() <= noise)[absmax > 2e-6].all()
    assert ((codes.double() * step - expected).abs() <= 0.5 * step + noise)[(absmax > 2e-6).expand_as(codes)].all()


@each(FUSED)
@in_each_dtype
@on_each_device
def test_norms(sample, dtype, device):
    x = sample.make(device, dtype)
    cpu = x.cpu()
    for weight, bias in ((None, None), parameters(sample, device, dtype), parameters(sample, device, torch.float32, 2)):
        on_cpu = [t if t is None else t.cpu() for t in (weight, bias)]
        check(quantrain.int8_layer_norm(x, weight, bias), reference.layer_norm(cpu, *on_cpu), 1e-4)
        check(quantrain.int8_rms_norm(x, weight), reference.rms_norm(cpu, on_cpu[0]))
    check(quantrain.int8_layer_norm(x, weight, None, 0.1), reference.layer_norm(cpu, on_cpu[0], None, 0.1), 1e-4)
    check(quantrain.int8_layer_norm(x, None, bias), reference.layer_norm(cpu, None, on_cpu[1]), 1e-4)
    check(quantrain.int8_rms_norm(x, None, 0.1), reference.rms_norm(cpu, None, 0.1))


@each(FUSED)
@in_each_dtype
@on_each_device
def test_norms_of_a_sum(sample, dtype, device):
    x, residual = sample.make(device, dtype), sample.make(device, dtype, seed=1)
    weight, bias = parameters(sample, device, dtype)
    summed = reference.add(x.cpu(), residual.cpu())
    for post_norm in (False, True):
        for found, expected in (
            (
                quantrain.int8_add_layer_norm(x, residual, weight, bias, post_norm=post_norm),
                reference.layer_norm(summed, weight.cpu(), bias.cpu()),
            ),
            (
                quantrain.int8_add_rms_norm(x, residual, weight, post_norm=post_norm),
                reference.rms_norm(summed, weight.cpu()),
            ),
        ):
            check(found, expected, 1e-4)
            carried = found[2].cpu()
            assert carried.dtype == dtype and carried.shape == x.shape
            if post_norm:
                room = 2e-5 * expected.abs().amax(-1, keepdim=True) + 1e-6
                torch.testing.assert_close(
                    carried.double(), expected, rtol=torch.finfo(dtype).eps, atol=room.max().item()
                )
            else:
                assert_same(carried, summed.contiguous())
    check(quantrain.int8_add_rms_norm(x, residual), reference.rms_norm(summed), 1e-4)


@each(FUSED)
@in_each_dtype
@on_each_device
def test_activations(sample, dtype, device):
    x, up = sample.make(device, dtype), sample.make(device, dtype, seed=1)
    for approximate in ("none", "tanh"):
        check(quantrain.int8_gelu(x, approximate=approximate), reference.gelu(x.cpu(), approximate))
    assert_all_same(quantrain.int8_gelu(x), quantrain.int8_gelu(x, approximate="none"))
    check(quantrain.int8_relu(x), reference.relu(x.cpu()))
    assert_all_same(quantrain.int8_relu(x), quantrain.int8_quantize_rows(x.relu()))  # nothing else is rounded
    check(quantrain.int8_silu_mul(x, up), reference.silu_mul(x.cpu(), up.cpu()))


@in_each_dtype
@on_each_device
def test_activations_far_from_zero(dtype, device):
    """No overflow of an exponential becomes NaN: gelu and silu end in 0 and x."""
    x = torch.tensor([[-1e4, -100.0, -20.0, 20.0, 100.0, 1e4]], device=device).to(dtype)
    for found in (
        quantrain.int8_gelu(x),
        quantrain.int8_gelu(x, approximate="tanh"),
        quantrain.int8_relu(x),
        quantrain.int8_silu_mul(x, torch.ones_like(x)),
    ):
        assert found[0].tolist() == [[0, 0, 0, 0, 1, 127]]
        torch.testing.assert_close(found[1].item(), x.float()[0, -1].item() / 127, rtol=1e-6, atol=0)


def operators(x):
    weight = torch.ones(x.shape[-1], device=x.device, dtype=x.dtype)
    return [
        quantrain.int8_layer_norm(x, weight, weight),
        quantrain.int8_rms_norm(x, weight),
        quantrain.int8_add_layer_norm(x, x, weight, weight),
        quantrain.int8_add_layer_norm(x, x, weight, weight, post_norm=True),
        quantrain.int8_add_rms_norm(x, x, weight),
        quantrain.int8_gelu(x),
        quantrain.int8_gelu(x, approximate="tanh"),
        quantrain.int8_relu(x),
        quantrain.int8_silu_mul(x, x),
    ]


@in_each_dtype
@on_each_device
def test_a_row_with_nan_or_inf_has_scale_nan_and_codes_0(dtype, device):
    x = torch.randn(5, 70).to(device, dtype)
    x[1, 3], x[3, 69] = NAN, INF
    for found, scale, *_ in operators(x):
        assert scale.isnan().flatten().tolist() == [False, True, False, True, False]
        assert (found[[1, 3]] == 0).all() and (found[[0, 2, 4]] != 0).any(1).all()


@in_each_dtype
@on_each_device
def test_relu_of_not_finite_numbers(dtype, device):
    """NaN passes and -Inf is 0, as in PyTorch."""
    x = torch.tensor([[NAN, 1.0], [-INF, 2.0], [INF, 2.0], [-1.0, -0.0]], device=device).to(dtype)
    found, scale = quantrain.int8_relu(x)
    assert scale.isnan().flatten().tolist() == [True, False, True, False]
    assert found.tolist() == [[0, 0], [0, 127], [0, 0], [0, 0]] and scale[3] == 1


@in_each_dtype
@on_each_device
def test_halves_of_one_tensor(dtype, device):
    """What a product of gate and up gives: rows that lie apart, read where they are."""
    for shape, half in (((5, 48), 24), ((2, 7, 66), 33), ((3, 2064), 1032), ((1, 2), 1)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(half)).to(device, dtype)
        gate, up = x[..., :half], x[..., half:]
        factor = torch.rand(half, generator=torch.Generator().manual_seed(1)).to(device)
        whole = gate.contiguous(), up.contiguous()
        for given in (None, factor):
            expected = quantrain.int8_silu_mul(*whole, column_factor=given)
            assert_all_same(quantrain.int8_silu_mul(gate, up, column_factor=given), expected)
            assert_all_same(quantrain.int8_silu_mul(gate, whole[1], column_factor=given), expected)  # steps that differ
            assert_all_same(quantrain.int8_silu_mul(whole[0], up, column_factor=given), expected)
        for function in (quantrain.int8_relu, quantrain.int8_gelu):
            for part, copy in zip((gate, up), whole, strict=True):
                assert_all_same(function(part), function(copy))
        check(quantrain.int8_silu_mul(gate, up), reference.silu_mul(gate.cpu(), up.cpu()))
        across = x.transpose(0, -1)[: shape[0]] if len(shape) == 2 and shape[0] < shape[1] else x
        assert_all_same(quantrain.int8_silu_mul(across, across), quantrain.int8_silu_mul(*[across.contiguous()] * 2))


@in_each_dtype
@on_each_device
def test_zero_rows_have_scale_1(dtype, device):
    x = torch.zeros(3, 20, device=device, dtype=dtype)
    for found, scale in (
        quantrain.int8_layer_norm(x),
        quantrain.int8_rms_norm(x),
        quantrain.int8_gelu(x),
        quantrain.int8_relu(x),
        quantrain.int8_silu_mul(x, x),
    ):
        assert (found == 0).all() and (scale == 1).all()


@each(EMPTY)
@on_each_device
def test_no_rows_give_empty_results(sample, device):
    x = torch.empty(sample.shape, device=device)
    for found, scale, *carried in operators(x):
        assert found.shape == x.shape and scale.shape == (*x.shape[:-1], 1)
        assert all(c.shape == x.shape for c in carried)


def test_the_number_of_threads_changes_nothing():
    x = Sample("", (300, 400), "heavy").make()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = operators(x)
        torch.set_num_threads(3)
        for a, b in zip(operators(x), one, strict=True):
            assert_all_same(a, b)
    finally:
        torch.set_num_threads(threads)


# ---- CUDA ----


@pytest.mark.cuda
@each(FUSED + [Sample("wide", (5, 40001), "heavy"), Sample("very_wide", (3, 65536)), Sample("layer", (300, 4096))])
@in_each_dtype
def test_cpu_and_cuda_are_within_a_code(sample, dtype):
    """Their exponentials and the order of their sums differ in the last bits."""
    for on_cuda, on_cpu in zip(operators(sample.make("cuda", dtype)), operators(sample.make(dtype=dtype)), strict=True):
        same = (on_cuda[1].cpu() - on_cpu[1]).abs() <= 1e-4 * on_cpu[1].abs()
        small = on_cpu[1] < 1e-6  # rows that are nothing but rounding errors
        assert (same | small).all()
        difference = (on_cuda[0].cpu().int() - on_cpu[0].int()).abs()
        assert (difference <= 1)[(~small).expand_as(difference)].all()
        assert (difference > 0).float().mean() < 0.02 or small.any()


@pytest.mark.cuda
def test_a_graph_holds_them():
    x = torch.randn(64, 768, device="cuda", dtype=torch.bfloat16)
    operators(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = operators(x)
    x.copy_(torch.randn(64, 768))
    graph.replay()
    for a, b in zip(results, operators(x), strict=True):
        assert_all_same(a, b)


@on_each_device
@in_each_dtype
@pytest.mark.parametrize("columns", [6, 64, 1030])
def test_a_column_factor_multiplies_what_is_quantized(columns, dtype, device):
    g = torch.Generator().manual_seed(columns)
    x, other = (torch.randn(5, columns, generator=g).to(device, dtype) for _ in range(2))
    factor = torch.rand(columns, generator=g) * 4 + 0.1
    cf, wide = factor.to(device), factor.double()
    for found, expected in (
        (quantrain.int8_layer_norm(x, column_factor=cf), reference.layer_norm(x.cpu())),
        (quantrain.int8_rms_norm(x, column_factor=cf), reference.rms_norm(x.cpu())),
        (quantrain.int8_gelu(x, column_factor=cf), reference.gelu(x.cpu(), "none")),
        (quantrain.int8_relu(x, column_factor=cf), reference.relu(x.cpu())),
        (quantrain.int8_silu_mul(x, other, column_factor=cf), reference.silu_mul(x.cpu(), other.cpu())),
    ):
        check(found, expected * wide, 1e-4)
    plain = quantrain.int8_add_layer_norm(x, other, post_norm=True)
    for found in (
        quantrain.int8_add_layer_norm(x, other, post_norm=True, column_factor=cf),
        quantrain.int8_add_layer_norm(x, other, post_norm=True, column_factor=torch.ones_like(cf)),
    ):
        assert torch.equal(found[2], plain[2])
    assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1])
    summed = reference.add(x.cpu(), other.cpu())
    check(quantrain.int8_add_rms_norm(x, other, column_factor=cf), reference.rms_norm(summed) * wide, 1e-4)
