"""The figures of docs/int8.md: the three products and their layouts, and the committed results of benchmark and study."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402, the backend comes first
from matplotlib.patches import Rectangle  # noqa: E402

from .results import bench_section, finals, mean_and_spread, newest, rows_of  # noqa: E402

BLUE, ORANGE, GREY, GREEN = "#1f5fa8", "#d1650f", "#7a7a7a", "#3b8f4e"
PALE_BLUE, PALE_ORANGE, PALE_GREY, PALE_GREEN = "#dce8f5", "#fae5d3", "#ececec", "#dcefe0"
INK = "#333333"
KINDS = {"bf16": (GREY, "bf16"), "int8-training": (BLUE, "int8-training")}


def _open_frame(axis: plt.Axes) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


# ---- the three products ----------------------------------------------------------------------------------------------------

T, IN, OUT = 2.4, 1.6, 2.0  # drawn lengths of tokens, in, out
STRIP = 0.16  # width of a strip of scales
LABEL = {"fontsize": 9, "ha": "center", "va": "center", "color": INK}


def _matrix(axis: plt.Axes, x: float, y: float, size: tuple[float, float], colors: tuple[str, str], name: str) -> None:
    """A matrix of int8 codes, its top left corner at (x, y), with lines along which memory runs; ``size`` is (rows, columns)."""
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
    axis.text(x - STRIP / 2 - 0.05, y + 0.13, name, **{**LABEL, "fontsize": 8})


def _sides(axis: plt.Axes, x: float, y: float, size: tuple[float, float], names: tuple[str, str]) -> None:
    rows, columns = size
    axis.text(x + columns + 0.14, y - rows / 2, names[0], **{**LABEL, "rotation": 90, "fontsize": 8, "color": GREY})
    axis.text(x + columns / 2, y - rows - 0.13, names[1], **{**LABEL, "fontsize": 8, "color": GREY})


PRODUCTS = (
    # title, A (size, colours, name, sides, scale), B likewise, D size, D name, formula, where the operands come from
    {
        "title": "forward    Y = X Wᵀ",
        "a": ((T, IN), (BLUE, PALE_BLUE), "$X_q$", ("tokens", "in"), "$s_x$"),
        "b": ((OUT, IN), (GREEN, PALE_GREEN), "$W_q$", ("out", "in"), "$s_w$"),
        "d": ((T, OUT), "Y", ("tokens", "out")),
        "formula": "$Y_{to} = s_{x,t}\\, s_{w,o} \\sum_i X_q\\, W_q + b_o$",
        "notes": ("X: one pass by rows, to nearest, or from the norm before", "W: one pass by rows, once a step", "$X_q, s_x$ are kept for backward: 1 byte an element"),
    },
    {
        "title": "grad_input    dX = dY W",
        "a": ((T, OUT), (ORANGE, PALE_ORANGE), "$G_q$", ("tokens", "out"), "$s_g$"),
        "b": ((IN, OUT), (GREEN, PALE_GREEN), "$W_q^T$", ("in", "out"), None),
        "d": ((T, IN), "dX", ("tokens", "in")),
        "formula": "$dX_{ti} = s_{g,t} \\sum_o G_q\\, W_q^T$",
        "notes": ("$G_q$: rows of dY diag($s_w$), rounded at random", "$W_q^T$: the forward's codes, transposed as bytes", "no scale is left inside the sum"),
    },
    {
        "title": "grad_weight    dW = dYᵀ X",
        "a": ((OUT, T), (ORANGE, PALE_ORANGE), "$H_q$", ("out", "tokens"), "$s_h$"),
        "b": ((IN, T), (BLUE, PALE_BLUE), "$X_q^T$", ("in", "tokens"), None),
        "d": ((OUT, IN), "dW", ("out", "in")),
        "formula": "$dW_{oi} = s_{h,o} \\sum_t H_q\\, X_q^T$",
        "notes": ("$H_q$: columns of diag($s_x$) dY, rounded at random", "$X_q^T$: the forward's codes, transposed as bytes", "no scale is left inside the sum"),
    },
)  # fmt: skip


def products(out: Path) -> None:
    """Operands of the three products as memory holds them: both with the summed dimension along the lines."""
    figure, axes = plt.subplots(1, 3, figsize=(13.5, 5.4), layout="constrained")
    for axis, product in zip(axes, PRODUCTS, strict=True):
        _product(axis, product)
    figure.savefig(out / "int8_gemms.png", dpi=150)
    plt.close(figure)


def _product(axis: plt.Axes, product: dict) -> None:
    axis.set_title(product["title"], fontsize=12, color=INK)
    x, top = 0.5, 0.0
    size, colors, name, sides, scale = product["a"]
    _matrix(axis, x, top, size, colors, name)
    _sides(axis, x, top, size, sides)
    if scale:
        _scale(axis, x, top, size[0], colors[0], scale)
    right = x + size[1] + 1.05
    size_b, colors_b, name_b, sides_b, scale_b = product["b"]
    axis.text(right - 0.5, top - 1.0, "×", **{**LABEL, "fontsize": 15})
    _matrix(axis, right, top, size_b, colors_b, name_b)
    _sides(axis, right, top, size_b, sides_b)
    if scale_b:
        _scale(axis, right, top, size_b[0], colors_b[0], scale_b)
    (rows, columns), name_d, sides_d = product["d"]
    shrink = 0.62
    place = (2.2, -3.15)
    axis.annotate(
        "", (place[0] + 0.4, place[1] + 0.05), (place[0] + 0.4, -2.75), arrowprops={"arrowstyle": "->", "color": INK}
    )
    axis.text(
        place[0] + 0.55,
        -2.9,
        "exact int32 sums, scales and bias\nin the epilogue",
        **{**LABEL, "ha": "left", "fontsize": 8},
    )
    axis.add_patch(
        Rectangle(
            (place[0], place[1] - rows * shrink), columns * shrink, rows * shrink, facecolor=PALE_GREY, edgecolor=GREY
        )
    )
    axis.text(place[0] + columns * shrink / 2, place[1] - rows * shrink / 2, f"{name_d}\nfloat", **LABEL)
    _sides(axis, *place, (rows * shrink, columns * shrink), sides_d)
    axis.text(2.9, -5.2, product["formula"], **{**LABEL, "fontsize": 12})
    for line, note in enumerate(product["notes"]):
        axis.text(0.1, -5.85 - 0.33 * line, note, **{**LABEL, "ha": "left", "fontsize": 8.5})
    axis.set_xlim(0.0, 6.6)
    axis.set_ylim(-6.85, 0.35)
    axis.set_aspect("equal")
    axis.axis("off")


# ---- measured --------------------------------------------------------------------------------------------------------------


def curves(results: Path, out: Path) -> None:
    """Held-out loss against the step, a panel a text: each seed a thin line, the mean a thick one; below, int8's over bf16's."""
    found = newest(results, "curves")
    if found is None:
        return
    path, content = found
    rows = content["rows"]
    texts = list(dict.fromkeys(row["text"] for row in rows))
    size = (5.8 * len(texts), 5.4)
    figure, axes = plt.subplots(
        2, len(texts), figsize=size, layout="constrained", squeeze=False, sharex="col", height_ratios=(3, 1)
    )
    for axis, below, text in zip(*axes, texts, strict=True):
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
            axis.plot(mean[:, 0], mean[:, 2], style, color=color, linewidth=2, label=f"{label}, {last:.4f} at the end")
        axis.set_title(text, fontsize=10)
        axis.set_ylabel("held-out loss, nats a byte")
        axis.legend(fontsize=8, frameon=False)
        _open_frame(axis)
        _difference(below, means)
    figure.suptitle(f"from benchmarks/results/{path.name}: {content['on']}", fontsize=9, color=INK)
    figure.savefig(out / "int8_curves.png", dpi=150)
    plt.close(figure)


def _difference(axis: plt.Axes, means: dict[str, np.ndarray]) -> None:
    """The mean int8 curve over the mean bf16 curve, in per cent, with the one per cent allowed at the end."""
    axis.axhspan(-1, 1, color=PALE_GREY, zorder=0)
    axis.axhline(0, color=GREY, linewidth=0.8)
    if len(means) == len(KINDS):
        bf16, int8 = (means[kind] for kind in KINDS)
        axis.plot(bf16[:, 0], 100 * (int8[:, 2] / bf16[:, 2] - 1), color=BLUE, linewidth=1.6)
    axis.set_xlabel("step")
    axis.set_ylabel("int8 over bf16, %", fontsize=9)
    _open_frame(axis)


def speed(results: Path, out: Path) -> None:
    """Ratios over bfloat16 of layers and steps, and over float16 of inference against the batch."""
    found = {section: bench_section(results, section) for section in ("linear", "gpt", "inference")}
    if any(value is None or value[1]["on"] == "CPU" for value in found.values()):
        return
    rows = {section: rows_of(content, section) for section, (_, content) in found.items()}
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    layers = [row for row in rows["linear"] if row["case"].endswith(" auto")]
    _bars(axes[0], [(row["case"].removesuffix(" auto"), row["ratio"], row["target"]) for row in layers])
    axes[0].set_title("one linear layer, forward + backward, auto: over bf16\n(tokens x in x out)", fontsize=10)
    steps = [row for row in rows["gpt"] if row["case"].endswith(": int8 auto") and row["ratio"]]
    _bars(axes[1], [(row["case"].removesuffix(": int8 auto"), row["ratio"], row["target"]) for row in steps])
    axes[1].set_title("GPT training step, eager: over compiled bf16", fontsize=10)
    _inference(axes[2], rows["inference"])
    names = dict.fromkeys(path.name for path, _ in found.values())
    device = found["linear"][1]["on"]
    figure.suptitle(f"from benchmarks/results/{', '.join(names)}: {device}", fontsize=9, color=INK)
    figure.savefig(out / "int8_speed.png", dpi=150)
    plt.close(figure)


def _bars(axis: plt.Axes, rows: list[tuple[str, float, float | None]]) -> None:
    for place, (_, ratio, target) in enumerate(rows):
        axis.barh(place, ratio, color=BLUE, height=0.6)
        axis.text(0.03, place, f"{ratio:.2f}x", va="center", fontsize=9, color="white", weight="bold")
        if target:
            axis.plot([target] * 2, [place - 0.4, place + 0.4], color=ORANGE, linewidth=2)
    axis.plot([], [], color=ORANGE, linewidth=2, label="to reach")
    axis.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(rows)), [name.replace(", 8 x 1024 tokens", "") for name, *_ in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, max([ratio for _, ratio, _ in rows] + [target or 0 for *_, target in rows], default=1) * 1.08)
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    _open_frame(axis)


def _inference(axis: plt.Axes, rows: list[dict]) -> None:
    models = list(dict.fromkeys(row["case"].split(" layer")[0] for row in rows))
    for model, color in zip(models, (BLUE, ORANGE), strict=False):
        points = [
            (int(row["case"].split("batch ")[1].split(" ")[0]), row) for row in rows if row["case"].startswith(model)
        ]
        batches = [batch for batch, _ in points]
        axis.plot(
            batches, [row["ratio"] for _, row in points], "o-", color=color, markersize=4, label=f"{model}, eager"
        )
        graph = [row["values"].get("graph_ratio") for _, row in points]
        if all(graph):
            axis.plot(batches, graph, "o--", color=color, markersize=4, label=f"{model}, CUDA graphs", alpha=0.7)
    axis.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    axis.set_xscale("log", base=2)
    ticks = sorted({int(row["case"].split("batch ")[1].split(" ")[0]) for row in rows})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xlabel("batch of 128 tokens")
    axis.set_title("encoder layer in W8A8: over fp16", fontsize=10)
    axis.legend(fontsize=8, frameon=False)
    _open_frame(axis)


def draw_all(results: Path, out: Path) -> None:
    """Every figure whose data there is."""
    out.mkdir(parents=True, exist_ok=True)
    products(out)
    curves(results, out)
    speed(results, out)
