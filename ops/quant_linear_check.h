// What the operator of the quant_linear family and its derivative share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace quantrain {

void check_quant_linear(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                        const std::optional<at::Tensor>& zero_point, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, int64_t weight_groups, int64_t weight_min,
                        int64_t weight_max);

// weight fake-quantized in `type`, each row in `groups` equal parts with a symmetric scale of their own; 0 groups: as
// it is. No gradient.
at::Tensor rounded_weight(const at::Tensor& weight, int64_t groups, int64_t quant_min, int64_t quant_max,
                          at::ScalarType type);

}  // namespace quantrain
