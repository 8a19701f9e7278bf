"""fixed_point_quantize, fixed_point_fraction_length, fixed_point_requantize: values and gradients."""

import math
import sys
from pathlib import Path

import pytest
import torch
from reference import fixed_point as reference
from samples.fake_quant import assert_same, in_each_dtype, on_each_device
from samples.fixed_point import FEW, SAMPLES

import quantrain

each = pytest.mark.parametrize("sample", SAMPLES, ids=str)
each_of_few = pytest.mark.parametrize("sample", FEW, ids=str)
each_method = pytest.mark.parametrize("method", ["std", "rms", "mse"])
each_sign = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
INT = torch.int32


def gaussian(sigma, signed, seed=0, size=20000):
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * sigma
    return x if signed else x.relu()


# ---- quantize --------------------------------------------------------------------------------------------------------------


@each
@in_each_dtype
@on_each_device
def test_quantize_equals_the_formula(sample, dtype, device):
    x, lengths = sample.make(device, dtype)
    y = quantrain.fixed_point_quantize(x, lengths, **sample.keywords)
    assert_same(y, reference.quantize(x, lengths, **sample.keywords))
    if x.numel() and sample.layout != "strided":
        assert y.stride() == x.stride()


@each
@in_each_dtype
@on_each_device
def test_gradient_leaves_out_the_end_codes(sample, dtype, device):
    x, lengths = sample.make(device, dtype, seed=1)
    x.requires_grad_()
    y = quantrain.fixed_point_quantize(x, lengths, **sample.keywords)
    assert_same(y, reference.quantize(x.detach(), lengths, **sample.keywords))
    grad_output = torch.randn(y.shape, device=device).to(dtype)
    (grad,) = torch.autograd.grad(y, x, grad_output)
    passes = reference.passes(x.detach(), lengths, **sample.keywords)
    assert_same(grad, torch.where(passes, grad_output, torch.zeros_like(grad_output)))


def test_the_estimator_is_strict():
    # In steps of 1/2: the unclamped codes 126, 127 and 128, -126 and -127; unsigned 0, 1, 254 and 255.
    x = torch.tensor([63.0, 63.5, 64.0, -63.0, -63.5], requires_grad=True)
    quantrain.fixed_point_quantize(x, 1).sum().backward()
    assert x.grad.tolist() == [1, 0, 0, 1, 0]
    x = torch.tensor([0.25, 0.2, 0.26, 127.0, 127.5, -1.0], requires_grad=True)
    y = quantrain.fixed_point_quantize(x, 1, signed=False)
    assert y.tolist() == [0.0, 0.0, 0.5, 127.0, 127.5, 0.0]
    y.sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 0, 0]


@in_each_dtype
@on_each_device
def test_nan_stays_and_infinity_saturates(dtype, device):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.5], device=device, dtype=dtype, requires_grad=True)
    y = quantrain.fixed_point_quantize(x, 2, word_length=4)
    assert torch.isnan(y[0])
    assert y[1:].tolist() == [1.75, -1.75, 0.5]
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert grad.tolist() == [0, 0, 0, 1]


def test_second_derivative_has_the_same_mask():
    x = torch.tensor([0.3, 500.0], requires_grad=True)
    y = quantrain.fixed_point_quantize(x, 3)
    (grad,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert second.tolist() == [2.0, 0.0]


def test_a_power_of_two_is_a_scale():
    x, _ = SAMPLES[0].make()
    expected = quantrain.fake_quantize(x, torch.tensor([2.0**-5]), quant_min=-127, quant_max=127)
    assert_same(quantrain.fixed_point_quantize(x, 5), expected)


def test_quantizing_again_changes_nothing():
    for sample in SAMPLES:
        x, lengths = sample.make()
        y = quantrain.fixed_point_quantize(x, lengths, **sample.keywords)
        assert_same(quantrain.fixed_point_quantize(y, lengths, **sample.keywords), y)


def test_axis_takes_a_vector():
    x = torch.randn(3, 5, 4)
    lengths = torch.tensor([0, 2, 4, 6, 7], dtype=INT)
    assert_same(
        quantrain.fixed_point_quantize(x, lengths, axis=1), quantrain.fixed_point_quantize(x, lengths.view(1, 5, 1))
    )


# ---- fraction length -------------------------------------------------------------------------------------------------------

# F8Net's thresholds: the standard deviation up to which each fraction length is taken.
SIGNED = {7: 0.3125, 6: 0.625, 5: 1.25, 4: 2.5, 3: 5.0, 2: 10.0, 1: 20.0}
UNSIGNED = {8: 0.2734375, 7: 0.546875, 6: 1.09375, 5: 2.1875, 4: 4.375, 3: 8.75, 2: 17.5, 1: 35.0}


def with_deviation(sigma):
    """Three numbers whose unbiased standard deviation is exactly sigma, and not 0 on average."""
    return torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float32) * sigma + sigma


