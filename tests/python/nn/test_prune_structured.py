"""Channels removed: what torch.fx shows can be cut, the same function where they did nothing, optimizers that go on."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantrain.nn as qnn
import quantrain.prune as prune
from quantrain.finetune.models import resnet20
from quantrain.optim import AdamW8bit
from quantrain.pruning import unpack_mask


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].shape == tensor.shape and torch.equal(after[name], tensor), name


def trained(model, *sizes):
    """With statistics in its batch norms, in evaluation mode."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(module.weight, 1, 0.2)
                nn.init.normal_(module.bias, 0, 0.2)
                nn.init.normal_(module.running_mean, 0, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def close(found, expected):
    found, expected = found.detach(), expected.detach()
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


# ---- models ----------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions and a shortcut, which a convolution widens where asked to, as torchvision's."""

    def __init__(self, inputs, planes, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inputs != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += identity
        return F.relu(out)


class SmallResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Residual(8, 8), Residual(8, 8))
        self.layer2 = nn.Sequential(Residual(8, 16, 2), Residual(16, 16))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.layer2(self.layer1(F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)))
        return self.fc(torch.flatten(self.pool(x), 1))


class Inverted(nn.Module):
    """MobileNet's block: expansion, depthwise convolution, squeeze and excitation, projection, a shortcut."""

    def __init__(self, inputs, outputs, stride, multiplier=1):
        super().__init__()
        hidden = 4 * inputs
        self.expand = nn.Sequential(nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish())
        self.depth = nn.Conv2d(hidden, hidden * multiplier, 3, stride, 1, groups=hidden)
        self.norm = nn.BatchNorm2d(hidden * multiplier)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(hidden * multiplier, 4, 1), nn.ReLU())
        self.excite = nn.Sequential(nn.Conv2d(4, hidden * multiplier, 1), nn.Hardsigmoid())
        self.project = nn.Sequential(nn.Conv2d(hidden * multiplier, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x):
        out = self.norm(self.depth(self.expand(x)))
        out = self.project(out * self.excite(self.squeeze(out)))
        return x + out if self.shortcut else out


def mobilenet(multiplier=1):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        Inverted(8, 8, 1, multiplier),
        Inverted(8, 12, 2, multiplier),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(12, 5),
    )


