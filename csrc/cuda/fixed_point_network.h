// Copies and additions of an integer network on CUDA. Launchers neither allocate nor wait; the stream is a cudaStream_t
// of the current device. Each returns cudaGetLastError() as an int, for the caller to report.
#pragma once

#include "csrc/common/fixed_point_network.h"

namespace quantrain::cuda {

int fixed_point_copy(const FixedPointCopyArgs& args, void* stream);
int fixed_point_sum(const FixedPointSumArgs& args, void* stream);

}  // namespace quantrain::cuda
