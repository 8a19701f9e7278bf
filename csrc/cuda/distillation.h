// CUDA launchers of losses between a student's and a teacher's rows. A result is a cudaError_t.
#pragma once

#include "csrc/common/distillation.h"

namespace quantrain::cuda {

// What kKlTopk may have in columns: a bit each in shared memory.
constexpr int64_t kMaxTopkColumns = int64_t{8} * 192 * 1024;

int distillation(const DistillationArgs& args, void* stream);
int distillation_backward(const DistillationArgs& args, void* stream);

}  // namespace quantrain::cuda
