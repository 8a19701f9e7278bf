// Layers that train in fixed point, after F8Net (Jin et al., arXiv:2202.05239): the C++ twins of
// quantrain.nn.fixed_point, with the same names of parameters and buffers and the same arithmetic. FixedPointGraph
// (quantrain/nn/fixed_point/graph.h) connects them.
//
// A tensor that several layers read is quantized once, where it is made, to 8-bit codes q. Its activation says what a
// code means:
//   units       u = q 2^-FL      what evaluation computes in, and the integer network by shifts and additions
//   real value  x = u eta        what training computes in
// and eta, of the tensor read and of the tensor made, is folded into the weights between them.
//
// Three ways to run. Not quantizing (enable_fake_quant(module, false), and under Calibration): the float layer. In
// training: real values, rounded. In evaluation: units, exact, so that the integer network gives the same numbers.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <torch/nn/module.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/options/conv.h>
#include <torch/nn/options/linear.h>
#include <torch/nn/pimpl.h>

#include "quantrain/nn/calibration.h"
#include "quantrain/nn/fixed_point/fold.h"
#include "quantrain/nn/observers.h"
#include "quantrain/nn/schemes/fixed_point.h"
#include "quantrain/ops/export.h"

namespace quantrain::nn {

// How a FixedPointActivation rounds.
struct QUANTRAIN_API FixedPointActivationOptions {
  bool is_signed = false;                                      // codes -127 to 127, else 0 to 255 with the ReLU in them
  bool clip = true;                                            // a learned level (PACT), else none
  std::string method = "std";                                  // how FL is chosen, as FixedPointSpec::fraction_length
  double max_alpha = std::numeric_limits<double>::infinity();  // 6 in place of a ReLU6
  bool fixed = false;                                          // alpha is a buffer
  double alpha = 8.0;                                          // first level
};

// Rounds tensors to 8-bit codes. With level = min(|alpha|, max_alpha) and qmax = 255 or 127:
//   clip   eta = 2^FL level / qmax, so that code q has the real value q level / qmax for any FL.
//          Training: fake_quantize_learnable(x, level / qmax), which is eta fix_quant(x / eta; FL) (section 3.3 of the
//          paper)
//   else   eta = 1, y = fix_quant(x; FL)
// Evaluation: fix_quant(u; FL) = clamp(rint(u 2^FL)) 2^-FL, float32.
//
// State: `alpha` [1] (parameter; buffer where fixed; none without clip); `fraction_length` float32 [1], the average of
// the batches' FL with weight 0.1 for the new one, first 6, rounded in use. Where several tensors share the activation
// FL follows the first; without clip, the shortest. Calibration sets alpha to the level of least squared error (the
// largest over the tensors) and FL to the batches' mean.
class QUANTRAIN_API FixedPointActivationImpl : public FixedDtypeModule, public Calibrates {
 public:
  explicit FixedPointActivationImpl(const FixedPointActivationOptions& options);

  // first: the tensor is the first of those that share this activation.
  virtual at::Tensor forward(const at::Tensor& input, bool first = true);

  virtual at::Tensor eta();                    // float32 [1]
  at::Tensor step();                           // with clip, float32 [1]: the real value of code 1
  at::Tensor rounded_fraction_length() const;  // int32 [1], in 0 to 8 - signed
  at::Tensor rounded_units(const at::Tensor& units);
  virtual bool is_signed() { return options_.is_signed; }
  bool clip() const { return options_.clip; }
  int64_t quant_max() { return is_signed() ? 127 : 255; }
  int64_t quant_min() { return is_signed() ? -127 : 0; }

  void begin_calibration() override;
  void end_calibration(bool keep) override;
  int end_order() const override { return 0; }  // the fraction lengths of weights follow the levels
  Reached reached_by_calibration() override { return reached_ ? Reached::kSomething : Reached::kNothing; }

