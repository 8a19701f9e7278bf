"""Texts of the language-model job: text and jsonl files, tokenized and cut into training and held-out sequences.

A text becomes sequences of exactly the asked-for length, one after another. An example of a jsonl file (a prompt and
its completion, or messages) is a sequence of its own, cut at that length, of which only the completion, or what the
assistant says, is learned.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantrain.finetune.data import Batch
from quantrain.finetune.own_data import held_out_rows

IGNORED = -100  # the label of a token that is not learned
SUFFIXES = (".txt", ".jsonl")
_KNOWN = {"tinyshakespeare": "tinyshakespeare/input.txt", "wikitext-2": "wikitext-2"}  # under $QUANTRAIN_DATA
_TITLES = {"tinyshakespeare": "tiny Shakespeare", "wikitext-2": "WikiText-2"}
_HELD_OUT = 0.1  # of a single text, its end
_PIECE = 1 << 22  # characters that are tokenized at once
_CUT_TOKENS = 64  # at the end of a text that is cut, which may differ from those of the whole text

Segment = tuple[str, bool]  # a piece of text, and whether it is learned


@dataclass(frozen=True)
class Sequences:
    """Token ids and labels int64 ``[T]`` of each sequence; labels are the ids, or IGNORED where nothing is learned."""

    ids: Sequence[Tensor]
    labels: Sequence[Tensor]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, chosen: slice | Sequence[int]) -> Sequences:
        if isinstance(chosen, slice):
            return Sequences(self.ids[chosen], self.labels[chosen])
        return Sequences([self.ids[place] for place in chosen], [self.labels[place] for place in chosen])

    def __add__(self, other: Sequences) -> Sequences:
        return Sequences([*self.ids, *other.ids], [*self.labels, *other.labels])

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(ids) for ids in self.ids)


@dataclass(frozen=True)
class LmData:
    """Training and held-out sequences of tokens held in memory.

    Attributes:
        name: What the data is called in tables and plots.
        source: Where it came from.
        train: To train on.
        test: Held out.
    """

    name: str
    source: str
    train: Sequences
    test: Sequences

    @property
    def train_size(self) -> int:
        """Number of training sequences."""
        return len(self.train)

    @property
    def test_size(self) -> int:
        """Number of held-out sequences."""
        return len(self.test)

    def hold_out(self, rows: int) -> LmData:
        """The last ``rows`` training sequences as the held-out ones, and the rest as the training ones.

        Raises:
            ValueError: They would leave nothing to train on.
        """
        if rows >= self.train_size:
            raise ValueError(f"holdout: expected fewer than the {self.train_size} training sequences, got {rows}")
        first = self.train_size - rows
        return replace(self, train=self.train[:first], test=self.train[first:])

    def subset(self, train_rows: int | None, test_rows: int | None) -> LmData:
        """``train_rows`` training sequences drawn by a fixed seed and the first ``test_rows``; None keeps them all."""
        train = self.train
        if train_rows is not None and train_rows < len(train):
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:train_rows]
            train = train[order.tolist()]
        return replace(self, train=train, test=self.test[:test_rows])

    def train_batch(self, indices: Tensor, generator: torch.Generator | None) -> Batch:
        """The training sequences at ``indices``, padded to the longest; ``generator`` is not drawn from."""
        return pad(self.train[indices.tolist()])

    def skip_train_batch(self, size: int, generator: torch.Generator) -> None:
        """A batch draws nothing, so there is nothing to skip."""

    def test_batches(self, batch_size: int) -> Iterator[Batch]:
        """The held-out sequences in order."""
        for start in range(0, self.test_size, batch_size):
            yield pad(self.test[start : start + batch_size])


def pad(sequences: Sequences) -> Batch:
    """Ids and labels ``[B, T]``, padded with id 0 and IGNORED at the end, where a causal model does not look."""
    ids = torch.nn.utils.rnn.pad_sequence(list(sequences.ids), batch_first=True, padding_value=0)
    labels = torch.nn.utils.rnn.pad_sequence(list(sequences.labels), batch_first=True, padding_value=IGNORED)
    return (ids,), labels


def default_data() -> str:
    """The first known text under $QUANTRAIN_DATA; where there is none, the name of one, which reading then refuses."""
    root = os.environ.get("QUANTRAIN_DATA")
    found = (name for name, place in _KNOWN.items() if root and (Path(root) / place).exists())
    return next(found, next(iter(_KNOWN)))


def load_lm_data(name: str, tokenizer: Any, length: int) -> LmData:
    """``tinyshakespeare``, ``wikitext-2``, a .txt or .jsonl file, or a folder with ``train`` (or ``valid``) and
    ``test`` (or ``valid``) files.

    Of a single text the last tenth is held out, of the examples of a single jsonl file every tenth in the order of a
    fixed seed.

    Args:
        name: One of these.
        tokenizer: Of transformers.
        length: Tokens of a sequence, at least 2.

    Raises:
        FileNotFoundError: The file or $QUANTRAIN_DATA is not there.
        ValueError: A file is not UTF-8, is empty, has a line that is no such example (the message has its number), or
            too few tokens for a sequence to train on and one to hold out.
    """
    path = _path_of(name)
    if path.is_dir():
        train, test = (_sequences(part, tokenizer, length) for part in _parts(path))
    else:
        whole = _sequences(path, tokenizer, length)
        if path.suffix == ".jsonl":
            train, test = (whole[rows] for rows in held_out_rows(len(whole), str(path)))
        else:
            held_out = max(1, round(_HELD_OUT * len(whole)))
            train, test = whole[: len(whole) - held_out], whole[len(whole) - held_out :]
    for what, part in (("train on", train), ("hold out", test)):
        if not len(part):
            raise ValueError(
                f"{path}: expected tokens for at least one sequence of {length} to {what}, "
                f"got {(train + test).tokens} in all; --sequence-length takes fewer"
            )
    return LmData(name=_TITLES.get(name, path.stem), source=str(path), train=train, test=test)


def check_text_file(path: Path) -> None:
    """Make sure that ``path`` is a file that read_tokens takes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no .txt or .jsonl file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a .txt or .jsonl file, got {'a folder' if path.is_dir() else 'none'}"
        )
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a .txt or .jsonl file, got one that ends in {path.suffix or 'neither'!r}")


