"""Schemes: recipes and files of before there were any load and compute the same; one from outside the library needs a file a language."""

import copy
import ctypes
import importlib
import json
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

import quantrain
import quantrain.nn as qnn
from quantrain import GradientQuantSpec, Int8Spec, QuantSpec, Recipe, Scheme

ROOT = next(path for path in Path(__file__).resolve().parents if (path / "pyproject.toml").exists())
OLD = ROOT / "tests" / "python" / "data" / "recipes-v1"  # written before there were schemes


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def integers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


FILES = [
    ("qat-w4a4", network, "image", True),
    ("fqt-bhq5", network, "image", True),
    ("ptq-w4a8", network, "image", True),
    ("int8-training", perceptron, "row", True),
    ("int8-static", perceptron, "row", True),
    ("f8net", integers, "positive", False),
]


def inputs(kind):
    torch.manual_seed(1)
    return {
        "image": lambda: torch.randn(8, 1, 8, 8),
        "row": lambda: torch.randn(8, 16),
        "positive": lambda: torch.rand(8, 1, 8, 8),
    }[kind]()


def test_recipes_of_before_read_as_those_of_today():
    old = json.loads((OLD / "recipes.json").read_text())
    assert set(old) <= set(Recipe.names())
    for name, fields in old.items():
        assert Recipe.from_json(json.dumps(fields)) == Recipe.from_name(name), name


@pytest.mark.parametrize(("name", "build", "kind", "converts"), FILES)
def test_checkpoints_of_before_load_and_compute_the_same(name, build, kind, converts):
    from safetensors.torch import load_file

    x, expected = inputs(kind), load_file(OLD / f"{name}.output.safetensors")["y"]
    prepared = qnn.from_checkpoint(OLD / f"{name}.prepared.safetensors", build())
    assert qnn.read_checkpoint_info(OLD / f"{name}.prepared.safetensors").recipe == Recipe.from_name(name)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}  # another machine's products may add in another order
    torch.testing.assert_close(
        qnn.convert(copy.deepcopy(prepared))(x) if converts else prepared(x), expected, **tolerance
    )
    if converts:
        converted = qnn.from_checkpoint(OLD / f"{name}.converted.safetensors", build())
        torch.testing.assert_close(converted(x), expected, **tolerance)


def test_a_scheme_is_a_value_of_its_recipe():
    recipe = Recipe.from_name("fqt-bhq5")
    other = copy.deepcopy(recipe)
    other.scheme.grad_input.bits = 3
    assert recipe.scheme.grad_input.bits == 5 and recipe != other
    recipe.scheme = other.scheme
    other.scheme.grad_input.bits = 4
    assert recipe.scheme.grad_input.bits == 3
    for scheme in (Int8Spec(output="none"), GradientQuantSpec(grad_weight=quantrain.GradientSpec(bits=6))):
        for twin in (
            copy.deepcopy(scheme),
            pickle.loads(pickle.dumps(scheme)),
            Scheme.make(scheme.kind, **json.loads(scheme.to_json())),
        ):
            assert twin == scheme and type(twin) is type(scheme) and repr(twin) == repr(scheme)
    with pytest.raises(TypeError, match="Int8Spec: expected a field of its own, got 'outputs'"):
        Int8Spec(outputs="int8")
    with pytest.raises(ValueError, match="^QuantSpec: expected granularity to be one of per_tensor, .*, got 'per_row'"):
        recipe.weight.granularity = "per_row"


def library():
    name = "libquantrain_toy_scheme.so"
    found = sorted((ROOT / "build").glob(f"*/**/{name}"), key=lambda path: path.stat().st_mtime)
    if not found:
        pytest.skip(f"no {name}: build with tests (scripts/setup.sh --tests)")
    return found[-1]


