"""What layers of a joined block share: a learned scale is one parameter, and a state holds one value for it."""

import copy
import pickle

import pytest
import torch
from samples.fuse import LEARNED, Shortcut, batch, chain_on, filled, sgd, step
from torch import nn

import quantrain.nn as qnn

SCALES = ["conv1.input_fake_quant.scale", "down.0.input_fake_quant.scale"]


def shortcut_and_head():
    """The last layer, whose bits are others, is not one of the block's."""
    torch.manual_seed(4)
    return filled(nn.Sequential(chain_on(nn.ReLU)(), Shortcut(), chain_on(nn.ReLU)()))


def learned_pair():
    """A model whose layers learn a scale each, and one that ties two."""
    model = shortcut_and_head()
    apart = qnn.prepare(copy.deepcopy(model), LEARNED)
    return apart, qnn.prepare(model, LEARNED, fuse=True)


def test_layers_that_read_one_tensor_learn_one_scale():
    apart, joined = learned_pair()
    names = [f"1.{name}" for name in SCALES]
    assert "1: one fake-quantized input of conv1, down.0, with one learned scale" in joined.quantization_summary.fused
    assert joined.get_parameter(names[0]) is joined.get_parameter(names[1])
    assert set(apart.quantization_summary.new_parameters) - set(joined.quantization_summary.new_parameters) == {
        names[1]
    }
    assert list(joined.state_dict()) == list(apart.state_dict())
    found = [step(model, torch.optim.SGD(model.parameters(), lr=0.0), batch()) for model in (apart, joined)]
    torch.testing.assert_close(found[0], found[1])
    for name, value in apart.state_dict().items():  # first values too: both saw the same tensor
        assert torch.equal(joined.state_dict()[name], value), name
    one, other = (apart.get_parameter(name).grad for name in names)
    torch.testing.assert_close(joined.get_parameter(names[0]).grad, one + other)


def test_an_optimizer_made_before_misses_one_scale_and_is_told():
    model = shortcut_and_head()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.warns(UserWarning, match="new parameters"):
        qnn.prepare(model, LEARNED, fuse=True)
    new = model.quantization_summary.new_parameters
    optimizer.add_param_group({"params": [model.get_parameter(name) for name in new]})
    step(model, optimizer, batch())
    before = model[1].down[0].input_fake_quant.scale.detach().clone()
    step(model, optimizer, batch(1))
    assert not torch.equal(model[1].down[0].input_fake_quant.scale, before)


@pytest.mark.parametrize(
    "change",
    [
        {"overrides": {"1.down.0": {"input": {"bits": 3}}}},
        {"overrides": {"1.down.0": {"input": {"learnable": False, "observer": "moving_average"}}}},
        {"frozen": True},
    ],
    ids=["bits", "observed", "frozen"],
)
def test_scales_that_are_not_alike_are_not_tied(change):
    model = shortcut_and_head()
    if change.pop("frozen", False):  # with the weight its learned scales are frozen
        model[1].down[0].weight.requires_grad_(False)
    joined = qnn.prepare(model, LEARNED, fuse=True, **change)
    assert not any("learned" in row for row in joined.quantization_summary.fused)
    assert joined[1].conv1.input_fake_quant is not joined[1].down[0].input_fake_quant
    step(joined, sgd(joined), batch())


def test_states_load_between_models_where_the_scales_agree(tmp_path):
    apart, joined = learned_pair()
    for seed in range(2):
        step(joined, sgd(joined), batch(seed))
    apart.load_state_dict(joined.state_dict())
    x = batch(4)
    assert torch.equal(apart.eval()(x), joined.eval()(x))
    pytest.importorskip("safetensors")
    qnn.save_checkpoint(tmp_path / "model.safetensors", joined)
    again = qnn.from_checkpoint(tmp_path / "model.safetensors", shortcut_and_head())
    assert torch.equal(again(x), joined(x))
    _, other = learned_pair()
    other.load_state_dict(apart.state_dict())
    assert torch.equal(other.eval()(x), joined(x))


@pytest.mark.parametrize("way", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("strict", [True, False])
def test_two_values_for_one_scale_do_not_load(way, strict, tmp_path):
    """Of two the last would win, in silence."""
    apart, joined = learned_pair()
    joined = way(joined)
    step(joined, sgd(joined), batch())
    step(apart, sgd(apart), batch())
    step(apart, sgd(apart), batch(1))
    message = "1.down.0.input_fake_quant: expected the values of 1.conv1.input_fake_quant"
    with pytest.raises(RuntimeError, match=message):
        joined.load_state_dict(apart.state_dict(), strict=strict)
    pytest.importorskip("safetensors")
    before = copy.deepcopy(joined.state_dict())
    qnn.save_checkpoint(tmp_path / "apart.safetensors", apart)
    with pytest.raises(ValueError, match=f"apart.safetensors: expected one value of what layers share, got {message}"):
        qnn.load_checkpoint(tmp_path / "apart.safetensors", joined)
    assert all(torch.equal(value, before[name]) for name, value in joined.state_dict().items())


def test_two_observed_ranges_for_one_do_not_load():
    model = filled(Shortcut())
    apart = qnn.prepare(copy.deepcopy(model), "qat-w8a8")
    joined = qnn.prepare(model, "qat-w8a8", fuse=True)
    apart(batch())
    joined.load_state_dict(apart.state_dict())
    apart.down[0].input_fake_quant.enable_observer(False)
    apart(2 * batch(1))
    with pytest.raises(RuntimeError, match="down.0.input_fake_quant: expected the values of conv1.input_fake_quant"):
        joined.load_state_dict(apart.state_dict())
