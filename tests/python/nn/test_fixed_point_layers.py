"""The layers of fixed-point training against the published rules in float64, one layer or block at a time."""

import copy

import pytest
import torch
from samples.fixed_point_models import ResNet, assert_integer_exact, prepared, train_steps, trained
from torch import nn
from torch.nn import functional

import quantrain
import quantrain.nn as qnn
from quantrain import Recipe


def spec(**fields):
    return qnn.changed_recipe(Recipe.from_name("f8net"), {"scheme": fields})


def fix_quant(x, fraction_length, signed):
    """The published quantizer, in x's type: section 3.1 of the paper."""
    low, high = (-127, 127) if signed else (0, 255)
    scale = 2.0**fraction_length
    return (x * scale).round().clamp(low, high) / scale


class FixQuant(torch.autograd.Function):
    """fix_quant with the published straight-through estimator."""

    @staticmethod
    def forward(ctx, x, fraction_length, signed):
        low, high = (-127, 127) if signed else (0, 255)
        r = (x * 2.0**fraction_length).round()
        ctx.save_for_backward((r > low) & (r < high))
        return fix_quant(x, fraction_length, signed)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None, None


def published_fraction_length(x, signed, c):
    """floor(log2(c / std)), clamped."""
    return int(torch.floor(torch.log2(c / x.double().std())).clamp(0, 8 - signed))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("fraction_length", range(9))
def test_pact_is_eta_fix_quant(fraction_length, signed):
    fraction_length = min(fraction_length, 8 - signed)
    torch.manual_seed(fraction_length)
    x, alpha = torch.randn(5000) * 3, 2.7
    activation = qnn.FixedPointActivation(signed, alpha=alpha)
    activation.fraction_length.fill_(fraction_length)
    level = activation.alpha.detach().double()
    eta = 2.0**fraction_length * level / (127 if signed else 255)
    expected = eta * fix_quant(x.double() / eta, fraction_length, signed)
    torch.testing.assert_close(activation.rounded_real(x).double(), expected, rtol=0, atol=1e-6)
    if not signed:
        pact = (x.double().clamp(0, float(level)) * (255 / level)).round() * (level / 255)
        torch.testing.assert_close(expected, pact, rtol=0, atol=1e-6)
    units = activation.eval()(x / activation.eta().detach())
    assert torch.equal(units * 2.0**fraction_length, (units * 2.0**fraction_length).round())
    torch.testing.assert_close(units.double() * eta, expected, rtol=0, atol=1e-6)


def test_gradient_of_alpha():
    """1 where x > alpha, (y - x) / alpha inside, 0 below 0; independent of the fraction length.

    The published rule counts the end codes as outside; LSQ's, used here, as inside: at most half a code of difference for each.
    """
    torch.manual_seed(0)
    x = (torch.randn(1000) * 3).requires_grad_()
    gradients = []
    for fraction_length in (2, 5, 8):
        activation = qnn.FixedPointActivation(alpha=2.0)
        activation.fraction_length.fill_(fraction_length)
        x.grad = None
        y = activation.rounded_real(x)
        y.sum().backward()
        code = (x.detach() * 255 / 2).round()
        inside = (code >= 0) & (code <= 255)
        expected = torch.where(inside, (y - x).detach() / 2, (code > 255).float()).sum()
        torch.testing.assert_close(activation.alpha.grad, expected.reshape(1), rtol=1e-4, atol=1e-3)
        strict = torch.where((code > 0) & (code < 255), (y - x).detach() / 2, (code >= 255).float()).sum()
        assert abs(float(strict - expected)) <= 0.5 * float((code == 255).sum()) / 255 + float((code == 255).sum())
        assert torch.equal(x.grad[inside], torch.ones_like(x.grad[inside]))
        assert not x.grad[(code < 0) | (code > 255)].any()
        gradients.append(float(activation.alpha.grad))
    assert gradients[0] == gradients[1] == gradients[2]


def test_fraction_length_follows_batches():
    activation = qnn.FixedPointActivation()
    x = torch.randn(20000).relu() * 2
    batch = activation.batch_fraction_length(x)
    assert int(batch) == int(torch.floor(torch.log2(50 / x.square().mean().sqrt())))
    activation(x)
    assert float(activation.fraction_length) == pytest.approx(0.9 * 6 + 0.1 * int(batch))
    before = activation.fraction_length.clone()
    activation(x, False)
    assert torch.equal(activation.fraction_length, before)
    activation.eval()(x)
    assert torch.equal(activation.fraction_length, before)


