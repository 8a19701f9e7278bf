"""Post-training quantization of linear layers and of the cache of keys and values: recipes zeroquant-*, llm-int8*,
smoothquant-*, gptq-*, awq-*, kv-int8."""

from __future__ import annotations

import re

from quantrain._C import PtqSpec

from ..heads import HEAD, output_layers
from ..layers import QuantLinear, QuantTransposedLinear
from ..ptq import PtqLinear, PtqTransposedLinear, QuantizedPtqLinear, _PtqLayer
from ..recipes import changed_recipe
from . import SchemeHandler, register

_LAYERS = {QuantLinear: PtqLinear, QuantTransposedLinear: PtqTransposedLinear}
# A part of the path that names attention: self_attn, attention, attn, SelfAttention.
_ATTENTION = re.compile(r"(^|[._])(\w*attn\w*|\w*attention\w*)([._]|$)", re.IGNORECASE)


def _holds_int8(recipe):
    return isinstance(recipe.scheme, PtqSpec) and recipe.scheme.kv_cache == "int8"


class Ptq(SchemeHandler):
    kind = "ptq"

    def layer_class(self, twin, recipe):
        return _LAYERS[twin]

    def left_float(self, twin, recipe):
        if recipe.weight is None:
            return f"recipe {recipe.name or '(unnamed)'} is for the cache alone"
        return "" if twin in _LAYERS else f"recipe {recipe.name or '(unnamed)'} is for Linear layers"

    def layer_recipe(self, name, recipe):
        bits = recipe.scheme.attention_bits
        if not bits or not _ATTENTION.search(name):
            return recipe
        return changed_recipe(recipe, {"weight": {"bits": bits, "granularity": "per_channel"}})

    def left_layers(self, model, layers, recipes, order):
        return {name: HEAD for name in output_layers(model, order) if name in layers and not recipes[name].scheme.head}

    def leaves_layers(self, recipe):
        return recipe.weight is None

    def check_model(self, model, recipe):
        if _holds_int8(recipe):
            from ..kv_cache import check_int8_cache  # needs transformers

            check_int8_cache(model)

    def prepared(self, model, layers, left_float, recipe):
        if any(map(_holds_int8, [recipe, *(layer.recipe for layer in layers.values())])):
            from ..kv_cache import use_int8_cache

            use_int8_cache(model)

    def takes_float64(self, recipe):
        return False

    def check_layer(self, layer):
        if not isinstance(layer, _PtqLayer):
            raise ValueError(
                f"{type(layer).__name__}: expected a recipe of another scheme than ptq, which PtqLinear runs, got "
                f"{layer.recipe.name!r}"
            )

    def converted_class(self, layer, twin):
        return QuantizedPtqLinear

    def spec_text(self, recipe, text):
        scheme = recipe.scheme
        parts = [text]
        parts += [f"smoothed (alpha {scheme.smooth_alpha:g})"] if scheme.smooth_alpha else []
        parts += ["AWQ"] if scheme.scale_search == "awq" else []
        parts += ["GPTQ"] if scheme.rounding == "gptq" else []
        if scheme.outlier_columns:
            chosen = f"above {scheme.outlier_threshold:g}" if scheme.outlier_threshold else "largest"
            parts.append(f"{scheme.outlier_columns} {chosen} columns apart")
        return ", ".join(parts)

    def edge_text(self, recipe):
        return "" if recipe.scheme.head else "the head stays float"

    def training_text(self, recipe):
        steps = recipe.scheme.distill_steps
        return f"blocks distilled one by one, {steps} batches" if steps else "none"

    def arithmetic_text(self, recipe):
        if recipe.weight is None:
            return "floating point, keys and values held in int8"
        if recipe.input is None:
            return "weights decoded inside the product, activations in floating point"
        return "int8 products"


register(Ptq())
