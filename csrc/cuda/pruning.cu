#include "csrc/cuda/pruning.h"

#include "csrc/cuda/common.cuh"

namespace quantrain::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTensors = 96;  // of a launch: the list is its argument, of at most 4 KB

struct MaskedList {
  int32_t count = 0;
  int32_t chunks = 0;
  void* data[kTensors];
  const uint8_t* mask[kTensors];
  int64_t numel[kTensors];
  int32_t first_chunk[kTensors];
  uint8_t element_size[kTensors];
};

// A thread has the eight elements of a byte of the mask, as whole vectors where they are all there and aligned: writing
// the zeros alone would have memory read every sector first.
template <typename T>
__device__ __forceinline__ void apply(T* __restrict__ data,              // [numel]
                                      const uint8_t* __restrict__ mask,  // [mask_bytes_of(numel)]
                                      int64_t first, int64_t last) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
  for (int64_t i = first + threadIdx.x * 8; i < last; i += kThreads * 8) {
    const uint32_t bits = mask[i / 8];
    if (bits == 255) continue;
    if (aligned && i + 8 <= last) {
      auto* const pack = reinterpret_cast<Pack<T, 8>*>(data + i);
      Pack<T, 8> values = *pack;
#pragma unroll
      for (int j = 0; j < 8; ++j) values.value[j] = bits >> j & 1 ? values.value[j] : T{0};
      *pack = values;
      continue;
    }
    const int there = static_cast<int>(last - i < 8 ? last - i : 8);
    for (int j = 0; j < there; ++j)
      if (!(bits >> j & 1)) data[i + j] = 0;
  }
}

__global__ void __launch_bounds__(kThreads) apply_masks_kernel(const __grid_constant__ MaskedList list) {
  const auto chunk = static_cast<int32_t>(blockIdx.x);
  int t = 0;
  while (t + 1 < list.count && list.first_chunk[t + 1] <= chunk) ++t;
  const int64_t first = static_cast<int64_t>(chunk - list.first_chunk[t]) * kMaskChunk;
  const int64_t last = first + kMaskChunk < list.numel[t] ? first + kMaskChunk : list.numel[t];
  switch (list.element_size[t]) {
    case 1:
      return apply(static_cast<uint8_t*>(list.data[t]), list.mask[t], first, last);
    case 2:
      return apply(static_cast<uint16_t*>(list.data[t]), list.mask[t], first, last);
    case 4:
      return apply(static_cast<uint32_t*>(list.data[t]), list.mask[t], first, last);
    default:
      return apply(static_cast<uint64_t*>(list.data[t]), list.mask[t], first, last);
  }
}

}  // namespace

int apply_masks(const ApplyMasksArgs& a, void* stream) {
  MaskedList list;
  const auto launch = [&] {
    if (list.chunks > 0)
      apply_masks_kernel<<<static_cast<unsigned>(list.chunks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(list);
    list.count = list.chunks = 0;
  };
  for (int64_t t = 0; t < a.count; ++t) {
    const MaskedTensor& tensor = a.tensors[t];
    if (tensor.numel == 0) continue;
    list.data[list.count] = tensor.data;
    list.mask[list.count] = tensor.mask;
    list.numel[list.count] = tensor.numel;
    list.element_size[list.count] = static_cast<uint8_t>(tensor.element_size);
    list.first_chunk[list.count++] = list.chunks;
    list.chunks += static_cast<int32_t>(mask_chunks_of(tensor.numel));
    if (list.count == kTensors) launch();
  }
  launch();
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
