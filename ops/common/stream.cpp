#include "ops/common/stream.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace quantrain {

int64_t current_stream([[maybe_unused]] const at::Device& device) {
#if defined(QUANTRAIN_WITH_CUDA)
  if (device.is_cuda()) return c10::cuda::getCurrentCUDAStream(device.index()).id();
#endif
  return 0;
}

bool is_capturing([[maybe_unused]] const at::Device& device) {
#if defined(QUANTRAIN_WITH_CUDA)
  if (device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(device);
    return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  }
#endif
  return false;
}

}  // namespace quantrain
