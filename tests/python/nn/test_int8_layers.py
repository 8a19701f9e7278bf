"""Int8Linear and what prepare and convert make of integer products: recipes, the weight's kept codes, training, checkpoints, DDP."""

import copy
import math
import os
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from samples.fake_quant import assert_same, on_each_device
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import quantrain
import quantrain.nn as qnn
from quantrain import Int8Spec, QuantSpec, Recipe

ops = torch.ops.quantrain


class Net(nn.Module):
    """Tokens to classes: an embedding, two hidden layers with a residual, a head."""

    def __init__(self, width=32):
        super().__init__()
        self.table = nn.Embedding(50, width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, tokens):
        x = self.table(tokens)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


def net(recipe="int8-training", seed=0, **keywords):
    torch.manual_seed(seed)
    return quantrain.prepare(Net(), recipe, **keywords)


def tokens(rows=16, seed=0):
    return torch.randint(0, 50, (rows, 6), generator=torch.Generator().manual_seed(seed))


def layer(k=24, o=40, recipe="int8-training", device="cpu", seed=0):
    torch.manual_seed(seed)
    return qnn.Int8Linear(k, o, recipe=recipe).to(device)


def simulated(name="int8-training"):
    return qnn.changed_recipe(Recipe.from_name(name), {"scheme": {"simulate": True}})


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


# ---- recipes and prepare ------------------------------------------------------------------------------------------------------


def test_the_named_recipes():
    training, static = Recipe.from_name("int8-training"), Recipe.from_name("int8-static")
    assert training.scheme == Int8Spec(output="auto", grad_input="auto", grad_weight="auto", weight_scheme="auto")
    assert training.training and training.scheme.training and not static.scheme.training
    assert training.scheme.integer_products and static.scheme.integer_products
    assert training.input.granularity == "per_token" and static.input.observer == "moving_average"
    assert not static.training and training.linear_only and static.linear_only
    for recipe in (training, static):
        assert Recipe.from_json(recipe.to_json()) == recipe
    assert "int8" not in Recipe.from_name("qat-w8a8").to_json()  # a file of before reads as the same recipe
    spec = Int8Spec(grad_weight="none", weight_scheme="fold")
    assert Int8Spec.from_json(spec.to_json()) == spec == copy.deepcopy(spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": {"output": "int4"}}, "output to be one of int8, none, auto, got 'int4'"),
        ({"scheme": {"weight_scheme": "row"}}, "weight_scheme to be one of auto, fold, columns"),
        ({"scheme": {"rows": 1}}, "expected a field of Int8Spec"),
        ({"weight": None}, "a spec for weight with int8, got none"),
        ({"weight": {"bits": 4}}, "weight of 8 bits, symmetric, with int8, got 4 bits, symmetric"),
        ({"input": {"symmetric": False}}, "input of 8 bits, symmetric, with int8, got 8 bits, affine"),
        (
            {"input": {"granularity": "per_tensor", "observer": "min_max"}},
            "input per_token and dynamic with int8 in training",
        ),
        ({"weight": {"granularity": "per_tensor"}}, "weight per_channel and dynamic with int8 in training"),
        (
            {"scheme": {"training": False}, "weight": {"granularity": "per_group"}},
            "weight per_channel or per_tensor with int8",
        ),
        ({"scheme": {"training": False}, "input": {"granularity": "per_tensor"}}, "per_tensor and observed, with int8"),
        ({"edge_bits": 4}, "edge_bits of 0 or 8 with int8, got 4"),
    ],
)
def test_recipes_that_integers_cannot_serve_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        qnn.changed_recipe(Recipe.from_name("int8-training"), change)


def test_prepare_swaps_linear_layers_only():
    model = Net()
    weight, names = model.up.weight, list(model.state_dict())
    quantrain.prepare(model, "int8-training", skip=["head"])
    assert type(model.up) is type(model.down) is qnn.Int8Linear
    assert type(model.head) is nn.Linear and type(model.table) is nn.Embedding
    assert model.up.weight is weight and list(model.state_dict()) == names
    summary = model.quantization_summary
    assert summary.left_float["table"] == "recipe int8-training is for Linear layers"
    assert summary.left_float["head"] == "skip"
    assert {row["grad_weight"] for row in summary.rows} == {"int8 or float (auto)"}
    assert "Int8Linear" in str(summary)
    mixed = quantrain.prepare(
        Net(), "int8-training", overrides={"table": "qat-w8a8", "up": {"scheme": {"grad_weight": "none"}}}
    )
    assert type(mixed.table) is qnn.QuantEmbedding
    assert [row["grad_weight"] for row in mixed.quantization_summary.rows if row["layer"] == "up"] == [None]
    with pytest.raises(ValueError, match="at least one layer to quantize under 'int8-training', got none"):
        quantrain.prepare(nn.Sequential(nn.Conv2d(1, 2, 3)), "int8-training")


