"""Codes, scales and compressed scales of the four_bit family against the oracle: byte for byte, on each device."""

import hashlib

import pytest
import torch
from reference import four_bit as reference
from samples.four_bit import (
    DIVISORS,
    DTYPES,
    EMPTY,
    FEW,
    FORMATS,
    GOLDEN_BYTES,
    GOLDEN_MSE,
    GOLDEN_SCALE,
    INF,
    NAN,
    RULES,
    SAMPLES,
    SEARCHED,
    SEARCHES,
    WEIGHTS,
    Rule,
    Sample,
    ambiguous,
    assert_bits,
    assert_packed,
    assert_same,
    drawn,
    each,
    each_rule,
    each_weight,
    golden_input,
    golden_linear,
    golden_lora,
    hexadecimal,
    in_each_dtype,
    laid_out,
    numel,
    on_each_device,
    poisoned,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import quantrain

ops = torch.ops.quantrain
on_each_device_and_meta = pytest.mark.parametrize(
    "device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.cuda)]
)
NF4, INT4 = FORMATS[0], Rule("int4")


def quantize(x, rule, block_size=64):
    with poisoned():
        return quantrain.quantize_4bit(x, block_size=block_size, **rule.keywords(x.device))


def read(codes, scale, size, rule, **keywords):
    with poisoned():
        return quantrain.dequantize_4bit(codes, scale, size=size, **rule.reading(codes.device), **keywords)


# ---- the oracle itself: numbers that were computed by others too -----------------------------------------------------


def test_oracle_tables():
    assert_same(
        reference.NF4[[1, 4, 8, 14]],
        torch.tensor([-0.6961928009986877, -0.28444138169288635, 0.07958029955625534, 0.7229568362236023]),
    )
    assert_bits(reference.FP4[:8], torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12)
    assert_bits(reference.E2M1[:8], torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6)
    assert_bits(reference.FP4[8:], -reference.FP4[:8])
    thresholds = [
        -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
        -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
        0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
    ]  # fmt: skip
    assert_same(reference.midpoints(reference.NF4), torch.tensor(thresholds))
    expected = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]
    assert reference.midpoints(reference.FP4[:8].sort().values).tolist() == pytest.approx(expected, rel=2e-6)
    assert reference.FACTORS[0] == torch.tensor(0.8) and reference.FACTORS[16] == 1 and len(reference.FACTORS) == 25


def test_oracle_dynamic_map():
    values = reference.MAP
    assert hashlib.sha256(values.numpy().tobytes()).hexdigest().startswith("e732639a65f497b4")
    assert len(values.unique()) == 256 and values[127] == 0 and values[255] == 1
    exact = values.double()
    assert exact.sum() == 1 and exact.abs().sum().item() == pytest.approx(75.10526317, abs=1e-8)
    assert exact.square().sum().item() == pytest.approx(48.59583767, abs=1e-8)
    assert values[[0, 254]].tolist() == pytest.approx([-0.99296874, 0.99296874])
    expected = [-7.75e-6, -3.25e-6, -5.5e-7, 0, 5.5e-7, 3.25e-6, 7.75e-6, 2.125e-5]
    assert values[124:132].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("format", GOLDEN_BYTES)
def test_oracle_golden_bytes(format):
    x = golden_input()
    codes, scale = reference.quantize(x, 64, format)
    assert hexadecimal(codes) == GOLDEN_BYTES[format]
    assert scale.tolist() == pytest.approx([GOLDEN_SCALE[format]] * 2)
    y = reference.dequantize(codes, scale, (128,), format, block_size=64)
    assert (x - y).double().square().mean().item() == pytest.approx(GOLDEN_MSE[format], abs=5e-9)
    if format == "nf4":
        assert y[:4].tolist() == pytest.approx([-0.78125, -0.22221982, 0.34430456, -0.54390061], abs=5e-9)


def test_oracle_golden_words():
    """The first eight int4 codes as two importers' words."""
    q = reference.unpack(reference.quantize(golden_input(), 64, "int4")[0], 8, "int4")
    signed = torch.where(q > 7, q - 16, q)
    assert signed.tolist() == [-7, -2, 3, -6, 0, 5, -4, 1]
    u = (signed + 8).tolist()
    assert f"{sum(c << 4 * i for i, c in enumerate(u)):08x}" == "94d82b61"
    assert f"{sum(u[column] << 4 * i for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7])):08x}" == "9d2648b1"


def test_oracle_golden_products():
    x, codes, scale = golden_linear()
    w = reference.dequantize(codes, scale, (2, 64), block_size=64)
    g = torch.tensor([1.0, -0.5])
    assert reference.linear(x, w).tolist() == pytest.approx([1.64266209, 0.47782713], abs=5e-9)
    grad_input, _ = reference.linear_gradients(g, w)
    assert grad_input[:4].tolist() == pytest.approx([-0.74568358, -0.44199209, 0.61625487, -0.57498666], abs=5e-9)
    assert grad_input.sum().item() == pytest.approx(0.43860758, abs=5e-9)
    assert grad_input.square().sum().item() == pytest.approx(23.47564681, abs=5e-9)
    a, b, scaling = golden_lora()
    assert reference.lora(x, w, a, b, scaling).tolist() == pytest.approx([1.56941990, 0.10673338], abs=5e-9)
    grad_input, grad_a, grad_b, _ = reference.lora_gradients(g, x, w, a, b, scaling)
    assert grad_input[:4].tolist() == pytest.approx([-0.29255858, -0.52011709, 1.02250487, -0.69998666], abs=5e-9)
    assert grad_a[:, 0].tolist() == [1.875, -0.46875] and grad_a.sum().item() == 1.59375
    assert grad_b.tolist() == [[0.390625, 3.359375], [-0.1953125, -1.6796875]]


