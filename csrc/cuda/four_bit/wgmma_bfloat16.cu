#include "csrc/cuda/four_bit/wgmma.cuh"

namespace quantrain::cuda::sm90 {

int wgmma_bfloat16(const WgmmaParams& params, bool transposed, const WgmmaPlan& plan, void* stream) {
  return run<BFloat16>(params, transposed, plan, stream);
}

}  // namespace quantrain::cuda::sm90
