"""Weights packed in 4 bits, and LoRA: recipes nf4, nf4-dq, fp4, int4-g128, int4-g64-affine and qlora."""

from __future__ import annotations

from torch import nn

from ..four_bit import Embedding4bit, FourBitLayer, Linear4bit, LoraLinear
from ..heads import HEAD, output_layers
from ..layers import QuantEmbedding, QuantLinear, QuantTransposedLinear
from . import SchemeHandler, register

NEW_HEAD = f"{HEAD}, trained where LoRA is"


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
        for name, new in output_layers(model, order).items():
            if name in layers and not recipes[name].scheme.head:
                left[name] = NEW_HEAD if new else HEAD
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

    def prepared(self, model, layers, left_float, recipe):
        """Under LoRA nothing else is trained, but a head of one's own: a new classifier, not a language model's."""
        if not any(isinstance(layer, LoraLinear) for layer in layers.values()):
            return
        lora = {id(p) for layer in layers.values() if isinstance(layer, LoraLinear) for p in layer.parameters()}
        modules = dict(model.named_modules())
        heads = {id(p) for name, why in left_float.items() if why == NEW_HEAD for p in modules[name].parameters()}
        for parameter in model.parameters():
            if id(parameter) not in lora | heads:
                parameter.requires_grad_(False)

    def summary_cells(self, layer):
        scheme, name = layer.recipe.scheme, layer.format
        compressed = ", compressed scales" if layer.weight_scale_scale is not None else ""
        cells = {"weight": f"{name} blocks of {layer.block_size}{compressed}", "lora": None}
        if isinstance(layer, LoraLinear):
            cells["lora"] = f"r {scheme.lora_rank}, alpha {scheme.lora_alpha:g}, dropout {scheme.lora_dropout:g}"
        return cells

    def spec_text(self, recipe, text):
        scheme, weight = recipe.scheme, recipe.weight
        kind = weight.format if weight.format != "int" else "int4" if weight.symmetric else "uint4"
        parts = [f"{kind}, a scale per {weight.group_size} weights"]
        parts += ["compressed scales"] if scheme.compress_scale else []
        if scheme.lora_rank:
            parts.append(
                f"LoRA of rank {scheme.lora_rank}, alpha {scheme.lora_alpha:g}, dropout {scheme.lora_dropout:g}"
            )
        return ", ".join(parts)

    def edge_text(self, recipe):
        return "" if recipe.scheme.head else "the head stays float"

    def training_text(self, recipe):
        return "LoRA alone" if recipe.scheme.lora_rank else "none"

    def arithmetic_text(self, recipe):
        return "weights decoded inside the product, activations in floating point"


register(FourBit())
