#include "quantrain/nn/schemes/four_bit.h"

#include <bit>
#include <cmath>

#include <c10/util/Exception.h>

#include "nn/json_fields.h"
#include "nn/named_recipes.h"
#include "nn/schemes/table.h"

namespace quantrain::nn {

using detail::fail_field;
using detail::number_text;

void FourBitSpec::validate() const {
  static const std::string kName = kTypeName;
  detail::check_one_of(kName, "scale_rule", scale_rule, {"absmax", "signed", "search"});
  if (lora_rank < 0 || lora_rank > 65536) fail_field(kName, "lora_rank in 0 to 65536", std::to_string(lora_rank));
  if (!std::isfinite(lora_alpha)) fail_field(kName, "a finite lora_alpha", number_text(lora_alpha));
  if (!(lora_dropout >= 0 && lora_dropout < 1)) fail_field(kName, "lora_dropout in [0, 1)", number_text(lora_dropout));
}

void FourBitSpec::check_recipe(const Recipe& recipe) const {
  static const std::string kName = Recipe::kTypeName;
  if (!recipe.weight) fail_field(kName, "a spec for weight with four_bit", "none");
  if (recipe.input || recipe.output) {
    fail_field(kName, "no spec for input and output with four_bit, whose activations stay in floating point", "one");
  }
  if (recipe.edge_bits != 0) fail_field(kName, "edge_bits of 0 with four_bit", std::to_string(recipe.edge_bits));
  const QuantSpec& weight = *recipe.weight;
  if (weight.bits != 4) fail_field(kName, "weight of 4 bits with four_bit", std::to_string(weight.bits));
  if (weight.granularity != Granularity::kPerGroup || !weight.dynamic() || weight.learnable) {
    fail_field(kName, "weight per_group and dynamic with four_bit",
               name_of(weight.granularity) + ", " + name_of(weight.observer));
  }
  const auto block = static_cast<uint64_t>(weight.group_size);
  const bool integer = weight.format == Format::kInt;
  const bool power = weight.group_size >= 32 && weight.group_size <= 4096 && std::has_single_bit(block);
  if (!power && !(integer && weight.group_size % 2 == 0)) {
    fail_field(kName,
               "weight group_size to be a power of two from 32 to 4096 (of format int any even number) with four_bit",
               std::to_string(weight.group_size));
  }
  if (compress_scale && integer) {
    fail_field(kName, "compress_scale with weight format nf4, fp4 or e2m1", "'int'");
  }
  if (scale_rule == "signed" && !(integer && weight.symmetric)) {
    fail_field(kName, "scale_rule 'signed' with symmetric weight of format int", four_bit_format(weight));
  }
  if (scale_rule != "absmax" && integer && !weight.symmetric) {
    fail_field(kName, "scale_rule 'absmax' with affine weight", "'" + scale_rule + "'");
  }
}

void FourBitSpec::check_layer(const std::string& layer, const Recipe& recipe) const {
  const bool lora = layer == "LoraLinear";
  TORCH_CHECK_VALUE(
      lora || layer == "Linear4bit" || layer == "Embedding4bit", layer,
      ": expected a recipe without packed weights of 4 bits, which Linear4bit and Embedding4bit have, got '",
      recipe.name, "'");
  TORCH_CHECK_VALUE(!lora || lora_rank > 0, "LoraLinear: expected a recipe with lora_rank of at least 1, got '",
                    recipe.name, "'");
}

std::string FourBitSpec::stored_form() const {
  return lora_rank == 0 ? "" : "lora_rank " + std::to_string(lora_rank) + ", lora_alpha " + number_text(lora_alpha);
}

std::string four_bit_format(const QuantSpec& weight) {
  return weight.format != Format::kInt ? name_of(weight.format) : weight.symmetric ? "int4" : "uint4";
}

SchemeEntry detail::four_bit_entry() {
  const auto recipes = [] {
    const auto make = [](const char* name, Format format, int64_t block, bool symmetric, const FourBitSpec& scheme) {
      Recipe recipe;
      recipe.name = name;
      recipe.weight = dynamic_weight(4, Granularity::kPerGroup);
      recipe.weight->format = format;
      recipe.weight->group_size = block;
      recipe.weight->symmetric = symmetric;
      recipe.scheme = scheme;
      recipe.training = scheme.lora_rank > 0;
      return recipe;
    };
    const FourBitSpec plain;
    FourBitSpec compressed;
    compressed.compress_scale = true;
    FourBitSpec qlora = compressed;
    qlora.lora_rank = 64;
    return std::vector<Recipe>{make("nf4", Format::kNf4, 64, true, plain),
                               make("nf4-dq", Format::kNf4, 64, true, compressed),
                               make("fp4", Format::kFp4, 64, true, plain),
                               make("int4-g128", Format::kInt, 128, true, plain),
                               make("int4-g64-affine", Format::kInt, 64, false, plain),
                               make("qlora", Format::kNf4, 64, true, qlora)};
  };
  return {FourBitSpec::kKind, [] { return std::make_unique<FourBitSpec>(); }, recipes};
}

}  // namespace quantrain::nn
