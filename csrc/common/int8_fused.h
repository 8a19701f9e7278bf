// Formulas and kernel arguments of operators that end in int8 rows: a norm or an activation whose result is quantized
// before it leaves the registers (token-wise fusion: Yao et al., "ZeroQuant", NeurIPS 2022, section 4.3). Results are
// float32 until they are codes.
#pragma once

#include <cmath>
#include <cstdint>

#include "csrc/common/activations.h"
#include "csrc/common/int8.h"

namespace quantrain {

// x Phi(x), with Phi by Abramowitz and Stegun, "Handbook of Mathematical Functions", 7.1.26: within 1e-7.
QUANTRAIN_HOST_DEVICE float gelu_erf(float x) {
  const float z = fabsf(x) * 0.70710678f;
  const float t = quotient(1.0f, fmaf(0.3275911f, z, 1.0f));
  float p = fmaf(1.061405429f, t, -1.453152027f);
  p = fmaf(p, t, 1.421413741f);
  p = fmaf(p, t, -0.284496736f);
  p = fmaf(p, t, 0.254829592f);
  const float tail = 0.5f * (p * t) * exponential(-z * z);  // Phi(-|x|)
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

// Hendrycks and Gimpel, arXiv:1606.08415, section 2; tanh(u) = 1 - 2 / (exp(2 u) + 1).
QUANTRAIN_HOST_DEVICE float gelu_tanh(float x) {
  const float u = 0.79788456f * (x + 0.044715f * x * x * x);
  return x - quotient(x, exponential(2.0f * u) + 1.0f);
}

// Where the host's exponential ends, the result is -0 (of -Inf NaN, as x / (1 + e^Inf) is).
QUANTRAIN_HOST_DEVICE float silu(float x) {
  const float result = quotient(x, 1.0f + exponential(-x));
#if defined(__CUDA_ARCH__)
  return result;
#else
  return select(0u - static_cast<uint32_t>(x < -88.0f), x * 0.0f, result);
#endif
}

// y = (s - mean) / sqrt(var + eps) * weight + bias, or with rms s / sqrt(mean(s^2) + eps) * weight; s = x + residual.
struct Int8NormArgs {
  const void* x;         // [rows, columns] of dtype
  const void* residual;  // likewise or null
  const void* weight;    // [columns] of parameter_dtype or null: 1
  const void* bias;      // [columns] of parameter_dtype or null: 0
  void* carried;         // [rows, columns] of dtype or null: s, or y where post_norm
  int8_t* codes;         // [rows, columns]
  float* scale;          // [rows]
  DType dtype;
  DType parameter_dtype;  // dtype or float32
  int64_t rows;
  int64_t columns;
  float eps;
  bool rms;
  bool post_norm;
  const float* column_factor;  // [columns] or null: of the result before it is quantized; carried is without
};

enum class Int8Activation { kGeluErf, kGeluTanh, kSiluMul };

struct Int8ActivationArgs {
  const void* x;   // [rows, columns] of dtype
  const void* up;  // likewise, kSiluMul only
  int8_t* codes;   // [rows, columns]
  float* scale;    // [rows]
  DType dtype;
  int64_t rows;
  int64_t columns;
  Int8Activation activation;
  const float* column_factor;  // [columns] or null: of the result before it is quantized
};

}  // namespace quantrain
