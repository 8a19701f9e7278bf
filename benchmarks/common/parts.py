"""The parts of a benchmark or study, one after the other."""

from __future__ import annotations

import argparse
import importlib
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


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


def parse_study(
    description: str,
    arguments: list[str] | None,
    *,
    quick: str,
    more: Callable[[Callable[..., Any]], Any] | None = None,
) -> argparse.Namespace:
    """Options of a study of one part: --device, --out, --quick, and what ``more(add_argument)`` adds."""
    import torch

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU")
    if more is not None:
        more(add)
    add("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results", help="folder of the results")
    add("--quick", action="store_true", help=quick)
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return options


def draw_part(study: str, options: argparse.Namespace) -> int:
    """The figures and tables of benchmarks/studies/<study>, which read JSON alone: no torch, no quantrain."""
    figures, tables = (importlib.import_module(f"studies.{study}.{part}") for part in ("figures", "tables"))
    if options.part in ("all", "figures"):
        figures.draw_all(options.out, options.figures)
    if options.part in ("all", "tables"):
        tables.fill(options.page, options.out, options.figures)
    return 0
