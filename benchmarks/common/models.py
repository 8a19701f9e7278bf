"""Networks in plain PyTorch: for images of 28x28 and 32x32 pixels, and ResNet-18 for those of 224x224; GPT-2's shapes."""

from __future__ import annotations

from torch import Tensor, nn

from quantrain.finetune.models import resnet20

__all__ = ["MODELS", "MobileNetV2", "gpt2_shapes", "mobilenet_v2", "resnet18"]

# expansion t, channels c, blocks n, first stride s: table 2 of Sandler et al. 2018 (arXiv:1801.04381), cut for small images.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 3, 2), (6, 96, 2, 1))
_HEAD = 320


def _conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 linear projection; the shortcut where shapes allow it.

    ``input`` is ``[N, in_channels, H, W]``, the result ``[N, out_channels, H / stride, W / stride]``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = in_channels * expansion
        layers = [*_conv_bn(in_channels, wide, 1), nn.ReLU6()] if expansion > 1 else []
        layers += [*_conv_bn(wide, wide, 3, stride, groups=wide), nn.ReLU6(), *_conv_bn(wide, out_channels, 1)]
        self.layers = nn.Sequential(*layers)
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, input: Tensor) -> Tensor:
        output = self.layers(input)
        return input + output if self.shortcut else output


class MobileNetV2(nn.Module):
    """MobileNet-V2's blocks for small images (0.5 M parameters): ``[N, in_channels, H, W]`` -> ``[N, num_classes]`` logits."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers, channels = [*_conv_bn(in_channels, 32, 3), nn.ReLU6()], 32
        for expansion, width, blocks, stride in _STAGES:
            for block in range(blocks):
                layers.append(InvertedResidual(channels, width, stride if block == 0 else 1, expansion))
                channels = width
        self.features = nn.Sequential(*layers, *_conv_bn(channels, _HEAD, 1), nn.ReLU6())
        self.classifier = nn.Linear(_HEAD, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.features(input).mean(dim=(2, 3)))


def mobilenet_v2(num_classes: int = 10, in_channels: int = 3) -> MobileNetV2:
    """:class:`MobileNetV2` with fresh weights drawn from the default generator."""
    return MobileNetV2(num_classes, in_channels)


def resnet18(num_classes: int, in_channels: int) -> nn.Module:
    """torchvision's, of three input channels."""
    from torchvision.models import resnet18

    return resnet18(num_classes=num_classes)


MODELS = {"resnet20": resnet20, "mobilenet_v2": mobilenet_v2}


def gpt2_shapes(
    layers: int = 12, width: int = 768, vocabulary: int = 50304, context: int = 1024
) -> list[tuple[int, ...]]:
    """The parameters of GPT-2 124M: 148 tensors."""
    shapes = [(vocabulary, width), (context, width)]
    for _ in range(layers):
        shapes += [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [*shapes, (width,), (width,)]
