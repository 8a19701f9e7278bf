"""Networks that the tests of fixed-point training prepare, and how they bring one to a state worth comparing."""

import json

import torch
from reference import fixed_point_network as oracle
from torch import nn
from torch.nn import functional

import quantrain.nn as qnn


class Block(nn.Module):
    """A residual block with an identity, a 1x1 convolution or (``option_a``) a cut and padded copy as its shortcut."""

    def __init__(self, planes, out, stride=1, option_a=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(planes, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.option_a, self.extra, self.stride = option_a, out - planes, stride
        self.downsample = None
        if not option_a and (stride != 1 or planes != out):
            self.downsample = nn.Sequential(nn.Conv2d(planes, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.option_a and self.stride != 1:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        y += x
        return torch.relu(y)


class ResNet(nn.Module):
    def __init__(self, option_a=False, ending="mean"):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Block(8, 8), Block(8, 8))
        self.layer2 = nn.Sequential(Block(8, 16, 2, option_a), Block(16, 16))
        self.pool = {"module": nn.AdaptiveAvgPool2d(1), "avg": nn.AvgPool2d(4)}.get(ending)
        self.fc = nn.Linear(16, 5)
        self.ending = ending

    def forward(self, x):
        x = self.layer2(self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x))))))
        if self.ending == "mean":
            x = x.mean(dim=(2, 3))
        elif self.ending == "functional":
            x = torch.flatten(functional.adaptive_avg_pool2d(x, (1, 1)), 1)
        elif self.ending == "view":
            x = functional.adaptive_avg_pool2d(x, 1)
            x = x.view(x.size(0), -1)
        else:
            x = self.pool(x)
            x = x.reshape(x.shape[0], -1)
        return self.fc(x)


def mobilenet_v1(width=8):
    """Depthwise and pointwise convolutions, each with batch norm and ReLU6."""

    def separable(planes, out, stride):
        return nn.Sequential(
            nn.Conv2d(planes, planes, 3, stride, 1, groups=planes, bias=False),
            nn.BatchNorm2d(planes),
            nn.ReLU6(inplace=True),
            nn.Conv2d(planes, out, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU6(inplace=True),
        )

    stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6())
    blocks = [separable(width, 2 * width, 1), separable(2 * width, 2 * width, 2)]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(2 * width, 5))


class Plain(nn.Module):
    """Biases without batch norm, pools between, two linear layers: a network of the VGG kind."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(12 * 4 * 4, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.relu(functional.max_pool2d(self.conv2(x), 2))
        x = functional.dropout(torch.flatten(x, 1), training=self.training)
        return self.fc2(functional.relu(self.fc1(x)))


def trained(build, seed=0, size=16, batch=6):
    """A float model whose batch norms have seen data and have uneven factors, and images for it."""
    torch.manual_seed(seed)
    model, images = build(), torch.randn(batch, 3, size, size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.momentum = 0.5
    with torch.no_grad():
        for _ in range(3):
            model(images)
    return model, images


def prepared(build, recipe="f8net", seed=0, size=16):
    """A calibrated model under the recipe, and images."""
    model, images = trained(build, seed, size)
    model = qnn.prepare(model, recipe)
    return qnn.calibrate(model, [images, images.flip(0)]), images


def train_steps(model, images, steps=2, rate=0.02):
    """The losses of a few SGD steps on fixed labels."""
    labels = torch.arange(len(images)) % 5
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    model.train()
    losses = []
    for _ in range(steps):
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def assert_integer_exact(model, images):
    """At every node the simulation's integers are those of the graph in int64; so are the logits."""
    text, tensors = qnn.fixed_point_program(model)
    graph = json.loads(text)
    codes = qnn.simulated_codes(model, images)
    exact = oracle.run(graph, tensors, codes["input"].numpy())
    assert set(exact) | {"input"} == set(codes)
    for name, values in exact.items():
        assert torch.equal(codes[name], torch.from_numpy(values)), name
    with torch.no_grad():
        logits = model.eval()(images)
    expected = torch.from_numpy(exact[graph["output"]["name"]] * graph["output"]["scale"]).float()
    assert torch.equal(logits, expected)
    return graph, exact
