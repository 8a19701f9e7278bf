// How a layer is quantized, as data: QuantSpec for one tensor of a layer, Recipe for the layer, a Scheme (scheme.h) for
// what is more than rounding tensors. One C++ struct serves both languages (bound to Python as quantrain.QuantSpec and
// quantrain.Recipe); its JSON form travels in the metadata of every checkpoint.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "quantrain/nn/fields.h"
#include "quantrain/nn/scheme.h"
#include "quantrain/ops/export.h"

namespace quantrain::nn {

enum class Format { kInt, kNf4, kFp4, kE2m1 };
enum class Granularity { kPerTensor, kPerChannel, kPerGroup, kPerToken };
enum class ObserverKind { kDynamic, kMinMax, kMovingAverage, kPercentile, kMse };
enum class NanPolicy { kRaise, kSkip };
enum class PruneScore { kMagnitude, kWanda, kSparseGpt };
enum class PruneScope { kLayer, kGlobal };
enum class PruneSchedule { kOneShot, kCubic };
template <>
inline constexpr const char* const kNames<Format>[] = {"int", "nf4", "fp4", "e2m1"};
template <>
inline constexpr const char* const kNames<Granularity>[] = {"per_tensor", "per_channel", "per_group", "per_token"};
template <>
inline constexpr const char* const kNames<ObserverKind>[] = {"dynamic", "min_max", "moving_average", "percentile",
                                                             "mse"};
template <>
inline constexpr const char* const kNames<NanPolicy>[] = {"raise", "skip"};
template <>
inline constexpr const char* const kNames<PruneScore>[] = {"magnitude", "wanda", "sparsegpt"};
template <>
inline constexpr const char* const kNames<PruneScope>[] = {"layer", "global"};
template <>
inline constexpr const char* const kNames<PruneSchedule>[] = {"one_shot", "cubic"};

// One quantized tensor: which codes, how many elements share a scale, and where the scale comes from.
//
// format       what a code is: "int", bits and symmetric say which integers; or "nf4", "fp4", "e2m1", the floats of 4
//              bits of <quantrain/ops/four_bit.h>, for weights under a scheme that packs them
// granularity  per_tensor   one scale
//              per_channel  one scale per output channel of a weight (dimension 0)
//              per_group    one scale per `group_size` elements along the last dimension of a Linear or Embedding
//                           weight; per_channel where group_size does not divide the row, and for convolutions
//              per_token    one scale per row of an input (all dimensions but the last); observer "dynamic" only
// observer     dynamic         the scale is computed from the tensor at each call and nothing is stored
//              min_max         the smallest and largest value ever seen
//              moving_average  averages of the batches' minimum and maximum with weight `averaging_constant` for the
//                              new one
//              percentile      like moving_average, over the `percentile` and (100 - percentile) quantiles of each
//                              batch
//              mse             like moving_average, over the range that rounds each batch with the least squared error
// learnable    the scale is a parameter trained by LSQ (Esser et al., arXiv:1902.08153, section 2.1); the observer
//              initializes it
// nan_policy   what an observer does with a batch that holds NaN: "raise" an error, or "skip" the batch
struct QUANTRAIN_API QuantSpec {
  Format format = Format::kInt;
  int64_t bits = 8;  // 1 to 16
  bool symmetric = true;
  Granularity granularity = Granularity::kPerTensor;
  int64_t group_size = 32;
  ObserverKind observer = ObserverKind::kMinMax;
  bool learnable = false;
  double averaging_constant = 0.1;
  double percentile = 99.99;
  NanPolicy nan_policy = NanPolicy::kRaise;

  static constexpr const char* kTypeName = "QuantSpec";
  template <typename Self, typename Visitor>
  static void fields(Self& self, Visitor&& visit) {
    visit("format", self.format);
    visit("bits", self.bits);
    visit("symmetric", self.symmetric);
    visit("granularity", self.granularity);
    visit("group_size", self.group_size);
    visit("observer", self.observer);
    visit("learnable", self.learnable);
    visit("averaging_constant", self.averaging_constant);
    visit("percentile", self.percentile);
    visit("nan_policy", self.nan_policy);
  }

  int64_t quant_min() const;  // symmetric: -2^(bits-1); affine: 0
  int64_t quant_max() const;  // symmetric: 2^(bits-1) - 1; affine: 2^bits - 1
  bool dynamic() const { return observer == ObserverKind::kDynamic; }

  // Of a weight [O, ...]: [1] per tensor, [O, 1, ...] per channel; per group [O, K / group_size] for a matrix [O, K]
  // whose rows group_size divides, else as per channel.
  std::vector<int64_t> weight_scale_shape(const std::vector<int64_t>& weight_shape) const;

  // Throws std::invalid_argument naming the field, the rule and the value.
  void validate() const;

  std::string to_json() const;
  // Throws std::invalid_argument: not JSON, unknown field, wrong type, bad value.
  static QuantSpec from_json(const std::string& text);

