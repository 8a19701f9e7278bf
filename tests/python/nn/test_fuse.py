"""What prepare joins between convolutions: the same results, gradients and ranges as call by call, and what stays as it is written."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantrain.nn as qnn
from quantrain.nn.fuse import FusedForward, fused_rows, unfuse

RECIPES = ["qat-w8a8", "qat-w4a4", "fqt-psq8"]


class Block(nn.Module):
    """As torchvision's: one activation module, called twice, an addition in place, a convolution beside the residual."""

    def __init__(self, inputs=6, outputs=8, stride=2, activation=nn.ReLU):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act = activation(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down = None
        if stride > 1:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x if self.down is None else self.down(x)
        out = self.act(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.act(out)


class Functions(nn.Module):
    """By functions; a result that two read."""

    def __init__(self):
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.b, self.bn_b = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.c = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = F.relu6(self.bn_a(self.a(x)))
        return F.silu(self.bn_b(self.b(y))) + self.c(y)


class Linear(nn.Module):
    """An addition without an activation behind it, as MobileNet-V2's."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(6, 12, 1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU6(),
            nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False),
            nn.BatchNorm2d(12),
            nn.Hardswish(),
            nn.Conv2d(12, 6, 1, bias=False),
            nn.BatchNorm2d(6),
        )

    def forward(self, x):
        return x + self.conv(x)


BLOCKS = {
    "residual": lambda: Block(),
    "identity": lambda: Block(6, 6, 1),
    "functions": Functions,
    "linear": Linear,
    "sequential": lambda: nn.Sequential(
        Block(), nn.Sequential(Block(8, 8, 1), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    ),
}


def pair(kind, recipe):
    """The same prepared model, call by call and joined."""
    torch.manual_seed(4)
    model = BLOCKS[kind]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    apart = qnn.prepare(copy.deepcopy(model), recipe)
    joined = qnn.prepare(model, recipe, fuse=True)
    assert joined.quantization_summary.fused and not apart.quantization_summary.fused
    return apart, joined


def states(model):
    return dict(model.state_dict())


def agree(apart, joined, text):
    """State by state; under a learned scale that became one, the joined model's is used by both layers."""
    other = states(apart)
    assert states(joined).keys() == other.keys()
    for name, value in states(joined).items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6, msg=f"{text}: {name}")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", BLOCKS)
def test_joined_and_written_agree(kind, recipe):
    apart, joined = pair(kind, recipe)
    x = torch.randn(5, 6, 9, 9)
    for number in range(3):
        results = []
        for model in (apart, joined):
            model.zero_grad()
            given = x.clone().requires_grad_()
            torch.manual_seed(number)  # of the gradient quantizers
            y = model(given)
            results.append((y, given))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
        if recipe != "fqt-psq8":  # whose draws follow the order of calls
            grad = torch.randn_like(y)
            for y, _ in results:
                y.backward(grad)
            torch.testing.assert_close(results[0][1].grad, results[1][1].grad, rtol=1e-3, atol=1e-4)
            ours = dict(joined.named_parameters())
            for name, parameter in apart.named_parameters():
                if name in ours and not name.endswith("scale"):
                    size = parameter.grad.abs().max()
                    torch.testing.assert_close(
                        ours[name].grad, parameter.grad, rtol=1e-3, atol=1e-3 * float(size) + 1e-5
                    )
    agree(apart, joined, kind)
    apart.eval(), joined.eval()
    torch.testing.assert_close(apart(x), joined(x), rtol=1e-5, atol=1e-5)
    one, other = qnn.convert(apart), qnn.convert(joined)
    assert not any("forward" in module.__dict__ for module in other.modules())
    torch.testing.assert_close(one(x), other(x), rtol=1e-5, atol=1e-5)


def test_what_the_summary_says():
    model = qnn.prepare(nn.Sequential(Block(), Linear()), "qat-w8a8", skip=["1.conv.6"], fuse=True)
    assert model.quantization_summary.fused == (
        "0.conv1: batch norm + relu + input of conv2",
        "0.conv2: batch norm + add + relu",
        "0: one fake-quantized input of down.0, conv1",
        "1.conv.0: batch norm + relu6 + input of conv.3",
        "1.conv.3: batch norm + hardswish",
    )
    assert "joined: 0.conv2: batch norm + add + relu" in str(model.quantization_summary)
    assert model[0].conv1.input_fake_quant is model[0].down[0].input_fake_quant


@pytest.mark.parametrize("name, calls", [("act", 2), ("conv1", 1), ("bn2", 1)])
def test_hooks_see_what_the_written_block_shows_them(name, calls):
    apart, joined = pair("residual", "qat-w8a8")
    x, seen = torch.randn(2, 6, 8, 8), []
    handles = [m.get_submodule(name).register_forward_hook(lambda *args: seen.append(args[2])) for m in (apart, joined)]
    apart(x), joined(x)
    assert len(seen) == 2 * calls
    assert all(torch.equal(a, b) for a, b in zip(seen[:calls], seen[calls:], strict=True))
    handles[1].remove()
    joined(x)
    assert len(seen) == 2 * calls


def test_copies_pickles_and_state_dicts():
    apart, joined = pair("residual", "qat-w8a8")
    x = torch.randn(2, 6, 8, 8)
    joined(x)
    for other in (copy.deepcopy(joined), pickle.loads(pickle.dumps(joined))):
        forward = other.__dict__["forward"]
        assert isinstance(forward, FusedForward) and forward.block is other
        assert torch.equal(other.eval()(x), copy.deepcopy(joined).eval()(x))
    apart.load_state_dict(joined.state_dict())
    assert torch.equal(apart.eval()(x), joined.eval()(x))
    unfuse(joined)
    assert not fused_rows(joined) and torch.equal(apart(x), joined(x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    _, joined = pair("sequential", "qat-w8a8")
    x = torch.randn(4, 6, 10, 10)
    joined(x)
    eager = copy.deepcopy(joined)
    compiled = torch.compile(joined, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(x), eager(x))
    compiled(x).sum().backward()
    eager(x).sum().backward()
    ours = dict(joined.named_parameters())
    assert all(torch.equal(p.grad, ours[name].grad) for name, p in eager.named_parameters())
    agree(eager, joined, "buffers")


def test_checkpointing_moves_no_statistic_twice():
    _, joined = pair("identity", "qat-w8a8")
    x = torch.randn(4, 6, 8, 8)
    joined(x)
    plain, again = copy.deepcopy(joined), copy.deepcopy(joined)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    plain(a).square().sum().backward()
    torch.utils.checkpoint.checkpoint(again, b, use_reentrant=False).square().sum().backward()
    agree(plain, again, "checkpointing")
    assert torch.equal(a.grad, b.grad)


def test_a_frozen_batch_norm_and_a_frozen_range():
    apart, joined = pair("residual", "qat-w8a8")
    x = torch.randn(4, 6, 8, 8)
    for model in (apart, joined):
        model(x)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
            if isinstance(module, qnn.FakeQuantize):
                module.enable_observer(False)
    before = copy.deepcopy(states(joined))
    results = [model(x) for model in (apart, joined)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    for result in results:
        result.square().sum().backward()
    ours = dict(joined.named_parameters())
    for name, parameter in apart.named_parameters():
        size = float(parameter.grad.abs().max())
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-3, atol=1e-3 * size + 1e-5)
    assert all(torch.equal(value, before[name]) for name, value in states(joined).items())


def test_synchronized_batch_norms_go_the_long_way():
    apart, joined = pair("residual", "qat-w8a8")
    for model in (apart, joined):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    x = torch.randn(4, 6, 8, 8)
    apart.eval(), joined.eval()  # under a process group training wants a GPU
    for model in (apart, joined):
        qnn.calibrate(model, [x])
    torch.testing.assert_close(apart(x), joined(x), rtol=1e-5, atol=1e-5)


def test_calibration_sees_every_range():
    apart, joined = pair("sequential", "qat-w8a8")
    batches = [torch.randn(4, 6, 8, 8) for _ in range(3)]
    for model in (apart, joined):
        for batch in batches:
            model(batch)
        qnn.calibrate(model.eval(), batches)
    agree(apart, joined, "calibration")


def test_nan_stops_training_or_is_left_out_as_before():
    _, joined = pair("residual", "qat-w8a8")
    x = torch.randn(2, 6, 8, 8)
    joined(x)
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="expected a finite batch"):
        joined(x)


def test_another_type_than_the_weight_s_is_refused():
    _, joined = pair("residual", "qat-w8a8")
    joined(torch.randn(2, 6, 8, 8))
    with pytest.raises((RuntimeError, TypeError), match="type"):
        joined(torch.randn(2, 6, 8, 8).half())


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.act(self.bn1(self.conv1(x)) * 2),
        lambda self, x: self.bn1(self.conv1(x)) + 1,
        lambda self, x: [y := self.bn1(self.conv1(x)), self.act(y)][0],
        lambda self, x: self.act(self.bn1(self.conv1(x))) if x.sum() > 0 else x,
        lambda self, x: (lambda y: y + y)(self.bn1(self.conv1(x))),
    ],
    ids=["scaled", "constant", "read twice", "control flow", "doubled"],
)
def test_what_is_not_the_pattern_stays(forward):
    class Odd(Block):
        pass

    Odd.forward = forward
    torch.manual_seed(0)
    model = Odd()
    with pytest.warns() if "sum" in forward.__code__.co_names else torch.no_grad():
        joined = qnn.prepare(copy.deepcopy(model), "qat-w8a8", fuse=True)
    assert not joined.quantization_summary.fused