def test_without_clip_the_shortest_of_a_chain_holds():
    activation = qnn.FixedPointActivation(clip=False)
    activation(torch.rand(1000))
    activation(torch.rand(1000) * 100, False)
    short = float(activation.fraction_length)
    activation = qnn.FixedPointActivation(clip=False)
    activation(torch.rand(1000) * 100)
    assert short == float(activation.fraction_length)
    activation(torch.rand(1000), False)
    assert short == float(activation.fraction_length)


def layer_with_bn(recipe, bias=False, seed=0):
    torch.manual_seed(seed)
    conv, bn = nn.Conv2d(4, 6, 3, padding=1, bias=bias), nn.BatchNorm2d(6)
    nn.init.uniform_(bn.weight, 0.5, 1.5)
    nn.init.normal_(bn.bias)
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    source, output = qnn.FixedPointActivation(alpha=1.3), qnn.FixedPointActivation(alpha=3.1)
    source.fraction_length.fill_(7.4)
    output.fraction_length.fill_(5.6)
    layer = qnn.FixedPointConv2d.from_float(conv, recipe, bn=bn, input_activation=source, output_activation=output)
    x = source.rounded_real(torch.rand(4, 4, 7, 7) * 1.5).detach()
    return layer, x


def eta(activation):
    return activation.eta().detach().double()


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("bias", [False, True])
def test_one_convolution_is_the_algebra(granularity, bias):
    recipe = qnn.changed_recipe(Recipe.from_name("f8net"), {"weight": {"granularity": granularity}})
    layer, x = layer_with_bn(recipe, bias)
    twin = copy.deepcopy(layer)
    sf = (layer.bn.weight / torch.sqrt(layer.bn.running_var + layer.bn.eps)).detach().double()
    ratio = eta(layer.input_activation) / eta(layer.output_activation)
    effective = layer.weight.detach().double() * sf.reshape(-1, 1, 1, 1) * ratio
    rows = effective if granularity == "per_channel" else effective[None]
    lengths = torch.tensor([published_fraction_length(row, True, 40.0) for row in rows])
    rounded = fix_quant(effective, lengths.reshape(-1, 1, 1, 1).double(), True)
    weight = rounded / ratio / sf.reshape(-1, 1, 1, 1)
    y = functional.conv2d(x.double(), weight, padding=1)
    if bias:
        y = y + layer.bias.detach().double().reshape(-1, 1, 1)
    expected = functional.batch_norm(
        y, None, None, layer.bn.weight.detach().double(), layer.bn.bias.detach().double(), training=True
    )
    got = layer(x)
    assert torch.equal(layer.weight_fraction_length.flatten().long(), lengths)
    step = float(layer.activation.step())
    assert float((got.double() - fix_quant(expected / step, 0, False) * step).abs().max()) < 1.01 * step
    assert (got.double() - fix_quant(expected / step, 0, False) * step).abs().mean() < 1e-3 * step
    twin.eval()
    units = twin(x / twin.input_activation.eta().detach())
    shift = twin.bn.running_mean.double() - (twin.bias.detach().double() if bias else 0)
    b = (twin.bn.bias.detach().double() - shift * sf) / eta(twin.output_activation)
    total = lengths + int(twin.input_activation.rounded_fraction_length())
    b = (b * 2.0**total).round() / 2.0**total
    plain = functional.conv2d(x.double() / eta(twin.input_activation), rounded, padding=1) + b.reshape(-1, 1, 1)
    length = int(twin.output_activation.rounded_fraction_length())
    torch.testing.assert_close(units.double(), fix_quant(plain, length, False), rtol=0, atol=1.01 * 2.0**-length)
    assert (units.double() - fix_quant(plain, length, False)).abs().mean() < 1e-3 * 2.0**-length


def test_gradient_of_the_weight_passes_straight_through():
    layer, x = layer_with_bn("f8net")
    layer.quantizes = False
    direction = torch.randn(4, 6, 7, 7)
    (layer(x) * direction).sum().backward()
    weight = layer.weight.grad
    reference, _ = layer_with_bn("f8net")
    factor, _ = reference.factor(reference.scale_factor())
    rounded = reference.choose_fraction_length(reference.weight * factor)
    q = quantrain.fixed_point.fixed_point_quantize((reference.weight * factor).detach(), rounded) / factor.detach()
    q.requires_grad_()
    (reference.bn(functional.conv2d(x, q, padding=1)) * direction).sum().backward()
    torch.testing.assert_close(weight, q.grad)  # no weight is at an end code here
    torch.testing.assert_close(layer.bn.weight.grad, reference.bn.weight.grad)


