"""The two networks of the study with their data on the device: ResNet-20 on images, a small GPT on bytes.

A task draws batches from indices that are already on the device and never waits for it, so that a whole step can be captured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantrain.finetune.models import resnet20

from .data import Images

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "python"))
from gpt import FLOAT_LAYERS, GPT, GPTConfig, init_weights, loss_of  # noqa: E402

PAD = 4
# The pretrained ResNet-20 was trained with ImageNet's channel statistics.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageTask:
    """ResNet-20 on uint8 images that stay on the device: random crops of the image padded by 4, random flips.

    Args:
        images: the data.
        batch_size: samples per step.
        device: where everything is.
        layout: memory format of images and model.
    """

    name = "resnet20"
    skip = ("*bn?",)  # batch norms stay apart, in full precision, as in the authors' networks
    measure = "test accuracy, %"

    def __init__(
        self, images: Images, batch_size: int, device: str, layout: torch.memory_format = torch.contiguous_format
    ) -> None:
        self.batch_size, self.device, self.layout = batch_size, device, layout
        self.padded = F.pad(images.train_images, (PAD, PAD, PAD, PAD)).to(device)
        self.labels = images.train_labels.to(device)
        self.test_images, self.test_labels = images.test_images.to(device), images.test_labels.to(device)
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in (MEAN, STD))
        self.channels = torch.arange(3, device=device).view(1, 3, 1, 1)
        self.pixels = torch.arange(32, device=device)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.labels) // self.batch_size

    def model(self, seed: int, weights: dict[str, Tensor] | None = None) -> nn.Module:
        """A float model on the device, with fresh weights or the given ones."""
        torch.manual_seed(seed)
        model = resnet20(10, 3)
        if weights is not None:
            model.load_state_dict(weights)
        return model.to(self.device, memory_format=self.layout)

    def indices(self, seed: int, steps: int) -> Iterator[Tensor]:
        """A batch of sample numbers per step, each epoch in an order of its own."""
        generator = torch.Generator().manual_seed(seed)
        order: list[Tensor] = []
        for _ in range(steps):
            if not order:
                shuffled = torch.randperm(len(self.labels), generator=generator).to(self.device, non_blocking=True)
                order = list(shuffled.split(self.batch_size)[: self.steps_per_epoch])
            yield order.pop(0)

    def batch(self, index: Tensor, *, augment: bool = True) -> tuple[Tensor, Tensor]:
        """Images ``[B, 3, 32, 32]`` and labels; crops and flips come from the device's default generator."""
        corner = torch.full((2, len(index), 1), PAD, device=self.device)
        columns = self.pixels.expand(len(index), 32)
        if augment:
            corner = torch.randint(2 * PAD + 1, (2, len(index), 1), device=self.device)
            flip = torch.rand(len(index), 1, device=self.device) < 0.5
            columns = torch.where(flip, 31 - columns, columns)
        rows, columns = corner[0] + self.pixels, corner[1] + columns
        pixels = self.padded[
            index.view(-1, 1, 1, 1), self.channels, rows.view(-1, 1, 32, 1), columns.view(-1, 1, 1, 32)
        ]
        return self._normalize(pixels), self.labels[index]

    def _normalize(self, pixels: Tensor) -> Tensor:
        return ((pixels.float() - self.mean) / self.std).contiguous(memory_format=self.layout)

    @staticmethod
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).float(), y)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Per cent of the test images that the model classifies right."""
        model.eval()
        right = torch.zeros((), device=self.device)
        for images, labels in zip(self.test_images.split(1000), self.test_labels.split(1000), strict=True):
            right += (model(self._normalize(images)).argmax(dim=1) == labels).sum()
        model.train()
        return 100 * float(right) / len(self.test_labels)


class TextTask:
    """A GPT on bytes; the last tenth of the text is held out.

    Args:
        text: uint8 bytes.
        config: sizes of the model.
        batch_size: sequences per step.
        device: where everything is.
    """

    name = "gpt"
    skip = FLOAT_LAYERS
    measure = "held-out loss, nats per byte"

    def __init__(self, text: Tensor, config: GPTConfig, batch_size: int, device: str) -> None:
        self.config, self.batch_size, self.device = config, batch_size, device
        text = text.to(device)
        held_out = len(text) // 10
        self.train, self.held_out = text[:-held_out], text[-held_out:]
        self.window = torch.arange(config.context + 1, device=device)

    def model(self, seed: int, weights: dict[str, Tensor] | None = None) -> nn.Module:
        """A float model on the device, with fresh weights or the given ones."""
        torch.manual_seed(seed)
        model = GPT(self.config)
        init_weights(model, self.config.layers)
        if weights is not None:
            model.load_state_dict(weights)
        return model.to(self.device)

    def indices(self, seed: int, steps: int) -> Iterator[Tensor]:
        """Where the sequences of each step begin."""
        generator = torch.Generator().manual_seed(seed)
        high = len(self.train) - self.config.context
        starts = torch.randint(high, (steps, self.batch_size), generator=generator).to(self.device)
        yield from starts

    def batch(self, index: Tensor, *, augment: bool = True) -> tuple[Tensor, Tensor]:
        """Inputs and targets ``[B, context]``."""
        return self._rows(self.train, index)

    def _rows(self, text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        tokens = text[starts.unsqueeze(-1) + self.window].long()
        return tokens[:, :-1], tokens[:, 1:]

    @staticmethod
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return loss_of(model(x), y)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Mean loss over held-out windows that do not overlap, at most 640 of them."""
        model.eval()
        windows = (len(self.held_out) - 1) // self.config.context
        starts = torch.arange(min(windows, 640), device=self.device) * self.config.context
        losses = [self.loss(model, *self._rows(self.held_out, part)) * len(part) for part in starts.split(64)]
        model.train()
        return float(sum(losses)) / len(starts)
