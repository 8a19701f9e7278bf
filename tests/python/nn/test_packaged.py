"""Converted models as AOTInductor packages: the operators that they call take no ScalarType, which torch 2.11 packs wrongly."""

import pytest
import torch

import quantrain
import quantrain.nn as qnn

RECIPES = ["qat-w8a8", "qat-w4a8", "int8-training", "int8-static"]


def converted(recipe: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    model = qnn.prepare(model, recipe)
    if recipe != "int8-training":
        qnn.calibrate(model, [torch.randn(16, 64) for _ in range(4)])
    return qnn.convert(model).eval()


@pytest.mark.parametrize("recipe", RECIPES)
def test_converted_layers_call_no_operator_with_a_scalar_type(recipe):
    program = torch.export.export(converted(recipe), (torch.randn(16, 64),))
    called = {
        node.target for node in program.graph.nodes if node.op == "call_function" and "quantrain" in str(node.target)
    }
    assert called
    for op in called:
        taken = {str(argument.type) for argument in op._schema.arguments}
        assert not any("ScalarType" in name for name in taken), f"{op}: {taken}"
        assert torch.Tag.nondeterministic_seeded not in op.tags, op


def test_a_package_of_a_converted_model_loads_and_equals_it(tmp_path):
    # One package for both kinds of layers: compiling takes most of the time.
    model = torch.nn.Sequential(converted("qat-w8a8"), torch.nn.Linear(8, 64), converted("int8-training")).eval()
    x = torch.randn(16, 64)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        packaged = torch._inductor.aoti_load_package(path)
        assert torch.allclose(packaged(x), model(x), atol=1e-5)


def test_recomputation_takes_nearest_rounding():
    # Partitioners keep the results of random operators; those that round to nearest are recomputed.
    for op in ("quantize", "int8_quantize_rows", "int8_quantize_columns", "int8_quantize_rows_and_columns"):
        packet = getattr(torch.ops.quantrain, op)
        assert torch.Tag.nondeterministic_seeded in packet.default.tags
        assert torch.Tag.nondeterministic_seeded not in packet.nearest.tags
    x = torch.randn(4, 8)
    scale = torch.tensor([0.1])
    assert quantrain.quantize(x, scale).equal(torch.ops.quantrain.quantize(x, scale))
    with torch._subclasses.FakeTensorMode() as mode:
        assert quantrain.int8_quantize_rows(mode.from_tensor(x))[0].dtype == torch.int8
