// The instantiations of the Hopper kernel: tile of the output, cluster of thread blocks that share loads, schedule.
#pragma once

#include <cstddef>

#include "csrc/common/int8.h"

namespace quantrain::cuda::sm90 {

struct Tuning {
  int multiprocessors = 0;
  int swizzle =
      1;  // width of the band of tiles that runs at once, so that operands are met again in the second-level cache
  int splits = 0;  // stream-K: parts of a sum; 0: CUTLASS chooses
};

// Of Int8MmOutliers::side (with_outliers.cuh): bytes of a row.
constexpr int kInt8SideBytes = 80;
constexpr int64_t kInt8SideColumns = 32;  // that such a row holds

#define QUANTRAIN_DECLARE_INT8_SM90(name)                                \
  size_t name##_workspace(const Int8MmArgs& args, const Tuning& tuning); \
  int name(const Int8MmArgs& args, const Tuning& tuning, void* stream)

// float16 and bfloat16
QUANTRAIN_DECLARE_INT8_SM90(pingpong_128x128_2x1);
QUANTRAIN_DECLARE_INT8_SM90(pingpong_64x128_2x1);
QUANTRAIN_DECLARE_INT8_SM90(cooperative_128x192_2x1);
QUANTRAIN_DECLARE_INT8_SM90(cooperative_128x256_1x1);
QUANTRAIN_DECLARE_INT8_SM90(stream_k_128x128_2x1);
QUANTRAIN_DECLARE_INT8_SM90(pingpong_128x128_2x1_outliers);
QUANTRAIN_DECLARE_INT8_SM90(pingpong_64x128_2x1_outliers);
// float32
QUANTRAIN_DECLARE_INT8_SM90(cooperative_128x256_2x1_float32);
QUANTRAIN_DECLARE_INT8_SM90(stream_k_128x128_2x1_float32);
QUANTRAIN_DECLARE_INT8_SM90(cooperative_128x128_2x1_accumulate);

#undef QUANTRAIN_DECLARE_INT8_SM90

}  // namespace quantrain::cuda::sm90
