// GradientProbe: what quantizing the gradients of a model would cost, layer by layer, measured while it trains.
//
// StatQuant (Chen, Gai, Yao, Mahoney, Gonzalez, "A statistical framework for low-bitwidth training of deep neural
// networks", NeurIPS 2020). With g = dL/dH the gradient of a layer's linear map, viewed as [N, D], Q a quantizer of b
// bits and B = 2^b - 1:
//
//   theorem 1   E[Q(g)] = g: the probe's z-score of the mean error says whether it holds
//   theorem 2   Var[dTheta] = Var[dTheta_QAT] + sum_l E[sum_{k <= l} Var[Q(g_l) gamma(k, l)]]: the batch variance, and
//               what each layer l adds to the weight gradients dTheta_k of itself (k = l: weight_variance) and all
//               before it (network_variance)
//   theorem 3   Var[Q(g)] <= (D / 4) ||S^-1||_F^2 = bound, S the map from g to the codes; proportional to 1 / B^2
//
// Use, C++ and Python alike: attach, then for each batch forward, backward, end_batch().
//
//   quantrain::nn::GradientProbe probe({.quantizers = {quantrain::nn::probe_quantizer("householder:5")}});
//   probe.attach(*model);
//   for (...) { model->zero_grad(); loss(model).backward(); probe.end_batch(); }
//   std::cout << probe.table();
//
// Draws come from Philox by (options.seed, number of the draw): the generators of the program are not touched.
// Arithmetic is float64 from float32 gradients. A probe waits for the device. Not for compiled or captured graphs.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include "quantrain/nn/schemes/gradient_quant.h"
#include "quantrain/ops/export.h"

namespace quantrain::nn {

// "quantizer:bits" or "quantizer:bits:rows", as "householder:5" or "per_sample:4:token". ValueError for another form or
// value.
QUANTRAIN_API GradientSpec probe_quantizer(const std::string& text);

struct GradientProbeOptions {
  std::vector<GradientSpec> quantizers = {};  // empty: per_tensor, per_sample and householder at 5 bits
  int64_t draws = 8;                          // M of each gradient and quantizer, even, at least 4
  double fraction = 0.1;                      // recommend(): what quantization may add to the batch variance
  int64_t seed = 0;
  // Stands in for the quantizer: float32 [N, D], the spec and the number of the draw to float32 [N, D].
  std::function<at::Tensor(const at::Tensor&, const GradientSpec&, int64_t)> quantize = {};
};

// One layer under one quantizer; means over its observations. A layer that is called twice in a pass is observed twice.
struct ProbeRow {
  std::string layer;
  GradientSpec quantizer;  // rows resolved to "sample" or "token"
  int64_t rows = 0;        // N of the last observation
  int64_t columns = 0;     // D of the last observation
  int64_t observations = 0;
  int64_t skipped = 0;         // gradients with NaN or Inf, or empty: not counted
  double gradient_square = 0;  // ||g||^2
  double variance = 0;         // E ||Q(g) - g||^2 over the draws
  double exact_variance =
      0;             // the same from the grid, without draws: sum of p (1 - p) scale^2, for stochastic rounding
  double bound = 0;  // theorem 3
  // Mean error against its standard error, along the direction that the first half of the draws gives, measured by the
  // second half. Standard normal at most where Q is unbiased: |bias_z| > 5 by chance in 6e-7 of all rows. Biased
  // quantizers give large positive values.
  double bias_z = 0;
  std::optional<double>
      weight_variance;  // E ||dTheta_l(Q(g)) - dTheta_l(g)||^2: theorem 2's term k = l. Absent: the layer's
                        // weight needs no gradient, or its own backward pass quantizes
  std::optional<double>
      network_variance;  // theorem 2's sum over k <= l, of the probed layers' weights: measure_network()
};

// One layer's weight gradient over batches.
struct ProbeLayer {
  std::string layer;
  int64_t batches = 0;
  std::optional<double> gradient_square;  // ||E dTheta||^2, of the mean over batches; at least 1 batch
  std::optional<double> batch_variance;   // sum over elements of the variance from batch to batch; at least 2 batches
  std::optional<double>
      repeat_variance;  // the same among passes over one batch: what the model's own quantization adds
};

// What a layer needs under one quantizer. variance(b') = variance(b) (B / B')^2.
struct ProbeAdvice {
  std::string layer;
  GradientSpec quantizer;
  // "network": network_variance against all layers' batch variance; "weight": weight_variance against the layer's
  std::string basis;
  double ratio = 0;         // that variance over that batch variance
  double allowed = 0;       // fraction, for "network" shared equally among the layers
  int64_t bits_needed = 0;  // smallest in 2 to 8 with ratio (B / B')^2 <= allowed; 9 where 8 is not enough
};

class QUANTRAIN_API GradientProbe {
 public:
  explicit GradientProbe(GradientProbeOptions options = {});
  ~GradientProbe();
  GradientProbe(const GradientProbe&) = delete;
  GradientProbe& operator=(const GradientProbe&) = delete;

  // Watches every QuantLinear, QuantConv2d and QuantConvBn2d of the module under its path there, until detach() or the
  // probe's end. ValueError where it has none. torch::nn::Linear and Conv2d have no hooks: call watch() in forward().
  void attach(torch::nn::Module& module);
  void detach();

  // Has the gradient of `output` observed when it is computed. weight: the layer's parameter, or undefined.
  // exact_backward = false where the layer's backward pass quantizes: weight_variance is then left out. Rows "auto" are
  // samples where weight has 4 dimensions (a convolution), else tokens.
  void watch(const std::string& layer, const at::Tensor& output, const at::Tensor& weight, bool exact_backward = true);

  // Adds one gradient of a layer's output. rows "auto": "sample" for 4 dimensions, else "token". Floating point, any
  // strides.
  void observe(const std::string& layer, const at::Tensor& grad, const std::string& rows = "auto");

  // After a backward pass: takes the weights' gradients as one batch's. They must be that batch's alone (zero_grad
  // before).
  void end_batch();
  // After another backward pass over the same batch as the last end_batch().
  void end_repeat();

  // Measures network_variance: runs `loss` once, then a backward pass per layer, quantizer and repeat with that layer's
  // gradient alone quantized, and sums ||dTheta - dTheta_QAT||^2 over the watched weights. The parameters' gradients
  // are not touched. ValueError where the backward pass is not deterministic (layers that quantize their gradients), or
  // the loss reaches no watched layer.
  void measure_network(const std::function<at::Tensor()>& loss, int64_t repeats = 2);

  std::vector<ProbeRow> rows() const;      // layers in the order they were first seen, quantizers in the options' order
  std::vector<ProbeLayer> layers() const;  // likewise
  // Those that need more bits than their quantizer has come first, the largest lack and then the largest ratio leading.
  // Only layers with a batch variance above 0. fraction <= 0 takes the options'.
  std::vector<ProbeAdvice> recommend(double fraction = 0) const;

  std::string to_json() const;  // options, rows, layers and advice under these structs' names
  std::string table() const;
  const GradientProbeOptions& options() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace quantrain::nn
