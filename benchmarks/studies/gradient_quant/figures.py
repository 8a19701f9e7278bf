"""The figures of docs/gradient_quant.md: what the reflector does (NumPy), and the committed results of the study."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from common.drawing import BLUE, GREY, INK, ORANGE, SKY, panels, save, source

from .results import KINDS, MODELS, by_recipe, measure_of, newest

COLORS = {"per_tensor": GREY, "per_sample": BLUE, "per_sample, zero kept": SKY, "householder": ORANGE}


# ---- what the reflector does -----------------------------------------------------------------------------------------


def transform(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(S, Q) of one group led by row 0: S = diag(s1, 1, ..., 1), Q the reflection that sends e1 to 1/sqrt(k)."""
    k = len(x)
    ranges = x.max(axis=1) - x.min(axis=1)
    n = np.full(k, 1 / np.sqrt(k))
    n[0] -= 1
    reflector = np.eye(k) - 2 * np.outer(n, n) / (n @ n)
    ratio = np.cbrt(ranges[1:].max() * np.abs(reflector).max() * np.sqrt(k) / ((k - 1) * ranges[0]))
    return np.diag([ratio, *[1.0] * (k - 1)]), reflector


def rounded(y: np.ndarray, bins: int, whole: bool, rng: np.random.Generator) -> np.ndarray:
    """``y`` stochastically rounded to ``bins`` steps of each row's range, or of the whole matrix's with 0 on the grid."""
    axis = None if whole else 1
    low = y.min(axis=axis, keepdims=True)
    step = (y.max(axis=axis, keepdims=True) - low) / bins
    if whole:
        step = -low / np.floor(-low / step)
    return np.floor((y - low) / step + rng.random(y.shape)) * step + low


def householder(out: Path) -> None:
    """A group of 16 rows, one of them large: as it is, scaled by S, and mixed by Q; and the errors that each form
    leaves.
    """
    rng = np.random.default_rng(4)
    x = rng.standard_normal((16, 200)) * np.array([1.0, *[0.03] * 15])[:, None]
    scale, reflector = transform(x)
    views = (
        ("X\none large row, 15 small ones", x),
        ("S X\nthe large row made smaller", scale @ x),
        ("T X = Q S X\nspread over all rows", reflector @ scale @ x),
    )
    figure, axes = panels(2, 7.0, columns=2)
    for axis, (title, rows) in zip(axes, views, strict=False):
        for place, row in enumerate(rows):
            color = COLORS["householder"] if place == 0 else COLORS["per_sample"]
            axis.vlines(place, row.min(), row.max(), color=color, linewidth=5, alpha=0.35)
            axis.plot(place + rng.uniform(-0.22, 0.22, len(row)), row, ".", color=color, markersize=1.5)
        axis.set_title(title)
        axis.set_xlabel("row")
        axis.set_ylabel("value")
        axis.set_xticks([0, 5, 10, 15])
    _householder_errors(axes[3], x, reflector @ scale, rng)
    save(figure, out / "gradient_quant_householder.png")


def _householder_errors(axis: plt.Axes, x: np.ndarray, t: np.ndarray, rng: np.random.Generator) -> None:
    inverse = np.linalg.inv(t)
    forms = {
        "per_tensor": lambda: rounded(x, 31, True, rng),
        "per_sample": lambda: rounded(x, 31, False, rng),
        "householder": lambda: inverse @ rounded(t @ x, 31, False, rng),
    }
    for place, (name, draw) in enumerate(forms.items()):
        error = np.mean([np.square(draw() - x).sum() for _ in range(200)])
        axis.bar(place, error, color=COLORS[name], width=0.6)
        axis.text(place, error * 1.1, f"{error:.2g}", ha="center", fontsize=11)
    axis.set_yscale("log")
    axis.set_ylim(top=axis.get_ylim()[1] * 2)
    axis.set_xticks(range(3), ["per_\ntensor", "per_\nsample", "house-\nholder"], fontsize=10)
    axis.set_title("E||Q(X) - X||² at 5 bits\n(lower is better)")


# ---- measured --------------------------------------------------------------------------------------------------------


