#include "quantrain/nn/recipe.h"

// The rules of a valid recipe and its JSON form.

#include <cmath>

#include "nn/json_fields.h"
#include "nn/old_recipes.h"

namespace quantrain::nn {

using detail::check_one_of;
using detail::fail_field;
using detail::FieldsJson;
using detail::JsonReader;
using detail::JsonWriter;
using detail::number_text;

namespace {

SchemeValue scheme_of(const FieldsJson& json) {
  if (!json.is_object() || !json.contains("kind") || !json["kind"].is_string()) {
    fail_field("Recipe", "scheme to be null or an object with a kind", json.dump());
  }
  FieldsJson fields = json;
  fields.erase("kind");
  return make_scheme(json["kind"].get<std::string>(), fields.dump());
}

bool is_pattern(const std::string& text) {
  if (text == "layer" || text == "row") return true;
  const size_t colon = text.find(':');
  const auto digits = [](const std::string& part) {
    return !part.empty() && part.size() <= 2 && part.find_first_not_of("0123456789") == std::string::npos;
  };
  if (colon == std::string::npos || !digits(text.substr(0, colon)) || !digits(text.substr(colon + 1))) return false;
  const int kept = std::stoi(text.substr(0, colon)), of = std::stoi(text.substr(colon + 1));
  return kept >= 1 && kept < of && of <= 64;
}

}  // namespace

int64_t QuantSpec::quant_min() const { return symmetric ? -(int64_t{1} << (bits - 1)) : 0; }

int64_t QuantSpec::quant_max() const { return (int64_t{1} << (symmetric ? bits - 1 : bits)) - 1; }

std::vector<int64_t> QuantSpec::weight_scale_shape(const std::vector<int64_t>& weight_shape) const {
  if (granularity == Granularity::kPerTensor) return {1};
  TORCH_CHECK_VALUE(!weight_shape.empty(), "weight_scale_shape: expected a weight [O, ...], got one of no dimensions");
  std::vector<int64_t> shape(weight_shape.size(), 1);
  shape[0] = weight_shape[0];
  if (granularity == Granularity::kPerGroup && shape.size() == 2 && weight_shape[1] > 0 &&
      weight_shape[1] % group_size == 0) {
    shape[1] = weight_shape[1] / group_size;
  }
  return shape;
}

void QuantSpec::validate() const {
  static const std::string kName = kTypeName;
  if (bits < 1 || bits > 16) fail_field(kName, "bits in 1 to 16", std::to_string(bits));
  if (group_size < 1) fail_field(kName, "group_size of at least 1", std::to_string(group_size));
  if (!(averaging_constant > 0 && averaging_constant <= 1)) {
    fail_field(kName, "averaging_constant in (0, 1]", number_text(averaging_constant));
  }
  if (!(percentile > 50 && percentile <= 100)) fail_field(kName, "percentile in (50, 100]", number_text(percentile));
  if (format != Format::kInt && (bits != 4 || !symmetric)) {
    fail_field(kName, "4 bits and symmetric with format '" + name_of(format) + "'",
               std::to_string(bits) + " bits, " + (symmetric ? "symmetric" : "affine"));
  }
  if (learnable && dynamic())
    fail_field(kName, "an observer that initializes the learnable scale", "observer 'dynamic'");
  if (granularity == Granularity::kPerToken && !dynamic()) {
    fail_field(kName, "observer 'dynamic' with granularity per_token", "'" + name_of(observer) + "'");
  }
}

std::string QuantSpec::to_json() const { return detail::to_object(*this).dump(); }

QuantSpec QuantSpec::from_json(const std::string& text) {
  return detail::from_object<QuantSpec>(detail::parse_object(kTypeName, text));
}

void PruneSpec::validate() const {
  static const std::string kName = kTypeName;
  if (!(sparsity >= 0 && sparsity < 1)) fail_field(kName, "sparsity in [0, 1)", number_text(sparsity));
  if (!is_pattern(pattern)) {
    fail_field(kName, "pattern layer, row or n:m with n below m (such as 2:4)", "'" + pattern + "'");
  }
  if (scope == PruneScope::kGlobal && (needs_batches() || pattern != "layer")) {
    fail_field(kName, "score 'magnitude' and pattern 'layer' with scope 'global'",
               "'" + name_of(score) + "' and '" + pattern + "'");
  }
  if (schedule == PruneSchedule::kCubic && score == PruneScore::kSparseGpt) {
    fail_field(kName, "schedule 'one_shot' with score 'sparsegpt', which changes the weights that it keeps", "'cubic'");
  }
  if (!(begin >= 0 && begin <= end && end <= 1)) {
    fail_field(kName, "0 <= begin <= end <= 1", number_text(begin) + " and " + number_text(end));
  }
  if (every < 1) fail_field(kName, "every of at least 1", std::to_string(every));
}

int64_t PruneSpec::first_step(int64_t steps) const {
  return schedule == PruneSchedule::kOneShot ? 0 : static_cast<int64_t>(begin * static_cast<double>(steps));
}

int64_t PruneSpec::last_step(int64_t steps) const {
  return schedule == PruneSchedule::kOneShot ? 0 : static_cast<int64_t>(std::ceil(end * static_cast<double>(steps)));
}

double PruneSpec::sparsity_at(int64_t step, int64_t steps) const {
  if (schedule == PruneSchedule::kOneShot || step >= last_step(steps)) return sparsity;
  const int64_t first = first_step(steps);
  if (step <= first) return 0;
  const double left = 1 - static_cast<double>(step - first) / static_cast<double>(last_step(steps) - first);
  return sparsity * (1 - left * left * left);
}

bool PruneSpec::renews_at(int64_t step, int64_t steps) const {
  const int64_t first = first_step(steps), last = last_step(steps);
  if (schedule == PruneSchedule::kOneShot) return step == 0;
  return step == last || (step > first && step < last && (step - first) % every == 0);
}

std::string PruneSpec::to_json() const { return detail::to_object(*this).dump(); }

PruneSpec PruneSpec::from_json(const std::string& text) {
  return detail::from_object<PruneSpec>(detail::parse_object(kTypeName, text));
}

Recipe Recipe::edge() const {
  Recipe recipe = *this;
  if (edge_bits > 0) {
    if (recipe.weight) recipe.weight->bits = edge_bits;
    if (recipe.input) recipe.input->bits = edge_bits;
  }
  return recipe;
}

void Recipe::validate() const {
  static const std::string kName = kTypeName;
  if (edge_bits < 0 || edge_bits > 16) fail_field(kName, "edge_bits in 0 to 16", std::to_string(edge_bits));
  if (!weight && !input && !output && !scheme && !prune) {
    fail_field(kName, "a spec for at least one of weight, input and output, or a scheme", "none");
  }
  if (prune) prune->validate();
  if (scheme) scheme->validate();
  const auto check = [this](const char* tensor, const std::optional<QuantSpec>& spec,
                            const std::vector<std::string>& granularities) {
    if (!spec) return;
    spec->validate();
    check_one_of(kName, std::string(tensor) + " granularity", name_of(spec->granularity), granularities);
    if (spec->format != Format::kInt && !(tensor == std::string("weight") && scheme && scheme->packs_weight())) {
      fail_field(kName, std::string(tensor) + " format 'int', as others are for weights of a scheme that packs them",
                 "'" + name_of(spec->format) + "'");
    }
  };
  check("weight", weight, {"per_tensor", "per_channel", "per_group"});
  check("input", input, {"per_tensor", "per_token"});
  check("output", output, {"per_tensor", "per_token"});
  if (scheme) scheme->check_recipe(*this);
}

std::string Recipe::to_json() const {
  FieldsJson json = detail::to_object(*this);
  if (scheme) {
    JsonWriter writer;
    writer.top()["kind"] = scheme->kind();
    scheme->visit(writer);
    json["scheme"] = std::move(writer.top());
  }
  if (prune) json["prune"] = detail::to_object(*prune);
  return json.dump();
}

Recipe Recipe::from_json(const std::string& text) {
  const FieldsJson json = detail::parse_object(kTypeName, text);
  Recipe recipe;
  JsonReader reader(kTypeName, json);
  fields(recipe, reader);
  std::vector<std::string> others = detail::kOldRecipeFields;
  others.push_back("scheme");
  others.push_back("prune");
  reader.check_all_known(others);
  recipe.scheme = detail::scheme_of_old_fields(json);
  if (json.contains("scheme") && !json["scheme"].is_null()) {
    if (recipe.scheme) fail_field(kTypeName, "a scheme, or the fields of before there were schemes", "both");
    recipe.scheme = scheme_of(json["scheme"]);
  }
  if (json.contains("prune") && !json["prune"].is_null()) {
    if (!json["prune"].is_object()) fail_field(kTypeName, "prune to be null or an object", json["prune"].dump());
    recipe.prune = detail::from_object<PruneSpec>(json["prune"]);
  }
  recipe.validate();
  return recipe;
}

}  // namespace quantrain::nn
