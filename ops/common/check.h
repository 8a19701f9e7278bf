// Argument checks, made once, in the operators. A message reads "op: expected <rule>, got <value>".
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <limits>
#include <string>
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

namespace quantrain {

// Far beyond any image, and small enough that twice a padding, or a stride times a size of a tensor in memory, does not
// wrap.
constexpr int64_t kMaxWindow = std::numeric_limits<int32_t>::max();

}  // namespace quantrain

namespace quantrain::detail {

inline std::string shape_text(const at::Tensor& tensor) {
  std::string text = "[";
  for (const auto& size : tensor.sym_sizes()) {
    if (text.size() > 1) text += ", ";
    text += size.maybe_as_int() ? fmt::format("{}", *size.maybe_as_int()) : "symbolic";
  }
  return text + "]";
}

// The element type of that name in PyTorch. A schema that takes the name, unlike one that takes a ScalarType, can be
// packed by AOTInductor: torch 2.11 hands a packed program's kernels the wrong type (pytorch #169157).
inline at::ScalarType named_type(std::string_view op, std::string_view argument, std::string_view name) {
  if (name == "float32") return at::kFloat;
  if (name == "float64") return at::kDouble;
  if (name == "float16") return at::kHalf;
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "int8") return at::kChar;
  if (name == "uint8") return at::kByte;
  if (name == "int16") return at::kShort;
  QUANTRAIN_CHECK_VALUE(
      name == "int32",
      "{}: expected {} to be one of float64, float32, float16, bfloat16, int8, uint8, int16, int32, got '{}'", op,
      argument, name);
  return at::kInt;
}

// The verbs: what most operators ask of a tensor, and how each says it.

inline void check_dense(std::string_view op, std::string_view name, const at::Tensor& tensor) {
  QUANTRAIN_CHECK_TYPE(tensor.layout() == at::kStrided, "{}: expected a dense {}, got layout {}", op, name,
                       c10::str(tensor.layout()));
}

// whose: of `other`, as "input's".
inline void check_device(std::string_view op, std::string_view name, const at::Tensor& tensor, const at::Tensor& other,
                         std::string_view whose) {
  QUANTRAIN_CHECK_TYPE(tensor.device() == other.device(), "{}: expected {} on {} device {}, got {}", op, name, whose,
                       other.device().str(), tensor.device().str());
}

inline void check_type(std::string_view op, std::string_view name, const at::Tensor& tensor, at::ScalarType type,
                       std::string_view type_name) {
  QUANTRAIN_CHECK_TYPE(tensor.scalar_type() == type, "{}: expected {} of {}, got {}", op, name, type_name,
                       c10::toString(tensor.scalar_type()));
}

inline void check_float(std::string_view op, std::string_view name, at::ScalarType type) {
  QUANTRAIN_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16,
                       "{}: expected {} of float32, float16 or bfloat16, got {}", op, name, c10::toString(type));
}

}  // namespace quantrain::detail
