"""The exported ONNX model, run by onnxruntime, against the oracle: every node's integers, equal."""

import importlib
import json
import sys
import types

import numpy as np
import pytest
import torch
from reference import fixed_point_network as oracle
from samples import fixed_point_graphs as graphs

import quantrain
from quantrain.nn.fixed_point.onnx import export_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

GRAPHS = [*graphs.SAMPLES, *range(40)]
INTEGER_OPS = {
    "Add", "BitShift", "BitwiseAnd", "Cast", "ConvInteger", "Flatten", "Identity", "MatMulInteger", "Max", "MaxPool", "Min", "Pad",
    "ReduceSum", "Slice", "Sub",
}  # fmt: skip


def make(name):
    return graphs.sample(name) if isinstance(name, str) else graphs.random_graph(name)


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def assert_exact(graph, tensors, codes, path, **arguments):
    """Every node's integers of the exported model are the oracle's."""
    expected = oracle.run(graph, tensors, codes)
    last = graph["output"]["name"]
    others = tuple(name for name in expected if name != last)
    export_onnx((graph, tensors), path, outputs=others, **arguments)
    found = session(path).run([last, *others], {graph["input"]["name"]: codes})
    for name, array in zip([last, *others], found, strict=True):
        assert array.dtype in (np.int8, np.uint8, np.int32)
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("name", GRAPHS)
def test_every_node_is_exact(name, tmp_path):
    assert_exact(*make(name), tmp_path / "network.onnx")


@pytest.mark.parametrize("name", GRAPHS)
def test_a_fixed_batch_and_an_open_one(name, tmp_path):
    """The model as it is deployed, with its one output."""
    graph, tensors, codes = make(name)
    codes = np.concatenate([codes, codes[::-1], codes])
    expected = oracle.run(graph, tensors, codes)[graph["output"]["name"]]
    path, fixed = tmp_path / "open.onnx", tmp_path / "fixed.onnx"
    export_onnx((json.dumps(graph), tensors), path)
    export_onnx((graph, tensors), fixed, batch=1)
    found = session(path)
    for size in (1, len(codes)):
        np.testing.assert_array_equal(found.run(None, {"input": codes[:size]})[0], expected[:size])
    np.testing.assert_array_equal(session(fixed).run(None, {"input": codes[:1]})[0], expected[:1])
    assert session(fixed).get_inputs()[0].shape[0] == 1 and found.get_inputs()[0].shape[0] == "N"


@pytest.mark.parametrize("name", graphs.SAMPLES)
def test_only_integers(name, tmp_path):
    graph, tensors, _ = graphs.sample(name)
    export_onnx((graph, tensors), tmp_path / "network.onnx")
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "network.onnx"), strict_mode=True)
    assert {node.op_type for node in model.graph.node} <= INTEGER_OPS
    found = {value.type.tensor_type.elem_type for value in model.graph.value_info}
    found |= {constant.data_type for constant in model.graph.initializer}
    T = onnx.TensorProto
    assert found <= {T.INT8, T.UINT8, T.INT32, T.UINT32, T.INT64}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["quantrain.output"]) == graph["output"]
    assert json.loads(metadata["quantrain.input"]) == graph["input"]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("lengths", [*range(-8, 32), "mixed", "left"])
