// Philox4x32-10, the counter-based random number generator of Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as
// easy as 1, 2, 3" (SC 2011). The bits depend on (seed, offset, element index) alone: never on the device or the launch
// shape.
#pragma once

#include <cstdint>

#include "csrc/common/macros.h"

namespace quantrain {

// Where the seed and the offset come from: values, or device memory that a CUDA graph rewrites between replays.
struct PhiloxState {
  uint64_t seed = 0;
  uint64_t offset = 0;
  const int64_t* seed_pointer = nullptr;    // [1] on the device, while a graph is captured
  const int64_t* offset_pointer = nullptr;  // [1] likewise; `offset` is then added to it
};

struct Philox4 {
  uint32_t word[4];
};

// The 64-bit product. On the device as one instruction: nvcc 13 adds a zero to the high word of the plain product.
QUANTRAIN_HOST_DEVICE uint64_t multiply_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

QUANTRAIN_HOST_DEVICE Philox4 philox4x32_10(uint64_t seed, uint64_t offset, uint64_t index) {
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32);
  uint32_t c2 = static_cast<uint32_t>(offset), c3 = static_cast<uint32_t>(offset >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = multiply_wide(0xD2511F53u, c0);
    const uint64_t p1 = multiply_wide(0xCD9E8D57u, c2);
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Philox4{{c0, c1, c2, c3}};
}

// Uniform in [0, 1) with 24 bits, exact in float32.
QUANTRAIN_HOST_DEVICE float philox_uniform(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

}  // namespace quantrain
