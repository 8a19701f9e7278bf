// Linear layer whose three matrix products run on int8 tensor cores: the int8 family's training step.
//
//   output       Y  = X W^T + b     X and W rounded to nearest, one scale per row (int8_quantize_rows)
//   grad_input   dX = (dY sw) Wq    dY sw rounded stochastically, one scale per row; Wq the forward's codes, transposed
//   grad_weight  dW = (sx dY)^T Xq  sx dY rounded stochastically, one scale per column; Xq the forward's codes
//   grad_bias    sum of dY, in float32
//
// Each of the three is "int8", "none" (floating point, as at::linear) or "auto" (whichever is faster for the shape by a
// model of the device's times; int8_auto.h). X and W are rounded once: the codes and scales Xq, sx, Wq, sw serve the
// backward pass too, where the scales are multiplied into dY before it is rounded ("scale folding", exact). Rounding dY
// is unbiased, so the mean of dX and dW over the draws is the gradient at the rounded X and W (the setting of
// StatQuant, Chen et al. 2020, arXiv:2010.14298). weight_scheme: how W enters dX, "fold", "columns" or "auto"
// (int8_weight_transpose in int8.h).
//
// Kept for the backward pass: Xq and sx where grad_weight is int8 (1 byte per element; X itself is not kept), else X; W
// as it is, and sw.
//
// input [..., K], weight [O, K], bias [O], each float32, float16 or bfloat16; the output has input's type, gradients
// their tensor's. Under autocast input is cast to the autocast type; weight is rounded as it is, and cast only for a
// product in floating point. weight_codes [O, K] and weight_scale (O elements): int8_quantize_rows(weight), made once
// for several calls with one weight. simulate: the same codes, of the same draws, multiplied in float32: any device.
//
// The draw comes from the device's default generator when the gradients are computed, one for dX and dW together (their
// errors are not independent); where nothing needs them nothing is drawn. NaN and Inf in X, W or dY make NaN in every
// product they enter. The gradients have no derivative: asking for one raises.
//
// Errors: c10::ValueError for shapes and values, and for a GPU without int8 tensor cores; c10::TypeError for element
// types and devices.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "quantrain/ops/export.h"

namespace quantrain {

struct Int8LinearOptions {
  std::string_view output = "int8";  // or "none", "auto"
  std::string_view grad_input = "int8";
  std::string_view grad_weight = "int8";
  std::string_view weight_scheme = "auto";  // or "fold", "columns"
  bool simulate = false;
};

QUANTRAIN_API at::Tensor int8_linear(const at::Tensor& input, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias = std::nullopt,
                                     const Int8LinearOptions& options = {},
                                     const std::optional<at::Tensor>& weight_codes = std::nullopt,
                                     const std::optional<at::Tensor>& weight_scale = std::nullopt);

}  // namespace quantrain
