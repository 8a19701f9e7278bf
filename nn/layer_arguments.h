// What the layers and the schemes make of tensors before they call an operator. Private to the library.
#pragma once

#include <optional>

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/conv2d.h>

#include "quantrain/nn/scheme.h"

namespace quantrain::nn::detail {

inline std::optional<at::Tensor> defined_or_none(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

// What a linear layer of this input gives: under autocast its type.
inline at::ScalarType output_type(const at::Tensor& input) {
  const at::DeviceType device = input.device().type();
  return at::autocast::is_autocast_enabled(device) ? at::autocast::get_autocast_dtype(device) : input.scalar_type();
}

inline at::Tensor float_conv2d(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                               const Conv2dArguments& arguments) {
  const auto& [stride, padding, dilation, padding_mode, groups] = arguments;
  if (padding_mode.empty()) return at::conv2d(input, weight, bias, stride, padding, dilation, groups);
  return at::conv2d(input, weight, bias, stride, padding_mode, dilation, groups);
}

}  // namespace quantrain::nn::detail
