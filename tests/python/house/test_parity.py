"""docs/parity.md lists what Python exports and what the C++ headers declare, each name once, in the section where it
belongs.
"""

import re
from pathlib import Path

import quantrain

ROOT = next(path for path in Path(__file__).resolve().parents if (path / "pyproject.toml").exists())
PAGE = ROOT / "docs" / "parity.md"
BOTH, PYTHON, CPP = "In both", "In Python only", "In C++ only"

INCLUDE = re.compile(r'^#include "(quantrain/[^"]+)"', re.MULTILINE)
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
DETAIL = re.compile(r"^namespace detail \{.*?^\}  // namespace detail", re.MULTILINE | re.DOTALL)
TYPE = re.compile(r"^(?:class|struct|enum class)(?: QUANTRAIN_API)? (\w+)[^;{]*\{", re.MULTILINE)
MODULE = re.compile(r"^TORCH_MODULE\((\w+)\);", re.MULTILINE)
FUNCTION = re.compile(r"^QUANTRAIN_API\s[^;{(]*?(\w+)\(", re.MULTILINE)


def public_headers(root: Path) -> list[Path]:
    """Every header under include/quantrain; in a tree that keeps them elsewhere, what the umbrella header reaches."""
    folder = root / "include" / "quantrain"
    if (folder / "ops").is_dir():
        return sorted(folder.rglob("*.h"))
    found, queue = [], [folder / "quantrain.h"]
    while queue:
        header = queue.pop()
        if header not in found and header.exists():
            found.append(header)
            for target in INCLUDE.findall(header.read_text(encoding="utf-8")):
                queue.append(root / target.removeprefix("quantrain/"))
    return sorted(found)


def declared(text: str) -> set[str]:
    """Public names of one header: types and exported functions at namespace level. A module's name is its holder's."""
    text = COMMENT.sub("", DETAIL.sub("", text))
    names = {*TYPE.findall(text), *MODULE.findall(text), *FUNCTION.findall(text)}
    return {name for name in names if not (name.endswith("Impl") and name.removesuffix("Impl") in names)}


def cpp_names() -> set[str]:
    return set().union(*(declared(path.read_text(encoding="utf-8")) for path in public_headers(ROOT)))


def python_names() -> set[str]:
    return {*quantrain.__all__, *quantrain.nn.__all__, *quantrain.amp.__all__, *quantrain.optim.__all__}


def listed(section: str) -> list[str]:
    """The names in the first cells of a section's tables."""
    text = PAGE.read_text(encoding="utf-8")
    part = re.search(rf"^## {re.escape(section)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert part, f"{PAGE.name} has no section {section!r}"
    cells = [line.split("|")[1] for line in part[1].splitlines() if line.startswith("|")]
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


def difference(section: str, expected: set[str]) -> str:
    names = listed(section)
    missing, odd = sorted(expected - set(names)), sorted(set(names) - expected)
    twice = sorted({name for name in names if names.count(name) > 1})
    return f"{section}: missing {missing}, not (or no longer) there {odd}, twice {twice}"


def test_the_page_lists_what_there_is():
    python, cpp = python_names(), cpp_names()
    for section, expected in ((BOTH, python & cpp), (PYTHON, python - cpp), (CPP, cpp - python)):
        assert sorted(listed(section)) == sorted(expected), difference(section, expected)


def test_the_headers_are_read_as_they_are_written():
    text = """
        // class Commented {};
        """ + (
        "class Forward;\n"
        "struct QUANTRAIN_API Options {\n  struct Inner {\n  };\n};\n"
        "class QUANTRAIN_API LayerImpl : public Base {\n};\nTORCH_MODULE(Layer);\n"
        "QUANTRAIN_API at::Tensor function(const at::Tensor& x,\n                                  int64_t size);\n"
        "QUANTRAIN_API std::tuple<at::Tensor, at::Tensor> pair(\n    const at::Tensor& x);\n"
        "namespace detail {\nQUANTRAIN_API void hidden();\n}  // namespace detail\n"
    )
    assert declared(text) == {"Options", "Layer", "function", "pair"}


def test_there_is_something_to_compare():
    assert {"fake_quantize", "Recipe", "QuantLinear", "GradScaler", "convert"} <= python_names() & cpp_names()
    assert len(public_headers(ROOT)) > 15
