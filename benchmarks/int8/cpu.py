"""Section cpu: int8_mm against torch.mm in float32 and bfloat16 on two threads."""

from __future__ import annotations

import torch
from common.operands import random_codes, random_scale
from common.sections import SectionReport
from common.timing import wall_seconds

import quantrain

from .checks import check_mm

SHAPES = (((1024, 1024, 1024), 6.0, 1.6), ((2048, 2048, 2048), None, None), ((512, 2048, 512), None, None))
QUICK = (((128, 96, 64), None, None),)
THREADS = 2


def cpu(report: SectionReport, quick: bool) -> None:
    """Ratios over float32, with scales on and a float32 result, and over bfloat16, with a bfloat16 result."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        for (m, n, k), over_fp32, over_bf16 in QUICK if quick else SHAPES:
            a, b = random_codes(m, k, "cpu"), random_codes(n, k, "cpu")
            a_scale, b_scale = random_scale(m, "cpu"), random_scale(n, "cpu")
            for dtype in (torch.float32, torch.bfloat16):
                check_mm(a, b, a_scale, b_scale, torch.randn(n), dtype)
            wide, other = torch.randn(m, k), torch.randn(n, k)
            half, other_half = wide.bfloat16(), other.bfloat16()
            fp32, bf16, to_fp32, to_bf16 = wall_seconds(
                [
                    lambda i: torch.mm(wide, other.t()),
                    lambda i: torch.mm(half, other_half.t()),
                    lambda i: quantrain.int8_mm(a, b, a_scale, b_scale),
                    lambda i: quantrain.int8_mm(a, b, a_scale, b_scale, out_dtype=torch.bfloat16),
                ],
                repeats=3 if quick else 31,
            )
            name, gops = f"{m}x{n}x{k}, {THREADS} threads", 2 * m * n * k / 1e9
            report.row("cpu", f"{name}, over float32", fp32 / to_fp32, over_fp32, ms=1e3 * to_fp32, gops=gops / to_fp32)
            report.row(
                "cpu", f"{name}, over bfloat16", bf16 / to_bf16, over_bf16, ms=1e3 * to_bf16, gops=gops / to_bf16
            )
    finally:
        torch.set_num_threads(threads)
