"""Recipes in words, for reports: how many bits, how fine the scales, where the ranges come from."""

from __future__ import annotations

from collections.abc import Mapping

from quantrain import QuantSpec, Recipe
from quantrain.nn import handler_of

RECIPE_HEADER = (
    "recipe",
    "weights",
    "inputs of layers",
    "outputs of layers",
    "first and last layer",
    "gradients",
    "training",
    "arithmetic",
)
_FLOAT = "float32"
_SAME = "as the others"
_UNCHANGED = {"outputs of layers": _FLOAT, "first and last layer": _SAME, "gradients": _FLOAT}
_SCALES = {
    "per_tensor": "one scale",
    "per_channel": "a scale per output channel",
    "per_token": "a scale per row",
    "per_group": "a scale per {group_size} weights",
}
_RANGES = {
    "dynamic": "range of the present values",
    "min_max": "range of all values seen",
    "moving_average": "running mean of ranges",
    "percentile": "range of {percentile:g} % of the values seen",
    "mse": "range of least squared error",
}


def recipe_table(recipes: Mapping[str, Recipe]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of a table of ``recipes``; what every recipe leaves as it is has no column.

    Example:
        >>> header, rows = recipe_table({"mine": Recipe.from_name("qat-w4a4")})
        >>> dict(zip(header, rows[0]))["weights"]
        '4 bits, a scale per output channel, learned'
    """
    rows = [(name, *_cells(recipe)) for name, recipe in recipes.items()]
    kept = [
        place
        for place, header in enumerate(RECIPE_HEADER)
        if header not in _UNCHANGED or any(row[place] != _UNCHANGED[header] for row in rows)
    ]
    return tuple(RECIPE_HEADER[place] for place in kept), [tuple(row[place] for place in kept) for row in rows]


def recipe_line(recipe: Recipe) -> str:
    """The recipe in one line."""
    return "; ".join(f"{header}: {cell}" for header, cell in zip(RECIPE_HEADER[1:], _cells(recipe), strict=True))


def spec_text(spec: QuantSpec | None) -> str:
    """How one tensor is quantized."""
    if spec is None:
        return _FLOAT
    fields = {"group_size": spec.group_size, "percentile": spec.percentile}
    scales = _SCALES.get(spec.granularity, spec.granularity).format(**fields)
    ranges = "learned" if spec.learnable else _RANGES.get(spec.observer, spec.observer).format(**fields)
    return f"{spec.bits} bits, {scales}, {ranges}"


def _cells(recipe: Recipe) -> tuple[str, ...]:
    handler = handler_of(recipe)
    tensors = [
        spec_text(spec) if spec is None else handler.spec_text(recipe, spec_text(spec))
        for spec in (recipe.weight, recipe.input, recipe.output)
    ]
    return (
        *tensors,
        handler.edge_text(recipe) or _SAME,
        gradient_text(recipe) or _FLOAT,
        handler.training_text(recipe),
        handler.arithmetic_text(recipe),
    )


def gradient_text(recipe: Recipe) -> str:
    """How a recipe quantizes gradients, for the report; "" where it does not.

    Example:
        >>> gradient_text(Recipe.from_name("fqt-bhq5-paper"))
        'grad_input from 5 bits householder; grad_weight from 8 bits per_channel (all stochastic, rows: sample)'
    """
    return handler_of(recipe).gradient_text(recipe)
