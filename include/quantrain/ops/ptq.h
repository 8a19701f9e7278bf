// The arithmetic of post-training quantization of linear layers: statistics of an input's columns, and what is chosen
// from them. A column is an input channel: dimension 1 of a weight [O, K], the last of an input [..., K].
//
// Composed of ATen's operators, on the device of their tensors. Statistics wait for nothing; gptq_round and awq_scale
// look at their results and so wait for the device. Errors: c10::ValueError, c10::TypeError. No gradients.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>

#include "quantrain/ops/export.h"

namespace quantrain {

// Takes the rows of input [..., K] into running statistics, float32, in place: absmax [K] the largest magnitudes,
// mean_abs [K] the means of |x|, hessian [K, K] the mean of 2 x x^T (absent: not asked for), rows int64 [1] how many
// there were. NaN and Inf stay in what they enter. The statistics lie on input's device or, for lack of its memory,
// all on the CPU, which waits for the device.
QUANTRAIN_API void column_statistics_(at::Tensor& absmax, at::Tensor& mean_abs,
                                      const std::optional<at::Tensor>& hessian, at::Tensor& rows,
                                      const at::Tensor& input);

// SmoothQuant (Xiao et al., arXiv:2211.10438, eq. 4): s = input_absmax^alpha / weight_absmax^(1 - alpha), at least
// 1e-5, and 1 where either is 0. x / s and W s have the product of x and W. Float32 [K].
QUANTRAIN_API at::Tensor smooth_factor(const at::Tensor& input_absmax, const at::Tensor& weight_absmax, double alpha);

// Codes of a weight [O, K] of any float type, each group of group_size columns by its scale, the last group short where
// group_size does not divide K.
//   quant_min, quant_max   range of the codes
//   scale                  float32 [O, ceil(K / group_size)]; zero_point int32 alike, or none
struct ColumnGrid {
  at::Tensor scale;
  std::optional<at::Tensor> zero_point;
  int64_t group_size = 0;
  int64_t quant_min = -8, quant_max = 7;
};

struct GptqOptions {
  std::string_view order = "activation";  // columns by falling diagonal of the Hessian; or "natural"
  double damping = 0.01;                  // of the mean of the Hessian's diagonal, over the columns not kept
  std::optional<at::Tensor> keep;         // int64 [Ko]: columns of 8 bits, -127..127, by keep_scale [O, 1]
  std::optional<at::Tensor> keep_scale;
};

struct GptqCodes {
  at::Tensor codes;  // int8 [O, K], kept columns in 8 bits
  double error = 0;  // tr((W - Q) H (W - Q)^T) / tr(W H W^T)
};

// GPTQ (Frantar et al., arXiv:2210.17323): column after column is rounded, and the columns not yet rounded are changed
// to make up for it, by the Hessian of the layer's squared error, in float64. Scales are those given: of the weight
// before any change. Where the damped Hessian has no Cholesky factor the damping is doubled, up to ten times, then
// c10::ValueError. A column that the inputs never use has codes of 0.
QUANTRAIN_API GptqCodes gptq_round(const at::Tensor& weight, const at::Tensor& hessian, const ColumnGrid& grid,
                                   const GptqOptions& options = {});

// The nearest codes, int8 [O, K] (codes above 127, of an affine grid of 8 bits, do not occur: at most 7 bits there).
QUANTRAIN_API at::Tensor round_columns(const at::Tensor& weight, const ColumnGrid& grid);

// float32 [O, K].
QUANTRAIN_API at::Tensor decode_columns(const at::Tensor& codes, const ColumnGrid& grid);

// The symmetric grid of a weight: scale = absmax / quant_max of each group, 1 where that is 0.
QUANTRAIN_API ColumnGrid absmax_grid(const at::Tensor& weight, int64_t bits, int64_t group_size);

struct AwqScale {
  at::Tensor factor;  // float32 [K]: W * factor is rounded, x / factor multiplies it
  double error = 0;   // as GptqCodes::error, of the nearest codes of W * factor
};

// AWQ (Lin et al., arXiv:2306.00978): the factor that makes columns with large inputs larger, of
//   mean_abs^r and mean_abs^r / u^(1 - r), r = 1 / steps, 2 / steps, ..., u the mean of |w| over its group's largest,
// each divided by sqrt(max min), and 1 (no change), the one whose nearest codes have the least error
// tr((W - Q) H (W - Q)^T). In float32.
QUANTRAIN_API AwqScale awq_scale(const at::Tensor& weight, const at::Tensor& hessian, const at::Tensor& mean_abs,
                                 int64_t bits, int64_t group_size, int64_t steps = 20);

}  // namespace quantrain
