"""Section gpt: a whole training step of a GPT, bfloat16 eager, bfloat16 compiled, int8 eager (and compiled)."""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common.checks import require
from common.recipes import int8_recipe
from common.sections import SectionReport
from common.timing import host_seconds, synchronize, turns
from torch import Tensor, nn

import quantrain.nn as qnn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "python"))
from gpt import FLOAT_LAYERS, GPT, GPTConfig, init_weights, loss_of  # noqa: E402


@dataclass(frozen=True)
class Case:
    """A model and what int8 has to reach against compiled bfloat16."""

    config: GPTConfig
    batch: int
    target: float | None


def _gpt(width: int, heads: int, layers: int) -> GPTConfig:
    return GPTConfig(layers=layers, heads=heads, width=width, context=1024, vocab=50304)


CASES = (Case(_gpt(768, 12, 12), 8, 0.98), Case(_gpt(2048, 16, 8), 8, 1.2), Case(_gpt(4096, 32, 4), 8, 1.35))
QUICK = (Case(GPTConfig(layers=2, heads=2, width=64, context=32, vocab=256), 2, None),)
PEAK_TARGET = 0.9
WARM_UP, STEPS, GROUPS = 4, 4, 4


def make_model(case: Case, device: str) -> GPT:
    """Fresh weights in bfloat16; no biases in the linear layers, as in the model whose times the figures to reach come from."""
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(case.config)
    init_weights(model, case.config.layers)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.bias = None
    return model.to(torch.bfloat16)


def prepared(model: nn.Module, choice: str) -> nn.Module:
    """int8-training in the linear layers; embeddings, and the output head that shares one, stay in floating point."""
    return qnn.prepare(model, int8_recipe(choice), skip=FLOAT_LAYERS)


@dataclass(frozen=True)
class Measured:
    """Seconds per step, bytes at the peak, first and last loss."""

    seconds: float
    peak: int
    losses: tuple[float, float]


def measure(case: Case, change: Callable[[nn.Module], nn.Module], compiled: bool, device: str) -> Measured:
    """Zero the gradients, forward, loss, backward, fused AdamW: steps back to back, launches included.

    The model is what is compiled; the loss is computed by the same operators in every column.
    """
    clean(device)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    model = change(make_model(case, device)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model) if compiled else model
    tokens = torch.randint(case.config.vocab, (case.batch, case.config.context + 1), device=device)
    losses: list[Tensor] = []

    def step(index: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(forward(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    for _ in range(WARM_UP):
        step(0)
    synchronize(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    (times,) = turns([lambda turn: host_seconds(step, STEPS, device)], GROUPS)
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
    found = Measured(statistics.median(times), peak, (float(losses[0]), float(losses[-1])))
    for parameter in model.parameters():
        require(torch.isfinite(parameter).all(), "GPT: a weight is NaN or Inf")
    return found


def clean(device: str) -> None:
    """Frees what the last model held; a compiled one is held by its cache too."""
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def gpt(report: SectionReport, device: str, quick: bool, *, compile_int8: bool = False) -> None:
    """Ratios are to compiled bfloat16. ``compile_int8`` measures the compiled int8 step instead of the eager ones."""
    for case in QUICK if quick else CASES:
        config = case.config
        name = f"GPT {config.width} wide, {config.layers} layers, {case.batch} x {config.context} tokens"
        runs: dict[str, tuple[Callable[[nn.Module], nn.Module], bool]] = {
            "bf16 eager": (lambda model: model, False),
            "bf16 compiled": (lambda model: model, True),
            "int8 auto": (lambda model: prepared(model, "auto"), False),
            "int8 all": (lambda model: prepared(model, "int8"), False),
        }
        if compile_int8:
            del runs["int8 all"]
            runs["int8 auto compiled"] = (lambda model: prepared(model, "auto"), True)
        found: dict[str, Measured] = {}
        for kind, (change, compiled) in runs.items():
            try:
                found[kind] = measure(case, change, compiled, device)
            except Exception as error:  # the other columns are still worth having
                if not compiled:
                    raise
                report.note(f"{name}: {kind} failed, {type(error).__name__}: {str(error).splitlines()[0]}")
        report_case(report, name, case, found, device)
    clean(device)


def report_case(report: SectionReport, name: str, case: Case, found: dict[str, Measured], device: str) -> None:
    eager = found["bf16 eager"]
    base = found.get("bf16 compiled")
    for kind, measured in found.items():
        first, last = measured.losses
        require(
            abs(first - eager.losses[0]) < 0.02 * eager.losses[0], f"{name}: {kind} begins with a loss of {first:.3f}"
        )
        require(last < first, f"{name}: {kind} does not learn: {first:.3f} to {last:.3f}")
        figures = {"ms": 1e3 * measured.seconds, "over_bf16_eager": eager.seconds / measured.seconds}
        if device == "cuda":
            figures |= {"peak_gib": measured.peak / 2**30}
        ratio = base.seconds / measured.seconds if base else None
        report.row("gpt", f"{name}: {kind}", ratio, case.target if kind == "int8 auto" else None, **figures)
    if device == "cuda":
        for kind in ("int8 auto", "int8 all"):
            if kind in found:
                share = found[kind].peak / eager.peak
                target = PEAK_TARGET if kind == "int8 auto" and case.target else None
                report.row("memory", f"{name}: {kind} over bf16 eager", share, target)
