// Which scale an element uses. The scale's shape is the granularity: along each dimension element i uses scale index
// i / (input size / scale size). A contiguous input then is a sequence of `rows` rows of `inner` elements that share
// one scale, and the scale index of a row is a sum of at most one term per dimension that varies.
#pragma once

#include <cstdint>

#include "csrc/common/macros.h"

namespace quantrain {

constexpr int kMaxLevels = 8;

struct Grouping {
  int64_t numel = 0;
  int64_t inner = 1;                 // consecutive elements that share one scale
  int64_t rows = 0;                  // numel / inner
  int levels = 0;                    // 0: one scale for the whole tensor
  int64_t divisor[kMaxLevels] = {};  // level 0 is the innermost
  int64_t modulus[kMaxLevels] = {};
  int64_t stride[kMaxLevels] = {};

  QUANTRAIN_HOST_DEVICE int64_t scale_index(int64_t row) const {
    int64_t index = 0;
    for (int level = 0; level < levels; ++level) index += row / divisor[level] % modulus[level] * stride[level];
    return index;
  }
};

// Collapses the dimensions of a contiguous input and a contiguous scale of the same rank (or of one element). The
// operator has checked that every scale size divides its input size. False where more than kMaxLevels separate levels
// remain.
inline bool make_grouping(const int64_t* sizes, const int64_t* scale_sizes, int rank, Grouping& grouping) {
  grouping = Grouping{};
  grouping.numel = 1;
  for (int d = 0; d < rank; ++d) grouping.numel *= sizes[d];
  int64_t row_stride = 1;    // rows covered by what lies inside the current dimension
  int64_t scale_stride = 1;  // scales covered likewise
  bool inside_row = true;    // still among the innermost dimensions, along which the scale does not vary
  bool open = false;         // the last level may grow: nothing that shares a scale lies between it and this dimension
  for (int d = rank - 1; d >= 0; --d) {
    const int64_t varying = scale_sizes[d];
    const int64_t shared = sizes[d] / (varying > 0 ? varying : 1);
    if (shared > 1) {
      if (inside_row) {
        grouping.inner *= shared;
      } else {
        row_stride *= shared;
        open = false;
      }
    }
    if (varying > 1) {
      inside_row = false;
      if (open) {
        grouping.modulus[grouping.levels - 1] *= varying;
      } else {
        if (grouping.levels == kMaxLevels) return false;
        grouping.divisor[grouping.levels] = row_stride;
        grouping.modulus[grouping.levels] = varying;
        grouping.stride[grouping.levels] = scale_stride;
        ++grouping.levels;
      }
      open = true;
      row_stride *= varying;
      scale_stride *= varying;
    }
  }
  grouping.rows = grouping.inner > 0 ? grouping.numel / grouping.inner : 0;
  return true;
}

}  // namespace quantrain
