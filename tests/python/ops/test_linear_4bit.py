"""linear_4bit and linear_4bit_lora: products, gradients, what is kept, dropout, autocast, compilers and refusals."""

import math
from collections import Counter

import pytest
import torch
from reference import four_bit as reference
from samples.four_bit import (
    DTYPES,
    FEW_WEIGHTS,
    INF,
    NAN,
    WEIGHTS,
    Rule,
    Weight,
    assert_same,
    each_weight,
    golden_linear,
    golden_lora,
    in_each_dtype,
    laid_out,
    on_each_device,
    poisoned,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import quantrain

ops = torch.ops.quantrain
METHODS = ["fused", "dequantize", "auto"]
in_each_method = pytest.mark.parametrize("method", METHODS)
TOKENS = [*range(1, 9), 15, 16, 17, 31, 33, 64, 65, 127, 130, 300]

# Norm-wise, of a product of 16-bit numbers: the weight's rounding to their type. Of float32: the order of the sums.
PRODUCT = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-3}
OUTPUT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8 / 3**0.5}


def draw(device, *shapes, dtype=torch.float32, seed=0):
    """The values are the same on every device."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(device, dtype) for shape in shapes]


def leaves(device, *shapes, dtype=torch.float32, seed=0):
    return [t.requires_grad_() for t in draw(device, *shapes, dtype=dtype, seed=seed)]


def assert_near(found, exact, dtype=None, factor=1.0, spread=None):
    """Within the tolerance of the product and the rounding of the output: of the norm of all and, with twice that, of
    each row of 32 numbers or more. Where there are few numbers one rounding counts, half an ulp of weight, scale and
    product each, and terms may cancel: the norm of their `spread` counts if it is larger."""
    dtype = dtype or found.dtype
    assert found.shape == exact.shape
    found, exact = found.detach().double().cpu(), exact.detach().double().cpu()
    assert found.isfinite().all()
    tolerance = factor * PRODUCT[dtype] + OUTPUT[dtype]
    if exact.numel() < 32:
        tolerance *= 2.5
    size = exact.norm() if spread is None else max(exact.norm(), spread.detach().cpu().norm())
    assert (found - exact).norm() <= tolerance * size + 1e-30
    if exact.dim() and exact.shape[-1] >= 32:
        assert ((found - exact).norm(dim=-1) <= 2 * tolerance * exact.norm(dim=-1) + 1e-30).all()


def dtypes(weight, device, method, rows):
    """Those of the input that the method takes."""
    return [t for t in DTYPES if method in weight.methods(device, t, rows)]


def linear(x, packed, keywords, bias=None, **others):
    with poisoned():
        return quantrain.linear_4bit(x, *packed, bias=bias, **keywords, **others)


def lora(x, packed, keywords, a, b, bias=None, scaling=2.0, **others):
    with poisoned():
        return quantrain.linear_4bit_lora(
            x, *packed, bias=bias, lora_a=a, lora_b=b, scaling=scaling, **keywords, **others
        )


# ---- products --------------------------------------------------------------------------------------------------------


@each_weight(WEIGHTS)
@in_each_dtype
@on_each_device
def test_products_of_every_weight(weight, dtype, device):
    packed, keywords, w = weight.pack(device)
    for rows in (1, 5, 33):
        x, bias = draw(device, (rows, weight.k), (weight.n,), dtype=dtype, seed=rows)
        for shift in (None, bias):
            exact, spread = reference.linear(x, w, shift), reference.spread(x, w, shift)
            for method in weight.methods(device, dtype, rows):
                y = linear(x, packed, keywords, shift, method=method)
                assert y.dtype == dtype and y.is_contiguous() and not y.requires_grad
                assert_near(y, exact, spread=spread)


@each_weight(FEW_WEIGHTS)
@pytest.mark.parametrize("rows", TOKENS)
@on_each_device
def test_products_of_every_number_of_rows(rows, weight, device):
    packed, keywords, w = weight.pack(device)
    for dtype in DTYPES:
        x, bias, g = draw(device, (rows, weight.k), (weight.n,), (rows, weight.n), dtype=dtype, seed=rows)
        for method in weight.methods(device, dtype, rows):
            x.requires_grad_()
            y = linear(x, packed, keywords, bias, method=method)
            assert_near(y, reference.linear(x, w, bias))
            with poisoned():
                (grad_input,) = torch.autograd.grad(y, x, g)
            assert grad_input.dtype == dtype
            assert_near(grad_input, reference.linear_gradients(g, w)[0])


# Sizes around every tile: with blocks of rows, or flat.
SIZES = [
    (1, 1),
    (2, 1),
    (1, 2),
    (3, 7),
    (8, 63),
    (15, 64),
    (16, 128),
    (17, 65),
    (63, 192),
    (65, 320),
    (127, 448),
    (129, 127),
    (255, 64),
    (257, 576),
    (130, 1027),
    (96, 2240),
]


@pytest.mark.parametrize(("n", "k"), SIZES, ids=str)
@on_each_device
def test_products_of_odd_sizes(n, k, device):
    for weight in (Weight("sizes", n, k), Weight("nested", n, k, nested=True)):
        packed, keywords, w = weight.pack(device)
        for dtype in DTYPES:
            for rows in (1, 3, 17, 66):
                x, bias, g = draw(device, (rows, k), (n,), (rows, n), dtype=dtype, seed=n + rows)
                spreads = reference.spread(x, w, bias), reference.spread(g, w.t())
                x.requires_grad_()
                for method in weight.methods(device, dtype, rows):
                    y = linear(x, packed, keywords, bias, method=method, out_features=n)
                    assert_near(y, reference.linear(x, w, bias), factor=1 if k > 64 else 2, spread=spreads[0])
                    grad_input, factor = torch.autograd.grad(y, x, g)[0], 1 if n > 64 else 2
                    assert_near(grad_input, reference.linear_gradients(g, w)[0], factor=factor, spread=spreads[1])


@on_each_device
def test_out_features(device):
    """Where rows have one element, bytes do not say whether their number is odd."""
    for n in (5, 6):
        packed, keywords, w = Weight("column", n, 1).pack(device)
        x = draw(device, (4, 1))[0].requires_grad_()
        y = linear(x, packed, keywords, out_features=n)
        assert_near(y, reference.linear(x, w))
        assert_near(torch.autograd.grad(y, x, torch.ones_like(y))[0], w.double().sum(0).expand(4, 1))
    assert linear(x, packed, keywords).shape == (4, 6)
    packed, keywords, w = WEIGHTS[0].pack(device)
    x = draw(device, (4, 256))[0]
    assert_same(linear(x, packed, keywords, out_features=128), linear(x, packed, keywords))
    with pytest.raises(ValueError, match="linear_4bit: .*out_features.*128.*127"):
        linear(x, packed, keywords, out_features=127)


@pytest.mark.cuda
def test_fused_says_what_it_does_not_take():
    for weight, dtype, rows in (
        (WEIGHTS[0], torch.float32, 4),
        *([(WEIGHTS[0], torch.bfloat16, 65)] if torch.cuda.get_device_capability()[0] != 9 else []),
        (Weight("k", 32, 100), torch.bfloat16, 4),
        (Weight("block", 32, 128, block_size=32), torch.float16, 4),
        (Weight("float_zero", 32, 128, affine="float"), torch.bfloat16, 4),
    ):
        packed, keywords, _ = weight.pack("cuda")
        x = draw("cuda", (rows, weight.k), dtype=dtype)[0]
        assert not weight.takes_fused("cuda", dtype, rows)
        with pytest.raises(ValueError, match="linear_4bit: .*fused"):
            quantrain.linear_4bit(x, *packed, method="fused", **keywords)


@on_each_device
@pytest.mark.parametrize("shape", [(256,), (1, 256), (2, 5, 256), (2, 3, 4, 256), (0, 256), (2, 0, 256)], ids=str)
def test_inputs_of_any_rank(shape, device):
    packed, keywords, w = WEIGHTS[0].pack(device)
    for dtype in DTYPES:
        for method in WEIGHTS[0].methods(device, dtype, 24):
            x, bias = leaves(device, shape, (128,), dtype=dtype)
            y = linear(x, packed, keywords, bias, method=method)
            assert y.shape == (*shape[:-1], 128) and y.dtype == dtype
            assert_near(y, reference.linear(x, w, bias))
            g = draw(device, y.shape, dtype=dtype, seed=3)[0]
            grad_input, grad_bias = torch.autograd.grad(y, (x, bias), g)
            expected = reference.linear_gradients(g, w)
            assert_near(grad_input, expected[0])
            assert_near(grad_bias, expected[1])


@on_each_device
@pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "expanded"])
@in_each_method
def test_inputs_of_any_strides(layout, method, device):
    packed, keywords, w = WEIGHTS[0].pack(device)
    for dtype in dtypes(WEIGHTS[0], device, method, 37):
        x, bias, g = draw(device, (37, 256), (128,), (37, 128), dtype=dtype)
        x, bias = laid_out(x, layout), laid_out(bias, "strided")
        before = x.clone()
        exact, expected = reference.linear(x, w, bias), reference.linear_gradients(laid_out(g, layout), w)[0]
        assert_near(linear(x, packed, keywords, bias, method=method), exact)
        assert_same(x.contiguous(), before.contiguous())
        x = x.detach().requires_grad_()
        y = linear(x, packed, keywords, bias, method=method)
        assert_near(torch.autograd.grad(y, x, laid_out(g, layout))[0], expected)


@on_each_device
def test_a_gradient_that_is_one_number(device):
    packed, keywords, w = WEIGHTS[0].pack(device)
    x, bias = leaves(device, (9, 256), (128,))
    linear(x, packed, keywords, bias).sum().backward()  # expanded
    assert_near(x.grad, w.double().sum(0).expand(9, 256))
    assert (bias.grad == 9).all()


@on_each_device
def test_golden_product(device):
    x, codes, scale = (t.to(device) for t in golden_linear())
    for method in Weight("golden", 2, 64).methods(device, torch.float32, 1):
        x = x.detach().requires_grad_()
        y = quantrain.linear_4bit(x, codes, scale, method=method)
        assert y.tolist() == pytest.approx([1.64266209, 0.47782713], rel=1e-5)
        (grad,) = torch.autograd.grad(y, x, torch.tensor([1.0, -0.5], device=device))
        assert grad[:4].tolist() == pytest.approx([-0.74568358, -0.44199209, 0.61625487, -0.57498666], rel=1e-5)
        assert grad.sum().item() == pytest.approx(0.43860758, abs=1e-4)
        assert grad.square().sum().item() == pytest.approx(23.47564681, rel=1e-5)


@on_each_device
@in_each_method
def test_float32_is_not_rounded_to_less(method, device):
    """Cancellation that tf32 or bfloat16 would show: rows that differ in their last bits only."""
    if method == "fused" and device == "cuda":
        pytest.skip("not of float32")
    packed, keywords, w = WEIGHTS[0].pack(device)
    x, step = draw(device, (40, 256), (40, 256))
    y = linear(x, packed, keywords, method=method)
    other = linear(x + 2.0**-12 * step, packed, keywords, method=method)
    exact = reference.linear(x + 2.0**-12 * step, w) - reference.linear(x, w)
    assert (other.double() - y.double() - exact).norm() < 0.02 * exact.norm()


@on_each_device
@in_each_method
@each_weight(FEW_WEIGHTS)
def test_single_elements_go_where_they_belong(weight, method, device):
    """Rows of the identity: column k of the weight, alone and to the bit of its rounding."""
    packed, keywords, w = weight.pack(device)
    for dtype in dtypes(weight, device, method, 64):
        ulps = {torch.float32: 2.0**-20, torch.float16: 3 * 2.0**-10, torch.bfloat16: 3 * 2.0**-7}[dtype]
        found = [
            linear(x, packed, keywords, method=method)
            for x in torch.eye(weight.k, device=device, dtype=dtype).split(64)
        ]
        bound = ulps * w.double().abs() + 2.0**-25
        assert ((torch.cat(found).t().double() - w.double()).abs() <= bound).all()
        found = []
        for grad in torch.eye(weight.n, device=device, dtype=dtype).split(64):
            x = torch.zeros(len(grad), weight.k, device=device, dtype=dtype, requires_grad=True)
            found.append(torch.autograd.grad(linear(x, packed, keywords, method=method), x, grad)[0])
        assert ((torch.cat(found).double() - w.double()).abs() <= bound).all()


@on_each_device
@in_each_method
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nan_and_inf_stay_in_their_rows(bad, method, device):
    for weight in FEW_WEIGHTS:
        packed, keywords, _ = weight.pack(device)
        for rows in (1, 7, 70):
            for dtype in dtypes(weight, device, method, rows):
                x = draw(device, (rows, weight.k), dtype=dtype)[0]
                x[rows // 2, weight.k // 2] = bad
                finite = torch.arange(rows) != rows // 2
                y = linear(x, packed, keywords, method=method).cpu()
                assert y[finite].isfinite().all() and not y[~finite].isfinite().any()


@on_each_device
@in_each_method
def test_a_block_that_is_nan_reaches_its_outputs(method, device):
    for weight in (Weight("rows", 96, 256), Weight("flat", 33, 65)):
        (codes, scale), keywords, _ = weight.pack(device)
        scale = scale.clone()
        scale.view(-1)[scale.numel() // 2] = NAN
        first = scale.numel() // 2 * 64
        rows = torch.arange(first, min(first + 64, weight.n * weight.k)).div(weight.k, rounding_mode="floor").unique()
        columns = torch.arange(first, min(first + 64, weight.n * weight.k)) % weight.k
        for m in (1, 40):
            for dtype in dtypes(weight, device, method, m):
                x = draw(device, (m, weight.k), dtype=dtype)[0].requires_grad_()
                y = linear(x, (codes, scale), keywords, method=method)
                bad = torch.zeros(weight.n, dtype=torch.bool)
                bad[rows] = True
                assert torch.equal(y.isnan().cpu(), bad.expand(m, -1))
                (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
                bad = torch.zeros(weight.k, dtype=torch.bool)
                bad[columns] = True
                assert torch.equal(grad.isnan().cpu(), bad.expand(m, -1))


@on_each_device
@in_each_method
def test_a_weight_of_zeros_gives_the_bias(method, device):
    codes = torch.full((40, 64), 0x5A, dtype=torch.uint8, device=device)
    for dtype in dtypes(Weight("zeros", 40, 128), device, method, 9):
        x, bias = draw(device, (9, 128), (40,), dtype=dtype)
        y = linear(x, (codes, torch.zeros(40, 2, device=device)), {}, bias, method=method)
        assert_same(y, bias.expand(9, 40).contiguous())


@on_each_device
@in_each_method
def test_large_and_small_scales(method, device):
    """Of bfloat16's range; a float16 product must not overflow on the way where its result does not."""
    (codes, scale), keywords, w = WEIGHTS[0].pack(device)
    cases = [(t, f) for t in (torch.float32, torch.bfloat16) for f in (2.0**100, 2.0**-90)]
    for dtype, factor in (*cases, (torch.float16, 2.0**10)):
        if method not in WEIGHTS[0].methods(device, dtype, 9):
            continue
        x = draw(device, (9, 256), dtype=dtype)[0]
        y = linear(x, (codes, scale * factor), keywords, method=method)
        assert_near(y.double() / factor, reference.linear(x, w), dtype)


