#include "nn/named_recipes.h"

// Recipes that round tensors and nothing more, and the look-up of all names: those of the schemes follow, in the order
// of their table.

#include <algorithm>

#include "nn/json_fields.h"
#include "nn/schemes/table.h"

namespace quantrain::nn {

using namespace detail;

namespace {

std::vector<Recipe> simulated_recipes() {
  constexpr Granularity kChannel = Granularity::kPerChannel, kGroup = Granularity::kPerGroup;
  std::vector<Recipe> recipes;
  recipes.push_back(
      named_recipe("qat-w8a8", dynamic_weight(8, kChannel), affine_input(8, ObserverKind::kMovingAverage)));

  QuantSpec token = affine_input(8, ObserverKind::kDynamic);
  token.granularity = Granularity::kPerToken;
  recipes.push_back(named_recipe("qat-w8a8-token", dynamic_weight(8, kChannel), token));

  recipes.push_back(named_recipe("qat-w4a8", dynamic_weight(4, kGroup), affine_input(8, ObserverKind::kMovingAverage)));

  QuantSpec weight = dynamic_weight(4, kChannel);
  weight.observer = ObserverKind::kMse;
  weight.learnable = true;
  QuantSpec input = affine_input(4, ObserverKind::kMse);
  input.learnable = true;
  recipes.push_back(named_recipe("qat-w4a4", weight, input));
  recipes.back().edge_bits = 8;

  recipes.push_back(named_recipe("ptq-w8a8", dynamic_weight(8, kChannel), affine_input(8, ObserverKind::kMse)));
  recipes.back().training = false;

  Recipe weight_only;
  weight_only.name = "w8a16";
  weight_only.weight = dynamic_weight(8, kChannel);
  weight_only.training = false;
  recipes.push_back(weight_only);

  QuantSpec groups = dynamic_weight(4, kGroup);
  groups.observer = ObserverKind::kMse;
  recipes.push_back(named_recipe("ptq-w4a8", groups, affine_input(8, ObserverKind::kMse)));
  recipes.back().training = false;

  Recipe pruned;
  pruned.name = "prune-magnitude";
  pruned.prune.emplace().schedule = PruneSchedule::kCubic;
  recipes.push_back(pruned);
  pruned.name = "prune-2of4";
  pruned.prune = PruneSpec{};
  pruned.prune->pattern = "2:4";
  recipes.push_back(pruned);
  return recipes;
}

std::vector<Recipe> named_recipes() {
  std::vector<Recipe> recipes = simulated_recipes();
  for (const SchemeEntry& entry : scheme_entries()) {
    if (!entry.recipes) continue;
    std::vector<Recipe> more = entry.recipes();
    std::move(more.begin(), more.end(), std::back_inserter(recipes));
  }
  return recipes;
}

}  // namespace

Recipe Recipe::from_name(const std::string& name) {
  for (Recipe& recipe : named_recipes()) {
    if (recipe.name == name) return std::move(recipe);
  }
  for (const SchemeEntry& entry : scheme_entries()) {
    if (!entry.by_name) continue;
    if (std::optional<Recipe> recipe = entry.by_name(name)) return *std::move(recipe);
  }
  fail_field(kTypeName, "name to be one of " + words_text(names()), "'" + name + "'");
}

std::vector<std::string> Recipe::names() {
  std::vector<std::string> names;
  for (const Recipe& recipe : named_recipes()) names.push_back(recipe.name);
  return names;
}

}  // namespace quantrain::nn
