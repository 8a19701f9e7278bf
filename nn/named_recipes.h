// The parts that named recipes are made of. Private to the library.
#pragma once

#include <string>
#include <utility>

#include "quantrain/nn/recipe.h"

namespace quantrain::nn::detail {

inline QuantSpec dynamic_weight(int64_t bits, Granularity granularity) {
  QuantSpec spec;
  spec.bits = bits;
  spec.granularity = granularity;
  spec.observer = ObserverKind::kDynamic;
  return spec;
}

inline QuantSpec symmetric_input(Granularity granularity, ObserverKind observer) {
  QuantSpec spec;
  spec.granularity = granularity;
  spec.observer = observer;
  return spec;
}

inline QuantSpec affine_input(int64_t bits, ObserverKind observer) {
  QuantSpec spec;
  spec.bits = bits;
  spec.symmetric = false;
  spec.observer = observer;
  return spec;
}

inline Recipe named_recipe(std::string name, QuantSpec weight, QuantSpec input, SchemeValue scheme = {}) {
  Recipe recipe;
  recipe.name = std::move(name);
  recipe.weight = std::move(weight);
  recipe.input = std::move(input);
  recipe.scheme = std::move(scheme);
  return recipe;
}

}  // namespace quantrain::nn::detail
