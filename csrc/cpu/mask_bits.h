// A mask of one bit per element, from a byte per element.
#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/cpu/simd.h"

namespace quantrain::cpu {

// Bytes of 0 or 1 to bits: eight bytes times this constant gather their lowest bits in the top byte.
QUANTRAIN_INLINE void pack_bits(const uint8_t* inside, int n, uint8_t* mask) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t bytes;
    std::memcpy(&bytes, inside + i, 8);
    mask[i / 8] = static_cast<uint8_t>(bytes * 0x0102040810204080ull >> 56);
  }
  if (i < n) {
    uint8_t tail = 0;
    for (int j = 0; i + j < n; ++j) tail = static_cast<uint8_t>(tail | inside[i + j] << j);
    mask[i / 8] = tail;
  }
}

}  // namespace quantrain::cpu
