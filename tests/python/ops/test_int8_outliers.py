"""Int8 products with outlier columns: against float64, edges, refusals, compilers."""

import pytest
import torch
from reference import ptq as reference
from torch.library import opcheck

import quantrain

ops = torch.ops.quantrain
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def operands(m, n, k, outliers, seed=0, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g)
    columns = torch.randperm(k, generator=g)[:outliers].sort().values
    x[:, columns] *= 80
    codes = torch.randint(-127, 128, (n, k), generator=g, dtype=torch.int8)
    scale = torch.rand(n, 1, generator=g) + 0.1
    return x.to(device, dtype), columns.to(device), codes.to(device), scale.to(device)


def product(x, columns, codes, scale, bias=None, **options):
    rows = quantrain.int8_quantize_rows_outliers(x, columns)
    return quantrain.int8_mm_outliers(*rows, codes, codes.index_select(1, columns.clamp_min(0)), scale, bias, **options)


@DEVICES
@DTYPES
@pytest.mark.parametrize(
    "m, n, k, outliers", [(5, 7, 64, 4), (1, 3, 33, 1), (130, 65, 576, 16), (4, 4, 8, 8), (3, 5, 16, 0)]
)
def test_the_product_is_that_of_float64(device, dtype, m, n, k, outliers):
    x, columns, codes, scale = operands(m, n, k, outliers, m + k, dtype, device)
    bias = torch.randn(n, device=device)
    found = product(x, columns, codes, scale, bias).cpu().double()
    want = reference.outlier_product(x.cpu(), columns.tolist(), codes.cpu(), scale.cpu()) + bias.cpu().double()
    w = (codes.cpu().double() * scale.cpu()).abs()
    # A code on the border of two may fall to either side in float32: three of a row's 576 say. Then float32's sums.
    step = x.cpu().double().index_fill(1, columns.cpu(), 0).abs().amax(1, keepdim=True) / 127
    room = 3 * step * w.amax(1) + 2e-5 * (x.cpu().double().abs() @ w.t()) + 1e-5
    assert ((found - want).abs() <= room).all()
    assert (found - want).norm() <= 2e-3 * want.norm()


def exact_product(rows, planes, s, codes, columns, scale, bias=None):
    """In int64, then the epilogue in float32, on the CPU."""
    rows, planes, s, codes, columns, scale = (t.cpu() for t in (rows, planes, s, codes, columns, scale))
    count = len(columns)
    apart = codes.index_select(1, columns.clamp_min(0)).long()
    shift = torch.log2(s[:, 1:] / s[:, :1]).long()
    side = (128 * planes[:, :count].long() + planes[:, count:].long()) @ apart.t() * 2**shift
    total = rows.long() @ codes.long().t() + side
    assert total.abs().max() < 2**31
    y = total.float() * scale.reshape(1, -1) * s[:, :1]
    return y if bias is None else y + bias.cpu()


@DEVICES
@pytest.mark.parametrize(
    "m, n, k, outliers",
    [(70, 33, 200, 16), (1, 8, 16, 3), (130, 72, 576, 16), (40, 128, 128, 32), (9, 24, 48, 40), (200, 264, 1040, 16)],
)
@DTYPES
def test_the_product_of_codes_is_exact(device, dtype, m, n, k, outliers):
    x, columns, codes, scale = operands(m, n, k, outliers, seed=k, device=device)
    x[0, columns] *= 100  # a row whose outliers are shifted
    if m > 2:
        x[1, columns] *= 1e6  # and one with more than a shift takes
        x[2].zero_()
        x[2, columns[0]] = 3.0
    bias = torch.randn(n, device=device)
    rows, planes, s = quantrain.int8_quantize_rows_outliers(x, columns)
    limit = 512 // outliers
    assert ((s[:, 1:] / s[:, :1]).log2() % 1 == 0).all() and (s[:, 1:] <= s[:, :1] * limit).all()
    found = quantrain.int8_mm_outliers(rows, planes, s, codes, codes[:, columns], scale, bias, out_dtype=dtype)
    assert torch.equal(found.cpu(), exact_product(rows, planes, s, codes, columns, scale, bias).to(dtype))


def test_planes_hold_15_bits():
    x, columns, *_ = operands(64, 1, 128, 16)
    x[:8, columns] *= 300
    codes, planes, scale = quantrain.int8_quantize_rows_outliers(x, columns)
    hi, lo = planes[:, :16].double(), planes[:, 16:].double()
    assert lo.min() >= -64 and lo.max() <= 63
    value = (128 * hi + lo) * scale[:, 1:].double()
    assert ((value - x[:, columns].double()).abs() <= 0.501 * scale[:, 1:]).all()
    assert (codes[:, columns] == 0).all()
    main = x.index_fill(1, columns, 0)
    exact = torch.round(main / scale[:, :1])
    assert (codes.double() - exact).abs().max() <= 1
    want = reference.outlier_scales(main.double().abs().amax(1), x[:, columns].double().abs().amax(1), 16)
    for found, exact in zip(scale.double().unbind(1), want, strict=True):
        assert ((found - exact).abs() <= 1e-6 * exact).all()
    # The step is the other columns', or the least power of two times it.
    assert ((128 * hi + lo).abs().amax(1) > 8000).logical_or(scale[:, 0] == scale[:, 1]).all()


@pytest.mark.parametrize("large", [5000.0, 1e8, 1e30])
def test_a_row_with_an_outlier_beyond_the_limit_has_a_larger_scale(large):
    x, columns, codes, scale = operands(4, 6, 64, 16)
    x = x.clamp(-1, 1)
    x[1, columns[3]] = large
    found = product(x, columns, codes, scale)
    want = x.double() @ (codes * scale).double().t()
    assert ((found - want)[1].norm() <= 2e-4 * want[1].norm()) and (found - want).norm() <= 2e-2 * want.norm()


