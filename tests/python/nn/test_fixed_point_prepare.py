"""prepare, calibrate and the integer graph under the fixed-point recipes, on whole networks."""

import copy
import json
import pickle

import pytest
import torch
from samples.fixed_point_models import Plain, ResNet, assert_integer_exact, mobilenet_v1, prepared, train_steps, trained
from torch import nn
from torch.nn import functional

import quantrain
import quantrain.nn as qnn
from quantrain.finetune.data import DEBIAN_FOLDER, load_image_data
from quantrain.finetune.models import resnet20
from quantrain.nn.fixed_point.prepare import layers_of

BUILDERS = {
    "resnet-mean": ResNet,
    "resnet-option-a": lambda: ResNet(option_a=True, ending="functional"),
    "resnet-view": lambda: ResNet(ending="view"),
    "resnet-module": lambda: ResNet(ending="module"),
    "resnet-avg": lambda: ResNet(ending="avg"),
    "mobilenet-v1": mobilenet_v1,
    "plain": Plain,
    "resnet20": lambda: resnet20(5, 3),
}


def per_channel():
    return qnn.changed_recipe(quantrain.Recipe.from_name("f8net"), {"weight": {"granularity": "per_channel"}})


@pytest.mark.parametrize("recipe", ["f8net", "f8net-tiny", "per_channel"])
@pytest.mark.parametrize("name", BUILDERS)
def test_every_node_is_exact(name, recipe):
    model, images = prepared(BUILDERS[name], per_channel() if recipe == "per_channel" else recipe)
    assert_integer_exact(model, images)
    losses = train_steps(model, images)
    assert all(loss < 20 for loss in losses)
    assert_integer_exact(model, torch.randn_like(images))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_torchvision_networks(name):
    models = pytest.importorskip("torchvision.models")
    model, images = prepared(lambda: getattr(models, name)(num_classes=5), size=32)
    train_steps(model, images, steps=1)
    graph, exact = assert_integer_exact(model, images)
    products = [node for node in graph["nodes"] if node["op"] in ("conv2d", "linear")]
    assert len(products) == {"resnet18": 21, "resnet50": 54, "mobilenet_v2": 53}[name]
    assert not any(node["op"] == "add" for node in graph["nodes"])


def test_names_are_the_float_models():
    model, _ = trained(ResNet)
    parameters = dict(model.named_parameters())
    result = qnn.prepare(model, "f8net")
    kept = [p for name, p in result.named_parameters() if not name.endswith(".alpha")]
    assert {id(p) for p in kept} == {id(p) for p in parameters.values()}
    assert result.get_parameter("layer2.0.downsample.0.bn.weight") is parameters["layer2.0.downsample.1.weight"]
    assert result.get_parameter("layer1.0.conv2.weight") is parameters["layer1.0.conv2.weight"]
    assert {name for name, _ in result.named_parameters() if name.endswith("alpha")} == {
        "conv1.activation.alpha",
        "layer1.0.conv1.activation.alpha",
        "layer1.1.conv1.activation.alpha",
        "layer2.0.conv1.activation.alpha",
        "layer2.0.conv2.activation.alpha",
        "layer2.1.conv1.activation.alpha",
    }
    assert result.training and not qnn.prepare(trained(ResNet)[0].eval(), "f8net").training


def test_not_inplace_leaves_the_model_alone():
    model, images = trained(ResNet)
    model.eval()
    before = model(images)
    result = qnn.prepare(model, "f8net", inplace=False)
    train_steps(qnn.calibrate(result, [images]), images)
    assert torch.equal(model(images), before)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in result.parameters()}


def test_identity_chain_shares_one_activation():
    model, _ = trained(ResNet)
    layers = layers_of(qnn.prepare(model, "f8net"))
    shared = layers["conv1"].activation
    assert layers["layer1.0.conv2"].output_activation is shared and layers["layer1.1.conv2"].output_activation is shared
    assert layers["layer1.0.conv2"].activation is None
    assert layers["layer1.1.conv1"].input_activation is shared
    second = layers["layer2.0.conv2"]
    assert second.activation is not shared and second.activation is layers["layer2.1.conv2"].output_activation
    assert layers["layer2.0.downsample.0"].output_activation is second.activation
    assert not layers["layer2.0.downsample.0"].quantizes


def test_option_a_chain_runs_through_the_stages():
    layers = layers_of(qnn.prepare(resnet20(), "f8net"))
    assert all(
        layers[f"layer{i}.{j}.conv2"].output_activation is layers["conv1"].activation
        for i in (1, 2, 3)
        for j in (0, 1, 2)
    )


