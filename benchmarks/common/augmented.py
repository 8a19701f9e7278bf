"""Image sets that lie whole on one device: batches flipped and shifted there, and what a model gets right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Images", "accuracy"]

_PAD = 4  # pixels of the random crop


@dataclass(frozen=True)
class Images:
    """uint8 images ``[N, C, H, W]`` and labels ``[N]`` on one device, and the statistics that normalize them."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: Tensor  # [C, 1, 1], on the scale 0 to 1
    std: Tensor

    @classmethod
    def of(cls, data, device: torch.device | str) -> Images:
        """From an object with the four tensors."""
        images = data.train_images.to(device)
        sample = images[:20_000].float() / 255
        parts = [data.train_labels, data.test_images, data.test_labels]
        mean, std = sample.mean((0, 2, 3)).reshape(-1, 1, 1), sample.std((0, 2, 3)).reshape(-1, 1, 1)
        return cls(images, *(part.to(device) for part in parts), mean, std)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images as float32, mean 0 and standard deviation 1 a channel."""
        return (images.float() / 255 - self.mean) / self.std

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of whole batches, each flipped and shifted at random, zeros behind the border."""
        order = torch.randperm(len(self.train_labels), generator=generator)
        for indices in order[: len(order) // size * size].split(size):
            indices = indices.to(self.train_images.device)
            images = self.normalize(self.train_images[indices])
            flipped = torch.rand(size, generator=generator).to(images.device) < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
            yield _shifted(images, generator), self.train_labels[indices]


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    size, _, height, width = images.shape
    shifts = torch.randint(0, 2 * _PAD + 1, (2, size), generator=generator).to(images.device)
    rows = shifts[0][:, None] + torch.arange(height, device=images.device)
    columns = shifts[1][:, None] + torch.arange(width, device=images.device)
    padded = functional.pad(images, (_PAD,) * 4).permute(0, 2, 3, 1)
    sample = torch.arange(size, device=images.device)[:, None, None]
    return padded[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def accuracy(model, images: Images, batch_size: int = 1000) -> tuple[float, float]:
    """Per cent right and mean cross-entropy of ``model`` (a module in evaluation mode, or any function) on the test set."""
    if isinstance(model, nn.Module):
        model.eval()
    correct, loss = 0, 0.0
    for inputs, labels in zip(images.test_images.split(batch_size), images.test_labels.split(batch_size), strict=True):
        logits = model(images.normalize(inputs))
        correct += int((logits.argmax(1) == labels).sum())
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
    return 100 * correct / len(images.test_labels), loss / len(images.test_labels)
