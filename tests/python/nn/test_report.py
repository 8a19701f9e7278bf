"""model_size against bytes counted on disk and by hand; quantization_error against the formula on the same tensors."""

import math

import pytest
import torch
from samples.layers import RECIPES
from torch import nn

import quantrain
import quantrain.nn as qnn
from quantrain import QuantSpec, Recipe


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)
    )


def prepared(recipe):
    model = quantrain.prepare(network(), recipe)
    return qnn.calibrate(model, [torch.randn(16, 3, 4, 4) for _ in range(2)])


def sqnr(exact, rounded):
    return 10 * math.log10(exact.double().square().sum() / (exact.double() - rounded.double()).square().sum())


def test_size_of_a_float_model():
    size = quantrain.model_size(network())
    rows = {row["layer"]: row for row in size.rows}
    assert list(rows) == ["0", "1", "4"]
    assert (rows["0"]["elements"], rows["0"]["bytes"], rows["0"]["bits"]) == (8 * 27 + 8, 4 * 224, 32)
    assert (rows["1"]["elements"], rows["1"]["bytes"]) == (33, 4 * 32 + 8)  # num_batches_tracked is int64
    assert size.total["bytes"] == sum(row["bytes"] for row in size.rows) == 4 * (224 + 32 + 645) + 8
    assert quantrain.model_size(network().bfloat16()).rows[0]["bits"] == 16


@pytest.mark.parametrize("recipe", RECIPES)
def test_converted_bytes_predict_the_converted_model(recipe):
    model = prepared(recipe)
    predicted = quantrain.model_size(model)
    size = quantrain.model_size(quantrain.convert(model))
    assert [row["converted_bytes"] for row in predicted.rows] == [row["bytes"] for row in size.rows]
    held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert size.total["bytes"] == size.total["converted_bytes"] == held
    assert [row["bits"] for row in predicted.rows] == [row["bits"] for row in size.rows]


def test_codes_of_four_bits_take_half_a_byte():
    model = prepared("qat-w4a8")
    row = quantrain.model_size(quantrain.convert(model)).rows[-1]
    codes, scales, bias, input_range = 5 * 128 // 2, 5 * 4 * 4, 5 * 4, 4 + 4
    assert row["bytes"] == codes + scales + bias + input_range
    assert row["elements"] == 5 * 128 + 5


def test_tied_weights_count_once():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    assert quantrain.model_size(model).total["elements"] == 28
    quantrain.prepare(model, "qat-w8a8-token")
    assert quantrain.model_size(model).total["elements"] == 28


def test_error_rows_follow_the_formula():
    torch.manual_seed(1)
    model, x = prepared("qat-w4a8").eval(), 2 * torch.randn(32, 3, 4, 4)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    conv, fc = quantrain.quantization_error(model, x).rows
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        layer = model[0]
        weight, fq = layer.weight_to_quantize(), layer.input_fake_quant
        assert conv["weight_sqnr_db"] == pytest.approx(sqnr(weight, layer.weight_fake_quant(weight)))
        assert conv["input_sqnr_db"] == pytest.approx(sqnr(x, fq(x)))
        low, high = -fq.zero_point * fq.scale, (255 - fq.zero_point) * fq.scale
        outside = ((x < low - fq.scale / 2) | (x > high + fq.scale / 2)).float().mean().item()
        assert outside > 0 and conv["input_saturation_pct"] == pytest.approx(100 * outside, rel=0.02)
        qnn.enable_fake_quant(model, False)
        float_conv, float_fc = model[0](x), model(x)
        qnn.enable_fake_quant(model, True)
        assert conv["output_sqnr_db"] == pytest.approx(sqnr(float_conv, model[0](x)), rel=1e-5)
        assert fc["output_sqnr_db"] == pytest.approx(sqnr(float_fc, model(x)), rel=1e-5)
    assert (conv["layer"], conv["type"], conv["weight_bits"], conv["input_bits"]) == ("0", "QuantConvBn2d", 4, 8)
    assert conv["weight_saturation_pct"] == 0  # min-max scale


