"""Part `curves`: one GPT on two texts, in bfloat16 and in int8-training, the same seeds, batches and schedule."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common.captured import TrainingStep, learning_rate, set_precision
from common.data import data_root, random_text, tinyshakespeare
from common.recipes import int8_recipe
from common.tasks import TextTask
from torch import Tensor, nn

import quantrain.nn as qnn

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples" / "python"))
from gpt import FLOAT_LAYERS, GPTConfig  # noqa: E402

BF16, INT8 = "bf16", "int8-training"
TEXTS = ("tinyshakespeare", "wikitext-2")


@dataclass(frozen=True)
class Settings:
    """The model and the schedule; the same for both precisions."""

    config: GPTConfig
    batch_size: int
    steps: int
    seeds: int
    points: int = 25  # of each curve
    peak_lr: float = 1e-3

    def facts(self) -> dict:
        return {**asdict(self), "config": self.config.sizes()}


# On a GPU 12 million bytes, some eleven times each text; on a CPU enough to see both curves fall.
GPU = Settings(GPTConfig(layers=6, heads=6, width=384, context=256, vocab=256), batch_size=32, steps=1500, seeds=3)
CPU = Settings(GPTConfig(layers=2, heads=2, width=64, context=64, vocab=256), batch_size=8, steps=200, seeds=1)
QUICK = Settings(
    GPTConfig(layers=1, heads=2, width=32, context=16, vocab=256),
    batch_size=8,
    steps=24,
    seeds=1,
    points=4,
    peak_lr=1e-2,
)


class Corpus(TextTask):
    """A GPT on the bytes of a text; ``held_out`` None holds back the last tenth of ``train``."""

    def __init__(self, title: str, train: Tensor, held_out: Tensor | None, settings: Settings, device: str) -> None:
        super().__init__(train, settings.config, settings.batch_size, device)
        self.title = title
        if held_out is not None:
            self.train, self.held_out = train.to(device), held_out.to(device)


def corpora(settings: Settings, device: str, random: bool) -> Iterator[Corpus]:
    """tinyshakespeare, and wikitext-2: its valid.txt to train on, its test.txt held out."""
    if random:
        yield Corpus(TEXTS[0], random_text(), None, settings, device)
        yield Corpus(TEXTS[1], random_text(), random_text(4000), settings, device)
        return
    yield Corpus(TEXTS[0], tinyshakespeare(), None, settings, device)
    parts = (_bytes_of(data_root() / "wikitext-2" / f"{part}.txt") for part in ("valid", "test"))
    yield Corpus(TEXTS[1], *parts, settings, device)


def _bytes_of(path: Path) -> Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def prepared(task: Corpus, seed: int, kind: str) -> nn.Module:
    """The model of a seed; in int8 all three products of its linear layers, whatever "auto" would choose."""
    model = task.model(seed)
    return model if kind == BF16 else qnn.prepare(model, int8_recipe("int8"), skip=FLOAT_LAYERS)


def train(task: Corpus, kind: str, seed: int, settings: Settings) -> dict:
    """One run: its curve of (step, training loss since the last point, held-out loss), and the mean time of a step.

    Both kinds run under bfloat16 autocast over float32 weights, on a GPU as one CUDA graph.
    """
    set_precision("bf16")
    model = prepared(task, seed, kind)
    torch.manual_seed(seed)
    step = TrainingStep(task, model, "bf16")
    every = max(1, settings.steps // settings.points)
    curve, seconds = [], 0.0
    started = time.monotonic()
    for number, index in enumerate(task.indices(seed, settings.steps), start=1):
        step(index, learning_rate(number - 1, settings.steps, settings.peak_lr))
        if number % every == 0 or number == settings.steps:
            since = number - (curve[-1][0] if curve else 0)
            loss = step.mean_loss(since)  # waits for the device
            seconds += time.monotonic() - started
            curve.append([number, loss, task.evaluate(model)])
            started = time.monotonic()
    return {
        "text": task.title,
        "kind": kind,
        "seed": seed,
        "train_loss": curve[-1][1],
        "held_out_loss": curve[-1][2],
        "least_held_out_loss": min(point[2] for point in curve),
        "step_ms": 1e3 * seconds / settings.steps,
        "captured": step.graph is not None,
        "curve": curve,
    }


def run(settings: Settings, device: str, random: bool, deadline: float, save: Callable[[dict], None]) -> int:
    """Every text, seed and kind; none is begun that would end after the deadline. Returns how many pairs were left out."""
    left, longest = 0, 0.0
    tasks = list(corpora(settings, device, random))
    for seed in range(settings.seeds):
        for task in tasks:
            started = time.monotonic()
            if started + longest > deadline:
                print(f"curves: out of time before {task.title}, seed {seed}", flush=True)
                left += 1
                continue
            pair = [train(task, kind, seed, settings) for kind in (BF16, INT8)]
            for row in pair:
                save(row)
            longest = max(longest, time.monotonic() - started)
            bf16, int8 = (row["held_out_loss"] for row in pair)
            print(
                f"curves: {task.title:<16} seed {seed}  held-out loss bf16 {bf16:.4f}  int8 {int8:.4f}  "
                f"{100 * (int8 / bf16 - 1):+.2f} %  training {pair[0]['train_loss']:.4f} {pair[1]['train_loss']:.4f}  "
                f"ms a step {pair[0]['step_ms']:.2f} {pair[1]['step_ms']:.2f}",
                flush=True,
            )
    return left
