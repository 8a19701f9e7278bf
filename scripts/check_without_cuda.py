#!/usr/bin/env python3
"""Compiles the files that look at QUANTRAIN_WITH_CUDA once more without it, syntax and warnings only.

Usage: check_without_cuda.py BUILD, a folder that CMake configured with QUANTRAIN_CUDA=ON.
"""

import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DEFINE = "-DQUANTRAIN_WITH_CUDA"


def command_without(entry: dict) -> list[str]:
    words = shlex.split(entry["command"])
    words = words[1:] if Path(words[0]).name == "ccache" else words
    at = words.index("-o")
    del words[at : at + 2]
    return [word for word in words if word != DEFINE] + ["-fsyntax-only"]


def main() -> int:
    build = Path(sys.argv[1])
    entries = json.loads((build / "compile_commands.json").read_text(encoding="utf-8"))
    entries = [entry for entry in entries if DEFINE in shlex.split(entry["command"])]
    if not entries:
        print(f"check_without_cuda: {build}: expected files compiled with {DEFINE}, got none")
        return 1

    def compile_one(entry: dict) -> int:
        result = subprocess.run(command_without(entry), cwd=entry["directory"], capture_output=True, text=True)
        if result.returncode:
            print(f"check_without_cuda: {entry['file']}\n{result.stderr}")
        return result.returncode

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failures = sum(code != 0 for code in pool.map(compile_one, entries))
    print(f"check_without_cuda: {len(entries)} files, {failures} do not compile without CUDA")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
