"""int8_linear: outputs, gradients, draws, what is kept, autocast, compilers and refusals."""

import itertools
import math
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from samples.fake_quant import assert_same, on_each_device
from samples.unbiased import largest_z
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import quantrain

ops = torch.ops.quantrain

SHAPES = [(33, 24), (2, 5, 24), (2, 3, 4, 24), (24,), (0, 24)]
MODES = ("int8", "none", "auto")


def tensors(device, *shapes, dtype=torch.float32, seed=0):
    """Leaves with gradients; the values are the same on every device."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(device, dtype).requires_grad_() for shape in shapes]


def gradients(y, leaves, grad_output, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    return torch.autograd.grad(y, leaves, grad_output, retain_graph=True)


def matrix(tensor):
    return tensor.reshape(-1, tensor.shape[-1])


def modes(output="int8", grad_input="int8", grad_weight="int8", **others):
    return {"output": output, "grad_input": grad_input, "grad_weight": grad_weight, **others}


# ---- the stated rule, by the family's own operators --------------------------------------------------------------------------


class Rule:
    """One call: its codes and its draws as the documentation says, multiplied by int8_mm."""

    def __init__(self, x, w, b=None, scheme="auto"):
        self.x, self.w, self.b, self.scheme = x.detach(), w.detach(), None if b is None else b.detach(), scheme
        self.xq, self.sx = ops.int8_quantize_rows(self.x)
        self.wq, self.sw = ops.int8_quantize_rows(self.w)

    def output(self):
        return ops.int8_mm(self.xq, self.wq, self.sx, self.sw, self.b, out_dtype=self.x.dtype)

    def gradients(self, g, seed):
        """grad_input and grad_weight, from one draw."""
        wt, factor, st = ops.int8_weight_transpose(self.w, self.sw, scheme=self.scheme)
        torch.manual_seed(seed)
        rows, rs, columns, cs = ops.int8_quantize_rows_and_columns(
            g, column_factor=factor, row_factor=self.sx, stochastic=True
        )
        grad_x = ops.int8_mm(rows, wt, rs, st, out_dtype=g.dtype)
        grad_w = ops.int8_mm(columns, ops.int8_transpose(matrix(self.xq)), cs, None, out_dtype=self.w.dtype)
        return grad_x, grad_w

    def exact_gradients(self, g):
        """The gradients at the rounded operands, in float64: what the draws average to."""
        wt, factor, st = ops.int8_weight_transpose(self.w, self.sw, scheme=self.scheme)
        weight = (factor.double() * wt.double() * st.double()).t()  # [O, K] as it enters grad_input
        x = matrix(self.xq.double() * self.sx.double())
        return (g.double() @ weight), matrix(g.double()).t() @ x


# ---- outputs ----------------------------------------------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_output_is_the_product_of_the_codes(shape, dtype, device):
    x, w, b = tensors(device, shape, (40, 24), (40,), dtype=dtype)
    for bias in (b, None):
        expected = Rule(x, w, bias).output()
        y = quantrain.int8_linear(x, w, bias)
        assert y.dtype == dtype and y.requires_grad
        assert_same(y.detach(), expected)
        with torch.inference_mode():
            assert_same(quantrain.int8_linear(x, w, bias), expected)
    exact = F.linear(x.double(), w.double(), b.double())
    assert (quantrain.int8_linear(x, w, b) - exact).norm() <= 0.02 * exact.norm()


@on_each_device
def test_inputs_of_any_strides(device):
    x, w, b = tensors(device, (24, 33), (24, 40), (80,))
    y = quantrain.int8_linear(x.t(), w.t(), b[::2])
    assert_same(y.detach(), Rule(x.t(), w.t(), b[::2]).output())
    y.sum().backward()  # a gradient that is one number, expanded
    assert x.grad.shape == x.shape and w.grad.shape == w.shape and torch.equal(b.grad[::2], torch.full_like(b[::2], 33))


# ---- gradients --------------------------------------------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("scheme", ["fold", "columns", "auto"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_follow_the_stated_rule(shape, scheme, device):
    x, w, b = tensors(device, shape, (40, 24), (40,))
    y = quantrain.int8_linear(x, w, b, weight_scheme=scheme)
    g = torch.randn_like(y)
    grad_x, grad_w, grad_b = gradients(y, (x, w, b), g, seed=3)
    rule = Rule(x, w, b, scheme)
    for mine, other in zip((grad_x, grad_w), rule.gradients(g, seed=3), strict=True):
        assert_same(mine, other)
    torch.testing.assert_close(grad_b, matrix(g).sum(0))
    for mine, exact in zip((grad_x, grad_w), rule.exact_gradients(g), strict=True):
        assert (mine - exact).norm() <= 0.05 * exact.norm()


def test_a_single_gradient_takes_a_draw_of_its_own():
    x, w, b = tensors("cpu", (33, 24), (40, 24), (40,))
    rule = Rule(x, w, b)
    g = torch.randn(33, 40)
    wt, factor, st = ops.int8_weight_transpose(w.detach(), rule.sw)
    torch.manual_seed(5)
    rows, rs = ops.int8_quantize_rows(g, column_factor=factor, stochastic=True)
    torch.manual_seed(5)
    columns, cs = ops.int8_quantize_columns(g, row_factor=rule.sx, stochastic=True)
    for keywords in ({"grad_weight": "none"}, {}):
        y = quantrain.int8_linear(x, w.detach() if not keywords else w, b, **keywords)
        assert_same(gradients(y, x, g, seed=5)[0], ops.int8_mm(rows, wt, rs, st))
    for keywords in ({"grad_input": "none"}, {}):
        y = quantrain.int8_linear(x.detach() if not keywords else x, w, b, **keywords)
        assert_same(gradients(y, w, g, seed=5)[0], ops.int8_mm(columns, rule.xq.t().contiguous(), cs, None))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    gradients(quantrain.int8_linear(x, w, b), b, g)
    assert torch.equal(torch.get_rng_state(), state)  # nobody needed a draw


@pytest.mark.parametrize("scheme", ["fold", "columns"])
def test_the_mean_of_the_gradients_is_the_gradient_at_the_rounded_operands(scheme):
    x, w = tensors("cpu", (20, 9), (7, 9))
    with torch.no_grad():
        w *= torch.logspace(0, -1.5, 7)[:, None]
    y = quantrain.int8_linear(x, w, weight_scheme=scheme)
    g = torch.randn_like(y) * torch.logspace(0, -4, 20)[:, None]  # rows of very different size, as gradients have them
    exact = Rule(x, w, scheme=scheme).exact_gradients(g)
    torch.manual_seed(5)
    draws = [gradients(y, (x, w), g) for _ in range(4000)]
    for place, mean in enumerate(exact):
        found = torch.stack([draw[place] for draw in draws])
        assert found.std(0).max() > 0
        z, bound = largest_z(found, mean)
        assert z < bound
        # A gradient at the operands before they were rounded would be found.
        other = (g @ w.detach(), g.t() @ x.detach())[place]
        assert largest_z(found, other)[0] > bound


# ---- simulated --------------------------------------------------------------------------------------------------------------


def sum_bound(a, b, k):
    """How far two float32 evaluations of a b^T may be apart: k roundings in one sum, a few in the other's scaling."""
    return (k + 8) * 2.0**-24 * (a.abs().double() @ b.abs().double().t())


