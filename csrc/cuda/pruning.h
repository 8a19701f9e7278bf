// CUDA launchers of pruning. A result is a cudaError_t.
#pragma once

#include "csrc/common/pruning.h"

namespace quantrain::cuda {

int apply_masks(const ApplyMasksArgs& args, void* stream);

}  // namespace quantrain::cuda
