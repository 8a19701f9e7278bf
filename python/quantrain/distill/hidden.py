"""The losses between hidden states."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quantrain.distillation import attention_kl, hidden_cosine, hidden_mse

from .hooks import Kept
from .outputs import fitted_mask, readable
from .pairs import MatchedPair
from .projections import Projections

__all__ = ["HiddenLosses", "wanted"]


def wanted(pairs: Sequence[MatchedPair], side: str) -> dict[str, list[str]]:
    """Names of the modules of one side, "student" or "teacher" -> the tensors to keep of each."""
    found: dict[str, list[str]] = {}
    for pair in pairs:
        kinds = found.setdefault(getattr(pair, side), [])
        if pair.kind not in kinds:
            kinds.append(pair.kind)
    return found


class HiddenLosses:
    """A loss for each pair, through a projection where the widths differ.

    Args:
        widths: pattern of pairs -> (student's width, teacher's); None: taken from the first tensors.
    """

    def __init__(
        self,
        pairs: Sequence[MatchedPair],
        projections: Projections,
        widths: Mapping[str, tuple[int, int]] | None = None,
    ):
        self.pairs, self.projections = pairs, projections
        self.fixed = widths is not None
        self.widths_known = self.fixed or all(pair.projection is None for pair in pairs)
        for pattern, (student, teacher) in (widths or {}).items():
            self._make(pattern, student, teacher)

    def __call__(self, own: Kept, taught: Kept, mask: Tensor | None) -> dict[str, Tensor]:
        """label -> loss; a module that is called several times has the mean over its calls."""
        before = len(self.projections.layers)
        losses = {pair.label: self._of_calls(pair, own, taught, mask) for pair in self.pairs}
        made = len(self.projections.layers) - before
        if made and torch.is_grad_enabled():
            warnings.warn(
                f"Distiller: made {made} projections, which train only where an optimizer has them: call build(batch), "
                "then make it of the student's parameters and distiller.parameters()",
                stacklevel=3,
            )
        self.widths_known = True
        return losses

    def _make(self, pattern: str, student: int, teacher: int) -> None:
        mine = [pair for pair in self.pairs if pair.pattern == pattern and pair.projection]
        if not mine:
            raise ValueError(
                "Distiller: expected the keys of projections to be those of pairs whose loss is mse, mse-normalized or "
                f"cosine, got {pattern!r}"
            )
        for pair in mine:
            if student != teacher and pair.projection not in self.projections.layers:
                self.projections.make(pair.projection, student, teacher)

    def _of_calls(self, pair: MatchedPair, own: Kept, taught: Kept, mask: Tensor | None) -> Tensor:
        mine, theirs = own[pair.student, pair.kind], taught[pair.teacher, pair.kind]
        if len(mine) != len(theirs):
            raise ValueError(
                f"Distiller: expected the student to call {pair.student!r} as often as the teacher calls "
                f"{pair.teacher!r}, {len(theirs)} times, got {len(mine)}"
            )
        losses = [self._of_call(pair, s, readable(t, s.device), mask) for s, t in zip(mine, theirs, strict=True)]
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def _of_call(self, pair: MatchedPair, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        mask = None if mask is None else mask.to(student.device)
        if callable(pair.loss):
            return pair.loss(student, teacher, mask)
        if pair.kind == "hidden":
            student, teacher = (t.movedim(1, -1) if t.dim() > 3 else t for t in (student, teacher))  # [N, C, H, W]
            student = self._widened(pair.projection, student, teacher.shape[-1])
        if student.shape != teacher.shape:
            raise ValueError(
                f"Distiller: expected {pair.student!r} to give {list(teacher.shape)} as the teacher's {pair.teacher!r} "
                f"does, got {list(student.shape)}"
            )
        what = f"the rows of {pair.student!r}"
        mask = fitted_mask(mask, student.shape[:-1], what, heads=pair.kind == "attention")
        if pair.loss == "attention":
            return attention_kl(student, teacher, mask=mask)
        if pair.loss == "cosine":
            return hidden_cosine(student, teacher, mask=mask)
        return hidden_mse(student, teacher, mask=mask, normalize=pair.loss == "mse-normalized")

    def _widened(self, key: str, student: Tensor, width: int) -> Tensor:
        if key not in self.projections.layers:
            if student.shape[-1] == width or self.fixed:
                return student
            self.projections.make(key, student.shape[-1], width, student.device)
        return self.projections(key, student, width)
