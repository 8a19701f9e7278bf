"""Codes and scales of the int8 family against the oracle: code for code, on each device."""

import pytest
import torch
from reference import int8 as reference
from samples.int8 import (
    EMPTY,
    FEW,
    INF,
    NAN,
    SAMPLES,
    Sample,
    assert_all_same,
    assert_same,
    codes,
    each,
    in_each_dtype,
    on_each_device,
    scales,
)

import quantrain

ops = torch.ops.quantrain
SEED, OFFSET = 1234567890123456789, (1 << 40) + 3
FINITE = [s for s in SAMPLES if s.kind != "not_finite"]


# ---- to nearest ----


@each(SAMPLES)
@in_each_dtype
@on_each_device
def test_rows_are_the_oracles(sample, dtype, device):
    x, (column_factor, _) = sample.make(device, dtype), sample.factors(device)
    before = x.clone()
    assert_all_same(quantrain.int8_quantize_rows(x), reference.quantize_rows(x.cpu()))
    found = quantrain.int8_quantize_rows(x, column_factor=column_factor)
    assert_all_same(found, reference.quantize_rows(x.cpu(), column_factor.cpu()))
    assert found[0].is_contiguous() and found[1].is_contiguous()
    assert_same(x, before)


@each(SAMPLES)
@in_each_dtype
@on_each_device
def test_columns_are_the_oracles(sample, dtype, device):
    x, (_, row_factor) = sample.make(device, dtype), sample.factors(device)
    assert_all_same(quantrain.int8_quantize_columns(x), reference.quantize_columns(x.cpu()))
    found = quantrain.int8_quantize_columns(x, row_factor=row_factor)
    assert_all_same(found, reference.quantize_columns(x.cpu(), row_factor.cpu()))
    assert found[0].is_contiguous() and found[1].is_contiguous()


@each(FINITE)
@in_each_dtype
def test_rows_are_within_half_a_step(sample, dtype):
    """The definition, in float64, apart from the oracle's order of operations."""
    x = sample.make(dtype=dtype).double()
    found, scale = quantrain.int8_quantize_rows(sample.make(dtype=dtype))
    absmax = x.abs().amax(-1, keepdim=True)
    assert ((found.double() * scale.double() - x).abs() <= 0.50003 * scale.double()).all()
    assert found.to(torch.int16).abs().max() <= 127
    if sample.kind not in ("zero", "zeros", "subnormal"):
        torch.testing.assert_close(scale.double(), absmax / 127, rtol=1e-6, atol=0)
        assert (found.to(torch.int16).abs().amax(-1) == 127).all()


@each(FINITE)
@in_each_dtype
@on_each_device
def test_nearest_is_choose_qparams_and_quantize(sample, dtype, device):
    x = sample.make(device, dtype)
    found, scale = quantrain.int8_quantize_rows(x)
    expected_scale, _ = quantrain.choose_qparams(x, scale.shape, quant_min=-127, quant_max=127)
    assert_same(scale, expected_scale)
    assert_same(found, quantrain.quantize(x, expected_scale, quant_min=-127, quant_max=127).contiguous())
    assert_same(quantrain.dequantize(found, scale), (found.float() * scale))


@in_each_dtype
@on_each_device
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_row_with_nan_or_inf_has_scale_nan_and_codes_0(dtype, device, stochastic):
    x = torch.randn(6, 200).to(device, dtype)
    x[1, 3], x[2, 199], x[4, 64] = NAN, INF, -INF
    rows = torch.tensor([False, True, True, False, True, False])
    columns = torch.zeros(200, dtype=torch.bool)
    columns[[3, 64, 199]] = True
    torch.manual_seed(0)
    for (found, scale), bad in (
        (quantrain.int8_quantize_rows(x, stochastic=stochastic), rows),
        (quantrain.int8_quantize_columns(x, stochastic=stochastic), columns),
    ):
        assert torch.equal(scale.isnan().flatten().cpu(), bad)
        assert (found[bad.to(device)] == 0).all()
        assert (found[~bad.to(device)] != 0).any(1).all()


