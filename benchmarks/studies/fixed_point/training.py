"""Training and evaluation on a device, with the whole data set in its memory."""

from __future__ import annotations

import time

import torch
from common.augmented import Images
from torch import nn
from torch.nn import functional

from quantrain.finetune.trainer import TrainSettings, learning_rate, make_optimizer

__all__ = ["train"]


def train(model: nn.Module, images: Images, settings: TrainSettings, *, seconds: float | None = None) -> dict:
    """Trains in place on the mean cross-entropy.

    Args:
        model: in training mode afterwards.
        images: the data.
        settings: epochs, learning rate, batch size, weight decay, seed, max_steps (which here cuts the schedule's length too).
        seconds: stop after so long; the schedule then ends early, which the result says.

    Returns:
        ``steps``, ``seconds``, ``final_loss`` (mean of the last 50 steps), ``complete``.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    per_epoch = len(images.train_labels) // settings.batch_size
    planned = max(1, round(settings.epochs * per_epoch))
    planned = total = min(planned, settings.max_steps or planned)
    optimizer = make_optimizer(model, settings)
    started, step, losses = time.perf_counter(), 0, []
    model.train()
    while step < total:
        for inputs, labels in images.batches(settings.batch_size, generator):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, settings.lr, settings.warmup)
            loss = functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            step += 1
            late = seconds is not None and step % 50 == 0 and time.perf_counter() - started > seconds
            if step >= total or late:
                total = min(total, step)
                break
    final = float(torch.stack(losses[-50:]).mean())
    return {"steps": step, "seconds": time.perf_counter() - started, "final_loss": final, "complete": step == planned}
