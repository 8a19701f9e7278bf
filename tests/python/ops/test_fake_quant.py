"""fake_quantize, fake_quantize_learnable, fake_quantize_dynamic: values and gradients."""

import math

import pytest
import torch
from reference import fake_quant as reference
from samples.fake_quant import FEW, NOT_EMPTY, SAMPLES, Sample, assert_same, each, in_each_dtype, on_each_device

import quantrain


@each(SAMPLES)
@in_each_dtype
@on_each_device
def test_forward_equals_the_formula(sample, dtype, device):
    x, scale, zero_point = sample.make(device, dtype)
    y = quantrain.fake_quantize(x, scale, zero_point, **sample.range)
    assert_same(y, reference.fake_quantize(x, scale, zero_point, **sample.range))
    if x.numel() and sample.layout != "strided":
        assert y.stride() == x.stride()


@each(SAMPLES)
@in_each_dtype
@on_each_device
def test_gradient_is_straight_through(sample, dtype, device):
    x, scale, zero_point = sample.make(device, dtype, seed=1)
    x.requires_grad_()
    y = quantrain.fake_quantize(x, scale, zero_point, **sample.range)
    assert_same(y, reference.fake_quantize(x.detach(), scale, zero_point, **sample.range))
    grad_output = torch.randn(y.shape, device=device).to(dtype)
    (grad,) = torch.autograd.grad(y, x, grad_output)
    inside = reference.inside(x.detach(), scale, zero_point, **sample.range)
    assert_same(grad, torch.where(inside, grad_output, torch.zeros_like(grad_output)))


@each([s for s in NOT_EMPTY if s.scale_shape in ((1,), ())])
def test_per_tensor_equals_pytorch(sample):
    x, scale, zero_point = sample.make()
    zero_point = torch.zeros(scale.shape, dtype=torch.int32) if zero_point is None else zero_point
    expected = torch.fake_quantize_per_tensor_affine(
        x.requires_grad_(), scale.reshape(1), zero_point.reshape(1), sample.quant_min, sample.quant_max
    )
    grad_output = torch.randn(x.shape)
    (expected_grad,) = torch.autograd.grad(expected, x, grad_output)
    actual = quantrain.fake_quantize(x, scale, zero_point, **sample.range)
    (grad,) = torch.autograd.grad(actual, x, grad_output)
    assert_same(actual, expected)
    assert_same(grad, expected_grad)


@pytest.mark.parametrize("seed", range(20))
def test_per_channel_equals_pytorch_on_every_axis(seed):
    g = torch.Generator().manual_seed(seed)
    rank = int(torch.randint(1, 5, (1,), generator=g))
    shape = torch.randint(1, 23, (rank,), generator=g).tolist()
    for axis in range(rank):
        x = (torch.randn(shape, generator=g) * 3).requires_grad_()
        scale = torch.rand(shape[axis], generator=g) * 0.03 + 1e-4
        zero_point = torch.randint(-128, 128, (shape[axis],), generator=g, dtype=torch.int32)
        expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, -128, 127)
        actual = quantrain.fake_quantize(x, scale, zero_point, axis=axis)
        grad_output = torch.randn(shape, generator=g)
        assert_same(actual, expected)
        assert_same(torch.autograd.grad(actual, x, grad_output)[0], torch.autograd.grad(expected, x, grad_output)[0])


def test_huge_finite_values_saturate_on_their_own_side():
    # PyTorch's int64 cast wraps beyond 2^63 and sends large positive values to quant_min.
    x = torch.tensor([3e38, -3e38, 1e20, -1e20])
    y = quantrain.fake_quantize(x, torch.tensor([0.1]))
    assert_same(y, torch.tensor([12.7, -12.8, 12.7, -12.8]))


@in_each_dtype
@on_each_device
def test_nan_stays_and_infinity_saturates(dtype, device):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.3], device=device, dtype=dtype, requires_grad=True)
    y = quantrain.fake_quantize(x, torch.tensor([0.1], device=device))
    assert torch.isnan(y[0]) and not torch.isnan(y[1:]).any()
    assert_same(y[1:].detach(), torch.tensor([12.7, -12.8, 0.3], device=device).to(dtype))
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert grad.tolist() == [0, 0, 0, 1]