class Dense(nn.Module):
    """Concatenation, a convolution read twice, one dimension flattened."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.norm, self.c = nn.BatchNorm2d(10), nn.Conv2d(10, 6, 3)
        self.up, self.act = nn.ConvTranspose2d(6, 5, 2, stride=2), nn.PReLU(5)
        self.head = nn.Linear(5 * 12 * 12, 7)

    def forward(self, x):
        a = torch.tanh(self.a(x))
        b = F.leaky_relu(self.b(a))
        both = self.norm(torch.cat([a, b], 1))
        up = self.act(self.up(self.c(both).sigmoid()))
        return self.head(up.reshape(up.size(0), -1))


def audio():
    return nn.Sequential(
        nn.Conv1d(4, 8, 5, stride=2), nn.BatchNorm1d(8), nn.GELU(), nn.Conv1d(8, 6, 3), nn.Flatten(), nn.Linear(36, 3)
    )


def mlp():
    return nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 12), nn.GELU(), nn.Linear(12, 4))


# model, input, what can be cut, what cannot and why
CHANNELS = {
    "resnet20": (
        lambda: resnet20(in_channels=3),
        (2, 3, 16, 16),
        [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in (0, 1, 2)],
        {"conv1": "'pad' in 'layer2.0' pads them with others", "linear": "they are the model's output"},
    ),
    "residual": (
        SmallResNet,
        (2, 3, 16, 16),
        [
            *("conv1, layer1.0.conv2, layer1.1.conv2", "layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1"),
            *("layer2.0.downsample.0, layer2.0.conv2, layer2.1.conv2", "layer2.1.conv1"),
        ],
        {"fc": "they are the model's output"},
    ),
    "mobilenet": (
        mobilenet,
        (2, 3, 16, 16),
        [
            *("0, 3.project.0", "3.expand.0, 3.excite.0", "3.squeeze.1", "4.expand.0, 4.excite.0", "4.squeeze.1"),
            "4.project.0",
        ],
        {"8": "they are the model's output"},
    ),
    "multiplied": (
        lambda: mobilenet(2),
        (2, 3, 16, 16),
        ["0, 3.project.0", "3.squeeze.1", "4.squeeze.1", "4.project.0"],
        {"3.expand.0": "lie otherwise", "3.excite.0": "lie otherwise"},
    ),
    "dense": (Dense, (2, 3, 8, 8), ["a", "b", "c", "up"], {"head": "they are the model's output"}),
    "audio": (audio, (2, 4, 19), ["0", "3"], {"5": "they are the model's output"}),
    "mlp": (mlp, (3, 16), ["3"], {"0": "LayerNorm '1' reads them", "5": "they are the model's output"}),
}


@pytest.mark.parametrize("kind", list(CHANNELS))
def test_what_can_be_cut(kind):
    build, size, free, fixed = CHANNELS[kind]
    model, x = trained(build()), torch.randn(*size)
    parameters = list(model.parameters())
    elements = sum(p.numel() for p in parameters)
    removal = prune.remove_channels(model, 0.5, batch=x)
    assert sorted(row["layer"] for row in removal.rows) == sorted(free)
    assert all(row["after"] == row["before"] - round(row["before"] / 2) for row in removal.rows)
    for name, reason in fixed.items():
        assert reason in removal.left[name], removal.left[name]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert sum(p.numel() for p in parameters) < 0.8 * elements
    assert torch.isfinite(model(x)).all()
    model.train()
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in parameters)


@pytest.mark.parametrize("kind", list(CHANNELS))
def test_channels_that_nobody_reads_change_nothing(kind):
    build, size, free, _ = CHANNELS[kind]
    model, x = trained(build()), torch.randn(*size)
    whole = copy.deepcopy(model)
    removal = prune.remove_channels(copy.deepcopy(model), 0.3, batch=x)
    gone = {}
    for row in removal.rows:
        kept = set(removal.kept[row["layer"]].tolist())
        gone[row["layer"].split(", ")[0]] = [unit for unit in range(row["before"]) if unit not in kept]
    with torch.no_grad():  # every producer's rows, and entries of batch norms: the channel is zero where f(0) is
        for names in removal.kept:
            units = gone[names.split(", ")[0]]
            for name in names.split(", "):
                layer = whole.get_submodule(name)
                weight = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
                weight[units] = 0
    smaller = copy.deepcopy(whole)
    prune.remove_channels(smaller, gone, batch=x)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in whole.parameters())
    assert smaller(x).shape == whole(x).shape


def test_zeroed_channels_go_without_a_change():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)
    )
    model, x = trained(model), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for channel in (1, 5):
            model[0].weight[channel], model[0].bias[channel] = 0, 0
            model[1].bias[channel], model[1].running_mean[channel] = 0, 0
        model[3].weight[[0, 2, 3]], model[3].bias[[0, 2, 3]] = 0, 0
    expected = model(x)
    removal = prune.remove_channels(model, 0.25, batch=x, layers=["0"])
    assert removal.kept["0"].tolist() == [0, 2, 3, 4, 6, 7]
    close(model(x), expected)
    removal = prune.remove_channels(model, {"3": [3, 0, 2]}, batch=x)
    assert removal.kept["3"].tolist() == [1, 4, 5]
    close(model(x), expected)
    assert (model[0].out_channels, model[1].num_features, model[3].in_channels, model[6].in_features) == (6, 6, 6, 48)
    assert model[6].weight.shape == (4, 48)


def test_a_residual_stream_is_cut_in_all_its_producers():
    model, x = trained(SmallResNet()), torch.randn(2, 3, 16, 16)
    removal = prune.remove_channels(model, {"layer1.1.conv2": [0, 3]}, batch=x)
    assert removal.rows[0]["layer"] == "conv1, layer1.0.conv2, layer1.1.conv2"
    assert [model.get_submodule(name).out_channels for name in ("conv1", "layer1.0.conv2", "layer1.1.conv2")] == [6] * 3
    assert [model.get_submodule(name).in_channels for name in ("layer1.0.conv1", "layer2.0.downsample.0")] == [6, 6]
    assert model.layer1[0].bn2.running_mean.shape == (6,) and model.layer2[0].conv1.in_channels == 6


def test_a_stream_that_a_padded_shortcut_fixes_is_refused_by_name():
    model = resnet20(in_channels=3)
    before = state_of(model)
    with pytest.raises(
        ValueError, match=r"got those of 'layer2.1.conv2': .*the addition in 'layer2.0'.*joins them"
    ) as told:
        prune.remove_channels(model, 0.5, batch=torch.randn(2, 3, 16, 16), layers=["layer2.1.conv2"])
    assert "'layer2.0.conv2'" in str(told.value)
    with pytest.raises(
        ValueError, match=r"those of 'conv1': 'pad' in 'layer2.0' pads them.*the addition in 'layer1.0' joins"
    ):
        prune.remove_channels(model, {"conv1": [0]}, batch=torch.randn(2, 3, 16, 16))
    assert_same(model, before)


def test_skipping_one_producer_leaves_what_is_joined_with_it():
    model, x = SmallResNet().eval(), torch.randn(2, 3, 16, 16)
    removal = prune.remove_channels(model, 0.5, batch=x, skip=["layer1.0.conv2", "layer2.*"])
    assert sorted(removal.kept) == ["layer1.0.conv1", "layer1.1.conv1"]


def test_as_many_stay_as_the_multiple_divides():
    model, x = SmallResNet().eval(), torch.randn(2, 3, 16, 16)
    removal = prune.remove_channels(model, 0.4, batch=x, multiple=4)
    assert {(row["before"], row["after"]) for row in removal.rows} == {(16, 12)}  # of 8 all stay


@pytest.mark.parametrize("weighted", [False, True])
def test_the_least_channels_go(weighted):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(20, 6)
    scores = model[0].weight.norm(dim=1)
    if weighted:
        scores = model[2].weight.norm(dim=0) * F.relu(model[0](x)).norm(dim=0)
    removal = prune.remove_channels(model, 0.5, **({"batches": [x[:9], x[9:]]} if weighted else {"batch": x}))
    assert removal.kept["0"].tolist() == sorted(scores.argsort(descending=True)[:4].tolist())


def test_scores_of_convolutions_by_what_is_read():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2, padding=1), nn.Flatten())
    x = torch.randn(3, 3, 9, 9)
    columns = F.unfold(F.relu(model[0](x)), 3, 1, 1, 2).transpose(1, 2).flatten(0, 1).norm(dim=0)
    scores = (model[2].weight.flatten(1) * columns).square().sum(0).view(6, 9).sum(1)
    removal = prune.remove_channels(model, 0.5, batches=[x])
    assert removal.kept["0"].tolist() == sorted(scores.argsort(descending=True)[:3].tolist())


def test_masks_gradients_and_memory_formats_are_cut_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4))
    model = model.to(memory_format=torch.channels_last)
    prune.magnitude(model, 0.5)
    x = torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    kept, grad = unpack_mask(model[2].weight_mask, (6, 8, 3, 3)), model[2].weight.grad.clone()
    removal = prune.remove_channels(model, {"0": [0, 7], "2": [1]}, batch=x)
    rows, columns = removal.kept["2"], removal.kept["0"]
    assert torch.equal(unpack_mask(model[2].weight_mask, (5, 6, 3, 3)), kept[rows][:, columns])
    assert torch.equal(model[2].weight.grad, grad[rows][:, columns])
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert prune.masks_of(model).keys() == {"0.weight", "2.weight", "4.weight"}


def test_an_output_that_is_still_alive_does_not_disturb_training():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    kept = model(x).sum()
    prune.remove_channels(model, 0.5, batch=x)
    model(x).sum().backward()
    assert model[0].weight.grad.shape == (4, 4) and kept.requires_grad


class Hidden(nn.Module):
    """Reads a layer's weight behind the tracer's back."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x))))) + self.a.weight.sum()


