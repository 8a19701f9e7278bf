// The products that need Hopper's wgmma, compiled for sm_90a alone.
#pragma once

#include <cstdint>

#include "csrc/cuda/four_bit/scale_layout.h"

namespace quantrain::cuda::sm90 {

// What a thread block makes: [groups * 64 outputs, columns rows of x], for a share of the sum.
struct WgmmaPlan {
  int columns;
  int groups;
  int split;            // thread blocks of a cluster, which share the sum
  double microseconds;  // a model's
};

// y[m, n] = x W^T + bias; with `transposed` x is [m, n], y [m, k] = x W.
struct WgmmaParams {
  FourBitLinearArgs args;
  ScaleLayout scales;
  int64_t contraction;
  int tiles_m;  // of x's rows
  int tiles_n;  // of the outputs
  int split;
  int chunks;  // of the contraction, of each thread block of a cluster
  bool lines;  // y lies on 16 bytes
};

// Returns a cudaError_t. The stream is a cudaStream_t.
int wgmma_bfloat16(const WgmmaParams& params, bool transposed, const WgmmaPlan& plan, void* stream);
int wgmma_float16(const WgmmaParams& params, bool transposed, const WgmmaPlan& plan, void* stream);

}  // namespace quantrain::cuda::sm90
