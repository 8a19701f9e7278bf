"""Post-training quantization of whole models: passes that need data and no labels.

:func:`quantize` does all in a call; the steps between (:func:`quantrain.nn.prepare`, ``calibrate``, ``convert``) are
those of every recipe.
"""

from .distill import LayerDistillation, distill_layers
from .export import check_target, export_model
from .operators import awq_scale, column_statistics_, gptq_round, smooth_factor
from .quantize import quantize
from .report import QuantizationReport, divergence, log_probabilities, quantization_report
from .rotate import rotate

__all__ = [
    "Int8Cache",
    "LayerDistillation",
    "QuantizationReport",
    "awq_scale",
    "check_target",
    "column_statistics_",
    "distill_layers",
    "divergence",
    "export_model",
    "gptq_round",
    "log_probabilities",
    "quantization_report",
    "quantize",
    "rotate",
    "smooth_factor",
    "use_int8_cache",
]


def __getattr__(name: str):
    if name in ("Int8Cache", "use_int8_cache"):  # need transformers
        from quantrain.nn import kv_cache

        return getattr(kv_cache, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
