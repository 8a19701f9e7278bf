// Runs a kernel on the tensor's device: the CPU's shared among threads, or the CUDA launcher on the current stream.
#pragma once

#include <ATen/core/Tensor.h>

#include <type_traits>

#include "ops/common/layout.h"
#include "ops/common/parallel.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
// The CPU and the CUDA kernel of one name.
#define QUANTRAIN_KERNELS(name) &cpu::name, &cuda::name
#else
#define QUANTRAIN_KERNELS(name) &cpu::name, nullptr
#endif

namespace quantrain {

// type_identity: Args comes from the arguments alone, so that a CPU build may pass nullptr for the launcher.
template <typename Args>
using CpuKernel = void (*)(const std::type_identity_t<Args>&, int64_t, int64_t);

template <typename Args>
using CudaLauncher = int (*)(const std::type_identity_t<Args>&, void*);

// False where the tensor is not on CUDA.
template <typename Args>
bool run_on_cuda([[maybe_unused]] const Args& args, [[maybe_unused]] const at::Tensor& on,
                 [[maybe_unused]] CudaLauncher<Args> launcher) {
#if defined(QUANTRAIN_WITH_CUDA)
  if (on.is_cuda()) {
    const c10::cuda::CUDAGuard guard(on.device());
    C10_CUDA_CHECK(static_cast<cudaError_t>(launcher(args, c10::cuda::getCurrentCUDAStream().stream())));
    return true;
  }
#endif
  return false;
}

// Over tasks, what the CPU kernel calls so.
template <typename Args>
void run_tasks(const Args& args, int64_t tasks, int64_t grain, const at::Tensor& on, CpuKernel<Args> kernel,
               CudaLauncher<Args> launcher) {
  if (run_on_cuda(args, on, launcher)) return;
  parallel_for(tasks, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// Over the elements of `on`.
template <typename Args>
void run_elementwise(const Args& args, const at::Tensor& on, CpuKernel<Args> kernel, CudaLauncher<Args> launcher) {
  if (run_on_cuda(args, on, launcher)) return;
  parallel_for_elements(on.numel(), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// Over row chunks.
template <typename Args>
void run_rows(const Args& args, const at::Tensor& on, CpuKernel<Args> kernel, CudaLauncher<Args> launcher) {
  if (run_on_cuda(args, on, launcher)) return;
  const Grouping& grouping = args.grouping;
  const int64_t tasks = grouping.rows * chunks_per_row(grouping);
  const int64_t per_task = std::max<int64_t>(grouping.numel / std::max<int64_t>(tasks, 1), 1);
  parallel_for(tasks, grain_of(per_task), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace quantrain
