"""The training loop of the fine-tuning job: schedule, optimizers, interruption, exact resumption, evaluation.

A run that was interrupted after step s and resumed takes the same steps as one that was not: the state file holds the
parameters, the optimizer and the generator, and the order of the data depends only on the seed and the epoch. On the
CPU the losses are then the same bit for bit; on a GPU, within what cuDNN's gradient sums vary from run to run.
"""

from __future__ import annotations

import io
import math
import os
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantrain import nn as qnn
from quantrain._C import PruneSpec, replace_file
from quantrain.finetune.data import Batch
from quantrain.finetune.memory import peak_bytes
from quantrain.finetune.metrics import Metrics
from quantrain.finetune.progress import Progress
from quantrain.optim import AdamW8bit
from quantrain.prune import Pruner

OPTIMIZERS = ("sgd", "adamw", "adamw8bit")
SAVE_SECONDS = 30.0  # between saves of the training state; a save of MiniLM's 270 MB takes 0.3 s
EVAL_BATCH = 256


class Interrupted(Exception):
    """Raised after a step when the user asked to stop and the state was saved."""


class StopRequest:
    """Set by the first Ctrl-C or SIGTERM and looked at between steps; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Raise Interrupted where a stop was asked for."""
        if self.requested:
            raise Interrupted

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take SIGINT and SIGTERM for the length of the block (main thread only)."""

        def ask(signum: int, frame: object) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass(frozen=True)
class TrainSettings:
    """How a model is trained.

    Attributes:
        epochs: Passes over the training set; 0.5 is half of one.
        lr: The schedule's largest learning rate.
        batch_size: Samples per step.
        optimizer: ``"sgd"`` (Nesterov momentum 0.9), ``"adamw"``, or ``"adamw8bit"`` (its moments in 8 bits a number).
        weight_decay: Applied to weights, not to biases, norms and quantizer scales.
        warmup: The part of the steps over which the learning rate rises.
        freeze: The part of the steps after which the ranges of a quantized model no longer follow its tensors.
        precision: ``"float32"``, or ``"bf16"`` for autocast.
        seed: Seeds the order of the data.
        max_steps: Stop after this many steps of the schedule; None takes them all.
        accumulate: Parts that a step's samples are split into; their gradients are added, so the step is the same.
        max_norm: A larger norm of all gradients together is brought down to this; None leaves them.
    """

    epochs: float
    lr: float
    batch_size: int = 128
    optimizer: str = "sgd"
    weight_decay: float = 5e-4
    warmup: float = 0.25
    freeze: float = 0.75
    precision: str = "float32"
    seed: int = 0
    max_steps: int | None = None
    accumulate: int = 1
    max_norm: float | None = None

    def total_steps(self, train_size: int) -> int:
        """The length of the schedule in steps."""
        return max(1, math.ceil(self.epochs * math.ceil(train_size / self.batch_size)))

    def steps_to_take(self, train_size: int) -> int:
        """How many of them are taken."""
        total = self.total_steps(train_size)
        return total if self.max_steps is None else min(total, self.max_steps)

    def freeze_step(self, train_size: int) -> int:
        """The first step whose ranges are those of the step before."""
        return math.ceil(self.freeze * self.total_steps(train_size))


@dataclass
class TrainResult:
    """What a training stage measured.

    Attributes:
        steps: Steps taken, those of earlier runs included.
        step_seconds: The median time of a step.
        earlier_seconds: Wall time that earlier, interrupted runs of the stage spent training.
        optimizer_bytes: What the optimizer's state takes.
    """

    steps: int
    step_seconds: float
    earlier_seconds: float
    optimizer_bytes: int = 0


def learning_rate(step: int, total: int, peak: float, warmup: float = 0.25) -> float:
    """One cycle: a linear rise to ``peak`` over the first ``warmup`` of the steps, then half a cosine down to 0.

    ``step`` counts from 0 to ``total - 1``. Source: Smith & Topin, arXiv:1708.07120, with the cosine of Loshchilov &
    Hutter, arXiv:1608.03983.

    Example:
        >>> [round(learning_rate(step, 8, 1.0), 3) for step in range(8)]
        [0.5, 1.0, 0.933, 0.75, 0.5, 0.25, 0.067, 0.0]
    """
    place = (step + 1) / total
    if place < warmup:
        return peak * place / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (place - warmup) / (1 - warmup)))


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer over two groups: weights of two or more dimensions, which decay, and everything else that trains.

    Raises:
        ValueError: ``settings.optimizer`` is no known name, or nothing of the model trains.
    """
    decayed, other = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = name.endswith("weight") and parameter.dim() >= 2
        (decayed if decays else other).append(parameter)
    if not decayed and not other:
        raise ValueError("optimizer: expected a model with parameters that train, got none")
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": other, "weight_decay": 0.0}]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr)
    if settings.optimizer == "adamw8bit":
        return AdamW8bit(groups, lr=settings.lr)
    raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {settings.optimizer!r}")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on ``device``."""
    inputs, labels = batch
    return tuple(tensor.to(device) for tensor in inputs), labels.to(device)


