#include "quantrain/nn/recipe.h"

// Named recipes, the rules of a valid recipe, and the JSON form. The JSON holds every field under its C++ name; on
// reading, a missing field takes its default and an unknown one is an error, so that a misspelt field never passes in
// silence.

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>
#include <utility>

#include <nlohmann/json.hpp>

#include "nn/json.h"

namespace quantrain::nn {
namespace {

using Json = nlohmann::ordered_json;

[[noreturn]] void fail(const std::string& name, const std::string& rule, const std::string& value) {
  throw std::invalid_argument(name + ": expected " + rule + ", got " + value);
}

std::string join(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) {
    text += (text.empty() ? "" : ", ") + word;
  }
  return text;
}

std::string number(double value) { return std::isfinite(value) ? Json(value).dump() : std::to_string(value); }

void check_one_of(const std::string& name, const std::string& field, const std::string& value,
                  const std::vector<std::string>& allowed) {
  if (std::find(allowed.begin(), allowed.end(), value) == allowed.end()) {
    fail(name, field + " to be one of " + join(allowed), "'" + value + "'");
  }
}

Json parse_object(const std::string& name, const std::string& text) {
  Json json = detail::parse_json(text);
  if (!json.is_object()) {
    fail(name, "a JSON object", "'" + text.substr(0, 40) + "'");
  }
  return json;
}

void read_field(const std::string& name, const std::string& key, const Json& value, bool& out) {
  if (!value.is_boolean()) fail(name, key + " to be true or false", value.dump());
  out = value.get<bool>();
}

void read_field(const std::string& name, const std::string& key, const Json& value, int64_t& out) {
  if (!value.is_number_integer()) fail(name, key + " to be an integer", value.dump());
  out = value.get<int64_t>();
}

void read_field(const std::string& name, const std::string& key, const Json& value, double& out) {
  if (!value.is_number()) fail(name, key + " to be a number", value.dump());
  out = value.get<double>();
}

void read_field(const std::string& name, const std::string& key, const Json& value, std::string& out) {
  if (!value.is_string()) fail(name, key + " to be a string", value.dump());
  out = value.get<std::string>();
}

Json to_object(const QuantSpec& spec) {
  return Json{{"bits", spec.bits},
              {"symmetric", spec.symmetric},
              {"granularity", spec.granularity},
              {"group_size", spec.group_size},
              {"observer", spec.observer},
              {"learnable", spec.learnable},
              {"averaging_constant", spec.averaging_constant},
              {"percentile", spec.percentile},
              {"nan_policy", spec.nan_policy}};
}

QuantSpec spec_from_object(const Json& json) {
  static const std::string kName = "QuantSpec";
  QuantSpec spec;
  for (const auto& [key, value] : json.items()) {
    if (key == "bits")
      read_field(kName, key, value, spec.bits);
    else if (key == "symmetric")
      read_field(kName, key, value, spec.symmetric);
    else if (key == "granularity")
      read_field(kName, key, value, spec.granularity);
    else if (key == "group_size")
      read_field(kName, key, value, spec.group_size);
    else if (key == "observer")
      read_field(kName, key, value, spec.observer);
    else if (key == "learnable")
      read_field(kName, key, value, spec.learnable);
    else if (key == "averaging_constant")
      read_field(kName, key, value, spec.averaging_constant);
    else if (key == "percentile")
      read_field(kName, key, value, spec.percentile);
    else if (key == "nan_policy")
      read_field(kName, key, value, spec.nan_policy);
    else
      fail(kName, "only fields of a QuantSpec", "'" + key + "'");
  }
  spec.validate();
  return spec;
}

Json to_object(const GradientSpec& spec) {
  return Json{{"bits", spec.bits},
              {"quantizer", spec.quantizer},
              {"rows", spec.rows},
              {"preserve_zero", spec.preserve_zero},
              {"max_group", spec.max_group}};
}

GradientSpec gradient_spec_from_object(const Json& json) {
  static const std::string kName = "GradientSpec";
  GradientSpec spec;
  for (const auto& [key, value] : json.items()) {
    if (key == "bits")
      read_field(kName, key, value, spec.bits);
    else if (key == "quantizer")
      read_field(kName, key, value, spec.quantizer);
    else if (key == "rows")
      read_field(kName, key, value, spec.rows);
    else if (key == "preserve_zero")
      read_field(kName, key, value, spec.preserve_zero);
    else if (key == "max_group")
      read_field(kName, key, value, spec.max_group);
    else
      fail(kName, "only fields of a GradientSpec", "'" + key + "'");
  }
  spec.validate();
  return spec;
}

Json to_object(const Int8Spec& spec) {
  return Json{{"output", spec.output},
              {"grad_input", spec.grad_input},
              {"grad_weight", spec.grad_weight},
              {"weight_scheme", spec.weight_scheme}};
}

Int8Spec int8_spec_from_object(const Json& json) {
  static const std::string kName = "Int8Spec";
  Int8Spec spec;
  for (const auto& [key, value] : json.items()) {
    if (key == "output")
      read_field(kName, key, value, spec.output);
    else if (key == "grad_input")
      read_field(kName, key, value, spec.grad_input);
    else if (key == "grad_weight")
      read_field(kName, key, value, spec.grad_weight);
    else if (key == "weight_scheme")
      read_field(kName, key, value, spec.weight_scheme);
    else
      fail(kName, "only fields of an Int8Spec", "'" + key + "'");
  }
  spec.validate();
  return spec;
}

Json to_object(const FixedPointSpec& spec) {
  return Json{{"fraction_length", spec.fraction_length},
              {"clip", spec.clip},
              {"hysteresis", spec.hysteresis},
              {"double_forward", spec.double_forward}};
}

FixedPointSpec fixed_point_spec_from_object(const Json& json) {
  static const std::string kName = "FixedPointSpec";
  FixedPointSpec spec;
  for (const auto& [key, value] : json.items()) {
    if (key == "fraction_length")
      read_field(kName, key, value, spec.fraction_length);
    else if (key == "clip")
      read_field(kName, key, value, spec.clip);
    else if (key == "hysteresis")
      read_field(kName, key, value, spec.hysteresis);
    else if (key == "double_forward")
      read_field(kName, key, value, spec.double_forward);
    else
      fail(kName, "only fields of a FixedPointSpec", "'" + key + "'");
  }
  spec.validate();
  return spec;
}

template <typename Spec>
Json optional_to_object(const std::optional<Spec>& spec) {
  return spec ? to_object(*spec) : Json(nullptr);
}

void from_object(const Json& json, std::optional<QuantSpec>& out) { out = spec_from_object(json); }
void from_object(const Json& json, std::optional<GradientSpec>& out) { out = gradient_spec_from_object(json); }
void from_object(const Json& json, std::optional<Int8Spec>& out) { out = int8_spec_from_object(json); }
void from_object(const Json& json, std::optional<FixedPointSpec>& out) { out = fixed_point_spec_from_object(json); }

template <typename Spec>
void read_field(const std::string& name, const std::string& key, const Json& value, std::optional<Spec>& out) {
  if (value.is_null()) {
    out.reset();
    return;
  }
  if (!value.is_object()) fail(name, key + " to be null or an object", value.dump());
  from_object(value, out);
}

// The parts the named recipes are made of.

QuantSpec dynamic_weight(int64_t bits, const std::string& granularity) {
  QuantSpec spec;
  spec.bits = bits;
  spec.granularity = granularity;
  spec.observer = "dynamic";
  return spec;
}

QuantSpec symmetric_input(const std::string& granularity, const std::string& observer) {
  QuantSpec spec;
  spec.granularity = granularity;
  spec.observer = observer;
  return spec;
}

QuantSpec affine_input(int64_t bits, const std::string& observer) {
  QuantSpec spec;
  spec.bits = bits;
  spec.symmetric = false;
  spec.observer = observer;
  return spec;
}

// "fqt-8", or "fqt-<ptq|psq|bhq><bits>" with or without "-paper"; none where `name` is neither. Forward as qat-w8a8.
//
// As they are: scales that an integer product allows. "-paper": as the authors trained, rows are samples everywhere and
// grad_weight has a range for each column over the samples (per tensor for ptq).
std::optional<Recipe> fqt_recipe(const std::string& name) {
  static const std::map<std::string, std::string> kQuantizers = {
      {"ptq", "per_tensor"}, {"psq", "per_sample"}, {"bhq", "householder"}};
  // Not by std::regex, whose symbols libtorch exports too: with another compiler's version of them it crashes.
  std::string rest = name == "fqt-8" ? "fqt-psq8" : name;
  const bool paper = rest.size() > 6 && rest.compare(rest.size() - 6, 6, "-paper") == 0;
  if (paper) rest.resize(rest.size() - 6);
  if (rest.size() != 8 || rest.compare(0, 4, "fqt-") != 0 || rest[7] < '2' || rest[7] > '8') return std::nullopt;
  const std::string quantizer = rest.substr(4, 3);
  if (!kQuantizers.contains(quantizer)) return std::nullopt;
  Recipe recipe;
  recipe.name = name;
  recipe.weight = dynamic_weight(8, "per_channel");
  recipe.input = affine_input(8, "moving_average");
  recipe.grad_input = GradientSpec{rest[7] - '0', kQuantizers.at(quantizer), paper ? "sample" : "auto"};
  const std::string columns = quantizer == "ptq" ? "per_tensor" : "per_channel";
  recipe.grad_weight = GradientSpec{8, paper ? columns : "auto", paper ? "sample" : "auto"};
  return recipe;
}

// What int8_linear and int8_mm take.
void check_integer_products(const Recipe& recipe) {
  static const std::string kName = "Recipe";
  const std::string whose = recipe.int8 ? "with int8" : "with backend int8";
  const auto check = [&](const std::string& tensor, const std::optional<QuantSpec>& spec) {
    if (!spec) fail(kName, "a spec for " + tensor + " " + whose, "none");
    if (spec->bits != 8 || !spec->symmetric) {
      fail(kName, tensor + " of 8 bits, symmetric, " + whose,
           std::to_string(spec->bits) + " bits, " + (spec->symmetric ? "symmetric" : "affine"));
    }
  };
  check("weight", recipe.weight);
  check("input", recipe.input);
  const bool dynamic = recipe.input->observer == "dynamic";
  if (recipe.edge_bits != 0 && recipe.edge_bits != 8) {
    fail(kName, "edge_bits of 0 or 8 " + whose, std::to_string(recipe.edge_bits));
  }
  if (recipe.weight->granularity == "per_group") fail(kName, "weight per_channel or per_tensor " + whose, "per_group");
  if (dynamic != (recipe.input->granularity == "per_token")) {
    fail(kName, "input per_token and dynamic, or per_tensor and observed, " + whose,
         recipe.input->granularity + ", " + recipe.input->observer);
  }
  if (!recipe.int8) return;
  if (recipe.weight->granularity != "per_channel" || recipe.weight->observer != "dynamic") {
    fail(kName, "weight per_channel and dynamic with int8",
         recipe.weight->granularity + ", " + recipe.weight->observer);
  }
  if (!dynamic) fail(kName, "input per_token and dynamic with int8", "per_tensor, " + recipe.input->observer);
  if (recipe.grad_input || recipe.grad_weight) {
    fail(kName, "no grad_input or grad_weight with int8 (it has its own)", "one of them");
  }
}

// What an integer-only network of 8-bit codes takes.
void check_fixed_point(const Recipe& recipe) {
  static const std::string kName = "Recipe";
  if (!recipe.weight || !recipe.input) {
    fail(kName, "a spec for weight and for input with fixed_point",
         recipe.weight ? "none for input" : "none for weight");
  }
  if (recipe.weight->bits != 8 || recipe.input->bits != 8) {
    fail(kName, "weight and input of 8 bits with fixed_point",
         std::to_string(recipe.weight->bits) + " and " + std::to_string(recipe.input->bits));
  }
  if (!recipe.weight->symmetric || recipe.weight->observer != "dynamic" || recipe.weight->learnable) {
    fail(kName, "a symmetric, dynamic weight with fixed_point", recipe.weight->to_json());
  }
  check_one_of(kName, "weight granularity with fixed_point", recipe.weight->granularity, {"per_tensor", "per_channel"});
  if (recipe.input->granularity != "per_tensor" || recipe.input->observer != "moving_average" ||
      recipe.input->learnable) {
    fail(kName, "a per_tensor, moving_average input with fixed_point", recipe.input->to_json());
  }
  if (recipe.output || recipe.grad_input || recipe.grad_weight || recipe.int8) {
    fail(kName, "no output, grad_input, grad_weight or int8 with fixed_point", "one of them");
  }
  if (recipe.edge_bits != 0) fail(kName, "edge_bits of 0 with fixed_point", std::to_string(recipe.edge_bits));
  if (recipe.backend != "simulate") fail(kName, "backend simulate with fixed_point", "'" + recipe.backend + "'");
}

std::vector<std::string> fqt_names() {
  std::vector<std::string> names = {"fqt-8"};
  for (const char* mode : {"", "-paper"})
    for (const char* quantizer : {"ptq", "psq", "bhq"})
      for (const char* bits : {"8", "5", "4"}) names.push_back(std::string("fqt-") + quantizer + bits + mode);
  return names;
}

std::vector<Recipe> named_recipes() {
  std::vector<Recipe> recipes;
  const auto add = [&recipes](const std::string& name, QuantSpec weight, QuantSpec input) -> Recipe& {
    Recipe recipe;
    recipe.name = name;
    recipe.weight = std::move(weight);
    recipe.input = std::move(input);
    return recipes.emplace_back(std::move(recipe));
  };
  add("qat-w8a8", dynamic_weight(8, "per_channel"), affine_input(8, "moving_average"));

  QuantSpec token = affine_input(8, "dynamic");
  token.granularity = "per_token";
  add("qat-w8a8-token", dynamic_weight(8, "per_channel"), token);

  add("qat-w4a8", dynamic_weight(4, "per_group"), affine_input(8, "moving_average"));

  QuantSpec weight = dynamic_weight(4, "per_channel");
  weight.observer = "mse";
  weight.learnable = true;
  QuantSpec input = affine_input(4, "mse");
  input.learnable = true;
  add("qat-w4a4", weight, input).edge_bits = 8;

  add("ptq-w8a8", dynamic_weight(8, "per_channel"), affine_input(8, "mse")).training = false;

  QuantSpec groups = dynamic_weight(4, "per_group");
  groups.observer = "mse";
  add("ptq-w4a8", groups, affine_input(8, "mse")).training = false;

  Recipe& int8 = add("int8-training", dynamic_weight(8, "per_channel"), symmetric_input("per_token", "dynamic"));
  int8.backend = "int8";
  int8.int8 = Int8Spec{};
  Recipe& fixed = add("int8-static", dynamic_weight(8, "per_channel"), symmetric_input("per_tensor", "moving_average"));
  fixed.backend = "int8";
  fixed.training = false;
  for (const std::string& name : fqt_names()) recipes.push_back(*fqt_recipe(name));

  Recipe& f8net = add("f8net", dynamic_weight(8, "per_tensor"), affine_input(8, "moving_average"));
  f8net.fixed_point = FixedPointSpec{};
  Recipe& tiny = add("f8net-tiny", dynamic_weight(8, "per_tensor"), affine_input(8, "moving_average"));
  tiny.fixed_point = FixedPointSpec{"mse", /*clip=*/false};
  return recipes;
}

}  // namespace

