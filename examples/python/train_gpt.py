"""Trains a GPT-2-style language model on the bytes of a text file, under autocast with dynamic loss scaling.

    python examples/python/train_gpt.py --precision fp16
    torchrun --nproc-per-node 2 examples/python/train_gpt.py --device cuda --preset gpt2 --precision bf16

``--help`` lists the flags; docs/train_gpt.md explains them. The C++ twin is examples/cpp/train_gpt.cpp.
"""

from __future__ import annotations

import gc
import json
import math
import os
import resource
import signal
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from gpt import FLOAT_LAYERS, GPT, init_weights, loss_of
from gpt_checkpoint import Checkpoint, rng_states, set_rng_states, training_tensors
from gpt_data import Text, default_text
from gpt_log import Metrics, Progress
from gpt_options import SETTINGS, parse
from torch import Tensor, nn

BENCHMARK_WARMUP = 10
DTYPES = {"fp32": torch.bfloat16, "fp16": torch.float16, "bf16": torch.bfloat16}  # autocast is off for fp32


@dataclass(frozen=True)
class Ranks:
    """This process among those of torchrun; one of one without it."""

    rank: int
    size: int

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float, device: torch.device) -> list[float]:
        """The sums over all ranks."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()


class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; a second one stops at once, but under torchrun, which sends its own."""

    def __init__(self, ranks: Ranks) -> None:
        self.requested, self.ranks = False, ranks

    def _ask(self, signum: int, frame: object) -> None:
        if self.requested and self.ranks.size == 1:
            raise KeyboardInterrupt
        self.requested = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def learning_rate(step: int, options: Namespace) -> float:
    """Of ``step``, counted from 0: up linearly over the warm-up, then half a cosine from --lr to --min-lr."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    place = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.min_lr + 0.5 * (options.lr - options.min_lr) * (1 + math.cos(math.pi * place))


def make_optimizer(model: nn.Module, options: Namespace) -> torch.optim.Optimizer:
    """AdamW, one fused kernel for all parameters; weights of two or more dimensions decay."""
    decayed = [p for name, p in model.named_parameters() if name.endswith(".weight") and p.dim() >= 2]
    kept = {id(p) for p in decayed}
    other = [p for p in model.parameters() if id(p) not in kept]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": other, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


class TorchScaler(torch.amp.GradScaler):
    """PyTorch's own loss scaler with PyTorch's own clipping, to compare with."""

    def clip_grad_norm_(self, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
        self.unscale_(optimizer)
        return nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)


def make_scaler(options: Namespace, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler, which passes everything through unless the precision is fp16."""
    arguments = {"init_scale": options.init_scale, "growth_interval": options.growth_interval}
    arguments["enabled"] = options.precision == "fp16"
    if options.scaler == "torch":
        return TorchScaler(device.type, **arguments)
    from quantrain import amp

    return amp.GradScaler(device.type, **arguments)


