"""The losses of distillation in float64, a value per row, and their derivatives by the student's row, written out.

Rows are the last dimension. With p = softmax(./T) of teacher t and student s:

    kl          T^2 sum p_t (log p_t - log p_s)                   d/ds = T (p_s - p_t)
    kl_topk     the same over the k stored columns and r, the bucket of all others
                                                                  d/ds = T (p_s - p_t) on those columns,
                                                                         T p_s (1 - r_t / r_s) on the others
    mse         mean (s - t)^2                                    d/ds = 2 (s - t) / K
    cosine      1 - s t / (|s| |t|)                               d/ds = -(t / |t| - cos s / |s|) / |s|
    attention   sum t (log t - log max(s, 1e-6))                  d/ds = -t / s where s >= 1e-6
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-6


def kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    s, t = (torch.log_softmax(x.double() / temperature, -1) for x in (student, teacher))
    return temperature**2 * _terms(t, s).sum(-1)


def kl_gradient(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    s, t = (torch.softmax(x.double() / temperature, -1) for x in (student, teacher))
    return temperature * (s - t)


def kl_topk(student: Tensor, values: Tensor, indices: Tensor, *, temperature: float = 1.0) -> Tensor:
    s, t, own, rest_s, rest_t = _buckets(student, values, indices, temperature)
    rows = _terms(t, s.gather(-1, indices.long())).sum(-1)
    if not bool(own.all()):
        rows = rows + torch.where(rest_t > 0, rest_t * (rest_t / rest_s).log(), 0.0)
    return temperature**2 * rows


def kl_topk_gradient(student: Tensor, values: Tensor, indices: Tensor, *, temperature: float = 1.0) -> Tensor:
    s, t, own, rest_s, rest_t = _buckets(student, values, indices, temperature)
    kept = torch.zeros_like(s).scatter(-1, indices.long(), t.exp())
    if bool(own.all()):  # no bucket: the stored probabilities need not add up to 1
        return temperature * (s.exp() * kept.sum(-1, keepdim=True) - kept)
    total = kept.sum(-1, keepdim=True) + rest_t[..., None]
    outside = s.exp() * (total - (rest_t / rest_s)[..., None])
    return temperature * torch.where(own, s.exp() * total - kept, outside)


def mse(student: Tensor, teacher: Tensor, *, normalize: bool = False) -> Tensor:
    s, t = student.double(), teacher.double()
    return (s - t).square().mean(-1) / _scale(t, normalize)


def mse_gradient(student: Tensor, teacher: Tensor, *, normalize: bool = False) -> Tensor:
    s, t = student.double(), teacher.double()
    return 2 * (s - t) / s.shape[-1] / _scale(t, normalize)[..., None]


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = student.double(), teacher.double()
    return 1 - (_unit(s) * _unit(t)).sum(-1)


def cosine_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = student.double(), teacher.double()
    length = s.norm(dim=-1, keepdim=True)
    cos = (_unit(s) * _unit(t)).sum(-1, keepdim=True)
    return torch.where(length == 0, 0.0, -(_unit(t) - cos * _unit(s)) / length)


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = student.double(), teacher.double()
    return _terms(t.log(), s.clamp_min(FLOOR).log()).sum(-1)


def attention_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = student.double(), teacher.double()
    return torch.where(s >= FLOOR, -t / s.clamp_min(FLOOR), 0.0)


def reduced(rows: Tensor, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Rows where the mask is 0 count nothing, whatever they hold; a mean of none is 0."""
    counts = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask != 0
    rows = torch.where(counts, rows, 0.0)
    if reduction == "none":
        return rows
    return rows.sum() / (counts.sum().clamp_min(1) if reduction == "mean" else 1)


def reduced_gradient(gradient: Tensor, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Of the result of :func:`reduced` (its sum, with "none") by the student, from the gradient of rows."""
    counts = torch.ones(gradient.shape[:-1], dtype=torch.bool, device=gradient.device) if mask is None else mask != 0
    gradient = torch.where(counts[..., None], gradient, 0.0)
    return gradient / (counts.sum().clamp_min(1) if reduction == "mean" else 1)


# name of the operator -> (rows, derivative of rows)
LOSSES = {
    "distillation_kl": (kl, kl_gradient),
    "distillation_kl_topk": (kl_topk, kl_topk_gradient),
    "hidden_mse": (mse, mse_gradient),
    "hidden_cosine": (cosine, cosine_gradient),
    "attention_kl": (attention, attention_gradient),
}


def _terms(t: Tensor, s: Tensor) -> Tensor:
    """exp(t) (t - s): 0 where the teacher's probability is, also for a student's of 0; NaN passes."""
    return torch.where((t == -torch.inf) & ~s.isnan(), 0.0, t.exp() * (t - s))


def _buckets(student: Tensor, values: Tensor, indices: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """log p_s, stored log p_t, which columns are stored, and both probabilities of all others."""
    s, t = torch.log_softmax(student.double() / temperature, -1), values.double()
    own = torch.zeros_like(s, dtype=torch.bool).scatter(-1, indices.long(), True)
    rest_s = torch.where(own, 0.0, s.exp()).sum(-1)
    return s, t, own, rest_s, (1 - t.exp().sum(-1)).clamp_min(0)


def _scale(t: Tensor, normalize: bool) -> Tensor:
    square = t.square().mean(-1)
    return torch.where(square == 0, 1.0, square) if normalize else torch.ones_like(square)


def _unit(x: Tensor) -> Tensor:
    """x / |x|; of a row of zeros zeros."""
    length = x.norm(dim=-1, keepdim=True)
    return torch.where(length == 0, 0.0, x / length)