int64_t QuantSpec::quant_min() const { return symmetric ? -(int64_t{1} << (bits - 1)) : 0; }

int64_t QuantSpec::quant_max() const { return (int64_t{1} << (symmetric ? bits - 1 : bits)) - 1; }

void QuantSpec::validate() const {
  static const std::string kName = "QuantSpec";
  if (bits < 1 || bits > 16) fail(kName, "bits in 1 to 16", std::to_string(bits));
  check_one_of(kName, "granularity", granularity, {"per_tensor", "per_channel", "per_group", "per_token"});
  check_one_of(kName, "observer", observer, {"dynamic", "min_max", "moving_average", "percentile", "mse"});
  check_one_of(kName, "nan_policy", nan_policy, {"raise", "skip"});
  if (group_size < 1) fail(kName, "group_size of at least 1", std::to_string(group_size));
  if (!(averaging_constant > 0 && averaging_constant <= 1)) {
    fail(kName, "averaging_constant in (0, 1]", number(averaging_constant));
  }
  if (!(percentile > 50 && percentile <= 100)) fail(kName, "percentile in (50, 100]", number(percentile));
  if (learnable && observer == "dynamic") {
    fail(kName, "an observer that initialises the learnable scale", "observer 'dynamic'");
  }
  if (granularity == "per_token" && observer != "dynamic") {
    fail(kName, "observer 'dynamic' with granularity per_token", "'" + observer + "'");
  }
}

