"""What a Recipe means for a layer: names, changed copies, and the arguments of its operators.

:class:`quantrain.Recipe`, :class:`quantrain.QuantSpec` and the schemes are C++ structs; here is how the Python layers
read them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from quantrain._C import PruneSpec, QuantSpec, Recipe, Scheme

__all__ = ["as_recipe", "changed_recipe", "rounds_nothing", "weight_scale_shape"]

_TENSORS = ("weight", "input", "output")
# Fields of recipes from before there were schemes, and what says it today.
_BEFORE = {
    "grad_input": '{"kind": "gradient_quant", "grad_input": ...}',
    "grad_weight": '{"kind": "gradient_quant", "grad_weight": ...}',
    "int8": '{"kind": "int8", ...}',
    "fixed_point": '{"kind": "fixed_point", ...}',
    "backend": '{"kind": "int8", "simulate": true or false}',
}


def as_recipe(recipe: Recipe | str) -> Recipe:
    """The recipe itself, or the one of that name; validated.

    Raises:
        ValueError: an unknown name (the message lists the names), or a field outside its rule.
        TypeError: neither a Recipe nor a str.

    >>> as_recipe("qat-w8a8").weight.granularity
    'per_channel'
    """
    if isinstance(recipe, str):
        return Recipe.from_name(recipe)
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: expected a Recipe or the name of one, got {type(recipe).__name__}")
    recipe.validate()
    return recipe


def rounds_nothing(recipe: Recipe) -> bool:
    """Whether the recipe prunes and no more.

    >>> rounds_nothing(as_recipe("prune-magnitude")), rounds_nothing(as_recipe("qat-w8a8"))
    (True, False)
    """
    return recipe.prune is not None and not (recipe.weight or recipe.input or recipe.output or recipe.scheme)


def changed_recipe(base: Recipe | str, change: Recipe | str | Mapping) -> Recipe:
    """A copy of ``base`` with ``change`` applied; ``base`` stays as it is.

    Args:
        base: a Recipe or the name of one.
        change: a Recipe or a name replaces everything; a mapping changes single fields. The values of ``weight``,
            ``input`` and ``output`` (QuantSpec), of ``prune`` (PruneSpec) and of ``scheme`` are a spec, None (leave that tensor in floating
            point; no scheme), or a mapping of its fields, applied to the base's or, where it has none, to the default
            one. A mapping for ``scheme`` names the ``kind`` where the base has no scheme or one of another kind.

    Raises:
        ValueError: a field that does not exist, or a value outside its rule.

    >>> changed_recipe(as_recipe("qat-w4a4"), {"weight": {"bits": 8}, "input": None}).weight.bits
    8
    >>> changed_recipe(as_recipe("fqt-8"), {"scheme": {"grad_input": {"bits": 5}}}).scheme.grad_input.bits
    5
    """
    if not isinstance(change, Mapping):
        return as_recipe(change)
    result = Recipe.from_json(as_recipe(base).to_json())
    for field, value in change.items():
        if not hasattr(result, field) or callable(getattr(result, field)):
            hint = f' (which is now in "scheme": {_BEFORE[field]})' if field in _BEFORE else ""
            raise ValueError(
                f"recipe: expected a field of Recipe (weight, input, output, training, edge_bits, scheme, prune, name), got {field!r}{hint}"
            )
        if isinstance(value, Mapping):
            if field in _TENSORS:
                value = _changed_spec(getattr(result, field) or QuantSpec(), value)
            elif field == "scheme":
                value = _changed_scheme(result.scheme, value)
            elif field == "prune":
                value = _changed_spec(result.prune or PruneSpec(), value)
        setattr(result, field, value)
    result.validate()
    return result


def _changed_spec(spec: QuantSpec | PruneSpec, change: Mapping) -> QuantSpec | PruneSpec:
    for field, value in change.items():
        if field not in json.loads(spec.to_json()):
            known = "bits, granularity, ..." if isinstance(spec, QuantSpec) else "sparsity, pattern, ..."
            raise ValueError(f"recipe: expected a field of {type(spec).__name__} ({known}), got {field!r}")
        setattr(spec, field, value)
    return spec


def _changed_scheme(scheme: Scheme | None, change: Mapping) -> Scheme:
    change = dict(change)
    kind = change.pop("kind", None if scheme is None else scheme.kind)
    if kind is None:
        raise ValueError(f"recipe: expected the kind of a scheme ({', '.join(Scheme.kinds())}), got none")
    if scheme is None or scheme.kind != kind:
        return Scheme.make(kind, **{field: _plain(value) for field, value in change.items()})
    fields = json.loads(scheme.to_json())
    for field, value in change.items():
        if field not in fields:
            raise ValueError(
                f"recipe: expected a field of {type(scheme).__name__} ({', '.join(fields)}), got {field!r}"
            )
        nested = isinstance(value, Mapping) and isinstance(fields[field], Mapping)
        fields[field] = {**fields[field], **_plain(value)} if nested else _plain(value)
    return Scheme.make(kind, **fields)


def _plain(value: object) -> object:
    """What JSON can say of a field: mappings, specs and numpy's numbers as Python's own."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if hasattr(value, "to_json"):  # a spec
        return json.loads(value.to_json())
    if hasattr(value, "item"):  # a number of numpy or torch
        return value.item()
    return value


def weight_scale_shape(spec: QuantSpec, weight_shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the scale of a weight ``[O, ...]``.

    per_tensor: ``(1,)``. per_channel: ``(O, 1, ...)``. per_group: ``(O, K / group_size)`` for a matrix ``[O, K]`` whose
    rows ``group_size`` divides, else (other rows, convolutions) per_channel.

    >>> weight_scale_shape(QuantSpec(granularity="per_group", group_size=32, observer="dynamic"), (8, 64))
    (8, 2)
    """
    return tuple(spec.weight_scale_shape(weight_shape))