@on_each_device
@pytest.mark.parametrize("shape", [(33, 24), (2, 5, 24), (24,), (0, 24)], ids=str)
def test_simulated_and_integer_products_have_the_same_codes(shape, device):
    x, w, b = tensors(device, shape, (40, 24), (40,))
    rule, found = Rule(x, w, b), []
    for simulate in (False, True):
        y = quantrain.int8_linear(x, w, b, simulate=simulate)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(device)
        found.append((y.detach(), *gradients(y, (x, w, b), g, seed=7)))
    wt, factor, st = ops.int8_weight_transpose(w.detach(), rule.sw)
    torch.manual_seed(7)
    rows, rs, columns, cs = ops.int8_quantize_rows_and_columns(
        g, column_factor=factor, row_factor=rule.sx, stochastic=True
    )
    bounds = (
        sum_bound(rule.xq * rule.sx, rule.wq * rule.sw, 24) + 2.0**-22 * b.detach().abs(),
        sum_bound(rows * rs, wt * st, 40),
        sum_bound(columns * cs, matrix(rule.xq).t(), max(matrix(x).shape[0], 1)),
    )
    for integer, simulated, bound in zip(*(part[:3] for part in found), bounds, strict=True):
        assert ((integer - simulated).abs() <= bound).all()
    assert_same(found[0][3], found[1][3])