class Trainer:
    """The model with all that a step needs, fresh or as --init or the run in --out left it."""

    def __init__(self, options: Namespace, ranks: Ranks) -> None:
        self.options, self.ranks = options, ranks
        local = int(os.environ.get("LOCAL_RANK", 0)) if ranks.size > 1 else torch.device(options.device).index or 0
        self.device = torch.device("cuda", local) if options.device.startswith("cuda") else torch.device("cpu")
        self.text = Text(options.data or default_text(), options.config.context, self.device)
        self.settings = {**vars(options), "text_bytes": self.text.size}
        self.settings = {name: self.settings[name] for name in SETTINGS}
        self.path = options.out / "checkpoint.safetensors"
        resumes = self.path.is_file() and not options.restart and not options.benchmark
        stored = Checkpoint.read(self.path) if resumes else None
        self.build_model(stored)
        self.optimizer = make_optimizer(self.model, options)
        self.scaler = make_scaler(options, self.device)
        self.step = self.skipped = 0
        if stored is not None:
            self.resume(stored)
        self.parallel = self.model
        if ranks.size > 1:
            self.parallel = nn.parallel.DistributedDataParallel(self.model)

    def build_model(self, stored: Checkpoint | None) -> None:
        """Initialize, or take over --init's weights; then calibrate under a recipe."""
        options = self.options
        self.model, recipe = GPT(options.config), ""
        torch.manual_seed(options.seed)
        init_weights(self.model, options.config.layers)
        if options.recipe:
            recipe = self.prepare()
        self.recipe = recipe
        if stored is not None:
            stored.check_model(options.config.sizes(), recipe)
            stored.check_settings(self.settings)
        elif options.init is not None:
            start = Checkpoint.read(options.init)
            start.check_model(options.config.sizes(), recipe, float_allowed=True)
            start.load_model(self.model)
        self.model.to(self.device).train()
        if recipe and stored is None and (options.init is None or not start.recipe):
            self.calibrate()
        if self.ranks.rank > 0:
            torch.manual_seed(options.seed + self.ranks.rank)  # each rank drops other elements

    def prepare(self) -> str:
        """Swap the linear layers for quantized ones and give the recipe as JSON."""
        from quantrain import Recipe
        from quantrain import nn as qnn

        recipe = Recipe.from_name(self.options.recipe)
        if not recipe.training:
            raise ValueError(f"expected --recipe for training (qat-...), got '{self.options.recipe}'")
        qnn.prepare(self.model, recipe, skip=FLOAT_LAYERS)
        qnn.enable_observer(self.model, False)
        qnn.enable_weight_cache(self.model, self.options.accumulate > 1)
        return recipe.to_json()

    def calibrate(self) -> None:
        from quantrain import nn as qnn

        options = self.options
        batches = (self.text.batch(options.seed, i, 1, options.batch_size) for i in range(options.calibration_batches))
        qnn.calibrate(self.model, batches, forward=lambda model, batch: model(batch[0][0]))

    def resume(self, stored: Checkpoint) -> None:
        stored.load_model(self.model)
        stored.load_optimizer(self.model, self.optimizer)
        if stored.scaler:
            self.scaler.load_state_dict(stored.scaler)
        set_rng_states(stored, self.ranks.rank, self.device)
        self.step, self.skipped = stored.step, stored.skipped
        if self.ranks.first:
            print(f"train_gpt: resuming at step {self.step} of {self.options.steps}", file=sys.stderr)

    def autocast(self) -> torch.autocast:
        precision = self.options.precision
        return torch.autocast(self.device.type, DTYPES[precision], enabled=precision != "fp32")

    def train_step(self) -> tuple[Tensor, Tensor | None]:
        """Issue one step; its loss (mean over this rank's sequences) and gradient norm, still on the device."""
        options, ranks = self.options, self.ranks
        rate = learning_rate(self.step, options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = self.text.batch(options.seed, self.step, options.accumulate, options.batch_size)
        if ranks.size > 1:
            inputs, targets = (part.chunk(ranks.size, dim=1)[ranks.rank] for part in (inputs, targets))
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for i in range(options.accumulate):
            last = i + 1 == options.accumulate
            with self.parallel.no_sync() if ranks.size > 1 and not last else nullcontext():
                with self.autocast():
                    loss = loss_of(self.parallel(inputs[i]), targets[i]) / options.accumulate
                self.scaler.scale(loss).backward()
            total += loss.detach()
        norm = self.scaler.clip_grad_norm_(self.optimizer, options.clip) if options.clip > 0 else None
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        return total, norm

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss on the evaluation part; each rank computes its share of the batches."""
        self.model.eval()
        total = count = 0.0
        batches = self.text.held_out_batches(self.options.batch_size, self.options.eval_batches)
        for i, (inputs, targets) in enumerate(batches):
            if i % self.ranks.size == self.ranks.rank:
                with self.autocast():
                    loss = loss_of(self.model(inputs), targets)
                total += float(loss) * len(inputs)
                count += len(inputs)
        self.model.train()
        total, count = self.ranks.sum(total, count, device=self.device)
        return total / count

    def save(self) -> None:
        """Write the checkpoint: rank 0, with the generators of all."""
        states = [rng_states(self.device)] * self.ranks.size
        if self.ranks.size > 1:
            dist.all_gather_object(states, states[0])
        if not self.ranks.first:
            return
        tensors = training_tensors(self.model, self.optimizer)
        for rank, generators in enumerate(states):
            tensors.update({f"rng.{kind}.{rank}": state for kind, state in generators.items()})
        scaler, sizes = self.scaler.state_dict(), self.options.config.sizes()
        Checkpoint(self.path, tensors, self.step, self.skipped, scaler, sizes, self.recipe, self.settings).save()


def check_loss(loss: float, step: int) -> None:
    """Raises ValueError where the loss itself, before scaling, is not finite: no loss scale would mend it."""
    if not math.isfinite(loss):
        raise ValueError(f"expected a finite loss, got {loss} at step {step} (try a lower --lr, or --precision bf16)")


def due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def train(trainer: Trainer, stop: StopRequest) -> int:
    """All steps from the trainer's; the exit status: 0, or 130 where the user stopped the run."""
    options, ranks = trainer.options, trainer.ranks
    last = min(options.steps, options.max_steps or options.steps)
    if trainer.step >= last:
        print(f"train_gpt: nothing to do, the run is at step {trainer.step} of {last}", file=sys.stderr)
        return 0
    if ranks.first:
        options.out.mkdir(parents=True, exist_ok=True)
    metrics = None
    if ranks.first:
        metrics = Metrics(options.out, trainer.step, tensorboard=not options.no_tensorboard)
    tokens = options.accumulate * options.batch_size * options.config.context
    scale = trainer.scaler.get_scale()
    with Progress(trainer.step, last, shown=ranks.first) as progress:
        while trainer.step < last:
            started, step = time.perf_counter(), trainer.step
            loss, norm = trainer.train_step()
            # One wait for the device a step; the request to stop travels with the loss, so that all ranks stop alike.
            total, stopping = ranks.sum(float(loss), float(stop.requested), device=trainer.device)
            check_loss(total / ranks.size, step)
            before, scale = scale, trainer.scaler.get_scale()
            trainer.skipped += scale < before
            seconds = time.perf_counter() - started
            if metrics is not None:
                values = {"loss": total / ranks.size, "lr": learning_rate(step, options), "scale": before}
                values |= {"skipped": trainer.skipped, "tokens_per_second": tokens / seconds}
                metrics.write("step", step, values if norm is None else {**values, "grad_norm": float(norm)})
                progress.update(total / ranks.size, tokens / seconds, scale, trainer.skipped)
            if due(trainer.step, options.eval_every, last):
                evaluation = trainer.evaluate()
                if metrics is not None:
                    metrics.write("eval", trainer.step, {"loss": evaluation})
            if stopping or due(trainer.step, options.save_every, last):
                trainer.save()
            if stopping:
                break
    if metrics is not None:
        metrics.close()
        if stopping:
            print(f"train_gpt: interrupted after step {step}; the same command goes on from there", file=sys.stderr)
        else:
            print(f"step {last}: loss {evaluation:.4f} on the evaluation part, checkpoint {trainer.path}")
    return 130 if stopping else 0


def benchmark(trainer: Trainer) -> dict[str, object]:
    """Two passes of --benchmark steps: back to back for the time a step takes, then each alone for the host's part."""
    options, device = trainer.options, trainer.device
    cuda = device.type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    for _ in range(BENCHMARK_WARMUP):
        loss, _ = trainer.train_step()
    synchronize()
    marks = []
    for _ in range(options.benchmark + 1):
        marks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
        if cuda:
            marks[-1].record()
        if len(marks) <= options.benchmark:
            loss, _ = trainer.train_step()
    synchronize()
    pairs = zip(marks, marks[1:], strict=False)
    times = [a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in pairs]
    host_times = []
    for _ in range(options.benchmark):
        started = time.perf_counter()
        loss, _ = trainer.train_step()
        host_times.append(1e3 * (time.perf_counter() - started))
        synchronize()
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "language": "python",
        "precision": "tf32" if options.tf32 and options.precision == "fp32" else options.precision,
        "captured": False,
        "batch": options.batch_size,
        "context": options.config.context,
        "step_ms_median": statistics.median(times),
        "host_ms_median": statistics.median(host_times),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else 1024 * kibibytes,
        "final_loss": float(loss),
    }


