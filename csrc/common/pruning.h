// Masks of pruned weights: a bit per element in the order of memory, bit i % 8 of byte i / 8; 1: the element is kept.
#pragma once

#include <cstdint>

#include "csrc/common/macros.h"

namespace quantrain {

constexpr int64_t kMaskChunk = 16384;  // elements of a thread block, or of a task

inline int64_t mask_bytes_of(int64_t numel) { return (numel + 7) / 8; }
inline int64_t mask_chunks_of(int64_t numel) { return (numel + kMaskChunk - 1) / kMaskChunk; }

// One tensor of a list, dense in memory, of elements of 1, 2, 4 or 8 bytes.
struct MaskedTensor {
  void* data = nullptr;           // [numel]
  const uint8_t* mask = nullptr;  // [mask_bytes_of(numel)]
  int64_t numel = 0;
  int32_t element_size = 0;
};

struct ApplyMasksArgs {
  const MaskedTensor* tensors;  // [count], host memory
  int64_t count;
};

QUANTRAIN_HOST_DEVICE bool is_kept(const uint8_t* mask, int64_t i) { return mask[i / 8] >> (i % 8) & 1; }

}  // namespace quantrain
