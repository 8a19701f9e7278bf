"""prepare and convert on whole models: what is swapped, folded, kept tied, left float, refused."""

import copy
import pickle
import warnings

import pytest
import torch
from samples.layers import RECIPES
from torch import nn

import quantrain
import quantrain.nn as qnn
from quantrain import QuantSpec, Recipe


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Block(4), Block(4))
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        x = self.layer1(torch.relu(self.bn1(self.conv1(x))))
        return self.linear(x.mean((2, 3)))


class Language(nn.Module):
    """An embedding tied to the head, a layer used twice, data-dependent control flow that torch.fx cannot trace."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.mix = nn.Linear(8, 8)
        self.again = self.mix
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, index):
        x = self.embed(index)
        if index.shape[1] > 2 and bool(x.sum() < 1e9):
            x = torch.relu(self.mix(x))
        return self.head(self.again(x))


class Shapely(nn.Module):
    """torch.fx fails on len() of a proxy, torch.export does not."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.fc(y.sum((2, 3))) / len(range(len(x)))


def images(n=4):
    return torch.randn(n, 1, 6, 6)


def types(model):
    return {name: type(module).__name__ for name, module in model.named_modules()}


def test_a_residual_network_is_swapped_folded_and_keeps_its_parameters():
    model = Net()
    before = {id(parameter) for parameter in model.parameters()}
    result = quantrain.prepare(model, "qat-w8a8")
    assert result is model
    kinds = types(model)
    for conv, bn in [("conv1", "bn1"), ("layer1.0.conv1", "layer1.0.bn1"), ("layer1.1.conv2", "layer1.1.bn2")]:
        assert (
            kinds[conv] == "QuantConvBn2d" and kinds[bn] == "FoldedBatchNorm2d" and kinds[conv + ".bn"] == "BatchNorm2d"
        )
    assert kinds["linear"] == "QuantLinear"
    assert {id(parameter) for parameter in model.parameters()} == before
    assert model.quantization_summary.left_float == {}
    assert [row["layer"] for row in model.quantization_summary.rows][::5] == ["conv1", "linear"]
    assert "layer1.0.conv1.input_fake_quant.observer.min_val" in model.state_dict()


def test_prepared_without_rounding_is_the_float_model():
    torch.manual_seed(0)
    model, x = Net(), images()
    for mode in (True, False):
        prepared = quantrain.prepare(model.train(mode), "qat-w8a8", inplace=False)
        assert types(model)["conv1"] == "Conv2d" and prepared.training == mode
        qnn.calibrate(prepared, [x])
        qnn.enable_fake_quant(prepared, False)
        torch.testing.assert_close(prepared(x), copy.deepcopy(model)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_train_convert_and_pickle_a_network(recipe):
    torch.manual_seed(1)
    model = quantrain.prepare(Net(), recipe)
    qnn.calibrate(model, [images() for _ in range(3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(images(8)).square().mean().backward()
        optimizer.step()
    model.eval()
    x = images()
    expected = model(x)
    converted = quantrain.convert(model, inplace=False)
    assert types(model)["linear"] == "QuantLinear" and types(converted)["linear"] == "QuantizedLinear"
    assert types(converted)["layer1.0.conv1"] == "QuantizedConv2d"
    for twin in (converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert torch.equal(twin(x), expected)
    assert quantrain.convert(model) is model and torch.equal(model(x), expected)


def test_qat_learns_what_a_float_model_learns():
    torch.manual_seed(2)
    x = torch.randn(128, 1, 6, 6)
    target = (x.mean((1, 2, 3)) > 0).long()
    model = Net()
    for stage in ("float32", "qat-w4a8"):
        if stage != "float32":
            quantrain.prepare(model, stage)
            qnn.calibrate(model, [x])
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
    quantrain.convert(model.eval())
    assert (model(x).argmax(1) == target).float().mean() > 0.95


def test_tied_and_shared_modules():
    model = Language()
    index = torch.randint(0, 13, (2, 5))
    with warnings.catch_warnings():  # no batch norm to lose: nothing to warn of
        warnings.simplefilter("error")
        quantrain.prepare(model, "qat-w8a8-token")
    assert model.mix is model.again and isinstance(model.mix, qnn.QuantLinear)
    assert model.head.weight is model.embed.weight
    assert isinstance(model.embed, qnn.QuantEmbedding)
    assert [row["layer"] for row in model.quantization_summary.rows] == ["embed", "mix", "head"]
    model(index).sum().backward()
    assert model.embed.weight.grad.isfinite().all()
    size = quantrain.model_size(model)
    assert size.total["elements"] == 13 * 8 + 8 * 8 + 8
    model.eval()
    expected = model(index)
    assert torch.equal(quantrain.convert(model)(index), expected)
    assert model.mix is model.again


def test_a_model_that_does_not_trace_keeps_its_batch_norm_and_says_so():
    model = Shapely()
    with pytest.warns(UserWarning, match="could not be traced, batch norms stay float.*example_inputs"):
        quantrain.prepare(model, "qat-w8a8")
    assert types(model)["conv"] == "QuantConv2d" and types(model)["bn"] == "BatchNorm2d"
    assert model.quantization_summary.left_float == {"bn": "model not traced"}
    assert "left float: bn (model not traced)" in str(model.quantization_summary)


def test_example_inputs_trace_what_fx_cannot():
    torch.manual_seed(3)
    model = Shapely()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        quantrain.prepare(model, "qat-w4a4", example_inputs=(images(),))
    assert types(model)["conv"] == "QuantConvBn2d" and types(model)["bn"] == "FoldedBatchNorm2d"
    assert [row["weight"][:4] for row in model.quantization_summary.rows] == ["int8", "int8"]
    qnn.calibrate(model, [images()])
    model.eval()
    x = images()
    expected = model(x)
    assert torch.equal(quantrain.convert(model)(x), expected)


def test_a_convolution_with_a_second_user_is_not_folded():
    class TwoUsers(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) + y

    class TwoCalls(TwoUsers):
        def forward(self, x):
            return self.bn(self.conv(self.conv(x)))

    for kind, channels in ((TwoUsers, 1), (TwoCalls, 2)):
        model = kind()
        model.conv = nn.Conv2d(channels, 2, 3)
        quantrain.prepare(model, "qat-w8a8")
        assert type(model.conv) is qnn.QuantConv2d and type(model.bn) is nn.BatchNorm2d
        assert model.quantization_summary.left_float == {"bn": "not the only user of a quantized convolution"}


def test_batch_norms_without_statistics_or_affine_stay_float():
    for arguments in ({"track_running_stats": False}, {"affine": False}):
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, **arguments))
        quantrain.prepare(model, "qat-w8a8")
        assert type(model[0]) is qnn.QuantConv2d and type(model[1]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="affine=False"):
        qnn.QuantConvBn2d.from_float_pair(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, affine=False), "qat-w8a8")


def test_a_frozen_batch_norm_and_hooks_survive():
    calls = []
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 2))
    model[1].eval()
    model[3].register_forward_hook(lambda module, args, y: calls.append(type(module).__name__))
    quantrain.prepare(model, "qat-w8a8")
    assert model[0].training and not model[0].bn.training and not model[1].training
    model(images())
    assert calls == ["QuantLinear"]