@on_each_device
@in_each_method
@each_weight(FEW_WEIGHTS)
def test_two_runs_have_equal_bits(weight, method, device):
    packed, keywords, _ = weight.pack(device)
    for rows in (1, 16, 65, 300):
        for dtype in dtypes(weight, device, method, rows):
            x, bias, g = draw(device, (rows, weight.k), (weight.n,), (rows, weight.n), dtype=dtype)
            x.requires_grad_()
            results = []
            for _ in range(3):
                y = linear(x, packed, keywords, bias, method=method)
                results.append((y.detach(), torch.autograd.grad(y, x, g)[0]))
            for other in results[1:]:
                assert_same(other[0], results[0][0])
                assert_same(other[1], results[0][1])


@pytest.mark.parametrize("weight", FEW_WEIGHTS, ids=str)
def test_the_number_of_threads_changes_nothing(weight):
    packed, keywords, _ = weight.pack()
    x = draw("cpu", (33, weight.k))[0]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = linear(x, packed, keywords, method="fused")
        torch.set_num_threads(3)
        assert_same(linear(x, packed, keywords, method="fused"), one)
    finally:
        torch.set_num_threads(threads)


# ---- which products, and what is kept --------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def kept_bytes(run, known):
    """(bytes of what autograd saves in `run` that are not in `known`, the number of saved tensors that are)."""
    others, parts = [], [0]
    storages = {t.untyped_storage().data_ptr() for t in known}

    def pack(tensor):
        if tensor.numel() and tensor.untyped_storage().data_ptr() in storages:
            parts[0] += 1
        else:
            others.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(others), parts[0]


