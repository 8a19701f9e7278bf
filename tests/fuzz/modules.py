"""The modules of drawn tests, and which operators they leave out."""

import importlib

import torch

FAMILIES = (
    "fake_quant",
    "fake_quant_ranges",
    "batch_norm",
    "fixed_point",
    "fixed_point_conv",
    "gradient_quant",
    "fqt",
    "quant_conv",
    "norm_act",
    "quant_linear",
    "int8",
    "int8_fused",
    "int8_transformer",
    "kv_cache",
    "int8_linear",
    "amp",
    "adamw_8bit",
    "four_bit",
    "ptq",
    "distillation",
    "pruning",
)

# Operators without a drawn and a hostile test, with the reason.
LEFT_OUT = {
    "_int8_mm_by_kernel": "int8_mm's kernels one by one, for sweeps: tests/python/samples/int8_every_kernel.py goes through all",
    "_snapshot": "a clone for compiled batch norms, in Python: quantrain/nn/conv_bn.py",
}


def load():
    for family in FAMILIES:
        importlib.import_module(f"drawn_{family}")  # a prefix: benchmarks has folders of the families' names


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
