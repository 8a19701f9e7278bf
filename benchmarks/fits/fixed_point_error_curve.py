"""Rounding error of the 8-bit fixed-point formats on Gaussians of many widths: the curves behind the rule for fraction lengths.

    python benchmarks/fits/fixed_point_error_curve.py [--output benchmarks/results/fixed-point-error-DATE.csv]

For each sigma and each fraction length: the root mean square error over sigma, of signed codes (-127 to 127) on the Gaussian itself and of
unsigned codes (0 to 255) on its positive part. The Gaussian is its 200,000 quantiles, not a draw: the same numbers on every machine.
Prints where the best fraction length changes, as c = sigma * 2^fraction_length. NumPy and torch alone; quantrain is not imported.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch

SAMPLES = 200_000
SIGMAS = np.exp2(np.arange(-4, 6.001, 0.0625))


def gaussian() -> np.ndarray:
    return torch.special.ndtri((torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES).numpy()


def relative_error(x: np.ndarray, sigma: float, fraction_length: int, signed: bool) -> float:
    """RMSE / sigma of round(x * 2^fraction_length), clamped to the codes; x is the Gaussian of deviation 1."""
    low, high = (-127, 127) if signed else (0, 255)
    value = sigma * (x if signed else np.maximum(x, 0))
    code = np.clip(np.rint(value * 2.0**fraction_length), low, high)
    return float(np.sqrt(np.mean(np.square(code * 2.0**-fraction_length - value)))) / sigma


def crossing(x: np.ndarray, fraction_length: int, signed: bool) -> float:
    """The sigma at which fraction_length and the next smaller one are as good as each other."""
    low, high = 0.05, 100.0
    for _ in range(30):
        middle = (low * high) ** 0.5
        finer, coarser = (
            relative_error(x, middle, length, signed) for length in (fraction_length, fraction_length - 1)
        )
        low, high = (middle, high) if finer < coarser else (low, middle)
    return middle


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the curves as CSV")
    options = parser.parse_args(arguments)
    x = gaussian()
    for signed in (True, False):
        for length in range(1, 8 if signed else 9):
            sigma = crossing(x, length, signed)
            kind = "signed" if signed else "unsigned"
            print(
                f"{kind:<9} fraction length {length} to {length - 1} at sigma {sigma:7.4f}, c = {sigma * 2**length:.2f}"
            )
    if options.output:
        with options.output.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["format", "sigma", *(f"fl{length}" for length in range(9))])
            for signed in (True, False):
                lengths = range(8 if signed else 9)
                for sigma in SIGMAS:
                    errors = [f"{relative_error(x, sigma, length, signed):.5g}" for length in lengths]
                    writer.writerow(
                        ["signed" if signed else "unsigned", f"{sigma:.6g}", *errors, *[""] * (9 - len(errors))]
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
