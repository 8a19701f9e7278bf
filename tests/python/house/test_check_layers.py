"""scripts/check_layers.py: a tree that keeps the rules passes, and each rule fails on a planted violation."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "check_layers.py"
spec = importlib.util.spec_from_file_location("check_layers", SCRIPT)
check_layers = importlib.util.module_from_spec(spec)
sys.modules["check_layers"] = check_layers
spec.loader.exec_module(check_layers)

GOOD = {
    "csrc/common/affine.h": "#include <cmath>\n",
    "csrc/cuda/scale.cu": '#include "csrc/common/affine.h"\n',
    "include/quantrain/ops/scale.h": "#include <ATen/core/Tensor.h>\n",
    "ops/scale.cpp": """
        #include "quantrain/ops/scale.h"
        #include "csrc/common/affine.h"
        #include <torch/library.h>
        TORCH_LIBRARY_FRAGMENT(quantrain, m) {
          m.def("scale(Tensor input) -> Tensor");
          m.def(
              "scale.seeded(Tensor input, int seed) -> Tensor",
              {at::Tag::pt2_compliant_tag});
          m.def("_helper(Tensor input) -> Tensor");
          // m.def("in_a_comment(Tensor input) -> Tensor");
        }
    """,
    "autograd/scale.h": "",
    "autograd/scale.cpp": '#include "quantrain/ops/scale.h"\n#include <torch/csrc/autograd/custom_function.h>\n',
    "include/quantrain/nn/layers.h": '#include "quantrain/ops/scale.h"\n',
    "nn/layers.cpp": '#include "quantrain/nn/layers.h"\n#include "autograd/scale.h"\n',
    "amp/scaler.cpp": '#include "quantrain/ops/scale.h"\n',
    "python/bindings.cpp": '#include <torch/extension.h>\n#include "quantrain/nn/layers.h"\nvoid f() { m.def("not_an_op(", 1); }\n',
    "python/quantrain/__init__.py": "from . import finetune, nn, ops\n",
    "python/quantrain/ops.py": "import torch\n",
    "python/quantrain/nn/layers.py": "from ..ops import scale\nfrom . import layers\n",
    "python/quantrain/amp/scaler.py": "from quantrain.ops import scale\n",
    "python/quantrain/finetune/run.py": "from ..nn.layers import Layer\nfrom ..amp import scaler\n",
    "examples/cpp/train.cpp": "#include <torch/all.h>\n",
    "tests/cpp/test_scale.cpp": "#include <torch/torch.h>\n",
    "build/dev/stray.cu": "",
    "tests/python/ops/test_scale.py": """
import torch
from torch.library import opcheck

SAMPLES = [(torch.ops.quantrain.scale.default, ())]

def helper(op, args):
    opcheck(op, args)

def test_opcheck():
    for op, args in SAMPLES:
        helper(op, args)
