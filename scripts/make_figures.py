#!/usr/bin/env python3
"""Draws docs/figures/*.png: the formulas of docs/fake_quant.md, the passes of docs/batch_norm.md, and the committed
results of the benchmarks and studies.

Usage: make_figures.py [--out DIR]. Needs numpy and matplotlib; the formulas are written out here in NumPy, nothing of
the package is imported. What a figure is drawn from stands below it; one whose result is not committed is not drawn.
The figures of the fixed_point, gradient_quant and int8 pages are those of the studies' own modules;
benchmarks/common/drawing.py has the look of all."""

from __future__ import annotations

import argparse
import ast
import csv
import json
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from common.drawing import (  # noqa: E402
    BLUE,
    GREY,
    INK,
    ORANGE,
    PALE_BLUE,
    PALE_GREEN,
    PALE_GREY,
    PALE_ORANGE,
    SKY,
    panels,
    plt,
    save,
    source,
)
from studies.fixed_point import figures as fixed_point  # noqa: E402
from studies.gradient_quant import figures as gradient_quant  # noqa: E402
from studies.int8_training import figures as int8_training  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


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
    axis.axvspan(edges[0], edges[-1], color=PALE_BLUE, zorder=0, label="gradient passes (dL/dx = dL/dy)")


def tidy(axis: plt.Axes, title: str, ylabel: str) -> None:
    axis.set_title(title)
    axis.set_xlabel("x")
    axis.set_ylabel(ylabel)
    axis.axhline(0, color=GREY, linewidth=0.5)
    axis.axvline(0, color=GREY, linewidth=0.5)
    axis.legend(fontsize=10, loc="upper left")


def staircase(out: Path) -> None:
    """Symmetric and affine fake quantization with the range in which the straight-through gradient passes."""
    figure, axes = panels(2, 7.6)
    x = np.linspace(-3, 3, 6001)
    cases = [
        ("symmetric, 3 bits: codes -4 to 3, scale 0.5", 0.5, 0, -4, 3),
        ("affine, 3 bits: codes 0 to 7, scale 0.5, zero point 2", 0.5, 2, 0, 7),
    ]
    for axis, (title, scale, zero_point, low, high) in zip(axes, cases, strict=True):
        y, inside = fake_quantize(x, scale, zero_point, low, high)
        shade(axis, x, inside)
        axis.plot(x, x, color=GREY, linewidth=1.2, linestyle="--", label="y = x")
        axis.plot(x, y, color=BLUE, linewidth=2, label="fake_quantize(x)")
        tidy(axis, title, "y")
        axis.set_ylim(-3, 4.8)
    save(figure, out / "staircase.png")


def lsq_gradients(out: Path) -> None:
    """What a learnable scale and a learnable zero point receive, as a function of x."""
    figure, axes = panels(2, 7.6)
    x = np.linspace(-3, 3, 6001)
    _, inside = fake_quantize(x, 0.5, 0, -4, 3)
    shade(axes[0], x, inside)
    axes[0].plot(x, learnable_scale_gradient(x, 0.5, 0, -4, 3), color=ORANGE, linewidth=2, label="dy/dscale")
    tidy(axes[0], "LSQ: codes -4 to 3, scale 0.5", "gradient")
    axes[0].set_ylim(-5, 7.5)
    _, inside = fake_quantize(x, 0.5, 2, 0, 7)
    shade(axes[1], x, inside)
    axes[1].plot(x, learnable_scale_gradient(x, 0.5, 2, 0, 7), color=ORANGE, linewidth=2, label="dy/dscale")
    axes[1].plot(x, np.where(inside, 0.0, -0.5), color=BLUE, linewidth=2, label="dy/dzero_point")
    tidy(axes[1], "LSQ+: codes 0 to 7, scale 0.5, zero point 2", "gradient")
    axes[1].set_ylim(-5, 10.5)
    save(figure, out / "lsq_gradients.png")


