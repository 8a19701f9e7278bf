"""The cases on SST-2: MiniLM-L6 teaches one of three layers; MiniLM-L6 pruned, in few bits, and both."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from quantrain import PruneSpec
from quantrain import nn as qnn
from quantrain.distill import shallow_student
from quantrain.finetune.minilm import load_tokenizer, sentence_classifier
from quantrain.finetune.text import load_text_data
from quantrain.finetune.trainer import TrainSettings, evaluate
from studies.small_models.training import Teaching, train, zeros

BATCH = 32
FLOAT = ("*embeddings*", "classifier")


@dataclass(frozen=True)
class Sizes:
    sentences: int = 6_400
    epochs: float = 1.0
    test: int | None = None


FULL, QUICK = Sizes(), Sizes(96, 1.0, 64)


class Cases:
    """The data, the teacher, and each case by its name."""

    def __init__(self, device: str, quick: bool, random: bool) -> None:
        self.device, self.sizes = torch.device(device), QUICK if quick else FULL
        self.data = load_text_data("sst2", load_tokenizer()).subset(self.sizes.sentences, self.sizes.test)

    def batches(self, seed: int):
        def of_epoch(epoch: int):
            order = torch.randperm(self.data.train_size, generator=torch.Generator().manual_seed(1000 * seed + epoch))
            for rows in order.split(BATCH):
                inputs, labels = self.data.train_batch(rows, None)
                yield tuple(t.to(self.device) for t in inputs), labels.to(self.device)

        return of_epoch

    def run(self, model: nn.Module, lr: float, seed: int, epochs: float | None = None, **options) -> dict:
        steps = round((epochs or self.sizes.epochs) * -(-self.data.train_size // BATCH))
        settings = TrainSettings(epochs=1, lr=lr, optimizer="adamw", weight_decay=0.01, warmup=0.1, seed=seed)
        loss = train(model, self.batches(seed), steps, settings, skip=FLOAT, **options)
        return {
            "accuracy": 100 * evaluate(model, self.data, self.device)[0],
            "loss": loss,
            "zeros": zeros(model),
            "steps": steps,
        }

    def teacher(self) -> nn.Module:
        path = Path(tempfile.gettempdir()) / f"small-models-minilm-{self.sizes.sentences}.pt"
        torch.manual_seed(0)
        model = sentence_classifier().to(self.device)
        if path.is_file():
            model.load_state_dict(torch.load(path, map_location=self.device, weights_only=True))
        else:
            self.run(model, 2e-4, 0)
            torch.save(model.state_dict(), path)
        return model.eval()

    def names(self) -> list[str]:
        return [
            "minilm", "3 layers", "3 layers taught", "tuned", "pruned 0.5", "pruned 0.8", "pruned 0.8 taught",
            "qat-w4a4", "qat-w4a4 taught", "qat-w8a8 pruned 0.5",
        ]  # fmt: skip

    def __call__(self, name: str, seed: int) -> dict:
        taught = name.endswith(" taught")
        words = name.removesuffix(" taught").split()
        teacher = self.teacher()
        teaching = Teaching(teacher, temperature=2.0, weight=0.7) if taught else None
        if words[0] == "minilm":
            torch.manual_seed(seed)
            return self.run(sentence_classifier().to(self.device), 2e-4, seed)
        if words[0] == "3":
            return self.run(shallow_student(teacher, layers=[0, 2, 4]), 2e-4, seed, teaching=teaching)
        model = copy.deepcopy(teacher).requires_grad_(True)
        prune = (
            PruneSpec(sparsity=float(words[words.index("pruned") + 1]), schedule="cubic") if "pruned" in words else None
        )
        if not words[0].startswith("qat"):
            return self.run(model, 1e-4, seed, teaching=teaching, prune=prune)
        model = qnn.prepare(model, words[0], skip=FLOAT)
        first = [batch for _, (batch, _) in zip(range(8), self.batches(7)(0), strict=False)]
        qnn.calibrate(model, first, forward=lambda of, batch: of(*batch))
        found = self.run(model, 5e-5, seed, teaching=teaching, prune=prune)
        converted = qnn.convert(copy.deepcopy(model).eval())
        return found | {"accuracy": 100 * evaluate(converted, self.data, self.device)[0]}