def variance(results: Path, out: Path) -> None:
    """Quantization variance over batch variance against the bits, one panel per network, one row of panels per mode."""
    found = newest(results, "variance")
    if found is None:
        return
    path, content = found
    modes = list(dict.fromkeys(row["mode"] for row in content["rows"]))
    models = [model for model in MODELS if any(row["model"] == model for row in content["rows"])]
    figure, axes = panels(len(modes), 3.3 * len(modes) + 1.0, columns=len(models), sharex=True, sharey=True)
    for line, mode in enumerate(modes):
        for column, model in enumerate(models):
            rows = [row for row in content["rows"] if (row["mode"], row["model"]) == (mode, model)]
            axis = axes[line * len(models) + column]
            _variance_panel(axis, rows, f"{MODELS[model].replace(', ', chr(10), 1)}\n{mode} mode")
        axes[line * len(models)].set_ylabel("quantization variance\n/ batch variance (lower is better)", fontsize=11)
    for axis in axes[-len(models) :]:
        axis.set_xlabel("bits of the gradient")
        axis.set_xticks(range(2, 9))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    save(figure, out / "gradient_quant_variance.png", source(path, f", {content['on']}"))


def _variance_panel(axis: plt.Axes, rows: list[dict], title: str) -> None:
    for quantizer, color in COLORS.items():
        points = sorted((r["bits"], r["variance"] / r["batch_variance"]) for r in rows if r["quantizer"] == quantizer)
        style = "--" if "zero" in quantizer else "-"
        if points:
            axis.plot(
                *zip(*points, strict=True), style, marker="o", markersize=5, color=color, linewidth=2, label=quantizer
            )
    axis.axhline(1, color=INK, linewidth=0.9, linestyle=":")
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
    axis.annotate("batch variance", (0.99, 1), (0, 3), fontsize=10, **place)
    axis.set_yscale("log")
    axis.set_title(title, fontsize=11)
    axis.grid(axis="y", color="#e2e2e2", linewidth=0.6)


def accuracy(results: Path, out: Path) -> None:
    """What each recipe reached: one dot per seed, a bar at the mean, and QAT's seeds as a band."""
    found = newest(results, "accuracy")
    if found is None:
        return
    path, content = found
    models = [model for model in MODELS if any(model in row for row in content["rows"])]
    figure, axes = panels(len(models), 4.2 * len(models))
    for axis, model in zip(axes, models, strict=True):
        measure = measure_of(next(row[model] for row in content["rows"] if model in row))
        better = "lower" if "loss" in measure else "higher"
        _accuracy_panel(axis, by_recipe(content["rows"], model), f"{measure}\n({better} is better)")
        axis.set_title(MODELS[model])
    save(figure, out / "gradient_quant_accuracy.png", source(path, f", {content['on']}"))


def _accuracy_panel(axis: plt.Axes, values: dict[str, list[float]], measure: str) -> None:
    base = values.get("qat-w8a8", [])
    if base:
        axis.axhspan(min(base), max(base), color="#e8e8e8", zorder=0)
        axis.axhline(np.mean(base), color=INK, linewidth=1, label=f"qat-w8a8, {np.mean(base):.2f}")
    bits = sorted({int(name[-1]) for name in values if name.startswith("fqt-")}, reverse=True)
    for shift, (kind, quantizer) in zip((-0.22, 0, 0.22), KINDS.items(), strict=True):
        points = {place: values.get(f"fqt-{kind}{width}", []) for place, width in enumerate(bits)}
        for place, reached in points.items():
            axis.plot([place + shift] * len(reached), reached, "o", color=COLORS[quantizer], markersize=5, alpha=0.7)
            if reached:
                middle = np.mean(reached)
                axis.hlines(middle, place + shift - 0.09, place + shift + 0.09, color=COLORS[quantizer], linewidth=3)
        axis.plot([], [], "o", color=COLORS[quantizer], label=quantizer)
    axis.set_xticks(range(len(bits)), [f"{width}-bit gradients" for width in bits])
    axis.set_ylabel(measure)
    axis.legend(fontsize=10)


def draw_all(results: Path, out: Path) -> None:
    """Every figure whose data there is."""
    out.mkdir(parents=True, exist_ok=True)
    householder(out)
    variance(results, out)
    accuracy(results, out)
