// Norms and activations whose results leave as int8 rows (int8.h): quantized where they are computed, token by token,
// so that no floating-point copy is written and read again. Yao et al., "ZeroQuant" (NeurIPS 2022), section 4.3.
//
// The result is float32 until it is quantized to nearest; sums over a row are float32, each device in its own order:
// codes on CPU and CUDA may differ by one. Rows are the last dimension. weight and bias: of input's type or float32.
// column_factor, float32 of K elements, multiplies the result before it is quantized, as in int8_quantize_rows (the
// inverse of a smoothing factor whose weight took it: SmoothQuant, arXiv:2211.10438, eq. 3); carried is without it.
// float32, float16, bfloat16. For inference: no gradients. Errors as in int8.h.
#pragma once

#include "quantrain/ops/int8.h"

namespace quantrain {

// (x - mean) / sqrt(var + eps) * weight + bias, var with 1 / K.
QUANTRAIN_API Int8Codes int8_layer_norm(const at::Tensor& input, const std::optional<at::Tensor>& weight = std::nullopt,
                                        const std::optional<at::Tensor>& bias = std::nullopt, double eps = 1e-5,
                                        const std::optional<at::Tensor>& column_factor = std::nullopt);

// x / sqrt(mean(x^2) + eps) * weight.
QUANTRAIN_API Int8Codes int8_rms_norm(const at::Tensor& input, const std::optional<at::Tensor>& weight = std::nullopt,
                                      double eps = 1e-6, const std::optional<at::Tensor>& column_factor = std::nullopt);

// The norm of s = input + residual, s rounded to input's type. carried: s, for the next residual of a pre-norm block;
// with post_norm the normalized value in input's type, for that of a post-norm block.
struct Int8AddNorm {
  Int8Codes result;
  at::Tensor carried;
};

QUANTRAIN_API Int8AddNorm int8_add_layer_norm(const at::Tensor& input, const at::Tensor& residual,
                                              const std::optional<at::Tensor>& weight = std::nullopt,
                                              const std::optional<at::Tensor>& bias = std::nullopt, double eps = 1e-5,
                                              bool post_norm = false,
                                              const std::optional<at::Tensor>& column_factor = std::nullopt);

QUANTRAIN_API Int8AddNorm int8_add_rms_norm(const at::Tensor& input, const at::Tensor& residual,
                                            const std::optional<at::Tensor>& weight = std::nullopt, double eps = 1e-6,
                                            bool post_norm = false,
                                            const std::optional<at::Tensor>& column_factor = std::nullopt);

// approximate: "none" (erf) or "tanh".
QUANTRAIN_API Int8Codes int8_gelu(const at::Tensor& input, std::string_view approximate = "none",
                                  const std::optional<at::Tensor>& column_factor = std::nullopt);

// max(input, 0).
QUANTRAIN_API Int8Codes int8_relu(const at::Tensor& input,
                                  const std::optional<at::Tensor>& column_factor = std::nullopt);

// gate * sigmoid(gate) * up.
QUANTRAIN_API Int8Codes int8_silu_mul(const at::Tensor& gate, const at::Tensor& up,
                                      const std::optional<at::Tensor>& column_factor = std::nullopt);

}  // namespace quantrain