def test_oracle_gradients_are_autograds():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    x, w, a, b, bias = draw(2, 3, 8), draw(5, 8), draw(2, 8), draw(5, 2), draw(5)
    mask = (torch.rand(2, 3, 8, generator=g) < 0.7) / 0.7
    leaves = [t.requires_grad_() for t in (x, a, b, bias)]
    y = reference.lora(x, w, a, b, 1.5, bias, mask)
    grad_output = draw(2, 3, 5)
    expected = torch.autograd.grad(y, leaves, grad_output)
    found = reference.lora_gradients(grad_output, x, w, a, b, 1.5, mask)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_oracle_golden_compressed_scales():
    scale = 1 + ((29 * torch.arange(512)) % 64) / 64
    codes, scale_scale, offset = reference.compress_scale(scale)
    assert offset == 1.4921875 and scale_scale.tolist() == [0.4921875] * 2
    assert codes[:16].tolist() == [0, 71, 243, 51, 230, 38, 216, 24, 203, 11, 183, 255, 63, 241, 49, 227]
    decoded = reference.decompress_scale(codes, scale_scale, offset)
    assert (decoded - scale).abs().max().item() == pytest.approx(0.0034607, abs=1e-7)
    assert decoded[:4].tolist() == pytest.approx([1.0034607, 1.45335083, 1.90477906, 1.3564514], abs=1e-7)


def test_oracle_statistics_of_one_seed():
    torch.manual_seed(0)
    x = torch.randn(2**20)
    for format, block_size, expected in (
        ("nf4", 64, 20.7260),
        ("nf4", 128, 20.3931),
        ("fp4", 64, 18.2775),
        ("fp4", 128, 17.8108),
    ):
        codes, scale = reference.quantize(x, block_size, format)
        found = reference.sqnr(x, reference.dequantize(codes, scale, x.shape, format, block_size=block_size))
        assert found == pytest.approx(expected, abs=1e-4)
    codes, scale = reference.quantize(x)
    scale = reference.decompress_scale(*reference.compress_scale(scale))
    assert reference.sqnr(x, reference.dequantize(codes, scale, x.shape, block_size=64)) == pytest.approx(
        20.7232, abs=1e-4
    )


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_oracle_is_bitsandbytes(format):
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="bitsandbytes is not installed: nothing to compare with"
    )
    for shape, block_size in (((16, 128), 64), ((4, 4096), 4096), ((5, 3420), 64), ((3, 65), 64), ((9, 96), 32)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1]))
        theirs, state = functional.quantize_4bit(x, blocksize=block_size, quant_type=format)
        assert_peers(theirs, state, *reference.quantize(x, block_size, format), x.shape, block_size, format)


def assert_peers(theirs, state, codes, scale, size, block_size, format):
    """Bytes are those of bitsandbytes on CPU, but for numbers next to fp4's 0, which get either of its zeros there, and
    for a short last block, where it divides by the scale."""
    n = numel(size)
    assert_same(state.absmax.cpu(), scale.flatten().cpu())
    mine, other = (reference.unpack(t.cpu(), n, format) for t in (codes, theirs))
    if format == "fp4":
        mine, other = mine.where(mine != 8, 0), other.where(other != 8, 0)
    full = n // block_size * block_size
    assert torch.equal(mine[:full], other[:full])
    assert (mine[full:] != other[full:]).sum() <= 1


# ---- quantize --------------------------------------------------------------------------------------------------------


@each(SAMPLES)
@in_each_dtype
@on_each_device
def test_bytes_and_scales_are_the_oracles(sample, dtype, device):
    x = sample.make(device, dtype)
    before = x.clone()
    for rule in RULES:
        expected = reference.quantize(x.cpu(), sample.block_size, **rule.keywords())
        found = quantize(x, rule, sample.block_size)
        assert_packed(found, expected, x.numel(), sample.block_size, rule.format)
    assert_same(x, before)


@each(SEARCHED)
@in_each_dtype
@on_each_device
def test_searched_scales_are_the_oracles(sample, dtype, device):
    x = sample.make(device, dtype)
    for rule in SEARCHES:
        expected = reference.quantize(x.cpu(), sample.block_size, **rule.keywords())
        assert_packed(quantize(x, rule, sample.block_size), expected, x.numel(), sample.block_size, rule.format)


@each(SAMPLES)
@in_each_dtype
@on_each_device
def test_affine_bytes_and_scales_are_the_oracles(sample, dtype, device):
    x = sample.make(device, dtype)
    with poisoned():
        found = quantrain.quantize_4bit_affine(x, block_size=sample.block_size)
    assert found[2].dtype == torch.int32
    expected = reference.quantize_affine(x.cpu(), sample.block_size)
    assert_packed(found, expected, x.numel(), sample.block_size, "uint4")


@each(DIVISORS)
@in_each_dtype
@on_each_device
def test_integers_take_any_even_divisor_of_a_row(sample, dtype, device):
    x = sample.make(device, dtype)
    for rule in (INT4, Rule("int4", "signed"), Rule("int4", "search")):
        expected = reference.quantize(x.cpu(), sample.block_size, **rule.keywords())
        found = quantize(x, rule, sample.block_size)
        assert_packed(found, expected, x.numel(), sample.block_size, "int4")
        decoded = reference.dequantize(*expected, x.shape, "int4", block_size=sample.block_size)
        assert_bits(read(*found, x.shape, INT4).cpu(), decoded)
    found = quantrain.quantize_4bit_affine(x, block_size=sample.block_size)
    expected = reference.quantize_affine(x.cpu(), sample.block_size)
    assert_packed(found, expected, x.numel(), sample.block_size, "uint4")
    y = quantrain.dequantize_4bit(*found, size=x.shape, format="uint4")
    codes, scale, zero_point = expected
    keywords = dict(block_size=sample.block_size, zero_point=zero_point)
    assert_bits(y.cpu(), reference.dequantize(codes, scale, x.shape, "uint4", **keywords))


