"""Each pattern that prepare joins, trained in every way that a network is trained: as the written calls would be."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import quantrain.nn as qnn
from quantrain.nn.fuse import unfuse


def conv_bn(inputs=6, outputs=6, size=3, **options):
    return [nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **options), nn.BatchNorm2d(outputs)]


class Added(nn.Module):
    def __init__(self, activation=None, following=None):
        super().__init__()
        self.conv, self.bn = conv_bn()
        self.activation, self.following = activation, following

    def forward(self, x):
        y = self.bn(self.conv(x)) + x
        if self.activation is not None:
            y = self.activation(y)
        return y if self.following is None else self.following(y)


class Shared(nn.Module):
    """Two layers, and nothing else, read the result."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv_bn()
        self.a, self.b = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        y = torch.relu(self.bn(self.conv(x)))
        return self.a(y) + self.b(y)


class Shortcut(nn.Module):
    """A strided convolution beside the residual reads the block's input too."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(stride=2)
        self.conv2, self.bn2 = conv_bn()
        self.down = nn.Sequential(*conv_bn(size=1, stride=2))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.down(x)
        return self.relu(y)


def following():
    return nn.Conv2d(6, 6, 1)


def chain(activation):
    return lambda: nn.Sequential(*conv_bn(), activation())


def chain_on(activation):
    return lambda: nn.Sequential(*conv_bn(), activation(), following())


# How a pattern is built, and what of it is joined.
PATTERNS = {
    "conv bn": (lambda: nn.Sequential(*conv_bn(), following()), []),
    "relu": (chain(nn.ReLU), ["0: batch norm + relu"]),
    "relu, next": (chain_on(nn.ReLU), ["0: batch norm + relu + input of 3"]),
    "relu6": (chain(nn.ReLU6), ["0: batch norm + relu6"]),
    "relu6, next": (chain_on(nn.ReLU6), ["0: batch norm + relu6 + input of 3"]),
    "hardswish": (chain(nn.Hardswish), ["0: batch norm + hardswish"]),
    "hardswish, next": (chain_on(nn.Hardswish), ["0: batch norm + hardswish + input of 3"]),
    "silu": (chain(nn.SiLU), ["0: batch norm + silu"]),
    "silu, next": (chain_on(nn.SiLU), ["0: batch norm + silu + input of 3"]),
    "add": (Added, ["conv: batch norm + add"]),
    "add, next": (lambda: Added(None, following()), ["conv: batch norm + add + input of following"]),
    "add relu": (lambda: Added(nn.ReLU()), ["conv: batch norm + add + relu"]),
    "add relu, next": (
        lambda: Added(nn.ReLU(), following()),
        ["conv: batch norm + add + relu + input of following"],
    ),
    "add relu6": (lambda: Added(nn.ReLU6()), ["conv: batch norm + add + relu6"]),
    "shared": (Shared, ["conv: batch norm + relu + input of a, b"]),
    "shortcut": (
        Shortcut,
        [
            "conv1: batch norm + relu + input of conv2",
            "conv2: batch norm + add + relu",
            "one fake-quantized input of conv1, down.0",
        ],
    ),
    "depthwise": (
        lambda: nn.Sequential(*conv_bn(), nn.ReLU6(), *conv_bn(groups=6), nn.ReLU6()),
        ["0: batch norm + relu6 + input of 3", "3: batch norm + relu6"],
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(6, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), following()),
        [],
    ),
}
TIED = ("shared", "shortcut")  # with one scale where two layers would learn theirs
EACH = pytest.mark.parametrize("pattern", PATTERNS)
LEARNED = "qat-w4a4"


def filled(model):
    """Batch norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


def several(*names):
    """Patterns one after the other."""
    torch.manual_seed(5)
    return filled(nn.Sequential(*(PATTERNS[name][0]() for name in names)))


def pair(pattern, recipe="qat-w8a8"):
    """The same prepared model, call by call and joined; learned scales that are tied are in both."""
    torch.manual_seed(4)
    model = filled(PATTERNS[pattern][0]())
    apart = qnn.prepare(copy.deepcopy(model), recipe)
    joined = qnn.prepare(model, recipe, fuse=True)
    if recipe == LEARNED and pattern in TIED:
        apart = copy.deepcopy(joined)
        unfuse(apart)
    return apart, joined


