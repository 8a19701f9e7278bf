"""The oracle of the integer network against cases worked by hand, and the sample graphs against what they promise."""

from fractions import Fraction

import numpy as np
import pytest
from reference import fixed_point_network as oracle
from samples import fixed_point_graphs as graphs

GRAPHS = [*graphs.SAMPLES, *range(30)]


def make(name):
    return graphs.sample(name) if isinstance(name, str) else graphs.random_graph(name)


def network(nodes, *, channels=1, signed=True, fraction_length=5):
    """A graph around these nodes; each takes the one before unless it says otherwise."""
    description = {"name": "input", "channels": channels, "signed": signed, "fraction_length": fraction_length}
    for i, node in enumerate(nodes):
        node.setdefault("inputs", [nodes[i - 1]["name"] if i else "input"])
    return {"input": description, "nodes": nodes}


def conv(name="conv", **changes):
    node = {"name": name, "op": "conv2d", "kernel": [1, 1], "stride": [1, 1], "padding": [0, 0], "groups": 1}
    return {**node, "channels": 1, "weight_fraction_length": 4, "output": "accumulators", **changes}


def image(*rows):
    return np.array(rows, np.int64)[None, None]


# ---- rounding ----


@pytest.mark.parametrize(
    ("accumulator", "shift", "expected"),
    [
        (5, 1, 2), (7, 1, 4), (-5, 1, -2), (-7, 1, -4), (-1, 1, 0), (1, 1, 0), (3, 1, 2),
        (8, 4, 0), (9, 4, 1), (24, 4, 2), (-8, 4, 0), (-9, 4, -1), (-24, 4, -2), (40, 4, 2), (-40, 4, -2),
        (3, 0, 3), (3, -2, 12), (-3, -4, -48), (2**31 - 1, 31, 1), (2**30, 31, 0), (2**30 + 1, 31, 1), (-(2**30), 31, 0),
    ],
)  # fmt: skip
def test_shift_rounds_half_to_even(accumulator, shift, expected):
    assert oracle.shift_round(accumulator, shift) == expected


def test_shift_round_is_python_round_of_a_fraction():
    accumulators = np.arange(-600, 601)
    for shift in range(1, 9):
        expected = [round(Fraction(int(a), 2**shift)) for a in accumulators]
        np.testing.assert_array_equal(oracle.shift_round(accumulators, shift), expected)


@pytest.mark.parametrize(
    ("accumulator", "shift", "signed", "expected"),
    [
        (-100, 2, False, 0), (1021, 2, False, 255), (1019, 2, False, 255), (1018, 2, False, 254), (-1000, 2, True, -127),
        (508, 2, True, 127), (-510, 2, True, -127), (40, -2, True, 127), (40, -2, False, 160), (-(2**31), -31, True, -127),
    ],
)  # fmt: skip
def test_requantize_saturates(accumulator, shift, signed, expected):
    assert oracle.requantize(accumulator, shift, signed) == expected


# ---- nodes ----


def test_convolution():
    graph = network([conv(kernel=[3, 3], padding=[1, 1])])
    weight = np.array([[[[1, 2, 3], [4, 5, 6], [7, 8, 9]]]])
    found = oracle.run(graph, {"conv.weight": weight, "conv.bias": np.array([1000])}, image([1, 0], [0, -1]))
    # at (0, 0): 5 * 1 + 9 * -1; (0, 1): 4 * 1 + 8 * -1; (1, 0): 2 * 1 + 6 * -1; (1, 1): 1 * 1 + 5 * -1
    np.testing.assert_array_equal(found["conv"], image([996, 996], [996, 996]))


def test_stride_and_uneven_padding():
    graph = network([conv(kernel=[1, 3], stride=[2, 1], padding=[0, 1])])
    found = oracle.run(graph, {"conv.weight": np.array([[[[1, 10, 100]]]])}, image([1, 2, 3], [4, 5, 6], [7, 8, 9]))
    np.testing.assert_array_equal(found["conv"], image([210, 321, 32], [870, 987, 98]))


