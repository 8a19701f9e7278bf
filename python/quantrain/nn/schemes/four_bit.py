"""Weights packed in 4 bits, and LoRA: recipes nf4, nf4-dq, fp4, int4-g128, int4-g64-affine and qlora."""

from __future__ import annotations

from torch import nn

from ..four_bit import Embedding4bit, FourBitLayer, Linear4bit, LoraLinear
from ..layers import QuantEmbedding, QuantLinear, QuantTransposedLinear
from . import SchemeHandler, register

HEAD = "gives the model's output"  # why a layer stays float; FourBitSpec.head packs it


class FourBit(SchemeHandler):
    kind = "four_bit"
    packs = True
    summary_columns = {"lora": "LoRA"}

    def layer_class(self, twin, recipe):
        if twin is QuantEmbedding:
            return Embedding4bit
        return LoraLinear if recipe.scheme.lora_rank > 0 else Linear4bit

    def left_float(self, twin, recipe):
        if twin in (QuantLinear, QuantTransposedLinear) or (twin is QuantEmbedding and recipe.scheme.embedding):
            return ""
        return "embedding" if twin is QuantEmbedding else "4-bit weights are for Linear and Embedding layers"

    def left_layers(self, model, layers, recipes, order):
        left = {}
        for name, layer in layers.items():
            if isinstance(layer, nn.Embedding):
                if layer.embedding_dim % recipes[name].weight.group_size:
                    left[name] = f"its rows are no whole blocks of {recipes[name].weight.group_size}"
                elif layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
                    left[name] = "max_norm, scale_grad_by_freq or sparse"
        linear = [name for name in order if name in layers and not isinstance(layers[name], nn.Embedding)]
        for name in _heads(model, layers, linear):
            if not recipes[name].scheme.head:
                left[name] = HEAD
        return left

    def takes_float64(self, recipe):
        return False

    def check_layer(self, layer):
        if not isinstance(layer, FourBitLayer):
            raise ValueError(
                f"{type(layer).__name__}: expected a recipe without packed weights of 4 bits, which Linear4bit and "
                f"Embedding4bit have, got {layer.recipe.name!r}"
            )
        if isinstance(layer, LoraLinear) and layer.recipe.scheme.lora_rank < 1:
            raise ValueError(f"LoraLinear: expected a recipe with lora_rank of at least 1, got {layer.recipe.name!r}")

    def prepared(self, model, layers, left_float):
        """Under LoRA nothing else is trained, but a head of one's own: a new classifier, not a language model's."""
        if not any(isinstance(layer, LoraLinear) for layer in layers.values()):
            return
        lora = {id(p) for layer in layers.values() if isinstance(layer, LoraLinear) for p in layer.parameters()}
        output = _output_layer(model)
        modules = dict(model.named_modules())
        heads = {
            id(p)
            for name, reason in left_float.items()
            if reason == HEAD and modules[name] is not output
            for p in modules[name].parameters()
        }
        for parameter in model.parameters():
            if id(parameter) not in lora:
                parameter.requires_grad_(id(parameter) in heads)

    def summary_cells(self, layer):
        scheme, name = layer.recipe.scheme, layer.format
        compressed = ", compressed scales" if layer.weight_scale_scale is not None else ""
        cells = {"weight": f"{name} blocks of {layer.block_size}{compressed}", "lora": None}
        if isinstance(layer, LoraLinear):
            cells["lora"] = f"r {scheme.lora_rank}, alpha {scheme.lora_alpha:g}, dropout {scheme.lora_dropout:g}"
        return cells

    def arithmetic_text(self, recipe):
        return "weights decoded inside the product, activations in floating point"


def _output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that a transformers model names as its head."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        return get() if callable(get) else None
    except NotImplementedError:  # of models without one, some raise
        return None


def _heads(model: nn.Module, layers: dict[str, nn.Module], linear: list[str]) -> list[str]:
    """Layers that give the model's output: what the model says, and what is tied to an embedding; else the last one."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = _output_layer(model)
    heads = [name for name in linear if layers[name] is output or id(layers[name].weight) in tables]
    if heads or output is not None:
        return heads
    return linear[-1:] if len(linear) > 1 else []


register(FourBit())
