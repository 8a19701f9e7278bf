"""Products with outlier columns, GPTQ and the rows' passes against float products, int8_mm and bitsandbytes.

    python benchmarks/bench_ptq.py [--device cpu|cuda] [--only SECTION,...] [--quick] [--json FILE]

Sections, in this order:
    eager     the llm-int8 layer called from Python, 16 columns, over the 16-bit linear layer; over bitsandbytes' LLM.int8() at
              threshold 6, where that can be imported
    captured  the same in CUDA graphs; on the CPU, called: over the 16-bit layer (float32 on the CPU), and over int8_mm with its rows
    passes    int8_quantize_rows_outliers over int8_quantize_rows
    gptq      seconds of gptq_round, its Hessian given

Every product is checked first against float64, with fresh random operands. Weights rotate through 250 MB and more; candidates take
turns; medians. The last columns: the ratio, the ratio to reach, and figures in the units that their names end in.
"""

from __future__ import annotations

import sys
import time

import torch
from common.sections import SectionReport, run_sections
from common.timing import Captured, graph_seconds, kernel_seconds, sets_for, step_seconds, synchronize
from torch import Tensor, nn

import quantrain
import quantrain.nn as qnn

ROWS = (1, 32, 128, 512, 1024, 8192)
SHAPES = ((4096, 4096), (4096, 14336), (1024, 4096))  # K, N
ON_CPU = ((576, 576), (576, 1536), (1536, 576))  # SmolLM2's
ROWS_ON_CPU = (1, 8, 128)
COLUMNS = 16
# Over the float layer: W8A16 at few rows; with AVX2 on the CPU.
TARGETS = {"cuda": {1: 1 / 0.75, 32: 1 / 1.1}, "cpu": {1: 2.5, 128: 1.8}}


def inputs(rows: int, k: int, device: str, dtype: torch.dtype) -> Tensor:
    """Normal numbers, some columns of which are 60 times as large."""
    x = torch.randn(rows, k, device=device)
    x[:, :COLUMNS] *= 60
    return x[:, torch.randperm(k, device=device)].to(dtype).contiguous()


def converted(linear: nn.Linear, x: Tensor, recipe: str) -> nn.Module:
    """The layer of that recipe, of the columns of ``x``."""
    layer = qnn.PtqLinear.from_float(linear, qnn.as_recipe(recipe))
    if layer.missing_range() is not None:
        qnn.calibrate(layer, [x])
    return qnn.convert(layer)


def check(layer: nn.Module, linear: nn.Linear, x: Tensor) -> float:
    """The layer's error over the norm, against float64."""
    exact = x.double() @ linear.weight.double().t()
    error = ((layer(x).double() - exact).norm() / exact.norm()).item()
    if not error < 0.02:
        raise AssertionError(f"llm-int8: expected an error below 2 %, got {error}")
    return error


def bitsandbytes_layers(linears: list[nn.Linear]) -> list[nn.Module] | None:
    """Linear8bitLt of the same weights, or None where bitsandbytes is not installed."""
    try:
        from bitsandbytes.nn import Int8Params, Linear8bitLt
    except ModuleNotFoundError:
        return None
    layers = []
    for linear in linears:
        layer = Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.weight = Int8Params(linear.weight.detach().half().cpu(), requires_grad=False, has_fp16_weights=False)
        layers.append(layer.cuda())
    return layers


