// CUDA kernels of dropout. Launchers neither allocate nor wait; the stream is a cudaStream_t of the current device.
// Each returns cudaGetLastError() as an int, for the operator to report.
#pragma once

#include "csrc/common/dropout.h"

namespace quantrain::cuda {

int dropout(const DropoutArgs& args, void* stream);
int dropout_state(const DropoutStateArgs& args, void* stream);

}  // namespace quantrain::cuda
