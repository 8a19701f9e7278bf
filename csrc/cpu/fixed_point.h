// CPU kernels of the fixed_point family; simulated quantization is cpu::fake_quantize.
#pragma once

#include <cstdint>

#include "csrc/common/fixed_point.h"

namespace quantrain::cpu {

// [begin, end) counts chunks: group * chunks_per_group + chunk.
void fraction_length_partial(const FractionLengthArgs& args, int64_t begin, int64_t end);

// [begin, end) counts groups.
void fraction_length_finish(const FractionLengthArgs& args, int64_t begin, int64_t end);

// [begin, end) counts elements.
void fixed_point_requantize(const FixedPointRequantizeArgs& args, int64_t begin, int64_t end);

}  // namespace quantrain::cpu
