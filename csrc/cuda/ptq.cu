#include "csrc/cuda/ptq.h"

#include "csrc/cuda/common.cuh"

namespace quantrain::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kSlots = static_cast<int>(kGptqBlock / 32);  // columns of a lane: lane, lane + 32, ...

// A row per warp, its block of columns in the lanes' registers.
__global__ void __launch_bounds__(32 * kWarps) gptq_block_kernel(const GptqBlockArgs a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= a.rows) return;
  const auto lane = static_cast<int>(threadIdx.x % 32), count = static_cast<int>(a.count);
  const int64_t first = row * a.stride;
  double w[kSlots] = {}, inverse[kSlots] = {}, scale[kSlots] = {}, zero_point[kSlots] = {};
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const int j = s * 32 + lane;
    if (j >= count) continue;
    w[s] = a.w[first + j];
    inverse[s] = a.inverse[first + j];
    scale[s] = a.scale[first + j];
    if (a.zero_point) zero_point[s] = a.zero_point[first + j];
  }
  double code[kSlots] = {}, error[kSlots] = {};
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    for (int owner = 0; owner < 32; ++owner) {
      const int i = s * 32 + owner;
      if (i >= count) break;
      const double* __restrict__ upper = a.upper + i * count;
      double e = 0.0;
      if (lane == owner) {
        const double q = fmin(fmax(rint(w[s] * inverse[s]) + zero_point[s], a.low[i]), a.high[i]);
        e = (w[s] - (q - zero_point[s]) * scale[s]) / upper[i];
        code[s] = q;
        error[s] = e;
      }
      e = __shfl_sync(0xffffffffu, e, owner);
#pragma unroll
      for (int t = s; t < kSlots; ++t) {
        const int j = t * 32 + lane;
        if (j > i && j < count) w[t] -= e * upper[j];
      }
    }
  }
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const int j = s * 32 + lane;
    if (j >= count) continue;
    a.codes[first + j] = code[s];
    a.errors[row * count + j] = error[s];
  }
}

}  // namespace

int gptq_block(const GptqBlockArgs& a, void* stream) {
  gptq_block_kernel<<<static_cast<unsigned>(ceil_div(a.rows, kWarps)), 32 * kWarps, 0,
                      static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