def test_overrides_and_skip():
    overrides = {
        "layer1.*": {"weight": {"bits": 4}},
        "layer1.1.conv2": {"weight": {"granularity": "per_tensor"}, "input": None},
        "*.0.conv2": "ptq-w4a8",
    }
    model = quantrain.prepare(Net(), "qat-w8a8", overrides=overrides, skip=["conv1", "layer1.1.bn1"])
    bits = {row["layer"]: row["weight"] for row in model.quantization_summary.rows}
    assert bits["layer1.0.conv1"].startswith("int4 per_channel") and bits["linear"].startswith("int8")
    assert bits["layer1.1.conv2"].startswith("int8 per_tensor")
    assert model.layer1[1].conv2.input_fake_quant is None
    assert model.layer1[0].conv2.weight_fake_quant.spec == Recipe.from_name("ptq-w4a8").weight
    assert type(model.conv1) is nn.Conv2d and type(model.bn1) is nn.BatchNorm2d
    assert type(model.layer1[1].conv1) is qnn.QuantConv2d and type(model.layer1[1].bn1) is nn.BatchNorm2d
    left = model.quantization_summary.left_float
    assert left["conv1"] == "skip" and left["layer1.1.bn1"] == "skip" and "bn1" in left


def test_edge_bits_follow_the_order_of_calls_and_yield_to_overrides():
    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.middle, self.last, self.first = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(self.middle(self.first(x)))

    model = quantrain.prepare(Shuffled(), "qat-w4a4", overrides={"last": {"weight": {"bits": 2}}})
    bits = {n: (m.weight_fake_quant.spec.bits, m.input_fake_quant.spec.bits) for n, m in model.named_children()}
    assert bits == {"first": (8, 8), "middle": (4, 4), "last": (2, 8)}
    model = quantrain.prepare(Shuffled(), "qat-w4a4", skip=["first"])
    assert [m.weight_fake_quant.spec.bits for m in (model.last, model.middle)] == [8, 8]