def batch(seed=0, size=(4, 6, 5, 6)):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def same(found, want, pattern, text):
    """To the bit; Hardswish and SiLU are other formulas than PyTorch's, and a tied scale's gradient is another sum."""
    message = lambda differs: f"{text}: {differs}"
    if any(word in pattern for word in ("hardswish", "silu", "tied")):
        size = float(want.abs().max()) if want.numel() and want.is_floating_point() else 0
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5 * size + 1e-7, equal_nan=True, msg=message)
    else:
        torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True, msg=message)


def agree(apart, joined, pattern):
    """Gradients and states."""
    ours = dict(joined.named_parameters(remove_duplicate=False))
    for name, parameter in apart.named_parameters(remove_duplicate=False):
        assert (parameter.grad is None) == (ours[name].grad is None), name
        if parameter.grad is not None:
            same(ours[name].grad, parameter.grad, pattern, f"gradient of {name}")
    states = joined.state_dict()
    assert list(states) == list(apart.state_dict())
    for name, value in apart.state_dict().items():
        same(states[name], value, pattern, name)


@EACH
@pytest.mark.parametrize("recipe", ["qat-w8a8", "fqt-bhq5", LEARNED])
def test_what_is_joined(recipe, pattern):
    _, joined = pair(pattern, recipe)
    said = [row.removesuffix(", with one learned scale") for row in joined.quantization_summary.fused]
    edge = recipe == LEARNED and pattern == "shared"  # b, the last layer, has 8 bits: another spec
    assert said == (["conv: batch norm + relu"] if edge else PATTERNS[pattern][1])


# ---- ways to train: each gives results to compare ---------------------------------------------------------------------------


def step(model, optimizer, *batches, call=None):
    """One step of the optimizer over micro-batches; outputs and gradients of the inputs."""
    found = []
    optimizer.zero_grad()
    for x in batches:
        x = x.to(next(model.parameters()).device, copy=True).requires_grad_()
        y = model(x) if call is None else call(model, x)
        (y * y.detach().cos()).mean().backward()
        found += [y.detach(), x.grad]
    optimizer.step()
    return found


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def plainly(model):
    optimizer = sgd(model)
    return [t for seed in range(3) for t in step(model, optimizer, batch(seed))]


def accumulating(model):
    optimizer = sgd(model)
    return [t for seed in range(2) for t in step(model, optimizer, batch(seed), batch(seed + 5, (2, 6, 5, 6)))]


def without_gradients(model):
    with torch.no_grad():
        first = model(batch(1))
    found = step(model, sgd(model), batch())
    with torch.no_grad():
        return [first, *found, model(batch(2))]


def with_frozen_batch_norms(model):
    optimizer = sgd(model)
    found = step(model, optimizer, batch())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return found + step(model, optimizer, batch(1))


def with_frozen_ranges(model):
    optimizer = sgd(model)
    found = step(model, optimizer, batch())
    qnn.enable_observer(model, False)
    return found + step(model, optimizer, 2 * batch(1))


def without_rounding(model):
    optimizer = sgd(model)
    found = step(model, optimizer, batch())
    qnn.enable_fake_quant(model, False)
    return found + step(model, optimizer, batch(1))


