// What the CUDA runtime says of the current device, asked once a process: launchers ask at each call, some of them
// several things, and a call into the runtime is not free.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

namespace quantrain::cuda {

// 0 on an error.
inline int device_attribute(cudaDeviceAttr attribute) {
  constexpr int kDevices = 64, kAttributes = 256;
  static std::atomic<int> known[kDevices][kAttributes];  // 1 more than the value; 0: not asked yet
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  const bool kept = device < kDevices && attribute < kAttributes;
  if (kept && (value = known[device][attribute].load(std::memory_order_relaxed)) > 0) return value - 1;
  if (cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) return 0;
  if (kept) known[device][attribute].store(value + 1, std::memory_order_relaxed);
  return value;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

}  // namespace quantrain::cuda
