#!/usr/bin/env python3
"""Checks that the tree keeps the layers `python -> distill, prune -> optim, amp, nn -> autograd -> ops -> csrc`.

A public header, include/quantrain/<layer>/..., belongs to its layer.

Rules, each a function below:
  includes   a layer includes only itself and layers right of it in the line above; nn and amp do not include each other, and nn, amp and
             optim do not reach past ops into csrc
  spelling   a public header is included as "quantrain/<layer>/...", a private one by its path from the root
  autograd   a file of autograd has the basename of the file of ops whose operator it differentiates
  imports    Python's packages import only what stands right of them in finetune -> distill, prune -> ptq -> nn, amp, optim -> the modules of operators
  cuda       a .cu or .cuh file lives in csrc/cuda only
  torch      csrc includes no header of torch or Python
  heavy      torch/all.h, torch/torch.h and torch/extension.h are included in python/ and examples/ only
             (torch/torch.h also under tests/, which are users of the library)
  opcheck    every public op (m.def without a leading underscore) is named by a test in tests/python that calls opcheck
  operators  every public op has a row in a table of docs/operators.md, which scripts/make_operators.py writes
  columns    no line of C++ and CUDA has more than 120 columns, but in a raw string, such as a schema

Usage: check_layers.py [ROOT]. Prints what it checked, one line a violation, and exits 1 where there is one.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

# folder -> the folders it may include
LAYERS = {
    "csrc": {"csrc"},
    "ops": {"ops", "csrc"},
    "autograd": {"autograd", "ops", "csrc"},
    "nn": {"nn", "autograd", "ops"},
    "amp": {"amp", "autograd", "ops"},
    "optim": {"optim", "amp", "autograd", "ops"},
    "distill": {"distill", "nn", "optim", "ops"},
    "prune": {"prune", "nn", "optim", "ops"},
    "python": {"python", "distill", "prune", "amp", "nn", "optim", "autograd", "ops"},
}
PUBLIC = "include/quantrain/"
COLUMNS = 120
# folder of python/quantrain -> the other folders that it may import; modules beside them serve all
PACKAGES = {
    "finetune": {"distill", "prune", "ptq", "nn", "amp", "optim"},
    "distill": {"ptq", "nn", "optim"},
    "prune": {"ptq", "nn", "optim"},
    "ptq": {"nn"},
    "nn": set(),
    "amp": set(),
    "optim": set(),
}
SHARED_AUTOGRAD = {"no_derivative"}  # of every operator without a derivative
UMBRELLA = (
    "quantrain.h"  # <quantrain/quantrain.h>, which includes all of amp, nn and ops: for programs, not for the layers
)
HEAVY = {"torch/all.h", "torch/torch.h", "torch/extension.h"}
SKIPPED = {".git", ".venv", ".ccache", "__pycache__", "dist", "runs"}
SOURCES = {".h", ".hpp", ".cuh", ".cpp", ".cc", ".cu"}

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"\n]+)[>"]', re.MULTILINE)
# m.def("name(...  |  m.def(TORCH_SELECTIVE_SCHEMA("name(...  |  m.def(\n      R"(name(...
SCHEMA = re.compile(r'\bm\.def\(\s*(?:\w+\(\s*)?(?:R"\w*\()?"?\s*(?:quantrain::)?([A-Za-z_]\w*)(?:\.\w+)?\s*\(')
RAW_STRING = re.compile(r'R"(\w*)\(.*?\)\1"', re.DOTALL)
TORCH_FREE = re.compile(r"^(torch|ATen|c10|caffe2|pybind11)/|^Python\.h$")


@dataclass(frozen=True)
class Violation:
    rule: str
    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: [{self.rule}] {self.text}"


@dataclass(frozen=True)
class Include:
    path: str  # of the including file, relative to the root
    line: int
    target: str  # as written

    @property
    def layer(self) -> str:
        return self.path.removeprefix(PUBLIC).split("/", 1)[0]


def sources(root: Path) -> list[Path]:
    """Every C++ and CUDA source of the tree, builds and environments left out, relative to root."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(d for d in folders if d not in SKIPPED and not d.startswith("build"))
        found += [(Path(folder) / f).relative_to(root) for f in sorted(files) if Path(f).suffix in SOURCES]
    return found


def strip_comments(text: str) -> str:
    """C++ text without comments; the line numbers stay. Strings are kept, so that `//` in one survives."""
    token = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
    return token.sub(lambda m: m[0] if m[0].startswith('"') else re.sub(r"[^\n]", " ", m[0]), text)


