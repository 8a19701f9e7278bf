// What the layers make of a recipe and of optional tensors before they call an operator. Private to the library.
#pragma once

#include <optional>
#include <string>

#include <ATen/core/Tensor.h>

#include "quantrain/nn/schemes/gradient_quant.h"
#include "quantrain/ops/fqt.h"

namespace quantrain::nn::detail {

inline std::optional<at::Tensor> defined_or_none(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

// The recipe's spec of grad_input or grad_weight as fqt_linear and fqt_conv2d take it.
inline GradientQuantizer gradient_quantizer(const Recipe& recipe, const std::string& tensor, bool convolution) {
  const auto* scheme = recipe.scheme_as<GradientQuantSpec>();
  if (!scheme) return {};
  const std::optional<GradientSpec>& spec = tensor == "grad_input" ? scheme->grad_input : scheme->grad_weight;
  if (!spec) return {};
  const GradientSpec resolved = spec->resolved(tensor, convolution);
  return {resolved.quantizer, resolved.bits, resolved.rows, resolved.preserve_zero, resolved.max_group};
}

}  // namespace quantrain::nn::detail
