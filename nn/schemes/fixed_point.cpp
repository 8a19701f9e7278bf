#include "quantrain/nn/schemes/fixed_point.h"

#include <c10/util/Exception.h>

#include "nn/fixed_point/constants.h"
#include "nn/json_fields.h"
#include "nn/named_recipes.h"
#include "nn/schemes/table.h"

namespace quantrain::nn {

using detail::check_one_of;
using detail::fail_field;

void FixedPointSpec::validate() const {
  check_one_of(kTypeName, "fraction_length", fraction_length, {"std", "mse"});
  if (!(hysteresis >= 0 && hysteresis < 1)) {
    fail_field(kTypeName, "hysteresis in [0, 1)", detail::number_text(hysteresis));
  }
}

// What an integer-only network of 8-bit codes takes.
void FixedPointSpec::check_recipe(const Recipe& recipe) const {
  static const std::string kName = Recipe::kTypeName;
  if (!recipe.weight || !recipe.input) {
    fail_field(kName, "a spec for weight and for input with fixed_point",
               recipe.weight ? "none for input" : "none for weight");
  }
  const QuantSpec &weight = *recipe.weight, &input = *recipe.input;
  if (weight.bits != 8 || input.bits != 8) {
    fail_field(kName, "weight and input of 8 bits with fixed_point",
               std::to_string(weight.bits) + " and " + std::to_string(input.bits));
  }
  if (!weight.symmetric || !weight.dynamic() || weight.learnable) {
    fail_field(kName, "a symmetric, dynamic weight with fixed_point", weight.to_json());
  }
  check_one_of(kName, "weight granularity with fixed_point", name_of(weight.granularity),
               {"per_tensor", "per_channel"});
  if (input.granularity != Granularity::kPerTensor || input.observer != ObserverKind::kMovingAverage ||
      input.learnable) {
    fail_field(kName, "a per_tensor, moving_average input with fixed_point", input.to_json());
  }
  if (recipe.output) fail_field(kName, "no output with fixed_point", "one");
  if (recipe.edge_bits != 0) fail_field(kName, "edge_bits of 0 with fixed_point", std::to_string(recipe.edge_bits));
}

void FixedPointSpec::check_layer(const std::string& layer, const Recipe& recipe) const {
  TORCH_CHECK_VALUE(layer.starts_with("FixedPoint"), layer,
                    ": expected a recipe without fixed_point (FixedPointGraph trains with it), got '", recipe.name,
                    "'");
}

SchemeEntry detail::fixed_point_entry() {
  const auto recipes = [] {
    FixedPointSpec tiny;
    tiny.fraction_length = "mse";
    tiny.clip = false;
    const QuantSpec weight = dynamic_weight(8, Granularity::kPerTensor);
    const QuantSpec input = affine_input(8, ObserverKind::kMovingAverage);
    return std::vector<Recipe>{named_recipe("f8net", weight, input, FixedPointSpec()),
                               named_recipe("f8net-tiny", weight, input, tiny)};
  };
  return {
      FixedPointSpec::kKind,    [] { return std::make_unique<FixedPointSpec>(); }, recipes, nullptr, "", kNetworkFormat,
      "FixedPointNetwork::load"};
}

}  // namespace quantrain::nn