@on_each_device
def test_a_factor_carries_nan_and_overflow_on(device):
    x = torch.ones(3, 5, device=device)
    found, scale = quantrain.int8_quantize_rows(x, column_factor=torch.tensor([1, 2, NAN, 1, 1], device=device))
    assert scale.isnan().all() and (found == 0).all()
    found, scale = quantrain.int8_quantize_columns(3 * x, row_factor=torch.tensor([1, 3e38, 1], device=device))
    assert scale.isnan().all() and (found == 0).all()


@each(EMPTY)
@in_each_dtype
@on_each_device
def test_no_rows_give_empty_results(sample, dtype, device):
    x = torch.empty(sample.shape, dtype=dtype, device=device)
    k = x.shape[-1]
    for keywords in ({}, {"stochastic": True}):
        found, scale, found_t, scale_t = quantrain.int8_quantize_rows_and_columns(x, **keywords)
        assert found.shape == x.shape and scale.shape == (*x.shape[:-1], 1)
        assert found_t.shape == (k, 0) and scale_t.shape == (k, 1) and (scale_t == 1).all()
        assert quantrain.int8_quantize_rows(x, **keywords)[0].shape == x.shape
        assert quantrain.int8_quantize_columns(x, **keywords)[0].shape == (k, 0)
    assert quantrain.int8_transpose(torch.empty(0, 8, dtype=torch.int8, device=device)).shape == (8, 0)
    assert quantrain.int8_transpose(torch.empty(8, 0, dtype=torch.int8, device=device)).shape == (0, 8)


# ---- stochastic ----


@each(SAMPLES)
@in_each_dtype
@on_each_device
def test_stochastic_rows_are_the_oracles(sample, dtype, device):
    x, (column_factor, _) = sample.make(device, dtype), sample.factors(device)
    found = ops.int8_quantize_rows.seeded(x, seed=SEED, offset=OFFSET)
    assert_all_same(found, reference.quantize_rows(x.cpu(), None, SEED, OFFSET))
    found = ops.int8_quantize_rows.seeded(x, column_factor=column_factor, seed=-1, offset=0)
    assert_all_same(found, reference.quantize_rows(x.cpu(), column_factor.cpu(), -1, 0))


@each(SAMPLES)
@in_each_dtype
@on_each_device
def test_stochastic_columns_are_the_oracles(sample, dtype, device):
    x, (_, row_factor) = sample.make(device, dtype), sample.factors(device)
    found = ops.int8_quantize_columns.seeded(x, seed=SEED, offset=OFFSET)
    assert_all_same(found, reference.quantize_columns(x.cpu(), None, SEED, OFFSET))
    found = ops.int8_quantize_columns.seeded(x, row_factor=row_factor, seed=-1, offset=0)
    assert_all_same(found, reference.quantize_columns(x.cpu(), row_factor.cpu(), -1, 0))


@each(SAMPLES)
@on_each_device
def test_rows_and_columns_are_both_from_one_draw(sample, device):
    x, (column_factor, row_factor) = sample.make(device, torch.bfloat16), sample.factors(device)
    factors = dict(column_factor=column_factor, row_factor=row_factor)
    assert_all_same(
        ops.int8_quantize_rows_and_columns.seeded(x, seed=5, offset=6, **factors),
        ops.int8_quantize_rows.seeded(x, seed=5, offset=6, column_factor=column_factor)
        + ops.int8_quantize_columns.seeded(x, seed=5, offset=6, row_factor=row_factor),
    )
    assert_all_same(
        quantrain.int8_quantize_rows_and_columns(x, **factors),
        quantrain.int8_quantize_rows(x, column_factor=column_factor)
        + quantrain.int8_quantize_columns(x, row_factor=row_factor),
    )
    # One factor alone.
    assert_all_same(
        quantrain.int8_quantize_rows_and_columns(x, row_factor=row_factor),
        quantrain.int8_quantize_rows(x) + quantrain.int8_quantize_columns(x, row_factor=row_factor),
    )