  // A new batch: the next tensor is the first of those that share this activation.
  void restart_calibration() { calls_ = 0; }

  at::Tensor alpha;
  at::Tensor fraction_length;

 protected:
  at::Tensor level();
  at::Tensor rounded_real(const at::Tensor& input);
  bool calibrating() const { return calibrating_; }
  bool reached_ = false;
  at::Tensor batch_fraction_length(const at::Tensor& real);

  FixedPointActivationOptions options_;

 private:
  struct Seen {
    at::Tensor low;  // with clip: averages of the batches' ranges of least squared error
    at::Tensor high;
    std::vector<at::Tensor> fraction_lengths;
    std::vector<at::Tensor> inputs;
  };
  void follow(const at::Tensor& input, bool first);
  void calibrate(const at::Tensor& input);

  at::Tensor before_;  // fraction_length when the batch began
  bool calibrating_ = false;
  std::vector<Seen> seen_;
  size_t calls_ = 0;
};
TORCH_MODULE(FixedPointActivation);

// The network's images as codes; buffer `alpha` is the largest magnitude that calibration saw, 1 before. Images without
// negative values have unsigned codes (bytes divided by 255: the bytes themselves), others signed ones: buffer
// `is_signed` (bool [1]).
class QUANTRAIN_API FixedPointInputImpl : public FixedPointActivationImpl {
 public:
  explicit FixedPointInputImpl(const FixedPointSpec& spec, bool is_signed = false);
  at::Tensor forward(const at::Tensor& input, bool first = true) override;
  bool is_signed() override;
  void begin_calibration() override;
  void end_calibration(bool keep) override;

 private:
  at::Tensor is_signed_;
  std::optional<uint32_t> version_;  // of is_signed_ when last read
  at::Tensor low_;
  at::Tensor high_;
};
TORCH_MODULE(FixedPointInput);

// Of an average pool: no clip, eta = eta_in 2^shift / pixels.
class QUANTRAIN_API FixedPointPoolActivationImpl : public FixedPointActivationImpl {
 public:
  FixedPointPoolActivationImpl(std::shared_ptr<FixedPointActivationImpl> source, const std::string& method);
  at::Tensor eta() override;
  bool is_signed() override { return source_->is_signed(); }
  void end_calibration(bool keep) override;
  int64_t shift() const;

  int64_t pixels = 0;

 private:
  std::shared_ptr<FixedPointActivationImpl> source_;
};
TORCH_MODULE(FixedPointPoolActivation);

// What the convolution and the linear layer share. With sf = bn.weight / sqrt(bn.running_var + eps) (1 without batch
// norm) and W_eff = W sf eta_in / eta_out, FL_w chosen from W_eff at every call, Q = fix_quant to 8 signed bits:
//   training    y = bn(product(x, Q(W_eff) eta_out / (eta_in sf)) + bias), the factors held constant (0 counts as 1);
//               with double_forward as published: sf from mean and variance of product(x, W), with gradient
//   evaluation  y = product(u, Q(W_eff)) + b_q, b_q = (bn.bias - (running_mean - bias) sf) / eta_out rounded to FL_x +
//               FL_w; float32 where the accumulator stays below 2^24, else float64
// then y + residual, then output_activation. Without one the output is in real values: eta_out = 2^-j with j such that
// FL_w can be 7.
class QUANTRAIN_API FixedPointLayer : public torch::nn::Module, public HasRecipe, public Calibrates {
 public:
  at::Tensor forward(const at::Tensor& input, const at::Tensor& residual = {});

  FixedPointFolded folded();

  // Chooses FL_w anew, without hysteresis.
  void reset_fraction_length();

  const Recipe& recipe() const override { return recipe_; }
  void end_calibration(bool keep) override {
    if (keep) reset_fraction_length();
  }
  bool is_own_tensor(const std::string& name) const override { return name == "weight_fraction_length"; }

