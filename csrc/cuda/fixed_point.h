// CUDA kernels of the fixed_point family, under the rules of fake_quant.h; simulated quantization is
// cuda::fake_quantize.
#pragma once

#include "csrc/common/fixed_point.h"

namespace quantrain::cuda {

// The partial sums and the answers: two kernels.
int fraction_length(const FractionLengthArgs& args, void* stream);

int fixed_point_requantize(const FixedPointRequantizeArgs& args, void* stream);

}  // namespace quantrain::cuda
