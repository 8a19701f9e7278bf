"""Rows of results: printed as they come, kept for JSON, with the figure to reach beside each ratio."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import quantrain

ROOT = Path(__file__).resolve().parents[2]


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


class Report:
    """Rows as they come; the JSON file is rewritten after each, so that a run that is stopped keeps what it has."""

    def __init__(self, device: str, path: Path | None, quick: bool) -> None:
        self.path, self.rows, self.notes = path, [], []
        self.head = {"benchmark": "bench_int8", **environment(device), "quick": quick}
        print("\n".join(f"{key:<10}{value}" for key, value in self.head.items()), flush=True)

    def add(self, *arguments, **values: float) -> None:
        """A row of section, case, ratio, target and named figures."""
        row = Row(*arguments, values)
        self.rows.append(row)
        print(row.line(), flush=True)
        self._write()

    def note(self, text: str) -> None:
        """Something that is no figure: what was skipped, and why."""
        self.notes.append(text)
        print(text, flush=True)
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {**self.head, "notes": self.notes, "rows": [asdict(row) for row in self.rows]}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)

    def summary(self) -> None:
        """How many targets were reached."""
        aimed = [row for row in self.rows if row.target is not None and row.ratio is not None]
        if aimed:
            print(f"reached {sum(not row.missed for row in aimed)} of {len(aimed)} figures", flush=True)


def environment(device: str) -> dict[str, str]:
    """Where and of what a result was measured; no paths of the machine."""
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    command = " ".join(["python", script, *map(_short, sys.argv[1:])])
    return {
        "on": where,
        "cpu": f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": command,
        "commit": commit(),
        "torch": torch.__version__,
        "quantrain": quantrain.__version__,
    }


def _short(argument: str) -> str:
    return Path(argument).name if argument.startswith("/") else argument


def commit() -> str:
    """$COMMIT where a script knows it, else what git says."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "unknown"
