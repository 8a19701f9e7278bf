// Weight and bias of a fixed-point layer as integers, and the program that they become: what decides bits, once for
// both languages.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "quantrain/ops/export.h"

namespace quantrain::nn {

struct Recipe;

// A layer as evaluation and the integer network have it.
struct QUANTRAIN_API FixedPointFolded {
  at::Tensor weight;           // float32: codes 2^-FL_w
  at::Tensor codes;            // float32 whole numbers
  at::Tensor bias_codes;       // float64 whole numbers of fraction length FL_x + FL_w; undefined where there is no bias
  at::Tensor fraction_length;  // FL_w, int32 [1] or [O, 1, ...]
  at::Tensor accumulator_fraction_length;  // FL_x + FL_w, int32 [1] or [O]
  at::Tensor exponent;                     // j, float32 [1], where the output is not in the units of an activation
  at::Tensor bound;                        // float64 [O]: the accumulator's largest magnitude
};

struct QUANTRAIN_API FixedPointFoldArguments {
  at::Tensor weight = {};  // [O, ...]
  at::Tensor bias = {};    // [O] or undefined
  // [O] each, or all undefined: no batch norm.
  at::Tensor bn_weight = {}, bn_bias = {}, bn_running_mean = {}, bn_running_var = {};
  double bn_eps = 1e-5;
  at::Tensor eta_in = {};                 // float32 [1]
  at::Tensor eta_out = {};                // float32 [1]; undefined: the output is in real values
  at::Tensor input_fraction_length = {};  // FL_x, int32 [1]
  int64_t input_quant_max = 255;          // largest code of the input
  // The one in use: its rank says per tensor or per channel, hysteresis may keep it.
  at::Tensor weight_fraction_length = {};
  std::string method = "std";  // how FL_w is chosen (FixedPointSpec)
  double hysteresis = 0.0;
};

// With sf = bn_weight / sqrt(bn_running_var + eps) (1 without batch norm): W_eff = W sf eta_in / eta_out, FL_w chosen
// from W_eff, codes = clamp(rint(W_eff 2^FL_w), -127, 127), b_eff = (bn_bias - (bn_running_mean - bias) sf) / eta_out
// rounded to FL_x + FL_w. Without eta_out it is 2^-j, j such that FL_w can be 7.
QUANTRAIN_API FixedPointFolded fold_fixed_point(const FixedPointFoldArguments& arguments);

// The integers of a network before they are proven: the graph's JSON text (version 1, network.h) and its tensors,
// "<layer>.weight" int8 and "<layer>.bias" int32, on CPU.
struct QUANTRAIN_API FixedPointProgram {
  std::string graph;
  std::map<std::string, at::Tensor> tensors;
};

// Writes a program node by node, in topological order; the one place that knows the JSON.
class QUANTRAIN_API FixedPointProgramWriter {
 public:
  // Codes of an activation; a product without one gives its accumulators.
  struct Codes {
    bool is_signed = false;
    int64_t fraction_length = 0;
  };

  // scale: the real value of the input's code 1.
  FixedPointProgramWriter(const Recipe& recipe, int64_t channels, const Codes& input, double scale);
  ~FixedPointProgramWriter();

  // Inputs are names of earlier nodes, "input" the images; a second one of conv2d is its residual. ValueError: a folded
  // weight that is not finite.
  void conv2d(const std::string& name, const std::vector<std::string>& inputs, std::array<int64_t, 2> kernel,
              std::array<int64_t, 2> stride, std::array<int64_t, 2> padding, int64_t groups,
              const FixedPointFolded& folded, const std::optional<Codes>& output);
  void linear(const std::string& name, const std::string& input, const FixedPointFolded& folded,
              const std::optional<Codes>& output);
  void max_pool2d(const std::string& name, const std::string& input, std::array<int64_t, 2> kernel,
                  std::array<int64_t, 2> stride, std::array<int64_t, 2> padding);
  void avg_pool2d(const std::string& name, const std::string& input, std::array<int64_t, 2> size, int64_t shift,
                  int64_t fraction_length);
  void slice_pad(const std::string& name, const std::string& input, std::array<int64_t, 2> stride,
                 std::array<int64_t, 2> pad);
  void add(const std::string& name, const std::vector<std::string>& inputs, const Codes& output);
  void flatten(const std::string& name, const std::string& input);

  // The last node is the output; its scale is that of the last product in real values.
  FixedPointProgram finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace quantrain::nn
