"""A model for scikit-learn's digits and a command line that trains it in a second or two."""

from pathlib import Path

from torch import nn


def tiny(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """A model small enough for a test: one folded convolution and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 64, num_classes),
    )


def arguments(folder: Path, *more: str) -> list[str]:
    """Of ``quantrain finetune``, into ``folder / "t"``."""
    common = "finetune --data digits --model samples.digits:tiny --name t"
    training = "--epochs 2 --qat-epochs 1 --batch-size 64 --calibration-batches 2 --lr 0.05"
    return [*common.split(), *training.split(), "--runs", str(folder), *more]
