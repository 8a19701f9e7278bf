"""Rows of a benchmark in sections: a ratio, and the figure to reach beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from .report import Report


@dataclass(frozen=True)
class Row:
    """One measured case.

    Attributes:
        section: the part of the benchmark.
        case: what was measured, with its shape.
        ratio: how many times as fast as what it is compared with, or the share of a rate; None where nothing is compared.
        target: the ratio to reach; None where there is none.
        values: named figures, units in their names (us, ms, tops, gib).
    """

    section: str
    case: str
    ratio: float | None
    target: float | None
    values: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        ratio = "" if self.ratio is None else f"{self.ratio:6.3f}"
        target = "" if self.target is None else f"to reach {self.target:.2f}{' MISSED' if self.missed else ''}"
        figures = "  ".join(f"{name} {value:.4g}" for name, value in self.values.items())
        return f"{self.section:<10} {self.case:<58} {ratio:>7}  {target:<21} {figures}"

    @property
    def missed(self) -> bool:
        if self.target is None or self.ratio is None:
            return False
        return self.ratio > self.target if self.section == "memory" else self.ratio < self.target


class SectionReport(Report):
    """A report of rows with figures to reach."""

    def row(self, *arguments, **values: float) -> None:
        """One of section, case, ratio, target and named figures."""
        row = Row(*arguments, values)
        self.add(asdict(row), row.line())

    def summary(self) -> None:
        """How many targets were reached."""
        rows = [Row(**row) for row in self.rows]
        aimed = [row for row in rows if row.target is not None and row.ratio is not None]
        if aimed:
            self.say(f"reached {sum(not row.missed for row in aimed)} of {len(aimed)} figures")
