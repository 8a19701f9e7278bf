// CPU kernels of the choices of post-training quantization.
#pragma once

#include "csrc/common/ptq.h"

namespace quantrain::cpu {

void gptq_block(const GptqBlockArgs& args, int64_t begin, int64_t end);  // rows

}  // namespace quantrain::cpu
