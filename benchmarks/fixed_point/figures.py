"""Figures of the fixed-point results that are committed: fraction lengths by layer, the integer network's speed on a CPU, ResNet-50's layers on a GPU."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["draw_all"]

BLUE, ORANGE, GREY = "#1f5fa8", "#d1650f", "#7a7a7a"
_DATA = {"fashion-mnist": "Fashion-MNIST", "cifar10-jpeg": "CIFAR-10-JPEG"}
_MODELS = {"resnet20": "ResNet-20", "mobilenet_v2": "MobileNet-V2 blocks", "resnet18": "ResNet-18"}


def draw_all(results: Path, out: Path) -> list[Path]:
    """Draws what ``results`` has data for into ``out``; the files written."""
    drawn = (_fraction_lengths(results, out), _speed(results, out), _resnet50(results, out))
    return [path for path in drawn if path is not None]


def _fraction_lengths(results: Path, out: Path) -> Path | None:
    """Histograms of the chosen fraction lengths, a row a network, a column a recipe."""
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("fixed-point-*-h*0-*.json"))]
    runs = [run for run in runs if "f8net" in run.get("stages", {})]
    if not runs:
        return None
    recipes = ("f8net", "f8net-tiny")
    figure, axes = plt.subplots(
        len(runs), 2, figsize=(9, 2.4 * len(runs) + 0.4), squeeze=False, sharex=True, sharey=True
    )
    for row, run in zip(axes, runs, strict=True):
        for axis, recipe in zip(row, recipes, strict=True):
            layers = run["stages"][recipe]["fraction_lengths"].values()
            for offset, (tensor, color) in enumerate((("input", BLUE), ("weight", ORANGE))):
                lengths = (layer[tensor] for layer in layers)
                count = Counter(n for length in lengths for n in (length if isinstance(length, list) else [length]))
                places = [n + 0.4 * offset - 0.2 for n in range(9)]
                axis.bar(places, [count[n] for n in range(9)], 0.38, color=color, label=f"{tensor}s")
            axis.set_title(f"{_MODELS[run['model']]}, {_DATA[run['data']]}: {recipe}", fontsize=10)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
        row[0].set_ylabel("layers")
    for axis in axes[-1]:
        axis.set_xlabel("fraction length")
        axis.set_xticks(range(9))
    axes[0][0].legend(frameon=False, fontsize=9)
    return _save(figure, out / "fixed_point_lengths.png")


def _speed(results: Path, out: Path) -> Path | None:
    """Time of each candidate over the integer network's, by network and batch."""
    paths = sorted(results.glob("fixed-point-network-cpu-*.json"))
    if not paths:
        return None
    rows = json.loads(paths[-1].read_text())["rows"]
    cases = list(dict.fromkeys((row["network"], row["batch"]) for row in rows))
    candidates = {
        "quantrain integers": BLUE,
        "onnxruntime int8": ORANGE,
        "onnxruntime float32": GREY,
        "torch float32": "#b9b9b9",
    }
    figure, axis = plt.subplots(figsize=(9, 3.4))
    for place, (candidate, color) in enumerate(candidates.items()):
        times = {(row["network"], row["batch"]): row["times_ours"] for row in rows if row["candidate"] == candidate}
        places = [number + 0.2 * place - 0.3 for number in range(len(cases))]
        bars = axis.bar(places, [times[case] for case in cases], 0.19, color=color, label=candidate)
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
    axis.set_xticks(range(len(cases)), [f"{_MODELS[network]}, batch {batch}" for network, batch in cases])
    axis.set_ylabel("time over the integer network's")
    axis.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    return _save(figure, out / "fixed_point_speed.png")


def _resnet50(results: Path, out: Path) -> Path | None:
    """Microseconds of each layer: in fixed point, in float16, and of a copy of the bytes."""
    paths = sorted(results.glob("fixed-point-resnet50-*.json"))
    if not paths:
        return None
    report = json.loads(paths[-1].read_text())
    rows = report["layers"]
    figure, axis = plt.subplots(figsize=(9, 4.2))
    kinds = (("float16", "fp16_us", ORANGE), ("fixed point", "int8_us", BLUE), ("copy of its bytes", "bound_us", GREY))
    for place, (label, key, color) in enumerate(kinds):
        places = [number + 0.28 * place - 0.28 for number in range(len(rows))]
        axis.bar(places, [row[key] for row in rows], 0.27, color=color, label=label)
    for number, row in enumerate(rows):
        top = max(row["fp16_us"], row["int8_us"])
        axis.text(number, top + 2, f"{row['ratio']:.2f}x", ha="center", fontsize=7)
    axis.set_xticks(
        range(len(rows)), [" ".join(row["name"].split()) for row in rows], rotation=60, ha="right", fontsize=7
    )
    axis.set_xlim(-0.7, len(rows) - 0.3)
    axis.set_ylabel("microseconds")
    axis.set_title(f"{report['gpu']}, batch 64", fontsize=10)
    axis.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    return _save(figure, out / "fixed_point_resnet50.png")


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
