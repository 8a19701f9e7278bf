"""A training step as one CUDA graph (on a CPU the same step plainly), and the optimizers it needs."""

from __future__ import annotations

import gc
import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn

WARM_UP = 4  # steps before a capture: cuDNN chooses its algorithms, buffers come to be


class Momentum:
    """SGD with Nesterov momentum whose learning rate is a tensor, which a captured step reads anew at each replay.

    g = grad + weight_decay p;  v = momentum v + g;  p = p - lr (g + momentum v), as torch.optim.SGD.
    """

    def __init__(self, parameters, lr: Tensor, momentum: float = 0.9, weight_decay: float = 5e-4) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.velocity = [torch.zeros_like(parameter) for parameter in self.parameters]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        grads = torch._foreach_add([p.grad for p in self.parameters], self.parameters, alpha=self.weight_decay)
        torch._foreach_mul_(self.velocity, self.momentum)
        torch._foreach_add_(self.velocity, grads)
        torch._foreach_add_(grads, self.velocity, alpha=self.momentum)
        torch._foreach_mul_(grads, self.lr)
        torch._foreach_sub_(self.parameters, grads)


def adamw(parameters, lr: Tensor) -> torch.optim.AdamW:
    """AdamW as GPT-2's: betas 0.9 and 0.95; decay 0.1 on weights of two or more dimensions."""
    parameters = list(parameters)
    on_gpu = lr.is_cuda
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, 0.95),
        fused=on_gpu,
        capturable=on_gpu,
    )


def set_precision(precision: str) -> None:
    """fp32: float32 products. tf32: in TF32 (11 significant bits). bf16: under autocast, see :class:`TrainingStep`."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True


class TrainingStep:
    """Batch, loss, gradients and update: captured once and replayed on a GPU.

    What a replay reads from outside are two static tensors, the batch's indices and the learning rate; what it gives is
    ``loss_sum``. Random numbers (crops, flips, the quantizers' rounding) come from the device's default generator, which
    the graph advances at each replay.

    Args:
        task: an ImageTask or TextTask.
        model: in training mode, without an observer that is on.
        precision: fp32, tf32 or bf16 (autocast).
    """

    capturing = True  # False: plainly on a GPU too

    def __init__(self, task, model: nn.Module, precision: str) -> None:
        self.task, self.model, self.precision = task, model, precision
        self.index = next(iter(task.indices(0, 1))).clone()
        self.lr = torch.zeros((), device=task.device)
        self.loss_sum = torch.zeros((), device=task.device)
        make = Momentum if task.name == "resnet20" else adamw
        self.optimizer = make(model.parameters(), self.lr)
        self.graph = self._captured() if self.capturing and task.device == "cuda" else None

    def __call__(self, index: Tensor, lr: float) -> None:
        self.index.copy_(index)
        self.lr.fill_(lr)
        if self.graph is not None:
            self.graph.replay()
        else:
            self._run()

    def mean_loss(self, steps: int) -> float:
        """Mean loss of the ``steps`` since the last call (waits for the device)."""
        loss = float(self.loss_sum) / steps
        self.loss_sum.zero_()
        return loss

    def _run(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        x, y = self.task.batch(self.index)
        autocast = torch.autocast(self.task.device, torch.bfloat16) if self.precision == "bf16" else nullcontext()
        with autocast:
            loss = self.task.loss(self.model, x, y)
        loss.backward()
        self.optimizer.step()
        self.loss_sum += loss.detach()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """Warmed up on a side stream at learning rate 0, then captured; weights stay as they were."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.optimizer.zero_grad(set_to_none=True)
        self._forget_warm_up()
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        torch.cuda.synchronize()
        self.loss_sum.zero_()
        return graph

    def _forget_warm_up(self) -> None:
        """Momenta to zero, in place: the graph will use these very tensors."""
        self.loss_sum.zero_()
        if isinstance(self.optimizer, Momentum):
            torch._foreach_zero_(self.optimizer.velocity)
            return
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()


def learning_rate(step: int, steps: int, peak: float, warm_up: float = 0.1) -> float:
    """Linear from 0 over the first ``warm_up`` of the steps, then a cosine to 0."""
    rising = max(1, round(warm_up * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
