"""What models that users bring do beyond layers in a row: side effects while tracing, hooks, bypassed layers, frozen batch norms."""

import copy
import pickle
import random
import sys
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples.layers import Conv1D
from torch import nn
from torch.nn.utils import parametrizations, prune

import quantrain.nn as qnn
from quantrain.nn.graph import trace_model


def conv_bn_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


def calibrated(model, *batch, recipe="qat-w8a8", **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qnn.prepare(model, recipe, **arguments)
        return qnn.calibrate(model, [batch], forward=lambda m, b: m(*b))


def assert_converts(model, *batch):
    """Converted equals simulated."""
    model.eval()
    with torch.no_grad():
        expected = model(*batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = qnn.convert(model)
        assert torch.equal(model(*batch), expected)
    return model


def step(model, *batch):
    """One step of training."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(*batch).square().mean().backward()
    optimizer.step()


# Tracing


class Remembers(nn.Module):
    """Counts its calls in a buffer, draws random numbers, and keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.seen, self.log = None, []

    def forward(self, x):
        self.calls += 1
        self.seen = self.fc(x)
        self.log.append(self.seen)
        noise = torch.rand(4) + random.random() + float(np.random.rand())  # noqa: NPY002
        return self.seen + noise


class Uncopied(Remembers):
    """And holds what cannot be copied."""

    def __init__(self):
        super().__init__()
        self.file = sys.stdout

    def __deepcopy__(self, memo):
        raise TypeError("a model with an open file")


@pytest.mark.parametrize("build", [Remembers, Uncopied])
@pytest.mark.parametrize("inputs", [None, (torch.randn(2, 4),)])
def test_tracing_leaves_the_model_and_the_random_states_alone(build, inputs):
    model = build()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    qnn.prepare(model, "qat-w8a8", example_inputs=inputs)
    assert model.calls == 0 and model.seen is None and model.log == []
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # noqa: NPY002
    if build is Remembers:
        pickle.dumps(model)
        copy.deepcopy(model)


def test_tracing_that_fails_leaves_the_model_alone():
    class Fails(Remembers):
        def forward(self, x):
            y = super().forward(x)
            return y if y.sum() > 0 else -y

    model = Fails()
    qnn.prepare(model, "qat-w8a8")
    assert model.calls == 0 and model.seen is None and model.log == []
    pickle.dumps(trace_model(nn.Linear(2, 2)))


class Named(nn.Module):
    """Children under names that a network in fixed point has uses for."""

    def __init__(self, first, second):
        super().__init__()
        self.add_module(first, nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
        self.add_module(second, nn.Linear(4 * 36, 5))
        self.names = first, second

    def forward(self, x):
        first, second = (self._modules[name] for name in self.names)
        return second(torch.flatten(first(x), 1))


@pytest.mark.parametrize("first, second", [("layers", "activations"), ("steps", "run"), ("update_summary", "layers")])
def test_children_may_have_any_name_in_fixed_point(first, second):
    model, x = Named(first, second), torch.randn(2, 3, 8, 8)
    prepared = qnn.calibrate(qnn.prepare(model, "f8net"), [x])
    assert {f"{first}.0.weight", f"{second}.weight"} <= set(prepared.state_dict())
    prepared.eval()
    assert torch.equal(qnn.convert(prepared)(x), prepared(x))


def test_fixed_point_refuses_another_network_in_evaluation():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.more, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4 * 36, 5)

        def forward(self, x):
            x = self.conv(x)
            return self.fc(torch.flatten(x if self.training else self.more(x), 1))

    with pytest.raises(ValueError, match="the same layers in training and in evaluation.*'more'"):
        qnn.prepare(Two(), "f8net")


# Both modes


class SecondUser(nn.Module):
    """A convolution that feeds its batch norm alone in one mode, and another user in the other."""

    def __init__(self, mode):
        super().__init__()
        self.conv, self.bn, self.mode = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), mode

    def forward(self, x):
        x = self.conv(x)
        y = self.bn(x)
        return y + x if self.training == self.mode else y


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_second_user_in_one_mode_keeps_the_batch_norm(mode, training):
    model, x = SecondUser(mode).train(training), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        model.bn.weight.uniform_(0.5, 2)
    exact = copy.deepcopy(model).eval()(x)
    calibrated(model, x)
    assert type(model.conv) is qnn.QuantConv2d and type(model.bn) is nn.BatchNorm2d
    torch.testing.assert_close(model.eval()(x), exact, atol=0.1, rtol=0.1)
    assert model.training is False


class Auxiliary(nn.Module):
    """With a convolution and a batch norm that evaluation does not call."""

    def __init__(self):
        super().__init__()
        self.body, self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.body(x)
        return self.bn(self.conv(x)) if self.training else x


def test_a_batch_norm_that_one_mode_alone_calls_is_folded():
    model = qnn.prepare(Auxiliary(), "qat-w8a8")
    assert type(model.conv) is qnn.QuantConvBn2d


def test_a_model_that_one_mode_alone_can_run_is_read_in_that_mode():
    class NeedsTargets(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x, targets=None):
            if self.training:
                x = x + len(targets)
            return self.bn(self.conv(x))

    model = qnn.prepare(NeedsTargets(), "qat-w8a8")
    assert type(model.conv) is qnn.QuantConvBn2d


# Folded batch norms


def test_the_place_of_a_folded_batch_norm_stands_for_it():
    model, x = conv_bn_net(), torch.randn(4, 3, 8, 8)
    bn = model[1]
    calibrated(model, x)
    model.train()
    model[1].eval()
    assert model[0].training and not model[0].bn.training
    before = model[0].bn.running_mean.clone()
    model(x)
    assert torch.equal(model[0].bn.running_mean, before)
    model.train()
    assert model[0].bn.training
    model(x)
    assert not torch.equal(model[0].bn.running_mean, before)
    assert model[1].weight is bn.weight and model[1].running_var is bn.running_var
    model[1].momentum = 0.5
    assert model[0].bn.momentum == 0.5
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    synchronized[1].eval()
    assert type(synchronized[0].bn) is nn.SyncBatchNorm and not synchronized[0].bn.training
    model[1].requires_grad_(False)
    assert not bn.weight.requires_grad
    assert not list(model[1].parameters()) and not model[1].state_dict()
    with pytest.raises(AttributeError):
        _ = model[1].no_such_attribute


def test_the_place_of_a_folded_batch_norm_survives_copies_and_is_gone_after_convert():
    model, x = conv_bn_net(), torch.randn(4, 3, 8, 8)
    calibrated(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.train()[1].eval()
        assert not other[0].bn.training and model[0].bn.training
    assert type(assert_converts(model, x)[1]) is nn.Identity


def test_a_frozen_batch_norm_in_training_equals_the_float_network():
    model, x = conv_bn_net(), torch.randn(4, 3, 8, 8)
    model(x)
    reference = copy.deepcopy(model).train()
    reference[1].eval()
    calibrated(model, x, recipe="qat-w8a8-token").train()
    model[1].eval()
    qnn.enable_fake_quant(model, False)
    torch.testing.assert_close(model(x), reference(x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_of_a_folded_convolution_has_the_gradients_of_eager(backend):
    torch.manual_seed(0)
    layer = qnn.QuantConvBn2d(3, 8, 3, recipe="qat-w8a8-token")
    other = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend=backend)
    for _ in range(3):
        x = 3 * torch.randn(4, 3, 8, 8)
        grads = []
        for module, run in ((layer, layer), (other, compiled)):
            y = x.clone().requires_grad_()
            module.zero_grad()
            run(y).sin().sum().backward()
            grads.append([y.grad, module.weight.grad, module.bn.weight.grad, module.bn.bias.grad])
        for mine, theirs in zip(*grads, strict=True):
            assert (mine - theirs).norm() <= 1e-5 * mine.norm()
    torch.testing.assert_close(layer.bn.running_var, other.bn.running_var)


# Layers that no batch reaches


class Bypassed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.linear(x, self.fc.weight, self.fc.bias))


class Untraced(Bypassed):
    def forward(self, x):
        return super().forward(x if x.sum() > -1e9 else -x)


@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w8a8-token", "qat-w4a4"])
def test_a_layer_whose_weight_a_function_reads_stays_float_where_tracing_shows_it(recipe):
    model, x = Bypassed(), torch.randn(4, 8)
    with pytest.warns(UserWarning, match=r"6\d % of the parameters stay in floating point: 'fc' \(Linear\)"):
        qnn.prepare(model, recipe)
    assert type(model.fc) is nn.Linear and "reads its weight" in model.quantization_summary.left_float["fc"]
    qnn.calibrate(model, [x])
    step(model, x)
    assert_converts(model, x)


@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w4a4"])
def test_convert_leaves_float_what_no_batch_reached_and_says_so(recipe, tmp_path):
    model, x = Untraced(), torch.randn(4, 8)
    weight = model.fc.weight
    calibrated(model, x, recipe=recipe)
    model.eval()
    expected = model(x)
    with pytest.warns(
        UserWarning, match="convert: 1 of 2 layers stay in floating point, as no batch reached them: 'fc'"
    ):
        qnn.convert(model)
    assert type(model.fc) is nn.Linear and model.fc.weight is weight and list(model.fc._modules) == []
    assert model.quantization_summary.left_float == {"fc": "no range of it was observed"}
    assert [row["layer"] for row in model.quantization_summary.rows] == ["head"]
    assert torch.equal(model(x), expected)
    qnn.save_checkpoint(tmp_path / "model.safetensors", model)
    fresh = qnn.convert(qnn.prepare(Untraced(), recipe), skip=["fc"], check_observed=False)
    qnn.load_checkpoint(tmp_path / "model.safetensors", fresh)
    assert torch.equal(fresh(x), expected)


def test_convert_warns_of_layers_that_were_never_called_where_nothing_is_observed():
    model, x = Untraced(), torch.randn(4, 8)
    qnn.prepare(model, "qat-w8a8-token")
    model(x)
    with pytest.warns(UserWarning, match="1 of 2 layers were not called since .*'fc'.*skip="):
        qnn.convert(model, inplace=False)
    expected = model.eval()(x)
    assert torch.equal(qnn.convert(model, skip=["fc"])(x), expected)


def test_a_convolution_and_its_batch_norm_become_float_again():
    model, x = Auxiliary(), torch.randn(2, 3, 5, 5)
    names, parameters = set(model.state_dict()), {id(p) for p in model.conv.parameters()}
    calibrated(model, x)
    with pytest.warns(UserWarning, match="'conv'"):
        qnn.convert(model)
    assert type(model.conv) is nn.Conv2d and type(model.bn) is nn.BatchNorm2d
    assert {id(p) for p in model.conv.parameters()} == parameters
    assert {n for n in model.state_dict() if not n.startswith("body")} == {n for n in names if not n.startswith("body")}
    assert model.train()(x).shape == (2, 4, 3, 3)


def test_convert_without_any_range_still_raises_and_skip_names_layers():
    model = qnn.prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "qat-w8a8")
    with pytest.raises(ValueError, match="convert: expected observed ranges at '0.input_fake_quant', got none"):
        qnn.convert(model)
    with pytest.raises(ValueError, match="convert: expected every pattern of skip to name a layer, got 'head'"):
        qnn.convert(model, skip=["head"])
    assert type(qnn.convert(model, skip=["*"])[0]) is nn.Linear


# Conv1D of transformers


@pytest.fixture
def transformers_conv1d(monkeypatch):
    """The class where prepare looks for it, without the package."""
    module = types.ModuleType("transformers.pytorch_utils")
    module.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)


