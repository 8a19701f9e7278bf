// CUDA kernels of the amp family. Launchers neither allocate nor wait; the stream is a cudaStream_t of the current
// device. Each returns cudaGetLastError() as an int, for the operator to report.
#pragma once

#include "csrc/common/amp.h"

namespace quantrain::cuda {

int check_norm(const CheckNormArgs& args, void* stream);
int finish_norm(const FinishNormArgs& args, void* stream);
int scale_list(const ScaleArgs& args, void* stream);
int round_stochastic_list(const StochasticRoundArgs& args, void* stream);

}  // namespace quantrain::cuda
