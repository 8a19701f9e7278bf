"""The measured part of docs/gradient_quant.md: text between ``<!-- measured: PART -->`` and ``<!-- end -->``, from the JSON."""

from __future__ import annotations

from pathlib import Path

from common import pages
from common.pages import mean_and_spread, table

from .results import KINDS, MODELS, QUANTIZERS, by_recipe, measure_of, newest

UNMEASURED = "No result is committed yet; `scripts/gpu_study.sh` measures it.\n"


def _source(path: Path, content: dict) -> str:
    return f"{content['on']}, torch {content['torch']}, {content['date']}: [{path.name}](../benchmarks/results/{path.name})."


def variance_text(path: Path, content: dict) -> str:
    """Quantization over batch variance at a few widths, and the bias."""
    settings, rows = content["settings"], content["rows"]
    shown = [bits for bits in (8, 6, 5, 4, 3, 2) if any(row["bits"] == bits for row in rows)]
    lines = []
    for model in MODELS:
        for mode in ("hardware", "paper"):
            for quantizer in QUANTIZERS:
                chosen = [r for r in rows if (r["model"], r["mode"], r["quantizer"]) == (model, mode, quantizer)]
                ratios = {row["bits"]: row["variance"] / row["batch_variance"] for row in chosen}
                if ratios:
                    values = [f"{ratios[bits]:.2g}" if bits in ratios else "-" for bits in shown]
                    lines.append([MODELS[model], mode, f"`{quantizer}`", *values])
    biases = [row["bias"] for row in rows]
    return (
        f"Quantization variance divided by batch variance, {settings['batches']} batches of {settings['image_batch']} images or "
        f"{settings['text_batch']} sequences, {settings['draws']} draws each, {settings['train_steps']} (the GPT: {settings['text_train_steps']}) steps of `qat-w8a8` before, ResNet-20 from "
        f"the pretrained weights. "
        f"{_source(path, content)}\n\n"
        + table(["network", "mode", "quantizer", *[f"{bits} bits" for bits in shown]], lines)
        + f"\nThe squared mean of the error, as a multiple of what unbiased draws would leave (1): {min(biases):.2f} to "
        f"{max(biases):.2f} over all lines.\n"
    )


def accuracy_text(path: Path, content: dict) -> str:
    """One table per network: mean, spread over the seeds, difference to QAT."""
    settings, rows = content["settings"], content["rows"]
    text = (
        f"From fresh weights, the same schedule for every recipe: ResNet-20 for {settings['epochs']} epochs at batch "
        f"{settings['batch_size']}, the GPT for {settings['steps']['gpt']} steps of 32 x 128 bytes; {settings['precision']} "
        f"products{', the training step one CUDA graph' if settings['captured'] else ''}. Mean over the seeds, in brackets how many and largest minus smallest. "
        f"{_source(path, content)}\n"
    )
    for model, title in MODELS.items():
        values = by_recipe(rows, model)
        if not values:
            continue
        measure = measure_of(next(row[model] for row in rows if model in row))
        digits = 2 if model == "resnet20" else 4
        base = mean_and_spread(values["qat-w8a8"])[0] if "qat-w8a8" in values else None

        def cell(recipe: str, values=values, base=base, digits=digits) -> str:
            if recipe not in values:
                return "-"
            mean, spread = mean_and_spread(values[recipe])
            change = "" if base is None or recipe == "qat-w8a8" else f", {mean - base:+.{digits}f}"
            return f"{mean:.{digits}f} ({len(values[recipe])}, {spread:.{digits}f}){change}"

        widths = sorted({name[-1] for name in values if name.startswith("fqt-")}, reverse=True)
        lines = [[f"`{name}`", *[cell(f"fqt-{kind}{bits}") for bits in widths]] for kind, name in KINDS.items()]
        text += f"\n{title}: {measure}. `qat-w8a8` {cell('qat-w8a8')}; without quantization {cell('float')}.\n\n"
        text += table(["gradient quantizer", *[f"{bits} bits" for bits in widths]], lines)
    return text


def step_text(path: Path, content: dict) -> str:
    """Milliseconds per step and ratios."""
    lines = []
    for row in content["rows"]:
        ratios = [f"{row[key]:.2f}x" if row[key] else "-" for key in ("ratio_to_float", "ratio_to_qat")]
        lines.append([row["model"], f"`{row['recipe']}`", f"{row['ms']:.2f}", *ratios])
    captured = "captured as CUDA graphs" if all(row["captured"] for row in content["rows"]) else "not all captured"
    return f"Time of a whole training step in bfloat16 autocast, {captured}. {_source(path, content)}\n\n" + table(
        ["network", "recipe", "ms", "to float", "to `qat-w8a8`"], lines
    )


TEXTS = {"variance": variance_text, "accuracy": accuracy_text, "step": step_text}
FIGURES = {
    "variance": ("gradient_quant_variance.png", "Quantization variance over batch variance against bits"),
    "accuracy": ("gradient_quant_accuracy.png", "What each recipe reached, by bits of the gradient"),
}


def measured(part: str, results: Path, figures: Path) -> str:
    """The text of one part, with its figure where there is one."""
    found = newest(results, part)
    if found is None:
        return UNMEASURED
    text = TEXTS[part](*found)
    name, title = FIGURES.get(part, ("", ""))
    if name and (figures / name).is_file():
        text += f"\n![{title}](figures/{name})\n"
    return text


def fill(page: Path, results: Path, figures: Path) -> None:
    """Replace every measured part of the page."""
    pages.fill(page, lambda part: measured(part, results, figures))
