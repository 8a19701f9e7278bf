// Two 16-bit values, bfloat16 or float16, in a register, and the product of such pairs on tensor cores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "csrc/cuda/common.cuh"
#include "csrc/cuda/ptx.cuh"

namespace quantrain::cuda {

template <typename T>
__device__ __forceinline__ uint32_t packed_pair(float first, float second) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <typename T>
using PairOf = std::conditional_t<std::is_same_v<T, BFloat16>, __nv_bfloat162, __half2>;

template <typename T>
__device__ __forceinline__ uint32_t subtracted(uint32_t pair, uint32_t other) {
  const PairOf<T> d = __hsub2(reinterpret_cast<const PairOf<T>&>(pair), reinterpret_cast<const PairOf<T>&>(other));
  return reinterpret_cast<const uint32_t&>(d);
}

template <typename T>
__device__ __forceinline__ uint32_t multiplied(uint32_t pair, uint32_t other) {
  const PairOf<T> d = __hmul2(reinterpret_cast<const PairOf<T>&>(pair), reinterpret_cast<const PairOf<T>&>(other));
  return reinterpret_cast<const uint32_t&>(d);
}

// c += a b: a [16, 16], b [16, 8], row by column, float32 sums.
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>)
    ptx::mma_m16n8k16_bf16(c, a, b0, b1);
  else
    ptx::mma_m16n8k16_f16(c, a, b0, b1);
}

}  // namespace quantrain::cuda
