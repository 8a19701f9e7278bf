// The one rule of int8_linear's words: of the operator's arguments and of a recipe's Int8Spec.
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <utility>

#include "ops/common/check.h"

namespace quantrain::detail {

using Int8LinearWords = std::array<std::string_view, 3>;

constexpr Int8LinearWords kInt8ProductWords = {"int8", "none", "auto"};
constexpr Int8LinearWords kInt8WeightSchemes = {"auto", "fold", "columns"};

// What is wrong with output, grad_input, grad_weight and weight_scheme, as "<rule>, got <value>", or "".
template <typename Options>
std::string int8_linear_fault(const Options& o) {
  using Field = std::pair<std::string_view, std::string_view>;
  const auto fault = [](const Field& field, const Int8LinearWords& words) -> std::string {
    if (std::find(words.begin(), words.end(), field.second) != words.end()) return "";
    return fmt::format("{} to be one of {}, got '{}'", field.first, fmt::join(words, ", "), field.second);
  };
  for (const Field& field :
       {Field{"output", o.output}, Field{"grad_input", o.grad_input}, Field{"grad_weight", o.grad_weight}}) {
    if (std::string text = fault(field, kInt8ProductWords); !text.empty()) return text;
  }
  return fault({"weight_scheme", o.weight_scheme}, kInt8WeightSchemes);
}

}  // namespace quantrain::detail
