"""choose_qparams, quantize, dequantize, packed 4-bit codes, and the ranges that observers use."""

import math

import pytest
import torch
from reference import fake_quant as reference
from samples.fake_quant import FEW, NOT_EMPTY, SAMPLES, Sample, assert_same, each, in_each_dtype, on_each_device

import quantrain

ops = torch.ops.quantrain


def code_dtype(sample):
    if sample.quant_min >= 0:
        return torch.uint8 if sample.quant_max <= 255 else torch.int32
    return torch.int8 if sample.quant_min >= -128 else torch.int16


@each(NOT_EMPTY)
@in_each_dtype
@on_each_device
@pytest.mark.parametrize("symmetric", [True, False])
def test_choose_qparams_equals_the_formula(sample, dtype, device, symmetric):
    x, _, _ = sample.make(device, dtype)
    shape = list(sample.scale_shape)
    scale, zero_point = quantrain.choose_qparams(x, shape, symmetric=symmetric, **sample.range)
    expected_scale, expected_zero_point = reference.choose_qparams(x, shape, symmetric=symmetric, **sample.range)
    # The reference divides in float64: one rounding to float32 apart.
    torch.testing.assert_close(scale, expected_scale, rtol=2e-7, atol=0)
    assert_same(zero_point, expected_zero_point)


@each(NOT_EMPTY)
@on_each_device
def test_min_max_is_exact(sample, device):
    x, _, _ = sample.make(device)
    low, high = ops._min_max(x, list(sample.scale_shape))
    rows = reference.groups(x, sample.scale_shape)
    assert_same(low, rows.amin(1).reshape(sample.scale_shape))
    assert_same(high, rows.amax(1).reshape(sample.scale_shape))


@on_each_device
@pytest.mark.parametrize("shape", [(4, 50), (4, 20000), (4, 3)])
def test_nan_makes_its_groups_range_nan(device, shape):
    x = torch.randn(shape, device=device)
    x[1, -1] = math.nan
    x[3] = 0
    scale, _ = quantrain.choose_qparams(x, [4, 1])
    assert torch.isnan(scale).flatten().tolist() == [False, True, False, False]
    assert scale[3].item() == 1
    low, high = ops._min_max(x, [1, 1])
    assert torch.isnan(low).all() and torch.isnan(high).all()


@on_each_device
def test_tiny_and_huge_ranges_stay_usable(device):
    x = torch.tensor([[1e-40, -1e-41], [3e38, -3e38], [0.0, 0.0]], device=device)
    for symmetric in (True, False):
        scale, _ = quantrain.choose_qparams(x, [3, 1], symmetric=symmetric)
        assert torch.isfinite(scale).all() and torch.isfinite(1 / scale).all() and (scale > 0).all()


@each(SAMPLES)
@in_each_dtype
@on_each_device
def test_codes_come_back_as_the_fake_quantized_value(sample, dtype, device):
    x, scale, zero_point = sample.make(device, dtype)
    codes = quantrain.quantize(x, scale, zero_point, dtype=code_dtype(sample), **sample.range)
    assert codes.dtype == code_dtype(sample)
    if x.numel():
        assert codes.min() >= sample.quant_min and codes.max() <= sample.quant_max
    expected = reference.unclamped_code(x, scale, zero_point).clamp(sample.quant_min, sample.quant_max)
    assert_same(codes.double(), expected.double())
    y = quantrain.dequantize(codes, scale, zero_point, dtype=dtype)
    assert_same(y, quantrain.fake_quantize(x, scale, zero_point, **sample.range))


@on_each_device
def test_quantize_nan_and_infinity(device):
    x = torch.tensor([math.nan, math.inf, -math.inf], device=device)
    zero_point = torch.tensor([3], dtype=torch.int32, device=device)
    assert quantrain.quantize(x, torch.tensor([0.1], device=device), zero_point).tolist() == [3, 127, -128]


@on_each_device
@in_each_dtype
def test_stochastic_rounding_is_unbiased(device, dtype):
    """z-test of the mean over 40,000 draws a value at 16 fractions, the block's largest element among them.

    The standard error is at most 0.5 / sqrt(40000) = 0.0025 steps. Limit 5 standard errors: a false alarm in 1 of 100,000 runs
    of this test (16 values, two-sided 5.7e-7 each).
    """
    draws = 40000
    values = torch.cat([torch.linspace(-7.9, 6.9, 15), torch.tensor([127.0])]).to(dtype).to(device)
    scale = torch.tensor([1.0], device=device)
    codes = ops.quantize.seeded(values.repeat(draws, 1), scale, seed=1234, offset=0).float()
    low = torch.floor(values.float())
    fraction = values.float() - low
    error = codes.mean(0) - values.float()
    standard = (fraction * (1 - fraction) / draws).sqrt()
    assert ((codes >= low) & (codes <= low + 1)).all()
    assert (error.abs() <= 5 * standard + 2**-24).all()


