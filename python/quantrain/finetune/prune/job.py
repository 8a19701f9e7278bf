"""``quantrain prune``: zeros in the linear layers of a model's blocks, measured on held-out texts, and a folder that
transformers reads."""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quantrain
import quantrain.prune as qprune
from quantrain.finetune.base_job import check_packages, find_device
from quantrain.finetune.lm.models import LanguageModel
from quantrain.finetune.progress import Count
from quantrain.finetune.quantize.models import FACTS, PLAIN, VERSION, WEIGHTS, load_float, task_of
from quantrain.finetune.quantize.task import Amounts, Measured, Texts, TextTask
from quantrain.finetune.quantize.writing import check_output, new_folder, write_beside_weights
from quantrain.finetune.results import write_json
from quantrain.finetune.table import format_bytes, format_cells
from quantrain.prune.report import table_of
from quantrain.prune.selection import (
    Weight,
    all_weights,
    check_pattern,
    in_embedding,
    is_transposed,
    prunable_weights,
)
from quantrain.ptq.blocks import block_names

METHODS = ("magnitude", "global", "wanda", "sparsegpt")
CALIBRATED = ("wanda", "sparsegpt")
_COLUMNS = 128  # that SparseGPT prunes at a time
_PACKAGES = ("safetensors", "tokenizers", "tqdm", "transformers")
_HEADER = ("layers of the blocks", "layers", "weights", "zeros", "share")


@dataclass(frozen=True)
class PruneSettings:
    """What the command line asks for.

    Attributes:
        model: As load_language_model takes it, or the folder of a classifier.
        method: One of METHODS.
        output: The folder to write.
        sparsity: The share of the weights that goes; None where ``pattern`` says it.
        pattern: ``"2:4"`` or another n:m.
        calibration: A .txt or .jsonl file; for a classifier a .tsv or .csv file with labels. None: nothing is measured.
        samples: Windows or sentences that are looked at; None: as the task has it, and so the next two.
        length: Tokens of a window, or at most of a sentence.
        held_out: Windows after those, or sentences at most, on which the model is measured.
        quick: Whether the task's numbers are those of a short run.
        skip: Patterns of layers that stay dense.
        device: ``"cpu"``, ``"cuda"``, ...
        force: Replace a folder that this command or ``quantrain quantize`` wrote before.
    """

    model: str
    method: str
    output: Path
    sparsity: float | None = None
    pattern: str | None = None
    calibration: Path | None = None
    samples: int | None = None
    length: int | None = None
    held_out: int | None = None
    quick: bool = False
    skip: tuple[str, ...] = ()
    device: str = "cpu"
    force: bool = False

    @property
    def share(self) -> float:
        """The share of the weights that goes."""
        if self.pattern is None:
            return self.sparsity
        kept, of = _counts(self.pattern)
        return 1 - kept / of

    @property
    def name(self) -> str:
        return f"{self.method} {self.pattern or f'{100 * self.share:g} %'}"

    def amounts(self, task: TextTask) -> Amounts:
        """How much of the file is used."""
        given = (self.samples, self.length, self.held_out)
        return Amounts(
            *(mine or own for mine, own in zip(given, task.quick if self.quick else task.normal, strict=True))
        )


@dataclass(frozen=True)
class Pruned:
    """What became of a model.

    Attributes:
        groups: Of layers with one name in all blocks: ``layers`` (their name), ``number``, ``elements``, ``zeros``,
            ``sparsity``.
        total: ``number``, ``elements``, ``zeros`` and ``sparsity`` of all of them.
        before: The dense model on the held-out texts; None where there are none, and so the next.
        after: The pruned one.
    """

    groups: Sequence[Mapping[str, Any]]
    total: Mapping[str, Any]
    before: Measured | None = None
    after: Measured | None = None


def run_prune(settings: PruneSettings) -> Pruned:
    """Prune a model and write its folder.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: An argument outside its rule, a model, text or folder that is
            not there or cannot be used, layers that cannot be pruned so. Nothing is written then.
        ModuleNotFoundError: A package is not installed.
    """
    task = _checked(settings)
    device = find_device(settings.device)
    lm = load_float(settings.model, task)
    weights = _weights(lm.model, settings)
    first = held_out = None
    if settings.calibration is not None:
        purpose = "to prune on" if settings.method in CALIBRATED else "that other methods look at"
        first, held_out = task.split(settings.calibration, lm, settings.amounts(task), purpose)
    print(f"{lm.title}, {settings.name}: {_use(settings, first, held_out)}", flush=True)
    dtype = _dtype(lm)
    before, after = _prune(settings, task, lm.model, weights, first, held_out, device, dtype)
    result = Pruned(*_counted(lm.model, weights), before, after)
    _write(settings, task, lm, dtype, result, first, held_out)
    print(f"\n{format_cells(_HEADER, _lines(task, result))}\n")
    if held_out is not None:
        print(f"held out: {held_out}, {task.protocol}; sha256 {held_out.sha256}")
    size = (settings.output / WEIGHTS).stat().st_size
    print(f"written: {settings.output}, of which {WEIGHTS} has {format_bytes(size)}", flush=True)
    return result


