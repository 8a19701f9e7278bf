"""Sections mm, int8_mm against torch.mm in bfloat16, and grid, what the table behind "auto" is made from."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from common.operands import random_codes, random_scale
from common.sections import SectionReport
from common.timing import kernel_seconds, sets_for
from torch import Tensor

import quantrain

from .checks import check_accumulate, check_mm

# (M, N, K), what the shape is, the ratio to reach over bfloat16
NAMED = (
    (4096, 4096, 4096, "square", 1.75),
    (8192, 4096, 14336, "forward", 1.75),
    (8192, 8192, 8192, "square", 1.75),
    (16384, 768, 768, "width 768", 1.45),
    (16384, 3072, 768, "width 768", 1.45),
    (16384, 768, 3072, "width 768", 1.45),
    (4096, 4096, 16384, "dW", 1.65),
    (3072, 768, 16384, "dW", 1.65),
    (768, 768, 16384, "dW", 1.2),
)
FURTHER = (
    (2048, 2048, 2048, "square", None),
    (16384, 2304, 768, "width 768", None),
    (16384, 4096, 4096, "square", None),
)
QUICK = ((256, 192, 320, "quick", None),)
ODD = (1000, 784, 720)  # nothing is a multiple of a tile; checked with bias in every type

# Linear layers of transformers as (tokens, in, out): q, k, v in one, projection, both of the feed-forward part
WIDTHS = (512, 768, 1024, 1536, 2048, 3072, 4096)
LINEARS = [
    (tokens, *sizes)
    for tokens in (8192, 16384)
    for width in WIDTHS
    for sizes in ((width, width), (width, 4 * width), (4 * width, width))
] + [
    (16384, 768, 2304),
    (16384, 2048, 6144),
    (8192, 4096, 12288),
    (16384, 4096, 14336),
    (16384, 14336, 4096),
    (2048, 1024, 1024),
    (2048, 4096, 4096),
    (4096, 1024, 4096),
    (4096, 2048, 8192),
    (4096, 4096, 14336),
    (32768, 768, 3072),
    (32768, 1024, 4096),
]
GRID_COLUMNS = (
    *("tokens", "in", "out", "gemm", "m", "n", "k", "bf16_us", "int8_mm_us", "passes_us", "ratio"),
    *("rows_x_us", "rows_w_us", "rows_dy_us", "columns_dy_us", "both_dy_us", "transpose_x_us", "weight_transpose_us"),
)


def operands(m: int, n: int, k: int, device: str, sets: int) -> tuple[list, list]:
    """(bfloat16 pairs, int8 pairs with their scales); b is [N, K] in both."""
    wide = [
        (torch.randn(m, k, device=device).bfloat16(), torch.randn(n, k, device=device).bfloat16()) for _ in range(sets)
    ]
    codes = [
        (
            random_codes(m, k, device),
            random_codes(n, k, device),
            random_scale(m, device),
            random_scale(n, device),
        )
        for _ in range(sets)
    ]
    return wide, codes


def mm(report: SectionReport, device: str, quick: bool) -> None:
    """int8_mm to bfloat16 with both scales, over torch.mm of the same M, N, K."""
    a, b = random_codes(ODD[0], ODD[2], device), random_codes(ODD[1], ODD[2], device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        bias = torch.randn(ODD[1], device=device)
        check_mm(a, b, random_scale(ODD[0], device), random_scale(ODD[1], device), bias, dtype)
        accumulator = torch.randn(ODD[0], ODD[1], device=device).to(dtype)
        check_accumulate(a, b, random_scale(ODD[0], device), accumulator)
    for m, n, k, kind, target in QUICK if quick else NAMED + FURTHER:
        sets = sets_for((m + n) * k, device)
        wide, codes = operands(m, n, k, device, sets)
        check_mm(*codes[0], None, torch.bfloat16)
        bf16, int8 = kernel_seconds(
            [
                lambda i: torch.mm(wide[i % sets][0], wide[i % sets][1].t()),
                lambda i: quantrain.int8_mm(*codes[i % sets], out_dtype=torch.bfloat16),
            ],
            device,
        )
        tops = 2 * m * n * k / 1e12
        figures = {"bf16_tflops": tops / bf16, "int8_tops": tops / int8, "bf16_us": 1e6 * bf16, "int8_us": 1e6 * int8}
        report.row("mm", f"{m}x{n}x{k} ({kind})", bf16 / int8, target, **figures)


# ---- grid ------------------------------------------------------------------------------------------------------------------


def grid(report: SectionReport, device: str, quick: bool, path: Path | None) -> None:
    """For each linear layer the three products in both types and every pass that int8 needs; a CSV of microseconds.

    ``passes_us``: the passes that this product alone needs (forward: X and W by rows; grad_input: dY by rows and the weight
    transposed; grad_weight: dY by columns and X's codes transposed). ``both_dy_us``: dY by rows and columns in one operator.
    ``ratio``: bf16 over product and passes.
    """
    rows = []
    for tokens, inputs, outputs in [(256, 128, 192)] if quick else LINEARS:
        times, passes = linear_times(tokens, inputs, outputs, device)
        own = {
            "forward": passes["rows_x_us"] + passes["rows_w_us"],
            "grad_input": passes["rows_dy_us"] + passes["weight_transpose_us"],
            "grad_weight": passes["columns_dy_us"] + passes["transpose_x_us"],
        }
        for name, (m, n, k, bf16, int8) in times.items():
            ratio = bf16 / (int8 + own[name])
            values = (tokens, inputs, outputs, name, m, n, k, bf16, int8, own[name], ratio)
            rows.append({**dict(zip(GRID_COLUMNS, values, strict=False)), **passes})
            figures = {"bf16_us": bf16, "int8_mm_us": int8, "passes_us": own[name]}
            report.row("grid", f"{tokens}x{inputs}x{outputs} {name}", ratio, None, **figures)
        if path is not None:
            _write_csv(path, rows, report)


def _write_csv(path: Path, rows: list[dict], report: SectionReport) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        for key, value in report.head.items():
            file.write(f"# {key} {value}\n")
        writer = csv.DictWriter(file, GRID_COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()})


def linear_times(tokens: int, inputs: int, outputs: int, device: str) -> tuple[dict, dict[str, float]]:
    """({product: (M, N, K, bfloat16 us, int8 us)}, {pass: us}); bfloat16 products in the layouts that nn.Linear gives them."""
    sets = sets_for(tokens * (inputs + outputs), device)

    def make(rows: int, columns: int) -> list[Tensor]:
        return [torch.randn(rows, columns, device=device).bfloat16() for _ in range(sets)]

    x, w, dy = make(tokens, inputs), make(outputs, inputs), make(tokens, outputs)
    xq = [quantrain.int8_quantize_rows(t) for t in x]
    wq = [quantrain.int8_quantize_rows(t) for t in w]
    xt = [quantrain.int8_transpose(codes) for codes, _ in xq]
    wt = [quantrain.int8_weight_transpose(w[i], wq[i][1]) for i in range(sets)]
    gq = [quantrain.int8_quantize_rows(t, stochastic=True) for t in dy]
    gt = [quantrain.int8_quantize_columns(t, row_factor=xq[i][1], stochastic=True) for i, t in enumerate(dy)]
    bf16 = torch.bfloat16
    products = {
        "forward": (
            (tokens, outputs, inputs),
            lambda i: torch.mm(x[i % sets], w[i % sets].t()),
            lambda i: quantrain.int8_mm(
                xq[i % sets][0], wq[i % sets][0], xq[i % sets][1], wq[i % sets][1], out_dtype=bf16
            ),
        ),
        "grad_input": (
            (tokens, inputs, outputs),
            lambda i: torch.mm(dy[i % sets], w[i % sets]),
            lambda i: quantrain.int8_mm(
                gq[i % sets][0], wt[i % sets][0], gq[i % sets][1], wt[i % sets][2], out_dtype=bf16
            ),
        ),
        "grad_weight": (
            (outputs, inputs, tokens),
            lambda i: torch.mm(dy[i % sets].t(), x[i % sets]),
            lambda i: quantrain.int8_mm(gt[i % sets][0], xt[i % sets], gt[i % sets][1], out_dtype=bf16),
        ),
    }
    times = {}
    for name, (shape, wide, narrow) in products.items():
        times[name] = (*shape, *(1e6 * t for t in kernel_seconds([wide, narrow], device, repeats=9)))
    runs = {
        "rows_x_us": lambda i: quantrain.int8_quantize_rows(x[i % sets]),
        "rows_w_us": lambda i: quantrain.int8_quantize_rows(w[i % sets]),
        "rows_dy_us": lambda i: quantrain.int8_quantize_rows(
            dy[i % sets], column_factor=wt[i % sets][1], stochastic=True
        ),
        "columns_dy_us": lambda i: quantrain.int8_quantize_columns(
            dy[i % sets], row_factor=xq[i % sets][1], stochastic=True
        ),
        "both_dy_us": lambda i: quantrain.int8_quantize_rows_and_columns(
            dy[i % sets], column_factor=wt[i % sets][1], row_factor=xq[i % sets][1], stochastic=True
        ),
        "transpose_x_us": lambda i: quantrain.int8_transpose(xq[i % sets][0]),
        "weight_transpose_us": lambda i: quantrain.int8_weight_transpose(w[i % sets], wq[i % sets][1]),
    }
    seconds = kernel_seconds(list(runs.values()), device, repeats=7, batch_seconds=1e-3)
    return times, {name: 1e6 * value for name, value in zip(runs, seconds, strict=True)}
