"""fqt_linear and fqt_conv2d: outputs, gradients, draws and errors."""

import math
from collections import Counter
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from samples.fake_quant import assert_same, on_each_device
from samples.unbiased import FALSE_ALARM, largest_z
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import quantrain

ops = torch.ops.quantrain

QUANTIZERS = ["per_tensor", "per_sample", "per_channel", "householder"]


def tensors(device, *shapes, dtype=torch.float32, seed=0):
    """Leaves with gradients; the values are the same on every device."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(device, dtype).requires_grad_() for shape in shapes]


def gradients(y, leaves, grad_output, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    return torch.autograd.grad(y, leaves, grad_output, retain_graph=True)


def quantizers(grad_input, grad_weight="per_channel", **fields):
    return {"grad_input": grad_input, "grad_weight": grad_weight, "grad_input_bits": 5, **fields}


# (input, weight, bias?, stride, padding, dilation, groups)
CONVOLUTIONS = {
    "plain": ((4, 3, 8, 8), (6, 3, 3, 3), True, 1, 0, 1, 1),
    "stride": ((4, 3, 9, 8), (6, 3, 3, 3), True, 2, 1, 1, 1),
    "sizes": ((3, 4, 9, 11), (6, 4, 3, 5), False, (2, 3), (1, 2), (1, 2), 1),
    "groups": ((4, 6, 8, 8), (4, 3, 3, 3), True, 1, 1, 1, 2),
    "depthwise": ((4, 6, 8, 8), (6, 1, 3, 3), False, 2, 1, 1, 6),
    "dilation": ((4, 3, 11, 11), (6, 3, 3, 3), True, 1, 2, 2, 1),
    "same": ((4, 3, 8, 8), (6, 3, 3, 3), True, 1, "same", 1, 1),
    "same, uneven": ((4, 3, 8, 9), (6, 3, 4, 2), True, 1, "same", (1, 3), 1),
    "valid": ((4, 3, 8, 8), (6, 3, 3, 3), False, 2, "valid", 1, 1),
    "one image": ((3, 8, 8), (6, 3, 3, 3), True, 1, 1, 1, 1),
    "1x1": ((4, 8, 5, 5), (6, 8, 1, 1), True, 1, 0, 1, 1),
}
each_convolution = pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)


def convolution(case, device="cpu", dtype=torch.float32):
    x_shape, w_shape, has_bias, *geometry = case
    x, w, *b = tensors(device, x_shape, w_shape, *([w_shape[:1]] if has_bias else []), dtype=dtype)
    return x, w, b[0] if b else None, geometry


# ---- outputs ----------------------------------------------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6), (2, 3, 4, 6), (6,), (0, 6)])
def test_the_output_is_that_of_linear(shape, device):
    x, w, b = tensors(device, shape, (5, 6), (5,))
    assert_same(quantrain.fqt_linear(x, w, b, **quantizers("householder")), F.linear(x, w, b))
    with torch.inference_mode():
        assert_same(quantrain.fqt_linear(x, w, **quantizers("householder")), F.linear(x, w))


@on_each_device
@each_convolution
def test_the_output_is_that_of_conv2d(case, device):
    x, w, b, geometry = convolution(case, device)
    assert_same(quantrain.fqt_conv2d(x, w, b, *geometry, **quantizers("per_sample")), F.conv2d(x, w, b, *geometry))
    with torch.inference_mode():
        assert_same(quantrain.fqt_conv2d(x, w, b, *geometry), F.conv2d(x, w, b, *geometry))


# ---- gradients --------------------------------------------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6), (6,), (0, 6)])
def test_without_quantizers_the_gradients_are_those_of_linear(shape, device):
    leaves = tensors(device, shape, (5, 6), (5,), dtype=torch.float64)
    expected = F.linear(*leaves)
    g = torch.randn_like(expected)
    for mine, other in zip(
        gradients(quantrain.fqt_linear(*leaves), leaves, g), gradients(expected, leaves, g), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@on_each_device
@each_convolution
def test_without_quantizers_the_gradients_are_those_of_conv2d(case, device):
    x, w, b, geometry = convolution(case, device, torch.float64)
    leaves = [x, w] if b is None else [x, w, b]
    expected = F.conv2d(x, w, b, *geometry)
    g = torch.randn_like(expected)
    mine = gradients(quantrain.fqt_conv2d(x, w, b, *geometry), leaves, g)
    for one, other in zip(mine, gradients(expected, leaves, g), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@on_each_device
@pytest.mark.parametrize("rows", ["token", "sample"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("shape", [(9, 6), (4, 5, 6)])
def test_linear_takes_two_draws_of_the_default_generator(shape, quantizer, rows, device):
    x, w, b = tensors(device, shape, (5, 6), (5,))
    keywords = quantizers(quantizer, "per_channel", grad_input_rows=rows, grad_weight_rows=rows, grad_weight_bits=7)
    y = quantrain.fqt_linear(x, w, b, **keywords)
    g = torch.randn_like(y)
    grad_x, grad_w, grad_b = gradients(y, (x, w, b), g, seed=3)
    torch.manual_seed(3)
    first = quantrain.quantize_gradient(g, 5, quantizer, rows=rows)
    second = quantrain.quantize_gradient(g, 7, "per_channel", rows=rows)
    torch.testing.assert_close(grad_x, first @ w)
    torch.testing.assert_close(grad_w, second.flatten(0, -2).t() @ x.flatten(0, -2))
    torch.testing.assert_close(grad_b, g.flatten(0, -2).sum(0))
    assert not torch.equal(first, g) and not torch.equal(second, g)


@on_each_device
@each_convolution
def test_conv2d_takes_two_draws_of_the_default_generator(case, device):
    x, w, b, geometry = convolution(case, device)
    y = quantrain.fqt_conv2d(x, w, b, *geometry, **quantizers("householder", "per_tensor"))
    g = torch.randn_like(y)
    batch = g if g.dim() == 4 else g.unsqueeze(0)
    mine = gradients(y, (x, w), g, seed=3)
    torch.manual_seed(3)
    first = quantrain.quantize_gradient(batch, 5, "householder").reshape(g.shape)
    second = quantrain.quantize_gradient(batch, 8, "per_tensor").reshape(g.shape)
    expected = F.conv2d(x, w, b, *geometry)
    torch.testing.assert_close(mine[0], gradients(expected, x, first)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine[1], gradients(expected, w, second)[0], rtol=1e-4, atol=1e-5)


@on_each_device
def test_the_two_draws_are_independent(device):
    """The same quantizer for both: the errors of the two draws are uncorrelated (z-test, false alarm 1e-6)."""
    x, w = tensors(device, (400, 6), (400, 6))
    y = quantrain.fqt_linear(
        x, w, grad_input="per_tensor", grad_input_bits=4, grad_weight="per_tensor", grad_weight_bits=4
    )
    g = torch.randn_like(y)
    torch.manual_seed(0)
    error = [quantrain.quantize_gradient(g, 4, "per_tensor") - g for _ in range(2)]
    one, two = ((e - e.mean()) / e.std() for e in error)
    z = (one * two).mean() * math.sqrt(g.numel())
    assert abs(z) < NormalDist().inv_cdf(1 - FALSE_ALARM / 2)
    grad_x, grad_w = gradients(y, (x, w), g, seed=0)
    torch.testing.assert_close(grad_x, (g + error[0]) @ w)
    torch.testing.assert_close(grad_w, (g + error[1]).t() @ x)


def test_a_gradient_nobody_needs_draws_nothing():
    x, w, b = tensors("cpu", (9, 6), (5, 6), (5,))
    y = quantrain.fqt_linear(x, w, b, **quantizers("per_sample"))
    g = torch.randn_like(y)
    torch.manual_seed(7)
    first = quantrain.quantize_gradient(g, 8, "per_channel", rows="token")
    assert_same(gradients(y, w, g, seed=7)[0], first.t() @ x)
    state = torch.get_rng_state()
    torch.testing.assert_close(gradients(y, b, g)[0], g.sum(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_every_backward_draws_anew_and_a_seed_repeats_it():
    x, w = tensors("cpu", (9, 6), (5, 6))
    y = quantrain.fqt_linear(x, w, **quantizers("householder"))
    g = torch.randn_like(y)
    first, second, again = gradients(y, x, g, seed=1)[0], gradients(y, x, g)[0], gradients(y, x, g, seed=1)[0]
    assert_same(first, again)
    assert not torch.equal(first, second)


class CountProducts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_forward_is_computed_once_and_backward_takes_two_products():
    x, w = tensors("cpu", (9, 6), (5, 6))
    image, kernel = tensors("cpu", (2, 3, 6, 6), (4, 3, 3, 3))
    with CountProducts() as forward:
        y = quantrain.fqt_linear(x, w, **quantizers("per_sample"))
        z = quantrain.fqt_conv2d(image, kernel, **quantizers("per_sample"))
    with CountProducts() as backward:
        (y.sum() + z.sum()).backward()
    products = ("linear", "addmm", "matmul", "mm", "convolution", "convolution_backward")
    assert sum(forward.count[name] for name in products) == 2
    assert sum(backward.count[name] for name in products) == 4
    # A linear layer's gradient with a grid per row for one product and per column for the other is read once.
    assert (backward.count["quantize_gradient"], backward.count["_quantize_gradient_both"]) == (2, 1)


@on_each_device
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_nan_and_inf_reach_the_gradients(quantizer, bad, device):
    x, w, b = tensors(device, (16, 6), (5, 6), (5,))
    image, kernel = tensors(device, (8, 3, 6, 6), (4, 3, 3, 3))
    for y, leaves in (
        (quantrain.fqt_linear(x, w, b, **quantizers(quantizer, quantizer)), (x, w, b)),
        (quantrain.fqt_conv2d(image, kernel, **quantizers(quantizer, quantizer)), (image, kernel)),
    ):
        g = torch.randn_like(y)
        g.view(-1)[g.numel() // 2 + 1] = bad
        for gradient in gradients(y, leaves, g):
            assert not gradient.isfinite().all()


@on_each_device
def test_channels_last(device):
    x, w = tensors(device, (4, 8, 6, 6), (5, 8, 3, 3))
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = quantrain.fqt_conv2d(x, w, padding=1, **quantizers("per_sample", "per_tensor"))
    g = torch.randn_like(y)
    assert g.is_contiguous(memory_format=torch.channels_last)
    mine = gradients(y, (x, w), g, seed=2)
    torch.manual_seed(2)
    first, second = quantrain.quantize_gradient(g, 5, "per_sample"), quantrain.quantize_gradient(g, 8, "per_tensor")
    exact = F.conv2d(x, w, padding=1)
    torch.testing.assert_close(mine[0], gradients(exact, x, first)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine[1], gradients(exact, w, second)[0], rtol=1e-4, atol=1e-5)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, device):
    leaves = tensors(device, (16, 32), (24, 32), (24,), dtype=dtype)
    y = quantrain.fqt_linear(*leaves, **quantizers("householder"))
    g = torch.randn_like(y)
    found = gradients(y, leaves, g, seed=0)
    torch.manual_seed(0)
    first = quantrain.quantize_gradient(g, 5, "householder", rows="token")
    torch.testing.assert_close(found[0], first @ leaves[1])
    assert [gradient.dtype for gradient in found] == [dtype] * 3


# ---- the mean over draws ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_mean_of_the_gradients_is_the_exact_gradient(quantizer):
    x, w = tensors("cpu", (24, 6), (5, 6))
    image, kernel = tensors("cpu", (12, 4, 5, 5), (4, 2, 3, 3))
    keywords = quantizers(quantizer, quantizer, grad_input_bits=3, grad_weight_bits=3)
    for y, exact, leaves in (
        (quantrain.fqt_linear(x, w, **keywords), F.linear(x, w), (x, w)),
        (quantrain.fqt_conv2d(image, kernel, groups=2, **keywords), F.conv2d(image, kernel, groups=2), (image, kernel)),
    ):
        # Rows of very different size, as gradients have them.
        g = torch.randn_like(y) * torch.logspace(0, -4, y.shape[0]).reshape(-1, *[1] * (y.dim() - 1))
        expected = gradients(exact, leaves, g)
        torch.manual_seed(5)
        draws = [gradients(y, leaves, g) for _ in range(3000)]
        for place, mean in enumerate(expected):
            z, bound = largest_z(torch.stack([draw[place] for draw in draws]), mean)
            assert z < bound


# ---- autocast, compilers, refusals ------------------------------------------------------------------------------------------


@on_each_device
def test_autocast_casts_as_for_linear_and_conv2d(device):
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    x, w, b = tensors(device, (9, 6), (5, 6), (5,))
    image, kernel = tensors(device, (2, 3, 6, 6), (4, 3, 3, 3))
    with torch.autocast(device, dtype=dtype):
        assert_same(quantrain.fqt_linear(x, w, b, **quantizers("per_sample")), F.linear(x, w, b))
        y = quantrain.fqt_conv2d(image, kernel, padding="same", **quantizers("per_sample", "per_tensor"))
        assert_same(y, F.conv2d(image, kernel, padding="same"))
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert image.grad.dtype == kernel.grad.dtype == torch.float32
    assert kernel.grad.isfinite().all()


@on_each_device
@pytest.mark.parametrize("quantizer", ["none", *QUANTIZERS])
def test_opcheck_linear(quantizer, device):
    x, w, b = tensors(device, (4, 3, 6), (5, 6), (5,))
    opcheck(ops.fqt_linear, (x, w, b), quantizers(quantizer))
    opcheck(ops.fqt_linear, (x, w), quantizers(quantizer, "none"))


@on_each_device
@pytest.mark.parametrize("quantizer", ["none", *QUANTIZERS])
def test_opcheck_conv2d(quantizer, device):
    x, w, b = tensors(device, (4, 4, 7, 7), (6, 2, 3, 3), (6,))
    opcheck(ops.fqt_conv2d.default, (x, w, b, [2, 2], [1, 1], [1, 1], 2), quantizers(quantizer))
    opcheck(ops.fqt_conv2d.padding, (x, w, None, [1, 1], "same", [1, 1], 2), quantizers(quantizer, "none"))


def step(x, w, b, image, kernel, quantized=True):
    linear = quantizers("householder") if quantized else {}
    conv = quantizers("per_sample", "per_tensor") if quantized else {}
    y = quantrain.fqt_linear(x.relu(), w * 2, b, **linear)
    z = quantrain.fqt_conv2d(image, kernel, None, 1, "same", **conv)
    return y.square().sum() + z.relu().square().sum()


def step_leaves(device, rows):
    return tensors(device, (rows, 6), (5, 6), (5,), (rows, 3, 6, 6), (4, 3, 3, 3), seed=rows)


@on_each_device
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_the_same_draws(device, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (8, 12) if dynamic else (8,):
        results = []
        for function in (step, compiled):
            leaves = step_leaves(device, rows)
            loss = function(*leaves)
            torch.manual_seed(1)
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        for eager, mine in zip(*results, strict=True):
            torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-4)


@on_each_device
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_keeps_the_mean(device, dynamic):
    """Inductor may order the draws of two layers in its own way: the mean of the gradients stays the exact gradient."""
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for rows in (8, 12) if dynamic else (8,):
        leaves = step_leaves(device, rows)
        exact = step(*leaves, quantized=False)
        torch.testing.assert_close(compiled(*leaves), exact)
        expected = torch.autograd.grad(exact, leaves)
        torch.manual_seed(1)
        draws = [torch.autograd.grad(compiled(*leaves), leaves) for _ in range(1000)]
        for place, mean in enumerate(expected):
            gradient = torch.stack([draw[place] for draw in draws]).cpu()
            if place == 2:  # the bias: no draw
                torch.testing.assert_close(gradient[-1], mean.cpu(), rtol=1e-4, atol=1e-4)
            else:
                z, bound = largest_z(gradient, mean.cpu())
                assert z < bound


def test_exports():
    class Model(torch.nn.Module):
        def forward(self, x, w):
            return quantrain.fqt_linear(x, w, **quantizers("householder"))

    x, w = torch.randn(4, 6), torch.randn(5, 6)
    program = torch.export.export(Model(), (x, w), dynamic_shapes=({0: torch.export.Dim("batch", min=2)}, None))
    other = torch.randn(7, 6)
    assert_same(program.module()(other, w), F.linear(other, w))


def test_meta_device_gives_shapes():
    x, w = torch.empty(4, 3, 6, device="meta"), torch.empty(5, 6, device="meta")
    assert quantrain.fqt_linear(x, w).shape == (4, 3, 5)
    x, w = torch.empty(4, 3, 9, 9, device="meta"), torch.empty(5, 3, 3, 3, device="meta")
    assert quantrain.fqt_conv2d(x, w, stride=2, padding=1).shape == (4, 5, 5, 5)


def test_a_second_derivative_is_refused():
    x, w = tensors("cpu", (9, 6), (5, 6))
    image, kernel = tensors("cpu", (2, 3, 6, 6), (4, 3, 3, 3))
    for name, y, leaves in (
        ("fqt_linear", quantrain.fqt_linear(x, w, **quantizers("per_sample")), (x, w)),
        ("fqt_conv2d", quantrain.fqt_conv2d(image, kernel, **quantizers("per_sample")), (image, kernel)),
    ):
        for leaf in leaves:
            (gradient,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
            assert gradient.requires_grad
            with pytest.raises(NotImplementedError, match=f"{name}: expected one derivative, got a second one"):
                gradient.square().sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad_input": "nearest"}, ValueError, "expected grad_input to be one of none, per_tensor, per_sample, per_channel, householder, got 'nearest'"),
        ({"grad_weight": "bhq"}, ValueError, "expected grad_weight to be one of none, per_tensor, .*, got 'bhq'"),
        ({"grad_input_bits": 1}, ValueError, "expected grad_input_bits in 2 to 8, got 1"),
        ({"grad_weight_bits": 9}, ValueError, "expected grad_weight_bits in 2 to 8, got 9"),
        ({"grad_input_rows": "row"}, ValueError, "expected grad_input_rows to be one of sample, token, got 'row'"),
        ({"grad_weight_max_group": 2}, ValueError, "expected grad_weight_max_group in 3 to 256, got 2"),
        ({"grad_input": "householder", "grad_input_preserve_zero": True}, ValueError, "expected grad_input_preserve_zero with another quantizer"),
    ],
)  # fmt: skip
def test_bad_quantizers_are_refused_by_the_forward_pass(change, error, message):
    x, w = torch.randn(4, 6), torch.randn(5, 6)
    with pytest.raises(error, match=f"^fqt_linear: {message}"):
        quantrain.fqt_linear(x, w, **change)
    with pytest.raises(error, match=f"^fqt_conv2d: {message}"):
        quantrain.fqt_conv2d(torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), **change)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantrain.fqt_linear(torch.ones(4, 6), torch.ones(5, 7)), ValueError, "fqt_linear: expected input"),
        (lambda: quantrain.fqt_linear(torch.ones(4, 6), torch.ones(5)), ValueError, "fqt_linear: expected weight"),
        (lambda: quantrain.fqt_linear(torch.tensor(1.0), torch.ones(5, 6)), ValueError, "fqt_linear: expected input"),
        (lambda: quantrain.fqt_linear(torch.ones(4, 6), torch.ones(5, 6), torch.ones(6)), ValueError, "fqt_linear: expected bias"),
        (lambda: quantrain.fqt_linear(torch.ones(4, 6).int(), torch.ones(5, 6).int()), TypeError, "fqt_linear: expected input of float32"),
        (lambda: quantrain.fqt_linear(torch.ones(4, 6).double(), torch.ones(5, 6).double(), grad_input="per_sample"), TypeError, "fqt_linear: expected input of float32, float16 or bfloat16, got Double"),
        (lambda: quantrain.fqt_linear(torch.ones(4, 6), torch.ones(5, 6).half()), TypeError, "fqt_linear: expected weight of input's type Float, got Half"),
        (lambda: quantrain.fqt_linear(torch.ones(4, 6), torch.ones(5, 6, device="meta")), TypeError, "fqt_linear: expected weight on input's device cpu, got meta"),
        (lambda: quantrain.fqt_conv2d(torch.ones(4, 6), torch.ones(5, 6, 3, 3)), ValueError, "fqt_conv2d: expected input"),
        (lambda: quantrain.fqt_conv2d(torch.ones(1, 6, 8, 8), torch.ones(5, 6, 3)), ValueError, "fqt_conv2d: expected weight"),
        (lambda: quantrain.fqt_conv2d(torch.ones(1, 6, 8, 8), torch.ones(4, 6, 3, 3), groups=2), ValueError, "fqt_conv2d: expected input of C channels"),
        (lambda: quantrain.fqt_conv2d(torch.ones(1, 6, 8, 8), torch.ones(4, 6, 3, 3), groups=0), ValueError, "fqt_conv2d: expected input of C channels"),
        (lambda: quantrain.fqt_conv2d(torch.ones(1, 6, 8, 8), torch.ones(4, 6, 3, 3), padding="full"), ValueError, "fqt_conv2d: expected padding to be sizes, 'same' or 'valid', got 'full'"),
        (lambda: quantrain.fqt_conv2d(torch.ones(1, 6, 8, 8), torch.ones(4, 6, 3, 3), stride=2, padding="same"), ValueError, "fqt_conv2d: expected stride 1 with padding 'same', got 2"),
        (lambda: quantrain.fqt_conv2d(torch.ones(1, 6, 8, 8), torch.ones(4, 6, 3, 3), stride=(1, 1, 1)), ValueError, "fqt_conv2d: expected two sizes each"),
    ],
)  # fmt: skip
def test_bad_tensors_are_refused(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


@pytest.mark.cuda
def test_a_step_is_captured_in_a_cuda_graph():
    x, w = tensors("cuda", (64, 32), (16, 32))
    image, kernel = tensors("cuda", (8, 3, 6, 6), (4, 3, 3, 3))

    def run():
        y = quantrain.fqt_linear(x, w, **quantizers("householder"))
        z = quantrain.fqt_conv2d(image, kernel, **quantizers("per_sample", "per_tensor"))
        (y.square().sum() + z.square().sum()).backward()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    for leaf in (x, w, image, kernel):
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    results = []
    for _ in range(2):
        for leaf in (x, w, image, kernel):
            leaf.grad.zero_()
        graph.replay()
        torch.cuda.synchronize()
        results.append([leaf.grad.clone() for leaf in (x, w, image, kernel)])
    for first, second in zip(*results, strict=True):
        assert first.isfinite().all() and not torch.equal(first, second)  # each replay draws anew