@on_each_device
@pytest.mark.parametrize("shape", [(94,), (126,), (196,), (200,), (1, 200), (1, 1, 300), (1, 126)], ids=str)
@pytest.mark.parametrize("format", ["nf4", "fp4", "e2m1"])
def test_a_flat_row_is_not_read_as_blocks_of_another_size(format, shape, device):
    """Four scales of 200 elements are of blocks of 64, not of 50."""
    x = Sample("row", shape, "heavy").make()
    expected = reference.quantize(x, 64, format)
    y = quantrain.dequantize_4bit(*(t.to(device) for t in expected), size=shape, format=format)
    assert_bits(y.cpu(), reference.dequantize(*expected, shape, format, block_size=64))


@on_each_device
@pytest.mark.parametrize("block_size", reference.BLOCK_SIZES)
def test_every_block_size_in_every_format(block_size, device):
    for shape in ((2, block_size), (3, block_size + 1), (1, 2 * block_size + 6)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(block_size))
        for rule in RULES:
            expected = reference.quantize(x, block_size, **rule.keywords())
            found = quantize(x.to(device), rule, block_size)
            assert_packed(found, expected, x.numel(), block_size, rule.format)
            decoded = reference.dequantize(*expected, shape, block_size=block_size, **rule.reading())
            assert_bits(read(*found, shape, rule).cpu(), decoded)


@on_each_device
@pytest.mark.parametrize("seed", range(100))
def test_drawn_shapes(seed, device):
    shape, block_size, layout, dtype = drawn(seed)
    x = laid_out(Sample("drawn", shape, "heavy", block_size=block_size, seed=seed).make(device, dtype), layout)
    for rule in (*RULES, *SEARCHES[: 1 + seed % 2]):
        expected = reference.quantize(x.cpu(), block_size, **rule.keywords())
        found = quantize(x, rule, block_size)
        assert_packed(found, expected, x.numel(), block_size, rule.format)
        if rule.format != "int4" or not ambiguous(shape, block_size):
            decoded = reference.dequantize(*expected, shape, block_size=block_size, dtype=dtype, **rule.reading())
            assert_bits(read(*found, shape, rule, dtype=dtype).cpu(), decoded)


@pytest.mark.cuda
@each(SAMPLES)
@in_each_dtype
def test_cuda_is_cpu(sample, dtype):
    """Every bit, of blocks of scale NaN too."""
    x = sample.make("cpu", dtype)
    searched = sample in SEARCHED
    for rule in (*RULES, *(SEARCHES if searched else ())):
        codes, scale = quantize(x, rule, sample.block_size)
        others = quantize(sample.make("cuda", dtype), rule, sample.block_size)
        assert_same(others[0].cpu(), codes)
        assert_bits(others[1].cpu(), scale)
        for out in DTYPES:
            y = read(codes, scale, x.shape, rule, dtype=out)
            assert_bits(read(*others, x.shape, rule, dtype=out).cpu(), y)
    found = quantrain.quantize_4bit_affine(x, block_size=sample.block_size)
    others = quantrain.quantize_4bit_affine(sample.make("cuda", dtype), block_size=sample.block_size)
    for mine, other in zip(found, others, strict=True):
        assert_same(other.cpu(), mine)


@each([s for s in SAMPLES if s.kind in ("normal", "heavy", "positive", "negative", "constant")])
@each_rule(RULES)
def test_codes_are_the_nearest_values(sample, rule):
    """The definition, in float64, apart from the oracle's order of operations."""
    x = sample.make()
    codes, scale = quantize(x, rule, sample.block_size)
    block = torch.arange(x.numel()) // sample.block_size
    scale = scale.flatten().double()[block]
    values = reference.code_values(rule.format, rule.values()).double()
    distance = (x.double().flatten()[:, None] - values * scale[:, None]).abs()
    chosen = distance.gather(1, reference.unpack(codes, x.numel(), rule.format)[:, None])[:, 0]
    assert (chosen <= distance.min(1).values + 1e-6 * scale.abs()).all()


@on_each_device
def test_ties_take_the_smaller_value(device):
    x = torch.zeros(64)
    x[0] = 1
    x[1:4] = torch.tensor([0.03979014977812767, 0.3893125355243683, -0.045525018125772476])
    assert unpacked(quantize(x.to(device), NF4)[0], 4, "nf4") == [15, 7, 11, 6]
    for format in ("fp4", "e2m1"):
        rule = Rule(format)
        middle = reference.midpoints(rule_values(format))
        x = torch.zeros(64)
        x[0], x[1:8], x[8:15] = 1, middle, -middle
        above = torch.nextafter(middle, torch.ones(7))
        x[15:22], x[22:29] = above, -above
        found = unpacked(quantize(x.to(device), rule)[0], 29, format)
        order = reference.code_values(format)[:8].argsort().tolist()
        assert found[1:15] == [*order[:7], *(c | 8 for c in order[:7])]  # the smaller magnitude
        assert found[15:] == [*order[1:], *(c | 8 for c in order[1:])]
    x = torch.zeros(64)
    x[:8] = torch.tensor([7, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -7])
    assert unpacked(quantize(x.to(device), INT4)[0], 8, "int4") == [7, 0, 2, 2, 0, 14, 14, 9]


def rule_values(format):
    return reference.code_values(format)[:8].sort().values


def unpacked(codes, n, format):
    return reference.unpack(codes.cpu(), n, format).tolist()


@on_each_device
def test_signed_scales_use_the_ninth_step(device):
    x = torch.zeros(64)
    x[:4] = torch.tensor([0.5, -4, 4, 1])  # of equal magnitudes the first
    codes, scale = quantize(x.to(device), Rule("int4", "signed"))
    assert scale.item() == 0.5 and unpacked(codes, 4, "int4") == [1, 8, 7, 2]
    codes, scale = quantize(-x.to(device), Rule("int4", "signed"))
    assert scale.item() == -0.5 and unpacked(codes, 4, "int4") == [1, 8, 7, 2]


