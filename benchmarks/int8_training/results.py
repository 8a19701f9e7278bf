"""The committed results: the newest file of each part, and what the page says of them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

BENCH_PARTS = ("bench", "gpt-compiled", "torchao")


def newest(folder: Path, part: str) -> tuple[Path, dict] | None:
    """(path, content) of the newest int8-PART-*.json; one of a GPU goes before one of a CPU."""
    paths = sorted(folder.glob(f"int8-{part}-*.json"), key=lambda p: ("-cpu-" not in p.name, p.stem[-10:]))
    return (paths[-1], json.loads(paths[-1].read_text(encoding="utf-8"))) if paths else None


def rows_of(content: dict, section: str) -> list[dict]:
    """The rows of one section of the benchmark."""
    return [row for row in content["rows"] if row["section"] == section]


def finals(rows: list[dict], text: str, kind: str, key: str = "held_out_loss") -> list[float]:
    """The last value of each seed's curve."""
    chosen = (row for row in rows if (row["text"], row["kind"]) == (text, kind))
    return [row[key] for row in sorted(chosen, key=lambda row: row["seed"])]


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean, and largest minus smallest."""
    return statistics.mean(values), max(values) - min(values)
