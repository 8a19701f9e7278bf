"""What counts of a batch and of models' results: logits, rows, labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import floating_tensors

__all__ = [
    "CalledAs",
    "attention_mask_of",
    "fitted_mask",
    "is_causal",
    "is_encoder_decoder",
    "label_mask",
    "labels_of",
    "logits_of",
    "moved",
    "readable",
    "without_labels",
]

LABELS = ("labels", "label", "label_ids")
IGNORED = -100  # cross entropy's ignore_index, and so transformers' mark of a label that does not count


def logits_of(output: Any, whose: str, choose: Callable[[Any], Tensor] | None = None) -> Tensor:
    """``[.., V]``: what ``choose`` gives, ``.logits``, or the first floating-point tensor of two or more dimensions."""
    if choose is not None:
        found = choose(output)
    elif (found := getattr(output, "logits", None)) is None:
        if isinstance(output, Mapping) and "logits" in output:
            found = output["logits"]
        else:
            found = next((t for t in floating_tensors(output) if t.dim() > 1), None)
    if not isinstance(found, Tensor) or found.dim() < 2 or not found.is_floating_point():
        got = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(output).__name__
        raise TypeError(
            f"Distiller: expected logits [.., V] from the {whose}, got {got} (logits=... chooses; kl_weight=0 needs "
            "none)"
        )
    return found


def fitted_mask(
    mask: Tensor | None, rows: torch.Size, what: str, *, heads: bool = False, op: str = "Distiller"
) -> Tensor | None:
    """The mask for values ``[*rows, ..]``: as it is, or one element for several rows.

    A mask of more dimensions than there are rows, such as that of tokens beside a classifier's logits, says nothing
    of them: None.

    Args:
        heads: the second of ``rows`` counts heads, which a mask of tokens ``[B, T]`` does not have.
    """
    if mask is None or mask.shape == rows:
        return mask
    if heads and len(rows) == 3 and mask.dim() == 2 and mask.shape == (rows[0], rows[2]):
        return mask[:, None].expand(rows)
    shared = min(mask.dim(), len(rows))
    if mask.shape[:shared] != rows[:shared] or (heads and mask.dim() == 2):
        raise ValueError(f"{op}: expected a mask of the shape of {what}, {list(rows)}, got {list(mask.shape)}")
    if mask.dim() > len(rows):
        return None
    return mask.reshape(*mask.shape, *(1,) * (len(rows) - mask.dim())).expand(rows)


def label_mask(labels: Any, rows: torch.Size, causal: bool) -> Tensor | None:
    """Which of the rows of logits have a label: those whose label, of a causal model that of the next place, is not
    -100.

    None where there are no labels of the rows, such as a class per sentence beside logits per token.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != rows:
        return None
    counts = labels.ne(IGNORED)
    if not causal or labels.dim() < 2:
        return counts
    return torch.cat([counts[..., 1:], torch.zeros_like(counts[..., :1])], -1)


def is_causal(model: nn.Module) -> bool:
    """Whether its class's name says that logits are of the next place's label."""
    return any(part in type(model).__name__ for part in ("CausalLM", "LMHeadModel", "DoubleHeads"))


def is_encoder_decoder(model: nn.Module | None) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def without_labels(batch: Any, model: nn.Module | None) -> Any:
    """A mapping without its labels, from which a model would compute a loss; encoder-decoders need them as inputs."""
    if not isinstance(batch, Mapping) or is_encoder_decoder(model):
        return batch
    return {key: value for key, value in batch.items() if key not in LABELS}


def attention_mask_of(batch: Any) -> Tensor | None:
    """That of tokens ``[B, T]``; one of queries and keys says nothing of rows."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def labels_of(batch: Any) -> Any:
    if not isinstance(batch, Mapping):
        return None
    return next((batch[key] for key in LABELS if batch.get(key) is not None), None)


def moved(batch: Any, model: nn.Module) -> Any:
    """The batch on the model's device; where all its parameters are of one floating type, in that type."""
    held = [*model.parameters(), *model.buffers()]
    if not held:
        return batch
    types = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}
    return _moved(batch, held[0].device, types.pop() if len(types) == 1 else None)


def _moved(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None, non_blocking=device.type != "cpu")
    if isinstance(value, Mapping):
        return {key: _moved(inner, device, dtype) for key, inner in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_moved(inner, device, dtype) for inner in value)
    return value


def readable(tensor: Tensor, device: torch.device) -> Tensor:
    """A teacher's tensor as a loss may keep it: detached, on the student's device, of at most 32 bits, not of inference
    mode."""
    tensor = tensor.detach().to(device, non_blocking=device.type != "cpu")  # to the CPU it would be read too early
    tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


class CalledAs:
    """Calls ``model``, with the ``forward`` of the module within for whoever asks which arguments it takes."""

    def __init__(self, model: nn.Module, inner: nn.Module):
        self.model, self.forward = model, inner.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)
