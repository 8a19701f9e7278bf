// Philox blocks side by side, for kernels that walk along rows.
#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/common/philox.h"

namespace quantrain::cpu {

constexpr int kPhiloxBatch = 16;  // blocks side by side: one AVX-512 register of 32-bit words

// The random halfwords of philox4x32_10 of csrc/common/philox.h, eight per block in order; index(i) is the index of
// block i.
template <typename Index>
inline __attribute__((always_inline)) void philox_batch(const PhiloxState& state, const Index& index,
                                                        uint16_t* numbers) {
  alignas(64) uint32_t c0[kPhiloxBatch], c1[kPhiloxBatch], c2[kPhiloxBatch], c3[kPhiloxBatch];
  for (int i = 0; i < kPhiloxBatch; ++i) {
    const uint64_t block = index(i);
    c0[i] = static_cast<uint32_t>(block);
    c1[i] = static_cast<uint32_t>(block >> 32);
    c2[i] = static_cast<uint32_t>(state.offset);
    c3[i] = static_cast<uint32_t>(state.offset >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(state.seed), k1 = static_cast<uint32_t>(state.seed >> 32);
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 1  // else gcc 12 unrolls the loop before it could vectorize it, and it takes five times as long
    for (int i = 0; i < kPhiloxBatch; ++i) {
      const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0[i];
      const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2[i];
      c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      c1[i] = static_cast<uint32_t>(p1);
      c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c3[i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  alignas(64) uint32_t words[4 * kPhiloxBatch];
#pragma GCC unroll 1
  for (int i = 0; i < kPhiloxBatch; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
  std::memcpy(numbers, words, sizeof(words));  // the low half of a word is the even element's: little-endian order
}

}  // namespace quantrain::cpu
