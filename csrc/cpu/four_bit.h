// CPU kernels of the four_bit family, each for a range of tasks.
#pragma once

#include "csrc/common/four_bit.h"

namespace quantrain::cpu {

void four_bit_quantize(const FourBitQuantizeArgs& args, int64_t begin, int64_t end);      // blocks
void four_bit_dequantize(const FourBitDequantizeArgs& args, int64_t begin, int64_t end);  // blocks
void four_bit_to_int8(const FourBitToInt8Args& args, int64_t begin, int64_t end);         // rows
// Rows of x up to which four_bit_linear takes less time than decoding the weight and a float product.
int64_t four_bit_linear_rows(const FourBitLinearArgs& args);
void four_bit_linear(const FourBitLinearArgs& args, int64_t begin, int64_t end);  // rows of the weight

}  // namespace quantrain::cpu
