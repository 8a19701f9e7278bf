#include "csrc/cuda/four_bit/wgmma.cuh"

namespace quantrain::cuda::sm90 {

int wgmma_float16(const WgmmaParams& params, bool transposed, const WgmmaPlan& plan, void* stream) {
  return run<Half>(params, transposed, plan, stream);
}

}  // namespace quantrain::cuda::sm90
