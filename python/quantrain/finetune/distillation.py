"""Training on a teacher's answers beside the labels: a task around a job's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantrain.distillation import distillation_kl
from quantrain.finetune.data import Batch
from quantrain.finetune.trainer import StopRequest, Task

TEMPERATURE, WEIGHT = 2.0, 0.7  # at 4 and 0.9 the learned scales of qat-w4a4 diverged (studies/small_models)


class Distilled(Task):
    """``(1 - weight) task + weight T^2 KL(softmax(teacher / T) || softmax(student / T))``, over what the task counts.

    Args:
        task: The job's.
        teacher: On the device of the batches; it runs in eval mode without gradients.
        temperature: T.
        weight: Of the teacher's part, in [0, 1].
    """

    def __init__(
        self, task: Task, teacher: nn.Module, temperature: float = TEMPERATURE, weight: float = WEIGHT
    ) -> None:
        self.task, self.teacher = task, teacher.eval().requires_grad_(False)
        self.temperature, self.weight = temperature, weight

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = self.task.logits(model, batch)
        with torch.no_grad():
            taught = self.task.logits(self.teacher, batch)
        kl = distillation_kl(logits, taught, temperature=self.temperature, mask=self.task.counted(batch))
        return (1 - self.weight) * self.task.loss_of(logits, batch) + self.weight * kl

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.task.logits(model, batch)

    def loss_of(self, logits: Tensor, batch: Batch) -> Tensor:
        return self.task.loss_of(logits, batch)

    def counted(self, batch: Batch) -> Tensor | None:
        return self.task.counted(batch)

    def terms(self, batch: Batch) -> int:
        return self.task.terms(batch)

    def evaluate(self, model: nn.Module, data, device: torch.device, stop: StopRequest | None = None) -> dict:
        return self.task.evaluate(model, data, device, stop)

    def tokens(self, batch: Batch) -> int | None:
        return self.task.tokens(batch)

    def trial(self, batch: Batch) -> Batch:
        return self.task.trial(batch)