@on_each_device
def test_generators_are_followed(device):
    x = torch.randn(20, 30, device=device)

    def draw(generator=None):
        return (
            *quantrain.int8_quantize_rows_and_columns(x, stochastic=True, generator=generator),
            *quantrain.int8_quantize_rows(x, stochastic=True, generator=generator),
            *quantrain.int8_quantize_columns(x, stochastic=True, generator=generator),
        )

    torch.manual_seed(11)
    first, second = draw(), draw()
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[2], second[2])
    assert not torch.equal(first[0], first[4]) and not torch.equal(first[2], first[6])
    torch.manual_seed(11)
    assert_all_same(draw(), first)
    state = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    assert_all_same(draw(torch.Generator(device).manual_seed(11)), first)
    after = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    assert torch.equal(state, after)  # the generator that was given, and no other
    # Rows and columns from one draw, the numbers that either operator would have had.
    for quantize, part in ((quantrain.int8_quantize_rows, first[:2]), (quantrain.int8_quantize_columns, first[2:4])):
        assert_all_same(quantize(x, stochastic=True, generator=torch.Generator(device).manual_seed(11)), part)


def test_nearest_draws_nothing():
    state = torch.get_rng_state()
    quantrain.int8_quantize_rows_and_columns(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sample", FEW[:3] + [Sample("large", (300, 1000))], ids=str)
def test_the_number_of_threads_changes_nothing(sample):
    x = sample.make()

    def everything():
        return (
            *ops.int8_quantize_rows_and_columns.seeded(x, seed=1, offset=2),
            quantrain.int8_transpose(codes(sample.rows_and_columns)),
            *quantrain.int8_weight_transpose(x.view(sample.rows_and_columns), sample.factors()[1], scheme="columns"),
        )

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(3)
        assert_all_same(everything(), one)
    finally:
        torch.set_num_threads(threads)


# ---- transposes ----


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1), (16, 16), (64, 64), (63, 65), (130, 200), (1000, 37)])
@on_each_device
def test_transpose(shape, device):
    x = codes(shape, low=-128, device=device)
    result = quantrain.int8_transpose(x)
    assert result.is_contiguous()
    assert_same(result, x.t().contiguous())
    assert_same(quantrain.int8_transpose(x.t()), x)  # from any strides
    wide = codes((shape[0], 2 * shape[1]), 1, device=device)
    assert_same(quantrain.int8_transpose(wide[:, ::2]), wide[:, ::2].t().contiguous())


WEIGHTS = [s for s in SAMPLES if len(s.shape) == 2 and s.kind != "not_finite"]


