"""The quantized layers against their formulas, and converted against fake-quantized: equal bit for bit."""

import copy
import io
import os
import pickle
import tempfile

import pytest
import torch
import torch.nn.functional as F
from samples.layers import BUILDERS, RECIPES, calibrated, conv, conv_bn, depthwise_conv, embedding, linear, make_recipe
from torch import nn

import quantrain.nn as qnn
from quantrain import QuantSpec, Recipe


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_converted_equals_fake_quantized_for_every_named_recipe(build, recipe):
    layer, x = calibrated(build, recipe)
    layer.eval()
    expected = layer(x)
    before = copy.deepcopy(layer.state_dict())
    converted = qnn.convert(layer)
    assert torch.equal(converted(x), expected)
    assert not list(converted.parameters())
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("observer, learnable", [("dynamic", False), ("min_max", False), ("mse", True)])
def test_converted_equals_fake_quantized_for_every_weight_spec(
    build, bits, granularity, symmetric, observer, learnable
):
    recipe = make_recipe(bits, granularity, symmetric, observer, learnable, output=QuantSpec(observer="min_max"))
    layer, x = calibrated(build, recipe)
    layer.eval()
    converted = qnn.convert(layer, inplace=False)
    assert torch.equal(converted(x), layer(x))
    assert converted.weight_codes.dtype == (torch.int8 if bits > 4 and symmetric else torch.uint8)
    assert (converted.weight_zero_point is None) == symmetric
    rows = layer.rows(layer.weight)
    if bits <= 4:
        assert converted.weight_codes.shape == (rows.shape[0], (rows[0].numel() + 1) // 2)
    low, high = layer.weight_fake_quant.quant_min, layer.weight_fake_quant.quant_max
    assert converted.codes().shape == rows.shape
    assert low <= converted.codes().min() and converted.codes().max() <= high


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_converted_equals_fake_quantized_in_half_precision(build, dtype):
    layer, x = calibrated(build, make_recipe(4))
    layer, x = layer.to(dtype).eval(), x if x.dtype in (torch.int32, torch.int64) else x.to(dtype)
    expected = layer(x)
    assert expected.dtype == dtype
    assert torch.equal(qnn.convert(layer)(x), expected)


def test_convert_follows_a_later_cast():
    layer, index = calibrated(embedding, make_recipe(4))
    converted = qnn.convert(layer.eval()).to(torch.bfloat16)
    assert converted.weight_scale.dtype == torch.float32
    assert torch.equal(converted(index), layer(index).bfloat16())


def test_linear_formula():
    layer, x = calibrated(linear, "qat-w8a8")
    scale, zero_point = layer.input_fake_quant.calculate_qparams()
    xq = torch.fake_quantize_per_tensor_affine(x, scale[0], zero_point[0], 0, 255)
    ws = layer.weight.detach().abs().amax(1) / 127
    wq = torch.fake_quantize_per_channel_affine(layer.weight, ws, torch.zeros(5, dtype=torch.int32), 0, -128, 127)
    assert torch.equal(layer(x), F.linear(xq, wq, layer.bias))


@pytest.mark.parametrize("build, kwargs", [(conv, {"stride": 2, "padding": 1}), (depthwise_conv, {"groups": 4})])
def test_conv_formula(build, kwargs):
    layer, x = calibrated(build, "qat-w8a8-token")
    lo, hi = x.amin((1, 2, 3), keepdim=True).clamp(max=0), x.amax((1, 2, 3), keepdim=True).clamp(min=0)
    scale = (hi - lo) / 255
    zero = (-torch.round(lo / scale)).clamp(0, 255)
    xq = ((torch.round(x * (1 / scale)) + zero).clamp(0, 255) - zero) * scale
    ws = layer.weight.detach().abs().amax((1, 2, 3)) / 127
    zeros = torch.zeros(len(ws), dtype=torch.int32)
    wq = torch.fake_quantize_per_channel_affine(layer.weight, ws, zeros, 0, -128, 127)
    assert torch.equal(layer(x), F.conv2d(xq, wq, layer.bias, **kwargs))


@pytest.mark.parametrize("bias", [False, True])
def test_conv_bn_training_formula(bias):
    torch.manual_seed(3)
    layer, x = conv_bn(make_recipe(4, input=None), bias)
    reference = copy.deepcopy(layer)
    sf = reference.bn.weight / torch.sqrt(reference.bn.running_var + reference.bn.eps)
    w = reference.weight * sf.view(-1, 1, 1, 1)
    scale = w.detach().abs().amax((1, 2, 3)) / 7
    wq = torch.fake_quantize_per_channel_affine(w, scale, torch.zeros(6, dtype=torch.int32), 0, -8, 7)
    y = F.conv2d(x, wq, None, padding=1) / sf.view(-1, 1, 1)
    if bias:
        y = y + reference.bias.view(-1, 1, 1)
    expected = reference.bn(y)
    got = layer(x)
    torch.testing.assert_close(got, expected)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(layer.bn, name), getattr(reference.bn, name))
    got.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(dict(layer.named_parameters())[name].grad, parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_conv_bn_without_rounding_is_conv_then_bn(bias):
    torch.manual_seed(4)
    layer, x = conv_bn(make_recipe(8), bias)
    qnn.calibrate(layer, [x])
    qnn.enable_fake_quant(layer, False)
    plain = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=bias), copy.deepcopy(layer.bn))
    plain[0].weight, plain[0].bias = copy.deepcopy(layer.weight), copy.deepcopy(layer.bias)
    for mode in (True, False):
        torch.testing.assert_close(layer.train(mode)(x), plain.train(mode)(x), rtol=1e-4, atol=1e-4)


