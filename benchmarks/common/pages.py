"""The measured parts of a page: text between ``<!-- measured: PART -->`` and ``<!-- end -->``, made from committed results."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from pathlib import Path

BLOCK = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def fill(page: Path, measured: Callable[[str], str]) -> None:
    """Replaces every measured part of the page by what ``measured`` gives for its name."""
    text = page.read_text(encoding="utf-8")
    text = BLOCK.sub(lambda found: f"{found[1]}{measured(found[2])}{found[3]}", text)
    page.write_text(text, encoding="utf-8")


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean, and largest minus smallest."""
    return statistics.mean(values), max(values) - min(values)