def loading_between(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = step(model, optimizer, batch())
    kept = copy.deepcopy(model.state_dict())
    once = step(model, optimizer, batch(1))
    step(model, optimizer, batch(2))
    model.load_state_dict(kept)
    again = step(model, optimizer, batch(1))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    return found + again


def with_frozen_parameters(model):
    """Every other one."""
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    optimizer = sgd(model)
    return step(model, optimizer, batch()) + step(model, optimizer, batch(1))


def evaluating_between(model):
    optimizer = sgd(model)
    found = step(model, optimizer, batch())
    found += [model.eval()(batch(1)).detach(), model(batch(2, (1, 6, 5, 6))).detach()]
    return found + step(model.train(), optimizer, batch(3))


def checkpointed(reentrant):
    def way(model):
        optimizer = sgd(model)
        call = lambda model, x: checkpoint(model, x, use_reentrant=reentrant)
        return step(model, optimizer, batch(), call=call) + step(model, optimizer, batch(1), call=call)

    return way


WAYS = {
    "plainly": plainly,
    "accumulating": accumulating,
    "without gradients": without_gradients,
    "frozen batch norms": with_frozen_batch_norms,
    "frozen ranges": with_frozen_ranges,
    "frozen parameters": with_frozen_parameters,
    "without rounding": without_rounding,
    "loading between": loading_between,
    "evaluating between": evaluating_between,
    "checkpointed": checkpointed(False),
    "checkpointed, reentrant": checkpointed(True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "recipe, pattern",
    [("qat-w8a8", pattern) for pattern in PATTERNS] + [(LEARNED, "add relu, next"), (LEARNED, "shortcut")],
)
def test_trains_as_the_written_calls_do(recipe, pattern, way):
    apart, joined = pair(pattern, recipe)
    want, found = WAYS[way](apart), WAYS[way](joined)
    pattern = f"{pattern}, tied" if recipe == LEARNED and pattern in TIED else pattern
    for number, (a, b) in enumerate(zip(want, found, strict=True)):
        same(b, a, pattern, f"result {number}")
    agree(apart, joined, pattern)


@pytest.mark.parametrize("pattern", [name for name in PATTERNS if name != "transposed"])
def test_one_image_without_a_batch(pattern):
    found = []
    for model in pair(pattern):
        optimizer = sgd(model)
        found.append(step(model, optimizer, batch()) + step(model, optimizer, batch(1)[0], batch(2)[0]))
    for number, (a, b) in enumerate(zip(*found, strict=True)):
        same(b, a, pattern, f"result {number}")


@pytest.mark.parametrize("pattern", ["relu", "relu6, next", "depthwise", "transposed"])
def test_quantized_gradients_of_a_chain_are_drawn_alike(pattern):
    """Where calls follow one another the draws come in the order of the written calls."""
    apart, joined = pair(pattern, "fqt-bhq5")
    torch.manual_seed(1)
    want = plainly(apart)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(want, plainly(joined), strict=True))
    agree(apart, joined, pattern)


@EACH
@pytest.mark.parametrize("recipe", ["qat-w8a8", LEARNED, "fqt-bhq5"])
def test_evaluates_and_converts_to_the_bit(recipe, pattern):
    apart, joined = pair(pattern, recipe)
    plainly(joined)
    apart.load_state_dict(joined.state_dict())
    x = batch(7)
    want = apart.eval()(x)
    assert torch.equal(joined.eval()(x), want)
    copied = qnn.convert(joined, inplace=False)
    converted = qnn.convert(joined)
    assert torch.equal(converted(x), want) and torch.equal(copied(x), want)
    written, ours = qnn.convert(apart).state_dict(), converted.state_dict()
    assert list(written) == list(ours) and all(torch.equal(ours[name], value) for name, value in written.items())


@EACH
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_trains_alike_and_on_its_own(way, pattern):
    _, joined = pair(pattern)
    plainly(joined)
    before = copy.deepcopy(joined.state_dict())
    other = way(joined)
    found = plainly(other)
    assert all(torch.equal(value, before[name]) for name, value in joined.state_dict().items())
    assert other.quantization_summary.fused == joined.quantization_summary.fused
    assert all(torch.equal(a, b) for a, b in zip(found, plainly(joined), strict=True))
    for name, value in joined.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@EACH
def test_under_autocast_as_near_to_float32_as_the_written_calls(pattern):
    apart, joined = pair(pattern)
    exact = copy.deepcopy(apart)
    found = []
    for model in (apart, joined, exact):
        given = batch().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=model is not exact):
            y = model(given)
        y.float().square().mean().backward()
        found.append((y.float(), given.grad))
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    for written, ours, want in zip(*found, strict=True):
        off = [float(((t - want).norm() / want.norm()).detach()) for t in (written, ours)]
        assert off[1] <= 1.5 * off[0] + 0.01, off


# ---- the whole at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe, patterns",
    [("qat-w8a8", ["add relu, next", "hardswish, next", "shared"]), (LEARNED, ["shortcut"])],
    ids=["observed", "learned"],
)
def test_patterns_compile_to_one_graph(recipe, patterns):
    torch._dynamo.reset()
    joined = qnn.prepare(several(*patterns), recipe, fuse=True)
    x = batch()
    joined(x)
    eager = copy.deepcopy(joined)
    compiled = torch.compile(joined, fullgraph=True, backend="aot_eager")
    outputs = [model(x) for model in (eager, compiled)]
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.square().sum().backward()
    ours = dict(joined.named_parameters())
    for name, parameter in eager.named_parameters():
        size = 1e-4 * float(parameter.grad.abs().max())
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-3, atol=size + 1e-6)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(joined.state_dict()[name], value)


