#include <stdexcept>
#include <string>

#include <catch2/catch.hpp>

#include <quantrain/nn/recipe.h>
#include <quantrain/nn/schemes/fixed_point.h>
#include <quantrain/nn/schemes/gradient_quant.h>
#include <quantrain/nn/schemes/int8.h>

using Catch::Matchers::Contains;
using quantrain::nn::Format;
using quantrain::nn::GradientQuantSpec;
using quantrain::nn::GradientSpec;
using quantrain::nn::Granularity;
using quantrain::nn::NanPolicy;
using quantrain::nn::ObserverKind;
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
  CHECK(w8a8.weight->granularity == Granularity::kPerChannel);
  CHECK(w8a8.weight->observer == ObserverKind::kDynamic);
  CHECK(w8a8.input->observer == ObserverKind::kMovingAverage);
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
  spec.granularity = Granularity::kPerChannel;
  spec.group_size = 7;
  spec.observer = ObserverKind::kPercentile;
  spec.learnable = true;
  spec.averaging_constant = 0.1 + 1e-17;
  spec.percentile = 99.123456789012345;
  spec.nan_policy = NanPolicy::kSkip;
  CHECK(QuantSpec::from_json(spec.to_json()) == spec);
}

TEST_CASE("recipes with quantized gradients: hardware and paper mode", "[recipe][fqt]") {
  const Recipe qat = Recipe::from_name("qat-w8a8");
  const Recipe bhq = Recipe::from_name("fqt-bhq5");
  CHECK(bhq.weight == qat.weight);
  CHECK(bhq.input == qat.input);
  const auto gradients = [](const Recipe& recipe) { return *recipe.scheme_as<GradientQuantSpec>(); };
  CHECK(*gradients(bhq).grad_input == GradientSpec{5, "householder", "auto"});
  CHECK(gradients(bhq).grad_weight->resolved("grad_weight", false) == GradientSpec{8, "per_channel", "token"});
  CHECK(gradients(bhq).grad_weight->resolved("grad_weight", true) == GradientSpec{8, "per_tensor", "sample"});
  CHECK(gradients(bhq).grad_input->resolved("grad_input", true) == GradientSpec{5, "householder", "sample"});
  CHECK(GradientSpec{8, "auto"}.resolved("grad_input", true).quantizer == "per_sample");

  const Recipe paper = Recipe::from_name("fqt-psq4-paper");
  CHECK(*gradients(paper).grad_input == GradientSpec{4, "per_sample", "sample"});
  CHECK(*gradients(paper).grad_weight == GradientSpec{8, "per_channel", "sample"});
  CHECK(gradients(Recipe::from_name("fqt-ptq4-paper")).grad_weight->quantizer == "per_tensor");

  Recipe eight = Recipe::from_name("fqt-8");
  eight.name = "fqt-psq8";
  CHECK(eight == Recipe::from_name("fqt-psq8"));
  for (const char* bits : {"2", "3", "6", "7"}) {
    CHECK(std::to_string(gradients(Recipe::from_name(std::string("fqt-bhq") + bits)).grad_input->bits) == bits);
  }
  for (const char* name : {"fqt", "fqt-5", "fqt-bhq1", "fqt-bhq9", "fqt-bhq55", "fqt-bhq5-papers", "fqt-xyz5"}) {
    INFO(name);
    CHECK_THROWS_WITH(Recipe::from_name(name), Contains("expected name to be one of qat-w8a8"));
  }
  CHECK_THROWS_WITH(gradients(bhq).grad_input->resolved("gradient", true),
                    Contains("grad_input, grad_weight, got 'gradient'"));
}

