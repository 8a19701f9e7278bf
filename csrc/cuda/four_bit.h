// CUDA kernels of the four_bit family. Launchers neither allocate nor wait; the stream is a cudaStream_t of the current
// device. Each returns cudaGetLastError() as an int, for the operator to report.
#pragma once

#include <cstddef>
#include <cstdint>

#include "csrc/common/four_bit.h"

namespace quantrain::cuda {

int four_bit_quantize(const FourBitQuantizeArgs& args, void* stream);
int four_bit_dequantize(const FourBitDequantizeArgs& args, void* stream);

// Whether four_bit_linear takes these arguments: float16 or bfloat16, at most kFourBitMaxRows rows of x, whole
// 64-element chunks, blocks of whole chunks, no float zero point.
constexpr int64_t kFourBitMaxRows = 32;
bool four_bit_linear_suits(const FourBitLinearArgs& args);
size_t four_bit_linear_workspace(const FourBitLinearArgs& args);
int four_bit_linear(const FourBitLinearArgs& args, void* stream);

}  // namespace quantrain::cuda
