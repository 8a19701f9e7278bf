"""Losses of a student against its teacher, row by row, without a temporary of the rows' size.

With s and t a student's and a teacher's row, the last dimension of ``student`` and ``teacher``:

    distillation_kl         T^2 sum p_t (log p_t - log p_s),  p = softmax(. / T)   Hinton et al., arXiv:1503.02531
    distillation_kl_topk    the same over the kept columns and one bucket of all others
    hidden_mse              mean (s - t)^2, or normalized sum (s - t)^2 / sum t^2
    hidden_cosine           1 - s t / (|s| |t|)                                     Sanh et al., arXiv:1910.01108
    attention_kl            sum t (log t - log max(s, 1e-6)) of probabilities       Wang et al., arXiv:2002.10957

``student`` and ``teacher`` are float32, float16 or bfloat16, each of its own type, of one shape ``[..., K]``. ``mask``
``[...]`` (bool or numbers) is 0 where a row does not count: such rows are not read, their loss and gradient are 0.
``reduction`` "mean" is over the rows that count (0 where none does), "sum" over them, "none" keeps ``[...]``. The result is
float32.

Gradients are the student's alone: the teacher is a constant. Beside its inputs a loss keeps four float32 per row. Rows that
lie evenly within evenly spaced batches, such as ``logits[:, :-1]``, are read where they are. Sums go in a fixed order:
results repeat. A NaN in a row that counts is NaN in the loss; a column that both exclude by -inf adds nothing, one that the
student alone excludes makes the loss infinite. Second derivatives raise ``NotImplementedError``.

Errors are ``ValueError`` (values and shapes) and ``TypeError`` (element types and devices).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantrain import _arguments

__all__ = ["attention_kl", "distillation_kl", "distillation_kl_topk", "hidden_cosine", "hidden_mse"]

_ops = torch.ops.quantrain


def _check(op: str, student: Tensor, teacher: Tensor, teacher_name: str = "teacher") -> None:
    _arguments.tensor(op, "student", student)
    _arguments.tensor(op, teacher_name, teacher)


def distillation_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))`` of logits over a vocabulary.

    Two reads of both in the forward pass, two reads and a write in the backward pass.

    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0986123]])
    >>> round(distillation_kl(student, teacher).item(), 4)
    0.1308
    """
    _check("distillation_kl", student, teacher)
    return _ops.distillation_kl(student, teacher, temperature=temperature, mask=mask, reduction=reduction)


def distillation_kl_topk(
    student: Tensor,
    teacher_values: Tensor,
    teacher_indices: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``distillation_kl`` of a teacher whose k likeliest columns were stored, the others as one bucket.

    ``teacher_values`` ``[..., k]`` are log softmax(teacher / T) at this temperature, ``teacher_indices`` ``[..., k]``
    int32 or int64, distinct. What is left of either's probability is one bucket; with all columns stored there is none.
    An index outside of the vocabulary makes its row NaN.

    >>> student = torch.tensor([[0.0, 0.0, 0.0]])
    >>> values, indices = torch.tensor([[0.5]]).log(), torch.tensor([[1]])
    >>> round(distillation_kl_topk(student, values, indices).item(), 4)
    0.0589
    """
    _check("distillation_kl_topk", student, teacher_values, "teacher_values")
    _arguments.tensor("distillation_kl_topk", "teacher_indices", teacher_indices)
    return _ops.distillation_kl_topk(
        student, teacher_values, teacher_indices, temperature=temperature, mask=mask, reduction=reduction
    )


def hidden_mse(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """The mean squared difference of hidden states ``[..., K]``.

    ``normalize`` divides each row by the mean square of the teacher's, so that a token of large norm is not the whole loss;
    a row of zeros is divided by 1.

    >>> hidden_mse(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]])).item()
    2.0
    """
    _check("hidden_mse", student, teacher)
    return _ops.hidden_mse(student, teacher, mask=mask, normalize=normalize, reduction=reduction)


def hidden_cosine(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """One less the cosine between hidden states ``[..., K]``. A row of zeros has the loss 1 and the gradient 0.

    >>> hidden_cosine(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 1.0]])).item()
    0.0
    """
    _check("hidden_cosine", student, teacher)
    return _ops.hidden_cosine(student, teacher, mask=mask, reduction=reduction)


def attention_kl(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """``KL(teacher || student)`` of attention probabilities ``[..., K]``, rows as a softmax gives them.

    The student's are at least 1e-6 inside the logarithm; below that the gradient is 0.

    >>> round(attention_kl(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])).item(), 4)
    0.6931
    """
    _check("attention_kl", student, teacher)
    return _ops.attention_kl(student, teacher, mask=mask, reduction=reduction)
