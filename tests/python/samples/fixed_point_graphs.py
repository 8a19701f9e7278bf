"""Graphs of the integer network to check with: a builder that chooses fraction lengths by what the codes do, samples, random ones.

graph, tensors, codes = sample("mobile_block")        # or random_graph(seed)
"""

from __future__ import annotations

import math

import numpy as np
from reference import fixed_point_network as oracle


class GraphBuilder:
    """Adds nodes one by one and runs the oracle beside, so that each node's fraction length suits the codes that it makes."""

    def __init__(self, seed, *, channels=3, size=8, batch=2, signed=True, fraction_length=5, recipe=""):
        self.random = np.random.default_rng(seed)
        self.tensors, self.names = {}, {}
        height, width = size if isinstance(size, tuple) else (size, size)
        low, high = oracle.code_range(signed)
        shape = (batch, channels, height, width)
        if signed:
            self.codes = np.clip(np.rint(self.random.normal(0, 35, shape)), low, high).astype(np.int8)
        else:
            self.codes = self.random.integers(low, high + 1, shape).astype(np.uint8)
        self.graph = {
            "format": "quantrain.fixed_point",
            "version": 1,
            "recipe": recipe,
            "input": {
                "name": "input",
                "channels": channels,
                "signed": signed,
                "fraction_length": fraction_length,
                "scale": 2.0**-fraction_length,
            },
            "nodes": [],
        }
        self.values = {"input": oracle.input_value(self.graph, self.codes)}

    # ---- nodes: each returns its name ----

    def conv(
        self, x, channels, *, kernel=3, stride=1, padding=None, groups=1, residual=None, signed=False, output="codes",
        per_channel=False, weight_fraction_length=None, fraction_length=None, bias=True, name=None, gain=1.0,
    ):  # fmt: skip
        kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        stride = stride if isinstance(stride, tuple) else (stride, stride)
        padding = tuple(k // 2 for k in kernel) if padding is None else padding
        node = {
            "name": name or self._name("conv"),
            "op": "conv2d",
            "inputs": [x] if residual is None else [x, residual],
            "kernel": list(kernel),
            "stride": list(stride),
            "padding": list(padding if isinstance(padding, tuple) else (padding, padding)),
            "groups": groups,
            "channels": channels,
        }
        shape = (channels, self.values[x].data.shape[1] // groups, *kernel)
        self._weight(node, x, shape, per_channel, weight_fraction_length, bias, gain)
        return self._finish(node, output, signed, fraction_length)

    def linear(self, x, features, *, output="accumulators", signed=True, fraction_length=None, bias=True, name="fc",
               per_channel=False):  # fmt: skip
        node = {"name": name, "op": "linear", "inputs": [x], "features": features}
        self._weight(node, x, (features, self.values[x].data.shape[1]), per_channel, None, bias, 1.0)
        return self._finish(node, output, signed, fraction_length)

    def slice_pad(self, x, stride, pad):
        node = {"name": self._name("shortcut"), "op": "slice_pad", "inputs": [x], "stride": [stride, stride]}
        return self._append({**node, "pad": list(pad)})

    def max_pool(self, x, kernel=3, stride=2, padding=1):
        node = {"name": self._name("maxpool"), "op": "max_pool2d", "inputs": [x], "kernel": [kernel, kernel]}
        return self._append({**node, "stride": [stride, stride], "padding": [padding, padding]})

    def avg_pool(self, x, fraction_length=None):
        size = list(self.values[x].data.shape[2:])
        node = {"name": self._name("pool"), "op": "avg_pool2d", "inputs": [x], "size": size}
        node["shift"] = round(math.log2(size[0] * size[1]))
        if fraction_length is None:
            fraction_length = self._suitable({**node, "output": "accumulators"}, self.values[x].signed)
        return self._append({**node, "fraction_length": fraction_length})

    def add(self, a, b, *, signed=False, fraction_length=None):
        return self._finish(
            {"name": self._name("add"), "op": "add", "inputs": [a, b]}, "codes", signed, fraction_length
        )

    def flatten(self, x):
        return self._append({"name": self._name("flatten"), "op": "flatten", "inputs": [x]})

    def finish(self, output):
        """(graph, tensors, codes) whose output is the named node."""
        value = self.values[output]
        assert value.fraction_length.size == 1, "the output has one scale"
        self.graph["output"] = {"name": output, "scale": 2.0 ** -int(value.fraction_length)}
        return self.graph, self.tensors, self.codes

    # ---- helpers ----

    def _name(self, kind):
        self.names[kind] = self.names.get(kind, 0) + 1
        return f"{kind}{self.names[kind]}"

    def _weight(self, node, x, shape, per_channel, fraction_length, bias, gain):
        """Weights of gain about 1, so that values keep their size from layer to layer, and a bias of a fifth of the sums."""
        deviation = gain * math.sqrt(1.5 / max(1, math.prod(shape[1:])))
        deviations = deviation * np.exp2(
            self.random.uniform(-1.5, 0.5, shape[0]) if per_channel else np.zeros(shape[0])
        )
        if fraction_length is None:
            fraction_length = np.clip(np.floor(np.log2(40 / deviations)), 0, 7).astype(np.int64)
        lengths = np.broadcast_to(np.asarray(fraction_length), shape[:1])
        scale = (deviations * np.exp2(lengths)).reshape((-1,) + (1,) * (len(shape) - 1))
        weight = np.clip(np.rint(self.random.normal(0, 1, shape) * scale), -127, 127)
        node["weight_fraction_length"] = lengths.tolist() if per_channel else int(lengths[0])
        self.tensors[f"{node['name']}.weight"] = weight.astype(np.int8)
        if bias:
            units = np.exp2(lengths + self.values[x].fraction_length)
            rms = self._rms(self.values[x])
            values = self.random.normal(0, 0.2 * rms, shape[0]) * units
            self.tensors[f"{node['name']}.bias"] = np.rint(values).astype(np.int32)

    def _rms(self, value):
        real = value.data / np.exp2(value.aligned_fraction_length().astype(np.float64))
        return float(np.sqrt(np.mean(np.square(real)))) or 1.0

    def _suitable(self, node, signed):
        """The rule for standard deviations of an accumulator before its ReLU: 40 of 127 codes, 70 of 255."""
        value = oracle.evaluate(node, [self.values[name] for name in node["inputs"]], self.tensors)
        length = math.floor(math.log2((40 if signed else 70) / self._rms(value)))
        return min(max(length, 0), 7 if signed else 8)

    def _finish(self, node, output, signed, fraction_length):
        if output == "accumulators":
            return self._append({**node, "output": output})
        if fraction_length is None:
            fraction_length = self._suitable({**node, "output": "accumulators"}, signed)
        if node["op"] != "add":
            node["output"] = output
        return self._append({**node, "signed": signed, "fraction_length": fraction_length})

    def _append(self, node):
        self.graph["nodes"].append(node)
        self.values[node["name"]] = oracle.evaluate(node, [self.values[name] for name in node["inputs"]], self.tensors)
        return node["name"]

    def classify(self, x, classes=10):
        return self.finish(self.linear(self.flatten(self.avg_pool(x)), classes))


# ---- samples ----


def conv_chain(seed=1):
    b = GraphBuilder(seed, channels=3, size=(9, 7), batch=3)
    x = b.conv("input", 8, per_channel=True)
    x = b.conv(x, 12, stride=2)
    x = b.conv(x, 5, kernel=(1, 3), per_channel=True)
    x = b.conv(x, 7, kernel=5, padding=(2, 1), signed=True)
    return b.finish(b.linear(b.flatten(x), 10))


def residual_identity(seed=2):
    b = GraphBuilder(seed, channels=3, size=8, signed=False, fraction_length=8)
    x = b.conv("input", 16, name="conv1")
    length = b.values[x].fraction_length
    for i in range(2):
        y = b.conv(x, 16, name=f"layer1.{i}.conv1")
        x = b.conv(y, 16, residual=x, fraction_length=int(length), name=f"layer1.{i}.conv2")
    return b.classify(x)


def residual_of_larger_fraction_length(seed=3):
    """The accumulators have fewer fraction bits than the residual, and are shifted to it; once per channel."""
    b = GraphBuilder(seed, channels=3, size=6)
    first = b.conv("input", 8, fraction_length=7)
    x = b.conv(first, 8, fraction_length=1, gain=24.0)
    x = b.conv(x, 8, weight_fraction_length=2, residual=first, gain=2.0)
    y = b.conv(x, 8, signed=True, fraction_length=1)
    z = b.conv(y, 8, residual=first, per_channel=True, weight_fraction_length=[7, 6, 5, 4, 3, 7, 6, 5])
    return b.classify(z)


def shortcut_accumulators(seed=4):
    b = GraphBuilder(seed, channels=3, size=8)
    x = b.conv("input", 8)
    y = b.conv(x, 12, stride=2)
    shortcut = b.conv(x, 12, kernel=1, stride=2, output="accumulators", per_channel=True, name="layer2.0.shortcut")
    x = b.conv(y, 12, residual=shortcut, per_channel=True)
    shortcut = b.conv(x, 16, kernel=1, stride=2, output="accumulators")
    x = b.conv(b.conv(x, 16, stride=2), 16, residual=shortcut)
    return b.classify(x)


def slice_pad_shortcut(seed=5):
    b = GraphBuilder(seed, channels=3, size=9)
    x = b.conv("input", 8)
    y = b.conv(x, 16, stride=2)
    return b.classify(b.conv(y, 16, residual=b.slice_pad(x, 2, (4, 4))))


def mobile_block(seed=6):
    b = GraphBuilder(seed, channels=3, size=8)
    x = b.conv("input", 8, stride=2)
    x = b.conv(x, 8, groups=8, per_channel=True)
    x = b.conv(x, 6, kernel=1, signed=True)
    for stride, residual in ((1, True), (2, False)):
        y = b.conv(x, 36, kernel=1)
        y = b.conv(y, 36, groups=36, stride=stride, per_channel=True)
        x = b.conv(y, 6, kernel=1, signed=True, residual=x if residual else None)
    return b.classify(b.conv(x, 24, kernel=1))


def max_pool_stem(seed=7):
    b = GraphBuilder(seed, channels=3, size=21, signed=False, fraction_length=8)
    x = b.max_pool(b.conv("input", 8, kernel=7, stride=2, padding=3))
    x = b.conv(x, 8, signed=True)
    return b.classify(b.max_pool(x, 2, 2, 0))


def avg_pool_7x7(seed=8):
    b = GraphBuilder(seed, channels=3, size=14)
    return b.classify(b.conv(b.conv("input", 8), 20, stride=2), classes=13)


def additions(seed=9):
    """Additions of their own: codes with codes, accumulators with codes and with accumulators."""
    b = GraphBuilder(seed, channels=1, size=5, batch=1)
    x, y = b.conv("input", 8), b.conv("input", 8, signed=True)
    z = b.add(x, y)
    sums = b.conv(z, 8, output="accumulators")
    w = b.add(sums, x, signed=True)
    others = b.conv(w, 8, output="accumulators", weight_fraction_length=3)
    return b.classify(b.add(others, sums))


def pool_of_signed_codes(seed=10):
    b = GraphBuilder(seed, channels=4, size=4)
    return b.classify(b.conv("input", 16, signed=True))


SAMPLES = {
    function.__name__: function
    for function in (
        conv_chain, residual_identity, residual_of_larger_fraction_length, shortcut_accumulators, slice_pad_shortcut,
        mobile_block, max_pool_stem, avg_pool_7x7, additions, pool_of_signed_codes,
    )
}  # fmt: skip


def sample(name):
    """(graph, tensors, codes) of the named sample."""
    return SAMPLES[name]()


def random_graph(seed):
    """(graph, tensors, codes): blocks drawn at random, until the image is small."""
    random = np.random.default_rng(seed)
    signed = bool(random.integers(2))
    b = GraphBuilder(
        seed + 1, channels=int(random.choice([1, 3, 4])), size=tuple(int(n) for n in random.integers(6, 15, 2)),
        batch=int(random.integers(1, 4)), signed=signed, fraction_length=int(random.integers(4, 8 if signed else 9)),
    )  # fmt: skip
    x = b.conv(
        "input", int(random.integers(4, 20)), stride=int(random.integers(1, 3)), per_channel=bool(random.integers(2))
    )
    for _ in range(int(random.integers(2, 6))):
        x = random_block(b, x, random)
    if random.integers(2):
        return b.classify(x, int(random.integers(2, 20)))
    return b.finish(b.linear(b.flatten(x), int(random.integers(2, 20))))


def random_block(b, x, random):
    channels, height = b.values[x].data.shape[1:3]
    per_channel, signed = bool(random.integers(2)), bool(random.integers(4) == 0)
    stride = int(random.integers(1, 3)) if height > 3 else 1
    wide = int(random.integers(4, 24))
    match random.choice(["conv", "identity", "project", "slice_pad", "depthwise", "max_pool", "add"]):
        case "conv":
            return b.conv(
                x, wide, kernel=int(random.choice([1, 3, 5])), stride=stride, signed=signed, per_channel=per_channel
            )
        case "identity":
            return b.conv(b.conv(x, wide), channels, residual=x, signed=signed, per_channel=per_channel)
        case "project":
            shortcut = b.conv(x, wide, kernel=1, stride=stride, output="accumulators", per_channel=per_channel)
            return b.conv(b.conv(x, wide, stride=stride), wide, residual=shortcut, signed=signed)
        case "slice_pad":
            before, after = (int(n) for n in random.integers(0, 5, 2))
            y = b.conv(x, 8, stride=2)
            return b.conv(y, channels + before + after, residual=b.slice_pad(x, 2, (before, after)), signed=signed)
        case "depthwise":
            y = b.conv(x, channels, groups=channels, stride=stride, per_channel=per_channel)
            return b.conv(y, wide, kernel=1, signed=True)
        case "max_pool":
            return b.max_pool(x, 3, stride, 1)
        case _:
            return b.add(b.conv(x, channels, signed=True), x, signed=signed)
