"""The figures of docs/int8.md: the three products and their layouts, and the results of benchmark and study."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from common.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE_BLUE,
    PALE_GREEN,
    PALE_GREY,
    PALE_ORANGE,
    panels,
    save,
    source,
    times,
)
from common.pages import mean_and_spread
from matplotlib.patches import Rectangle

from .results import bench_section, finals, newest, rows_of

KINDS = {"bf16": (GREY, "bf16"), "int8-training": (BLUE, "int8-training")}


# ---- the three products ----------------------------------------------------------------------------------------------

T, IN, OUT = 2.4, 1.6, 2.0  # drawn lengths of tokens, in, out
STRIP = 0.16  # width of a strip of scales
LABEL = {"fontsize": 12, "ha": "center", "va": "center", "color": INK}
SMALL = {**LABEL, "fontsize": 10}


def _matrix(axis: plt.Axes, x: float, y: float, size: tuple[float, float], colors: tuple[str, str], name: str) -> None:
    """A matrix of int8 codes, its top left corner at (x, y), with lines along which memory runs; ``size`` is (rows,
    columns).
    """
    rows, columns = size
    edge, face = colors
    axis.add_patch(Rectangle((x, y - rows), columns, rows, facecolor=face, edgecolor=edge, linewidth=1.4))
    for line in np.arange(0.14, rows - 0.05, 0.14):
        axis.plot([x + 0.06, x + columns - 0.06], [y - line] * 2, color=edge, linewidth=0.4, alpha=0.7)
    axis.text(
        x + columns / 2, y - rows / 2, name, **LABEL, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    )


def _scale(axis: plt.Axes, x: float, y: float, rows: float, color: str, name: str) -> None:
    axis.add_patch(Rectangle((x - STRIP - 0.05, y - rows), STRIP, rows, facecolor=color, edgecolor=INK, linewidth=0.6))
    axis.text(x - STRIP / 2 - 0.05, y + 0.2, name, **SMALL)


def _sides(axis: plt.Axes, x: float, y: float, size: tuple[float, float], names: tuple[str, str]) -> None:
    rows, columns = size
    axis.text(x + columns + 0.2, y - rows / 2, names[0], **{**SMALL, "rotation": 90, "color": GREY})
    axis.text(x + columns / 2, y - rows - 0.2, names[1], **{**SMALL, "color": GREY})


PRODUCTS = (
    # title, A (size, colours, name, sides, scale), B likewise, D size, D name, formula, where the operands come from
    {
        "title": "forward:  Y = X Wᵀ",
        "a": ((T, IN), (BLUE, PALE_BLUE), "$X_q$", ("tokens", "in"), "$s_x$"),
        "b": ((OUT, IN), (GREEN, PALE_GREEN), "$W_q$", ("out", "in"), "$s_w$"),
        "d": ((T, OUT), "Y", ("tokens", "out")),
        "formula": "$Y_{to} = s_{x,t}\\, s_{w,o} \\sum_i X_q\\, W_q + b_o$",
        "notes": (
            "X, W: one pass by rows, to nearest, once per step",
            "$X_q, s_x$ are kept for backward: 1 byte per element",
        ),
    },
    {
        "title": "grad_input:  dX = dY W",
        "a": ((T, OUT), (ORANGE, PALE_ORANGE), "$G_q$", ("tokens", "out"), "$s_g$"),
        "b": ((IN, OUT), (GREEN, PALE_GREEN), "$W_q^T$", ("in", "out"), None),
        "d": ((T, IN), "dX", ("tokens", "in")),
        "formula": "$dX_{ti} = s_{g,t} \\sum_o G_q\\, W_q^T$",
        "notes": (
            "$G_q$: rows of dY diag($s_w$), rounded at random",
            "$W_q^T$: the forward's codes, transposed as bytes",
        ),
    },
    {
        "title": "grad_weight:  dW = dYᵀ X",
        "a": ((OUT, T), (ORANGE, PALE_ORANGE), "$H_q$", ("out", "tokens"), "$s_h$"),
        "b": ((IN, T), (BLUE, PALE_BLUE), "$X_q^T$", ("in", "tokens"), None),
        "d": ((OUT, IN), "dW", ("out", "in")),
        "formula": "$dW_{oi} = s_{h,o} \\sum_t H_q\\, X_q^T$",
        "notes": (
            "$H_q$: columns of diag($s_x$) dY, rounded at random",
            "$X_q^T$: the forward's codes, transposed as bytes",
        ),
    },
)  # fmt: skip


def products(out: Path) -> None:
    """Operands of the three products as memory holds them: both with the summed dimension along the lines."""
    figure, axes = panels(3, 10.6)
    for axis, product in zip(axes, PRODUCTS, strict=True):
        _product(axis, product)
    save(figure, out / "int8_gemms.png")


def _product(axis: plt.Axes, product: dict) -> None:
    """A times B on the left, the result on the right, formula and notes below."""
    axis.set_title(product["title"], fontsize=13, loc="left")
    size, colors, name, sides, scale = product["a"]
    x, top = 0.4, 0.0
    _matrix(axis, x, top, size, colors, name)
    _sides(axis, x, top, size, sides)
    _scale(axis, x, top, size[0], colors[0], scale)
    size_b, colors_b, name_b, sides_b, scale_b = product["b"]
    right = x + size[1] + 1.25
    axis.text(right - 0.55, top - 1.0, "×", **{**LABEL, "fontsize": 16})
    _matrix(axis, right, top, size_b, colors_b, name_b)
    _sides(axis, right, top, size_b, sides_b)
    if scale_b:
        _scale(axis, right, top, size_b[0], colors_b[0], scale_b)
    (rows, columns), name_d, sides_d = product["d"]
    shrink, place = 0.75, 7.45
    axis.annotate("", (place - 0.15, -1.0), (place - 0.5, -1.0), arrowprops={"arrowstyle": "->", "color": INK})
    size_d = (rows * shrink, columns * shrink)
    axis.add_patch(Rectangle((place, top - size_d[0]), size_d[1], size_d[0], facecolor=PALE_GREY, edgecolor=GREY))
    axis.text(place + size_d[1] / 2, top - size_d[0] / 2, f"{name_d}\nfloat", **LABEL)
    _sides(axis, place, top, size_d, sides_d)
    axis.text(0.2, -3.2, product["formula"], **{**LABEL, "ha": "left", "fontsize": 13})
    for line, note in enumerate(product["notes"]):
        axis.text(0.2, -3.85 - 0.45 * line, note, **{**LABEL, "ha": "left", "fontsize": 11})
    axis.set_xlim(0.0, 9.6)
    axis.set_ylim(-4.6, 0.4)
    axis.set_aspect("equal")
    axis.axis("off")


# ---- measured --------------------------------------------------------------------------------------------------------


def curves(results: Path, out: Path) -> None:
    """Held-out loss against the step, one panel per text: a thin line per seed, a thick one for the mean; below, int8's
    over bf16's.
    """
    found = newest(results, "curves")
    if found is None:
        return
    path, content = found
    rows = content["rows"]
    texts = list(dict.fromkeys(row["text"] for row in rows))
    figure, axes = panels(2 * len(texts), 5.0 * len(texts), ratios=(3, 1.3) * len(texts))
    for number, text in enumerate(texts):
        axis, below = axes[2 * number : 2 * number + 2]
        means = {}
        for kind, (color, label) in KINDS.items():
            chosen = [np.array(row["curve"]) for row in rows if (row["text"], row["kind"]) == (text, kind)]
            if not chosen:
                continue
            style = "-" if kind == "bf16" else "--"
            for curve in chosen:
                axis.plot(curve[:, 0], curve[:, 2], style, color=color, linewidth=0.6, alpha=0.5)
            mean = means[kind] = np.mean(chosen, axis=0)
            last = mean_and_spread(finals(rows, text, kind))[0]
            axis.plot(
                mean[:, 0], mean[:, 2], style, color=color, linewidth=2.2, label=f"{label}, {last:.4f} at the end"
            )
        axis.set_title(text)
        axis.set_ylabel("held-out loss, nats per byte\n(lower is better)", fontsize=11)
        axis.legend()
        _difference(below, means)
    save(figure, out / "int8_curves.png", source(path, f", {content['on']}"))


def _difference(axis: plt.Axes, means: dict[str, np.ndarray]) -> None:
    """The mean int8 curve over the mean bf16 curve, in per cent; the band is one per cent."""
    axis.axhspan(-1, 1, color=PALE_GREY, zorder=0)
    axis.axhline(0, color=GREY, linewidth=0.8)
    if len(means) == len(KINDS):
        bf16, int8 = (means[kind] for kind in KINDS)
        axis.plot(bf16[:, 0], 100 * (int8[:, 2] / bf16[:, 2] - 1), color=BLUE, linewidth=1.8)
    axis.set_xlabel("training step")
    axis.set_ylabel("int8 over\nbf16, %", fontsize=11)


def speed(results: Path, out: Path) -> None:
    """Ratios over bfloat16 of layers and steps, and over float16 of inference against the batch."""
    found = {section: bench_section(results, section) for section in ("linear", "gpt", "inference")}
    if any(value is None or value[1]["on"] == "CPU" for value in found.values()):
        return
    rows = {section: rows_of(content, section) for section, (_, content) in found.items()}
    device = found["linear"][1]["on"]
    figure, axes = panels(3, 9.2, ratios=(4.4, 3, 5))
    layers = [row for row in rows["linear"] if row["case"].endswith(" auto")]
    _bars(axes[0], [(row["case"].removesuffix(" auto"), row["ratio"]) for row in layers])
    axes[0].set_title(f"One linear layer, forward and backward, {device}")
    axes[0].set_ylabel("tokens x in x out")
    axes[0].set_xlabel("times as fast as bfloat16 (higher is better)")
    steps = [row for row in rows["gpt"] if row["case"].endswith(": int8 auto") and row["ratio"]]
    names = [row["case"].removesuffix(": int8 auto").replace(", 8 x 1024 tokens", "") for row in steps]
    _bars(axes[1], [(name.replace(", ", "\n"), row["ratio"]) for name, row in zip(names, steps, strict=True)])
    axes[1].set_title("A GPT's training step, 8 x 1024 tokens")
    axes[1].set_xlabel("times as fast as compiled bfloat16 (higher is better)")
    _inference(axes[2], rows["inference"])
    files = dict.fromkeys(path.name for path, _ in found.values())
    save(figure, out / "int8_speed.png", source(", ".join(files)))


def _bars(axis: plt.Axes, rows: list[tuple[str, float]]) -> None:
    for place, (_, ratio) in enumerate(rows):
        axis.barh(place, ratio, color=BLUE, height=0.65)
        axis.text(0.03, place, f"{ratio:.2f}x", va="center", color="white", weight="bold")
    times(axis)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, max((ratio for _, ratio in rows), default=1) * 1.04)


def _inference(axis: plt.Axes, rows: list[dict]) -> None:
    models = list(dict.fromkeys(row["case"].split(" layer")[0] for row in rows))
    for model, color in zip(models, (BLUE, ORANGE), strict=False):
        points = [
            (int(row["case"].split("batch ")[1].split(" ")[0]), row) for row in rows if row["case"].startswith(model)
        ]
        batches = [batch for batch, _ in points]
        axis.plot(
            batches, [row["ratio"] for _, row in points], "o-", color=color, markersize=5, label=f"{model}, eager"
        )
        graph = [row["values"].get("graph_ratio") for _, row in points]
        if all(graph):
            axis.plot(batches, graph, "o--", color=color, markersize=5, label=f"{model}, CUDA graphs", alpha=0.7)
    times(axis, "y")
    axis.set_xscale("log", base=2)
    ticks = sorted({int(row["case"].split("batch ")[1].split(" ")[0]) for row in rows})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xlabel("sequences of 128 tokens in the batch")
    axis.set_ylabel("times as fast as float16\n(higher is better)")
    axis.set_title("Inference of one encoder layer in W8A8")
    axis.legend(fontsize=10)


def draw_all(results: Path, out: Path) -> None:
    """Every figure whose data there is."""
    out.mkdir(parents=True, exist_ok=True)
    products(out)
    curves(results, out)
    speed(results, out)
