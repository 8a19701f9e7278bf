"""Part `accuracy`: the same schedule under every recipe, from fresh weights, for several seeds; one process per run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import torch
from common.captured import TrainingStep, learning_rate, set_precision

from .recipes import prepared

RECIPES = ("qat-w8a8", *(f"fqt-{kind}{bits}" for bits in (4, 5, 8) for kind in ("bhq", "psq", "ptq")))
PEAK = {"resnet20": 0.2, "gpt": 1e-3}
EPOCHS = (3, 30)  # least and most that a time limit may choose
MARK = "RESULT "  # before a worker's result on its standard output


@dataclass(frozen=True)
class Run:
    """One training: a recipe and a seed."""

    recipe: str
    seed: int


def runs_of(recipes: tuple[str, ...], seeds: int) -> list[Run]:
    """Seed after seed, so that a time limit leaves every recipe with as many seeds."""
    return [Run(recipe, seed) for seed in range(seeds) for recipe in recipes]


def train(task, recipe: str, seed: int, steps: int, precision: str) -> dict:
    """Train from fresh weights; what the task measures at the end, the mean loss of the last tenth, seconds."""
    set_precision(precision)
    started = time.monotonic()
    model = prepared(task, task.model(seed), recipe)
    torch.manual_seed(seed)
    step = TrainingStep(task, model, precision)
    ready = time.monotonic()
    tail = max(1, steps // 10)
    for number, index in enumerate(task.indices(seed, steps)):
        if number == steps - tail:
            step.loss_sum.zero_()
        step(index, learning_rate(number, steps, PEAK[task.name]))
    loss = step.mean_loss(tail)
    seconds = time.monotonic() - ready
    return {
        "measure": task.measure,
        "value": task.evaluate(model),
        "train_loss": loss,
        "steps": steps,
        "seconds": seconds,
        "prepare_seconds": ready - started,
    }


def worker(tasks: Callable[[], Iterator], recipe: str, seed: int, steps: dict[str, int], precision: str) -> None:
    """Both networks under one recipe and seed; prints the result as one line of JSON."""
    result: dict = {"recipe": recipe, "seed": seed}
    for task in tasks():
        if steps.get(task.name):
            result[task.name] = train(task, recipe, seed, steps[task.name], precision)
    print(MARK + json.dumps(result), flush=True)


def run_worker(command: list[str], timeout: float) -> dict:
    """The result of a worker process.

    Raises:
        RuntimeError: it failed or ran out of time; the message is the end of what it printed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=min(max(1.0, timeout), 1e6))
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{' '.join(command[2:])}: expected an end within {timeout:.0f} s, got none") from error
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        raise RuntimeError(f"{' '.join(command[2:])}: status {done.returncode}\n{done.stdout}\n{done.stderr}".strip())
    return json.loads(lines[-1].removeprefix(MARK))


def chosen_epochs(trial: dict, seconds: float, runs: int, jobs: int, steps_per_epoch: int, text_steps: int) -> int:
    """Epochs that ``runs`` have time for, going by one trial run that had the device for itself.

    The device's time adds up over the processes that share it, start-up overlaps with it; a tenth is kept back.
    """
    image, text = trial["resnet20"], trial["gpt"]
    image_step, text_step = image["seconds"] / image["steps"], text["seconds"] / text["steps"]
    start_up = max(0.0, trial["wall"] - image["seconds"] - text["seconds"])
    left = 0.9 * (seconds - start_up * (runs / jobs / 2 + 1)) / runs - text_steps * text_step
    epochs = int(left / (steps_per_epoch * image_step))
    print(
        f"accuracy: {1e3 * image_step:.2f} and {1e3 * text_step:.2f} ms a step, start-up {start_up:.1f} s: {epochs} epochs",
        flush=True,
    )
    return min(max(epochs, EPOCHS[0]), EPOCHS[1])


def run_all(runs: list[Run], command_of: Callable[[Run], list[str]], jobs: int, deadline: float, save) -> int:
    """Every run, ``jobs`` at a time; none is begun that would end after the deadline. Returns how many failed."""
    longest = 0.0

    def one(run: Run) -> dict | None:
        nonlocal longest
        started = time.monotonic()
        if started + longest > deadline:
            print(f"accuracy: out of time before {run.recipe}, seed {run.seed}", flush=True)
            return None
        result = run_worker(command_of(run), deadline - started)
        longest = max(longest, time.monotonic() - started)
        return result

    failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(one, run) for run in runs]):
            try:
                result = future.result()
            except Exception as error:  # the other runs are still worth having
                failed += 1
                print(f"accuracy: FAILED {error}", file=sys.stderr, flush=True)
                continue
            if result is not None:
                save(result)
                values = "  ".join(
                    f"{name} {result[name]['value']:.3f}" for name in ("resnet20", "gpt") if name in result
                )
                print(f"{result['recipe']:<16}seed {result['seed']}  {values}", flush=True)
    return failed