@each_sign
@on_each_device
def test_thresholds_of_the_paper(signed, device):
    for length, sigma in (SIGNED if signed else UNSIGNED).items():
        at = with_deviation(sigma).to(device)
        past = with_deviation(sigma * (1 + 2**-20)).to(device)
        assert quantrain.fixed_point_fraction_length(at, signed=signed).tolist() == [length]
        assert quantrain.fixed_point_fraction_length(past, signed=signed).tolist() == [length - 1]


@each_sign
@pytest.mark.parametrize("word_length", range(2, 17))
def test_thresholds_of_every_word_length(word_length, signed):
    longest = word_length - signed
    for length in range(1, longest + 1):
        threshold = reference.constant("rms", word_length, signed) / 2**length
        x = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]) * torch.tensor(
            [[threshold * (1 - 1e-6)], [threshold * (1 + 1e-6)]]
        )
        lengths = quantrain.fixed_point_fraction_length(x, axis=0, word_length=word_length, signed=signed, method="rms")
        assert lengths.flatten().tolist() == [length, length - 1]


@each_sign
def test_std_and_rms_find_the_least_error_of_a_gaussian(signed):
    # A quarter of an octave or more from the thresholds, which the sampling then cannot move past.
    for quarter in (q for q in range(-8, 32) if q % 4):
        sigma = (40 if signed else 70) / 2 ** (7 - quarter / 4)
        before, x = gaussian(sigma, True, seed=quarter + 8), gaussian(sigma, signed, seed=quarter + 8)
        errors = reference.squared_errors(x, 8, signed)
        expected = [errors.index(min(errors))]
        assert quantrain.fixed_point_fraction_length(before, signed=signed).tolist() == expected
        assert quantrain.fixed_point_fraction_length(x, signed=signed, method="rms").tolist() == expected
        assert quantrain.fixed_point_fraction_length(x, signed=signed, method="mse").tolist() == expected


@each
@each_method
@in_each_dtype
@on_each_device
def test_fraction_length_equals_the_formula(sample, method, dtype, device):
    x, _ = sample.make(device, dtype, seed=2)
    keywords = dict(method=method, **sample.keywords)
    axes = [None] if not sample.shape else [None, *range(len(sample.shape))]
    for axis in axes if sample in FEW else axes[:2]:
        # A group's own magnitude, so that the answers differ.
        scale = torch.ones(()) if axis is None else torch.exp2(-torch.arange(x.shape[axis]).double() % 9)
        scale = scale if axis is None else scale.view([-1 if d == axis else 1 for d in range(x.dim())])
        scaled = (x * scale.to(device)).to(dtype) if axis is not None else x
        actual = quantrain.fixed_point_fraction_length(scaled, axis=axis, **keywords)
        assert_same(actual.cpu(), reference.fraction_length(scaled.cpu(), axis, **keywords))


def test_negative_axis():
    x = torch.randn(3, 4) * torch.tensor([1.0, 4.0, 16.0, 64.0])
    expected = quantrain.fixed_point_fraction_length(x, axis=1)
    assert expected.shape == (1, 4)
    assert_same(quantrain.fixed_point_fraction_length(x, axis=-1), expected)


def test_a_channels_last_weight_is_read_in_place():
    weight = torch.randn(6, 8, 3, 3) * torch.exp2(torch.arange(6.0)).view(6, 1, 1, 1)
    last = weight.contiguous(memory_format=torch.channels_last)
    for method in ("std", "mse"):
        expected = quantrain.fixed_point_fraction_length(weight, axis=0, method=method)
        assert_same(quantrain.fixed_point_fraction_length(last, axis=0, method=method), expected)


