#include <type_traits>

#include "csrc/cuda/common.cuh"
#include "csrc/cuda/dropout.h"

namespace quantrain::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kItem = 4;  // elements that one Philox block serves

template <typename T>
__global__ void __launch_bounds__(kThreads) dropout_kernel(const DropoutArgs a) {
  const uint64_t seed = static_cast<uint64_t>(a.state[0]), offset = static_cast<uint64_t>(a.state[1]);
  const auto* x = static_cast<const T*>(a.x);
  auto* y = static_cast<T*>(a.y);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; item * kItem < a.numel; item += step) {
    const Philox4 numbers = philox4x32_10(seed, offset, static_cast<uint64_t>(item));
#pragma unroll
    for (int j = 0; j < kItem; ++j) {
      const int64_t i = item * kItem + j;
      if (i < a.numel) y[i] = from_float<T>(dropped(to_float(x[i]), numbers.word[j], a));
    }
  }
}

__global__ void dropout_state_kernel(const DropoutStateArgs a) {
  const PhiloxKey key(a.philox);
  a.state[0] = static_cast<int64_t>(key.seed);
  a.state[1] = static_cast<int64_t>(key.offset);
}

}  // namespace

int dropout(const DropoutArgs& a, void* stream) {
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const unsigned grid = grid_for(ceil_div(a.numel, kItem), kThreads);
    dropout_kernel<T><<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  });
  return cudaGetLastError();
}

int dropout_state(const DropoutStateArgs& a, void* stream) {
  dropout_state_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
