"""How a language model does on a text, and how far it is from another one.

The text is cut into windows of equal length, without a token for its beginning. A window is one call of the model, and
each of its tokens but the first is predicted from those before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantrain import ptq
from quantrain.finetune.lm.task import perplexity


@dataclass(frozen=True)
class Windows:
    """Windows of a text.

    Attributes:
        file: The name of the text's file.
        ids: Token ids int64 ``[W, T]``.
    """

    file: str
    ids: Tensor

    @property
    def sha256(self) -> str:
        """Of the token ids as little-endian int32."""
        return hashlib.sha256(self.ids.cpu().numpy().astype("<i4").tobytes()).hexdigest()

    def __str__(self) -> str:
        return f"{self.ids.shape[0]} windows x {self.ids.shape[1]} tokens of {self.file}"

    def protocol(self) -> dict[str, Any]:
        """What says which tokens these are, as JSON has it."""
        windows, length = self.ids.shape
        return {
            "file": self.file,
            "windows": windows,
            "length": length,
            "tokens": windows * length,
            "sha256": self.sha256,
        }


PROTOCOL = "no BOS; the first token of a window is not predicted"


@dataclass(frozen=True)
class Measured:
    """What a model does on windows of a text.

    Attributes:
        perplexity: e to the mean cross-entropy of the predicted tokens.
        kl: Mean over the predictions of KL(other || this) in nats; None where it was not compared with another model.
        top1: Share of predictions for which both models' most likely token is the same; None as ``kl``.
    """

    perplexity: float
    kl: float | None = None
    top1: float | None = None


def predictions(model: nn.Module, batch: Tensor) -> Tensor:
    """Logits ``[B, T - 1, V]`` of the tokens after each window's first.

    A window is a call of its own: what an int8 layer does with a row may depend on the other rows of the call.

    Args:
        model: Of transformers, with a language-model head.
        batch: Token ids int64 ``[B, T]``.
    """
    return torch.cat([model(input_ids=row[None], use_cache=False).logits[:, :-1] for row in batch])


def log_probabilities(
    model: nn.Module, ids: Tensor, progress: Callable[[int, int], None] | None = None
) -> Iterator[Tensor]:
    """Float32 ``[T - 1, V]`` of each of the windows ``ids`` ``[W, T]``; ``progress`` is told how many are done, of how
    many."""
    for place, row in enumerate(ids):
        yield ptq.log_probabilities(model, row[None], forward=predictions)
        if progress is not None:
            progress(place + 1, len(ids))


def compare(found: Iterable[Tensor], ids: Tensor, reference: Iterable[Tensor] | None = None) -> Measured:
    """What a model's log-probabilities say.

    Args:
        found: Log-probabilities ``[T - 1, V]`` of each window.
        ids: The windows, int64 ``[W, T]``.
        reference: Those of another model.
    """
    loss, kl, same, count = 0.0, 0.0, 0.0, 0
    others = iter(reference) if reference is not None else None
    for row, mine in zip(ids, found, strict=True):
        loss -= float(mine.gather(1, row[1:, None].to(mine.device)).double().sum())
        count += len(mine)
        if others is not None:
            its_kl, its_same = ptq.divergence(next(others).to(mine.device), mine)
            kl, same = kl + len(mine) * its_kl, same + len(mine) * its_same
    if others is None:
        return Measured(perplexity(loss / count))
    return Measured(perplexity(loss / count), kl / count, same / count)


@contextmanager
def input_maxima(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within it, the largest absolute values of the inputs of the model's linear layers are noted: name -> float32
    ``[K]``; of the head, which is no layer of a block, nothing."""
    maxima: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Linear) -> RemovableHandle:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest = inputs[0].detach().abs().flatten(0, -2).amax(0).float()
            maxima[name] = torch.maximum(maxima[name], largest) if name in maxima else largest

        return layer.register_forward_pre_hook(note)

    handles = [watch(name, layer) for name, layer in linear_layers(model).items()]
    try:
        yield maxima
    finally:
        for handle in handles:
            handle.remove()


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of a model of transformers by name, but for its head."""
    head = model.get_output_embeddings()
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head}
