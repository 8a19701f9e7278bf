"""The integer network against its oracle in int64, node by node; what it refuses; its file."""

import copy
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import fixed_point_network as oracle
from samples import fixed_point_graphs as graphs

from quantrain._C import FixedPointNetwork
from quantrain.nn import FixedPointNetwork as Module

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def as_tensors(arrays, device="cpu"):
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def network(graph, tensors, device="cpu"):
    return FixedPointNetwork(json.dumps(graph), as_tensors(tensors, device))


def make(name):
    return graphs.sample(name) if isinstance(name, str) else graphs.random_graph(name)


def assert_equal_everywhere(graph, tensors, codes, device="cpu"):
    expected = oracle.run(graph, tensors, codes)
    net = network(graph, tensors, device)
    x = torch.from_numpy(codes).to(device)
    found = net.forward_all(x)
    assert list(found) == sorted(expected)
    for name, value in found.items():
        np.testing.assert_array_equal(value.cpu().numpy(), expected[name], err_msg=name)
        assert value.is_contiguous()
    output = net.forward(x)
    assert output.dtype == found[graph["output"]["name"]].dtype
    np.testing.assert_array_equal(output.cpu().numpy(), expected[graph["output"]["name"]])
    return net


# ---- integers ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", graphs.SAMPLES)
def test_sample_equals_oracle_at_every_node(name, device):
    assert_equal_everywhere(*graphs.sample(name), device)


@pytest.mark.parametrize("device", DEVICES)
def test_random_graphs_equal_oracle_at_every_node(device):
    for seed in range(60):
        assert_equal_everywhere(*graphs.random_graph(seed), device)


def add_of_everything(seed):
    """Additions of every pair of types, per channel and not, with either operand the finer."""
    b = graphs.GraphBuilder(seed, channels=2, size=(5, 6), batch=2)
    values = [
        b.conv("input", 6, fraction_length=7),
        b.conv("input", 6, fraction_length=1, signed=True),
        b.conv("input", 6, output="accumulators", weight_fraction_length=6),
        b.conv("input", 6, output="accumulators", per_channel=True, weight_fraction_length=[0, 1, 2, 3, 6, 7]),
    ]
    ends = [b.add(x, y, signed=bool((i + j) % 2)) for i, x in enumerate(values) for j, y in enumerate(values)]
    padded = b.slice_pad(ends[0], 2, (2, 1))
    for x in values[:3]:
        padded = b.add(padded, b.slice_pad(x, 2, (1, 2)))
    b.slice_pad(values[3], 2, (0, 0))
    total = ends[0]
    for x in ends[1:]:
        total = b.add(total, x)
    return b.finish(total)


@pytest.mark.parametrize("device", DEVICES)
def test_additions_of_every_kind(device):
    for seed in range(3):
        assert_equal_everywhere(*add_of_everything(seed), device)


def test_residual_of_every_kind_and_sign_of_alignment():
    for length in (0, 3, 7):
        for kind in ("unsigned", "signed", "accumulators", "per_channel"):
            b = graphs.GraphBuilder(length, channels=3, size=5)
            if kind in ("unsigned", "signed"):
                x = b.conv("input", 4, fraction_length=length, signed=kind == "signed")
            else:
                lengths = [length, 0, 7, 3] if kind == "per_channel" else length
                x = b.conv(
                    "input", 4, output="accumulators", per_channel=kind == "per_channel", weight_fraction_length=lengths
                )
            for weight in (0, 7):
                y = b.conv("input", 4, weight_fraction_length=weight, residual=x, signed=weight == 0)
            assert_equal_everywhere(*b.finish(y))


def test_input_layouts_shapes_and_empty_batch():
    graph, tensors, codes = graphs.sample("residual_identity")
    net = network(graph, tensors)
    x = torch.from_numpy(codes)
    want = net.forward(x)
    for layout in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([x, x], 1)[:, : x.size(1)],
        torch.cat([x, x], 3)[..., : x.size(3)],
    ):
        assert net.forward(layout).equal(want)
    for batch in (1, 5, 2, 7, 3, 9, 4, 8, 6, 10, 1):  # more shapes than plans are kept
        many = x[:1].expand(batch, -1, -1, -1)
        assert net.forward(many).equal(want[:1].expand(batch, -1))
    assert net.forward(x[:0]).shape == (0, want.size(1))
    assert all(value.size(0) == 0 for value in net.forward_all(x[:0]).values())


