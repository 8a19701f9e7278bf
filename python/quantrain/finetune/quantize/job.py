"""``quantrain quantize``: calibrate a language model on a text, convert it, measure it on what follows, write it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quantrain
from quantrain import Recipe, ptq
from quantrain import nn as qnn
from quantrain.finetune.base_job import check_packages, device_text, find_device
from quantrain.finetune.lm.data import check_text_file, read_tokens
from quantrain.finetune.lm.models import LanguageModel
from quantrain.finetune.progress import Count
from quantrain.finetune.quantize import report
from quantrain.finetune.quantize.measure import (
    PROTOCOL,
    Measured,
    Windows,
    compare,
    input_maxima,
    linear_layers,
    log_probabilities,
    predictions,
)
from quantrain.finetune.quantize.models import FACTS, TARGET, WEIGHTS, check_tokens, load_float
from quantrain.finetune.quantize.writing import check_output, new_folder, write_beside_weights
from quantrain.finetune.recipe_text import recipe_line, recipe_table
from quantrain.finetune.recipes import resolve_recipes
from quantrain.finetune.results import write_json
from quantrain.finetune.table import format_bytes, format_cells

TARGETS = (TARGET, "vllm", "bitsandbytes")
_PACKAGES = ("matplotlib", "safetensors", "tokenizers", "tqdm", "transformers")
_VERSION = 1  # of quantrain.json


@dataclass(frozen=True)
class QuantizeSettings:
    """What the command line asks for.

    Attributes:
        model: As load_language_model takes it.
        recipe: A recipe's name, or a JSON file with one.
        calibration: A .txt or .jsonl file.
        output: The folder to write.
        target: The program that is to read the folder: one of TARGETS.
        samples: Windows that calibrate.
        length: Tokens of a window.
        held_out: Windows after those, on which the model is measured.
        sequential: Whether a block is calibrated on the output of the quantized blocks before it; None leaves that to
            the recipe.
        max_kl: A larger KL is an error.
        skip: Patterns of layers that stay in floating point.
        device: ``"cpu"``, ``"cuda"``, ...
        force: Replace a folder that the command wrote before.
    """

    model: str
    recipe: str
    calibration: Path
    output: Path
    target: str
    samples: int
    length: int
    held_out: int
    sequential: bool | None = None
    max_kl: float | None = None
    skip: tuple[str, ...] = ()
    device: str = "cpu"
    force: bool = False


@dataclass(frozen=True)
class Quantized:
    """What became of a model.

    Attributes:
        sizes: As report.rows takes them.
        before: The float model on the held-out windows.
        after: The quantized one.
        maxima: The largest absolute values of the inputs of the float model's linear layers, on the held-out windows.
    """

    sizes: Mapping[str, int]
    before: Measured
    after: Measured
    maxima: Mapping[str, Tensor]


def run_quantize(settings: QuantizeSettings, command: str = "") -> Quantized:
    """Quantize a model and write its folder; ``command`` is what the report says it was.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: An argument outside its rule, a model, text or folder that is
            not there or cannot be used, layers that the target cannot express, a KL above ``max_kl``. Nothing is
            written then.
        ModuleNotFoundError: A package is not installed.
    """
    recipe = _checked(settings)
    device = find_device(settings.device)
    lm = load_float(settings.model)
    calibration, held_out = _windows(settings, lm)
    if settings.target != TARGET:
        ptq.check_target(_sizes(lm.model, settings.skip), recipe, settings.target)
    print(
        f"{lm.title}, {recipe.name}: {calibration} calibrate, the {len(held_out.ids)} windows after them are held out",
        flush=True,
    )
    lm.model.to(device)
    lm, result = _quantize(settings, recipe, lm, calibration.ids.to(device), held_out.ids.to(device))
    _write(settings, recipe, lm, calibration, held_out, result, command)
    lines = report.rows(lm.title, recipe.name, result.sizes, result.before, result.after)
    print(f"\n{format_cells(report.HEADER, lines)}\n\nheld out: {held_out}, {PROTOCOL}; sha256 {held_out.sha256}")
    size = (settings.output / WEIGHTS).stat().st_size
    print(f"written: {settings.output}, of which {WEIGHTS} has {format_bytes(size)}", flush=True)
    return result


def _checked(settings: QuantizeSettings) -> Recipe:
    """The recipe, where what can be known before anything is loaded is right."""
    if settings.target not in TARGETS:
        raise ValueError(f"--target: expected {', '.join(TARGETS[:-1])} or {TARGETS[-1]}, got {settings.target!r}")
    if settings.length < 2:
        raise ValueError(f"--length: expected at least 2 tokens, got {settings.length}")
    (recipe,) = resolve_recipes([settings.recipe]).values()
    check_output(settings.output, settings.force)
    check_text_file(settings.calibration)
    check_packages(_PACKAGES)
    return recipe


def _windows(settings: QuantizeSettings, lm: LanguageModel) -> tuple[Windows, Windows]:
    """The windows that calibrate and those after them."""
    used, length = settings.samples * settings.length, settings.length
    wanted = used + settings.held_out * length
    ids = read_tokens(settings.calibration, lm.tokenizer, wanted)
    if len(ids) < wanted:
        raise ValueError(
            f"--calibration: expected {wanted} tokens, {settings.samples} windows of {length} to calibrate and "
            f"{settings.held_out} held out, got {len(ids)} in {settings.calibration}; --samples and --length take fewer"
        )
    file = settings.calibration.name
    calibration, held_out = Windows(file, ids[:used].view(-1, length)), Windows(file, ids[used:].view(-1, length))
    check_tokens(lm, ids.view(-1, length))
    return calibration, held_out


def _sizes(model: Any, skip: Sequence[str]) -> dict[str, tuple[int, int]]:
    """``(out_features, in_features)`` of the layers that will be quantized."""
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in linear_layers(model).items()
        if not any(fnmatchcase(name, pattern) for pattern in skip)
    }


def _quantize(
    settings: QuantizeSettings, recipe: Recipe, lm: LanguageModel, calibration: Tensor, held_out: Tensor
) -> tuple[LanguageModel, Quantized]:
    """Measure the model, convert it, and measure it again."""
    with input_maxima(lm.model) as maxima:
        exact = [values.cpu() for values in log_probabilities(lm.model, held_out)]
    before = compare(exact, held_out)
    with Count("quantizing", "block") as progress:
        model = ptq.quantize(
            lm.model,
            recipe,
            list(calibration.split(1)),
            skip=settings.skip,
            sequential=settings.sequential,
            forward=predictions,
            check_batch=held_out,
            max_kl=settings.max_kl,
            progress=progress,
        )
    after = compare(log_probabilities(model, held_out), held_out, exact)
    sizes = {"layers": len(model.ptq_report.rows), **model.ptq_report.total}
    return replace(lm, model=model), Quantized(sizes, before, after, maxima)


def _write(
    settings: QuantizeSettings,
    recipe: Recipe,
    lm: LanguageModel,
    calibration: Windows,
    held_out: Windows,
    result: Quantized,
    command: str,
) -> None:
    facts = _facts(settings, recipe, lm, calibration, held_out, result)
    with new_folder(settings.output, settings.force) as folder:
        write_beside_weights(folder, lm)
        if settings.target == TARGET:
            _save(folder / WEIGHTS, lm)
        else:
            ptq.export_model(lm.model, folder, settings.target)
        write_json(folder / FACTS, facts)
        report.write_report(
            folder / "report.html",
            facts["title"],
            f"Quantized without training, calibrated on {calibration}.",
            report.rows(lm.title, recipe.name, result.sizes, result.before, result.after),
            recipe_table({recipe.name: recipe}),
            report.layer_table(lm.model.ptq_report.rows),
            _map(lm.model.ptq_report.absmax, result.maxima),
            _texts(settings, recipe, calibration, held_out, facts["versions"], command),
        )


def _map(calibrated: Mapping[str, Tensor], held_out: Mapping[str, Tensor]) -> report.Maxima:
    """What the map of outliers shows: a recipe that needs no calibration has seen nothing."""
    if calibrated:
        return report.Maxima(calibrated, "calibration text")
    return report.Maxima(held_out, "held-out text, since the recipe needs no calibration")


def _save(path: Path, lm: LanguageModel) -> None:
    try:
        qnn.save_checkpoint(path, lm.model)
    except RuntimeError as error:  # the disk is full, for one
        raise OSError(f"--output: expected a place that the model can be written to, got {error}") from error


def _facts(
    settings: QuantizeSettings,
    recipe: Recipe,
    lm: LanguageModel,
    calibration: Windows,
    held_out: Windows,
    result: Quantized,
) -> dict[str, Any]:
    """The content of quantrain.json."""
    import transformers

    return {
        "version": _VERSION,
        "title": f"{lm.title}, {recipe.name}",
        "model": lm.title,
        "target": settings.target,
        "recipe": json.loads(recipe.to_json()),
        "skip": list(settings.skip),
        "sequential": settings.sequential,
        "calibration": calibration.protocol(),
        "held_out": {**held_out.protocol(), "protocol": PROTOCOL, "sha256_of": "token ids as little-endian int32"},
        "sizes": dict(result.sizes),
        "float": asdict(result.before),
        "quantized": asdict(result.after),
        "versions": {
            "quantrain": quantrain.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _texts(
    settings: QuantizeSettings,
    recipe: Recipe,
    calibration: Windows,
    held_out: Windows,
    versions: Mapping[str, str],
    command: str,
) -> Sequence[tuple[str, str]]:
    """How it was made, for the report."""
    return [
        ("date", date.today().isoformat()),
        ("recipe", recipe_line(recipe)),
        ("target", settings.target),
        ("calibration", f"{calibration}; sha256 of the token ids {calibration.sha256}"),
        ("held out", f"{held_out}, those after them; sha256 of the token ids {held_out.sha256}"),
        ("protocol", f"{PROTOCOL}; float32; token ids are hashed as little-endian int32"),
        ("device", device_text(torch.device(settings.device))),
        *versions.items(),
        *([("command", command)] if command else []),
    ]