def test_more_bits_more_sqnr_and_learned_scales_saturate():
    x, rows = torch.randn(32, 3, 4, 4), {}
    for bits in (3, 4, 8):
        recipe = Recipe(weight=QuantSpec(bits=bits, granularity="per_channel", observer="dynamic"))
        rows[bits] = quantrain.quantization_error(quantrain.prepare(network(), recipe), x).rows[1]
    assert rows[3]["weight_sqnr_db"] + 4 < rows[4]["weight_sqnr_db"] < rows[8]["weight_sqnr_db"] - 20
    assert rows[8]["input_sqnr_db"] is None and rows[8]["output_sqnr_db"] > rows[3]["output_sqnr_db"]
    model = prepared("qat-w4a4")
    with torch.no_grad():
        model[0].weight_fake_quant.scale.mul_(0.2)
    assert quantrain.quantization_error(model, x).rows[0]["weight_saturation_pct"] > 10


def test_modes_and_switches_are_left_as_they_were():
    model, x = prepared("qat-w8a8").train(), torch.randn(2, 3, 4, 4)
    model[0].bn.eval()
    model[4].input_fake_quant.enable_fake_quant(False)
    quantrain.quantization_error(model, x)
    assert model.training and not model[0].bn.training
    assert not model[4].input_fake_quant.fake_quant_enabled and model[0].input_fake_quant.fake_quant_enabled
    assert not model[0]._forward_hooks and not model[0].input_fake_quant._forward_hooks

    def broken(model, batch):
        raise RuntimeError("broken batch")

    with pytest.raises(RuntimeError, match="broken batch"):
        quantrain.quantization_error(model, x, forward=broken)
    assert model.training and not model[0]._forward_hooks and model[0].input_fake_quant.fake_quant_enabled


def test_a_layer_called_twice_and_an_embedding():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(9, 8), nn.Linear(8, 8)

        def forward(self, index):
            return self.fc(self.fc(self.embed(index)))

    model = quantrain.prepare(Twice(), "qat-w8a8-token")
    embed, fc = quantrain.quantization_error(model, torch.arange(9)).rows
    assert embed["input_bits"] is None and embed["output_sqnr_db"] > 30
    assert fc["input_sqnr_db"] > 30 and fc["input_saturation_pct"] == 0
    assert fc["output_sqnr_db"] > 30  # each call against its own float output


def test_a_converted_model_reports_its_inputs():
    model = quantrain.convert(prepared("qat-w4a8"))
    row = quantrain.quantization_error(model, torch.randn(4, 3, 4, 4)).rows[0]
    assert row["input_sqnr_db"] > 20 and row["weight_bits"] == 4
    assert row["weight_sqnr_db"] is None and row["output_sqnr_db"] is None


def test_tables_print():
    model = prepared("qat-w8a8")
    text = str(quantrain.quantization_error(model, torch.randn(4, 3, 4, 4)))
    header, *lines = text.splitlines()
    assert "output SQNR dB" in header and len(lines) == 2 and "QuantConvBn2d" in lines[0]
    size = str(quantrain.model_size(model))
    assert "converted" in size.splitlines()[0] and "in float32" in size.splitlines()[-1]
    table = qnn.Table({"a": "name", "b": "n"}, [{"a": "x", "b": 12345}, {"a": None, "b": float("inf")}], title="t")
    assert str(table) == "t\nname       n\nx     12,345\n-        inf"


def test_models_without_quantized_layers_raise():
    with pytest.raises(ValueError, match="prepared or converted model"):
        quantrain.quantization_error(network(), torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match="observed or loaded"):
        quantrain.quantization_error(quantrain.prepare(network(), "qat-w8a8"), torch.randn(1, 3, 4, 4))
