// CUDA kernels of the four_bit family. Launchers neither allocate nor wait; the stream is a cudaStream_t of the current
// device. Each returns cudaGetLastError() as an int, for the operator to report.
#pragma once

#include <cstddef>
#include <cstdint>

#include "csrc/common/four_bit.h"

namespace quantrain::cuda {

int four_bit_quantize(const FourBitQuantizeArgs& args, void* stream);
int four_bit_dequantize(const FourBitDequantizeArgs& args, void* stream);
int four_bit_to_int8(const FourBitToInt8Args& args, void* stream);  // codes on 4 bytes, y on 8

// Whether four_bit_linear takes these arguments: float16 or bfloat16, whole 64-element chunks, blocks of whole chunks,
// no float zero point; before Hopper (or built without it) at most kFourBitFewRows rows of x.
constexpr int64_t kFourBitFewRows = 32;
bool four_bit_linear_suits(const FourBitLinearArgs& args);
// Whether it is faster than a pass that decodes the weight and a product of 16-bit numbers.
bool four_bit_linear_pays(const FourBitLinearArgs& args);
size_t four_bit_linear_workspace(const FourBitLinearArgs& args);
int four_bit_linear(const FourBitLinearArgs& args, void* stream);

// The same of grad_input: x is grad_output [m, n], y grad_input [m, k], without bias. Hopper's alone, n a multiple of
// 8.
bool four_bit_grad_input_suits(const FourBitLinearArgs& args);
bool four_bit_grad_input_pays(const FourBitLinearArgs& args);
int four_bit_grad_input(const FourBitLinearArgs& args, void* stream);

}  // namespace quantrain::cuda
