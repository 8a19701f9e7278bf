// Marks a function as compiled for host and device, so that a formula is written once and CPU and CUDA agree bit for
// bit.
#pragma once

#if defined(__CUDACC__)
#define QUANTRAIN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define QUANTRAIN_HOST_DEVICE inline __attribute__((always_inline))
#endif
