"""Sections quantize, the passes against the rate of a copy, and fused, producers that end in codes against separate operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common.sections import SectionReport
from common.timing import kernel_seconds, sets_for
from torch import Tensor

import quantrain

from . import checks

SHAPES = ((16384, 4096), (16384, 768), (16384, 1024), (16384, 3072), (8192, 8192), (8192, 14336))
QUICK = ((300, 776),)
FUSED_SHAPES = ((16384, 768), (16384, 1024), (16384, 4096))


def quantize(report: SectionReport, device: str, quick: bool) -> None:
    """Each pass: bytes that it must move over its time, as a share of a copy's bytes over its time."""
    for rows, columns in QUICK if quick else SHAPES:
        quantize_shape(report, device, rows, columns)


def quantize_shape(report: SectionReport, device: str, rows: int, columns: int) -> None:
    sets = sets_for(2 * rows * columns, device)
    x = [torch.randn(rows, columns, device=device).bfloat16() for _ in range(sets)]
    target = [torch.empty_like(t) for t in x]
    row_factor = torch.rand(rows, device=device) * 0.1 + 0.01
    column_factor = torch.rand(columns, device=device) * 0.1 + 0.01
    for stochastic in (False, True):
        checks.check_rows(x[0], stochastic)
        checks.check_rows(x[0], stochastic, column_factor)
        checks.check_columns(x[0], stochastic)
        checks.check_columns(x[0], stochastic, row_factor)
    checks.check_both(x[0], column_factor, row_factor)
    codes = [quantrain.int8_quantize_rows(t)[0] for t in x]
    checks.require(torch.equal(quantrain.int8_transpose(codes[0]), codes[0].t()), "int8_transpose: wrong codes")
    check_equal_on_cpu(x[0])
    # name, call, bytes per element, share of the copy's rate to reach at 16384 x 4096
    cases = (
        ("rows, nearest", lambda i: quantrain.int8_quantize_rows(x[i % sets]), 3, 0.92),
        ("rows, stochastic", lambda i: quantrain.int8_quantize_rows(x[i % sets], stochastic=True), 3, 0.75),
        (
            "rows, factor, stochastic",
            lambda i: quantrain.int8_quantize_rows(x[i % sets], column_factor=column_factor, stochastic=True),
            3,
            None,
        ),
        ("columns, nearest", lambda i: quantrain.int8_quantize_columns(x[i % sets]), 5, None),
        ("columns, stochastic", lambda i: quantrain.int8_quantize_columns(x[i % sets], stochastic=True), 5, None),
        (
            "rows and columns, factors, stochastic",
            lambda i: quantrain.int8_quantize_rows_and_columns(
                x[i % sets], column_factor=column_factor, row_factor=row_factor, stochastic=True
            ),
            6,
            None,
        ),
        ("codes transposed", lambda i: quantrain.int8_transpose(codes[i % sets]), 2, None),
    )
    runs = [lambda i: target[i % sets].copy_(x[i % sets]), *(case[1] for case in cases)]
    copy, *seconds = kernel_seconds(runs, device)
    elements = rows * columns
    rate = 4 * elements / copy
    report.row("quantize", f"copy {rows}x{columns} bf16", None, None, us=1e6 * copy, gb_s=rate / 1e9)
    for (name, _, moved, share), found in zip(cases, seconds, strict=True):
        reached = moved * elements / found / rate
        target_share = share if (rows, columns) == SHAPES[0] else None
        report.row(
            "quantize", f"{name} {rows}x{columns}", reached, target_share, us=1e6 * found, bytes_an_element=float(moved)
        )


def check_equal_on_cpu(x: Tensor) -> None:
    """The seeded operators give the CPU's bits."""
    ops, part = torch.ops.quantrain, x[:200, :777].contiguous()
    for op in (ops.int8_quantize_rows, ops.int8_quantize_columns):
        here = op.seeded(part, seed=5, offset=8)
        there = op.seeded(part.cpu(), seed=5, offset=8)
        same = all(torch.equal(a.cpu(), b) for a, b in zip(here, there, strict=True))
        checks.require(same, f"{op}: not the CPU's bits")


# ---- fused -----------------------------------------------------------------------------------------------------------------


def fused(report: SectionReport, device: str, quick: bool) -> None:
    """Producers with codes out over the same from F.layer_norm, F.rms_norm, F.gelu, F.silu, + and int8_quantize_rows."""
    for rows, columns in QUICK if quick else FUSED_SHAPES:
        fused_shape(report, device, rows, columns)