@pytest.mark.parametrize("pattern", ["shared", "shortcut"])
def test_a_block_exports(pattern):
    _, joined = pair(pattern)
    plainly(joined)
    x = batch(8)
    program = torch.export.export(joined.eval(), (x,))
    assert torch.equal(program.module()(x), joined(x))


# ---- learned scales that are tied -----------------------------------------------------------------------------------

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


# ---- synchronized batch norms ---------------------------------------------------------------------------------------


def synchronized(model):
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


@pytest.mark.parametrize("before", [True, False], ids=["before prepare", "after prepare"])
def test_synchronized_batch_norms_train_in_one_process(before):
    """Without a process group a SyncBatchNorm is a batch norm, on any device."""
    model = several("relu, next", "shortcut")
    plain = qnn.prepare(copy.deepcopy(model), "qat-w8a8")
    if before:
        apart = qnn.prepare(synchronized(copy.deepcopy(model)), "qat-w8a8")
        joined = qnn.prepare(synchronized(model), "qat-w8a8", fuse=True)
    else:
        apart = synchronized(qnn.prepare(copy.deepcopy(model), "qat-w8a8"))
        joined = synchronized(qnn.prepare(model, "qat-w8a8", fuse=True))
    assert len(joined.quantization_summary.fused) == 4 and type(joined[0][0].bn) is nn.SyncBatchNorm
    want, found = plainly(apart), plainly(joined)
    for number, (a, b) in enumerate(zip(want, found, strict=True)):
        same(b, a, "", f"result {number}")
    agree(apart, joined, "")
    torch.testing.assert_close(found[:2], plainly(plain)[:2], rtol=1e-4, atol=1e-5)
    x = batch(3)
    assert torch.equal(qnn.convert(joined.eval(), inplace=False)(x), joined(x))


