"""Every scheme, by the import that registers its handler: a line here as in nn/schemes/table.cpp."""

from . import (  # noqa: F401
    fixed_point,
    four_bit,
    gradient_quant,
    int8,
    ptq,
)