def fused_shape(report: SectionReport, device: str, rows: int, columns: int) -> None:
    sets = sets_for(4 * rows * columns, device)
    dtype = torch.bfloat16
    x = [torch.randn(rows, columns, device=device).to(dtype) for _ in range(sets)]
    r = [torch.randn(rows, columns, device=device).to(dtype) for _ in range(sets)]
    w, b = torch.rand(columns, device=device).to(dtype) + 0.5, torch.randn(columns, device=device).to(dtype)
    size = (columns,)
    rows_of = quantrain.int8_quantize_rows

    def added(i: int) -> Tensor:
        return x[i % sets] + r[i % sets]

    def add_norm_separate(i: int) -> None:
        carried = added(i)
        rows_of(F.layer_norm(carried, size, w, b))

    check_producers(x[0], r[0], w, b)
    # name, fused, separate, bytes per element that the fused one must move
    cases = (
        (
            "int8_layer_norm",
            lambda i: quantrain.int8_layer_norm(x[i % sets], w, b),
            lambda i: rows_of(F.layer_norm(x[i % sets], size, w, b)),
            3,
        ),
        (
            "int8_rms_norm",
            lambda i: quantrain.int8_rms_norm(x[i % sets], w),
            lambda i: rows_of(F.rms_norm(x[i % sets], size, w, 1e-6)),
            3,
        ),
        (
            "int8_add_layer_norm",
            lambda i: quantrain.int8_add_layer_norm(x[i % sets], r[i % sets], w, b),
            add_norm_separate,
            7,
        ),
        (
            "int8_add_layer_norm, post_norm",
            lambda i: quantrain.int8_add_layer_norm(x[i % sets], r[i % sets], w, b, post_norm=True),
            add_norm_separate,
            7,
        ),
        (
            "int8_add_rms_norm",
            lambda i: quantrain.int8_add_rms_norm(x[i % sets], r[i % sets], w),
            lambda i: rows_of(F.rms_norm(added(i), size, w, 1e-6)),
            7,
        ),
        (
            "int8_gelu",
            lambda i: quantrain.int8_gelu(x[i % sets]),
            lambda i: rows_of(F.gelu(x[i % sets])),
            3,
        ),
        (
            "int8_gelu, tanh",
            lambda i: quantrain.int8_gelu(x[i % sets], approximate="tanh"),
            lambda i: rows_of(F.gelu(x[i % sets], approximate="tanh")),
            3,
        ),
        (
            "int8_silu_mul",
            lambda i: quantrain.int8_silu_mul(x[i % sets], r[i % sets]),
            lambda i: rows_of(F.silu(x[i % sets]) * r[i % sets]),
            5,
        ),
    )
    target = torch.empty_like(x[0])
    runs = [lambda i: target.copy_(x[i % sets])]
    for _, ours, separate, _ in cases:
        runs += [ours, separate]
    copy, *seconds = kernel_seconds(runs, device, repeats=9, batch_seconds=1e-3)
    rate = 4 * rows * columns / copy
    for (name, _, _, moved), ours, separate in zip(cases, seconds[::2], seconds[1::2], strict=True):
        share = moved * rows * columns / ours / rate
        figures = {"us": 1e6 * ours, "separate_us": 1e6 * separate, "share_of_copy": share}
        report.row("fused", f"{name} {rows}x{columns}", separate / ours, None, **figures)


def check_producers(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> None:
    size = (x.shape[-1],)
    norm = F.layer_norm
    total = x + r
    exact = {
        "int8_layer_norm": norm(x.float(), size, w.float(), b.float()),
        "int8_rms_norm": F.rms_norm(x.float(), size, w.float(), 1e-6),
        "int8_gelu": F.gelu(x.float()),
        "int8_silu_mul": F.silu(x.float()) * r.float(),
    }
    added = {
        "layer": norm(total.float(), size, w.float(), b.float()),
        "rms": F.rms_norm(total.float(), size, w.float(), 1e-6),
    }
    with checks.poisoned():
        found = {
            "int8_layer_norm": quantrain.int8_layer_norm(x, w, b),
            "int8_rms_norm": quantrain.int8_rms_norm(x, w),
            "int8_gelu": quantrain.int8_gelu(x),
            "int8_silu_mul": quantrain.int8_silu_mul(x, r),
        }
        pre, post = (quantrain.int8_add_layer_norm(x, r, w, b, post_norm=post) for post in (False, True))
        pre_rms, post_rms = (quantrain.int8_add_rms_norm(x, r, w, post_norm=post) for post in (False, True))
        tanh = quantrain.int8_gelu(x, approximate="tanh")
    for name, (codes, scale) in found.items():
        checks.check_fused(name, codes, scale, exact[name])
    checks.check_fused("int8_gelu, tanh", *tanh, F.gelu(x.float(), approximate="tanh"))
    for kind, (before, after) in {"layer": (pre, post), "rms": (pre_rms, post_rms)}.items():
        name = f"int8_add_{kind}_norm"
        for codes, scale, _ in (before, after):
            checks.check_fused(name, codes, scale, added[kind])
        checks.require(torch.equal(before[2], total), f"{name}: wrong sum carried on")
        close = torch.isclose(after[2].float(), added[kind], rtol=2**-7, atol=1e-5)
        checks.require(close.all(), f"{name}: wrong norm carried on")
