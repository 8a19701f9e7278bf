"""Causal language models in the commands: windows of a text, perplexity.

The text is cut into windows of equal length, without a token for its beginning. A window is one call of the model, and
each of its tokens but the first is predicted from those before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from quantrain.finetune.lm.data import check_text_file, read_tokens
from quantrain.finetune.lm.models import LanguageModel, load_language_model
from quantrain.finetune.lm.task import perplexity
from quantrain.finetune.quantize.task import Amounts, Column, Texts, TextTask, check_ids


@dataclass(frozen=True)
class Windows(Texts):
    """Windows of a text.

    Attributes:
        ids: Token ids int64 ``[W, T]``.
    """

    ids: Tensor
    unit: ClassVar[str] = "windows"

    def __len__(self) -> int:
        return len(self.ids)

    def __str__(self) -> str:
        return f"{len(self)} windows x {self.length} tokens of {self.file}"

    @property
    def calls(self) -> list[Tensor]:
        return list(self.ids.split(1))

    @property
    def targets(self) -> list[Tensor]:
        return list(self.ids[:, 1:])

    @property
    def token_ids(self) -> Tensor:
        return self.ids.flatten()

    @property
    def length(self) -> int:
        return self.ids.shape[1]


class LanguageTask(TextTask):
    """The next token of a text."""

    def load(self, name: str) -> LanguageModel:
        return load_language_model(name)

    def check_file(self, path: Path) -> None:
        check_text_file(path)

    def read(self, path: Path, lm: LanguageModel, length: int, count: int | None) -> Windows:
        wanted = None if count is None else count * length
        ids = read_tokens(path, lm.tokenizer, wanted)
        if len(ids) < (wanted or length):
            raise ValueError(
                f"--text: expected at least {wanted or length} tokens, {count or 1} windows of {length}, got "
                f"{len(ids)} in {path}"
            )
        return self._windows(path, lm, ids[: len(ids) // length * length], length)

    def split(self, path: Path, lm: LanguageModel, amounts: Amounts, purpose: str) -> tuple[Windows, Windows]:
        samples, length, held_out = amounts
        wanted = (samples + held_out) * length
        ids = read_tokens(path, lm.tokenizer, wanted)
        if len(ids) < wanted:
            raise ValueError(
                f"--calibration: expected {wanted} tokens, {samples} windows of {length} {purpose} and {held_out} held "
                f"out, got {len(ids)} in {path}; --samples and --length take fewer"
            )
        windows = self._windows(path, lm, ids, length)
        return Windows(path.name, windows.ids[:samples]), Windows(path.name, windows.ids[samples:])

    def _windows(self, path: Path, lm: LanguageModel, ids: Tensor, length: int) -> Windows:
        """Windows that the model has embeddings and positions for."""
        if lm.context is not None and length > lm.context:
            raise ValueError(
                f"--length: expected at most the {lm.context} tokens that {lm.title} has positions for, got {length}"
            )
        check_ids(lm, ids)
        return Windows(path.name, ids.view(-1, length))

    def outputs(self, lm: LanguageModel) -> str:
        return f"{lm.vocabulary} ids"

    def logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)

    def scores(self, found: Tensor, targets: Tensor) -> float:
        return -float(found.gather(1, targets[:, None]).double().sum())

    def score(self, mean: float) -> float:
        return perplexity(mean)


def _perplexity_text(value: float) -> str:
    return f"{value:.3f}" if value < 1e5 else f"{value:.3g}"


LANGUAGE = LanguageTask(
    name="language model",
    what="a causal language model",
    auto_class="AutoModelForCausalLM",
    columns=(
        Column(
            "perplexity",
            "perplexity",
            "of the held-out tokens: e to the mean loss, lower is better",
            _perplexity_text,
        ),
        Column("kl", "KL", "mean over the predictions of KL(float || quantized), in nats", "{:.4f}".format),
        Column(
            "top1",
            "top-1",
            "share of predictions for which both models' most likely token is the same",
            "{:.4f}".format,
        ),
    ),
    answers="predictions",
    protocol="no BOS; the first token of a window is not predicted",
    normal=Amounts(samples=128, length=512, held_out=4),
    quick=Amounts(samples=8, length=128, held_out=2),
)
