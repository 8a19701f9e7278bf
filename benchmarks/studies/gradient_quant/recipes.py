"""How the study prepares a model: a recipe by name, with the authors' ranges for activations where asked."""

from __future__ import annotations

from torch import nn

import quantrain
import quantrain.nn as qnn

FLOAT = "float"  # the model as it is, without a recipe
QUANTIZERS = {"per_tensor": "ptq", "per_sample": "psq", "per_sample, zero kept": "psq", "householder": "bhq"}


def recipe_of(quantizer: str, bits: int, *, paper: bool = False) -> quantrain.Recipe:
    """The fqt recipe of a key of ``QUANTIZERS``."""
    recipe = quantrain.Recipe.from_name(f"fqt-{QUANTIZERS[quantizer]}{bits}{'-paper' if paper else ''}")
    if quantizer.endswith("zero kept"):
        recipe.scheme.grad_input.preserve_zero = True
    return recipe


def with_dynamic_inputs(recipe: quantrain.Recipe) -> quantrain.Recipe:
    """``recipe`` with each activation's range taken from the batch itself, as the authors ran it.

    A network trained from fresh weights outgrows ranges that were calibrated before.
    """
    spec = recipe.input
    spec.observer = "dynamic"
    recipe.input = spec
    return recipe


def prepared(task, model: nn.Module, recipe: quantrain.Recipe | str, *, dynamic: bool = True) -> nn.Module:
    """``model`` under ``recipe`` (a name or a Recipe; "float" leaves it alone), in training mode.

    Without ``dynamic`` the ranges of the activations are calibrated on two batches and fixed.
    """
    if recipe == FLOAT:
        return model.train()
    recipe = quantrain.Recipe.from_name(recipe) if isinstance(recipe, str) else recipe
    if dynamic:
        recipe = with_dynamic_inputs(recipe)
    model = qnn.prepare(model, recipe, skip=task.skip).train()
    if not dynamic:
        batches = [task.batch(index, augment=False)[0] for index in task.indices(99, 2)]
        qnn.calibrate(model, batches)
        qnn.enable_observer(model, False)
        model.train()
    return model