@torch.inference_mode()
def evaluate(model: nn.Module, data, device: torch.device, stop: StopRequest | None = None) -> tuple[float, float]:
    """Accuracy (0 to 1) and mean cross-entropy of ``model`` in eval mode on the test set."""
    model.eval()
    correct, loss = 0, 0.0
    for batch in data.test_batches(EVAL_BATCH):
        inputs, labels = to_device(batch, device)
        logits = model(*inputs)
        correct += int((logits.argmax(1) == labels).sum())
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
        if stop is not None:
            stop.check()
    return correct / data.test_size, loss / data.test_size


class Task:
    """What a training step and an evaluation compute; this one tells the classes of samples."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean cross-entropy of a batch, on the model's device."""
        return self.loss_of(self.logits(model, batch), batch)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model says of each row that may count, ``[..., classes]``."""
        return model(*batch[0])

    def loss_of(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss of such logits."""
        return functional.cross_entropy(logits.float(), batch[1])

    def counted(self, batch: Batch) -> Tensor | None:
        """Which rows of the logits count, 0 where one does not; None where all do."""
        return None

    def terms(self, batch: Batch) -> int:
        """How many numbers ``loss`` is the mean of."""
        return len(batch[1])

    def evaluate(self, model: nn.Module, data, device: torch.device, stop: StopRequest | None = None) -> dict:
        """What the test set says, by the names that metrics.jsonl has."""
        accuracy, loss = evaluate(model, data, device, stop)
        return {"accuracy": accuracy, "loss": loss}

    def tokens(self, batch: Batch) -> int | None:
        """Tokens of a batch, where the speed of training is told in tokens."""
        return None

    def trial(self, batch: Batch) -> Batch:
        """What of a batch a step takes that only shows whether the model trains."""
        return batch


CLASSIFICATION = Task()


@torch.inference_mode()
def latency_seconds(model: nn.Module, data, device: torch.device, *, runs: int = 20, limit: float = 2.0) -> float:
    """The median time of ``model`` in eval mode for one test sample, of up to ``runs`` runs in ``limit`` seconds."""
    inputs, _ = to_device(next(data.test_batches(1)), device)
    model.eval()
    float(model(*inputs).sum())  # warms up; the sum waits for a GPU
    times: list[float] = []
    while len(times) < runs and sum(times) < limit:
        begun = time.perf_counter()
        float(model(*inputs).sum())
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


FEW_STEPS = 20  # below it a schedule is over before it has warmed up; with one step its learning rate is 0


