"""``quantrain quantize``: calibrate a model on texts, convert it, measure it on those that follow, write it."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quantrain
from quantrain import Recipe, ptq
from quantrain import nn as qnn
from quantrain.finetune.base_job import check_packages, device_text, find_device
from quantrain.finetune.lm.models import LanguageModel
from quantrain.finetune.progress import Count
from quantrain.finetune.quantize import report
from quantrain.finetune.quantize.maxima import input_maxima
from quantrain.finetune.quantize.models import FACTS, TARGET, VERSION, WEIGHTS, load_float, task_of
from quantrain.finetune.quantize.plan import Plan, check_target, plan_of
from quantrain.finetune.quantize.task import Amounts, Measured, Texts, TextTask
from quantrain.finetune.quantize.writing import check_output, new_folder, untie, write_beside_weights
from quantrain.finetune.recipe_text import recipe_line, recipe_table
from quantrain.finetune.recipes import names_file, resolve_recipes
from quantrain.finetune.report import ReportTable
from quantrain.finetune.results import write_json
from quantrain.finetune.table import format_bytes, format_cells
from quantrain.ptq.rotate import check_rotation

TARGETS = (TARGET, "vllm", "bitsandbytes")
_PACKAGES = ("matplotlib", "safetensors", "tokenizers", "tqdm", "transformers")


@dataclass(frozen=True)
class QuantizeSettings:
    """What the command line asks for.

    Attributes:
        model: As load_language_model takes it, or the folder of a classifier.
        recipe: A recipe's name, or a JSON file with one.
        calibration: A .txt or .jsonl file; for a classifier a .tsv or .csv file with labels.
        output: The folder to write.
        target: The program that is to read the folder: one of TARGETS.
        samples: Windows or sentences that calibrate; None: as the task has it, and so the next two.
        length: Tokens of a window, or at most of a sentence.
        held_out: Windows after those, or sentences at most, on which the model is measured.
        quick: Whether the task's numbers are those of a short run.
        sequential: Whether a block is calibrated on the output of the quantized blocks before it; None leaves that to
            the recipe.
        max_kl: A larger KL is an error.
        skip: Patterns of layers that stay in floating point.
        rotate: Whether ptq.rotate comes first.
        device: ``"cpu"``, ``"cuda"``, ...
        force: Replace a folder that the command wrote before.
    """

    model: str
    recipe: str
    calibration: Path
    output: Path
    target: str = TARGET
    samples: int | None = None
    length: int | None = None
    held_out: int | None = None
    quick: bool = False
    sequential: bool | None = None
    max_kl: float | None = None
    skip: tuple[str, ...] = ()
    rotate: bool = False
    device: str = "cpu"
    force: bool = False

    def amounts(self, task: TextTask) -> Amounts:
        """How much of the file is used."""
        given = (self.samples, self.length, self.held_out)
        return Amounts(
            *(mine or own for mine, own in zip(given, task.quick if self.quick else task.normal, strict=True))
        )


@dataclass(frozen=True)
class Quantized:
    """What became of a model.

    Attributes:
        sizes: As report.result_table takes them.
        before: The float model on the held-out texts.
        after: The quantized one.
        maxima: The largest absolute values of the inputs of the float model's linear layers, on the held-out texts.
    """

    sizes: Mapping[str, int]
    before: Measured
    after: Measured
    maxima: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Run:
    """What a run works with, once everything is read.

    Attributes:
        first: The texts at the file's beginning, which calibrate where the recipe needs that.
        held_out: Those after them.
        command: The command line.
    """

    settings: QuantizeSettings
    task: TextTask
    recipe: Recipe
    plan: Plan
    first: Texts
    held_out: Texts
    device: torch.device
    command: str

    @property
    def calibration(self) -> Texts | None:
        """What the model is calibrated or distilled on; None where the recipe needs no texts, and the first are passed
        over."""
        return self.first if self.plan.use else None

    @property
    def held_out_text(self) -> str:
        return f"{self.held_out}, after its first {len(self.first)}"

    def table(self, title: str, result: Quantized) -> ReportTable:
        sizes = (result.sizes, result.before, result.after)
        return report.result_table(self.task, title, self.name, *sizes)

    @property
    def name(self) -> str:
        return f"{self.recipe.name}, rotated" if self.settings.rotate else self.recipe.name


def run_quantize(settings: QuantizeSettings, command: str = "") -> Quantized:
    """Quantize a model and write its folder; ``command`` is what the report says it was.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: An argument outside its rule, a model, text or folder that is
            not there or cannot be used, layers that the target cannot express, a KL above ``max_kl``. Nothing is
            written then.
        ModuleNotFoundError: A package is not installed.
    """
    recipe, task = _checked(settings)
    device = find_device(settings.device)
    lm = load_float(settings.model, task)
    if settings.rotate:
        _named("--rotate:", check_rotation, lm.model)
    plan = plan_of(lm.model, recipe, settings.skip)
    if settings.target != TARGET:
        check_target(plan, recipe, settings.target)
    first, held_out = task.split(settings.calibration, lm, settings.amounts(task), plan.purpose)
    run = _Run(settings, task, recipe, plan, first, held_out, device, command)
    use = f"{plan.use} on {first}" if plan.use else "no calibration needed"
    print(f"{lm.title}, {recipe.name}: {use}; measured on {run.held_out_text}", flush=True)
    lm, result = _quantize(run, lm)
    _write(run, lm, result)
    table = run.table(lm.title, result)
    print(
        f"\n{format_cells(table.header, table.lines)}\n\nheld out: {held_out}, {task.protocol}; "
        f"sha256 {held_out.sha256}"
    )
    size = (settings.output / WEIGHTS).stat().st_size
    print(f"written: {settings.output}, of which {WEIGHTS} has {format_bytes(size)}", flush=True)
    return result


def _checked(settings: QuantizeSettings) -> tuple[Recipe, TextTask]:
    """The recipe and the model's task, where what can be known before anything is loaded is right."""
    if settings.target not in TARGETS:
        raise ValueError(f"--target: expected {', '.join(TARGETS[:-1])} or {TARGETS[-1]}, got {settings.target!r}")
    if settings.length is not None and settings.length < 2:
        raise ValueError(f"--length: expected at least 2 tokens, got {settings.length}")
    recipe = _recipe(settings.recipe)
    check_output(settings.output, settings.force)
    check_packages(_PACKAGES)
    task = task_of(settings.model)
    task.check_file(settings.calibration)
    return recipe, task


