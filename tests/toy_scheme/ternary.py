"""The Python half of the scheme in ternary.cpp, whose library must be loaded first."""

from quantrain.nn import QuantLinear, SchemeHandler, schemes


class Ternary(SchemeHandler):
    kind = "ternary"

    def left_float(self, twin, recipe):
        return "" if twin is QuantLinear else "ternary weights are for Linear layers"


schemes.register(Ternary())
