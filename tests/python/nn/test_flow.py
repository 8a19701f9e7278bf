"""The flow from a float model to a trained one: which ranges move when, and what a checkpoint brings back."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import quantrain
import quantrain.nn as qnn
from quantrain import QuantSpec, Recipe


def spec(observer="min_max", **fields):
    return QuantSpec(observer=observer, **fields)


def conv_bn_network():
    layers = []
    for channels_in, channels in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def quiet_calibrate(model, batches):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return qnn.calibrate(model, batches)


@functools.cache
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


def train(model, x, y, steps, *, seed=0, lr=0.01, freeze_at=None):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    generator, losses = torch.Generator().manual_seed(seed), []
    model.train()
    for step in range(steps):
        if step == freeze_at:
            qnn.enable_observer(model, False)
        rows = torch.randperm(len(x), generator=generator)[:128]
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w4a8"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_new_network_with_batch_norms_trains_after_calibration_too(recipe, calibrated):
    x, y = digits()
    torch.manual_seed(0)
    model = qnn.prepare(conv_bn_network(), recipe)
    if calibrated:
        with pytest.warns(UserWarning, match="3 batch norms have seen no batch .*the first is '0.bn'"):
            qnn.calibrate(model, [x[:128]])
    losses = train(model, x, y, 120, freeze_at=100)
    assert sum(losses[-10:]) / 10 < 0.25
    model.eval()
    accuracy = (qnn.convert(model)(x).argmax(1) == y).float().mean()
    assert accuracy > 0.93


def test_no_warning_where_batch_norms_have_seen_data_or_hold_weights_of_older_releases():
    model = conv_bn_network()
    model(torch.randn(8, 1, 8, 8))
    for norm in (m for m in model if isinstance(m, nn.BatchNorm2d)):
        norm.num_batches_tracked.zero_()
    prepared = qnn.prepare(model, "qat-w8a8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qnn.calibrate(prepared, [torch.randn(8, 1, 8, 8)])


def test_ranges_follow_training_until_frozen():
    model = qnn.prepare(nn.Sequential(nn.Linear(4, 2)), "qat-w8a8")
    qnn.calibrate(model, [torch.ones(2, 4)])
    fq = model[0].input_fake_quant
    before = fq.scale.item()
    model(torch.full((2, 4), 11.0))
    assert fq.scale.item() == pytest.approx(2 * before)  # 1 + 0.1 * (11 - 1)
    qnn.enable_observer(model, False)
    model(torch.full((2, 4), 100.0))
    assert fq.scale.item() == pytest.approx(2 * before)
    qnn.enable_observer(model)
    model(torch.full((2, 4), 2.0))
    assert fq.scale.item() == pytest.approx(2 * before)  # the average is 2 already


@pytest.mark.parametrize("recipe", ["ptq-w8a8", "ptq-w4a8", "int8-static"])
def test_ranges_of_post_training_recipes_are_fixed_by_calibration(recipe):
    model = qnn.prepare(nn.Sequential(nn.Linear(32, 2)), recipe)
    qnn.calibrate(model, [torch.rand(4, 32)])
    before = copy.deepcopy(model.state_dict())
    model(torch.full((4, 32), 7.0))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_calibration_restores_the_switches():
    model = qnn.prepare(nn.Sequential(nn.Linear(4, 2)), "qat-w8a8")
    for quantizes, observes in ((True, False), (False, True)):
        qnn.enable_fake_quant(model, quantizes)
        qnn.enable_observer(model, observes)
        qnn.calibrate(model, [torch.randn(2, 4)])
        fq = model[0].input_fake_quant
        assert (fq.fake_quant_enabled, fq.observer_enabled, fq.calibrating) == (quantizes, observes, False)


@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w4a4", "ptq-w4a8", "f8net"])
def test_a_calibration_that_fails_leaves_the_state_as_it_was(recipe):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))
    model = qnn.prepare(net, recipe)
    x = torch.rand(2, 3, 6, 6)
    for _ in range(2):  # of a model that was never calibrated, then of one that was
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="NaN|finite|infinity"):
            qnn.calibrate(model, [2 * x, x * float("nan")])
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True, msg=name)
        qnn.calibrate(model, [x])


# ---- resuming ---------------------------------------------------------------------------------------------------------------


def resume_network(recipe):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(8 * 36, 10),
    )
    model(torch.randn(16, 1, 8, 8))  # statistics
    return qnn.prepare(model, recipe)


def steps(model, optimizer, first, last):
    losses = []
    for step in range(first, last):
        x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(step)) * (1 + step)
        loss = F.cross_entropy(model(x), torch.arange(16) % 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w4a8", "qat-w4a4", "fqt-bhq5"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("file", [False, True])
def test_a_resumed_run_takes_the_same_steps_bit_for_bit(recipe, frozen, calibrated, file, tmp_path):
    model = resume_network(recipe)
    if calibrated:
        qnn.calibrate(model, [torch.randn(16, 1, 8, 8)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    steps(model, optimizer, 0, 3)
    if frozen:
        qnn.enable_observer(model, False)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    path = tmp_path / "model.safetensors"
    qnn.save_checkpoint(path, model)
    losses = steps(model, optimizer, 3, 6)

    again = resume_network(recipe)
    if file:
        qnn.load_checkpoint(path, again)
    else:
        again.load_state_dict(state[0])
    optimizer = torch.optim.SGD(again.parameters(), lr=0.01, momentum=0.9)
    optimizer.load_state_dict(state[1])
    torch.set_rng_state(state[2])
    assert steps(again, optimizer, 3, 6) == losses
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_loaded_learned_scale_stays_also_without_the_range_it_came_from():
    fq = qnn.FakeQuantize(spec(bits=4, learnable=True))
    state = {"scale": torch.tensor([0.25]), "observer.min_val": torch.tensor([float("inf")])}
    state["observer.max_val"] = -state["observer.min_val"]
    fq.load_state_dict(state)  # as of an earlier release: without observer.frozen
    fq(torch.randn(8))
    assert fq.scale.item() == 0.25 and fq.observer_enabled


def test_enable_observer_does_not_undo_a_learned_scale():
    fq = qnn.FakeQuantize(spec(bits=4, learnable=True))
    fq(torch.randn(8))
    with torch.no_grad():
        fq.scale.mul_(3)
    trained = fq.scale.item()
    fq.enable_observer()
    fq(torch.randn(8))
    assert fq.scale.item() == trained


def test_checkpoints_of_earlier_releases_load(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    model = qnn.calibrate(resume_network("qat-w8a8"), [torch.randn(4, 1, 8, 8)])
    path = tmp_path / "model.safetensors"
    qnn.save_checkpoint(path, model)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if not name.endswith("frozen")}  # noqa: SIM118
        metadata = {key: value for key, value in file.metadata().items() if key != "layer_recipes"}
    save_file(tensors, path, metadata=metadata)
    again = resume_network("qat-w8a8")
    qnn.enable_observer(again, False)
    qnn.load_checkpoint(path, again)
    assert not again[0].input_fake_quant.observer_enabled  # the model's own switch
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(again.eval()(x), model.eval()(x))
    with pytest.raises(ValueError, match="expected layer '0' with weight int4 .*got weight int8"):
        qnn.load_checkpoint(path, resume_network("qat-w4a8"))


# ---- zeros ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", ["min_max", "moving_average", "percentile", "mse"])
def test_a_zero_block_does_not_count_as_observed(observer):
    watching = qnn.make_observer(spec(observer), (2, 1))
    watching(torch.zeros(2, 4))
    assert watching.only_zeros().all() and watching.calculate_qparams()[0].eq(1).all()
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0], [-1.0, 2.0, -2.0, 1.0]])
    watching(x)
    fresh = qnn.make_observer(spec(observer), (2, 1))
    fresh(x)
    assert torch.equal(watching.max_val, fresh.max_val) and torch.equal(watching.min_val, fresh.min_val)
    watching(torch.zeros(2, 4))
    assert torch.equal(watching.max_val, fresh.max_val)


@pytest.mark.parametrize("learnable", [False, True])
def test_an_input_calibrated_on_zeros_takes_its_range_from_the_first_other_batch(learnable):
    recipe = Recipe(input=spec("moving_average", learnable=learnable))
    layer = qnn.QuantLinear(4, 2, recipe=recipe)
    with pytest.warns(UserWarning, match="seen only as zeros: input_fake_quant"):
        qnn.calibrate(layer, [torch.zeros(3, 4)])
    assert layer.calibration_report.only_zeros == ("input_fake_quant",)
    x = torch.linspace(-0.1, 0.1, 12).reshape(3, 4)
    layer(x)
    assert layer.input_fake_quant.scale.item() == pytest.approx(0.1 / 127)
    layer(10 * x)
    expected = 0.1 if learnable else 0.1 + 0.1 * 0.9
    assert layer.input_fake_quant.scale.item() == pytest.approx(expected / 127)


def test_a_post_training_range_of_zeros_stays_open():
    layer = qnn.QuantLinear(4, 2, recipe="ptq-w8a8")
    with pytest.warns(UserWarning, match="only as zeros"):
        qnn.calibrate(layer, [torch.zeros(3, 4)])
    layer(torch.rand(3, 4))
    assert layer.input_fake_quant.scale.item() < 1 / 200


class ResidualNet(nn.Module):
    """Blocks whose last batch norm begins with gamma 0, as torchvision's zero_init_residual makes them."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x):
        x = F.relu(self.stem_bn(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("calibrated", [False, True])
def test_zero_initialized_residual_branches_train_under_learned_scales(calibrated):
    x, y = digits()
    torch.manual_seed(0)
    model = qnn.prepare(ResidualNet(), "qat-w4a4")
    if calibrated:
        quiet_calibrate(model, [x[:128]])
    first = copy.deepcopy(model)
    losses = train(model, x, y, 150, freeze_at=120)
    assert sum(losses[-10:]) / 10 < 0.6
    moved = (model.conv2.weight - first.conv2.weight).norm() / first.conv2.weight.norm()
    assert moved > 0.05 and model.conv2.bn.weight.abs().mean() > 0.02
    # The branch is quantized to its own range: no channel is rounded away, few codes saturate.
    fq, weight = model.eval().conv2.weight_fake_quant, model.conv2.weight_to_quantize()
    codes = (weight / fq.scale).round()
    assert (codes != 0).flatten(1).any(1).all()
    assert ((codes < -8) | (codes > 7)).float().mean() < 0.1
    without = copy.deepcopy(model)
    nn.init.zeros_(without.conv2.bn.weight)
    assert F.cross_entropy(without(x), y) > 1.2 * F.cross_entropy(model(x), y)


def test_a_zero_initialized_linear_layer_trains_under_a_learned_scale():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.zeros_(model[2].weight)
    qnn.prepare(model, "qat-w4a4")
    x = torch.randn(64, 8)
    quiet_calibrate(model, [x])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()
    fq, weight = model[2].weight_fake_quant, model[2].weight.detach()
    error = (fq.eval()(weight) - weight).square().mean() / weight.square().mean()
    assert error < 0.05


# ---- recomputation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w4a4", "f8net"])
def test_activation_checkpointing_gives_the_same_ranges_and_gradients(recipe, use_reentrant):
    torch.manual_seed(0)
    if recipe == "f8net":
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        model = qnn.prepare(nn.Sequential(*layers, nn.Linear(8, 4)), recipe)
        x = torch.rand(4, 3, 8, 8)
    else:
        model = qnn.prepare(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), recipe)
        x = torch.randn(16, 8)
    qnn.calibrate(model, [x])
    plain = copy.deepcopy(model)
    for scale in (3.0, 0.2):
        inputs = (scale * x).requires_grad_()
        checkpoint(model, inputs, use_reentrant=use_reentrant).square().sum().backward()
        plain(scale * x).square().sum().backward()
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


# ---- reports ----------------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """A layer that no call reaches, one that is read past its call, one that gets no row."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused, self.read = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        return self.a(x) + self.b(x[:0]).sum() + F.linear(x, self.read.weight)


@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w4a4", "ptq-w4a8", "qat-w8a8-token"])
def test_calibration_names_what_it_did_not_reach_and_empty_batches_pass(recipe):
    model = qnn.prepare(Experts(), recipe)
    x = torch.randn(3, 4)
    if recipe == "qat-w8a8-token":
        assert not qnn.calibrate(model, [x]).calibration_report
        return
    with pytest.warns(UserWarning, match="calibrate: never reached: b.input_fake_quant, unused.input_fake_quant"):
        qnn.calibrate(model, [x])
    assert model.calibration_report.unreached == ("b.input_fake_quant", "unused.input_fake_quant")
    assert model.b.input_fake_quant.observer_enabled
    model.eval()
    assert model(x).isfinite().all()
    with pytest.raises(ValueError, match="'b.input_fake_quant': expected a scale"):
        model.b(x)
    model.train()(x).sum().backward()
    model.b(x)
    assert model.b.input_fake_quant.ready


def test_calibration_takes_a_data_loader_of_pairs():
    data = torch.utils.data.TensorDataset(torch.randn(12, 4), torch.arange(12))
    model = qnn.prepare(nn.Sequential(nn.Linear(4, 2)), "ptq-w8a8")
    qnn.calibrate(model, torch.utils.data.DataLoader(data, batch_size=4))
    assert model[0].input_fake_quant.ready


# ---- switches ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["f8net", "f8net-tiny"])
def test_fake_quant_off_makes_a_fixed_point_model_compute_in_floating_point(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    x = torch.rand(4, 3, 8, 8)
    for _ in range(20):
        model(x)
    prepared = qnn.calibrate(qnn.prepare(copy.deepcopy(model), recipe), [x])
    qnn.enable_fake_quant(prepared, False)
    torch.testing.assert_close(prepared.eval()(x), model.eval()(x))
    torch.testing.assert_close(prepared.train()(x), model.train()(x))
    qnn.enable_fake_quant(prepared)
    assert not torch.equal(prepared.eval()(x), model.eval()(x))


# ---- optimizers -------------------------------------------------------------------------------------------------------------


def test_a_frozen_layers_learned_scales_are_frozen():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    qnn.prepare(model, "qat-w4a4")
    assert not any(p.requires_grad for p in model[0].parameters())
    assert all(p.requires_grad for p in model[1].parameters())
    model(torch.randn(4, 4)).sum().backward()
    assert model[0].input_fake_quant.ready


def test_a_scale_factor_of_a_loss_scaler_sees_an_inf_in_a_range_that_follows_training():
    model = qnn.prepare(nn.Sequential(nn.Linear(4, 2)), "qat-w8a8")
    qnn.calibrate(model, [torch.randn(4, 4)])
    before = model[0].input_fake_quant.scale.clone()
    with pytest.raises(ValueError, match="'0.input_fake_quant.observer': expected a finite batch"):
        model(torch.full((2, 4), float("inf")))
    assert torch.equal(model[0].input_fake_quant.scale, before)


# ---- checkpoints ------------------------------------------------------------------------------------------------------------


def network(width=32):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(width * 4, 64),
        nn.Linear(64, 3),
    )


def calibrated(recipe, **arguments):
    torch.manual_seed(0)
    return quiet_calibrate(qnn.prepare(network(), recipe, **arguments), [torch.randn(4, 1, 4, 4)])


@pytest.mark.parametrize("saved, model", [("qat-w8a8", "qat-w4a8"), ("qat-w4a8", "qat-w8a8"), ("qat-w8a8", "fqt-psq4")])
@pytest.mark.parametrize("converted", [False, True])
def test_a_checkpoint_of_other_bits_is_refused(saved, model, converted, tmp_path):
    path = tmp_path / "model.safetensors"
    source, target = calibrated(saved), calibrated(model)
    if converted:
        source, target = qnn.convert(source), qnn.convert(target)
    qnn.save_checkpoint(path, source)
    before = copy.deepcopy(target.state_dict())
    if model.startswith("fqt"):  # the same codes
        qnn.load_checkpoint(path, target)
        return
    with pytest.raises(
        ValueError, match="load_checkpoint: .*expected layer '0' with .*bits|expected layer '0' with weight int"
    ):
        qnn.load_checkpoint(path, target)
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_a_layer_left_float_in_the_file_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    qnn.save_checkpoint(path, calibrated("qat-w8a8-token", skip=["4"]))
    with pytest.raises(ValueError, match="expected layer '4' with weight int8 .*got a layer in floating point"):
        qnn.load_checkpoint(path, calibrated("qat-w8a8-token"))


def test_a_checkpoint_is_saved_under_the_recipe_of_its_model(tmp_path):
    path, model = tmp_path / "model.safetensors", calibrated("qat-w4a4")
    qnn.save_checkpoint(path, model, "qat-w4a4")
    with pytest.raises(ValueError, match="save_checkpoint: expected the recipe of the model's layers .*got 'qat-w8a8'"):
        qnn.save_checkpoint(path, calibrated("qat-w4a8"), "qat-w8a8")
    with pytest.raises(ValueError, match="save_checkpoint: expected no recipe for a float model, got 'qat-w8a8'"):
        qnn.save_checkpoint(path, network(), "qat-w8a8")
    assert qnn.read_checkpoint_info(path).recipe.name == "qat-w4a4"


@pytest.mark.parametrize(
    "recipe", ["qat-w8a8", "qat-w4a4", "qat-w8a8-token", "ptq-w4a8", "int8-static", "int8-training"]
)
@pytest.mark.parametrize("converted", [False, True])
def test_from_checkpoint_rebuilds_the_model(recipe, converted, tmp_path):
    path, x = tmp_path / "model.safetensors", torch.randn(4, 1, 4, 4)
    model = calibrated(
        recipe,
        skip=["5"],
        overrides={"4": {"weight": {"bits": 8, "granularity": "per_tensor"}}} if "training" not in recipe else {},
    )
    model.eval()
    expected = model(x)
    if converted:
        model = qnn.convert(model)
        expected = model(x)
    qnn.save_checkpoint(path, model)
    info = qnn.read_checkpoint_info(path)
    assert (info.recipe.name, info.converted) == (recipe, converted)
    assert set(info.layers) == ({"4"} if recipe.startswith("int8") else {"0", "4"})
    torch.manual_seed(9)
    again = qnn.from_checkpoint(path, network())
    assert not again.training and type(again[5]) is nn.Linear
    assert torch.equal(again(x), expected)


def test_from_checkpoint_of_a_float_and_of_a_fixed_point_model(tmp_path):
    path, x = tmp_path / "model.safetensors", torch.rand(4, 1, 4, 4)
    model = network()
    model(x)
    qnn.save_checkpoint(path, model)
    assert torch.equal(qnn.from_checkpoint(path, network())(x), model.eval()(x))
    with pytest.raises(ValueError, match="already|quantized|converted"):
        qnn.from_checkpoint(path, qnn.convert(calibrated("qat-w8a8")))
    prepared = qnn.calibrate(qnn.prepare(model, "f8net"), [x]).eval()
    qnn.save_checkpoint(path, prepared)
    assert torch.equal(qnn.from_checkpoint(path, network())(x), prepared(x))


def test_read_checkpoint_info_refuses_what_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="read_checkpoint_info"):
        qnn.read_checkpoint_info(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        qnn.read_checkpoint_info(tmp_path / "bad")
    assert quantrain.nn.CheckpointInfo(None, False).layers == {}


# ---- saying so --------------------------------------------------------------------------------------------------------------


def test_prepare_names_its_new_parameters_and_warns_of_an_older_optimizer():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"prepare: 6 new parameters \(0.weight_fake_quant.scale, .*in no optimizer"):
        qnn.prepare(model, "qat-w4a4")
    names = model.quantization_summary.new_parameters
    assert set(names) == {name for name, _ in model.named_parameters() if name.endswith("scale")}
    optimizer.add_param_group({"params": [model.get_parameter(name) for name in names]})
    other = network()
    torch.optim.SGD(other.parameters(), lr=0.1)  # gone
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qnn.prepare(other, "qat-w8a8")
        qnn.prepare(network(), "qat-w4a4")
    assert other.quantization_summary.new_parameters == ()


