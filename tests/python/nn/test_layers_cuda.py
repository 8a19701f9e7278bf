"""The quantized layers on a GPU: converted equals fake-quantized there too, and the codes are those of the CPU."""

import copy
import math

import pytest
import torch
from samples.layers import BUILDERS, RECIPES, calibrated, conv_bn, linear

import quantrain
import quantrain.nn as qnn

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_converted_equals_fake_quantized(build, recipe):
    layer, x = calibrated(build, recipe, device="cuda")
    layer.eval()
    with torch.backends.cudnn.flags(deterministic=True):  # a transposed convolution may add in any order
        expected = layer(x)
        converted = qnn.convert(layer)
        assert expected.is_cuda and torch.equal(converted(x), expected)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_codes_and_scales_are_those_of_the_cpu(build, recipe):
    converted = {}
    for device in ("cpu", "cuda"):
        layer, _ = calibrated(build, recipe)
        folded = isinstance(layer, qnn.QuantConvBn2d)
        converted[device] = qnn.convert(layer.to(device)).cpu().state_dict()
    for name, value in converted["cpu"].items():
        if not folded:
            assert torch.equal(converted["cuda"][name], value), name
        elif value.is_floating_point():  # a folded weight goes through the device's own square root and division
            torch.testing.assert_close(converted["cuda"][name], value)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_under_autocast(recipe, dtype):
    layer, x = calibrated(conv_bn, recipe, device="cuda")
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for _ in range(3):
        with torch.autocast("cuda", dtype):
            loss = layer(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    assert all(t.dtype == torch.float32 for name, t in layer.state_dict().items() if name.endswith("scale"))


def test_a_nan_batch_raises_and_leaves_the_range():
    layer, x = calibrated(linear, "qat-w8a8", device="cuda")
    before = copy.deepcopy(layer.state_dict())
    bad = x.clone()
    bad[0, 0] = math.nan
    with pytest.raises(ValueError, match="expected a finite batch, got 1 NaN"):
        qnn.calibrate(layer, [bad])
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_a_range_that_follows_training_turns_inf_into_nan_and_stays():
    layer, x = calibrated(linear, "qat-w8a8", device="cuda")
    before = copy.deepcopy(layer.state_dict())
    bad = x.clone()
    bad[0, 0] = math.inf
    assert layer(bad).isnan().all()  # without waiting for a check; a loss scaler skips the step
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    assert layer(x).isfinite().all()
    qnn.enable_observer(layer, False)
    assert layer(bad).isfinite().all()  # a frozen range saturates


@pytest.mark.parametrize("recipe", RECIPES)
def test_linear_compiles_without_a_graph_break(recipe):
    torch._dynamo.reset()
    layer, x = calibrated(linear, recipe, device="cuda")
    expected = layer(x)
    assert torch.equal(torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")(x), expected)


def test_eval_forward_is_captured_in_a_cuda_graph():
    layer, x = calibrated(linear, "qat-w8a8", device="cuda")
    layer.eval()
    with torch.no_grad():
        layer(x)  # warm up: cuBLAS handles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, layer(x))


def test_checkpoint_and_reports(tmp_path):
    pytest.importorskip("safetensors")
    layer, x = calibrated(conv_bn, "qat-w4a4", device="cuda")
    quantrain.save_checkpoint(tmp_path / "a.safetensors", layer)
    twin, _ = conv_bn("qat-w4a4")
    quantrain.load_checkpoint(tmp_path / "a.safetensors", twin.cuda())
    assert torch.equal(twin.eval()(x), layer.eval()(x))
    assert quantrain.quantization_error(layer, x).rows[0]["weight_sqnr_db"] > 10
