// What the CUDA runtime says of the current device. Kernels' launchers ask at each call: the answers are the runtime's
// own cache.
#pragma once

#include <cuda_runtime.h>

namespace quantrain::cuda {

// 0 on an error.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess)
    return 0;
  return value;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

}  // namespace quantrain::cuda