# Before the model is opened


def _checked(settings: PruneSettings) -> TextTask:
    """The model's task, where what can be known before anything is loaded is right."""
    if settings.method not in METHODS:
        raise ValueError(f"--method: expected {', '.join(METHODS[:-1])} or {METHODS[-1]}, got {settings.method!r}")
    if (settings.sparsity is None) == (settings.pattern is None):
        got = "neither" if settings.sparsity is None else "both"
        raise ValueError(f"--sparsity: expected one of --sparsity and --pattern, got {got}")
    if settings.sparsity is not None and not 0 <= settings.sparsity < 1:
        raise ValueError(f"--sparsity: expected a share in [0, 1), got {settings.sparsity:g}")
    if settings.pattern is not None:
        _check_pattern(settings.pattern, settings.method)
    if settings.method in CALIBRATED and settings.calibration is None:
        raise ValueError(f"--calibration: expected a file of texts, which {settings.method} looks at, got none")
    if settings.length is not None and settings.length < 2:
        raise ValueError(f"--length: expected at least 2 tokens, got {settings.length}")
    check_output(settings.output, settings.force)
    check_packages(_PACKAGES)
    task = task_of(settings.model)
    if settings.calibration is not None:
        task.check_file(settings.calibration)
    return task


def _check_pattern(pattern: str, method: str) -> None:
    kept, of = _counts(pattern)
    if not 0 < kept < of:
        raise ValueError(f"--pattern: expected N:M with N below M, such as 2:4, got {pattern!r}")
    if method == "global":
        raise ValueError(f"--pattern: expected --sparsity with global, which has one threshold, got {pattern!r}")
    if method == "sparsegpt" and _COLUMNS % of:
        raise ValueError(f"--pattern: expected an M that divides {_COLUMNS} with sparsegpt, got {pattern!r}")


def _counts(pattern: str) -> tuple[int, int]:
    """N and M; (0, 0) where the pattern has none."""
    found = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", pattern)
    return (int(found[1]), int(found[2])) if found else (0, 0)


# Which layers


def _weights(model: nn.Module, settings: PruneSettings) -> list[Weight]:
    """The weights of the linear layers in the model's blocks that ``skip`` leaves.

    Raises:
        ValueError: There are none, or one that cannot be pruned so; a pattern of ``skip`` that names no layer.
    """
    blocks = tuple(f"{name}." for name in block_names(model))
    layers = [
        weight.layer
        for weight in all_weights(model)
        if weight.layer.startswith(blocks)
        and not in_embedding(weight)
        and (isinstance(weight.module, nn.Linear) or is_transposed(weight.module))
    ]
    if not layers:
        raise ValueError(f"MODEL: expected blocks with linear layers, got none in {type(model).__name__}")
    try:
        weights = prunable_weights("MODEL", model, layers, settings.skip)
    except ValueError as error:
        # the package's words, under the name of the option that they are about
        text = str(error).replace("MODEL: expected every pattern of skip", "--skip: expected every pattern", 1)
        raise ValueError(text) from error
    if settings.pattern is not None:
        check_pattern("--pattern", settings.pattern, settings.share, weights)
    return weights


def _use(settings: PruneSettings, first: Texts | None, held_out: Texts | None) -> str:
    """What the texts are there for, in words."""
    seen = f"pruned on {first}" if settings.method in CALIBRATED else "no calibration needed"
    if held_out is None:
        return f"{seen}; not measured, without --calibration"
    return f"{seen}; measured on {held_out}, after its first {len(first)}"


# Pruning and measuring


def _prune(
    settings: PruneSettings,
    task: TextTask,
    model: nn.Module,
    weights: Sequence[Weight],
    first: Texts | None,
    held_out: Texts | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Measured | None, Measured | None]:
    """Prune the model in place, on ``device``; it is measured before and after where there are texts."""
    model.to(device)
    before = after = None
    if held_out is not None:
        exact = [values.cpu() for values in task.log_probabilities(model, held_out, device)]
        before = task.compare(exact, held_out)
    _call(settings, task, model, [weight.layer for weight in weights], first, device)
    qprune.remove_masks(model)  # the zeros are in the weights, and transformers has no place for masks
    _round(model, dtype)
    if held_out is not None:
        after = task.compare(task.log_probabilities(model, held_out, device), held_out, exact)
    return before, after


