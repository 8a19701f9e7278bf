"""quantize_gradient, its integer form and the reflection: values, against the oracle for the same random bits."""

import math

import pytest
import torch
from reference import gradient_quant as reference
from samples.gradient_quant import (
    EVERY_BITS,
    FEW,
    QUANTIZERS,
    SAMPLES,
    Quantizer,
    Sample,
    assert_same,
    each,
    encode,
    in_each_dtype,
    on_each_device,
    simulate,
    with_each_quantizer,
)

import quantrain

ops = torch.ops.quantrain
SEED, OFFSET = 0x1234_5678_9ABC, 20
HOUSEHOLDER = Quantizer("householder", 5)


def rounded_rows(grad, sample, quantizer, plan):
    """What is rounded: X in float32, or T X."""
    x = sample.matrix(grad).float()
    if quantizer.quantizer != "householder":
        return x
    return ops._reflect_rows(x.to(grad.device), plan.order, plan.reflector).cpu()


@each(SAMPLES)
@with_each_quantizer
@in_each_dtype
@on_each_device
def test_the_grid_and_the_codes_are_the_oracles(sample, quantizer, dtype, device):
    """Against float64 for the same bits: a code may differ, by one, only where float32 leaves the draw undecided."""
    grad = sample.make(device, dtype)
    x = sample.matrix(grad)
    found = encode(grad, quantizer, sample, seed=SEED, offset=OFFSET)
    u = reference.uniforms(SEED, OFFSET, *x.shape)
    expected = reference.quantize(x, **quantizer.rule, u=u, max_group=sample.max_group)
    scale, offset, codes = found.scale.cpu().double(), found.offset.cpu().double(), found.codes.cpu()
    assert scale.shape == expected.scale.shape and offset.shape == expected.offset.shape and codes.shape == x.shape
    # y carries the roundings of a sum over at most 256 rows of its group, in steps of the largest of them.
    largest = max(expected.rounded.abs().max().item(), x.abs().max().item())
    slack = 2**-23 * (expected.rounded.abs().amax(1, keepdim=True) + offset.abs())
    if quantizer.quantizer == "householder":
        slack = slack + 2**-22 * largest
    flat = expected.scale <= slack.amin() * 4  # a constant block: any grid through it will do
    torch.testing.assert_close(
        torch.where(flat, 0.0, scale), torch.where(flat, 0.0, expected.scale), rtol=1e-6, atol=2 * slack.max().item()
    )
    values = codes.double() * scale + offset
    reach = expected.scale + 4 * slack
    assert ((values - expected.rounded).abs() <= reach + 1e-30).all()
    undecided = expected.margin * expected.scale <= 8 * slack + 2**-20 * expected.scale
    differs = (codes.double() != expected.codes) & ~flat
    assert not (differs & ~undecided).any()
    assert ((codes.double() - expected.codes).abs()[differs] <= 1).all()
    assert differs.double().mean() < 0.01
    half = 2 ** (quantizer.bits - 1)
    assert codes.min().item() >= -half and codes.max().item() < half


