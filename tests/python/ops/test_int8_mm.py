"""The int8 matrix product: exact sums for every shape and path, dequantized in float32 in the stated order."""

import itertools
import re

import pytest
import torch
from reference import int8 as reference
from samples.int8 import INF, NAN, assert_same, codes, on_each_device, scales

import quantrain

ops = torch.ops.quantrain
LONGEST_SUM = 131056  # of codes of any size; longer ones are split

PATHS = ["plain", "avx2", "avx512", "avx_vnni", "avx512_vnni", "onednn"]
SHAPES = [
    *itertools.product((1, 3, 17), (1, 5, 49), (1, 2, 3, 4, 7, 33)),
    (8, 48, 16), (9, 47, 15), (128, 24, 64), (129, 96, 65), (131, 145, 130), (260, 50, 515), (2, 3, 2049), (16, 16, 1024),
]  # fmt: skip


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Each of the CPU's paths that this processor has."""
    monkeypatch.setenv("QUANTRAIN_CPU_INT8", request.param)
    try:
        quantrain.int8_mm(codes((1, 1)), codes((1, 1)))
    except ValueError as error:
        assert "expected QUANTRAIN_CPU_INT8 to name a path that this processor has" in str(error)
        assert request.param not in ("plain", "onednn")
        pytest.skip(f"this processor does not have {request.param}")


def operands(m, n, k, device="cpu", low=-128):
    return codes((m, k), m + n + k, low, device), codes((n, k), m * n + k + 1, low, device)


def check(a, b, *arguments, **keywords):
    found = quantrain.int8_mm(a, b, *arguments, **keywords)
    arguments = [t if t is None else t.cpu() for t in arguments]
    assert_same(found.cpu(), reference.mm(a.cpu(), b.cpu(), *arguments, **keywords))


def test_each_path_is_exact(path):
    for m, n, k in SHAPES:
        a, b = operands(m, n, k)
        check(a, b)
        check(a, b, scales(m), scales(n, 1), torch.randn(n, generator=torch.Generator().manual_seed(2)))


def test_each_path_takes_extreme_codes(path):
    """Sums that saturate 16 bits at the first pair, and one just below 2^31."""
    for x, y in itertools.product((-128, -127, 127), repeat=2):
        for m, n, k in ((1, 1, LONGEST_SUM), (9, 50, 255)):
            a, b = (torch.full((rows, k), value, dtype=torch.int8) for rows, value in ((m, x), (n, y)))
            assert (quantrain.int8_mm(a, b).double() == float(torch.tensor(float(x * y * k)))).all()


def test_each_path_writes_each_type(path):
    a, b = operands(37, 70, 101)
    for dtype, accumulate in itertools.product((torch.float32, torch.float16, torch.bfloat16), (False, True)):
        a_scale, b_scale = scales(37), scales(70, 1)
        if not accumulate:
            check(a, b, a_scale, b_scale, torch.randn(70), out_dtype=dtype)
            continue
        total = torch.randn(37, 70).to(dtype)
        expected = reference.mm(a, b, a_scale, b_scale, accumulator=total)
        quantrain.int8_mm_accumulate_(total, a, b, a_scale, b_scale)
        assert_same(total, expected)


def test_an_unknown_path_is_refused(monkeypatch):
    monkeypatch.setenv("QUANTRAIN_CPU_INT8", "abacus")
    with pytest.raises(ValueError, match=re.escape("int8_mm: expected QUANTRAIN_CPU_INT8 to name a path that this processor has, got abacus")):  # fmt: skip
        quantrain.int8_mm(codes((1, 1)), codes((1, 1)))


@on_each_device
def test_the_sums_are_exact(device):
    large = [(256, 384, 512), (1000, 784, 720), (64, 4096, 100)] if device == "cuda" else []
    for m, n, k in SHAPES + large:
        a, b = operands(m, n, k, device)
        exact = (
            a.cpu().long() @ b.cpu().long().t() if m * n * k < 1e6 else (a.cpu().double() @ b.cpu().double().t()).long()
        )
        assert exact.abs().max() < 2**31
        assert_same(quantrain.int8_mm(a, b).cpu(), exact.float())


@on_each_device
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_scales_bias_and_types(device, out_dtype):
    g = torch.Generator().manual_seed(3)
    for m, n, k in ((1, 1, 1), (19, 33, 70), (130, 64, 256), (64, 200, 48)):
        a, b = operands(m, n, k, device)
        rows = [None, scales(m, device=device), scales(m, device=device).view(m, 1), scales(1, device=device)]
        columns = [None, scales(n, 1, device), scales(n, 1, device).view(n, 1), scales(1, 1, device).view(1, 1)]
        biases = [None] + [
            torch.randn(n, generator=g).to(device, t) for t in (torch.float32, torch.float16, torch.bfloat16)
        ]
        for a_scale, b_scale, bias in itertools.product(rows, columns, biases):
            check(a, b, a_scale, b_scale, bias, out_dtype=out_dtype)
        check(a, b, None, None, torch.randn(n, generator=g, dtype=torch.float64).to(device), out_dtype=out_dtype)