BIT = 1 / 8  # bytes
NORM, BEND, ROUND, DIVIDE, JOINED = PALE_BLUE, PALE_GREEN, PALE_ORANGE, PALE_GREY, "#a9cdee"
# What lies between two convolutions: name, bytes read and written per element of 16 bits, colour. docs/batch_norm.md,
# "Bytes moved", has the joined passes, and 14 and 6 bytes for the forward calls. What each backward call must at least
# read and write follows from its formula (of the division that of its input alone), what is saved from PyTorch's
# formulas and, joined, from autograd/quant_conv.cpp, which also decodes the codes for the next weight's gradient.
PASSES = {
    "float": {
        "forward": [("statistics", 2, 0, NORM), ("normalize", 2, 2, NORM), ("ReLU", 2, 2, BEND)],
        "backward": [("ReLU", 4, 2, BEND), ("sums", 4, 0, NORM), ("normalize", 4, 2, NORM)],
        "saved": [("convolution's output", 2, NORM), ("ReLU's output", 2, BEND)],
    },
    "QAT, call by call": {
        "forward": [
            ("unfold", 2, 2, DIVIDE), ("statistics", 2, 0, NORM), ("normalize", 2, 2, NORM), ("ReLU", 2, 2, BEND),
            ("range", 2, 0, ROUND), ("round", 2, 2 + BIT, ROUND),
        ],
        "backward": [
            ("round", 2 + BIT, 2, ROUND), ("ReLU", 4, 2, BEND), ("sums", 4, 0, NORM), ("normalize", 4, 2, NORM),
            ("unfold", 2, 2, DIVIDE),
        ],
        "saved": [
            ("convolution's output", 2, DIVIDE), ("unfolded", 2, NORM), ("ReLU's output", 2, BEND), ("rounded", 2, ROUND),
        ],
    },
    "QAT, joined": {
        "forward": [("statistics, range", 2, 0, JOINED), ("normalize, ReLU,\nround, codes", 2, 3 + BIT, JOINED)],
        "backward": [
            ("round, ReLU, sums", 4 + BIT, 0, JOINED), ("round, ReLU,\nnormalize", 4 + BIT, 2, JOINED),
            ("decode codes", 1, 2, ROUND),
        ],
        "saved": [("convolution's output", 2, JOINED), ("codes", 1, ROUND)],
    },
}  # fmt: skip
MASKED = {"QAT, call by call", "QAT, joined"}  # save a bit per element too


def number(value: float) -> str:
    """2, or 2⅛."""
    return f"{int(value)}{'' if value == int(value) else {1: '⅛', 2: '¼'}[round(value % 1 * 8)]}"


def passes(out: Path) -> None:
    """The passes over memory between two convolutions, as high as the bytes that they move, and what is saved."""
    rows = ("forward", "backward", "saved")
    heights = [max(sum(sum(p[1:-1]) for p in ways[row]) for ways in PASSES.values()) + 2.6 for row in rows]
    figure, axes = panels(3, 0.165 * sum(heights) + 0.6, ratios=heights)
    for axis, row, height in zip(axes, rows, heights, strict=True):
        axis.set(xlim=(-0.02, 2.98), ylim=(height - 1.6, -1.0))
        axis.set_axis_off()
        for column, (way, parts) in enumerate(PASSES.items()):
            top = 0.0
            for name, *moved, colour in parts[row]:
                high = sum(moved)
                box = plt.Rectangle((column, top), 0.95, high, facecolor=colour, edgecolor=INK, linewidth=0.8)
                axis.add_patch(box)
                at = {"y": top + high / 2, "va": "center", "fontsize": 9.5 if high > 1 else 8}
                axis.text(column + 0.03, s=name, ha="left", **at)
                axis.text(column + 0.92, s=" + ".join(map(number, moved)), ha="right", **at)
                top += high
            bit = BIT if row == "saved" and way in MASKED else 0
            what = f"{number(top + bit)} bytes" + (" (mask ⅛)" if bit else "")
            axis.text(column + 0.475, top + 0.25, what, ha="center", va="top", fontsize=10, weight="bold")
        titles = {
            "forward": "forward, from a convolution to the next: bytes read + written per element",
            "backward": "backward, from that convolution to this: bytes read + written per element",
            "saved": "saved in between for the backward pass: bytes per element",
        }
        axis.set_title(titles[row], loc="left", fontsize=11, pad=18 if row == "forward" else 4)
    for column, way in enumerate(PASSES):
        axes[0].text(column + 0.475, -0.35, way, ha="center", va="bottom", fontsize=11, weight="bold", color=BLUE)
    handles = [
        plt.Rectangle((0, 0), 1, 1, facecolor=c, edgecolor=INK, linewidth=0.8)
        for c in (DIVIDE, NORM, BEND, ROUND, JOINED)
    ]
    names = ["folded scale", "batch norm", "activation", "rounding", "joined"]
    figure.legend(
        handles, names, loc="outside upper center", ncols=5, fontsize=9.5, columnspacing=1.0, handlelength=1.3
    )
    save(
        figure,
        out / "passes.png",
        "at the least, counted from docs/batch_norm.md, Bytes moved, and autograd/quant_conv.cpp",
    )


