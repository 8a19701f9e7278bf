// Kernel arguments of the choices of post-training quantization.
#pragma once

#include <cstdint>

#include "csrc/common/macros.h"

namespace quantrain {

// A block of GPTQ's columns (Frantar et al., arXiv:2210.17323, section 3.3), each row by itself. Column i in turn:
//
//   q = clamp(rint(w_i * inverse_i) + zero_point_i, low_i, high_i)     e_i = (w_i - (q - zero_point_i) scale_i) / U_ii
//   w_j -= e_i U_ij   for the block's columns j > i
constexpr int64_t kGptqBlock = 128;  // columns, whose effect on those behind is one product

struct GptqBlockArgs {
  const double* w;        // [rows, count], rows `stride` apart, as all but the last four
  const double* inverse;  // of the scale, 0 where that is 0
  const double* scale;
  const double* zero_point;  // null: 0
  double* codes;
  double* errors;       // [rows, count] contiguous: e
  const double* upper;  // U, [count, count] contiguous
  const double* low;    // [count]
  const double* high;   // [count]
  int64_t rows;
  int64_t count;  // at most kGptqBlock
  int64_t stride;
};

}  // namespace quantrain
