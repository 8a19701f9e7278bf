// CPU kernels of the norm_act family. rows: moments, extremes and scales of rows, where there are any; elements: what
// follows, over elements (ranges begin at multiples of kElementBlock). Backward goes over parts of the rows for norms,
// over elements else; gradients over columns.
#pragma once

#include "csrc/common/norm_act.h"

namespace quantrain::cpu {

void norm_act_rows(const NormActArgs& args, int64_t begin, int64_t end);
void norm_act_elements(const NormActArgs& args, int64_t begin, int64_t end);
void norm_act_range(const NormActRangeArgs& args, int64_t begin, int64_t end);
void norm_act_backward(const NormActBackwardArgs& args, int64_t begin, int64_t end);
void norm_act_gradients(const NormActGradientArgs& args, int64_t begin, int64_t end);

}  // namespace quantrain::cpu
