// The product for few rows of x, on any GPU from sm_80 on, and what it shares with others.
#pragma once

#include <cstddef>

#include "csrc/cuda/four_bit.h"
#include "csrc/cuda/four_bit/scale_layout.h"

namespace quantrain::cuda {

// What every product asks of its arguments, and how their scales lie.
bool suits(const FourBitLinearArgs& args);
ScaleLayout layout_of(const FourBitLinearArgs& args);

bool few_rows_suit(const FourBitLinearArgs& args);
size_t few_rows_workspace(const FourBitLinearArgs& args);
int few_rows_linear(const FourBitLinearArgs& args, void* stream);

// The same for int4 with scales of 128 columns or more and at most eight rows (int4_rows.cu).
bool int4_rows_suit(const FourBitLinearArgs& args);
int int4_rows(const FourBitLinearArgs& args, void* stream);

}  // namespace quantrain::cuda
