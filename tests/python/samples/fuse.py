"""The patterns that prepare joins, one small block each, and one step of training."""

import copy

import torch
from torch import nn

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
