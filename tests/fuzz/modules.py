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

# Operators that only serve a layer's Python: no drawn test, no hostile one, with the reason.
PYTHON_ONLY = {
    "_snapshot": "a clone for compiled batch norms, nn/conv_bn.py: tests/python/test_layers.py compiles them",
}
# Operators without a drawn test of values, with the reason. The hostile test draws arguments for them too.
LEFT_OUT = {
    "_int8_mm_by_kernel": "int8_mm's kernels one by one: tests/python/int8_every_kernel.py goes through all",
}


def load():
    for family in FAMILIES:
        importlib.import_module(family)


def schemas():
    """Every operator's schema: {"name" or "name.overload": schema}, but for those of PYTHON_ONLY."""
    found = {}
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("quantrain::"):
            name = schema.name.removeprefix("quantrain::") + (
                f".{schema.overload_name}" if schema.overload_name else ""
            )
            found[name] = schema
    return {name: schema for name, schema in sorted(found.items()) if name not in PYTHON_ONLY}
