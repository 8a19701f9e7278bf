"""``quantrain evaluate``: perplexity of a language model on a text, and its distance from another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from quantrain.finetune.base_job import check_packages, device_text, find_device
from quantrain.finetune.lm.data import check_text_file, read_tokens
from quantrain.finetune.lm.models import LanguageModel
from quantrain.finetune.progress import Count
from quantrain.finetune.quantize.measure import PROTOCOL, Measured, Windows, compare, log_probabilities
from quantrain.finetune.quantize.models import check_tokens, load_any

_PACKAGES = ("safetensors", "tokenizers", "tqdm", "transformers")


@dataclass(frozen=True)
class EvaluateSettings:
    """What the command line asks for.

    Attributes:
        model: As load_language_model takes it, or a folder that ``quantrain quantize`` wrote.
        text: A .txt or .jsonl file.
        length: Tokens of a window.
        windows: How many windows, from the text's beginning; None takes all.
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
            used, a second model of other tokens.
        ModuleNotFoundError: A package is not installed.
    """
    if settings.length < 2:
        raise ValueError(f"--length: expected at least 2 tokens, got {settings.length}")
    check_text_file(settings.text)
    check_packages(_PACKAGES)
    device = find_device(settings.device)
    lm = load_any(settings.model)
    windows = _windows(settings, lm)
    check_tokens(lm, windows.ids)
    ids, other, reference = windows.ids.to(device), None, None
    if settings.against is not None:
        other = load_any(settings.against, "--against")
        _check_same_tokens(settings, lm, other, windows)
        reference = log_probabilities(other.model.to(device), ids)
    model = lm.model.to(device)
    with Count("evaluating", "window") as progress:
        measured = compare(log_probabilities(model, ids, progress), ids, reference)
    print(format_measured(measured, lm, other, windows, device))
    return measured


def _windows(settings: EvaluateSettings, lm: LanguageModel) -> Windows:
    length = settings.length
    wanted = None if settings.windows is None else settings.windows * length
    ids = read_tokens(settings.text, lm.tokenizer, wanted)
    if len(ids) < (wanted or length):
        raise ValueError(
            f"--text: expected at least {wanted or length} tokens, {settings.windows or 1} windows of {length}, got "
            f"{len(ids)} in {settings.text}"
        )
    return Windows(settings.text.name, ids[: len(ids) // length * length].view(-1, length))


def _check_same_tokens(settings: EvaluateSettings, lm: LanguageModel, other: LanguageModel, windows: Windows) -> None:
    tokens = windows.ids.numel()
    ids = read_tokens(settings.text, other.tokenizer, tokens)
    if other.vocabulary != lm.vocabulary or not torch.equal(ids, windows.ids.flatten()):
        raise ValueError(
            f"--against: expected a model with the tokens of {lm.title} ({lm.vocabulary} ids), got {other.title} "
            f"({other.vocabulary} ids), which has others"
        )


def format_measured(
    measured: Measured, lm: LanguageModel, other: LanguageModel | None, windows: Windows, device: torch.device
) -> str:
    """What was found, and how, in lines."""
    lines = [("model", lm.title), ("perplexity", f"{measured.perplexity:.3f}")]
    if other is not None:
        lines += [
            ("against", other.title),
            ("KL", f"{measured.kl:.5f} nats, mean of KL(against || model)"),
            ("top-1", f"{measured.top1:.4f} of the predictions agree"),
        ]
    count, length = windows.ids.shape
    lines += [
        ("protocol", f"{windows}, {count * (length - 1)} predictions, {PROTOCOL}"),
        ("token ids", f"sha256 {windows.sha256} as little-endian int32"),
        ("device", device_text(device)),
    ]
    return "\n".join(f"{name:<10}  {value}" for name, value in lines)
