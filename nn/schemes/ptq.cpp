#include "quantrain/nn/schemes/ptq.h"

#include <cmath>

#include <c10/util/Exception.h>

#include "nn/json_fields.h"
#include "nn/named_recipes.h"
#include "nn/schemes/table.h"

namespace quantrain::nn {

using detail::fail_field;
using detail::number_text;

void PtqSpec::validate() const {
  static const std::string kName = kTypeName;
  detail::check_one_of(kName, "few_rows", few_rows, {"float", "int8"});
  detail::check_one_of(kName, "group_scales", group_scales, {"float", "two_level"});
  detail::check_one_of(kName, "kv_cache", kv_cache, {"float", "int8"});
  if (!(smooth_alpha >= 0 && smooth_alpha <= 1)) fail_field(kName, "smooth_alpha in [0, 1]", number_text(smooth_alpha));
  if (outlier_columns < 0 || outlier_columns > 4096) {
    fail_field(kName, "outlier_columns in 0 to 4096", std::to_string(outlier_columns));
  }
  if (!(outlier_threshold >= 0 && std::isfinite(outlier_threshold))) {
    fail_field(kName, "a finite outlier_threshold of at least 0", number_text(outlier_threshold));
  }
  if (outlier_threshold > 0 && outlier_columns == 0) {
    fail_field(kName, "outlier_columns above 0, the most there can be, with outlier_threshold", "0");
  }
  if (!(damping > 0 && std::isfinite(damping))) fail_field(kName, "damping above 0", number_text(damping));
  if (attention_bits != 0 && attention_bits != 4 && attention_bits != 8) {
    fail_field(kName, "attention_bits of 0, 4 or 8", std::to_string(attention_bits));
  }
  if (distill_steps < 0) fail_field(kName, "distill_steps of at least 0", std::to_string(distill_steps));
  if (!(distill_lr > 0 && std::isfinite(distill_lr))) fail_field(kName, "distill_lr above 0", number_text(distill_lr));
  if (distill_steps > 0 && (has_factor() || outlier_columns > 0 || rounding != Rounding::kNearest)) {
    fail_field(kName, "weights rounded to nearest alone (no factors, outlier columns or gptq) with distill_steps",
               std::to_string(distill_steps) + " steps beside one of them");
  }
  if (smooth_alpha > 0 && scale_search == ScaleSearch::kAwq) {
    fail_field(kName, "smooth_alpha or scale_search 'awq', which both choose a factor per column", "both");
  }
}

void PtqSpec::check_recipe(const Recipe& recipe) const {
  static const std::string kName = Recipe::kTypeName;
  if (!recipe.weight && kv_cache == "float")
    fail_field(kName, "a spec for weight or a kv_cache of int8 with ptq", "none");
  if (recipe.output) fail_field(kName, "no spec for output with ptq", "one");
  if (recipe.edge_bits != 0) fail_field(kName, "edge_bits of 0 with ptq", std::to_string(recipe.edge_bits));
  if (!recipe.weight) {  // the cache alone
    if (recipe.input) fail_field(kName, "a spec for input beside one for weight with ptq", "one without");
    PtqSpec alone;
    alone.kv_cache = kv_cache;
    if (!(*this == alone)) fail_field(kName, "no field of the scheme but kv_cache without a spec for weight", "others");
    return;
  }
  const QuantSpec& weight = *recipe.weight;
  if ((weight.bits != 4 && weight.bits != 8) || !weight.symmetric || weight.format != Format::kInt) {
    fail_field(kName, "weight of 4 or 8 bits, symmetric, of format int with ptq",
               std::to_string(weight.bits) + " bits, " + (weight.symmetric ? "symmetric" : "affine") + ", " +
                   name_of(weight.format));
  }
  const bool grouped = weight.granularity == Granularity::kPerGroup;
  if (!weight.dynamic() || weight.learnable || !(weight.granularity == Granularity::kPerChannel || grouped)) {
    fail_field(kName, "weight per_channel or per_group and dynamic with ptq",
               name_of(weight.granularity) + ", " + name_of(weight.observer));
  }
  if (grouped && (weight.bits == 8 || weight.group_size % 2 != 0)) {
    fail_field(kName, "weight per_group of 4 bits and an even group_size with ptq",
               std::to_string(weight.bits) + " bits, group_size " + std::to_string(weight.group_size));
  }
  // attention_bits makes weights of 8 bits, per channel, of some of the layers.
  if (group_scales == "two_level" && !grouped && attention_bits == 0) {
    fail_field(kName, "weight per_group with group_scales 'two_level'", name_of(weight.granularity));
  }
  if (!recipe.input) {
    if (weight.bits == 8 && outlier_columns > 0) {
      fail_field(kName, "a spec for input with outlier_columns and weights of 8 bits", "none");
    }
    return;
  }
  const QuantSpec& input = *recipe.input;
  const bool token = input.granularity == Granularity::kPerToken && input.dynamic();
  const bool tensor = input.granularity == Granularity::kPerTensor && input.observer == ObserverKind::kMinMax;
  if (input.bits != 8 || !input.symmetric || input.format != Format::kInt || input.learnable || !(token || tensor)) {
    fail_field(kName, "input of 8 bits, symmetric, per_token and dynamic or per_tensor and min_max, with ptq",
               std::to_string(input.bits) + " bits, " + name_of(input.granularity) + ", " + name_of(input.observer));
  }
  if (tensor && (weight.bits != 8 || outlier_columns > 0)) {
    fail_field(kName, "input per_token with weights of 4 bits or outlier_columns under ptq", "per_tensor");
  }
  if (outlier_threshold > 0 && weight.bits != 8) {
    fail_field(kName, "weight of 8 bits with outlier_threshold", std::to_string(weight.bits));
  }
}

void PtqSpec::check_layer(const std::string& layer, const Recipe& recipe) const {
  TORCH_CHECK_VALUE(layer == "PtqLinear", layer,
                    ": expected a recipe of another scheme than ptq, which PtqLinear runs, got '", recipe.name, "'");
  TORCH_CHECK_VALUE(recipe.weight, layer, ": expected a recipe with a spec for weight, got '", recipe.name, "'");
}

std::string PtqSpec::stored_form() const {
  std::string form = has_factor() ? "input_factor" : "";
  if (outlier_columns > 0) {
    form += (form.empty() ? "" : ", ") + std::string("outlier_columns ") + std::to_string(outlier_columns);
    if (outlier_threshold > 0) form += " above " + number_text(outlier_threshold);
  }
  return form;
}

SchemeEntry detail::ptq_entry() {
  const auto recipes = [] {
    std::vector<Recipe> named;
    const auto add = [&named](const char* name, int64_t bits, int64_t group_size, std::optional<QuantSpec> input,
                              const PtqSpec& scheme) {
      Recipe recipe;
      recipe.name = name;
      if (bits > 0)
        recipe.weight = dynamic_weight(bits, group_size > 0 ? Granularity::kPerGroup : Granularity::kPerChannel);
      if (group_size > 0) recipe.weight->group_size = group_size;
      recipe.input = std::move(input);
      recipe.scheme = scheme;
      recipe.training = false;
      named.push_back(std::move(recipe));
    };
    const QuantSpec token = symmetric_input(Granularity::kPerToken, ObserverKind::kDynamic);
    const QuantSpec tensor = symmetric_input(Granularity::kPerTensor, ObserverKind::kMinMax);
    const PtqSpec plain;
    PtqSpec mixed, distilled, mixed_distilled, columns, threshold, smooth, all, gptq, awq, both, cache;
    mixed.attention_bits = 8;
    distilled.distill_steps = mixed_distilled.distill_steps = 100;
    distilled.distill_lr = 5e-6;  // ZeroQuant's, of weights of 8 bits
    mixed_distilled.attention_bits = 8;
    columns.outlier_columns = 16;
    threshold.outlier_columns = 128;
    threshold.outlier_threshold = 6;
    smooth.smooth_alpha = 0.5;
    all.smooth_alpha = 0.85;
    gptq.rounding = Rounding::kGptq;
    awq.scale_search = ScaleSearch::kAwq;
    both.rounding = Rounding::kGptq;
    both.scale_search = ScaleSearch::kAwq;
    cache.kv_cache = "int8";
    add("zeroquant-w8a8", 8, 0, token, plain);
    add("zeroquant-w4a8", 4, 128, token, mixed);
    add("zeroquant-w8a8-lkd", 8, 0, token, distilled);
    add("zeroquant-w4a8-lkd", 4, 128, token, mixed_distilled);
    add("llm-int8", 8, 0, token, columns);
    add("llm-int8-threshold", 8, 0, token, threshold);
    add("smoothquant-w8a8", 8, 0, token, smooth);
    add("smoothquant-w8a8-static", 8, 0, tensor, all);
    add("gptq-w4a16", 4, 128, std::nullopt, gptq);
    add("awq-w4a16", 4, 128, std::nullopt, awq);
    add("awq-gptq-w4a8", 4, 128, token, both);
    add("kv-int8", 0, 0, std::nullopt, cache);
    return named;
  };
  return {PtqSpec::kKind, [] { return std::make_unique<PtqSpec>(); }, recipes};
}

}  // namespace quantrain::nn