def _ranks(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for recipe in ("qat-w8a8", LEARNED):
            results = []
            model = several("relu, next", "shortcut", "depthwise")
            joined = qnn.prepare(copy.deepcopy(model), recipe, fuse=True)
            apart = qnn.prepare(model, recipe)
            if recipe == LEARNED:
                apart = copy.deepcopy(joined)
                unfuse(apart)
            for network in (apart, joined):
                parallel = nn.parallel.DistributedDataParallel(network)
                optimizer, found = sgd(network), []
                for seed in range(3):
                    found += step(parallel, optimizer, (1 + rank) * batch(10 * rank + seed))
                trained = {name: value.clone() for name, value in network.state_dict().items()}
                with torch.no_grad():  # which sends the buffers of rank 0
                    found.append(parallel.eval()(batch(7)))
                sent = {name: value.clone() for name, value in network.state_dict().items()}
                gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
                results.append({"found": found, "trained": trained, "sent": sent, "gradients": gradients})
            torch.save(results, f"{folder}/{recipe}{rank}.pt")
        errors = []
        for order in ("before", "after"):
            model = several("relu, next")
            model = synchronized(model) if order == "before" else model
            model = qnn.prepare(model, "qat-w8a8", fuse=True)
            model = synchronized(model) if order == "after" else model
            try:
                model(batch())
            except ValueError as error:
                errors.append(str(error))
            qnn.calibrate(model, [batch(rank)])  # evaluation synchronizes nothing
        torch.save(errors, f"{folder}/errors{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_train_as_the_written_calls_do(tmp_path):
    """Under DistributedDataParallel: gradients are averaged, statistics and ranges are those of rank 0."""
    torch.multiprocessing.spawn(_ranks, (str(tmp_path),), nprocs=2)
    for recipe in ("qat-w8a8", LEARNED):
        ranks = [torch.load(tmp_path / f"{recipe}{rank}.pt") for rank in range(2)]
        for apart, joined in ranks:
            tied = "tied" if recipe == LEARNED else ""
            for number, (a, b) in enumerate(zip(apart["found"], joined["found"], strict=True)):
                same(b, a, tied, f"{recipe}: result {number}")
            for kind in ("trained", "sent", "gradients"):
                assert apart[kind].keys() == joined[kind].keys()
                for name, value in apart[kind].items():
                    same(joined[kind][name], value, tied, f"{recipe}: {kind}: {name}")
        one, other = (joined for _, joined in ranks)
        for kind in ("sent", "gradients"):
            assert all(torch.equal(value, other[kind][name]) for name, value in one[kind].items()), kind
        assert not torch.equal(one["found"][0], other["found"][0])
        moved = [name for name, value in one["trained"].items() if not torch.equal(value, other["trained"][name])]
        ranges = [name for name in moved if name.endswith("input_fake_quant.scale")]
        assert any("running_mean" in name for name in moved) and bool(ranges) == (recipe != LEARNED)
        assert all(torch.equal(value, one["trained"][name]) for name, value in one["sent"].items())
    for rank in range(2):
        errors = torch.load(tmp_path / f"errors{rank}.pt")
        assert len(errors) == 2 and all("SyncBatchNorm expected input tensor to be on" in text for text in errors)


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("recipe", ["qat-w8a8", LEARNED])
def test_a_whole_step_is_captured_in_a_graph(recipe):
    joined = qnn.prepare(several(*(name for name in PATTERNS if name != "transposed")), recipe, fuse=True).cuda()
    x = batch(size=(4, 6, 12, 12)).cuda()
    optimizer = sgd(joined)

    def backward(model):
        loss = model(x).square().mean()
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.zero_grad()
            backward(joined)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad()
    eager = copy.deepcopy(joined)
    other = sgd(eager)
    other.load_state_dict(optimizer.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = backward(joined)
        optimizer.step()
    for seed in range(3):
        x.copy_(batch(seed, (4, 6, 12, 12)))
        graph.replay()
        other.zero_grad()
        want = backward(eager)
        other.step()
        torch.testing.assert_close(loss, want, rtol=1e-3, atol=1e-5)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(joined.state_dict()[name], value, rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("before", [True, False], ids=["before prepare", "after prepare"])
def test_synchronized_batch_norms_train_on_a_gpu(backend, before, tmp_path):
    torch.distributed.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = several("relu, next", "shortcut").cuda()
        plain = qnn.prepare(copy.deepcopy(model), "qat-w8a8", fuse=True)
        model = synchronized(model) if before else model
        joined = qnn.prepare(model, "qat-w8a8", fuse=True)
        joined = joined if before else synchronized(joined)
        assert type(joined[0][0].bn) is nn.SyncBatchNorm and len(joined.quantization_summary.fused) == 4
        want, found = (step(network, sgd(network), batch()) for network in (plain, joined))
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(joined.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)
    finally:
        torch.distributed.destroy_process_group()


def calibrated(model, images):
    """With ranges that stay: two processes agree on those of the whole batch."""
    with pytest.warns(UserWarning, match="have seen no batch"):
        qnn.calibrate(model, [images])
    qnn.enable_observer(model, False)
    return model


def _synchronized_ranks(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        images = batch(size=(8, 6, 5, 6))[4 * rank : 4 * rank + 4].cuda()
        joined = synchronized(qnn.prepare(several("relu, next", "shortcut"), "qat-w8a8", fuse=True)).cuda()
        parallel = nn.parallel.DistributedDataParallel(calibrated(joined, images), device_ids=[0])
        y = parallel(images)
        y.square().sum().backward()
        gradients = {name: parameter.grad.cpu() for name, parameter in joined.named_parameters()}
        torch.save((y.detach().cpu(), gradients, joined.cpu().state_dict()), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.cuda
def test_two_processes_synchronize_batch_norms_on_one_gpu(tmp_path):
    """Halves of a batch on two ranks, as the whole in one process."""
    torch.multiprocessing.spawn(_synchronized_ranks, (str(tmp_path),), nprocs=2)
    images = batch(size=(8, 6, 5, 6)).cuda()
    model = qnn.prepare(several("relu, next", "shortcut"), "qat-w8a8", fuse=True).cuda()
    want = calibrated(model, images)(images)
    (want.square().sum() / 2).backward()  # DistributedDataParallel gives the mean over ranks
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(torch.cat([y for y, _, _ in ranks]), want.detach().cpu(), rtol=1e-3, atol=1e-3)
    for _, gradients, states in ranks:
        for name, parameter in model.named_parameters():
            size = float(parameter.grad.abs().max())
            torch.testing.assert_close(
                gradients[name], parameter.grad.cpu(), rtol=1e-2, atol=1e-2 * size, msg=f"gradient of {name}"
            )
        for name, value in model.state_dict().items():
            torch.testing.assert_close(states[name], value.cpu(), rtol=1e-4, atol=1e-5, msg=name)
