"""The fused operators under the loss scaler: check and norm, scale and clip, stochastic rounding."""

from __future__ import annotations

import math

import pytest
import torch
from reference import amp as oracle
from torch.library import opcheck

import quantrain  # noqa: F401

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ops = torch.ops.quantrain


def make_grads(device: str, seed: int = 0, magnitude: float = 50.0) -> list[torch.Tensor]:
    """Every size class of the kernels, element types mixed, one tensor not contiguous, one with gaps, one misaligned."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * magnitude

    grads = [draw(16384), draw(3), draw(0), draw(40000).bfloat16(), draw(130, 257).half(), draw(1), draw(70000)]
    grads = [grad.to(device) for grad in grads]
    grads.append(draw(64, 96).to(device).t())
    grads.append(draw(50, 40).to(device)[:, ::2])
    grads.append(draw(2049).to(device)[1:])
    grads.append(draw(8, 3, 5, 5).to(device).to(memory_format=torch.channels_last))
    return grads


def one(value: float, device: str) -> torch.Tensor:
    return torch.tensor(value, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1.0, 65536.0, 3.7])
def test_check_norm_equals_float64(device, scale):
    grads = make_grads(device)
    found_inf, norm, grad_scale, non_finite = ops._amp_check_norm(grads, one(scale, device), max_norm=0.5)
    expected = oracle.norm(grads, scale)
    assert float(found_inf) == 0.0 and not non_finite.any()
    assert float(norm) == pytest.approx(expected, rel=2e-6)
    assert float(grad_scale) == pytest.approx(scale / min(1.0, 0.5 / (expected + 1e-6)), rel=4e-6)
    assert norm.shape == () and non_finite.shape == (len(grads),)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_one_bad_element_is_found_and_named(device, value):
    for index in range(len(make_grads(device))):
        grads = make_grads(device)
        if grads[index].numel() == 0:
            continue
        grads[index][(-1,) * grads[index].dim()] = value
        found_inf, norm, _, non_finite = ops._amp_check_norm(grads, one(2.0, device))
        assert float(found_inf) == 1.0
        assert non_finite.tolist() == oracle.non_finite(grads) and int(non_finite.sum()) == 1
        assert not math.isfinite(float(norm))


@pytest.mark.parametrize("device", DEVICES)
def test_large_finite_gradients_are_no_overflow(device):
    grads = [torch.full((1000,), 3e38, device=device), torch.full((1000,), 65504.0, device=device, dtype=torch.float16)]
    found_inf, norm, _, _ = ops._amp_check_norm(grads, one(2.0**100, device))
    assert float(found_inf) == 0.0
    assert float(norm) == pytest.approx(oracle.norm(grads, 2.0**100), rel=2e-6)
    assert (
        float(ops._amp_check_norm(grads, one(1.0, device))[0]) == 0.0
    )  # the sum overflows float32, the elements do not


@pytest.mark.parametrize("device", DEVICES)
def test_empty_lists(device):
    for grads in ([], [torch.empty(0, device=device)]):
        found_inf, norm, grad_scale, non_finite = ops._amp_check_norm(grads, one(8.0, device))
        assert (float(found_inf), float(norm), float(grad_scale)) == (0.0, 0.0, 8.0)
        assert non_finite.shape == (len(grads),)
        ops._amp_scale_(grads, one(8.0, device))


@pytest.mark.parametrize("device", DEVICES)
def test_more_tensors_than_a_launch_takes(device):
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(0, 300, (2500,), generator=generator).tolist()
    grads = [torch.randn(size, generator=generator).to(device) for size in sizes]
    grads[2400] = torch.full((5,), math.nan, device=device)
    found_inf, _, _, non_finite = ops._amp_check_norm(grads, one(4.0, device))
    assert float(found_inf) == 1.0 and non_finite.nonzero().flatten().tolist() == [2400]
    expected = [grad / 4.0 for grad in grads]
    ops._amp_scale_(grads, one(4.0, device))
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_norm", [0.5, 1e9, math.inf])
@pytest.mark.parametrize("scale", [1024.0, 3.7])
def test_scale_unscales_and_clips_in_place(device, max_norm, scale):
    grads = make_grads(device, seed=3)
    before = [grad.clone() for grad in grads]
    norm = ops._amp_check_norm(grads, one(scale, device))[1]
    ops._amp_scale_(grads, one(scale, device), norm, max_norm=max_norm)
    for grad, old in zip(grads, before, strict=True):
        wanted = oracle.scaled(old, scale, float(norm), max_norm)
        step = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[grad.dtype]
        assert ((grad.double() - wanted).abs() <= step * wanted.abs() + 2.0**-25).all()


@pytest.mark.parametrize("device", DEVICES)
def test_without_clipping_equals_pytorch_unscale_bit_for_bit(device):
    for scale in (65536.0, 3.7):
        grads = [torch.randn(70001, device=device), torch.randn(33, 65, device=device)]
        expected = [grad.clone() for grad in grads]
        inverse = torch.tensor(scale, device=device).double().reciprocal().float()
        torch._amp_foreach_non_finite_check_and_unscale_(expected, torch.zeros((), device=device), inverse)
        ops._amp_scale_(grads, one(scale, device))
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_norm_is_deterministic(device):
    grads = make_grads(device, seed=5)
    norms = {float(ops._amp_check_norm(grads, one(2.0, device))[1]) for _ in range(5)}
    assert len(norms) == 1


@pytest.mark.cuda
def test_norm_of_cuda_is_that_of_the_cpu():
    on_cpu, on_cuda = make_grads("cpu", seed=7), [grad.cuda() for grad in make_grads("cpu", seed=7)]
    a = ops._amp_check_norm(on_cpu, one(16.0, "cpu"))[1]
    b = ops._amp_check_norm(on_cuda, one(16.0, "cuda"))[1]
    assert float(a) == pytest.approx(float(b), rel=1e-6)


# ---- stochastic rounding ----------------------------------------------------------------------------------------------------


def masters_of(dtype: torch.dtype) -> torch.Tensor:
    """Values of every magnitude that the type has, subnormal ones too, and values that it holds exactly."""
    generator = torch.Generator().manual_seed(2)
    exponents = torch.linspace(-26, 15, 4001) if dtype == torch.float16 else torch.linspace(-120, 120, 4001)
    values = torch.randn(4001, generator=generator) * torch.exp2(exponents)
    limit = 65000.0 if dtype == torch.float16 else 1e38
    return torch.cat([values.clamp(-limit, limit), values.clamp(-limit, limit).to(dtype).float()[:100], torch.zeros(3)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding_takes_a_neighbour_and_is_unbiased(device, dtype):
    master = masters_of(dtype).to(device)
    down, up = oracle.neighbours(master.cpu(), dtype)
    draws = 2000
    total = torch.zeros(len(master), dtype=torch.float64)
    for seed in range(draws):
        parameter = torch.empty_like(master, dtype=dtype)
        ops._amp_round_stochastic_.seeded([parameter], [master], seed=seed, offset=0)
        result = parameter.cpu().double()
        assert bool(((result == down) | (result == up)).all())
        total += result
    # z of the mean of each element: 4104 elements at |z| < 6 raise a false alarm once in 1e5 runs (2e-9 an element).
    width = (up - down).clamp_min(1e-300)
    p = ((master.cpu().double() - down) / width).clamp(0, 1)
    sigma = width * (p * (1 - p) / draws).sqrt()
    error = (total / draws - master.cpu().double()).abs()
    assert bool((error <= 6 * sigma + width * 2.0**-23)[p * (1 - p) * draws > 10].all())
    exact = up == down
    assert int(exact.sum()) >= 103 and bool((error[exact] == 0).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding_of_special_values(device, dtype):
    largest = torch.finfo(dtype).max
    master = torch.tensor(
        [math.inf, -math.inf, math.nan, 0.0, -0.0, largest, -largest, largest * (1 + 1e-4)], device=device
    )
    for seed in range(50):
        parameter = torch.empty_like(master, dtype=dtype)
        ops._amp_round_stochastic_.seeded([parameter], [master], seed=seed, offset=3)
        torch.testing.assert_close(parameter, master.to(dtype), rtol=0, atol=0, equal_nan=True)
        assert torch.signbit(parameter[4])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding_is_the_same_on_cpu_and_cuda(dtype):
    masters = [masters_of(dtype), torch.randn(5), torch.randn(0), torch.randn(70000), torch.randn(64, 48).t()]
    results = []
    for device in ("cpu", "cuda"):
        parameters = [torch.empty_like(master, dtype=dtype, device=device) for master in masters]
        ops._amp_round_stochastic_.seeded(parameters, [m.to(device) for m in masters], seed=11, offset=8)
        results.append([parameter.cpu() for parameter in parameters])
    assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_elements_of_all_tensors_draw_their_own_numbers(device):
    masters = [torch.full((1000,), 1.0 + 2.0**-8, device=device) for _ in range(3)]
    parameters = [torch.empty_like(master, dtype=torch.bfloat16) for master in masters]
    ops._amp_round_stochastic_.seeded(parameters, masters, seed=1, offset=0)
    bits = [parameter > 1.0 for parameter in parameters]
    for a, b in ((0, 1), (0, 2), (1, 2)):  # equal bits would agree in 1000 of 1000; independent ones in 500 +- 16
        assert 400 < int((bits[a] == bits[b]).sum()) < 600


def test_default_generator_follows_manual_seed():
    def draw():
        torch.manual_seed(5)
        parameter = torch.empty(256, dtype=torch.bfloat16)
        ops._amp_round_stochastic_([parameter], [torch.full((256,), 1.001)])
        return parameter

    assert torch.equal(draw(), draw())


# ---- errors, schemas, compilers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops._amp_check_norm([torch.ones(2, dtype=torch.int32)], one(1.0, "cpu")),
            TypeError,
            "got Int at index 0",
        ),
        (lambda: ops._amp_check_norm([torch.ones(2, dtype=torch.float64)], one(1.0, "cpu")), TypeError, "got Double"),
        (
            lambda: ops._amp_check_norm([torch.ones(2)], torch.ones(2)),
            ValueError,
            r"scale with one element, got shape \[2\]",
        ),
        (
            lambda: ops._amp_check_norm([torch.ones(2)], torch.ones((), dtype=torch.float64)),
            TypeError,
            "scale of float32",
        ),
        (
            lambda: ops._amp_check_norm([torch.ones(2)], one(1.0, "cpu"), max_norm=0.0),
            ValueError,
            "max_norm > 0, got 0",
        ),
        (
            lambda: ops._amp_scale_([torch.ones(2)], one(1.0, "cpu"), max_norm=math.nan),
            ValueError,
            "max_norm > 0, got nan",
        ),
        (lambda: ops._amp_scale_([torch.ones(2).to_sparse()], one(1.0, "cpu")), Exception, "."),
        (
            lambda: ops._amp_round_stochastic_.seeded([torch.ones(2).half()], [], seed=0, offset=0),
            ValueError,
            "a master for each parameter, got 0 for 1",
        ),
        (
            lambda: ops._amp_round_stochastic_.seeded([torch.ones(2)], [torch.ones(2)], seed=0, offset=0),
            TypeError,
            "parameters of float16 or bfloat16",
        ),
        (
            lambda: ops._amp_round_stochastic_.seeded([torch.ones(2).half()], [torch.ones(3)], seed=0, offset=0),
            ValueError,
            r"a master of shape \[2\], got \[3\]",
        ),
    ],
)
def test_errors_name_rule_and_value(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.cuda
def test_two_devices_are_refused():
    with pytest.raises(TypeError, match="on one device, got cpu and cuda:0"):
        ops._amp_check_norm([torch.ones(2), torch.ones(2, device="cuda")], one(1.0, "cpu"))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    grads = [torch.randn(5, device=device), torch.randn(3, 4, device=device).half()]
    scale = one(4.0, device)
    opcheck(ops._amp_check_norm, (grads, scale), {"max_norm": 1.0})
    opcheck(ops._amp_scale_, (grads, scale, one(2.0, device)), {"max_norm": 1.0})
    parameters, masters = [torch.zeros(6, device=device).bfloat16()], [torch.randn(6, device=device)]
    opcheck(ops._amp_round_stochastic_.seeded, (parameters, masters), {"seed": 1, "offset": 0})


def test_compiles_whole():
    def unscale_and_clip(a, b, scale):
        norm = ops._amp_check_norm([a, b], scale, max_norm=1.0)[1]
        ops._amp_scale_([a, b], scale, norm, max_norm=1.0)
        return a + 1, b + 1, norm

    a, b, scale = torch.randn(40), torch.randn(6, 7), one(8.0, "cpu")
    expected = unscale_and_clip(a.clone(), b.clone(), scale)
    compiled = torch.compile(unscale_and_clip, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(a.clone(), b.clone(), scale), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.cuda
def test_cuda_graph():
    grads = make_grads("cuda", seed=9)
    scale = one(8.0, "cuda")

    def body():
        norm = ops._amp_check_norm(grads, scale, max_norm=1.0)[1]
        ops._amp_scale_(grads, scale, norm, max_norm=1.0)

    body()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    fresh = make_grads("cuda", seed=10)
    for grad, value in zip(grads, fresh, strict=True):
        grad.copy_(value)
    graph.replay()
    norm = ops._amp_check_norm(fresh, scale, max_norm=1.0)[1]
    ops._amp_scale_(fresh, scale, norm, max_norm=1.0)
    assert all(torch.equal(a, b) for a, b in zip(grads, fresh, strict=True))
