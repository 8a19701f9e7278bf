"""The layers in fixed point on a GPU: the bits of the CPU, for every kernel and shape."""

import itertools

import pytest
import torch

import quantrain  # noqa: F401  loads the operators

pytestmark = pytest.mark.cuda
ops = torch.ops.quantrain

# n, c, h, w, o, kernel, stride, padding, groups
SHAPES = [
    (2, 3, 33, 31, 64, (7, 7), (2, 2), (3, 3), 1), (2, 3, 16, 16, 16, (3, 3), (1, 1), (1, 1), 1),
    (3, 1, 28, 28, 20, (5, 5), (1, 1), (0, 0), 1), (2, 20, 13, 11, 40, (3, 3), (1, 1), (1, 1), 1),
    (2, 100, 9, 7, 33, (3, 3), (1, 1), (1, 1), 1), (2, 16, 15, 17, 16, (3, 3), (1, 1), (1, 1), 1),
    (2, 48, 14, 14, 80, (3, 3), (2, 2), (1, 1), 1), (4, 64, 8, 8, 10, (1, 1), (1, 1), (0, 0), 1),
    (130, 512, 1, 1, 100, (1, 1), (1, 1), (0, 0), 1), (2, 80, 12, 10, 144, (1, 3), (2, 1), (0, 2), 1),
    (2, 256, 7, 7, 272, (2, 3), (1, 2), (1, 0), 1), (2, 32, 14, 14, 32, (3, 3), (1, 1), (1, 1), 32),
    (2, 64, 15, 13, 64, (3, 3), (2, 2), (1, 1), 64), (2, 7, 9, 9, 7, (3, 3), (1, 1), (1, 1), 7),
    (2, 32, 9, 9, 64, (3, 3), (1, 1), (1, 1), 4), (2, 6, 9, 9, 12, (3, 3), (1, 1), (1, 1), 6),
    (1, 16, 1, 1, 16, (3, 3), (1, 1), (1, 1), 1), (2, 64, 28, 28, 256, (1, 1), (2, 2), (0, 0), 1),
]  # fmt: skip
KERNELS = [
    "wgmma_128x128x128", "wgmma_128x128x64", "wgmma_128x64x128", "wgmma_128x64x64", "wgmma_64x128x128",
    "128x256x64", "128x128x128", "128x128x64", "128x64x128", "128x64x64", "64x64x128", "64x64x64", "gather", "depthwise", "plain",
]  # fmt: skip
RESIDUALS = [None, torch.uint8, torch.int8, torch.int32]
RANGES = {torch.uint8: (0, 256), torch.int8: (-127, 128), torch.int32: (-(2**17), 2**17)}


def codes(shape, dtype, g):
    return torch.randint(*RANGES[dtype], shape, dtype=dtype, generator=g)


