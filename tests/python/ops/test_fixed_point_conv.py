"""The operators of the family fixed_point_conv: equal to int64 arithmetic bit for bit, on every path, and what they refuse."""

import doctest
import functools
import re
from dataclasses import dataclass

import pytest
import torch
from reference import fixed_point_conv as reference
from torch.library import opcheck

import quantrain
import quantrain.fixed_point

ops = torch.ops.quantrain
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
PATHS = ["", "plain", "avx2", "avx512", "avx_vnni", "avx512_vnni"]


def draw(shape, low, high, dtype, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@dataclass(frozen=True)
class Sample:
    name: str
    n: int
    c: int
    h: int
    w: int
    o: int
    kernel: tuple = (3, 3)
    stride: tuple = (1, 1)
    padding: tuple = (1, 1)
    groups: int = 1
    signed: bool = False

    def make(self, device="cpu"):
        low, high, dtype = (-128, 128, torch.int8) if self.signed else (0, 256, torch.uint8)
        x = draw((self.n, self.c, self.h, self.w), low, high, dtype).contiguous(memory_format=torch.channels_last)
        w = draw((self.o, self.c // self.groups, *self.kernel), -128, 128, torch.int8, 1)
        bias = draw((self.o,), -100000, 100000, torch.int32, 2)
        return x.to(device), w.to(device), bias.to(device)

    @property
    def options(self):
        return dict(stride=self.stride, padding=self.padding, groups=self.groups)

    def __str__(self):
        return self.name


SAMPLES = [
    Sample("resnet20_1", 2, 16, 32, 32, 16),
    Sample("resnet20_2", 2, 16, 32, 32, 32, stride=(2, 2)),
    Sample("resnet20_3", 3, 64, 8, 8, 64),
    Sample("resnet18_14", 1, 64, 14, 14, 64),
    Sample("resnet18_7", 3, 96, 7, 7, 48),
    Sample("deep", 1, 512, 7, 7, 80),
    Sample("first", 2, 3, 32, 32, 16),
    Sample("first_signed", 2, 3, 33, 31, 16, signed=True),
    Sample("first_7x7", 1, 3, 40, 40, 64, (7, 7), (2, 2), (3, 3)),
    Sample("one_channel", 1, 1, 28, 28, 6, (5, 5), padding=(2, 2)),
    Sample("pointwise", 2, 64, 9, 9, 48, (1, 1), padding=(0, 0)),
    Sample("pointwise_odd", 2, 30, 5, 3, 17, (1, 1), padding=(0, 0)),
    Sample("pointwise_signed", 1, 32, 11, 11, 33, (1, 1), padding=(0, 0), signed=True),
    Sample("pointwise_strided", 2, 64, 8, 8, 128, (1, 1), (2, 2), (0, 0)),
    Sample("pointwise_113", 1, 8, 113, 1, 16, (1, 1), padding=(0, 0)),
    # A stride larger than the kernel, and an image of several bands of the CPU's cache: ResNet's downsamples.
    Sample("downsample", 1, 64, 56, 56, 64, (1, 1), (2, 2), (0, 0)),
    Sample("downsample_signed", 1, 128, 28, 28, 48, (1, 1), (2, 2), (0, 0), signed=True),
    Sample("downsample_padded", 2, 48, 57, 55, 16, (1, 1), (3, 2), (1, 1)),
    Sample("leaping", 1, 40, 61, 64, 17, (2, 2), (5, 3), (1, 0), signed=True),
    Sample("valid", 1, 32, 10, 12, 32, padding=(0, 0)),
    Sample("valid_small", 1, 8, 4, 5, 16, padding=(0, 0)),
    Sample("odd", 2, 5, 9, 13, 7, (3, 2), (2, 3), (1, 0)),
    Sample("odd_signed", 1, 7, 6, 4, 33, (2, 5), (1, 2), (2, 2), signed=True),
    Sample("one_pixel", 1, 40, 1, 1, 70, (1, 1), padding=(0, 0)),
    Sample("wide_padding", 1, 4, 3, 3, 5, (5, 5), padding=(4, 4)),
    Sample("depthwise", 2, 64, 9, 9, 64, groups=64),
    Sample("depthwise_strided", 1, 72, 8, 7, 72, stride=(2, 2), groups=72),
    Sample("depthwise_signed", 1, 33, 7, 5, 33, (5, 5), padding=(2, 2), groups=33, signed=True),
    Sample("grouped", 2, 12, 6, 6, 8, groups=4),
    Sample("grouped_signed", 1, 8, 5, 5, 16, groups=2, signed=True),
    Sample("multiplier", 1, 6, 5, 5, 12, groups=6),
]
each = pytest.mark.parametrize("sample", SAMPLES, ids=str)


def set_path(monkeypatch, path):
    monkeypatch.setenv("QUANTRAIN_CPU_INT8", path)
    try:
        quantrain.fixed_point_linear(torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int8))
    except ValueError:
        pytest.skip(f"this processor lacks {path}")


@functools.cache
def expectations(sample):
    """Sums, and codes for every kind of shift and residual."""
    x, w, bias = sample.make()
    sums = reference.conv2d(x, w, bias, sample.stride, sample.padding, sample.groups)
    o = sample.o
    shifts = (ints(9), draw((o,), 7, 12, torch.int32, 8), draw((o,), -31, 32, torch.int32, 9), ints(0))
    residuals = [
        (None, None),
        (draw(sums.shape, 0, 256, torch.uint8, 3), ints(6)),
        (draw(sums.shape, -127, 128, torch.int8, 4), draw((o,), 0, 9, torch.int32, 5)),
        (draw(sums.shape, -127, 128, torch.int8, 4), draw((o,), -4, 5, torch.int32, 5)),
        (draw(sums.shape, -(2**20), 2**20, torch.int32, 6), draw((o,), -3, 4, torch.int32, 7)),
        (draw(sums.shape, -(2**20), 2**20, torch.int32, 6), draw((o,), 0, 4, torch.int32, 7)),
        (draw(sums.shape, -(2**30), 2**30, torch.int32, 6), draw((o,), -31, 32, torch.int32, 7)),
    ]
    arguments = [
        (shift, *residual, signed)
        for i, shift in enumerate(shifts)
        for j, residual in enumerate(residuals)
        for signed in ((False, True) if i == 1 else (bool((i + j) % 2),))
    ]
    return sums, [(a, reference.requantize(sums, *a)) for a in arguments]


def check(sample, device):
    x, w, bias = sample.make(device)
    sums, cases = expectations(sample)
    found = ops.fixed_point_conv2d(x, w, bias, **sample.options)
    assert found.dtype == torch.int32 and found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found.cpu(), sums.int())
    no_bias = ops.fixed_point_conv2d(x, w, None, **sample.options)
    assert torch.equal(no_bias.cpu(), (sums - bias.cpu().long().view(1, -1, 1, 1)).int())
    for (*tensors, signed), expected in cases:
        shift, residual, residual_shift = (t if t is None else t.to(device) for t in tensors)
        found = ops.fixed_point_conv2d_requantize(
            x, w, bias, shift, residual, residual_shift, **sample.options, signed=signed
        )
        assert found.dtype == expected.dtype and found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found.cpu(), expected), tensors


