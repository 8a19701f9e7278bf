"""Operators of a family: each case is checked before it is timed, beside a copy of the same bytes and PyTorch's own operator.

On CUDA: kernel_seconds, on rotating inputs larger than the second-level cache. On a CPU: two threads, wall clock. Either way the
candidates take turns; medians.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.report import Measured, Report
from common.timing import Run, kernel_seconds, wall_seconds

SMALL = 1 << 22  # elements: of more, two sets rotate on a CPU


@dataclass
class Case:
    """A call with the number of a set of inputs; ``moved``: the bytes that it must move."""

    op: str
    granularity: str
    run: Run
    moved: float
    native: Run | None = None
    check: Callable[[], None] | None = None


MakeCases = Callable[[Sequence[int], torch.dtype, str, int], tuple[list[Tensor], list[Case]]]


def seconds_of(runs: Sequence[Run], device: str, sets: int, *, quick: bool = False) -> list[float]:
    """Seconds per call of candidates whose inputs are ``sets`` sets."""
    rotating = [lambda index, run=run: run(index % sets) for run in runs]
    if device == "cuda":
        return kernel_seconds(rotating, device)
    return wall_seconds(rotating, seconds=0.0 if quick else 0.8)


def copies(x: list[Tensor]) -> list[Run]:
    """A copy of an input into new memory, and PyTorch's clone: what moves as many bytes as an elementwise operator."""
    return [lambda i: torch.empty_like(x[i]).copy_(x[i]), lambda i: x[i].clone()]


def bench_case(report: Report, case: Case, x: list[Tensor], *, quick: bool = False) -> None:
    """A line: how long the case takes beside a copy and the native operator."""
    if case.check:
        case.check()
    runs = [case.run, *copies(x), *([case.native] if case.native else [])]
    ours, copy, clone, *native = seconds_of(runs, report.device, len(x), quick=quick)
    on_cpu = {} if report.device == "cuda" else {"times_of_copy": ours / copy, "times_of_clone": ours / clone}
    rate = 2 * x[0].numel() * x[0].element_size() / copy
    what = (case.op, case.granularity, x[0].dtype, x[0].shape)
    report.measured(Measured(*what, ours, case.moved, rate, native[0] if native else None, on_cpu))


def bench_cases(report: Report, shapes: Sequence[Sequence[int]], make_cases: MakeCases, *, quick: bool = False) -> None:
    """Every case of every shape: on CUDA in float32 and bfloat16, on a CPU in float32."""
    on_gpu = report.device == "cuda"
    for shape in [(64, 128)] if quick else shapes:
        for dtype in (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,):
            sets = 3 if on_gpu else 2 if math.prod(shape) > SMALL else 1
            x, cases = make_cases(shape, dtype, report.device, sets)
            for case in cases:
                bench_case(report, case, x, quick=quick)
            del x, cases
            if on_gpu:
                torch.cuda.empty_cache()


def parser_of(description: str) -> argparse.ArgumentParser:
    """The flags of every benchmark of a family."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quick", action="store_true", help="tiny shapes, to see that it runs")
    add("--json", type=Path, help="also write the rows to this file")
    return parser


def report_of(name: str, options: argparse.Namespace) -> Report:
    """The report of a benchmark with these flags; on a CPU two threads from now on."""
    torch.manual_seed(0)
    if options.device == "cpu":
        torch.set_num_threads(2)
    return Report(name, options.device, options.json)
