"""Models of the fine-tuning job: ResNet-20, and any function a user names as ``module:function``."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import torch
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
    """ResNet-20 for small images (He et al. 2016, section 4.2): 3 stages of 3 blocks, 16, 32 and 64 planes wide; with
    more ``blocks`` a stage ResNet-32 (5) and ResNet-56 (9).

    Parameter names are those of akamaster/pytorch_resnet_cifar10. ``input`` is ``[N, in_channels, H, W]`` with H and W
    at least 4; the result is ``[N, num_classes]`` logits.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, blocks: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, stride=1, blocks=blocks)
        self.layer2 = _stage(16, 32, stride=2, blocks=blocks)
        self.layer3 = _stage(32, 64, stride=2, blocks=blocks)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, input: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(input)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean(dim=(2, 3)))


def _stage(in_planes: int, planes: int, stride: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(in_planes, planes, stride)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(blocks - 1)))


def resnet20(num_classes: int = 10, in_channels: int = 1) -> ResNet20:
    """ResNet-20 with fresh weights drawn from the default generator (0.27 M parameters).

    Example:
        >>> resnet20()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    return ResNet20(num_classes, in_channels)


def resnet56(num_classes: int = 10, in_channels: int = 1) -> ResNet20:
    """ResNet-56 with fresh weights drawn from the default generator (0.85 M parameters): a teacher of ResNet-20.

    Example:
        >>> sum(parameter.numel() for parameter in resnet56(10, 3).parameters())
        853018
    """
    return ResNet20(num_classes, in_channels, blocks=9)


def mlp(num_classes: int, in_features: int, hidden: int = 64) -> nn.Sequential:
    """Three linear layers with ReLU between them, for rows of ``in_features`` numbers.

    Example:
        >>> mlp(3, 4)(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """
    return nn.Sequential(
        nn.Linear(in_features, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_classes),
    )


def load_weights(model: nn.Module, path: Path) -> None:
    """Reads a state dict into ``model``: a safetensors file, or one of torch.save, also under ``"state_dict"`` and with the
    prefix ``module.`` of a parallel model.

    Raises:
        ValueError: It is no such file, or of another model; the model is then unchanged.
        FileNotFoundError: No such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--teacher-weights: expected a file, got none at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            tensors = tensors.get("state_dict", tensors)
        model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in tensors.items()})
    except Exception as error:
        text = str(error).splitlines()[0]
        raise ValueError(
            f"--teacher-weights: {path}: expected the weights of {type(model).__name__}, got {text}"
        ) from error


BUILT_IN = {"resnet20": resnet20, "resnet56": resnet56, "mlp": mlp}


def names_code(name: str) -> bool:
    """Whether ``name`` has the form ``module:function``.

    Example:
        >>> names_code("my_models:tiny"), names_code("resnet20")
        (True, False)
    """
    return ":" in name


def load_model(name: str, *, option: str = "--model", **offered: int) -> tuple[nn.Module, str]:
    """The model that ``name`` means, and the call that made it: ``resnet20``, or ``module:function`` for a function of
    the user.

    Args:
        name: A function is called with those of ``offered`` that it has parameters for; one with ``**kwargs`` gets
            ``num_classes`` too. Modules are looked for in the current folder as well.
        offered: What the data says: ``num_classes``, and ``in_channels`` of images or ``in_features`` of rows of
            numbers.
        option: What errors call it.

    Raises:
        ValueError: ``name`` is neither, or the module has no such function, or it fails or returns something else.
    """
    function = BUILT_IN.get(name) or import_function(name, option, ", ".join(BUILT_IN))
    known = inspect.signature(function).parameters.values()
    taken = {parameter.name for parameter in known}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
        taken.add("num_classes")
    given = {key: value for key, value in offered.items() if key in taken}
    call = f"{name}({', '.join(f'{key}={value}' for key, value in given.items())})"
    try:
        model = function(**given)
    except Exception as error:
        raise ValueError(
            f"{option}: expected {call} to return a torch.nn.Module, got {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{option}: expected {call} to return a torch.nn.Module, got {type(model).__name__}")
    return model, call


def import_function(name: str, option: str, others: str):
    """The function ``name``, of the form ``module:function``; ``others`` is what else ``option`` takes.

    Raises:
        ValueError: It is not of that form, the module cannot be imported, or it has no such function.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise ValueError(f"{option}: expected {others} or module:function, got {name!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"{option}: expected an importable module, got {module_name!r} ({error})") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(
            f"{option}: expected a function in {module_name}, got {function_name!r}, which it does not have"
        )
    return function
