// CPU kernels of pruning.
#pragma once

#include "csrc/common/pruning.h"

namespace quantrain::cpu {

void apply_masks(const ApplyMasksArgs& args, int64_t begin, int64_t end);  // chunks of all tensors

}  // namespace quantrain::cpu
