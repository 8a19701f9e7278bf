#!/usr/bin/env python3
"""Draws docs/figures/*.png: the formulas of docs/fake_quant.md, and the bandwidths of the committed benchmark results.

Usage: make_figures.py [--out DIR]. Needs numpy and matplotlib; the formulas are written out here in NumPy, nothing of the
package is imported. bandwidth.png and amp_losses.png are drawn only where benchmarks/results holds a GPU result of their benchmark,
fixed_point_error.png only where it holds the curves of benchmarks/fixed_point_error_curve.py.
fixed_point_lengths.png, fixed_point_speed.png and fixed_point_resnet50.png are those of benchmarks/fixed_point/figures.py, gradient_quant_*.png and int8_*.png those of benchmarks/gradient_quant/figures.py and benchmarks/int8_training/figures.py, the measured
ones only where their results are.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402, the backend comes first

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from fixed_point import figures as fixed_point  # noqa: E402
from gradient_quant import figures as gradient_quant  # noqa: E402
from int8_training import figures as int8_training  # noqa: E402

BLUE, ORANGE, GREY, PALE = "#1f5fa8", "#d1650f", "#7a7a7a", "#dce8f5"


def fake_quantize(x: np.ndarray, scale: float, zero_point: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """(y, inside): the simulated value, and where the straight-through gradient passes."""
    code = np.rint(x / scale) + zero_point
    return (np.clip(code, low, high) - zero_point) * scale, (code >= low) & (code <= high)


def learnable_scale_gradient(x: np.ndarray, scale: float, zero_point: int, low: int, high: int) -> np.ndarray:
    """dy/dscale of LSQ (Esser et al. 2020, eq. 3), with a zero point as in LSQ+."""
    code = np.rint(x / scale) + zero_point
    inside = (code >= low) & (code <= high)
    return np.where(inside, code - zero_point - x / scale, np.clip(code, low, high) - zero_point)


def shade(axis: plt.Axes, x: np.ndarray, inside: np.ndarray) -> None:
    edges = x[inside]
    axis.axvspan(edges[0], edges[-1], color=PALE, zorder=0, label="gradient passes (dL/dx = dL/dy)")


def open_frame(axis: plt.Axes) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def tidy(axis: plt.Axes, title: str, ylabel: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("x")
    axis.set_ylabel(ylabel)
    axis.axhline(0, color=GREY, linewidth=0.5)
    axis.axvline(0, color=GREY, linewidth=0.5)
    open_frame(axis)
    axis.legend(fontsize=8, frameon=False, loc="upper left")


def staircase(out: Path) -> None:
    """Symmetric and affine fake quantisation with the range in which the straight-through gradient passes."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    x = np.linspace(-3, 3, 6001)
    cases = [
        ("symmetric, 3 bits: codes -4 to 3, scale 0.5", 0.5, 0, -4, 3),
        ("affine, 3 bits: codes 0 to 7, scale 0.5, zero point 2", 0.5, 2, 0, 7),
    ]
    for axis, (title, scale, zero_point, low, high) in zip(axes, cases, strict=True):
        y, inside = fake_quantize(x, scale, zero_point, low, high)
        shade(axis, x, inside)
        axis.plot(x, x, color=GREY, linewidth=1, linestyle="--", label="y = x")
        axis.plot(x, y, color=BLUE, linewidth=1.6, label="fake_quantize(x)")
        tidy(axis, title, "y")
        axis.set_ylim(-3, 4.4)
    figure.savefig(out / "staircase.png", dpi=150)
    plt.close(figure)