def test_layers_refuse_recipes_they_cannot_run():
    for build in (lambda r: qnn.QuantConv2d(3, 4, 3, recipe=r), lambda r: qnn.QuantEmbedding(5, 4, recipe=r)):
        for recipe in ("int8-training", "int8-static"):
            with pytest.raises(ValueError, match=f"without integer products, which Linear layers have, got '{recipe}'"):
                build(recipe)
    with pytest.raises(ValueError, match="QuantLinear: expected a recipe without int8"):
        qnn.QuantLinear(4, 2, recipe="int8-training")
    with pytest.raises(ValueError, match="Int8Linear: expected a recipe with int8, got 'int8-static'"):
        qnn.Int8Linear(4, 2, recipe="int8-static")


# ---- the layer ---------------------------------------------------------------------------------------------------------------


@on_each_device
def test_forward_is_int8_linear(device):
    spec = {"output": "int8", "grad_input": "int8", "grad_weight": "none", "weight_scheme": "columns"}
    recipe = qnn.changed_recipe(Recipe.from_name("int8-training"), {"scheme": spec})
    module, x = layer(recipe=recipe, device=device), torch.randn(33, 24, device=device, requires_grad=True)
    y, expected = module(x), quantrain.int8_linear(x, module.weight, module.bias, **spec)
    assert_same(y.detach(), expected.detach())
    for result in (y, expected):
        torch.manual_seed(2)
        result.sin().sum().backward(inputs=[x, module.weight, module.bias])
    assert torch.equal(module.bias.grad, 2 * (module.bias.grad / 2))
    reference = [t.grad / 2 for t in (x, module.weight)]
    x.grad = module.weight.grad = None
    torch.manual_seed(2)
    module(x).sin().sum().backward()
    for found, other in zip((x.grad, module.weight.grad), reference, strict=True):
        torch.testing.assert_close(found, other)


def test_switches():
    module, x = layer(), torch.randn(33, 24, requires_grad=True)
    exact = F.linear(x, module.weight, module.bias)
    qnn.enable_gradient_quant(module, False)
    y = module(x)
    assert not torch.equal(y, exact)
    for mine, other in zip(*(torch.autograd.grad(t.sum(), (x, module.weight)) for t in (y, exact)), strict=True):
        torch.testing.assert_close(mine, other)
    qnn.enable_gradient_quant(module)
    qnn.enable_fake_quant(module, False)
    assert_same(module(x), F.linear(x, module.weight, module.bias))
    qnn.enable_fake_quant(module)
    assert_same(module(x), y)


def test_a_simulated_recipe_takes_the_same_codes():
    results = []
    for recipe in ("int8-training", simulated()):
        model, found = net(recipe), []
        loss = F.cross_entropy(model(tokens()), tokens()[:, 0] % 4)
        torch.manual_seed(3)
        found = [loss, *torch.autograd.grad(loss, list(model.parameters()))]
        results.append(found)
    assert results[0][0] != 0
    for integer, other in zip(*results, strict=True):
        torch.testing.assert_close(
            integer, other, rtol=2e-3, atol=2e-5
        )  # a code at a tie may fall either way downstream


def test_tables():
    model = net()
    errors = {row["layer"]: row for row in quantrain.quantization_error(model, tokens(64)).rows}
    assert errors["up"]["type"] == "Int8Linear"
    for row in errors.values():
        assert 30 < row["weight_sqnr_db"] < 60 and 30 < row["input_sqnr_db"] < 60 and row["output_sqnr_db"] > 20
        assert row["input_saturation_pct"] == 0
    held = qnn.model_size(model).total
    quantrain.convert(model)
    assert qnn.model_size(model).total["bytes"] == held["converted_bytes"] < held["bytes"]
    assert quantrain.quantization_error(model, tokens(64)).rows[0]["input_sqnr_db"] > 30


