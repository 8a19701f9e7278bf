// How a packed weight's scales lie, for the products with it.
#pragma once

#include "csrc/common/four_bit.h"

namespace quantrain::cuda {

constexpr int kChunk = 64;  // elements of a row of W that blocks are counted in
constexpr int kGroup = 4;   // chunks whose scales are loaded together

enum class Extra { kNone, kCompressed, kZeroPoint };

struct ScaleLayout {
  FourBitScales scales;
  int64_t blocks_per_row;
  int block_shift;  // 2^block_shift chunks share a scale
  bool grouped;     // the scales of a group of chunks lie together and aligned: one load

  Extra extra() const {
    return scales.scale == nullptr ? Extra::kCompressed : scales.zero_point ? Extra::kZeroPoint : Extra::kNone;
  }
};

}  // namespace quantrain::cuda
