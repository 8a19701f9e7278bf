"""What a Recipe means for a layer: names, changed copies, and the shape of each scale.

:class:`quantrain.Recipe`, :class:`quantrain.QuantSpec`, :class:`quantrain.GradientSpec`, :class:`quantrain.Int8Spec` and :class:`quantrain.FixedPointSpec` are C++ structs;
here is how the Python layers read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantrain._C import FixedPointSpec, GradientSpec, Int8Spec, QuantSpec, Recipe

__all__ = ["as_recipe", "changed_recipe", "gradient_arguments", "weight_scale_shape"]

_SPECS = {
    "weight": QuantSpec,
    "input": QuantSpec,
    "output": QuantSpec,
    "grad_input": GradientSpec,
    "grad_weight": GradientSpec,
    "int8": Int8Spec,
    "fixed_point": FixedPointSpec,
}
_SOME_FIELDS = {
    QuantSpec: "bits, granularity, ...",
    GradientSpec: "bits, quantizer, ...",
    Int8Spec: "output, grad_input, ...",
    FixedPointSpec: "fraction_length, clip, ...",
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


def changed_recipe(base: Recipe, change: Recipe | str | Mapping) -> Recipe:
    """A copy of ``base`` with ``change`` applied; ``base`` stays as it is.

    Args:
        change: a Recipe or a name replaces everything; a mapping changes single fields. The values of ``weight``,
            ``input``, ``output`` (QuantSpec), ``grad_input``, ``grad_weight`` (GradientSpec), ``int8`` (Int8Spec) and ``fixed_point`` (FixedPointSpec) are a spec, None
            (leave that tensor in floating point), or a mapping of a spec's fields (applied to the base's spec, to the default one
            where the base has none).

    Raises:
        ValueError: a field that does not exist, or a value outside its rule.

    >>> changed_recipe(as_recipe("qat-w4a4"), {"weight": {"bits": 8}, "input": None}).weight.bits
    8
    """
    if not isinstance(change, Mapping):
        return as_recipe(change)
    result = Recipe.from_json(base.to_json())
    for field, value in change.items():
        if not hasattr(result, field) or callable(getattr(result, field)):
            raise ValueError(f"recipe: expected a field of Recipe (weight, input, output, ...), got {field!r}")
        if field in _SPECS and isinstance(value, Mapping):
            value = _changed_spec(getattr(result, field) or _SPECS[field](), value)
        setattr(result, field, value)
    result.validate()
    return result


def _changed_spec(
    spec: QuantSpec | GradientSpec | Int8Spec | FixedPointSpec, change: Mapping
) -> QuantSpec | GradientSpec | Int8Spec | FixedPointSpec:
    for field, value in change.items():
        if not hasattr(spec, field) or callable(getattr(spec, field)):
            some = _SOME_FIELDS[type(spec)]
            raise ValueError(f"recipe: expected a field of {type(spec).__name__} ({some}), got {field!r}")
        setattr(spec, field, value)
    return spec


def gradient_arguments(recipe: Recipe, *, convolution: bool) -> dict[str, str | int | bool] | None:
    """The recipe's ``grad_input`` and ``grad_weight`` as keyword arguments of ``fqt_conv2d`` or ``fqt_linear``; None: it has none.

    >>> gradient_arguments(as_recipe("fqt-bhq5"), convolution=False)["grad_input"]
    'householder'
    """
    arguments: dict[str, str | int | bool] = {}
    for tensor in ("grad_input", "grad_weight"):
        spec = getattr(recipe, tensor)
        if spec is not None:
            spec = spec.resolved(tensor, convolution=convolution)
            arguments[tensor] = spec.quantizer
            for field in ("bits", "rows", "preserve_zero", "max_group"):
                arguments[f"{tensor}_{field}"] = getattr(spec, field)
    return arguments or None


def weight_scale_shape(spec: QuantSpec, weight_shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the scale of a weight ``[O, ...]``.

    per_tensor: ``(1,)``. per_channel: ``(O, 1, ...)``. per_group: ``(O, K / group_size)`` for a matrix ``[O, K]`` whose
    rows ``group_size`` divides, else (other rows, convolutions) per_channel.

    >>> weight_scale_shape(QuantSpec(granularity="per_group", group_size=32, observer="dynamic"), (8, 64))
    (8, 2)
    """
    channels, *row = weight_shape
    if spec.granularity == "per_tensor":
        return (1,)
    if spec.granularity == "per_group" and len(row) == 1 and row[0] and row[0] % spec.group_size == 0:
        return (channels, row[0] // spec.group_size)
    return (channels, *[1] * len(row))
