"""A teacher's answers, stored once: the k largest log-probabilities of each row, in safetensors files.

    values = the k largest of log softmax(t / T), indices = their classes

A vocabulary of 49,152 then takes 6 k bytes per token (float16 and int32) in place of 98,304, and no teacher is in
memory while the student trains. What is not stored of a row is one bucket of probability in
:func:`quantrain.distillation_kl_topk`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quantrain._arguments import integer, is_number
from quantrain.nn.calibrate import check_batches, evaluating, run_batch
from quantrain.nn.prepare import check_model

from .hooks import unwrapped
from .outputs import CalledAs, logits_of, moved, without_labels

__all__ = ["TopkOutput", "TopkTeacher", "batch_digest", "write_topk"]

kFormat = 1
kIndex = "topk.json"
kRows = 1024  # softmax of so many rows at a time: 200 MB of float32 at 49,152 classes
kShardBytes = 512 << 20


@dataclass(frozen=True)
class TopkOutput:
    """The stored answers for one batch.

    Attributes:
        values: log-probabilities of softmax(t / T), falling, ``[.., k]``.
        indices: their classes, int32 ``[.., k]``.
        temperature: T.
        vocabulary: classes in all.
    """

    values: Tensor
    indices: Tensor
    temperature: float
    vocabulary: int

    def check(self, temperature: float, logits: torch.Size) -> None:
        """Raises ValueError where they are of another temperature, vocabulary or rows."""
        if temperature != self.temperature:
            raise ValueError(f"TopkTeacher: expected temperature {self.temperature}, as stored, got {temperature}")
        if logits[-1] != self.vocabulary:
            raise ValueError(f"TopkTeacher: expected logits of {self.vocabulary} classes, as stored, got {logits[-1]}")
        if logits[:-1] != self.values.shape[:-1]:
            raise ValueError(
                f"TopkTeacher: expected logits of rows {list(self.values.shape[:-1])}, as stored for this batch, got "
                f"{list(logits[:-1])}"
            )


def write_topk(
    teacher: nn.Module,
    batches: Iterable[Any],
    folder: str | os.PathLike,
    *,
    k: int = 64,
    temperature: float = 2.0,
    dtype: torch.dtype = torch.float16,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    logits: Callable[[Any], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> TopkTeacher:
    """Stores what the teacher gives for each batch, in evaluation mode and without gradients.

    ``topk.json`` is written last, so a folder that has it is whole.

    Args:
        teacher: as in :class:`Distiller`; left as it was.
        batches: as :func:`quantrain.nn.calibrate` takes them, read once, in the order of training or any other: batches
            are found by index or by digest. Rows that do not count are stored too.
        folder: new or empty.
        k: classes per row; with all of them nothing is lost but the rounding to ``dtype``.
        temperature: T, which the distiller must use.
        dtype: of the log-probabilities, torch.float16 (2^-11 relative) or torch.float32.
        forward: ``forward(model, batch)``; by default as in :func:`quantrain.nn.calibrate`.
        logits: as in :class:`Distiller`.
        progress: called with the number of batches done.

    Returns:
        The folder, opened.

    Raises:
        TypeError: no module, one batch in place of an iterable of them, another type.
        ValueError: k below 1 or above the vocabulary; a temperature that is not positive; no batch; logits that are not
            finite; batches of different vocabularies.
        FileExistsError: a folder with files in it.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> stored = write_topk(nn.Linear(8, 100), [torch.randn(16, 8)], folder, k=10, temperature=2.0)
    >>> stored[0].values.shape, stored.vocabulary, sorted(os.listdir(folder))
    (torch.Size([16, 10]), 100, ['topk-00000.safetensors', 'topk.json'])
    """
    check_model("write_topk", teacher)
    check_batches("write_topk", batches)
    k = integer("write_topk", "k", k)
    if k < 1:
        raise ValueError(f"write_topk: expected k of at least 1, got {k}")
    if not is_number(temperature) or not 0 < temperature < float("inf"):
        raise ValueError(f"write_topk: expected a finite temperature above 0, got {temperature!r}")
    if dtype not in (torch.float16, torch.float32):
        raise TypeError(f"write_topk: expected dtype float16 or float32, got {dtype}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"write_topk: expected a new or empty folder, got {folder} with files in it")
    shards = _Shards(folder)
    inner = unwrapped(teacher)
    called = teacher if inner is teacher or forward is not None else CalledAs(teacher, inner)
    try:
        with evaluating(teacher), torch.no_grad():
            for count, batch in enumerate(batches, start=1):
                output = (forward or run_batch)(called, moved(without_labels(batch, inner), teacher))
                found = logits_of(output, "teacher", logits)
                shards.add(*_topk(found, k, float(temperature), dtype), found.shape, batch_digest(batch))
                if progress is not None:
                    progress(count)
        shards.finish(k=k, temperature=float(temperature), dtype=str(dtype).removeprefix("torch."))
    except BaseException:
        shards.remove()
        raise
    return TopkTeacher(folder)


class TopkTeacher:
    """A folder of :func:`write_topk`, in place of the teacher of a :class:`Distiller`.

    Files are mapped into memory, and of them what is asked for is read.

    Args:
        folder: where ``topk.json`` is.

    Attributes:
        temperature, k, vocabulary: of the stored answers.
        rows: in all batches together.

    Raises:
        FileNotFoundError: no ``topk.json``: nothing was written there, or not to the end.
        ValueError: a file of another format.

    >>> import tempfile
    >>> batches, folder = [torch.randn(16, 8) for _ in range(3)], tempfile.mkdtemp()
    >>> _ = write_topk(nn.Linear(8, 100), batches, folder, k=10)
    >>> from quantrain.distill import Distiller
    >>> teacher, student = TopkTeacher(folder), nn.Linear(8, 100)
    >>> teacher.check(batches)
    >>> losses = Distiller(student, teacher)(batches[1])
    >>> losses.backward()
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        path = self.folder / kIndex
        if not path.is_file():
            raise FileNotFoundError(f"TopkTeacher: expected a folder that write_topk has finished, got no {path}")
        index = json.loads(path.read_text(encoding="utf-8"))
        if index.get("format") != kFormat:
            raise ValueError(f"TopkTeacher: expected format {kFormat} in {path}, got {index.get('format')!r}")
        self.temperature, self.k, self.vocabulary = index["temperature"], index["k"], index["vocabulary"]
        self.rows = index["rows"]
        self._batches: list[dict[str, Any]] = index["batches"]
        self._places: dict[str, int] = {}
        for place, batch in enumerate(self._batches):
            self._places.setdefault(batch["digest"], place)
        self._open: dict[str, Any] = {}

    def __len__(self) -> int:
        """How many batches."""
        return len(self._batches)

    def __getitem__(self, index: int) -> TopkOutput:
        """The answers for the batch of that index."""
        index = integer("TopkTeacher", "index", index)
        if not 0 <= index < len(self):
            raise IndexError(f"TopkTeacher: expected a batch of {len(self)} in {self.folder}, got index {index}")
        file = self._batches[index]["file"]
        if file not in self._open:
            self._open[file] = safe_open(str(self.folder / file), framework="pt")
        values, indices = (self._open[file].get_tensor(f"{name}.{index}") for name in ("values", "indices"))
        return TopkOutput(values, indices, self.temperature, self.vocabulary)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a loader's worker opens the files itself

    def find(self, batch: Any) -> TopkOutput:
        """The answers for a batch, found by its digest.

        Raises:
            ValueError: another batch than those that were stored.
        """
        place = self._places.get(batch_digest(batch))
        if place is None:
            raise ValueError(
                f"TopkTeacher: expected one of the {len(self)} batches that {self.folder} was written from, got other "
                "inputs"
            )
        return self[place]

    def check(self, batches: Iterable[Any]) -> None:
        """Raises ValueError where these are not the batches that were stored, in their order."""
        check_batches("TopkTeacher", batches)
        count = 0
        for count, batch in enumerate(itertools.islice(batches, len(self) + 1), start=1):
            if count <= len(self) and batch_digest(batch) != self._batches[count - 1]["digest"]:
                raise ValueError(
                    f"TopkTeacher: expected the batches that {self.folder} was written from, got other inputs in batch "
                    f"{count - 1}"
                )
        if count != len(self):
            more = " or more" if count > len(self) else ""
            raise ValueError(f"TopkTeacher: expected {len(self)} batches, as stored, got {count}{more}")


