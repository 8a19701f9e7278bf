"""What a case is drawn from: shapes, layouts, element types, values, scales and ranges, all from one seeded generator.

A case is a pure function of (operator, seed, number). Values come from pools that are made once per process, so that a
case costs little more than the operator itself.
"""

import random
import sys
import zlib
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

torch.set_num_threads(1)  # before anything runs: a process whose threads have run cannot be forked

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (1, 2, 3, 4, 4, 5, 7, 8, 12, 12, 16, 20, 20, 28, 28, 32, 33, 33, 48, 64, 70)
NAN, INF = float("nan"), float("inf")
# Ties, ends of types, denormals and signed zeros.
SPECIAL = (
    NAN,
    INF,
    -INF,
    0.0,
    -0.0,
    1e-45,
    -1e-40,
    1.17549435e-38,
    65504.0,
    -65520.0,
    3.3e38,
    -3.3e38,
    0.5,
    1.5,
    2.5,
    -2.5,
)
FINITE = tuple(value for value in SPECIAL if abs(value) < INF)
VALUES = (
    "normal",
    "normal",
    "normal",
    "normal",
    "heavy",
    "ties",
    "special",
    "finite",
    "zero",
    "constant",
    "subnormal",
    "huge",
)

_POOL = 1 << 20
_generator = torch.Generator().manual_seed(20261127)
_normal = torch.randn(_POOL, generator=_generator)
_halves = torch.randint(-40, 41, (_POOL,), generator=_generator).float() / 2
_bits = torch.randint(-(2**31), 2**31, (_POOL,), generator=_generator, dtype=torch.int64)


class Mismatch(Exception):
    """What the operator gave is not what it should have given."""


