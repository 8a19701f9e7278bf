"""Stochastic codes are unbiased and have the variance of stochastic rounding: z-tests with fixed seeds, false alarms below 1e-6 a test.

The stated slack of the mean is 2e-4 steps: the factor 1 - 2^-20 (at most 1.2e-4 at the largest code) and 16-bit random numbers (at most 2^-17 a
draw, and none on average).
"""

import math

import pytest
import torch
from samples.int8 import in_each_dtype

import quantrain

ops = torch.ops.quantrain
SLACK = 2e-4
LIMIT = 5.5  # standard errors: 4e-8 for one sum


def row(dtype, largest=1.0):
    """A row whose largest element stands first, then elements all over its range, and its negatives."""
    g = torch.Generator().manual_seed(31)
    x = torch.cat([torch.tensor([1.0]), 1.98 * torch.rand(60, generator=g) - 0.99, torch.tensor([0.0, 1e-3, -1.0])])
    return (largest * x).to(dtype)


def draws(x, n, by_columns=False, seed=77):
    """n draws of a row's codes, float64 [n, K], and its scale: n equal rows (or columns) in one call."""
    if by_columns:
        found, scale = ops.int8_quantize_columns.seeded(x.expand(n, -1).t().contiguous(), seed=seed, offset=5)
    else:
        found, scale = ops.int8_quantize_rows.seeded(x.expand(n, -1), seed=seed, offset=5)
    assert (scale == scale.flatten()[0]).all()
    return found.double(), scale.flatten()[0].double()


@in_each_dtype
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("largest", [1.0, 3e-5, 1e4])
def test_each_element_is_unbiased(dtype, by_columns, largest):
    """Means of 20,000 draws of each element, the largest among them, against its exact value: 64 elements, 5.5 standard errors, 3e-6 / 64 each."""
    n = 20000
    x = row(dtype, largest)
    found, scale = draws(x, n, by_columns)
    exact = x.double() / scale
    share = exact - exact.floor()
    error = (share * (1 - share) / n).sqrt()
    distance = (found.mean(0) - exact).abs()
    # A share near 0 or 1 is not normal at this n; Poisson's tail needs a few draws more.
    assert (distance <= LIMIT * error + 16 / n * (share * (1 - share) < 0.005) + SLACK).all()
    # The test sees a bias of a fortieth of a step.
    assert (LIMIT * error + SLACK < 0.025).all()
    assert (found - exact).abs().max() <= 1 + SLACK


@in_each_dtype
def test_the_largest_element_is_unbiased(dtype):
    """4 million draws of the largest element: the mean error is within 2e-4 steps, which a scale in 16 bits (0.06 steps) or a clamp would not be."""
    x = torch.full((8000, 500), 0.7).to(dtype) * torch.tensor([1.0, -1.0]).to(dtype).repeat(250)
    found, scale = ops.int8_quantize_rows.seeded(x, seed=3, offset=1)
    error = found.double() * x.double().sign() - x.double().abs() / scale.double()
    assert error.abs().max() <= 1 + SLACK
    # The variance of a share of at most 2e-4.
    assert abs(error.mean().item()) <= SLACK + LIMIT * math.sqrt(2e-4 / error.numel())


@in_each_dtype
def test_sums_of_elements_are_unbiased(dtype):
    """A small bias of each element adds up in a sum of 2 million, with equal signs, the elements' signs and random ones: 5.5 standard errors."""
    g = torch.Generator().manual_seed(4)
    x = torch.randn(2000, 1000, generator=g).to(dtype)
    found, scale = ops.int8_quantize_rows.seeded(x, seed=8, offset=2)
    exact = x.double() / scale.double()
    share = exact - exact.floor()
    error = found.double() - exact
    limit = LIMIT * (share * (1 - share)).sum().sqrt()
    for sign in (torch.ones_like(exact), exact.sign(), torch.randn(exact.shape, generator=g).sign().double()):
        # The shrinking moves each element by at most 2^-20 of itself.
        assert abs((error * sign).sum()) <= limit + 2**-20 * exact.abs().sum() * 1.1


def test_errors_have_the_exact_variance():
    """The mean square of the errors over their exact variance: its own standard deviation is known, 5.5 of them."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(2000, 500, generator=g)
    for found, scale in (
        ops.int8_quantize_rows.seeded(x, seed=1, offset=2),
        (t.t() for t in ops.int8_quantize_columns.seeded(x, seed=1, offset=2)),
    ):
        exact = x.double() / scale.double()
        share = exact - exact.floor()
        variance = share * (1 - share)
        square = (found.double() - exact).square()
        # Var(e^2) of an error of 1 - f with probability f and -f otherwise: f (1 - f) (1 - 2 f)^2.
        spread = (variance * (1 - 2 * share).square()).sum().sqrt()
        assert abs((square - variance).sum()) <= LIMIT * spread + 4e-4 * variance.numel()


def test_errors_of_neighbours_and_of_draws_are_independent():
    """Correlations of an error with those beside it, and of a draw with the next offset's and the next seed's: 6 sums, each within 5.5 sqrt(n)."""
    x = torch.full((1000, 1000), 0.5)
    x[:, 0] = 127  # the scale is 1, the shares 1/2
    e, by_offset, by_seed = (
        2 * ops.int8_quantize_rows.seeded(x, seed=seed, offset=offset)[0][:, 1:].double() - 1
        for seed, offset in ((6, 0), (6, 4), (7, 0))
    )
    assert e.abs().max() == 1 and abs(e.sum()) <= LIMIT * math.sqrt(e.numel())
    beside = [(e[:, k:], e[:, :-k]) for k in (1, 2, 8)]  # half words, words and blocks of Philox
    for a, b in (*beside, (e[1:], e[:-1]), (e, by_offset), (e, by_seed)):
        assert abs((a * b).sum()) <= LIMIT * math.sqrt(a.numel())


@pytest.mark.parametrize("scheme", ["fold", "columns"])
def test_products_of_stochastic_codes_are_unbiased(scheme):
    """dX and dW as a training step makes them, 400 draws, against the products of the exact gradient with the quantized operands."""
    g = torch.Generator().manual_seed(9)
    n, tokens, k, out = 400, 12, 10, 9
    x, w, dy = (torch.randn(s, generator=g) for s in ((tokens, k), (out, k), (tokens, out)))
    (xq, xs), (wq, ws) = quantrain.int8_quantize_rows(x), quantrain.int8_quantize_rows(w)
    wt, factor, st = quantrain.int8_weight_transpose(wq, ws, scheme=scheme)
    dx, dw = [], []
    for i in range(n):
        gq, gs, gt, gts = ops.int8_quantize_rows_and_columns.seeded(
            dy, column_factor=factor, row_factor=xs, seed=10, offset=2 * i
        )
        dx.append(quantrain.int8_mm(gq, wt, gs, st))
        dw.append(quantrain.int8_mm(gt, quantrain.int8_transpose(xq), gts))
    exact_dx = (dy.double() * factor.double()) @ (wt.double() * st.double()).t()
    exact_dw = dy.double().t() @ (xq.double() * xs.double())
    for found, exact in ((torch.stack(dx).double(), exact_dx), (torch.stack(dw).double(), exact_dw)):
        error = found.std(0) / math.sqrt(n)
        z = (found.mean(0) - exact) / error
        # Student's t with 399 degrees of freedom, up to 120 elements: 6.2 is 1e-9 each. The slack of 2e-4 steps is far below one standard error.
        assert z.abs().max() < 6.2
        assert 0.6 < z.square().mean() < 1.6
        assert (found.std(0) > 0).all()
