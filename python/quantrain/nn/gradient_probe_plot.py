"""The plot of a GradientProbe: noise against the bound by layer, and its part of the batch variance."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from quantrain.nn.gradient_probe import spec_name
from quantrain.plotting import COLORS, FAINT, STYLE, pyplot_for_files


def plot_probe(rows: Sequence[dict[str, Any]], advice: Sequence[dict[str, Any]], path: str | os.PathLike) -> None:
    """Write the PNG: left each quantizer's variance (filled) and bound (hollow), right the advice's ratio and limit.

    Args:
        rows: :attr:`quantrain.nn.GradientProbe.rows`.
        advice: :meth:`quantrain.nn.GradientProbe.recommend`; without any there is one panel.
        path: The file.

    Raises:
        ValueError: No row has an observation.
    """
    rows = [row for row in rows if row["gradient_square"] > 0]
    if not rows:
        raise ValueError("GradientProbe.plot: expected an observed gradient, got none")
    pyplot = pyplot_for_files()
    names = list(dict.fromkeys(row["layer"] for row in rows))
    places = {layer: place for place, layer in enumerate(names)}
    quantizers = list(dict.fromkeys(spec_name(row["quantizer"]) for row in rows))
    colors = {name: COLORS[place % len(COLORS)] for place, name in enumerate(quantizers)}
    with pyplot.rc_context(STYLE):
        columns = 2 if advice else 1
        height = max(3.2, 1.4 + 0.24 * len(names))
        figure, panels = pyplot.subplots(1, columns, figsize=(5.2 * columns + 1, height), sharey=True, squeeze=False)
        _noise_panel(panels[0][0], rows, places, colors)
        if advice:
            _advice_panel(panels[0][1], advice, places, colors)
        panels[0][0].set_yticks(range(len(names)), names, fontsize=8)
        panels[0][0].set_ylim(len(names) - 0.5, -0.5)
        figure.savefig(path, format="png")
        pyplot.close(figure)


def _noise_panel(axes, rows: Sequence[dict[str, Any]], places: dict[str, int], colors: dict[str, str]) -> None:
    for name, color in colors.items():
        chosen = [row for row in rows if spec_name(row["quantizer"]) == name]
        at = [places[row["layer"]] for row in chosen]
        measured = [row["variance"] / row["gradient_square"] for row in chosen]
        bounds = [row["bound"] / row["gradient_square"] for row in chosen]
        axes.plot(measured, at, "o", color=color, markersize=5, label=name)
        axes.plot(bounds, at, "o", color=color, markersize=5, fillstyle="none")
    _log_axis(axes)
    axes.set(title="Quantization noise (hollow: bound)", xlabel="E ||Q(g) - g||² / ||g||²")
    axes.legend(loc="best", fontsize=8)


def _advice_panel(axes, advice: Sequence[dict[str, Any]], places: dict[str, int], colors: dict[str, str]) -> None:
    for entry in advice:
        if entry["layer"] in places and entry["ratio"] > 0:
            color, at = colors[spec_name(entry["quantizer"])], places[entry["layer"]]
            axes.plot(entry["ratio"], at, "o", color=color, markersize=5)
            if entry["bits_needed"] > entry["quantizer"].bits:
                needed = ">8" if entry["bits_needed"] > 8 else str(entry["bits_needed"])
                axes.annotate(
                    needed, (entry["ratio"], at), (5, -3), textcoords="offset points", fontsize=7, color=color
                )
    for allowed in {entry["allowed"] for entry in advice}:
        axes.axvline(allowed, color="#B03030", linewidth=0.9)
    _log_axis(axes)
    basis = "all weights" if advice[0]["basis"] == "network" else "own weight"
    axes.set(title="Added to the batch variance (number: bits needed)", xlabel=f"part of the batch variance, {basis}")


def _log_axis(axes) -> None:
    axes.set_xscale("log")
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