def read_tokens(path: Path, tokenizer: Any, count: int | None = None) -> Tensor:
    """The token ids int64 ``[N]`` of a .txt or .jsonl file in its order, without a token for its beginning.

    Examples of a jsonl file follow one another whole, each with its end.

    Args:
        path: The file.
        tokenizer: Of transformers.
        count: Read no more than the first so many tokens; None reads all.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is neither of these, is not UTF-8, is empty, or has a line that is no example.
    """
    check_text_file(path)
    text = _read_text(path)
    if path.suffix == ".txt":
        return torch.tensor(_text_tokens(text, tokenizer, count)[:count], dtype=torch.long)
    ids: list[int] = []
    end = tokenizer.eos_token or ""
    for number, row in _rows(path, text):
        if "text" in row:
            ids += _encode(tokenizer, [_string(path, number, row, "text") + end])
        else:
            ids += _encode(tokenizer, [piece for piece, _ in _segments(path, number, row, tokenizer, end)])
        if count is not None and len(ids) >= count:
            break
    return torch.tensor(ids[:count], dtype=torch.long)


def _text_tokens(text: str, tokenizer: Any, count: int | None) -> list[int]:
    """At least the first ``count`` tokens, where the text has so many; of its beginning, where that has enough."""
    size = len(text) if count is None else 8 * count
    while True:
        ids = _encode(tokenizer, _pieces(text[:size]))
        if size >= len(text) or len(ids) >= count + _CUT_TOKENS:
            return ids
        size *= 2


def _path_of(name: str) -> Path:
    path = Path(name)
    if name in _KNOWN and not path.exists():
        root = os.environ.get("QUANTRAIN_DATA")
        if not root:
            raise FileNotFoundError(
                f"{name}: expected QUANTRAIN_DATA to name a folder with {_KNOWN[name]}, or --data with a .txt or "
                ".jsonl file, got neither"
            )
        path = Path(root) / _KNOWN[name]
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: expected a .txt or .jsonl file, or a folder with train and test files, got none"
        )
    if path.is_file() and path.suffix not in SUFFIXES:
        raise ValueError(f"--data: expected a .txt or .jsonl file, {' or '.join(_KNOWN)}, got {name!r}")
    return path


def _parts(folder: Path) -> tuple[Path, Path]:
    """The files to train on and to hold out in a folder."""

    def first(*stems: str) -> Path | None:
        paths = (folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES)
        return next((path for path in paths if path.is_file()), None)

    train, test = first("train", "valid"), first("test", "valid")
    if train is None or test is None or train == test:
        wanted = (
            "train.txt (or valid.txt) and test.txt (or valid.txt), or the same as .jsonl, got neither"
            if train is None
            else f"a file to hold out, test or valid, beside {train.name}, got none"
        )
        raise FileNotFoundError(f"{folder}: expected {wanted}")
    return train, test


def _sequences(path: Path, tokenizer: Any, length: int) -> Sequences:
    text = _read_text(path)
    if path.suffix == ".jsonl":
        return _read_jsonl(path, text, tokenizer, length)
    return _windows(_encode(tokenizer, _pieces(text)), length)


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, got {error}") from error
    if not text.strip():
        raise ValueError(f"{path}: expected text, got an empty file")
    return text


