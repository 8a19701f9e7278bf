"""Section weight: int8_weight_mm (8-bit weight, bfloat16 input) over bfloat16, for few rows of input."""

from __future__ import annotations

import torch
from common.sections import SectionReport
from common.timing import Captured, copy_rate, graph_seconds, wall_seconds

import quantrain

SHAPES = ((4096, 4096), (14336, 4096), (8192, 8192), (28672, 8192))
QUICK = ((48, 64),)
ROWS = (1, 4, 8, 16, 32, 64)
ROTATED_BYTES = 250e6


def weight(report: SectionReport, device: str, quick: bool) -> None:
    """Weights rotate past the cache; on CUDA in graphs. read_share: codes and scales over time, as a share of a copy's rate."""
    rate = copy_rate(device)
    for n, k in QUICK if quick else SHAPES if device == "cuda" else SHAPES[:1]:
        count = 2 if quick or device == "cpu" else max(3, -(-int(ROTATED_BYTES) // (n * k)))
        weights = [torch.randn(n, k, device=device, dtype=torch.bfloat16) for _ in range(count)]
        packed = [quantrain.int8_quantize_rows(w) for w in weights]
        for m in ROWS:
            x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            codes, scale = packed[0]
            exact = x.double() @ (codes.double() * scale.double()).t()
            error = float((quantrain.int8_weight_mm(x, codes, scale).double() - exact).norm() / exact.norm())
            if not error < 4e-3:
                raise AssertionError(f"int8_weight_mm: expected an error below 0.4 %, got {error}")
            runs = [
                lambda i, x=x: torch.nn.functional.linear(x, weights[i % count]),
                lambda i, x=x: quantrain.int8_weight_mm(x, *packed[i % count]),
            ]
            if device == "cuda":
                seconds = graph_seconds({str(i): Captured(run, count) for i, run in enumerate(runs)})
                bf16, ours = seconds["0"], seconds["1"]
            else:
                bf16, ours = wall_seconds(runs, repeats=9)
            share = (n * k + 4 * n) / ours / rate
            report.row(
                "weight", f"{m} rows {n}x{k}", bf16 / ours, None, us=ours * 1e6, bf16_us=bf16 * 1e6, read_share=share
            )
        del weights, packed
        if device == "cuda":
            torch.cuda.empty_cache()
