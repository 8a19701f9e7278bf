// CUDA kernels of the gradient_quant family. Launchers neither allocate nor wait; the stream is a cudaStream_t of the
// current device. Each returns cudaGetLastError() as an int, for the operator to report.
#pragma once

#include "csrc/common/gradient_quant.h"

namespace quantrain::cuda {

// Rows that round_rows holds in registers.
constexpr int64_t kFusedColumns = 32768;
inline bool fits_fused_rows(int64_t columns) { return columns <= kFusedColumns; }

int gradient_grids(const GradientGridsArgs& args, void* stream);
int round_gradient(const RoundGradientArgs& args, void* stream);
int round_rows(const RoundRowsArgs& args, void* stream);
int ordering_ranges(const OrderingRangesArgs& args, void* stream);
int plan_reflectors(const PlanReflectorsArgs& args, void* stream);
int reflected_ranges(const ReflectedRangesArgs& args, void* stream);
int round_reflected(const RoundReflectedArgs& args, void* stream);
int reflect_rows(const ReflectRowsArgs& args, void* stream);

}  // namespace quantrain::cuda