def test_simulated_half_precision_rounds_once():
    x, w, b = tensors("cpu", (33, 24), (40, 24), (40,), dtype=torch.bfloat16)
    integer, simulated = (quantrain.int8_linear(x, w, b, simulate=s).detach() for s in (False, True))
    assert simulated.dtype == torch.bfloat16
    assert ((integer - simulated).abs() <= 2.0**-7 * integer.abs()).all() and (
        integer == simulated
    ).float().mean() > 0.98


# ---- which products ---------------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("output", "grad_input", "grad_weight"), [*itertools.product(MODES, MODES, MODES)])
def test_each_product_runs_as_asked(output, grad_input, grad_weight):
    x, w, b = tensors("cpu", (33, 24), (40, 24), (40,))
    with Calls() as forward:
        y = quantrain.int8_linear(x, w, b, **modes(output, grad_input, grad_weight))
    g = torch.randn_like(y)
    with Calls() as backward:
        grad_x, grad_w, grad_b = gradients(y, (x, w, b), g, seed=3)
    # On CPU "auto" is int8.
    integer = [mode != "none" for mode in (output, grad_input, grad_weight)]
    assert forward.count["int8_mm"] == integer[0] and backward.count["int8_mm"] == integer[1] + integer[2]
    assert forward.count["int8_quantize_rows"] == (integer[0] or integer[2]) + integer[0]
    exact = F.linear(x, w, b)
    exact_x, exact_w, exact_b = gradients(exact, (x, w, b), g)
    rule = Rule(x, w, b)
    torch.testing.assert_close(y, rule.output() if integer[0] else exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(grad_b, exact_b)
    expected_x, expected_w = rule.gradients(g, seed=3)
    if not integer[1]:
        torch.testing.assert_close(grad_x, exact_x)
    elif integer[2]:
        assert_same(grad_x, expected_x)
    if not integer[2]:
        torch.testing.assert_close(grad_w, exact_w)
    elif integer[1]:
        assert_same(grad_w, expected_w)
    for mine, other in ((grad_x, exact_x), (grad_w, exact_w)):
        assert (mine - other).norm() < 0.05 * other.norm()


def test_given_weight_codes_replace_the_weights_own():
    x, w, b = tensors("cpu", (33, 24), (40, 24), (40,))
    codes, scale = quantrain.int8_quantize_rows(w.detach())
    with Calls() as calls:
        y = quantrain.int8_linear(x, w, b, weight_codes=codes, weight_scale=scale)
        g = torch.randn_like(y)
        found = gradients(y, (x, w, b), g, seed=1)
    assert calls.count["int8_quantize_rows"] == 1  # the input's
    plain = quantrain.int8_linear(x, w, b)
    assert_same(y.detach(), plain.detach())
    for mine, other in zip(found, gradients(plain, (x, w, b), g, seed=1), strict=True):
        assert_same(mine, other)
    doubled = quantrain.int8_linear(x, w, weight_codes=codes, weight_scale=2 * scale)
    torch.testing.assert_close(doubled, 2 * quantrain.int8_linear(x, w))


# ---- what is kept ------------------------------------------------------------------------------------------------------------


def kept_bytes(run, parameters):
    """Bytes of what autograd saves in ``run``, the parameters not counted."""
    found = []

    def pack(tensor):
        if all(tensor.data_ptr() != p.data_ptr() for p in parameters):
            found.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(found)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_byte_an_element_is_kept(dtype, device):
    rows, k, o = 64, 48, 32
    x, w, b = tensors(device, (rows, k), (o, k), (o,), dtype=dtype)
    scales = 4 * rows + 4 * o
    assert kept_bytes(lambda: quantrain.int8_linear(x, w, b), (w, b)) == rows * k + scales
    assert kept_bytes(lambda: quantrain.int8_linear(x, w, b, simulate=True), (w, b)) == rows * k + scales
    assert kept_bytes(lambda: quantrain.int8_linear(x.detach(), w, b), (w, b)) == rows * k + 4 * rows
    floating = rows * k * x.element_size()
    assert kept_bytes(lambda: quantrain.int8_linear(x, w, b, grad_weight="none"), (w, b)) == floating + 4 * o
    assert kept_bytes(lambda: quantrain.int8_linear(x, w.detach(), b), (w, b)) == 4 * o
    assert kept_bytes(lambda: F.linear(x, w, b), (w, b)) == floating


def test_a_weight_changed_before_backward_is_found():
    x, w = tensors("cpu", (33, 24), (40, 24))
    y = quantrain.int8_linear(x, w)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_checkpointing_repeats_the_forward_pass():
    x, w, b = tensors("cpu", (33, 24), (40, 24), (40,))

    def block(x):
        return quantrain.int8_linear(x.relu(), w, b).sin()

    g = torch.randn(33, 40)
    expected = gradients(block(x), (x, w, b), g, seed=4)
    y = checkpoint(block, x, use_reentrant=False)
    torch.manual_seed(4)
    for mine, other in zip(torch.autograd.grad(y, (x, w, b), g), expected, strict=True):
        assert_same(mine, other)


# ---- autocast ---------------------------------------------------------------------------------------------------------------


@on_each_device
def test_autocast_rounds_the_float32_weight_itself(device):
    x, w, b = tensors(device, (33, 24), (40, 24), (40,))
    with torch.autocast(device, dtype=torch.bfloat16):
        y = quantrain.int8_linear(x, w, b)
    assert y.dtype == torch.bfloat16
    assert_same(y.detach(), Rule(x.bfloat16(), w, b).output())
    g = torch.randn_like(y)
    grad_x, grad_w, grad_b = gradients(y, (x, w, b), g, seed=6)
    assert [t.dtype for t in (grad_x, grad_w, grad_b)] == [torch.float32] * 3
    expected_x, expected_w = Rule(x.bfloat16(), w, b).gradients(g, seed=6)
    assert_same(grad_x, expected_x.float())
    assert_same(grad_w, expected_w)
    assert not torch.equal(grad_w, grad_w.bfloat16().float())  # never rounded to 16 bits on the way
    torch.testing.assert_close(grad_b, g.float().sum(0))


@on_each_device
def test_autocast_without_int8_is_linear(device):
    x, w, b = tensors(device, (33, 24), (40, 24), (40,))
    none = modes("none", "none", "none")
    with torch.autocast(device, dtype=torch.bfloat16):
        y, other = quantrain.int8_linear(x, w, b, **none), F.linear(x, w, b)
        mixed = quantrain.int8_linear(x, w, b, output="none")
    assert_same(y.detach(), other.detach())
    assert_same(mixed.detach(), other.detach())
    g = torch.randn_like(y)
    for mine, exact in zip(gradients(y, (x, w, b), g), gradients(other, (x, w, b), g), strict=True):
        assert_same(mine, exact)
    assert gradients(mixed, w, g)[0].dtype == torch.float32


@on_each_device
def test_a_float32_weight_with_16_bit_input(device):
    x, w, b = tensors(device, (33, 24), (40, 24), (40,))
    half = x.detach().bfloat16().requires_grad_()
    y = quantrain.int8_linear(half, w, b, grad_input="none")
    grads = gradients(y, (half, w, b), torch.randn_like(y))
    assert [t.dtype for t in (y, *grads)] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    y = quantrain.int8_linear(half, w, b, **modes("none", "none", "none"))
    assert [t.dtype for t in gradients(y, (half, w), torch.randn_like(y))] == [torch.bfloat16, torch.float32]


@on_each_device
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("simulate", [False, True])
def test_nan_and_inf_are_never_swallowed(simulate, bad, device):
    clean = tensors(device, (33, 24), (40, 24), (40,))
    for place in range(2):
        leaves = [t.detach().clone() for t in clean]
        leaves[place][3, 5] = bad
        y = quantrain.int8_linear(*leaves, simulate=simulate)
        assert (y[3] if place == 0 else y[:, 3]).isnan().all()
    y = quantrain.int8_linear(*clean, simulate=simulate)
    g = torch.randn_like(y)
    g[3, 5] = bad
    for gradient in gradients(y, clean, g):
        assert not gradient.isfinite().all()


# ---- second derivatives, compilers, refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", ["x", "w", "xw", "xwb"])
def test_a_second_derivative_is_refused(needed):
    x, w, b = tensors("cpu", (33, 24), (40, 24), (40,))
    leaves = [t for name, t in zip("xwb", (x, w, b), strict=True) if name in needed]
    y = quantrain.int8_linear(*(t if name in needed else t.detach() for name, t in zip("xwb", (x, w, b), strict=True)))
    first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
    for gradient in first:
        assert gradient.requires_grad
        for leaf in leaves:
            with pytest.raises(NotImplementedError, match="int8_linear: expected one derivative, got a second"):
                torch.autograd.grad(gradient.sum(), leaf, retain_graph=True)
    with pytest.raises(NotImplementedError, match="int8_linear: expected one derivative"):
        sum(gradient.square().sum() for gradient in first).backward()


# opcheck's fourth test compares the gradients of two runs, whose draws differ; test_compiles_to_the_same_draws does so with one seed.
WITHOUT_GRADIENTS = ("test_schema", "test_autograd_registration", "test_faketensor")


@on_each_device
@pytest.mark.parametrize("mode", MODES)
def test_opcheck_int8_linear(mode, device):
    x, w, b = tensors(device, (4, 3, 24), (40, 24), (40,))
    codes, scale = ops.int8_quantize_rows(w.detach())
    given = {"weight_codes": codes, "weight_scale": scale}
    opcheck(ops.int8_linear, (x, w, b), modes(mode, "none", "none"))
    opcheck(ops.int8_linear, (x.detach(), w.detach(), b), modes(mode, mode, mode, **given))
    for keywords in (
        modes(mode, mode, mode),
        modes("none", mode, "none", **given),
        modes("none", "none", mode, simulate=True),
    ):
        opcheck(ops.int8_linear, (x, w), keywords, test_utils=WITHOUT_GRADIENTS)


def step(x, w, b, mode):
    first = quantrain.int8_linear(x.relu(), w * 2, b, **modes(mode, mode, mode))
    return quantrain.int8_linear(first, w.t(), grad_weight="none", weight_scheme="fold").square().sum()


@on_each_device
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_the_same_draws(device, dynamic):
    torch.compiler.reset()
    # Where a layer's own sizes are symbolic too, "auto" takes them for large, and may choose otherwise than eagerly on CUDA.
    mode = "int8" if dynamic else "auto"
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (33, 70, 9) if dynamic else (33,):
        results = []
        for run in (step, compiled):
            x, w, b = tensors(device, (rows, 24), (40, 24), (40,), seed=rows)
            torch.manual_seed(1)
            y = run(x, w, b, mode)
            y.backward()
            results.append((y.detach(), x.grad, w.grad, b.grad))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-4)


