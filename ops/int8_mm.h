// int8_mm without its checks, for operators whose sums begin with more than zeros.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "csrc/common/int8.h"

namespace quantrain::detail {

// d = int8_mm(a, b, scale of `outliers`, b_scale, bias) with `outliers` in its sums. a [m, k], b [n, k], contiguous,
// 0 < k <= kInt8OutlierDepth, m > 0, n > 0; b_scale, bias: contiguous float32; d [m, n] contiguous.
void int8_mm_with(const Int8MmOutliers& outliers, const at::Tensor& a, const at::Tensor& b, const at::Tensor& b_scale,
                  const std::optional<at::Tensor>& bias, const at::Tensor& d);

}  // namespace quantrain::detail