def test_more_outliers_than_one_sum_takes():
    x, columns, codes, scale = operands(3, 5, 700, 600)
    found = product(x, columns, codes, scale)
    want = x.double() @ (codes * scale).double().t()
    assert (found - want).norm() <= 2e-3 * want.norm()


def test_a_column_factor_comes_first():
    x, columns, *_ = operands(8, 1, 32, 3)
    factor = torch.rand(32) + 0.5
    for a, b in zip(
        quantrain.int8_quantize_rows_outliers(x, columns, column_factor=factor),
        quantrain.int8_quantize_rows_outliers(x * factor, columns),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b.double(), atol=1, rtol=1e-6)


def test_a_negative_column_is_none():
    x, columns, codes, scale = operands(4, 5, 32, 3)
    padded = torch.cat([columns, torch.tensor([-1, -1])])
    torch.testing.assert_close(product(x, padded, codes, scale), product(x, columns, codes, scale), rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["main", "outlier"])
def test_a_row_that_is_not_a_number_is_none(value, where):
    x, columns, codes, scale = operands(3, 5, 32, 2)
    other = next(i for i in range(32) if i not in columns.tolist())
    x[1, columns[0] if where == "outlier" else other] = value
    found = product(x, columns, codes, scale)
    assert found[1].isnan().all() and torch.isfinite(found[[0, 2]]).all()


def test_rows_of_zeros_and_no_rows():
    x, columns, codes, scale = operands(3, 5, 32, 2)
    assert (product(x * 0, columns, codes, scale) == 0).all()
    assert product(x[:0], columns, codes, scale).shape == (0, 5)
    assert product(x.view(3, 1, 32), columns, codes, scale).shape == (3, 1, 5)


@DEVICES
def test_outlier_columns(device):
    x = torch.zeros(4, 10, device=device)
    x[1, 3], x[2, 7], x[0, 5], x[3, 5] = 8.0, -9.0, 6.0, 5.9
    assert quantrain.int8_outlier_columns(x, threshold=6.0, capacity=5).tolist() == [7, 3, 5, -1, -1]
    assert quantrain.int8_outlier_columns(x, threshold=6.0, capacity=2).tolist() == [7, 3]
    assert quantrain.int8_outlier_columns(x[:0], threshold=6.0, capacity=2).tolist() == [-1, -1]


@pytest.mark.cuda
def test_cuda_is_the_cpu_bit_for_bit():
    x, columns, codes, scale = operands(70, 40, 200, 16)
    for a, b in zip(
        quantrain.int8_quantize_rows_outliers(x, columns),
        quantrain.int8_quantize_rows_outliers(x.cuda(), columns.cuda()),
        strict=True,
    ):
        assert torch.equal(a, b.cpu())


@pytest.mark.cuda
def test_a_cuda_graph_captures_it():
    x, columns, codes, scale = (t.cuda() for t in operands(40, 64, 128, 16))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        product(x, columns, codes, scale)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = product(x, columns, codes, scale)
    x.copy_(operands(40, 64, 128, 16, seed=9)[0])
    graph.replay()
    torch.testing.assert_close(found, product(x, columns, codes, scale), rtol=0, atol=0)


def test_opcheck():
    x, columns, codes, scale = operands(3, 5, 32, 2)
    rows = ops.int8_quantize_rows_outliers(x, columns)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(ops.int8_quantize_rows_outliers, (x, columns), {"column_factor": torch.rand(32)}, test_utils=tests)
    opcheck(ops.int8_mm_outliers, (*rows, codes, codes[:, columns], scale), {"out_dtype": "bfloat16"}, test_utils=tests)
    opcheck(ops.int8_outlier_columns, (x,), {"threshold": 6.0, "capacity": 4}, test_utils=tests)


X, C = torch.randn(3, 8), torch.tensor([1, 5])
ROWS = (torch.zeros(3, 8, dtype=torch.int8), torch.zeros(3, 4, dtype=torch.int8), torch.ones(3, 2))
B, BO, BS = torch.zeros(5, 8, dtype=torch.int8), torch.zeros(5, 2, dtype=torch.int8), torch.ones(5, 1)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: ops.int8_quantize_rows_outliers(X, C.float()), TypeError, "outlier_columns of int32 or int64"),
        (lambda: ops.int8_quantize_rows_outliers(X, C[None]), ValueError, r"outlier_columns \[Ko\], got \[1, 2\]"),
        (lambda: ops.int8_quantize_rows_outliers(X.double(), C), TypeError, "input of float32"),
        (lambda: ops.int8_quantize_rows_outliers(X, C, column_factor=torch.ones(7)), ValueError, "column_factor of 8"),
        (lambda: ops.int8_mm_outliers(*ROWS, B[:, :7], BO, BS), ValueError, r"a \[..., K\] and b \[N, K\]"),
        (lambda: ops.int8_mm_outliers(*ROWS, B, BO[:, :1], BS), ValueError, r"a_planes \[..., 2 Ko\]"),
        (lambda: ops.int8_mm_outliers(*ROWS[:2], ROWS[2][:, :1], B, BO, BS), ValueError, r"a_scale \[..., 2\]"),
        (lambda: ops.int8_mm_outliers(*ROWS, B.float(), BO, BS), TypeError, "b of int8"),
        (lambda: ops.int8_mm_outliers(*ROWS, B, BO, BS, torch.ones(4)), ValueError, "bias of 5 elements"),
        (lambda: quantrain.int8_outlier_columns(X, threshold=0.0, capacity=2), ValueError, "threshold above 0, got 0"),
        (lambda: quantrain.int8_outlier_columns(X, threshold=6.0, capacity=0), ValueError, "capacity of at least 1"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
