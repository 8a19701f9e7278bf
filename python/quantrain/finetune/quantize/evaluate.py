"""``quantrain evaluate``: how a model does on a text, and its distance from another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantrain.finetune.base_job import check_packages, device_text, find_device
from quantrain.finetune.lm.models import LanguageModel
from quantrain.finetune.progress import Count
from quantrain.finetune.quantize.models import load_any, task_of
from quantrain.finetune.quantize.task import Measured, Texts, TextTask

_PACKAGES = ("safetensors", "tokenizers", "tqdm", "transformers")


@dataclass(frozen=True)
class EvaluateSettings:
    """What the command line asks for.

    Attributes:
        model: As load_language_model takes it, the folder of a classifier, or one that ``quantrain quantize`` wrote.
        text: A .txt or .jsonl file; for a classifier a .tsv or .csv file with labels.
        length: Tokens of a window, or at most of a sentence.
        windows: How many windows or sentences, from the file's beginning; None takes all.
        against: A second model, as ``model``, that the first is compared with.
        device: ``"cpu"``, ``"cuda"``, ...
    """

    model: str
    text: Path
    length: int = 512
    windows: int | None = None
    against: str | None = None
    device: str = "cpu"


def run_evaluate(settings: EvaluateSettings) -> Measured:
    """Measure a model and print what was found, and how.

    Raises:
        FileNotFoundError, ValueError: An argument outside its rule, a model or text that is not there or cannot be
            used, a second model of another task or of other tokens.
        ModuleNotFoundError: A package is not installed.
    """
    if settings.length < 2:
        raise ValueError(f"--length: expected at least 2 tokens, got {settings.length}")
    check_packages(_PACKAGES)
    task = task_of(settings.model)
    task.check_file(settings.text)
    device = find_device(settings.device)
    lm = load_any(settings.model, task)
    texts = task.read(settings.text, lm, settings.length, settings.windows)
    other = reference = None
    if settings.against is not None:
        other = _other_model(settings, task, lm, texts)
        reference = task.log_probabilities(other.model.to(device), texts, device)
    model = lm.model.to(device)
    with Count("evaluating", "call") as progress:
        found = _numbers(task.log_probabilities(model, texts, device, progress), settings.model)
        measured = task.compare(found, texts, reference)
    print(format_measured(task, measured, lm, other, texts, device))
    return measured


def _numbers(found: Iterable[Tensor], name: str) -> Iterator[Tensor]:
    """``found``, none of which may be NaN."""
    for values in found:
        if bool(values.isnan().any()):
            raise ValueError(f"MODEL: expected numbers from {name}, got NaN")
        yield values


def _other_model(settings: EvaluateSettings, task: TextTask, lm: LanguageModel, texts: Texts) -> LanguageModel:
    """The second model, where it reads the same tokens and gives answers of the same kind."""
    name = settings.against
    if (others := task_of(name, "--against")) is not task:
        raise ValueError(f"--against: expected {task.what}, as MODEL is, got {others.what} in {name}")
    other = load_any(name, task, "--against")
    try:
        same = task.read(settings.text, other, settings.length, settings.windows).sha256 == texts.sha256
    except ValueError:  # the file was read for the first model, so it is the second that does not fit it
        same = False
    if not same or task.outputs(other) != task.outputs(lm):
        raise ValueError(
            f"--against: expected a model with the tokens of {lm.title} ({task.outputs(lm)}), got {other.title} "
            f"({task.outputs(other)}), which has others"
        )
    return other


def format_measured(
    task: TextTask,
    measured: Measured,
    lm: LanguageModel,
    other: LanguageModel | None,
    texts: Texts,
    device: torch.device,
) -> str:
    """What was found, and how, in lines."""
    score, _, agreement = task.columns
    lines = [("model", lm.title), (score.header, score.text(measured.score))]
    if other is not None:
        lines += [
            ("against", other.title),
            ("KL", f"{measured.kl:.5f} nats, mean of KL(against || model)"),
            (agreement.header, f"{agreement.text(measured.agreement)} of the {task.answers} agree"),
        ]
    lines += [
        ("protocol", f"{texts}, {texts.predictions} {task.answers}, {task.protocol}"),
        ("token ids", f"sha256 {texts.sha256} as little-endian int32"),
        ("device", device_text(device)),
    ]
    return "\n".join(f"{name:<10}  {value}" for name, value in lines)
