#include "quantrain/nn/schemes/int8.h"

#include <stdexcept>

#include <c10/util/Exception.h>

#include "nn/json_fields.h"
#include "nn/layer_arguments.h"
#include "nn/named_recipes.h"
#include "nn/schemes/table.h"
#include "ops/int8_linear_check.h"
#include "quantrain/nn/layers.h"
#include "quantrain/ops/fake_quant.h"
#include "quantrain/ops/int8.h"

namespace quantrain::nn {

using detail::fail_field;

void Int8Spec::validate() const {
  const std::string fault = quantrain::detail::int8_linear_fault(*this);
  if (!fault.empty()) throw std::invalid_argument(std::string(kTypeName) + ": expected " + fault);
}

// What int8_linear and int8_mm take.
void Int8Spec::check_recipe(const Recipe& recipe) const {
  static const std::string kName = Recipe::kTypeName;
  const auto check = [](const std::string& tensor, const std::optional<QuantSpec>& spec) {
    if (!spec) fail_field(kName, "a spec for " + tensor + " with int8", "none");
    if (spec->format != Format::kInt || spec->bits != 8 || !spec->symmetric) {
      fail_field(kName, tensor + " of 8 bits, symmetric, with int8",
                 std::to_string(spec->bits) + " bits, " + (spec->symmetric ? "symmetric" : "affine"));
    }
  };
  check("weight", recipe.weight);
  check("input", recipe.input);
  const QuantSpec &weight = *recipe.weight, &input = *recipe.input;
  const auto text = [](const QuantSpec& spec) { return name_of(spec.granularity) + ", " + name_of(spec.observer); };
  if (recipe.edge_bits != 0 && recipe.edge_bits != 8) {
    fail_field(kName, "edge_bits of 0 or 8 with int8", std::to_string(recipe.edge_bits));
  }
  if (weight.granularity == Granularity::kPerGroup) {
    fail_field(kName, "weight per_channel or per_tensor with int8", "per_group");
  }
  if (input.dynamic() != (input.granularity == Granularity::kPerToken)) {
    fail_field(kName, "input per_token and dynamic, or per_tensor and observed, with int8", text(input));
  }
  if (!training) return;
  if (weight.granularity != Granularity::kPerChannel || !weight.dynamic()) {
    fail_field(kName, "weight per_channel and dynamic with int8 in training", text(weight));
  }
  if (!input.dynamic()) fail_field(kName, "input per_token and dynamic with int8 in training", text(input));
}

void Int8Spec::check_layer(const std::string& layer, const Recipe& recipe) const {
  if (layer == "QuantLinear") {
    TORCH_CHECK_VALUE(!training, "QuantLinear: expected a recipe without int8 (Int8Linear trains with it), got '",
                      recipe.name, "'");
    return;
  }
  if (layer == "Int8Linear") {
    TORCH_CHECK_VALUE(training, "Int8Linear: expected a recipe with int8, got '", recipe.name, "'");
    return;
  }
  TORCH_CHECK_VALUE(false, layer, ": expected a recipe without integer products, which Linear layers have, got '",
                    recipe.name, "'");
}

at::Tensor Int8Spec::integer_linear(const QuantModule& layer, const at::Tensor& input) const {
  at::Tensor codes, scale;
  if (layer.input_fake_quant->dynamic()) {
    Int8Codes rows = quantrain::int8_quantize_rows(input);
    codes = std::move(rows.codes);
    scale = std::move(rows.scale);
  } else {
    const QuantSpec& spec = layer.input_fake_quant->spec();
    scale = layer.input_fake_quant->scale;
    codes = quantrain::quantize(input, scale, std::nullopt, spec.quant_min(), spec.quant_max(), at::kChar);
  }
  return quantrain::int8_mm(codes, layer.weight_codes, scale, layer.weight_scale, detail::defined_or_none(layer.bias),
                            detail::output_type(input));
}

SchemeEntry detail::int8_entry() {
  const auto recipes = [] {
    Int8Spec converted;
    converted.training = false;
    const QuantSpec weight = dynamic_weight(8, Granularity::kPerChannel);
    std::vector<Recipe> named;
    named.push_back(named_recipe("int8-training", weight,
                                 symmetric_input(Granularity::kPerToken, ObserverKind::kDynamic), Int8Spec()));
    named.push_back(named_recipe("int8-static", weight,
                                 symmetric_input(Granularity::kPerTensor, ObserverKind::kMovingAverage), converted));
    named.back().training = false;
    return named;
  };
  return {Int8Spec::kKind, [] { return std::make_unique<Int8Spec>(); }, recipes};
}

}  // namespace quantrain::nn
