// What the kernels of the amp family take: lists of tensors cut into chunks, and the formulas that both devices share.
#pragma once

#include <cstdint>

#include "csrc/common/macros.h"
#include "csrc/common/philox.h"
#include "csrc/common/types.h"

namespace quantrain {

// One tensor of a list, dense in memory.
struct ListTensor {
  void* data = nullptr;           // [numel] of dtype
  const float* source = nullptr;  // [numel], where the operation reads from another tensor
  int64_t numel = 0;
  DType dtype = DType::kFloat32;
};

// A list is worked on in chunks of this many elements, each of one tensor: one block of threads each on CUDA.
constexpr int64_t kListChunk = 16384;

inline int64_t chunks_of(int64_t numel) { return (numel + kListChunk - 1) / kListChunk; }

// For each chunk the sum of (x / scale)^2, and for each tensor 1 where an element is Inf or NaN.
struct CheckNormArgs {
  const ListTensor* tensors;  // [count], host memory
  int64_t count;
  const float* scale;  // [1]
  float* partial;      // [chunks of all tensors]
  float* non_finite;   // [count], zero on entry
};

// What the sums come to. The clip coefficient is min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_'s.
struct FinishNormArgs {
  const float* partial;  // [chunks]
  int64_t chunks;
  const float* non_finite;  // [count]
  int64_t count;
  const float* scale;  // [1]
  float max_norm;
  float* found_inf;   // [1]: 1 where a tensor holds Inf or NaN, else 0
  float* norm;        // [1]
  float* grad_scale;  // [1]: scale / clip coefficient, what a ScaledOptimizer divides by
};

// x = x * (1 / scale) * clip coefficient
struct ScaleArgs {
  const ListTensor* tensors;  // [count], host memory
  int64_t count;
  const float* scale;  // [1]
  const float* norm;   // [1], or null: no clipping
  float max_norm;
};

// data = source, rounded up or down at random. Element i of tensor t draws number `first[t] + i`.
struct StochasticRoundArgs {
  const ListTensor* tensors;  // [count], host memory
  int64_t count;
  PhiloxState philox;
};

// Numbers of the generator that a tensor of numel elements uses up: whole blocks of four.
inline int64_t numbers_of(int64_t numel) { return (numel + 3) / 4 * 4; }

// Rounded once from double, as PyTorch's scaler computes it.
QUANTRAIN_HOST_DEVICE float inverse_scale(float scale) { return static_cast<float>(1.0 / static_cast<double>(scale)); }

QUANTRAIN_HOST_DEVICE float clip_coefficient(float norm, float max_norm) {
  const float coefficient = max_norm / (norm + 1e-6f);
  return coefficient > 1.0f ? 1.0f : coefficient;  // NaN stays
}

QUANTRAIN_HOST_DEVICE bool is_finite_bits(float value) {
  return (detail::float_to_bits(value) & 0x7f800000u) != 0x7f800000u;
}

// value in T: the neighbour below or above in magnitude, with the probability that makes it `value` on average.
// `random` are 32 even bits. Values that T holds are kept, NaN and Inf too; a finite value that rounds to nearest
// finitely never becomes Inf.
template <typename T>
QUANTRAIN_HOST_DEVICE T round_stochastic(float value, uint32_t random);

template <>
QUANTRAIN_HOST_DEVICE BFloat16 round_stochastic<BFloat16>(float value, uint32_t random) {
  const uint32_t bits = detail::float_to_bits(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return from_float<BFloat16>(value);
  uint32_t rounded = bits + (random >> 16);  // the dropped 16 bits carry with probability dropped / 2^16
  if ((rounded & 0x7f800000u) == 0x7f800000u) return from_float<BFloat16>(value);
  return BFloat16{static_cast<uint16_t>(rounded >> 16)};
}

template <>
QUANTRAIN_HOST_DEVICE Half round_stochastic<Half>(float value, uint32_t random) {
  const uint32_t bits = detail::float_to_bits(value);
  const uint32_t sign = bits & 0x80000000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x477fe000u) return from_float<Half>(value);  // 65504 and above, NaN
  if (magnitude < 0x38800000u) {                                 // below 2^-14 the step is 2^-24 throughout
    const float steps = detail::bits_to_float(magnitude) * 0x1p24f;
    const float whole = static_cast<float>(static_cast<uint32_t>(steps));
    const float up = philox_uniform(random) < steps - whole ? 1.0f : 0.0f;
    return from_float<Half>(detail::bits_to_float(detail::float_to_bits((whole + up) * 0x1p-24f) | sign));
  }
  const uint32_t rounded = (magnitude + (random >> 19)) & ~0x1fffu;  // likewise with 13 dropped bits
  return from_float<Half>(detail::bits_to_float(rounded | sign));
}

}  // namespace quantrain
