"""What each operator says of its derivative: the right one, or a clear refusal; never a silent zero."""

import pytest
import torch
from torch.autograd import forward_ad

import quantrain
from quantrain import fake_quantize, fake_quantize_dynamic, fake_quantize_learnable, fixed_point_quantize

SCALE = torch.tensor([[0.1], [0.2], [0.3]])
QUANTIZERS = {
    "fake_quantize": lambda x: fake_quantize(x, SCALE, quant_min=-4, quant_max=3),
    "fake_quantize_affine": lambda x: fake_quantize(x, SCALE, torch.tensor([[1], [2], [3]]), quant_min=0, quant_max=7),
    "fake_quantize_dynamic": lambda x: fake_quantize_dynamic(x, [3, 1], quant_min=-8, quant_max=4),
    "fixed_point_quantize": lambda x: fixed_point_quantize(x, 2, word_length=4),
}


@pytest.fixture
def x():
    x = torch.randn(3, 28, generator=torch.Generator().manual_seed(1))
    x[0, :3] = torch.tensor([0.0, -0.0, 50.0])
    return x


def gradient(quantizer, x, grad):
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(quantizer(x), x, grad)
    return found


@pytest.mark.parametrize("name", QUANTIZERS)
def test_torch_func_grad_is_the_straight_through_gradient(x, name):
    quantizer, grad = QUANTIZERS[name], torch.randn(3, 28)
    want = gradient(quantizer, x, grad)
    assert want.ne(0).any() and (want.eq(0).any() or name == "fake_quantize_dynamic")  # whose own range clips nothing
    assert torch.func.grad(lambda t: (quantizer(t) * grad).sum())(x).equal(want)
    value, pullback = torch.func.vjp(quantizer, x)
    assert value.equal(quantizer(x)) and value.signbit().equal(quantizer(x).signbit())
    assert pullback(grad)[0].equal(want)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_forward_mode_is_the_straight_through_gradient(x, name):
    quantizer, tangent = QUANTIZERS[name], torch.randn(3, 28)
    want = gradient(quantizer, x, torch.ones(3, 28)) * tangent
    with forward_ad.dual_level():
        dual = quantizer(forward_ad.make_dual(x, tangent))
        value, found = forward_ad.unpack_dual(dual)
        assert value.equal(quantizer(x)) and found.equal(want)
    value, found = torch.func.jvp(quantizer, (x,), (tangent,))
    assert value.equal(quantizer(x)) and found.equal(want)


def test_second_derivatives_of_a_fixed_scale(x):
    x.requires_grad_()
    (first,) = torch.autograd.grad(QUANTIZERS["fake_quantize"](x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    mask = gradient(QUANTIZERS["fake_quantize"], x.detach(), torch.ones(3, 28))
    assert second.equal(2 * mask)  # d(2 y mask)/dx = 2 mask mask


def test_second_derivative_of_a_learned_scale_is_refused(x):
    scale = SCALE.clone().requires_grad_()
    x.requires_grad_()
    y = fake_quantize_learnable(x, scale, quant_min=-4, quant_max=3)
    grads = torch.autograd.grad(y.square().sum(), (x, scale), create_graph=True)
    for grad in grads:
        with pytest.raises(NotImplementedError, match="fake_quantize_learnable: expected one derivative"):
            torch.autograd.grad(grad.sum(), x, retain_graph=True)
    first = torch.autograd.grad(fake_quantize_learnable(x, scale, quant_min=-4, quant_max=3).square().sum(), (x, scale))
    assert all(a.equal(b) for a, b in zip(grads, first, strict=True))


def layers(x):
    """Calls of the operators with custom nodes that have one derivative, in reverse mode."""
    w, image, kernel = torch.randn(4, 28), torch.randn(1, 2, 5, 5), torch.randn(2, 2, 3, 3)
    return {
        "fake_quantize_learnable": (lambda t: fake_quantize_learnable(t, SCALE), x),
        "int8_linear": (lambda t: quantrain.int8_linear(t, w), x),
        "fqt_linear": (lambda t: quantrain.fqt_linear(t, w), x),
        "fqt_conv2d": (lambda t: quantrain.fqt_conv2d(t, kernel), image),
    }


@pytest.mark.parametrize("name", ["fake_quantize_learnable", "int8_linear", "fqt_linear", "fqt_conv2d"])
def test_forward_mode_and_torch_func_are_refused_elsewhere(x, name):
    call, argument = layers(x)[name]
    message = f"{name}: expected a derivative in reverse mode"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        call(forward_ad.make_dual(argument, torch.ones_like(argument)))
    with pytest.raises(NotImplementedError, match=message):
        torch.func.grad(lambda t: call(t).sum())(argument)


def test_scales_of_a_parameter_carry_no_gradient():
    weight = torch.nn.Parameter(torch.randn(4, 8))
    scale, zero_point = quantrain.choose_qparams(weight, [4, 1])
    assert not scale.requires_grad and not zero_point.requires_grad
    fake_quantize(weight, scale).sum().backward()  # the module that everybody writes first
    assert weight.grad.eq(1).all()
    low, high = torch.ops.quantrain._min_max(weight, [4, 1])
    assert not low.requires_grad and not high.requires_grad
    low, high = torch.ops.quantrain._mse_range(weight, [4, 1], quant_min=-8, quant_max=7, symmetric=True)
    assert not low.requires_grad and not high.requires_grad
    assert not quantrain.quantize(weight, scale).requires_grad
    assert not quantrain.fixed_point_fraction_length(weight).requires_grad


def refusing(weight):
    codes, scale = quantrain.int8_quantize_rows(weight.detach())
    learned = scale.clone().requires_grad_()
    return {
        "dequantize": quantrain.dequantize(codes, learned),
        "int8_mm": quantrain.int8_mm(codes, codes, learned),
        "int8_quantize_rows": quantrain.int8_quantize_rows(weight)[1],
        "int8_rms_norm": quantrain.int8_rms_norm(weight)[1],
        "quantize_gradient": quantrain.quantize_gradient(weight, 8, "per_sample"),
    }


@pytest.mark.parametrize("op", ["dequantize", "int8_mm", "int8_quantize_rows", "int8_rms_norm", "quantize_gradient"])
def test_a_missing_derivative_raises_with_the_operators_name(op):
    result = refusing(torch.nn.Parameter(torch.randn(4, 8)))[op]
    with pytest.raises((NotImplementedError, RuntimeError), match=f"quantrain::{op}.* is not implemented"):
        result.sum().backward()


def test_a_converted_int8_layer_says_that_it_has_no_derivative():
    model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    quantrain.convert(quantrain.prepare(model, "int8-training"))
    y = model(torch.randn(4, 16, requires_grad=True))
    if y.requires_grad:
        with pytest.raises((NotImplementedError, RuntimeError), match="int8.* is not implemented"):
            y.sum().backward()
    else:
        pytest.fail("the layer's output hides that its input required a gradient")