@each(SAMPLES)
@with_each_quantizer
@in_each_dtype
@on_each_device
def test_rounding_is_the_rule_bit_for_bit(sample, quantizer, dtype, device):
    """On the operator's own grid, every step rounded to float32: codes, the value of the codes, and the simulated form."""
    grad = sample.make(device, dtype)
    plan = encode(grad, quantizer, sample, seed=SEED, offset=OFFSET)
    y = rounded_rows(grad, sample, quantizer, plan)
    u = reference.uniforms(SEED, OFFSET, *y.shape)
    scale, offset = plan.scale.cpu(), plan.offset.cpu()
    rounding = reference.dithered_code if quantizer.quantizer == "householder" else reference.round_to_grid
    codes, values = rounding(y, scale, offset, quantizer.bits, u)
    assert_same(plan.codes.cpu(), codes)
    if quantizer.quantizer != "householder":
        assert_same(plan.dequantize().cpu(), values)
    else:
        assert_same(plan.dequantize(), ops._reflect_rows(values.to(device), plan.order, plan.reflector, inverse=True))

    # The simulated form. Its random numbers are by position in memory where a row's memory is one piece.
    simulated = simulate(grad, quantizer, sample, seed=SEED, offset=OFFSET)
    assert simulated.dtype == dtype and simulated.shape == grad.shape
    x = sample.matrix(grad, in_memory=True).float()
    if quantizer.quantizer == "per_channel" and sample.layout == "channels_last":
        n, c, h, w = grad.shape
        scale, offset = (g.view(1, c, h, w).permute(0, 2, 3, 1).reshape(1, -1) for g in (scale, offset))
    if quantizer.quantizer != "householder":
        _, expected = reference.round_to_grid(x, scale, offset, quantizer.bits, u, dtype)
    else:
        y = ops._reflect_rows(x.to(device), plan.order, plan.reflector).cpu()
        _, values = reference.dithered_code(y, scale, offset, quantizer.bits, u)
        back = ops._reflect_rows(values.to(device), plan.order, plan.reflector, inverse=True).cpu()
        second = reference.uniforms(SEED, OFFSET, *x.shape, second=True)
        expected = back if dtype == torch.float32 else reference.round_to_type(back, second, dtype)
    assert_same(sample.matrix(simulated, in_memory=True), expected)


@each([s for s in SAMPLES if s.layout != "channels_last"])
@with_each_quantizer
@on_each_device
def test_the_integer_form_is_the_simulated_form(sample, quantizer, device):
    grad = sample.make(device, seed=1)
    simulated = simulate(grad, quantizer, sample, seed=3, offset=4)
    codes = encode(grad, quantizer, sample, seed=3, offset=4)
    assert_same(codes.dequantize(), reference.flatten(simulated, sample.rows).contiguous())
    nearest = simulate(grad, quantizer, sample, stochastic=False)
    assert_same(
        encode(grad, quantizer, sample, stochastic=False).dequantize(),
        reference.flatten(nearest, sample.rows).contiguous(),
    )


@each(FEW)
@with_each_quantizer
@on_each_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dequantize_rounds_to_the_type(sample, quantizer, dtype, device):
    found = encode(sample.make(device, dtype), quantizer, sample, seed=3, offset=4)
    assert_same(found.dequantize(dtype), found.dequantize().to(dtype))


@each(FEW)
@pytest.mark.parametrize("quantizer", EVERY_BITS, ids=str)
def test_every_number_of_bits(sample, quantizer):
    grad = sample.make(seed=2)
    found = encode(grad, quantizer, sample, seed=5, offset=0)
    x = sample.matrix(grad)
    u = reference.uniforms(5, 0, *x.shape)
    expected = reference.quantize(x, **quantizer.rule, u=u, max_group=sample.max_group)
    differs = (found.codes.double() != expected.codes) & (expected.scale > 0)
    assert (expected.margin[differs] < 1e-3).all() and differs.double().mean() < 0.01
    steps = 2**quantizer.bits - 1
    live = expected.scale.expand_as(found.scale) > 0
    if quantizer.quantizer in ("per_sample", "householder") and not quantizer.preserve_zero:
        spread = (found.codes.amax(1) - found.codes.amin(1))[live.flatten()]
        assert (spread == steps).all()  # the whole of the grid is used: no row's range is wider than its elements


@each(FEW)
@with_each_quantizer
@in_each_dtype
@on_each_device
def test_nearest_is_within_half_a_step(sample, quantizer, dtype, device):
    grad = sample.make(device, dtype, seed=3)
    found = encode(grad, quantizer, sample, stochastic=False)
    y = rounded_rows(grad, sample, quantizer, found).double()
    scale, offset = found.scale.cpu().double(), found.offset.cpu().double()
    values = found.codes.cpu().double() * scale + offset
    slack = 2**-22 * (y.abs().amax() + offset.abs())
    assert ((values - y).abs() <= scale / 2 + slack).all()


# ---- the plan and the reflection ----


