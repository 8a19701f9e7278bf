"""What the source of a forward pass does beside operations on tensors keeps a block as it is written, or brings that back."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quantrain.nn as qnn
from quantrain.nn.fuse import fused_rows


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6)

    def first(self, x):
        return F.relu(self.bn1(self.conv1(x)))

    def second(self, x):
        return F.relu(self.bn2(self.conv2(x)))


def pair(block):
    torch.manual_seed(0)
    model = block()
    apart = qnn.prepare(copy.deepcopy(model), "qat-w8a8")
    return apart, qnn.prepare(model, "qat-w8a8", fuse=True)


X = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(1))


# ---- hidden: what tracing would lose ------------------------------------------------------------------------------------------


def detached(block, x):
    with torch.no_grad():
        return block.first(x)


class Doubled(torch.autograd.Function):
    """Another derivative than its formula's."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 0


doubled = Doubled.apply
SWITCH = [True]


class FromAFunction(Base):
    def forward(self, x):
        return self.second(detached(self, x))


class FromAFunctionInside(Base):
    def forward(self, x):
        def inner(x):
            with torch.no_grad():
                return self.first(x)

        return self.second(inner(x))


class FromAClassMethod(Base):
    @classmethod
    def without(cls, block, x):
        with torch.no_grad():
            return block.first(x)

    def forward(self, x):
        return self.second(self.without(self, x))


class Parent(Base):
    def forward(self, x):
        with torch.no_grad():
            return self.first(x)


class FromABaseClass(Parent):
    def forward(self, x):
        return self.second(super().forward(x))


class FromANamedBaseClass(Parent):
    def forward(self, x):
        return self.second(Parent.forward(self, x))


class FromAProperty(Base):
    kept = 2

    @property
    def scale(self):
        return self.kept

    def forward(self, x):
        return self.second(self.first(x)) * self.scale


class FromAGlobal(Base):
    def forward(self, x):
        return self.second(self.first(x)) if SWITCH[0] else x


class FromATypeOfArgument(Base):
    def forward(self, x):
        return self.second(self.first(x * 2 if isinstance(x, Tensor) else x))


class FromAnException(Base):
    def forward(self, x):
        y = self.first(x)
        try:
            y = y * float(x.detach().abs().sum())
        except TypeError:  # as a stand-in for a tensor raises
            y = y * 2
        return self.second(y)


class FromRandomNumbers(Base):
    def forward(self, x):
        return self.second(self.first(x)) * random.uniform(1, 2)


class FromADerivative(Base):
    def forward(self, x):
        return self.second(doubled(self.first(x)))


class FromADerivativeByName(Base):
    def forward(self, x):
        return self.second(Doubled.apply(self.first(x)))


class FromPrinting(Base):
    def forward(self, x):
        print("called")
        return self.second(self.first(x))


class FromAttributesMadeUp(Base):
    def __getattr__(self, name):
        return self.conv2 if name == "other" else super().__getattr__(name)

    def forward(self, x):
        return F.relu(self.bn2(self.other(self.first(x))))


HIDDEN = [value for name, value in list(globals().items()) if name.startswith("From")]


@pytest.mark.parametrize("block", HIDDEN, ids=lambda block: block.__name__)
def test_a_block_with_something_hidden_stays_as_written(block):
    apart, joined = pair(block)
    assert not fused_rows(joined)
    found = []
    for model in (apart, joined):
        random.seed(3)
        given = X.clone().requires_grad_()
        model(given).square().sum().backward()
        found.append((given.grad, [p.grad for p in model.parameters()]))
    assert all((a is None) == (b is None) for a, b in zip(*[grads for _, grads in found], strict=True))
    assert found[0][0] is None or torch.equal(found[0][0], found[1][0])


def plus(x, y):
    return x + y


class Plain(Base):
    """Functions, methods, constants of its class and loops that a graph shows are no hindrance."""

    times = 2

    def __init__(self):
        super().__init__()
        self.more = nn.ModuleList([nn.Conv2d(6, 6, 1) for _ in range(2)])

    @staticmethod
    def halved(x):
        return x / 2

    def forward(self, x):
        y = self.halved(self.second(self.first(x))) * self.times
        for layer in self.more:
            y = layer(y)
        return plus(y, torch.flatten(x, 2).sum(2)[..., None, None])


