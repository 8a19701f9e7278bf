// QuantConvBn2d with learned scales: the training step as one node past the scales' first values, against the same
// layer run operator by operator.

#include <cmath>
#include <string>
#include <vector>

#include <quantrain/amp/autocast.h>
#include <torch/csrc/autograd/autograd.h>

#include "conv_bn.h"
#include "recomputed.h"

using support::same_bits;
using namespace conv_bn;

namespace {

const Recipe& learned() {
  static const Recipe recipe = Recipe::from_name("qat-w4a4");
  return recipe;
}

const Options& plain() {
  static const Options options = Options(4, 6, 3).padding(1).bias(false);
  return options;
}

// Past the scales' first values, which calibration gives.
template <typename Module>
void calibrate(Module& module) {
  torch::manual_seed(30);
  const at::Tensor x = at::randn({4, 4, 9, 8});
  const Calibration calibration(*module);
  module->forward(x);
}

}  // namespace

TEST_CASE("with learned scales a training step of QuantConvBn2d is one node", "[conv_bn]") {
  const std::string activation = GENERATE("identity", "relu", "relu6", "hardswish");
  INFO(activation);
  QuantConvBn2d layer = layer_of(plain(), learned());
  calibrate(layer);
  QuantConvBn2d other = long_way(layer);
  for (const at::Tensor& x : images()) {
    const at::Tensor residual = activation == "hardswish" ? at::Tensor() : at::randn({4, 6, 9, 8});
    const Step found = step(layer, x, residual, activation), wanted = step(other, x, residual, activation);
    CHECK(made_by(found.output, kNode));
    CHECK_FALSE(made_by(wanted.output, kNode));
    check_steps(found, wanted);
    check_gradients(*layer, *other);
    check_state(*layer, *other);
  }
  CHECK(layer->weight_fake_quant->scale.grad().abs().min().item<double>() > 0);
  CHECK(layer->input_fake_quant->scale.grad().abs().min().item<double>() > 0);
}

TEST_CASE("a scale whose first value is not known yet goes the long way", "[conv_bn]") {
  QuantConvBn2d layer = layer_of(plain(), learned());
  const at::Tensor x = at::randn({4, 4, 9, 8});
  CHECK_FALSE(layer->quantize_input(x).codes.defined());
  CHECK_FALSE(made_by(layer->forward(x), kNode));  // takes the first values
  CHECK(layer->quantize_input(x).codes.defined());
  CHECK(made_by(layer->forward(x), kNode));

  QuantConvBn2d zero = layer_of(plain(), learned());
  {
    const at::NoGradGuard no_grad;
    zero->weight[2].fill_(0);
  }
  for (int batch = 0; batch < 3; ++batch) CHECK_FALSE(made_by(zero->forward(x), kNode));  // its scale follows
  enable_observer(*zero, false);
  CHECK(made_by(zero->forward(x), kNode));
}

TEST_CASE("other learned scales go the long way", "[conv_bn]") {
  const at::Tensor x = at::randn({4, 4, 9, 8});
  const auto in_one = [&](const Recipe& recipe) {
    QuantConvBn2d layer = layer_of(plain(), recipe);
    calibrate(layer);
    return made_by(layer->forward(x), kNode);
  };
  CHECK(in_one(learned()));
  Recipe recipe = learned();
  recipe.weight->granularity = Granularity::kPerTensor;
  CHECK_FALSE(in_one(recipe));
  recipe = learned();
  recipe.weight->symmetric = false;
  CHECK_FALSE(in_one(recipe));
}

TEST_CASE("frozen learned scales stay as they are, on the node", "[conv_bn]") {
  QuantConvBn2d layer = layer_of(plain(), learned());
  calibrate(layer);
  layer->weight_fake_quant->scale.set_requires_grad(false);
  layer->input_fake_quant->scale.set_requires_grad(false);
  QuantConvBn2d other = long_way(layer);
  const at::Tensor x = at::randn({4, 4, 9, 8});
  for (int batch = 0; batch < 2; ++batch) {
    const Step found = step(layer, x, {}, "relu"), wanted = step(other, x, {}, "relu");
    CHECK(made_by(found.output, kNode));
    check_steps(found, wanted);
    check_gradients(*layer, *other);
  }
  CHECK_FALSE(layer->weight_fake_quant->scale.grad().defined());
}

TEST_CASE("a reader's learned scale is trained in the batch norm's pass", "[conv_bn]") {
  const std::string activation = GENERATE("identity", "relu", "relu6", "silu");
  INFO(activation);
  Pair joined(learned(), activation), apart(learned(), activation);
  calibrate(joined);
  calibrate(apart);
  apart->joined = false;
  check_pairs(joined, apart, activation == "silu" ? 1e-5 : 1e-6);
  const at::Tensor y = joined->forward(at::randn({4, 4, 9, 8}));
  CHECK(made_by(y, kNode));
  const Quantized& between = joined->between;
  REQUIRE(between.codes.defined());
  CHECK(made_by(between.values, activation == "silu" ? "FakeQuantizeLearnedCodes" : kNode));
  CHECK_FALSE(between.scale.requires_grad());
  CHECK(
      same_bits(quantrain::dequantize(between.codes, between.scale,
                                      between.zero_point.defined() ? std::optional(between.zero_point) : std::nullopt),
                between.values.detach()));
}

TEST_CASE("a recomputed step with learned scales has the first one's gradients", "[conv_bn]") {
  const bool calibrated = GENERATE(true, false);  // else the first pass takes the first values
  Pair pair(learned(), "relu"), other(learned(), "relu");
  if (calibrated) calibrate(pair), calibrate(other);
  for (int batch = 0; batch < 2; ++batch) {
    const at::Tensor x = at::randn({4, 4, 9, 8});
    pair->zero_grad();
    other->zero_grad();
    support::Recomputed<Pair>::apply(x.clone().requires_grad_(), &pair).square().sum().backward();
    other->forward(x.clone().requires_grad_()).square().sum().backward();
    check_gradients(*pair, *other);
    check_state(*pair, *other);
  }
}

TEST_CASE("the node takes learned scales in autocast's type", "[conv_bn]") {
  Pair joined(learned(), "relu"), apart(learned(), "relu");
  calibrate(joined);
  calibrate(apart);
  apart->joined = false;
  const at::Tensor x = at::randn({4, 4, 9, 8});
  at::Tensor y, want;
  for (int batch = 0; batch < 2; ++batch) {
    const quantrain::amp::AutocastGuard autocast(at::kCPU, at::kBFloat16);
    y = joined->forward(x);
    want = apart->forward(x);
  }
  CHECK(made_by(y, kNode));
  CHECK(y.scalar_type() == at::kBFloat16);
  CHECK((y - want).abs().mean().item<double>() < 0.05);  // less rounding between the passes: a code of 4 bits apart
  y.sum().backward();
  for (const auto& item : joined->named_parameters()) {
    INFO(item.key());
    CHECK(item.value().grad().isfinite().all().item<bool>());
    CHECK(item.value().grad().scalar_type() == at::kFloat);
  }
}

TEST_CASE("a layer with second derivatives keeps its input and goes the long way", "[conv_bn]") {
  QuantConvBn2d layer = layer_of(plain(), Recipe::from_name("qat-w8a8"));
  const at::Tensor x = at::randn({4, 4, 9, 8});
  CHECK(made_by(layer->forward(x), kNode));
  layer->enable_second_derivatives();
  CHECK_FALSE(made_by(layer->forward(x), kNode));
  CHECK_FALSE(layer->quantize_input(x).codes.defined());
  CHECK(copy_of(layer)->second_derivatives());
}
