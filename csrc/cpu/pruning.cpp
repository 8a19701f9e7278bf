#include "csrc/cpu/pruning.h"

#include <algorithm>

#include "csrc/cpu/simd.h"

namespace quantrain::cpu {
namespace {

template <typename T>
void apply(const MaskedTensor& tensor, int64_t first, int64_t last) {
  T* const data = static_cast<T*>(tensor.data);
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    int64_t i = first;
    for (; i + 8 <= last; i += 8) {
      const uint32_t bits = tensor.mask[i / 8];
      for (uint32_t j = 0; j < 8; ++j) data[i + j] &= static_cast<T>(T{0} - static_cast<T>(bits >> j & 1));
    }
    for (; i < last; ++i)
      if (!is_kept(tensor.mask, i)) data[i] = 0;
  });
}

void apply_to(const MaskedTensor& tensor, int64_t first, int64_t last) {
  switch (tensor.element_size) {
    case 1:
      return apply<uint8_t>(tensor, first, last);
    case 2:
      return apply<uint16_t>(tensor, first, last);
    case 4:
      return apply<uint32_t>(tensor, first, last);
    default:
      return apply<uint64_t>(tensor, first, last);
  }
}

}  // namespace

void apply_masks(const ApplyMasksArgs& a, int64_t begin, int64_t end) {
  int64_t first_chunk = 0;
  for (int64_t t = 0; t < a.count && first_chunk < end; ++t) {
    const MaskedTensor& tensor = a.tensors[t];
    const int64_t chunks = mask_chunks_of(tensor.numel);
    const int64_t from = std::max(begin - first_chunk, int64_t{0}), to = std::min(end - first_chunk, chunks);
    if (from < to) apply_to(tensor, from * kMaskChunk, std::min(to * kMaskChunk, tensor.numel));
    first_chunk += chunks;
  }
}

}  // namespace quantrain::cpu
