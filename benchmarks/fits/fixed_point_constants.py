"""The constants c of fixed_point_fraction_length: a fraction length f is right where c / 2^(f + 1) < statistic <= c / 2^f.

    python benchmarks/fits/fixed_point_constants.py

For a Gaussian of standard deviation s, in steps of the quantizer, let g(s) be the mean squared error of rounding to the codes of a word.
With fraction length f the error is 4^-f g(s 2^f); f and f - 1 are equally good where g(s) = 4 g(s / 2). That s is c, whatever f is.
Signed words hold [-(2^(WL-1) - 1), 2^(WL-1) - 1]; unsigned ones [0, 2^WL - 1], of the Gaussian after a ReLU: "std" takes the deviation
before the ReLU, "rms" the root mean square after it (smaller by the square root of 2). The integral is taken cell by cell, by Gauss
and Legendre; the root by bisection. Prints the table of csrc/common/fixed_point.h. (F8Net, arXiv:2202.05239, rounds those of 8 bits to
40, 70, 40 and 50.)
"""

from __future__ import annotations

import argparse
import math

import numpy as np

NODES, WEIGHTS = np.polynomial.legendre.leggauss(24)
REACH = 14.0  # deviations beyond which the Gaussian is left out: 1e-44


def squared_error(s: float, largest: int) -> float:
    """g(s) / 2: the integral over the positive half of codes 0..largest."""
    cells = int(min(largest, math.ceil(REACH * s)))
    # Cell k holds the numbers nearest to k; the first is half a cell.
    code = np.arange(cells + 1, dtype=np.float64)
    low, high = np.maximum(code - 0.5, 0.0), code + 0.5
    total = integral(low, high, code, s)
    if cells == largest and REACH * s > largest + 0.5:
        edges = np.linspace(largest + 0.5, REACH * s + largest, 401)
        total += integral(edges[:-1], edges[1:], np.full(400, float(largest)), s)
    return total


def integral(low, high, code, s: float) -> float:
    middle, half = (low + high) / 2, (high - low) / 2
    x = middle[:, None] + half[:, None] * NODES
    density = np.exp(-0.5 * (x / s) ** 2) / (s * math.sqrt(2 * math.pi))
    return float((((x - code[:, None]) ** 2 * density) @ WEIGHTS * half).sum())


def constant(word_length: int, signed: bool) -> float:
    """c of the Gaussian's standard deviation. The ReLU halves the error of either fraction length and moves nothing else."""
    largest = 2 ** (word_length - signed) - 1
    low, high = 0.05 * largest, 1.5 * largest
    for _ in range(60):
        s = math.sqrt(low * high)
        if squared_error(s, largest) < 4 * squared_error(s / 2, largest):
            low = s  # the longer fraction still wins
        else:
            high = s
    return s


def table() -> dict[int, dict[str, float]]:
    rows = {}
    for word_length in range(2, 17):
        signed, unsigned = constant(word_length, True), constant(word_length, False)
        rows[word_length] = {
            "std signed": signed,
            "std unsigned": unsigned,
            "rms signed": signed,
            "rms unsigned": unsigned / math.sqrt(2),
        }
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    print(f"{'word':>5} {'std signed':>14} {'std unsigned':>14} {'rms signed':>14} {'rms unsigned':>14}")
    for word_length, row in table().items():
        print(f"{word_length:5d} " + " ".join(f"{value:14.6g}" for value in row.values()))


if __name__ == "__main__":
    main()