std::string QuantSpec::to_json() const { return to_object(*this).dump(); }

QuantSpec QuantSpec::from_json(const std::string& text) { return spec_from_object(parse_object("QuantSpec", text)); }

GradientSpec GradientSpec::resolved(const std::string& tensor, bool convolution) const {
  check_one_of("GradientSpec", "tensor", tensor, {"grad_input", "grad_weight"});
  GradientSpec spec = *this;
  if (spec.quantizer == "auto") {
    spec.quantizer = tensor == "grad_input" ? "per_sample" : convolution ? "per_tensor" : "per_channel";
  }
  if (spec.rows == "auto") spec.rows = convolution ? "sample" : "token";
  return spec;
}

void GradientSpec::validate() const {
  static const std::string kName = "GradientSpec";
  if (bits < 2 || bits > 8) fail(kName, "bits in 2 to 8", std::to_string(bits));
  check_one_of(kName, "quantizer", quantizer, {"auto", "per_tensor", "per_sample", "per_channel", "householder"});
  check_one_of(kName, "rows", rows, {"auto", "sample", "token"});
  if (preserve_zero && quantizer == "householder") {
    fail(kName, "another quantizer than householder with preserve_zero", "'householder'");
  }
  if (max_group < 3 || max_group > 256) fail(kName, "max_group in 3 to 256", std::to_string(max_group));
}

