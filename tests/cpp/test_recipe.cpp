#include <stdexcept>
#include <string>

#include <catch2/catch.hpp>

#include <quantrain/nn/recipe.h>

using Catch::Matchers::Contains;
using quantrain::nn::QuantSpec;
using quantrain::nn::Recipe;

TEST_CASE("every named recipe is valid and survives its JSON form", "[recipe]") {
  for (const std::string& name : Recipe::names()) {
    INFO(name);
    const Recipe recipe = Recipe::from_name(name);
    recipe.validate();
    CHECK(recipe.name == name);
    CHECK(Recipe::from_json(recipe.to_json()) == recipe);
  }
}

TEST_CASE("the recipes of the design are there", "[recipe]") {
  const Recipe w8a8 = Recipe::from_name("qat-w8a8");
  CHECK(w8a8.weight->granularity == "per_channel");
  CHECK(w8a8.weight->observer == "dynamic");
  CHECK(w8a8.input->observer == "moving_average");
  CHECK_FALSE(w8a8.input->symmetric);
  const Recipe w4a4 = Recipe::from_name("qat-w4a4");
  CHECK(w4a4.weight->learnable);
  CHECK(w4a4.edge().weight->bits == 8);
  CHECK(w4a4.edge().input->bits == 8);
  CHECK(Recipe::from_name("qat-w4a8").weight->group_size == 32);
  CHECK_FALSE(Recipe::from_name("ptq-w8a8").training);
  CHECK(w8a8.edge() == w8a8);
}

TEST_CASE("the codes of a spec follow its bits and symmetry", "[recipe]") {
  QuantSpec spec;
  CHECK(spec.quant_min() == -128);
  CHECK(spec.quant_max() == 127);
  spec.symmetric = false;
  spec.bits = 4;
  CHECK(spec.quant_min() == 0);
  CHECK(spec.quant_max() == 15);
  spec.symmetric = true;
  spec.bits = 1;
  CHECK(spec.quant_min() == -1);
  CHECK(spec.quant_max() == 0);
}

TEST_CASE("a spec's own JSON keeps every field", "[recipe]") {
  QuantSpec spec;
  spec.bits = 5;
  spec.symmetric = false;
  spec.granularity = "per_channel";
  spec.group_size = 7;
  spec.observer = "percentile";
  spec.learnable = true;
  spec.averaging_constant = 0.1 + 1e-17;
  spec.percentile = 99.123456789012345;
  spec.nan_policy = "skip";
  CHECK(QuantSpec::from_json(spec.to_json()) == spec);
}

TEST_CASE("an unknown recipe name lists the known ones", "[recipe]") {
  CHECK_THROWS_WITH(Recipe::from_name("qat"), Contains("expected name to be one of qat-w8a8") && Contains("got 'qat'"));
}

TEST_CASE("JSON that is not a recipe is refused with the field, the rule and the value", "[recipe]") {
  const auto refused = [](const std::string& text, const std::string& rule, const std::string& value) {
    INFO(text);
    CHECK_THROWS_AS(Recipe::from_json(text), std::invalid_argument);
    CHECK_THROWS_WITH(Recipe::from_json(text), Contains(rule) && Contains(value));
  };
  refused("", "a JSON object", "''");
  refused("[1]", "a JSON object", "[1]");
  refused(R"({"weight": {"bits": 8})", "a JSON object", "weight");
  refused(R"({"wieght": {}})", "only fields of a Recipe", "'wieght'");
  refused(R"({"weight": {"bit": 8}})", "only fields of a QuantSpec", "'bit'");
  refused(R"({"weight": {"bits": 8.5}})", "bits to be an integer", "8.5");
  refused(R"({"weight": {"bits": "8"}})", "bits to be an integer", "8");
  refused(R"({"weight": {"symmetric": 1}})", "symmetric to be true or false", "1");
  refused(R"({"weight": 8})", "weight to be null or an object", "8");
  refused(R"({"weight": {}, "name": 3})", "name to be a string", "3");
  refused(R"({"name": "empty"})", "at least one of weight, input and output", "none");
}

TEST_CASE("a value outside its rule is refused", "[recipe]") {
  const auto refused = [](auto change, const std::string& rule) {
    QuantSpec spec;
    change(spec);
    CHECK_THROWS_AS(spec.validate(), std::invalid_argument);
    CHECK_THROWS_WITH(spec.validate(), Contains(rule));
  };
  refused([](QuantSpec& s) { s.bits = 0; }, "bits in 1 to 16, got 0");
  refused([](QuantSpec& s) { s.bits = 17; }, "bits in 1 to 16, got 17");
  refused([](QuantSpec& s) { s.granularity = "per_row"; }, "got 'per_row'");
  refused([](QuantSpec& s) { s.observer = "max"; }, "got 'max'");
  refused([](QuantSpec& s) { s.nan_policy = "ignore"; }, "got 'ignore'");
  refused([](QuantSpec& s) { s.group_size = 0; }, "group_size of at least 1, got 0");
  refused([](QuantSpec& s) { s.averaging_constant = 0; }, "averaging_constant in (0, 1], got 0");
  refused([](QuantSpec& s) { s.percentile = 50; }, "percentile in (50, 100], got 50");
  refused([](QuantSpec& s) { s.learnable = true, s.observer = "dynamic"; }, "an observer that initialises");
  refused([](QuantSpec& s) { s.granularity = "per_token"; }, "observer 'dynamic' with granularity per_token");

  Recipe recipe = Recipe::from_name("qat-w8a8");
  recipe.backend = "int8";
  CHECK_THROWS_WITH(recipe.validate(), Contains("backend to be one of simulate, got 'int8'"));
  recipe = Recipe::from_name("qat-w8a8");
  recipe.input->granularity = "per_channel";
  CHECK_THROWS_WITH(recipe.validate(), Contains("input granularity"));
  recipe = Recipe::from_name("qat-w8a8-token");
  recipe.weight = recipe.input;
  CHECK_THROWS_WITH(recipe.validate(), Contains("weight granularity"));
  recipe = Recipe::from_name("qat-w8a8");
  recipe.edge_bits = 20;
  CHECK_THROWS_WITH(recipe.validate(), Contains("edge_bits in 0 to 16, got 20"));
}