  at::Tensor weight;
  at::Tensor bias;                           // [O] or undefined
  at::Tensor weight_fraction_length;         // buffer, int32 [1] or [O, 1, ...]
  torch::nn::BatchNorm2d bn{nullptr};        // child, where one follows
  FixedPointActivation activation{nullptr};  // child: that of the tensor made, where this layer owns it
  std::shared_ptr<FixedPointActivationImpl> input_activation;   // of the tensor read; not a child
  std::shared_ptr<FixedPointActivationImpl> output_activation;  // of the tensor made; not a child; null: real values
  bool quantizes = true;                                        // false: a shortcut that is added later, not rounded

 protected:
  FixedPointLayer(const std::string& name, const Recipe& recipe, const std::vector<int64_t>& weight_shape,
                  bool has_bias);
  virtual at::Tensor product(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) const = 0;

 private:
  friend class FixedPointGraphImpl;
  // Called once by the graph: activations, then the buffer whose shape depends on them.
  void connect(std::shared_ptr<FixedPointActivationImpl> input, std::shared_ptr<FixedPointActivationImpl> output,
               FixedPointActivation owned, bool rounds);

  at::Tensor scale_factor() const;                                       // sf [O], undefined without batch norm
  std::pair<at::Tensor, at::Tensor> factor(const at::Tensor& sf) const;  // W_eff / W, and j
  at::Tensor choose_fraction_length(const at::Tensor& effective_weight, bool fresh = false) const;
  at::Tensor rounded(const at::Tensor& effective_weight);
  at::Tensor float_forward(const at::Tensor& input);
  at::Tensor one_forward(const at::Tensor& input);
  at::Tensor double_forward(const at::Tensor& input);
  at::Tensor unit_forward(const at::Tensor& input, const at::Tensor& residual);
  std::vector<int64_t> rows(int64_t channels = -1) const;

  Recipe recipe_;
};

// 2-D convolution; groups 1 or depthwise (in == out == groups), dilation 1, zero padding in numbers. ValueError
// otherwise.
class QUANTRAIN_API FixedPointConv2dImpl : public FixedPointLayer {
 public:
  FixedPointConv2dImpl(const torch::nn::Conv2dOptions& options, const Recipe& recipe, bool batch_norm);

  const torch::nn::Conv2dOptions& options() const { return options_; }
  std::array<int64_t, 2> padding() const;

 protected:
  at::Tensor product(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) const override;

 private:
  torch::nn::Conv2dOptions options_;
};
TORCH_MODULE(FixedPointConv2d);

// Linear layer. As the last layer of a network its output is not rounded, and is in real values.
class QUANTRAIN_API FixedPointLinearImpl : public FixedPointLayer {
 public:
  FixedPointLinearImpl(const torch::nn::LinearOptions& options, const Recipe& recipe);

 protected:
  at::Tensor product(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) const override;
};
TORCH_MODULE(FixedPointLinear);

// The mean over the whole image, [N, C, H, W] -> [N, C, 1, 1]: the sum, a shift by the power of two 2^k nearest to H W,
// and what is left of the division in the eta of its output. State: `size`, int64 [2], height and width last seen.
class QUANTRAIN_API FixedPointAvgPool2dImpl : public torch::nn::Module, public Calibrates {
 public:
  FixedPointAvgPool2dImpl(std::shared_ptr<FixedPointActivationImpl> input_activation, const Recipe& recipe);
  at::Tensor forward(const at::Tensor& input);

  void begin_calibration() override { size_before_ = size.clone(); }
  void end_calibration(bool keep) override;

  at::Tensor size;
  FixedPointPoolActivation activation{nullptr};

 private:
  at::Tensor size_before_;
  friend class FixedPointGraphImpl;
  void read_size();  // where a checkpoint was loaded

  std::optional<uint32_t> version_;  // of size when last read
};
TORCH_MODULE(FixedPointAvgPool2d);

}  // namespace quantrain::nn
