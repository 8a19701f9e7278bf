"""Layers, recipes and networks whose gradients are quantized: fully quantized training from prepare to convert."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from samples.fake_quant import assert_same, on_each_device
from samples.unbiased import largest_z
from torch import nn

import quantrain
import quantrain.nn as qnn
from quantrain import GradientQuantSpec, GradientSpec, QuantSpec, Recipe

HARDWARE = ["fqt-8", "fqt-ptq8", "fqt-psq5", "fqt-bhq4"]
PAPER = ["fqt-ptq5-paper", "fqt-psq4-paper", "fqt-bhq8-paper"]


class Net(nn.Module):
    """Convolutions with and without a batch norm, grouped and strided, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, groups=2)
        self.linear = nn.Linear(8 * 2 * 2, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(F.relu(self.conv2(x)).flatten(1))


def images(n=12, seed=0):
    return torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def labels(n=12):
    return torch.arange(n) % 5


def prepared(recipe, device="cpu", seed=0):
    torch.manual_seed(seed)
    model = quantrain.prepare(Net(), recipe)
    qnn.calibrate(model, [images()])
    qnn.enable_observer(model, False)  # every pass rounds alike
    model.conv1.bn.momentum = 0.0  # the running statistics stay: every forward pass gives the same
    return model.to(device).train()


def loss_of(model, device="cpu"):
    return F.cross_entropy(model(images().to(device)), labels().to(device))


def layer_gradients(layer, x, grad_output, seed):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    torch.manual_seed(seed)
    y.backward(grad_output)
    return x.grad, layer.weight.grad, layer.bias.grad


# ---- recipes ----------------------------------------------------------------------------------------------------------------


def test_names():
    names = Recipe.names()
    for quantizer in ("ptq", "psq", "bhq"):
        for bits in (8, 5, 4):
            assert {f"fqt-{quantizer}{bits}", f"fqt-{quantizer}{bits}-paper"} <= set(names)
    assert "fqt-8" in names
    with pytest.raises(ValueError, match="expected name to be one of .*fqt-bhq5.*, got 'fqt-bhq9'"):
        Recipe.from_name("fqt-bhq9")


@pytest.mark.parametrize("name", [*HARDWARE, *PAPER, "fqt-bhq6", "fqt-psq2-paper"])
def test_recipes_survive_json_pickle_and_copies(name):
    recipe = Recipe.from_name(name)
    assert recipe.name == name
    for twin in (Recipe.from_json(recipe.to_json()), copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe))):
        assert twin == recipe and twin.scheme.grad_input == recipe.scheme.grad_input
    assert recipe.weight == Recipe.from_name("qat-w8a8").weight
    other = copy.deepcopy(recipe)
    other.scheme.grad_weight.bits = 7
    assert other != recipe and recipe.scheme.grad_weight.bits == 8
    assert repr(recipe.scheme.grad_weight) in repr(recipe)


def test_a_recipe_of_an_older_checkpoint_has_no_gradient_specs():
    recipe = Recipe.from_json('{"name": "old", "weight": {"bits": 8}}')
    assert recipe.scheme is None


def test_modes():
    """hardware: a scale that an integer product takes out of its sum; paper: the columns over the samples."""
    arguments = qnn.gradient_arguments(Recipe.from_name("fqt-bhq5"), convolution=False)
    assert (arguments["grad_input"], arguments["grad_input_bits"], arguments["grad_input_rows"]) == (
        "householder",
        5,
        "token",
    )
    assert (arguments["grad_weight"], arguments["grad_weight_rows"]) == ("per_channel", "token")
    arguments = qnn.gradient_arguments(Recipe.from_name("fqt-bhq5"), convolution=True)
    assert (arguments["grad_input_rows"], arguments["grad_weight"]) == ("sample", "per_tensor")
    for convolution in (False, True):
        arguments = qnn.gradient_arguments(Recipe.from_name("fqt-psq5-paper"), convolution=convolution)
        assert (arguments["grad_input"], arguments["grad_weight"]) == ("per_sample", "per_channel")
        assert arguments["grad_input_rows"] == arguments["grad_weight_rows"] == "sample"
    assert qnn.gradient_arguments(Recipe.from_name("qat-w8a8"), convolution=True) is None


