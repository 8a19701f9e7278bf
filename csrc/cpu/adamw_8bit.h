// CPU kernels of 8-bit AdamW.
#pragma once

#include "csrc/common/adamw_8bit.h"

namespace quantrain::cpu {

// The blocks from `begin` to `end` of the whole list. Steps are read, not counted.
void adamw_8bit(const AdamW8bitArgs& args, int64_t begin, int64_t end);
void count_steps(const AdamW8bitArgs& args);

// The blocks from `begin` to `end`.
void quantize_state(const StateCodesArgs& args, int64_t begin, int64_t end);
void dequantize_state(const StateCodesArgs& args, int64_t begin, int64_t end);

}  // namespace quantrain::cpu
