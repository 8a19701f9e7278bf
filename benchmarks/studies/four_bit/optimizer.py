"""Part `optimizer`: a GPT on the bytes of tinyshakespeare by AdamW with moments of 32 bits (PyTorch's) and of 8: the same seeds and batches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common.captured import learning_rate, set_precision
from common.data import tinyshakespeare
from common.tasks import TextTask

from quantrain.optim import AdamW8bit

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples" / "python"))
from gpt import GPTConfig  # noqa: E402

KINDS = ("AdamW", "AdamW8bit")


@dataclass(frozen=True)
class Settings:
    config: GPTConfig
    steps: int = 1500
    seeds: int = 3
    batch_size: int = 32
    points: int = 25
    peak_lr: float = 1e-3

    def facts(self) -> dict:
        return {**asdict(self), "config": self.config.sizes()}


SETTINGS = Settings(GPTConfig(layers=6, heads=6, width=384, context=256, vocab=256))
QUICK = Settings(GPTConfig(layers=1, heads=2, width=64, context=16, vocab=256), 24, 1, 8, 4)


def groups(model: torch.nn.Module) -> list[dict]:
    """GPT-2's: decay 0.1 on weights of two or more dimensions."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def train(task: TextTask, kind: str, seed: int, settings: Settings) -> dict:
    """One run: its curve of (step, training loss since the last point, held-out loss)."""
    set_precision("bf16")
    model = task.model(seed)
    options = {"lr": settings.peak_lr, "betas": (0.9, 0.95)}
    on_gpu = task.device == "cuda"
    optimizer = (
        AdamW8bit(groups(model), **options)
        if kind == "AdamW8bit"
        else torch.optim.AdamW(groups(model), fused=on_gpu, **options)
    )
    every = max(1, settings.steps // settings.points)
    curve, total = [], torch.zeros((), device=task.device)
    for number, index in enumerate(task.indices(seed, settings.steps), start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number - 1, settings.steps, settings.peak_lr)
        with torch.autocast(task.device, torch.bfloat16) if on_gpu else nullcontext():
            loss = task.loss(model, *task.batch(index))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
        if number % every == 0 or number == settings.steps:
            since = number - (curve[-1][0] if curve else 0)
            curve.append([number, float(total) / since, task.evaluate(model)])
            total.zero_()
    state = sum(
        t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)
    )
    return {
        "kind": kind,
        "seed": seed,
        "train_loss": curve[-1][1],
        "held_out_loss": curve[-1][2],
        "least_held_out_loss": min(point[2] for point in curve),
        "state_bytes": state,
        "curve": curve,
    }


def run(settings: Settings, options, save: Callable[[dict], None]) -> int:
    task = TextTask(tinyshakespeare(), settings.config, settings.batch_size, options.device)
    for seed in range(settings.seeds):
        pair = [train(task, kind, seed, settings) for kind in KINDS]
        for row in pair:
            save(row)
        full, small = pair
        print(
            f"optimizer: seed {seed}  training loss {full['train_loss']:.4f} {small['train_loss']:.4f} "
            f"{100 * (small['train_loss'] / full['train_loss'] - 1):+.2f} %  held out {full['held_out_loss']:.4f} {small['held_out_loss']:.4f} "
            f"{100 * (small['held_out_loss'] / full['held_out_loss'] - 1):+.2f} %  state {full['state_bytes']} {small['state_bytes']} bytes",
            flush=True,
        )
    return 0
