"""Models of the fine-tuning job: ResNet-20, and any function a user names as ``module:function``."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut without parameters (option A of He et al. 2016, section 4.2).

    Where the stride is 2 the shortcut takes every second row and column and pads the new channels with zeros, half on
    either side. ``input`` is ``[N, in_planes, H, W]``, the result ``[N, planes, H / stride, W / stride]``.
    """

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride = stride
        self.extra_planes = planes - in_planes

    def shortcut(self, input: Tensor) -> Tensor:
        """The block's input, cut and padded to the shape of its output."""
        if self.stride == 1 and self.extra_planes == 0:
            return input
        before = self.extra_planes // 2
        cut = input[:, :, :: self.stride, :: self.stride]
        return functional.pad(cut, (0, 0, 0, 0, before, self.extra_planes - before))

    def forward(self, input: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(input)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + self.shortcut(input))


class ResNet20(nn.Module):
    """ResNet-20 for small images (He et al. 2016, section 4.2): 3 stages of 3 blocks, 16, 32 and 64 planes wide.

    Parameter names are those of akamaster/pytorch_resnet_cifar10. ``input`` is ``[N, in_channels, H, W]`` with H and W
    at least 4; the result is ``[N, num_classes]`` logits.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, stride=1)
        self.layer2 = _stage(16, 32, stride=2)
        self.layer3 = _stage(32, 64, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, input: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(input)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean(dim=(2, 3)))


def _stage(in_planes: int, planes: int, stride: int) -> nn.Sequential:
    blocks = [BasicBlock(in_planes, planes, stride)]
    blocks += [BasicBlock(planes, planes, 1) for _ in range(2)]
    return nn.Sequential(*blocks)


def resnet20(num_classes: int = 10, in_channels: int = 1) -> ResNet20:
    """ResNet-20 with fresh weights drawn from the default generator (0.27 M parameters).

    Example:
        >>> resnet20()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    return ResNet20(num_classes, in_channels)


def names_code(name: str) -> bool:
    """Whether ``name`` has the form ``module:function``.

    Example:
        >>> names_code("my_models:tiny"), names_code("resnet20")
        (True, False)
    """
    return ":" in name


def load_model(name: str, num_classes: int, in_channels: int) -> nn.Module:
    """The model that ``name`` means: ``resnet20``, or ``module:function`` for a function that returns an nn.Module.

    The function is called with those of ``num_classes`` and ``in_channels`` that it has parameters for. Modules are
    looked for in the current folder too.

    Raises:
        ValueError: ``name`` is neither, or the module has no such function, or it returns something else.
    """
    if name == "resnet20":
        return resnet20(num_classes, in_channels)
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise ValueError(f"--model: expected resnet20 or module:function, got {name!r}")
    function = _import_function(module_name, function_name)
    known = inspect.signature(function).parameters
    offered = {"num_classes": num_classes, "in_channels": in_channels}
    model = function(**{key: value for key, value in offered.items() if key in known})
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model: expected {name} to return a torch.nn.Module, got {type(model).__name__}")
    return model


def _import_function(module_name: str, function_name: str):
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"--model: expected an importable module, got {module_name!r} ({error})") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(
            f"--model: expected a function in {module_name}, got {function_name!r}, which it does not have"
        )
    return function
