"""The z-test of an unbiased mean, and the rate of false alarms that the statistical tests share."""

import math
from statistics import NormalDist

import torch

FALSE_ALARM = 1e-6  # of each statistical test, if its hypothesis holds


def largest_z(draws, exact, directions=16):
    """Largest |z| of the mean of ``draws`` [n, ...] against ``exact`` along random directions, and the bound it keeps with
    probability 1 - FALSE_ALARM if the mean is exact (Bonferroni)."""
    n = draws.shape[0]
    g = torch.Generator().manual_seed(99)
    along = torch.randn(exact.numel(), directions, generator=g, dtype=torch.float64)
    errors = (draws.double() - exact.double()).reshape(n, -1) @ along
    z = errors.mean(0) / (errors.std(0) / math.sqrt(n))
    return float(z.abs().max()), NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * directions))
