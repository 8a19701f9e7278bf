"""Post-training quantization in float64: statistics, SmoothQuant, GPTQ by the inverse Hessian itself, outlier products."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def statistics(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """absmax, mean of |x| and the mean of 2 x x^T over the rows ``[M, K]``."""
    x = rows.double()
    return x.abs().amax(0), x.abs().mean(0), 2 * x.t() @ x / len(x)


def smooth(input_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    s = (input_absmax.double() ** alpha / weight_absmax.double() ** (1 - alpha)).clamp_min(1e-5)
    return torch.where((input_absmax == 0) | (weight_absmax == 0), 1.0, s)


def gptq(
    weight: Tensor, hessian: Tensor, scale: Tensor, group_size: int, low: int, high: int, damping: float
) -> Tensor:
    """Optimal brain quantization with one order for all rows, columns by falling diagonal: after each column the inverse
    Hessian of the columns left is updated (Frantar et al., arXiv:2210.17323, eq. 3 and 4), without a Cholesky factor."""
    w, h = weight.double().clone(), hessian.double().clone()
    dead = h.diagonal() == 0
    w[:, dead] = 0
    h.diagonal()[dead] = 1
    h.diagonal().add_(damping * h.diagonal()[~dead].mean())
    # The order is of the diagonal before damping.
    order = torch.argsort(torch.where(dead, 1.0, hessian.double().diagonal()), descending=True, stable=True).tolist()
    inverse = torch.linalg.inv(h)
    codes = torch.zeros_like(w)
    for i in order:
        s = scale[:, i // group_size].double()
        q = torch.where(s == 0, 0.0, torch.round(w[:, i] / torch.where(s == 0, 1.0, s))).clamp(low, high)
        codes[:, i] = q
        error = (w[:, i] - q * s) / inverse[i, i]
        w -= error[:, None] * inverse[i][None, :]
        inverse = inverse - inverse[:, i : i + 1] * inverse[i : i + 1, :] / inverse[i, i]
        inverse[i, :] = 0
        inverse[:, i] = 0
    return codes


def outlier_scales(main_absmax: Tensor, absmax: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(s1, s2) of rows, float64: s2 = s1 2^e, the least e for which absmax / s2 fits 16256, Ko 2^e <= 512."""
    limit = int(math.log2(512 // max(count, 1))) if count <= 512 else 0
    s1 = torch.maximum(main_absmax / 127, absmax / (16256 * 2**limit))
    s1 = torch.where(s1 == 0, 1.0, s1)
    e = torch.ceil(torch.log2(absmax / (16256 * s1))).clamp(0, limit)
    return s1, s1 * 2**e


def outlier_product(x: Tensor, columns: list[int], codes: Tensor, scale: Tensor) -> Tensor:
    """x W^T with W = codes * scale: outlier columns at 15 bits, the others at 8."""
    x, w = x.double(), codes.double() * scale.double().reshape(-1, 1)
    main = x.clone()
    main[:, columns] = 0
    apart = x[:, columns]
    largest = apart.abs().amax(1, keepdim=True) if columns else torch.zeros(len(x), 1, dtype=torch.float64)
    s1, s2 = outlier_scales(main.abs().amax(1, keepdim=True), largest, len(columns))
    return (torch.round(main / s1) * s1) @ w.t() + (torch.round(apart / s2) * s2) @ w[:, columns].t()
