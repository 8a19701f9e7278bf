// CPU kernels of the amp family. Each works on the chunks (kListChunk elements) from `begin` to `end` of the whole
// list.
#pragma once

#include "csrc/common/amp.h"

namespace quantrain::cpu {

void check_norm(const CheckNormArgs& args, int64_t begin, int64_t end);
void finish_norm(const FinishNormArgs& args);
void scale_list(const ScaleArgs& args, int64_t begin, int64_t end);
void round_stochastic_list(const StochasticRoundArgs& args, int64_t begin, int64_t end);

}  // namespace quantrain::cpu