def test_conv_bn_with_a_zero_gamma_stays_finite():
    layer, x = conv_bn("qat-w8a8")
    with torch.no_grad():
        layer.bn.weight.zero_()
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all() and layer.bn.weight.grad.isfinite().all()
    assert torch.equal(y, layer.bn.bias.view(-1, 1, 1).expand_as(y))
    layer.eval()
    torch.testing.assert_close(layer(x), layer.bn.bias.view(-1, 1, 1).expand_as(y))
    expected = layer(x)
    layer.train().bn.eval()  # converting reads the layer as in evaluation and leaves its modes
    assert torch.equal(qnn.QuantizedConv2d.from_quant(layer)(x), expected)
    assert layer.training and not layer.bn.training


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("observer, learnable", [("dynamic", False), ("min_max", False), ("mse", True)])
def test_embedding_rows_equal_the_quantized_table(granularity, observer, learnable):
    layer, index = calibrated(embedding, make_recipe(4, granularity, True, observer, learnable))
    table = layer.weight_fake_quant(layer.weight)
    rows = layer(index)
    assert torch.equal(rows, table[index])
    rows.sum().backward()
    used = torch.zeros(11).index_add_(0, index.flatten(), torch.ones(15))
    used[2] = 0  # padding_idx has no gradient
    if not learnable:
        torch.testing.assert_close(layer.weight.grad, used[:, None].expand(11, 8))
    else:
        assert layer.weight_fake_quant.scale.grad.isfinite().all()


def test_weights_and_inputs_get_gradients_and_learned_scales_too():
    layer, x = calibrated(linear, "qat-w4a4")
    layer(x.requires_grad_()).square().sum().backward()
    for tensor in (x, layer.weight, layer.bias, layer.weight_fake_quant.scale, layer.input_fake_quant.scale):
        assert tensor.grad.isfinite().all() and tensor.grad.abs().sum() > 0


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_deepcopy_pickle_torch_save_and_state_dict_round_trips(build, recipe):
    layer, x = calibrated(build, recipe)
    layer.eval()
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    fresh = build(recipe)[0].eval()
    fresh.load_state_dict(layer.state_dict())
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False), fresh]
    for twin in twins:
        assert torch.equal(twin(x), expected)
        assert twin.recipe == layer.recipe
    converted = qnn.convert(layer)
    for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_autocast_bfloat16(build, recipe):
    torch.manual_seed(5)
    layer, x = build(recipe)
    with torch.autocast("cpu", torch.bfloat16):
        qnn.calibrate(layer, [x])
        y = layer(x)
        loss = y.float().square().mean()
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.isfinite().all()
    assert all(t.dtype == torch.float32 for name, t in layer.state_dict().items() if name.endswith("scale"))
    layer.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(qnn.convert(layer, inplace=False)(x), layer(x))
    torch.testing.assert_close(layer(x), y.float(), rtol=0.5, atol=0.5 + 2 * isinstance(layer, qnn.QuantConvBn2d))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layer_called_twice_in_a_graph_backpropagates(recipe):
    torch.manual_seed(6)
    layer = qnn.QuantLinear(8, 8, recipe=recipe)
    x = torch.randn(4, 8)
    layer(layer(x)).sum().backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("training", [True, False])
def test_linear_compiles_without_a_graph_break(recipe, training):
    torch._dynamo.reset()
    layer, x = calibrated(linear, recipe)
    layer.train(training)
    qnn.enable_observer(layer, not layer.weight_fake_quant.learnable)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (6, 9, 12):  # the batch size becomes dynamic on the way
        x = torch.randn(rows, 8)
        y, expected = compiled(x), eager(x)
        assert torch.equal(y, expected)
        for output in (y, expected):
            torch.manual_seed(rows)  # quantized gradients: the same draws for both
            output.square().sum().backward()
    for got, want in zip(layer.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)
    for name, value in eager.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name