@on_each_device
def test_leading_dimensions_and_strides(device):
    a, b = codes((2, 3, 5, 24), device=device), codes((7, 24), 1, device=device)
    a_scale, b_scale = scales(30, device=device), scales(7, 1, device)
    flat = quantrain.int8_mm(a.view(30, 24), b, a_scale, b_scale)
    for scale in (a_scale, a_scale.view(2, 3, 5, 1), a_scale.view(2, 3, 5)):
        result = quantrain.int8_mm(a, b, scale, b_scale.view(7, 1))
        assert result.shape == (2, 3, 5, 7) and result.is_contiguous()
        assert_same(result.view(30, 7), flat)
    assert_same(quantrain.int8_mm(a[0, 0, 0], b, a_scale[:1], b_scale), flat[0])
    # The same numbers from other strides.
    wide = torch.zeros(60, 48, dtype=torch.int8, device=device)
    wide[::2, ::2] = a.view(30, 24)
    assert_same(quantrain.int8_mm(wide[::2, ::2], b.t().contiguous().t(), a_scale, b_scale), flat)
    one_byte_on = torch.zeros(30 * 24 + 1, dtype=torch.int8, device=device)
    one_byte_on[1:] = a.flatten()
    spread = torch.zeros(14, device=device)
    spread[::2] = b_scale
    assert_same(quantrain.int8_mm(one_byte_on[1:].view(30, 24), b, a_scale, spread[::2]), flat)
    assert_same(quantrain.int8_mm(a.view(30, 24)[:1].expand(30, 24), b), quantrain.int8_mm(a.view(30, 24)[:1], b).expand(30, 7).contiguous())  # fmt: skip


@on_each_device
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_empty_products(device, out_dtype):
    bias = torch.tensor([1.0, -2.5], device=device)
    for a, b, shape in (((0, 4), (2, 4), (0, 2)), ((3, 4), (0, 4), (3, 0)), ((2, 0, 4), (2, 4), (2, 0, 2))):
        result = quantrain.int8_mm(codes(a, device=device), codes(b, device=device), out_dtype=out_dtype)
        assert result.shape == shape and result.dtype == out_dtype
    none = codes((3, 0), device=device), codes((2, 0), device=device)
    assert (quantrain.int8_mm(*none, out_dtype=out_dtype) == 0).all()
    assert_same(quantrain.int8_mm(*none, scales(3, device=device), None, bias, out_dtype=out_dtype), bias.expand(3, 2).to(out_dtype).contiguous())  # fmt: skip
    total = torch.ones(3, 2, device=device, dtype=out_dtype)
    quantrain.int8_mm_accumulate_(total, *none)
    assert (total == 1).all()
    quantrain.int8_mm_accumulate_(total[:0], none[0][:0], none[1])


@on_each_device
def test_a_scale_that_is_nan_or_inf_goes_on(device):
    a, b = codes((4, 40), low=1, device=device), codes((3, 40), 1, low=1, device=device)
    a_scale, b_scale = torch.full((4,), 1e-3, device=device), torch.ones(3, device=device)
    a_scale[1], b_scale[2] = NAN, INF
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        result = quantrain.int8_mm(a, b, a_scale, b_scale, out_dtype=dtype)
        assert result[1].isnan().all() and result[[0, 2, 3]][:, 2].isposinf().all()
        assert result[[0, 2, 3]][:, :2].isfinite().all()
    assert quantrain.int8_mm(a, b, torch.tensor([1e4] * 4, device=device), out_dtype=torch.float16).isinf().all()


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_accumulate_adds_in_float32_and_rounds_once(device, dtype):
    for m, n, k in ((1, 1, 1), (19, 33, 70), (130, 64, 256), (96, 200, 48)):
        a, b = operands(m, n, k, device)
        start = torch.randn(m, n, generator=torch.Generator().manual_seed(k)).to(device, dtype)
        for a_scale, b_scale in (
            (None, None),
            (scales(m, device=device), None),
            (scales(1, device=device), scales(n, 1, device)),
        ):
            total = start.clone()
            assert quantrain.int8_mm_accumulate_(total, a, b, a_scale, b_scale) is None
            cpu = [t if t is None else t.cpu() for t in (a, b, a_scale, b_scale)]
            assert_same(total.cpu(), reference.mm(*cpu, accumulator=start.cpu()))
        # Any strides: the accumulator is written where it is.
        whole = torch.zeros(n, m, device=device, dtype=dtype)
        whole.t().copy_(start)
        quantrain.int8_mm_accumulate_(whole.t(), a, b, scales(1, device=device), scales(n, 1, device))
        assert_same(whole.t().contiguous(), total)


