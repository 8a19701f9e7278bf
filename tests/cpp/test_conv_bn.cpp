// QuantConvBn2d's training step as one node, inputs kept as codes, and results rounded for the layers that read them,
// against the same layer run operator by operator (a layer with an output hook is) and against compositions by hand.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include <quantrain/amp/autocast.h>
#include <quantrain/nn/layers.h>
#include <quantrain/ops/batch_norm.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/optim/sgd.h>

#include "conv_bn.h"
#include "recomputed.h"
#include "support.h"

using Catch::Matchers::Contains;
using support::largest_difference;
using support::same_bits;
using support::value_error;
using namespace quantrain::nn;
using namespace conv_bn;

TEST_CASE("a training step of QuantConvBn2d is one node, equal to its operators one by one", "[conv_bn]") {
  const std::string recipe = GENERATE("qat-w8a8", "qat-w8a8-token", "fqt-psq4-paper", "fqt-bhq5");
  const std::string activation = GENERATE("identity", "relu", "relu6", "hardswish", "silu");
  INFO(recipe << ' ' << activation);
  QuantConvBn2d layer = layer_of(Options(4, 6, 3).padding(1).bias(false), Recipe::from_name(recipe));
  QuantConvBn2d other = long_way(layer);
  for (const at::Tensor& x : images()) {
    const bool adds = activation != "hardswish" && activation != "silu";
    const at::Tensor residual = adds ? at::randn({4, 6, 9, 8}) : at::Tensor();
    const Step found = step(layer, x, residual, activation), wanted = step(other, x, residual, activation);
    CHECK(made_by(found.output, kNode));
    CHECK_FALSE(made_by(wanted.output, kNode));
    check_steps(found, wanted);
    check_gradients(*layer, *other);
    check_state(*layer, *other);
  }
  CHECK(layer->bn->num_batches_tracked.item<int64_t>() == 4);
}

TEST_CASE("the node takes stride, padding, dilation and groups", "[conv_bn]") {
  for (const Options& options : {Options(4, 6, 1).bias(false), Options(4, 6, {3, 2}).stride({2, 1}).padding({1, 0}),
                                 Options(4, 8, 3).dilation(2).padding(2), Options(4, 4, 3).groups(4).padding(1)}) {
    QuantConvBn2d layer = layer_of(Options(options).bias(false), Recipe::from_name("qat-w8a8"));
    QuantConvBn2d other = long_way(layer);
    const at::Tensor x = at::randn({4, 4, 9, 8}), residual = at::randn_like(copy_of(layer)->forward(x));
    const Step found = step(layer, x, residual, "relu"), wanted = step(other, x, residual, "relu");
    CHECK(made_by(found.output, kNode));
    check_steps(found, wanted);
    check_gradients(*layer, *other);
    check_state(*layer, *other);
  }
}

TEST_CASE("what the node does not do goes the long way", "[conv_bn]") {
  const Recipe w8a8 = Recipe::from_name("qat-w8a8");
  const Options plain = Options(4, 6, 3).padding(1).bias(false);
  const at::Tensor x = at::randn({4, 4, 9, 8}), residual = at::randn({4, 6, 9, 8});
  const auto in_one = [&](QuantConvBn2d layer, const at::Tensor& other = {}, const std::string& activation = "relu") {
    const at::Tensor y = layer->forward_act(x, other, activation);
    y.square().sum().backward();
    CHECK(y.isfinite().all().item<bool>());
    CHECK(layer->weight.grad().isfinite().all().item<bool>());
    return made_by(y, kNode);
  };
  CHECK(in_one(layer_of(plain, w8a8), residual));
  CHECK_FALSE(in_one(layer_of(Options(4, 6, 3).padding(1), w8a8)));
  CHECK_FALSE(in_one(layer_of(Options(plain).padding(torch::kSame), w8a8)));
  CHECK_FALSE(in_one(layer_of(plain, Recipe::from_name("qat-w4a4"))));
  CHECK_FALSE(in_one(layer_of(plain, w8a8), residual, "silu"));
  CHECK_FALSE(in_one(layer_of(plain, w8a8), residual.narrow(0, 0, 1)));
  CHECK_FALSE(in_one(layer_of(plain, w8a8), residual.to(at::kDouble)));
  Recipe rounds_output = w8a8;
  rounds_output.output = rounds_output.input;
  CHECK_FALSE(in_one(layer_of(plain, rounds_output)));
  QuantConvBn2d without = layer_of(plain, w8a8);
  enable_fake_quant(*without, false);
  CHECK_FALSE(in_one(without));
  QuantConvBn2d cumulative(plain, w8a8, torch::nn::BatchNorm2dOptions(6).momentum(c10::nullopt));
  CHECK_FALSE(in_one(cumulative));
}

