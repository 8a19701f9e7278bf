// What the tests of QuantConvBn2d share: layers past their first values, and steps compared with the same layer run
// operator by operator.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include <quantrain/nn/layers.h>
#include <torch/csrc/autograd/function.h>
#include <torch/optim/sgd.h>

#include "support.h"

namespace conv_bn {

using support::largest_difference;
using namespace quantrain::nn;

using Options = torch::nn::Conv2dOptions;

inline constexpr const char* kNode = "ConvBatchNorm";

inline bool made_by(const at::Tensor& y, const std::string& node) {
  return y.grad_fn() && y.grad_fn()->name().find(node) != std::string::npos;
}

// A batch norm past its first values.
inline QuantConvBn2d layer_of(const Options& options, const Recipe& recipe, uint64_t seed = 0) {
  torch::manual_seed(seed);
  QuantConvBn2d layer(options, recipe);
  const at::NoGradGuard no_grad;
  layer->bn->weight.uniform_(0.5, 2.0);
  layer->bn->weight[1] *= -1;
  layer->bn->bias.normal_();
  layer->bn->running_mean.normal_();
  layer->bn->running_var.uniform_(0.5, 2.0);
  return layer;
}

inline QuantConvBn2d copy_of(const QuantConvBn2d& layer) {
  return QuantConvBn2d(std::dynamic_pointer_cast<QuantConvBn2dImpl>(layer->clone()));
}

// The same layer, operator by operator.
inline QuantConvBn2d long_way(const QuantConvBn2d& layer) {
  QuantConvBn2d copy = copy_of(layer);
  copy->set_output_hook([](const at::Tensor&, bool) {});
  return copy;
}

inline void check_state(const torch::nn::Module& found, const torch::nn::Module& wanted, double tolerance = 1e-5) {
  const auto check = [tolerance](const auto& a, const auto& b) {
    REQUIRE(a.keys() == b.keys());
    for (const auto& item : a) {
      INFO(item.key());
      CHECK(largest_difference(item.value(), b[item.key()]) <= tolerance);
    }
  };
  check(found.named_parameters(), wanted.named_parameters());
  check(found.named_buffers(), wanted.named_buffers());
}

inline void check_gradients(const torch::nn::Module& found, const torch::nn::Module& wanted, double tolerance = 1e-4) {
  const auto others = wanted.named_parameters();
  for (const auto& item : found.named_parameters()) {
    INFO(item.key());
    const at::Tensor& other = others[item.key()].grad();
    REQUIRE(item.value().grad().defined() == other.defined());
    if (other.defined())
      CHECK(largest_difference(item.value().grad(), other) <= tolerance * (1 + other.abs().max().item<double>()));
  }
}

struct Step {
  at::Tensor output, grad_input, grad_residual;
};

// Draws the same quantized gradients each time.
inline Step step(QuantConvBn2d layer, const at::Tensor& x, const at::Tensor& residual, const std::string& activation) {
  const at::Tensor input = x.detach().requires_grad_();
  const at::Tensor other = residual.defined() ? residual.detach().requires_grad_() : residual;
  const at::Tensor y = layer->forward_act(input, other, activation);
  layer->zero_grad();
  torch::manual_seed(5);
  y.backward(at::randn(y.sizes()));
  return {y, input.grad(), other.defined() ? other.grad() : other};
}

inline void check_steps(const Step& found, const Step& wanted) {
  CHECK(largest_difference(found.output, wanted.output) < 1e-5);
  CHECK(largest_difference(found.grad_input, wanted.grad_input) < 1e-5);
  if (wanted.grad_residual.defined()) CHECK(largest_difference(found.grad_residual, wanted.grad_residual) < 1e-5);
}

// [4, 4, 9, 8], as it may lie in memory.
inline std::vector<at::Tensor> images() {
  const at::Tensor x = at::randn({4, 4, 9, 8});
  return {x, x.contiguous(at::MemoryFormat::ChannelsLast), at::randn({9, 4, 8, 4}).permute({3, 1, 0, 2}),
          at::randn({4, 4, 18, 8}).slice(2, 0, std::nullopt, 2)};
}

// Two convolutions, the first's result rounded for the second or not.
struct PairImpl : torch::nn::Module {
  PairImpl(const Recipe& recipe, const std::string& activation)
      : first(register_module("first", layer_of(Options(4, 6, 3).padding(1).bias(false), recipe, 1))),
        second(register_module("second", layer_of(Options(6, 6, 3).padding(1).bias(false), recipe, 2))),
        activation_(activation) {}

  at::Tensor forward(const at::Tensor& x) {
    if (!joined) return second->forward_act(first->forward_act(x, {}, activation_), {}, "relu");
    between = first->forward_act_quantized(first->quantize_input(x), {}, activation_, second->input_fake_quant);
    return second->forward_act_quantized(between, {}, "relu").values;
  }

  QuantConvBn2d first, second;
  bool joined = true;
  Quantized between;

 private:
  std::string activation_;
};
TORCH_MODULE(Pair);

// Losses and state of two pairs over some steps of training, the ranges frozen before the last.
inline void check_pairs(Pair joined, Pair apart, double tolerance) {
  torch::optim::SGD first(joined->parameters(), torch::optim::SGDOptions(0.05).momentum(0.9)),
      second(apart->parameters(), torch::optim::SGDOptions(0.05).momentum(0.9));
  for (int batch = 0; batch < 4; ++batch) {
    INFO("batch " << batch);
    torch::manual_seed(40 + batch);
    const at::Tensor x = at::randn({4, 4, 9, 8}), target = at::randn({4, 6, 9, 8});
    if (batch == 3) {
      enable_observer(*joined, false);
      enable_observer(*apart, false);
    }
    const auto loss_of = [&](Pair& pair, torch::optim::SGD& optimizer) {
      const at::Tensor loss = (pair->forward(x) - target).square().mean();
      optimizer.zero_grad();
      torch::manual_seed(3);
      loss.backward();
      optimizer.step();
      return loss.item<double>();
    };
    CHECK(loss_of(joined, first) == Approx(loss_of(apart, second)).epsilon(tolerance));
    check_gradients(*joined, *apart);
    check_state(*joined, *apart, 1e-4);
  }
}

}  // namespace conv_bn
