"""The shell scripts parse, and fail with one clear line where something they need is missing."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"])
TOOLS = ["bash", "dirname", "cat", "cut", "grep", "find", "sort", "xargs", "sha256sum", "ls", "mkdir"]


def run(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(script), *arguments], capture_output=True, text=True, timeout=60, env=environment, check=False
    )


@pytest.fixture
def bare(tmp_path) -> tuple[Path, dict[str, str]]:
    """A checkout that holds only the scripts, on a machine of an ordinary user without compiler, Python or GPU."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in TOOLS:
        (tools / tool).symlink_to(shutil.which(tool))
    (tools / "id").write_text("#!/bin/bash\necho 1000\n")
    (tools / "id").chmod(0o755)
    return tmp_path, {"PATH": str(tools), "HOME": str(tmp_path)}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_parses_and_is_executable(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", ["setup.sh", "demo.sh", "test.sh"])
def test_a_missing_compiler_is_one_clear_line(bare, script):
    root, environment = bare
    result = run(root / "scripts" / script, **environment)
    assert result.returncode == 1
    assert result.stderr == "setup: no C++ compiler: install g++ 11 or later, or set CXX\n"
    assert not (root / ".venv").exists()


def test_a_missing_python_is_one_clear_line(bare):
    root, environment = bare
    (root / "bin" / "c++").symlink_to(shutil.which("true"))
    result = run(root / "scripts" / "setup.sh", **environment)
    assert result.returncode == 1
    assert result.stderr.startswith("setup: no Python 3.10 to 3.14") and result.stderr.count("\n") == 1
    assert not (root / ".venv").exists()


def test_an_unknown_argument_is_one_clear_line():
    result = run(ROOT / "scripts" / "setup.sh", "--fast", **os.environ)
    assert (result.returncode, result.stderr) == (1, "setup: expected --tests or nothing, got --fast\n")


def test_gpu_check_needs_torch_and_then_a_gpu(bare):
    root, environment = bare
    result = run(root / "scripts" / "gpu_check.sh", **environment)
    assert (result.returncode, result.stderr) == (
        1,
        "gpu_check: no Python with torch 2.11: run scripts/setup.sh, or set PYTHON\n",
    )
    python = root / "bin" / "python3"
    python.write_text("#!/bin/bash\n")  # one that finds torch
    python.chmod(0o755)
    result = run(root / "scripts" / "gpu_check.sh", **environment)
    assert (result.returncode, result.stderr) == (1, "gpu_check: no GPU here: nvidia-smi does not answer\n")


def test_every_tag_of_a_cpp_test_is_run():
    """ctest runs the tests of a list of tags: one that is missing there would never run."""
    folder = ROOT / "tests" / "cpp"
    listed = set(re.search(r"foreach\(\s*family\s([\w\s]+)\)", (folder / "CMakeLists.txt").read_text())[1].split())
    cases = re.findall(
        r'TEST_CASE\(\s*"(?:[^"\\]|\\.)*",\s*"(\[[^"]+\])"', "".join(p.read_text() for p in folder.glob("test_*.cpp"))
    )
    assert len(cases) > 150
    for tags in cases:
        names = re.findall(r"\[([^\]]+)\]", tags)
        assert "." in names or listed & set(names), tags
