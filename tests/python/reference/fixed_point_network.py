"""The integer network of the fixed_point family in int64 NumPy: a graph's meaning, node by node. Nothing here imports quantrain.

A value is a code (or an int32 accumulator) times 2^-fraction_length; the fraction length is one number, or one a channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


@dataclass
class Value:
    """Integers [N, C, H, W] or [N, C], and their fraction length: an int64 array of shape () or [C]."""

    data: np.ndarray
    fraction_length: np.ndarray
    signed: bool = True
    codes: bool = True

    def aligned_fraction_length(self) -> np.ndarray:
        """One that broadcasts with the data."""
        return over_channels(self.fraction_length, self.data.ndim)


def over_channels(values, rank: int) -> np.ndarray:
    values = np.asarray(values, dtype=np.int64)
    return values.reshape(()) if values.size == 1 else values.reshape((1, -1) + (1,) * (rank - 2))


def code_range(signed: bool) -> tuple[int, int]:
    return (-127, 127) if signed else (0, 255)


def shift_round(accumulator, shift) -> np.ndarray:
    """accumulator * 2^-shift, half to even: an arithmetic shift to the right, or an exact one to the left where shift <= 0."""
    accumulator, shift = np.broadcast_arrays(np.asarray(accumulator, np.int64), np.asarray(shift, np.int64))
    n = np.maximum(shift, 0)
    quotient = accumulator >> n
    twice_rest, one = 2 * (accumulator - (quotient << n)), np.int64(1) << n
    up = (twice_rest > one) | ((twice_rest == one) & (quotient % 2 == 1))
    return np.where(shift > 0, quotient + up, accumulator << np.maximum(-shift, 0))


def requantize(accumulator, shift, signed: bool) -> np.ndarray:
    """The 8-bit codes of accumulators; shift = their fraction length less the codes'."""
    return np.clip(shift_round(accumulator, shift), *code_range(signed))


def int32(name: str, data: np.ndarray) -> np.ndarray:
    """The data itself: a valid network's accumulators, aligned or not, fit 32 bits."""
    if data.size and (data.min() < INT32_MIN or data.max() > INT32_MAX):
        raise OverflowError(f"{name}: an accumulator of {data.min()}..{data.max()} does not fit int32")
    return data


