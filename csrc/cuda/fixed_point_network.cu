#include "csrc/cuda/fixed_point_network.h"

#include "csrc/cuda/common.cuh"

// One thread per element: these passes are a few percent of a network's time.

namespace quantrain::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) fixed_point_copy_kernel(const FixedPointCopyArgs args, int64_t numel) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < numel; i += step) {
    int64_t rest = i;
    const int64_t l = rest % args.size[3];
    rest /= args.size[3];
    const int64_t k = rest % args.size[2];
    rest /= args.size[2];
    const int64_t j = rest % args.size[1], n = rest / args.size[1];
    const bool copied = l >= args.first && l < args.last;
    static_cast<T*>(args.output)[i] =
        copied ? static_cast<const T*>(args.input)[n * args.stride[0] + j * args.stride[1] + k * args.stride[2] +
                                                   (l - args.first) * args.stride[3]]
               : T(0);
  }
}

__global__ void __launch_bounds__(kThreads) fixed_point_sum_kernel(const FixedPointSumArgs args) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < args.numel; i += step)
    fixed_point_sum_element(args, i);
}

}  // namespace

int fixed_point_copy(const FixedPointCopyArgs& args, void* stream) {
  const int64_t numel = args.size[0] * args.size[1] * args.size[2] * args.size[3];
  if (numel == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  if (args.element_size == 1)
    fixed_point_copy_kernel<uint8_t><<<grid_for(numel, kThreads), kThreads, 0, on>>>(args, numel);
  else
    fixed_point_copy_kernel<int32_t><<<grid_for(numel, kThreads), kThreads, 0, on>>>(args, numel);
  return cudaGetLastError();
}

int fixed_point_sum(const FixedPointSumArgs& args, void* stream) {
  if (args.numel == 0) return cudaSuccess;
  fixed_point_sum_kernel<<<grid_for(args.numel, kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
