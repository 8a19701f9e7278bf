"""What is tried before a run starts: the model on the data and every recipe on the model, so that a run of hours does
not end on a typo."""

from __future__ import annotations

import copy
import math
import statistics
import time
import warnings
from collections.abc import Iterable

import torch
from torch import nn

from quantrain import Recipe
from quantrain import nn as qnn
from quantrain.finetune.trainer import (
    CLASSIFICATION,
    EVAL_BATCH,
    Task,
    TrainSettings,
    make_optimizer,
    to_device,
    train_step,
)
from quantrain.nn.recipes import rounds_nothing

ROWS = 8  # samples of a step that is tried and not timed


def reason_of(error: Exception) -> str:
    """The error's message, with its type where the message is not one of ours (``expected ..., got ...``)."""
    text = str(error).strip() or "no message"
    return text if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"


def check_model(model: nn.Module, call: str, data, device: torch.device, option: str = "--model") -> None:
    """Make sure that ``model`` takes the data's inputs and returns a number for each of its classes.

    Raises:
        ValueError: It does not; the message says how the model was made (``call``).
    """
    inputs, labels = to_device(data.train_batch(torch.arange(min(2, data.train_size)), None), device)
    shapes = ", ".join(str(list(tensor.shape)) for tensor in inputs)
    try:
        with torch.no_grad():
            output = model.eval()(*inputs)
    except Exception as error:
        reason = reason_of(error).splitlines()[0]
        raise ValueError(f"{option}: expected {call} to take inputs of shape {shapes}, got {reason}") from error
    expected = (len(labels), data.num_classes)
    if not isinstance(output, torch.Tensor) or tuple(output.shape) != expected:
        got = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ValueError(
            f"{option}: expected {call} to return {list(expected)}, a number for each of the data's {data.num_classes} "
            f"classes, got {got}"
        )


def rehearse(
    baseline: nn.Module,
    recipe: Recipe | None,
    skip: Iterable[str],
    data,
    settings: TrainSettings,
    device: torch.device,
    *,
    steps: int,
    task: Task = CLASSIFICATION,
    fuse: bool = False,
) -> float:
    """Take training steps (forward only where the recipe does not train) on a prepared copy of ``baseline``.

    One step is on a few samples; of several steps on whole batches the first warms up and the others are timed. The
    copy is then converted. Whatever does not fit raises here.

    Args:
        baseline: On ``device``, or with a recipe elsewhere: the copy is moved when it is prepared.
        recipe: None tries the model as it is.
        fuse: As quantrain.nn.prepare's.

    Returns:
        The median seconds of a step.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself says them again
        model = copy.deepcopy(baseline)
        plain = recipe is None or rounds_nothing(recipe)
        model = model.to(device) if plain else qnn.prepare(model, recipe, skip=skip, fuse=fuse).to(device)
        rows = min(settings.batch_size if steps > 1 else ROWS, data.train_size)
        batch = to_device(data.train_batch(torch.arange(rows), None), device)
        batch = batch if steps > 1 else task.trial(batch)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")
        trains = recipe is None or recipe.training
        optimizer = make_optimizer(model, settings) if trains else None
        model.train()  # observers are on
        times = []
        for _ in range(steps):
            started = time.perf_counter()
            if trains:
                float(train_step(model, optimizer, batch, autocast, task=task))
            else:
                with torch.no_grad():
                    float(task.loss(model, batch))
            times.append(time.perf_counter() - started)
        if not plain:
            qnn.convert(model.eval(), check_observed=qnn.handler_of(recipe).rebuilds)
    return statistics.median(times[1:] or times)


@torch.inference_mode()
def evaluation_seconds(model: nn.Module, data, device: torch.device) -> float:
    """How long ``model`` takes for the test set, from one batch of it."""
    inputs, _ = to_device(next(data.test_batches(EVAL_BATCH)), device)
    float(model.eval()(*inputs).sum())  # warms up
    started = time.perf_counter()
    float(model(*inputs).sum())
    return (time.perf_counter() - started) * math.ceil(data.test_size / EVAL_BATCH)