  bool operator==(const QuantSpec&) const = default;
};

// Which weights of a model stay at zero (ops/pruning.h).
//
// sparsity   the share that is dropped, in [0, 1); not read where the pattern is n:m
// pattern    "layer": of the whole weight; "row": of each output row; "n:m", such as "2:4"
// score      magnitude   |w|
//            wanda       |w| times the norm of the input column, of calibration batches (arXiv:2306.11695)
//            sparsegpt   w^2 / U_jj^2, the kept weights adjusted, of calibration batches (arXiv:2301.00774)
// scope      layer: each layer by itself; global: one threshold for all, with score magnitude and pattern "layer"
// schedule   one_shot: before training; cubic: s (1 - (1 - t)^3) while training goes from `begin` to `end`, shares of
//            the steps, with new masks every `every` steps, then fixed (Zhu and Gupta, arXiv:1710.01878, eq. 1)
struct QUANTRAIN_API PruneSpec {
  double sparsity = 0.5;
  std::string pattern = "layer";
  PruneScore score = PruneScore::kMagnitude;
  PruneScope scope = PruneScope::kLayer;
  PruneSchedule schedule = PruneSchedule::kOneShot;
  double begin = 0.0;
  double end = 0.67;
  int64_t every = 20;

  static constexpr const char* kTypeName = "PruneSpec";
  template <typename Self, typename Visitor>
  static void fields(Self& self, Visitor&& visit) {
    visit("sparsity", self.sparsity);
    visit("pattern", self.pattern);
    visit("score", self.score);
    visit("scope", self.scope);
    visit("schedule", self.schedule);
    visit("begin", self.begin);
    visit("end", self.end);
    visit("every", self.every);
  }

  bool needs_batches() const { return score != PruneScore::kMagnitude; }

  // Of `steps` those after which the schedule begins, and after which the masks are fixed; of one_shot 0.
  int64_t first_step(int64_t steps) const;
  int64_t last_step(int64_t steps) const;
  // What is dropped after `step` of `steps`: of one_shot `sparsity` at once.
  double sparsity_at(int64_t step, int64_t steps) const;
  // Whether masks are made anew after that step; 0 is before the first.
  bool renews_at(int64_t step, int64_t steps) const;

  // Throws std::invalid_argument naming the field, the rule and the value.
  void validate() const;
  std::string to_json() const;
  static PruneSpec from_json(const std::string& text);

  bool operator==(const PruneSpec&) const = default;
};

// One layer: specs of the tensors it quantizes (absent: left in floating point), and how it runs.
//
// training   false: calibrate only, no fine-tuning (post-training quantization)
// edge_bits  > 0: the first and the last quantized layer of a model use this many bits (Esser et al., section 2.3)
// scheme     none: floating-point arithmetic on fake-quantized values; else schemes/*.h
// prune      none, or which weights stay at zero beside that
struct QUANTRAIN_API Recipe {
  std::string name;
  std::optional<QuantSpec> weight;
  std::optional<QuantSpec> input;
  std::optional<QuantSpec> output;
  bool training = true;
  int64_t edge_bits = 0;
  SchemeValue scheme;
  std::optional<PruneSpec> prune;

  static constexpr const char* kTypeName = "Recipe";
  template <typename Self, typename Visitor>
  static void fields(Self& self, Visitor&& visit) {  // but scheme and prune, which are written where they are
    visit("name", self.name);
    visit("weight", self.weight);
    visit("input", self.input);
    visit("output", self.output);
    visit("training", self.training);
    visit("edge_bits", self.edge_bits);
  }

  // The scheme where it is of this struct, else null: recipe.scheme_as<Int8Spec>().
  template <typename S>
  S* scheme_as() const {
    return dynamic_cast<S*>(scheme.pointer().get());
  }

  // Whether only Linear layers run so.
  bool linear_only() const { return scheme && scheme->linear_only(); }

  // A named recipe: one of names(), or fqt-ptq, fqt-psq, fqt-bhq (per_tensor, per_sample, householder) followed by bits
  // 2 to 8, plain or with "-paper". Throws std::invalid_argument for another name.
  static Recipe from_name(const std::string& name);
  static std::vector<std::string> names();

  // The recipe of the first and the last layer: this one with edge_bits for weight and input, itself where edge_bits is
  // 0.
  Recipe edge() const;

  // Throws std::invalid_argument naming the field, the rule and the value.
  void validate() const;

  // {"name", "weight", "input", "output", "training", "edge_bits", "scheme": {"kind", its fields}, "prune": {..}},
  // without the last two where there is none.
  std::string to_json() const;

  // Throws std::invalid_argument, as QuantSpec's. Reads the form of before there were schemes too: "backend", "int8",
  // "fixed_point", "grad_input" and "grad_weight" beside the others.
  static Recipe from_json(const std::string& text);

  bool operator==(const Recipe&) const = default;
};

}  // namespace quantrain::nn