def test_threads_share_one_network():
    graph, tensors, codes = graphs.sample("mobile_block")
    net = network(graph, tensors)
    inputs = [torch.from_numpy(np.roll(codes, i, 2)) for i in range(4)]
    want = [net.forward(x) for x in inputs]
    wrong = []

    def work(i):
        wrong.extend(i for _ in range(50) if not net.forward(inputs[i]).equal(want[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.cuda
def test_cuda_graph_replays():
    graph, tensors, codes = graphs.sample("mobile_block")
    net, cpu = network(graph, tensors, "cuda"), network(graph, tensors)
    x = torch.from_numpy(codes).cuda()
    net.forward(x)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        output = net.forward(x)
    other = torch.from_numpy(np.roll(codes, 1, 3))
    x.copy_(other)
    for batch in range(1, 12):  # other plans come and go
        net.forward(x[:1].expand(batch, -1, -1, -1))
    captured.replay()
    assert output.cpu().equal(cpu.forward(other))


def test_tensors_are_the_networks_own():
    graph, tensors, codes = graphs.sample("conv_chain")
    mine = as_tensors(tensors)
    net = FixedPointNetwork(json.dumps(graph), mine)
    want = net.forward(torch.from_numpy(codes))
    for tensor in mine.values():
        tensor.zero_()
    assert net.forward(torch.from_numpy(codes)).equal(want)


# ---- floats at both ends ----


def test_quantize_input_and_dequantize_output():
    graph, tensors, _ = graphs.sample("residual_identity")
    graph["input"]["scale"] = 1 / 255
    net = network(graph, tensors)
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert net.quantize_input(pixels / 255).equal(pixels)
    assert net.quantize_input(torch.tensor([-1.0, 2.0])).tolist() == [0, 255]
    integers = torch.tensor([[3, -5]], dtype=torch.int32)
    assert net.dequantize_output(integers).equal(integers.float() * graph["output"]["scale"])
    signed, tensors, _ = graphs.sample("mobile_block")
    assert network(signed, tensors).quantize_input(torch.tensor([-1e9, 1e9])).tolist() == [-127, 127]


def test_refuses_floats_and_other_inputs():
    graph, tensors, codes = graphs.sample("residual_identity")
    net, x = network(graph, tensors), torch.from_numpy(codes)
    with pytest.raises(TypeError, match="expected uint8 or int8 codes, got float32"):
        net.forward(x.float())
    with pytest.raises(TypeError, match="expected uint8 codes, as the graph's input says, got int8"):
        net.forward(x.to(torch.int8))
    with pytest.raises(ValueError, match=r"expected codes \[N, 3, H, W\] of at least one pixel, got \[2, 2, 8, 8\]"):
        net.forward(x[:, :2])
    with pytest.raises(ValueError, match=r"pool1: expected an image of \[8,8\], got \[4,4\]"):
        net.forward(x[:, :, :4, :4])
    with pytest.raises(TypeError, match="expected floating-point images, got uint8"):
        net.quantize_input(x)
    with pytest.raises(TypeError, match="expected integers, got float32"):
        net.dequantize_output(x.float())
    assert net.forward(x).dtype == torch.int32


# ---- what a graph may be ----


def node_of(graph, name):
    return next(node for node in graph["nodes"] if node["name"] == name)


def drop(key):
    return lambda entry: entry.pop(key)


def put(key, value):
    return lambda entry: entry.__setitem__(key, value)


CONV, INPUT = "layer1.0.conv2", "input"
BAD = [
    (None, drop("format"), "graph: expected the field 'format', got none"),
    (None, put("format", "other"), "expected format 'quantrain.fixed_point', got 'other'"),
    (None, put("version", 2), "expected version 1, got 2"),
    (None, put("version", "1"), 'expected version 1, got "1"'),
    (None, put("extra", 1), "graph: expected only known fields, got 'extra'"),
    (None, put("recipe", "no JSON"), "expected recipe to be a Recipe's JSON"),
    (None, put("recipe", 3), "expected recipe to be a string, got 3"),
    (None, put("nodes", []), r"nodes to be a list of at least one, got \[\]"),
    (None, put("output", {"name": "gone", "scale": 1.0}), "output: expected the name of a node, got 'gone'"),
    (None, put("output", {"name": "input", "scale": 1.0}), "output: expected the name of a node, got 'input'"),
    (None, put("output", {"name": "fc", "scale": 0.3}), "expected scale to be a power of two, got 0.3"),
    (None, put("output", {"name": "fc", "scale": 0}), "expected scale to be a power of two, got 0"),
    (INPUT, put("channels", 0), "input: expected channels to be an integer from 1"),
    (INPUT, put("channels", 3.0), "input: expected channels to be an integer from 1 to 16777216, got 3.0"),
    (INPUT, put("signed", 1), "input: expected signed to be true or false, got 1"),
    (INPUT, put("fraction_length", 9), "input: expected fraction_length to be an integer from 0 to 8, got 9"),
    (INPUT, put("scale", -1.0), "input: expected scale to be a positive float32, got -1.0"),
    (INPUT, put("scale", 1e-300), "input: expected scale to be a positive float32"),
    (INPUT, put("more", 1), "input: expected only known fields, got 'more'"),
    (CONV, drop("stride"), "layer1.0.conv2: expected the field 'stride', got none"),
    (CONV, put("dilation", [1, 1]), "layer1.0.conv2: expected only known fields, got 'dilation'"),
    (CONV, put("kernel", [3]), r"expected kernel to be two integers, got \[3\]"),
    (CONV, put("stride", [0, 1]), "expected stride to be an integer from 1 to 1048576, got 0"),
    (CONV, put("padding", [-1, 1]), "expected padding to be an integer from 0"),
    (CONV, put("kernel", [5, 3]), r"expected 'layer1.0.conv2.weight' of shape \[16,16,5,3\], got \[16,16,3,3\]"),
    (CONV, put("channels", 8), "expected 8 channels from 'conv1', got 16"),
    (
        CONV,
        put("groups", 4),
        "expected groups 1, or as many as input and output channels .* got groups 4 for 16 and 16",
    ),
    (CONV, put("weight_fraction_length", 8), "weight_fraction_length to be an integer from 0 to 7, got 8"),
    (CONV, put("weight_fraction_length", -1), "weight_fraction_length to be an integer from 0 to 7, got -1"),
    (CONV, put("weight_fraction_length", [7] * 15), "one integer or a list of 16, got a list of 15"),
    (CONV, put("fraction_length", 9), "fraction_length to be an integer from 0 to 8, got 9"),
    (CONV, put("output", "floats"), "expected output 'codes' or 'accumulators', got 'floats'"),
    (CONV, put("output", "accumulators"), "expected output 'codes' where there is a residual, got 'accumulators'"),
    (CONV, put("inputs", ["layer1.0.conv1", "gone"]), "expected inputs that are names of the graph, got 'gone'"),
    (CONV, put("inputs", ["fc"]), "expected inputs that come before it .* got 'fc'"),
    (CONV, put("inputs", [CONV]), "expected inputs that come before it .* got 'layer1.0.conv2'"),
    (CONV, put("inputs", []), "expected inputs to be a list of 1 or 2 names"),
    (CONV, put("inputs", "conv1"), "expected inputs to be a list of 1 or 2 names"),
    (CONV, put("op", "relu"), "expected op to be one of conv2d, .* got 'relu'"),
    (CONV, put("name", "conv1"), "expected every name once, got 'conv1' twice"),
    (CONV, put("name", ""), "node 2: expected a name, got ''"),
    (CONV, put("padding", [2**20, 2**20]), "both operands of its addition to be images of"),
    ("pool1", put("shift", 60), "pool1: expected shift to be an integer from 0 to 23, got 60"),
    ("pool1", put("size", [8192, 8192]), "pool1: expected its sum to stay below 2.31 = 2147483648, got a bound of"),
    ("flatten1", put("inputs", [CONV]), "fc: expected 16 input features, got 1024 from this image"),
    ("fc", put("inputs", ["pool1"]), r"fc: expected a flat value \[N, C\] from 'pool1', got an image"),
    ("fc", put("features", 9), r"expected 'fc.weight' of shape \[9,16\], got \[10,16\]"),
]


@pytest.mark.parametrize(("where", "change", "message"), BAD)
def test_refuses_graphs(where, change, message):
    graph, tensors, codes = graphs.sample("residual_identity")
    change(graph if where is None else graph["input"] if where == INPUT else node_of(graph, where))
    with pytest.raises(ValueError, match=message):
        network(graph, tensors).forward(torch.from_numpy(codes))


def test_refuses_images_beyond_memory():
    graph, tensors = one_layer(np.ones((1, 1)), [0], padding=[2**20, 2**20])
    deep = graph["nodes"][0]
    graph["nodes"].append(deep | {"name": "deeper", "output": "codes", "signed": False, "fraction_length": 8})
    tensors |= {"deeper.weight": np.ones((2**7, 1, 1, 1), np.int8)}
    graph["nodes"][1]["channels"] = 2**7
    graph["output"]["name"] = "deeper"
    with pytest.raises(ValueError, match=r"deeper: expected a result of at most 2\^48 elements"):
        network(graph, tensors).forward(torch.zeros(1, 1, 1, 1, dtype=torch.uint8))


def test_refuses_text_that_is_no_graph():
    for text in ("", "{", "[]", "null", '{"format": 1}'):
        with pytest.raises(ValueError, match="FixedPointNetwork: graph: expected"):
            FixedPointNetwork(text, {})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fc.weight", None, "expected the tensor 'fc.weight', got none"),
        ("other", torch.zeros(1), "expected only weights and biases of the graph, got 'other'"),
        ("fc.weight", torch.zeros(10, 16), "expected 'fc.weight' of dtype int8, got float32"),
        ("fc.weight", torch.zeros(10, 16, dtype=torch.uint8), "expected 'fc.weight' of dtype int8, got uint8"),
        ("fc.weight", torch.full((10, 16), -128, dtype=torch.int8), "expected 'fc.weight' to hold codes from -127"),
        ("fc.bias", torch.zeros(10, dtype=torch.int64), "expected 'fc.bias' of dtype int32, got Long"),
        ("fc.bias", torch.zeros(9, dtype=torch.int32), r"expected 'fc.bias' of shape \[10\], got \[9\]"),
    ],
)
def test_refuses_tensors(name, value, message):
    graph, arrays, _ = graphs.sample("residual_identity")
    tensors = as_tensors(arrays)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    with pytest.raises(ValueError, match=message):
        FixedPointNetwork(json.dumps(graph), tensors)


def test_refuses_products_of_accumulators_and_per_channel_output():
    graph, tensors, _ = graphs.sample("shortcut_accumulators")
    node_of(graph, "conv3")["inputs"] = ["layer2.0.shortcut"]
    with pytest.raises(
        ValueError, match="conv3: expected 8-bit codes from 'layer2.0.shortcut', got int32 accumulators"
    ):
        network(graph, tensors)
    graph, tensors, _ = graphs.sample("shortcut_accumulators")
    graph["output"] = {"name": "layer2.0.shortcut", "scale": 1.0}
    with pytest.raises(ValueError, match="output: expected one fraction length for all channels"):
        network(graph, tensors)


# ---- the proof ----


def one_layer(weight, bias, **changes):
    conv = {"name": "deep", "op": "conv2d", "inputs": ["input"], "kernel": [1, 1], "stride": [1, 1], "padding": [0, 0]}
    conv |= {"groups": 1, "channels": len(weight), "weight_fraction_length": 7, "output": "accumulators", **changes}
    graph = {"format": "quantrain.fixed_point", "version": 1, "recipe": ""}
    graph["input"] = {"name": "input", "channels": weight.shape[1], "signed": False, "fraction_length": 8, "scale": 1.0}
    graph |= {"nodes": [conv], "output": {"name": "deep", "scale": 1.0}}
    return graph, {"deep.weight": weight[:, :, None, None].astype(np.int8), "deep.bias": np.asarray(bias, np.int32)}


def test_bound_is_tight():
    weight = np.full((2, 4), 127)
    room = 2**31 - 1 - 4 * 127 * 255
    graph, tensors = one_layer(weight, [0, -room])
    net = network(graph, tensors)
    assert net.audit()[0]["bound"] == 2**31 - 1
    graph, tensors = one_layer(-weight, [0, -room])
    lowest = network(graph, tensors).forward(torch.full((1, 4, 1, 1), 255, dtype=torch.uint8))
    assert lowest.flatten().tolist() == [-4 * 127 * 255, -(2**31) + 1]
    graph, tensors = one_layer(weight, [0, -room - 1])
    with pytest.raises(
        ValueError, match=r"deep: expected its sum to stay below 2\^31 = 2147483648, got a bound of 2147483648"
    ):
        network(graph, tensors)


def test_bound_after_alignment():
    graph, tensors = one_layer(np.full((1, 4), 127), [2**26])
    last = {**graph["nodes"][0], "name": "last", "weight_fraction_length": 0}
    graph["nodes"].append(
        {**last, "output": "codes", "signed": False, "fraction_length": 0, "inputs": ["input", "deep"]}
    )
    tensors |= {"last.weight": tensors["deep.weight"], "last.bias": np.asarray([2**24 - 2**20], np.int32)}
    network(graph, tensors)
    tensors["last.bias"] = np.asarray([2**24], np.int32)
    with pytest.raises(ValueError, match=r"last: expected its sum after the alignment with 'deep' to stay below 2\^31"):
        network(graph, tensors)


def test_audit_names_integers_only():
    for name in graphs.SAMPLES:
        graph, tensors, _ = graphs.sample(name)
        rows = network(graph, tensors).audit()
        assert [row["name"] for row in rows] == [node["name"] for node in graph["nodes"]]
        for row in rows:
            assert set(row["operations"].split(", ")) <= {"multiply", "add", "shift", "compare", "copy"}
            assert set(row["operands"].replace(" x ", " + ").split(" + ")) <= {"uint8", "int8", "int32"}
            assert row["result"] in ("uint8", "int8", "int32") and 0 <= row["bound"] < 2**31
            if "multiply" in row["operations"]:
                assert row["operands"].split(" + ")[0] in ("uint8 x int8", "int8 x int8")
                assert row["accumulator"] == "int32"
    text = str(Module(network(graph, tensors)).audit())
    assert "multiply, add, shift" in text and "int8 x int8" in text


# ---- files ----


def test_file_round_trip(tmp_path):
    for name in ("mobile_block", "additions"):
        graph, tensors, codes = graphs.sample(name)
        net = network(graph, tensors)
        path = tmp_path / f"{name}.safetensors"
        net.save(str(path))
        assert [p.name for p in tmp_path.glob(f"*{name}*")] == [f"{name}.safetensors"]
        again = FixedPointNetwork.load(str(path))
        assert again.graph() == net.graph() and json.loads(net.graph()) == graph
        assert {k: v.tolist() for k, v in again.tensors().items()} == {k: v.tolist() for k, v in tensors.items()}
        assert again.forward(torch.from_numpy(codes)).equal(net.forward(torch.from_numpy(codes)))
        first = path.read_bytes()
        again.save(str(path))
        assert path.read_bytes() == first


def small_file(tmp_path):
    graph, tensors = one_layer(np.arange(-3, 3).reshape(2, 3), [5, -6])
    path = tmp_path / "net.safetensors"
    network(graph, tensors).save(str(path))
    return path


def check_every_changed_byte(path, file):
    whole = file.read_bytes()
    for i in range(len(whole)):
        for change in (1 << i % 8, 0x20):
            file.write_bytes(whole[:i] + bytes([whole[i] ^ change]) + whole[i + 1 :])
            with pytest.raises(ValueError, match="(net|v1).(safetensors|json): expected"):
                FixedPointNetwork.load(str(path))
    for size in [*range(0, len(whole), 7), len(whole) - 1]:
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="(net|v1).(safetensors|json): expected"):
            FixedPointNetwork.load(str(path))
    for more in (b" ", b"\n", b"\0"):
        file.write_bytes(whole + more)
        with pytest.raises(ValueError, match="expected"):
            FixedPointNetwork.load(str(path))
    file.write_bytes(whole)