TEST_CASE("a gradient spec's own JSON keeps every field, and refuses others", "[recipe][fqt]") {
  const GradientSpec spec{3, "per_sample", "token", true, 17};
  CHECK(GradientSpec::from_json(spec.to_json()) == spec);
  CHECK_THROWS_WITH(GradientSpec::from_json(R"({"bit": 8})"), Contains("only fields of a GradientSpec, got 'bit'"));
  CHECK_THROWS_WITH(Recipe::from_json(R"({"grad_input": {"bits": 1}})"), Contains("bits in 2 to 8, got 1"));
  CHECK_THROWS_WITH(Recipe::from_json(R"({"grad_weight": 8})"), Contains("grad_weight to be null or an object"));

  const auto refused = [](GradientSpec value, const std::string& rule) {
    CHECK_THROWS_AS(value.validate(), std::invalid_argument);
    CHECK_THROWS_WITH(value.validate(), Contains(rule));
  };
  refused({9}, "bits in 2 to 8, got 9");
  refused({8, "none"}, "quantizer to be one of auto, per_tensor, per_sample, per_channel, householder, got 'none'");
  refused({8, "per_sample", "row"}, "rows to be one of auto, sample, token, got 'row'");
  refused({8, "householder", "auto", true}, "preserve_zero with another quantizer than householder");
  refused({8, "householder", "auto", false, 2}, "max_group in 3 to 256, got 2");
  refused({8, "householder", "auto", false, 257}, "max_group in 3 to 256, got 257");

  Recipe gradients_only;
  gradients_only.scheme = GradientQuantSpec(GradientSpec{}, std::nullopt);
  gradients_only.validate();
  gradients_only.scheme_as<GradientQuantSpec>()->grad_input->bits = 0;
  CHECK_THROWS_WITH(gradients_only.validate(), Contains("bits in 2 to 8, got 0"));
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
  refused(R"({"weight": {"granularity": "per_row"}})", "granularity to be one of per_tensor, per_channel", "'per_row'");
  refused(R"({"weight": {"observer": "max"}})", "observer to be one of dynamic, min_max", "'max'");
  refused(R"({"weight": {"nan_policy": "ignore"}})", "nan_policy to be one of raise, skip", "'ignore'");
  refused(R"({"weight": {"format": "nf3"}})", "format to be one of int", "'nf3'");
  refused(R"({"weight": {}, "backend": "int4"})", "backend to be one of simulate, int8", "'int4'");
  refused(R"({"weight": {}, "scheme": {"kind": "int9"}})", "scheme to be one of int8, gradient_quant, fixed_point",
          "int9");
  refused(R"({"weight": {}, "scheme": {"bits": 8}})", "scheme to be null or an object with a kind", "bits");
  refused(R"({"weight": {}, "int8": {}, "fixed_point": {}})", "one of int8, fixed_point, and grad_input", "several");
  refused(R"({"weight": {}, "int8": {}, "scheme": {"kind": "int8"}})", "or the fields of before", "both");
  refused(R"({"weight": {"bits": 8.5}})", "bits to be an integer", "8.5");
  refused(R"({"weight": {"bits": "8"}})", "bits to be an integer", "8");
  refused(R"({"weight": {"symmetric": 1}})", "symmetric to be true or false", "1");
  refused(R"({"weight": 8})", "weight to be null or an object", "8");
  refused(R"({"weight": {}, "name": 3})", "name to be a string", "3");
  refused(R"({"name": "empty"})", "at least one of weight, input and output, or a scheme", "none");
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
  refused([](QuantSpec& s) { s.group_size = 0; }, "group_size of at least 1, got 0");
  refused([](QuantSpec& s) { s.averaging_constant = 0; }, "averaging_constant in (0, 1], got 0");
  refused([](QuantSpec& s) { s.percentile = 50; }, "percentile in (50, 100], got 50");
  refused([](QuantSpec& s) { s.learnable = true, s.observer = ObserverKind::kDynamic; },
          "an observer that initializes");
  refused([](QuantSpec& s) { s.granularity = Granularity::kPerToken; },
          "observer 'dynamic' with granularity per_token");

  Recipe recipe = Recipe::from_name("qat-w8a8");
  recipe.scheme = quantrain::nn::Int8Spec();
  CHECK_THROWS_WITH(recipe.validate(), Contains("input of 8 bits, symmetric, with int8, got 8 bits, affine"));
  recipe = Recipe::from_name("qat-w8a8");
  recipe.input->granularity = Granularity::kPerChannel;
  CHECK_THROWS_WITH(recipe.validate(), Contains("input granularity"));
  recipe = Recipe::from_name("qat-w8a8-token");
  recipe.weight = recipe.input;
  CHECK_THROWS_WITH(recipe.validate(), Contains("weight granularity"));
  recipe = Recipe::from_name("qat-w8a8");
  recipe.edge_bits = 20;
  CHECK_THROWS_WITH(recipe.validate(), Contains("edge_bits in 0 to 16, got 20"));
}