@on_each_device
@in_each_method
@each_weight(WEIGHTS[:8] + [w for w in WEIGHTS if w.affine or w.rule.format == "table"])
def test_only_the_packed_weight_is_kept(weight, method, device):
    packed, keywords, _ = weight.pack(device)
    parts = [*packed, *(t for t in keywords.values() if torch.is_tensor(t))]

    def kept(x, bias):
        return kept_bytes(lambda: quantrain.linear_4bit(x, *packed, bias=bias, **keywords, method=method), parts)

    for dtype in dtypes(weight, device, method, 33):
        x, bias = leaves(device, (33, weight.k), (weight.n,), dtype=dtype)
        others, known = kept(x, bias)
        assert others == 0 and known <= len(parts)
        assert kept(x.detach(), bias)[0] == 0


@on_each_device
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_lora_keeps_rank_sized_tensors(dropout, device):
    packed, keywords, _ = WEIGHTS[1].pack(device)
    parts = [*packed, *(t for t in keywords.values() if torch.is_tensor(t))]
    rows, rank = 65, 4
    x, a, b, bias = leaves(device, (rows, 256), (rank, 256), (128, rank), (128,), dtype=torch.bfloat16)
    adapter = dict(lora_a=a, lora_b=b, scaling=2.0, dropout=dropout)
    others, _ = kept_bytes(
        lambda: quantrain.linear_4bit_lora(x, *packed, bias=bias, **adapter, **keywords), [*parts, x, a, b]
    )
    assert others <= 4 * rows * rank + 64  # x A^T in float32 at most, no mask of x


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 16, 32])
def test_fused_products_never_write_the_weight(rows):
    packed, keywords, _ = Weight("large", 2048, 4096).pack("cuda")
    x = draw("cuda", (rows, 4096), dtype=torch.bfloat16)[0]
    y = quantrain.linear_4bit(x, *packed, method="fused", **keywords)  # what libraries keep for themselves
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = quantrain.linear_4bit(x, *packed, method="fused", **keywords)
    extra = torch.cuda.max_memory_allocated() - before - 2 * y.numel()
    assert extra < 2048 * 4096, f"{extra} bytes besides the result"  # half of the weight in bfloat16


