// What the schemas, kernels and derivatives of linear_4bit share.
#pragma once

#include <optional>
#include <string_view>

#include "ops/four_bit_check.h"

namespace quantrain {

using Linear4bitSignature = at::Tensor(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                                       const std::optional<at::Tensor>& zero_point,
                                       const std::optional<at::Tensor>& bias,
                                       const std::optional<at::Tensor>& scale_scale,
                                       const std::optional<at::Tensor>& scale_offset, std::string_view format,
                                       const std::optional<at::Tensor>& table, std::string_view method,
                                       std::optional<c10::SymInt> out_features);

using Linear4bitGradInputSignature = at::Tensor(const at::Tensor& grad_output, const at::Tensor& codes,
                                                const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
                                                const std::optional<at::Tensor>& scale_scale,
                                                const std::optional<at::Tensor>& scale_offset, c10::SymInt in_features,
                                                std::string_view format, const std::optional<at::Tensor>& table,
                                                std::string_view method);

// All that can be wrong with a call; the rows of the weight.
c10::SymInt check_linear_4bit(std::string_view op, const at::Tensor& input, const PackedWeight& weight,
                              const std::optional<at::Tensor>& bias, std::string_view method,
                              const std::optional<c10::SymInt>& out_features);

// Method "int8": rows of input, and of the weight anew, as int8 codes, and an integer product.
at::Tensor linear_4bit_int8(const at::Tensor& input, const PackedWeight& weight, const std::optional<at::Tensor>& bias,
                            int64_t rows);

}  // namespace quantrain
