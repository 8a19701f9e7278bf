"""The look of the figures in docs: one column, large letters and a white ground, so that a phone and a dark page show
them well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402, the backend comes first

BLUE, ORANGE, GREY, GREEN, SKY = "#1f5fa8", "#d1650f", "#7a7a7a", "#3b8f4e", "#56a3d9"
PALE_BLUE, PALE_ORANGE, PALE_GREY, PALE_GREEN = "#dce8f5", "#fae5d3", "#ececec", "#dcefe0"
INK = "#222222"
WIDTH = 6.4  # inches: letters of 12 points are 9 pixels high where a phone shows the figure 360 pixels wide

_LOOK = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.labelsize": 12,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 160,
}
plt.rcParams.update(_LOOK)


def panels(
    rows: int, height: float, columns: int = 1, ratios: Sequence[float] | None = None, **options
) -> tuple[plt.Figure, list[plt.Axes]]:
    """A figure of the one width with its panels, row by row; ``height`` in inches is that of the whole figure."""
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(WIDTH, height),
        layout="constrained",
        squeeze=False,
        height_ratios=ratios,
        **options,
    )
    return figure, list(axes.flat)


def source(path: Path | str, more: str = "") -> str:
    """Which committed file a figure is drawn from."""
    name = path.name if isinstance(path, Path) else path
    return f"benchmarks/results/{name}{more}"


def save(figure: plt.Figure, path: Path, drawn_from: str = "") -> Path:
    """Writes the figure, below it in small letters what it is drawn from."""
    if drawn_from:
        figure.supxlabel(drawn_from, fontsize=8, color=GREY, x=0.01, ha="left")
    figure.savefig(path)
    plt.close(figure)
    return path


def times(axis: plt.Axes, what: str = "x") -> None:
    """The line at 1, where both are as fast."""
    (axis.axvline if what == "x" else axis.axhline)(1, color=INK, linewidth=0.9, linestyle=":")