std::string GradientSpec::to_json() const { return to_object(*this).dump(); }

GradientSpec GradientSpec::from_json(const std::string& text) {
  return gradient_spec_from_object(parse_object("GradientSpec", text));
}

void Int8Spec::validate() const {
  static const std::string kName = "Int8Spec";
  check_one_of(kName, "output", output, {"auto", "int8", "none"});
  check_one_of(kName, "grad_input", grad_input, {"auto", "int8", "none"});
  check_one_of(kName, "grad_weight", grad_weight, {"auto", "int8", "none"});
  check_one_of(kName, "weight_scheme", weight_scheme, {"auto", "fold", "columns"});
}

std::string Int8Spec::to_json() const { return to_object(*this).dump(); }

Int8Spec Int8Spec::from_json(const std::string& text) { return int8_spec_from_object(parse_object("Int8Spec", text)); }

void FixedPointSpec::validate() const {
  static const std::string kName = "FixedPointSpec";
  check_one_of(kName, "fraction_length", fraction_length, {"std", "mse"});
  if (!(hysteresis >= 0 && hysteresis < 1)) fail(kName, "hysteresis in [0, 1)", number(hysteresis));
}

std::string FixedPointSpec::to_json() const { return to_object(*this).dump(); }

FixedPointSpec FixedPointSpec::from_json(const std::string& text) {
  return fixed_point_spec_from_object(parse_object("FixedPointSpec", text));
}