def test_the_gradient_probe_watches_int8_layers():
    model = net()
    with qnn.GradientProbe(model, ["per_sample:8"], draws=4) as probe:
        F.cross_entropy(model(tokens()), tokens()[:, 0] % 4).backward()
        probe.end_batch()
    assert {row["layer"]: row["weight_variance"] for row in probe.rows} == dict.fromkeys(("up", "down", "head"))


# ---- gradient accumulation and the weight's kept codes -------------------------------------------------------------------------


def quantized_rows(run):
    with Calls() as calls:
        run()
    return calls.count["int8_quantize_rows"]


def test_kept_codes_are_made_once_a_step():
    module = layer()
    batches = torch.randn(4, 33, 24)
    plain = copy.deepcopy(module)
    qnn.enable_weight_cache(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    assert module.cache_weight and module._kept is None

    def accumulate(model):
        torch.manual_seed(1)
        for x in batches:
            model(x).square().mean().backward()

    assert quantized_rows(lambda: accumulate(plain)) == 8
    assert quantized_rows(lambda: accumulate(module)) == 5  # four inputs, one weight
    for mine, other in zip(module.parameters(), plain.parameters(), strict=True):
        assert_same(mine.grad, other.grad)
    optimizer.step()
    assert quantized_rows(lambda: accumulate(module)) == 5
    assert_same(module(batches[0]), quantrain.int8_linear(batches[0], module.weight, module.bias))


CHANGES = {
    "optimizer step": lambda m: torch.optim.SGD([m.weight], lr=0.5).step(),
    "fused AdamW": lambda m: torch.optim.AdamW([m.weight], lr=0.5, fused=True).step(),
    "in place": lambda m: m.weight.detach().mul_(2),
    "load_state_dict": lambda m: m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}),
    "load_state_dict, assigned": lambda m: m.load_state_dict(
        {k: 2 * v.clone() for k, v in m.state_dict().items()}, assign=True
    ),
    "to another type": lambda m: m.to(torch.bfloat16),
    "to another type and back": lambda m: m.to(torch.bfloat16).to(torch.float32),
    "another parameter": lambda m: setattr(m, "weight", nn.Parameter(2 * m.weight.detach())),
    "cleared": lambda m: qnn.enable_weight_cache(m),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_kept_codes_follow_the_weight(change):
    module, x = layer(), torch.randn(33, 24)
    qnn.enable_weight_cache(module)
    module(x).sum().backward()
    assert quantized_rows(lambda: module(x)) == 1
    change(module)
    x = x.to(module.weight.dtype)
    found = []
    assert quantized_rows(lambda: found.append(module(x))) == 2
    assert_same(found[0], quantrain.int8_linear(x, module.weight, module.bias))


def test_kept_codes_stay_out_of_evaluation_copies_and_files(tmp_path):
    module, x = layer(), torch.randn(33, 24)
    qnn.enable_weight_cache(module)
    with torch.no_grad():
        assert quantized_rows(lambda: module(x)) == 2
        assert module._kept is None
    with torch.inference_mode():
        module(x)
    module(x)
    assert module._kept is not None and list(module.state_dict()) == ["weight", "bias"]
    assert copy.deepcopy(module)._kept is None
    torch.save(module, tmp_path / "layer.pt")
    assert torch.load(tmp_path / "layer.pt", weights_only=False)._kept is None
    qnn.enable_weight_cache(module, False)
    assert module._kept is None


@pytest.mark.cuda
def test_kept_codes_stay_out_of_captured_graphs():
    every = {"scheme": {"output": "int8", "grad_input": "int8", "grad_weight": "int8"}}
    recipe = qnn.changed_recipe(Recipe.from_name("int8-training"), every)
    module, x = layer(recipe=recipe, device="cuda"), torch.randn(64, 24, device="cuda")
    qnn.enable_weight_cache(module)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        module(x).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    with torch.no_grad():
        module.weight.mul_(-2)
    graph.replay()
    assert_same(y.detach(), quantrain.int8_linear(x, module.weight, module.bias).detach())


# ---- training ----------------------------------------------------------------------------------------------------------------