""",
    "docs/operators.md": "| op | what |\n|---|---|\n| `scale` | scales |\n",
}


def plant(root: Path, **changed: str) -> list:
    """Writes the good tree with the changed files and returns the violations found."""
    for path, text in {**GOOD, **changed}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return check_layers.check(root)[1]


def test_the_good_tree_passes(tmp_path):
    assert plant(tmp_path) == []
    checked, _ = check_layers.check(tmp_path)
    assert "1 public ops: scale" in checked


@pytest.mark.parametrize(
    ("path", "text", "line"),
    [
        ("csrc/common/affine.h", '#include "quantrain/ops/scale.h"\n', 1),
        ("include/quantrain/ops/scale.h", '#include "autograd/scale.h"\n', 1),
        ("include/quantrain/ops/scale.h", "\n#include <quantrain/nn/layers.h>\n", 2),
        ("autograd/scale.cpp", '#include "../nn/private.h"\n', 1),
        ("autograd/scale.cpp", "#include <quantrain/quantrain.h>\n", 1),
        ("include/quantrain/nn/layers.h", '#include "quantrain/amp/scaler.h"\n', 1),
        ("nn/layers.cpp", '#include "csrc/common/affine.h"\n', 1),
        ("amp/scaler.cpp", '#include "csrc/common/affine.h"\n', 1),
        ("optim/adamw.cpp", '#include "csrc/common/affine.h"\n', 1),
        ("amp/scaler.cpp", '#include "quantrain/nn/layers.h"\n', 1),
        ("nn/layers.cpp", '/* two\nlines */ #include "python/bindings.h"\n', 2),
    ],
)
def test_an_include_to_the_left_fails(tmp_path, path, text, line):
    (violation,) = plant(tmp_path, **{path: text})
    assert (violation.rule, violation.path, violation.line) == ("includes", path, line)


def test_an_include_in_a_comment_passes(tmp_path):
    assert plant(tmp_path, **{"csrc/common/affine.h": '// #include "quantrain/ops/scale.h"\n'}) == []


@pytest.mark.parametrize(
    ("path", "text", "right"),
    [
        ("nn/layers.cpp", '#include "nn/layers.h"\n', "quantrain/nn/layers.h"),
        ("nn/layers.cpp", '#include "ops/scale.h"\n', "quantrain/ops/scale.h"),
        ("nn/layers.cpp", '#include "quantrain/autograd/scale.h"\n', "autograd/scale.h"),
        ("ops/scale.cpp", '#include "quantrain/csrc/common/affine.h"\nm.def("scale(");', "csrc/common/affine.h"),
    ],
)
def test_a_header_has_one_spelling(tmp_path, path, text, right):
    (violation,) = plant(tmp_path, **{path: text})
    assert (violation.rule, violation.path) == ("spelling", path)
    assert f"is included as {right}, got" in violation.text


def test_a_derivative_without_its_operator_fails(tmp_path):
    (violation,) = plant(tmp_path, **{"autograd/learned.cpp": ""})
    assert (violation.rule, violation.path) == ("autograd", "autograd/learned.cpp")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("python/quantrain/ops.py", "from quantrain.nn import layers\n"),
        ("python/quantrain/ops.py", "import quantrain.finetune.run\n"),
        ("python/quantrain/nn/layers.py", "from ..finetune import run\n"),
        ("python/quantrain/nn/layers.py", "def late():\n    from quantrain.amp.scaler import Scaler\n"),
        ("python/quantrain/amp/scaler.py", "from .. import nn\n"),
    ],
)
def test_an_import_to_the_left_fails(tmp_path, path, text):
    (violation,) = plant(tmp_path, **{path: text})
    assert (violation.rule, violation.path, violation.line) == ("imports", path, len(text.splitlines()))


def test_a_long_line_fails_but_in_a_raw_string(tmp_path):
    assert plant(tmp_path, **{"nn/layers.cpp": f'auto text = R"({"x" * 130})";\n'}) == []
    (violation,) = plant(tmp_path, **{"nn/layers.cpp": f"\n// {'x' * 118}\n"})
    assert (violation.rule, violation.line) == ("columns", 2)
    assert "expected at most 120 columns, got 121" in violation.text


@pytest.mark.parametrize("path", ["ops/scale.cu", "csrc/cpu/scale.cu", "csrc/common/scale.cuh", "scale.cu"])
def test_a_cuda_source_outside_csrc_cuda_fails(tmp_path, path):
    (violation,) = plant(tmp_path, **{path: ""})
    assert (violation.rule, violation.path) == ("cuda", path)


@pytest.mark.parametrize(
    "header", ["torch/library.h", "ATen/core/Tensor.h", "c10/util/BFloat16.h", "pybind11/pybind11.h"]
)
def test_a_torch_header_in_csrc_fails(tmp_path, header):
    (violation,) = plant(tmp_path, **{"csrc/cuda/scale.cu": f"#include <{header}>\n"})
    assert (violation.rule, violation.path) == ("torch", "csrc/cuda/scale.cu")


@pytest.mark.parametrize(
    ("path", "header"),
    [
        ("include/quantrain/ops/scale.h", "torch/all.h"),
        ("include/quantrain/nn/layers.h", "torch/torch.h"),
        ("autograd/scale.cpp", "torch/extension.h"),
        ("tests/cpp/test_scale.cpp", "torch/extension.h"),
    ],
)
def test_a_heavy_header_outside_python_and_examples_fails(tmp_path, path, header):
    (violation,) = plant(tmp_path, **{path: f"#include <{header}>\n"})
    assert (violation.rule, violation.path) == ("heavy", path)


@pytest.mark.parametrize(
    "definition",
    [
        'm.def("fresh(Tensor x) -> Tensor");',
        'm.def(\n  "fresh.out(Tensor x, *, Tensor(a!) out) -> ()");',
        'm.def(R"(fresh(Tensor x) -> Tensor)");',
        'm.def(TORCH_SELECTIVE_SCHEMA("fresh(Tensor x) -> Tensor"));',
    ],
)
def test_an_op_without_opcheck_and_row_fails_twice(tmp_path, definition):
    violations = plant(tmp_path, **{"ops/fresh.cpp": definition})
    assert sorted(v.rule for v in violations) == ["opcheck", "operators"]
    assert all(v.path == "ops/fresh.cpp" and "fresh" in v.text for v in violations)


@pytest.mark.parametrize(
    "test",
    [
        "import torch\ndef test_calls():\n    torch.ops.quantrain.scale(1)\n",  # named, not opchecked
        "from torch.library import opcheck\ndef test_other():\n    opcheck(other, ())\n",  # opchecked, not named
        "from torch.library import opcheck\ndef unused():\n    opcheck(torch.ops.quantrain.scale, ())\n",  # no test uses it
    ],
)
def test_what_does_not_count_as_an_opcheck_test(tmp_path, test):
    (violation,) = plant(tmp_path, **{"tests/python/ops/test_scale.py": test})
    assert violation.rule == "opcheck"


@pytest.mark.parametrize(
    "test",
    [
        "def test_direct():\n    torch.library.opcheck(torch.ops.quantrain.scale.default, ())\n",
        "@pytest.mark.parametrize('name', ['scale'])\ndef test_by_name(name):\n"
        "    opcheck(getattr(torch.ops.quantrain, name), ())\n",
        "ops = torch.ops.quantrain\ndef test_by_alias():\n    opcheck(ops.scale.default, ())\n",
        "class TestScale:\n    def test_method(self):\n        opcheck(torch.ops.quantrain.scale, ())\n",
    ],
)
def test_what_counts_as_an_opcheck_test(tmp_path, test):
    assert plant(tmp_path, **{"tests/python/ops/test_scale.py": test}) == []


@pytest.mark.parametrize(
    "page", ["", "The op `scale` scales.\n", "| op | what |\n|---|---|\n| other | see `scale` |\n"]
)
def test_what_does_not_count_as_a_row(tmp_path, page):
    (violation,) = plant(tmp_path, **{"docs/operators.md": page})
    assert violation.rule == "operators"


def test_an_empty_tree_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_layers.py", str(tmp_path)])
    assert check_layers.main() == 1
    assert "no source" in capsys.readouterr().out


def test_this_repository_keeps_the_rules():
    _, violations = check_layers.check(SCRIPT.parents[1])
    assert [str(v) for v in violations] == []
