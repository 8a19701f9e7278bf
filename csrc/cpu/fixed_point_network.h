// Copies and additions of an integer network on the CPU. [begin, end) are tasks.
#pragma once

#include <cstdint>

#include "csrc/common/fixed_point_network.h"

namespace quantrain::cpu {

void fixed_point_copy(const FixedPointCopyArgs& args, int64_t begin, int64_t end);  // size[0] * size[1] rows
void fixed_point_sum(const FixedPointSumArgs& args, int64_t begin, int64_t end);    // elements

}  // namespace quantrain::cpu