@each(WEIGHTS)
@on_each_device
@pytest.mark.parametrize("scheme", ["fold", "columns", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_weight_transpose_is_the_oracles(sample, device, scheme, dtype):
    weight = sample.make(device, torch.float32 if dtype == torch.int8 else dtype)
    found, scale = quantrain.int8_quantize_rows(weight)
    if dtype == torch.int8:
        weight = found
    result = quantrain.int8_weight_transpose(weight, scale, scheme=scheme)
    assert_all_same(result, reference.weight_transpose(weight.cpu(), scale.cpu(), scheme))
    if scheme == "fold":  # the forward's codes
        assert_same(result[0], found.t().contiguous())
    # Either way the three stand for the weight. ("huge": 127 * scale may be just above float32's largest number.)
    if scheme != "auto" and sample.kind != "huge":
        stands_for = (result[0].double() * result[2].double()).t() * result[1].double().view(-1, 1)
        given = weight.double() * (scale.double() if dtype == torch.int8 else 1)
        step = result[1].double().view(-1, 1) if scheme == "fold" else result[2].double().t()
        assert ((stands_for - given).abs() <= 0.50003 * step).all()


@on_each_device
def test_auto_folds_where_the_scales_are_alike(device):
    weight = torch.randn(64, 30, device=device)
    for largest, folded in ((1.0, True), (1.9, True), (2.1, False), (100.0, False)):
        scale = torch.full((64,), 0.01, device=device)
        scale[5] *= largest
        assert folded == (largest**2 <= 4 * (63 + largest**2) / 64)
        _, factor, column_scale = quantrain.int8_weight_transpose(weight, scale)
        assert_same(factor, scale if folded else torch.ones_like(scale))
        assert bool((column_scale == 1).all()) == folded


@on_each_device
def test_a_weight_row_with_nan_reaches_the_result(device):
    weight = torch.randn(6, 10, device=device)
    weight[2, 3] = NAN
    _, scale = quantrain.int8_quantize_rows(weight)
    found, factor, _ = quantrain.int8_weight_transpose(weight, scale, scheme="fold")
    assert factor[2].isnan() and (found[:, 2] == 0).all() and factor.isnan().sum() == 1
    found, factor, column_scale = quantrain.int8_weight_transpose(weight, scale, scheme="columns")
    assert (factor == 1).all() and column_scale.isnan().flatten().tolist() == [i == 3 for i in range(10)]
    _, factor, column_scale = quantrain.int8_weight_transpose(weight, scale)
    assert factor.isnan().any() or column_scale.isnan().any()


# ---- CUDA ----


@pytest.mark.cuda
@each(SAMPLES + [Sample("wide", (5, 40001), "heavy"), Sample("very_wide", (3, 131072)), Sample("tall", (33000, 70))])
@in_each_dtype
def test_cpu_and_cuda_agree(sample, dtype):
    x, (column_factor, row_factor) = sample.make(dtype=dtype), sample.factors()
    for factors in ({}, dict(column_factor=column_factor, row_factor=row_factor)):
        on_cuda = {name: factor.cuda() for name, factor in factors.items()}
        assert_all_same(
            ops.int8_quantize_rows_and_columns.seeded(sample.make("cuda", dtype), seed=9, offset=10, **on_cuda),
            ops.int8_quantize_rows_and_columns.seeded(x, seed=9, offset=10, **factors),
        )
        assert_all_same(
            quantrain.int8_quantize_rows_and_columns(sample.make("cuda", dtype), **on_cuda),
            quantrain.int8_quantize_rows_and_columns(x, **factors),
        )


@pytest.mark.cuda
def test_a_graph_draws_afresh_at_each_replay():
    x = torch.randn(64, 200, device="cuda", dtype=torch.bfloat16)

    def step():
        return (
            *quantrain.int8_quantize_rows(x, stochastic=True),
            *quantrain.int8_quantize_columns(x, stochastic=True),
            *quantrain.int8_quantize_rows_and_columns(x, stochastic=True),
        )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    torch.cuda.synchronize()  # capture fills the graph's seed on a stream of its own
    replays = []
    torch.cuda.manual_seed(21)
    for _ in range(3):
        graph.replay()
        replays.append([r.clone() for r in results])
    torch.cuda.manual_seed(21)
    for replay in replays:  # the numbers of eager calls, which are new each time
        assert_all_same(replay, step())
    for i in (0, 2, 4, 6):
        assert not torch.equal(replays[0][i], replays[1][i]) and not torch.equal(replays[1][i], replays[2][i])
    assert not torch.equal(replays[0][0], replays[0][4])


@pytest.mark.cuda
def test_a_graph_holds_the_deterministic_operators():
    x, a = torch.randn(48, 96, device="cuda"), codes((48, 96), device="cuda")
    scale = scales(48, device="cuda")

    def step():
        return (
            *quantrain.int8_quantize_rows_and_columns(x),
            quantrain.int8_transpose(a),
            *quantrain.int8_weight_transpose(x, scale),
        )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    x.copy_(torch.randn(48, 96) * 3)
    a.copy_(codes((48, 96), 1))
    scale[0] = 50.0  # "auto" decides anew
    graph.replay()
    assert_all_same(results, step())
    assert (results[6] == 1).all()