def _call(
    settings: PruneSettings,
    task: TextTask,
    model: nn.Module,
    layers: Sequence[str],
    first: Texts | None,
    device: torch.device,
) -> None:
    """Call the method."""
    share, pattern = settings.share, settings.pattern
    if settings.method not in CALIBRATED:
        scope = "global" if settings.method == "global" else "layer"
        qprune.magnitude(model, share, scope=scope, pattern=pattern, layers=layers)
        return
    method = qprune.wanda if settings.method == "wanda" else qprune.sparsegpt
    batches = [ids.to(device) for ids in first.calls]
    with Count("pruning", "block") as progress:
        chosen = {} if pattern is None else {"pattern": pattern}  # without one, each has the pattern of its paper
        method(model, share, batches, layers=layers, forward=task.forward, progress=progress, **chosen)


@torch.no_grad()
def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the parameters to what the file will hold, so that what is measured is what is written."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def _dtype(lm: LanguageModel) -> torch.dtype:
    """The type of the source's parameters, as its config.json says; else float32, in which all models are opened."""
    try:
        config = json.loads((Path(lm.source) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return torch.float32
    name = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(name, torch.float32)


# What is shown and written


def _counted(model: nn.Module, weights: Sequence[Weight]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """``groups`` and ``total`` of Pruned."""
    blocks = [f"{name}." for name in block_names(model)]
    groups: dict[str, dict[str, Any]] = {}
    total = {"number": 0, "elements": 0, "zeros": 0}
    for weight, row in zip(weights, table_of(weights).rows, strict=True):
        inside = next(weight.layer.removeprefix(name) for name in blocks if weight.layer.startswith(name))
        kind = re.sub(r"\b\d+\b", "*", inside)  # experts have numbers too
        group = groups.setdefault(kind, {"layers": kind, "number": 0, "elements": 0, "zeros": 0})
        for counts in (group, total):
            counts["number"] += 1
            counts["elements"] += row["elements"]
            counts["zeros"] += row["zeros"]
    for counts in (*groups.values(), total):
        counts["sparsity"] = counts["zeros"] / counts["elements"]
    return list(groups.values()), total


def _lines(task: TextTask, result: Pruned) -> list[tuple[str, ...]]:
    """The table's lines."""
    lines = [
        (
            counts["layers"],
            str(counts["number"]),
            f"{counts['elements']:,}",
            f"{counts['zeros']:,}",
            f"{100 * counts['sparsity']:.2f} %",
        )
        for counts in (*result.groups, {"layers": "total", **result.total})
    ]
    if result.before is not None:
        score, kl, same = (column.header for column in task.columns)
        (dense, *_), (pruned, divergence, agreement) = task.cells(result.before), task.cells(result.after)
        lines += [(score, f"{dense} dense, {pruned} pruned"), (kl, f"{divergence}, {same} {agreement}")]
    return lines


def _write(
    settings: PruneSettings,
    task: TextTask,
    lm: LanguageModel,
    dtype: torch.dtype,
    result: Pruned,
    first: Texts | None,
    held_out: Texts | None,
) -> None:
    """Write the folder."""
    with new_folder(settings.output, settings.force) as folder:
        write_beside_weights(folder, lm)
        _save(folder, lm.model, dtype)
        write_json(folder / FACTS, _facts(settings, task, lm, dtype, result, first, held_out))


def _save(folder: Path, model: Any, dtype: torch.dtype) -> None:
    """Write the weights as transformers does, in ``dtype``."""
    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.cpu()
    for parameter in model.parameters():  # not model.to, which would round the buffers, that no file has
        parameter.data = parameter.data.to(dtype)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config = GenerationConfig()  # transformers refuses to save some that it reads
    saved = folder / "saved"  # the other files that transformers writes are there already, as the source has them
    try:
        model.save_pretrained(saved, max_shard_size="1000GB")
        (saved / WEIGHTS).rename(folder / WEIGHTS)
    except Exception as error:  # the disk is full, for one, which safetensors has a type of its own for
        raise OSError(f"--output: expected a place that the model can be written to, got {error}") from error
    shutil.rmtree(saved)


def _facts(
    settings: PruneSettings,
    task: TextTask,
    lm: LanguageModel,
    dtype: torch.dtype,
    result: Pruned,
    first: Texts | None,
    held_out: Texts | None,
) -> dict[str, Any]:
    """The content of quantrain.json."""
    import transformers

    protocol = None
    if held_out is not None:
        protocol = {
            **held_out.protocol(),
            "after": len(first),
            "protocol": task.protocol,
            "sha256_of": "token ids as little-endian int32",
        }
    return {
        "version": VERSION,
        "title": f"{lm.title}, {settings.name}",
        "model": lm.title,
        "task": task.name,
        "target": PLAIN,
        "method": settings.method,
        "sparsity": settings.share,
        "pattern": settings.pattern,
        "skip": list(settings.skip),
        "dtype": str(dtype).removeprefix("torch."),
        "calibration": first.protocol() if settings.method in CALIBRATED else None,
        "held_out": protocol,
        "layers": list(result.groups),
        "total": dict(result.total),
        "dense": None if result.before is None else task.named(result.before),
        "pruned": None if result.after is None else task.named(result.after),
        "versions": {
            "quantrain": quantrain.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
