// CPU kernels of losses between a student's and a teacher's rows.
#pragma once

#include "csrc/common/distillation.h"

namespace quantrain::cpu {

void distillation(const DistillationArgs& args, int64_t begin, int64_t end);           // rows
void distillation_backward(const DistillationArgs& args, int64_t begin, int64_t end);  // rows

}  // namespace quantrain::cpu
