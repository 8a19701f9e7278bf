"""Every benchmark starts, says how it is run, and imports nothing but benchmarks/common and its own folder."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
MODULES = sorted(BENCHMARKS.rglob("*.py"))
SCRIPTS = [path for path in MODULES if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
FOLDERS = {
    "int8",
    "transformer",
    "studies",
    "fits",
    "tests",
    "samples",
    "reference",
}  # imported from their own folder alone, a bench_* by nobody

HELP = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
for script in sys.argv[2:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
"""


def name_of(path: Path) -> str:
    return path.relative_to(BENCHMARKS).as_posix()


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_a_script_says_how_it_is_run(script):
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")))
    assert f"python benchmarks/{name_of(script)}" in docstring


def test_every_script_starts():
    command = [sys.executable, "-c", HELP, str(BENCHMARKS), *map(str, SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(SCRIPTS)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_common_and_its_own_folder(path):
    place = path.relative_to(BENCHMARKS).parts
    own = {
        "bench_int8.py": "int8",
        "bench_transformer.py": "transformer",
        "studies": f"studies.{place[1]}" if len(place) > 2 else "",
    }.get(place[0], place[0])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            foreign = name.split(".")[0] in FOLDERS or name.startswith("bench_")
            assert not foreign or name == own or name.startswith(f"{own}."), f"line {node.lineno} imports {name}"
