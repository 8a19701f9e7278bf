"""The built C++ examples, which tests run beside Python."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

BUILDS = Path(__file__).resolve().parents[3] / "build"


@cache
def example(name: str) -> Path | None:
    """The example, from $QUANTRAIN_EXAMPLES_DIR where that is set, else the newest of the build folders."""
    named = os.environ.get("QUANTRAIN_EXAMPLES_DIR")
    found = [Path(named, name)] if named else list(BUILDS.glob(f"*/**/{name}"))
    return max((path for path in found if path.is_file()), key=lambda path: path.stat().st_mtime, default=None)


def why_missing(name: str) -> str:
    return f"{name} is not built: configure with QUANTRAIN_BUILD_EXAMPLES=ON, or set QUANTRAIN_EXAMPLES_DIR"
