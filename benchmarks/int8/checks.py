"""What each kernel must give before it is timed: references in PyTorch's operators, on fresh random operands."""

from __future__ import annotations

import torch
from common.checks import poisoned, require
from torch import Tensor

import quantrain

SAMPLES = 8192  # elements of a product that are computed exactly

# ---- products --------------------------------------------------------------------------------------------------------------


def check_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    """int8_mm: some thousand elements exactly, and the sum of each row with random signs, which no wrong tile survives."""
    name = f"int8_mm {a.shape[0]}x{b.shape[0]}x{a.shape[1]} {dtype}"
    with poisoned():
        out = quantrain.int8_mm(a, b, a_scale, b_scale, bias, out_dtype=dtype)
    require(torch.isfinite(out).all(), f"{name}: NaN or Inf in the result")
    m, n = out.shape
    rows = torch.randint(m, (SAMPLES,), device=a.device)
    columns = torch.randint(n, (SAMPLES,), device=a.device)
    rows[:4], columns[:4] = (
        torch.tensor([0, 0, m - 1, m - 1], device=a.device),
        torch.tensor([0, n - 1, 0, n - 1], device=a.device),
    )
    step = torch.finfo(dtype).eps
    for some, others in zip(rows.split(1024), columns.split(1024), strict=True):
        sums = (a[some].int() * b[others].int()).sum(dim=1)
        exact = sums.double() * b_scale.flatten()[others].double() * a_scale.flatten()[some].double()
        size = exact.abs()
        if bias is not None:
            exact += bias[others].double()
            size += bias[others].double().abs()
        error = (out[some, others].double() - exact).abs()
        require((error <= step * exact.abs() + 4 * 2**-23 * size).all(), f"{name}: wrong elements")
    signs = torch.randint(0, 2, (n, 1), device=a.device).double() * 2 - 1
    weighted = signs * b_scale.view(-1, 1).double()
    row_sums = (_matvec(a, _matvec_t(b, weighted))) * a_scale.view(-1, 1).double()
    if bias is not None:
        row_sums += (bias.double().view(-1, 1) * signs).sum()
    error = (_matvec(out, signs) - row_sums).abs().flatten()
    norm = torch.linalg.vector_norm(out, dim=1, dtype=torch.float64)
    limit = 8 * (step / 2 + 2**-21) * norm + 1e-9 * norm.max()
    require((error <= limit).all(), f"{name}: wrong row sums, {int((error > limit).sum())} rows")


def _matvec(matrix: Tensor, vector: Tensor, rows: int = 2048) -> Tensor:
    """matrix @ vector in float64, a part of the rows at a time."""
    return torch.cat([part.double() @ vector for part in matrix.split(rows)])


def _matvec_t(matrix: Tensor, vector: Tensor, rows: int = 2048) -> Tensor:
    """matrix.T @ vector in float64."""
    total = torch.zeros(matrix.shape[1], vector.shape[1], dtype=torch.float64, device=matrix.device)
    for part, weights in zip(matrix.split(rows), vector.split(rows), strict=True):
        total += part.double().t() @ weights
    return total


def check_accumulate(a: Tensor, b: Tensor, a_scale: Tensor, accumulator: Tensor) -> None:
    """int8_mm_accumulate_: the old values plus the product, rounded once."""
    product = quantrain.int8_mm(a, b, a_scale, None, out_dtype=torch.float32)
    expected = accumulator.float() + product
    result = accumulator.clone()
    quantrain.int8_mm_accumulate_(result, a, b, a_scale, None)
    step = torch.finfo(accumulator.dtype).eps
    slack = 2**-22 * (accumulator.float().abs() + product.abs())
    require(
        ((result.float() - expected).abs() <= step * expected.abs() + slack).all(), "int8_mm_accumulate_: wrong sums"
    )


# ---- quantization ----------------------------------------------------------------------------------------------------------


def nearest_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of the rows by choose_qparams and quantize."""
    scale, _ = quantrain.choose_qparams(x, [*x.shape[:-1], 1], quant_min=-127, quant_max=127)
    return quantrain.quantize(x, scale, quant_min=-127, quant_max=127), scale


def check_codes(name: str, codes: Tensor, scale: Tensor, x: Tensor, stochastic: bool) -> None:
    """Codes of the rows of ``x`` (float32): to nearest those of choose_qparams and quantize, else within a step and without bias."""
    expected, expected_scale = nearest_rows(x)
    require(torch.equal(scale, expected_scale), f"{name}: wrong scales")
    if not stochastic:
        require(torch.equal(codes, expected), f"{name}: wrong codes")
        return
    error = codes.float() - x * (1 / scale)
    require(error.abs().max() < 1.001, f"{name}: a code more than a step away")
    z = float(error.double().mean() / (error.double().std() / error.numel() ** 0.5))
    require(abs(z) < 6, f"{name}: mean error {z:.1f} standard errors from 0")
    require((codes != expected).any(), f"{name}: rounded to nearest")


def check_rows(x: Tensor, stochastic: bool, factor: Tensor | None = None) -> None:
    with poisoned():
        codes, scale = quantrain.int8_quantize_rows(x, column_factor=factor, stochastic=stochastic)
    seen = x.float() if factor is None else x.float() * factor
    check_codes(f"int8_quantize_rows {x.dtype}", codes, scale, seen, stochastic)


def check_columns(x: Tensor, stochastic: bool, factor: Tensor | None = None) -> None:
    with poisoned():
        codes, scale = quantrain.int8_quantize_columns(x, row_factor=factor, stochastic=stochastic)
    seen = x.float() if factor is None else x.float() * factor.view(-1, 1)
    check_codes(f"int8_quantize_columns {x.dtype}", codes, scale, seen.t().contiguous(), stochastic)


def check_both(x: Tensor, column_factor: Tensor, row_factor: Tensor) -> None:
    """int8_quantize_rows_and_columns gives what the two operators give."""
    with poisoned():
        codes, scale, codes_t, scale_t = quantrain.int8_quantize_rows_and_columns(
            x, column_factor=column_factor, row_factor=row_factor, stochastic=True
        )
    name = "int8_quantize_rows_and_columns"
    check_codes(name, codes, scale, x.float() * column_factor, True)
    check_codes(name, codes_t, scale_t, (x.float() * row_factor.view(-1, 1)).t().contiguous(), True)


def check_fused(name: str, codes: Tensor, scale: Tensor, reference: Tensor) -> None:
    """Codes of a norm or an activation against the same in PyTorch's float32: one code apart where sums were ordered otherwise."""
    expected, expected_scale = nearest_rows(reference)
    require(torch.isfinite(scale).all(), f"{name}: NaN or Inf in the scales")
    require(
        ((scale - expected_scale).abs() <= 1e-4 * expected_scale).all(),
        f"{name}: wrong scales",
    )
    apart = (codes.int() - expected.int()).abs()
    require(apart.max() <= 1, f"{name}: codes {int(apart.max())} apart")
    require(
        (apart > 0).float().mean() < 0.01,
        f"{name}: {100 * float((apart > 0).float().mean()):.1f} % of the codes differ",
    )