@pytest.mark.parametrize("argument", ["overrides", "skip"])
def test_a_pattern_that_names_no_layer_raises_and_changes_nothing(argument):
    model = Net()
    value = {"layer9.*": "qat-w8a8"} if argument == "overrides" else ["layer9.*"]
    with pytest.raises(ValueError, match=rf"pattern of {argument} .*got 'layer9\.\*'.*'conv1', 'layer1.0.conv1'"):
        quantrain.prepare(model, "qat-w8a8", **{argument: value})
    assert types(model) == types(Net())


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: quantrain.prepare(nn.Sequential(nn.ReLU()), "qat-w8a8"), ValueError, "got none .*'0' .ReLU."),
        (lambda: quantrain.prepare(Net(), "qat-w7a7"), ValueError, "got 'qat-w7a7'"),
        (lambda: quantrain.prepare(Net(), 8), TypeError, "got int"),
        (lambda: quantrain.prepare(Net(), "qat-w8a8", skip=["*"]), ValueError, "at least one layer"),
        (lambda: quantrain.prepare(Net(), "qat-w8a8", overrides={"linear": {"wieght": 1}}), ValueError, "'wieght'"),
        (
            lambda: quantrain.prepare(Net(), "qat-w8a8", overrides={"linear": {"weight": {"bit": 1}}}),
            ValueError,
            "'bit'",
        ),
        (
            lambda: quantrain.prepare(Net(), "qat-w8a8", overrides={"linear": {"weight": {"bits": 99}}}),
            ValueError,
            "99",
        ),
        (
            lambda: quantrain.prepare(quantrain.prepare(Net(), "qat-w8a8"), "qat-w8a8"),
            ValueError,
            "6 layers that are quantized already",
        ),
        (lambda: quantrain.convert(Net()), ValueError, "prepared model"),
        (lambda: quantrain.prepare(Net().forward, "qat-w8a8"), TypeError, "^prepare: expected model .*got method"),
        (lambda: quantrain.prepare("qat-w8a8", Net()), TypeError, "^prepare: expected model .*got str"),
        (lambda: quantrain.convert("model"), TypeError, "^convert: expected model .*got str"),
        (lambda: quantrain.prepare(Net(), "qat-w8a8", skip="conv1"), TypeError, "skip to be a list .*'conv1'"),
        (
            lambda: quantrain.convert(quantrain.prepare(Net(), "qat-w8a8"), skip="conv1"),
            TypeError,
            "skip to be a list .*'conv1'",
        ),
    ],
)
def test_bad_input_raises(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_failed_convert_changes_nothing():
    model = quantrain.prepare(Net(), "qat-w8a8")
    before = types(model)
    with pytest.raises(ValueError, match="observed ranges at 'conv1.input_fake_quant'"):
        quantrain.convert(model)
    qnn.calibrate(model, [images()])
    model.linear = qnn.QuantLinear(4, 3, recipe=Recipe(weight=QuantSpec(bits=16, observer="dynamic")))
    with pytest.raises(ValueError, match="layer 'linear'.*at most 8 bits, got 16"):
        quantrain.convert(model)
    assert types(model)["conv1"] == before["conv1"] == "QuantConvBn2d"


def test_a_lone_layer_comes_back_as_a_new_module():
    layer = nn.Linear(4, 2)
    prepared = quantrain.prepare(layer, "qat-w8a8-token")
    assert isinstance(prepared, qnn.QuantLinear) and prepared.weight is layer.weight
    assert isinstance(quantrain.convert(prepared), qnn.QuantizedLinear)


def test_activations_alone_and_embeddings_under_such_a_recipe():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    quantrain.prepare(model, Recipe(input=QuantSpec(symmetric=False, observer="moving_average")))
    assert type(model[0]) is nn.Embedding and type(model[1]) is qnn.QuantLinear
    assert model.quantization_summary.left_float == {"0": "nothing to quantize under its recipe"}


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_transformer_fast_path_does_not_go_past_the_quantized_layers(norm_first):
    torch.manual_seed(4)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    quantrain.prepare(model, "qat-w8a8-token", overrides={"*": {"weight": {"bits": 2}}})
    left = model.quantization_summary.left_float
    assert left["layers.0.self_attn.out_proj"] == "NonDynamicallyQuantizableLinear is a subclass"
    assert left["layers.0.self_attn"] == "MultiheadAttention has no quantized twin"
    x = torch.randn(2, 5, 8)
    expected = model.train()(x)  # no dropout: training computes the same
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)
        fake = model(x)
        torch.testing.assert_close(quantrain.convert(model)(x), fake)


def test_changed_recipe_leaves_its_base_alone():
    base = qnn.as_recipe("qat-w8a8")
    changed = qnn.changed_recipe(base, {"output": {"bits": 4}, "weight": QuantSpec(bits=2), "training": False})
    assert (changed.output.bits, changed.weight.bits, changed.training) == (4, 2, False)
    assert base == Recipe.from_name("qat-w8a8")
    with pytest.raises(ValueError, match="'to_json'"):
        qnn.changed_recipe(base, {"to_json": 1})


def test_a_converted_model_is_not_calibrated_again():
    model = quantrain.prepare(nn.Sequential(nn.Linear(4, 2)), "qat-w8a8")
    batches = [torch.randn(8, 4)]
    quantrain.convert(quantrain.calibrate(model, batches).eval())
    with pytest.raises(ValueError, match="calibrate: expected a prepared model, got one that is converted already"):
        quantrain.calibrate(model, batches)
