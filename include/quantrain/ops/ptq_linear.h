// The product of a linear layer that post-training quantization made: what its parts mean, and the product by the
// operators that exist for them (int8.h, int8_outliers.h, four_bit.h).
//
//   x' = x * input_factor      a weight Q of 8 bits, or of 4 in groups of columns; Qo its outlier columns at 8 bits
//   y  = q(x') Q^T + x'[outlier_columns] Qo^T + bias
//
// q(x') is x' itself, its rows in int8, or x' / input_scale in int8. Of weights of 8 bits the outlier columns of x' are
// two int8 planes and Qo are columns of Q; of 4 bits they stay as they come, and Q is 0 there.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "quantrain/ops/export.h"

namespace quantrain {

// codes: int8 [O, K]; or uint8 [O, Kp / 2], int4 as quantize_4bit packs it, Kp the columns of whole groups.
// scale: float32 [O, 1]; or [O, Kp / group].
struct PtqWeight {
  at::Tensor codes, scale;
  std::optional<at::Tensor> input_factor = std::nullopt;     // float32 [K]
  std::optional<at::Tensor> input_scale = std::nullopt;      // float32 [1]
  std::optional<at::Tensor> outlier_columns = std::nullopt;  // int32 [Ko], ascending
  std::optional<at::Tensor> outlier_codes = std::nullopt;    // int8 [O, Ko]
  std::optional<at::Tensor> outlier_scale = std::nullopt;    // float32 [O, 1], of weights of 4 bits
};

struct PtqProduct {
  bool quantize_input = true;    // to int8
  double outlier_threshold = 0;  // > 0: outlier columns of this call, at most `capacity`
  int64_t capacity = 0;
  bool few_rows_float = true;  // few rows are not rounded (weights of 8 bits)
};

constexpr int64_t kFewRows = 32, kFewRowsOnCpu = 8;  // up to which int8_weight_mm is the faster product

// input [..., K] -> [..., O], of input's type. Under autocast the input is cast.
QUANTRAIN_API at::Tensor ptq_linear(const at::Tensor& input, const PtqWeight& weight,
                                    const std::optional<at::Tensor>& bias, const PtqProduct& product);

// The float weight [O, in_features] that the codes stand for, in the coordinates of the input as it comes.
QUANTRAIN_API at::Tensor ptq_dequantize(const PtqWeight& weight, int64_t in_features,
                                        at::ScalarType dtype = at::kFloat);

}  // namespace quantrain
