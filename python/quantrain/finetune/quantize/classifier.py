"""Sequence classifiers in the commands: sentences with labels, accuracy.

A call of the model has sentences of one length, so that no padding is calibrated on or measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantrain.finetune.lm.models import LanguageModel, load_folder
from quantrain.finetune.quantize.task import Amounts, Column, Texts, TextTask, check_ids
from quantrain.finetune.text import read_sentences, read_tsv_texts

SUFFIXES = (".tsv", ".csv")
_CALL = 32  # sentences of a call, at most


@dataclass(frozen=True)
class Sentences(Texts):
    """Sentences with labels.

    Attributes:
        ids: Token ids of each.
        labels: The class of each.
        cut: Tokens that a sentence has at most; what is beyond is left out.
    """

    ids: Sequence[list[int]]
    labels: Sequence[int]
    cut: int
    unit: ClassVar[str] = "sentences"

    def __len__(self) -> int:
        return len(self.ids)

    def __str__(self) -> str:
        return f"{len(self)} sentences of {self.file}"

    def _rows(self) -> list[list[int]]:
        """The places of each call's sentences: shortest first, those of one length in the order of the file."""
        order = sorted(range(len(self)), key=lambda place: len(self.ids[place]))
        calls = []
        for _, same in groupby(order, key=lambda place: len(self.ids[place])):
            places = list(same)
            calls += [places[start : start + _CALL] for start in range(0, len(places), _CALL)]
        return calls

    @property
    def calls(self) -> list[Tensor]:
        return [torch.tensor([self.ids[place] for place in places]) for places in self._rows()]

    @property
    def targets(self) -> list[Tensor]:
        return [torch.tensor([self.labels[place] for place in places]) for places in self._rows()]

    @property
    def token_ids(self) -> Tensor:
        return torch.tensor([number for ids in self.ids for number in ids])

    @property
    def length(self) -> int:
        return self.cut


class ClassifierTask(TextTask):
    """The class of a sentence."""

    def load(self, name: str) -> LanguageModel:
        lm = load_folder(Path(name), torch.float32, self.auto_class, self.what)
        config = lm.model.config
        kind = getattr(config, "problem_type", None) or "single_label_classification"
        if kind != "single_label_classification" or config.num_labels < 2:
            raise ValueError(
                f"--model: expected {name} to hold a classifier that gives each sentence one of its classes, got one "
                f"of {config.num_labels} outputs for {kind}"
            )
        return lm

    def check_file(self, path: Path) -> None:
        what = "a .tsv or .csv file with the columns sentence and label"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected {what}, got {'a folder' if path.is_dir() else 'none'}")
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: expected {what}, got one that ends in {path.suffix or 'neither'!r}")

    def read(self, path: Path, lm: LanguageModel, length: int, count: int | None) -> Sentences:
        sentences, labels = _read(path)
        if len(sentences) < (count or 1):
            raise ValueError(f"--text: expected at least {count} sentences, got {len(sentences)} in {path}")
        return _tokenized("--text", path, lm, sentences[:count], labels[:count], length)

    def split(self, path: Path, lm: LanguageModel, amounts: Amounts, purpose: str) -> tuple[Sentences, Sentences]:
        samples, length, held_out = amounts
        sentences, labels = _read(path)
        if len(sentences) <= samples:
            raise ValueError(
                f"--calibration: expected at least {samples + 1} sentences, {samples} {purpose} and one held out, got "
                f"{len(sentences)} in {path}; --samples takes fewer"
            )
        parts = slice(samples), slice(samples, samples + held_out)
        first, after = (_tokenized("--calibration", path, lm, sentences[part], labels[part], length) for part in parts)
        return first, after

    def outputs(self, lm: LanguageModel) -> str:
        return f"{lm.vocabulary} ids, {lm.model.config.num_labels} classes"

    def logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    def scores(self, found: Tensor, targets: Tensor) -> float:
        return float((found.argmax(-1) == targets).sum())


def _read(path: Path) -> tuple[list[str], list[str]]:
    """The sentences and labels of a file."""
    return read_sentences(path) if path.suffix == ".csv" else read_tsv_texts(path)


def _tokenized(
    what: str, path: Path, lm: LanguageModel, sentences: Sequence[str], labels: Sequence[str], length: int
) -> Sentences:
    """Sentences that the model has embeddings, positions and classes for."""
    limits = (length, lm.context, getattr(lm.tokenizer, "model_max_length", None))
    cut = min(limit for limit in limits if limit)
    ids = lm.tokenizer(list(sentences), truncation=True, max_length=cut)["input_ids"]
    if not all(ids):
        empty = next(place for place, sentence in enumerate(ids) if not sentence)
        raise ValueError(f"{what}: expected sentences with tokens, got {sentences[empty]!r} in {path}")
    texts = Sentences(path.name, ids, _classes(what, path, lm.model.config, labels), cut)
    check_ids(lm, texts.token_ids)
    return texts


def _classes(what: str, path: Path, config: Any, labels: Sequence[str]) -> list[int]:
    """The labels as the model counts its classes: by their names where all have one, else by their numbers."""
    names = {str(name): int(place) for name, place in (config.label2id or {}).items()}
    if all(label in names for label in labels):
        return [names[label] for label in labels]
    for label in labels:
        if not label.isdecimal() or int(label) >= config.num_labels:
            raise ValueError(
                f"{what}: expected labels 0 to {config.num_labels - 1}, or {', '.join(list(names)[:5])}, as the model "
                f"has classes, got {label!r} in {path}"
            )
    return [int(label) for label in labels]


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


CLASSIFIER = ClassifierTask(
    name="sequence classifier",
    what="a sequence classifier",
    auto_class="AutoModelForSequenceClassification",
    columns=(
        Column("accuracy", "accuracy", "share of the held-out sentences whose label is the likeliest class", _percent),
        Column(
            "kl", "KL", "mean over these sentences of KL(float || quantized) of the classes, in nats", "{:.4f}".format
        ),
        Column("same", "same", "share of these sentences to which both models give the same class", _percent),
    ),
    answers="answers",
    protocol=f"sentences of one length in calls of up to {_CALL}, without padding",
    normal=Amounts(samples=128, length=512, held_out=1000),
    quick=Amounts(samples=8, length=512, held_out=100),
)
