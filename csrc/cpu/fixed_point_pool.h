// Pools and sums of fixed-point codes on the CPU. [begin, end) are tasks.
#pragma once

#include <cstdint>

#include "csrc/common/fixed_point_conv.h"

namespace quantrain::cpu {

void fixed_point_max_pool2d(const FixedPointPoolArgs& args, int64_t begin, int64_t end);  // n * oh rows
void fixed_point_sum_pool2d(const FixedPointPoolArgs& args, int64_t begin, int64_t end);  // n images
void fixed_point_add(const FixedPointAddArgs& args, int64_t begin, int64_t end);          // elements

}  // namespace quantrain::cpu
