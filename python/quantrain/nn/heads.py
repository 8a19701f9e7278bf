"""Which layers give a model's output, and so stay as they are under recipes for the blocks alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .layers import QuantLayer
from .quantized import QuantizedLayer

__all__ = ["HEAD", "output_layers"]

HEAD = "gives the model's output"  # why a layer stays float


def _named_heads(model: nn.Module) -> set[int]:
    """The layers that the transformers models in ``model``, itself or wrapped, name as their heads."""
    found = set()
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        try:
            layer = get() if callable(get) else None
        except (NotImplementedError, AttributeError):  # of models without one, some raise
            layer = None
        if isinstance(layer, nn.Module):
            found.add(id(layer))
    return found


def output_layers(model: nn.Module, order: Sequence[str]) -> dict[str, bool]:
    """Layers that give the model's output -> whether they are new, and so trained with LoRA.

    What the model says or ties to an embedding; of another transformers model what stands beside the backbone; of any
    other the last of its linear layers, whatever becomes of that. Where layers are quantized already, and so no longer in
    ``order``, the last is that of registration.
    """
    modules = dict(model.named_modules())
    linear = [name for name in order if name in modules]
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    tied, outputs = {id(table.weight) for table in tables}, _named_heads(model)
    heads = {
        name: False
        for name in linear
        if id(modules[name]) in outputs or id(getattr(modules[name], "weight", None)) in tied
    }
    if heads:
        return heads
    backbones = [m.base_model for m in model.modules() if hasattr(m, "base_model_prefix") and hasattr(m, "base_model")]
    if backbones:
        inside = {id(m) for backbone in backbones for m in backbone.modules()}
        return {name: True for name in linear if id(modules[name]) not in inside}
    if done := [name for name, m in modules.items() if isinstance(m, (QuantLayer, QuantizedLayer))]:
        if next(name for name in reversed(modules) if name in done or name in linear) in done:
            return {}
        linear = [*done, *(name for name in modules if name in linear)]
    if len(linear) < 2:
        return {}
    vocabularies = {table.num_embeddings for table in tables}  # a language model's own head
    return {linear[-1]: getattr(modules[linear[-1]], "out_features", None) not in vocabularies}