def operands(shape, signed_input, residual, channels, seed=0):
    n, c, h, w, o, (kh, kw), (sh, sw), (ph, pw), groups = shape
    g = torch.Generator().manual_seed(seed)
    oh, ow = (h + 2 * ph - kh) // sh + 1, (w + 2 * pw - kw) // sw + 1
    many = o if channels else 1
    tensors = [
        codes((n, c, h, w), torch.int8 if signed_input else torch.uint8, g),
        codes((o, c // groups, kh, kw), torch.int8, g),
        torch.randint(-5000, 5000, (o,), dtype=torch.int32, generator=g),
        torch.randint(7, 14, (many,), dtype=torch.int32, generator=g),
        None if residual is None else codes((n, o, oh, ow), residual, g),
        None if residual is None else torch.randint(-3, 8, (many,), dtype=torch.int32, generator=g),
    ]
    return tensors, {"stride": [sh, sw], "padding": [ph, pw], "groups": groups}


def on_cuda(tensors):
    return [None if t is None else t.cuda() for t in tensors]


def assert_equal(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_those_of_the_cpu(shape):
    for signed_input, signed, channels, residual in itertools.product((False, True), (False, True), (False, True), RESIDUALS):  # fmt: skip
        tensors, where = operands(shape, signed_input, residual, channels)
        expected = ops.fixed_point_conv2d_requantize(*tensors, signed=signed, **where)
        assert_equal(ops.fixed_point_conv2d_requantize(*on_cuda(tensors), signed=signed, **where), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_those_of_the_cpu(shape):
    for signed_input, biased in itertools.product((False, True), repeat=2):
        (x, weight, bias, *_), where = operands(shape, signed_input, None, True)
        tensors = [x, weight, bias if biased else None]
        assert_equal(ops.fixed_point_conv2d(*on_cuda(tensors), **where), ops.fixed_point_conv2d(*tensors, **where))


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel(kernel, monkeypatch):
    if kernel.startswith("wgmma") and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")
    served = 0
    for shape, residual in itertools.product(SHAPES, RESIDUALS):
        tensors, where = operands(shape, False, residual, True, seed=1)
        monkeypatch.delenv("QUANTRAIN_CUDA_FIXED_POINT_CONV", raising=False)
        expected = ops.fixed_point_conv2d_requantize(*tensors, **where)
        monkeypatch.setenv("QUANTRAIN_CUDA_FIXED_POINT_CONV", kernel)
        try:
            found = ops.fixed_point_conv2d_requantize(*on_cuda(tensors), **where)
        except RuntimeError:  # it does not serve the shape
            continue
        served += 1
        assert_equal(found, expected)
    assert served >= 8


def test_shifts_of_every_size():
    """Left shifts, none, those whose half needs more than 32 bits, and ties."""
    shape = (1, 16, 4, 4, 64, (1, 1), (1, 1), (0, 0), 1)
    for signed_input, signed in itertools.product((False, True), repeat=2):
        tensors, where = operands(shape, signed_input, None, True)
        tensors[3] = torch.arange(-31, 33, dtype=torch.int32).clamp(max=31)
        tensors[2] = torch.randint(-(2**31) + 2**20, 2**31 - 2**20, (64,), dtype=torch.int32)
        expected = ops.fixed_point_conv2d_requantize(*tensors, signed=signed, **where)
        assert_equal(ops.fixed_point_conv2d_requantize(*on_cuda(tensors), signed=signed, **where), expected)
        tensors[1] = tensors[1].sign() * 2  # few values: many ties
        tensors[2] = torch.zeros(64, dtype=torch.int32)
        tensors[3] = torch.full((1,), 3, dtype=torch.int32)
        expected = ops.fixed_point_conv2d_requantize(*tensors, signed=signed, **where)
        assert_equal(ops.fixed_point_conv2d_requantize(*on_cuda(tensors), signed=signed, **where), expected)


def test_memory_off_a_vectors_boundary():
    shape = (2, 16, 9, 9, 32, (3, 3), (1, 1), (1, 1), 1)
    tensors, where = operands(shape, False, torch.uint8, True)
    expected = ops.fixed_point_conv2d_requantize(*tensors, **where)
    for which in (0, 1, 4):
        moved = on_cuda(tensors)
        t = moved[which].permute(0, 2, 3, 1).contiguous()
        buffer = torch.zeros(t.numel() + 1, dtype=t.dtype, device="cuda")
        buffer[1:] = t.flatten()
        moved[which] = buffer[1:].view(t.shape).permute(0, 3, 1, 2)
        assert_equal(ops.fixed_point_conv2d_requantize(*moved, **where), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
def test_pools(dtype):
    g = torch.Generator().manual_seed(0)
    for shape in ((2, 64, 14, 14), (3, 20, 9, 7), (2, 3, 8, 8), (1, 1, 5, 5), (5, 2048, 7, 7), (2, 130, 1, 1)):
        x = codes(shape, dtype, g)
        assert_equal(ops.fixed_point_sum_pool2d(x.cuda()), ops.fixed_point_sum_pool2d(x))
        for kernel, stride, padding in (((3, 3), (2, 2), (1, 1)), ((2, 2), (2, 2), (0, 0)), ((1, 1), (1, 1), (0, 0))):
            if shape[2] < kernel[0]:
                continue
            expected = ops.fixed_point_max_pool2d(x, kernel, stride, padding)
            assert_equal(ops.fixed_point_max_pool2d(x.cuda(), kernel, stride, padding), expected)


def test_addition():
    g = torch.Generator().manual_seed(0)
    for a_type, b_type in itertools.product(RANGES, repeat=2):
        a, b = codes((2, 6, 5, 3), a_type, g), codes((2, 6, 5, 3), b_type, g)
        for a_fl, b_fl in itertools.product((0, 5, 15, 30), repeat=2):
            lengths = [torch.tensor([a_fl], dtype=torch.int32), torch.tensor([b_fl], dtype=torch.int32)]
            expected = ops.fixed_point_add(a, b, *lengths)
            assert_equal(ops.fixed_point_add(*on_cuda([a, b, *lengths])), expected)
    lengths = [torch.arange(6, dtype=torch.int32).view(1, 6, 1, 1), torch.tensor([3], dtype=torch.int32)]
    assert_equal(ops.fixed_point_add(*on_cuda([a, b, *lengths])), ops.fixed_point_add(a, b, *lengths))


def test_the_same_bits_each_time_and_under_a_graph():
    tensors, where = operands((8, 64, 28, 28, 64, (3, 3), (1, 1), (1, 1), 1), False, torch.uint8, True)
    tensors = on_cuda(tensors)
    first = ops.fixed_point_conv2d_requantize(*tensors, **where)
    for _ in range(20):
        assert torch.equal(ops.fixed_point_conv2d_requantize(*tensors, **where), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.fixed_point_conv2d_requantize(*tensors, **where)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, first)
