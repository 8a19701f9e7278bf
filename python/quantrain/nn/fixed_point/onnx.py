"""The integer network as an ONNX model of integer operators, for any runtime that has them.

Codes are uint8 inside the model; signed codes are held with 128 added (zero point 128), and so are the weights, because
unsigned bytes have an exact product on every CPU: onnxruntime's product of uint8 with int8 saturates at 16 bits where
the CPU has no VNNI. A shift with rounding to even is made of operators that ONNX has, on unsigned integers t that are
not negative:

    (t + (2^(n-1) - 1) + ((t >> n) & 1)) >> n
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quantrain import _C

__all__ = ["export_onnx"]

_OPSET, _IR_VERSION = 18, 8  # BitwiseAnd came with opset 18
_ZERO_POINT = 128
_MAX_NARROW_SHIFT = 22  # 256 << 22 and half a step more fit 31 bits; longer shifts take 64
_MAX_LEFT_SHIFT = 8  # a code range holds 8 bits: what is shifted further is 0 or saturates either way


def export_onnx(model: Any, path: str | os.PathLike, *, batch: int | str = "N", outputs: tuple[str, ...] = ()) -> None:
    """Writes an integer network as ONNX (opset 18): 8-bit codes in, int32 accumulators out, no floating point between.

    The results equal those of the network itself, bit for bit. The products are ConvInteger and MatMulInteger; the rest
    are Add, Sub, Min, Max, BitShift, BitwiseAnd, Cast, ReduceSum, MaxPool, Slice, Pad and Flatten. The model's metadata
    hold what the integers mean: ``quantrain.input`` and ``quantrain.output`` (JSON, with the scale of a code and of an
    accumulator) and ``quantrain.recipe``.

    Args:
        model: a ``FixedPointNetwork``, a converted model whose ``network`` is one, or the pair (graph, tensors): the
            graph as a dict or JSON text, the tensors by name.
        path: the file to write. The model's input and output have the names that the graph gives them.
        batch: the batch size, or the name of an open one.
        outputs: names of further nodes whose integers the model gives, after its output.

    Raises:
        ImportError: the package onnx is not installed (extra [onnx]).
        ValueError: another model (of floating point, or of a recipe that is not in fixed point); a graph of another
            format or version, or an op or a name that it does not have.

    Example:
        >>> graph = {
        ...     "format": "quantrain.fixed_point", "version": 1, "recipe": "",
        ...     "input": {"name": "input", "channels": 4, "signed": True, "fraction_length": 5, "scale": 2.0**-5},
        ...     "nodes": [{"name": "flatten", "op": "flatten", "inputs": ["input"]},
        ...               {"name": "fc", "op": "linear", "inputs": ["flatten"], "features": 2, "weight_fraction_length": 7,
        ...                "output": "accumulators"}],
        ...     "output": {"name": "fc", "scale": 2.0**-12},
        ... }
        >>> export_onnx((graph, {"fc.weight": np.ones((2, 4), np.int8)}), "network.onnx")  # doctest: +SKIP
    """
    graph, tensors = _graph_and_tensors(model)
    if (graph.get("format"), graph.get("version")) != ("quantrain.fixed_point", 1):
        found = f"{graph.get('format')} {graph.get('version')}"
        raise ValueError(f"export_onnx: expected a graph of format quantrain.fixed_point 1, got {found}")
    onnx = _import_onnx()
    onnx.save(_Exporter(onnx, graph, tensors).export(batch, outputs), os.fspath(path))


def _import_onnx():
    try:
        import onnx
    except ImportError as error:
        raise ImportError("export_onnx: expected the package onnx, which is not installed: pip install onnx") from error
    return onnx


def _graph_and_tensors(model: Any) -> tuple[dict, dict[str, np.ndarray]]:
    if not isinstance(model, tuple):
        network = getattr(model, "network", model)
        if not isinstance(network, _C.FixedPointNetwork):
            raise _not_a_network(type(model).__name__)
        model = (network.graph(), network.tensors())
    if len(model) != 2:
        raise _not_a_network(f"{len(model)} items")
    graph, tensors = model
    graph = json.loads(graph) if isinstance(graph, str) else graph
    return graph, {name: np.asarray(t.cpu() if hasattr(t, "cpu") else t) for name, t in tensors.items()}


def _not_a_network(found: str) -> ValueError:
    return ValueError(
        "export_onnx: expected a FixedPointNetwork, a model that convert made of one prepared with a fixed-point recipe, or the "
        f"pair (graph, tensors), got {found}"
    )


@dataclass
class _Value:
    """A tensor of the model: uint8 codes (signed ones plus 128) or int32 accumulators; fraction length [C] or []."""

    name: str
    fraction_length: np.ndarray
    shape: tuple[int, ...]  # without the batch
    signed: bool
    codes: bool
    int32: str = field(default="")  # the name of its integers as int32, once they are needed

    @property
    def offset(self) -> int:
        return _ZERO_POINT if self.codes and self.signed else 0


class _Exporter:
    """Writes one graph's nodes; each handler takes a node and its inputs' values and returns its own."""

    def __init__(self, onnx, graph: dict, tensors: dict[str, np.ndarray]):
        self.onnx, self.graph, self.tensors = onnx, graph, tensors
        self.types = onnx.TensorProto
        self.nodes, self.initializers = [], {}
        self.values: dict[str, _Value] = {}
        self.used: set[str] = set()

    def export(self, batch: int | str, outputs: tuple[str, ...]):
        h = self.onnx.helper
        description, output = self.graph["input"], self.graph["output"]
        code_type = self.types.INT8 if description["signed"] else self.types.UINT8
        shape = (description["channels"], "height", "width")
        inputs = [h.make_tensor_value_info(description["name"], code_type, [batch, *shape])]
        self.values[description["name"]] = self._input(description)
        for node in self.graph["nodes"]:
            self.values[node["name"]] = self._node(node)
        results = [self._result(name, batch) for name in (output["name"], *outputs)]
        constants = [self.onnx.numpy_helper.from_array(array, name) for name, array in self.initializers.items()]
        graph = h.make_graph(self.nodes, "quantrain", inputs, results, constants)
        model = h.make_model(graph, opset_imports=[h.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
        model.producer_name = "quantrain"
        metadata = {
            "input": json.dumps(description),
            "output": json.dumps(output),
            "recipe": self.graph.get("recipe", ""),
        }
        h.set_model_props(model, {f"quantrain.{key}": value for key, value in metadata.items()})
        self.onnx.checker.check_model(model)
        return model

    # ---- ends ----

    def _input(self, description: dict) -> _Value:
        name, signed = description["name"], description["signed"]
        value = _Value(
            name, np.asarray(description["fraction_length"]), (description["channels"], None, None), signed, True
        )
        if signed:
            wide = self._op("Cast", [name], f"{name}/int32", to=self.types.INT32)
            value.int32 = wide
            value.name = self._offset_codes(wide, name)
        return value

    def _offset_codes(self, int32: str, name: str) -> str:
        moved = self._op("Add", [int32, self._constant(np.int32(_ZERO_POINT))], f"{name}/moved")
        return self._op("Cast", [moved], f"{name}/plus128", to=self.types.UINT8)

    def _result(self, name: str, batch: int | str):
        """The node's integers under its own name: int8 for signed codes, uint8 for unsigned, int32 for accumulators."""
        if name not in self.values or name == self.graph["input"]["name"]:
            raise ValueError(f"export_onnx: expected the name of a node, got {name}")
        value, kind = self.values[name], self.types.INT32
        if value.codes:
            kind = self.types.INT8 if value.signed else self.types.UINT8
        if value.codes and value.signed:
            self._op("Cast", [self._int32(value)], name, to=self.types.INT8)
        elif value.name != name:
            self._op("Identity", [value.name], name)
        shape = [size if size is not None else f"{name}.{i}" for i, size in enumerate(value.shape)]
        return self.onnx.helper.make_tensor_value_info(name, kind, [batch, *shape])

    # ---- operators ----

    def _node(self, node: dict) -> _Value:
        handlers = {
            "conv2d": self._conv2d, "linear": self._linear, "add": self._add, "slice_pad": self._slice_pad,
            "max_pool2d": self._max_pool2d, "avg_pool2d": self._avg_pool2d, "flatten": self._flatten,
        }  # fmt: skip
        if node["op"] not in handlers:
            raise ValueError(
                f"export_onnx: expected an op of {', '.join(handlers)} at {node['name']}, got {node['op']}"
            )
        missing = [name for name in node["inputs"] if name not in self.values]
        if missing:
            raise ValueError(
                f"export_onnx: expected inputs of {node['name']} that come before it, got {', '.join(missing)}"
            )
        return handlers[node["op"]](node, *(self.values[name] for name in node["inputs"]))

    def _conv2d(self, node: dict, x: _Value, residual: _Value | None = None) -> _Value:
        weight = self._weight(node, transpose=False)
        operands = [x.name, weight, self._constant(np.uint8(x.offset)), self._constant(np.uint8(_ZERO_POINT))]
        sums = self._op(
            "ConvInteger", operands, f"{node['name']}/products", kernel_shape=node["kernel"], strides=node["stride"],
            pads=[*node["padding"], *node["padding"]], group=node["groups"],
        )  # fmt: skip
        sums = self._biased(node, sums, (-1, 1, 1))
        accumulators = self._accumulators(node, sums, x, (node["channels"], None, None))
        if residual is not None:
            accumulators = self._sum(node["name"], accumulators, residual)
        return self._written(node, accumulators)

    def _linear(self, node: dict, x: _Value) -> _Value:
        weight = self._weight(node, transpose=True)
        operands = [x.name, weight, self._constant(np.uint8(x.offset)), self._constant(np.uint8(_ZERO_POINT))]
        sums = self._op("MatMulInteger", operands, f"{node['name']}/products")
        sums = self._biased(node, sums, (-1,))
        return self._written(node, self._accumulators(node, sums, x, (node["features"],)))

    def _add(self, node: dict, a: _Value, b: _Value) -> _Value:
        return self._written(node, self._sum(node["name"], a, b))

    def _slice_pad(self, node: dict, x: _Value) -> _Value:
        name, (before, after) = node["name"], node["pad"]
        end = np.iinfo(np.int64).max
        bounds = [self._constant(np.array(v, np.int64)) for v in ([0, 0], [end, end], [2, 3], node["stride"])]
        sliced = self._op("Slice", [x.name, *bounds], f"{name}/sliced")
        pads = self._constant(np.array([0, before, 0, 0, 0, after, 0, 0], np.int64))
        zero = np.uint8(x.offset) if x.codes else np.int32(0)
        padded = self._op("Pad", [sliced, pads, self._constant(zero)], f"{name}/padded", mode="constant")
        lengths = x.fraction_length
        lengths = np.pad(lengths, (before, after)) if lengths.size > 1 else lengths
        return _Value(padded, lengths, (x.shape[0] + before + after, None, None), x.signed, x.codes)

    def _max_pool2d(self, node: dict, x: _Value) -> _Value:
        padding = [*node["padding"], *node["padding"]]
        pooled = self._op(
            "MaxPool",
            [x.name],
            f"{node['name']}/pooled",
            kernel_shape=node["kernel"],
            strides=node["stride"],
            pads=padding,
        )
        return _Value(pooled, x.fraction_length, (x.shape[0], None, None), x.signed, True)

    def _avg_pool2d(self, node: dict, x: _Value) -> _Value:
        axes = self._constant(np.array([2, 3], np.int64))
        total = self._op("ReduceSum", [self._int32(x), axes], f"{node['name']}/total", keepdims=1)
        value = _Value(total, x.fraction_length + node["shift"], (x.shape[0], 1, 1), True, False)
        return self._written({"output": "codes", "signed": x.signed, **node}, value)

    def _flatten(self, node: dict, x: _Value) -> _Value:
        flat = self._op("Flatten", [x.name], f"{node['name']}/flat", axis=1)
        pixels = None if None in x.shape else int(np.prod(x.shape))
        return _Value(flat, x.fraction_length, (pixels,), x.signed, x.codes)

    # ---- weights ----

    def _weight(self, node: dict, *, transpose: bool) -> str:
        weight = self.tensors[f"{node['name']}.weight"].astype(np.int16) + _ZERO_POINT
        weight = weight.astype(np.uint8)
        return self._constant(weight.T if transpose else weight, f"{node['name']}.weight")

    def _biased(self, node: dict, sums: str, shape: tuple[int, ...]) -> str:
        bias = self.tensors.get(f"{node['name']}.bias")
        if bias is None:
            return sums
        constant = self._constant(bias.astype(np.int32).reshape(shape), f"{node['name']}.bias")
        return self._op("Add", [sums, constant], f"{node['name']}/biased")

    def _accumulators(self, node: dict, sums: str, x: _Value, shape: tuple[int | None, ...]) -> _Value:
        lengths = x.fraction_length + np.asarray(node["weight_fraction_length"]).squeeze()
        return _Value(sums, lengths, shape, signed=True, codes=False)

    # ---- shifts ----

    def _int32(self, value: _Value) -> str:
        """The integers themselves as int32."""
        if not value.codes:
            return value.name
        if not value.int32:
            value.int32 = self._op("Cast", [value.name], f"{value.name}/int32", to=self.types.INT32)
            if value.offset:
                zero_point = self._constant(np.int32(value.offset))
                value.int32 = self._op("Sub", [value.int32, zero_point], f"{value.name}/integers")
        return value.int32

    def _sum(self, name: str, a: _Value, b: _Value) -> _Value:
        """a + b at the larger fraction length. The network has proved that neither shift overflows."""
        lengths = np.maximum(a.fraction_length, b.fraction_length)
        left = self._shifted_left(self._int32(a), lengths - a.fraction_length, len(a.shape), f"{name}/aligned_a")
        right = self._shifted_left(self._int32(b), lengths - b.fraction_length, len(b.shape), f"{name}/aligned_b")
        shape = tuple(p if p is not None else q for p, q in zip(a.shape, b.shape, strict=True))
        return _Value(self._op("Add", [left, right], f"{name}/sum"), lengths, shape, signed=True, codes=False)

    def _shifted_left(self, int32: str, shift: np.ndarray, rank: int, name: str) -> str:
        """int32 << shift. BitShift takes unsigned integers only; in two's complement the bits are the same."""
        if not np.any(shift):
            return int32
        bits = self._op("Cast", [int32], f"{name}_bits", to=self.types.UINT32)
        amount = self._constant(_over_channels(shift, rank).astype(np.uint32))
        shifted = self._op("BitShift", [bits, amount], f"{name}_shifted", direction="LEFT")
        return self._op("Cast", [shifted], name, to=self.types.INT32)

    def _written(self, node: dict, value: _Value) -> _Value:
        """What the node writes of its accumulators: themselves, or codes."""
        if node.get("output", "codes") == "accumulators":
            return value
        shift = _over_channels(value.fraction_length - node["fraction_length"], len(value.shape))
        codes = self._requantized(node["name"], value.name, shift, node["signed"], len(value.shape))
        return _Value(codes, np.asarray(node["fraction_length"]), value.shape, node["signed"], True)

    def _requantized(self, name: str, int32: str, shift: np.ndarray, signed: bool, rank: int) -> str:
        """Codes of int32 accumulators, signed ones plus 128.

        Saturation comes first, at 256 steps to each side, so that nothing overflows. Then signed accumulators get 128
        steps more, an even number, which makes them positive and leaves ties to even what they were.
        """
        wide = bool(np.any(shift > _MAX_NARROW_SHIFT))
        integer, natural = (np.int64, np.uint64) if wide else (np.int32, np.uint32)
        right, left = np.maximum(shift, 0), np.minimum(np.maximum(-shift, 0), _MAX_LEFT_SHIFT)
        x = self._op("Cast", [int32], f"{name}/int64", to=self.types.INT64) if wide else int32
        step = np.left_shift(np.ones_like(right, dtype=np.int64), right)
        lowest, highest = (-128 * step, 128 * step) if signed else (0 * step, 256 * step)
        x = self._op("Max", [x, self._constant(lowest.astype(integer))], f"{name}/from_below")
        x = self._op("Min", [x, self._constant(highest.astype(integer))], f"{name}/from_above")
        if np.any(left) and not wide:
            x = self._shifted_left(x, np.squeeze(left), rank, f"{name}/left")
        elif np.any(left):
            raise ValueError(f"export_onnx: expected shifts of {name} to one side, got {shift.min()} to {shift.max()}")
        if signed:  # a left shift has made up to 128 * 2^8 of it
            offset = np.where(left > 0, 128 << _MAX_LEFT_SHIFT, 128 * step)
            x = self._op("Add", [x, self._constant(offset.astype(integer))], f"{name}/positive")
        x = self._op("Cast", [x], f"{name}/natural", to=self.types.UINT64 if wide else self.types.UINT32)
        if np.any(right):
            x = self._rounded(name, x, right, natural)
        if signed and np.any(left):
            excess = np.where(left > 0, (128 << _MAX_LEFT_SHIFT) - 128, 0)
            least = self._constant((excess + 1).astype(natural))
            x = self._op("Max", [x, least], f"{name}/at_least")
            x = self._op("Sub", [x, self._constant(excess.astype(natural))], f"{name}/less_excess")
        elif signed:
            x = self._op("Max", [x, self._constant(np.asarray(1, natural))], f"{name}/at_least")
        x = self._op("Min", [x, self._constant(np.asarray(255, natural))], f"{name}/at_most")
        return self._op("Cast", [x], f"{name}/codes", to=self.types.UINT8)

    def _rounded(self, name: str, x: str, shift: np.ndarray, natural: type) -> str:
        """x >> shift, half to even, of unsigned integers; channels of shift 0 stay."""
        amount = self._constant(shift.astype(natural))
        quotient = self._op("BitShift", [x, amount], f"{name}/quotient", direction="RIGHT")
        odd = self._op("BitwiseAnd", [quotient, self._constant((shift > 0).astype(natural))], f"{name}/odd")
        half = np.where(shift > 0, np.left_shift(np.ones_like(shift), np.maximum(shift, 1) - 1) - 1, 0)
        x = self._op("Add", [x, self._constant(half.astype(natural))], f"{name}/plus_half")
        x = self._op("Add", [x, odd], f"{name}/plus_odd")
        return self._op("BitShift", [x, amount], f"{name}/rounded", direction="RIGHT")

    # ---- writing ----

    def _op(self, op: str, inputs: list[str], output: str, **attributes) -> str:
        name, i = output, 1
        while name in self.used:
            i += 1
            name = f"{output}_{i}"
        self.used.add(name)
        self.nodes.append(self.onnx.helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def _constant(self, value, name: str = "") -> str:
        """The name of an initializer; equal small ones are written once."""
        array = np.ascontiguousarray(value).reshape(np.shape(value))
        name = name or f"constant/{array.dtype}/{'x'.join(map(str, array.shape))}/{array.tobytes().hex()}"
        self.initializers.setdefault(name, array)
        return name


def _over_channels(values: np.ndarray, rank: int) -> np.ndarray:
    """One value per channel so that it broadcasts with [N, C, ...]; rank counts without the batch."""
    values = np.asarray(values, np.int64)
    return values.reshape(()) if values.size == 1 else values.reshape((-1,) + (1,) * (rank - 1))
