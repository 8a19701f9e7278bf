"""The measured parts of docs/measured/int8.md: text between ``<!-- measured: PART -->`` and ``<!-- end -->``, from the committed JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from common import pages
from common.pages import mean_and_spread, table

from .results import bench_section, finals, newest, rows_of

UNMEASURED = "Not measured yet: `scripts/gpu_int8.sh` measures it.\n"
RESULTS, PICTURES = "../../benchmarks/results", "../figures"  # from the page
MOVED = {"benchmarks/int8_training_study.py": "benchmarks/studies/int8_training/study.py"}  # since the result's commit


def _source(path: Path, content: dict, on_cpu: bool = False) -> str:
    where = content["cpu"] if on_cpu or "CPU" in content["on"] else content["on"]
    moved = [
        f" (the command at commit {content['commit']}; the script is now `{new}`)"
        for old, new in MOVED.items()
        if old in content["command"]
    ]
    return (
        f"{where}, torch {content['torch']}, {content['date']}: [{path.name}]({RESULTS}/{path.name}), "
        f"`{content['command']}`{''.join(moved)}."
    )


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def mm_text(rows: list[dict]) -> str:
    lines = [
        [
            row["case"],
            f"{row['values']['bf16_tflops']:.0f}",
            f"{row['values']['int8_tops']:.0f}",
            _times(row["ratio"]),
        ]
        for row in rows
    ]
    return table(["M x N x K", "bf16 TFLOP/s", "int8 TOPS", "ratio"], lines)


def quantize_text(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        values = row["values"]
        if row["ratio"] is None:
            lines.append([row["case"], f"{values['us']:.1f}", "4", "100 %"])
        else:
            share = f"{100 * row['ratio']:.0f} %"
            lines.append([row["case"], f"{values['us']:.1f}", f"{values['bytes_an_element']:.0f}", share])
    return table(["pass", "us", "bytes per element", "of the copy's rate"], lines)


def fused_text(rows: list[dict]) -> str:
    lines = [
        [row["case"], *(f"{row['values'][key]:.1f}" for key in ("us", "separate_us")), _times(row["ratio"])]
        for row in rows
    ]
    return table(["operator", "us", "separate operators, us", "ratio"], lines)


def linear_text(rows: list[dict]) -> str:
    whole = [row for row in rows if "bf16_ms" in row["values"]]
    lines = [
        [
            row["case"],
            *(f"{row['values'][key]:.3f}" for key in ("bf16_ms", "int8_ms")),
            _times(row["ratio"]),
            _times(row["values"]["device_ratio"]),
        ]
        for row in whole
    ]
    text = table(["tokens x in x out, choice", "bf16 ms", "int8 ms", "eager", "device alone"], lines)
    single = [[row["case"], _times(row["ratio"])] for row in rows if row not in whole]
    return (
        text
        + ("\nOne product in int8, the other two in bf16 (device alone):\n\n" if single else "")
        + (table(["tokens x in x out", "ratio"], single) if single else "")
    )


def inference_text(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        values = row["values"]
        graph = [f"{values[f'graph_{key}']:.3f}" if f"graph_{key}" in values else "-" for key in ("fp16_ms", "int8_ms")]
        eager = [f"{values[key]:.3f}" for key in ("fp16_ms", "int8_ms")]
        lines.append([row["case"], *eager, _times(row["ratio"]), *graph, _times(values.get("graph_ratio"))])
    header = ["layer", "fp16 ms", "int8 ms", "eager", "fp16 ms, graph", "int8 ms, graph", "graphs"]
    return table(header, lines)


def cpu_text(rows: list[dict]) -> str:
    lines = [
        [row["case"], f"{row['values']['ms']:.2f}", f"{row['values']['gops']:.0f}", _times(row["ratio"])]
        for row in rows
    ]
    return table(["int8_mm", "ms", "GOP/s", "ratio"], lines)


def gpt_text(rows: list[dict], memory: list[dict]) -> str:
    shares = {row["case"].removesuffix(" over bf16 eager"): row for row in memory}
    lines = []
    for row in rows:
        values, share = row["values"], shares.get(row["case"])
        lines.append(
            [
                row["case"],
                f"{values['ms']:.1f}",
                _times(values["over_bf16_eager"]),
                _times(row["ratio"]),
                f"{values['peak_gib']:.2f}" if "peak_gib" in values else "-",
                f"{share['ratio']:.2f}" if share else "",
            ]
        )
    return table(["step", "ms", "over bf16 eager", "over bf16 compiled", "peak GiB", "of bf16 eager's"], lines)


def torchao_text(rows: list[dict]) -> str:
    lines = [
        [
            row["case"],
            *(f"{row['values'][key]:.3f}" for key in ("bf16_ms", "torchao_ms", "int8_ms")),
            _times(row["ratio"]),
            _times(row["values"]["ours_over_torchao"]),
        ]
        for row in rows
    ]
    return table(
        ["tokens x in x out", "bf16 ms", "torchao ms", "ours ms", "torchao over bf16", "ours over torchao"], lines
    )


SECTIONS: dict[str, Callable[[list[dict]], str]] = {
    "mm": mm_text,
    "quantize": quantize_text,
    "fused": fused_text,
    "linear": linear_text,
    "inference": inference_text,
    "cpu": cpu_text,
}


def bench_part(part: str, results: Path) -> str:
    """A section of the benchmark."""
    found = bench_section(results, part)
    section = "gpt" if part == "gpt_compiled" else part
    rows = rows_of(found[1], section) if found else []
    if not rows:
        return UNMEASURED
    if section == "gpt":
        table = gpt_text(rows, rows_of(found[1], "memory"))
    elif section == "torchao":
        notes = [note for note in found[1]["notes"] if note.startswith("torchao ")]
        table = "".join(f"{note}.\n\n" for note in notes[:1]) + torchao_text(rows)
    else:
        table = SECTIONS[section](rows)
    return f"{_source(*found, on_cpu=part == 'cpu')}\n\n{table}"


def curves_text(path: Path, content: dict) -> str:
    """Final losses of both precisions, mean over the seeds, and their difference in percent."""
    settings, rows = content["settings"], content["rows"]
    config = settings["config"]
    lines = []
    for text in dict.fromkeys(row["text"] for row in rows):
        for key, title in (("held_out_loss", "held out"), ("train_loss", "training")):
            bf16, int8 = (mean_and_spread(finals(rows, text, kind, key)) for kind in ("bf16", "int8-training"))
            change = 100 * (int8[0] / bf16[0] - 1)
            lines.append(
                [text, title, f"{bf16[0]:.4f} ({bf16[1]:.4f})", f"{int8[0]:.4f} ({int8[1]:.4f})", f"{change:+.2f} %"]
            )
    seeds = len({row["seed"] for row in rows})
    return (
        f"GPT of {config['layers']} layers, {config['width']} wide, context {config['context']} bytes, batch "
        f"{settings['batch_size']}, {settings['steps']} steps, {seeds} seed{'s' if seeds > 1 else ''}; loss at the last step in nats "
        f"per byte, in brackets largest minus smallest over the seeds. {_source(path, content)}\n\n"
        + table(["text", "loss", "bf16", "int8-training", "int8 over bf16"], lines)
    )


def finetune_text(path: Path, content: dict) -> str:
    """Accuracies by seed, their mean, and the difference to float32."""
    rows = content["rows"]
    seeds = sorted({row["seed"] for row in rows})
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    accuracy = {(row["kind"], row["seed"]): row["accuracy"] for row in rows}
    means = {
        kind: mean_and_spread([accuracy[kind, seed] for seed in seeds if (kind, seed) in accuracy])[0] for kind in kinds
    }
    lines = [
        [
            f"`{kind}`" if kind.count(" ") == 0 else kind,
            *(f"{accuracy[kind, seed]:.2f}" if (kind, seed) in accuracy else "-" for seed in seeds),
            f"{means[kind]:.2f}",
            "" if kind == kinds[0] else f"{means[kind] - means[kinds[0]]:+.2f}",
        ]
        for kind in kinds
    ]
    settings = content["settings"]
    return (
        f"MiniLM-L6 on SST-2, {settings['train_rows']} sentences, batch {settings['batch_size']}, {settings['epochs']:g} epochs, "
        f"pretrained weights stored in {settings['pretrained_weights']}; accuracy on "
        f"the 872 sentences of the development set in percent (one sentence is 0.11). {_source(path, content)}\n\n"
        + table(["training", *(f"seed {seed}" for seed in seeds), "mean", "to float32, points"], lines)
    )


FIGURES = {
    "curves": ("int8_curves.png", "Held-out loss of both precisions against the step"),
    "linear": ("int8_speed.png", "How much faster int8 is than 16 bit: layers, training steps, inference"),
}


def measured(part: str, results: Path, figures: Path) -> str:
    """The text of one part, with its figure where there is one."""
    studies = {"curves": curves_text, "finetune": finetune_text}
    if part in studies:
        found = newest(results, part)
        text = studies[part](*found) if found else UNMEASURED
    else:
        text = bench_part(part, results)
    name, title = FIGURES.get(part, ("", ""))
    if name and text != UNMEASURED and (figures / name).is_file():
        text += f"\n![{title}]({PICTURES}/{name})\n"
    return text


def fill(page: Path, results: Path, figures: Path) -> None:
    """Replace every measured part of the page."""
    pages.fill(page, lambda part: measured(part, results, figures))
