// Attention on tensor cores, for the sequences of an inference step.
#pragma once

#include "csrc/common/attention.h"

namespace quantrain::cuda {

// Whether attention() takes these arguments: float16 or bfloat16, heads of 32, 64, 80, 96 or 128, q, k, v and their
// strides on 16 bytes, compute capability 8.0.
bool attention_suits(const AttentionArgs& args);
int attention(const AttentionArgs& args, void* stream);

}  // namespace quantrain::cuda