@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w4a8", "qat-w4a4", "fqt-bhq5", "int8-training", "int8-static"])
def test_conv1d_of_transformers_is_a_linear_layer(recipe, transformers_conv1d):
    torch.manual_seed(0)
    float_layer, x = Conv1D(32, 64), torch.randn(3, 5, 64)
    linear = nn.Linear(64, 32)
    with torch.no_grad():
        linear.weight.copy_(float_layer.weight.t())
        linear.bias.copy_(float_layer.bias)
    mine, reference = nn.Sequential(float_layer), nn.Sequential(linear)
    for model in (mine, reference):
        calibrated(model, x, recipe=recipe)
    assert mine[0].weight is float_layer.weight and not isinstance(mine[0], nn.Linear)
    torch.manual_seed(1)
    expected = reference(x)
    expected.sum().backward()
    torch.manual_seed(1)
    found = mine(x)
    found.sum().backward()
    assert torch.equal(found, expected)
    torch.testing.assert_close(mine[0].weight.grad, reference[0].weight.grad.t())
    for model in (mine, reference):
        expected = model.eval()(x)
        torch.testing.assert_close(
            qnn.convert(model)(x), expected, atol=1e-5, rtol=1e-5
        )  # int8-static: another order of sums
    assert mine[0].state_dict().keys() == reference[0].state_dict().keys()
    assert all(torch.equal(value, reference[0].state_dict()[name]) for name, value in mine[0].state_dict().items())
    assert type(mine[0]) is type(reference[0]) and mine[0].weight.shape == (64, 32)
    assert qnn.model_size(mine).total == qnn.model_size(reference).total


