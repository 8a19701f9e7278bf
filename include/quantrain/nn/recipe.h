// How a layer is quantised, as data: QuantSpec for one tensor of a layer, Recipe for the layer.
// One C++ struct serves both languages (bound to Python as quantrain.QuantSpec and quantrain.Recipe);
// its JSON form travels in the metadata of every checkpoint.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "quantrain/ops/export.h"

namespace quantrain::nn {

// One quantised tensor: which codes, how many elements share a scale, and where the scale comes from.
//
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
//              initialises it
// nan_policy   what an observer does with a batch that holds NaN: "raise" an error, or "skip" the batch
struct QUANTRAIN_API QuantSpec {
  int64_t bits = 8;  // 1 to 16
  bool symmetric = true;
  std::string granularity = "per_tensor";
  int64_t group_size = 32;
  std::string observer = "min_max";
  bool learnable = false;
  double averaging_constant = 0.1;
  double percentile = 99.99;
  std::string nan_policy = "raise";

  int64_t quant_min() const;  // symmetric: -2^(bits-1); affine: 0
  int64_t quant_max() const;  // symmetric: 2^(bits-1) - 1; affine: 2^bits - 1

  // Throws std::invalid_argument naming the field, the rule and the value.
  void validate() const;

  std::string to_json() const;
  static QuantSpec from_json(
      const std::string& text);  // throws std::invalid_argument: not JSON, unknown field, wrong type, bad value

  bool operator==(const QuantSpec&) const = default;
};

// One quantised gradient: how the gradient of a layer's output is rounded before it is multiplied (quantize_gradient,
// <quantrain/ops/gradient_quant.h>; always stochastically, so that the gradients computed from it stay unbiased).
//
// quantizer      per_tensor, per_sample, per_channel or householder; "auto": the finest scale that an integer product
//                of the layer allows, per_sample for grad_input, and for grad_weight per_channel (Linear) or per_tensor
//                (convolution)
// rows           what a row of the gradient is: "sample" (dimension 0) or "token" (all dimensions but the last);
//                "auto": token for Linear, sample for convolutions
// preserve_zero  per_sample and per_channel: zero is a code of every row or column (per_tensor: it always is)
// max_group      householder: how many rows a block holds at most, 3 to 256
struct QUANTRAIN_API GradientSpec {
  int64_t bits = 8;  // 2 to 8
  std::string quantizer = "per_sample";
  std::string rows = "auto";
  bool preserve_zero = false;
  int64_t max_group = 128;

  // This spec as a layer runs it, without "auto". tensor: "grad_input" or "grad_weight".
  GradientSpec resolved(const std::string& tensor, bool convolution) const;

  // Throws std::invalid_argument naming the field, the rule and the value.
  void validate() const;

  std::string to_json() const;
  static GradientSpec from_json(const std::string& text);  // throws std::invalid_argument, as QuantSpec's

  bool operator==(const GradientSpec&) const = default;
};

// How a Linear layer trains on int8 products (int8_linear, <quantrain/ops/int8_linear.h>): which of its three run in
// int8.
//
// output, grad_input, grad_weight  "int8", "none" (floating point) or "auto" (the faster one, by device and shape)
// weight_scheme  how the weight enters grad_input: "fold", "columns" or "auto"
struct QUANTRAIN_API Int8Spec {
  std::string output = "auto";
  std::string grad_input = "auto";
  std::string grad_weight = "auto";
  std::string weight_scheme = "auto";

  // Throws std::invalid_argument naming the field, the rule and the value.
  void validate() const;

  std::string to_json() const;
  static Int8Spec from_json(const std::string& text);  // throws std::invalid_argument, as QuantSpec's

  bool operator==(const Int8Spec&) const = default;
};

// Fixed-point training after F8Net (Jin et al., arXiv:2202.05239): tensors are integers times powers of two, weights
// hold batch norm and the scales of their neighbours, and the converted network multiplies 8-bit integers, adds and
// shifts (nn/fixed_point/network.h).
//
// fraction_length    how the fraction length of a tensor is chosen: "std", from its standard deviation, or "mse", the
//                    one of least squared error
// clip               true: activations are clipped at a learned level (PACT), which is folded into the neighbours'
//                    weights; false: not clipped
// hysteresis         octaves by which a weight's standard deviation must pass a threshold before its fraction length
//                    changes; 0: none
// double_forward     true: batch statistics come from a second convolution with the unrounded weight, as published;
//                    false: from the one convolution with the rounded weight
struct QUANTRAIN_API FixedPointSpec {
  std::string fraction_length = "std";
  bool clip = true;
  double hysteresis = 0.0;
  bool double_forward = false;

  // Throws std::invalid_argument naming the field, the rule and the value.
  void validate() const;

  std::string to_json() const;
  static FixedPointSpec from_json(const std::string& text);  // throws std::invalid_argument, as QuantSpec's

  bool operator==(const FixedPointSpec&) const = default;
};

// One layer: specs of the tensors it quantises (absent: left in floating point), and how it runs.
//
// grad_input, grad_weight  the gradient of the output as the products for the gradients of input and weight take it
//                          (StatQuant, Chen et
//            al., arXiv:2010.14298: Q_b2 and Q_b1, two independent draws). Linear layers and convolutions only
// backend    "simulate": floating-point arithmetic on fake-quantised values
//            "int8": integer matrix products, of Linear layers only: of converted ones, and with `int8` in training.
//            Weight and input 8 bits, symmetric; weight per_channel or per_tensor; input per_token and dynamic, or
//            per_tensor and observed
// int8       Linear layers train as Int8Linear; weight dynamic per_channel, input dynamic per_token. With backend
//            "simulate" the same codes are multiplied in float32
// fixed_point convolutions and Linear layers train in fixed point, and convert() makes an integer-only network. Weight
// 8 bits, symmetric, dynamic,
//            per_tensor or per_channel (of fraction lengths); input 8 bits, per_tensor, moving_average; nothing else
// training   false: calibrate only, no fine-tuning (post-training quantisation)
// edge_bits  > 0: the first and the last quantised layer of a model use this many bits (Esser et al., section 2.3)
struct QUANTRAIN_API Recipe {
  std::string name;
  std::optional<QuantSpec> weight;
  std::optional<QuantSpec> input;
  std::optional<QuantSpec> output;
  std::string backend = "simulate";
  bool training = true;
  int64_t edge_bits = 0;
  std::optional<GradientSpec> grad_input;
  std::optional<GradientSpec> grad_weight;
  std::optional<Int8Spec> int8;
  std::optional<FixedPointSpec> fixed_point;

  // Whether only Linear layers run so: integer products, in training or converted.
  bool linear_only() const { return int8.has_value() || backend == "int8"; }

  // A named recipe: one of names(), or fqt-ptq, fqt-psq, fqt-bhq (per_tensor, per_sample, householder) with bits 2 to 8
  // behind, as they are or with "-paper". Throws std::invalid_argument for another name.
  static Recipe from_name(const std::string& name);
  static std::vector<std::string> names();

  // The recipe of the first and the last layer: this one with edge_bits for weight and input, itself where edge_bits is
  // 0.
  Recipe edge() const;

  // Throws std::invalid_argument naming the field, the rule and the value.
  void validate() const;

  std::string to_json() const;
  static Recipe from_json(const std::string& text);  // throws std::invalid_argument, as QuantSpec's

  bool operator==(const Recipe&) const = default;
};

}  // namespace quantrain::nn