def test_converted_layers_compile_without_a_graph_break():
    for build in (linear, conv, embedding):
        torch._dynamo.reset()
        layer, x = calibrated(build, make_recipe(4))
        converted = qnn.convert(layer.eval())
        assert torch.equal(torch.compile(converted, fullgraph=True, backend="aot_eager")(x), converted(x))


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w4a4"])
def test_prepared_and_converted_layers_export(build, recipe):
    layer, x = calibrated(build, recipe)
    layer.eval()
    expected = layer(x)
    for module in (layer, qnn.convert(layer, inplace=False)):
        assert torch.equal(torch.export.export(module, (x,)).module()(x), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_converted_equals_fake_quantized_in_channels_last(bits):
    layer, x = calibrated(conv_bn, make_recipe(bits))
    layer.eval().to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(qnn.convert(layer, inplace=False)(x), layer(x))


def test_distributed_data_parallel():
    dist = torch.distributed
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{os.path.join(folder, 'store')}", rank=0, world_size=1)
        try:
            layer, x = calibrated(conv_bn, "qat-w4a4")
            alone = copy.deepcopy(layer)
            parallel = nn.parallel.DistributedDataParallel(layer)
            parallel(x).square().sum().backward()
            alone(x).square().sum().backward()
            for got, want in zip(layer.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(got.grad, want.grad)
        finally:
            dist.destroy_process_group()


def test_a_nan_weight_is_not_swallowed():
    layer, x = calibrated(linear, "qat-w8a8-token")
    with torch.no_grad():
        layer.weight[1, 0] = float("nan")
    y = layer(x)
    assert y[:, 1].isnan().all() and y[:, 0].isfinite().all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: qnn.QuantLinear(4, 2, recipe="qat-w9"), "name to be one of .*qat-w8a8"),
        (lambda: qnn.QuantLinear(4, 2, recipe=make_recipe(granularity="per_token")), "granularity"),
        (lambda: qnn.QuantLinear(4, 2, recipe=Recipe(input=QuantSpec(granularity="per_channel"))), "granularity"),
        (lambda: qnn.convert(qnn.QuantLinear(4, 2, recipe=make_recipe(bits=12))), "at most 8 bits, got 12"),
        (lambda: qnn.convert(qnn.QuantLinear(4, 2, recipe=Recipe(input=QuantSpec()))), "weight spec, got none"),
        (lambda: qnn.convert(qnn.QuantLinear(4, 2, recipe="qat-w8a8")), "observed ranges at 'input_fake_quant'"),
        (lambda: qnn.convert(nn.Linear(4, 2)), "prepared model"),
    ],
)
def test_bad_input_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_pact_forward_and_the_papers_gradient():
    x = torch.tensor([-2.0, 0.0, 0.4, 1.4, 1.5, 7.0, float("inf")], requires_grad=True)
    alpha = torch.tensor([1.5], requires_grad=True)
    y = qnn.pact(x, alpha, bits=2)
    assert torch.equal(y, torch.tensor([0.0, 0.0, 0.5, 1.5, 1.5, 1.5, 1.5]))
    y.sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 0, 0, 0]
    assert alpha.grad.tolist() == [3]  # one for each x >= alpha
    assert qnn.pact(torch.tensor([float("nan")]), alpha.detach()).isnan().all()


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pact_module_matches_its_formula_and_trains(bits, dtype):
    torch.manual_seed(7)
    layer, x = qnn.PACT(bits, alpha=2.0).to(dtype), (3 * torch.randn(200)).to(dtype)
    assert layer.alpha.dtype == torch.float32
    step = 2.0 / (2**bits - 1)
    expected = torch.round(x.double().clamp(0, 2) / step) * step
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-6)
    layer(x).float().sum().backward()
    assert layer.alpha.grad.item() == (x >= 2).sum().item()
    with torch.no_grad():
        layer.alpha.fill_(-1.0)
    assert layer(x).isfinite().all() and layer.alpha.item() > 0
    for bad in (lambda: qnn.PACT(0), lambda: qnn.PACT(alpha=-1.0), lambda: qnn.pact(x, layer.alpha, bits=17)):
        with pytest.raises(ValueError, match="expected"):
            bad()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_per_token(bits, symmetric):
    torch.manual_seed(8)
    x = torch.randn(2, 3, 16, requires_grad=True)
    y = qnn.fake_quantize_per_token(x, bits=bits, symmetric=symmetric)
    codes, scale, zero_point = qnn.quantize_per_token(x.detach(), bits=bits, symmetric=symmetric)
    assert scale.shape == (2, 3, 1) and codes.dtype == (torch.int8 if symmetric else torch.uint8)
    assert torch.equal((codes.float() - zero_point) * scale, y.detach())
    assert ((y - x).abs() <= scale * 0.5001).all()
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))
    with pytest.raises(ValueError, match="expected bits"):
        qnn.quantize_per_token(x, bits=9)


def test_rows_of_a_table_train_its_learned_scales_as_the_table_does():
    torch.manual_seed(0)
    layer = qnn.QuantEmbedding(50, 16, recipe="qat-w4a4")
    index = torch.randint(0, 50, (4, 8))
    layer(index)
    layer.zero_grad()
    layer(index).backward(grad := torch.randn(4, 8, 16))
    found, quantizer = layer.weight_fake_quant.scale.grad.clone(), layer.weight_fake_quant
    layer.zero_grad()
    F.embedding(index, quantizer(layer.weight)).backward(grad)
    torch.testing.assert_close(found, quantizer.scale.grad)