@each
@on_each_device
def test_convolutions_equal_int64(sample, device):
    check(sample, device)


@pytest.mark.parametrize("path", PATHS[1:])
@each
def test_every_cpu_path(sample, path, monkeypatch):
    set_path(monkeypatch, path)
    check(sample, "cpu")


def test_cpu_paths_are_named(monkeypatch):
    monkeypatch.setenv("QUANTRAIN_CPU_INT8", "abacus")
    with pytest.raises(
        ValueError, match="expected QUANTRAIN_CPU_INT8 to name a path that this processor has, got abacus"
    ):
        quantrain.fixed_point_linear(torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int8))


@on_each_device
def test_halves_go_to_even_and_ends_saturate(device):
    sums = torch.arange(-1200, 1200, dtype=torch.int32)
    weight, x = torch.zeros(len(sums), 1, 1, 1, dtype=torch.int8), torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    for n in range(-31, 32):
        for signed in (False, True):
            args = [t.to(device) for t in (x, weight, sums, ints(n))]
            found = ops.fixed_point_conv2d_requantize(*args, signed=signed).cpu().flatten()
            exact = (sums.double() * 2.0**-n).round()  # half to even
            assert torch.equal(found.double(), exact.clamp(-127 if signed else 0, 127 if signed else 255))
    ends = torch.tensor([2**31 - 1, -(2**31), 2**31 - 2, 2**30, -(2**30)], dtype=torch.int32)
    weight = torch.zeros(len(ends), 1, 1, 1, dtype=torch.int8)
    for n in range(-31, 32):
        args = [t.to(device) for t in (x, weight, ends, ints(n))]
        found = ops.fixed_point_conv2d_requantize(*args, signed=True).cpu().flatten()
        assert torch.equal(found.double(), (ends.double() * 2.0**-n).round().clamp(-127, 127))


