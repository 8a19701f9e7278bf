"""What the commands of the console script share: numbers on the command line, exit statuses and errors."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable

EXIT_FAILED, EXIT_ERROR, EXIT_INTERRUPTED = 1, 2, 130  # failed: a recipe, or a plot or the report


def positive(kind: type) -> Callable[[str], float]:
    """What reads a positive number of ``kind`` (int or float) from the command line."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(
                f"expected a positive {'whole ' if kind is int else ''}number, got {text!r}"
            )
        return value

    return parse


def failed(command: str, error: Exception | str) -> int:
    """Say on stderr why ``command`` ends; the result is the exit status."""
    print(f"quantrain {command}: error: {error}", file=sys.stderr)
    return EXIT_ERROR


def run_command(command: str, run: Callable[[], object], stopped: str = "") -> int:
    """Run a command; the result is the exit status. ``stopped`` is said where it is interrupted."""
    try:
        run()
    except KeyboardInterrupt:
        if stopped:
            print(f"\n{stopped}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except ModuleNotFoundError as error:
        return missing(command, error)
    except (ValueError, OSError) as error:
        return failed(command, error)
    return 0


def missing(command: str, error: ModuleNotFoundError) -> int:
    """As failed, of a package that is not installed."""
    extra = "hf" if error.name in ("transformers", "tokenizers") else "train"
    return failed(command, f"expected the package {error.name}, got none (pip install 'quantrain[{extra}]')")
