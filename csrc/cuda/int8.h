// CUDA kernels of the int8 family. Launchers neither allocate nor wait; the stream is a cudaStream_t of the current device.
// Each returns cudaGetLastError() as an int, for the operator to report.
#pragma once

#include <cstddef>

#include "csrc/common/int8.h"
#include "csrc/common/int8_fused.h"

namespace quantrain::cuda {

int int8_quantize_rows(const Int8QuantizeRowsArgs& args, void* stream);
int int8_column_absmax(const Int8ColumnAbsmaxArgs& args, void* stream);
int int8_quantize_columns(const Int8QuantizeColumnsArgs& args, void* stream);
int int8_transpose(const Int8TransposeArgs& args, void* stream);
int int8_weight_transpose(const Int8WeightTransposeArgs& args, void* stream);
int int8_norm(const Int8NormArgs& args, void* stream);
int int8_activation(const Int8ActivationArgs& args, void* stream);

// 10 * major + minor of the current device.
int compute_capability();

// What int8_mm needs in `workspace` for these sizes, on the current device.
size_t int8_mm_workspace(const Int8MmArgs& args);

// Hopper's kernel for the shape where one serves it, else that of sm_80, which any later device runs.
int int8_mm(const Int8MmArgs& args, void* stream);

}  // namespace quantrain::cuda
