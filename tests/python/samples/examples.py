"""The built C++ examples, which tests run beside Python."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

BUILDS = Path(__file__).resolve().parents[3] / "build"


@cache
def example(name: str) -> Path | None:
    """The example, from $QUANTRAIN_EXAMPLES_DIR where that is set, else the newest of the build folders."""
    named = os.environ.get("QUANTRAIN_EXAMPLES_DIR")
    found = [Path(named, name)] if named else list(BUILDS.glob(f"*/**/{name}"))
    return max((path for path in found if path.is_file()), key=lambda path: path.stat().st_mtime, default=None)


def run_example(name: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    """Runs it with one thread, as the ``one_thread`` fixture has Python do; skips where it is not built."""
    if example(name) is None:
        pytest.skip(why_missing(name))
    command = [str(part) for part in (example(name), "--threads", 1, *arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert not check or result.returncode == 0, result.stderr
    return result


def why_missing(name: str) -> str:
    return f"{name} is not built: configure with QUANTRAIN_BUILD_EXAMPLES=ON, or set QUANTRAIN_EXAMPLES_DIR"