# ---- layers -----------------------------------------------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("recipe", [*HARDWARE, *PAPER])
def test_linear_uses_the_recipe(recipe, device):
    torch.manual_seed(0)
    layer = qnn.QuantLinear(6, 5, recipe=recipe).to(device)
    x = torch.randn(3, 4, 6, device=device)
    qnn.calibrate(layer, [x])
    g = torch.randn(3, 4, 5, device=device)
    grad_x, grad_w, grad_b = layer_gradients(layer, x, g, seed=3)
    spec = Recipe.from_name(recipe).scheme
    rows = "sample" if "paper" in recipe else "token"
    torch.manual_seed(3)
    first = quantrain.quantize_gradient(g, spec.grad_input.bits, spec.grad_input.quantizer, rows=rows)
    second = quantrain.quantize_gradient(g, 8, "per_tensor" if recipe == "fqt-ptq5-paper" else "per_channel", rows=rows)
    weight, input = layer.weight_fake_quant(layer.weight), layer.input_fake_quant(x)
    inside = torch.autograd.functional.vjp(layer.input_fake_quant, x, torch.ones_like(x))[1]  # straight-through mask
    torch.testing.assert_close(grad_x, inside * (first @ weight))
    torch.testing.assert_close(grad_w, second.flatten(0, 1).t() @ input.flatten(0, 1))
    torch.testing.assert_close(grad_b, g.sum((0, 1)))