def test_what_a_graph_shows_is_joined():
    apart, joined = pair(Plain)
    assert fused_rows(joined) == ["conv1: batch norm + relu + input of conv2", "conv2: batch norm + relu"]
    assert torch.equal(apart(X), joined(X))


# ---- changed after prepare --------------------------------------------------------------------------------------------------


class Switched(Base):
    """Attributes of the class, not of the object."""

    skips = True

    def forward(self, x):
        y = self.second(self.first(x))
        return y + x if self.skips else y


def set_on_the_class(model):
    type(model).skips = False


@pytest.mark.parametrize("change", [lambda model: setattr(model, "skips", False), set_on_the_class])
def test_an_attribute_of_the_class_changes(change):
    class Own(Switched):
        skips = True

    apart, joined = pair(Own)
    assert fused_rows(joined) and torch.equal(apart(X), joined(X))
    change(apart), change(joined)
    assert torch.equal(apart(X), joined(X))


def test_a_layer_joins_a_list_that_the_block_loops_over():
    apart, joined = pair(Plain)
    apart(X), joined(X)
    for model in (apart, joined):
        model.more.append(nn.Hardtanh(-0.1, 0.1))
    assert torch.equal(apart(X), joined(X))


def test_none_in_place_of_a_tensor():
    class Optional(Base):
        def forward(self, x, skip):
            y = self.first(x)
            return self.second(y * 2) if skip is None else self.second(y + skip)

    apart, joined = pair(Optional)
    assert fused_rows(joined)
    for arguments in ({"skip": X}, {"skip": None}):
        assert torch.equal(apart(X, **arguments), joined(X, **arguments))


def test_a_layer_of_two_blocks_has_the_range_of_both_inputs():
    class Reads(nn.Module):
        def __init__(self, both):
            super().__init__()
            self.both, self.own = both, nn.Conv2d(6, 6, 1)
            self.conv, self.bn = nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)

        def forward(self, x):
            return self.both(x) + self.own(x) + F.relu(self.bn(self.conv(x)))

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = nn.Conv2d(6, 6, 1)
            self.one, self.two = Reads(self.both), Reads(self.both)

        def forward(self, x):
            return self.one(x) + self.two(3 * x)

    apart, joined = pair(Two)
    assert "two: one fake-quantized input of own, conv" in fused_rows(joined)
    for _ in range(2):
        assert torch.equal(apart(X), joined(X))
    states = joined.state_dict()
    assert all(torch.equal(value, states[name]) for name, value in apart.state_dict().items())
    assert torch.equal(qnn.convert(apart.eval())(X), qnn.convert(joined.eval())(X))


class Loops(nn.Module):
    """Convolutions in lists alone; a nn.Sequential in a list belongs to the block that calls it."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(2, 2, 3, 1, 1, bias=False) for _ in range(3))
        self.bns = nn.ModuleList(nn.BatchNorm2d(2) for _ in range(3))
        self.tails = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1))
            for _ in range(2)
        )

    def forward(self, x):
        parts, y = [], 0
        for n, conv in enumerate(self.convs):
            y = F.relu(self.bns[n](conv(x[:, 2 * n : 2 * n + 2] + y)))
            parts.append(y)
        x = torch.cat(parts, 1)
        return self.tails[1](self.tails[0](x))


def test_a_block_whose_convolutions_are_in_lists():
    apart, joined = pair(Loops)
    assert fused_rows(joined) == [
        *(f"convs.{n}: batch norm + relu" for n in range(3)),
        *(f"tails.{n}.0: batch norm + relu + input of tails.{n}.3" for n in range(2)),
    ]
    for _ in range(2):
        assert torch.equal(apart(X), joined(X))
    other = nn.Conv2d(2, 2, 1)
    for model in (apart, joined):
        model.convs[1] = copy.deepcopy(other)
    assert torch.equal(apart(X), joined(X))