def test_depthwise_and_groups():
    codes = np.array([1, 2, 3, 4]).reshape(1, 4, 1, 1)
    depthwise = network([conv(groups=4, channels=4)], channels=4)
    found = oracle.run(depthwise, {"conv.weight": np.array([1, 10, 100, -1]).reshape(4, 1, 1, 1)}, codes)
    assert found["conv"].ravel().tolist() == [1, 20, 300, -4]
    grouped = network([conv(groups=2, channels=2)], channels=4)
    found = oracle.run(grouped, {"conv.weight": np.array([1, 10, 100, -1]).reshape(2, 2, 1, 1)}, codes)
    assert found["conv"].ravel().tolist() == [21, 296]


def test_requantization_is_per_channel():
    node = conv(channels=3, weight_fraction_length=[0, 3, 7], output="codes", signed=False, fraction_length=5)
    weight = np.full((3, 1, 1, 1), 4)
    found = oracle.run(network([node]), {"conv.weight": weight}, image([10, -10, 50]))
    # accumulators 40, -40, 200, shifted by 0, 3 and 7: 200 / 8 = 25, 40 / 128 = 0.3125, 200 / 128 = 1.5625
    np.testing.assert_array_equal(found["conv"][0, :, 0], [[40, 0, 200], [5, 0, 25], [0, 0, 2]])


def test_residual_of_smaller_fraction_length_is_shifted():
    nodes = [conv("conv"), conv("sum", inputs=["input", "input"], output="codes", signed=True, fraction_length=5)]
    found = oracle.run(network(nodes), {"conv.weight": image([16]), "sum.weight": image([8])}, image([3, -5, 100]))
    # accumulators at 9 bits, the residual at 5: (8 x + 16 x) / 16 = 1.5 x: 4.5, -7.5, 150
    np.testing.assert_array_equal(found["sum"], image([4, -8, 127]))


def test_residual_of_larger_fraction_length_shifts_the_accumulators():
    first = conv("first", weight_fraction_length=7, output="codes", signed=True, fraction_length=7)
    second = conv("second", weight_fraction_length=0, output="codes", signed=True, fraction_length=4)
    third = conv(
        "sum", inputs=["second", "first"], weight_fraction_length=1, output="codes", signed=True, fraction_length=4
    )
    tensors = {"first.weight": image([64]), "second.weight": image([1]), "sum.weight": image([3])}
    values = oracle.run(network([first, second, third], fraction_length=5), tensors, image([10, -7]))
    # first: 640 at 12 bits to 7: 20; -448 / 32 = -14. second: 20 at 7 bits to 4: 2.5, to 2; -1.75, to -2.
    np.testing.assert_array_equal(values["first"], image([20, -14]))
    np.testing.assert_array_equal(values["second"], image([2, -2]))
    # sum: 6 at 5 bits is 24 at 7, and 20: 44 / 8 = 5.5, to 6; -24 - 14 = -38 / 8 = -4.75, to -5
    np.testing.assert_array_equal(values["sum"], image([6, -5]))


def test_residual_of_accumulators_with_a_fraction_length_a_channel():
    shortcut = conv("shortcut", channels=2, weight_fraction_length=[2, 6])
    total = conv("sum", channels=2, inputs=["input", "shortcut"], output="codes", signed=True, fraction_length=5)
    tensors = {
        "shortcut.weight": np.array([1, 1]).reshape(2, 1, 1, 1),
        "sum.weight": np.array([8, 8]).reshape(2, 1, 1, 1),
    }
    found = oracle.run(network([shortcut, total]), tensors, image([20]))
    # channel 0: 160 + (20 << 2) at 9 bits = 240 / 16 = 15; channel 1: (160 << 2) + 20 at 11 bits = 660 / 64 = 10.3
    assert found["sum"].ravel().tolist() == [15, 10]


def test_slice_pad():
    node = {"name": "s", "op": "slice_pad", "stride": [2, 2], "pad": [1, 2]}
    found = oracle.run(network([node]), {}, image([1, 2, 3], [4, 5, 6], [7, 8, 9]))["s"]
    assert found.shape == (1, 4, 2, 2)
    np.testing.assert_array_equal(found[0, 1], [[1, 3], [7, 9]])
    assert found.sum() == 20


def test_max_pool_padding_never_wins():
    node = {"name": "m", "op": "max_pool2d", "kernel": [3, 3], "stride": [2, 2], "padding": [1, 1]}
    codes = image([-9, -8, -3], [-7, -6, -4], [-5, -4, -2])
    np.testing.assert_array_equal(oracle.run(network([node]), {}, codes)["m"], image([-6, -3], [-4, -2]))


