// CUDA kernels of the fake_quant family. Launchers neither allocate nor wait; the stream is a cudaStream_t of the
// current device. Each returns cudaGetLastError() as an int, for the operator to report.
#pragma once

#include "csrc/common/fake_quant.h"

namespace quantrain::cuda {

int fake_quantize(const FakeQuantizeArgs& args, void* stream);
int fake_quantize_backward(const FakeQuantizeBackwardArgs& args, void* stream);
int quantize(const QuantizeArgs& args, void* stream);
int dequantize(const DequantizeArgs& args, void* stream);
int fake_quantize_learnable_backward(const LearnableBackwardArgs& args, void* stream);
int min_max(const MinMaxArgs& args, void* stream);
int range_error(const RangeErrorArgs& args, void* stream);
int qparams_from_range(const QParamsFromRangeArgs& args, void* stream);
int observe(const ObserveArgs& args, void* stream);

}  // namespace quantrain::cuda