def test_linear_bottlenecks_are_signed_and_relu6_bounds_alpha():
    models = pytest.importorskip("torchvision.models")
    model = qnn.prepare(models.mobilenet_v2(num_classes=5), "f8net")
    layers = layers_of(model)
    assert layers["features.1.conv.1"].activation.signed
    assert not layers["features.0.0"].activation.signed
    assert layers["features.0.0"].activation.max_alpha == 6.0
    with torch.no_grad():
        layers["features.0.0"].activation.alpha.fill_(9.0)
    assert float(layers["features.0.0"].activation.level()) == 6.0


def test_deepcopy_pickle_and_checkpoint(tmp_path):
    model, images = prepared(ResNet)
    train_steps(model, images)
    expected = model.eval()(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), expected)
    qnn.save_checkpoint(tmp_path / "model.safetensors", model)
    fresh = qnn.prepare(trained(ResNet, seed=3)[0], "f8net").eval()
    metadata = qnn.load_checkpoint(tmp_path / "model.safetensors", fresh)
    assert quantrain.Recipe.from_json(metadata["recipe"]).name == "f8net"
    assert torch.equal(fresh(images), expected)
    assert qnn.fixed_point_program(fresh)[0] == qnn.fixed_point_program(model)[0]


def test_summary_shows_fraction_lengths():
    model, _ = prepared(ResNet)
    text = str(model.quantization_summary)
    assert "weight FL" in text and "layer2.0.downsample.0" in text and "int32" in text


def test_bytes_are_their_own_codes():
    model, _ = trained(ResNet)
    model = qnn.prepare(model, "f8net")
    images = torch.randint(0, 256, (4, 3, 16, 16)).float() / 255
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 0, 1
    qnn.calibrate(model, [images])
    assert torch.equal(qnn.simulated_codes(model, images)["input"], (images * 255).round().long())
    graph = json.loads(qnn.fixed_point_program(model)[0])
    assert graph["input"]["signed"] is False and graph["input"]["fraction_length"] == 8


def test_calibrated_model_is_near_the_float_model():
    model, images = trained(ResNet)
    with torch.no_grad():
        expected = model.eval()(images)
    result = qnn.calibrate(qnn.prepare(model, "f8net"), [images]).eval()
    error = (result(images) - expected).norm() / expected.norm()
    assert error < 0.2


def test_float_shortcut_of_relu_behind_max_pool():
    """ReLU and max pool commute, so conv -> pool -> ReLU is conv with ReLU -> pool."""
    model, images = prepared(Plain)
    graph, _ = assert_integer_exact(model, images)
    assert [node["op"] for node in graph["nodes"]] == [
        "conv2d",
        "max_pool2d",
        "conv2d",
        "max_pool2d",
        "flatten",
        "linear",
        "linear",
    ]


