"""Gradients computed from a quantized gradient of the output (StatQuant): recipes fqt-*."""

from __future__ import annotations

from functools import partial

from quantrain._C import GradientQuantSpec, Recipe
from quantrain.fqt import fqt_conv2d, fqt_linear

from ..convolutions import QuantConvTranspose2d
from . import SchemeHandler, register

_TENSORS = ("grad_input", "grad_weight")


class GradientQuant(SchemeHandler):
    kind = "gradient_quant"
    summary_columns = dict(zip(_TENSORS, _TENSORS, strict=True))

    def no_twin(self, twin, recipe):
        return "gradients of ConvTranspose2d are not quantized" if issubclass(twin, QuantConvTranspose2d) else ""

    def takes_float64(self, recipe):
        return False

    def check_layer(self, layer):
        if isinstance(layer, QuantConvTranspose2d):
            raise ValueError(
                f"{type(layer).__name__}: expected a recipe without grad_input and grad_weight, got {layer.recipe.name!r}"
            )

    def linear(self, recipe):
        return partial(fqt_linear, **gradient_arguments(recipe, convolution=False))

    def conv2d(self, recipe):
        return partial(fqt_conv2d, **gradient_arguments(recipe, convolution=True))

    def summary_cells(self, layer):
        arguments = {} if layer.product is None else layer.product.keywords
        return {tensor: _cell(arguments, tensor) for tensor in _TENSORS}

    def gradient_specs(self, recipe):
        spec = recipe.scheme.grad_input
        if spec is None:
            return []
        return [spec.resolved("grad_input", convolution=False) if spec.quantizer == "auto" else spec]

    def gradient_text(self, recipe: Recipe) -> str:
        parts, rows = [], []
        for tensor in _TENSORS:
            spec = getattr(recipe.scheme, tensor)
            if spec is None:
                continue
            kinds = [spec.resolved(tensor, convolution=convolution) for convolution in (False, True)]
            names = list(dict.fromkeys(kind.quantizer for kind in kinds))
            quantizers = names[0] if len(names) == 1 else f"{names[0]} (linear), {names[1]} (convolution)"
            parts.append(f"{tensor} from {spec.bits} bits {quantizers}")
            rows += ["token (linear), sample (convolution)" if spec.rows == "auto" else spec.rows]
        return f"{'; '.join(parts)} (all stochastic, rows: {'; '.join(dict.fromkeys(rows))})"


def gradient_arguments(recipe: Recipe, *, convolution: bool) -> dict[str, str | int | bool] | None:
    """How the recipe quantizes gradients, as keyword arguments of ``fqt_conv2d`` or ``fqt_linear``; None: it does not.

    >>> gradient_arguments(Recipe.from_name("fqt-bhq5"), convolution=False)["grad_input"]
    'householder'
    """
    arguments: dict[str, str | int | bool] = {}
    for tensor in _TENSORS:
        spec = getattr(recipe.scheme, tensor, None) if isinstance(recipe.scheme, GradientQuantSpec) else None
        if spec is not None:
            spec = spec.resolved(tensor, convolution=convolution)
            arguments[tensor] = spec.quantizer
            for field in ("bits", "rows", "preserve_zero", "max_group"):
                arguments[f"{tensor}_{field}"] = getattr(spec, field)
    return arguments or None


def _cell(arguments: dict[str, str | int | bool], tensor: str) -> str | None:
    if tensor not in arguments:
        return None
    rows = "" if arguments[tensor] == "per_tensor" else f" ({arguments[f'{tensor}_rows']})"
    zero = ", zero kept" if arguments[f"{tensor}_preserve_zero"] else ""
    return f"{arguments[f'{tensor}_bits']} bits {arguments[tensor]}{rows}{zero}"


register(GradientQuant())