@each_method
@each_sign
@on_each_device
def test_edges_of_the_fraction_length(method, signed, device):
    def length(values, **keywords):
        x = torch.tensor(values, device=device, dtype=torch.float32)
        return quantrain.fixed_point_fraction_length(x, signed=signed, method=method, **keywords).tolist()

    longest = 8 - signed
    assert length([0.0, 0.0]) == [longest]
    assert length([]) == [longest]
    assert length([1.0, math.nan]) == [0]
    assert length([math.nan]) == [0]
    assert length([1.0, math.inf]) == [0]
    assert length([-math.inf]) == [0]
    if method != "mse":  # no fraction length changes such an error, and ties go to the longest
        assert length([3e38, -3e38, 1.0]) == [0]
    if method == "std":
        assert length([1e10]) == [longest]
        assert length([1e10] * 10000) == [longest]
        assert length([3.3e38] * 5) == [longest]
    empty = torch.empty(3, 0, device=device)
    assert (
        quantrain.fixed_point_fraction_length(empty, axis=0, method=method, signed=signed).tolist() == [[longest]] * 3
    )
    assert quantrain.fixed_point_fraction_length(empty, axis=1, method=method, signed=signed).shape == (1, 0)


def test_the_deviation_of_a_distant_tensor():
    # The sum of squares alone would lose it: 1e6 beside 0.5.
    x = with_deviation(0.5).double().repeat(3000) + 1e6
    assert quantrain.fixed_point_fraction_length(x.float()).tolist() == [6]


def test_ties_go_to_the_longer_fraction():
    assert quantrain.fixed_point_fraction_length(torch.tensor([0.5, 1.0]), method="mse").tolist() == [6]
    assert quantrain.fixed_point_fraction_length(torch.tensor([1e-4]), method="mse").tolist() == [7]


@each_method
@on_each_device
def test_hysteresis_keeps_the_previous_length(method, device):
    def length(factor, previous, hysteresis):
        x = (torch.tensor([-1.0, 1.0] * 500) * 1.25 * factor).to(device)
        if method == "mse":
            x = gaussian(1.226 * factor, True).to(device)
        previous = torch.tensor([previous], dtype=INT, device=device)
        return quantrain.fixed_point_fraction_length(x, method=method, previous=previous, hysteresis=hysteresis).item()

    # 1.25 is the threshold of 5 and 4. A fifth of an octave is a factor of 1.15.
    assert length(0.9, 4, 0.0) == 5 and length(1.1, 5, 0.0) == 4
    if method == "mse":  # near the threshold the errors are alike; 2 octaves from it they are not
        assert length(0.98, 4, 0.5) == 4 and length(1.02, 5, 0.5) == 5
        assert length(0.2, 4, 0.5) == 7 and length(5.0, 5, 0.5) == 2
    else:
        assert length(0.9, 4, 0.2) == 4 and length(1.1, 5, 0.2) == 5
        assert length(0.8, 4, 0.2) == 5 and length(1.2, 5, 0.2) == 4
        assert length(0.9, 5, 0.2) == 5 and length(1.1, 4, 0.2) == 4
        assert length(0.9, 3, 0.2) == 5 and length(1.1, 7, 0.2) == 4  # past a nearer threshold: the answer itself


def test_hysteresis_of_each_channel():
    x = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]) * torch.tensor([[1.1], [1.1]])
    previous = torch.tensor([[4], [6]], dtype=INT)
    lengths = quantrain.fixed_point_fraction_length(x, axis=0, method="rms", previous=previous, hysteresis=0.3)
    assert lengths.tolist() == [[4], [5]]


def test_constants_are_those_of_the_integral():
    sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks" / "fits"))
    try:
        import fixed_point_constants
    finally:
        sys.path.pop(0)
    for word_length in (2, 4, 8, 10):
        assert fixed_point_constants.constant(word_length, True) == pytest.approx(
            reference.GAUSSIAN[word_length - 2], rel=1e-5
        )
        assert fixed_point_constants.constant(word_length, False) == pytest.approx(
            reference.GAUSSIAN[word_length - 1], rel=1e-5
        )
    # The optima that sampling finds.
    assert fixed_point_constants.constant(8, True) == pytest.approx(39.4, rel=0.01)
    assert fixed_point_constants.constant(8, False) == pytest.approx(72.0, rel=0.01)


# ---- requantize ------------------------------------------------------------------------------------------------------------


