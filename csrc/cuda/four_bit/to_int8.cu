#include "csrc/cuda/device.h"
#include "csrc/cuda/four_bit.h"
#include "csrc/cuda/four_bit/decode.cuh"

// A packed weight as int8 codes with one scale per row: the operand of int8_mm. A thread turns 4 bytes, 8 elements of a
// block, into 8 bytes.

namespace quantrain::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kItem = 8;

__global__ void __launch_bounds__(kThreads) to_int8_kernel(const FourBitToInt8Args a, const FourBitValues values) {
  __shared__ float value[kFourBitCodes][32];  // a copy for each lane: no two meet in a bank
  const int lane = threadIdx.x % 32;
  const float mine = a.table ? a.table[lane % kFourBitCodes] : values.value[lane % kFourBitCodes];
  for (int code = threadIdx.x / 32; code < kFourBitCodes; code += kThreads / 32)
    value[code][lane] = __shfl_sync(0xffffffffu, mine, code);
  __syncthreads();
  const bool high_first = four_bit_high_first(a.format);
  const int items = static_cast<int>(a.k / kItem), items_of_block = static_cast<int>(a.block / kItem);
  const int64_t blocks = a.k / a.block;
  for (int64_t row = blockIdx.x; row < a.n; row += gridDim.x) {
    const auto* words = reinterpret_cast<const uint32_t*>(a.codes + row * a.k / 2);
    auto* y = reinterpret_cast<uint2*>(a.y + row * a.k);
    const float inverse = 1.0f / a.row_scale[row];
#pragma unroll 4
    for (int item = threadIdx.x; item < items; item += kThreads) {
      const int64_t block = row * blocks + item / items_of_block;
      const float scale = block_scale(a.scales, block), zero_point = block_zero_point(a.scales, block);
      uint32_t word = __ldcs(words + item);
      if (high_first) word = (word & 0x0f0f0f0fu) << 4 | (word >> 4 & 0x0f0f0f0fu);
      uint32_t packed[2] = {};
#pragma unroll
      for (int j = 0; j < kItem; ++j) {
        const int8_t code = four_bit_row_code(value[word >> (4 * j) & 15u][lane], zero_point, scale, inverse);
        packed[j / 4] |= (static_cast<uint32_t>(code) & 255u) << (8 * (j % 4));
      }
      y[item] = make_uint2(packed[0], packed[1]);
    }
  }
}

}  // namespace

int four_bit_to_int8(const FourBitToInt8Args& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const int64_t resident = static_cast<int64_t>(multiprocessors()) * 8;
  const auto grid = static_cast<unsigned>(a.n < resident ? a.n : resident);
  const FourBitValues values = four_bit_values(a.format);
  to_int8_kernel<<<grid, kThreads, 0, stream>>>(a, values);
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
