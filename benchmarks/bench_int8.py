"""The int8 family against bfloat16, float16 and a copy, all ratios within one run: products, passes, layers, training steps.

    python benchmarks/bench_int8.py [--device cpu|cuda] [--only SECTION,...] [--quick] [--json FILE] [--csv FILE]

Sections, in this order:
    mm            int8_mm to bfloat16 over torch.mm in bfloat16
    weight        int8_weight_mm over bfloat16, few rows of input
    quantize      passes by rows and columns, as a share of the rate of a copy
    fused         norms and activations that end in codes, over separate operators
    linear        int8_linear, forward and backward, over nn.Linear in bfloat16
    inference     W8A8 encoder layers over float16 ones, eager and captured
    cpu           int8_mm over float32 and bfloat16 on two CPU threads
    gpt           a GPT's training step over compiled bfloat16; peak memory over eager bfloat16
Only where named, for they take longer:
    grid          products and passes of some thirty layers, for the table behind "auto" (--csv)
    gpt_compiled  the GPT's step with int8 compiled too
    torchao       torchao's compiled int8 mixed precision, where it is installed

Every kernel is checked first: fresh random operands, results against a reference in PyTorch's operators, new memory poisoned. Kernels
(mm, quantize, fused, grid) are timed on the device's clock with their launches queued behind a spin kernel and operands that rotate through
more than the cache holds; layers and steps as a user has them, launches included (device_ratio: without). Candidates take turns; medians.
The last columns: the ratio, the ratio to reach, and figures in the units that their names end in.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from common.parts import run_parts
from common.sections import SectionReport
from int8 import cpu, gemm, gpt_step, inference, linear, quantize
from int8.weight import weight

from quantrain.finetune.memory import keep_freed_memory

SECTIONS = ("mm", "weight", "quantize", "fused", "linear", "inference", "cpu", "gpt")
LONGER = ("grid", "gpt_compiled", "torchao")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--only", type=lambda text: tuple(text.split(",")), help="sections, separated by commas")
    add("--quick", action="store_true", help="tiny shapes, to see that it runs")
    add("--json", type=Path, help="also write the rows to this file, after each")
    add("--csv", type=Path, help="grid: its file")
    add("--torchao-seconds", type=float, default=150.0, help="torchao: no shape is begun later")
    options = parser.parse_args(arguments)
    options.only = options.only or SECTIONS
    for name in options.only:
        if name not in SECTIONS + LONGER:
            parser.error(f"expected sections of {', '.join(SECTIONS + LONGER)}, got {name}")
    return options


def run_section(name: str, report: SectionReport, options: argparse.Namespace) -> None:
    device, quick = options.device, options.quick
    sections = {
        "mm": lambda: gemm.mm(report, device, quick),
        "weight": lambda: weight(report, device, quick),
        "quantize": lambda: quantize.quantize(report, device, quick),
        "fused": lambda: quantize.fused(report, device, quick),
        "linear": lambda: linear.linear(report, device, quick),
        "inference": lambda: inference.inference(report, device, quick),
        "cpu": lambda: cpu.cpu(report, quick),
        "gpt": lambda: gpt_step.gpt(report, device, quick),
        "grid": lambda: gemm.grid(report, device, quick, options.csv),
        "gpt_compiled": lambda: gpt_step.gpt(report, device, quick, compile_int8=True),
        "torchao": lambda: linear.torchao(report, device, quick, options.torchao_seconds),
    }
    sections[name]()


def main(arguments: list[str] | None = None) -> int:
    """Runs the sections; one that fails prints its traceback and does not stop the others. The status is how many failed."""
    options = parse(arguments)
    torch.manual_seed(0)
    if options.device == "cpu":
        torch.set_num_threads(1 if options.quick else 2)
        keep_freed_memory()
    report = SectionReport("bench_int8", options.device, options.json, quick=options.quick)

    def section(name: str) -> None:
        try:
            run_section(name, report, options)
        finally:
            if options.device == "cuda":
                torch.cuda.empty_cache()

    failed = run_parts("bench_int8", {name: lambda name=name: section(name) for name in options.only}, report.note)
    report.summary()
    return failed


if __name__ == "__main__":
    sys.exit(main())