@on_each_device
def test_a_frozen_input_needs_no_product_backward(device):
    packed, keywords, _ = WEIGHTS[0].pack(device)
    x, bias = leaves(device, (33, 256), (128,))
    y = quantrain.linear_4bit(x.detach(), *packed, bias=bias, **keywords)
    with Calls() as calls:
        (grad,) = torch.autograd.grad(y, bias, torch.ones_like(y))
    assert not any("4bit" in name for name in calls.count) and (grad == 33).all()
    y = quantrain.linear_4bit(x, *packed, bias=bias.detach(), **keywords)
    assert torch.autograd.grad(y, x, torch.ones_like(y))[0].shape == x.shape
    assert not quantrain.linear_4bit(x.detach(), *packed, **keywords).requires_grad


def test_a_weight_changed_before_backward_is_found():
    (codes, scale), keywords, _ = WEIGHTS[0].pack()
    for changed in (codes, scale):
        x = leaves("cpu", (5, 256))[0]
        y = quantrain.linear_4bit(x, codes, scale, **keywords)
        changed.mul_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_checkpointing_repeats_the_forward_pass():
    packed, keywords, _ = WEIGHTS[1].pack()
    x, bias = leaves("cpu", (9, 256), (128,))

    def block(x):
        return quantrain.linear_4bit(x.relu(), *packed, bias=bias, **keywords).sin()

    expected = torch.autograd.grad(block(x).sum(), (x, bias))
    for mine, other in zip(
        torch.autograd.grad(checkpoint(block, x, use_reentrant=False).sum(), (x, bias)), expected, strict=True
    ):
        assert_same(mine, other)


# ---- derivatives -----------------------------------------------------------------------------------------------------


@each_weight(WEIGHTS)
@in_each_dtype
@on_each_device
def test_gradients(weight, dtype, device):
    packed, keywords, w = weight.pack(device)
    for rows in (3, 40):
        for method in weight.methods(device, dtype, 2 * rows):
            x, bias = leaves(device, (2, rows, weight.k), (weight.n,), dtype=dtype)
            y = linear(x, packed, keywords, bias, method=method)
            g = draw(device, y.shape, dtype=dtype, seed=5)[0]
            with poisoned():
                grad_input, grad_bias = torch.autograd.grad(y, (x, bias), g)
            assert grad_input.dtype == dtype and grad_bias.dtype == dtype
            expected = reference.linear_gradients(g, w)
            assert_near(grad_input, expected[0])
            assert_near(grad_bias, expected[1])


@on_each_device
@in_each_method
def test_finite_differences(method, device):
    """Of the operator itself: it is linear, so a step of any size will do."""
    if method == "fused" and device == "cuda":
        pytest.skip("not of float32")
    packed, keywords, _ = WEIGHTS[0].pack(device)
    x, step, g = draw(device, (6, 256), (6, 256), (6, 128))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(linear(x, packed, keywords, method=method), x, g)
    difference = linear(x + step, packed, keywords, method=method) - linear(x, packed, keywords, method=method)
    found, expected = (difference.double() * g).sum(), (grad.double() * step).sum()
    assert abs(found - expected) < 1e-4 * (grad.double() * step).norm() * math.sqrt(grad.numel())


@on_each_device
@in_each_method
@each_weight(FEW_WEIGHTS)
def test_second_derivatives(weight, method, device):
    """grad_input is linear in grad_output and does not depend on the input."""
    if method == "fused" and device == "cuda":
        pytest.skip("not of float32")
    packed, keywords, w = weight.pack(device)
    x, g, v = draw(device, (7, weight.k), (7, weight.n), (7, weight.k))
    x.requires_grad_()
    g.requires_grad_()
    y = quantrain.linear_4bit(x, *packed, **keywords, method=method)
    (grad,) = torch.autograd.grad(y, x, g, create_graph=True)
    assert grad.requires_grad
    found, none = torch.autograd.grad(grad, (g, x), v, allow_unused=True)
    assert_near(found, reference.linear(v, w))
    assert none is None or not none.any()
    penalty = (
        torch.autograd.grad(
            quantrain.linear_4bit(x, *packed, **keywords, method=method).sin().sum(), x, create_graph=True
        )[0]
        .square()
        .sum()
    )
    (found,) = torch.autograd.grad(penalty, x)
    exact = x.detach().double().requires_grad_()
    wide = w.double()
    first = torch.autograd.grad((exact @ wide.t()).sin().sum(), exact, create_graph=True)[0]
    (expected,) = torch.autograd.grad(first.square().sum(), exact)
    assert (found.double() - expected).norm() <= 1e-4 * expected.norm()


# ---- autocast and types ----------------------------------------------------------------------------------------------


@on_each_device
@in_each_method
def test_autocast_casts_the_input(method, device):
    packed, keywords, w = WEIGHTS[1].pack(device)
    x, bias, g = draw(device, (30, 256), (128,), (30, 128))
    x.requires_grad_()
    bias.requires_grad_()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device, dtype=dtype):
            y = quantrain.linear_4bit(x, *packed, bias=bias, **keywords, method=method)
        assert y.dtype == dtype
        assert_near(y, reference.linear(x.to(dtype), w, bias), factor=1.5)
        grads = torch.autograd.grad(y, (x, bias), g.to(dtype))
        assert [t.dtype for t in grads] == [torch.float32] * 2
        assert_near(grads[0], reference.linear_gradients(g.to(dtype), w)[0], dtype)
        with torch.autocast(device, enabled=False):
            assert quantrain.linear_4bit(x, *packed, **keywords).dtype == torch.float32


