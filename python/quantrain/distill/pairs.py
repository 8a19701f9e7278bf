"""Which hidden states of a student are to be like which of the teacher's."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor, nn

from quantrain._arguments import is_number

__all__ = ["MatchedPair", "Pair", "evenly_spaced", "matched_pairs"]

HiddenLoss: TypeAlias = "Callable[[Tensor, Tensor, Tensor | None], Tensor]"
Loss: TypeAlias = "str | HiddenLoss | tuple[str | HiddenLoss, float]"

NAMED_LOSSES = ("mse", "mse-normalized", "cosine", "attention")


@dataclass(frozen=True)
class Pair:
    """Modules of the student, modules of the teacher, and what compares their results.

    Attributes:
        student: a name, or a pattern of :func:`fnmatch.fnmatchcase` for each part between dots: ``encoder.layer.*`` is
            the layers and not the modules in them. Where no whole name fits, the ends of names are compared:
            ``layer.*`` is then BERT's ``bert.encoder.layer.*``.
        teacher: the same of the teacher, or a list of names, one per module of the student. With a pattern that finds
            more modules than ``student`` does, evenly spaced ones are taken, the last among them: 6 layers of a student
            learn from every second of 12, ``layer.1`` to ``layer.11`` (TinyBERT, arXiv:1909.10351).
        loss: ``"mse"``, ``"mse-normalized"`` (each row's error over the mean square of the teacher's row),
            ``"cosine"`` (1 - cos of rows), ``"attention"`` (KL of attention probabilities), or
            ``loss(student, teacher, mask) -> scalar``, which gets both tensors as they are.
        weight: in the sum of all losses; 0 leaves the pair out.

    >>> Pair("encoder.layer.*", "encoder.layer.*", "cosine", 0.5).loss
    'cosine'
    """

    student: str
    teacher: str | Sequence[str]
    loss: str | HiddenLoss = "mse"
    weight: float = 1.0


@dataclass(frozen=True)
class MatchedPair:
    """A module of the student and its module of the teacher, by name.

    Attributes:
        label: the loss's key in the result.
        pattern: what named the student's module.
    """

    label: str
    pattern: str
    student: str
    teacher: str
    loss: str | HiddenLoss
    weight: float

    @property
    def kind(self) -> str:
        """Which tensor of the modules' results counts."""
        return "attention" if self.loss == "attention" else "hidden"

    @property
    def projection(self) -> str | None:
        """Key of its projection, where its loss can have one: two losses of the same modules share it."""
        return None if callable(self.loss) or self.loss == "attention" else f"{self.student}->{self.teacher}"


def matched_pairs(
    student: nn.Module,
    teacher: nn.Module,
    pairs: Mapping[str, str | Sequence[str]] | Sequence[Pair],
    losses: Loss | Mapping[str, Loss],
) -> list[MatchedPair]:
    """The pairs of modules that ``pairs`` describes, in its order.

    Raises:
        ValueError: a pattern that finds nothing, or modules of several parents by the ends of their names; counts that
            cannot be matched; a loss or weight that is none; a key of ``losses`` that is no pair's.
    """
    names = {"student": _names(student), "teacher": _names(teacher)}
    found: list[MatchedPair] = []
    for pair in _as_pairs(pairs, losses):
        if pair.weight == 0:
            continue
        own = _matching(pair.student, names["student"], "student")
        found += [
            MatchedPair(_label(pair, mine, theirs), pair.student, mine, theirs, pair.loss, float(pair.weight))
            for mine, theirs in zip(own, _teachers(pair, own, names["teacher"]), strict=True)
        ]
    labels = [pair.label for pair in found]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ValueError(f"Distiller: expected each pair once, got {twice!r} twice")
    return found