def _pieces(text: str) -> list[str]:
    """The text in pieces that end with a line, since a tokenizer's memory grows with what it is given at once."""
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", start + _PIECE) + 1 or len(text)
        pieces.append(text[start:end])
        start = end
    return pieces


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """The token ids of the texts, one after another, without the tokenizer's beginning and end."""
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return [token for ids in encoded for token in ids]


def _windows(ids: Sequence[int], length: int) -> Sequences:
    """Sequences of exactly ``length``; what is left at the end is dropped."""
    whole = torch.tensor(ids[: len(ids) // length * length], dtype=torch.long)
    windows = list(whole.split(length)) if len(whole) else []
    return Sequences(windows, windows)


def _read_jsonl(path: Path, text: str, tokenizer: Any, length: int) -> Sequences:
    """Texts, joined by the tokenizer's end and cut into windows, then each example as a sequence."""
    texts: list[str] = []
    ids, labels = [], []
    end = tokenizer.eos_token or ""
    for number, row in _rows(path, text):
        if "text" in row:
            texts.append(_string(path, number, row, "text") + end)
            continue
        segments = _segments(path, number, row, tokenizer, end)
        example_ids, example_labels = _encode_segments(tokenizer, segments, length)
        if (example_labels[1:] == IGNORED).all():
            raise ValueError(
                f"{path}: expected tokens to learn among the first {length} in line {number}, got none: the prompt is "
                "too long, or the answer empty"
            )
        ids.append(example_ids)
        labels.append(example_labels)
    windows = _windows(_encode(tokenizer, texts), length) if texts else Sequences([], [])
    return windows + Sequences(ids, labels)


def _rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    """The lines of a jsonl file that are not empty, with their numbers."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _row(path, number, line)


def _row(path: Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object in line {number}, got {line[:60]!r} ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}: expected a JSON object in line {number}, got {line[:60]!r}")
    return row


def _string(path: Path, number: int, row: dict, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{path}: expected text in the field {key} in line {number}, got {value!r:.60}")
    return value


def _segments(path: Path, number: int, row: dict, tokenizer: Any, end: str) -> list[Segment]:
    if "messages" in row:
        return _chat(path, number, row["messages"], tokenizer)
    if "prompt" in row or "completion" in row:
        prompt, completion = (_string(path, number, row, key) for key in ("prompt", "completion"))
        begin = tokenizer.bos_token or "" if _begins(tokenizer) else ""
        return [(begin + prompt, False), (completion + end, True)]
    raise ValueError(
        f"{path}: expected the field text, or prompt and completion, or messages in line {number}, got the fields "
        f"{', '.join(map(str, row))[:80] or 'none'}"
    )


def _begins(tokenizer: Any) -> bool:
    """Whether the tokenizer begins every text with its bos_token."""
    return tokenizer("", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]


def _chat(path: Path, number: int, messages: object, tokenizer: Any) -> list[Segment]:
    """What the tokenizer's template makes of messages, the assistant's turns learned.

    Each turn is what the template adds to the text of the messages before it, so a template that changes what came
    before is refused.
    """
    fits = isinstance(messages, list) and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in messages
    )
    if not fits or not any(one["role"] == "assistant" for one in messages):
        raise ValueError(
            f"{path}: expected messages with role and content, one of them the assistant's, in line {number}, got "
            f"{messages!r:.60}"
        )
    if not tokenizer.chat_template:
        raise ValueError(
            f"{path}: expected a tokenizer with a chat template for the messages in line {number}, got none"
        )
    segments: list[Segment] = []
    before = ""
    try:
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = tokenizer.apply_chat_template(messages[:place], tokenize=False, add_generation_prompt=True)
            answered = tokenizer.apply_chat_template(messages[: place + 1], tokenize=False)
            if not asked.startswith(before) or not answered.startswith(asked):
                raise ValueError("one that changes earlier turns")
            segments += [(asked[len(before) :], False), (answered[len(asked) :], True)]
            before = answered
    except Exception as error:  # a template raises what it likes
        raise ValueError(
            f"{path}: expected a chat template that adds turns for the messages in line {number}, got {error}"
        ) from error
    return segments


def _encode_segments(tokenizer: Any, segments: Sequence[Segment], length: int) -> tuple[Tensor, Tensor]:
    """Ids and labels of the first ``length`` tokens; the segments are tokenized one by one."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in segments:
        encoded = _encode(tokenizer, [text])
        ids += encoded
        labels += encoded if learned else [IGNORED] * len(encoded)
    return torch.tensor(ids[:length], dtype=torch.long), torch.tensor(labels[:length], dtype=torch.long)
