"""The plots of a run, as PNG files: loss and accuracy, accuracy over bytes, histograms over their quantization
grids, SQNR by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantrain.finetune.grids import Grid
from quantrain.finetune.results import StageResult
from quantrain.plotting import BASELINE_COLOR, COLORS, FAINT, STYLE, pyplot_for_files


@dataclass(frozen=True)
class Measure:
    """The number of an evaluation that stages are compared by.

    Attributes:
        name: Its name in metrics.jsonl and as a result's attribute.
        title: Of its panel.
        unit: Of its axis.
        factor: Brings it to that unit.
        cut: Whether what lies far from the final values is left out, as the accuracy of the first epochs is.
    """

    name: str = "accuracy"
    title: str = "Test accuracy (hollow: on the way)"
    unit: str = "percent"
    factor: float = 100.0
    cut: bool = True


ACCURACY = Measure()


def stage_colors(stages: Sequence[str]) -> dict[str, str]:
    """One color per stage: gray for the first, the baseline."""
    recipes = {stage: COLORS[place % len(COLORS)] for place, stage in enumerate(stages[1:])}
    return {**dict.fromkeys(stages[:1], BASELINE_COLOR), **recipes}


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """The mean of each value and up to ``window - 1`` before it."""
    sums = np.cumsum(np.concatenate([[0.0], np.asarray(values, dtype=float)]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot_curves(
    entries: Sequence[dict],
    results: Sequence[StageResult],
    path: Path,
    measure: Measure = ACCURACY,
    labels: Mapping[str, str] | None = None,
) -> None:
    """Training loss by step, and what each stage reached on the test set, from metrics.jsonl and the results;
    ``labels`` are names of stages other than their own."""
    pyplot = pyplot_for_files()
    from matplotlib import ticker

    colors = stage_colors([result.stage for result in results])
    with pyplot.rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2))
        for stage, color in colors.items():
            steps = [entry for entry in entries if entry["stage"] == stage and entry["event"] == "step"]
            if steps:
                places = [entry["step"] + 1 for entry in steps]
                losses = [entry["loss"] for entry in steps]
                left.plot(places, losses, color=color, alpha=0.15, linewidth=0.7)
                left.plot(places, smooth(losses, max(1, len(losses) // 30)), color=color, linewidth=1.8, label=stage)
        left.set(title="Training loss (thin: each step; thick: running mean)", xlabel="step", ylabel="cross-entropy")
        left.set_yscale("log")
        left.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        left.yaxis.set_minor_formatter(ticker.NullFormatter())
        left.grid(axis="y", color=FAINT, linewidth=0.6)
        if left.lines:
            left.legend()
        _final_panel(right, entries, results, colors, measure)
        right.set_yticks(range(len(results)), [(labels or {}).get(result.stage, result.stage) for result in results])
        figure.savefig(path)
        pyplot.close(figure)


def _final_panel(
    axes, entries: Sequence[dict], results: Sequence[StageResult], colors: dict[str, str], measure: Measure
) -> None:
    finals = [measure.factor * getattr(result, measure.name) for result in results]
    earlier = {
        result.stage: [
            measure.factor * entry[measure.name]
            for entry in entries
            if entry["stage"] == result.stage and entry["event"] == "eval" and entry["step"] < result.steps
        ]
        for result in results
    }
    shown = finals if measure.cut else [*finals, *(value for values in earlier.values() for value in values)]
    span = max(1.0, max(shown) - min(shown))
    margin = span if measure.cut else 0.6 * span
    low, high = min(shown) - margin, max(shown) + 0.6 * span
    axes.axvline(finals[0], color=BASELINE_COLOR, linewidth=1, linestyle=(0, (4, 3)))
    for row, (result, final) in enumerate(zip(results, finals, strict=True)):
        places = [value for value in earlier[result.stage] if low < value < high]
        color = colors[result.stage]
        axes.plot(places, [row] * len(places), "o", color=color, fillstyle="none", markersize=5)
        axes.plot(final, row, "o", color=color, markersize=9)
        text = f"{final:.2f}" if row == 0 else f"{final:.2f} ({final - finals[0]:+.2f})"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.9}
        axes.annotate(text, (final, row), (0, 9), textcoords="offset points", ha="center", color=color, bbox=box)
    axes.set_xlim(low, high)
    axes.locator_params(axis="x", nbins=6)
    axes.set_ylim(len(results) - 0.5, -0.7)
    axes.set(title=measure.title, xlabel=measure.unit)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def plot_histograms(grids: Sequence[Grid], stage: str, color: str, path: Path) -> None:
    """One panel per tensor: the float values as a histogram, and the codes of the grid that they are rounded to."""
    pyplot = pyplot_for_files()
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, len(grids), figsize=(3.8 * len(grids), 3.3), squeeze=False)
        for axes, grid in zip(panels[0], grids, strict=True):
            _histogram_panel(axes, grid, color)
        panels[0][0].set_ylabel("part of the values per code")
        figure.suptitle(f"{stage}: {grids[0].tensor}s and their grids", x=0.01, ha="left", fontweight="bold")
        figure.savefig(path)
        pyplot.close(figure)


def _histogram_panel(axes, grid: Grid, color: str) -> None:
    codes = grid.codes.numpy()
    few = grid.bits <= 5
    margin, bins_per_code = (2, 6) if few else (12, 0.25)
    low, high = grid.quant_min - margin - 0.5, grid.quant_max + margin + 0.5
    edges = np.linspace(low, high, round((high - low) * bins_per_code) + 1)
    counts, _ = np.histogram(np.clip(codes, low, high), bins=edges)
    share = counts / max(1, len(codes)) / (edges[1] - edges[0])
    floor = 0.5 * share[share > 0].min()
    axes.stairs(share, edges, baseline=floor, fill=True, color=color, alpha=0.55, linewidth=0)
    axes.stairs(np.maximum(share, floor), edges, baseline=floor, color=color, linewidth=0.9)
    _draw_codes(axes, grid, few)
    for edge, end in ((grid.quant_min - 0.5, low), (grid.quant_max + 0.5, high)):
        axes.axvspan(min(edge, end), max(edge, end), color="#F3DCDC", zorder=0, linewidth=0)
        axes.axvline(edge, color="#B03030", linewidth=0.9)
    axes.set_xlim(low, high)
    axes.set_yscale("log")
    axes.set_ylim(floor, share.max() * 4)
    axes.tick_params(axis="y", which="minor", labelleft=False)
    axes.set_title(f"{grid.layer}, {grid.bits} bits, {100 * grid.saturated:.2g} % saturated", fontsize=9.5)
    axes.set_xlabel(
        f"code (a step is {grid.scale:.3g})" if grid.scale is not None else "code (each channel has its step)"
    )


def _draw_codes(axes, grid: Grid, few: bool) -> None:
    """The grid: one line per code, or where there are too many one mark per code along the axis."""
    codes = np.arange(grid.quant_min, grid.quant_max + 1)
    top = 1.0 if few else 0.045
    axes.vlines(
        codes,
        0,
        top,
        transform=axes.get_xaxis_transform(),
        color="#8A8A8A",
        linewidth=0.8 if few else 0.4,
        zorder=0 if few else 3,
    )


def plot_sqnr(results: Sequence[StageResult], path: Path) -> None:
    """Signal to quantization noise of each layer: one panel per tensor, one line per recipe."""
    pyplot = pyplot_for_files()
    measured = [result for result in results if result.layer_errors]
    colors = stage_colors([result.stage for result in results])
    tensors = list(dict.fromkeys(error.tensor for result in measured for error in result.layer_errors))
    layers = list(dict.fromkeys(error.layer for result in measured for error in result.layer_errors))
    rows = {layer: row for row, layer in enumerate(layers)}
    with pyplot.rc_context(STYLE):
        height = max(3.2, 1.3 + 0.21 * len(layers))
        figure, panels = pyplot.subplots(
            1, len(tensors), figsize=(3.9 * len(tensors) + 1.2, height), sharey=True, squeeze=False
        )
        for axes, tensor in zip(panels[0], tensors, strict=True):
            for result in measured:
                errors = [
                    error for error in result.layer_errors if error.tensor == tensor and math.isfinite(error.sqnr_db)
                ]
                places = [rows[error.layer] for error in errors]
                axes.plot(
                    [error.sqnr_db for error in errors], places, "o-", color=colors[result.stage], markersize=4,
                    linewidth=1, label=result.stage,
                )  # fmt: skip
            axes.set_title(tensor)
            axes.set_xlabel("SQNR in dB (higher is closer to float32)")
            axes.grid(color=FAINT, linewidth=0.6)
            axes.set_axisbelow(True)
        panels[0][0].set_yticks(range(len(layers)), layers, fontsize=8)
        panels[0][0].invert_yaxis()
        panels[0][-1].legend(loc="best")
        figure.savefig(path)
        pyplot.close(figure)


def pareto_front(results: Sequence[StageResult]) -> list[StageResult]:
    """The results that no other of at most their bytes reaches in accuracy, by size.

    Example:
        >>> from types import SimpleNamespace as Stage
        >>> [stage.accuracy for stage in pareto_front([Stage(accuracy=0.9, weight_bytes=9), Stage(accuracy=0.8, weight_bytes=9)])]
        [0.9]
    """
    front: list[StageResult] = []
    for result in sorted(results, key=lambda result: (result.weight_bytes, -result.accuracy)):
        if not front or result.accuracy > front[-1].accuracy:
            front.append(result)
    return front


def plot_sizes(results: Sequence[StageResult], path: Path) -> None:
    """Accuracy over the bytes of the file, a point for each stage, and a line through those that none beats."""
    pyplot = pyplot_for_files()
    colors = stage_colors([result.stage for result in results])
    front = pareto_front(results)
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
        axes.plot(
            [result.weight_bytes / 1000 for result in front], [100 * result.accuracy for result in front],
            color=FAINT, linewidth=1.5, drawstyle="steps-post", zorder=1,
        )  # fmt: skip
        for result in results:
            axes.plot(
                result.weight_bytes / 1000, 100 * result.accuracy, "o", color=colors[result.stage], markersize=7,
                label=result.stage,
            )  # fmt: skip
        axes.set_xlim(left=0)
        axes.set_xlabel("kilobytes of the file, metadata included")
        axes.set_ylabel("test accuracy in percent")
        axes.grid(color=FAINT, linewidth=0.6, which="both")
        axes.set_axisbelow(True)
        axes.legend(loc="best")
        figure.savefig(path)
        pyplot.close(figure)