@on_each_device
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed", "expanded"])
def test_any_strides(layout, device):
    make = {
        "contiguous": lambda t: t.contiguous(),
        "sliced": lambda t: torch.cat([t, t], 3)[..., ::2],
        "transposed": lambda t: t.transpose(2, 3),
        "expanded": lambda t: t[:1].expand(2, -1, -1, -1),
    }[layout]
    x, w, bias = SAMPLES[0].make(device)
    x, w = make(x), w.flip(0).transpose(2, 3)
    sums = reference.conv2d(x.cpu(), w.cpu(), bias.cpu(), (1, 1), (1, 1), 1)
    assert torch.equal(ops.fixed_point_conv2d(x, w, bias, padding=(1, 1)).cpu().long(), sums)
    residual = draw(sums.shape, 0, 256, torch.uint8, 3).to(device)
    shift = draw((32,), 3, 12, torch.int32).to(device)[::2]
    found = ops.fixed_point_conv2d_requantize(x, w, bias, shift, residual, shift, padding=(1, 1))
    assert torch.equal(found.cpu(), reference.requantize(sums, shift.cpu(), residual.cpu(), shift.cpu(), False))


@on_each_device
def test_linear(device):
    for shape, o in [((5, 512), 10), ((1, 512), 1000), ((2, 3, 17), 33), ((7,), 4), ((130, 3), 5)]:
        for dtype, low, high in [(torch.uint8, 0, 256), (torch.int8, -128, 128)]:
            x, w = draw(shape, low, high, dtype), draw((o, shape[-1]), -128, 128, torch.int8, 1)
            bias = draw((o,), -1000, 1000, torch.int32, 2)
            expected = (x.double() @ w.double().t() + bias).int()
            assert torch.equal(ops.fixed_point_linear(x.to(device), w.to(device), bias.to(device)).cpu(), expected)


@on_each_device
def test_add(device):
    shape = (2, 6, 5, 3)
    operands = [
        draw(shape, 0, 256, torch.uint8),
        draw(shape, -127, 128, torch.int8, 1),
        draw(shape, -(2**31), 2**31, torch.int32, 2).contiguous(memory_format=torch.channels_last),
    ]
    lengths = [ints(5), ints(12), draw((1, 6, 1, 1), 0, 15, torch.int32, 3)]
    for a in operands:
        for b in operands:
            for a_fl in lengths:
                for b_fl in lengths:
                    found = ops.fixed_point_add(*[t.to(device) for t in (a, b, a_fl, b_fl)])
                    assert torch.equal(found.cpu(), reference.add(a, b, a_fl, b_fl))
    a, b = operands[0].flatten(), operands[1].flatten()
    found = ops.fixed_point_add(*[t.to(device) for t in (a, b, ints(3), ints(1))])
    assert torch.equal(found.cpu(), reference.add(a, b, ints(3), ints(1)))


@on_each_device
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
def test_pools(dtype, device):
    low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
    for shape in [(2, 64, 16, 16), (1, 5, 7, 9), (3, 130, 8, 8)]:
        x = draw(shape, low, high, dtype)
        for setting in [((3, 3), (2, 2), (1, 1)), ((2, 2), (2, 2), (0, 0)), ((3, 2), (1, 3), (0, 1))]:
            found = ops.fixed_point_max_pool2d(x.to(device), *setting)
            assert found.dtype == dtype
            assert torch.equal(found.cpu(), reference.max_pool2d(x, *setting))
        assert torch.equal(ops.fixed_point_sum_pool2d(x.to(device)).cpu(), reference.sum_pool2d(x))