def lsq_gradients(out: Path) -> None:
    """What a learnable scale and a learnable zero point receive, as a function of x."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    x = np.linspace(-3, 3, 6001)
    _, inside = fake_quantize(x, 0.5, 0, -4, 3)
    shade(axes[0], x, inside)
    axes[0].plot(x, learnable_scale_gradient(x, 0.5, 0, -4, 3), color=ORANGE, linewidth=1.4, label="dy/dscale")
    tidy(axes[0], "LSQ: codes -4 to 3, scale 0.5", "dy/dscale")
    axes[0].set_ylim(-5, 6.5)
    _, inside = fake_quantize(x, 0.5, 2, 0, 7)
    shade(axes[1], x, inside)
    axes[1].plot(x, learnable_scale_gradient(x, 0.5, 2, 0, 7), color=ORANGE, linewidth=1.4, label="dy/dscale")
    axes[1].plot(x, np.where(inside, 0.0, -0.5), color=BLUE, linewidth=1.4, label="dy/dzero_point")
    tidy(axes[1], "LSQ+: codes 0 to 7, scale 0.5, zero point 2", "gradient")
    axes[1].set_ylim(-5, 9)
    figure.savefig(out / "lsq_gradients.png", dpi=150)
    plt.close(figure)


def range_search(out: Path) -> None:
    """Squared error against the clipping ratio of the MSE range search, for normal samples and 3, 4 and 8 bits."""
    x = np.random.default_rng(0).standard_normal(65536).astype(np.float32)
    ratios = np.arange(1, 81) / 80
    figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for bits, colour in ((3, ORANGE), (4, BLUE), (8, GREY)):
        high = 2 ** (bits - 1) - 1
        errors = []
        for ratio in ratios:
            y, _ = fake_quantize(x, ratio * np.abs(x).max() / high, 0, -high - 1, high)
            errors.append(float(np.mean((x - y) ** 2)))
        best = int(np.argmin(errors))
        axis.semilogy(ratios, errors, color=colour, linewidth=1.6, label=f"{bits} bits, least at {ratios[best]:.2f}")
        axis.plot(ratios[best], errors[best], "o", color=colour)
    axis.set_title("65,536 standard normal values: error of a range shrunk by r", fontsize=10)
    axis.set_xlabel("r (1 = the min-max range)")
    axis.set_ylabel("mean squared error")
    open_frame(axis)
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(out / "range_search.png", dpi=150)
    plt.close(figure)


LINE = re.compile(
    r"^(?P<op>.{41}) (?P<granularity>.{17}) (?P<dtype>\w+) +(?P<shape>\S+) +[\d.]+ us"
    r" +\d+ GB/s +(?P<percent>[\d.]+) % +(?P<native>[\d.]+x|-)"
)


def bandwidth(out: Path) -> None:
    """Per cent of the copy's rate at 8192 x 8192, from the newest GPU result that holds bench_fake_quant's lines."""
    for path in sorted(
        (ROOT / "benchmarks" / "results").glob("nvidia-*.txt"), key=lambda p: p.stem[-10:], reverse=True
    ):
        lines = [m.groupdict() for m in map(LINE.match, path.read_text(encoding="utf-8").splitlines()) if m]
        rows = [row for row in lines if row["shape"] == "8192x8192" and row["op"].startswith("fake_quantize")]
        if rows:
            break
    else:
        return
    labels = list(dict.fromkeys(f"{row['op'].strip()}, {row['granularity'].strip()}" for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.2 + 0.34 * len(labels)), layout="constrained", sharey=True)
    for axis, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        for row in (row for row in rows if row["dtype"] == dtype):
            place = labels.index(f"{row['op'].strip()}, {row['granularity'].strip()}")
            ours = float(row["percent"])
            axis.barh(place - 0.2, ours, height=0.38, color=BLUE)
            axis.text(ours + 1, place - 0.2, f"{ours:.0f}", va="center", fontsize=7)
            if row["native"] != "-":
                native = ours / float(row["native"].rstrip("x"))
                axis.barh(place + 0.2, native, height=0.38, color=GREY)
                axis.text(native + 1, place + 0.2, f"{native:.0f}", va="center", fontsize=7)
        axis.axvline(100, color=GREY, linewidth=0.8, linestyle="--")
        axis.set_title(dtype, fontsize=10)
        axis.set_xlabel("per cent of the rate of a copy in the same run")
        axis.set_xlim(0, 115)
        open_frame(axis)
    axes[0].set_yticks(range(len(labels)), labels, fontsize=8)
    axes[0].invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (BLUE, GREY)]
    figure.legend(handles, ["quantrain", "PyTorch"], fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    figure.suptitle(f"8192 x 8192, from benchmarks/results/{path.name}", fontsize=10)
    figure.savefig(out / "bandwidth.png", dpi=150)
    plt.close(figure)


def amp_losses(out: Path) -> None:
    """Evaluation losses of one model trained in three precisions, from the newest result of bench_amp --curves."""
    paths = sorted((ROOT / "benchmarks" / "results").glob("amp-losses-*.csv"), key=lambda p: p.stem[-10:])
    if not paths:
        return
    rows = [line.split(",") for line in paths[-1].read_text(encoding="utf-8").splitlines()[1:]]
    figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for precision, colour, style in (("fp32", GREY, "-"), ("fp16", BLUE, "--"), ("bf16", ORANGE, ":")):
        points = [(int(step), float(loss)) for name, step, loss in rows if name == precision]
        axis.plot(
            *zip(*points, strict=True),
            color=colour,
            linestyle=style,
            linewidth=1.8,
            label=f"{precision}, {points[-1][1]:.3f}",
        )
    axis.set_title("tinyshakespeare, 0.8 M parameters: evaluation loss", fontsize=10)
    axis.set_xlabel("step")
    axis.set_ylabel("cross-entropy of a byte, nats")
    open_frame(axis)
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(out / "amp_losses.png", dpi=150)
    plt.close(figure)


def fixed_point_error(out: Path) -> None:
    """The error of each 8-bit fixed-point format against the width of a Gaussian, from the newest fixed-point-error CSV."""
    results = sorted((ROOT / "benchmarks" / "results").glob("fixed-point-error-*.csv"))
    if not results:
        return
    with results[-1].open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained", sharey=True)
    for axis, kind, numerator in zip(axes, ("signed", "unsigned"), (40, 70), strict=True):
        chosen = [row for row in rows if row["format"] == kind]
        sigma = np.array([float(row["sigma"]) for row in chosen])
        lengths = [length for length in range(9) if chosen[0][f"fl{length}"]]
        errors = np.array([[float(row[f"fl{length}"]) for length in lengths] for row in chosen])
        for length, curve in zip(lengths, errors.T, strict=True):
            axis.loglog(sigma, curve, color=GREY, linewidth=0.8, label="one fraction length" if length == 0 else None)
            best = sigma[errors.argmin(axis=1) == length]
            axis.annotate(str(length), (np.sqrt(best[0] * best[-1]), 0.0025), fontsize=8, ha="center", color=BLUE)
        axis.loglog(sigma, errors.min(axis=1), color=BLUE, linewidth=2, label="the best of them (numbers)")
        for length in lengths[1:]:
            label = f"{numerator} / 2^FL: where the rule steps" if length == 1 else None
            axis.axvline(numerator / 2**length, color=ORANGE, linewidth=0.9, linestyle="--", label=label)
        axis.set_title(
            f"{kind} codes, {'-127 to 127' if kind == 'signed' else '0 to 255, of the positive part'}", fontsize=10
        )
        axis.set_xlabel("standard deviation of the Gaussian")
        axis.set_ylim(0.0022, 1)
        open_frame(axis)
        axis.legend(fontsize=8, loc="upper right", framealpha=0.9, edgecolor="none")
    axes[0].set_ylabel("root mean square error / standard deviation")
    figure.savefig(out / "fixed_point_error.png", dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for draw in (staircase, lsq_gradients, range_search, bandwidth, amp_losses, fixed_point_error):
        draw(out)
    fixed_point.draw_all(ROOT / "benchmarks" / "results", out)
    gradient_quant.draw_all(ROOT / "benchmarks" / "results", out)
    int8_training.draw_all(ROOT / "benchmarks" / "results", out)
    print(f"make_figures: {', '.join(sorted(p.name for p in out.glob('*.png')))} in {out}")


if __name__ == "__main__":
    main()