class Draw(random.Random):
    """The choices of one case. `device` is what runs beside the CPU: "cpu" or "cuda"."""

    def __init__(self, op, seed, case, device="cpu"):
        super().__init__((zlib.crc32(op.encode()) << 96) ^ (seed << 40) ^ case)
        self.device = device
        self.tags = set()  # what a list of known faults goes by
        self.notes = {}  # what a mismatch prints

    @property
    def devices(self):
        return ("cpu",) if self.device == "cpu" else ("cpu", self.device)

    def chance(self, probability):
        return self.random() < probability

    # ---- shapes ----

    def size(self):
        return self.choice(SIZES) if self.random() < 0.7 else self.randint(1, 70)

    def shape(self, low=0, high=5, cap=None, empty=0.02):
        """Of `low` to `high` dimensions and at most `cap` elements; sometimes empty."""
        rank = min(max(self.choice((0, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 5)), low), high)
        shape = [self.size() for _ in range(rank)]
        cap = cap or self.choice((300, 300, 2000, 2000, 6000, 30000))
        while _product(shape) > cap:
            at = self.randrange(rank)
            shape[at] = max(1, shape[at] // self.randint(2, 5)) if self.random() < 0.5 else self.choice((1, 2, 3, 4))
        if rank and self.random() < empty:
            shape[self.randrange(rank)] = 0
        return shape

    def scale_shape(self, shape):
        """Every granularity: one element in several ranks, or sizes that divide."""
        if self.random() < 0.2 or not shape:
            return self.choice(([1], [], [1] * len(shape)))
        if self.random() < 0.5:  # one dimension
            at = self.randrange(len(shape))
            return [self._divisor(n) if d == at else 1 for d, n in enumerate(shape)]
        return [self.choice((1, n, self._divisor(n))) for n in shape]

    def _divisor(self, n):
        if n == 0:
            return self.choice((1, 0))
        return n if self.random() < 0.5 else self.choice([k for k in range(1, n + 1) if n % k == 0])

    # ---- layouts ----

    def layout(self, shape, expanded=True):
        """(strides, offset, elements of storage): permuted, channels-last, sliced, expanded, unaligned."""
        rank, kind = len(shape), self.random()
        order = list(range(rank))
        if kind > 0.35 and rank > 1:
            if rank in (4, 5) and self.random() < 0.5:
                order = [0, *range(2, rank), 1]
            else:
                self.shuffle(order)
        gaps = kind > 0.7
        strides, span = [0] * rank, 1
        for d in reversed(order):
            if gaps and expanded and self.random() < 0.15:
                continue  # expanded: the stride is 0
            step = self.choice((1, 1, 2, 3)) if gaps else 1
            strides[d] = span * step
            span *= max(shape[d], 1) * step + (self.choice((0, 0, 1, 3)) if gaps else 0)
        if span > _POOL // 8:
            return self.layout(shape, expanded)  # too many gaps: another one
        offset = self.choice((0, 0, 0, 1, 2, 3, 5, 8))
        return strides, offset, span + offset

    def place(self, values, shape, layout):
        """The storage `values` seen under a layout."""
        strides, offset, _ = layout
        return values.as_strided(shape, strides, offset)

    # ---- values ----

    def dtype(self):
        return self.choice(FLOATS)

    def values(self, n, kind):
        """float32 [n], a tensor of its own."""
        if kind in ("zero", "constant"):
            return torch.full((n,), 0.0 if kind == "zero" else self.choice((1.0, -3.25, 0.37, 1e-3)))
        pool = _halves if kind == "ties" else _normal
        at = self.randrange(_POOL - n)
        result = pool[at : at + n].clone()
        if kind == "heavy":
            result.pow_(3)
        elif kind == "subnormal":
            result.mul_(2.0**-130)
        elif kind == "huge":
            result.mul_(1e37)
        elif kind in ("special", "finite"):
            these = SPECIAL if kind == "special" else FINITE
            for _ in range(self.randint(1, 6)):
                result[self.randrange(n)] = self.choice(these)
        elif kind == "normal":
            result.mul_(2.0 ** self.randint(-4, 4))
        return result

    def tensor(self, shape, dtype=torch.float32, kind=None, expanded=True):
        """A floating-point tensor of a drawn layout."""
        layout = self.layout(shape, expanded)
        return self.place(self.values(layout[2], kind or self.choice(VALUES)).to(dtype), shape, layout)

    def integers(self, shape, low, high, dtype, expanded=True):
        """Integers of [low, high] in a drawn layout."""
        layout = self.layout(shape, expanded)
        n, at = layout[2], self.randrange(_POOL // 2)
        values = _bits[at : at + n].remainder(high - low + 1).add_(low).to(dtype)
        return self.place(values, shape, layout)

    def range(self, low=2):
        """(quant_min, quant_max) of `low` to 16 bits: signed, narrow, unsigned or anything between."""
        bits, kind = self.choice((low, 3, 4, 4, 5, 8, 8, 8, 8, 12, 16, self.randint(low, 16))), self.random()
        half = 2 ** (bits - 1)
        if kind < 0.4:
            return -half, half - 1
        if kind < 0.6:
            return -half + 1, half - 1
        if kind < 0.85:
            return 0, 2 * half - 1
        width = self.randint(1, 2 * half - 1)
        least = self.randint(max(-32768, -half), half - width)
        return least, least + width

    def scale(self, scale_shape, quant_min, quant_max):
        """Positive float32, about a tenth of normal elements saturating; sometimes powers of two, sometimes extreme."""
        layout = self.layout(scale_shape)
        n, at, kind = layout[2], self.randrange(_POOL // 2), self.random()
        spread = _normal[at : at + n].abs().add_(0.3) if kind < 0.7 else torch.ones(n)
        steps = max(1, (quant_max - quant_min) / 2)
        base = 2.0 ** self.randint(-8, 3) if kind > 0.8 else 1.6 / steps
        if self.random() < 0.03:
            base = self.choice((1e-38, 1e-30, 1e30, 2.0**-149))
        return self.place(spread.mul_(base).clamp_(min=2.0**-149, max=3e38), scale_shape, layout)

    # ---- devices ----

    def on(self, device, tensor):
        """The tensor on a device, with its strides and its offset."""
        if tensor is None or device == "cpu":
            return tensor
        flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        return flat.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _product(sizes):
    result = 1
    for size in sizes:
        result *= size
    return result


def in_memory(dense):
    """[n]: the elements of a dense tensor in the order of memory, a view."""
    return dense.as_strided((dense.numel(),), (1,))


def named(dtype):
    """What the operators without ScalarType arguments take."""
    return str(dtype).removeprefix("torch.")


# ---- comparisons ----


def describe(tensor):
    if tensor is None:
        return "None"
    where = f"strides {tuple(tensor.stride())}" if tensor.layout == torch.strided else str(tensor.layout)
    device = "" if tensor.device.type == "cpu" else f" on {tensor.device.type}"
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} {where}{device}"


def check(condition, message):
    if not condition:
        raise Mismatch(message() if callable(message) else message)


def same(found, expected, what):
    """Equal type, shape and values; NaN equals NaN, and the two zeros are one."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        raise Mismatch(f"{what}: expected {describe(expected)}, got {describe(found)}")
    if found.device != expected.device:
        found = found.cpu()
    if torch.equal(found, expected):
        return
    wrong = found != expected
    if found.is_floating_point():
        wrong &= ~(found.isnan() & expected.isnan())
    if wrong.any():
        _report(found, expected, wrong, what)


def same_bits(found, expected, what):
    """CPU and CUDA, where the same bits are claimed: but for the sign of zero and a NaN's payload, as in all tests."""
    same(found.cpu(), expected, what)


def close(found, expected, room, what):
    """Within `room` (a number or a tensor) of a float64 expectation; NaN and Inf where it has them."""
    found, expected = found.cpu().double(), expected.double()
    if found.shape != expected.shape:
        raise Mismatch(f"{what}: expected shape {list(expected.shape)}, got {list(found.shape)}")
    wrong = ~((found - expected).abs() <= room)
    if wrong.any():
        wrong &= ~((found == expected) | (found.isnan() & expected.isnan()))
        if wrong.any():
            _report(found, expected, wrong, what)


def _report(found, expected, wrong, what):
    index = tuple(wrong.nonzero()[0].tolist())
    raise Mismatch(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} elements of {describe(found)} are wrong, first {list(index)}: "
        f"expected {expected[index].item()!r}, got {found[index].item()!r}"
    )


# ---- the table of drawn tests ----

DRAWN = {}  # name: (function of a Draw, operators that it covers)


def drawn(*covers):
    """Registers a function of a Draw as the drawn test of these operators; the first names it."""

    def register(function):
        DRAWN[covers[0]] = (function, covers)
        return function

    return register