def _recipe(word: str) -> Recipe:
    """The recipe that ``word`` means: a name, or a JSON file."""
    if not names_file(word) and word not in Recipe.names():
        names = [name for name in Recipe.names() if not Recipe.from_name(name).training]
        raise ValueError(
            f"--recipe: expected a JSON file, or a recipe that needs no training ({', '.join(names)}), got {word!r}"
        )
    (recipe,) = resolve_recipes([word]).values()
    if qnn.handler_of(recipe).rebuilds:
        raise ValueError(f"--recipe: expected one for layers, got {word!r}, which makes a new network")
    return recipe


def _quantize(run: _Run, lm: LanguageModel) -> tuple[LanguageModel, Quantized]:
    """Measure the model, convert it, and measure it again.

    Raises:
        ValueError: The KL is above ``max_kl``.
    """
    settings, task, held_out, device = run.settings, run.task, run.held_out, run.device
    lm.model.to(device)
    with input_maxima(lm.model, run.plan.linear) as maxima:
        exact = [values.cpu() for values in task.log_probabilities(lm.model, held_out, device)]
    before = task.compare(exact, held_out)
    if settings.rotate:
        _named("--rotate:", ptq.rotate, lm.model)
    calibration = [] if run.calibration is None else run.calibration.calls
    with Count("quantizing", "block") as progress:
        model = ptq.quantize(
            lm.model,
            run.recipe,
            [ids.to(device) for ids in calibration],
            skip=settings.skip,
            sequential=settings.sequential,
            forward=task.forward,
            check_batch=[ids.to(device) for ids in held_out.calls],
            max_kl=None,  # checked below, as the command line names it
            progress=progress,
        )
    after = task.compare(task.log_probabilities(model, held_out, device), held_out, exact)
    if settings.max_kl is not None and not after.kl <= settings.max_kl:
        raise ValueError(
            f"--max-kl: expected a KL of at most {settings.max_kl:g} nats from the float model under "
            f"{run.recipe.name!r}, got {after.kl:.3g}; nothing was written"
        )
    sizes = {"layers": len(model.ptq_report.rows), **model.ptq_report.total}
    return replace(lm, model=model), Quantized(sizes, before, after, maxima)


