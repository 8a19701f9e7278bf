#include "nn/old_recipes.h"

#include "quantrain/nn/schemes/fixed_point.h"
#include "quantrain/nn/schemes/gradient_quant.h"
#include "quantrain/nn/schemes/int8.h"

namespace quantrain::nn {

using detail::check_one_of;
using detail::fail_field;
using detail::FieldsJson;

const std::vector<std::string> detail::kOldRecipeFields = {"backend", "int8", "fixed_point", "grad_input",
                                                           "grad_weight"};

SchemeValue detail::scheme_of_old_fields(const FieldsJson& json) {
  std::string backend = "simulate";
  if (json.contains("backend")) {
    if (!json["backend"].is_string()) fail_field("Recipe", "backend to be a string", json["backend"].dump());
    backend = json["backend"].get<std::string>();
    check_one_of("Recipe", "backend", backend, {"simulate", "int8"});
  }
  const auto given = [&json](const char* field) {
    if (!json.contains(field) || json[field].is_null()) return false;
    if (!json[field].is_object()) {
      fail_field("Recipe", std::string(field) + " to be null or an object", json[field].dump());
    }
    return true;
  };
  const bool integer = given("int8"), fixed = given("fixed_point");
  const bool gradients = given("grad_input") || given("grad_weight");
  if (integer + fixed + gradients > 1 || ((fixed || gradients) && backend == "int8")) {
    fail_field("Recipe", "one of int8, fixed_point, and grad_input with grad_weight", "several");
  }
  if (integer || backend == "int8") {
    for (const char* later : {"training", "simulate"}) {  // fields of a scheme, which these recipes did not have
      if (integer && json["int8"].contains(later)) fail_field("Recipe", "int8 without " + std::string(later), "one");
    }
    auto scheme = integer ? detail::from_object<Int8Spec>(json["int8"]) : Int8Spec{};
    scheme.training = integer;
    scheme.simulate = backend == "simulate";
    return scheme;
  }
  if (fixed) return detail::from_object<FixedPointSpec>(json["fixed_point"]);
  if (!gradients) return {};
  GradientQuantSpec scheme;
  if (given("grad_input")) scheme.grad_input = detail::from_object<GradientSpec>(json["grad_input"]);
  if (given("grad_weight")) scheme.grad_weight = detail::from_object<GradientSpec>(json["grad_weight"]);
  return scheme;
}

}  // namespace quantrain::nn
