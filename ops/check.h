// Argument checks, made once, in the operators. A message reads "op: expected <rule>, got <value>".
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <string_view>

// fmt is torch's own copy, header-only.
#ifndef FMT_HEADER_ONLY
#define FMT_HEADER_ONLY
#endif
#include <fmt/format.h>
#include <fmt/ranges.h>

// A wrong value or shape: ValueError in Python, c10::ValueError in C++.
#define QUANTRAIN_CHECK_VALUE(condition, ...) TORCH_CHECK_VALUE(condition, ::fmt::format(__VA_ARGS__))

// A wrong element type or device: TypeError in Python, c10::TypeError in C++.
#define QUANTRAIN_CHECK_TYPE(condition, ...) TORCH_CHECK_TYPE(condition, ::fmt::format(__VA_ARGS__))

namespace quantrain::detail {

inline std::string shape_text(const at::Tensor& tensor) {
  std::string text = "[";
  for (const auto& size : tensor.sym_sizes()) {
    if (text.size() > 1) text += ", ";
    text += size.maybe_as_int() ? fmt::format("{}", *size.maybe_as_int()) : "symbolic";
  }
  return text + "]";
}

}  // namespace quantrain::detail
