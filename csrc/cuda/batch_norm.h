// CUDA kernels of the batch_norm family. Launchers neither allocate nor wait; the stream is a cudaStream_t of the
// current device. Each returns cudaGetLastError() as an int, for the operator to report.
#pragma once

#include "csrc/common/batch_norm.h"

namespace quantrain::cuda {

int batch_norm_statistics(const BatchNormStatisticsArgs& args, void* stream);
int batch_norm_fold(const BatchNormFoldArgs& args, void* stream);
int batch_norm_update(const BatchNormUpdateArgs& args, void* stream);
int batch_norm_apply(const BatchNormApplyArgs& args, void* stream);
int batch_norm_reduce(const BatchNormReduceArgs& args, void* stream);
int batch_norm_gradients(const BatchNormGradientArgs& args, void* stream);
int batch_norm_backward(const BatchNormBackwardArgs& args, void* stream);
int fold_fake_quantize(const FoldArgs& args, void* stream);
int fold_fake_quantize_backward(const FoldBackwardArgs& args, void* stream);

}  // namespace quantrain::cuda
