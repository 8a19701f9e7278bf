// Fixed-point training after F8Net (Jin et al., arXiv:2202.05239): tensors are integers times powers of two, weights
// hold batch norm and the scales of their neighbors, and the converted network multiplies 8-bit integers, adds and
// shifts (quantrain/nn/fixed_point/network.h). Recipes f8net and f8net-tiny.
#pragma once

#include <string>

#include "quantrain/nn/recipe.h"

namespace quantrain::nn {

// The recipe's weight is of 8 bits, symmetric, dynamic, per_tensor or per_channel (of fraction lengths); its input of 8
// bits, per_tensor, moving_average; nothing else.
//
// fraction_length    how the fraction length of a tensor is chosen: "std", from its standard deviation, or "mse", the
//                    one of least squared error
// clip               true: activations are clipped at a learned level (PACT), which is folded into the neighbours'
//                    weights; false: not clipped
// hysteresis         octaves by which a weight's standard deviation must pass a threshold before its fraction length
//                    changes; 0: none
// double_forward     true: batch statistics come from a second convolution with the unrounded weight, as published;
//                    false: from the one convolution with the rounded weight
struct QUANTRAIN_API FixedPointSpec : SchemeOf<FixedPointSpec> {
  std::string fraction_length = "std";
  bool clip = true;
  double hysteresis = 0.0;
  bool double_forward = false;

  static constexpr const char* kKind = "fixed_point";
  static constexpr const char* kTypeName = "FixedPointSpec";
  template <typename Self, typename Visitor>
  static void fields(Self& self, Visitor&& visit) {
    visit("fraction_length", self.fraction_length);
    visit("clip", self.clip);
    visit("hysteresis", self.hysteresis);
    visit("double_forward", self.double_forward);
  }

  void validate() const override;
  void check_recipe(const Recipe& recipe) const override;
  void check_layer(const std::string& layer, const Recipe& recipe) const override;
};

}  // namespace quantrain::nn