@on_each_device
def test_autocast_of_lora(device):
    packed, keywords, w = WEIGHTS[1].pack(device)
    x, a, b, bias, g = draw(device, (33, 256), (4, 256), (128, 4), (128,), (33, 128))
    tensors = [t.requires_grad_() for t in (x, a, b, bias)]
    with torch.autocast(device, dtype=torch.bfloat16):
        y = lora(x, packed, keywords, a, b, bias)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y, tensors, g.bfloat16())
    assert [t.dtype for t in grads] == [torch.float32] * 4
    assert_near(y, reference.lora(x, w, a, b, 2.0, bias), factor=3)
    for mine, exact in zip(grads, reference.lora_gradients(g, x, w, a, b, 2.0), strict=True):
        assert_near(mine, exact, torch.bfloat16, factor=3)


@on_each_device
def test_a_bias_of_float32_with_16_bit_input(device):
    packed, keywords, w = WEIGHTS[0].pack(device)
    x, bias = leaves(device, (9, 256), (128,), dtype=torch.bfloat16)
    bias = bias.detach().float().requires_grad_()
    y = quantrain.linear_4bit(x, *packed, bias=bias, **keywords)
    assert y.dtype == torch.bfloat16
    assert_near(y, reference.linear(x, w, bias), factor=1.5)
    assert [t.dtype for t in torch.autograd.grad(y, (x, bias), torch.ones_like(y))] == [torch.bfloat16, torch.float32]


# ---- LoRA ------------------------------------------------------------------------------------------------------------


@on_each_device
def test_golden_lora(device):
    x, codes, scale = (t.to(device) for t in golden_linear())
    a, b, scaling = golden_lora()
    for method in Weight("golden", 2, 64).methods(device, torch.float32, 1):
        tensors = [t.detach().to(device).requires_grad_() for t in (x, a, b)]
        y = quantrain.linear_4bit_lora(
            tensors[0], codes, scale, lora_a=tensors[1], lora_b=tensors[2], scaling=scaling, method=method
        )
        assert y.tolist() == pytest.approx([1.56941990, 0.10673338], rel=1e-5)
        grad_input, grad_a, grad_b = torch.autograd.grad(y, tensors, torch.tensor([1.0, -0.5], device=device))
        expected = [-0.29255858, -0.52011709, 1.02250487, -0.69998666]
        assert grad_input[:4].tolist() == pytest.approx(expected, rel=1e-5)
        assert grad_a[:, 0].tolist() == pytest.approx([1.875, -0.46875], rel=1e-6)
        assert grad_a.sum().item() == pytest.approx(1.59375, rel=1e-5)
        assert grad_b.flatten().tolist() == pytest.approx([0.390625, 3.359375, -0.1953125, -1.6796875], rel=1e-5)


@each_weight([w for w in WEIGHTS if w.name not in ("nf4_block_4096", "nf4_wide")])
@on_each_device
def test_lora_of_every_weight(weight, device):
    packed, keywords, w = weight.pack(device)
    for dtype in DTYPES:
        for rows, rank in ((1, 1), (5, 8), (33, 3), (70, 64)):
            x, a, b, bias, g = draw(
                device,
                (rows, weight.k),
                (rank, weight.k),
                (weight.n, rank),
                (weight.n,),
                (rows, weight.n),
                dtype=dtype,
                seed=rank,
            )
            a, b = a * weight.k**-0.5, b * rank**-0.5 / 8
            for method in weight.methods(device, dtype, rows):
                tensors = [t.detach().requires_grad_() for t in (x, a, b, bias)]
                y = lora(tensors[0], packed, keywords, *tensors[1:], scaling=0.5, method=method)
                assert y.dtype == dtype
                spread = reference.spread(x, w, bias)
                assert_near(y, reference.lora(x, w, a, b, 0.5, bias), factor=2, spread=spread)
                with poisoned():
                    grads = torch.autograd.grad(y, tensors, g)
                for mine, exact in zip(grads, reference.lora_gradients(g, x, w, a, b, 0.5), strict=True):
                    assert mine.dtype == dtype
                    assert_near(mine, exact, factor=2)


@pytest.mark.parametrize("rows", TOKENS)
@on_each_device
def test_lora_of_every_number_of_rows(rows, device):
    packed, keywords, w = WEIGHTS[1].pack(device)
    for dtype in DTYPES:
        x, a, b, g = draw(device, (rows, 256), (16, 256), (128, 16), (rows, 128), dtype=dtype, seed=rows)
        a, b = a / 16, b / 16
        tensors = [t.requires_grad_() for t in (x, a, b)]
        y = lora(*tensors[:1], packed, keywords, *tensors[1:], scaling=2.0)
        assert_near(y, reference.lora(x, w, a, b, 2.0), factor=2)
        grads = torch.autograd.grad(y, tensors, g)
        for mine, exact in zip(grads, reference.lora_gradients(g, x, w, a, b, 2.0), strict=False):
            assert_near(mine, exact, factor=2)


@on_each_device
def test_lora_of_any_rank_and_strides_of_input(device):
    packed, keywords, w = WEIGHTS[0].pack(device)
    for shape in ((256,), (2, 3, 256), (0, 256)):
        x, a, b = leaves(device, shape, (4, 256), (128, 4))
        y = lora(x, packed, keywords, a, b)
        assert y.shape == (*shape[:-1], 128)
        assert_near(y, reference.lora(x, w, a, b, 2.0))
        g = torch.ones_like(y)
        for mine, exact in zip(
            torch.autograd.grad(y, (x, a, b), g), reference.lora_gradients(g, x, w, a, b, 2.0), strict=False
        ):
            assert_near(mine, exact)
    x, a, b = draw(device, (24, 256), (256, 4), (128, 8))
    y = lora(laid_out(x, "transposed"), packed, keywords, a.t(), b[:, ::2])
    assert_near(y, reference.lora(x, w, a.t(), b[:, ::2], 2.0))


@on_each_device
def test_lora_of_zero_b_is_the_plain_product(device):
    packed, keywords, _ = WEIGHTS[0].pack(device)
    x, a = draw(device, (9, 256), (4, 256))
    y = lora(x, packed, keywords, a, torch.zeros(128, 4, device=device), method="dequantize")
    assert_near(y, linear(x, packed, keywords, method="dequantize").double())


