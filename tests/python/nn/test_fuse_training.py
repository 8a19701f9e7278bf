"""Each pattern that prepare joins, trained in every way that a network is trained: as the written calls would be."""

import copy
import inspect
import pickle

import pytest
import torch
from samples.fuse import LEARNED, PATTERNS, TIED, agree, batch, pair, plainly, same, several, sgd, step
from torch import nn
from torch.utils.checkpoint import checkpoint

import quantrain.nn as qnn

EACH = pytest.mark.parametrize("pattern", PATTERNS)


@EACH
@pytest.mark.parametrize("recipe", ["qat-w8a8", "fqt-bhq5", LEARNED])
def test_what_is_joined(recipe, pattern):
    _, joined = pair(pattern, recipe)
    said = [row.removesuffix(", with one learned scale") for row in joined.quantization_summary.fused]
    edge = recipe == LEARNED and pattern == "shared"  # b, the last layer, has 8 bits: another spec
    assert said == (["conv: batch norm + relu"] if edge else PATTERNS[pattern][1])


# ---- ways to train: each gives results to compare ---------------------------------------------------------------------------


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


ONCE = ("conv bn", "relu6", "hardswish", "silu", "add relu6")  # like others where they are trained otherwise
CASES = [("qat-w8a8", pattern, way) for pattern in PATTERNS for way in WAYS if way == "plainly" or pattern not in ONCE]
CASES += [(LEARNED, pattern, way) for pattern in ("add relu, next", "shortcut") for way in WAYS]


@pytest.mark.parametrize("recipe, pattern, way", CASES)
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


@pytest.mark.parametrize("pattern", ["relu, next", "shared", "shortcut"])
def test_a_block_exports_for_any_batch(pattern):
    _, joined = pair(pattern)
    plainly(joined)
    joined.eval()
    program = torch.export.export(joined, (batch(),), dynamic_shapes=({0: torch.export.Dim("images", min=2)},))
    for images in (4, 7):
        x = batch(8, (images, 6, 5, 6))
        assert torch.equal(program.module()(x), joined(x))


@pytest.mark.parametrize("pattern", ["relu, next", "shortcut"])
def test_a_block_says_what_its_forward_pass_takes(pattern):
    """calibrate gives a model as many items of a batch as that."""
    apart, joined = pair(pattern)
    assert inspect.signature(joined.forward) == inspect.signature(apart.forward)
    for model in (apart, joined):
        plainly(model)
        qnn.calibrate(model, [(batch(seed), torch.zeros(4)) for seed in range(2)])
    agree(apart, joined, pattern)