@contextmanager
def joined_ranks(options: Namespace) -> Iterator[Ranks]:
    """The process group that torchrun asks for: NCCL on GPUs, gloo on CPUs."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Ranks(0, 1)
        return
    if options.batch_size % size:
        raise ValueError(f"expected --batch-size to be a multiple of the {size} ranks, got {options.batch_size}")
    if options.device.startswith("cuda"):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        # DistributedDataParallel holds the group in cycles. A group that outlives this keeps gloo's threads, and one of them may reach for the
        # interpreter when it is gone, which aborts the process.
        gc.collect()
        dist.destroy_process_group()


def run(arguments: list[str] | None) -> int:
    """Parse and train; the exit status."""
    options = parse(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"expected a GPU for --device {options.device}, got none")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with joined_ranks(options) as ranks:
        return run_rank(options, ranks)


def run_rank(options: Namespace, ranks: Ranks) -> int:
    """Build and train; all that uses the process group ends with this function."""
    trainer = Trainer(options, ranks)
    if options.benchmark:
        print(json.dumps(benchmark(trainer)), flush=True)
        return 0
    stop = StopRequest(ranks)
    with stop.listening():
        return train(trainer, stop)


def main(arguments: list[str] | None = None) -> int:
    """The command line: errors in one line on stderr, status 1."""
    try:
        return run(arguments)
    except (ValueError, OSError) as error:
        print(f"train_gpt: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