TEST_CASE("a frozen batch norm under training keeps its statistics and takes them as constants", "[conv_bn]") {
  QuantConvBn2d layer = layer_of(Options(4, 6, 3).padding(1).bias(false), Recipe::from_name("qat-w8a8"));
  layer->bn->eval();
  const at::Tensor x = at::randn({4, 4, 9, 8}), mean = layer->bn->running_mean.clone(),
                   variance = layer->bn->running_var.clone();
  const at::Tensor y = layer->forward(x);
  CHECK_FALSE(made_by(y, kNode));
  const auto [weight, sf] = quantrain::fold_fake_quantize(layer->weight, layer->bn->weight, variance);
  const at::Tensor product = at::conv2d(layer->input_fake_quant->forward(x), weight, {}, 1, 1);
  const at::Tensor want = at::batch_norm(product / sf.view({1, -1, 1, 1}), layer->bn->weight, layer->bn->bias, mean,
                                         variance, false, 0.1, layer->bn->options.eps(), false);
  CHECK(largest_difference(y, want) < 1e-4);
  y.sum().backward();
  CHECK(layer->weight.grad().defined());
  CHECK(same_bits(layer->bn->running_mean, mean));
  CHECK(same_bits(layer->bn->running_var, variance));
  CHECK(layer->bn->num_batches_tracked.item<int64_t>() == 0);
}

TEST_CASE("an image without its batch dimension is a batch of one", "[conv_bn]") {
  for (const char* recipe : {"qat-w8a8", "fqt-psq4-paper"}) {
    QuantConvBn2d layer = layer_of(Options(4, 6, 3).bias(false), Recipe::from_name(recipe)), other = copy_of(layer);
    const at::Tensor x = at::randn({4, 9, 8}), residual = at::randn({6, 7, 6});
    const at::Tensor y = layer->forward_act(x, residual, "relu");
    const at::Tensor want = other->forward_act(x.unsqueeze(0), residual.unsqueeze(0), "relu");
    CHECK_FALSE(made_by(y, kNode));
    CHECK(largest_difference(y, want.squeeze(0)) < 1e-5);
    check_state(*layer, *other);
  }
}

TEST_CASE("a fake-quantized input is kept as its codes", "[conv_bn]") {
  const auto options = Options(4, 6, 3).padding(1);
  torch::manual_seed(0);
  QuantConv2d layer(options, Recipe::from_name("qat-w8a8"));
  const at::Tensor x = at::randn({2, 4, 7, 7}), leaf = x.clone().requires_grad_();
  const at::Tensor y = layer->forward(leaf);
  CHECK(made_by(y, "QuantConv2d"));
  const Quantized input = layer->quantize_input(leaf);
  REQUIRE(input.codes.defined());
  CHECK(input.codes.scalar_type() == at::kByte);
  CHECK(same_bits(quantrain::dequantize(input.codes, input.scale, input.zero_point), input.values.detach()));
  const at::Tensor weight = layer->weight_fake_quant->forward(layer->weight);
  const at::Tensor plain = x.clone().requires_grad_();
  FakeQuantize quantizer = layer->input_fake_quant;
  quantizer->enable_observer(false);
  const at::Tensor again = layer->forward(leaf),
                   want = at::conv2d(quantizer->forward(plain), weight, layer->bias, 1, 1);
  CHECK(same_bits(again, want));
  const at::Tensor grad = at::randn_like(y);
  const auto found = torch::autograd::grad({again}, {leaf, layer->weight, layer->bias}, {grad});
  const auto wanted = torch::autograd::grad({want}, {plain, layer->weight, layer->bias}, {grad});
  for (size_t i = 0; i < found.size(); ++i) CHECK(largest_difference(found[i], wanted[i]) < 1e-5);

  const auto has_codes = [&](const Options& of, const char* recipe) {
    return QuantConv2d(of, Recipe::from_name(recipe))->quantize_input(x).codes.defined();
  };
  CHECK(has_codes(options, "qat-w8a8"));
  CHECK_FALSE(has_codes(Options(options).padding(torch::kSame), "qat-w8a8"));
  CHECK_FALSE(has_codes(options, "qat-w8a8-token"));
  CHECK_FALSE(has_codes(options, "qat-w4a4"));
  CHECK_FALSE(has_codes(options, "fqt-bhq5"));
  layer->eval();
  CHECK_FALSE(layer->quantize_input(x).codes.defined());
  layer->train();
  const at::NoGradGuard no_grad;
  CHECK_FALSE(layer->quantize_input(x).codes.defined());
}