Recipe Recipe::from_name(const std::string& name) {
  if (std::optional<Recipe> recipe = fqt_recipe(name)) return *std::move(recipe);
  for (Recipe& recipe : named_recipes()) {
    if (recipe.name == name) return std::move(recipe);
  }
  fail("Recipe", "name to be one of " + join(names()), "'" + name + "'");
}

std::vector<std::string> Recipe::names() {
  std::vector<std::string> names;
  for (const Recipe& recipe : named_recipes()) {
    names.push_back(recipe.name);
  }
  return names;
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
  static const std::string kName = "Recipe";
  check_one_of(kName, "backend", backend, {"simulate", "int8"});
  if (edge_bits < 0 || edge_bits > 16) fail(kName, "edge_bits in 0 to 16", std::to_string(edge_bits));
  if (!weight && !input && !output && !grad_input && !grad_weight) {
    fail(kName, "a spec for at least one of weight, input, output, grad_input and grad_weight", "none");
  }
  if (weight) {
    weight->validate();
    check_one_of(kName, "weight granularity", weight->granularity, {"per_tensor", "per_channel", "per_group"});
  }
  if (input) {
    input->validate();
    check_one_of(kName, "input granularity", input->granularity, {"per_tensor", "per_token"});
  }
  if (output) {
    output->validate();
    check_one_of(kName, "output granularity", output->granularity, {"per_tensor", "per_token"});
  }
  if (grad_input) grad_input->validate();
  if (grad_weight) grad_weight->validate();
  if (int8) int8->validate();
  if (linear_only()) check_integer_products(*this);
  if (fixed_point) {
    fixed_point->validate();
    check_fixed_point(*this);
  }
}

