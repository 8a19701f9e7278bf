// What the CUDA kernels of the gradient_quant family share: extremes that carry NaN.
#pragma once

#include "csrc/common/gradient_quant.h"
#include "csrc/cuda/common.cuh"

namespace quantrain::cuda {

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