TEST_CASE("ranges may move between a convolution and its backward pass", "[conv_bn]") {
  torch::manual_seed(0);
  QuantConv2d layer(Options(4, 6, 3), Recipe::from_name("qat-w8a8"));
  const at::Tensor x = at::randn({2, 4, 7, 7});
  const at::Tensor alone = torch::autograd::grad({layer->forward(x).sum()}, {layer->weight})[0];
  QuantConv2d twice(std::dynamic_pointer_cast<QuantConv2dImpl>(QuantConv2d(layer)->clone()));
  const at::Tensor first = twice->forward(x);
  twice->forward(10 * x);
  const at::Tensor wanted = torch::autograd::grad({first.sum()}, {twice->weight})[0];
  CHECK(largest_difference(alone, wanted) < 1e-4);
}

TEST_CASE("a reader's range and rounding go with the batch norm's pass", "[conv_bn]") {
  const std::string recipe = GENERATE("qat-w8a8", "qat-w4a4", "qat-w8a8-token", "fqt-psq4-paper", "fqt-bhq5");
  const std::string activation = GENERATE("identity", "relu", "relu6", "silu");
  INFO(recipe << ' ' << activation);
  Pair joined(Recipe::from_name(recipe), activation), apart(Recipe::from_name(recipe), activation);
  apart->joined = false;
  check_pairs(joined, apart, activation == "silu" ? 1e-5 : 1e-6);
}

TEST_CASE("the result comes with the reader's codes, on either way", "[conv_bn]") {
  const bool one_node = GENERATE(true, false);
  const bool symmetric = GENERATE(true, false);
  const std::string observer = GENERATE("moving_average", "min_max", "percentile");
  INFO(one_node << symmetric << observer);
  Recipe recipe = Recipe::from_name("qat-w8a8");
  recipe.input->symmetric = symmetric;
  recipe.input->observer = value_of<ObserverKind>(observer);
  Pair pair(recipe, "relu"), other(recipe, "relu");
  other->joined = false;
  if (!one_node) pair->first->set_output_hook([](const at::Tensor&, bool) {});
  const at::Tensor x = at::randn({4, 4, 9, 8});
  for (const bool frozen : {false, true}) {
    if (frozen) enable_observer(*pair, false), enable_observer(*other, false);
    const at::Tensor y = pair->forward(x), want = other->forward(x);
    CHECK(largest_difference(y, want) < 1e-5);
    const Quantized& between = pair->between;
    REQUIRE(between.codes.defined());
    CHECK(between.codes.scalar_type() == (symmetric ? at::kChar : at::kByte));
    CHECK(between.zero_point.defined() != symmetric);
    CHECK_FALSE(between.codes.requires_grad());
    CHECK(same_bits(quantrain::dequantize(between.codes, between.scale,
                                          symmetric ? std::nullopt : std::optional(between.zero_point)),
                    between.values.detach()));
    CHECK(same_bits(between.scale, pair->second->input_fake_quant->scale));
    check_state(*pair, *other);
  }
}