@each(FEW)
@in_each_dtype
@pytest.mark.cuda
def test_cpu_and_cuda_agree_bit_for_bit(sample, dtype):
    x, scale, zero_point = sample.make("cpu", dtype, seed=2)
    results = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        y = quantrain.fake_quantize(
            leaf, scale.to(device), None if zero_point is None else zero_point.to(device), **sample.range
        )
        (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        results.append((y.detach().cpu(), grad.cpu()))
    assert torch.equal(*(r[0].contiguous().view(torch.uint8) for r in results))
    assert torch.equal(*(r[1].contiguous().view(torch.uint8) for r in results))


@each(NOT_EMPTY)
@in_each_dtype
@on_each_device
@pytest.mark.parametrize("learned_zero_point", [False, True])
def test_learnable_equals_the_formula(sample, dtype, device, learned_zero_point):
    x, scale, zero_point = sample.make(device, dtype, seed=3)
    if learned_zero_point:
        zero_point = torch.zeros_like(scale) if zero_point is None else zero_point.float() + 0.3
        zero_point.requires_grad_()
    x.requires_grad_()
    scale.requires_grad_()
    y = quantrain.fake_quantize_learnable(x, scale, zero_point, grad_factor=0.25, **sample.range)
    used = zero_point
    if learned_zero_point:
        used = zero_point.detach().round().clamp(sample.quant_min, sample.quant_max)
    assert_same(y.detach(), reference.fake_quantize(x.detach(), scale.detach(), used, **sample.range))
    grad_output = torch.randn(y.shape, device=device).to(dtype)
    inputs = [x, scale, *([zero_point] if learned_zero_point else [])]
    grads = torch.autograd.grad(y, inputs, grad_output)
    grad_x, grad_scale, grad_zero_point, magnitude = reference.learnable_gradients(
        grad_output,
        x.detach(),
        scale.detach(),
        None if used is None else used.detach(),
        grad_factor=0.25,
        **sample.range,
    )
    assert_same(grads[0], grad_x)
    # The terms are rounded to float32 and added in float32: a few hundred roundings of the sum of magnitudes. Inside the range a
    # term is the difference of two numbers of at most quant_max steps, each with its own rounding.
    reach = max(abs(sample.quant_min), abs(sample.quant_max)) * 2
    slack = magnitude * 1e-5 + reach * 1e-6 * reference.sum_to_scale(grad_output.abs(), scale)
    assert ((grads[1].double() - grad_scale.reshape(scale.shape)).abs() <= slack.reshape(scale.shape)).all()
    if learned_zero_point:
        slack = reference.sum_to_scale(grad_output.abs(), scale) * scale.detach().abs() * 1e-5
        assert ((grads[2].double() - grad_zero_point.reshape(scale.shape)).abs() <= slack + 1e-9).all()


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_learnable_equals_pytorch(axis):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(24, 36, generator=g, requires_grad=True)
    size = 1 if axis is None else x.shape[axis]
    scale = (torch.rand(size, generator=g) * 0.1 + 0.05).requires_grad_()
    # PyTorch rounds a learned zero point half up in forward and half to even in backward; away from halves the two agree.
    zero_point = (torch.randint(-4, 4, (size,), generator=g).float() + 0.2).requires_grad_()
    grad_output = torch.randn(x.shape, generator=g)
    if axis is None:
        expected = torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point, -8, 7, 0.5)
    else:
        expected = torch._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, axis, -8, 7, 0.5)
    actual = quantrain.fake_quantize_learnable(
        x, scale, zero_point, quant_min=-8, quant_max=7, grad_factor=0.5, axis=axis
    )
    assert_same(actual.detach(), expected.detach())
    ours = torch.autograd.grad(actual, (x, scale, zero_point), grad_output)
    theirs = torch.autograd.grad(expected, (x, scale, zero_point), grad_output)
    assert_same(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-4, atol=1e-5)