def test_seeded_bits_depend_on_seed_offset_and_index_alone():
    x = torch.rand(5000)
    scale = torch.tensor([1.0])
    codes = ops.quantize.seeded(x, scale, seed=3, offset=8)
    assert torch.equal(codes, ops.quantize.seeded(x, scale, seed=3, offset=8))
    assert torch.equal(codes[:3], ops.quantize.seeded(x[:3], scale, seed=3, offset=8))
    assert not torch.equal(codes, ops.quantize.seeded(x, scale, seed=4, offset=8))
    assert not torch.equal(codes, ops.quantize.seeded(x, scale, seed=3, offset=12))


def test_philox_known_answer():
    # Random123's known-answer test of philox4x32-10: counter and key all ones give 408f276d 41c83b0e a20bc7c6 6d5451fd.
    # Its first word, as a 24-bit fraction, decides the rounding of element 4 * (2^64 - 1); counter 0 and key 0 give 6627e8d5 for
    # element 0, e169c58d for element 1, bc57ac4c for element 2, 9b00dbd8 for element 3.
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    fractions = torch.tensor([(w >> 8) / 2**24 for w in words])
    one = torch.tensor([1.0])
    above = ops.quantize.seeded(fractions + 2**-24, one, seed=0, offset=0)
    at = ops.quantize.seeded(fractions, one, seed=0, offset=0)
    assert above.tolist() == [1, 1, 1, 1] and at.tolist() == [0, 0, 0, 0]


def test_generator_rules():
    x, scale = torch.rand(1000), torch.tensor([1.0])
    torch.manual_seed(0)
    first, second = (quantrain.quantize(x, scale, stochastic=True) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, quantrain.quantize(x, scale, stochastic=True))
    own = torch.Generator().manual_seed(0)
    assert torch.equal(first, quantrain.quantize(x, scale, stochastic=True, generator=own))


@each(FEW)
@pytest.mark.cuda
def test_codes_agree_on_cpu_and_cuda(sample):
    x, scale, zero_point = sample.make()
    for seeded in (False, True):
        results = []
        for device in ("cpu", "cuda"):
            args = (x.to(device), scale.to(device), None if zero_point is None else zero_point.to(device))
            kwargs = dict(dtype=code_dtype(sample), **sample.range)
            if seeded:
                results.append(ops.quantize.seeded(*args, **kwargs, seed=11, offset=4).cpu())
            else:
                results.append(ops.quantize(*args, **kwargs).cpu())
        assert torch.equal(*results)
    scales = [quantrain.choose_qparams(x.to(d), list(sample.scale_shape), **sample.range) for d in ("cpu", "cuda")]
    assert torch.equal(scales[0][0], scales[1][0].cpu()) and torch.equal(scales[0][1], scales[1][1].cpu())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(6,), (7,), (3, 8), (3, 5), (2, 3, 1), (4, 0)])
@on_each_device
def test_int4_round_trip(shape, signed, device):
    low, high = (-8, 8) if signed else (0, 16)
    codes = torch.randint(low, high, shape, dtype=torch.int8 if signed else torch.uint8, device=device)
    packed = quantrain.pack_int4(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], (shape[-1] + 1) // 2)
    assert_same(quantrain.unpack_int4(packed, size=shape[-1], signed=signed), codes)


@each([s for s in NOT_EMPTY if s.quant_max - s.quant_min > 1 and max(s.shape, default=1) < 1000])
@on_each_device
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_range_has_the_least_error(sample, device, symmetric):
    x, _, _ = sample.make(device, seed=7)
    steps, shape = 20, list(sample.scale_shape)
    low, high = ops._mse_range(x, shape, symmetric=symmetric, steps=steps, **sample.range)
    errors = reference.mse_ratio_errors(x, shape, sample.quant_min, sample.quant_max, symmetric, steps)
    full_low, full_high = (t.flatten() for t in ops._min_max(x, shape))
    ratio = torch.where(full_high.abs() > full_low.abs(), high.flatten() / full_high, low.flatten() / full_low)
    chosen = (ratio * steps).round().long().clamp(1, steps) - 1
    chosen = torch.where(torch.isnan(ratio), torch.full_like(chosen, steps - 1), chosen)
    found = errors.gather(0, chosen.unsqueeze(0)).squeeze(0)
    # Sums of squares in float32 against float64: near-ties may fall either way.
    assert (found <= errors.amin(0) * (1 + 1e-4) + 1e-9).all()


def test_qparams_from_range_widens_affine_to_zero():
    scale, zero_point = ops._qparams_from_range(
        torch.tensor([2.0, -4.0]), torch.tensor([5.1, -1.0]), quant_min=0, quant_max=255, symmetric=False
    )
    torch.testing.assert_close(scale, torch.tensor([5.1 / 255, 4.0 / 255]))
    assert zero_point.tolist() == [0, 255]


def test_int4_range_of_weights_uses_seven_steps():
    scale, zero_point = quantrain.choose_qparams(torch.tensor([3.5, -1.0]), [1], quant_min=-8, quant_max=7)
    assert scale.item() == 0.5 and zero_point.item() == 0


def test_sample_names_are_unique():
    assert len({s.name for s in SAMPLES}) == len(SAMPLES) and isinstance(SAMPLES[0], Sample)
