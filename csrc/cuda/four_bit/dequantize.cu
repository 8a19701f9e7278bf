#include <type_traits>

#include "csrc/cuda/device.h"
#include "csrc/cuda/four_bit.h"
#include "csrc/cuda/four_bit/decode.cuh"

namespace quantrain::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kItem = 8;      // codes of a thread at a time: 4 bytes, which become 16 bytes of a 16-bit type
constexpr int kUnrolled = 4;  // items that are in flight

enum class Extra { kNone, kCompressed, kZeroPoint };

// Whole items, in blocks of 2^block_shift of them.
template <typename T, bool kHighFirst, Extra kExtra>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const FourBitDequantizeArgs a, const FourBitValues values, int64_t items, int block_shift) {
  __shared__ float value[kFourBitCodes][32];  // a copy for each lane: no two meet in a bank
  const int lane = threadIdx.x % 32;
  const float mine = a.table ? a.table[lane % kFourBitCodes] : values.value[lane % kFourBitCodes];
  for (int code = threadIdx.x / 32; code < kFourBitCodes; code += kThreads / 32)
    value[code][lane] = __shfl_sync(0xffffffffu, mine, code);
  __syncthreads();
  const auto* words = reinterpret_cast<const uint32_t*>(a.codes);
  auto* y = static_cast<Pack<T, kItem>*>(a.y);
  const float offset = kExtra == Extra::kCompressed ? *a.scales.scale_offset : 0.0f;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; first < items;
       first += kUnrolled * step) {
    uint32_t word[kUnrolled];
    float scale[kUnrolled], zero_point[kUnrolled];
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {  // past the end the last item, which is not written again
      const int64_t item = min(first + u * step, items - 1), block = item >> block_shift;
      word[u] = __ldcs(words + item);
      zero_point[u] = 0.0f;
      if constexpr (kExtra == Extra::kCompressed) {
        scale[u] = four_bit_decompressed(device_signed_map.value[__ldg(a.scales.scale_codes + block)],
                                         __ldg(a.scales.scale_scale + block / kScaleBlock), offset);
      } else {
        scale[u] = __ldg(a.scales.scale + block);
        if constexpr (kExtra == Extra::kZeroPoint)
          zero_point[u] = static_cast<float>(__ldg(a.scales.zero_point + block));
      }
    }
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      float decoded[kItem];
#pragma unroll
      for (int j = 0; j < kItem; ++j) {
        const uint32_t code = word[u] >> (4 * (kHighFirst ? j ^ 1 : j)) & 15u;
        decoded[j] = value[code][lane];
        if constexpr (kExtra == Extra::kZeroPoint) decoded[j] -= zero_point[u];
        decoded[j] *= scale[u];
      }
      if (first + u * step < items) y[first + u * step] = pack<T>(decoded);
    }
  }
}

// Any element.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_any_kernel(const FourBitDequantizeArgs a, const FourBitValues values, int64_t first_element) {
  const int64_t i = first_element + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.numel) return;
  const int shift = (i % 2 == 0) == four_bit_high_first(a.format) ? 4 : 0;
  const int code = a.codes[i / 2] >> shift & 15;
  const float value = a.table ? a.table[code] : values.value[code];
  const int64_t block = i / a.block;
  static_cast<T*>(a.y)[i] = from_float<T>((value - block_zero_point(a.scales, block)) * block_scale(a.scales, block));
}

}  // namespace

int four_bit_dequantize(const FourBitDequantizeArgs& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const FourBitValues values = four_bit_values(a.format);
  int block_shift = -1;
  for (int shift = 0; shift < 20; ++shift)
    if (a.block == int64_t{kItem} << shift) block_shift = shift;
  const bool compressed = a.scales.scale == nullptr, high_first = four_bit_high_first(a.format);
  const bool fast = block_shift >= 0 && !a.scales.float_zero_point && !(compressed && a.scales.zero_point) &&
                    is_aligned(a.y) && reinterpret_cast<uintptr_t>(a.codes) % 4 == 0;
  const int64_t items = fast ? a.numel / kItem : 0;
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (items > 0) {
      // A thread block for each few items: one that goes on in steps of the grid was 8 % slower on H200.
      const unsigned grid = grid_for(ceil_div(items, kUnrolled), kThreads);
      const auto launch = [&](auto kernel) { kernel<<<grid, kThreads, 0, stream>>>(a, values, items, block_shift); };
      if (a.scales.zero_point)
        launch(dequantize_kernel<T, false, Extra::kZeroPoint>);
      else if (high_first)
        launch(compressed ? dequantize_kernel<T, true, Extra::kCompressed> : dequantize_kernel<T, true, Extra::kNone>);
      else
        launch(compressed ? dequantize_kernel<T, false, Extra::kCompressed>
                          : dequantize_kernel<T, false, Extra::kNone>);
    }
    if (items * kItem < a.numel) {
      const int64_t rest = a.numel - items * kItem;
      dequantize_any_kernel<T>
          <<<static_cast<unsigned>(ceil_div(rest, kThreads)), kThreads, 0, stream>>>(a, values, items * kItem);
    }
  });
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