@on_each_device
def test_sums_beyond_int32_are_split(device):
    for k in (LONGEST_SUM + 1, 2 * LONGEST_SUM, 300_001):
        a, b = (torch.full((rows, k), -128, dtype=torch.int8, device=device) for rows in (2, 3))
        a[1] = codes((k,), device=device)
        exact = a.cpu().double() @ b.cpu().double().t()
        bias = torch.tensor([0.0, 1.0, -1.0], device=device)
        torch.testing.assert_close(quantrain.int8_mm(a, b).cpu().double(), exact, rtol=3e-7, atol=512)
        found = quantrain.int8_mm(
            a, b, scales(2, device=device), scales(1, device=device), bias, out_dtype=torch.bfloat16
        )
        expected = exact * scales(1).double() * scales(2).double().view(2, 1) + bias.cpu().double()
        torch.testing.assert_close(found.cpu().double(), expected, rtol=2**-8, atol=0.1)
        total = torch.zeros(2, 3, device=device)
        quantrain.int8_mm_accumulate_(total, a, b)
        torch.testing.assert_close(total.cpu().double(), exact, rtol=3e-7, atol=512)


@on_each_device
def test_codes_and_scales_give_the_product_of_their_matrices(device):
    """What the family is for: the product of two quantized matrices is that of the dequantized ones."""
    x, w = torch.randn(50, 300, device=device), torch.randn(70, 300, device=device) * 0.02
    (xq, xs), (wq, ws) = quantrain.int8_quantize_rows(x), quantrain.int8_quantize_rows(w)
    found = quantrain.int8_mm(xq, wq, xs, ws)
    expected = quantrain.dequantize(xq, xs).double() @ quantrain.dequantize(wq, ws).double().t()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    assert (found - x @ w.t()).norm() < 0.02 * (x @ w.t()).norm()


def test_the_number_of_threads_changes_nothing():
    a, b = operands(300, 500, 200)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = quantrain.int8_mm(a, b, scales(300), scales(500, 1))
        torch.set_num_threads(3)
        assert_same(quantrain.int8_mm(a, b, scales(300), scales(500, 1)), one)
    finally:
        torch.set_num_threads(threads)


# ---- CUDA ----

# The shapes of training steps in small, and those that the kernels' tiles do not divide.
CUDA_SHAPES = [
    (2048, 2048, 2048), (4096, 768, 768), (2048, 3072, 768), (768, 768, 8192), (3072, 768, 4096), (1024, 4096, 1024),
    (1000, 784, 720), (1001, 777, 1003), (8, 4096, 4096), (1, 1000, 512), (4096, 1, 256), (4096, 10, 784), (17, 50304, 64),
]  # fmt: skip


@pytest.mark.cuda
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
def test_cpu_and_cuda_agree(shape, out_dtype):
    m, n, k = shape
    a, b = operands(m, n, k)
    for arguments in ((), (scales(m), scales(n, 1)), (scales(m), scales(n, 1), torch.randn(n)), (None, scales(1), torch.randn(n))):  # fmt: skip
        on_cuda = [t if t is None else t.cuda() for t in arguments]
        found = quantrain.int8_mm(a.cuda(), b.cuda(), *on_cuda, out_dtype=out_dtype)
        assert_same(found.cpu(), quantrain.int8_mm(a, b, *arguments, out_dtype=out_dtype))
    total = torch.randn(m, n).to(out_dtype)
    on_cuda = total.cuda()
    quantrain.int8_mm_accumulate_(total, a, b, scales(m), scales(n, 1))
    quantrain.int8_mm_accumulate_(on_cuda, a.cuda(), b.cuda(), scales(m).cuda(), scales(n, 1).cuda())
    assert_same(on_cuda.cpu(), total)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(2048, 2048, 2048), (768, 768, 8192), (1001, 777, 1003), (33, 10, 5)], ids=str)
def test_a_graph_and_other_streams(shape):
    m, n, k = shape
    a, b = operands(m, n, k, "cuda")
    total = torch.zeros(m, n, device="cuda")

    def step():
        return quantrain.int8_mm(a, b, scale, None, bias, out_dtype=torch.bfloat16)

    scale, bias = scales(m, device="cuda"), torch.randn(n, device="cuda")
    expected = step()
    quantrain.int8_mm_accumulate_(total, a, b, scale)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
        quantrain.int8_mm_accumulate_(total, a, b, scale)
    total.zero_()
    for _ in range(2):
        result.zero_()
        graph.replay()
        assert_same(result, expected)
    once = quantrain.int8_mm(a, b, scale)
    torch.testing.assert_close(total, 2 * once, rtol=1e-6, atol=0)
    a.copy_(operands(m, n, k, "cuda")[0].flip(0))
    graph.replay()
    assert_same(result, step())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = step()
    stream.synchronize()
    assert_same(on_stream, step())
    assert_same(step(), step())  # deterministic
