"""Checkpoints: what is written comes back, and a bad file raises, names itself and changes nothing."""

import copy
import json
import os

import pytest
import torch
from samples.layers import RECIPES
from torch import nn

import quantrain
import quantrain.nn as qnn
from quantrain import Recipe

safetensors = pytest.importorskip("safetensors.torch")


def network(width=6):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(4 * width, 3)
    )


def images():
    return torch.randn(4, 1, 4, 4)


def prepared(recipe, seed=0):
    torch.manual_seed(seed)
    model = quantrain.prepare(network(), recipe)
    return qnn.calibrate(model, [images()]).eval()


def rewritten(source, path, *, metadata=None, tensors=None):
    """A copy of a checkpoint with changed metadata or tensors (a None value removes)."""
    with safetensors.safe_open(source, framework="pt") as file:
        header, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = {k: v for k, v in {**header, **(metadata or {})}.items() if v is not None}
    state = {k: v for k, v in {**state, **(tensors or {})}.items() if v is not None}
    safetensors.save_file(state, path, metadata=header)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    quantrain.save_checkpoint(path, prepared("qat-w8a8"))
    return path


@pytest.mark.parametrize("recipe", RECIPES)
def test_prepared_and_converted_models_come_back(recipe, tmp_path):
    model, x = prepared(recipe), images()
    expected = model(x)
    quantrain.save_checkpoint(tmp_path / "prepared.safetensors", model)
    fresh = quantrain.prepare(network(), recipe).eval()
    metadata = quantrain.load_checkpoint(tmp_path / "prepared.safetensors", fresh)
    assert torch.equal(fresh(x), expected)
    assert Recipe.from_json(metadata["recipe"]) == Recipe.from_name(recipe)
    assert (metadata["format"], metadata["version"], metadata["converted"]) == ("quantrain", "1", "false")

    quantrain.save_checkpoint(tmp_path / "converted.safetensors", quantrain.convert(model))
    skeleton = quantrain.convert(quantrain.prepare(network(), recipe), check_observed=False)
    metadata = quantrain.load_checkpoint(tmp_path / "converted.safetensors", skeleton)
    assert torch.equal(skeleton(x), expected)
    assert metadata["converted"] == "true"
    bits = model[0].bits
    assert json.loads(metadata["layers"])["0"] == {"bits": bits, "shape": [6, 1, 3, 3]}


def test_a_skeleton_that_was_not_loaded_refuses_to_run():
    for recipe in ("qat-w8a8", "ptq-w4a8"):
        skeleton = quantrain.convert(quantrain.prepare(network(), recipe), check_observed=False)
        with pytest.raises(ValueError):
            skeleton(images())


def test_a_float_model_and_the_recipe_argument(tmp_path):
    path, model = tmp_path / "float.safetensors", network()
    quantrain.save_checkpoint(path, model)
    fresh = network()
    assert quantrain.load_checkpoint(path, fresh)["recipe"] == ""
    assert all(torch.equal(fresh.state_dict()[key], value) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="expected no recipe for a float model"):
        quantrain.save_checkpoint(path, model, "qat-w4a4")
    model, fresh = prepared("qat-w4a4"), quantrain.prepare(network(), "qat-w4a4")
    quantrain.save_checkpoint(path, model, "qat-w4a4")
    assert Recipe.from_json(quantrain.load_checkpoint(path, fresh)["recipe"]).name == "qat-w4a4"


def test_the_file_is_plain_safetensors_with_the_state_dict_names(checkpoint):
    state = safetensors.load_file(checkpoint)
    model = prepared("qat-w8a8")
    assert set(state) == set(model.state_dict())
    assert "0.bn.running_mean" in state and "4.input_fake_quant.observer.max_val" in state
    assert not [name for name in os.listdir(checkpoint.parent) if name.endswith(".tmp")]


def test_tied_tensors_and_odd_strides(tmp_path):
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    model["strided"] = nn.Linear(3, 3, bias=False)
    model["strided"].weight = nn.Parameter(torch.randn(3, 3).t())
    path = tmp_path / "tied.safetensors"
    quantrain.save_checkpoint(path, model)
    fresh = copy.deepcopy(model)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    quantrain.load_checkpoint(path, fresh)
    assert torch.equal(fresh["head"].weight, model["embed"].weight)
    assert fresh["head"].weight is fresh["embed"].weight
    assert torch.equal(fresh["strided"].weight, model["strided"].weight)


