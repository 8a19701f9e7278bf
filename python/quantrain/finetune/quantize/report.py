"""What ``quantrain quantize`` shows: its table, and report.html with sizes, errors by layer and a map of outliers."""

from __future__ import annotations

import html
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantrain.finetune.quantize.task import Measured, TextTask
from quantrain.finetune.report import (
    ReportTable,
    html_definitions,
    html_image,
    html_section,
    html_table,
    html_title,
    write_page,
)
from quantrain.finetune.table import format_bytes, format_seconds
from quantrain.plotting import STYLE, pyplot_for_files

_HEADER = ("model", "layers", "their weights", "ratio")  # and the task's columns
_COLUMNS = (
    ("layers", "quantized layers"),
    ("their weights", "bytes of these layers, of the float model in 16 bits"),
    ("ratio", "of the two"),
)
_LAYER_HEADER = ("layer", "type", "weight", "input", "product", "error", "time", "bytes", "in 16 bits")
_MAP_ROWS = 256  # of a panel of the map of outliers: the largest of neighboring channels stands for them
_MAP_PANELS = 8


@dataclass(frozen=True)
class Maxima:
    """Of the map of outliers.

    Attributes:
        absmax: Layer -> ``[K]``, the largest absolute value of each channel of its input.
        text: What the values were seen on.
    """

    absmax: Mapping[str, Tensor]
    text: str


def result_table(
    task: TextTask, title: str, recipe: str, sizes: Mapping[str, int], before: Measured, after: Measured
) -> ReportTable:
    """The model as it was and as it is.

    Args:
        task: The model's.
        title: The model's.
        recipe: The recipe's name.
        sizes: ``layers``, their number, ``bytes`` and, in 16 bits, ``float_bytes``.
        before: Of the float model.
        after: Of the quantized model, compared with it.
    """
    ratio = f"{sizes['float_bytes'] / sizes['bytes']:.2f}x" if sizes["bytes"] else ""
    lines = [
        (f"{title} (float32)", "", format_bytes(sizes["float_bytes"]), "", *task.cells(before)),
        (recipe, str(sizes["layers"]), format_bytes(sizes["bytes"]), ratio, *task.cells(after)),
    ]
    header = (*_HEADER, *(column.header for column in task.columns))
    columns = (*_COLUMNS, *((column.header, column.meaning) for column in task.columns))
    return ReportTable(header, lines, columns=columns)


def layer_table(layers: Sequence[Mapping[str, Any]]) -> ReportTable:
    """One line per layer, of the rows of quantrain.ptq's report."""
    lines = []
    for row in layers:
        error, ms = row["error"], row["ms"]
        texts = (row[key] or "-" for key in ("layer", "type", "weight", "input", "product"))
        sizes = (format_bytes(row["bytes"]), format_bytes(row["float_bytes"]))
        lines.append(
            (*texts, "-" if error is None else f"{error:.3g}", "-" if ms is None else format_seconds(ms / 1e3), *sizes)
        )
    note = (
        "error: of the layer's output on what it was calibrated on, relative, where the recipe measures it; time: of "
        "the layer on the held-out text."
    )
    return ReportTable(_LAYER_HEADER, lines, "Layer by layer", note)


def write_report(
    path: Path,
    title: str,
    lead: str,
    table: ReportTable,
    recipe: tuple[Sequence[str], Sequence[Sequence[str]]],
    layers: ReportTable,
    maxima: Maxima,
    facts: Sequence[tuple[str, str]],
) -> None:
    """Write the report.

    Args:
        path: The file to write.
        title: Its heading.
        lead: A sentence under it.
        table: That of result_table.
        recipe: What the recipe does: a header and rows.
        layers: The errors and sizes of the layers.
        maxima: What the map of outliers shows.
        facts: How it was made, as (name, value) pairs.
    """
    parts = html_title(title, lead)
    parts += [html_table(table.header, table.lines, first_is_base=True), html_definitions(table.columns, "columns")]
    parts.append(f"<h2>The recipe</h2>{html_table(*recipe, words=True)}")
    if maxima.absmax:
        text = f"The largest absolute value of each input channel of the linear layers, on the {maxima.text}."
        parts.append(f'<h2>Outliers</h2><p class="note">{html.escape(text)}</p>')
        with tempfile.TemporaryDirectory() as folder:
            image = Path(folder) / "outliers.png"
            plot_outliers(maxima.absmax, image)
            parts.append(html_image(image, "Map of outliers, channels by layers"))
    parts.append(html_section(layers))
    parts.append(f"<h2>How it was made</h2>{html_definitions(facts)}")
    write_page(path, title, parts)


def plot_outliers(absmax: Mapping[str, Tensor], path: Path) -> None:
    """A panel for each kind of layer: channels down, the layers of that kind from left to right."""
    pyplot = pyplot_for_files()
    from matplotlib.colors import LogNorm

    panels = outlier_panels(absmax)
    positive = torch.cat([values[values > 0].flatten() for values in panels.values()])
    low, high = (float(positive.min()), float(positive.max())) if len(positive) else (1.0, 10.0)
    norm = LogNorm(max(low, high / 1e6), max(high, low * 1.01))
    with pyplot.rc_context(STYLE):
        columns = min(4, len(panels))
        lines = -(-len(panels) // columns)
        figure, places = pyplot.subplots(lines, columns, figsize=(3.1 * columns + 0.8, 3.6 * lines), squeeze=False)
        for axes in places.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (name, values) in zip(places.flat, panels.items(), strict=False):
            channels, layers = values.shape
            shown = _largest_of_neighbors(values).clamp_min(norm.vmin)
            extent = (-0.5, layers - 0.5, len(shown) * _neighbors(channels), 0)
            image = axes.imshow(
                shown.numpy(), aspect="auto", interpolation="nearest", norm=norm, cmap="viridis", extent=extent
            )
            axes.set_title(name, fontsize=9)
            axes.set_xlabel("layer")
            axes.set_ylim(channels, 0)
        for axes in places[:, 0]:
            axes.set_ylabel("input channel")
        figure.colorbar(image, ax=places, label="largest absolute value", shrink=0.9)
        figure.savefig(path)
        pyplot.close(figure)


def outlier_panels(absmax: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Title -> float32 ``[K, layers]``, of layers whose names differ in numbers only; kinds of layers that share their
    input share a panel. The panels with the largest values, up to 8 of them, in the order of the model."""
    kinds: dict[tuple[str, int], list[Tensor]] = {}
    for name, values in absmax.items():
        kinds.setdefault((re.sub(r"\d+", "*", name), len(values)), []).append(values.detach().float().cpu())
    panels: dict[str, Tensor] = {}
    for (kind, _), columns in kinds.items():
        values, short = torch.stack(columns, 1).nan_to_num(), kind.rsplit(".", 1)[-1]
        title = next((name for name, other in panels.items() if torch.equal(other, values)), None)
        if title is None:
            panels[short if short not in panels else kind] = values
        else:
            panels = {f"{title}, {short}" if name == title else name: other for name, other in panels.items()}
    kept = sorted(panels, key=lambda name: -float(panels[name].max()))[:_MAP_PANELS]
    return {name: values for name, values in panels.items() if name in kept}


def _neighbors(channels: int) -> int:
    """Channels that one row of the map stands for."""
    return -(-channels // _MAP_ROWS)


def _largest_of_neighbors(values: Tensor) -> Tensor:
    """At most 256 rows of ``[K, layers]``: a picture of more would leave single channels out."""
    size = _neighbors(values.shape[0])
    padded = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % size))
    return padded.unflatten(0, (-1, size)).amax(1)