def range_search(out: Path) -> None:
    """Squared error against the clipping ratio of the MSE range search, for normal samples and 3, 4 and 8 bits."""
    x = np.random.default_rng(0).standard_normal(65536).astype(np.float32)
    ratios = np.arange(1, 81) / 80
    figure, (axis,) = panels(1, 4.4)
    for bits, colour in ((3, ORANGE), (4, BLUE), (8, GREY)):
        high = 2 ** (bits - 1) - 1
        errors = []
        for ratio in ratios:
            y, _ = fake_quantize(x, ratio * np.abs(x).max() / high, 0, -high - 1, high)
            errors.append(float(np.mean((x - y) ** 2)))
        best = int(np.argmin(errors))
        axis.semilogy(ratios, errors, color=colour, linewidth=2, label=f"{bits} bits, least at r = {ratios[best]:.2f}")
        axis.plot(ratios[best], errors[best], "o", color=colour)
    axis.set_title("65,536 standard normal values, range shrunk by r")
    axis.set_xlabel("r (1 is the range from minimum to maximum)")
    axis.set_ylabel("mean squared error\n(lower is better)")
    axis.legend()
    save(figure, out / "range_search.png")


LINE = re.compile(
    r"^(?P<op>.{41}) (?P<granularity>.{17}) (?P<dtype>\w+) +(?P<shape>\S+) +[\d.]+ us"
    r" +\d+ GB/s +(?P<percent>[\d.]+) % +(?P<native>[\d.]+x|-)"
)


def bandwidth_rows() -> tuple[Path, list[dict]] | None:
    """Lines of bench_fake_quant at 8192 x 8192, from the newest GPU result that holds some."""
    for path in sorted(RESULTS.glob("nvidia-*.txt"), key=lambda p: p.stem[-10:], reverse=True):
        lines = [m.groupdict() for m in map(LINE.match, path.read_text(encoding="utf-8").splitlines()) if m]
        rows = [row for row in lines if row["shape"] == "8192x8192" and row["op"].startswith("fake_quantize")]
        if rows:
            return path, [{key: value.strip() for key, value in row.items()} for row in rows]
    return None


def bandwidth(out: Path) -> None:
    """Per cent of the copy's rate at 8192 x 8192: one group of bars per operation, one pair per granularity, PyTorch's
    as marks.
    """
    found = bandwidth_rows()
    if found is None:
        return
    path, rows = found
    device = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# quantrain on ")
    places: dict[tuple[str, str], float] = {}
    headings, place = {}, 0.0
    for op in dict.fromkeys(row["op"] for row in rows):
        headings[op] = place
        for granularity in dict.fromkeys(row["granularity"] for row in rows if row["op"] == op):
            place += 1
            places[op, granularity] = place
        place += 1.3
    figure, (axis,) = panels(1, 1.6 + 0.42 * place)
    for shift, dtype, color in ((-0.2, "float32", BLUE), (0.2, "bfloat16", SKY)):
        for row in (row for row in rows if row["dtype"] == dtype):
            where, ours = places[row["op"], row["granularity"]] + shift, float(row["percent"])
            axis.barh(where, ours, height=0.38, color=color)
            axis.text(2, where, f"{ours:.0f}", va="center", fontsize=9, color="white" if color == BLUE else INK)
            if row["native"] != "-":
                native = ours / float(row["native"].rstrip("x"))
                axis.plot(native, where, "D", color=ORANGE, markersize=6, markeredgecolor="white")
    for op, where in headings.items():
        name, _, passes = op.partition(" ")
        axis.text(1, where, f"{name}, {passes.replace('+', ' and ')}", va="center", weight="bold")
    axis.axvline(100, color=INK, linewidth=0.9, linestyle=":")
    axis.set_yticks(list(places.values()), [granularity for _, granularity in places])
    axis.set_ylim(place - 0.6, -0.8)
    axis.set_xlim(0, 104)
    axis.set_xlabel("per cent of the rate of a copy in the same run\n(higher is better)")
    axis.set_title(f"8192 x 8192 elements, {device}", loc="left")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (BLUE, SKY)]
    handles.append(plt.Line2D([], [], color=ORANGE, marker="D", linestyle="", markersize=6))
    figure.legend(handles, ["float32", "bfloat16", "PyTorch's operator"], loc="outside upper center", ncols=3)
    save(figure, out / "bandwidth.png", source(path))


