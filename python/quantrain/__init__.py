"""quantrain: training and running neural networks in few bits.

The operators are in ``torch.ops.quantrain`` and, with documentation, in this module; layers and the flow
``prepare -> train or calibrate -> convert`` in ``quantrain.nn``; loss scaling in ``quantrain.amp``; optimizers in ``quantrain.optim``.
"""

from pathlib import Path

from quantrain._load import load

_C = load()

__version__: str = _C.__version__
built_with_cuda: bool = _C.built_with_cuda
# For CMake: -DCMAKE_PREFIX_PATH=$(python -c "import quantrain; print(quantrain.cmake_prefix_path)")
cmake_prefix_path: str = str(Path(_C.__file__).parent / "share" / "cmake")

from quantrain import amp, distill, nn, optim, prune, ptq  # noqa: E402
from quantrain._C import (  # noqa: E402
    FixedPointSpec,
    FourBitSpec,
    GradientQuantSpec,
    GradientSpec,
    Int8Spec,
    PruneSpec,
    PtqSpec,
    QuantSpec,
    Recipe,
    Scheme,
)
from quantrain.adamw_8bit import adamw_8bit_, dequantize_8bit_blockwise, quantize_8bit_blockwise  # noqa: E402
from quantrain.batch_norm import (  # noqa: E402
    BatchStatistics,
    batch_norm_act,
    batch_norm_act_fake_quantize,
    batch_norm_statistics,
    fold_fake_quantize,
)
from quantrain.distillation import (  # noqa: E402
    attention_kl,
    distillation_kl,
    distillation_kl_topk,
    hidden_cosine,
    hidden_mse,
)
from quantrain.fake_quant import (  # noqa: E402
    choose_qparams,
    dequantize,
    fake_quantize,
    fake_quantize_dynamic,
    fake_quantize_learnable,
    pack_int4,
    quantize,
    unpack_int4,
)
from quantrain.fixed_point import (  # noqa: E402
    fixed_point_add,
    fixed_point_conv2d,
    fixed_point_conv2d_requantize,
    fixed_point_fraction_length,
    fixed_point_linear,
    fixed_point_max_pool2d,
    fixed_point_quantize,
    fixed_point_requantize,
    fixed_point_sum_pool2d,
)
from quantrain.four_bit import (  # noqa: E402
    compress_scale,
    decompress_scale,
    dequantize_4bit,
    linear_4bit,
    linear_4bit_lora,
    quantize_4bit,
    quantize_4bit_affine,
)
from quantrain.fqt import fqt_conv2d, fqt_linear  # noqa: E402
from quantrain.gradient_quant import (  # noqa: E402
    QuantizedGradient,
    quantize_gradient,
    quantize_gradient_codes,
)
from quantrain.int8 import (  # noqa: E402
    int8_add_layer_norm,
    int8_add_rms_norm,
    int8_gelu,
    int8_layer_norm,
    int8_linear,
    int8_mm,
    int8_mm_accumulate_,
    int8_quantize_columns,
    int8_quantize_rows,
    int8_quantize_rows_and_columns,
    int8_relu,
    int8_rms_norm,
    int8_silu_mul,
    int8_transpose,
    int8_weight_mm,
    int8_weight_transpose,
)
from quantrain.int8_outliers import (  # noqa: E402
    int8_mm_outliers,
    int8_outlier_columns,
    int8_quantize_rows_outliers,
)
from quantrain.int8_transformer import (  # noqa: E402
    int8_transformer_layer,
    int8_transformer_output,
    int8_transformer_qkv,
    rotate_heads_,
)
from quantrain.kv_cache import Int8KvCache, kv_cache_append_, kv_cache_attention  # noqa: E402
from quantrain.nn import (  # noqa: E402
    calibrate,
    convert,
    load_checkpoint,
    model_size,
    prepare,
    quantization_error,
    save_checkpoint,
)
from quantrain.norm_act import norm_act_fake_quantize, norm_act_fake_quantize_dynamic  # noqa: E402
from quantrain.pruning import (  # noqa: E402
    apply_masks_,
    pack_mask,
    prune_mask,
    prune_masks,
    sparsegpt_prune,
    unpack_mask,
)
from quantrain.ptq.operators import awq_scale, column_statistics_, gptq_round, smooth_factor  # noqa: E402
from quantrain.quant_conv import fake_quantize_codes, quant_conv2d  # noqa: E402
from quantrain.quant_linear import quant_linear  # noqa: E402

__all__ = [
    "BatchStatistics",
    "FixedPointSpec",
    "GradientQuantSpec",
    "GradientSpec",
    "FourBitSpec",
    "Int8Spec",
    "PruneSpec",
    "PtqSpec",
    "QuantSpec",
    "QuantizedGradient",
    "Recipe",
    "Scheme",
    "adamw_8bit_",
    "amp",
    "apply_masks_",
    "attention_kl",
    "awq_scale",
    "batch_norm_act",
    "batch_norm_act_fake_quantize",
    "batch_norm_statistics",
    "built_with_cuda",
    "calibrate",
    "choose_qparams",
    "column_statistics_",
    "cmake_prefix_path",
    "convert",
    "dequantize",
    "dequantize_8bit_blockwise",
    "distill",
    "distillation_kl",
    "distillation_kl_topk",
    "fake_quantize",
    "fake_quantize_codes",
    "fake_quantize_dynamic",
    "fake_quantize_learnable",
    "fold_fake_quantize",
    "fixed_point_fraction_length",
    "fixed_point_quantize",
    "fixed_point_requantize",
    "fixed_point_add",
    "fixed_point_conv2d",
    "fixed_point_conv2d_requantize",
    "fixed_point_linear",
    "fixed_point_max_pool2d",
    "fixed_point_sum_pool2d",
    "fqt_conv2d",
    "fqt_linear",
    "gptq_round",
    "hidden_cosine",
    "hidden_mse",
    "int8_add_layer_norm",
    "int8_add_rms_norm",
    "int8_gelu",
    "int8_layer_norm",
    "int8_linear",
    "int8_mm",
    "int8_mm_accumulate_",
    "int8_mm_outliers",
    "int8_outlier_columns",
    "int8_weight_mm",
    "int8_quantize_columns",
    "int8_quantize_rows",
    "int8_quantize_rows_outliers",
    "int8_quantize_rows_and_columns",
    "int8_rms_norm",
    "int8_relu",
    "int8_silu_mul",
    "Int8KvCache",
    "int8_transformer_layer",
    "int8_transformer_output",
    "int8_transformer_qkv",
    "kv_cache_append_",
    "kv_cache_attention",
    "rotate_heads_",
    "int8_transpose",
    "int8_weight_transpose",
    "load_checkpoint",
    "model_size",
    "nn",
    "norm_act_fake_quantize",
    "norm_act_fake_quantize_dynamic",
    "optim",
    "pack_int4",
    "pack_mask",
    "prepare",
    "prune",
    "prune_mask",
    "prune_masks",
    "ptq",
    "quant_linear",
    "quantization_error",
    "quant_conv2d",
    "quantize",
    "quantize_8bit_blockwise",
    "quantize_gradient",
    "quantize_gradient_codes",
    "save_checkpoint",
    "smooth_factor",
    "sparsegpt_prune",
    "unpack_int4",
    "unpack_mask",
    "compress_scale",
    "decompress_scale",
    "dequantize_4bit",
    "linear_4bit",
    "linear_4bit_lora",
    "quantize_4bit",
    "quantize_4bit_affine",
]
