"""The modules of drawn tests, and which operators they leave out."""

import importlib

import torch

FAMILIES = (
    "fake_quant",
    "fake_quant_ranges",
    "fixed_point",
    "fixed_point_layers",
    "gradient_quant",
    "gradient_quant_layers",
    "int8",
    "int8_fused",
    "int8_linear",
    "amp",
)

# Operators without a drawn test of values, with the reason. The hostile test draws arguments for them too.
LEFT_OUT = {
    "_int8_mm_by_kernel": "int8_mm's kernels one by one: tests/python/int8_every_kernel.py goes through all",
}


def load():
    for family in FAMILIES:
        importlib.import_module(family)


def schemas():
    """Every operator's schema: {"name" or "name.overload": schema}."""
    found = {}
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("quantrain::"):
            name = schema.name.removeprefix("quantrain::") + (
                f".{schema.overload_name}" if schema.overload_name else ""
            )
            found[name] = schema
    return dict(sorted(found.items()))
