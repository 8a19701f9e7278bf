"""The recipes of a job: named ones and JSON files, with the settings that the command line changes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from quantrain import Recipe
from quantrain import nn as qnn
from quantrain.finetune.folder import BASELINE, check_name


def resolve_recipes(words: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, Recipe]:
    """The recipes that ``words`` mean, by the names that their stages have, in order.

    Args:
        words: Each the name of a recipe, or a JSON file with what ``Recipe.to_json`` gives; the file's stage has the
            name of the file.
        overrides: Settings that every recipe gets, such as ``"weight.bits=4"`` or ``"input=null"``; the stages then end
            in ``-custom``.

    Raises:
        ValueError: An unknown name, a file that holds no recipe, a setting outside its rule, two recipes of one name;
            all are listed.

    Example:
        >>> resolve_recipes(["qat-w8a8"], ["weight.bits=6"])["qat-w8a8-custom"].weight.bits
        6
    """
    changes = parse_overrides(overrides)
    recipes: dict[str, Recipe] = {}
    faults = []
    for word in words:
        try:
            name, recipe = _read(word) if names_file(word) else (word, Recipe.from_name(word))
            if changes:
                name, recipe = f"{name}-custom", _changed(word, recipe, changes, overrides)
            if name in (*recipes, BASELINE):
                raise ValueError(
                    f"--recipes: expected names that differ, also from {BASELINE!r}, got a second {name!r}"
                )
            recipe.name = name
            recipes[check_name(name, "--recipes")] = recipe
        except (ValueError, OSError) as error:
            faults.append(str(error))
    raise_all(faults)
    return recipes


def pruned(recipe: Recipe, sparsity: float, schedule: str) -> Recipe:
    """The recipe with that share of the weights dropped, by ``"cubic"`` or ``"one-shot"``; else its own settings.

    Raises:
        ValueError: A recipe that does not train, or that cannot be pruned so.

    Example:
        >>> pruned(Recipe.from_name("qat-w8a8"), 0.5, "cubic").prune.sparsity
        0.5
    """
    kept = qnn.changed_recipe(recipe, {"prune": {"sparsity": sparsity, "schedule": schedule.replace("-", "_")}})
    kept.name = recipe.name
    return kept


def raise_all(faults: Sequence[str]) -> None:
    """Raise one ValueError that says all ``faults``, where there are any."""
    if len(faults) > 1:
        raise ValueError(f"{len(faults)} faults, nothing was started\n  " + "\n  ".join(faults))
    if faults:
        raise ValueError(faults[0])


def parse_overrides(overrides: Sequence[str]) -> dict[str, object]:
    """``key=value`` texts as the mapping that ``changed_recipe`` takes; a value is JSON, or else text.

    Raises:
        ValueError: A text is not of that form, or changes the name.

    Example:
        >>> parse_overrides(["weight.bits=4", "weight.observer=mse", "input=null", "scheme.grad_input.bits=4"])
        {'weight': {'bits': 4, 'observer': 'mse'}, 'input': None, 'scheme': {'grad_input': {'bits': 4}}}
    """
    changes: dict[str, object] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        parts = key.split(".")
        if not equals or not all(parts) or parts == ["name"]:
            raise ValueError(f"--override: expected key=value such as weight.bits=4 or input=null, got {text!r}")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        inner = changes
        for part in parts[:-1]:
            if not isinstance(inner.get(part), dict):
                inner[part] = {}
            inner = inner[part]
        inner[parts[-1]] = parsed
    return changes


def names_file(word: str) -> bool:
    """Whether ``word`` is the path of a recipe's JSON file, and not a recipe's name."""
    return word.endswith(".json") or "/" in word or "\\" in word


def _read(word: str) -> tuple[str, Recipe]:
    path = Path(word)
    try:
        return path.stem, Recipe.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: expected a file with a recipe's JSON, got none") from error
    except ValueError as error:
        raise ValueError(f"{path}: expected what Recipe.to_json gives, got {error}") from error


def _changed(word: str, recipe: Recipe, changes: dict[str, object], overrides: Sequence[str]) -> Recipe:
    try:
        return qnn.changed_recipe(recipe, changes)
    except TypeError as error:
        raise ValueError(f"--override: expected values of the settings' types, got {' '.join(overrides)}") from error
    except ValueError as error:
        raise ValueError(
            f"--override: expected settings that {word} can have, got {' '.join(overrides)} ({error})"
        ) from error