@pytest.mark.cuda
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_on_a_gpu_under_autocast(recipe, layout):
    """bfloat16 rounds at other places: close, and as close to float32 as call by call."""
    apart, joined = pair("sequential", recipe)
    exact = copy.deepcopy(apart).cuda()
    apart, joined = apart.cuda().to(memory_format=layout), joined.cuda().to(memory_format=layout)
    x = torch.randn(8, 6, 16, 16, device="cuda").contiguous(memory_format=layout)
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            results = [apart(x), joined(x)]
        results.append(exact(x))
        for y in results:
            y.float().square().mean().backward()
    off = [(y.float() - results[2]).norm() / results[2].norm() for y in results[:2]]
    assert off[1] <= 1.5 * off[0] + 0.01, off


@pytest.mark.cuda
def test_a_step_is_captured_in_a_graph():
    _, joined = pair("sequential", "qat-w8a8")
    joined.cuda()
    x = torch.randn(8, 6, 16, 16, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            joined(x).square().mean().backward()
    torch.cuda.current_stream().wait_stream(side)
    joined.zero_grad(set_to_none=True)
    graph, eager = torch.cuda.CUDAGraph(), copy.deepcopy(joined)
    with torch.cuda.graph(graph):
        loss = joined(x).square().mean()
        loss.backward()
    for _ in range(3):
        x.normal_()
        joined.zero_grad(set_to_none=False)
        graph.replay()
        eager.zero_grad()
        want = eager(x).square().mean()
        want.backward()
        torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
    agree(eager, joined, "graph")


# ---- what a graph does not show -------------------------------------------------------------------------------------


class Hidden(Block):
    """A block whose forward pass a test writes."""

    flag = True

    def __init__(self):
        super().__init__(6, 6, 1)
        self.flag, self.skip = True, None

    def first(self, x):
        with torch.no_grad():
            return self.act(self.bn1(self.conv1(x)))


def _no_grad(self, x):
    with torch.no_grad():
        y = torch.relu(self.bn1(self.conv1(x)))
    return torch.relu(self.bn2(self.conv2(y)))


def _optional(self, x, skip=None):
    return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + (x if skip is None else skip))


