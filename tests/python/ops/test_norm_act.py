"""Norms and activations rounded for a linear layer: against float64, with gradients, in every kernel, compiled, refusals."""

import pytest
import torch
import torch.nn.functional as F
from reference import norm_act as reference
from torch.library import opcheck

import quantrain

ops = torch.ops.quantrain
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
FUNCTIONS = ["identity", "relu", "silu", "gelu", "gelu_tanh", "silu_mul", "layer_norm", "rms_norm"]
# One item and less, no whole items, part of a warp, a warp, warps, the widest rows that are read once, wider ones.
SHAPES = [(4, 8), (2, 3, 33), (7, 96), (3, 1030), (2, 2048), (1, 9000), (1, 40000)]
STEP = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def operands(function, shape, dtype=torch.float32, device="cpu", seed=0):
    """input, other, weight, bias (None where the function has none) and a gradient."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.rand(*shape[:-1], 1, generator=g) * 3 + 0.1
    x = (torch.randn(shape, generator=g) * rows + torch.randn(*shape[:-1], 1, generator=g)).to(dtype)
    norm, layer = function.endswith("norm"), function == "layer_norm"
    other = torch.randn(shape, generator=g).to(dtype) if function == "silu_mul" else None
    weight = torch.randn(shape[-1], generator=g) if norm else None
    bias = torch.randn(shape[-1], generator=g).to(dtype) if layer else None
    grad = torch.randn(shape, generator=g).to(dtype)
    return [t if t is None else t.to(device) for t in (x, other, weight, bias, grad)]


def leaves(tensors, change=lambda t: t):
    return [None if t is None else change(t.detach()).clone().requires_grad_() for t in tensors]


def compared(function, dtype, found, codes, scale, point, inputs, grad, limits):
    """Codes, values and gradients against float64 on the grid that was found."""
    exact = leaves(inputs, lambda t: t.cpu().double())
    z = reference.norm_act(function, *exact, eps=0.01)
    grid = (scale.detach().cpu().double(), 0 if point is None else point.cpu().double(), *limits)
    want, unclamped = reference.straight_through(z, *grid)
    # Where float64 lies next to a midpoint, float32 may be on its other side.
    edge = (unclamped - z.detach() / grid[0] - grid[1]).abs() > 0.499
    off = (codes.cpu().double() - unclamped.clamp(*limits)).abs()
    assert (off <= edge.double()).all(), f"codes off by {off.max()}, {off.mean()} on average"
    decoded = (codes.cpu().float() - (0 if point is None else point.cpu())) * scale.detach().cpu()
    assert torch.equal(found.cpu(), decoded.to(found.dtype)), "values are not those of the codes"
    found.backward(grad.to(found.dtype))
    # There, and where float64 is on the other side of a bend, a gradient is there or is not.
    want.backward(grad.cpu().double())
    for name, one, two in zip(("input", "other", "weight", "bias"), inputs, exact, strict=True):
        if one is None:
            continue
        size = two.grad.abs().max() + 1e-3
        wrong = (one.grad.cpu().double() - two.grad).abs() > 4 * STEP[dtype] * size
        allowed = edge.double().mean() + 1e-3 if two.grad.shape == edge.shape else 0.0
        assert wrong.double().mean() <= allowed, f"gradient of {name}: {wrong.double().mean()} wrong"


@DEVICES
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_scale(device, dtype, shape, function):
    *given, grad = operands(function, shape, dtype, device)
    inputs = leaves(given)
    scale, point = torch.tensor([0.037], device=device), torch.tensor([3], dtype=torch.int32, device=device)
    y, codes = quantrain.norm_act_fake_quantize(
        *inputs, scale, point, function=function, eps=0.01, quant_min=-50, quant_max=60
    )
    assert y.dtype == dtype and codes.dtype == torch.int8 and y.is_contiguous()
    compared(function, dtype, y, codes, scale, point, inputs, grad, (-50, 60))


@DEVICES
@DTYPES
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_scale_per_row(device, dtype, symmetric, shape, function):
    *given, grad = operands(function, shape, dtype, device, 1)
    inputs = leaves(given)
    limits = (-127, 127) if symmetric else (0, 255)
    y, codes, scale, point = quantrain.norm_act_fake_quantize_dynamic(
        *inputs, function=function, eps=0.01, quant_min=limits[0], quant_max=limits[1], symmetric=symmetric
    )
    assert (
        scale.shape == (*shape[:-1], 1)
        and point.shape == scale.shape
        and not (scale.requires_grad or codes.requires_grad)
    )
    z = reference.norm_act(function, *(None if t is None else t.detach().cpu().double() for t in inputs), eps=0.01)
    width = z.abs().amax(-1, keepdim=True) / 127
    if not symmetric:
        width = (z.amax(-1, keepdim=True).clamp(min=0) - z.amin(-1, keepdim=True).clamp(max=0)) / 255
    torch.testing.assert_close(scale.cpu().double(), torch.where(width == 0, 1.0, width), rtol=1e-4, atol=1e-9)
    compared(function, dtype, y, codes, scale, None if symmetric else point, inputs, grad, limits)


@DEVICES
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(3, 5), (40, 96), (9, 2048), (2, 40000)], ids=str)
def test_the_range_is_that_of_the_result(device, function, shape):
    """Of functions with a valley it is found from four values per row; once on either side of it, and on both."""
    *given, _ = operands(function, shape, device=device, seed=2)
    for shift in (-3.0, 0.0, 3.0):
        moved = [given[0] + shift, *given[1:]]
        low, high = ops._norm_act_range(*moved, function=function, eps=0.01).tolist()
        z = reference.norm_act(function, *(None if t is None else t.cpu().double() for t in moved), eps=0.01)
        assert abs(low - z.min()) <= 2e-5 * z.abs().max() and abs(high - z.max()) <= 2e-5 * z.abs().max()


@DEVICES
def test_rows_are_those_of_fake_quantize_dynamic(device):
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for shape, low, high, symmetric in (
            ((6, 64), -128, 127, True),
            ((2, 3, 200), 0, 255, False),
            ((5, 33), -8, 7, True),
        ):
            x = torch.randn(shape, device=device).to(dtype)
            y, codes, scale, point = quantrain.norm_act_fake_quantize_dynamic(
                x, quant_min=low, quant_max=high, symmetric=symmetric
            )
            rows = [*shape[:-1], 1]
            want = ops.fake_quantize_dynamic(x, rows, quant_min=low, quant_max=high, symmetric=symmetric)
            assert torch.equal(y, want)
            again, zero = ops.choose_qparams(x, rows, quant_min=low, quant_max=high, symmetric=symmetric)
            assert torch.equal(scale, again) and torch.equal(point, zero)


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_float32_input_becomes_16_bits_in_the_pass(device, dtype):
    *given, grad = operands("layer_norm", (6, 96), device=device)
    inputs = leaves(given)
    y, codes = quantrain.norm_act_fake_quantize(*inputs, 0.05, function="layer_norm", eps=0.01, dtype=dtype)
    wide, same = quantrain.norm_act_fake_quantize(*given, 0.05, function="layer_norm", eps=0.01)
    assert y.dtype == dtype and torch.equal(codes, same) and torch.equal(y, wide.to(dtype))
    y.backward(grad.to(dtype))
    assert inputs[0].grad.dtype == torch.float32 and inputs[2].grad.dtype == torch.float32
    for function in ("identity", "relu", "gelu"):
        x = torch.randn(4, 24, device=device, requires_grad=True)
        y, _, _, _ = quantrain.norm_act_fake_quantize_dynamic(x, function=function, dtype=dtype)
        y.sum().backward()
        assert y.dtype == dtype and x.grad.dtype == torch.float32


@DEVICES
@pytest.mark.parametrize("function", ["identity", "gelu", "silu_mul", "rms_norm"])
def test_nan_and_inf_reach_the_result(device, function):
    *given, _ = operands(function, (4, 40), device=device)
    given[0][1, 3], given[0][2, 5] = float("nan"), float("inf")
    y, _ = quantrain.norm_act_fake_quantize(*given, 0.05, function=function)
    assert y[1, 3].isnan() and not y[0].isnan().any()
    y, codes, scale, point = quantrain.norm_act_fake_quantize_dynamic(*given, function=function)
    assert y[1:3].isnan().all() and scale[1:3].isnan().all() and not y[[0, 3]].isnan().any() and (point == 0).all()


@DEVICES
@pytest.mark.parametrize("function", ["silu", "gelu", "gelu_tanh"])
def test_slopes_far_out_are_one_and_zero(device, function):
    for size in (1e5, 1e13, 1e20, 3e38):
        x = torch.tensor([[size], [-size]], device=device, requires_grad=True)
        y, _, _, _ = quantrain.norm_act_fake_quantize_dynamic(x, function=function)
        y.sum().backward()
        assert x.grad.flatten().tolist() == [1, 0], f"at {size}"


@DEVICES
@pytest.mark.parametrize("function", ["identity", "gelu"])
def test_a_symmetric_range_of_one_sign_lets_no_gradient_through_where_it_clips(device, function):
    x = torch.linspace(-4, 4, 64, device=device).view(2, 32).requires_grad_()
    y, codes, _, _ = quantrain.norm_act_fake_quantize_dynamic(x, function=function, quant_min=0, quant_max=255)
    y.sum().backward()
    assert (x.grad[0, 8:20] == 0).all() and (codes[0, :20] == 0).all() and (x.grad[1] > 0).all()


@DEVICES
def test_zeros_and_nothing(device):
    y, codes, scale, _ = quantrain.norm_act_fake_quantize_dynamic(torch.zeros(3, 16, device=device))
    assert (y == 0).all() and (codes == 0).all() and (scale == 1).all()
    for shape in ((0, 16), (3, 0)):
        x = torch.zeros(shape, device=device, requires_grad=True)
        y, codes, scale, point = quantrain.norm_act_fake_quantize_dynamic(x)
        assert y.shape == shape and codes.shape == shape and scale.shape == (shape[0], 1) and (scale == 1).all()
        y.sum().backward()
        assert x.grad.shape == shape
    weight = torch.ones(16, device=device, requires_grad=True)
    y, _ = quantrain.norm_act_fake_quantize(
        torch.zeros(0, 16, device=device), None, weight, None, 0.1, function="rms_norm"
    )
    y.sum().backward()
    assert (weight.grad == 0).all()


@DEVICES
@pytest.mark.parametrize("function", FUNCTIONS)
def test_where_a_tensor_lies_does_not_matter(device, function):
    """Strided, and not on 16 bytes: another kernel on CUDA, which rounds its sums otherwise."""
    *given, grad = operands(function, (6, 64), device=device)
    plain = leaves(given)
    wide = [None if t is None else torch.stack([t, t], -1)[..., 0] for t in given]
    shifted = [None if t is None else torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in given]
    y, codes = quantrain.norm_act_fake_quantize(*plain, 0.05, function=function, eps=0.01)
    y.backward(grad)
    for other in (wide, shifted):
        inputs = leaves(other) if other is wide else [None if t is None else t.requires_grad_() for t in other]
        z, again = quantrain.norm_act_fake_quantize(*inputs, 0.05, function=function, eps=0.01)
        assert (again.int() - codes.int()).abs().max() <= 1 and (again != codes).double().mean() < 0.01
        z.backward(grad)
        for a, b in zip(inputs, plain, strict=True):
            if a is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


@DEVICES
@pytest.mark.parametrize("function", ["gelu", "layer_norm"])
def test_results_repeat(device, function):
    *given, grad = operands(function, (300, 96), device=device)
    found = []
    for _ in range(3):
        inputs = leaves(given)
        y, codes, scale, _ = quantrain.norm_act_fake_quantize_dynamic(*inputs, function=function)
        y.backward(grad)
        found.append([y.detach(), codes, scale, *(t.grad for t in inputs if t is not None)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_what_is_kept():
    """x and other once, moments, and a bit where a code may clip; of identity and relu bits alone."""
    sizes = {}
    for function in FUNCTIONS:
        for dynamic in (True, False):
            *given, _ = operands(function, (6, 64))
            inputs, kept = leaves(given), []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
                if dynamic:
                    quantrain.norm_act_fake_quantize_dynamic(*inputs, function=function)
                else:
                    quantrain.norm_act_fake_quantize(*inputs, 0.05, function=function)
            sizes[function, dynamic] = sum(t.numel() * t.element_size() for t in kept if t is not None)
    x, bits = 6 * 64 * 4, 6 * 64 // 8
    assert sizes["identity", True] == 0 and sizes["identity", False] == bits
    assert sizes["relu", True] == sizes["relu", False] == bits
    assert sizes["gelu", True] == x and sizes["gelu", False] == x + bits
    assert sizes["silu_mul", True] == 2 * x
    assert sizes["rms_norm", True] == x + 64 * 4 + 6 * 8


@DEVICES
def test_opcheck_compilers_and_second_derivatives(device):
    for function in ("identity", "silu_mul", "layer_norm"):
        torch._dynamo.reset()
        *given, _ = operands(function, (4, 24), device=device)
        inputs = leaves(given)
        scale = torch.tensor([0.05], device=device)
        opcheck(ops.norm_act_fake_quantize, (*inputs, scale), {"function": function})
        opcheck(ops.norm_act_fake_quantize_dynamic, tuple(inputs), {"function": function, "symmetric": False})

        def run(*inputs, function=function, scale=scale):
            y, _ = ops.norm_act_fake_quantize(*inputs, scale, function=function)
            z, _, step, _ = ops.norm_act_fake_quantize_dynamic(*inputs, function=function)
            return y + z * step

        want, needed = run(*inputs), [t for t in inputs if t is not None]
        for dynamic in (False, True):
            found = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")(*inputs)
            torch.testing.assert_close(found, want)
            a = torch.autograd.grad(found.sum(), needed)
            torch.testing.assert_close(a, torch.autograd.grad(want.sum(), needed, retain_graph=True))
        (grad,) = torch.autograd.grad(want.square().sum(), inputs[0], create_graph=True)
        with pytest.raises(NotImplementedError, match="norm_act_fake_quantize.*: expected one derivative"):
            grad.sum().backward()


X, W = torch.zeros(2, 8), torch.ones(8)
GIVEN = {"input": X, "other": None, "weight": None, "bias": None, "scale": 0.1}


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"function": "tanh"}, ValueError, "expected function to be identity"),
        ({"function": "silu_mul"}, ValueError, "expected other with silu_mul"),
        ({"other": X}, ValueError, "expected other with silu_mul"),
        ({"other": X[:1], "function": "silu_mul"}, ValueError, "expected other of input's shape"),
        ({"weight": W}, ValueError, "expected weight with layer_norm or rms_norm"),
        ({"weight": W, "bias": W, "function": "rms_norm"}, ValueError, "expected bias with layer_norm"),
        ({"weight": W[:3], "function": "rms_norm"}, ValueError, "expected weight of one element per column"),
        ({"weight": W.double(), "function": "rms_norm"}, TypeError, "expected weight of input's type"),
        ({"input": X.double()}, TypeError, "expected input of float32, float16 or bfloat16"),
        ({"input": torch.tensor(1.0)}, ValueError, r"expected input \[..., K\]"),
        ({"scale": torch.ones(2, 1)}, ValueError, "expected one scale"),
        ({"scale": -1.0}, ValueError, "expected every scale to be positive"),
        ({"scale": torch.ones(1).requires_grad_()}, ValueError, "expected scale without requires_grad"),
        ({"quant_max": 300}, ValueError, "expected codes of at most 8 bits"),
        ({"input": X.half(), "dtype": torch.float32}, TypeError, "expected dtype to be input's"),
        ({"dtype": torch.float64}, TypeError, "expected dtype to be one of float32"),
    ],
)
def test_what_it_refuses(change, error, text):
    arguments = {"function": "identity"} | GIVEN | change
    with pytest.raises(error, match=f"norm_act_fake_quantize: {text}"):
        quantrain.norm_act_fake_quantize(**arguments)
    if "scale" in change or "double" in text:
        return
    arguments.pop("scale")
    with pytest.raises(error, match=f"norm_act_fake_quantize_dynamic: {text}"):
        quantrain.norm_act_fake_quantize_dynamic(**arguments)


def test_forward_mode_is_refused():
    with pytest.raises(NotImplementedError, match="expected a derivative in reverse mode"):
        torch.func.jvp(lambda x: quantrain.norm_act_fake_quantize_dynamic(x)[0], (X,), (X,))


def test_the_gates_of_a_feed_forward():
    """silu(g) * u rounded per token, as a gated feed-forward calls it, against PyTorch's calls."""
    torch.manual_seed(0)
    g, u = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 64, requires_grad=True)
    y, _, _, _ = quantrain.norm_act_fake_quantize_dynamic(g, u, function="silu_mul")
    a, b = g.detach().requires_grad_(), u.detach().requires_grad_()
    want = ops.fake_quantize_dynamic(F.silu(a) * b, [2, 5, 1])
    torch.testing.assert_close(y, want, rtol=0, atol=2e-6)
    grad = torch.randn_like(y)
    y.backward(grad)
    want.backward(grad)
    torch.testing.assert_close(g.grad, a.grad)
    torch.testing.assert_close(u.grad, b.grad)