@on_each_device
def test_compiles_with_inductor(device):
    torch.compiler.reset()
    compiled = torch.compile(
        quantrain.int8_linear, fullgraph=True
    )  # operators alone: nothing for its C++ compiler to do
    x, w = tensors(device, (33, 24), (40, 24))
    y, other = compiled(x, w), quantrain.int8_linear(x, w)
    assert_same(y.detach(), other.detach())
    g = torch.randn_like(y)
    torch.manual_seed(1)
    found = torch.autograd.grad(y, (x, w), g)
    for mine, eager in zip(found, gradients(other, (x, w), g, seed=1), strict=True):
        assert_same(mine, eager)


def test_a_dynamic_size_is_compiled_once_a_range():
    """The choice of "auto" guards on powers of two of the tokens, not on their number."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for rows in (65, 70, 100, 127):
        compiled(*tensors("cpu", (rows, 24), (40, 24), (40,)), "auto")
    assert counter.frame_count == 1


def test_compiles_under_autocast_and_inference():
    torch.compiler.reset()

    def run(x, w, b):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return quantrain.int8_linear(x, w, b)

    x, w, b = tensors("cpu", (33, 24), (40, 24), (40,))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x, w, b).detach(), run(x, w, b).detach())
    with torch.no_grad():
        assert_same(compiled(x, w, b), run(x, w, b).detach())


def test_exports():
    class Model(torch.nn.Module):
        def forward(self, x, w):
            return quantrain.int8_linear(x, w, **modes("auto", "auto", "auto"))

    x, w = torch.randn(10, 24), torch.randn(40, 24)
    program = torch.export.export(Model(), (x, w))
    assert_same(program.module()(x, w), Model()(x, w))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"output": "int4"}, ValueError, "expected output to be one of int8, none, auto, got 'int4'"),
        ({"grad_input": ""}, ValueError, "expected grad_input to be one of int8, none, auto, got ''"),
        ({"grad_weight": "INT8"}, ValueError, "expected grad_weight to be one of int8, none, auto, got 'INT8'"),
        ({"weight_scheme": "row"}, ValueError, "expected weight_scheme to be one of auto, fold, columns, got 'row'"),
        ({"input": torch.randn(7, 6)}, ValueError, r"expected input \[..., K\] for weight \[O, K\], got \[7, 6\] and \[5, 8\]"),
        ({"input": torch.tensor(1.0)}, ValueError, r"expected input \[..., K\]"),
        ({"input": torch.randn(7, 8).double()}, TypeError, "expected input of float32, float16 or bfloat16, got Double"),
        ({"input": torch.ones(7, 8, dtype=torch.int8)}, TypeError, "expected input of float32, float16 or bfloat16, got Char"),
        ({"input": torch.randn(7, 8, device="meta")}, TypeError, "expected weight on input's device meta, got cpu"),
        ({"weight": torch.randn(5, 8, 1)}, ValueError, r"expected weight \[O, K\], got \[5, 8, 1\]"),
        ({"weight": torch.randn(5, 8).double()}, TypeError, "expected weight of float32, float16 or bfloat16, got Double"),
        ({"bias": torch.randn(4)}, ValueError, r"expected bias of weight's dimension 0, got \[4\] and \[5, 8\]"),
        ({"bias": torch.randn(5).double()}, TypeError, "expected bias of float32, float16 or bfloat16, got Double"),
        ({"weight_codes": torch.ones(5, 8, dtype=torch.int8)}, ValueError, "together, got weight_codes alone"),
        ({"weight_scale": torch.ones(5)}, ValueError, "together, got weight_scale alone"),
        ({"weight_codes": torch.ones(5, 8), "weight_scale": torch.ones(5)}, TypeError, "weight_codes of int8"),
        ({"weight_codes": torch.ones(4, 8, dtype=torch.int8), "weight_scale": torch.ones(5)}, ValueError, r"got \[4, 8\] and \[5\]"),
        ({"input": torch.randn(7, 0), "weight": torch.randn(5, 0)}, ValueError, "at least one column"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(change, error, message):
    arguments = {"input": torch.randn(7, 8), "weight": torch.randn(5, 8), "bias": torch.randn(5), **change}
    with pytest.raises(error, match=message):
        quantrain.int8_linear(**arguments)


# ---- on a GPU ---------------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_cuda_output_is_the_cpus(dtype):
    for shape in ((33, 24), (256, 1024), (1000, 768)):
        x, w, b = tensors("cpu", shape, (320, shape[-1]), (320,), dtype=dtype)
        y = quantrain.int8_linear(x.cuda(), w.cuda(), b.cuda())
        assert_same(y.cpu().detach(), quantrain.int8_linear(x, w, b).detach())


@pytest.mark.cuda
def test_auto_is_float_for_small_and_int8_for_large_layers_on_cuda():
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("no int8 tensor cores")
    for rows, width, integer in ((8, 64, False), (8192, 4096, True)):
        x, w = tensors("cuda", (rows, width), (width, width), dtype=torch.bfloat16)
        with Calls() as calls:
            quantrain.int8_linear(x, w, **modes("auto", "auto", "auto")).sum().backward()
        assert calls.count["int8_mm"] == (3 if integer else 0)


@pytest.mark.cuda
def test_a_training_step_is_captured_and_draws_afresh_in_each_replay():
    x, w, b = tensors("cuda", (256, 64), (96, 64), (96,), dtype=torch.bfloat16)
    target = torch.randn(256, 96, device="cuda", dtype=torch.bfloat16)

    def run():
        for leaf in (x, w, b):
            leaf.grad = None
        (quantrain.int8_linear(x, w, b) - target).square().sum().backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    found = []
    for _ in range(2):
        graph.replay()
        found.append([leaf.grad.clone() for leaf in (x, w, b)])
    assert not torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][1], found[1][1])
    assert_same(found[0][2], found[1][2])
    with torch.no_grad():
        x.mul_(0.5)
        w.mul_(-1)
    graph.replay()
    torch.cuda.synchronize()
    exact = torch.autograd.grad((F.linear(x, w, b) - target).square().sum(), (x, w, b))
    for mine, other in zip((x.grad, w.grad, b.grad), exact, strict=True):
        assert (mine - other).float().norm() < 0.05 * other.float().norm()
