"""The Python examples of README.md and docs/**/*.md run as they stand and print what the page says.

A page's ```python blocks run in order in one namespace; where a ```text block follows one directly, it is what that block
prints, to the character. A block whose first line is ```python no-run (it needs data or minutes) is only compiled.
Links to files of the repository are followed.
"""

import contextlib
import io
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGES = [
    p for p in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))] if p.exists()
]
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str, str, str]]:
    """(line, language, info, text) of each fenced block; a text block directly after another is its output."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start()) + 1, m[1], m[2].strip(), m[3]) for m in FENCE.finditer(text)]


def examples(page: Path) -> list[tuple[int, str, str | None, bool]]:
    """(line, code, expected output or None, run) of each Python block of a page."""
    text, found = page.read_text(encoding="utf-8"), []
    matches = list(FENCE.finditer(text))
    for index, match in enumerate(matches):
        if match[1] != "python":
            continue
        following = matches[index + 1] if index + 1 < len(matches) else None
        printed = following is not None and following[1] == "text" and not text[match.end() : following.start()].strip()
        line = text.count("\n", 0, match.start()) + 1
        found.append((line, match[3], following[3] if printed else None, match[2].strip() != "no-run"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_examples_print_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__example__"}
    for line, code, expected, run in examples(page):
        compiled = compile("\n" * line + code, str(page), "exec")
        if not run:
            continue
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compiled, namespace)
        if expected is not None:
            assert output.getvalue() == expected, f"{page.name}:{line} prints something else"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor and linked.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", linked.read_text(encoding="utf-8")), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
            assert anchor in anchors, f"{page.name} links to {target}, which has no such heading"


def test_the_pages_hold_examples():
    assert sum(run for page in PAGES for *_, run in examples(page)) > 5


def cpp_example() -> tuple[str, str]:
    """(code, printed result) of the C++ example in the README."""
    found = blocks(ROOT / "README.md")
    for (_, language, _, code), (_, after, _, printed) in zip(found, found[1:], strict=False):
        if language == "cpp" and after == "text":
            return code, printed
    raise AssertionError("README.md has no cpp block followed by a text block")


def test_the_cpp_example_is_the_built_one_and_prints_what_the_readme_says():
    code, printed = cpp_example()
    source = ROOT / "examples" / "cpp" / "quickstart.cpp"
    body = "".join(line for line in source.read_text().splitlines(keepends=True) if not line.startswith("//"))
    assert body.strip() == code.strip(), "examples/cpp/quickstart.cpp is not the README's example"
    built = sorted((ROOT / "build").glob("*/**/quickstart"), key=lambda p: p.stat().st_mtime)
    built = [p for p in built if p.is_file()]
    if not built:
        pytest.skip("quickstart is not built: configure with QUANTRAIN_BUILD_EXAMPLES=ON")
    result = subprocess.run([built[-1]], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout == printed
