"""Post-training quantization in float64: statistics, SmoothQuant, GPTQ by the inverse Hessian itself, outlier products."""

from __future__ import annotations

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


def outlier_product(x: Tensor, columns: list[int], codes: Tensor, scale: Tensor) -> Tensor:
    """x W^T with W = codes * scale: outlier columns at 15 bits, the others at 8, each row by its absmax."""
    x, w = x.double(), codes.double() * scale.double().reshape(-1, 1)
    main = x.clone()
    main[:, columns] = 0
    s1 = main.abs().amax(1, keepdim=True) / 127
    s1 = torch.where(s1 == 0, 1.0, s1)
    apart = x[:, columns]
    if not columns:
        return (torch.round(main / s1) * s1) @ w.t()
    s2 = apart.abs().amax(1, keepdim=True) / 16256
    s2 = torch.where(s2 == 0, 1.0, s2)
    return (torch.round(main / s1) * s1) @ w.t() + (torch.round(apart / s2) * s2) @ w[:, columns].t()