def test_every_changed_byte_is_refused(tmp_path):
    path = small_file(tmp_path)
    check_every_changed_byte(path, path)
    FixedPointNetwork.load(str(path))


def version_1(tmp_path):
    """A pair of files that version 1 wrote: a convolution with stride 2, and a linear layer, of an 8 x 8 image."""
    folder = Path(__file__).parents[1] / "data"
    for name in ("fixed_point_v1.safetensors", "fixed_point_v1.json"):
        shutil.copy(folder / name, tmp_path / name)
    return tmp_path / "fixed_point_v1.safetensors", tmp_path / "fixed_point_v1.json"


def test_version_1_loads_and_is_as_strict(tmp_path):
    path, json_path = version_1(tmp_path)
    image = torch.arange(64.0).reshape(1, 1, 8, 8) / 64
    want = torch.tensor([[-0.1395, -0.3573, 0.0165]])  # what version 1 gave
    assert torch.allclose(Module.load(path)(image), want, atol=5e-5)
    for file in (path, json_path):
        check_every_changed_byte(path, file)
    Module.load(path).save(path)  # over a pair: the file alone then counts
    json_path.write_text("not of this network")
    assert torch.allclose(Module.load(path)(image), want, atol=5e-5)


def test_version_1_files_of_two_networks_are_refused(tmp_path):
    path, json_path = version_1(tmp_path)
    text = json_path.read_bytes()
    digits = text.split(b'"')[3]
    json_path.write_bytes(text.replace(digits, b"0123456789abcdef"))
    with pytest.raises(ValueError, match="or they are not of one network"):
        FixedPointNetwork.load(str(path))


