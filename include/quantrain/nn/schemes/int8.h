// Integer matrix products of Linear layers (int8_linear, <quantrain/ops/int8_linear.h>; int8_mm). Recipes int8-training
// and int8-static.
#pragma once

#include <string>

#include "quantrain/nn/recipe.h"

namespace quantrain::nn {

// output, grad_input, grad_weight  which of the three products run in int8 while the layer trains: "int8", "none"
//                                  (floating point) or "auto" (the faster one, by device and shape)
// weight_scheme  how the weight enters grad_input: "fold", "columns" or "auto"
// training       true: layers train on int8 products (Int8Linear); weight dynamic per_channel, input dynamic per_token.
//                false: they train on fake-quantized values (QuantLinear), and only the converted layer multiplies
//                integers; weight per_channel or per_tensor; input per_token and dynamic, or per_tensor and observed
// simulate       the same codes are multiplied in float32, on any device; the converted layer dequantizes
struct QUANTRAIN_API Int8Spec : SchemeOf<Int8Spec> {
  std::string output = "auto";
  std::string grad_input = "auto";
  std::string grad_weight = "auto";
  std::string weight_scheme = "auto";
  bool training = true;
  bool simulate = false;

  static constexpr const char* kKind = "int8";
  static constexpr const char* kTypeName = "Int8Spec";
  template <typename Self, typename Visitor>
  static void fields(Self& self, Visitor&& visit) {
    visit("output", self.output);
    visit("grad_input", self.grad_input);
    visit("grad_weight", self.grad_weight);
    visit("weight_scheme", self.weight_scheme);
    visit("training", self.training);
    visit("simulate", self.simulate);
  }

  void validate() const override;
  void check_recipe(const Recipe& recipe) const override;
  void check_layer(const std::string& layer, const Recipe& recipe) const override;
  bool quantizes_gradients() const override { return training; }
  bool linear_only() const override { return true; }
  bool integer_products() const override { return !simulate; }
  at::Tensor integer_linear(const QuantModule& layer, const at::Tensor& input) const override;  // int8_mm
};

}  // namespace quantrain::nn