def use_the_toy_scheme(path: str):
    """In a process of its own: a scheme stays registered."""
    ctypes.CDLL(path)
    sys.path.insert(0, str(ROOT / "tests" / "toy_scheme"))
    import ternary  # noqa: F401

    recipe = Recipe.from_name("ternary-w2")
    assert recipe.scheme.threshold == 0.7 and "ternary" in Scheme.kinds() and "threshold=0.7" in repr(recipe)
    changed = qnn.changed_recipe(recipe, {"scheme": {"threshold": 0.5}})
    assert changed.scheme.threshold == 0.5 and Recipe.from_json(changed.to_json()) == changed
    torch.manual_seed(0)
    model = qnn.prepare(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), recipe)
    x, y = torch.randn(64, 16), torch.randint(4, (64,))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    simulated = model.eval()(x)
    with tempfile.TemporaryDirectory() as folder:
        prepared, stored = Path(folder) / "p.safetensors", Path(folder) / "c.safetensors"
        quantrain.save_checkpoint(prepared, model)
        converted = quantrain.convert(copy.deepcopy(model))
        assert torch.equal(converted(x), simulated)
        assert set((converted[0].codes()).unique().tolist()) <= {-1, 0, 1} and converted[0].weight_codes.shape == (
            32,
            8,
        )
        quantrain.save_checkpoint(stored, converted)
        fresh = [nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)) for _ in range(2)]
        assert torch.equal(qnn.from_checkpoint(prepared, fresh[0])(x), simulated)
        assert torch.equal(qnn.from_checkpoint(stored, fresh[1])(x), simulated)
    embedding = qnn.prepare(nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 2)), recipe)
    assert embedding.quantization_summary.left_float["0"] == "ternary weights are for Linear layers"


def test_a_scheme_from_outside_prepares_trains_converts_saves_and_loads():
    path = library()
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_scheme; test_scheme.use_the_toy_scheme({str(path)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_scheme_that_python_does_not_know_is_named():
    code = (
        f"import ctypes; import quantrain; ctypes.CDLL({str(library())!r}); import quantrain.nn as qnn; from torch import nn\n"
        "try: qnn.prepare(nn.Sequential(nn.Linear(2, 2)), 'ternary-w2')\n"
        "except ValueError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "recipe 'ternary-w2': expected a scheme of" in result.stdout and "got 'ternary'" in result.stdout, (
        result.stderr
    )


def test_the_subpackage_of_fixed_point_is_not_hidden_by_its_scheme():
    assert importlib.import_module("quantrain.nn.fixed_point") is qnn.fixed_point
    assert qnn.fixed_point.__name__ == "quantrain.nn.fixed_point"


def test_a_changed_scheme_takes_what_numbers_and_mappings_are():
    change = {"scheme": MappingProxyType({"grad_input": MappingProxyType({"bits": np.int64(4)})})}
    assert qnn.changed_recipe(Recipe.from_name("fqt-bhq5"), change).scheme.grad_input.bits == 4


@pytest.mark.parametrize("field", ["grad_input", "grad_weight", "int8", "fixed_point", "backend"])
def test_a_field_from_before_there_were_schemes_is_pointed_to_them(field):
    with pytest.raises(ValueError, match=rf"got '{field}' \(which is now in \"scheme\": .*kind"):
        qnn.changed_recipe(Recipe.from_name("qat-w8a8"), {field: None})


@pytest.mark.parametrize("scheme", ["int8", {"kind": "int8"}, 8])
def test_a_scheme_of_another_type_is_named(scheme):
    with pytest.raises(TypeError, match="Recipe: expected another type for scheme, got"):
        Recipe(weight=QuantSpec(), scheme=scheme)


@pytest.mark.parametrize("field", ["training", "simulate"])
def test_a_recipe_from_before_has_no_later_fields(field):
    fields = json.loads((OLD / "recipes.json").read_text())["int8-training"]
    assert Recipe.from_json(json.dumps(fields)) == Recipe.from_name("int8-training")
    fields["int8"][field] = False
    with pytest.raises(ValueError, match=f"Recipe: expected int8 without {field}"):
        Recipe.from_json(json.dumps(fields))


def test_a_scheme_without_a_rule_for_weights_says_so():
    scheme = Int8Spec()
    assert not scheme.has_weight_rule
    with pytest.raises(ValueError, match="Int8Spec: expected a scheme with a rule for weights, got one without"):
        scheme.weight_qparams(torch.randn(2, 3))


def test_the_scale_of_a_scalar_weight_has_no_shape():
    spec = QuantSpec(granularity="per_channel")
    with pytest.raises(ValueError, match=r"weight_scale_shape: expected a weight \[O, ...\], got one of no dimensions"):
        qnn.weight_scale_shape(spec, ())