def includes(root: Path, files: list[Path]) -> list[Include]:
    """Every #include of the given files."""
    found = []
    for path in files:
        text = strip_comments((root / path).read_text(encoding="utf-8"))
        for match in INCLUDE.finditer(text):
            found.append(Include(path.as_posix(), text.count("\n", 0, match.start(1)) + 1, match[1]))
    return found


def layer_of(include: Include) -> str | None:
    """The layer folder an include points into, None where it points outside the layers."""
    target = include.target.removeprefix("quantrain/")
    if target.startswith("."):
        target = os.path.normpath(os.path.join(os.path.dirname(include.path), target))
    if target == UMBRELLA and include.target != target:
        return None if include.path.startswith("include/") else "python"
    folder, _, rest = target.partition("/")
    return folder if rest and folder in LAYERS else None


def check_includes(found: list[Include]) -> list[Violation]:
    violations = []
    for include in found:
        allowed, target = LAYERS.get(include.layer), layer_of(include)
        if allowed is not None and target is not None and target not in allowed:
            text = f"{include.layer} includes {include.target}: it may include {', '.join(sorted(allowed))} only"
            violations.append(Violation("includes", include.path, include.line, text))
    return violations


def check_spelling(root: Path, found: list[Include]) -> list[Violation]:
    violations = []
    for include in found:
        if include.layer not in LAYERS or layer_of(include) is None:
            continue
        name = include.target.removeprefix("quantrain/")
        public = (root / PUBLIC / name).exists()
        if (public or (root / name).exists()) and include.target.startswith("quantrain/") != public:
            right = f"quantrain/{name}" if public else name
            text = f"a {'public' if public else 'private'} header is included as {right}, got {include.target}"
            violations.append(Violation("spelling", include.path, include.line, text))
    return violations


def check_autograd(root: Path, files: list[Path]) -> list[Violation]:
    text = "no file of ops has this basename: it is that of the operator that is differentiated"
    return [
        Violation("autograd", path.as_posix(), 1, text)
        for path in files
        if path.parts[0] == "autograd" and path.suffix == ".cpp" and path.stem not in SHARED_AUTOGRAD
        if not (root / "ops" / path.name).exists()
    ]


def check_imports(root: Path) -> list[Violation]:
    violations = []
    package = root / "python" / "quantrain"
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).parts
        if parts == ("__init__.py",):
            continue
        own = parts[0] if len(parts) > 1 else ""
        allowed = PACKAGES.get(own, set()) | {own}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in _imported(node, parts):
                folder = name.split(".")[0]
                if folder in PACKAGES and folder not in allowed:
                    text = f"{own or 'a module of operators'} imports quantrain.{name}"
                    violations.append(Violation("imports", path.relative_to(root).as_posix(), node.lineno, text))
    return violations