@on_each_device
def test_scale_gradient_repeats_bit_for_bit(device):
    x, scale, _ = Sample("", (256, 3000), (256, 1)).make(device)
    scale.requires_grad_()
    grads = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        y = quantrain.fake_quantize_learnable(x, scale)
        grads.append(torch.autograd.grad(y, scale, torch.ones_like(y))[0])
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[1], grads[2])


@each(NOT_EMPTY)
@on_each_device
@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_is_choose_then_fake_quantize(sample, device, symmetric):
    if sample.quant_min == sample.quant_max:
        return
    x, _, _ = sample.make(device)
    shape = list(sample.scale_shape)
    leaf = x.clone().requires_grad_()
    y = quantrain.fake_quantize_dynamic(leaf, shape, symmetric=symmetric, **sample.range)
    scale, zero_point = quantrain.choose_qparams(x, shape, symmetric=symmetric, **sample.range)
    used = None if symmetric else zero_point
    assert_same(y.detach(), quantrain.fake_quantize(x, scale, used, **sample.range))
    assert_same(quantrain.fake_quantize_dynamic(x, shape, symmetric=symmetric, **sample.range), y.detach())
    (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    assert_same(grad, reference.inside(x, scale, used, **sample.range).to(grad.dtype))


@on_each_device
def test_dynamic_nan_marks_its_group_alone(device):
    x = torch.randn(4, 64, device=device)
    x[2, 7] = math.nan
    y = quantrain.fake_quantize_dynamic(x, [4, 1])
    assert torch.isnan(y[2]).all() and not torch.isnan(y[[0, 1, 3]]).any()


def test_second_derivative_follows_the_mask():
    x = torch.tensor([0.3, 50.0], requires_grad=True)
    y = quantrain.fake_quantize(x * x, torch.tensor([0.1]))
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert second.tolist() == [2.0, 0.0]


def test_gradient_may_come_in_other_strides():
    x = torch.randn(6, 8, requires_grad=True)
    y = quantrain.fake_quantize(x, torch.tensor([0.01]))
    grad_output = torch.randn(8, 6).t()
    (grad,) = torch.autograd.grad(y, x, grad_output)
    assert_same(grad, torch.where(reference.inside(x.detach(), torch.tensor([0.01])), grad_output, torch.zeros(())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_input_type(dtype):
    x = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=dtype):
        assert quantrain.fake_quantize(x, torch.tensor([0.1])).dtype == torch.float32
        assert quantrain.fake_quantize(x.to(dtype), torch.tensor([0.1])).dtype == dtype
        assert quantrain.fake_quantize_learnable(x.to(dtype), torch.tensor([0.1])).dtype == dtype


def test_inference_mode_and_no_grad():
    x = torch.randn(4, 4, requires_grad=True)
    with torch.inference_mode():
        assert not quantrain.fake_quantize(torch.randn(3), torch.tensor([0.1])).requires_grad
    with torch.no_grad():
        assert not quantrain.fake_quantize(x, torch.tensor([0.1])).requires_grad


@pytest.mark.cuda
def test_cuda_graph_replays():
    x = torch.randn(512, 512, device="cuda")
    scale = torch.rand(512, 1, device="cuda") * 0.01 + 0.01
    quantrain.fake_quantize(x, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = quantrain.fake_quantize(x, scale)
        dynamic = quantrain.fake_quantize_dynamic(x, [512, 1])
        codes = quantrain.quantize(x, scale, stochastic=True)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert_same(y, reference.fake_quantize(x, scale))
        assert_same(dynamic, quantrain.fake_quantize_dynamic(x, [512, 1]))
        first = codes.clone()
        graph.replay()
        assert not torch.equal(first, codes)  # new random numbers each replay


@pytest.mark.cuda
def test_more_than_2_to_the_31_elements():
    shape = (3, (1 << 30) + 24)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    scale = torch.rand(3, 1, device="cuda") * 0.01 + 0.01
    y = quantrain.fake_quantize(x, scale)
    for row in range(3):
        for part in (slice(0, 1000), slice(-1000, None)):
            assert_same(y[row, part], reference.fake_quantize(x[row, part], scale[row]))