std::string Recipe::to_json() const {
  Json json{{"name", name},
            {"weight", optional_to_object(weight)},
            {"input", optional_to_object(input)},
            {"output", optional_to_object(output)},
            {"backend", backend},
            {"training", training},
            {"edge_bits", edge_bits},
            {"grad_input", optional_to_object(grad_input)},
            {"grad_weight", optional_to_object(grad_weight)}};
  // Absent otherwise: files written before they existed stay equal.
  if (int8) json["int8"] = to_object(*int8);
  if (fixed_point) json["fixed_point"] = to_object(*fixed_point);
  return json.dump();
}

Recipe Recipe::from_json(const std::string& text) {
  static const std::string kName = "Recipe";
  Recipe recipe;
  const Json json = parse_object(kName, text);
  for (const auto& [key, value] : json.items()) {
    if (key == "name")
      read_field(kName, key, value, recipe.name);
    else if (key == "weight")
      read_field(kName, key, value, recipe.weight);
    else if (key == "input")
      read_field(kName, key, value, recipe.input);
    else if (key == "output")
      read_field(kName, key, value, recipe.output);
    else if (key == "backend")
      read_field(kName, key, value, recipe.backend);
    else if (key == "training")
      read_field(kName, key, value, recipe.training);
    else if (key == "edge_bits")
      read_field(kName, key, value, recipe.edge_bits);
    else if (key == "grad_input")
      read_field(kName, key, value, recipe.grad_input);
    else if (key == "grad_weight")
      read_field(kName, key, value, recipe.grad_weight);
    else if (key == "int8")
      read_field(kName, key, value, recipe.int8);
    else if (key == "fixed_point")
      read_field(kName, key, value, recipe.fixed_point);
    else
      fail(kName, "only fields of a Recipe", "'" + key + "'");
  }
  recipe.validate();
  return recipe;
}

}  // namespace quantrain::nn
