// CPU kernels of the batch_norm family: statistics and reduce over parts, apply and backward over elements (ranges
// begin at multiples of kElementBlock), the others whole.
#pragma once

#include "csrc/common/batch_norm.h"

namespace quantrain::cpu {

void batch_norm_statistics(const BatchNormStatisticsArgs& args, int64_t begin, int64_t end);
void batch_norm_fold(const BatchNormFoldArgs& args, int64_t begin, int64_t end);
void batch_norm_update(const BatchNormUpdateArgs& args, int64_t begin, int64_t end);
void batch_norm_apply(const BatchNormApplyArgs& args, int64_t begin, int64_t end);
void batch_norm_reduce(const BatchNormReduceArgs& args, int64_t begin, int64_t end);
void batch_norm_gradients(const BatchNormGradientArgs& args, int64_t begin, int64_t end);
void batch_norm_backward(const BatchNormBackwardArgs& args, int64_t begin, int64_t end);

// Over rows.
void fold_fake_quantize(const FoldArgs& args, int64_t begin, int64_t end);
void fold_fake_quantize_backward(const FoldBackwardArgs& args, int64_t begin, int64_t end);

}  // namespace quantrain::cpu
