"""What the commands ask of a model's task: which texts it reads, in which calls, and how its answers are measured."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from quantrain import ptq
from quantrain.finetune.lm.models import LanguageModel


@dataclass(frozen=True)
class Texts(ABC):
    """Texts of a file as a task's models read them.

    Attributes:
        file: The name of the file.
    """

    file: str
    unit: ClassVar[str]  # what is counted: "windows"

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def calls(self) -> list[Tensor]:
        """Token ids int64 ``[B, T]`` of each call of a model, none of them padding.

        They depend on the texts alone: what an int8 layer does with a row may depend on the other rows of the call.
        """

    @property
    @abstractmethod
    def targets(self) -> list[Tensor]:
        """For each call the right answers int64 ``[predictions]``."""

    @property
    @abstractmethod
    def token_ids(self) -> Tensor:
        """All token ids in the order of the file, int64 ``[N]``."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens of a text, at most."""

    @property
    def predictions(self) -> int:
        """Number of answers that are measured."""
        return sum(len(targets) for targets in self.targets)

    @property
    def sha256(self) -> str:
        """Of the token ids as little-endian int32."""
        return hashlib.sha256(self.token_ids.cpu().numpy().astype("<i4").tobytes()).hexdigest()

    def protocol(self) -> dict[str, Any]:
        """What says which tokens these are, as JSON has it."""
        counts = {self.unit: len(self), "length": self.length, "tokens": self.token_ids.numel()}
        return {"file": self.file, **counts, "sha256": self.sha256}


@dataclass(frozen=True)
class Measured:
    """What a model does on texts.

    Attributes:
        score: Perplexity, or accuracy.
        kl: Mean over the predictions of KL(other || this) in nats; None where it was not compared with another model.
        agreement: Share of predictions for which both models' likeliest answer is the same; None as ``kl``.
    """

    score: float
    kl: float | None = None
    agreement: float | None = None


class Column(NamedTuple):
    """A field of Measured as tables, reports and quantrain.json have it."""

    key: str  # in quantrain.json
    header: str
    meaning: str
    text: Callable[[float], str]


class Amounts(NamedTuple):
    """How much of a file is used: texts that calibrate, tokens of a text, texts after those that are held out."""

    samples: int
    length: int
    held_out: int


@dataclass(frozen=True)
class TextTask(ABC):
    """What depends on what a model is for.

    Attributes:
        name: Of the task, as quantrain.json has it.
        what: What its models are, with an article.
        auto_class: The class of transformers that loads them.
        columns: The fields of Measured, in their order.
        answers: What a model gives, in the plural.
        protocol: How a model is measured, in words.
        normal, quick: Amounts where the command line gives none, without and with ``--quick``.
    """

    name: str
    what: str
    auto_class: str
    columns: tuple[Column, Column, Column]
    answers: str
    protocol: str
    normal: Amounts
    quick: Amounts

    @abstractmethod
    def load(self, name: str) -> LanguageModel:
        """The floating-point model that ``name`` means, in float32 on the CPU; errors begin with ``--model``."""

    @abstractmethod
    def check_file(self, path: Path) -> None:
        """Make sure that ``path`` is a file of texts that the task reads.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: Its name is that of another kind of file.
        """

    @abstractmethod
    def read(self, path: Path, lm: LanguageModel, length: int, count: int | None) -> Texts:
        """The first ``count`` texts of ``--text``, each of ``length`` tokens (at most); None: all of them.

        Raises:
            ValueError: The file has fewer, or cannot be read; the model cannot take them.
        """

    @abstractmethod
    def split(self, path: Path, lm: LanguageModel, amounts: Amounts, purpose: str) -> tuple[Texts, Texts]:
        """The first texts of ``--calibration`` and those after them, which are held out.

        Args:
            path: The file.
            lm: The model that is to read them.
            amounts: How many texts, and of how many tokens.
            purpose: What the first ones are there for, as errors have it. Where the recipe needs none they are passed
                over, so that every recipe is measured on the same texts.

        Raises:
            ValueError: As read.
        """

    @abstractmethod
    def outputs(self, lm: LanguageModel) -> str:
        """What two models must share to be compared, in words."""

    @abstractmethod
    def logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Logits ``[predictions, answers]`` of one call with token ids ``[B, T]``."""

    @abstractmethod
    def scores(self, found: Tensor, targets: Tensor) -> float:
        """The sum over the predictions of what ``score`` averages.

        Args:
            found: Log-probabilities ``[predictions, answers]``.
            targets: The right answers ``[predictions]``.
        """

    def score(self, mean: float) -> float:
        """What Measured has, of the mean of ``scores``."""
        return mean

    def forward(self, model: nn.Module, batch: Tensor | Sequence[Tensor]) -> Tensor:
        """Logits ``[predictions, answers]`` of one call, or of several one after the other."""
        calls = [batch] if isinstance(batch, Tensor) else batch
        return torch.cat([self.logits(model, ids) for ids in calls])

    def log_probabilities(
        self,
        model: nn.Module,
        texts: Texts,
        device: torch.device,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Tensor]:
        """Float32 ``[predictions, answers]`` of each call; ``progress`` is told how many are done, of how many."""
        calls = texts.calls
        for place, ids in enumerate(calls):
            yield ptq.log_probabilities(model, ids.to(device), forward=self.forward)
            if progress is not None:
                progress(place + 1, len(calls))

    def compare(self, found: Iterable[Tensor], texts: Texts, reference: Iterable[Tensor] | None = None) -> Measured:
        """What a model's log-probabilities say.

        Args:
            found: Log-probabilities ``[predictions, answers]`` of each call.
            texts: What they are of.
            reference: Those of another model.
        """
        total, kl, same, count = 0.0, 0.0, 0.0, 0
        others = iter(reference) if reference is not None else None
        for targets, mine in zip(texts.targets, found, strict=True):
            total += self.scores(mine, targets.to(mine.device))
            count += len(mine)
            if others is not None:
                its_kl, its_same = ptq.divergence(next(others).to(mine.device), mine)
                kl, same = kl + len(mine) * its_kl, same + len(mine) * its_same
        compared = () if others is None else (kl / count, same / count)
        return Measured(self.score(total / count), *compared)

    def named(self, measured: Measured) -> dict[str, float | None]:
        """``measured`` as quantrain.json has it."""
        values = (measured.score, measured.kl, measured.agreement)
        return {column.key: value for column, value in zip(self.columns, values, strict=True)}

    def cells(self, measured: Measured) -> tuple[str, ...]:
        """``measured`` as the table has it."""
        values = self.named(measured)
        return tuple("" if values[c.key] is None else c.text(values[c.key]) for c in self.columns)


def check_ids(lm: LanguageModel, ids: Tensor, what: str = "MODEL") -> None:
    """Make sure that the model has embeddings for token ids of any shape.

    Raises:
        ValueError: It has not.
    """
    if (largest := int(ids.max())) >= lm.vocabulary:
        raise ValueError(
            f"{what}: expected a tokenizer whose ids are below the {lm.vocabulary} of the model's embedding, got "
            f"{largest}: it is another model's"
        )
