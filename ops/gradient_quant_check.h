// The one rule of a valid gradient quantizer: of quantize_gradient's arguments, of fqt_linear's and fqt_conv2d's, and
// of a recipe's GradientSpec.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "csrc/common/gradient_quant.h"
#include "ops/common/check.h"

namespace quantrain::detail {

constexpr int kMinGradientBits = 2, kMaxGradientBits = 8;

// What is wrong, as "<rule>, got <value>", or "". field: what the quantizer's name is called; prefix: before the other
// fields' names. more: names beside the quantizers' that are allowed ("none"; "auto", which rows then take too).
template <typename Quantizer>
std::string gradient_quantizer_fault(const Quantizer& q, std::string_view field, std::string_view prefix,
                                     const std::vector<std::string_view>& more) {
  const bool automatic = std::find(more.begin(), more.end(), "auto") != more.end();
  std::vector<std::string_view> names = more, rows = {"sample", "token"};
  for (const std::string_view name : {"per_tensor", "per_sample", "per_channel", "householder"}) names.push_back(name);
  if (automatic) rows.insert(rows.begin(), "auto");
  const auto one_of = [](const std::vector<std::string_view>& words, std::string_view word) {
    return std::find(words.begin(), words.end(), word) != words.end();
  };
  if (!one_of(names, q.quantizer)) {
    return fmt::format("{} to be one of {}, got '{}'", field, fmt::join(names, ", "), q.quantizer);
  }
  if (q.bits < kMinGradientBits || q.bits > kMaxGradientBits) {
    return fmt::format("{}bits in {} to {}, got {}", prefix, kMinGradientBits, kMaxGradientBits, q.bits);
  }
  if (!one_of(rows, q.rows)) {
    return fmt::format("{}rows to be one of {}, got '{}'", prefix, fmt::join(rows, ", "), q.rows);
  }
  if (q.preserve_zero && q.quantizer == "householder") {
    return fmt::format("{}preserve_zero with another quantizer than householder, got it with householder", prefix);
  }
  if (q.max_group < 3 || q.max_group > kMaxGroup) {
    return fmt::format("{}max_group in 3 to {}, got {}", prefix, kMaxGroup, q.max_group);
  }
  return "";
}

}  // namespace quantrain::detail
