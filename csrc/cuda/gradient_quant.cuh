// What the CUDA kernels of the gradient_quant family share: random numbers of a launch, and extremes that carry NaN.
#pragma once

#include "csrc/common/gradient_quant.h"
#include "csrc/cuda/common.cuh"

namespace quantrain::cuda {

// The same pair for every thread of a launch; under graph capture read from the device at each replay.
struct PhiloxKey {
  uint64_t seed;
  uint64_t offset;

  __device__ __forceinline__ explicit PhiloxKey(const PhiloxState& s)
      : seed(s.seed_pointer ? static_cast<uint64_t>(*s.seed_pointer) : s.seed),
        offset(s.offset + (s.offset_pointer ? static_cast<uint64_t>(*s.offset_pointer) : 0)) {}

  __device__ __forceinline__ Philox4 block(uint64_t index) const { return philox4x32_10(seed, offset, index); }
};

// One instruction each, and NaN wins.
__device__ __forceinline__ float min_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

}  // namespace quantrain::cuda