class Adds(nn.Module):
    """Additions that no convolution can hold: of two ReLUs, and of three tensors."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3 if i < 2 else 4, 4, 3, padding=1) for i in range(4))
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        y = functional.relu(self.a(x)) + functional.relu(self.b(x))
        y = functional.relu(y)
        y = functional.relu(self.c(y) + y)
        return self.fc(functional.relu(self.d(y) + y).mean((2, 3)))


def test_addition_of_codes():
    model, images = prepared(Adds)
    graph, _ = assert_integer_exact(model, images)
    assert [node["op"] for node in graph["nodes"]].count("add") == 1


class Wrong(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.odd = {
            "sigmoid": nn.Sigmoid(),
            "grouped": nn.Conv2d(4, 8, 3, groups=2),
            "dilated": nn.Conv2d(4, 4, 3, dilation=2),
            "reflect": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            "avg": nn.AvgPool2d(2, padding=1),
            "upsample": nn.Upsample(scale_factor=2),
            "norm": nn.GroupNorm(2, 4),
            "bn": nn.BatchNorm2d(4),
            "twice": nn.Conv2d(4, 4, 1),
            "transposed": nn.ConvTranspose2d(4, 4, 2),
        }.get(what, nn.Identity())
        self.fc = nn.Linear(8 if what == "grouped" else 4, 5)

    def forward(self, x):
        x = self.odd(self.stem(x))
        if self.what == "mul":
            x = x * 0.5
        if self.what == "twice":
            x = self.odd(x)
        if self.what == "slice":
            x = x[:, :, 1:]
        if self.what == "branch" and x.sum() > 0:
            x = x + 1
        if self.what == "softmax":
            return torch.softmax(self.fc(x.mean((2, 3))), 1)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("sigmoid", "'odd': Sigmoid has no integer form"),
        ("grouped", "'odd': expected groups of 1 or a depthwise convolution, got groups=2 of 4 channels"),
        ("dilated", "'odd': expected dilation 1"),
        ("reflect", "'odd': expected padding_mode 'zeros', got 'reflect'"),
        ("avg", "'odd': expected an average pool over the whole image"),
        ("upsample", "'odd': Upsample has no integer form"),
        ("norm", "'odd': GroupNorm has no integer form"),
        ("bn", "'odd': expected a batch norm that is the only user of a convolution"),
        ("transposed", "'odd': ConvTranspose2d has no integer form"),
        ("mul", "mul has no integer form"),
        ("softmax", "softmax has no integer form"),
        ("twice", "'odd': expected a layer that is called once, got a second call"),
        ("slice", "every k-th row and column"),
        ("branch", "torch.fx can trace"),
    ],
)
def test_refused_by_name_with_nothing_changed(what, message):
    model = Wrong(what)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"^prepare: ") as error:
        qnn.prepare(model, "f8net")
    assert message in str(error.value)
    assert dict(model.named_modules()) == before


def test_operation_inside_a_module_is_named_with_its_path():
    class Inner(nn.Module):
        def forward(self, x):
            return torch.sigmoid(x)

    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Sequential(Inner()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    with pytest.raises(ValueError, match=r"in '1\.0': sigmoid has no integer form"):
        qnn.prepare(model, "f8net")


def test_unsupported_options():
    model, _ = trained(ResNet)
    with pytest.raises(ValueError, match="expected no skip"):
        qnn.prepare(model, "f8net", skip=["fc"])
    with pytest.raises(ValueError, match="expected no overrides"):
        qnn.prepare(model, "f8net", overrides={"fc": "f8net-tiny"})
    result = qnn.prepare(model, "f8net")
    with pytest.raises(ValueError, match="quantized already"):
        qnn.prepare(result, "f8net")
    with pytest.raises(ValueError, match="has seen an image"):
        qnn.fixed_point_program(result)
    for layer in (qnn.QuantLinear, qnn.QuantConv2d):
        with pytest.raises(ValueError, match="expected a recipe without fixed_point"):
            layer(3, 4, **({"kernel_size": 3} if layer is qnn.QuantConv2d else {}), recipe="f8net")


def test_mixed_shortcut_is_refused():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)

        def forward(self, x):
            x = self.a(x)
            return self.fc(torch.relu(self.b(x) + x).mean((2, 3)))

    with pytest.raises(ValueError, match=r"'b': expected both sides of a shortcut .* got one without \('a'\)"):
        qnn.prepare(Mixed(), "f8net")


def test_overflow_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    result = qnn.calibrate(qnn.prepare(model, "f8net"), [torch.rand(2, 3, 8, 8)])
    with torch.no_grad():
        result.get_submodule("0").bias[1] = 1e9
    with pytest.raises(ValueError, match=r"convert: '0': expected accumulators below 2\^31, got .* in channel 1"):
        qnn.fixed_point_program(result)


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="no Fashion-MNIST")
def test_fashion_mnist_is_exact():
    data = load_image_data(DEBIAN_FOLDER).subset(256, 128)
    (images,), _ = next(data.test_batches(128))
    torch.manual_seed(0)
    model = resnet20(10, 1)
    with torch.no_grad():
        for _ in range(3):
            model(images)
    model = qnn.calibrate(qnn.prepare(model, "f8net"), [images])
    train_steps(model, images[:32], steps=3)
    assert_integer_exact(model, images)


@pytest.mark.parametrize("name", ["resnet-mean", "resnet-option-a", "mobilenet-v1", "plain"])
def test_converted_network_is_the_simulation(name):
    """Integers in C++ at every node, and the logits, are those of the prepared model's evaluation."""
    model, images = prepared(BUILDERS[name])
    train_steps(model, images)
    converted = qnn.convert(model)
    assert isinstance(converted, qnn.FixedPointNetwork) and model.training
    expected = qnn.simulated_codes(model, images)
    got = converted.network.forward_all(converted.network.quantize_input(images))
    for node, values in got.items():
        assert torch.equal(values.long(), expected[node]), node
    with torch.no_grad():
        assert torch.equal(converted(images), model.eval()(images))
    assert {row["accumulator"] for row in qnn.audit(converted).rows if row["op"] in ("conv2d", "linear")} == {"int32"}
    with pytest.raises(ValueError, match="audit: expected a model that convert made"):
        qnn.audit(model)
