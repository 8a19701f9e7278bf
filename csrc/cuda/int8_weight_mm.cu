#include <type_traits>

#include "csrc/cuda/common.cuh"
#include "csrc/cuda/device.h"
#include "csrc/cuda/int8.h"
#include "csrc/cuda/overlap.cuh"
#include "csrc/cuda/pair.cuh"
#include "csrc/cuda/ptx.cuh"

// y^T = W x^T on tensor cores for few rows of x, W read once: it is the left operand, and lane t of a group of four
// owns 16 consecutive elements, 16 bytes, of a chunk of 64, so that nothing is shuffled; x is read in the same order. A
// pair of bytes becomes a pair of 16-bit values, exactly, by four instructions. The warps of a thread block take the
// chunks of its rows in turn, and their sums are added at the end.

namespace quantrain::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kChunk = 64;  // elements of a row of W that a warp takes at a time

// Elements 2h and 2h + 1 of four int8. 2^7 + the low seven bits, less 2^7 or, of a negative number, 2^8 (of float16
// 2^10 likewise): both are exact, and so is the difference.
template <typename T>
__device__ __forceinline__ uint32_t value_pair(uint32_t word, int h) {
  constexpr bool kBf16 = std::is_same_v<T, BFloat16>;
  constexpr uint32_t kBase = kBf16 ? 0x43004300u : 0x64006400u;
  const uint32_t bytes = __byte_perm(word, 0, h == 0 ? 0x4140 : 0x4342);
  const uint32_t low = (bytes & 0x007f007fu) | kBase, sign = (bytes & 0x00800080u) | kBase;
  return subtracted<T>(low, sign);
}

// kFragments: sixteens of rows of W that a thread block has. kTiles: eights of rows of x.
template <typename T, int kFragments, int kTiles>
__global__ void __launch_bounds__(kThreads) weight_mm_kernel(const Int8WeightMmArgs a) {
  // Chunks that are loaded before the first is multiplied: 4 kB of W for each warp.
  constexpr int kRows = kFragments * 16, kColumns = kTiles * 8, kAhead = kFragments == 1 ? 4 : 2;
  ptx::begin_overlapping();
  __shared__ float sums[kWarps / 2][kRows][kColumns + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int k = static_cast<int>(a.k), m_rows = static_cast<int>(a.m), chunks = (k + kChunk - 1) / kChunk;
  const auto* x = static_cast<const T*>(a.x);
  const int8_t* codes[2 * kFragments];
#pragma unroll
  for (int i = 0; i < 2 * kFragments; ++i)  // rows past the end read the last one, and are not written
    codes[i] = a.codes + min(first_row + i * 8 + g, a.n - 1) * a.k + t * 16;

  struct Loaded {
    uint4 weight[2 * kFragments];
    uint4 x[kTiles][2];
  };
  const auto load = [&](int chunk) {
    Loaded now;
    const int column = chunk * kChunk + t * 16;
    const bool inside = column < k;  // k is a multiple of 16
#pragma unroll
    for (int i = 0; i < 2 * kFragments; ++i)
      now.weight[i] =
          inside ? __ldg(reinterpret_cast<const uint4*>(codes[i] + chunk * kChunk)) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        now.x[n][half] = inside && n * 8 + g < m_rows
                             ? __ldg(reinterpret_cast<const uint4*>(x + (n * 8 + g) * a.k + column) + half)
                             : make_uint4(0, 0, 0, 0);
    return now;
  };
  float sum[kFragments][kTiles][4] = {};
  const auto multiply = [&](const Loaded& now) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {  // 16 columns: four bytes of each lane
      const auto word = [step](const uint4& four) {
        return step == 0 ? four.x : step == 1 ? four.y : step == 2 ? four.z : four.w;
      };
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const uint32_t top = word(now.weight[2 * f]), bottom = word(now.weight[2 * f + 1]);
        const uint32_t fragment[4] = {value_pair<T>(top, 0), value_pair<T>(bottom, 0), value_pair<T>(top, 1),
                                      value_pair<T>(bottom, 1)};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const uint4& half = now.x[n][step / 2];
          mma<T>(sum[f][n], fragment, step % 2 ? half.z : half.x, step % 2 ? half.w : half.y);
        }
      }
    }
  };
  for (int chunk = warp; chunk < chunks; chunk += kWarps * kAhead) {
    Loaded now[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) now[i] = load(chunk + i * kWarps);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) multiply(now[i]);
  }

  // The upper half of the warps gives its sums to the lower one, again and again: a fixed order.
#pragma unroll
  for (int width = kWarps / 2; width > 0; width /= 2) {
    const bool gives = warp >= width && warp < 2 * width, takes = warp < width;
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          if (gives) sums[warp - width][f * 16 + c / 2 * 8 + g][n * 8 + t * 2 + c % 2] = sum[f][n][c];
    __syncthreads();
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          if (takes) sum[f][n][c] += sums[warp][f * 16 + c / 2 * 8 + g][n * 8 + t * 2 + c % 2];
    __syncthreads();
  }
  if (warp != 0) return;
#pragma unroll
  for (int f = 0; f < kFragments; ++f)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int64_t row = first_row + f * 16 + c / 2 * 8 + g;
        const int m = n * 8 + t * 2 + c % 2;
        if (row >= a.n || m >= m_rows) continue;
        const float scaled = __fmul_rn(sum[f][n][c], a.scale[row * a.scale_stride]);
        static_cast<T*>(a.y)[m * a.n + row] = from_float<T>(a.bias ? scaled + a.bias[row] : scaled);
      }
}

template <typename T, int kFragments, int kTiles>
int launch(const Int8WeightMmArgs& args, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(args.n, kFragments * 16));
  return launch_overlapping(weight_mm_kernel<T, kFragments, kTiles>, dim3(blocks), dim3(kThreads), 0, stream, args);
}

template <typename T>
int launch(const Int8WeightMmArgs& args, cudaStream_t stream) {
  // More rows of W share what is read of x; fewer keep all multiprocessors busy.
  const bool tall = ceil_div(args.n, 64) >= multiprocessors();
  if (args.m <= 8) {
    const bool few = ceil_div(args.n, 32) < 2 * multiprocessors();  // thread blocks, if they took two fragments
    return few ? launch<T, 1, 1>(args, stream) : launch<T, 2, 1>(args, stream);
  }
  if (args.m <= 16) return tall ? launch<T, 4, 2>(args, stream) : launch<T, 2, 2>(args, stream);
  return tall ? launch<T, 4, 4>(args, stream) : launch<T, 2, 4>(args, stream);
}

}  // namespace

bool int8_weight_mm_suits(const Int8WeightMmArgs& a) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  return (a.dtype == DType::kFloat16 || a.dtype == DType::kBFloat16) && a.m >= 1 && a.m <= kInt8WeightRows && a.n > 0 &&
         a.k > 0 && a.k % 16 == 0 && a.k < (int64_t{1} << 30) && aligned(a.x) && aligned(a.codes) &&
         device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8;
}

int int8_weight_mm(const Int8WeightMmArgs& args, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  return args.dtype == DType::kBFloat16 ? launch<BFloat16>(args, stream) : launch<Half>(args, stream);
}

}  // namespace quantrain::cuda