@on_each_device
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_conv2d_uses_the_recipe(padding_mode, device):
    torch.manual_seed(0)
    layer = qnn.QuantConv2d(4, 6, 3, padding=1, groups=2, padding_mode=padding_mode, recipe="fqt-bhq4").to(device)
    x = torch.randn(8, 4, 6, 6, device=device)
    qnn.calibrate(layer, [x])
    g = torch.randn(8, 6, 6, 6, device=device)
    mine = layer_gradients(layer, x, g, seed=3)
    torch.manual_seed(3)
    first, second = quantrain.quantize_gradient(g, 4, "householder"), quantrain.quantize_gradient(g, 8, "per_tensor")
    layer.enable_gradient_quant(False)
    torch.testing.assert_close(mine[0], layer_gradients(layer, x, first, seed=0)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine[1], layer_gradients(layer, x, second, seed=0)[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine[2], g.sum((0, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", [*HARDWARE, *PAPER])
def test_the_forward_pass_and_the_converted_model_are_those_of_qat(recipe):
    mine, qat = prepared(recipe), prepared("qat-w8a8")
    assert_same(mine(images()), qat(images()))
    mine.eval(), qat.eval()
    assert_same(mine(images()), qat(images()))
    assert_same(quantrain.convert(mine)(images()), quantrain.convert(qat)(images()))


def test_switched_off_the_gradients_are_those_of_qat():
    mine, qat = prepared("fqt-bhq4"), prepared("qat-w8a8")
    qnn.enable_gradient_quant(mine, False)
    loss_of(mine).backward(), loss_of(qat).backward()
    for one, other in zip(mine.parameters(), qat.parameters(), strict=True):
        assert_same(one.grad, other.grad)
    qnn.enable_gradient_quant(mine)
    mine.zero_grad()
    loss_of(mine).backward()
    assert not torch.equal(mine.conv1.weight.grad, qat.conv1.weight.grad)


def test_embedding_ignores_gradient_specs():
    table = qnn.QuantEmbedding(10, 4, recipe="fqt-bhq4")
    state = torch.get_rng_state()
    table(torch.tensor([1, 2])).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_recipe_of_gradients_alone_keeps_the_forward_pass_float():
    recipe = Recipe(
        name="gradients",
        scheme=GradientQuantSpec(grad_input=GradientSpec(bits=4), grad_weight=GradientSpec(quantizer="auto")),
    )
    layer, x = qnn.QuantLinear(6, 5, recipe=recipe), torch.randn(8, 6)
    assert not list(layer.children())
    assert_same(layer(x), F.linear(x, layer.weight, layer.bias))
    layer(x).square().sum().backward()
    assert layer.weight.grad.isfinite().all()
    with pytest.raises(ValueError, match="weight spec"):
        quantrain.convert(nn.Sequential(layer))


def test_an_empty_batch():
    layer = qnn.QuantLinear(6, 5, recipe="fqt-bhq4")
    qnn.calibrate(layer, [torch.randn(8, 6)])
    layer.eval()
    layer(torch.empty(0, 6)).sum().backward()
    assert layer.weight.grad.count_nonzero() == 0


def test_a_learned_scale_trains_beside_quantized_gradients():
    recipe = qnn.changed_recipe(
        Recipe.from_name("qat-w4a4"),
        {"scheme": {"kind": "gradient_quant", "grad_input": {"bits": 5, "quantizer": "householder"}}},
    )
    model = prepared(recipe)
    loss_of(model).backward()
    for scale in (model.linear.weight_fake_quant.scale, model.linear.input_fake_quant.scale):
        assert scale.grad is not None and scale.grad.isfinite().all()


# ---- prepare ----------------------------------------------------------------------------------------------------------------


def test_the_summary_shows_gradient_columns_where_there_are_some():
    summary = prepared("fqt-bhq5").quantization_summary
    rows = {row["layer"]: row for row in summary.rows}
    assert rows["linear"]["grad_input"] == "5 bits householder (token)"
    assert rows["linear"]["grad_weight"] == "8 bits per_channel (token)"
    assert rows["conv1"]["grad_input"] == "5 bits householder (sample)"
    assert rows["conv1"]["grad_weight"] == "8 bits per_tensor"
    header = str(summary).splitlines()[1]
    assert header.split()[-2:] == ["grad_input", "grad_weight"]
    assert "grad" not in str(prepared("qat-w8a8").quantization_summary)
    with_embedding = quantrain.prepare(nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 2)), "fqt-8").quantization_summary
    assert with_embedding.rows[0]["grad_input"] is None


def test_overrides_change_single_fields():
    overrides = {
        "conv*": {"scheme": {"grad_input": {"bits": 8}}},
        "conv1": {"scheme": {"grad_input": None, "grad_weight": {"quantizer": "per_sample", "preserve_zero": True}}},
        "linear": {"scheme": {"grad_weight": GradientSpec(bits=6)}},
    }
    torch.manual_seed(0)
    model = quantrain.prepare(Net(), "fqt-bhq4", overrides=overrides)
    assert model.conv1.recipe.scheme.grad_input is None
    assert model.conv1.recipe.scheme.grad_weight == GradientSpec(
        quantizer="per_sample", rows="auto", preserve_zero=True
    )
    assert model.conv2.recipe.scheme.grad_input == GradientSpec(bits=8, quantizer="householder")
    assert model.linear.recipe.scheme.grad_input.bits == 4 and model.linear.recipe.scheme.grad_weight.bits == 6
    assert model.quantization_summary.rows[0]["grad_weight"] == "8 bits per_sample (sample), zero kept"
    loss_of(model).backward()

    added = quantrain.prepare(
        Net(), "qat-w8a8", overrides={"linear": {"scheme": {"kind": "gradient_quant", "grad_input": {"bits": 5}}}}
    )
    assert added.linear.recipe.scheme.grad_input == GradientSpec(bits=5) and added.conv1.recipe.scheme is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": {"grad_input": {"bits": 1}}}, "GradientSpec: expected bits in 2 to 8, got 1"),
        ({"scheme": {"grad_input": {"observer": "mse"}}}, "only fields of a GradientSpec, got 'observer'"),
        ({"scheme": {"grad_inputs": None}}, r"expected a field of GradientQuantSpec \(grad_input, grad_weight\), got 'grad_inputs'"),
        ({"scheme": {"kind": "int9"}}, "expected scheme to be one of int8, gradient_quant, fixed_point, four_bit, ptq, got 'int9'"),
        ({"gradient": None}, "expected a field of Recipe"),
        ({"scheme": {"grad_weight": {"quantizer": "bhq"}}}, "expected quantizer to be one of auto, per_tensor"),
    ],
)  # fmt: skip
def test_bad_overrides_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        quantrain.prepare(Net(), "fqt-bhq4", overrides={"linear": change})


