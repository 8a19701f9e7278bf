// Pieces that CUDA kernels share: vector access, the random numbers of a launch, division by invariants.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "csrc/common/grouping.h"
#include "csrc/common/philox.h"
#include "csrc/common/types.h"

namespace quantrain::cuda {

constexpr int kVectorBytes = 16;  // the widest load of one thread

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize < kVectorBytes ? sizeof(T) * kSize : kVectorBytes) Pack {
  T value[kSize];
};

// The values of a pack as float32, and back. 16-bit types go by whole words: two elements in an instruction or two.
template <typename T, int kSize>
__device__ __forceinline__ void unpack(const Pack<T, kSize>& pack, float (&values)[kSize]) {
  if constexpr (sizeof(T) == 2 && kSize % 2 == 0) {
#pragma unroll
    for (int j = 0; j < kSize; j += 2) {
      const uint32_t word = reinterpret_cast<const uint32_t*>(pack.value)[j / 2];
      if constexpr (std::is_same_v<T, BFloat16>) {
        values[j] = __uint_as_float(word << 16);
        values[j + 1] = __uint_as_float(word & 0xffff0000u);
      } else {
        const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word));
        values[j] = pair.x;
        values[j + 1] = pair.y;
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < kSize; ++j) values[j] = to_float(pack.value[j]);
  }
}

template <typename T, int kSize>
__device__ __forceinline__ Pack<T, kSize> pack(const float (&values)[kSize]) {
  Pack<T, kSize> result;
  if constexpr (sizeof(T) == 2 && kSize % 2 == 0) {
#pragma unroll
    for (int j = 0; j < kSize; j += 2) {
      uint32_t& word = reinterpret_cast<uint32_t*>(result.value)[j / 2];
      if constexpr (std::is_same_v<T, BFloat16>)
        reinterpret_cast<__nv_bfloat162&>(word) = __floats2bfloat162_rn(values[j], values[j + 1]);
      else
        reinterpret_cast<__half2&>(word) = __floats2half2_rn(values[j], values[j + 1]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kSize; ++j) result.value[j] = from_float<T>(values[j]);
  }
  return result;
}

// The same pair for every thread of a launch; under graph capture read from the device at each replay.
struct PhiloxKey {
  uint64_t seed;
  uint64_t offset;

  __device__ __forceinline__ explicit PhiloxKey(const PhiloxState& s)
      : seed(s.seed_pointer ? static_cast<uint64_t>(*s.seed_pointer) : s.seed),
        offset(s.offset + (s.offset_pointer ? static_cast<uint64_t>(*s.offset_pointer) : 0)) {}

  __device__ __forceinline__ Philox4 block(uint64_t index) const { return philox4x32_10(seed, offset, index); }
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
  bool one_row_a_scale = false;  // the scale index is the row
  Divisor divisor[kMaxLevels];
  Divisor modulus[kMaxLevels];
  Index stride[kMaxLevels] = {};

  DeviceGrouping(const Grouping& g, int64_t inner_units) : inner(static_cast<Index>(inner_units)), levels(g.levels) {
    one_row_a_scale = g.levels == 1 && g.divisor[0] == 1 && g.stride[0] == 1 && g.modulus[0] == g.rows;
    for (int level = 0; level < g.levels; ++level) {
      divisor[level] = Divisor(static_cast<Index>(g.divisor[level]));
      modulus[level] = Divisor(static_cast<Index>(g.modulus[level]));
      stride[level] = static_cast<Index>(g.stride[level]);
    }
  }

  __device__ __forceinline__ Index scale_index(Index row) const {
    if (one_row_a_scale) return row;
    Index index = 0;
#pragma unroll 1
    for (int level = 0; level < levels; ++level) {
      const Index quotient = divisor[level].divide(row);
      const Index modulus_value = static_cast<Index>(modulus[level].divisor);
      index += (quotient - modulus[level].divide(quotient) * modulus_value) * stride[level];
    }
    return index;
  }
};

// Calls f with std::true_type or std::false_type.
template <typename F>
void dispatch_bool(bool value, const F& f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for this many threads, of a kernel whose threads go on in steps of the grid.
inline unsigned grid_for(int64_t threads, int threads_per_block) {
  constexpr int64_t kMaxBlocks = int64_t{1} << 30;
  const int64_t blocks = ceil_div(threads, threads_per_block);
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

}  // namespace quantrain::cuda
