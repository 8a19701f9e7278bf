"""The recipe int8-training with the three products of a layer as chosen."""

from __future__ import annotations

from quantrain import Int8Spec, Recipe


def int8_recipe(choice: str) -> Recipe:
    """``int8-training`` with ``choice`` for output, grad_input and grad_weight: "auto", the recipe's own, "int8" or "none"."""
    recipe = Recipe.from_name("int8-training")
    recipe.scheme = Int8Spec(output=choice, grad_input=choice, grad_weight=choice)
    return recipe