def test_floating_tensors_keep_the_models_dtype(checkpoint):
    model = quantrain.prepare(network(), "qat-w8a8").bfloat16()
    quantrain.load_checkpoint(checkpoint, model)
    assert model[4].weight.dtype == torch.bfloat16
    assert model[4].input_fake_quant.scale.dtype == torch.float32
    assert torch.equal(model[4].weight, prepared("qat-w8a8")[4].weight.bfloat16())


def truncated(source, path):
    path.write_bytes(source.read_bytes()[:-10])
    return path


def cut_header(source, path):
    path.write_bytes(source.read_bytes()[:40])
    return path


def empty(source, path):
    path.write_bytes(b"")
    return path


def not_safetensors(source, path):
    torch.save({"weight": torch.ones(3)}, path)
    return path


def huge_header(source, path):
    path.write_bytes(b"\xff" * 64)
    return path


BAD = [
    (truncated, "whole safetensors file, got [0-9]+ bytes"),
    (cut_header, "whole safetensors file, got 40 bytes"),
    (empty, "whole safetensors file, got 0 bytes"),
    (not_safetensors, "whole safetensors file"),
    (huge_header, "whole safetensors file, got 64 bytes"),
    (lambda s, p: rewritten(s, p, metadata={"format": "pt"}), "format 'quantrain', got pt"),
    (lambda s, p: rewritten(s, p, metadata={"format": None}), "format 'quantrain', got None"),
    (lambda s, p: rewritten(s, p, metadata={"version": "2"}), "version '1', got 2"),
    (lambda s, p: rewritten(s, p, metadata={"layers": "{"}), "a JSON object in metadata 'layers', got {"),
    (lambda s, p: rewritten(s, p, metadata={"converted": "true"}), "got a converted one"),
    (
        lambda s, p: rewritten(s, p, tensors={"4.bias": torch.zeros(4)}),
        r"'4.bias' of shape \[3\], got \[4\]",
    ),
    (
        lambda s, p: rewritten(s, p, tensors={"4.bias": torch.zeros(3, dtype=torch.int32)}),
        "'4.bias' of dtype torch.float32, got torch.int32",
    ),
    (lambda s, p: rewritten(s, p, tensors={"4.bias": None, "4.weight": None}), r"2 missing.*no '4.weight', '4.bias'"),
    (lambda s, p: rewritten(s, p, tensors={"5.bias": torch.zeros(1)}), r"1 unexpected.*got '5.bias'"),
]


@pytest.mark.parametrize("damage, message", BAD)
def test_a_bad_file_raises_names_itself_and_changes_nothing(damage, message, checkpoint, tmp_path):
    path = damage(checkpoint, tmp_path / "bad.safetensors")
    model = prepared("qat-w8a8", seed=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"load_checkpoint: .*bad.safetensors: expected .*{message}"):
        quantrain.load_checkpoint(path, model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a checkpoint file, got none at .*nothing.safetensors"):
        quantrain.load_checkpoint(tmp_path / "nothing.safetensors", network())


def test_converted_files_need_a_model_with_the_same_bits(tmp_path):
    path = tmp_path / "converted.safetensors"
    quantrain.save_checkpoint(path, quantrain.convert(prepared("qat-w4a8")))
    other = quantrain.convert(prepared("qat-w8a8"))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="layer '0' with {'bits': 8.*got {'bits': 4"):
        quantrain.load_checkpoint(path, other)
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
    quantrain.save_checkpoint(path, prepared("qat-w8a8"))
    with pytest.raises(ValueError, match="expected a converted checkpoint for this model, got one that is not"):
        quantrain.load_checkpoint(path, other)


def test_saving_refuses_what_is_not_a_tensor_and_leaves_the_old_file(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    path = tmp_path / "model.safetensors"
    quantrain.save_checkpoint(path, network())
    old = path.read_bytes()
    with pytest.raises(ValueError, match="expected tensors in the state dict, got dict at '_extra_state'"):
        quantrain.save_checkpoint(path, Extra(2, 2))
    assert path.read_bytes() == old