@on_each_device
@each_rule([*RULES, *SEARCHES])
def test_zeros_and_not_finite_blocks(rule, device):
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    x[1, 5], x[2, 63], x[3, 0] = NAN, INF, -INF
    x[4] = 0
    x[5] *= 1e-38 / x[5].abs().max()  # below 2^-126
    codes, scale = quantize(x.to(device), rule)
    assert scale.isnan().flatten().tolist() == [False, True, True, True, False, False]
    assert scale[4:].flatten().tolist() == [0, 0]
    zero = reference.code_of_zero(rule.format, rule.values())
    assert set(unpacked(codes[4:], 128, rule.format)) == {zero}
    for dtype in DTYPES:
        y = read(codes, scale, (6, 64), rule, dtype=dtype).cpu()
        assert y.isnan().all(1).tolist() == scale.isnan().flatten().tolist()
        assert y[[0, 4, 5]].isfinite().all() and (y[4:] == 0).all()


@on_each_device
def test_affine_ranges(device):
    x = torch.zeros(5, 64)
    x[0, :3] = torch.tensor([-1.0, 2, 0])
    x[1] = 3  # 0 is in the range
    x[2] = -3
    x[4, 7] = NAN
    codes, scale, zero_point = quantrain.quantize_4bit_affine(x.to(device))
    assert scale.flatten()[:4].tolist() == pytest.approx([0.2, 0.2, 0.2, 0]) and scale[4].isnan()
    assert zero_point.flatten()[:4].tolist() == [5, 0, 15, 0]
    y = quantrain.dequantize_4bit(codes, scale, zero_point, size=(5, 64), format="uint4").cpu()
    torch.testing.assert_close(y[:4], x[:4], rtol=1e-6, atol=1e-6)
    assert y[4].isnan().all() and (y[0, 3:] == 0).all() and (y[3] == 0).all()


@each(EMPTY)
@in_each_dtype
@on_each_device
def test_empty_tensors(sample, dtype, device):
    x = torch.empty(sample.shape, dtype=dtype, device=device)
    for rule in (*RULES, *SEARCHES):
        codes, scale = quantize(x, rule)
        assert codes.shape == reference.packed_shape(x.shape, 64) and codes.dtype == torch.uint8
        assert scale.shape == reference.scale_shape(x.shape, 64) and scale.dtype == torch.float32
        y = read(codes, scale, x.shape, rule, dtype=dtype)
        assert y.shape == x.shape and y.dtype == dtype
    codes, scale, zero_point = quantrain.quantize_4bit_affine(x)
    assert codes.shape == reference.packed_shape(x.shape, 64) and zero_point.shape == scale.shape


@on_each_device
def test_quantizers_are_not_differentiable(device):
    x = torch.randn(3, 64, device=device, requires_grad=True)
    for codes, scale, *_ in (quantrain.quantize_4bit(x), quantrain.quantize_4bit_affine(x)):
        assert not codes.requires_grad
        with pytest.raises(RuntimeError, match="quantize_4bit"):
            scale.sum().backward()


