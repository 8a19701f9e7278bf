"""Part `finetune`: MiniLM-L6 on SST-2 through the job of ``quantrain finetune``, in float32 and in int8-training.

For each seed: float32 from the pretrained weights; int8-training from the same weights, the same schedule and batches; and a quarter of an
epoch of int8-training on top of the float32 result. The int8 models are evaluated as :func:`quantrain.nn.convert` leaves them, with
integer weights.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from common.recipes import int8_recipe

import quantrain.nn as qnn
from quantrain.finetune.config import JobConfig
from quantrain.finetune.folder import BASELINE
from quantrain.finetune.job import Job
from quantrain.finetune.minilm import package_file
from quantrain.finetune.results import StageResult

RECIPE = "int8-training"
FLOAT, FROM_START, ON_TOP = "float32", "int8-training", "int8-training after float32"


@dataclass(frozen=True)
class Settings:
    """Sizes of the job; the schedule is the job's own."""

    seeds: int
    train_rows: int = 8000
    test_rows: int | None = None
    batch_size: int = 32
    epochs: float = 1.0
    lr: float = 2e-4
    max_steps: int | None = None


GPU = Settings(seeds=3)
CPU = Settings(seeds=1, train_rows=2000)
QUICK = Settings(seeds=1, train_rows=16, test_rows=16, batch_size=8, max_steps=1)


def stored_type() -> str:
    """The element type in which the installed package holds MiniLM's weights; training starts from them in float32."""
    from safetensors import safe_open

    with safe_open(package_file("model.safetensors"), "pt") as weights:
        return str(weights.get_tensor(next(iter(weights.keys()))).dtype).removeprefix("torch.")


class Int8Job(Job):
    """The job with all three products in int8, whatever "auto" would choose, and without the report that nobody would read."""

    def __init__(self, config: JobConfig) -> None:
        super().__init__(config)
        self.recipes[RECIPE] = int8_recipe("int8")

    def _plot_grids(self, name: str, model) -> None:
        pass

    def _layer_errors(self, model) -> tuple:
        return ()

    def _write_report(self, results: list[StageResult]) -> None:
        pass


def row(kind: str, seed: int, result: StageResult) -> dict:
    return {
        "kind": kind,
        "seed": seed,
        "accuracy": 100 * result.accuracy,
        "loss": result.loss,
        "steps": result.steps,
        "step_ms": 1e3 * result.step_seconds if result.step_seconds else None,
        "peak_mb": result.peak_memory_bytes / 1e6,
    }


def one_seed(settings: Settings, seed: int, device: str, runs: Path) -> list[dict]:
    """The three trainings of a seed."""
    config = JobConfig(
        job="sst2",
        model="minilm",
        data="sst2",
        recipes=(RECIPE,),
        name=f"float-{seed}",
        runs=runs,
        epochs=settings.epochs,
        lr=settings.lr,
        batch_size=settings.batch_size,
        train_rows=settings.train_rows,
        test_rows=settings.test_rows,
        max_steps=settings.max_steps,
        seed=seed,
        device=device,
    )
    job = Int8Job(config)
    start = runs / f"start-{seed}.safetensors"
    qnn.save_checkpoint(start, job.baseline)
    baseline, on_top = job.run()
    whole = replace(config, name=f"int8-{seed}", baseline=start, qat_epochs=settings.epochs, qat_lr=settings.lr)
    untrained, from_start = Int8Job(whole).run()
    assert (baseline.stage, untrained.stage, from_start.stage) == (BASELINE, BASELINE, RECIPE)
    return [row(FLOAT, seed, baseline), row(FROM_START, seed, from_start), row(ON_TOP, seed, on_top)]


def run(settings: Settings, device: str, deadline: float, save: Callable[[dict], None]) -> int:
    """Every seed; none is begun that would end after the deadline. Returns how many were left out."""
    left, longest = 0, 0.0
    for seed in range(settings.seeds):
        started = time.monotonic()
        if started + longest > deadline:
            print(f"finetune: out of time before seed {seed}", flush=True)
            left += 1
            continue
        with tempfile.TemporaryDirectory() as runs:
            rows = one_seed(settings, seed, device, Path(runs))
        for found in rows:
            save(found)
        longest = max(longest, time.monotonic() - started)
        texts = (f"{found['kind']} {found['accuracy']:.2f} %" for found in rows)
        print(f"finetune: seed {seed}  {'  '.join(texts)}  in {longest:.0f} s", flush=True)
    return left
