// Pieces that CUDA kernels share: vector access, division by invariants, sums over a group of lanes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/common/grouping.h"
#include "csrc/common/types.h"

namespace quantrain::cuda {

constexpr int kVectorBytes = 16;  // the widest load of one thread

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize < kVectorBytes ? sizeof(T) * kSize : kVectorBytes) Pack {
  T value[kSize];
};

// Division of n < 2^31 by a fixed d with one multiplication (Granlund and Montgomery, PLDI 1994).
struct FastDivisor {
  uint32_t divisor = 1;
  uint32_t magic = 0;
  uint32_t shift = 0;

  FastDivisor() = default;
  explicit FastDivisor(uint32_t d) : divisor(d) {
    while (shift < 31 && (1u << shift) < d) ++shift;
    magic = static_cast<uint32_t>(((1ull << 32) * ((1ull << shift) - d)) / d + 1);
  }

  __device__ __forceinline__ uint32_t divide(uint32_t n) const { return (__umulhi(n, magic) + n) >> shift; }
};

struct SlowDivisor {
  uint64_t divisor = 1;

  SlowDivisor() = default;
  explicit SlowDivisor(uint64_t d) : divisor(d) {}

  __device__ __forceinline__ uint64_t divide(uint64_t n) const { return n / divisor; }
};

template <typename Index>
struct DivisorFor {
  using type = SlowDivisor;
};
template <>
struct DivisorFor<uint32_t> {
  using type = FastDivisor;
};

// Grouping with the divisions prepared. Index is uint32_t while every quotient fits in 31 bits, else uint64_t.
template <typename Index>
struct DeviceGrouping {
  using Divisor = typename DivisorFor<Index>::type;
  Divisor inner;  // in units of the kernel's vectors where a row holds whole vectors, else in elements
  int levels = 0;
  Divisor divisor[kMaxLevels];
  Divisor modulus[kMaxLevels];
  Index stride[kMaxLevels] = {};

  DeviceGrouping(const Grouping& g, int64_t inner_units) : inner(static_cast<Index>(inner_units)), levels(g.levels) {
    for (int level = 0; level < g.levels; ++level) {
      divisor[level] = Divisor(static_cast<Index>(g.divisor[level]));
      modulus[level] = Divisor(static_cast<Index>(g.modulus[level]));
      stride[level] = static_cast<Index>(g.stride[level]);
    }
  }

  __device__ __forceinline__ Index scale_index(Index row) const {
    Index index = 0;
    for (int level = 0; level < levels; ++level) {
      const Index quotient = divisor[level].divide(row);
      const Index modulus_value = static_cast<Index>(modulus[level].divisor);
      index += (quotient - modulus[level].divide(quotient) * modulus_value) * stride[level];
    }
    return index;
  }
};

template <int kLanes>
__device__ __forceinline__ float sum_over_lanes(float value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace quantrain::cuda