def test_a_wrong_kind_of_spec_is_refused():
    with pytest.raises(TypeError):
        Recipe(weight=QuantSpec(), grad_input=QuantSpec())


# ---- networks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["fqt-ptq5", "fqt-psq4", "fqt-bhq4", "fqt-bhq3-paper"])
def test_the_mean_gradient_of_a_network_is_the_qat_gradient(recipe):
    """Every layer's backward pass is linear in the gradient, so unbiased quantizers leave the mean of all gradients alone
    (z-test along random directions of each parameter; false alarm 1e-6 a parameter)."""
    model = prepared(recipe)
    parameters = list(model.parameters())
    qnn.enable_gradient_quant(model, False)
    exact = torch.autograd.grad(loss_of(model), parameters)
    qnn.enable_gradient_quant(model)
    loss = loss_of(model)
    torch.manual_seed(11)
    draws = [torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2000)]
    for place, (name, _) in enumerate(model.named_parameters()):
        gradient = torch.stack([draw[place] for draw in draws])
        if name == "linear.bias":  # the loss's own gradient, summed: nothing was drawn before
            torch.testing.assert_close(gradient[-1], exact[place])
            continue
        z, bound = largest_z(gradient, exact[place])
        assert z < bound, f"{name}: z = {z:.2f}"
        error = gradient.double().std(0).norm() / math.sqrt(len(draws))
        assert 0 < error < 0.05 * exact[place].norm(), f"{name}: a bias of some per cent would pass"


def test_the_test_of_the_mean_finds_a_small_bias():
    g = torch.Generator().manual_seed(0)
    exact = torch.randn(50, generator=g)
    draws = exact + torch.randn(2000, 50, generator=g)
    assert largest_z(draws, exact)[0] < largest_z(draws, exact)[1]
    assert largest_z(draws, 0.7 * exact)[0] > largest_z(draws, exact)[1]


