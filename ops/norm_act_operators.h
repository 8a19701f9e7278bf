// Signatures of the norm_act family's inner operators: what its derivative and the layers' nodes call.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace quantrain {

// output, codes, mask, moments, and where no scale is given each row's scale and zero_point. What does not exist is
// [0].
using NormActForward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor& input, const std::optional<at::Tensor>& other, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& zero_point, std::string_view function, double eps, int64_t quant_min,
    int64_t quant_max, bool symmetric, std::string_view dtype, bool with_codes, bool with_mask);

// Gradients of input, other, weight and bias.
using NormActBackward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor& grad_output, const at::Tensor& input, const std::optional<at::Tensor>& other,
    const std::optional<at::Tensor>& weight, const at::Tensor& moments, const at::Tensor& mask,
    std::string_view function);

}  // namespace quantrain
