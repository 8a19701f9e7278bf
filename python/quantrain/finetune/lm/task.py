"""What a step and an evaluation of a causal language model compute: the mean cross-entropy of the next token."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantrain.finetune.data import Batch
from quantrain.finetune.lm.data import IGNORED
from quantrain.finetune.trainer import StopRequest, Task, to_device

EVAL_TOKENS = 2048  # of a batch of an evaluation: the logits of 49,152 token ids then take 0.4 GB
_TRIAL_ROWS, _TRIAL_TOKENS = 2, 64


class CausalLM(Task):
    """The task of a model of transformers that returns logits ``[B, T, vocabulary]`` for ids ``[B, T]``.

    Args:
        precision: ``"float32"``, or ``"bf16"``: evaluations are under autocast too.
        length: Tokens of a whole sequence, which sets how many an evaluation takes at once.
    """

    def __init__(self, precision: str, length: int) -> None:
        self.precision, self.length = precision, length

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of every token but the last, for the one after it."""
        (ids,), _ = batch
        return model(input_ids=ids, use_cache=False).logits[:, :-1]

    def loss_of(self, logits: Tensor, batch: Batch) -> Tensor:
        """The mean over the tokens that are learned, each predicted from those before it."""
        return self._cross_entropy(logits, batch, "mean")

    def counted(self, batch: Batch) -> Tensor:
        return batch[1][:, 1:] != IGNORED

    def _cross_entropy(self, logits: Tensor, batch: Batch, reduction: str) -> Tensor:
        targets = batch[1][:, 1:].flatten()
        return functional.cross_entropy(
            logits.flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction=reduction
        )

    def terms(self, batch: Batch) -> int:
        return int((batch[1][:, 1:] != IGNORED).sum())

    def tokens(self, batch: Batch) -> int:
        return batch[1].numel()

    def trial(self, batch: Batch) -> Batch:
        (ids,), labels = batch
        ids, labels = ids[:_TRIAL_ROWS], labels[:_TRIAL_ROWS]
        first = int((labels[:, 1:] != IGNORED).any(0).nonzero()[0])  # what is learned of a chat may come late
        last = max(_TRIAL_TOKENS, first + 2)
        return (ids[:, :last],), labels[:, :last]

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, data, device: torch.device, stop: StopRequest | None = None) -> dict:
        """Perplexity, e to the mean loss, of the held-out tokens, and that loss, in eval mode."""
        model.eval()
        loss, terms = 0.0, 0
        bf16 = self.precision == "bf16"
        for batch in data.test_batches(max(1, EVAL_TOKENS // self.length)):
            batch = to_device(batch, device)
            with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
                loss += float(self._cross_entropy(self.logits(model, batch), batch, "sum"))
            terms += self.terms(batch)
            if stop is not None:
                stop.check()
        loss /= terms
        return {"perplexity": perplexity(loss), "loss": loss}


def perplexity(loss: float) -> float:
    """e to the loss in nats; infinite where a float does not hold it.

    Example:
        >>> round(perplexity(2.0), 3), perplexity(1e4)
        (7.389, inf)
    """
    return math.exp(loss) if loss < 700 else math.inf if loss > 0 else math.nan