@on_each_device
@pytest.mark.parametrize("needed", ["x", "a", "b", "ab", "xa", "xab"])
def test_lora_gradients_that_are_needed(needed, device):
    packed, keywords, w = WEIGHTS[0].pack(device)
    named = dict(zip("xab", draw(device, (9, 256), (4, 256), (128, 4)), strict=True))
    expected = dict(
        zip(
            "xab",
            reference.lora_gradients(torch.ones(9, 128, device=device), *(named["x"], w, named["a"], named["b"]), 2.0),
            strict=False,
        )
    )
    for name in needed:
        named[name].requires_grad_()
    y = lora(named["x"], packed, keywords, named["a"], named["b"])
    found = torch.autograd.grad(y, [named[name] for name in needed], torch.ones_like(y))
    for name, mine in zip(needed, found, strict=True):
        assert_near(mine, expected[name])


def visible_mask(device, size=64, rows=40, dtype=torch.float32):
    """Arguments whose output is the input under its mask: weight 0, A and B the identity, scaling 1."""
    packed = torch.full((size, size // 2), 0x77, dtype=torch.uint8, device=device), torch.zeros(size, 1, device=device)
    eye = torch.eye(size, device=device, dtype=dtype)
    return packed, eye, torch.ones(rows, size, device=device, dtype=dtype)


@on_each_device
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_a_share_and_scales_it(p, device):
    packed, eye, x = visible_mask(device, rows=4000)
    torch.manual_seed(3)
    y = lora(x, packed, {}, eye, eye, scaling=1.0, dropout=p)
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=1e-5, atol=0)
    n = y.numel()
    z = abs(kept.sum().item() - n * (1 - p)) / math.sqrt(n * p * (1 - p))
    assert z < 5.5  # false alarms: 4e-8
    # Of rows and of columns too, and neighbors are independent.
    for dim, count in ((0, 4000), (1, 64)):
        z = (kept.double().sum(dim) - count * (1 - p)).abs() / math.sqrt(count * p * (1 - p))
        assert z.max() < 6.5
    centered = kept.double() - (1 - p)
    for a, b in ((centered[:, 1:], centered[:, :-1]), (centered[1:], centered[:-1])):
        assert abs((a * b).sum().item()) / (p * (1 - p) * math.sqrt(a.numel())) < 5.5


@on_each_device
def test_the_gradients_see_the_masks_of_the_forward_pass(device):
    for dtype in (torch.float32, torch.bfloat16):
        packed, eye, x = visible_mask(device, dtype=dtype)
        torch.manual_seed(3)
        mask = lora(x, packed, {}, eye, eye, scaling=1.0, dropout=0.3)
        assert 0 < (mask == 0).sum() < mask.numel()
        x, a, b, g = draw(device, (40, 64), (8, 64), (64, 8), (40, 64), dtype=dtype)
        tensors = [t.requires_grad_() for t in (x, a, b)]
        torch.manual_seed(3)  # the mask depends on the input's shape alone
        y = lora(*tensors[:1], packed, {}, *tensors[1:], scaling=0.5, dropout=0.3)
        w = torch.zeros(64, 64, device=device)
        assert_near(y, reference.lora(x, w, a, b, 0.5, mask=mask), factor=2)
        grads = torch.autograd.grad(y, tensors, g)
        for mine, exact in zip(grads, reference.lora_gradients(g, x, w, a, b, 0.5, mask), strict=False):
            assert_near(mine, exact, factor=2)


@on_each_device
def test_dropout_leaves_the_plain_product_alone(device):
    packed, keywords, w = WEIGHTS[0].pack(device)
    x, a = draw(device, (9, 256), (4, 256))
    y = lora(x, packed, keywords, a, torch.zeros(128, 4, device=device), dropout=0.5)
    assert_near(y, reference.linear(x, w))


@on_each_device
def test_dropout_follows_generators(device):
    packed, eye, x = visible_mask(device)
    run = lambda generator=None, p=0.5: lora(x, packed, {}, eye, eye, scaling=1.0, dropout=p, generator=generator)
    torch.manual_seed(11)
    first, second = run(), run()
    assert not torch.equal(first, second)
    torch.manual_seed(11)
    assert_same(run(), first)
    assert_same(run(torch.Generator(device).manual_seed(11)), first)
    state = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    run(torch.Generator(device).manual_seed(1))
    run(p=0.0)  # draws nothing
    assert torch.equal(state, torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state())


@pytest.mark.cuda
def test_masks_on_cuda_are_the_cpus():
    """One seed and offset, one mask: by the overload that takes them."""
    found = []
    for device in ("cpu", "cuda"):
        packed, eye, x = visible_mask(device)
        found.append(
            ops.linear_4bit_lora.seeded(
                x, *packed, lora_a=eye, lora_b=eye, scaling=1.0, dropout=0.4, seed=5, offset=8
            ).cpu()
        )
    assert torch.equal(found[0] == 0, found[1] == 0)


def test_the_random_operator_says_so():
    assert torch.Tag.nondeterministic_seeded in ops.linear_4bit_lora.default.tags
    assert torch.Tag.nondeterministic_seeded not in ops.linear_4bit.default.tags


# ---- compilers -------------------------------------------------------------------------------------------------------

# opcheck's fourth test compares the gradients of two runs, whose masks differ.
WITHOUT_GRADIENTS = ("test_schema", "test_autograd_registration", "test_faketensor")


@on_each_device
@each_weight(FEW_WEIGHTS)
def test_opcheck_linear(weight, device):
    packed, keywords, _ = weight.pack(device)
    x, bias = leaves(device, (2, 3, weight.k), (weight.n,))
    for method in weight.methods(device, torch.float32, 6):
        opcheck(ops.linear_4bit, (x, *packed), dict(keywords, bias=bias, method=method))
    opcheck(ops.linear_4bit, (x.detach(), *packed), keywords)
    opcheck(ops.linear_4bit, (x.detach().bfloat16(), *packed), dict(keywords, bias=bias.detach().bfloat16()))
    a, b = leaves(device, (4, weight.k), (weight.n, 4))
    adapter = dict(keywords, lora_a=a, lora_b=b, scaling=2.0)
    opcheck(ops.linear_4bit_lora.default, (x, *packed), dict(adapter, bias=bias))
    opcheck(ops.linear_4bit_lora.default, (x, *packed), dict(adapter, dropout=0.5), test_utils=WITHOUT_GRADIENTS)


def step(x, packed, keywords, a, b, bias):
    first = quantrain.linear_4bit(x.relu(), *packed, bias=bias, **keywords)
    second = quantrain.linear_4bit_lora(x * 2, *packed, lora_a=a, lora_b=b, scaling=0.5, **keywords)
    return (first.sin() + second).square().sum()


@on_each_device
@pytest.mark.parametrize("dynamic", [False, True])
@each_weight(FEW_WEIGHTS)
def test_compiles(weight, dynamic, device):
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    packed, keywords, _ = weight.pack(device)
    for rows in (33, 70, 9) if dynamic else (33,):
        results = []
        for run in (step, compiled):
            x, a, b, bias = leaves(device, (rows, weight.k), (4, weight.k), (weight.n, 4), (weight.n,), seed=rows)
            loss = run(x, packed, keywords, a, b, bias)
            loss.backward()
            results.append((loss.detach(), x.grad, a.grad, b.grad, bias.grad))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-3)