def train(model, steps=100, lr=4e-3, seed=0):
    """The last mean loss of learning whether a sequence holds more even than odd tokens; the data are the same for every model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    torch.manual_seed(seed)
    for step in range(steps):
        batch = tokens(64, seed=step)
        loss = F.cross_entropy(model(batch), ((batch % 2).sum(1) > 3).long() + 2 * (batch[:, 0] > 25).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_network_trained_in_int8_is_as_good_as_in_float32():
    """Means of the last 20 losses within 5 per cent, far below where they began. Two float32 trainings that differ in their
    seed are about as far apart."""
    torch.manual_seed(0)
    exact = train(Net())
    rounded = train(net(seed=0))
    assert exact[0] == pytest.approx(rounded[0], rel=1e-2)
    ends = [sum(losses[-20:]) / 20 for losses in (exact, rounded)]
    assert ends[0] < 0.5 * exact[0]
    assert ends[1] == pytest.approx(ends[0], rel=0.05)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), pytest.param("cuda", torch.float16, marks=pytest.mark.cuda)])  # fmt: skip
def test_a_scaler_sees_overflow_through_int8(device, dtype):
    model = net().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = quantrain.amp.GradScaler(device, init_scale=2.0**10)
    for poison, scale in ((1.0, 2.0**10), (math.inf, 2.0**9), (1.0, 2.0**9)):
        before = model.up.weight.detach().clone()
        optimizer.zero_grad()
        with torch.autocast(device, dtype=dtype):
            loss = F.cross_entropy(model(tokens().to(device)).float(), tokens().to(device)[:, 0] % 4)
        scaler.scale(loss * poison).backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale
        assert torch.equal(before, model.up.weight) == (poison == math.inf)


@on_each_device
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_layer_compiles_to_the_same_step(dynamic, device):
    torch.compiler.reset()
    module = layer(device=device)
    qnn.enable_weight_cache(module)
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (33, 57) if dynamic else (33,):
        results = []
        x = torch.randn(rows, 24, generator=torch.Generator().manual_seed(rows)).to(device)
        for run, owner in ((module, module), (compiled, twin)):
            batch, owner.weight.grad = x.clone().requires_grad_(), None
            torch.manual_seed(1)
            y = run(batch)
            y.cos().sum().backward()
            results.append([y.detach(), batch.grad, owner.weight.grad])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-5, atol=1e-5)


def _ddp_worker(rank, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        model = net()
        qnn.enable_weight_cache(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        torch.manual_seed(10 + rank)
        with parallel.no_sync():
            parallel(tokens(8, seed=rank)).square().sum().backward()
        alone = [p.grad.clone() for p in model.parameters()]
        parallel(tokens(8, seed=5 + rank)).square().sum().backward()
        torch.save({"alone": alone, "grads": [p.grad for p in model.parameters()]}, f"{folder}/{rank}.pt")
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        parallel(tokens(8, seed=rank)).sum().backward()
        torch.save([p.detach() for p in model.parameters()], f"{folder}/weights{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_train_alike(tmp_path):
    """Under DistributedDataParallel: each rank draws its own numbers, gradients are averaged, weights stay equal."""
    torch.multiprocessing.spawn(_ddp_worker, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for one, two in zip(ranks[0]["grads"], ranks[1]["grads"], strict=True):
        assert_same(one, two)
    assert not torch.equal(ranks[0]["alone"][-2], ranks[1]["alone"][-2])
    for one, two in zip(*(torch.load(tmp_path / f"weights{rank}.pt") for rank in range(2)), strict=True):
        assert_same(one, two)


# ---- converted ---------------------------------------------------------------------------------------------------------------


def static_net():
    model = net("int8-static")
    qnn.calibrate(model, [tokens(32, seed=s) for s in range(3)])
    return model.eval()


def bound(x, w, k):
    return (k + 8) * 2.0**-24 * (x.abs().double() @ w.abs().double().t())


@on_each_device
@pytest.mark.parametrize("recipe", ["int8-training", "int8-static"])
@pytest.mark.parametrize("shape", [(33, 24), (2, 5, 24), (24,), (0, 24)], ids=str)
def test_a_converted_layer_multiplies_what_was_simulated(recipe, shape, device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    prepared = quantrain.prepare(nn.Sequential(nn.Linear(24, 40)), recipe).to(device)
    qnn.calibrate(prepared, [torch.randn(64, 24, device=device) / 2])  # x saturates under a stored scale
    converted = quantrain.convert(copy.deepcopy(prepared.eval()))
    module = converted[0]
    assert type(module) is qnn.QuantizedInt8Linear and isinstance(module, qnn.QuantizedLinear)
    assert module.weight_codes.dtype == torch.int8 and list(module.weight_scale.shape) == [40, 1]
    rounded = module.input_fake_quant(x)
    simulated = F.linear(rounded, module.dequantized_weight(), module.bias)
    limit = bound(rounded, module.dequantized_weight(), 24) + 2.0**-22 * module.bias.abs()
    with Calls() as calls:
        y = converted(x)
    assert calls.count["int8_mm"] == 1 and calls.count["dequantize"] == 0
    assert ((y - simulated).abs() <= limit).all()
    if recipe == "int8-training":
        # The same codes, the same product. The prepared layer's "auto" may prefer floating point for so small a shape.
        assert_same(y, quantrain.int8_linear(x, prepared[0].weight, prepared[0].bias).detach())
    qnn.enable_fake_quant(converted, False)
    assert_same(converted(x), F.linear(x, module.dequantized_weight(), module.bias))


def test_converted_layers_under_autocast_and_in_half_precision():
    model = quantrain.convert(layer())
    x = torch.randn(33, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert model(x.half()).dtype == torch.float16 and model(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(model(x.bfloat16()).float(), model(x), rtol=0.05, atol=0.05)
    model.to(torch.bfloat16)
    assert model.weight_scale.dtype == torch.float32 and model.weight_codes.dtype == torch.int8
    x[3, 4] = math.nan
    assert model(x)[3].isnan().all() and model(x)[4].isfinite().all()


@pytest.mark.parametrize("build", [net, static_net], ids=["dynamic", "static"])
def test_a_converted_network_predicts_what_the_prepared_one_does(build):
    model = build()
    batch = tokens(64, seed=9)
    expected = model(batch).detach()
    quantrain.convert(model).requires_grad_(False)
    assert [type(m).__name__ for m in (model.table, model.up, model.head)] == ["Embedding"] + [
        "QuantizedInt8Linear"
    ] * 2
    torch.testing.assert_close(model(batch), expected, rtol=1e-2, atol=2e-2)  # a code at a tie may fall either way
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch), model(batch), rtol=1e-5, atol=1e-5)


def test_a_simulated_recipe_converts_to_dequantized_weights():
    model = quantrain.convert(layer(recipe=simulated()))
    assert type(model) is qnn.QuantizedLinear
    x = torch.randn(33, 24)
    assert_same(model(x), F.linear(model.input_fake_quant(x), model.dequantized_weight(), model.bias))


@pytest.mark.parametrize("build", [net, static_net], ids=["dynamic", "static"])
def test_checkpoints(build, tmp_path):
    pytest.importorskip("safetensors")
    path, batch = tmp_path / "model.safetensors", tokens(64, seed=9)
    model = build()
    recipe = model.quantization_summary.recipe
    quantrain.save_checkpoint(path, model)
    other = net(recipe, seed=5)
    metadata = quantrain.load_checkpoint(path, other)
    assert Recipe.from_json(metadata["recipe"]) == recipe
    assert_same(other.eval()(batch), model(batch))
    quantrain.convert(model)
    quantrain.save_checkpoint(path, model)
    skeleton = quantrain.convert(net(recipe, seed=6), check_observed=False)
    quantrain.load_checkpoint(path, skeleton)
    assert_same(skeleton(batch), model(batch))


def test_a_recipe_of_weights_per_tensor_converts_too():
    weight = QuantSpec(granularity="per_tensor", observer="min_max")
    token = QuantSpec(granularity="per_token", observer="dynamic")
    recipe = Recipe(name="w8-tensor", weight=weight, input=token, scheme=Int8Spec(training=False))
    model = quantrain.prepare(nn.Sequential(nn.Linear(24, 40)), recipe)
    x = torch.randn(33, 24)
    qnn.calibrate(model, [x])
    expected = model.eval()(x).detach()
    converted = quantrain.convert(model)
    assert type(converted[0]) is qnn.QuantizedInt8Linear and converted[0].weight_scale.numel() == 1
    torch.testing.assert_close(converted(x), expected, rtol=1e-5, atol=1e-5)