def evenly_spaced(count: int, total: int) -> list[int]:
    """``count`` of the places 0 to ``total - 1``, evenly spaced, the last among them.

    >>> evenly_spaced(3, 6), evenly_spaced(3, 10)
    ([1, 3, 5], [2, 5, 9])
    """
    return [(place + 1) * total // count - 1 for place in range(count)]


def _as_pairs(pairs: Mapping | Sequence[Pair], losses: Loss | Mapping[str, Loss]) -> list[Pair]:
    if not isinstance(pairs, Mapping):
        if isinstance(pairs, (str, Pair)) or not all(isinstance(pair, Pair) for pair in pairs):
            raise TypeError(f"Distiller: expected pairs to be a mapping of names or a list of Pair, got {pairs!r}")
        if losses != "mse":
            raise ValueError(f"Distiller: expected losses in the list of Pair, got losses={losses!r} as well")
        return [_checked(pair) for pair in pairs]
    if isinstance(losses, Mapping):
        for key in losses:
            if key not in pairs:
                raise ValueError(
                    f"Distiller: expected the keys of losses to be those of pairs, {', '.join(map(repr, pairs))}, got "
                    f"{key!r}"
                )
    made = []
    for name, teacher in pairs.items():
        loss = losses.get(name, "mse") if isinstance(losses, Mapping) else losses
        loss, weight = loss if isinstance(loss, tuple) and len(loss) == 2 else (loss, 1.0)
        made.append(_checked(Pair(name, teacher, loss, weight)))
    return made


def _checked(pair: Pair) -> Pair:
    if not isinstance(pair.student, str):
        raise TypeError(f"Distiller: expected names of modules in pairs, got {pair.student!r}")
    if not callable(pair.loss) and pair.loss not in NAMED_LOSSES:
        raise ValueError(
            f"Distiller: expected the loss of pair {pair.student!r} to be one of {', '.join(NAMED_LOSSES)} or a "
            f"function, got {pair.loss!r}"
        )
    check_weight(f"the weight of pair {pair.student!r}", pair.weight)
    return pair


def check_weight(name: str, value: object) -> None:
    if not is_number(value) or not math.isfinite(value) or value < 0:
        raise ValueError(f"Distiller: expected {name} to be a finite number of at least 0, got {value!r}")


def _teachers(pair: Pair, own: Sequence[str], names: Sequence[str]) -> list[str]:
    """The teacher's module for each of the student's ``own``."""
    if isinstance(pair.teacher, str):
        theirs = _matching(pair.teacher, names, "teacher")
        if len(theirs) > len(own):
            return [theirs[place] for place in evenly_spaced(len(own), len(theirs))]
    else:
        theirs = [name for pattern in pair.teacher for name in _matching(pattern, names, "teacher")]
    if len(theirs) != len(own):
        raise ValueError(
            f"Distiller: expected pair {pair.student!r}: {pair.teacher!r} to name as many modules of the teacher as of "
            f"the student, or more by a pattern, got {len(own)} of the student and {len(theirs)} of the teacher"
        )
    return theirs


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name]


def _matching(pattern: str, names: Sequence[str], whose: str) -> list[str]:
    """The names that the pattern fits as a whole or, where there are none, at their ends."""
    parts = pattern.split(".")
    apart = [(name, name.split(".")) for name in names]
    whole = [name for name, own in apart if len(own) == len(parts) and _fits(own, parts)]
    if whole:
        return whole
    ends = {name: ".".join(own[: -len(parts)]) for name, own in apart if _fits(own[-len(parts) :], parts)}
    parents = sorted(set(ends.values()))
    if not ends:
        raise ValueError(
            f"Distiller: expected {pattern!r} to name a module of the {whose}, got none (nearest: "
            f"{_nearest(pattern, names)})"
        )
    if len(parents) > 1:
        raise ValueError(
            f"Distiller: expected {pattern!r} to name modules of one parent in the {whose}, got those of "
            f"{', '.join(map(repr, parents[:4]))}{' and others' if len(parents) > 4 else ''}"
        )
    return list(ends)


def _fits(own: Sequence[str], parts: Sequence[str]) -> bool:
    return len(own) == len(parts) and all(map(fnmatchcase, own, parts))


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """The likeliest names meant, numbers as ``*`` where the pattern has one."""
    if "*" in pattern:
        names = list(dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) for name in names))
    length = pattern.count(".") + 1

    def likeness(name: str) -> float:
        end = ".".join(name.split(".")[-length:])
        return max(difflib.SequenceMatcher(None, pattern, text).ratio() for text in (name, end))

    best = sorted(names, key=likeness, reverse=True)[:3]
    return ", ".join(map(repr, best)) or "the model has no modules"


def _label(pair: Pair, student: str, teacher: str) -> str:
    loss = pair.loss if isinstance(pair.loss, str) else getattr(pair.loss, "__name__", type(pair.loss).__name__)
    return f"{loss}:{student}" if student == teacher else f"{loss}:{student}->{teacher}"