def _named(option: str, run: Callable[[Any], Any], model: Any) -> None:
    """``run`` of the model, whose errors name the option in place of ``rotate:``."""
    try:
        run(model)
    except ValueError as error:
        raise ValueError(str(error).replace("rotate:", option, 1)) from error


def _write(run: _Run, lm: LanguageModel, result: Quantized) -> None:
    """Write the folder."""
    settings, facts, calibration = run.settings, _facts(run, lm, result), run.calibration
    seen = f"{run.plan.use} on {calibration}" if calibration else f"and without calibration; measured on {run.held_out}"
    with new_folder(settings.output, settings.force) as folder:
        write_beside_weights(folder, lm)
        if settings.rotate:
            untie(folder)
        if settings.target == TARGET:
            _save(folder / WEIGHTS, lm)
        else:
            ptq.export_model(lm.model, folder, settings.target)
        write_json(folder / FACTS, facts)
        report.write_report(
            folder / "report.html",
            facts["title"],
            f"Quantized without training, {seen}.",
            run.table(lm.title, result),
            recipe_table({run.recipe.name: run.recipe}),
            report.layer_table(lm.model.ptq_report.rows),
            _map(run, lm.model.ptq_report.absmax, result.maxima),
            _texts(run, facts["versions"]),
        )


def _map(run: _Run, calibrated: Mapping[str, Tensor], held_out: Mapping[str, Tensor]) -> report.Maxima:
    """What the map of outliers shows: not every recipe notes what calibration saw."""
    if calibrated:
        return report.Maxima(calibrated, "calibration text")
    return report.Maxima(
        held_out, "held-out text" + ("" if run.calibration else ", since the recipe needs no calibration")
    )


def _save(path: Path, lm: LanguageModel) -> None:
    try:
        qnn.save_checkpoint(path, lm.model)
    except RuntimeError as error:  # the disk is full, for one
        raise OSError(f"--output: expected a place that the model can be written to, got {error}") from error


def _facts(run: _Run, lm: LanguageModel, result: Quantized) -> dict[str, Any]:
    """The content of quantrain.json."""
    import transformers

    task, calibration = run.task, run.calibration
    return {
        "version": VERSION,
        "title": f"{lm.title}, {run.name}",
        "model": lm.title,
        "task": task.name,
        "target": run.settings.target,
        "recipe": json.loads(run.recipe.to_json()),
        "skip": list(run.settings.skip),
        "sequential": run.settings.sequential,
        "rotated": run.settings.rotate,
        "calibration": None if calibration is None else calibration.protocol(),
        "held_out": {
            **run.held_out.protocol(),
            "after": len(run.first),
            "protocol": task.protocol,
            "sha256_of": "token ids as little-endian int32",
        },
        "sizes": dict(result.sizes),
        "float": task.named(result.before),
        "quantized": task.named(result.after),
        "versions": {
            "quantrain": quantrain.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _texts(run: _Run, versions: Mapping[str, str]) -> Sequence[tuple[str, str]]:
    """How it was made, for the report."""
    calibration, held_out = run.calibration, run.held_out
    seen = (
        f"{calibration}; sha256 of the token ids {calibration.sha256}" if calibration else "none: the recipe needs none"
    )
    return [
        ("date", date.today().isoformat()),
        ("recipe", recipe_line(run.recipe) + (", after rotation" if run.settings.rotate else "")),
        ("target", run.settings.target),
        ("calibration", seen),
        ("held out", f"{run.held_out_text}; sha256 of the token ids {held_out.sha256}"),
        ("protocol", f"{run.task.protocol}; float32; token ids are hashed as little-endian int32"),
        ("device", device_text(run.device)),
        *versions.items(),
        *([("command", run.command)] if run.command else []),
    ]
