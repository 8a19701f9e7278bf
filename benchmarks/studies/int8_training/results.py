"""The committed results: the newest file of each part, and what the page says of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

LONGER = ("gpt_compiled", "torchao")  # sections that the whole benchmark leaves out


def newest(folder: Path, part: str) -> tuple[Path, dict] | None:
    """(path, content) of the newest int8-PART-DEVICE-DATE.json; one of a GPU goes before one of a CPU."""
    name = re.compile(rf"int8-{part}-(\w+)-\d{{4}}-\d\d-\d\d\.json")
    found = [
        (match[1] != "cpu", path.stem[-10:], path)
        for path in folder.glob("*.json")
        if (match := name.fullmatch(path.name))
    ]
    return (path := max(found)[-1], json.loads(path.read_text(encoding="utf-8"))) if found else None


def bench_section(folder: Path, section: str) -> tuple[Path, dict] | None:
    """(path, content) that holds a section of the benchmark: the later of a run of its own and of the whole one."""
    own = newest(folder, section.replace("_", "-"))
    whole = None if section in LONGER else newest(folder, "bench")
    if own is None or whole is None:
        return own or whole
    # That of the CPU is measured on a machine of its own.
    return own if section == "cpu" or own[1]["date"] >= whole[1]["date"] else whole


def rows_of(content: dict, section: str) -> list[dict]:
    """The rows of one section of the benchmark."""
    return [row for row in content["rows"] if row["section"] == section]


def finals(rows: list[dict], text: str, kind: str, key: str = "held_out_loss") -> list[float]:
    """The last value of each seed's curve."""
    chosen = (row for row in rows if (row["text"], row["kind"]) == (text, kind))
    return [row[key] for row in sorted(chosen, key=lambda row: row["seed"])]