def _imported(node: ast.AST, parts: tuple[str, ...]) -> list[str]:
    """What a statement of the file `parts` imports from the package, without "quantrain."."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = ".".join(("quantrain", *parts[: len(parts) - node.level])) if node.level else ""
        module = ".".join(filter(None, (base, node.module)))
        names = [f"{module}.{alias.name}" for alias in node.names]
    else:
        names = []
    return [name.removeprefix("quantrain.") for name in names if name.startswith("quantrain.")]


def check_columns(root: Path, files: list[Path]) -> list[Violation]:
    """Python's lines are ruff's."""
    violations = []
    for path in files:
        text = RAW_STRING.sub(lambda m: "\n" * m[0].count("\n"), (root / path).read_text(encoding="utf-8"))
        for number, line in enumerate(text.splitlines(), start=1):
            if len(line) > COLUMNS:
                text = f"expected at most {COLUMNS} columns, got {len(line)}"
                violations.append(Violation("columns", path.as_posix(), number, text))
    return violations


def check_cuda(files: list[Path]) -> list[Violation]:
    text = "a CUDA source lives in csrc/cuda only"
    return [
        Violation("cuda", path.as_posix(), 1, text)
        for path in files
        if path.suffix in {".cu", ".cuh"} and path.parts[:2] != ("csrc", "cuda")
    ]


def check_torch(found: list[Include]) -> list[Violation]:
    return [
        Violation("torch", i.path, i.line, f"csrc knows no torch header, yet includes {i.target}")
        for i in found
        if i.layer == "csrc" and TORCH_FREE.match(i.target)
    ]


def check_heavy(found: list[Include]) -> list[Violation]:
    def allowed(include: Include) -> bool:
        return include.layer in {"python", "examples"} or (
            include.layer == "tests" and include.target == "torch/torch.h"
        )

    return [
        Violation("heavy", i.path, i.line, f"{i.target} belongs in python/ and examples/ only")
        for i in found
        if i.target in HEAVY and not allowed(i)
    ]


def schemas(root: Path, files: list[Path]) -> dict[str, tuple[str, int]]:
    """Public op name -> where its schema is defined. Overloads (`quantize.seeded`) count as their op."""
    found: dict[str, tuple[str, int]] = {}
    for path in files:
        if path.parts[0] not in LAYERS or path.parts[0] == "python":
            continue  # a pybind11 module also says m.def, for functions that are no ops
        text = strip_comments((root / path).read_text(encoding="utf-8"))
        for match in SCHEMA.finditer(text):
            if not match[1].startswith("_"):
                found.setdefault(match[1], (path.as_posix(), text.count("\n", 0, match.start(1)) + 1))
    return found


class _Definition(ast.NodeVisitor):
    """The names that one top-level statement uses, the ops it names, and whether it calls opcheck."""

    def __init__(self, node: ast.AST, namespaces: set[str]) -> None:
        self.namespaces = namespaces  # how the file writes torch.ops.quantrain
        self.names: set[str] = set()
        self.ops: set[str] = set()
        self.calls_opcheck = False
        self.visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self.names.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if ast.unparse(node.value) in self.namespaces:
            self.ops.add(node.attr)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):  # getattr(torch.ops.quantrain, "name"), or "name.overload"
            self.ops.add(node.value.removeprefix("quantrain::").partition(".")[0])

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        self.calls_opcheck |= called == "opcheck"
        self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> None:
        self.names.add(node.arg)  # a fixture is used by its argument's name
        self.generic_visit(node)


def opchecked(text: str) -> set[str]:
    """Names that the opcheck tests of one Python file mention, through its helpers and lists of samples too.

    A test counts where it, or a top-level function, list or fixture of the file that it uses, calls opcheck; it then
    covers every op and every string named anywhere along the way.
    """
    definitions: dict[str, _Definition] = {}
    tests = []
    namespaces = {"torch.ops.quantrain"}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.value) in namespaces:
            namespaces |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        for part in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(part, ast.FunctionDef):
                definitions[part.name] = _Definition(part, namespaces)
                tests += [part.name] if part.name.startswith("test_") else []
            elif isinstance(part, (ast.Assign, ast.AnnAssign)):
                targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                for target in targets:
                    if isinstance(target, ast.Name):
                        definitions[target.id] = _Definition(part, namespaces)
    covered: set[str] = set()
    for test in tests:
        reached, queue = {test}, [test]
        while queue:
            new = (definitions[queue.pop()].names & definitions.keys()) - reached
            reached |= new
            queue += new
        if any(definitions[name].calls_opcheck for name in reached):
            covered |= set().union(*(definitions[name].ops for name in reached))
    return covered


def check_opcheck(root: Path, ops: dict[str, tuple[str, int]]) -> list[Violation]:
    covered: set[str] = set()
    for path in sorted((root / "tests" / "python").rglob("*.py")):
        covered |= opchecked(path.read_text(encoding="utf-8"))
    return [
        Violation("opcheck", *where, f"no test in tests/python calls opcheck on torch.ops.quantrain.{name}")
        for name, where in ops.items()
        if name not in covered
    ]


def check_operators(root: Path, ops: dict[str, tuple[str, int]]) -> list[Violation]:
    page = root / "docs" / "operators.md"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    first_cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("|") and line.count("|") > 2]
    rows = {name for cell in first_cells for name in re.findall(r"`(\w+)(?:\(|`)", cell)}
    return [
        Violation("operators", *where, f"docs/operators.md has no table row that begins with `{name}`")
        for name, where in ops.items()
        if name not in rows
    ]


def check(root: Path) -> tuple[str, list[Violation]]:
    """(what was checked, the violations) of the tree at root."""
    files = sources(root)
    found = includes(root, files)
    ops = schemas(root, files)
    violations = [
        *check_includes(found),
        *check_spelling(root, found),
        *check_autograd(root, files),
        *check_imports(root),
        *check_cuda(files),
        *check_torch(found),
        *check_heavy(found),
        *check_opcheck(root, ops),
        *check_operators(root, ops),
        *check_columns(root, files),
    ]
    layered = sum(i.layer in LAYERS for i in found)
    checked = f"{len(files)} sources, {len(found)} includes ({layered} in the layers), {len(ops)} public ops: {', '.join(ops)}"
    return checked, violations


def main() -> int:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
    checked, violations = check(root)
    print(f"check_layers: {checked}")
    for violation in violations:
        print(violation)
    if not sources(root):
        print(f"check_layers: no source under {root}")
        return 1
    print(f"check_layers: {len(violations)} violations" if violations else "check_layers: every rule holds")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
