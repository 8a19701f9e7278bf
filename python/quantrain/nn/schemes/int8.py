"""Integer matrix products of linear layers: recipes int8-training and int8-static."""

from __future__ import annotations

from ..int8_linear import Int8Layer, Int8Linear, Int8TransposedLinear
from ..layers import QuantLinear, QuantTransposedLinear
from ..quantized import QuantizedInt8Linear, QuantizedLinear
from . import SchemeHandler, register

_LAYERS = {QuantLinear: Int8Linear, QuantTransposedLinear: Int8TransposedLinear}


class Int8(SchemeHandler):
    kind = "int8"
    summary_columns = {"grad_input": "grad_input", "grad_weight": "grad_weight"}

    def layer_class(self, twin, recipe):
        return _LAYERS[twin] if recipe.scheme.training else twin

    def left_float(self, twin, recipe):
        return "" if twin in _LAYERS else f"recipe {recipe.name or '(unnamed)'} is for Linear layers"

    def takes_float64(self, recipe):
        return not recipe.scheme.training

    def check_layer(self, layer):
        name, recipe = type(layer).__name__, layer.recipe
        if isinstance(layer, Int8Layer):
            if not recipe.scheme.training:
                raise ValueError(f"{name}: expected a recipe with int8, got {recipe.name!r}")
        elif not isinstance(layer, (QuantLinear, QuantTransposedLinear)):
            raise ValueError(
                f"{name}: expected a recipe without integer products, which Linear layers have, got {recipe.name!r}"
            )
        elif recipe.scheme.training:
            raise ValueError(f"{name}: expected a recipe without int8 (Int8Linear trains with it), got {recipe.name!r}")

    def converted_class(self, layer, twin):
        return QuantizedInt8Linear if layer.recipe.scheme.integer_products else QuantizedLinear

    def summary_cells(self, layer):
        if not isinstance(layer, Int8Layer):
            return {}
        modes = {tensor: layer.int8_arguments[tensor] for tensor in ("grad_input", "grad_weight")}
        return {
            tensor: {"auto": "int8 or float (auto)", "none": None}.get(mode, mode) for tensor, mode in modes.items()
        }

    def gradient_text(self, recipe):
        if not recipe.scheme.training:
            return ""
        modes = f"grad_input {recipe.scheme.grad_input}; grad_weight {recipe.scheme.grad_weight}"
        return f"{modes} (int8 products, stochastic, rows: token)"

    def arithmetic_text(self, recipe):
        return super().arithmetic_text(recipe) if recipe.scheme.simulate else "int8 products"


register(Int8())