@each
@each_sign
@on_each_device
def test_requantize_equals_the_published_shifts(sample, signed, device):
    accumulator, lengths = sample.make_accumulator(device)
    for fraction_length in (0, 3, 7):
        codes = quantrain.fixed_point_requantize(accumulator, lengths, fraction_length, signed=signed)
        assert_same(codes, reference.requantize(accumulator, lengths, fraction_length, signed))
        if accumulator.numel() and sample.layout != "strided":
            assert codes.stride() == accumulator.stride()


@each_sign
@pytest.mark.parametrize(("accumulator_length", "length"), [(14, 5), (9, 8), (6, 6), (3, 7)])
@on_each_device
def test_requantize_equals_quantization_of_the_real_number(signed, accumulator_length, length, device):
    if signed and length == 8:
        length = 7
    g = torch.Generator().manual_seed(length)
    accumulator = torch.randint(-(2**20), 2**20, (200000,), generator=g, dtype=INT)
    small = torch.randint(-2000, 2000, (20000,), generator=g, dtype=INT)
    accumulator = torch.cat([accumulator, small]).to(device)
    codes = quantrain.fixed_point_requantize(accumulator, accumulator_length, length, signed=signed)
    real = accumulator.double() / 2**accumulator_length
    expected = reference.quantize(real, torch.tensor([length], device=device), signed=signed) * 2**length
    assert_same(codes, expected.to(codes.dtype))
    # The simulated quantizer gives the same codes: float32 holds these accumulators exactly.
    simulated = quantrain.fixed_point_quantize(real.float(), length, signed=signed) * 2**length
    assert_same(codes, simulated.to(codes.dtype))


@on_each_device
def test_requantize_saturates_without_overflow(device):
    accumulator = torch.tensor([-(2**31), 2**31 - 1, -(2**31) + 1, 1, -1, 0], dtype=INT, device=device)
    for accumulator_length in range(32):
        for length in range(8):
            lengths = torch.tensor([accumulator_length], dtype=INT, device=device)
            codes = quantrain.fixed_point_requantize(accumulator, lengths, length)
            assert_same(codes, reference.requantize(accumulator, lengths, length))


def test_rounds_half_to_even():
    accumulator = torch.tensor([-24, -16, -8, -4, 4, 8, 12, 16, 24, 40], dtype=INT)
    assert quantrain.fixed_point_requantize(accumulator, 4, 0).tolist() == [-2, -1, 0, 0, 0, 0, 1, 1, 2, 2]


# ---- CPU and CUDA ----------------------------------------------------------------------------------------------------------


@each
@in_each_dtype
@pytest.mark.cuda
def test_cpu_and_cuda_agree_bit_for_bit(sample, dtype):
    x, lengths = sample.make("cpu", dtype, seed=3)
    accumulator, accumulator_lengths = sample.make_accumulator("cpu", seed=3)
    results = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        y = quantrain.fixed_point_quantize(leaf, lengths.to(device), **sample.keywords)
        (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        codes = quantrain.fixed_point_requantize(accumulator.to(device), accumulator_lengths.to(device), 5)
        chosen = [
            quantrain.fixed_point_fraction_length(leaf.detach(), method=method, **sample.keywords)
            for method in ("std", "rms", "mse")
        ]
        results.append([t.detach().cpu().contiguous() for t in (y, grad, codes, *chosen)])
    for on_cpu, on_cuda in zip(*results, strict=True):
        assert torch.equal(on_cpu.reshape(-1).view(torch.uint8), on_cuda.reshape(-1).view(torch.uint8))


@pytest.mark.cuda
def test_nothing_waits_for_the_device():
    x = torch.randn(64, 128, device="cuda", requires_grad=True)
    previous = torch.full((64, 1), 3, dtype=INT, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for method in ("std", "rms", "mse"):
            lengths = quantrain.fixed_point_fraction_length(x, axis=0, method=method, previous=previous, hysteresis=0.1)
        quantrain.fixed_point_quantize(x, lengths).sum().backward()
        quantrain.fixed_point_quantize(x, 5)
        quantrain.fixed_point_requantize(x.detach().int(), 9, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("too little memory")
    accumulator = torch.ones(2**31 + 5, dtype=INT, device="cuda")
    accumulator[-1] = 1000
    codes = quantrain.fixed_point_requantize(accumulator, 5, 5)
    assert codes[-2:].tolist() == [1, 127]
