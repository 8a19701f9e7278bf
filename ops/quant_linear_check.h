// What the operator of the quant_linear family and its derivative share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace quantrain {

void check_quant_linear(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                        const std::optional<at::Tensor>& zero_point, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias);

}  // namespace quantrain