def test_conv1d_of_transformers_keeps_its_kind_where_it_stays_float(transformers_conv1d):
    model = qnn.prepare(nn.Sequential(Conv1D(4, 8), nn.Linear(4, 4)), "qat-w8a8")
    assert type(model[0]) is qnn.QuantTransposedLinear
    qnn.convert(model, skip=["0"], check_observed=False)
    assert type(model[0]) is Conv1D and set(model[0].state_dict()) == {"weight", "bias"}
    assert model[0](torch.ones(2, 8)).shape == (2, 4)


@pytest.mark.parametrize("recipe", ["int8-training", "int8-static"])
def test_recipes_of_integer_products_leave_convolutions_alone(recipe):
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3), nn.Linear(4, 4))
    qnn.prepare(model, recipe)
    assert set(model.quantization_summary.left_float) == {"0", "1"}


def test_gradients_of_conv1d_are_quantized_as_those_of_an_image_of_one_row():
    torch.manual_seed(0)
    one, two = (
        nn.Conv1d(4, 6, 5, stride=2, padding=2, groups=2),
        nn.Conv2d(4, 6, (1, 5), stride=(1, 2), padding=(0, 2), groups=2),
    )
    with torch.no_grad():
        two.weight.copy_(one.weight.unsqueeze(2))
        two.bias.copy_(one.bias)
    x, results = torch.randn(3, 4, 16), []
    for model, batch in ((nn.Sequential(one), x), (nn.Sequential(two), x.unsqueeze(2))):
        calibrated(model, batch, recipe="fqt-bhq5")
        batch = batch.clone().requires_grad_()
        torch.manual_seed(1)
        y = model(batch)
        y.sin().sum().backward()
        results.append([t.flatten() for t in (y.detach(), batch.grad, model[0].weight.grad, model[0].bias.grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_of_conv_transpose2d_cannot_be_quantized_and_prepare_says_so():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Flatten(), nn.Linear(64, 2))
    with pytest.warns(UserWarning, match="ConvTranspose2d"):
        qnn.prepare(model, "fqt-bhq5")
    assert "gradients of ConvTranspose2d" in model.quantization_summary.left_float["0"]
    with pytest.raises(ValueError, match="expected a recipe without grad_input"):
        qnn.QuantConvTranspose2d(3, 4, 2, recipe="fqt-bhq5")


@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w4a8"])
def test_model_size_foretells_the_bytes_of_converted_layers(recipe):
    layers = (nn.ConvTranspose2d(6, 4, 3), nn.Conv1d(3, 5, 3), Conv1D(6, 3), nn.Linear(5, 3))
    model = qnn.prepare(nn.Sequential(*layers), recipe)
    model[2] = qnn.QuantTransposedLinear.from_float(model[2], recipe)
    expected = qnn.model_size(model).total["converted_bytes"]
    assert qnn.model_size(qnn.convert(model, check_observed=False)).total["bytes"] == expected


def test_conv_transpose2d_takes_an_output_size():
    layer, x = qnn.QuantConvTranspose2d(3, 4, 3, stride=2, recipe="qat-w8a8-token"), torch.randn(1, 3, 4, 4)
    assert layer(x, output_size=[10, 10]).shape == (1, 4, 10, 10)
    expected = layer.eval()(x, output_size=[10, 10])
    assert torch.equal(qnn.convert(layer)(x, output_size=[10, 10]), expected)


# The share left in floating point


def test_prepare_warns_of_the_share_left_float_but_not_of_what_was_asked_for():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(88, 100))

        def forward(self, x):
            return x @ self.weight.t()

    model = nn.Sequential(Own(), nn.Linear(88, 13, bias=False), nn.BatchNorm1d(13))
    with pytest.warns(UserWarning, match=r"prepare: 88 % of the parameters stay in floating point: '0' \(Own\)"):
        qnn.prepare(model, "qat-w8a8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qnn.prepare(nn.Sequential(nn.Linear(100, 100), nn.Linear(4, 4)), "qat-w8a8", skip=["0"])
        qnn.prepare(nn.Sequential(nn.Embedding(100, 100), nn.Linear(4, 4)), "int8-training")


# nn.TransformerEncoder


@pytest.mark.parametrize("lengths", [(6, 4), (3, 6), (6, 6)])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_encoder_takes_a_padding_mask_in_evaluation(lengths, norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # norm_first has no nested tensors
        model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 6, 16)
    padding = torch.arange(6) >= torch.tensor(lengths)[:, None]
    expected = model(x, src_key_padding_mask=padding)
    batch = {"src": x, "src_key_padding_mask": padding}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qnn.calibrate(qnn.prepare(model, "qat-w8a8"), [batch])
    with torch.no_grad():
        simulated = model(**batch)
        torch.testing.assert_close(simulated[~padding], expected[~padding], atol=0.1, rtol=0.1)
        assert torch.equal(qnn.convert(model)(**batch), simulated)


# Weights that hooks compute

HOOKS = {
    "weight_norm": lambda m: torch.nn.utils.weight_norm(m),
    "spectral_norm": lambda m: torch.nn.utils.spectral_norm(m),
    "prune": lambda m: prune.random_unstructured(m, "weight", 0.5),
    "prune twice": lambda m: prune.l1_unstructured(prune.random_unstructured(m, "weight", 0.3), "weight", 0.3),
    "prune of the bias": lambda m: prune.random_unstructured(m, "bias", 0.5),
}


def hooked(kind):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weight_norm is deprecated
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5), nn.Linear(5, 5)
        )
        for layer in (model[0], model[3], model[4]):
            HOOKS[kind](layer)
    return model, torch.randn(4, 3, 8, 8)


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w4a4"])
@pytest.mark.parametrize("inplace", [True, False])
def test_convert_right_after_a_step_stores_the_weight_of_the_step(kind, recipe, inplace):
    model, x = hooked(kind)
    model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = qnn.calibrate(qnn.prepare(model, recipe, inplace=inplace), [x])
    names = {name for name, _ in model.named_parameters()}
    learned = [fq.scale for fq in model.modules() if isinstance(fq, qnn.FakeQuantize) and fq.learnable]
    assert all(scale.requires_grad for scale in learned) and bool(learned) == (recipe == "qat-w4a4")
    step(model, x)
    with torch.no_grad():
        converted = qnn.convert(model, inplace=False).eval()
        assert torch.equal(converted(x), model.eval()(x))
    assert {name for name, _ in model.named_parameters()} == names


