"""Figures of the fixed-point results that are committed: fraction lengths by layer, the integer network's speed on a
CPU, ResNet-50's layers on a GPU.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from common.drawing import BLUE, GREY, ORANGE, panels, save, source

__all__ = ["draw_all"]

_DATA = {"fashion-mnist": "Fashion-MNIST", "cifar10-jpeg": "CIFAR-10-JPEG"}
_MODELS = {"resnet20": "ResNet-20", "mobilenet_v2": "MobileNet-V2 blocks", "resnet18": "ResNet-18"}


def draw_all(results: Path, out: Path) -> list[Path]:
    """Draws what ``results`` has data for into ``out``; the files written."""
    drawn = (_fraction_lengths(results, out), _speed(results, out), _resnet50(results, out))
    return [path for path in drawn if path is not None]


def _fraction_lengths(results: Path, out: Path) -> Path | None:
    """Histograms of the chosen fraction lengths, one row per network, one column per recipe."""
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("fixed-point-*-h*0-*.json"))]
    runs = [run for run in runs if "f8net" in run.get("stages", {})]
    if not runs:
        return None
    recipes = ("f8net", "f8net-tiny")
    figure, axes = panels(len(runs), 2.2 * len(runs) + 0.8, columns=2, sharex=True, sharey=True)
    for number, run in enumerate(runs):
        for column, recipe in enumerate(recipes):
            axis = axes[2 * number + column]
            layers = run["stages"][recipe]["fraction_lengths"].values()
            for offset, (tensor, color) in enumerate((("input", BLUE), ("weight", ORANGE))):
                lengths = (layer[tensor] for layer in layers)
                count = Counter(n for length in lengths for n in (length if isinstance(length, list) else [length]))
                places = [n + 0.4 * offset - 0.2 for n in range(9)]
                axis.bar(places, [count[n] for n in range(9)], 0.38, color=color, label=f"{tensor}s")
            axis.set_title(f"{recipe}\n{_MODELS[run['model']]}\n{_DATA[run['data']]}", fontsize=10)
        axes[2 * number].set_ylabel("number of layers")
    for axis in axes[-2:]:
        axis.set_xlabel("fraction length")
        axis.set_xticks(range(9))
    axes[0].legend()
    return save(figure, out / "fixed_point_lengths.png", source(f"fixed-point-*-{runs[-1]['date']}.json, one seed"))


def _speed(results: Path, out: Path) -> Path | None:
    """Time of each candidate over the integer network's, by network and batch."""
    paths = sorted(results.glob("fixed-point-network-cpu-*.json"))
    if not paths:
        return None
    report = json.loads(paths[-1].read_text())
    rows = report["rows"]
    cases = list(dict.fromkeys((row["network"], row["batch"]) for row in rows))
    candidates = {
        "quantrain, integers": ("quantrain integers", BLUE),
        "onnxruntime, int8": ("onnxruntime int8", ORANGE),
        "onnxruntime, float32": ("onnxruntime float32", GREY),
        "PyTorch, float32": ("torch float32", "#b9b9b9"),
    }
    figure, (axis,) = panels(1, 6.0)
    for place, (label, (candidate, color)) in enumerate(candidates.items()):
        times = {(row["network"], row["batch"]): row["times_ours"] for row in rows if row["candidate"] == candidate}
        places = [number + 0.2 * place - 0.3 for number in range(len(cases))]
        bars = axis.barh(places, [times[case] for case in cases], 0.19, color=color, label=label)
        axis.bar_label(bars, fmt=" %.2f", fontsize=10)
    axis.set_yticks(range(len(cases)), [f"{_MODELS[network]}\nbatch {batch}" for network, batch in cases])
    axis.invert_yaxis()
    axis.set_xlabel("time over that of quantrain's integers (lower is better)")
    axis.set_title(f"Time of one batch on a CPU ({report['cpu']})", loc="left")
    figure.legend(loc="outside upper center", ncols=2)
    return save(figure, out / "fixed_point_speed.png", source(paths[-1]))


def _resnet50(results: Path, out: Path) -> Path | None:
    """Microseconds of each layer: in fixed point, in float16, and of a copy of the bytes."""
    paths = sorted(results.glob("fixed-point-resnet50-*.json"))
    if not paths:
        return None
    report = json.loads(paths[-1].read_text())
    rows = report["layers"]
    figure, (axis,) = panels(1, 10.4)
    kinds = (("float16", "fp16_us", ORANGE), ("fixed point", "int8_us", BLUE), ("copy of its bytes", "bound_us", GREY))
    for place, (label, key, color) in enumerate(kinds):
        places = [number + 0.28 * place - 0.28 for number in range(len(rows))]
        axis.barh(places, [row[key] for row in rows], 0.27, color=color, label=label)
    for number, row in enumerate(rows):
        top = max(row["fp16_us"], row["int8_us"])
        axis.text(top + 2, number - 0.14, f"{row['ratio']:.2f}x", va="center", fontsize=9)
    axis.set_yticks(range(len(rows)), [" ".join(row["name"].split()) for row in rows], fontsize=10)
    axis.set_ylim(len(rows) - 0.3, -0.7)
    axis.set_xlabel("microseconds (lower is better)")
    axis.set_title(f"ResNet-50's convolutions at batch 64, {report['gpu']}", loc="left", x=-0.35)
    axis.legend(loc="center right")
    return save(figure, out / "fixed_point_resnet50.png", source(paths[-1]))