def amp_losses(out: Path) -> None:
    """Evaluation losses of one model trained in three precisions, from the newest result of bench_amp --curves."""
    paths = sorted(RESULTS.glob("amp-losses-*.csv"), key=lambda p: p.stem[-10:])
    if not paths:
        return
    rows = [line.split(",") for line in paths[-1].read_text(encoding="utf-8").splitlines()[1:]]
    device = paths[-1].stem.split("-")[2].upper()
    figure, (axis,) = panels(1, 4.4)
    for precision, colour, style in (("fp32", GREY, "-"), ("fp16", BLUE, "--"), ("bf16", ORANGE, ":")):
        points = [(int(step), float(loss)) for name, step, loss in rows if name == precision]
        label = f"{precision}, {points[-1][1]:.3f} at the end"
        axis.plot(*zip(*points, strict=True), color=colour, linestyle=style, linewidth=2.2, label=label)
    axis.set_title(f"GPT of 0.8 M parameters on tinyshakespeare, {device}")
    axis.set_xlabel("training step")
    axis.set_ylabel("evaluation loss, nats per byte\n(lower is better)")
    axis.legend()
    save(figure, out / "amp_losses.png", source(paths[-1]))


def fixed_point_error(out: Path) -> None:
    """The error of each 8-bit fixed-point format against the width of a Gaussian, from the newest fixed-point-error
    CSV.
    """
    results = sorted(RESULTS.glob("fixed-point-error-*.csv"))
    if not results:
        return
    with results[-1].open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure, axes = panels(2, 8.4)
    for axis, kind, numerator in zip(axes, ("signed", "unsigned"), (40, 70), strict=True):
        chosen = [row for row in rows if row["format"] == kind]
        sigma = np.array([float(row["sigma"]) for row in chosen])
        lengths = [length for length in range(9) if chosen[0][f"fl{length}"]]
        errors = np.array([[float(row[f"fl{length}"]) for length in lengths] for row in chosen])
        for length, curve in zip(lengths, errors.T, strict=True):
            axis.loglog(sigma, curve, color=GREY, linewidth=0.9, label="one fraction length" if length == 0 else None)
            best = sigma[errors.argmin(axis=1) == length]
            axis.annotate(str(length), (np.sqrt(best[0] * best[-1]), 0.0025), fontsize=11, ha="center", color=BLUE)
        axis.loglog(sigma, errors.min(axis=1), color=BLUE, linewidth=2.4, label="the best of them (numbers)")
        for length in lengths[1:]:
            label = f"{numerator} / 2^FL: where the rule steps" if length == 1 else None
            axis.vlines(numerator / 2**length, 0.0022, 1.3, color=ORANGE, linewidth=1, linestyle="--", label=label)
        codes = "-127 to 127" if kind == "signed" else "0 to 255, of the positive part"
        axis.set_title(f"{kind} codes, {codes}")
        axis.set_xlabel("standard deviation of the Gaussian")
        axis.set_ylabel("root mean square error /\nstandard deviation (lower is better)", fontsize=11)
        axis.set_ylim(0.0022, 8)  # room for the legend
        axis.legend(fontsize=10, loc="upper right")
    save(figure, out / "fixed_point_error.png", source(results[-1]))


