"""Sentences with labels for the fine-tuning job: SST-2, or a tsv file that the user names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quantrain.finetune.data import Batch, LabelledData
from quantrain.finetune.own_data import held_out_rows, index_labels, read_csv


@dataclass(frozen=True)
class TextData(LabelledData):
    """A training and a test set of tokenized sentences held in memory.

    Attributes:
        train_ids: Token ids of each training sentence.
        test_ids: Token ids of each test sentence.
    """

    train_ids: Sequence[list[int]]
    test_ids: Sequence[list[int]]

    _samples = "ids"

    def train_batch(self, indices: Tensor, generator: torch.Generator | None) -> Batch:
        """The training sentences at ``indices``, padded to the longest of them; ``generator`` is not drawn from."""
        return pad([self.train_ids[index] for index in indices.tolist()]), self.train_labels[indices]

    def skip_train_batch(self, size: int, generator: torch.Generator) -> None:
        """A batch of text draws nothing, so there is nothing to skip."""

    def test_batches(self, batch_size: int) -> Iterator[Batch]:
        """The test set, shortest sentences first, so that little is padded."""
        order = sorted(range(self.test_size), key=lambda index: len(self.test_ids[index]))
        for start in range(0, self.test_size, batch_size):
            chosen = order[start : start + batch_size]
            yield pad([self.test_ids[index] for index in chosen]), self.test_labels[chosen]

    def subset(self, train_rows: int | None, test_rows: int | None) -> TextData:
        """``train_rows`` training sentences drawn by a fixed seed and the first ``test_rows``; None keeps them all."""
        order = torch.randperm(self.train_size, generator=torch.Generator().manual_seed(0))[:train_rows]
        return replace(
            self,
            train_ids=[self.train_ids[index] for index in order.tolist()],
            train_labels=self.train_labels[order],
            test_ids=self.test_ids[:test_rows],
            test_labels=self.test_labels[:test_rows],
        )


def pad(sentences: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids as int64 ``[B, T]`` padded with 0 to the longest, and the mask bool ``[B, T]`` of the tokens."""
    length = max(len(ids) for ids in sentences)
    ids = torch.zeros(len(sentences), length, dtype=torch.long)
    mask = torch.zeros(len(sentences), length, dtype=torch.bool)
    for row, sentence in enumerate(sentences):
        ids[row, : len(sentence)] = torch.tensor(sentence)
        mask[row, : len(sentence)] = True
    return ids, mask


def read_tsv(path: Path) -> tuple[list[str], list[int]]:
    """The sentences and labels in a tsv file with the header ``sentence<TAB>label``, labels being numbers.

    Raises:
        FileNotFoundError, ValueError: As read_tsv_texts; also a label that is no number.
    """
    rows = _tsv_rows(path)
    for number, sentence, label in rows:
        if not label.isdecimal():
            raise ValueError(f"{path}: expected a number as label in line {number}, got {f'{sentence} {label}'[:60]!r}")
    return [sentence for _, sentence, _ in rows], [int(label) for *_, label in rows]


def read_tsv_texts(path: Path) -> tuple[list[str], list[str]]:
    """The sentences and labels in a tsv file with the header ``sentence<TAB>label``, labels as the file has them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The header or a row is not of that form, or there are no rows; it is not UTF-8.
    """
    rows = _tsv_rows(path)
    return [sentence for _, sentence, _ in rows], [label for *_, label in rows]


def _tsv_rows(path: Path) -> list[tuple[int, str, str]]:
    """The line's number, the sentence and the label of each row."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a tsv file with the columns sentence and label, got none")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, got {error}") from error
    if lines[0].rstrip("\r").split("\t") != ["sentence", "label"]:
        raise ValueError(f"{path}: expected the header 'sentence<TAB>label', got {lines[0][:60]!r}")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        sentence, tab, label = line.rstrip("\r").rpartition("\t")
        if not tab or not label.strip():
            raise ValueError(f"{path}: expected 'sentence<TAB>label' in line {number}, got {line[:60]!r}")
        rows.append((number, sentence.strip(), label.strip()))
    if not rows:
        raise ValueError(f"{path}: expected at least one row, got none")
    return rows


def read_sentences(path: Path) -> tuple[list[str], list[str]]:
    """The sentences and labels in a csv file with the columns ``sentence`` (or ``text``) and ``label``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column is missing, or a row is not of that form.
    """
    header, rows = read_csv(path)
    column = next((name for name in ("sentence", "text") if name in header), None)
    if column is None:
        raise ValueError(f"{path}: expected a column named sentence or text, got the columns {', '.join(header)[:80]}")
    place, label = header.index(column), header.index("label")
    return [row[place].strip() for row in rows], [row[label].strip() for row in rows]


def load_text_data(name: str, tokenizer) -> TextData:
    """``sst2`` (``$QUANTRAIN_DATA/sst2``), the path of a folder with train.tsv and dev.tsv, or of one tsv or csv file.

    Of a single file every tenth row, in the order of a fixed seed, is held out as the test set. A csv file has the
    columns ``sentence`` (or ``text``) and ``label``, whose values may be any text.

    Raises:
        FileNotFoundError: $QUANTRAIN_DATA is not set, or a file is missing; the message names it.
        ValueError: A file is not of the form that read_tsv or read_sentences takes.
    """
    path = _sst2_folder() if name == "sst2" else Path(name)
    names: tuple[str, ...] | None = None
    if path.is_file() or path.suffix == ".csv":
        sentences, labels = read_sentences(path) if path.suffix == ".csv" else read_tsv(path)
        train, test = (
            ([sentences[row] for row in rows], [labels[row] for row in rows])
            for rows in held_out_rows(len(labels), str(path))
        )
    else:
        train, test = read_tsv(path / "train.tsv"), read_tsv(path / "dev.tsv")
    if path.suffix == ".csv":
        names, *places = index_labels(str(path), train[1], test[1])
        train, test = (train[0], places[0].tolist()), (test[0], places[1].tolist())
    classes = max(max(train[1]), max(test[1])) + 1
    return TextData(
        name="SST-2" if name == "sst2" else path.stem,
        source=str(path),
        classes=names or (("negative", "positive") if classes == 2 else tuple(str(label) for label in range(classes))),
        train_ids=[encoding.ids for encoding in tokenizer.encode_batch(train[0])],
        train_labels=torch.tensor(train[1]),
        test_ids=[encoding.ids for encoding in tokenizer.encode_batch(test[0])],
        test_labels=torch.tensor(test[1]),
    )


def _sst2_folder() -> Path:
    root = os.environ.get("QUANTRAIN_DATA")
    if not root:
        raise FileNotFoundError(
            "sst2: expected QUANTRAIN_DATA to name a folder with sst2/train.tsv and sst2/dev.tsv, or --data with a tsv "
            "file, got neither"
        )
    return Path(root) / "sst2"
