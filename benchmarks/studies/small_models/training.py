"""One training loop for all cases: labels, a teacher's answers, pruning on the way; on a GPU steps are CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantrain import PruneSpec, distillation_kl
from quantrain import nn as qnn
from quantrain.finetune.trainer import TrainSettings, learning_rate, make_optimizer
from quantrain.prune import Pruner

Batch = tuple[tuple[Tensor, ...], Tensor]


@dataclass(frozen=True)
class Teaching:
    """``(1 - weight) cross-entropy + weight T^2 KL(teacher || student)``."""

    teacher: nn.Module
    temperature: float = 4.0
    weight: float = 0.9


class Step:
    """A step of training: eager, or on a GPU replayed as a graph, of batches of one shape."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, teaching: Teaching | None) -> None:
        self.model, self.optimizer, self.teaching = model, optimizer, teaching
        self.graph: torch.cuda.CUDAGraph | None = None
        self.taken = 0

    def __call__(self, inputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        fixed = labels.is_cuda and inputs[0].is_floating_point()  # sentences vary in length
        self.taken += 1
        if not fixed or self.taken <= 3:
            return self.run(inputs, labels).clone()
        if self.graph is None:
            self.static = tuple(t.clone() for t in inputs), labels.clone()
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.loss = self.run(*self.static)
        for to, value in zip((*self.static[0], self.static[1]), (*inputs, labels), strict=True):
            to.copy_(value)
        self.graph.replay()
        return self.loss.clone()

    def forget(self) -> None:
        """What the model does has changed."""
        self.graph, self.taken = None, 0

    def run(self, inputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(*inputs)
        loss = functional.cross_entropy(logits, labels)
        if (teaching := self.teaching) is not None:
            with torch.no_grad():
                taught = teaching.teacher(*inputs)
            kl = distillation_kl(logits, taught, temperature=teaching.temperature)
            loss = (1 - teaching.weight) * loss + teaching.weight * kl
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def train(
    model: nn.Module,
    batches: Callable[[int], Iterator[Batch]],
    steps: int,
    settings: TrainSettings,
    *,
    teaching: Teaching | None = None,
    prune: PruneSpec | None = None,
    skip: tuple[str, ...] = (),
) -> float:
    """Trains in place; the mean loss of the last 50 steps. ``batches(epoch)`` is one pass over the training set."""
    optimizer = make_optimizer(model, settings)
    if isinstance(optimizer, torch.optim.SGD) and next(model.parameters()).is_cuda:  # a graph needs the fused one
        groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in optimizer.param_groups]
        optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True, fused=True)
    rate = torch.zeros((), device=next(model.parameters()).device)  # in memory that a graph reads
    for group in optimizer.param_groups:
        group["lr"] = rate
    pruner = None if prune is None else Pruner.from_spec(model, prune, steps, optimizer, skip=skip)
    torch.manual_seed(settings.seed)
    take = Step(model, optimizer, teaching)
    step, epoch, losses = 0, 0, []
    model.train()
    while step < steps:
        for inputs, labels in batches(epoch):
            if step == int(settings.freeze * steps):
                qnn.enable_observer(model, False)
                take.forget()
            rate.fill_(learning_rate(step, steps, settings.lr, settings.warmup))
            losses.append(take(inputs, labels))
            if pruner is not None:
                pruner.step()
            step += 1
            if step == steps:
                break
        epoch += 1
    return float(torch.stack(losses[-50:]).mean())


def zeros(model: nn.Module) -> float:
    """The share of zeros among all weights of two or more dimensions."""
    weights = [p for n, p in model.named_parameters() if p.dim() >= 2 and "embeddings" not in n]
    return float(sum((w == 0).sum() for w in weights)) / sum(w.numel() for w in weights)
