"""quantrain.cmake_prefix_path leads CMake to the installed package. (ctest builds and runs the consumer itself.)"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

quantrain = pytest.importorskip("quantrain", reason="the package is not installed")

CONSUMER = Path(__file__).resolve().parents[2] / "consumer"
PREFIX = Path(quantrain.cmake_prefix_path)


def cache_of(build: Path) -> dict[str, str]:
    lines = (build / "CMakeCache.txt").read_text().splitlines()
    return {line.split(":")[0]: line.partition("=")[2] for line in lines if ":" in line and "=" in line}


def test_cmake_prefix_path_holds_the_config_the_headers_and_the_library():
    assert (PREFIX / "quantrain" / "quantrain-config.cmake").is_file()
    package = PREFIX.parents[1]
    for header in ("quantrain.h", "ops/fake_quant.h", "nn/layers.h", "nn/recipe.h", "nn/checkpoint.h"):
        assert (package / "include" / "quantrain" / header).is_file(), header
    assert (package / "lib" / "libquantrain.so").is_file()


def test_a_project_finds_the_package_by_cmake_prefix_path(tmp_path):
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    command = [cmake, "-S", CONSUMER, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={PREFIX}"]
    torch_root = Path(torch.__file__).parent
    result = subprocess.run(
        [*command, f"-DQUANTRAIN_TORCH_ROOT={torch_root}"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert Path(cache_of(tmp_path)["quantrain_DIR"]).resolve() == (PREFIX / "quantrain").resolve()
