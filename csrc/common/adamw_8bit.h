// AdamW (Loshchilov & Hutter, arXiv:1711.05101) with its two moments in 8 bits a number, in blocks of 256 with a
// float32 scale each (Dettmers et al., arXiv:2110.02861): the formulas that both devices share.
#pragma once

#include <cmath>
#include <cstdint>

#include "csrc/common/amp.h"
#include "csrc/common/dynamic_map.h"
#include "csrc/common/macros.h"
#include "csrc/common/philox.h"
#include "csrc/common/pruning.h"
#include "csrc/common/types.h"

namespace quantrain {

constexpr int kStateBlock = 256;    // elements of a scale
constexpr int kElementsOfDraw = 8;  // of one Philox block: 16 bits each
constexpr int kDrawsOfBlock = kStateBlock / kElementsOfDraw;

inline int64_t state_blocks_of(int64_t numel) { return (numel + kStateBlock - 1) / kStateBlock; }

// One parameter with its gradient and state, dense, all in the order of the parameter's memory.
struct AdamW8bitTensor {
  void* param = nullptr;              // [numel] of dtype
  const void* grad = nullptr;         // [numel] of grad_dtype
  void* exp_avg = nullptr;            // [numel] uint8, or float32 without codes
  void* exp_avg_sq = nullptr;         // likewise
  float* exp_avg_scale = nullptr;     // [state_blocks_of(numel)], null without codes
  float* exp_avg_sq_scale = nullptr;  // likewise
  float* step = nullptr;              // [1]
  const uint8_t* mask = nullptr;      // [mask_bytes_of(numel)] of csrc/common/pruning.h, or null: all is kept
  int64_t numel = 0;
  DType dtype = DType::kFloat32;
  DType grad_dtype = DType::kFloat32;
  bool codes = false;
};

// Block b of the list (each tensor begins a new one) draws Philox blocks from kDrawsOfBlock * b on.
struct AdamW8bitArgs {
  const AdamW8bitTensor* tensors;  // [count], host memory
  int64_t count;
  const float* lr;          // [1]
  const float* grad_scale;  // [1], or null: 1
  const float* found_inf;   // [1], or null: 0
  double beta1, beta2, eps, weight_decay;
  bool stochastic;  // bfloat16 parameters are rounded at random
  PhiloxState philox;
};

// Codes and scales of blocks, and back.
struct StateCodesArgs {
  void* values;    // [numel] of dtype
  uint8_t* codes;  // [numel]
  float* scale;    // [state_blocks_of(numel)]
  int64_t numel;
  DType dtype;
  bool with_sign;
};

// What is the same for all elements of a tensor.
struct AdamW8bitFactors {
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float grad_factor;  // 1 / grad_scale
  float decay;        // 1 - lr weight_decay
  float step_size;    // lr sqrt(1 - beta2^t) / (1 - beta1^t)
  float eps;          // eps sqrt(1 - beta2^t)
};

namespace detail {

// By squaring: the same on every device, as pow is not.
QUANTRAIN_HOST_DEVICE double power(double base, uint32_t exponent) {
  double result = 1.0;
  for (; exponent != 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

}  // namespace detail

// Rounded once, from float64. `steps_before`: made before this one, a whole number.
QUANTRAIN_HOST_DEVICE AdamW8bitFactors adamw_8bit_factors(double beta1, double beta2, double eps, double weight_decay,
                                                          float lr, float grad_factor, float steps_before) {
  const uint32_t t = (steps_before > 0.0f ? static_cast<uint32_t>(steps_before < 2e9f ? steps_before : 2e9f) : 0u) + 1;
  const double correction = sqrt(1.0 - detail::power(beta2, t));
  AdamW8bitFactors f;
  f.beta1 = static_cast<float>(beta1);
  f.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  f.beta2 = static_cast<float>(beta2);
  f.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  f.grad_factor = grad_factor;
  f.decay = static_cast<float>(1.0 - static_cast<double>(lr) * weight_decay);
  f.step_size = static_cast<float>(static_cast<double>(lr) * correction / (1.0 - detail::power(beta1, t)));
  f.eps = static_cast<float>(eps * correction);
  return f;
}

// One element: its moments, then its parameter, which moves by the moments before they are rounded. Weight decay comes
// first.
QUANTRAIN_HOST_DEVICE void adamw_8bit_moments(const AdamW8bitFactors& f, float grad, float& m, float& v) {
  const float g = grad * f.grad_factor;
  m = f.beta1 * m + f.one_minus_beta1 * g;
  v = f.beta2 * v + f.one_minus_beta2 * g * g;
}

QUANTRAIN_HOST_DEVICE float adamw_8bit_param(const AdamW8bitFactors& f, float param, float m, float v) {
  return param * f.decay - f.step_size * (m / (sqrtf(v) + f.eps));
}

// The 32 bits of which round_stochastic<BFloat16> takes the upper 16, for element j of a draw.
QUANTRAIN_HOST_DEVICE uint32_t random_of_element(const Philox4& draw, int j) {
  const uint32_t word = draw.word[j / 2];
  return j % 2 == 0 ? word << 16 : word;
}

QUANTRAIN_HOST_DEVICE uint32_t magnitude_bits(float value) { return detail::float_to_bits(value) & 0x7fffffffu; }

}  // namespace quantrain