def test_a_dynamic_size_is_compiled_once_a_range():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    packed, keywords, _ = WEIGHTS[0].pack()
    adapter = leaves("cpu", (4, 256), (128, 4), (128,))
    compiled(*leaves("cpu", (65, 256)), packed, keywords, *adapter)
    first = counter.frame_count  # 1, or 2 where the compiler starts again to make a float a tensor
    for rows in (70, 100, 127):
        compiled(*leaves("cpu", (rows, 256)), packed, keywords, *adapter)
    assert counter.frame_count == first


def test_compiles_under_autocast_and_inference():
    torch.compiler.reset()
    packed, keywords, _ = WEIGHTS[1].pack()

    def run(x, bias):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return quantrain.linear_4bit(x, *packed, bias=bias, **keywords)

    x, bias = leaves("cpu", (33, 256), (128,))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x, bias).detach(), run(x, bias).detach())
    with torch.no_grad():
        assert_same(compiled(x, bias), run(x, bias).detach())
    with torch.inference_mode():
        assert_same(run(x, bias), run(x.detach(), bias.detach()))


def test_exports():
    packed, keywords, _ = WEIGHTS[1].pack()

    class Model(torch.nn.Module):
        def forward(self, x):
            return quantrain.linear_4bit(x, *packed, **keywords)

    x = torch.randn(10, 256)
    program = torch.export.export(Model(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2, max=100)}})
    assert_same(program.module()(x), Model()(x))


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 16, 130])
@in_each_method
def test_a_training_step_is_captured(rows, method):
    if method not in WEIGHTS[1].methods("cuda", torch.bfloat16, rows):
        pytest.skip("at most 32 rows")
    (codes, scale), keywords, w = WEIGHTS[1].pack("cuda")
    x, a, b = leaves("cuda", (rows, 256), (4, 256), (128, 4), dtype=torch.bfloat16)

    def run():
        for leaf in (x, a, b):
            leaf.grad = None
        y = quantrain.linear_4bit_lora(x, codes, scale, lora_a=a, lora_b=b, scaling=0.5, method=method, **keywords)
        y.square().sum().backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    with torch.no_grad():
        x.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    found = [t.grad.clone() for t in (x, a, b)]
    run()
    for mine, eager in zip(found, (x, a, b), strict=True):
        assert_same(mine, eager.grad)
    g = 2 * reference.lora(x, w, a, b, 0.5)
    for mine, exact in zip(found, reference.lora_gradients(g, x, w, a, b, 0.5), strict=False):
        assert_near(mine, exact, factor=3)


@pytest.mark.cuda
def test_dropout_draws_afresh_in_each_replay():
    packed, eye, x = visible_mask("cuda")
    run = lambda: quantrain.linear_4bit_lora(x, *packed, lora_a=eye, lora_b=eye, scaling=1.0, dropout=0.5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)


@pytest.mark.cuda
@each_weight(WEIGHTS)
def test_cuda_is_near_the_cpu(weight):
    packed, keywords, _ = weight.pack("cpu")
    others, on_cuda, _ = weight.pack("cuda")
    x = draw("cpu", (33, weight.k))[0]
    for dtype in DTYPES:
        for method in weight.methods("cuda", dtype, 33):
            y = linear(x.cuda().to(dtype), others, on_cuda, method=method).cpu()
            assert_near(y, linear(x.to(dtype), packed, keywords, method=method).double(), factor=2)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (14336, 1024), (1000, 3420), (512, 11008)], ids=str)
def test_layers_of_real_sizes(n, k, dtype):
    g = torch.Generator("cuda").manual_seed(0)
    w = torch.randn(n, k, generator=g, device="cuda") * 0.02
    codes, scale = quantrain.quantize_4bit(w)
    w = quantrain.dequantize_4bit(codes, scale, size=(n, k))
    weight = Weight("real", n, k)
    for rows in (1, 2, 8, 16, 32, 64, 128, 256, 1024):
        x, grad = torch.randn(rows, k, generator=g, device="cuda"), torch.randn(rows, n, generator=g, device="cuda")
        x, grad = x.to(dtype).requires_grad_(), grad.to(dtype)
        exact, expected = reference.linear(x, w), reference.linear_gradients(grad, w)[0]
        for method in weight.methods("cuda", dtype, rows):
            y = linear(x, (codes, scale), {}, method=method)
            assert_near(y, exact)
            with poisoned():
                assert_near(torch.autograd.grad(y, x, grad)[0], expected)


# ---- a peer ----------------------------------------------------------------------------------------------------------


@on_each_device
def test_products_are_bitsandbytes(device):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: nothing to compare with")
    w, x = draw("cpu", (128, 256), (9, 256))
    theirs, state = bitsandbytes.functional.quantize_4bit(w, quant_type="nf4")
    exact = bitsandbytes.matmul_4bit(x, theirs.t(), quant_state=state)
    packed = theirs.to(device).view(128, 128), state.absmax.to(device).view(128, 4)
    assert_near(linear(x.to(device), packed, {}), exact.double())


# ---- refusals --------------------------------------------------------------------------------------------------------

