// CUDA kernels of the choices of post-training quantization; as in int8.h.
#pragma once

#include "csrc/common/ptq.h"

namespace quantrain::cuda {

int gptq_block(const GptqBlockArgs& args, void* stream);

}  // namespace quantrain::cuda
