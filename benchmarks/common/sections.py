"""Rows of a benchmark in sections: a ratio, and the figure to reach beside it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from .parts import run_parts
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


Section = Callable[[SectionReport, str, bool], None]  # of the report, the device, and whether the run is a quick one


def run_sections(name: str, description: str, sections: Mapping[str, Section], arguments: list[str] | None) -> int:
    """The command of a benchmark in sections; one that fails prints its traceback and does not stop the others.

    Returns:
        How many failed: a status of the process.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--only", type=lambda text: text.split(","), default=list(sections), help="sections, separated by commas")
    add("--quick", action="store_true", help="tiny shapes, to see that it runs")
    add("--json", type=Path, help="also write the rows to this file, after each")
    options = parser.parse_args(arguments)
    for section in options.only:
        if section not in sections:
            parser.error(f"expected sections of {', '.join(sections)}, got {section}")
    torch.manual_seed(0)
    if options.device == "cpu":
        torch.set_num_threads(1 if options.quick else 2)
    report = SectionReport(name, options.device, options.json, quick=options.quick)
    parts = {
        section: lambda of=section: sections[of](report, options.device, options.quick) for section in options.only
    }
    failed = run_parts(name, parts, report.note)
    report.summary()
    return failed
