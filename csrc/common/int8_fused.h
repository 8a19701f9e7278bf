// Formulas and kernel arguments of operators that end in int8 rows: a norm or an activation whose result is quantized
// before it leaves the registers (token-wise fusion: Yao et al., "ZeroQuant", NeurIPS 2022, section 4.3). Results are
// float32 until they are codes.
#pragma once

#include <cmath>
#include <cstdint>

#include "csrc/common/activations.h"
#include "csrc/common/int8.h"

namespace quantrain {

// x Phi(x), with log(Phi / (1 - Phi)) = x times a polynomial of x^2: within 7e-7 of x Phi(x), in fewer instructions
// than erf itself takes. Least largest error for |x| <= 5.5, where 1 - Phi ends at 2e-8; beyond, x^2 stays there.
QUANTRAIN_HOST_DEVICE float gelu_erf(float x) {
  const float square = x * x;
  const float s = square > 30.25f ? 30.25f : square;  // NaN stays
  // Times -1 / ln 2: 2 to the power of x p is Phi's (1 - Phi) / Phi.
  constexpr float kUnit = -1.44269504f;
  float p = fmaf(s, kUnit * -1.1421894e-7f, kUnit * 5.6249794e-6f);
  p = fmaf(p, s, kUnit * -9.4796393e-5f);
  p = fmaf(p, s, kUnit * -1.1471054e-4f);
  p = fmaf(p, s, kUnit * 0.0727298333f);
  p = fmaf(p, s, kUnit * 1.59574586f);
  const float result = quotient(x, 1.0f + exponential2(x * p));
#if defined(__CUDA_ARCH__)
  return result;
#else  // whose power of 2 ends before x does; of -Inf NaN, as there
  return select(0u - static_cast<uint32_t>(x < -16.0f), x * 0.0f, result);
#endif
}

QUANTRAIN_HOST_DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }

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
  void* values = nullptr;      // [rows, columns] of dtype: the result, in place of codes and scale
};

enum class Int8Activation { kGeluErf, kGeluTanh, kRelu, kSiluMul };

struct Int8ActivationArgs {
  const void* x;   // [rows, columns] of dtype, `stride` elements from row to row
  const void* up;  // likewise, kSiluMul only
  int8_t* codes;   // [rows, columns]
  float* scale;    // [rows]
  DType dtype;
  int64_t rows;
  int64_t columns;
  int64_t stride;
  Int8Activation activation;
  const float* column_factor;  // [columns] or null: of the result before it is quantized
  void* values = nullptr;      // [rows, columns] of dtype: the result, in place of codes and scale
};

}  // namespace quantrain
