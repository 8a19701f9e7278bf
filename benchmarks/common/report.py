"""Results: rows printed as they come and kept for JSON, with where and of what they were measured."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import quantrain

ROOT = Path(__file__).resolve().parents[2]


# ---- where and of what -----------------------------------------------------------------------------------------------


def environment(device: str) -> dict[str, str]:
    """Where and of what a result was measured; no paths of the machine."""
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    return {
        "on": where,
        "cpu": f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": " ".join(["python", script, *map(_short, sys.argv[1:])]),
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


def slug(head: dict[str, str]) -> str:
    """The device in a file's name: h200, cpu."""
    return head["on"].split()[-1].lower()


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One call of an operator, beside the ceiling and the peer of the same run.

    Attributes:
        op: the operator, and which pass.
        granularity: or what else tells its cases apart.
        dtype: of the input.
        shape: of the input.
        seconds: of a call.
        moved: bytes that it must move.
        ceiling: bytes per second of a copy.
        peer_seconds: of the peer's operator; None where there is none.
        more: further figures by name.
    """

    op: str
    granularity: str
    dtype: torch.dtype
    shape: Sequence[int]
    seconds: float
    moved: float
    ceiling: float
    peer_seconds: float | None = None
    more: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict:
        """As JSON holds it."""
        return {
            "op": self.op,
            "granularity": self.granularity,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": "x".join(map(str, self.shape)),
            "microseconds": round(self.seconds * 1e6, 2),
            "gigabytes_per_second": round(self.moved / self.seconds / 1e9, 1),
            "percent_of_floor": round(100 * self.moved / self.ceiling / self.seconds, 1),
            "native_ratio": round(self.peer_seconds / self.seconds, 2) if self.peer_seconds else None,
            **{name: round(value, 2) for name, value in self.more.items()},
        }

    def line(self, *, absolute: bool) -> str:
        """As it is printed, and as scripts/make_figures.py reads it; without ``absolute`` ratios alone."""
        row = self.row()
        times = f"{row['microseconds']:10.1f} us {row['gigabytes_per_second']:8.0f} GB/s" if absolute else ""
        peer = f"{row['native_ratio']:8.2f}x" if self.peer_seconds else f"{'-':>9}"
        more = "".join(f"  {name} {row[name]}" for name in self.more)
        return (
            f"{self.op:<41} {self.granularity:<17} {row['dtype']:<9} {row['shape']:<13} {times} "
            f"{row['percent_of_floor']:6.1f} %{peer}{more}"
        )


class Results:
    """Rows as they come; the JSON file is rewritten after each, so that a run that is stopped keeps what it has.

    Args:
        benchmark: what measures.
        device: cpu or cuda.
        path: the JSON file, where there is one.
        facts: what else the file begins with.
    """

    def __init__(self, benchmark: str, device: str, path: Path | None = None, **facts) -> None:
        self.device, self.path = device, path
        self.head = {"benchmark": benchmark, **environment(device), **facts}
        self.notes: list[str] = []
        self.rows: list[dict] = []

    def keep(self, row: dict) -> None:
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        if self.path is not None:
            write_json(self.path, {**self.head, "notes": self.notes, "rows": self.rows})


class Report(Results):
    """Results that are printed too, and written as text beside the JSON where ``text`` names a file."""

    def __init__(self, benchmark: str, device: str, path: Path | None = None, *, text: Path | None = None, **facts):
        super().__init__(benchmark, device, path, **facts)
        self.text, self.lines = text, []
        self.say("\n".join(f"{key:<11} {value}" for key, value in self.head.items() if not isinstance(value, dict)))

    def say(self, line: str) -> None:
        """A line that is no row."""
        self.lines.append(line)
        print(line, flush=True)
        if self.text is not None:
            self.text.parent.mkdir(parents=True, exist_ok=True)
            self.text.write_text("\n".join(self.lines) + "\n", encoding="utf-8")

    def add(self, row: dict, line: str) -> None:
        self.say(line)
        self.keep(row)

    def measured(self, measured: Measured) -> None:
        """A line of an operator; of a CPU ratios alone, for a shared machine's seconds say nothing."""
        self.add(measured.row(), measured.line(absolute=self.device == "cuda"))

    def note(self, text: str) -> None:
        """Something that is no figure: what was skipped, and why."""
        self.notes.append(text)
        self.say(text)
        self.write()


def write_json(path: Path, content: dict) -> None:
    """At once or not at all: who reads it meanwhile finds the old content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
