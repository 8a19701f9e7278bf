// What the convolution kernels use of CUDA, on a CPU: the header stands in for CUDA's where the kernels are compiled
// for the emulation.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct __half2 {
  uint32_t bits;
};
struct __nv_bfloat162 {
  uint32_t bits;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline int min(int a, int b) { return std::min(a, b); }
inline int max(int a, int b) { return std::max(a, b); }

template <typename To, typename From>
To emulated_bits(From value) {
  To result;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

inline float __uint_as_float(uint32_t bits) { return emulated_bits<float>(bits); }
inline uint32_t __float_as_uint(float value) { return emulated_bits<uint32_t>(value); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}
// Unlike prmt it takes three bits of a selector's digit.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> (selector >> i * 4 & 7) * 8 & 0xff) << i * 8;
  return result;
}
inline float2 __half22float2(__half2) { return {}; }
inline __half2 __floats2half2_rn(float, float) { return {}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float, float) { return {}; }

void __syncthreads();
int __syncthreads_and(int value);
