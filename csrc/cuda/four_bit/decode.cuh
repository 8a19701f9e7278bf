// What the four_bit kernels share: values of codes and scales of blocks.
#pragma once

#include "csrc/common/dynamic_map.h"
#include "csrc/common/four_bit.h"
#include "csrc/cuda/common.cuh"

namespace quantrain::cuda {

static __device__ const DynamicMap device_signed_map = kSignedMap;

__device__ __forceinline__ float block_scale(const FourBitScales& s, int64_t block) {
  if (s.scale) return __ldg(s.scale + block);
  return four_bit_decompressed(device_signed_map.value[s.scale_codes[block]],
                               __ldg(s.scale_scale + block / kScaleBlock), __ldg(s.scale_offset));
}

__device__ __forceinline__ float block_zero_point(const FourBitScales& s, int64_t block) {
  if (s.zero_point) return static_cast<float>(__ldg(s.zero_point + block));
  return s.float_zero_point ? __ldg(s.float_zero_point + block) : 0.0f;
}

}  // namespace quantrain::cuda
