// What ends in int8 rows (quantrain/ops/int8_fused.h), left in input's type: for products that take it as it is.
#pragma once

#include "csrc/common/int8_fused.h"
#include "quantrain/ops/int8_fused.h"

namespace quantrain::detail {

struct NormValues {
  at::Tensor values;
  at::Tensor carried;  // input + residual; undefined without residual
};

// The norm of input, or of input + residual. Contiguous tensors, sizes as the operators have them.
NormValues norm_values(const at::Tensor& input, const std::optional<at::Tensor>& residual,
                       const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, double eps,
                       bool rms);

// The activation of input; of kSiluMul silu(input) * up, rows of one stride.
at::Tensor activation_values(const at::Tensor& input, const std::optional<at::Tensor>& up, Int8Activation activation);

}  // namespace quantrain::detail
