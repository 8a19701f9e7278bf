// CPU kernels of dropout.
#pragma once

#include "csrc/common/dropout.h"

namespace quantrain::cpu {

void dropout(const DropoutArgs& args, int64_t begin, int64_t end);  // elements; begin a multiple of 4
void dropout_state(const DropoutStateArgs& args);

}  // namespace quantrain::cpu
