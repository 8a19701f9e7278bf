"""Part `step`: time of a captured training step in bfloat16 autocast, of a float model, under QAT and under FQT."""

from __future__ import annotations

import gc
import statistics
import time
import traceback

import torch
from common.captured import TrainingStep
from common.timing import device_seconds, host_seconds

from .recipes import FLOAT, prepared

RECIPES = (FLOAT, "qat-w8a8", "fqt-ptq8", "fqt-psq8", "fqt-psq5", "fqt-bhq5", "fqt-bhq4", "fqt-bhq5-paper")


def seconds_a_step(step: TrainingStep, index: torch.Tensor, groups: int = 7, steps: int = 20) -> float:
    """Median over groups of steps, on the device's clock."""
    run = lambda _: step(index, 1e-4)  # noqa: E731
    for _ in range(3):
        run(0)
    if step.graph is None:
        return host_seconds(run, 2)
    return statistics.median(device_seconds(run, steps, spin=0.01) for _ in range(groups))


def measure(label: str, task, recipes: tuple[str, ...], precision: str, deadline: float, save) -> int:
    """A row per recipe; ratios are to the float model and to qat-w8a8 of the same task. Returns how many recipes failed."""
    known: dict[str, float] = {}
    failed = 0
    for recipe in recipes:
        if time.monotonic() > deadline:
            print(f"step: out of time before {label} {recipe}", flush=True)
            break
        try:
            seconds, captured = timed(task, recipe, precision)
        except Exception:  # the other recipes are still worth measuring
            failed += 1
            print(f"step: FAILED {label} {recipe}", flush=True)
            traceback.print_exc()
            continue
        known[recipe] = seconds
        row = {"model": label, "recipe": recipe, "precision": precision, "captured": captured, "ms": 1e3 * seconds}
        row["ratio_to_float"] = seconds / known[FLOAT] if FLOAT in known else None
        row["ratio_to_qat"] = seconds / known["qat-w8a8"] if "qat-w8a8" in known else None
        save(row)
        ratio = row["ratio_to_float"]
        print(f"{label:<44}{recipe:<18}{row['ms']:9.3f} ms  {f'{ratio:.2f}x float' if ratio else ''}", flush=True)
    return failed


def timed(task, recipe: str, precision: str) -> tuple[float, bool]:
    """(seconds a step, whether it was captured) of a model of its own, which is gone afterwards."""
    step = TrainingStep(task, prepared(task, task.model(0), recipe, dynamic=False), precision)
    seconds = seconds_a_step(step, next(iter(task.indices(0, 1))))
    captured = step.graph is not None
    del step
    gc.collect()
    if task.device == "cuda":
        torch.cuda.empty_cache()
    return seconds, captured