TEST_CASE("a pair with a reader calibrates, evaluates, converts and keeps its names", "[conv_bn]") {
  const Recipe recipe = Recipe::from_name("qat-w8a8");
  Pair joined(recipe, "relu"), apart(recipe, "relu");
  apart->joined = false;
  std::set<std::string> names;
  for (const auto& item : joined->named_parameters()) names.insert(item.key());
  for (const auto& item : joined->named_buffers()) names.insert(item.key());
  const at::Tensor x = at::randn({4, 4, 9, 8});
  for (Pair pair : {joined, apart}) {
    const Calibration calibration(*pair);
    pair->forward(x);
  }
  check_state(*joined, *apart, 0);
  for (Pair pair : {joined, apart}) pair->forward(x).sum().backward();
  std::set<std::string> after;
  for (const auto& item : joined->named_parameters()) after.insert(item.key());
  for (const auto& item : joined->named_buffers()) after.insert(item.key());
  CHECK(after == names);
  CHECK(names.size() == 22);
  CHECK(names.contains("second.input_fake_quant.observer.min_val"));
  CHECK(names.contains("first.bn.num_batches_tracked"));

  joined->eval();
  const at::NoGradGuard no_grad;
  const at::Tensor before = joined->forward(x);
  CHECK_FALSE(joined->between.codes.defined());
  joined->joined = false;
  CHECK(same_bits(joined->forward(x), before));
  joined->joined = true;
  convert(*joined);
  CHECK(same_bits(joined->forward(x), before));
}

TEST_CASE("a recomputed step moves no statistic and no range twice, and folds as the first", "[conv_bn]") {
  const bool watched = GENERATE(false, true);
  Pair pair(Recipe::from_name("qat-w8a8"), "relu"), other(Recipe::from_name("qat-w8a8"), "relu");
  if (watched) pair->first->set_output_hook([](const at::Tensor&, bool) {});
  for (int batch = 0; batch < 2; ++batch) {
    const at::Tensor x = at::randn({4, 4, 9, 8});
    pair->zero_grad();
    other->zero_grad();
    support::Recomputed<Pair>::apply(x.clone().requires_grad_(), &pair).square().sum().backward();
    other->forward(x.clone().requires_grad_()).square().sum().backward();
    check_gradients(*pair, *other);
    check_state(*pair, *other);
  }
  CHECK(pair->first->bn->num_batches_tracked.item<int64_t>() == 2);
}

TEST_CASE("NaN stops training in the reader's name, or is left out of its range", "[conv_bn]") {
  for (const bool one_node : {true, false}) {
    Pair pair(Recipe::from_name("qat-w8a8"), "relu");
    pair->second->set_label("second");
    if (!one_node) pair->first->set_output_hook([](const at::Tensor&, bool) {});
    {
      const at::NoGradGuard no_grad;
      pair->first->bn->bias[0] = std::nan("");
    }
    CHECK_THAT(value_error([&] { pair->forward(at::randn({4, 4, 9, 8})); }),
               Contains("Observer 'second.input_fake_quant.observer': expected a finite batch"));
  }
  Recipe skips = Recipe::from_name("qat-w8a8");
  skips.input->nan_policy = NanPolicy::kSkip;
  Pair pair(skips, "relu");
  pair->forward(at::randn({4, 4, 9, 8}));
  const at::Tensor range = pair->second->input_fake_quant->observer->max_val.clone();
  {
    const at::NoGradGuard no_grad;
    pair->first->bn->bias[0] = std::nan("");
  }
  CHECK(pair->forward(at::randn({4, 4, 9, 8})).isnan().any().item<bool>());
  CHECK(same_bits(pair->second->input_fake_quant->observer->max_val, range));
}

TEST_CASE("an unknown activation is refused before anything moves", "[conv_bn]") {
  QuantConvBn2d layer = layer_of(Options(4, 6, 3).bias(false), Recipe::from_name("qat-w8a8"));
  CHECK_THAT(value_error([&] { layer->forward_act(at::randn({4, 4, 9, 8}), {}, "gelu"); }),
             Contains("QuantConvBn2d: expected activation to be identity, relu, relu6, hardswish or silu, got 'gelu'"));
  CHECK(layer->bn->num_batches_tracked.item<int64_t>() == 0);
}

