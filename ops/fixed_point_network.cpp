#include "ops/fixed_point_network.h"

#include "csrc/cpu/fixed_point_network.h"
#include "ops/common/launch.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/fixed_point_network.h"
#endif

namespace quantrain {

void fixed_point_copy(const FixedPointCopyArgs& args, const at::Tensor& on) {
  const int64_t row_bytes = args.size[2] * args.size[3] * args.element_size;
  run_tasks(args, args.size[0] * args.size[1], grain_of(row_bytes, kGrainBytes), on,
            QUANTRAIN_KERNELS(fixed_point_copy));
}

void fixed_point_sum(const FixedPointSumArgs& args, const at::Tensor& output) {
  run_elementwise(args, output, QUANTRAIN_KERNELS(fixed_point_sum));
}

}  // namespace quantrain
