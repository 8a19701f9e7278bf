// Products of int8 rows some of whose columns are far larger than the others (LLM.int8(), Dettmers et al.,
// arXiv:2208.07339). Those columns enter as two int8 planes of 15 bits together, on the other columns' grid but for a
// power of two, so that the whole product is one int32 sum, of fixed shapes, and waits for nothing:
//
//   main      codes of the row with its outlier columns as 0, scale s1 = absmax of the others / 127
//   planes    q = rint(x / s2), s2 = s1 2^e with the least e >= 0 for which |q| <= 16256;
//             hi = floor((q + 64) / 128), lo = q - 128 hi
//   product   float(main b^T + ((128 hi + lo) bo^T) 2^e) b_scale s1 + bias
//
// b holds all columns of the weight, bo its outlier columns again. e is at most log2(512 / Ko), so that the sum fits:
// in a row whose outliers would need more (more than 4096 times as large as all others, for 16 columns), s1 is larger.
// A row of zeros has scales 1; a NaN or Inf in a row makes the row NaN. float32, float16 and bfloat16 input; the bits
// are the same on CPU and CUDA, for up to 512 outlier columns and K up to 65536; beyond, the product is three products
// whose sum is float32. No gradients.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "quantrain/ops/export.h"

namespace quantrain {

struct Int8OutlierCodes {
  at::Tensor codes;   // int8 [..., K], 0 in the outlier columns
  at::Tensor planes;  // int8 [..., 2 Ko]: hi, then lo
  at::Tensor scale;   // float32 [..., 2]: s1, s2
};

// Rows of input * column_factor. outlier_columns: int32 or int64 [Ko], none twice (a product counts it twice); a
// negative one stands for a column of zeros, and so does one beyond K on CUDA, where nothing waits for its value; on
// the CPU that is an error.
QUANTRAIN_API Int8OutlierCodes
int8_quantize_rows_outliers(const at::Tensor& input, const at::Tensor& outlier_columns,
                            const std::optional<at::Tensor>& column_factor = std::nullopt);

// a, a_planes, a_scale: of int8_quantize_rows_outliers (of other scales' quotient the power of two below it counts, at
// most the limit above); b int8 [N, K], b_outlier int8 [N, Ko]; b_scale float32 of N
// elements or of one; bias [N] of any floating type. Result [..., N] in out_dtype (float32, float16, bfloat16).
QUANTRAIN_API at::Tensor int8_mm_outliers(const at::Tensor& a, const at::Tensor& a_planes, const at::Tensor& a_scale,
                                          const at::Tensor& b, const at::Tensor& b_outlier, const at::Tensor& b_scale,
                                          const std::optional<at::Tensor>& bias = std::nullopt,
                                          at::ScalarType out_dtype = at::kFloat);

// The columns of input [..., K] that hold an element of magnitude at least threshold, at most `capacity` of them, the
// largest first; int64 [capacity], -1 where there are fewer. Of the rows of this call together, as LLM.int8() chooses
// them.
QUANTRAIN_API at::Tensor int8_outlier_columns(const at::Tensor& input, double threshold, int64_t capacity);

}  // namespace quantrain
