// CUDA kernels of the norm_act family. Launchers neither allocate nor wait; the stream is a cudaStream_t of the current
// device. Each returns cudaGetLastError() as an int, for the operator to report.
#pragma once

#include "csrc/common/norm_act.h"

namespace quantrain::cuda {

int norm_act(const NormActArgs& args, void* stream);
int norm_act_range(const NormActRangeArgs& args, void* stream);
int norm_act_backward(const NormActBackwardArgs& args, void* stream);
int norm_act_gradients(const NormActGradientArgs& args, void* stream);

}  // namespace quantrain::cuda
