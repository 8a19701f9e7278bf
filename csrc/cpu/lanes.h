// Blocks of elements as float32, and vectors of sixteen: sums and extremes in a fixed order, at vector speed, without
// letting the compiler reorder an addition.
#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/common/types.h"
#include "csrc/cpu/simd.h"

namespace quantrain::cpu {

constexpr int kLanes = 16;  // independent sums: one AVX-512 register of float32

// n values as float32: in place, or in `buffer`.
QUANTRAIN_INLINE const float* load_block(const float* x, int, float*) { return x; }

template <typename T>
QUANTRAIN_INLINE const float* load_block(const T* x, int n, float* buffer) {
  for (int i = 0; i < n; ++i) buffer[i] = to_float(x[i]);
  return buffer;
}

QUANTRAIN_INLINE float* store_target(float* y, float*) { return y; }

template <typename T>
QUANTRAIN_INLINE float* store_target(T*, float* buffer) {
  return buffer;
}

QUANTRAIN_INLINE void store_block(float*, int, const float*) {}

template <typename T>
QUANTRAIN_INLINE void store_block(T* y, int n, const float* buffer) {
  for (int i = 0; i < n; ++i) y[i] = from_float<T>(buffer[i]);
}

// Sixteen values side by side, in vector registers whatever the optimizer makes of the loop around them.
using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));
using LaneMask = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

// The values from i on, `fill` past the end.
#define QUANTRAIN_LOAD_LANES(lanes, values, i, n, fill)                                     \
  Lanes lanes;                                                                              \
  if ((i) + kLanes <= (n)) {                                                                \
    std::memcpy(&lanes, (values) + (i), sizeof(lanes));                                     \
  } else {                                                                                  \
    for (int j = 0; j < kLanes; ++j) lanes[j] = (i) + j < (n) ? (values)[(i) + j] : (fill); \
  }

// Sixteen sums, folded in a fixed order: vector speed without letting the compiler reorder an addition.
struct LaneSum {
  Lanes lane = {};

  QUANTRAIN_INLINE void add(const float* values, int n) {
    for (int i = 0; i < n; i += kLanes) {
      QUANTRAIN_LOAD_LANES(next, values, i, n, 0.0f)
      lane += next;
    }
  }

  QUANTRAIN_INLINE float total() const {
    float folded[kLanes];
    for (int j = 0; j < kLanes; ++j) folded[j] = lane[j];
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int j = 0; j < width; ++j) folded[j] += folded[j + width];
    return folded[0];
  }
};

}  // namespace quantrain::cpu
