"""The cases on CIFAR-10-JPEG: ResNet-56 teaches ResNet-20; ResNet-20 pruned, in few bits, and both."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from common.augmented import Images, accuracy
from common.data import cifar10_jpeg, data_root, random_images
from torch import nn

from quantrain import PruneSpec, save_checkpoint
from quantrain import nn as qnn
from quantrain.finetune.models import load_weights, resnet20, resnet56
from quantrain.finetune.trainer import TrainSettings
from studies.small_models.training import Teaching, train, zeros

BATCH = 128


@dataclass(frozen=True)
class Sizes:
    adapt: float = 4  # epochs of published weights on these images
    scratch: float = 20
    tune: float = 6
    bits: float = 3


FULL, QUICK = Sizes(), Sizes(0.1, 0.1, 0.1, 0.1)


class Cases:
    """The data, the adapted models, and each case by its name."""

    def __init__(self, device: str, quick: bool, random: bool) -> None:
        self.device, self.sizes = device, QUICK if quick else FULL
        self.images = Images.of(random_images() if random else cifar10_jpeg(), device)
        self.random = random

    def batches(self, seed: int):
        def of_epoch(epoch: int):
            generator = torch.Generator().manual_seed(1000 * seed + epoch)
            for inputs, labels in self.images.batches(BATCH, generator):
                yield (inputs,), labels

        return of_epoch

    def run(self, model: nn.Module, epochs: float, lr: float, seed: int, **options) -> dict:
        steps = max(4, round(epochs * (len(self.images.train_labels) // BATCH)))
        loss = train(model, self.batches(seed), steps, TrainSettings(epochs=epochs, lr=lr, seed=seed), **options)
        return {"accuracy": accuracy(model.eval(), self.images)[0], "loss": loss, "zeros": zeros(model), "steps": steps}

    def adapted(self, name: str) -> nn.Module:
        """Published weights, tuned for a few epochs on these images: the same in every process, kept in a file."""
        path = Path(tempfile.gettempdir()) / f"small-models-{name}-{self.sizes.adapt}-{self.random}.pt"
        model = {"resnet20": resnet20, "resnet56": resnet56}[name](10, 3).to(self.device)
        if path.is_file():
            model.load_state_dict(torch.load(path, map_location=self.device, weights_only=True))
            return model.eval()
        if not self.random:
            load_weights(model, next(iter(sorted((data_root() / "resnet-cifar10-pretrained").glob(f"{name}-*.th")))))
        self.run(model, self.sizes.adapt, 0.02, 0)
        torch.save(model.state_dict(), path)
        return model.eval()

    def names(self) -> list[str]:
        return [
            "resnet20", "resnet20 taught", "tuned", "tuned taught", "pruned 0.5", "pruned 0.8", "pruned 0.8 taught",
            "qat-w4a4", "qat-w4a4 taught", "qat-w8a8", "qat-w8a8 pruned 0.5", "qat-w4a4 pruned 0.5 taught",
        ]  # fmt: skip

    def __call__(self, name: str, seed: int) -> dict:
        taught = name.endswith(" taught")
        words = name.removesuffix(" taught").split()
        if words[0] == "resnet20":
            torch.manual_seed(seed)
            model = resnet20(10, 3).to(self.device)
            teaching = Teaching(self.adapted("resnet56")) if taught else None
            return self.run(model, self.sizes.scratch, 0.1, seed, teaching=teaching) | self.stored(model)
        model = self.adapted("resnet20")
        teaching = None
        if taught:  # in few bits its float self, at a temperature that leaves 4-bit scales stable
            own = words[0].startswith("qat")
            teaching = Teaching(copy.deepcopy(model), 2.0, 0.7) if own else Teaching(self.adapted("resnet56"))
        prune = (
            PruneSpec(sparsity=float(words[words.index("pruned") + 1]), schedule="cubic") if "pruned" in words else None
        )
        if not words[0].startswith("qat"):
            return self.run(model, self.sizes.tune, 0.02, seed, teaching=teaching, prune=prune) | self.stored(model)
        model = qnn.prepare(model, words[0], fuse=True)
        qnn.calibrate(model, [inputs[0] for _, (inputs, _) in zip(range(8), self.batches(7)(0), strict=False)])
        found = self.run(model, self.sizes.bits * (2 if prune else 1), 0.005, seed, teaching=teaching, prune=prune)
        converted = qnn.convert(copy.deepcopy(model).eval())
        return found | {"accuracy": accuracy(converted, self.images)[0]} | self.stored(converted)

    def stored(self, model: nn.Module) -> dict:
        """What a checkpoint takes; of float weights with masks their kept values and the mask."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            save_checkpoint(path, model)
            tensors = model.state_dict()
            held = path.stat().st_size
            if not any(name.endswith("weight_codes") for name in tensors):
                dropped = [tensors[n.removesuffix("_mask")] for n in tensors if n.endswith("weight_mask")]
                held -= sum(4 * int((w == 0).sum()) for w in dropped)
        return {"bytes": held}