def test_shifts_round_half_to_even_and_saturate(signed, lengths, tmp_path):
    """Accumulators at and around every tie and at the ends of int32, by way of the bias of a convolution."""
    base = {"mixed": [-8, -1, 0, 1, 2, 7, 15, 20], "left": [-8, -3, -1, 0]}.get(lengths, [lengths])
    shifts = np.repeat(base, 64)
    random = np.random.default_rng(0)
    ends = [0, 1, -1, 2**31 - 256, -(2**31) + 256]
    halves = random.integers(-600, 600, 64) * np.exp2(np.maximum(shifts.reshape(-1, 64) - 1, 0)).astype(np.int64)
    bias = np.clip(halves + random.integers(-1, 2, 64), *(ends[:2:-1]))
    bias[:, : len(ends)] = ends
    length = 5 if min(base) < 0 else 0
    node = {
        "name": "conv", "op": "conv2d", "inputs": ["input"], "kernel": [1, 1], "stride": [1, 1], "padding": [0, 0], "groups": 1,
        "channels": len(shifts), "weight_fraction_length": (shifts + length).tolist(), "output": "codes", "signed": signed,
        "fraction_length": length,
    }  # fmt: skip
    description = {"name": "input", "channels": 1, "signed": True, "fraction_length": 0, "scale": 1.0}
    graph = {"format": "quantrain.fixed_point", "version": 1, "recipe": "", "input": description, "nodes": [node]}
    graph["output"] = {"name": "conv", "scale": 2.0**-length}
    tensors = {"conv.weight": np.ones((len(shifts), 1, 1, 1), np.int8), "conv.bias": bias.ravel().astype(np.int32)}
    codes = np.arange(-3, 4, dtype=np.int8).reshape(7, 1, 1, 1)
    assert_exact(graph, tensors, codes, tmp_path / "network.onnx")


@pytest.mark.parametrize("signed", [False, True])
def test_products_of_the_largest_codes_are_exact(signed, tmp_path):
    """A CPU that adds pairs of products in 16 bits would saturate here."""
    b = graphs.GraphBuilder(0, channels=64, size=3, signed=signed)
    x = b.conv("input", 16, output="accumulators")
    b.linear(b.flatten("input"), 4)
    b.tensors[f"{x}.weight"][:] = 127
    b.tensors["fc.weight"][:] = -127
    graph, tensors, codes = b.finish("fc")
    codes[:] = oracle.code_range(signed)[1]
    assert_exact(graph, tensors, codes, tmp_path / "network.onnx")


@pytest.mark.skipif(not hasattr(quantrain._C, "FixedPointNetwork"), reason="no FixedPointNetwork in this build")
@pytest.mark.parametrize("name", graphs.SAMPLES)
def test_takes_a_network_and_a_model_that_holds_one(name, tmp_path):
    graph, tensors, codes = graphs.sample(name)
    tensors = {key: torch.from_numpy(value) for key, value in tensors.items()}
    network = quantrain._C.FixedPointNetwork(json.dumps(graph), tensors)
    expected = network.forward(torch.from_numpy(codes)).numpy()
    for i, model in enumerate((network, types.SimpleNamespace(network=network))):
        export_onnx(model, tmp_path / f"{i}.onnx")
        np.testing.assert_array_equal(session(tmp_path / f"{i}.onnx").run(None, {"input": codes})[0], expected)


def test_refuses_what_it_cannot_write(tmp_path):
    graph, tensors, _ = graphs.sample("conv_chain")
    path = tmp_path / "network.onnx"
    with pytest.raises(
        ValueError, match="expected a graph of format quantrain.fixed_point 1, got quantrain.fixed_point 2"
    ):
        export_onnx(({**graph, "version": 2}, tensors), path)
    with pytest.raises(ValueError, match="expected the name of a node, got nothing"):
        export_onnx((graph, tensors), path, outputs=("nothing",))
    with pytest.raises(ValueError, match="expected an op of conv2d, .* at conv1, got conv3d"):
        export_onnx(({**graph, "nodes": [{**graph["nodes"][0], "op": "conv3d"}]}, tensors), path)
    with pytest.raises(ValueError, match="expected inputs of conv1 that come before it, got conv9"):
        export_onnx(({**graph, "nodes": [{**graph["nodes"][0], "inputs": ["conv9"]}]}, tensors), path)
    assert not path.exists()


def test_names_the_package_that_is_missing(tmp_path, monkeypatch):
    graph, tensors, _ = graphs.sample("conv_chain")
    monkeypatch.setitem(sys.modules, "onnx", None)
    module = importlib.import_module("quantrain.nn.fixed_point.onnx")
    with pytest.raises(ImportError, match="expected the package onnx, which is not installed"):
        module.export_onnx((graph, tensors), tmp_path / "network.onnx")
