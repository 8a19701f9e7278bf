// Kernels that begin while the one before them in the stream ends.
#pragma once

#include <cuda_runtime.h>

#include "csrc/cuda/device.h"
#include "csrc/cuda/ptx.cuh"

namespace quantrain::cuda {

// Launches a kernel whose thread blocks may start, on Hopper and later, while the kernel before it in the stream ends.
// It begins with ptx::griddepcontrol_wait(), before it reads or writes global memory. Older devices know no such thing.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_overlapping(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                               const Arguments&... arguments) {
  cudaLaunchAttribute overlaps;
  overlaps.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlaps.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &overlaps;
  config.numAttrs = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace quantrain::cuda