def test_double_forward_is_the_published_rule():
    """Two convolutions; mean and variance of the first, with gradient, are in the rounded weight and the bias of the second."""
    layer, x = layer_with_bn(spec(double_forward=True))
    source, output = layer.input_activation, layer.output_activation
    w, gamma, beta = (t.detach().double().requires_grad_() for t in (layer.weight, layer.bn.weight, layer.bn.bias))
    mean0, var0 = layer.bn.running_mean.double(), layer.bn.running_var.double()
    eta_in, eta_out = eta(source), eta(output).requires_grad_()
    xq = x.double() / eta_in
    y0 = functional.conv2d(eta_in * xq, w, padding=1)
    mean, var = y0.mean((0, 2, 3)), y0.var((0, 2, 3), correction=0)
    sigma = (var + layer.bn.eps).sqrt()
    effective = (gamma / sigma).reshape(-1, 1, 1, 1) * w * eta_in / eta_out
    rounded = FixQuant.apply(effective, published_fraction_length(effective.detach(), True, 40.0), True)
    units = functional.conv2d(xq, rounded, padding=1) + ((beta - gamma * mean / sigma) / eta_out).reshape(-1, 1, 1)
    length = int(output.rounded_fraction_length())
    expected = FixQuant.apply(units, length, False) * eta_out  # what the next layer multiplies by
    direction = torch.randn(expected.shape, dtype=torch.float64)
    (expected * direction).sum().backward()

    got = layer(x)
    (got * direction.float()).sum().backward()
    step = float(output.step())
    assert float((got.double() - expected).abs().max()) < 1.01 * step
    assert float((got.double() - expected).abs().mean()) < 2e-3 * step
    count = y0.numel() / 6
    torch.testing.assert_close(
        layer.bn.running_mean.double(), (0.9 * mean0 + 0.1 * mean).detach(), rtol=1e-5, atol=1e-5
    )
    unbiased = (var * count / (count - 1)).detach()
    torch.testing.assert_close(layer.bn.running_var.double(), 0.9 * var0 + 0.1 * unbiased, rtol=1e-5, atol=1e-5)
    for mine, published in ((layer.weight, w), (layer.bn.weight, gamma), (layer.bn.bias, beta)):
        error = (mine.grad.double() - published.grad).norm() / published.grad.norm()
        assert float(error) < 0.05, float(error)


def test_without_batch_norm_and_residual():
    source, output = qnn.FixedPointActivation(alpha=1.0), qnn.FixedPointActivation(alpha=4.0)
    torch.manual_seed(0)
    layer = qnn.FixedPointConv2d(3, 3, 1, recipe="f8net", input_activation=source, activation=output)
    x = source.rounded_real(torch.rand(2, 3, 5, 5)).detach()
    y = layer(x, x)
    expected = functional.conv2d(x, layer.weight, layer.bias) + x
    torch.testing.assert_close(y, expected.relu(), rtol=0, atol=0.1)
    units = layer.eval()(x / source.eta(), x / output.eta())
    torch.testing.assert_close(units * output.eta(), expected.relu(), rtol=0, atol=0.1)


def test_logits_are_real_values_in_both_modes():
    source = qnn.FixedPointActivation(alpha=2.0)
    torch.manual_seed(0)
    layer = qnn.FixedPointLinear(64, 5, recipe="f8net", input_activation=source)
    with torch.no_grad():
        layer.weight.mul_(1e-3)
    x = source.rounded_real(torch.rand(8, 64) * 2).detach()
    exact = functional.linear(x, layer.weight, layer.bias)
    training = layer(x)
    evaluation = layer.eval()(x / source.eta())
    torch.testing.assert_close(training, evaluation, rtol=0, atol=1e-3)
    torch.testing.assert_close(evaluation, exact, rtol=0, atol=1e-3)
    assert int(layer.weight_fraction_length) == 7