@each(SAMPLES)
@in_each_dtype
@on_each_device
def test_the_plan_is_the_oracles(sample, dtype, device):
    grad = sample.make(device, dtype)
    found = encode(grad, HOUSEHOLDER, sample, seed=1, offset=0)
    order, reflector = reference.plan(sample.matrix(grad), sample.max_group)
    assert found.order.dtype == torch.int32 and found.order.tolist() == order.tolist()
    torch.testing.assert_close(found.reflector.cpu().double(), reflector, rtol=3e-7, atol=0)


@pytest.mark.parametrize("rows", [3, 4, 5, 6, 7, 12, 33, 64, 127, 128, 129, 255, 256, 257, 1000])
@pytest.mark.parametrize("kind", ["normal", "heavy", "few_rows", "zero_rows", "equal_rows"])
@pytest.mark.parametrize("max_group", [3, 17, 128, 256])
def test_groups_keep_the_authors_rule(rows, kind, max_group):
    """Every row once; blocks as dealt; each group a leader with at least one small row; sizes that share out the small rows."""
    x = Sample("", (rows, 5), kind, seed=rows).make()
    _, _, _, order, reflector = encode(x, HOUSEHOLDER, seed=1, offset=0, max_group=max_group)
    assert sorted(order.tolist()) == list(range(rows))
    if kind != "equal_rows":  # whether 3 of 6 equal ranges are more than half their sum is for the last bit of the sum
        order_expected, reflector_expected = reference.plan(x, max_group)
        assert order.tolist() == order_expected.tolist()
        torch.testing.assert_close(reflector.double(), reflector_expected, rtol=3e-7, atol=0)
    blocks = -(-rows // max_group)
    ranges = (x.amax(1) - x.amin(1)).double()
    starts = reference.group_starts(reflector)
    at = 0
    for b in range(blocks):
        size = len(range(b, rows, blocks))
        groups = [(p, q) for p, q in zip(starts, starts[1:], strict=False) if at <= p < at + size]
        assert groups[0][0] == at and groups[-1][1] == at + size  # no group crosses a block
        at += size
        if size < 3:
            assert all(q - p == 1 for p, q in groups)
            continue
        assert all(q - p >= 2 for p, q in groups)
        leaders = torch.tensor([ranges[order[p].item()] for p, _ in groups])
        small = torch.cat([ranges[order[p + 1 : q].long()] for p, q in groups])
        assert leaders.min() >= small.max()
        share = len(small) * leaders / leaders.sum()
        if leaders.max() > 0:
            assert share.min() > 1 - 1e-9
            upto = torch.tensor([q - p - 1 for p, q in groups]).cumsum(0)
            assert ((upto[:-1] - share.cumsum(0)[:-1]).abs() <= 0.5 + 1e-9).all()


@each(SAMPLES)
@in_each_dtype
@on_each_device
def test_reflect_rows_is_the_dense_product(sample, dtype, device):
    x = sample.matrix(sample.make(device, dtype)).float()
    plan = encode(x.to(device), HOUSEHOLDER, max_group=sample.max_group, seed=1, offset=0)
    forward, inverse = reference.dense(*reference.plan(x, sample.max_group))
    y = ops._reflect_rows(x.to(device), plan.order, plan.reflector)
    back = ops._reflect_rows(y, plan.order, plan.reflector, inverse=True)
    # A group's k products are added one after the other: a float32 rounding each, of at most the sum of magnitudes.
    starts = reference.group_starts(plan.reflector.cpu())
    k = max(b - a for a, b in zip(starts, starts[1:], strict=False))
    unit = 2**-24 * (k + 8)
    for found, matrix, source in ((y, forward, x), (back, inverse, y.cpu())):
        magnitude = matrix.abs() @ source.double().abs() + source.double().abs()
        error = (found.cpu().double() - matrix @ source.double()).abs()
        assert (error <= unit * (magnitude + magnitude.amax(0))).all()
    zero = (x == 0).all(1)
    assert (back.cpu()[zero] == 0).all()
    assert (back.cpu() - x).abs().max() <= 2 * unit * x.abs().max()


@each(SAMPLES)
def test_the_inverse_is_an_inverse(sample):
    x = sample.matrix(sample.make())
    plan = encode(x, HOUSEHOLDER, max_group=sample.max_group, seed=1, offset=0)
    forward, inverse = reference.dense(plan.order, plan.reflector)
    kept = torch.diag((x != 0).any(1).double())
    assert (inverse @ forward - kept).abs().max() < 1e-6


@on_each_device
def test_reflect_rows_takes_any_number_of_columns_and_strides(device):
    x = Sample("", (50, 30), "heavy").make(device)
    plan = encode(x, HOUSEHOLDER, seed=1, offset=0)
    for columns in (0, 1, 5, 30, 700):
        z = torch.randn(50, columns, device=device)
        y = ops._reflect_rows(z, plan.order, plan.reflector)
        assert y.shape == z.shape
        assert_same(ops._reflect_rows(z.t().contiguous().t(), plan.order, plan.reflector), y)
    same = ops._reflect_rows(x, plan.order[:0], plan.reflector[:0])  # no reflection
    assert_same(same, x)
    assert same.data_ptr() != x.data_ptr()


@each([s for s in SAMPLES if s.name in {"odd", "heavy", "big_row", "blocks_of_7", "one_row_only", "zero_rows"}])
@pytest.mark.parametrize("quantizer", [q for q in QUANTIZERS if q.quantizer != "per_channel"], ids=str)
@on_each_device
def test_an_integer_product_gives_the_input_gradient(sample, quantizer, device):
    """dX = T^-1 (scale * (C W) + offset * (1^T W)): the product runs on codes alone."""
    grad = sample.make(device)
    found = encode(grad, quantizer, sample, seed=8, offset=0)
    weight = torch.randint(-8, 8, (found.codes.shape[1], 11), device=device)
    product = (found.codes.cpu().int() @ weight.cpu().int()).to(device)  # what an int8 GEMM accumulates
    y = found.scale * product.float() + found.offset * weight.sum(0).float()
    dx = ops._reflect_rows(y, found.order, found.reflector, inverse=True)
    expected = found.dequantize().cpu().double() @ weight.cpu().double()
    size = found.dequantize().cpu().double().abs() @ weight.cpu().double().abs()
    tiny = 2**-18 * (size.amax() + (found.offset.abs().amax() * weight.abs().sum(0).amax()).item())
    assert ((dx.cpu().double() - expected).abs() <= tiny).all()
    assert (expected.abs().amax() > 100 * tiny) or found.dequantize().abs().max() == 0


# ---- shapes, strides, ends ----


@each(SAMPLES)
@with_each_quantizer
@in_each_dtype
@on_each_device
def test_shape_type_and_strides_are_kept(sample, quantizer, dtype, device):
    grad = sample.make(device, dtype)
    before = grad.clone()
    result = simulate(grad, quantizer, sample)
    assert result.shape == grad.shape and result.dtype == dtype and result.device == grad.device
    assert result.stride() == torch.empty_like(grad).stride()
    assert result.data_ptr() != grad.data_ptr() and torch.equal(grad, before)
    if sample.layout not in ("contiguous", "channels_last"):
        plain = simulate(grad.contiguous(), quantizer, sample, seed=1, offset=2)
        assert_same(simulate(grad, quantizer, sample, seed=1, offset=2).contiguous(), plain)


@with_each_quantizer
@on_each_device
@pytest.mark.parametrize(("shape", "rows"), [((4, 0), "sample"), ((3, 2, 0), "token"), ((3, 0, 5), "sample")])
def test_rows_without_elements(quantizer, device, shape, rows):
    grad = torch.empty(shape, device=device)
    assert simulate(grad, quantizer, rows=rows).shape == shape
    found = encode(grad, quantizer, rows=rows)
    n = shape[0] * shape[1] if rows == "token" else shape[0]
    assert found.codes.shape == (n, 0) and found.dequantize().shape == (n, 0)


@with_each_quantizer
@in_each_dtype
@on_each_device
@pytest.mark.parametrize("stochastic", [True, False])
def test_zero_rows_stay_zero(quantizer, dtype, device, stochastic):
    sample = Sample("", (60, 23), "zero_rows")
    grad = sample.make(device, dtype)
    zero = (grad == 0).all(1)
    assert 0 < zero.sum() < 60
    exact = quantizer.quantizer not in ("per_channel",)  # a column's grid need not hold zero
    for values in (
        simulate(grad, quantizer, stochastic=stochastic),
        encode(grad, quantizer, stochastic=stochastic).dequantize(),
    ):
        assert not exact or (values[zero] == 0).all()
        assert (values[~zero] != 0).any()
    nothing = torch.zeros_like(grad)
    assert_same(simulate(nothing, quantizer, stochastic=stochastic), nothing)
    assert_same(encode(nothing, quantizer, stochastic=stochastic).dequantize(), nothing.float())


@in_each_dtype
@on_each_device
def test_constant_rows_and_columns_stay_constant(dtype, device):
    grad = Sample("", (9, 14), "constant_rows").make(device, dtype)
    for bits in (2, 5, 8):
        assert_same(simulate(grad, Quantizer("per_sample", bits)), grad)
        assert_same(simulate(grad.t().contiguous(), Quantizer("per_channel", bits)), grad.t().contiguous())
        one = grad[:1].expand(4, 14).contiguous()
        # Zero and the value are the ends of this grid, so the value is kept but for the last bit of B (value / B).
        torch.testing.assert_close(simulate(one, Quantizer("per_tensor", bits)), one, rtol=2**-23, atol=0)


@on_each_device
@in_each_dtype
@pytest.mark.parametrize(
    "quantizer",
    [
        Quantizer(q, b, z)
        for b in (2, 5, 8)
        for q, z in (("per_tensor", False), ("per_sample", True), ("per_channel", True))
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["normal", "sparse", "positive", "negative", "heavy"])
def test_zero_is_on_the_grid(quantizer, kind, device, dtype):
    grad = Sample("", (24, 31), kind).make(device, dtype)
    grad[3, 5] = grad[7, 0] = 0
    result = simulate(grad, quantizer)
    assert (result[grad == 0] == 0).all()
    found = encode(grad, quantizer)
    zero = torch.round(-found.offset / found.scale)
    assert (zero * found.scale + found.offset).abs().max() <= 1e-6 * found.scale.max()
    assert (zero >= -(2 ** (quantizer.bits - 1))).all() and (zero < 2 ** (quantizer.bits - 1)).all()


@on_each_device
@in_each_dtype
def test_the_rows_ends_are_kept(device, dtype):
    """A row's smallest and largest value are the ends of its grid: they are not rounded, but for float32's last bits."""
    grad = Sample("", (32, 65), "heavy").make(device, dtype)
    for bits in (2, 4, 8):
        result = simulate(grad, Quantizer("per_sample", bits))
        for end in (torch.amin, torch.amax):
            error = (end(result.double(), 1) - end(grad.double(), 1)).abs()
            assert (error <= 2**-22 * grad.double().abs().amax(1)).all()


@with_each_quantizer
@in_each_dtype
@on_each_device
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_make_their_block_nan(quantizer, dtype, device, bad):
    grad = Sample("", (40, 21), "heavy").make(device, dtype)
    grad[11, 4] = bad
    expected = torch.zeros(40, 21, dtype=torch.bool, device=device)
    if quantizer.quantizer == "per_tensor":
        expected[:] = True
    elif quantizer.quantizer == "per_sample":
        expected[11] = True
    elif quantizer.quantizer == "per_channel":
        expected[:, 4] = True
    found = encode(grad, quantizer)
    if quantizer.quantizer == "householder":
        starts = reference.group_starts(found.reflector.cpu())
        at = found.order.tolist().index(11)
        group = next((p, q) for p, q in zip(starts, starts[1:], strict=False) if p <= at < q)
        expected[found.order[group[0] : group[1]].long()] = True
        assert not expected.all()
    for stochastic in (True, False):
        result = simulate(grad, quantizer, stochastic=stochastic)
        assert torch.equal(torch.isnan(result), expected)
        assert torch.isfinite(result[~expected]).all()
    assert torch.equal(torch.isnan(found.dequantize()), expected)


@with_each_quantizer
@on_each_device
def test_tiny_and_huge_gradients_stay_usable(quantizer, device):
    """Ranges are relative: nothing is lost at 2^-100, and a range near float32's end gives no infinity."""
    grad = Sample("", (12, 40), "heavy").make(device)
    plain = simulate(grad, quantizer, seed=1, offset=0)
    for power in (-100, -40, 16, 60):
        assert_same(simulate(grad * 2.0**power, quantizer, seed=1, offset=0), plain * 2.0**power)
    subnormal = simulate(grad * 2.0**-140, quantizer)
    assert torch.isfinite(subnormal).all()
    huge = grad / grad.abs().max() * 1.2e38
    assert torch.isfinite(simulate(huge, quantizer)).all()


@with_each_quantizer
@on_each_device
def test_largest_halves_stay_finite(quantizer, device):
    grad = torch.tensor([[65504.0, -20000.0, 3.0], [-1.0, 65504.0, 30000.0], [2.0, 60000.0, -65504.0]], device=device)
    if quantizer.quantizer == "householder":
        grad *= 0.5  # what comes back from a reflection may lie beyond its row's ends
    for seed in range(20):
        for bits in (2, 3, 8):
            chosen = Quantizer(quantizer.quantizer, bits, quantizer.preserve_zero)
            assert torch.isfinite(simulate(grad.half(), chosen, seed=seed, offset=0)).all()


@on_each_device
def test_many_token_rows(device):
    """16,411 tokens: 129 blocks, each grouped by itself."""
    sample = Sample("", (7, 16411 // 7 + 1, 6), "heavy", rows="token")
    grad = sample.make(device)
    n = grad.shape[0] * grad.shape[1]
    assert n > 16384
    found = encode(grad, HOUSEHOLDER, sample, seed=1, offset=0)
    order, reflector = reference.plan(sample.matrix(grad), 128)
    assert found.order.tolist() == order.tolist()
    torch.testing.assert_close(found.reflector.cpu().double(), reflector, rtol=3e-7, atol=0)
    simulated = simulate(grad, HOUSEHOLDER, sample, seed=1, offset=0)
    assert_same(found.dequantize().view(grad.shape), simulated)
    y = ops._reflect_rows(grad.reshape(n, 6), found.order, found.reflector)
    back = ops._reflect_rows(y, found.order, found.reflector, inverse=True)
    assert (back - grad.reshape(n, 6)).abs().max() <= 2**-19 * grad.abs().max()


# ---- random numbers ----


@with_each_quantizer
@in_each_dtype
@on_each_device
def test_results_repeat_bit_for_bit(quantizer, dtype, device):
    grad = Sample("", (130, 300), "heavy").make(device, dtype)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append((simulate(grad, quantizer, seed=9, offset=4), *encode(grad, quantizer, seed=9, offset=4)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same(a, b)


@with_each_quantizer
@on_each_device
def test_generator_rules(quantizer, device):
    grad = Sample("", (30, 40)).make(device)
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append((simulate(grad, quantizer), simulate(grad, quantizer)))
    assert_same(draws[0][0], draws[1][0])
    assert_same(draws[0][1], draws[1][1])
    assert not torch.equal(*draws[0])
    own = torch.Generator(device).manual_seed(5)
    assert_same(simulate(grad, quantizer, generator=own), draws[0][0])  # the default generator's rule
    state = own.get_state()
    simulate(grad, quantizer, generator=own, stochastic=False)
    assert torch.equal(own.get_state(), state)  # rounding to the nearest draws nothing
    torch.manual_seed(5)
    codes = encode(grad, quantizer)
    assert_same(codes.dequantize(), draws[0][0])


def test_seed_and_offset_are_64_bits():
    grad = torch.rand(2, 9)
    draws = [
        encode(grad, Quantizer("per_sample", 2), seed=seed, offset=offset).codes
        for seed, offset in ((3, 8), (4, 8), (3, 12), (3 + 2**40, 8), (3, 8 + 2**40), (-3, 8), (3, -8))
    ]
    wide = [reference.uniforms(s, o, 2, 9) for s, o in ((3, 8), (-3, 8), (3, -8))]
    for found, u in zip((draws[0], draws[5], draws[6]), wide, strict=True):
        assert torch.equal(found.double(), reference.quantize(grad, 2, "per_sample", u=u).codes)
    assert len({tuple(d.flatten().tolist()) for d in draws}) == len(draws)


def test_philox_known_answers():
    """Random123's known answers of philox4x32-10, in the oracle; the operators are held to the oracle's bits above."""
    assert reference.philox4x32_10(0, 0, [0])[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 2**64 - 1
    assert reference.philox4x32_10(ones, ones, [ones])[0].tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_rows_share_no_random_numbers():
    """Each row and each column has its own numbers, also in rows that end inside a block of eight."""
    u = reference.uniforms(1, 0, 50, 13)
    assert torch.unique(u).numel() > 0.97 * u.numel()  # 16 bits: about 3 of 650 coincide
    grad = torch.rand(1, 61).expand(50, 61).contiguous()
    codes = encode(grad, Quantizer("per_sample", 2), seed=1, offset=0).codes
    assert len({tuple(r) for r in codes.tolist()}) == 50


# ---- the Python function ----


def test_python_functions_pass_their_arguments():
    grad = torch.randn(3, 5, 8)
    torch.manual_seed(1)
    values = quantrain.quantize_gradient(grad, 4, "householder", rows="token", max_group=7)
    torch.manual_seed(1)
    assert_same(values, ops.quantize_gradient(grad, 4, "householder", rows="token", max_group=7))
    torch.manual_seed(1)
    codes = quantrain.quantize_gradient_codes(grad, 4, "householder", rows="token", max_group=7)
    assert isinstance(codes, quantrain.QuantizedGradient)
    assert_same(codes.dequantize().view(grad.shape), values)
    own = torch.Generator().manual_seed(2)
    nearest = quantrain.quantize_gradient(grad, 3, "per_sample", preserve_zero=True, stochastic=False, generator=own)
    assert_same(nearest, ops.quantize_gradient(grad, 3, "per_sample", preserve_zero=True, stochastic=False))
    codes = quantrain.quantize_gradient_codes(grad, 3, "per_channel", stochastic=False)
    assert codes.scale.shape == (1, 40) and codes.order.shape == (0,) and codes.reflector.shape == (0, 4)


# ---- CUDA ----


@each(SAMPLES)
@with_each_quantizer
@in_each_dtype
@pytest.mark.cuda
def test_cpu_and_cuda_agree_bit_for_bit(sample, quantizer, dtype):
    grad = sample.make("cpu", dtype, seed=4)
    for keywords in (dict(seed=SEED, offset=OFFSET), dict(stochastic=False)):
        both = [simulate(sample._lay_out(grad.to(d)), quantizer, sample, **keywords).cpu() for d in ("cpu", "cuda")]
        assert torch.equal(*(b.contiguous().view(torch.uint8) for b in both))
        both = [encode(sample._lay_out(grad.to(d)), quantizer, sample, **keywords) for d in ("cpu", "cuda")]
        for a, b in zip(*both, strict=True):
            assert torch.equal(a.contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8))
        values = [b.dequantize().cpu() for b in both]
        assert torch.equal(*(v.view(torch.uint8) for v in values))


@with_each_quantizer
@in_each_dtype
@pytest.mark.cuda
@pytest.mark.parametrize(
    ("shape", "rows"),
    [((4096, 1024), "token"), ((64, 32, 28, 28), "sample"), ((128, 40000), "sample"), ((16411, 65), "token")],
)
def test_cpu_and_cuda_agree_on_large_shapes(quantizer, dtype, shape, rows):
    grad = Sample("", shape, "heavy", rows=rows).make("cpu", dtype)
    both = [simulate(grad.to(d), quantizer, rows=rows, seed=6, offset=8).cpu() for d in ("cpu", "cuda")]
    assert torch.equal(*(b.view(torch.uint8) for b in both))


@with_each_quantizer
@in_each_dtype
@pytest.mark.cuda
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_cpu_and_cuda_agree_on_bad_values(quantizer, dtype, bad):
    grad = Sample("", (40, 21), "heavy").make("cpu", dtype)
    grad[11, 4] = bad
    both = [simulate(grad.to(d), quantizer, seed=6, offset=8).cpu() for d in ("cpu", "cuda")]
    assert_same(*both)


@with_each_quantizer
@in_each_dtype
@pytest.mark.cuda
def test_nothing_waits_for_the_device(quantizer, dtype):
    grads = [s.make("cuda", dtype) for s in FEW] + [torch.randn(4000, 64, device="cuda", dtype=dtype)]
    for grad in grads:
        simulate(grad, quantizer)  # first use may set things up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for grad in grads:
            simulate(grad, quantizer)
            encode(grad, quantizer).dequantize()
            simulate(grad, quantizer, stochastic=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@with_each_quantizer
@in_each_dtype
@pytest.mark.cuda
def test_a_graphs_replays_draw_afresh(quantizer, dtype):
    grad = Sample("", (96, 512), "heavy").make("cuda", dtype)
    simulate(grad, quantizer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first, second = simulate(grad, quantizer), simulate(grad, quantizer)
        codes = encode(grad, quantizer)
    torch.cuda.synchronize()  # capture fills the graph's seed on a stream of its own
    torch.cuda.manual_seed(3)
    seen = []
    for _ in range(3):
        graph.replay()
        seen += [first.clone(), second.clone(), codes.dequantize().to(dtype)]
    for i, a in enumerate(seen):
        assert not any(torch.equal(a, b) for b in seen[:i])
    torch.cuda.manual_seed(3)
    graph.replay()
    assert_same(first, seen[0])
    # New data in the same memory: ranges, groups and grids are the graph's own work.
    grad.copy_(Sample("", (96, 512), "one_row", seed=9).make("cuda", dtype))
    graph.replay()
    steps = encode(grad, quantizer).scale
    assert_same(codes.scale, steps)
    assert torch.equal(codes.order, encode(grad, quantizer).order)


@with_each_quantizer
@pytest.mark.cuda
def test_work_goes_to_the_current_stream(quantizer):
    grad = Sample("", (512, 2048), "heavy").make("cuda")
    expected = simulate(grad, quantizer, seed=1, offset=0)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(grad)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(grad)
        result = simulate(late, quantizer, seed=1, offset=0)  # sees the copy only in this stream
    stream.synchronize()
    assert_same(result, expected)


@with_each_quantizer
@pytest.mark.cuda
def test_another_device_than_the_current_one(quantizer):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    grad = Sample("", (40, 33), "heavy").make()
    expected = simulate(grad, quantizer, seed=1, offset=0)
    result = simulate(grad.to("cuda:1"), quantizer, seed=1, offset=0)
    assert result.device.index == 1 and torch.cuda.current_device() == 0
    assert_same(result.cpu(), expected)
    assert_same(encode(grad.to("cuda:1"), quantizer, seed=1, offset=0).dequantize().cpu(), expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("shape", [(7, 33), (3, 5, 64), (40, 2048), (5, 40000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_products_gradients_in_one_reading(device, shape, dtype):
    """Per row and per column, with the draws of the two calls one after the other."""
    ops = torch.ops.quantrain
    g = (torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 3).to(dtype).to(device)
    for bits, keep, column_bits, column_keep in ((8, False, 8, False), (5, True, 3, False)):
        torch.manual_seed(5)
        by_row, by_column = ops._quantize_gradient_both(g, bits, keep, column_bits, column_keep, rows="token")
        torch.manual_seed(5)
        want = ops.quantize_gradient(g, bits, "per_sample", rows="token", preserve_zero=keep)
        assert torch.equal(by_row, want)
        want = ops.quantize_gradient(g, column_bits, "per_channel", rows="token", preserve_zero=column_keep)
        assert torch.equal(by_column, want)