def batch_digest(batch: Any) -> str:
    """sha256 of a batch's tensors with their names, types and shapes, labels left out.

    >>> batch_digest(torch.arange(3))[:8], batch_digest({"x": torch.arange(3), "labels": torch.ones(3)})[:8]
    ('5dda9961', '37d4ba7b')
    """
    digest = hashlib.sha256()
    _add(digest, without_labels(batch, None), "")
    return digest.hexdigest()


def _add(digest: Any, value: Any, name: str) -> None:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key in sorted(value):
            _add(digest, value[key], f"{name}.{key}")
    elif isinstance(value, (tuple, list)):
        for place, inner in enumerate(value):
            _add(digest, inner, f"{name}.{place}")


def _topk(logits: Tensor, k: int, temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """values and indices ``[.., k]`` on the CPU."""
    vocabulary = logits.shape[-1]
    if k > vocabulary:
        raise ValueError(f"write_topk: expected k of at most the vocabulary, {vocabulary}, got {k}")
    values, indices = [], []
    for rows in logits.reshape(-1, vocabulary).split(kRows):
        best = torch.log_softmax(rows.float() / temperature, -1).topk(k)
        lowest = torch.finfo(dtype).min  # in place of -inf, which times a probability of 0 is NaN
        values.append(best.values.clamp_min(lowest).to(dtype).cpu())
        indices.append(best.indices.int().cpu())
    shape = (*logits.shape[:-1], k)
    return torch.cat(values).reshape(shape), torch.cat(indices).reshape(shape)


class _Shards:
    """Batches on their way to files of about kShardBytes."""

    def __init__(self, folder: Path):
        self.folder, self.held, self.bytes = folder, {}, 0
        self.batches: list[dict[str, Any]] = []
        self.vocabulary, self.rows, self.files = None, 0, 0

    def add(self, values: Tensor, indices: Tensor, logits: torch.Size, digest: str) -> None:
        number = len(self.batches)
        if bool(values.isnan().any()):
            raise ValueError(
                f"write_topk: expected logits whose softmax is a number, got NaN or infinity in batch {number}"
            )
        if self.vocabulary not in (None, logits[-1]):
            raise ValueError(
                f"write_topk: expected batches of one vocabulary, {self.vocabulary}, got {logits[-1]} in batch {number}"
            )
        self.vocabulary, self.rows = logits[-1], self.rows + logits[:-1].numel()
        self.batches.append({"digest": digest, "shape": list(logits[:-1]), "file": self._file()})
        self.held |= {f"values.{number}": values, f"indices.{number}": indices}
        self.bytes += values.nbytes + indices.nbytes
        if self.bytes >= kShardBytes:
            self._write()

    def finish(self, **facts: Any) -> None:
        if not self.batches:
            raise ValueError("write_topk: expected at least one batch, got none")
        if self.held:
            self._write()
        digest = hashlib.sha256("".join(batch["digest"] for batch in self.batches).encode()).hexdigest()
        index = {"format": kFormat, **facts, "vocabulary": self.vocabulary, "rows": self.rows, "digest": digest}
        text = json.dumps({**index, "batches": self.batches}, indent=1)
        (self.folder / kIndex).write_text(text, encoding="utf-8")

    def remove(self) -> None:
        """What was written until an error."""
        for number in range(self.files):
            (self.folder / f"topk-{number:05}.safetensors").unlink(missing_ok=True)

    def _file(self) -> str:
        return f"topk-{self.files:05}.safetensors"

    def _write(self) -> None:
        save_file(self.held, str(self.folder / self._file()))
        self.held, self.bytes, self.files = {}, 0, self.files + 1