def transformer_inference(out: Path) -> None:
    """BERT in int8 and its alternatives over float16 without fusion, as Table 6 of ZeroQuant, from the newest
    transformer-h200-*.json, whole runs of the benchmark.
    """
    results = sorted(RESULTS.glob("transformer-h200-*.json"))
    rows = [row for path in results[-1:] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    rows = [row for row in rows if row["section"] == "zeroquant" and row["case"].startswith("BERT-base")]
    if not rows:
        return
    lines = (  # figure, what it is, colour, style
        ("ours_captured", "quantrain, CUDA graph", BLUE, "o-"),
        ("ours", "quantrain, as called", SKY, "o-"),
        ("sdpa", "float16, SDPA", GREY, "s-"),
        ("sdpa_captured", "float16, SDPA, CUDA graph", INK, "s:"),
        ("bitsandbytes", "bitsandbytes int8", ORANGE, "v-"),
    )
    figure, axes = panels(2, 8.4)
    for axis, length in zip(axes, (128, 256), strict=True):
        chosen = [row for row in rows if f", {length} tokens" in row["case"]]
        for name, label, colour, style in lines:
            points = [
                (int(row["case"].split()[-1]), row["values"]["unfused_ms"] / row["values"][f"{name}_ms"])
                for row in chosen
                if f"{name}_ms" in row["values"]
            ]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colour, linewidth=2, markersize=5, label=label)
        axis.axhline(1, color=INK, linewidth=0.9, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 2, 4, 8, 16, 32, 64, 128], ["1", "2", "4", "8", "16", "32", "64", "128"])
        axis.set_yscale("log", base=2)
        axis.set_yticks([0.25, 0.5, 1, 2, 4, 8, 16, 32], ["0.25", "0.5", "1", "2", "4", "8", "16", "32"])
        axis.set_ylim(0.25, 64)
        axis.set_title(f"BERT-base, {length} tokens")
        axis.set_xlabel("sequences in a batch")
        axis.set_ylabel("times as fast as float16\nwithout fused attention", fontsize=11)
    axes[0].legend(fontsize=9, loc="upper right", ncols=2)
    save(figure, out / "transformer_inference.png", source(results[-1]))


def small_models(out: Path) -> None:
    """Accuracy over bytes of ResNet-20 pruned, in few bits, taught, and combined; what none beats is joined."""
    results = sorted(RESULTS.glob("small-models-images-*.txt"), key=lambda p: p.stem[-10:])
    if not results:
        return
    rows = [ast.literal_eval(line) for line in results[-1].read_text().splitlines() if line.startswith("{")]
    points = {
        row["case"]: (row["bytes"] / 1e3, row["accuracy"])
        for row in rows
        if row["seed"] == 0 and not row["case"].startswith("resnet20")
    }
    figure, [axis] = panels(1, 5.0)
    front, best = [], 0.0
    for place in sorted(points.values(), key=lambda p: (p[0], -p[1])):
        if place[1] > best:
            front.append(place)
            best = place[1]
    axis.plot(*zip(*front, strict=True), "--", color=GREY, linewidth=1.2, zorder=1, label="best for the bytes")
    for taught, colour, marker in ((False, BLUE, "o"), (True, ORANGE, "s")):
        chosen = {name: place for name, place in points.items() if name.endswith(" taught") == taught}
        label = "learned a teacher's answers too" if taught else "learned from labels"
        axis.scatter(*zip(*chosen.values(), strict=True), color=colour, marker=marker, s=48, zorder=2, label=label)
        for name, (kilobytes, accuracy) in chosen.items():
            words = name.removesuffix(" taught").replace("tuned", "float32")
            words = re.sub(r"pruned 0\.(\d)", r"\g<1>0 % zeros", words)
            up = {"qat-w4a4": -12, "qat-w4a4 taught": 0, "qat-w4a4 pruned 0.5 taught": -1}.get(name, 4)
            up = -3 if name.startswith("qat-w8a8") else up
            axis.annotate(words, (kilobytes, accuracy), xytext=(8, up), textcoords="offset points", fontsize=9)
    axis.set_xscale("log", base=2)
    axis.set_xlim(128, 1700)
    axis.set_xticks([150, 200, 300, 400, 600, 800, 1100], ["150", "200", "300", "400", "600", "800", "1100"])
    axis.minorticks_off()
    axis.set_title("ResNet-20 on CIFAR-10-JPEG, one seed")
    axis.set_xlabel("kB")
    axis.set_ylabel("accuracy, %")
    axis.legend(fontsize=9, loc="lower right")
    save(figure, out / "small_models.png", source(results[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for draw in (
        staircase,
        lsq_gradients,
        passes,
        range_search,
        bandwidth,
        amp_losses,
        fixed_point_error,
        transformer_inference,
        small_models,
    ):
        draw(out)
    for study in (fixed_point, gradient_quant, int8_training):
        study.draw_all(RESULTS, out)
    print(f"make_figures: {', '.join(sorted(p.name for p in out.glob('*.png')))} in {out}")


if __name__ == "__main__":
    main()