def _dropout(self, x):
    return self.bn2(self.conv2(F.dropout(torch.relu(self.bn1(self.conv1(x))), 0.5, self.training)))


def _in_place(self, x):
    y = self.bn1(self.conv1(x))
    x = x.relu_()
    return torch.relu(y + x)


def _other_in_place(self, x):
    x = x * 1
    x += self.bn1(self.conv1(x))
    return torch.relu(x) + x


def _counts(self, x):
    self.calls = 1
    return torch.relu(self.bn1(self.conv1(x)))


def _constant(self, x):
    return torch.relu(self.bn1(self.conv1(x))) * torch.tensor(0.5)


def _own_method(self, x):
    return torch.relu(self.bn2(self.conv2(self.first(x))))


@pytest.mark.parametrize(
    "forward", [_no_grad, _optional, _dropout, _in_place, _other_in_place, _counts, _constant, _own_method]
)
def test_a_forward_pass_that_hides_something_stays_as_written(forward):
    class Written(Hidden):
        pass

    Written.forward = forward
    torch.manual_seed(1)
    model = Written()
    apart = qnn.prepare(copy.deepcopy(model), "qat-w8a8")
    joined = qnn.prepare(model, "qat-w8a8", fuse=True)
    assert not fused_rows(joined)
    x = torch.randn(2, 6, 8, 8)
    for training in (True, False):
        apart.train(training), joined.train(training)
        torch.manual_seed(2)
        want = apart(x.clone())
        torch.manual_seed(2)
        assert torch.equal(joined(x.clone()), want)
    assert not hasattr(model, "calls") or forward is _counts


