"""docs/operators.md is what scripts/make_operators.py writes, and the script refuses what it has no line for."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = next(path for path in Path(__file__).resolve().parents if (path / "pyproject.toml").exists())
spec = importlib.util.spec_from_file_location("make_operators", ROOT / "scripts" / "make_operators.py")
make_operators = importlib.util.module_from_spec(spec)
sys.modules["make_operators"] = make_operators
spec.loader.exec_module(make_operators)

PAGE = ROOT / "docs" / "operators.md"


def test_the_page_is_what_the_script_writes():
    assert PAGE.read_text(encoding="utf-8") == make_operators.page(), "run scripts/make_operators.py"


def test_every_description_is_one_sentence_that_stands_alone():
    for name in make_operators.registered():
        text = make_operators.description(name)
        assert 15 < len(text) < 140 and "\n" not in text, f"{name}: {text!r}"
        assert not text[0].islower() and not text.startswith(("The same", "As ", "And ")), f"{name}: {text!r}"
        assert "above" not in text and "below" not in text, f"{name}: {text!r}"


def test_an_operator_without_a_line_is_refused(monkeypatch):
    monkeypatch.setattr(make_operators, "FAMILIES", make_operators.FAMILIES[1:])
    with pytest.raises(SystemExit, match="differ by .*fake_quantize"):
        make_operators.page()


def test_a_gradient_that_is_not_registered_is_refused(monkeypatch):
    monkeypatch.setitem(make_operators.GRADIENTS, "quantize", "straight-through")
    with pytest.raises(SystemExit, match="GRADIENTS and the registration of quantize disagree"):
        make_operators.page()


def test_check_compares_and_writes_nothing(tmp_path, monkeypatch, capsys):
    out = tmp_path / "operators.md"
    monkeypatch.setattr(sys, "argv", ["make_operators.py", "--check", "--out", str(out)])
    assert make_operators.main() == 1 and not out.exists()
    monkeypatch.setattr(sys, "argv", ["make_operators.py", "--out", str(out)])
    assert make_operators.main() == 0
    monkeypatch.setattr(sys, "argv", ["make_operators.py", "--check", "--out", str(out)])
    assert make_operators.main() == 0
    assert "as it should be" in capsys.readouterr().out