@pytest.mark.parametrize("sample", [*FEW, Sample("large", (300, 1024)), Sample("large_flat", (301, 1023))], ids=str)
def test_the_number_of_threads_changes_nothing(sample):
    x = sample.make()

    def everything():
        found = [quantize(x, rule, sample.block_size) for rule in (*RULES, *SEARCHES)]
        scale = found[0][1]
        return [*(t for pair in found for t in pair), *quantrain.compress_scale(scale), read(*found[0], x.shape, NF4)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(3)
        for mine, other in zip(everything(), one, strict=True):
            assert_same(mine, other)
    finally:
        torch.set_num_threads(threads)


# ---- golden numbers --------------------------------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("format", GOLDEN_BYTES)
def test_golden_bytes(format, device):
    x = golden_input().to(device)
    codes, scale = quantrain.quantize_4bit(x, format=format)
    assert hexadecimal(codes) == GOLDEN_BYTES[format]
    assert scale.tolist() == pytest.approx([GOLDEN_SCALE[format]] * 2)
    y = quantrain.dequantize_4bit(codes, scale, size=(128,), format=format)
    assert (x - y).double().square().mean().item() == pytest.approx(GOLDEN_MSE[format], abs=5e-9)
    if format == "nf4":
        assert y[:4].tolist() == pytest.approx([-0.78125, -0.22221982, 0.34430456, -0.54390061], abs=5e-9)
    short = quantrain.quantize_4bit(x[:75], format=format)
    assert short[0].shape == (38,) and short[1].shape == (2,)
    if format == "nf4":
        assert short[0][-1] == 0x17 and short[1].tolist() == [0.78125, 0.765625]
    if format == "int4":  # the bytes of the operator that packs int4
        q = reference.unpack(codes.cpu(), 128, "int4")
        assert_same(quantrain.pack_int4(torch.where(q > 7, q - 16, q).to(torch.int8)), codes.cpu())


# SQNR in dB of normal numbers.
STATISTICS = [
    *((NF4, b, v) for b, v in ((32, 21.18), (64, 20.73), (128, 20.39), (256, 20.12), (4096, 19.16))),
    *((Rule("fp4"), b, v) for b, v in ((32, 18.85), (64, 18.28), (128, 17.82))),
    *((Rule("e2m1"), b, v) for b, v in ((32, 19.91), (64, 19.52))),
    *((INT4, b, v) for b, v in ((32, 20.26), (64, 19.36), (128, 18.61), (256, 17.97))),
    *((Rule("int4", "signed"), b, v) for b, v in ((32, 21.32), (64, 20.45), (128, 19.73), (256, 19.10))),
    (Rule("table", table="sorted"), 64, 20.39),
    *((Rule("nf4", "search"), b, v) for b, v in ((64, 21.39), (128, 20.94))),
]


@on_each_device
@pytest.mark.parametrize(("rule", "block_size", "expected"), STATISTICS, ids=str)
def test_error_of_normal_numbers(rule, block_size, expected, device):
    n = 2**20 if rule.scale_rule == "search" else 2**22
    x = torch.randn(n, generator=torch.Generator().manual_seed(5)).to(device)
    codes, scale = quantize(x, rule, block_size)
    found = reference.sqnr(x, read(codes, scale, x.shape, rule))
    # A few standard deviations (0.005 dB of 2^22 numbers, 0.01 of 2^20) beside the last digit of the table.
    assert found == pytest.approx(expected, abs=0.1 if block_size == 4096 else 0.03)


@on_each_device
def test_more_statistics_of_normal_numbers(device):
    x = torch.randn(2**22, generator=torch.Generator().manual_seed(6)).to(device)
    codes, scale = quantrain.quantize_4bit(x)
    frequency = torch.bincount(reference.unpack(codes.cpu(), x.numel(), "nf4"), minlength=16) / x.numel()
    expected = [0.01847, 0.04376, 0.05857, 0.07102, 0.08072, 0.08787, 0.09226, 0.08835,
                0.08127, 0.07818, 0.07330, 0.06678, 0.05806, 0.04797, 0.03622, 0.01720]  # fmt: skip
    torch.testing.assert_close(frequency, torch.tensor(expected), rtol=0, atol=1e-3)
    y = quantrain.dequantize_4bit(codes, scale, size=x.shape)
    error = (x - y).double()
    assert (error.square().mean() / x.double().square().mean()).item() == pytest.approx(0.008446, rel=0.005)
    assert error.abs().mean().item() == pytest.approx(0.07276, rel=0.005)
    assert scale.mean().item() == pytest.approx(2.5967, rel=0.005)
    assert (error.view(-1, 64) / scale[:, None]).abs().max().item() <= 0.1520
    compressed = quantrain.compress_scale(scale)
    nested = quantrain.dequantize_4bit(
        codes, compressed[0], scale_scale=compressed[1], scale_offset=compressed[2], size=x.shape
    )
    assert reference.sqnr(x, nested) == pytest.approx(20.727, abs=0.03)
    for block_size, expected in ((32, 21.86), (64, 20.82), (128, 19.95), (256, 19.22)):
        codes, scale, zero_point = quantrain.quantize_4bit_affine(x, block_size=block_size)
        y = quantrain.dequantize_4bit(codes, scale, zero_point, size=x.shape, format="uint4")
        assert reference.sqnr(x, y) == pytest.approx(expected, abs=0.03)


@on_each_device
def test_a_search_is_never_worse(device):
    x = Sample("search", (64, 512), "heavy").make(device)
    for rule in SEARCHES:
        plain = Rule(rule.format, "absmax", rule.table)
        errors = [(x - read(*quantize(x, r), x.shape, r)).double().view(-1, 64).square().sum(1) for r in (plain, rule)]
        assert (errors[1] <= errors[0] * (1 + 1e-6)).all() and errors[1].sum() < 0.98 * errors[0].sum()


# ---- dequantize ------------------------------------------------------------------------------------------------------


@each_weight(WEIGHTS)
@on_each_device
def test_packed_weights_are_read(weight, device):
    (codes, scale), keywords, expected = weight.pack(device)
    for dtype in DTYPES:
        with poisoned():
            y = quantrain.dequantize_4bit(codes, scale, size=(weight.n, weight.k), dtype=dtype, **keywords)
        assert y.is_contiguous()
        assert_bits(y.cpu(), expected.cpu().to(dtype))  # rounded once


@on_each_device
@each_rule(FORMATS)
def test_every_byte_is_read(rule, device):
    """All 256 bytes under scales of either sign, NaN, Inf and 0."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(6).view(6, 256)
    scale = torch.tensor([1.0, -0.37, 0.0, NAN, INF, 3e-45])[:, None].expand(6, 8).contiguous()
    expected = reference.dequantize(codes, scale, (6, 512), block_size=64, **rule.reading())
    assert_bits(read(codes.to(device), scale.to(device), (6, 512), rule).cpu(), expected)


@on_each_device
def test_rounding_to_16_bits_is_to_nearest_even(device):
    table = torch.tensor(
        [
            1,
            1 + 2.0**-9,
            1 + 3 * 2.0**-9,
            1 + 2.0**-8,
            1 + 2.0**-11,
            1 + 3 * 2.0**-11,
            65504,
            65519,
            65520,
            1e38,
            3.3961e38,
            6e-8,
            2.9e-8,
            2.0**-133,
            2.0**-134,
            -1 - 2.0**-9,
        ]
    )
    codes = torch.arange(0, 256, 17, dtype=torch.uint8).repeat(2)  # a byte of each code twice
    rule_keywords = dict(format="table", table=table.to(device))
    for dtype in (torch.float16, torch.bfloat16):
        y = quantrain.dequantize_4bit(
            codes.to(device), torch.ones(1, device=device), size=(64,), dtype=dtype, **rule_keywords
        )
        assert_bits(y.cpu(), table.repeat_interleave(2).repeat(2).to(dtype))


@on_each_device
def test_a_round_trip_has_the_same_bytes(device):
    """Codes of decoded values are those codes."""
    x = Sample("x", (40, 256), "heavy").make(device)
    for rule in (Rule("nf4"), Rule("fp4"), Rule("e2m1"), Rule("int4")):
        codes, scale = quantize(x, rule)
        again = quantize(read(codes, scale, x.shape, rule), rule)
        mine, other = (reference.unpack(t.cpu(), x.numel(), rule.format) for t in (codes, again[0]))
        if rule.format in ("fp4", "e2m1"):  # -0 is not less than 0
            mine = mine.where(mine != 8, 0)
        assert torch.equal(mine, other)
        torch.testing.assert_close(again[1], scale, rtol=1e-6, atol=0)


@pytest.mark.cuda
def test_more_than_2_31_elements():
    rows = 2**25 + 5
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    x = torch.empty(rows, 64, dtype=torch.bfloat16, device="cuda").normal_(
        generator=torch.Generator("cuda").manual_seed(0)
    )
    codes, scale = quantrain.quantize_4bit(x)
    for first in (0, 2**24 - 3, 2**25 - 3, rows - 7):
        part = slice(first, first + 7)
        expected = reference.quantize(x[part].cpu())
        assert_packed((codes[part], scale[part]), expected, 7 * 64, 64, "nf4")
    x = quantrain.dequantize_4bit(codes, scale, size=x.shape, dtype=torch.bfloat16)
    for first in (0, 2**24 - 3, 2**25 - 3, rows - 7):
        part = slice(first, first + 7)
        expected = reference.dequantize(codes[part].cpu(), scale[part].cpu(), (7, 64), block_size=64)
        assert_bits(x[part].cpu(), expected.bfloat16())


# ---- compressed scales -----------------------------------------------------------------------------------------------


SCALES = {
    "one": torch.tensor([[0.7]]),
    "a_few": torch.rand(3, 4, generator=torch.Generator().manual_seed(0)),
    "a_block": torch.rand(256, generator=torch.Generator().manual_seed(1)) + 0.5,
    "rows": torch.randn(64, 16, generator=torch.Generator().manual_seed(2)).abs() * 0.01 + 0.05,
    "short_last_block": torch.rand(7, 131, generator=torch.Generator().manual_seed(3)) + 2,
    "signed": torch.randn(513, generator=torch.Generator().manual_seed(4)),
    "zeros_among": torch.where(torch.arange(1000) % 3 == 0, 0.0, 0.05).view(10, 100),
    "all_zero": torch.zeros(300),
    "large": torch.rand(1000, 70, generator=torch.Generator().manual_seed(5)) + 1,
    "blocks_of_one_value": torch.tensor([1.0, 2.0, 5.0]).repeat_interleave(256),
}


@on_each_device
@pytest.mark.parametrize("name", SCALES)
def test_compressed_scales_are_the_oracles(name, device):
    scale = SCALES[name]
    for layout in ("contiguous", "strided", "offset"):
        with poisoned():
            codes, scale_scale, offset = (t.cpu() for t in quantrain.compress_scale(laid_out(scale.to(device), layout)))
        assert offset.shape == () and offset.dtype == torch.float32
        assert offset.item() == pytest.approx(
            scale.double().mean().item(), rel=1e-6, abs=1e-6 * scale.abs().max().item()
        )
        expected = reference.compress_scale(scale, offset)  # the order of the mean's sum is not specified
        assert_same(scale_scale, expected[1])
        assert_same(codes, expected[0])
        decoded = reference.decompress_scale(codes, scale_scale, offset)
        with poisoned():
            found = quantrain.decompress_scale(codes.to(device), scale_scale.to(device), offset.to(device))
        assert_same(found.cpu(), decoded)
        # A step of the map is at most 2.7 % of the largest distance from the mean at its lower end.
        assert (decoded - scale).abs().max() <= 0.0075 * (scale - offset).abs().max() + 1e-6 * scale.abs().max()


@on_each_device
def test_golden_compressed_scales(device):
    scale = 1 + ((29 * torch.arange(512)) % 64) / 64
    codes, scale_scale, offset = quantrain.compress_scale(scale.to(device))
    assert offset.item() == 1.4921875 and scale_scale.tolist() == [0.4921875] * 2
    assert codes[:16].tolist() == [0, 71, 243, 51, 230, 38, 216, 24, 203, 11, 183, 255, 63, 241, 49, 227]
    decoded = quantrain.decompress_scale(codes, scale_scale, offset).cpu()
    assert (decoded - scale).abs().max().item() == pytest.approx(0.0034607, abs=1e-7)
    assert decoded[:4].tolist() == pytest.approx([1.0034607, 1.45335083, 1.90477906, 1.3564514], abs=1e-7)


@on_each_device
def test_equal_scales_have_code_127(device):
    codes, scale_scale, offset = quantrain.compress_scale(torch.full((3, 100), 0.25, device=device))
    assert offset == 0.25 and (scale_scale == 0).all() and (codes == 127).all()
    assert (quantrain.decompress_scale(codes, scale_scale, offset) == 0.25).all()


@on_each_device
def test_every_code_of_a_scale_is_read(device):
    codes = torch.arange(256, dtype=torch.uint8).repeat(2)
    scale_scale, offset = torch.tensor([1.0, 0.3]), torch.tensor(0.5)
    found = quantrain.decompress_scale(codes.to(device), scale_scale.to(device), offset.to(device)).cpu()
    assert_same(found, reference.decompress_scale(codes, scale_scale, offset))


@on_each_device
def test_a_scale_that_is_nan_stays(device):
    scale = torch.rand(600, generator=torch.Generator().manual_seed(0))
    scale[300] = NAN
    decoded = quantrain.decompress_scale(*quantrain.compress_scale(scale.to(device)))
    assert decoded[300].isnan()


@on_each_device
def test_empty_scales(device):
    codes, scale_scale, offset = quantrain.compress_scale(torch.empty(0, 4, device=device))
    assert codes.shape == (0, 4) and scale_scale.shape == (0,) and offset.shape == ()
    assert quantrain.decompress_scale(codes, scale_scale, offset).shape == (0, 4)


@pytest.mark.cuda
@pytest.mark.parametrize("name", SCALES)
def test_compressed_scales_on_cuda_are_the_cpus(name):
    for mine, other in zip(
        quantrain.compress_scale(SCALES[name].cuda()), quantrain.compress_scale(SCALES[name]), strict=True
    ):
        assert_same(mine.cpu(), other)


# ---- a peer ----------------------------------------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_bytes_are_bitsandbytes(format, device):
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="bitsandbytes is not installed: nothing to compare with"
    )
    for shape, block_size in (((16, 128), 64), ((4, 4096), 4096), ((5, 3420), 64), ((3, 65), 64), ((9, 96), 32)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1]))
        theirs, state = functional.quantize_4bit(x, blocksize=block_size, quant_type=format)  # on CPU
        mine = quantrain.quantize_4bit(x.to(device), block_size=block_size, format=format)
        assert_peers(theirs, state, *mine, x.shape, block_size, format)
        y = quantrain.dequantize_4bit(*mine, size=shape, format=format)
        flat = theirs.flatten().to(device).view(mine[0].shape)
        scale = state.absmax.to(device).view(mine[1].shape)
        assert_same(
            quantrain.dequantize_4bit(flat, scale, size=shape, format=format).cpu(),
            functional.dequantize_4bit(theirs, state).view(shape),
        )
        assert y.shape == x.shape
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    theirs, state = functional.quantize_4bit(x, quant_type=format, compress_statistics=True)
    found = quantrain.decompress_scale(*(t.to(device) for t in (state.absmax, state.state2.absmax, state.offset)))
    expected = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert_same(found.cpu(), expected.float())


# ---- compilers -------------------------------------------------------------------------------------------------------


@on_each_device
def test_opcheck(device):
    for shape in ((3, 128), (2, 2, 64), (3, 65)):
        x = torch.randn(shape, device=device)
        for rule in (*FORMATS, SEARCHES[0], Rule("int4", "signed")):
            opcheck(ops.quantize_4bit, (x,), dict(block_size=64, **rule.keywords(device)))
            codes, scale = quantrain.quantize_4bit(x, **rule.keywords(device))
            opcheck(
                ops.dequantize_4bit,
                (codes, scale),
                dict(size=list(shape), dtype="bfloat16", **rule.reading(device)),
            )
        opcheck(ops.quantize_4bit, (x.transpose(0, 1),), dict(block_size=32))
        opcheck(ops.quantize_4bit_affine, (x,), dict(block_size=64))
        codes, scale, zero_point = quantrain.quantize_4bit_affine(x)
        opcheck(ops.dequantize_4bit, (codes, scale, zero_point), dict(size=list(shape), format="uint4"))
        opcheck(ops.compress_scale, (scale,))
        nested, scale_scale, offset = quantrain.compress_scale(scale)
        opcheck(ops.decompress_scale, (nested, scale_scale, offset))
        keywords = dict(scale_scale=scale_scale, scale_offset=offset, size=list(shape), format="uint4")
        opcheck(ops.dequantize_4bit, (codes, nested, zero_point), keywords)


def round_trip(x, table):
    codes, scale = quantrain.quantize_4bit(x * 2)
    nested, scale_scale, offset = quantrain.compress_scale(scale)
    y = quantrain.dequantize_4bit(codes, nested, scale_scale=scale_scale, scale_offset=offset, size=x.shape)
    other = quantrain.quantize_4bit(y, block_size=32, format="table", table=table, scale_rule="search")
    z = quantrain.dequantize_4bit(*other, size=y.shape, format="table", table=table, dtype=torch.bfloat16)
    affine = quantrain.quantize_4bit_affine(x)
    return codes, y + 1, z, *affine, quantrain.decompress_scale(nested, scale_scale, offset)


@on_each_device
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("width", [128, 65])
def test_compiles(width, dynamic, device):
    torch.compiler.reset()
    compiled = torch.compile(round_trip, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    table = reference.AF4.to(device)
    for rows in (5, 12, 3) if dynamic else (5,):
        x = torch.randn(rows, width, device=device)
        for mine, eager in zip(compiled(x, table), round_trip(x, table), strict=True):
            assert_same(mine, eager)


def test_a_dynamic_number_of_rows_is_compiled_once():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(round_trip, fullgraph=True, dynamic=True, backend=counter)
    for rows in (6, 9, 30, 77):
        compiled(torch.randn(rows, 128), reference.AF4)
    assert counter.frame_count == 1


def test_exports():
    class Model(torch.nn.Module):
        def forward(self, x):
            codes, scale = quantrain.quantize_4bit(x)
            return quantrain.dequantize_4bit(codes, scale, size=x.shape)

    x = torch.randn(6, 128)
    program = torch.export.export(Model(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2, max=100)}})
    assert_same(program.module()(x), Model()(x))


def test_inference_mode_and_autocast():
    x = torch.randn(4, 128)
    codes, scale = quantrain.quantize_4bit(x)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = quantrain.quantize_4bit(x)
        y = quantrain.dequantize_4bit(*found, size=x.shape)
    assert torch.equal(found[0], codes) and torch.equal(found[1], scale) and y.dtype == torch.float32


@pytest.mark.cuda
def test_a_cuda_graph():
    x = torch.randn(64, 256, device="cuda")
    table = reference.AF4.cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        round_trip(x, table)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = round_trip(x, table)
    x.normal_()
    graph.replay()
    torch.cuda.synchronize()
    for mine, eager in zip(found, round_trip(x, table), strict=True):
        assert_same(mine, eager)


# ---- refusals --------------------------------------------------------------------------------------------------------

X, TABLE = torch.randn(3, 128), reference.AF4
U8 = torch.uint8


def codes_of(x, device):
    return torch.zeros(3, 64, dtype=U8, device=device), torch.ones(3, 2, device=device)


QUANTIZER_ERRORS = [
    *((ValueError, f"block_size.*{b}", dict(block_size=b)) for b in (48, 16, 8192, 0, -64, 65)),
    (ValueError, "block_size.*48", dict(block_size=48, format="fp4")),
    (ValueError, "block_size.*48", dict(block_size=48, format="int4")),  # no divisor of 128
    (ValueError, "block_size.*1", dict(block_size=1, format="int4")),  # odd
    (ValueError, "format.*nf5", dict(format="nf5")),
    (ValueError, "format.*'?NF4", dict(format="NF4")),
    (ValueError, "uint4", dict(format="uint4")),
    (ValueError, "scale_rule.*max", dict(scale_rule="max")),
    (ValueError, "signed", dict(scale_rule="signed")),
    (ValueError, "table", dict(format="table")),
    (ValueError, "table", dict(format="nf4", table=TABLE)),
    (ValueError, r"table.*\[15\]", dict(format="table", table=TABLE[:15])),
    (ValueError, r"table.*\[4, 4\]", dict(format="table", table=TABLE.view(4, 4))),
    (TypeError, "table.*Half", dict(format="table", table=TABLE.half())),
]


@on_each_device_and_meta
@pytest.mark.parametrize(("error", "message", "keywords"), QUANTIZER_ERRORS, ids=[m for _, m, _ in QUANTIZER_ERRORS])
def test_quantize_refuses(error, message, keywords, device):
    keywords = {k: v.to(device) if torch.is_tensor(v) else v for k, v in keywords.items()}
    with pytest.raises(error, match=f"quantize_4bit: .*{message}"):
        quantrain.quantize_4bit(X.to(device), **keywords)


INPUT_TYPES = [(torch.float64, "Double"), (torch.int32, "Int"), (torch.int8, "Char"), (torch.bool, "Bool")]


@on_each_device_and_meta
@pytest.mark.parametrize(("dtype", "name"), INPUT_TYPES, ids=str)
def test_input_types_are_refused(dtype, name, device):
    x = torch.ones(3, 128, dtype=dtype, device=device)
    with pytest.raises(TypeError, match=f"quantize_4bit: .*input.*{name}"):
        quantrain.quantize_4bit(x)
    with pytest.raises(TypeError, match=f"quantize_4bit_affine: .*input.*{name}"):
        quantrain.quantize_4bit_affine(x)
    with pytest.raises(TypeError, match=f"compress_scale: .*scale.*{name}"):
        quantrain.compress_scale(x)


@on_each_device_and_meta
@pytest.mark.parametrize("block_size", [48, 15, 8192, 0, -64])
def test_affine_refuses_block_sizes(block_size, device):
    with pytest.raises(ValueError, match=f"quantize_4bit_affine: .*block_size.*{block_size}"):
        quantrain.quantize_4bit_affine(X.to(device), block_size=block_size)


def reader_errors(codes, scale):
    """(error, message, codes, scale, zero_point, keywords)."""
    ones, eight = torch.ones_like(scale), codes.new_zeros(3, 2)
    offset, group = scale.new_zeros(()), scale.new_ones(1)
    nested = dict(scale_scale=group, scale_offset=offset)
    return [
        (TypeError, "codes.*Char", codes.to(torch.int8), scale, None, {}),
        (TypeError, "codes.*Float", codes.float(), scale, None, {}),
        (TypeError, "scale.*Half", codes, scale.half(), None, {}),
        (ValueError, "format.*nf5", codes, scale, None, dict(format="nf5")),
        (ValueError, "table", codes, scale, None, dict(format="table")),
        (ValueError, "table", codes, scale, None, dict(table=TABLE.to(scale.device))),
        (ValueError, "zero_point", codes, scale, None, dict(format="uint4")),
        (ValueError, "zero_point", codes, scale, ones.int(), {}),
        (TypeError, "zero_point.*Half", codes, scale, ones.half(), dict(format="uint4")),
        (ValueError, r"zero_point.*\[3, 1\]", codes, scale, ones.int()[:, :1], dict(format="uint4")),
        (ValueError, "scale_scale", codes, eight, None, dict(scale_offset=offset)),
        (ValueError, "scale_offset", codes, eight, None, dict(scale_scale=group)),
        ((ValueError, TypeError), "scale", codes, eight, None, {}),
        ((ValueError, TypeError), "scale", codes, scale, None, nested),
        (ValueError, r"scale_scale.*\[2\]", codes, eight, None, dict(nested, scale_scale=scale.new_ones(2))),
        (TypeError, "scale_scale.*Half", codes, eight, None, dict(nested, scale_scale=group.half())),
        (ValueError, r"scale_offset.*\[2\]", codes, eight, None, dict(nested, scale_offset=scale.new_ones(2))),
    ]


@on_each_device_and_meta
@pytest.mark.parametrize("case", range(len(reader_errors(torch.zeros(3, 64, dtype=U8), torch.ones(3, 2)))))
def test_readers_refuse(case, device):
    error, message, codes, scale, zero_point, keywords = reader_errors(*codes_of(X, device))[case]
    with pytest.raises(error, match=f"dequantize_4bit: .*{message}"):
        quantrain.dequantize_4bit(codes, scale, zero_point, size=(3, 128), **keywords)
    with pytest.raises(error, match=f"linear_4bit: .*{message}"):
        quantrain.linear_4bit(torch.ones(2, 128, device=device), codes, scale, zero_point, **keywords)


@on_each_device_and_meta
@pytest.mark.parametrize(
    "size", [(3, 127), (3, 130), (4, 128), (3, 64), (128,), (3, 2, 128), (6, 64), (2, 192), (384,)], ids=str
)
def test_sizes_that_do_not_fit_are_refused(size, device):
    with pytest.raises(ValueError, match="dequantize_4bit: expected"):
        quantrain.dequantize_4bit(*codes_of(X, device), size=size)


@on_each_device_and_meta
def test_other_refusals(device):
    codes, scale = codes_of(X, device)
    for dtype in (torch.int32, torch.float64, torch.uint8):
        with pytest.raises(TypeError, match="dequantize_4bit: .*dtype"):
            quantrain.dequantize_4bit(codes, scale, size=(3, 128), dtype=dtype)
    with pytest.raises(ValueError, match=r"dequantize_4bit: .*\[3, 5\]"):  # no block of a power of two
        quantrain.dequantize_4bit(codes, scale.new_ones(3, 5), size=(3, 128))
    with pytest.raises(TypeError, match="decompress_scale: .*codes.*Float"):
        quantrain.decompress_scale(scale, scale.new_ones(1), scale.new_zeros(()))
    with pytest.raises(ValueError, match=r"decompress_scale: .*scale_scale.*\[2\]"):
        quantrain.decompress_scale(codes, scale.new_ones(2), scale.new_zeros(()))
    with pytest.raises(ValueError, match=r"decompress_scale: .*scale_offset.*\[2\]"):
        quantrain.decompress_scale(codes, scale.new_ones(1), scale.new_zeros(2))


@on_each_device
def test_tensors_of_two_devices_are_refused(device):
    x, codes, scale = X.to(device), *codes_of(X, device)
    with pytest.raises((TypeError, ValueError), match="quantize_4bit: .*table.*meta"):
        quantrain.quantize_4bit(x, format="table", table=TABLE.to("meta"))
    with pytest.raises((TypeError, ValueError), match="dequantize_4bit: .*scale.*meta"):
        quantrain.dequantize_4bit(codes, scale.to("meta"), size=(3, 128))
