// Weights of 4 bits in blocks that share a scale (<quantrain/ops/four_bit.h>), stored packed and not trained, and LoRA
// beside them (Hu et al., arXiv:2106.09685; Dettmers et al., arXiv:2305.14314). Recipes nf4, nf4-dq, fp4, int4-g128,
// int4-g64-affine and qlora.
#pragma once

#include <string>

#include "quantrain/nn/recipe.h"

namespace quantrain::nn {

enum class PackedStorage { kUint8, kBfloat16 };
template <>
inline constexpr const char* const kNames<PackedStorage>[] = {"uint8", "bfloat16"};

// The recipe's weight spec says the rest: format nf4, fp4 or e2m1 (symmetric), or int of 4 bits, symmetric (int4) or
// affine (uint4); group_size elements share a scale.
//
// scale_rule      "absmax", "signed" (int4) or "search": as quantize_4bit
// compress_scale  whether scales are codes of 8 bits themselves ("double quantization"); not with int of 4 bits
// embedding       whether embeddings are packed too (Embedding4bit)
// head            whether the layer that gives a model's output is packed too
// storage         how a layer holds its codes and scales: "uint8", buffers of their own types; or "bfloat16", frozen
//                 parameters that are byte views of them, which is what FSDP2 can shard ([N, K / 4] and [N, 2 K / B];
//                 K must be a multiple of group_size; compressed scales of an odd number per row stay a buffer)
// lora_rank       r > 0: layers are LoraLinear, y = x W^T + (lora_alpha / r) D(x) A^T B^T, and only A and B are trained
// lora_dropout    share of x that A does not see while the layer trains, in [0, 1)
struct QUANTRAIN_API FourBitSpec : SchemeOf<FourBitSpec> {
  std::string scale_rule = "absmax";
  bool compress_scale = false;
  bool embedding = false;
  bool head = false;
  PackedStorage storage = PackedStorage::kUint8;
  int64_t lora_rank = 0;
  double lora_alpha = 16;
  double lora_dropout = 0;

  static constexpr const char* kKind = "four_bit";
  static constexpr const char* kTypeName = "FourBitSpec";
  template <typename Self, typename Visitor>
  static void fields(Self& self, Visitor&& visit) {
    visit("scale_rule", self.scale_rule);
    visit("compress_scale", self.compress_scale);
    visit("embedding", self.embedding);
    visit("head", self.head);
    visit("storage", self.storage);
    visit("lora_rank", self.lora_rank);
    visit("lora_alpha", self.lora_alpha);
    visit("lora_dropout", self.lora_dropout);
  }

  double scaling() const { return lora_rank > 0 ? lora_alpha / static_cast<double>(lora_rank) : 0.0; }

  void validate() const override;
  void check_recipe(const Recipe& recipe) const override;
  void check_layer(const std::string& layer, const Recipe& recipe) const override;
  bool packs_weight() const override { return true; }
  std::string stored_form() const override;  // of LoRA
};

// What quantize_4bit calls the format of a weight spec under this scheme: "nf4", "fp4", "e2m1", "int4" or "uint4".
QUANTRAIN_API std::string four_bit_format(const QuantSpec& weight);

}  // namespace quantrain::nn