TEST_CASE("a pair in bfloat16 trains as its operators one by one", "[conv_bn]") {
  Pair joined(Recipe::from_name("qat-w8a8"), "relu"), apart(Recipe::from_name("qat-w8a8"), "relu");
  apart->joined = false;
  joined->to(at::kBFloat16);
  apart->to(at::kBFloat16);
  const at::Tensor x = at::randn({4, 4, 9, 8}).to(at::kBFloat16);
  const at::Tensor y = joined->forward(x), want = apart->forward(x);
  CHECK(y.scalar_type() == at::kBFloat16);
  CHECK(joined->between.codes.scalar_type() == at::kByte);
  CHECK(largest_difference(y, want) < 0.2);  // less rounding between the passes: a code apart
  CHECK((y - want).abs().mean().item<double>() < 5e-3);
  y.sum().backward();
  CHECK(joined->first->weight.grad().isfinite().all().item<bool>());
}

TEST_CASE("the node runs in autocast's type, as the operators one by one do", "[conv_bn]") {
  for (const char* recipe : {"qat-w8a8", "fqt-psq4-paper"}) {
    QuantConvBn2d layer = layer_of(Options(4, 6, 3).padding(1).bias(false), Recipe::from_name(recipe));
    QuantConvBn2d other = long_way(layer);
    const at::Tensor x = at::randn({4, 4, 9, 8}), residual = at::randn({4, 6, 9, 8}).to(at::kBFloat16);
    at::Tensor found, wanted;
    {
      const quantrain::amp::AutocastGuard autocast(at::kCPU, at::kBFloat16);
      found = layer->forward_act(x, residual, "relu");
      wanted = other->forward_act(x, residual, "relu");
      CHECK_FALSE(made_by(layer->forward_act(x, residual.to(at::kFloat), "relu"), kNode));  // promotes
      other->forward_act(x, residual.to(at::kFloat), "relu");
    }
    CHECK(made_by(found, kNode));
    CHECK(found.scalar_type() == at::kBFloat16);
    CHECK(same_bits(found, wanted));
    for (const at::Tensor& y : {found, wanted}) {
      torch::manual_seed(5);
      y.backward(at::randn(y.sizes()).to(at::kBFloat16));
    }
    CHECK(layer->weight.grad().scalar_type() == at::kFloat);
    check_gradients(*layer, *other, 1e-2);
    check_state(*layer, *other);
  }
}

TEST_CASE("on a GPU the node equals its operators, and a range that stands waits for no check", "[conv_bn][cuda]") {
  if (!support::has_cuda()) {
    WARN("skipped: no GPU");
    return;
  }
  at::globalContext().setAllowTF32CuDNN(false);
  Pair pair(Recipe::from_name("qat-w8a8"), "relu"), other(Recipe::from_name("qat-w8a8"), "relu");
  pair->to(at::kCUDA);
  other->to(at::kCUDA);
  other->first->set_output_hook([](const at::Tensor&, bool) {});
  for (int batch = 0; batch < 3; ++batch) {
    const at::Tensor x = at::randn({4, 4, 9, 8}).cuda().contiguous(at::MemoryFormat::ChannelsLast);
    pair->zero_grad();
    other->zero_grad();
    const at::Tensor y = pair->forward(x), want = other->forward(x);
    CHECK(pair->between.codes.scalar_type() == at::kByte);
    CHECK(largest_difference(y, want) < 1e-4);
    y.square().sum().backward();
    want.square().sum().backward();
    check_gradients(*pair, *other, 1e-3);
    check_state(*pair, *other, 1e-4);
  }
  const at::Tensor range = pair->second->input_fake_quant->observer->max_val.clone();
  {
    const at::NoGradGuard no_grad;
    pair->first->bn->bias.fill_(std::nan(""));
  }
  CHECK(pair->forward(at::randn({4, 4, 9, 8}).cuda()).isnan().all().item<bool>());
  CHECK(same_bits(pair->second->input_fake_quant->observer->max_val, range));
}

TEST_CASE("a sequential of QuantConvBn2d calls the node", "[conv_bn]") {
  const Recipe recipe = Recipe::from_name("qat-w8a8");
  torch::nn::Sequential model(layer_of(Options(4, 6, 3).bias(false), recipe),
                              layer_of(Options(6, 6, 3).bias(false), recipe));
  CHECK(made_by(model->forward(at::randn({4, 4, 9, 8})), kNode));
}