def test_missing_files(tmp_path):
    path, json_path = version_1(tmp_path)
    json_path.unlink()
    with pytest.raises(RuntimeError, match=r"v1.json: expected a file that can be read, got No such file"):
        FixedPointNetwork.load(str(path))
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        Module.load(tmp_path / "gone.safetensors")
    with pytest.raises(ValueError, match=r"expected the path of a \.safetensors file"):
        FixedPointNetwork.load(str(json_path))
    with pytest.raises(RuntimeError, match="expected a file that can be written"):
        network(*one_layer(np.ones((1, 1)), [0])).save(str(tmp_path / "no" / "net.safetensors"))


def test_a_killed_save_leaves_the_old_file_or_the_new(tmp_path):
    path = tmp_path / "net.safetensors"
    nets = [network(*one_layer(np.full((64, 512), value), [value] * 64)) for value in (1, 2)]
    nets[0].save(str(path))
    found = set()
    for attempt in range(40):
        child = os.fork()
        if child == 0:
            while True:
                for net in nets:
                    net.save(str(path))
        time.sleep(0.002 + 0.0007 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        weights = [t for t in FixedPointNetwork.load(str(path)).tensors().values() if t.dtype == torch.int8]
        found.add(weights[0].flatten()[0].item())
    assert found == {1, 2}
    nets[0].save(str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]  # what the killed ones left is gone


# ---- the module ----


def test_model_from_images_to_logits(tmp_path):
    graph, tensors, codes = graphs.sample("shortcut_accumulators")
    model = Module(graph, as_tensors(tensors))
    images = torch.from_numpy(codes).float() * graph["input"]["scale"]
    want = oracle.run(graph, tensors, codes)["fc"] * graph["output"]["scale"]
    np.testing.assert_array_equal(model(images).numpy(), want.astype(np.float32))
    model.save(tmp_path / "net.safetensors")
    for again in (Module.load(tmp_path / "net.safetensors"), copy.deepcopy(model), model.to("cpu").double()):
        assert again(images).equal(model(images)) and not again.training


def test_model_state_dict():
    graph, tensors, codes = graphs.sample("mobile_block")
    model = torch.nn.Sequential(Module(graph, as_tensors(tensors)))
    state = model.state_dict()
    assert set(state) == {f"0.{name}" for name in tensors}
    assert {value.dtype for value in state.values()} == {torch.int8, torch.int32}
    other = torch.nn.Sequential(Module(graph, {k: torch.zeros_like(v) for k, v in as_tensors(tensors).items()}))
    other.load_state_dict(state)
    x = torch.from_numpy(codes).float()
    assert other(x).equal(model(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})
    with pytest.raises(RuntimeError, match="of dtype int8, got float32"):
        other.load_state_dict({name: value.float() for name, value in state.items()})
    assert other(x).equal(model(x))


@pytest.mark.cuda
def test_model_moves_to_cuda():
    graph, tensors, codes = graphs.sample("mobile_block")
    model = Module(graph, as_tensors(tensors))
    x = torch.from_numpy(codes).float()
    want = model(x)
    assert model.cuda()(x.cuda()).cpu().equal(want)
    with pytest.raises(TypeError, match="expected codes on cuda:0, got cpu"):
        model(x)
