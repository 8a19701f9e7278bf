#include "csrc/cuda/common.cuh"
#include "csrc/cuda/device.h"
#include "csrc/cuda/four_bit/few_rows.h"
#include "csrc/cuda/overlap.cuh"
#include "csrc/cuda/pair.cuh"
#include "csrc/cuda/ptx.cuh"

// y^T = W x^T for at most eight rows of x and int4 weights whose scales span 128 columns or more: what a decoder
// multiplies by, token after token. As int8_weight_mm.cu: W is the left operand and read once, lane t of a group of
// four owns 16 bytes of a row, here 32 elements of a chunk of 128, and x is read in the same order, so that nothing is
// shuffled and no table looked up. A pair of codes becomes a pair of 16-bit values, exactly, by a shift, a mask and a
// difference; the chunk's scale multiplies the sum. Twice as many thread blocks as few_rows.cu has, each done after a
// few microseconds.

namespace quantrain::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kRows = 16;       // of W for a thread block
constexpr int kColumns = 8;     // rows of x
constexpr int kElements = 128;  // of a row of W that a warp takes at a time
constexpr int kAhead = 2;       // of those that are loaded before the first is multiplied
constexpr int64_t kMostRows = 8;

// Codes i and i + 4 of eight, the sign bit of each flipped: 2^7 (of float16 2^10) + 8 + code, less what is added.
template <typename T>
__device__ __forceinline__ uint32_t value_pair(uint32_t flipped, int i) {
  constexpr bool kBf16 = std::is_same_v<T, BFloat16>;
  constexpr uint32_t kBase = kBf16 ? 0x43004300u : 0x64006400u;
  return subtracted<T>((flipped >> (4 * i) & 0x000f000fu) | kBase, kBase | 0x00080008u);
}

struct Chunk {
  uint4 weight[2];  // of rows g and g + 8
  float scale[2];
  uint4 x[4];
};

template <typename T>
__global__ void __launch_bounds__(kThreads) int4_rows_kernel(const FourBitLinearArgs a) {
  ptx::begin_overlapping();
  __shared__ float sums[kWarps][kRows][kColumns + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int chunks = static_cast<int>(a.k / kElements), m = static_cast<int>(a.m);
  const int64_t scales_per_row = a.k / a.block;
  const int chunks_per_scale = static_cast<int>(a.block / kElements);
  // Rows past the end read the last one, and are not written.
  const int64_t row[2] = {min(first_row + g, a.n - 1), min(first_row + g + 8, a.n - 1)};
  const T* const x = static_cast<const T*>(a.x) + g * a.k + t * 32;
  const auto load = [&](int chunk) {
    Chunk now;
    const bool inside = chunk < chunks;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      now.weight[h] = make_uint4(0x88888888u, 0x88888888u, 0x88888888u, 0x88888888u);
      now.scale[h] = 0.0f;
      if (!inside) continue;
      now.weight[h] = __ldg(reinterpret_cast<const uint4*>(a.codes + row[h] * (a.k / 2) + chunk * (kElements / 2)) + t);
      now.scale[h] = __ldg(a.scales.scale + row[h] * scales_per_row + chunk / chunks_per_scale);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
      now.x[j] =
          inside && g < m ? __ldg(reinterpret_cast<const uint4*>(x + chunk * kElements) + j) : make_uint4(0, 0, 0, 0);
    return now;
  };
  float sum[4] = {};
  const auto multiply = [&](const Chunk& now) {
    float part[4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const auto word = [j](const uint4& four) { return j == 0 ? four.x : j == 1 ? four.y : j == 2 ? four.z : four.w; };
      const uint32_t top = word(now.weight[0]) ^ 0x88888888u, bottom = word(now.weight[1]) ^ 0x88888888u;
      const uint4& values = now.x[j];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t fragment[4] = {value_pair<T>(top, 2 * half), value_pair<T>(bottom, 2 * half),
                                      value_pair<T>(top, 2 * half + 1), value_pair<T>(bottom, 2 * half + 1)};
        const uint32_t low = half ? values.y : values.x, high = half ? values.w : values.z;
        mma<T>(part, fragment, __byte_perm(low, high, 0x5410), __byte_perm(low, high, 0x7632));
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[c] = fmaf(part[c], now.scale[c / 2], sum[c]);
  };
  for (int chunk = warp; chunk < chunks; chunk += kWarps * kAhead) {
    Chunk now[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) now[i] = load(chunk + i * kWarps);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) multiply(now[i]);
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) sums[warp][c / 2 * 8 + g][t * 2 + c % 2] = sum[c];
  __syncthreads();
  if (threadIdx.x >= kRows * kColumns) return;
  const int of_block = static_cast<int>(threadIdx.x) % kRows, column = static_cast<int>(threadIdx.x) / kRows;
  const int64_t output = first_row + of_block;
  if (output >= a.n || column >= m) return;
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += sums[w][of_block][column];  // in order
  static_cast<T*>(a.y)[column * a.n + output] = from_float<T>(total + four_bit_bias(a, output));
}

}  // namespace

bool int4_rows_suit(const FourBitLinearArgs& a) {
  return a.format == FourBitFormat::kInt4 && a.scales.scale && !a.scales.zero_point && !a.scales.float_zero_point &&
         a.m <= kMostRows && a.block % kElements == 0 && a.k % a.block == 0 && a.k < (int64_t{1} << 30) &&
         is_aligned(a.x) && is_aligned(a.codes) && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8;
}

int int4_rows(const FourBitLinearArgs& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const dim3 blocks(static_cast<unsigned>(ceil_div(a.n, kRows)));
  const auto kernel = a.dtype == DType::kBFloat16 ? int4_rows_kernel<BFloat16> : int4_rows_kernel<Half>;
  return launch_overlapping(kernel, blocks, dim3(kThreads), 0, stream, a);
}

}  // namespace quantrain::cuda