def test_avg_pool_divides_by_a_power_of_two():
    node = {"name": "p", "op": "avg_pool2d", "size": [7, 7], "shift": 6, "fraction_length": 6}
    codes = np.full((1, 1, 7, 7), 100)
    # the sum, 4900, has 5 + 6 bits; to 6: 4900 / 32 = 153.1, unsigned as its input is
    assert oracle.run(network([node], signed=False), {}, codes)["p"].item() == 153
    assert oracle.run(network([node], signed=True), {}, codes)["p"].item() == 127
    with pytest.raises(ValueError, match="expected an image of"):
        oracle.run(network([node]), {}, codes[..., :6])


def test_flatten_is_channel_major_and_linear_adds_its_bias():
    nodes = [
        {"name": "flat", "op": "flatten"},
        {"name": "fc", "op": "linear", "features": 2, "weight_fraction_length": 7, "output": "accumulators"},
    ]
    codes = np.arange(8).reshape(1, 2, 2, 2)
    tensors = {"fc.weight": np.stack([10 ** (np.arange(8) % 3), np.ones(8)]), "fc.bias": np.array([1, -1])}
    found = oracle.run(network(nodes, channels=2), tensors, codes)
    assert found["flat"].tolist() == [list(range(8))]
    assert found["fc"].tolist() == [[0 + 10 + 200 + 3 + 40 + 500 + 6 + 70 + 1, 27]]


def test_add():
    nodes = [conv("a"), {"name": "s", "op": "add", "inputs": ["a", "input"], "signed": False, "fraction_length": 6}]
    found = oracle.run(network(nodes), {"a.weight": image([1])}, image([3, -3, 127]))
    # 3 at 9 bits and 3 << 4: 51 / 8 = 6.4; 127 * 17 / 8 = 269.9
    np.testing.assert_array_equal(found["s"], image([6, 0, 255]))


def test_refuses_what_a_valid_network_does_not_do():
    graph = network([conv(channels=1)], channels=1)
    with pytest.raises(OverflowError, match="conv: an accumulator"):
        oracle.run(graph, {"conv.weight": image([127]), "conv.bias": np.array([2**31 - 1])}, image([1]))
    with pytest.raises(ValueError, match="expected codes of -127..127"):
        oracle.run(graph, {"conv.weight": image([1])}, image([-128]))


# ---- the sample graphs ----


@pytest.mark.parametrize("name", GRAPHS)
def test_samples_use_their_codes(name):
    """Codes neither all saturate nor all vanish, weights are never -128, and the same name gives the same graph."""
    graph, tensors, codes = make(name)
    again = make(name)
    assert graph == again[0] and all(np.array_equal(tensors[key], again[1][key]) for key in tensors)
    for tensor in (value for key, value in tensors.items() if key.endswith(".weight")):
        assert tensor.dtype == np.int8 and tensor.min() >= -127 and np.abs(tensor).max() >= 3
    for key, value in oracle.run_values(graph, tensors, codes).items():
        if value.codes and value.data.size >= 32:
            low, high = oracle.code_range(value.signed)
            saturated = (value.data == high) | ((value.data == low) & value.signed)
            assert saturated.mean() < 0.5 and (value.data == 0).mean() < 0.9 and len(np.unique(value.data)) > 4, key


def test_samples_hold_every_kind_of_node():
    """Among the samples by name: every op, both directions of a residual's alignment, each kind of residual."""
    ops, differences, kinds = set(), [], set()
    for name in graphs.SAMPLES:
        graph, tensors, codes = graphs.sample(name)
        values = oracle.run_values(graph, tensors, codes)
        for node in graph["nodes"]:
            ops.add(node["op"])
            if node["op"] == "conv2d" and len(node["inputs"]) == 2:
                x, residual = (values[i] for i in node["inputs"])
                lengths = x.fraction_length + np.asarray(node["weight_fraction_length"]) - residual.fraction_length
                differences.append(lengths.ravel())
                kinds.add((residual.codes, residual.signed))
    assert ops == {"conv2d", "linear", "add", "slice_pad", "max_pool2d", "avg_pool2d", "flatten"}
    differences = np.concatenate(differences)
    assert differences.min() < 0 < differences.max()
    assert kinds == {(True, True), (True, False), (False, True)}
