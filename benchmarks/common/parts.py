"""The parts of a benchmark or study, one after the other."""

from __future__ import annotations

import argparse
import importlib
import time
import traceback
from collections.abc import Callable


def run_parts(script: str, parts: dict[str, Callable[[], int | None]], say: Callable[[str], None] = print) -> int:
    """Runs each; one that fails prints its traceback and does not stop the others.

    Args:
        script: whose parts they are.
        parts: functions by name; what one gives is how many of its cases failed.
        say: what to do with a line about a part that failed.

    Returns:
        How many failed, cases and parts, at most 100: a status of the process.
    """
    failed = 0
    for name, run in parts.items():
        started = time.monotonic()
        try:
            failed += run() or 0
        except Exception as error:
            failed += 1
            traceback.print_exc()
            say(f"{name}: FAILED, {type(error).__name__}: {error}")
        print(f"{script}: {name} took {time.monotonic() - started:.0f} s", flush=True)
    return min(failed, 100)


def draw_part(study: str, options: argparse.Namespace) -> int:
    """The figures and tables of benchmarks/studies/<study>, which read JSON alone: no torch, no quantrain."""
    figures, tables = (importlib.import_module(f"studies.{study}.{part}") for part in ("figures", "tables"))
    if options.part in ("all", "figures"):
        figures.draw_all(options.out, options.figures)
    if options.part in ("all", "tables"):
        tables.fill(options.page, options.out, options.figures)
    return 0