def test_average_pool_keeps_the_mean_in_its_eta():
    source = qnn.FixedPointActivation(alpha=2.0)
    pool = qnn.FixedPointAvgPool2d(source, keepdim=False)
    x = source.rounded_real(torch.rand(16, 8, 7, 7) * 2).detach()
    pool(x)
    assert pool.activation.shift == 6
    ratio = pool.activation.eta() / source.eta()
    torch.testing.assert_close(ratio, torch.tensor([64 / 49]))
    real = pool(x)
    units = pool.eval()(x / source.eta())
    difference = (units * pool.activation.eta() - real).abs()  # a mean in floats falls to one side of a tie
    assert (difference > 1e-6).float().mean() < 0.05 and difference.max() < 2.0**-5
    torch.testing.assert_close(real, x.mean((2, 3)), rtol=0, atol=2.0**-6)
    fixed = qnn.FixedPointAvgPool2d(source, kernel=(4, 4), name="pool")
    with pytest.raises(ValueError, match=r"'pool': expected an image of the pool's size \(4, 4\), got \(7, 7\)"):
        fixed(x)


def test_hysteresis_keeps_a_fraction_length():
    layer, x = layer_with_bn(spec(hysteresis=0.25))
    factor, _ = layer.factor(layer.scale_factor())
    layer.bn.momentum = 0.0
    with torch.no_grad():
        effective = layer.weight * factor
        layer.weight.mul_(40 / 2**6 / effective.std() * 0.99)  # a little below the threshold of 6
        layer.reset_fraction_length()
        assert int(layer.weight_fraction_length) == 6
        layer.weight.mul_(1.08)
        layer(x)
        assert int(layer.weight_fraction_length) == 6
        layer.weight.mul_(1.2)
        layer(x)
        assert int(layer.weight_fraction_length) == 5


def test_zero_batch_norm_weight_trains():
    layer, x = layer_with_bn("f8net")
    with torch.no_grad():
        layer.bn.weight[2] = 0
    layer(x).sum().backward()
    assert torch.isfinite(layer.weight.grad).all() and torch.isfinite(layer.bn.weight.grad).all()
    assert torch.isfinite(layer.eval()(x / layer.input_activation.eta())).all()


def test_large_accumulators_are_exact():
    """Sums beyond 2^24 are not exact in float32: evaluation goes to float64 by itself."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(640, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    x = torch.rand(2, 640, 6, 6)
    prepared_model = qnn.calibrate(qnn.prepare(model, "f8net"), [x])
    with torch.no_grad():
        prepared_model.get_submodule("0").weight.sign_()
    assert float(prepared_model.get_submodule("0").eval().folded().bound.max()) > 2**24
    assert_integer_exact(prepared_model, x)


def test_training_forward_waits_for_nothing():
    """No value decides Python's control flow: the training step runs on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, images = prepared(ResNet)
    model.train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss = model(torch.randn(2, 3, 16, 16)).sum()
        assert loss.shape == ()


@pytest.mark.parametrize("recipe", ["f8net", "f8net-tiny"])
def test_training_lowers_the_loss(recipe):
    model, images = prepared(ResNet, recipe)
    losses = train_steps(model, images, steps=12, rate=0.05)
    assert losses[-1] < 0.7 * losses[0]
    for parameter in model.parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()


def test_double_forward_trains_a_network():
    model, images = prepared(ResNet, spec(double_forward=True))
    losses = train_steps(model, images, steps=12, rate=0.05)
    assert losses[-1] < 0.7 * losses[0]


def test_enable_observer_leaves_it_alone():
    model, images = prepared(ResNet)
    before = copy.deepcopy(model.state_dict())
    qnn.enable_observer(model, False)
    qnn.enable_fake_quant(model, True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_calibration_that_fails_changes_nothing():
    model, images = trained(ResNet)
    model = qnn.prepare(model, "f8net")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError):
        qnn.calibrate(model, [images, torch.full_like(images, float("nan"))])
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if not name.endswith(".size"))
    with pytest.raises(ValueError, match="at least one batch"):
        qnn.calibrate(model, [])


def test_recipe_without_fixed_point():
    with pytest.raises(ValueError, match="FixedPointConv2d: expected a recipe with fixed_point, got 'qat-w8a8'"):
        qnn.FixedPointConv2d(3, 4, 3, recipe="qat-w8a8", input_activation=qnn.FixedPointActivation())
    with pytest.raises(ValueError, match="expected groups of 1 or a depthwise"):
        qnn.FixedPointConv2d(4, 8, 3, groups=2, recipe="f8net", input_activation=qnn.FixedPointActivation())
    with pytest.raises(ValueError, match="expected method 'std' or 'mse'"):
        qnn.FixedPointActivation(method="rms")