def test_a_change_that_is_wrong_is_taken_back_and_named():
    model, x = Hidden(), torch.randn(5, 6)
    before, sizes = state_of(model), (model.a.out_features, model.b.in_features)
    with pytest.raises(ValueError, match=r"without some channels of 'a' to give what it gives .* a difference of"):
        prune.remove_channels(model, 0.5, batch=x)
    assert_same(model, before)
    assert (model.a.out_features, model.b.in_features) == sizes
    removal = prune.remove_channels(model, 0.5, batch=x, skip=["a"])
    assert list(removal.kept) == ["b"]


class Auxiliary(nn.Module):
    """A second head, in training alone."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.second = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.body(x))
        return (self.head(x), self.second(x)) if self.training else self.head(x)


def test_what_training_alone_reads_is_cut_too():
    model, x = Auxiliary(), torch.randn(4, 6)
    prune.remove_channels(model, 0.5, batch=x)
    assert model.second.in_features == 4 and model.training
    assert [y.shape for y in model(x)] == [(4, 3)] * 2


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.pool, self.b = nn.Conv2d(3, 8, 3), nn.MaxPool2d(2, return_indices=True), nn.Linear(8, 3)
        self.c = nn.Linear(8, 4)

    def forward(self, scale=1.0, image=None, *, bias=None):
        pooled, _ = self.pool(self.a(image))
        x = F.relu(self.c(pooled.mean((2, 3)))) * scale
        return self.b(x.repeat(1, 2))


def test_inputs_by_name_and_operations_that_are_not_known():
    model, x = Named(), torch.randn(2, 3, 9, 9)
    with pytest.raises(ValueError, match=r"got none: 'a' \(MaxPool2d 'pool' reads them\), .*'repeat' reads them"):
        prune.remove_channels(model, 0.5, batch={"image": x})


class Reshaped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 2)

    def forward(self, x):
        return self.fc(self.conv(x).view(-1, 288))


def test_sizes_that_forward_holds_as_numbers_are_refused():
    model = Reshaped()
    before = state_of(model)
    with pytest.raises(
        ValueError, match=r"remove_channels: .*channels of 'conv'.* got (RuntimeError: shape|\d+ numbers)"
    ):
        prune.remove_channels(model, 0.5, batch=torch.randn(1, 3, 8, 8))
    assert_same(model, before)


def test_a_fixed_point_network_of_fewer_channels():
    torch.manual_seed(0)
    model, x = trained(resnet20(in_channels=3)), torch.rand(8, 3, 16, 16)
    prune.remove_channels(model, 0.5, batch=x)
    exact = model(x).detach()
    prepared = qnn.prepare(model, "f8net")
    assert prepared.get_submodule("layer3.2.conv1").out_channels == 32
    qnn.calibrate(prepared, [x])
    network = qnn.convert(prepared)
    found = network(x)
    assert found.shape == exact.shape
    assert float((found - exact).norm() / exact.norm()) < 0.5


@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w4a4"])
def test_a_smaller_network_is_prepared_and_converted(recipe):
    model, x = trained(SmallResNet()), torch.randn(8, 3, 16, 16)
    prune.remove_channels(model, 0.25, batch=x)
    prepared = qnn.prepare(model, recipe)
    qnn.calibrate(prepared, [x])
    expected = prepared.eval()(x)
    torch.testing.assert_close(qnn.convert(prepared)(x), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(channels=1.0), r"the share to remove in \[0, 1\), got 1.0"),
        (dict(channels=0.0), "at least one of channels to remove, got none"),
        (dict(channels={}), "got no name"),
        (dict(channels={"0": [8]}), r"some of 0 to 7 of '0', not all, got \[8\]"),
        (dict(channels={"0": range(8)}), "not all, got"),
        (dict(channels={"7": [0]}), r"names of layers that make channels, got '7' \(there are '0'"),
        (dict(channels=0.5, layers=["9"]), "every name of layers to be a layer's that makes channels, got '9'"),
        (dict(channels=0.5, layers=["4"]), "got those of '4': they are the model's output"),
        (dict(channels=0.5, skip=["*"]), "channels that can be cut, got none"),
        (dict(channels=0.5, batch=None), "expected batch, one input to check the change on, or batches, got none"),
        (dict(channels={"0": [1]}, layers=["0"]), "layers with a share, got them with channels by name"),
        (dict(channels=0.5, multiple=0), "multiple of at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    before = state_of(model)
    with pytest.raises(ValueError, match=f"remove_channels: .*{message}"):
        prune.remove_channels(model, **{"batch": torch.randn(2, 3, 8, 8), **arguments})
    assert_same(model, before)


def test_models_that_cannot_be_cut():
    x = torch.randn(2, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(TypeError, match="remove_channels: expected model to be a torch.nn.Module, got int"):
        prune.remove_channels(1, 0.5, batch=x)
    with pytest.raises(TypeError, match="a share in .* or a mapping of names, got str"):
        prune.remove_channels(model, "half", batch=x)
    prepared = qnn.prepare(copy.deepcopy(model), "qat-w8a8")
    with pytest.raises(ValueError, match="expected a float model, got '0' as QuantLinear: remove before prepare"):
        prune.remove_channels(prepared, 0.5, batch=x)
    adapted = qnn.prepare(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8)), "qlora")
    with pytest.raises(ValueError, match="expected a float model, got '0' as LoraLinear"):
        prune.remove_channels(adapted, 0.5, batch=torch.randn(2, 64))
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="expected finite weights, got NaN or Inf in '0.weight'"):
        prune.remove_channels(model, 0.5, batch=x)

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="expected a model that torch.fx can trace, got TraceError"):
        prune.remove_channels(nn.Sequential(nn.Linear(8, 8), Branching()), 0.5, batch=x)


# ---- optimizers ------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw8bit": lambda p: AdamW8bit(p, lr=1e-2, min_8bit_size=0),
}


def steps(model, optimizer, x, count=2):
    for _ in range(count):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_with_the_state_of_what_stays(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    x = torch.randn(7, 6)
    optimizer = OPTIMIZERS[kind](model.parameters())
    with torch.no_grad():
        model[2].weight[:, ::2] = 0  # what goes has no say in what the others' gradients are
    mask = torch.zeros(3, 32).index_fill_(1, torch.arange(1, 32, 2), 1)
    model[2].weight.register_hook(lambda grad: grad * mask if grad.shape == mask.shape else grad)
    steps(model, optimizer, x, 3)
    other = copy.deepcopy(model)
    second = OPTIMIZERS[kind](other.parameters())
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other[2].weight.register_hook(lambda grad: grad * mask)
    removal = prune.remove_channels(model, {"0": list(range(0, 32, 2))}, batch=x)
    prune.cut_optimizer(optimizer, removal)
    steps(model, optimizer, x, 2)
    steps(other, second, x, 2)
    kept = removal.kept["0"]
    tolerance = 2e-2 if kind == "adamw8bit" else 1e-5
    torch.testing.assert_close(model[0].weight, other[0].weight[kept], rtol=0, atol=tolerance)
    torch.testing.assert_close(model[2].weight, other[2].weight[:, kept], rtol=0, atol=tolerance)
    assert optimizer.state[model[0].weight].get("exp_avg", torch.zeros(16, 6)).shape == (16, 6)


def test_masks_and_kept_pruned_go_on_after_a_removal():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    x = torch.randn(7, 6)
    prune.magnitude(model, 0.5)
    for kind in ("sgd", "adamw8bit"):
        optimizer = OPTIMIZERS[kind](model.parameters())
        prune.keep_pruned(optimizer, model)
        steps(model, optimizer, x)
        prune.cut_optimizer(optimizer, prune.remove_channels(model, 0.25, batch=x))
        steps(model, optimizer, x)
        for index in (0, 2):
            gone = ~unpack_mask(model[index].weight_mask, model[index].weight.shape)
            assert bool((model[index].weight[gone] == 0).all())


def test_cut_optimizer_refuses():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(7, 6)
    optimizer = torch.optim.AdamW(model.parameters())
    steps(model, optimizer, x)
    removal = prune.remove_channels(model, 0.5, batch=x)
    with pytest.raises(TypeError, match="cut_optimizer: expected a torch.optim.Optimizer, got list"):
        prune.cut_optimizer([], removal)
    with pytest.raises(TypeError, match="cut_optimizer: expected what a removal returned, got dict"):
        prune.cut_optimizer(optimizer, {})
    prune.cut_optimizer(optimizer, removal)
    with pytest.raises(
        ValueError, match=r"the state 'exp_avg' to be of its parameter's shape before, \[8, 6\], got \[4, 6\]"
    ):
        prune.cut_optimizer(optimizer, removal)
    steps(model, optimizer, x)
