"""The messages on docs/troubleshooting.md are those of the sources: what stands between the dots is a string there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = next(path for path in Path(__file__).resolve().parents if (path / "pyproject.toml").exists())
PAGE = ROOT / "docs" / "troubleshooting.md"
OTHERS = ("Could not run", "NotImplementedError", "qat-w4a4")  # PyTorch's own, and what is no message
VALUE = "\x00"  # stands for what a message puts in


def python_strings(text: str) -> list[str]:
    """The strings of a Python file, each value of an f-string as VALUE."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def cpp_strings(text: str) -> list[str]:
    """The strings of a C++ file, adjacent ones joined, as the compiler does."""
    literal = r'"(?:\\.|[^"\\\n])*"'
    runs = re.findall(rf"{literal}(?:\s*{literal})*", text)
    return ["".join(part[1:-1] for part in re.findall(literal, run)).replace('\\"', '"') for run in runs]


def sources() -> str:
    parts = []
    for path in sorted((ROOT / "python").rglob("*.py")):
        parts += python_strings(path.read_text(encoding="utf-8"))
    for folder in ("ops", "nn", "amp", "optim", "autograd", "python", "csrc"):
        for path in sorted([*(ROOT / folder).rglob("*.cpp"), *(ROOT / folder).rglob("*.h")]):
            parts += cpp_strings(path.read_text(encoding="utf-8"))
    text = re.sub(r"\{\d*\}", VALUE, "\n".join(parts))
    scripts = [
        path.read_text(encoding="utf-8") for path in (ROOT / "scripts" / "setup.sh", *(ROOT / "cmake").iterdir())
    ]
    return text + re.sub(r'"\s*\n\s*"', "", "\n".join(scripts))


def messages() -> list[str]:
    cells = [line.split(" | ")[0] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    found = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    return [message for message in found if len(message) > 12 and not message.startswith(OTHERS)]


@pytest.fixture(scope="module")
def strings() -> str:
    return sources()


def test_there_are_messages():
    assert len(messages()) > 50


@pytest.mark.parametrize("message", messages())
def test_the_message_is_in_the_sources(message, strings):
    """Each run of words between the dots; rule and value may be strings of their own, and so may the name before the
    colon.
    """
    for run in re.split(r"\.\.\.|, got |expected ", message):
        wanted = re.sub(r"^[\w.]*: ", "", run).removeprefix("scale ").strip(" .,:'()[]")
        assert len(wanted) < 9 or wanted in strings, f"no source says {wanted!r}"
