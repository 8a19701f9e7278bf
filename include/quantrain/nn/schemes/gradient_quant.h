// Fully quantized training: gradients are computed from a quantized gradient of the output (StatQuant, Chen et al.,
// arXiv:2010.14298). Recipes fqt-*.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "quantrain/nn/recipe.h"

namespace quantrain::nn {

// One quantized gradient: how the gradient of a layer's output is rounded before it is multiplied (quantize_gradient,
// <quantrain/ops/gradient_quant.h>; always stochastically, so that the gradients computed from it stay unbiased).
//
// quantizer      per_tensor, per_sample, per_channel or householder; "auto": the finest scale that an integer product
//                of the layer allows, per_sample for grad_input, and for grad_weight per_channel (Linear) or per_tensor
//                (convolution)
// rows           what a row of the gradient is: "sample" (dimension 0) or "token" (all dimensions but the last);
//                "auto": token for Linear, sample for convolutions
// preserve_zero  per_sample and per_channel: zero is a code of every row or column (per_tensor: it always is)
// max_group      householder: how many rows a block holds at most, 3 to 256
struct QUANTRAIN_API GradientSpec {
  int64_t bits = 8;  // 2 to 8
  std::string quantizer = "per_sample";
  std::string rows = "auto";
  bool preserve_zero = false;
  int64_t max_group = 128;

  static constexpr const char* kTypeName = "GradientSpec";
  template <typename Self, typename Visitor>
  static void fields(Self& self, Visitor&& visit) {
    visit("bits", self.bits);
    visit("quantizer", self.quantizer);
    visit("rows", self.rows);
    visit("preserve_zero", self.preserve_zero);
    visit("max_group", self.max_group);
  }

  // This spec as a layer runs it, without "auto". tensor: "grad_input" or "grad_weight".
  GradientSpec resolved(const std::string& tensor, bool convolution) const;

  // Throws std::invalid_argument naming the field, the rule and the value.
  void validate() const;

  std::string to_json() const;
  static GradientSpec from_json(const std::string& text);  // throws std::invalid_argument, as QuantSpec's

  bool operator==(const GradientSpec&) const = default;
};

// The gradient of the output as the products for the gradients of input and weight take it: Q_b2 and Q_b1 of the paper,
// two independent draws; none: in floating point. Linear layers and convolutions.
struct QUANTRAIN_API GradientQuantSpec : SchemeOf<GradientQuantSpec> {
  std::optional<GradientSpec> grad_input;
  std::optional<GradientSpec> grad_weight;

  GradientQuantSpec() = default;
  GradientQuantSpec(std::optional<GradientSpec> input, std::optional<GradientSpec> weight)
      : grad_input(std::move(input)), grad_weight(std::move(weight)) {}

  static constexpr const char* kKind = "gradient_quant";
  static constexpr const char* kTypeName = "GradientQuantSpec";
  template <typename Self, typename Visitor>
  static void fields(Self& self, Visitor&& visit) {
    visit("grad_input", self.grad_input);
    visit("grad_weight", self.grad_weight);
  }

  void validate() const override;
  void check_layer(const std::string& layer, const Recipe& recipe) const override;
  bool quantizes_gradients() const override { return grad_input || grad_weight; }
  // fqt_linear and fqt_conv2d.
  at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) const override;
  at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                    const Conv2dArguments& arguments) const override;
  std::optional<std::pair<GradientQuantizer, GradientQuantizer>> linear_quantizers() const override;
  std::optional<std::pair<GradientQuantizer, GradientQuantizer>> conv2d_quantizers() const override;
};

}  // namespace quantrain::nn
