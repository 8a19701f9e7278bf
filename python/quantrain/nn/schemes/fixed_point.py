"""A network of integers alone: recipes f8net and f8net-tiny."""

from __future__ import annotations

from ..fixed_point.convert import convert_fixed_point
from ..fixed_point.network import FixedPointNetwork
from ..fixed_point.prepare import FixedPointGraph, prepare_fixed_point, summary_rows
from . import SchemeHandler, register


class FixedPoint(SchemeHandler):
    kind = "fixed_point"
    rebuilds = True
    summary_columns = {"fraction_length": "weight FL"}
    network_format = "quantrain.fixed_point"
    network_reader = "FixedPointNetwork.load"

    def check_layer(self, layer):
        raise ValueError(
            f"{type(layer).__name__}: expected a recipe without fixed_point (prepare makes fixed-point layers of a whole "
            f"model), got {layer.recipe.name!r}"
        )

    def prepare_network(self, model, recipe):
        return prepare_fixed_point(model, recipe)

    def convert_network(self, model):
        return convert_fixed_point(model)

    def summary_rows(self, model):
        return summary_rows(model)

    def is_prepared(self, model):
        return isinstance(model, FixedPointGraph)

    def calibrated(self, model):
        model._update_summary()

    def is_converted(self, model):
        return isinstance(model, FixedPointNetwork)

    def spec_text(self, recipe, text):
        return f"{recipe.weight.bits} bits, one scale that is a power of two"  # the observers' fields mean nothing

    def arithmetic_text(self, recipe):
        return "integers throughout"


register(FixedPoint())
