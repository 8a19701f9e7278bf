// Rotary position embedding (Su et al., "RoFormer", arXiv:2104.09864), of halves: for i < D / 2
//
//   y[i] = x[i] cos[i] - x[i + D/2] sin[i]        y[i + D/2] = x[i + D/2] cos[i + D/2] + x[i] sin[i + D/2]
#pragma once

#include <cstdint>

#include "csrc/common/macros.h"
#include "csrc/common/types.h"

namespace quantrain {

struct RotaryArgs {
  void* x;          // [tokens, all_heads, size] of dtype; the first `heads` heads are rotated
  const void* cos;  // [tokens, size] of angle_dtype, or of one sequence, [length, size]
  const void* sin;  // likewise
  DType dtype;
  DType angle_dtype;
  int64_t tokens;
  int64_t length;  // tokens of a sequence
  int64_t all_heads;
  int64_t heads;
  int64_t size;  // even
  bool one_sequence;
};

struct RotatedPair {
  float low, high;
};

QUANTRAIN_HOST_DEVICE RotatedPair rotated(float low, float high, float cos_low, float cos_high, float sin_low,
                                          float sin_high) {
#if defined(__CUDA_ARCH__)  // no contraction there: the same bits
  return {__fsub_rn(__fmul_rn(low, cos_low), __fmul_rn(high, sin_low)),
          __fadd_rn(__fmul_rn(high, cos_high), __fmul_rn(low, sin_high))};
#else
  return {low * cos_low - high * sin_low, high * cos_high + low * sin_high};
#endif
}

}  // namespace quantrain
