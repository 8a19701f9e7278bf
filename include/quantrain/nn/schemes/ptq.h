// Post-training quantization of linear layers: ZeroQuant (Yao et al., arXiv:2206.01861), LLM.int8() (Dettmers et al.,
// arXiv:2208.07339), SmoothQuant (Xiao et al., arXiv:2211.10438), GPTQ (Frantar et al., arXiv:2210.17323) and AWQ (Lin
// et al., arXiv:2306.00978), and the cache of keys and values. Recipes zeroquant-*, llm-int8*, smoothquant-*, gptq-*,
// awq-*, kv-int8.
#pragma once

#include <string>

#include "quantrain/nn/recipe.h"

namespace quantrain::nn {

enum class Rounding { kNearest, kGptq };
template <>
inline constexpr const char* const kNames<Rounding>[] = {"nearest", "gptq"};
enum class ScaleSearch { kAbsmax, kAwq };
template <>
inline constexpr const char* const kNames<ScaleSearch>[] = {"absmax", "awq"};

// The recipe's weight is of 4 or 8 bits, symmetric and dynamic: of 8 bits per_channel; of 4 per_channel or per_group,
// the last group of a row short where group_size does not divide it. Its input is absent (activations stay in floating
// point), of 8 bits per_token and dynamic, or of 8 bits per_tensor and observed (min_max; one scale, from calibration;
// weights of 8 bits).
//
// smooth_alpha       > 0: columns of the input are divided by smooth_factor with this alpha, those of the weight
//                    multiplied
// outlier_columns    > 0: so many columns, of the largest inputs seen in calibration, are kept at more bits: with
//                    weights of 8 bits as two int8 planes of the input, with weights of 4 as weights of 8 bits and the
//                    input as it comes
// outlier_threshold  > 0: the columns are chosen at each call instead, those with an element of this magnitude, at most
//                    outlier_columns of them; as LLM.int8() does, so that a row's result depends on the others
// rounding           "nearest", or "gptq" (gptq_round)
// damping            of gptq
// scale_search       "absmax", or "awq": columns of the weight are multiplied by awq_scale before they are rounded
// group_scales       of weights of 4 bits in groups: "float", or "two_level": whole multiples, 1 to 15, of one scale
//                    per row, of the two next to the group's own that of less error. An integer product with inputs of
//                    8 bits then takes the codes as they are (QoQ, arXiv:2405.04532, section 4.1)
// attention_bits     > 0: prepare gives layers of attention so many weight bits, per_channel (ZeroQuant's mixed form)
// few_rows           of weights and inputs of 8 bits, for at most 32 rows (8 on the CPU): "float", the input as it
//                    comes (exact, and faster: W8A16), or "int8", one arithmetic for all
// distill_steps      > 0: between calibration and conversion quantrain.ptq.quantize trains the blocks one by one on
//                    what the float model's blocks give (ZeroQuant's LKD), so many batches; weights rounded to nearest
// distill_lr         its learning rate
// head               whether the layer that gives a model's output is quantized too
// kv_cache           "float", or "int8": keys and values of attention are held as int8 codes, one scale (absmax / 127)
//                    per token and head. Alone, in a recipe without a weight, it leaves every layer as it is
struct QUANTRAIN_API PtqSpec : SchemeOf<PtqSpec> {
  double smooth_alpha = 0;
  int64_t outlier_columns = 0;
  double outlier_threshold = 0;
  Rounding rounding = Rounding::kNearest;
  double damping = 0.01;
  ScaleSearch scale_search = ScaleSearch::kAbsmax;
  std::string group_scales = "float";
  int64_t attention_bits = 0;
  std::string few_rows = "float";
  int64_t distill_steps = 0;
  double distill_lr = 1e-4;
  bool head = false;
  std::string kv_cache = "float";

  static constexpr const char* kKind = "ptq";
  static constexpr const char* kTypeName = "PtqSpec";
  template <typename Self, typename Visitor>
  static void fields(Self& self, Visitor&& visit) {
    visit("smooth_alpha", self.smooth_alpha);
    visit("outlier_columns", self.outlier_columns);
    visit("outlier_threshold", self.outlier_threshold);
    visit("rounding", self.rounding);
    visit("damping", self.damping);
    visit("scale_search", self.scale_search);
    visit("group_scales", self.group_scales);
    visit("attention_bits", self.attention_bits);
    visit("few_rows", self.few_rows);
    visit("distill_steps", self.distill_steps);
    visit("distill_lr", self.distill_lr);
    visit("head", self.head);
    visit("kv_cache", self.kv_cache);
  }

  void validate() const override;
  void check_recipe(const Recipe& recipe) const override;
  void check_layer(const std::string& layer, const Recipe& recipe) const override;
  bool linear_only() const override { return true; }
  std::string stored_form() const override;

  // What a layer's buffers are, and what calibration has to see.
  bool static_columns() const { return outlier_columns > 0 && outlier_threshold == 0; }
  bool has_factor() const { return smooth_alpha > 0 || scale_search == ScaleSearch::kAwq; }
  bool needs_hessian() const { return rounding == Rounding::kGptq || scale_search == ScaleSearch::kAwq; }
  bool needs_statistics(const Recipe& recipe) const {
    return static_columns() || has_factor() || needs_hessian() || (recipe.input && !recipe.input->dynamic());
  }
};

}  // namespace quantrain::nn
