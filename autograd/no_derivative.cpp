#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

// Operators without a derivative. Without an entry here PyTorch would mark their results as requiring a gradient that
// then never comes.

// Ranges, scales and codes are constants: the results carry no gradient. A step of an optimizer has none.
TORCH_LIBRARY_IMPL(quantrain, Autograd, m) {
  for (const char* op : {
           "adamw_8bit_",
           "adamw_8bit_.seeded",
           "quantize_8bit_blockwise",
           "choose_qparams",
           "_min_max",
           "_qparams_from_range",
           "_mse_range",
           "_percentile_range",
           "_observe_",
           "_observe_qparams_",
           "_batch_norm_statistics",
           "_batch_norm_update_",
           "quantize",
           "quantize.nearest",
           "quantize.seeded",
           "pack_int4",
           "unpack_int4",
           "fixed_point_fraction_length",
           "fixed_point_requantize",
           "fixed_point_conv2d",
           "fixed_point_conv2d_requantize",
           "fixed_point_linear",
           "fixed_point_add",
           "fixed_point_max_pool2d",
           "fixed_point_sum_pool2d",
           "int8_outlier_columns",
           "column_statistics_",
           "gptq_round",
           "awq_scale",
           "int8_transpose",
           "prune_mask",
           "prune_masks",
           "pack_mask",
           "unpack_mask",
           "apply_masks_",
           "sparsegpt_prune",
           "_dropout_state",
           "_dropout_state.seeded",
       }) {
    m.impl(op, torch::CppFunction::makeFallthrough());
  }
}

// Real numbers that depend on their inputs: a backward pass, and forward-mode differentiation, raise
// NotImplementedError with the operator's name.
TORCH_LIBRARY_IMPL(quantrain, Autograd, m) {
  for (const char* op : {
           "_batch_norm_forward",
           "_batch_norm_backward",
           "_fold_fake_quantize",
           "_fold_fake_quantize_backward",
           "dequantize",
           "dequantize.typed",
           "dequantize_8bit_blockwise",
           "quantize_gradient",
           "quantize_gradient.seeded",
           "_quantize_gradient_both",
           "quantize_gradient_codes",
           "quantize_gradient_codes.seeded",
           "dequantize_gradient",
           "_reflect_rows",
           "int8_quantize_rows",
           "int8_quantize_rows_outliers",
           "int8_mm_outliers",
           "smooth_factor",
           "int8_quantize_rows.nearest",
           "int8_quantize_rows.seeded",
           "int8_quantize_columns",
           "int8_quantize_columns.nearest",
           "int8_quantize_columns.seeded",
           "int8_quantize_rows_and_columns",
           "int8_quantize_rows_and_columns.nearest",
           "int8_quantize_rows_and_columns.seeded",
           "int8_weight_transpose",
           "int8_mm",
           "int8_mm.typed",
           "int8_layer_norm",
           "int8_rms_norm",
           "int8_add_layer_norm",
           "int8_add_rms_norm",
           "int8_gelu",
           "_attention",
           "kv_cache_append_",
           "kv_cache_attention",
           "int8_relu",
           "int8_transformer_layer",
           "int8_transformer_output",
           "int8_transformer_qkv",
           "rotate_heads_",
           "int8_silu_mul",
           "_dropout",
           "_distillation_rows_backward",
           "quantize_4bit",
           "quantize_4bit_affine",
           "dequantize_4bit",
           "compress_scale",
           "decompress_scale",
       }) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}
