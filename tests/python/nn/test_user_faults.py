"""What people do with models beside training them: hooks, checkpointed blocks, one batch for a list, integer networks in checkpoints."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import quantrain.nn as qnn
from quantrain import load_checkpoint, save_checkpoint


def small(recipe="qat-w8a8"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(16, 8)
    return model, x, recipe


@pytest.mark.parametrize("recipe", ["qat-w8a8", "ptq-w8a8", "int8-static", "qat-w4a8"])
def test_convert_keeps_forward_hooks(recipe):
    model, x, recipe = small(recipe)
    model[0].register_forward_hook(lambda module, args, y: y * 2)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[2].register_forward_hook(lambda module, args, kwargs, y: y - 1, with_kwargs=True)
    model = qnn.prepare(model, recipe)
    qnn.calibrate(model, [x])
    simulated = model.eval()(x)
    converted = qnn.convert(model)
    assert torch.allclose(converted(x), simulated, atol=1e-5)
    assert len(converted[2]._forward_hooks) == 1 and len(converted[2]._forward_pre_hooks) == 1


def test_convert_drops_hooks_that_compute_the_weight():
    model, x, recipe = small()
    model[0] = torch.nn.utils.spectral_norm(model[0])
    model = qnn.prepare(model, recipe)
    qnn.calibrate(model, [x])
    assert not qnn.convert(model)[0]._forward_pre_hooks


@pytest.mark.parametrize("recipe", ["qat-w4a4", "qat-w8a8"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_of_a_checkpointed_convolution_with_batch_norm(recipe, use_reentrant):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    x = torch.randn(4, 3, 10, 10) * 3 + 1
    model(x)
    model = qnn.prepare(model, recipe)
    qnn.calibrate(model, [x])
    qnn.enable_observer(model, False)
    model.train()
    plain = copy.deepcopy(model)
    plain(x).pow(3).sum().backward()
    checkpoint(model, x.clone().requires_grad_(), use_reentrant=use_reentrant).pow(3).sum().backward()
    for (name, expected), found in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(found.grad, expected.grad, rtol=1e-4, atol=1e-4 * expected.grad.abs().max()), name
    assert "_variance" not in pickle.loads(pickle.dumps(model[0])).__dict__


@pytest.mark.parametrize("batches", [torch.randn(4, 8), {"input": torch.randn(4, 8)}, "data", None, 3])
def test_one_batch_in_place_of_batches_is_refused(batches):
    model, _, recipe = small()
    model = qnn.prepare(model, recipe)
    with pytest.raises(TypeError, match="calibrate: expected batches to be an iterable of batches, got one"):
        qnn.calibrate(model, batches)


def test_a_float64_model_converts():
    model, x, recipe = small()
    model, x = model.double(), x.double()
    model = qnn.prepare(model, recipe)
    qnn.calibrate(model, [x])
    simulated = model.eval()(x)
    converted = qnn.convert(model)
    assert converted(x).dtype == torch.float64 and torch.allclose(converted(x), simulated, atol=1e-6)
    assert converted.float()(x.float()).dtype == torch.float32


def test_integer_networks_do_not_go_into_checkpoints(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    x = torch.rand(8, 1, 8, 8)
    model(x)
    prepared = qnn.prepare(model, "f8net")
    qnn.calibrate(prepared, [x])
    with pytest.raises(
        ValueError, match=r"save_checkpoint: expected a model without an integer network.*FixedPointNetwork.save"
    ):
        save_checkpoint(tmp_path / "f.safetensors", qnn.convert(prepared))
    qnn.convert(prepared).save(tmp_path / "g.safetensors")
    with pytest.raises(ValueError, match=r"an integer network, which FixedPointNetwork.load reads"):
        load_checkpoint(tmp_path / "g.safetensors", prepared)
    with pytest.raises(ValueError, match="use what prepare returned"):
        qnn.calibrate(model, [x])
    with pytest.raises(ValueError, match="use what prepare returned"):
        qnn.convert(model)


class Versioned(nn.Linear):
    """A module whose loading asks for the version of its state, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 2:
            raise ValueError(f"version should be 2 instead of {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_modules_with_versioned_states_load(tmp_path):
    model = nn.Sequential(Versioned(4, 2))
    save_checkpoint(tmp_path / "m.safetensors", model)
    load_checkpoint(tmp_path / "m.safetensors", nn.Sequential(Versioned(4, 2)))


def test_the_text_of_a_model_says_what_is_frozen():
    model, x, recipe = small()
    model = qnn.prepare(model, recipe)
    qnn.calibrate(model, [x])
    assert "frozen" not in repr(model)
    qnn.enable_observer(model, False)
    assert "frozen" in repr(model)


def test_a_batch_norm_with_a_hook_is_not_folded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model[1].register_forward_hook(lambda module, args, y: y * 2)
    x = torch.randn(8, 1, 8, 8)
    model(x)
    want = model.eval()(x)
    model = qnn.prepare(model, "qat-w8a8")
    assert type(model[1]) is nn.BatchNorm2d and isinstance(model[2], qnn.QuantConvBn2d)
    qnn.calibrate(model, [x])
    assert (model(x) - want).norm() < 0.1 * want.norm()


class TiedByFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.fc = nn.Embedding(16, 8), nn.Linear(8, 8)

    def forward(self, ids):
        return nn.functional.linear(self.fc(self.emb(ids)), self.emb.weight)


def test_a_layer_that_is_called_and_read_is_named():
    with pytest.warns(UserWarning, match=r"1 layers are called and their weight is read by a function too: 'emb'"):
        qnn.prepare(TiedByFunction(), "qat-w8a8")
    model = qnn.prepare(TiedByFunction(), "qat-w8a8-token", skip=["emb"])
    ids = torch.arange(16).reshape(2, 8)
    simulated = model.eval()(ids)
    assert torch.equal(qnn.convert(model)(ids), simulated)


@pytest.mark.parametrize("recipe", ["int8-training", "fqt-psq8"])
def test_recipes_without_float64_say_so_at_once(recipe):
    model = nn.Sequential(nn.Linear(8, 4)).double()
    with pytest.raises(ValueError, match=f"prepare: expected float32, .* under '{recipe}', got float64 in '0'"):
        qnn.prepare(model, recipe)
    assert type(model[0]) is nn.Linear


def test_the_weight_of_a_converted_layer_cannot_be_assigned():
    model, _, _ = small()
    model = qnn.convert(qnn.prepare(model, "qat-w8a8-token"))
    with pytest.raises(AttributeError, match="QuantizedLinear: expected no assignment to weight"):
        model[0].weight = nn.Parameter(torch.zeros(8, 8))
