// How two partial results of a reduction become one.
#pragma once

#include <cmath>

#include "csrc/cuda/ptx.cuh"

namespace quantrain::cuda {

struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

// NaN wins, from either side. kNothing: of no values.
struct Min {
  static constexpr float kNothing = HUGE_VALF;
  __device__ __forceinline__ float operator()(float a, float b) const { return ptx::min_nan(a, b); }
};
struct Max {
  static constexpr float kNothing = -HUGE_VALF;
  __device__ __forceinline__ float operator()(float a, float b) const { return ptx::max_nan(a, b); }
};

}  // namespace quantrain::cuda