def test_what_changes_after_prepare_brings_the_written_pass_back():
    def written(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(y if self.flag else x)) + x)

    class Written(Hidden):
        pass

    Written.forward = written
    x = torch.randn(2, 6, 8, 8)
    changes = {
        "an attribute": lambda m: setattr(m, "flag", False),
        "an activation": lambda m: setattr(m, "act", nn.GELU()),
        "a convolution": lambda m: setattr(m, "conv2", nn.Conv2d(6, 6, 3, 1, 1)),
    }
    for text, change in changes.items():
        torch.manual_seed(3)
        model = Written()
        model.act = nn.ReLU()
        apart = qnn.prepare(copy.deepcopy(model), "qat-w8a8")
        joined = qnn.prepare(model, "qat-w8a8", fuse=True)
        assert fused_rows(joined)
        for m in (apart, joined):
            m(x)
            torch.manual_seed(4)
            change(m)
        assert torch.equal(apart(x), joined(x)), text


def test_hooks_on_a_container_that_tracing_went_into_are_called():
    _, joined = pair("sequential", "qat-w8a8")
    x, seen = torch.randn(2, 6, 9, 9), []
    joined[1].register_forward_hook(lambda *_: seen.append(1))
    joined(x)
    assert seen == [1]


def test_a_layer_of_two_blocks_keeps_each_reader_s_range():
    conv, bn = nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)

    def block():
        return nn.Sequential(conv, bn, nn.ReLU(), nn.Conv2d(6, 4, 1))

    model = nn.ModuleList([block(), block()])
    model.forward = None
    joined = qnn.prepare(model, "qat-w8a8", fuse=True)
    for part in joined:
        part(torch.randn(2, 6, 5, 5))
    assert all(torch.isfinite(part[3].input_fake_quant.scale).all() for part in joined)


def test_the_first_step_may_be_checkpointed():
    for fuse in (False, True):
        torch.manual_seed(0)
        model = qnn.prepare(nn.Sequential(Block(6, 6, 1), nn.Conv2d(6, 4, 1)), "qat-w8a8", fuse=fuse)
        x = torch.randn(2, 6, 8, 8, requires_grad=True)
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
        assert torch.isfinite(x.grad).all()


def test_a_joined_root_exports():
    _, joined = pair("identity", "qat-w8a8")
    x = torch.randn(2, 6, 8, 8)
    joined(x)
    joined.eval()
    program = torch.export.export(joined, (x,))
    torch.testing.assert_close(program.module()(x), joined(x), rtol=1e-5, atol=1e-5)