@on_each_device
@pytest.mark.parametrize("sizes", [(9, 0), (0, 6), (0, 0)])
@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (4, 1), (8, 8), (16, 1), (64, 1)])
def test_an_image_without_pixels_gives_the_bias(channels, groups, sizes, device):
    x = torch.empty(2, channels, *sizes, dtype=torch.uint8, device=device)
    w = torch.ones(channels, channels // groups, 2, 2, dtype=torch.int8, device=device)
    b = torch.arange(channels, dtype=torch.int32, device=device)
    y = ops.fixed_point_conv2d(x, w, b, padding=[2, 2], groups=groups)
    assert y.shape == (2, channels, sizes[0] + 3, sizes[1] + 3)
    assert torch.equal(y, b.view(1, -1, 1, 1).expand_as(y))


@on_each_device
def test_empty(device):
    x, w, bias = (t.to(device) for t in SAMPLES[0].make())
    assert ops.fixed_point_conv2d(x[:0], w, bias, padding=(1, 1)).shape == (0, 16, 32, 32)
    assert ops.fixed_point_conv2d(x, w[:0]).shape == (2, 0, 30, 30)
    assert torch.equal(ops.fixed_point_conv2d(x[:, :0], w[:, :0], bias)[0, :, 0, 0], bias)
    assert ops.fixed_point_linear(x[:0, :, 0, 0], w[:, :, 0, 0]).shape == (0, 16)
    assert ops.fixed_point_max_pool2d(x[:0], 2, 2).shape == (0, 16, 16, 16)
    assert ops.fixed_point_sum_pool2d(x[:0]).shape == (0, 16, 1, 1)


def test_results_do_not_depend_on_threads():
    x, w, bias = Sample("", 4, 64, 28, 28, 64).make()
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(ops.fixed_point_conv2d_requantize(x, w, bias, ints(9), padding=(1, 1)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@on_each_device
def test_opcheck(device):
    x, w, bias = Sample("", 2, 8, 6, 5, 4).make(device)
    shift = ints(9).to(device)
    residual = torch.zeros(2, 4, 6, 5, dtype=torch.uint8, device=device)
    opcheck(ops.fixed_point_conv2d, (x, w, bias), dict(padding=(1, 1)))
    opcheck(ops.fixed_point_conv2d_requantize, (x, w, bias, shift), dict(stride=(2, 1), signed=True))
    opcheck(ops.fixed_point_conv2d_requantize, (x, w, None, shift, residual, shift), dict(padding=(1, 1)))
    opcheck(ops.fixed_point_linear, (x[:, :, 0, 0], w[:, :, 0, 0], bias))
    opcheck(ops.fixed_point_add, (x, x, shift, shift))
    opcheck(ops.fixed_point_max_pool2d, (x, (3, 3), (2, 2), (1, 1)))
    opcheck(ops.fixed_point_sum_pool2d, (x,))


def block(x, w, bias, shift):
    y = ops.fixed_point_conv2d_requantize(x, w, bias, shift, x, shift, padding=(1, 1))
    y = ops.fixed_point_max_pool2d(y, 3, 2, 1)
    sums = ops.fixed_point_conv2d(y, w, bias, padding=(1, 1))
    total = ops.fixed_point_add(sums, y, shift, shift)
    return total, ops.fixed_point_linear(y.flatten(1)[:, :8], w[:, :, 0, 0]), ops.fixed_point_sum_pool2d(y)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    _, w, bias = Sample("", 2, 8, 6, 5, 8).make()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for h, w_size in [(6, 5), (9, 7)]:
        x, _, _ = Sample("", 2, 8, h, w_size, 8).make()
        for found, expected in zip(compiled(x, w, bias, ints(9)), block(x, w, bias, ints(9)), strict=True):
            assert torch.equal(found, expected)
            assert found.stride() == expected.stride()


X, W, BIAS = Sample("", 2, 8, 6, 5, 4).make()
S = ints(9)
R = torch.zeros(2, 4, 6, 5, dtype=torch.uint8)
CONV, LAST = ops.fixed_point_conv2d, ops.fixed_point_conv2d_requantize
REFUSED = [
    (TypeError, "conv2d: expected uint8 or int8 codes, got float32", CONV, (X.float(), W)),
    (TypeError, "conv2d: expected uint8 or int8 codes, got Int", CONV, (X.int(), W)),
    (TypeError, "conv2d: expected weight of int8, got Byte", CONV, (X, W.to(torch.uint8))),
    (TypeError, "conv2d: expected bias of int32, got Float", CONV, (X, W, BIAS.float())),
    (ValueError, "conv2d: expected bias of weight's dimension 0, got [3] and [4, 8, 3, 3]", CONV, (X, W, BIAS[:3])),
    (ValueError, "conv2d: expected input [N, C, H, W], got [8, 6, 5]", CONV, (X[0], W)),
    (ValueError, "conv2d: expected weight [O, C / groups, KH, KW], got [4, 8, 3]", CONV, (X, W[..., 0])),
    (ValueError, "conv2d: expected input of C channels for weight", CONV, (X[:, :7], W)),
    (ValueError, "conv2d: expected input of C channels for weight", CONV, (X, W), dict(groups=2)),
    (ValueError, "conv2d: expected stride of at least 1, got 0", CONV, (X, W), dict(stride=(0, 1))),
    (ValueError, "conv2d: expected padding of at least 0, got -1", CONV, (X, W), dict(padding=(0, -1))),
    (ValueError, "conv2d: expected a kernel of at least 1 that fits the padded input, got 3 and 2", CONV, (X[:, :, :2], W)),
    (TypeError, "requantize: expected uint8 or int8 codes, got float32", LAST, (X.float(), W, None, S)),
    (TypeError, "requantize: expected shift of an integer type, got Float", LAST, (X, W, None, S.float())),
    (ValueError, "requantize: expected shift of one element or 4, got [3]", LAST, (X, W, None, ints(1, 2, 3))),
    (ValueError, "requantize: expected residual and residual_shift together, got residual alone", LAST, (X, W, None, S, R)),
    (TypeError, "requantize: expected residual of uint8, int8 or int32, got Float", LAST, (X, W, None, S, R.float(), S), dict(padding=(1, 1))),
    (ValueError, "requantize: expected residual of the result's shape [2, 4, 4, 3], got [2, 4, 6, 5]", LAST, (X, W, None, S, R, S)),
    (TypeError, "linear: expected uint8 or int8 codes, got float32", ops.fixed_point_linear, (X.float(), W[0, :, :, 0])),
    (ValueError, "linear: expected input [..., K] for weight [O, K], got [2, 8, 6, 5] and [4, 8]", ops.fixed_point_linear, (X, W[:, :, 0, 0])),
    (TypeError, "add: expected a and b of uint8, int8 or int32, got Float", ops.fixed_point_add, (X, X.float(), S, S)),
    (ValueError, "add: expected a and b of one shape, got [2, 8, 6, 5] and [1, 8, 6, 5]", ops.fixed_point_add, (X, X[:1], S, S)),
    (ValueError, "add: expected a_fraction_length of one element or of one along a single dimension", ops.fixed_point_add, (X, X, ints(1, 2), S)),
    (TypeError, "max_pool2d: expected uint8 or int8 codes, got float32", ops.fixed_point_max_pool2d, (X.float(), 2, 2)),
    (ValueError, "max_pool2d: expected padding of at most half the kernel, got [2, 2] and [3, 3]", ops.fixed_point_max_pool2d, (X, 3, 2, 2)),
    (TypeError, "sum_pool2d: expected uint8 or int8 codes, got float32", ops.fixed_point_sum_pool2d, (X.float(),)),
]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[1])
def test_what_is_refused(case, device):
    error, message, op, args, *keywords = case
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    with pytest.raises(error, match=re.escape(message)):
        op(*args, **(keywords[0] if keywords else {}))


def test_shifts_out_of_range_are_refused_on_cpu():
    for shift in (ints(32), ints(1, -32, 3, 4)):
        with pytest.raises(ValueError, match=re.escape("expected shift in [-31, 31], got ")):
            ops.fixed_point_conv2d_requantize(X, W, None, shift)


def test_examples():
    assert doctest.testmod(quantrain.fixed_point).failed == 0
    for name in ("conv2d", "conv2d_requantize", "linear", "add", "max_pool2d", "sum_pool2d"):
        assert getattr(quantrain, f"fixed_point_{name}").__doc__
