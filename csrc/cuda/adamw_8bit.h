// CUDA kernels of 8-bit AdamW. Launchers neither allocate nor wait; the stream is a cudaStream_t of the current device.
// Each returns cudaGetLastError() as an int, for the operator to report.
#pragma once

#include "csrc/common/adamw_8bit.h"

namespace quantrain::cuda {

int adamw_8bit(const AdamW8bitArgs& args, void* stream);  // counts the steps, too
int quantize_state(const StateCodesArgs& args, void* stream);
int dequantize_state(const StateCodesArgs& args, void* stream);

}  // namespace quantrain::cuda
