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

// Any m, n; tensor cores of sm_80 and later.
int int8_mm_sm80(const Int8MmArgs& args, void* stream);

// Hopper (sm_90): which kernel serves a shape, or none where n does not suit its stores.
size_t int8_mm_sm90_workspace(const Int8MmArgs& args);
bool int8_mm_sm90_supports(const Int8MmArgs& args);
int int8_mm_sm90(const Int8MmArgs& args, void* stream);

}  // namespace quantrain::cuda
