// What a recipe was before there were schemes: fields beside the others. Private to the library.
#pragma once

#include <string>
#include <vector>

#include "nn/json_fields.h"
#include "quantrain/nn/scheme.h"

namespace quantrain::nn::detail {

extern const std::vector<std::string> kOldRecipeFields;

// The scheme that those fields stand for. Throws std::invalid_argument, as Recipe::from_json.
SchemeValue scheme_of_old_fields(const FieldsJson& json);

}  // namespace quantrain::nn::detail