on_each_device_and_meta = pytest.mark.parametrize(
    "device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.cuda)]
)
ERRORS = [
    (ValueError, "method.*fast", dict(method="fast")),
    (ValueError, "format.*nf5", dict(format="nf5")),
    (ValueError, "127", dict(input=torch.ones(3, 127))),
    (ValueError, "input", dict(input=torch.tensor(1.0))),
    (TypeError, "input.*Double", dict(input=torch.ones(3, 128).double())),
    (TypeError, "input.*Int", dict(input=torch.ones(3, 128, dtype=torch.int32))),
    (ValueError, r"bias.*\[4\]", dict(bias=torch.ones(4))),
    (ValueError, r"bias.*\[5, 1\]", dict(bias=torch.ones(5, 1))),
    (TypeError, "bias.*Double", dict(bias=torch.ones(5).double())),
    (TypeError, "codes.*Float", dict(codes=torch.ones(5, 64))),
    (ValueError, r"\[5, 7\]", dict(scale=torch.ones(5, 7))),
    (ValueError, r"\[4, 2\]", dict(scale=torch.ones(4, 2))),
]
LORA_ERRORS = [
    (ValueError, r"lora_a.*\[4, 127\]", dict(lora_a=torch.ones(4, 127))),
    (ValueError, r"lora_a.*\[128\]", dict(lora_a=torch.ones(128))),
    (ValueError, r"lora_b.*\[6, 4\]", dict(lora_b=torch.ones(6, 4))),
    (ValueError, r"lora_b.*\[5, 3\]", dict(lora_b=torch.ones(5, 3))),
    (TypeError, "lora_a.*Int", dict(lora_a=torch.ones(4, 128, dtype=torch.int32))),
    (TypeError, "lora_b.*Double", dict(lora_b=torch.ones(5, 4).double())),
    (ValueError, "dropout.*1.5", dict(dropout=1.5)),
    (ValueError, "dropout.*-0.1", dict(dropout=-0.1)),
    (ValueError, "dropout.*nan", dict(dropout=NAN)),
]


def arguments(change, device, adapter=False):
    codes = torch.zeros(5, 64, dtype=torch.uint8)
    found = {"input": torch.ones(3, 128), "codes": codes, "scale": torch.ones(5, 2)}
    if adapter:
        found |= {"lora_a": torch.ones(4, 128), "lora_b": torch.ones(5, 4), "scaling": 2.0}
    found |= change
    return {name: v.to(device) if torch.is_tensor(v) else v for name, v in found.items()}


@on_each_device_and_meta
@pytest.mark.parametrize(("error", "message", "change"), ERRORS, ids=[m for _, m, _ in ERRORS])
def test_bad_arguments_are_refused(error, message, change, device):
    with pytest.raises(error, match=f"linear_4bit: .*{message}"):
        quantrain.linear_4bit(**arguments(change, device))
    with pytest.raises(error, match=f"linear_4bit_lora: .*{message}"):
        quantrain.linear_4bit_lora(**arguments(change, device, adapter=True))


@on_each_device_and_meta
@pytest.mark.parametrize(("error", "message", "change"), LORA_ERRORS, ids=[m for _, m, _ in LORA_ERRORS])
def test_bad_adapters_are_refused(error, message, change, device):
    with pytest.raises(error, match=f"linear_4bit_lora: .*{message}"):
        quantrain.linear_4bit_lora(**arguments(change, device, adapter=True))


@on_each_device
@pytest.mark.parametrize("name", ["codes", "scale", "bias"])
def test_tensors_of_two_devices_are_refused(name, device):
    found = arguments({"bias": torch.ones(5)}, device)
    found[name] = found[name].to("meta")
    with pytest.raises((TypeError, ValueError), match=f"linear_4bit: .*{name}.*meta"):
        quantrain.linear_4bit(**found)


def test_a_rule_of_scales_is_the_writers_alone():
    """The reader of searched and signed scales is that of any others."""
    w = draw("cpu", (16, 128))[0]
    for rule in (Rule("nf4", "search"), Rule("int4", "signed"), Rule("int4", "search")):
        codes, scale = quantrain.quantize_4bit(w, **rule.keywords())
        y = quantrain.linear_4bit(torch.eye(128), codes, scale, format=rule.format)
        decoded = quantrain.dequantize_4bit(codes, scale, size=(16, 128), format=rule.format)
        torch.testing.assert_close(y.t(), decoded, rtol=1e-6, atol=1e-7)


@on_each_device
@in_each_dtype
@pytest.mark.parametrize("form", ["nf4", "fp4", "e2m1", "int4", "uint4", "table", "nf4-dq"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 5, 64), (9, 33, 192), (70, 40, 63), (3, 7, 128)])
def test_int8_products(device, dtype, form, m, n, k):
    """W4A8: against the product of what both operands are rounded to, and near the unrounded one."""
    x, w = draw(device, (m, k), (n, k), dtype=dtype)
    w = w.float()
    table = reference.AF4.to(device) if form == "table" else None
    if form == "uint4":
        codes, scale, zero_point = ops.quantize_4bit_affine(w)
    else:
        codes, scale = ops.quantize_4bit(w, format=form.removesuffix("-dq"), table=table)
        zero_point = None
    nested = (None, None)
    if form == "nf4-dq":
        scale, *nested = ops.compress_scale(scale)
    more = {"format": form.removesuffix("-dq"), "table": table}
    exact = ops.dequantize_4bit(codes, scale, zero_point, *nested, size=(n, k), dtype="float32", **more).double()
    y = ops.linear_4bit(x, codes, scale, zero_point, None, *nested, method="int8", out_features=n, **more)
    want = x.double() @ exact.t()
    assert y.dtype == dtype and y.shape == want.shape
    assert (y.double() - want).norm() <= 0.03 * want.norm() + 1e-3 * (x.double().norm() * exact.norm()) / n**0.5
    again = ops.linear_4bit(x, codes, scale, zero_point, None, *nested, method="int8", out_features=n, **more)
    assert torch.equal(y, again)


def test_the_gradient_of_int8_products_is_that_of_the_unrounded_one():
    x, w = draw("cpu", (5, 64), (8, 64))
    x = x.requires_grad_()
    codes, scale = ops.quantize_4bit(w)
    y = ops.linear_4bit(x, codes, scale, method="int8")
    seed = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, seed)
    (want,) = torch.autograd.grad(ops.linear_4bit(x, codes, scale), x, seed)
    assert torch.equal(found, want)
    x = x.detach().clone()
    x[2, 3] = NAN
    y = ops.linear_4bit(x, codes, scale, method="int8")
    assert y[2].isnan().all() and y[:2].isfinite().all()
