"""How sparse a model is to be at which step."""

from __future__ import annotations

from dataclasses import dataclass

from quantrain._arguments import integer
from quantrain._C import PruneSpec

from .selection import check_sparsity

__all__ = ["ConstantSchedule", "CubicSchedule", "SpecSchedule"]


@dataclass(frozen=True)
class CubicSchedule:
    """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3: fast while there is much to drop, slow at the end (Zhu and
    Gupta, arXiv:1710.01878, eq. 1).

    Masks are renewed at steps ``begin``, ``begin + every``, ... and ``end``, then fixed: train on for about a third of
    the run.

    Args:
        sparsity: s_f, in [0, 1).
        initial: s_i, from 0 to ``sparsity``.
        begin: t_0, the step of the first masks; 0 is before the first step.
        end: t_0 + n dt, the step of the last.
        every: dt, steps between; 100 to 1,000 in the paper.

    Raises:
        TypeError: no integers.
        ValueError: numbers outside of these ranges.

    >>> schedule = CubicSchedule(0.8, begin=100, end=500, every=100)
    >>> [round(schedule.sparsity_at(step), 4) for step in (0, 100, 200, 300, 400, 500, 9000)]
    [0.0, 0.0, 0.4625, 0.7, 0.7875, 0.8, 0.8]
    >>> [step for step in range(1000) if schedule.renews_at(step)]
    [100, 200, 300, 400, 500]
    """

    sparsity: float
    initial: float = 0.0
    begin: int = 0
    end: int = 1000
    every: int = 100

    def __post_init__(self) -> None:
        check_sparsity("CubicSchedule", self.sparsity)
        check_sparsity("CubicSchedule", self.initial, "initial")
        for name in ("begin", "end", "every"):
            integer("CubicSchedule", name, getattr(self, name))
        if self.initial > self.sparsity:
            raise ValueError(f"CubicSchedule: expected initial of at most sparsity {self.sparsity}, got {self.initial}")
        if self.begin < 0 or self.end < self.begin:
            raise ValueError(f"CubicSchedule: expected 0 <= begin <= end, got {self.begin} and {self.end}")
        if self.every < 1:
            raise ValueError(f"CubicSchedule: expected every of at least 1, got {self.every}")

    def sparsity_at(self, step: int) -> float:
        """s_t; before ``begin`` that of ``begin``, after ``end`` that of ``end``."""
        if step >= self.end:
            return self.sparsity
        if step <= self.begin:
            return self.initial
        left = 1 - (step - self.begin) / (self.end - self.begin)
        return self.sparsity + (self.initial - self.sparsity) * left**3

    def renews_at(self, step: int) -> bool:
        """Whether masks are renewed after this many steps."""
        return self.begin <= step <= self.end and ((step - self.begin) % self.every == 0 or step == self.end)


@dataclass(frozen=True)
class ConstantSchedule:
    """All at once, after step ``at`` (0: before the first), then fixed: the three steps train, prune, retrain (Han et
    al., arXiv:1506.02626).

    Raises:
        TypeError, ValueError: as :class:`CubicSchedule`.

    >>> schedule = ConstantSchedule(0.5)
    >>> schedule.sparsity_at(0), [step for step in range(10) if schedule.renews_at(step)]
    (0.5, [0])
    """

    sparsity: float
    at: int = 0

    def __post_init__(self) -> None:
        check_sparsity("ConstantSchedule", self.sparsity)
        if integer("ConstantSchedule", "at", self.at) < 0:
            raise ValueError(f"ConstantSchedule: expected at of at least 0, got {self.at}")

    @property
    def end(self) -> int:
        """The step of the last masks."""
        return self.at

    def sparsity_at(self, step: int) -> float:
        """0 before ``at``."""
        return self.sparsity if step >= self.at else 0.0

    def renews_at(self, step: int) -> bool:
        """Whether masks are renewed after this many steps."""
        return step == self.at


@dataclass(frozen=True)
class SpecSchedule:
    """The schedule of a recipe's ``prune`` over so many steps of training: the formula is the spec's own.

    Raises:
        TypeError, ValueError: no PruneSpec; no number of steps of at least 1.

    >>> from quantrain import PruneSpec
    >>> schedule = SpecSchedule(PruneSpec(sparsity=0.8, schedule="cubic", end=0.5, every=10), steps=100)
    >>> [round(schedule.sparsity_at(step), 4) for step in (0, 10, 25, 50, 99)], schedule.end
    ([0.0, 0.3904, 0.7, 0.8, 0.8], 50)
    """

    spec: PruneSpec
    steps: int

    def __post_init__(self) -> None:
        if not isinstance(self.spec, PruneSpec):
            raise TypeError(f"SpecSchedule: expected a PruneSpec, got {type(self.spec).__name__}")
        self.spec.validate()
        if integer("SpecSchedule", "steps", self.steps) < 1:
            raise ValueError(f"SpecSchedule: expected at least one step, got {self.steps}")

    @property
    def sparsity(self) -> float:
        """What is reached."""
        return self.spec.sparsity

    @property
    def end(self) -> int:
        """The step of the last masks."""
        return self.spec.last_step(self.steps)

    def sparsity_at(self, step: int) -> float:
        """What is dropped after this many steps."""
        return self.spec.sparsity_at(step, self.steps)

    def renews_at(self, step: int) -> bool:
        """Whether masks are renewed after this many steps."""
        return self.spec.renews_at(step, self.steps)