@pytest.mark.parametrize("kind", ["weight_norm", "prune"])
def test_an_integer_network_has_the_weight_of_the_step(kind):
    model, x = hooked(kind)
    del model[4]
    prepared = qnn.calibrate(qnn.prepare(model, "f8net"), [x])
    step(prepared, x)
    converted = qnn.convert(prepared)
    assert torch.equal(converted(x), prepared.eval()(x))


@pytest.mark.parametrize("parametrization", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_layers_stay_float_and_are_named(parametrization):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(4, 8)
    parametrization(model[0])
    with pytest.warns(UserWarning, match=r"% of the parameters stay in floating point: '0'"):
        qnn.prepare(model, "qat-w8a8")
    assert "parametrized" in model.quantization_summary.left_float["0"]
    qnn.calibrate(model, [x])
    step(model, x)
    assert_converts(model, x)


def test_a_weight_that_another_hook_computes_stays_float_and_is_named():
    def compute(module, args):
        module.weight = torch.tanh(module.raw)

    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(4, 8)
    raw = model[0].weight
    del model[0].weight
    model[0].register_parameter("raw", raw)
    model[0].register_forward_pre_hook(compute)
    calibrated(model, x)
    assert type(model[0]) is nn.Linear and "computed by a hook" in model.quantization_summary.left_float["0"]
    step(model, x)
    assert_converts(model, x)


# Embedding(max_norm=)


@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w4a8", "qat-w4a4", "ptq-w4a8"])
@pytest.mark.parametrize("norm_type", [2.0, 1.0])
def test_convert_keeps_max_norm(recipe, norm_type):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 32, max_norm=1.0, norm_type=norm_type), nn.Linear(32, 3))
    some, every = torch.arange(0, 20, 3), torch.arange(20)
    calibrated(model, some, recipe=recipe)
    model.eval()
    converted = qnn.convert(model, inplace=False)
    with torch.no_grad():
        expected = model(every)
    assert torch.equal(converted(every), expected)
    assert (
        converted[0].weight.norm(norm_type, dim=1) <= 1.2
    ).all()  # without the limit 4 to 30; rounding moves it a little


def test_max_norm_with_one_scale_for_the_table():
    torch.manual_seed(0)
    recipe = qnn.changed_recipe(qnn.as_recipe("qat-w8a8"), {"weight": {"granularity": "per_tensor"}})
    model = nn.Sequential(nn.Embedding(20, 8, max_norm=1.0))
    qnn.prepare(model, recipe).eval()
    converted = qnn.convert(model, inplace=False)
    every = torch.arange(20)
    assert torch.equal(converted(every), model(every))


def test_export_onnx_of_another_model_says_what_it_expects(tmp_path):
    for model in (
        qnn.convert(qnn.prepare(nn.Sequential(nn.Linear(4, 2)), "qat-w8a8-token")),
        nn.Linear(2, 2),
        3,
        (1, 2, 3),
    ):
        with pytest.raises(ValueError, match="export_onnx: expected a FixedPointNetwork"):
            qnn.export_onnx(model, tmp_path / "model.onnx")
