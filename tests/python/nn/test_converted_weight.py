"""The weight of a converted layer reads as the float tensor that it stands for; its codes have another name, in old files too."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from samples.layers import BUILDERS, calibrated, make_recipe
from torch import nn

import quantrain.nn as qnn
from quantrain.nn.quantized import quantized_layer

TORCH_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("bits, symmetric", [(8, True), (8, False), (4, True), (3, False)])
def test_weight_reads_as_the_rounded_float_weight(build, bits, symmetric):
    layer, _ = calibrated(build, make_recipe(bits, symmetric=symmetric))
    layer.eval()
    with torch.no_grad():
        expected = layer.rows(layer.quantized_weight())  # rows() is its own inverse, where it is not the identity
    converted = qnn.convert(copy.deepcopy(layer))
    assert converted.weight.shape == layer.weight.shape and converted.weight.dtype == torch.float32
    assert torch.equal(converted.weight, expected)
    assert not converted.weight.requires_grad
    assert converted.weight_codes.dtype in (torch.int8, torch.uint8)
    names = {name for name, _ in converted.named_buffers()} | {name for name, _ in converted.named_parameters()}
    assert "weight" not in names and "weight_codes" in names and "weight" not in converted.state_dict()


@pytest.mark.parametrize("dtype", TORCH_TYPES)
def test_the_type_of_weight_is_the_float_layers_and_follows_to(dtype):
    model = qnn.prepare(nn.Sequential(nn.Linear(8, 4), nn.Embedding(5, 8)).to(dtype), "qat-w8a8-token")
    qnn.convert(model)
    assert model[0].weight.dtype == model[1].weight.dtype == dtype
    assert model[1](torch.tensor([1])).dtype == dtype
    for other in TORCH_TYPES:
        model.to(other)
        assert model[0].weight.dtype == model[1].weight.dtype == other
        assert model[0].weight_codes.dtype == torch.int8 and model[0].weight_scale.dtype == torch.float32
    assert copy.deepcopy(model)[0].weight.dtype == torch.bfloat16


class CastsItsInput(nn.Module):
    """As the patch embeddings of transformers' ViT, CLIP and SigLIP do, and T5 before its second product."""

    def __init__(self):
        super().__init__()
        self.projection, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 8)
        self.embed = nn.Embedding(6, 8)

    def forward(self, x):
        x = self.projection(x.to(self.projection.weight.dtype)).mean((2, 3))
        x = self.head(x.to(self.head.weight.dtype))
        return F.linear(x, self.embed.weight)  # a tied head


@pytest.mark.parametrize("recipe", ["ptq-w8a8", "ptq-w4a8", "qat-w8a8-token"])
def test_models_that_read_the_weight_of_a_layer_compute_with_floats(recipe):
    torch.manual_seed(0)
    model, x = CastsItsInput(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    exact = model(x)
    qnn.calibrate(qnn.prepare(model, recipe, skip=["embed"]), [x])
    model.embed = quantized_layer(qnn.QuantEmbedding.from_float(model.embed, "qat-w8a8-token"))
    result = qnn.convert(model)(x)
    assert (result - exact).norm() < 0.3 * exact.norm()


def old_names(state):
    return {name.replace("weight_codes", "weight"): value for name, value in state.items()}


@pytest.mark.parametrize("recipe", ["ptq-w8a8", "ptq-w4a8", "qat-w8a8-token"])
def test_files_whose_codes_are_called_weight_load(recipe, tmp_path):
    def skeleton():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 9, 5))
        return qnn.prepare(model, recipe)

    x = torch.randn(2, 3, 5, 5)
    model = qnn.convert(qnn.calibrate(skeleton(), [x]) if recipe.startswith("ptq") else skeleton())
    expected, state = model(x), model.state_dict()
    other = qnn.convert(skeleton(), check_observed=False)
    before = old_names(state)
    assert other.load_state_dict(before) == ([], []) and torch.equal(other(x), expected)
    assert before.keys() == old_names(state).keys()  # the caller's dict stays as it is
    alone = qnn.convert(skeleton(), check_observed=False)[2]
    alone.load_state_dict({k[2:]: v for k, v in before.items() if k.startswith("2.")})
    assert torch.equal(alone.weight_codes, model[2].weight_codes)

    from safetensors import safe_open
    from safetensors.torch import save_file

    qnn.save_checkpoint(tmp_path / "new", model)
    with safe_open(tmp_path / "new", "pt") as file:
        save_file(old_names({k: file.get_tensor(k) for k in file.keys()}), tmp_path / "old", metadata=file.metadata())  # noqa: SIM118
    other = qnn.convert(skeleton(), check_observed=False)
    qnn.load_checkpoint(tmp_path / "old", other)
    assert torch.equal(other(x), expected)

    pickled = copy.deepcopy(model)
    for layer in (pickled[0], pickled[2]):  # as a module pickled before
        layer._buffers["weight"] = layer._buffers.pop("weight_codes")
        del layer.__dict__["weight_dtype"]
    assert torch.equal(pickle.loads(pickle.dumps(pickled))(x), expected)
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)


def test_a_float_layer_misses_its_weight_in_a_converted_file_and_the_other_way_round():
    layer = nn.Linear(8, 4)
    converted = qnn.convert(qnn.prepare(nn.Sequential(copy.deepcopy(layer)), "qat-w8a8-token"))
    found = layer.load_state_dict(converted[0].state_dict(), strict=False)
    assert found.missing_keys == ["weight"] and "weight_codes" in found.unexpected_keys
    found = converted[0].load_state_dict(layer.state_dict(), strict=False)
    assert "weight_codes" in found.missing_keys and found.unexpected_keys == ["weight"]


def test_a_prepared_layer_reads_its_float_parameter():
    layer = nn.Linear(8, 4)
    model = qnn.prepare(nn.Sequential(layer), "qat-w4a8")
    assert model[0].weight is layer.weight and isinstance(model[0].weight, nn.Parameter)


def test_reading_weight_is_traced_by_compile_and_export():
    model = qnn.convert(qnn.prepare(nn.Sequential(nn.Linear(8, 4)), "qat-w4a8", overrides={"*": {"input": None}}))

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = model[0]

        def forward(self, x):
            return F.linear(x.to(self.fc.weight.dtype), self.fc.weight) + self.fc(x)

    module, x = Reads(), torch.randn(3, 8)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), module(x))
    assert torch.equal(torch.export.export(module, (x,)).module()(x), module(x))
