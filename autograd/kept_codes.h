// An input that a node keeps as codes for the products of its backward pass.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <optional>
#include <string_view>

#include "ops/common/dispatch.h"

namespace quantrain {

// The element type's name, of the three that these nodes compute in.
inline std::string_view name_of(at::ScalarType type) {
  return type == at::kFloat ? "float32" : type == at::kHalf ? "float16" : "bfloat16";
}

// (codes - zero_point) scale in `type`; zero_point may be undefined. Where only a gradient that needs no values is
// asked for, nothing is decoded: the result has the sizes alone.
inline at::Tensor decoded(const at::Tensor& codes, const at::Tensor& scale, const at::Tensor& zero_point,
                          at::ScalarType type, bool needs_values) {
  using OptionalTensor = std::optional<at::Tensor>;
  static const auto dequantize =
      find_operator<at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, std::string_view)>(
          "dequantize", "typed");
  if (!needs_values) return at::empty_like(codes, codes.options().dtype(type));
  return dequantize.call(codes, scale, zero_point.defined() ? OptionalTensor(zero_point) : std::nullopt, name_of(type));
}

}  // namespace quantrain