class _State:
    """The state file of a stage in training: written whole, then renamed, so that it is never half a file."""

    def __init__(
        self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner | None = None
    ) -> None:
        self.path, self.model, self.optimizer, self.pruner = path, model, optimizer, pruner
        self.saved_at = time.monotonic()

    def save(self, step: int, seconds: float, durations: list[float]) -> None:
        state = {
            "step": step,
            "seconds": seconds,
            "durations": durations,
            "model": _changing_tensors(self.model),
            "optimizer": self.optimizer.state_dict(),
            "pruner": None if self.pruner is None else self.pruner.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        replace_file(os.fspath(self.path), buffer.getvalue())
        self.saved_at = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.saved_at > SAVE_SECONDS

    def load(self, device: torch.device) -> tuple[int, float, list[float]]:
        """Steps taken, seconds spent and each step's time; zeros where there is no state file."""
        if not self.path.is_file():
            return 0, 0.0, []
        try:
            state = torch.load(self.path, map_location=device, weights_only=True)
            _load_changing_tensors(self.model, state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.pruner is not None:
                self.pruner.load_state_dict(state["pruner"])
            torch.set_rng_state(state["rng"].cpu())
            if torch.cuda.is_available() and state.get("cuda_rng") is not None:
                torch.cuda.set_rng_state(state["cuda_rng"].cpu())
            return state["step"], state["seconds"], state["durations"]
        except Exception as error:
            raise ValueError(f"{self.path}: expected the state of this training stage, got {error}") from error


def _changing_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict; of a model with LoRA what trains alone, since packed weights stay what prepare made of them."""
    if not _has_lora(model):
        return model.state_dict()
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def _has_lora(model: nn.Module) -> bool:
    return any(isinstance(module, qnn.LoraLinear) for module in model.modules())


@torch.no_grad()
def _load_changing_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    if not _has_lora(model):
        model.load_state_dict(tensors)
        return
    own = {name: value for name, value in model.named_parameters() if value.requires_grad}
    expected, found = ({name: list(value.shape) for name, value in named.items()} for named in (own, tensors))
    if expected != found:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))[0]
        raise ValueError(f"expected {odd} of shape {expected.get(odd)}, got {found.get(odd)}")
    for name, value in own.items():
        value.copy_(tensors[name])


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = (value for state in optimizer.state.values() for value in state.values())
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def _batches(data, settings: TrainSettings, first: int, last: int) -> Iterator[tuple[int, int, Batch]]:
    """(step, epoch, batch) for the steps from ``first`` to ``last - 1``, in the order both trainers share."""
    per_epoch = math.ceil(data.train_size / settings.batch_size)
    for epoch in range(first // per_epoch, math.ceil(last / per_epoch)):
        generator = torch.Generator().manual_seed(settings.seed + epoch)
        order = torch.randperm(data.train_size, generator=generator)
        for place, indices in enumerate(order.split(settings.batch_size)):
            step = epoch * per_epoch + place
            if step >= last:
                return
            if step < first:
                data.skip_train_batch(len(indices), generator)
            else:
                yield step, epoch, data.train_batch(indices, generator)


def _parts(batch: Batch, count: int) -> Iterator[Batch]:
    """The batch's samples in ``count`` runs, or in as many as there are samples."""
    inputs, labels = batch
    for *part, answers in zip(*(tensor.chunk(count) for tensor in (*inputs, labels)), strict=True):
        yield tuple(part), answers


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    autocast,
    *,
    task: Task = CLASSIFICATION,
    parts: int = 1,
    max_norm: float | None = None,
) -> Tensor:
    """One step on the task's mean loss; the result is the loss before the update.

    Args:
        parts: The gradients of so many parts of the batch are added, each by its share of the loss's terms.
        max_norm: The gradients are scaled down where their norm, all together, is larger.
    """
    optimizer.zero_grad(set_to_none=True)
    if parts == 1:
        with autocast:
            total = task.loss(model, batch)
        total.backward()
    else:
        terms, total = task.terms(batch), torch.zeros((), device=batch[1].device)
        for part in _parts(batch, parts):
            with autocast:
                loss = task.loss(model, part) * (task.terms(part) / terms)
            loss.backward()
            total += loss.detach()
    if max_norm is not None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()
    return total.detach()


def train(
    model: nn.Module,
    data,
    settings: TrainSettings,
    *,
    stage: str,
    metrics: Metrics,
    state_path: Path,
    device: torch.device,
    stop: StopRequest,
    task: Task = CLASSIFICATION,
    prune: PruneSpec | None = None,
) -> TrainResult:
    """Train ``model`` in place, from the state file where an earlier run left one.

    The ranges of a quantized model follow its tensors for the first ``settings.freeze`` of the steps. With ``prune`` its
    weights are pruned on the way, by the spec's schedule over the steps of ``settings``.

    A line goes to ``metrics`` for each step, and one for the test set after each epoch but the last, which the caller
    evaluates in the form that it keeps.

    Raises:
        Interrupted: The user asked to stop; the state file holds what is done.
        ValueError: The state file is damaged or another model's, or the loss is not finite.
    """
    total = settings.total_steps(data.train_size)
    last = settings.steps_to_take(data.train_size)
    if total < FEW_STEPS:
        print(
            f"{stage}: {total} step{'s' if total > 1 else ''} of training for {data.train_size} samples: too few to learn from; "
            "--epochs and --qat-epochs ask for more, --batch-size for smaller ones",
            flush=True,
        )
    freeze_step = settings.freeze_step(data.train_size)
    per_epoch = math.ceil(data.train_size / settings.batch_size)
    optimizer = make_optimizer(model, settings)
    pruner = None if prune is None else Pruner.from_spec(model, prune, total, optimizer)
    torch.manual_seed(settings.seed)  # dropout and quantized gradients draw from here, whatever ran before
    state = _State(state_path, model, optimizer, pruner)
    first, before, durations = state.load(device)
    metrics.forget_after(stage, first)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")
    started = time.perf_counter()

    def seconds() -> float:
        return before + time.perf_counter() - started

    with Progress(stage, first, last) as progress:
        model.train()
        for step, epoch, batch in _batches(data, settings, first, last):
            begun = time.perf_counter()
            if step == freeze_step:
                qnn.enable_observer(model, False)
            rate = learning_rate(step, total, settings.lr, settings.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            options = {"task": task, "parts": settings.accumulate, "max_norm": settings.max_norm}
            loss = float(train_step(model, optimizer, to_device(batch, device), autocast, **options))
            if pruner is not None:
                pruner.step()
            durations.append(time.perf_counter() - begun)
            if not math.isfinite(loss):
                raise ValueError(f"{stage}: expected a finite loss, got {loss} at step {step} (learning rate {rate:g})")
            tokens = task.tokens(batch)
            more = {} if tokens is None else {"tokens_per_second": round(tokens / durations[-1], 1)}
            metrics.step(stage, step, epoch, loss, rate, seconds(), **more)
            progress.update(loss, rate, tokens, durations[-1], 0 if tokens is None else peak_bytes(device))
            epoch_ends = (step + 1) % per_epoch == 0 and step + 1 < last
            if stop.requested or epoch_ends or state.due():
                state.save(step + 1, seconds(), durations)
                stop.check()
            if epoch_ends:
                metrics.evaluation(stage, step + 1, epoch + 1, **task.evaluate(model, data, device))
                model.train()
    state.save(last, seconds(), durations)
    return TrainResult(last, statistics.median(durations), before, _state_bytes(optimizer))