def operands(k: int, n: int, device: str) -> tuple[list[nn.Linear], list[nn.Module], list[nn.Module], torch.dtype]:
    """Float layers, llm-int8's and plain int8's, which rotate."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    count = sets_for(k * n, device)
    linears = [nn.Linear(k, n, bias=False, device=device, dtype=dtype) for _ in range(count)]
    x = inputs(256, k, device, dtype)
    layers = [converted(linear, x, "llm-int8") for linear in linears]
    plain = [converted(linear, x, "zeroquant-w8a8") for linear in linears]
    check(layers[0], linears[0], x)
    check(layers[0], linears[0], x[:4])
    return linears, layers, plain, dtype


# ---- sections --------------------------------------------------------------------------------------------------------


def eager(report: SectionReport, device: str, quick: bool) -> None:
    """As a program calls it, launches included."""
    for k, n in ((64, 64),) if quick else (SHAPES if device == "cuda" else ON_CPU):
        linears, layers, _, dtype = operands(k, n, device)
        count = len(linears)
        theirs = bitsandbytes_layers(linears) if device == "cuda" else None
        for rows in ROWS_ON_CPU if device == "cpu" else ROWS:
            x = [inputs(rows, k, device, dtype) for _ in range(count)]
            runs = {
                "float": lambda i, x=x: linears[i % count](x[i % count]),
                "ours": lambda i, x=x: layers[i % count](x[i % count]),
            }
            if theirs is not None:
                runs["bitsandbytes"] = lambda i, x=x: theirs[i % count](x[i % count])
            found = dict(zip(runs, step_seconds(list(runs.values()), device), strict=True))
            case, us = f"{rows} rows {k}x{n}", {"us": found["ours"] * 1e6}
            report.row("eager", f"{case} over float", found["float"] / found["ours"], None, **us)
            if theirs is not None:
                ratio = found["bitsandbytes"] / found["ours"]
                report.row("eager", f"{case} over bitsandbytes", ratio, 4.0 if (k, n) == SHAPES[0] else None, **us)


def seconds_of(runs: dict[str, tuple], device: str) -> dict[str, float]:
    """Seconds per call of each candidate: its run, and how many calls go through its operands once."""
    if device == "cpu":
        return dict(zip(runs, step_seconds([run for run, _ in runs.values()], device), strict=True))
    return graph_seconds({name: Captured(run, calls) for name, (run, calls) in runs.items()})


def captured(report: SectionReport, device: str, quick: bool) -> None:
    """Without the host's part."""
    for k, n in ((64, 64),) if quick else (SHAPES if device == "cuda" else ON_CPU):
        linears, layers, plain, dtype = operands(k, n, device)
        count = len(linears)
        for rows in ROWS_ON_CPU if device == "cpu" else ROWS:
            x = [inputs(rows, k, device, dtype) for _ in range(count)]
            runs = {
                "float": (lambda i, x=x: linears[i % count](x[i % count]), count),
                "ours": (lambda i, x=x: layers[i % count](x[i % count]), count),
                "plain": (lambda i, x=x: plain[i % count](x[i % count]), count),
            }
            found = seconds_of(runs, device)
            case, us = f"{rows} rows {k}x{n}", {"us": found["ours"] * 1e6}
            aimed = not quick and ((k, n) == SHAPES[0] or device == "cpu")
            target = TARGETS[device].get(rows) if aimed else None
            report.row("captured", f"{case} over float", found["float"] / found["ours"], target, **us)
            ratio = found["plain"] / found["ours"]
            bar = {("cuda", 8192): 0.93, ("cpu", 128): 1 / 1.1}.get((device, rows)) if aimed else None
            report.row("captured", f"{case} over one scale per row", ratio, bar, us=found["plain"] * 1e6)


def passes(report: SectionReport, device: str, quick: bool) -> None:
    """One reading of the rows, as the plain pass."""
    for rows, k in ((8, 64),) if quick else ((128, 576), (8192, 4096), (8192, 14336))[: 1 if device == "cpu" else 3]:
        dtype = torch.float16 if device == "cuda" else torch.float32
        x = [inputs(rows, k, device, dtype) for _ in range(sets_for(2 * rows * k, device))]
        columns = torch.arange(COLUMNS, device=device) * (k // COLUMNS)
        plain, ours = kernel_seconds(
            [
                lambda i: torch.ops.quantrain.int8_quantize_rows.nearest(x[i % len(x)]),
                lambda i: torch.ops.quantrain.int8_quantize_rows_outliers(x[i % len(x)], columns),
            ],
            device,
        )
        report.row("passes", f"{rows} x {k}", plain / ours, None, us=ours * 1e6, plain_us=plain * 1e6)


def gptq(report: SectionReport, device: str, quick: bool) -> None:
    """Once: it allocates, and waits for the device."""
    for n, k in ((8, 64),) if quick else (((4096, 4096), (4096, 14336)) if device == "cuda" else ((1536, 576),)):
        weight, x = torch.randn(n, k, device=device) * 0.02, torch.randn(2 * k, k, device=device)
        hessian = 2 * x.t() @ x / len(x)
        group = min(128, k)
        scale = weight.view(n, -1, group).abs().amax(2) / 7
        quantrain.ptq.gptq_round(weight[:8], hessian, scale[:8], group_size=group)  # libraries are loaded
        synchronize(device)
        start = time.perf_counter()
        _, error = quantrain.ptq.gptq_round(weight, hessian, scale, group_size=group)
        synchronize(device)
        seconds = time.perf_counter() - start
        bar = 4.0 if device == "cuda" and k == 14336 else None
        report.row("gptq", f"{n} x {k}", bar and bar / seconds, bar and 1.0, s=seconds, error=float(error))


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    sections = {"eager": eager, "captured": captured, "passes": passes, "gptq": gptq}
    return run_sections("bench_ptq", __doc__, sections, arguments)


if __name__ == "__main__":
    sys.exit(main())