def test_preparing_converting_and_calibrating_twice_say_so():
    model = qnn.prepare(network(), "qat-w8a8-token", skip=["5"])
    with pytest.warns(UserWarning, match="2 layers are quantized already"):
        qnn.prepare(model, "qat-w8a8-token")
    with pytest.raises(ValueError, match="3 layers that are quantized already"):
        qnn.prepare(model, "qat-w8a8-token")
    qnn.convert(model)
    with pytest.raises(ValueError, match="convert: .*converted already"):
        qnn.convert(model)


@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w4a4"])
def test_conversion_refuses_a_weight_that_is_not_finite(recipe):
    model = calibrated(recipe)
    with torch.no_grad():
        model[4].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="expected"):
        qnn.convert(model)


# ---- several ranks ----------------------------------------------------------------------------------------------------------


def _rank(rank, folder, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    found = []
    for how in ("calibrated", "first batch", "zeros first"):
        model = qnn.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "qat-w4a4")
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(7)) * (1 + 4 * rank)
        if how == "calibrated":
            qnn.calibrate(model, [x])
        elif how == "zeros first":
            quiet_calibrate(model, [torch.zeros(8, 4)])
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(x).sum().backward()
        found.append({name: value.clone() for name, value in model.state_dict().items()})
    results[rank] = found
    torch.distributed.destroy_process_group()


def test_first_ranges_agree_between_ranks(tmp_path):
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_rank, args=(str(tmp_path), results), nprocs=2)
        first, second = results[0], results[1]
    for a, b in zip(first, second, strict=True):
        for name in a:
            assert torch.equal(a[name], b[name]), name
    alone = qnn.FakeQuantize(qnn.as_recipe("qat-w4a4").edge().input)
    alone(torch.randn(8, 4, generator=torch.Generator().manual_seed(7)))
    for state in first:  # the widest range is that of the other rank, whose batch is 5 times as large
        assert state["0.input_fake_quant.scale"] > 3 * alone.scale


def test_an_addition_of_codes_converts_to_what_the_cpp_tests_compare_with():
    from safetensors.torch import load_file
    from samples.fixed_point_add import FOLDER, Adding, images

    model = qnn.from_checkpoint(FOLDER / "fixed_point_add.safetensors", Adding())
    expected = load_file(FOLDER / "fixed_point_add_network.safetensors")
    _, tensors = qnn.fixed_point_program(model)
    assert all(torch.equal(expected[name], value) for name, value in tensors.items())
    with torch.no_grad():
        assert torch.equal(model(images()), qnn.convert(model)(images()))
