// What the CUDA kernels of the int8 family share: items of a row, largest magnitudes, and eight codes at once.
#pragma once

#include "csrc/common/int8.h"
#include "csrc/cuda/common.cuh"

namespace quantrain::cuda {

constexpr int kItem = kInt8Item;

// A whole pack at once; through a reference to memory its elements would be loaded one by one.
template <typename T>
__device__ __forceinline__ Pack<T, kItem> load(const Pack<T, kItem>* __restrict__ from) {
  return *from;
}

// Magnitudes are compared as integers: the order is the same, and NaN is larger than all numbers.
__device__ __forceinline__ uint32_t magnitude(float value) { return __float_as_uint(value) & 0x7fffffffu; }

// The largest magnitude of an item, as float bits. 16-bit types are compared two at a time.
template <typename T>
__device__ __forceinline__ uint32_t largest_magnitude(const Pack<T, kItem>& item) {
  if constexpr (sizeof(T) == 2) {
    const auto* words = reinterpret_cast<const uint32_t*>(item.value);
    uint32_t most = words[0] & 0x7fff7fffu;
#pragma unroll
    for (int j = 1; j < kItem / 2; ++j) most = __vmaxu2(most, words[j] & 0x7fff7fffu);
    const auto half = static_cast<uint16_t>(max(most & 0xffffu, most >> 16));
    return __float_as_uint(to_float(T{half}));
  } else {
    uint32_t most = 0;
#pragma unroll
    for (int j = 0; j < kItem; ++j) most = max(most, magnitude(item.value[j]));
    return most;
  }
}

__device__ __forceinline__ uint32_t largest_magnitude(const float (&values)[kItem]) {
  uint32_t most = 0;
#pragma unroll
  for (int j = 0; j < kItem; ++j) most = max(most, magnitude(values[j]));
  return most;
}

// The low bytes of four words.
__device__ __forceinline__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// Eight codes of values that are scaled already. `index`: of the Philox block that serves the item.
template <bool kStochastic>
__device__ __forceinline__ uint2 item_codes(const float (&scaled)[kItem], const PhiloxKey& key, uint64_t index) {
  uint32_t code[kItem];
  if constexpr (kStochastic) {
    const Philox4 block = key.block(index);
#pragma unroll
    for (int j = 0; j < kItem; ++j) code[j] = int8_code(scaled[j], int8_dither(block.word[j / 2], j % 2));
  } else {
#pragma unroll
    for (int j = 0; j < kItem; ++j)
      code[j] = __float_as_uint(scaled[j] + 12582912.0f);  // int8_code without a zero to add
  }
  return {low_bytes(code[0], code[1], code[2], code[3]), low_bytes(code[4], code[5], code[6], code[7])};
}

// The code of one element: its item's block is drawn for it alone.
__device__ __forceinline__ int8_t element_code(float scaled, bool stochastic, const PhiloxKey& key, uint64_t index,
                                               int j) {
  float dither = 0.0f;
  if (stochastic) dither = int8_dither(key.block(index).word[j / 2], j % 2);
  return static_cast<int8_t>(static_cast<uint8_t>(int8_code(scaled, dither)));
}

// The largest of a thread block's values, for every thread. blockDim.x threads, a multiple of 32.
__device__ __forceinline__ uint32_t block_max(uint32_t value) {
  __shared__ uint32_t of_warp[32];
  value = __reduce_max_sync(0xffffffffu, value);
  if (blockDim.x == 32) return value;
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  const uint32_t lane = threadIdx.x % 32;
  return __reduce_max_sync(0xffffffffu, lane < blockDim.x / 32 ? of_warp[lane] : 0u);
}

// ---- rows that are read once ----------------------------------------------------------------------------------------

constexpr int kRowThreads = 1024;                                 // of a thread block at most
constexpr int kRowItems = 4;                                      // of a thread, but for short rows
constexpr int64_t kRowColumns = kRowThreads * kRowItems * kItem;  // 32,768

// Whether a row of whole items fits the registers of a thread block, and all begin on 16 bytes.
inline bool is_read_once(int64_t columns, const void* x, const void* codes, const void* column_factor) {
  return columns % kItem == 0 && columns <= kRowColumns && is_aligned(x) && is_aligned(codes) &&
         is_aligned(column_factor);
}

// Calls launch(items of a thread, thread blocks, threads): a row for threads.x threads, threads.y rows per block.
template <typename F>
void launch_item_rows(int64_t rows, uint32_t items, const F& launch) {
  const auto with = [&](auto of_thread) {
    const auto wide = static_cast<unsigned>(ceil_div(ceil_div(items, of_thread.value), 32) * 32);
    const dim3 threads(wide, wide == 32 ? 8 : 1);
    launch(of_thread, static_cast<unsigned>(ceil_div(rows, threads.y)), threads);
  };
  if (items <= 64)
    with(std::integral_constant<int, 2>{});
  else
    with(std::integral_constant<int, kRowItems>{});
}

}  // namespace quantrain::cuda