def align(name: str, a: Value, b: Value) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both operands of an addition at the larger fraction length, and that length."""
    larger = np.maximum(a.aligned_fraction_length(), b.aligned_fraction_length())
    left = int32(name, a.data << (larger - a.aligned_fraction_length()))
    right = int32(name, b.data << (larger - b.aligned_fraction_length()))
    return left, right, larger.reshape(-1) if larger.size > 1 else larger.reshape(())


def convolve(x: np.ndarray, weight: np.ndarray, stride, padding, groups: int) -> np.ndarray:
    """[N, C, H, W] * [O, C / groups, kh, kw]. In float64, whose sums are exact below 2^53: int32 sums are."""
    (n, c, h, w), (o, _, kh, kw) = x.shape, weight.shape
    oh, ow = (h + 2 * padding[0] - kh) // stride[0] + 1, (w + 2 * padding[1] - kw) // stride[1] + 1
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    kernels = weight.astype(np.float64).reshape(groups, o // groups, c // groups, kh, kw)
    result = np.zeros((n, groups, o // groups, oh * ow))
    for i in range(kh):
        for j in range(kw):
            rows = slice(i, i + stride[0] * (oh - 1) + 1, stride[0])
            columns = slice(j, j + stride[1] * (ow - 1) + 1, stride[1])
            pixels = padded[:, :, rows, columns].reshape(n, groups, c // groups, oh * ow)
            result += kernels[:, :, :, i, j] @ pixels
    return result.reshape(n, o, oh, ow).astype(np.int64)


def requantized_or_not(node: dict, accumulator: np.ndarray, fraction_length: np.ndarray) -> Value:
    """What a node writes: its accumulators, or codes made of them."""
    if node.get("output", "codes") == "accumulators":
        return Value(accumulator, fraction_length, signed=True, codes=False)
    shift = over_channels(fraction_length, accumulator.ndim) - node["fraction_length"]
    codes = requantize(accumulator, shift, node["signed"])
    return Value(codes, np.asarray(node["fraction_length"], np.int64), node["signed"])


def multiply(node: dict, inputs: list[Value], tensors: dict[str, np.ndarray]) -> Value:
    """conv2d and linear, with the addition of a residual."""
    name, x = node["name"], inputs[0]
    weight = tensors[f"{name}.weight"]
    if node["op"] == "conv2d":
        data = convolve(x.data, weight, node["stride"], node["padding"], node["groups"])
    else:
        data = convolve(x.data[:, :, None, None], weight[:, :, None, None], (1, 1), (0, 0), 1)[:, :, 0, 0]
    if f"{name}.bias" in tensors:
        data = data + over_channels(tensors[f"{name}.bias"], data.ndim)
    weight_fraction_length = np.asarray(node["weight_fraction_length"], np.int64).squeeze()
    accumulator = Value(int32(name, data), x.fraction_length + weight_fraction_length, codes=False)
    if len(inputs) == 1:
        return requantized_or_not(node, accumulator.data, accumulator.fraction_length)
    left, right, fraction_length = align(name, accumulator, inputs[1])
    return requantized_or_not(node, int32(name, left + right), fraction_length)


def add(node: dict, a: Value, b: Value) -> Value:
    left, right, fraction_length = align(node["name"], a, b)
    return requantized_or_not(node, np.clip(left + right, INT32_MIN, INT32_MAX), fraction_length)


def slice_pad(node: dict, x: Value) -> Value:
    data = x.data[:, :, :: node["stride"][0], :: node["stride"][1]]
    before, after = node["pad"]
    data = np.pad(data, ((0, 0), (before, after), (0, 0), (0, 0)))
    return Value(data, x.fraction_length, x.signed, x.codes)


def max_pool2d(node: dict, x: Value) -> Value:
    (kh, kw), (sh, sw), (ph, pw) = node["kernel"], node["stride"], node["padding"]
    padded = np.pad(x.data, ((0, 0), (0, 0), (ph, ph), (pw, pw)), constant_values=INT32_MIN)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kh, kw), axis=(2, 3))
    return Value(windows[:, :, ::sh, ::sw].max((4, 5)), x.fraction_length, x.signed, x.codes)


def avg_pool2d(node: dict, x: Value) -> Value:
    if list(x.data.shape[2:]) != list(node["size"]):
        raise ValueError(f"{node['name']}: expected an image of {node['size']}, got {x.data.shape[2:]}")
    total = int32(node["name"], x.data.sum((2, 3), keepdims=True))
    return requantized_or_not({"signed": x.signed, **node}, total, x.fraction_length + node["shift"])


def flatten(x: Value) -> Value:
    pixels = int(np.prod(x.data.shape[2:]))
    fraction_length = np.repeat(x.fraction_length, pixels) if x.fraction_length.size > 1 else x.fraction_length
    return Value(x.data.reshape(len(x.data), -1), fraction_length, x.signed, x.codes)


def evaluate(node: dict, inputs: list[Value], tensors: dict[str, np.ndarray]) -> Value:
    op = node["op"]
    if op in ("conv2d", "linear"):
        return multiply(node, inputs, tensors)
    if op == "add":
        return add(node, *inputs)
    if op == "slice_pad":
        return slice_pad(node, *inputs)
    if op == "max_pool2d":
        return max_pool2d(node, *inputs)
    if op == "avg_pool2d":
        return avg_pool2d(node, *inputs)
    if op == "flatten":
        return flatten(*inputs)
    raise ValueError(f"{node['name']}: no op {op}")


def input_value(graph: dict, codes) -> Value:
    description = graph["input"]
    data = np.asarray(codes).astype(np.int64)
    low, high = code_range(description["signed"])
    if data.size and (data.min() < low or data.max() > high):
        raise ValueError(f"expected codes of {low}..{high}, got {data.min()}..{data.max()}")
    return Value(data, np.asarray(description["fraction_length"], np.int64), description["signed"])


def run_values(graph: dict, tensors: dict, codes) -> dict[str, Value]:
    """Every node's value and the input's, by name. Tensors and codes are NumPy arrays or CPU tensors."""
    arrays = {name: np.asarray(tensor).astype(np.int64) for name, tensor in tensors.items()}
    values = {graph["input"]["name"]: input_value(graph, codes)}
    for node in graph["nodes"]:
        values[node["name"]] = evaluate(node, [values[name] for name in node["inputs"]], arrays)
    return values


def run(graph: dict, tensors: dict, codes) -> dict[str, np.ndarray]:
    """Every node's integers (int64) by name, for input codes [N, C, H, W]."""
    values = run_values(graph, tensors, codes)
    return {node["name"]: values[node["name"]].data for node in graph["nodes"]}