@pytest.mark.parametrize("recipe", ["fqt-ptq5", "fqt-psq4", "fqt-bhq4", "fqt-psq5-paper"])
def test_a_loss_scale_of_a_power_of_two_changes_no_draw(recipe):
    model = prepared(recipe)
    parameters = list(model.parameters())
    results = []
    for scale in (1.0, 2.0**16, 2.0**-8):
        loss = loss_of(model) * scale
        torch.manual_seed(4)
        results.append([gradient / scale for gradient in torch.autograd.grad(loss, parameters)])
    for scaled in results[1:]:
        for one, other in zip(results[0], scaled, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("recipe", ["qat-w8a8", "fqt-8", "fqt-bhq4", "fqt-psq4-paper"])
def test_a_network_learns(recipe):
    torch.manual_seed(2)
    x = torch.randn(128, 2, 6, 6)
    target = (x.mean((1, 2, 3)) > 0).long()
    model = quantrain.prepare(Net(), recipe)
    qnn.calibrate(model, [x])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(120):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    quantrain.convert(model.eval())
    assert (model(x).argmax(1) == target).float().mean() > 0.9


@on_each_device
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_reach_the_parameters(bad, device):
    """Of the loss's gradient, through every layer: a scaler sees it in each parameter's gradient."""
    model = prepared("fqt-bhq4", device)
    y = model(images().to(device))
    g = torch.ones_like(y)
    g[3, 1] = bad
    y.backward(g)
    for name, parameter in model.named_parameters():
        assert not parameter.grad.isfinite().all(), name


def test_autocast_bfloat16():
    model = prepared("fqt-bhq5")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(images())
        assert y.dtype == torch.bfloat16
        loss = F.cross_entropy(y.float(), labels())
    loss.backward()
    qat = prepared("qat-w8a8")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(qat(images()), y)
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


def scaled_step(model, optimizer, scaler, device, dtype, poison=False):
    optimizer.zero_grad()
    with torch.autocast(device, dtype=dtype):
        loss = loss_of(model, device)
    scaler.scale(loss * (math.inf if poison else 1.0)).backward()
    norm = scaler.clip_grad_norm_(optimizer, 1.0)
    scaler.step(optimizer)
    scaler.update()
    return norm


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), pytest.param("cuda", torch.float16, marks=pytest.mark.cuda)])  # fmt: skip
@pytest.mark.parametrize("recipe", ["fqt-8", "fqt-bhq4"])
def test_a_scaler_sees_overflow_through_quantized_gradients(recipe, device, dtype):
    model = prepared(recipe, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = quantrain.amp.GradScaler(device, init_scale=2.0**10)
    before = copy.deepcopy(model.state_dict())
    assert scaled_step(model, optimizer, scaler, device, dtype).isfinite()
    assert scaler.get_scale() == 2.0**10
    after = copy.deepcopy(model.state_dict())
    assert not torch.equal(before["linear.weight"], after["linear.weight"])
    scaled_step(model, optimizer, scaler, device, dtype, poison=True)
    assert scaler.get_scale() == 2.0**9
    for name in ("conv1.weight", "conv2.weight", "linear.weight"):
        assert torch.equal(model.state_dict()[name], after[name])  # the step was skipped
    assert scaled_step(model, optimizer, scaler, device, dtype).isfinite()


@on_each_device
@pytest.mark.parametrize(("build", "backend"), [
    (lambda: (qnn.QuantLinear(6, 5, recipe="fqt-bhq5"), torch.randn(16, 6)), "inductor"),
    (lambda: (qnn.QuantConv2d(4, 6, 3, padding="same", recipe="fqt-psq4"), torch.randn(8, 4, 6, 6)), "aot_eager"),
], ids=["linear", "conv"])  # fmt: skip
def test_a_layer_compiles_to_the_same_step(build, backend, device):
    torch.manual_seed(0)
    layer, x = build()
    layer, x = layer.to(device), x.to(device)
    qnn.calibrate(layer, [x])
    layer.train()
    twin = copy.deepcopy(layer)
    torch.compiler.reset()
    results = []
    for module, run in ((layer, layer), (twin, torch.compile(twin, fullgraph=True, backend=backend))):
        batch = x.clone().requires_grad_()
        y = run(batch)
        torch.manual_seed(1)
        y.cos().sum().backward()
        results.append([y.detach(), batch.grad, module.weight.grad])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-3)


def test_a_folded_convolution_compiles_without_a_break():
    torch.manual_seed(0)
    layer, x = qnn.QuantConvBn2d(4, 6, 3, padding=1, recipe="fqt-bhq4-paper"), torch.randn(8, 4, 6, 6)
    qnn.calibrate(layer, [x])
    layer.train()
    twin = copy.deepcopy(layer)
    torch.compiler.reset()
    y = torch.compile(twin, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, layer(x))
    y.cos().sum().backward()
    assert twin.weight.grad.isfinite().all() and twin.weight.grad.count_nonzero() > 0


def test_checkpoints_carry_the_recipe(tmp_path):
    pytest.importorskip("safetensors")
    model = prepared("fqt-bhq6")
    quantrain.save_checkpoint(tmp_path / "model.safetensors", model, Recipe.from_name("fqt-bhq6"))
    other = prepared("fqt-bhq6", seed=1)
    metadata = quantrain.load_checkpoint(tmp_path / "model.safetensors", other)
    assert Recipe.from_json(metadata["recipe"]) == Recipe.from_name("fqt-bhq6")
    assert_same(other(images()), model(images()))
