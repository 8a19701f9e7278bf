#include "support.h"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <ATen/Context.h>
#include <quantrain/nn/layers.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/conv.h>
#include <torch/optim/sgd.h>

using Catch::Matchers::Contains;
using namespace quantrain::nn;
using support::largest_difference;
using support::same_bits;
using support::value_error;

namespace {

Recipe affine_weight_recipe(int64_t bits) {
  Recipe recipe = Recipe::from_name("qat-w8a8");
  recipe.weight->symmetric = false;
  recipe.weight->bits = bits;
  recipe.name = "affine";
  return recipe;
}

std::vector<Recipe> recipes() {
  std::vector<Recipe> all = {affine_weight_recipe(8), affine_weight_recipe(3)};
  for (const std::string& name : Recipe::names()) {
    const Recipe recipe = Recipe::from_name(name);
    // The others: test_int8_layers, test_fixed_point_conv, test_four_bit_layers; w8a16 is not bit for bit.
    const bool packed = (recipe.scheme && recipe.scheme->packs_weight()) || recipe.prune;  // or rounds nothing
    if (!recipe.linear_only() && !recipe.scheme_as<quantrain::nn::FixedPointSpec>() && !packed && name != "w8a16")
      all.push_back(recipe);
  }
  Recipe output = Recipe::from_name("qat-w8a8");
  output.output = output.input;
  output.name = "with output";
  all.push_back(output);
  return all;
}

template <typename Layer>
void calibrate(Layer& layer, const at::Tensor& input) {
  const Calibration calibration(*layer);
  layer->forward(input);
}

// Converts a calibrated layer and compares it with its own evaluation mode.
template <typename Layer>
void check_conversion(Layer& layer, const at::Tensor& input) {
  layer->eval();
  const at::NoGradGuard no_grad;
  const at::Tensor before = layer->forward(input);
  layer->convert_();
  CHECK(same_bits(layer->forward(input), before));
  CHECK(layer->parameters().empty());
  CHECK(layer->named_buffers().contains("weight_codes"));
  CHECK_FALSE(layer->named_buffers().contains("weight"));
  CHECK_FALSE(layer->weight.defined());
  CHECK(layer->named_buffers().contains("weight_scale"));
}

}  // namespace

TEST_CASE("QuantLinear is a linear map of quantized input and weight", "[layers]") {
  torch::manual_seed(3);
  const Recipe recipe = Recipe::from_name("qat-w8a8-token");
  QuantLinear layer(64, 16, recipe);
  const at::Tensor x = at::randn({2, 5, 64});
  const auto [x_scale, x_zero] = quantrain::choose_qparams(x, {2, 5, 1}, 0, 255, false);
  const auto [w_scale, w_zero] = quantrain::choose_qparams(layer->weight.detach(), {16, 1});
  const at::Tensor expected =
      at::linear(quantrain::fake_quantize(x, x_scale, x_zero, 0, 255),
                 quantrain::fake_quantize(layer->weight.detach(), w_scale), layer->bias.detach());
  CHECK(same_bits(layer->forward(x).detach(), expected));
}

TEST_CASE("groups divide the rows of a matrix, or each row has one scale", "[layers]") {
  const Recipe recipe = Recipe::from_name("ptq-w4a8");
  CHECK(QuantLinear(64, 8, recipe)->weight_fake_quant->scale.sizes().vec() == std::vector<int64_t>{8, 2});
  CHECK(QuantLinear(40, 8, recipe)->weight_fake_quant->scale.sizes().vec() == std::vector<int64_t>{8, 1});
  const QuantConv2d conv(torch::nn::Conv2dOptions(32, 8, 3), recipe);
  CHECK(conv->weight_fake_quant->scale.sizes().vec() == std::vector<int64_t>{8, 1, 1, 1});
}

TEST_CASE("QuantConv2d takes stride, padding, dilation and groups as torch's", "[layers]") {
  torch::manual_seed(4);
  using Options = torch::nn::Conv2dOptions;
  const std::vector<Options> all = {Options(4, 8, 3),
                                    Options(4, 8, {3, 2}).stride({2, 1}).padding({1, 0}),
                                    Options(4, 8, 3).dilation(2).padding(2),
                                    Options(4, 8, 3).groups(2).bias(false),
                                    Options(4, 4, 3).groups(4).padding(1),
                                    Options(4, 8, 3).padding(torch::kSame),
                                    Options(4, 8, 1).padding(torch::kValid)};
  const at::Tensor x = at::randn({2, 4, 9, 9});
  for (const Options& options : all) {
    QuantConv2d layer(options, Recipe::from_name("qat-w8a8"));
    enable_fake_quant(*layer, false);
    torch::nn::Conv2d reference(options);
    const at::NoGradGuard no_grad;
    reference->weight.copy_(layer->weight);
    if (layer->bias.defined()) reference->bias.copy_(layer->bias);
    CHECK(same_bits(layer->forward(x), reference->forward(x)));
    enable_fake_quant(*layer, true);
    CHECK(largest_difference(layer->forward(x), reference->forward(x)) < 0.1);
  }
}

TEST_CASE("QuantConvBn2d folds the batch norm in evaluation and trains its statistics", "[layers]") {
  torch::manual_seed(5);
  const bool has_bias = GENERATE(false, true);
  const auto options = torch::nn::Conv2dOptions(3, 6, 3).padding(1).bias(has_bias);
  QuantConvBn2d layer(options, Recipe::from_name("qat-w8a8"));
  torch::nn::Conv2d conv(options);
  torch::nn::BatchNorm2d bn(6);
  {
    const at::NoGradGuard no_grad;
    layer->bn->weight.uniform_(0.5, 2.0);
    layer->bn->bias.normal_();
    conv->weight.copy_(layer->weight);
    if (has_bias) conv->bias.copy_(layer->bias);
    bn->weight.copy_(layer->bn->weight);
    bn->bias.copy_(layer->bn->bias);
  }
  enable_fake_quant(*layer, false);
  const at::Tensor x = at::randn({4, 3, 8, 8});
  for (int batch = 0; batch < 3; ++batch) {
    CHECK(largest_difference(layer->forward(x), bn->forward(conv->forward(x))) < 1e-4);
  }
  CHECK(largest_difference(layer->bn->running_mean, bn->running_mean) < 1e-5);
  CHECK(largest_difference(layer->bn->running_var, bn->running_var) < 1e-5);
  CHECK(layer->bn->num_batches_tracked.item<int64_t>() == 3);
  layer->eval();
  bn->eval();
  CHECK(largest_difference(layer->forward(x), bn->forward(conv->forward(x))) < 1e-4);
}

TEST_CASE("a channel whose batch-norm weight is zero gives no NaN in training", "[layers]") {
  QuantConvBn2d layer(torch::nn::Conv2dOptions(2, 4, 3), Recipe::from_name("qat-w8a8"));
  {
    const at::NoGradGuard no_grad;
    layer->bn->weight[1] = 0;
  }
  const at::Tensor y = layer->forward(at::randn({2, 2, 6, 6}));
  y.square().sum().backward();
  CHECK(y.isfinite().all().item<bool>());
  CHECK(layer->weight.grad().isfinite().all().item<bool>());
}

TEST_CASE("QuantEmbedding equals looking up in the quantized table", "[layers]") {
  torch::manual_seed(6);
  const at::Tensor indices = at::randint(0, 20, {3, 4}, at::kLong);
  for (const char* granularity : {"per_tensor", "per_channel", "per_group"}) {
    for (const char* observer : {"dynamic", "min_max"}) {
      INFO(granularity << " " << observer);
      Recipe recipe = Recipe::from_name("qat-w4a8");
      recipe.weight->granularity = quantrain::nn::value_of<quantrain::nn::Granularity>(granularity);
      recipe.weight->observer = quantrain::nn::value_of<quantrain::nn::ObserverKind>(observer);
      QuantEmbedding layer(20, 64, recipe);
      CHECK_FALSE(layer->input_fake_quant);
      const at::Tensor rows = layer->forward(indices).detach();
      const at::Tensor table = layer->weight_fake_quant->forward(layer->weight).detach();
      CHECK(same_bits(rows, at::embedding(table, indices)));
      check_conversion(layer, indices);
    }
  }
}

TEST_CASE("conversion gives what evaluation gave, bit for bit, under every recipe", "[layers]") {
  torch::manual_seed(7);
  for (const Recipe& recipe : recipes()) {
    INFO(recipe.name);
    const at::Tensor rows = at::randn({5, 64});
    QuantLinear linear(64, 6, recipe);
    calibrate(linear, rows);
    check_conversion(linear, rows);
    QuantLinear odd(7, 3, recipe);
    calibrate(odd, rows.slice(1, 0, 7));
    check_conversion(odd, rows.slice(1, 0, 7));
    const at::Tensor images = at::randn({2, 3, 8, 8});
    QuantConv2d conv(torch::nn::Conv2dOptions(3, 5, 3).padding(1), recipe);
    calibrate(conv, images);
    check_conversion(conv, images);
    QuantConvBn2d conv_bn(torch::nn::Conv2dOptions(3, 5, 3).bias(false), recipe);
    enable_observer(*conv_bn, true);
    conv_bn->forward(images);
    calibrate(conv_bn, images);
    check_conversion(conv_bn, images);
    CHECK(conv_bn->named_buffers().contains("bias"));
    CHECK_FALSE(conv_bn->bn);
  }
}

TEST_CASE("converted weights are int8, uint8, or two codes a byte", "[layers]") {
  const auto weight_of = [](const Recipe& recipe) {
    QuantLinear layer(7, 3, recipe);
    calibrate(layer, at::randn({4, 7}));
    layer->convert_();
    return layer->weight_codes;
  };
  const at::Tensor int8 = weight_of(Recipe::from_name("qat-w8a8"));
  CHECK(int8.scalar_type() == at::kChar);
  CHECK(int8.sizes().vec() == std::vector<int64_t>{3, 7});
  CHECK(weight_of(affine_weight_recipe(8)).scalar_type() == at::kByte);
  const at::Tensor packed = weight_of(Recipe::from_name("qat-w4a8"));
  CHECK(packed.scalar_type() == at::kByte);
  CHECK(packed.sizes().vec() == std::vector<int64_t>{3, 4});
}

TEST_CASE("dequantized_weight is the weight that a converted layer stands for, in the layer's type", "[layers]") {
  for (const char* name : {"qat-w8a8-token", "qat-w4a8"}) {
    QuantLinear layer(7, 3, Recipe::from_name(name));
    calibrate(layer, at::randn({4, 7}));
    CHECK_THAT(value_error([&] { (void)layer->dequantized_weight(); }), Contains("expected a converted QuantLinear"));
    layer->eval();
    const at::Tensor rounded = layer->weight_fake_quant->forward(layer->weight.detach());
    layer->convert_();
    CHECK(same_bits(layer->dequantized_weight(), rounded));
    layer->to(at::kHalf);
    CHECK(same_bits(layer->dequantized_weight(), rounded.to(at::kHalf)));
    CHECK(layer->dequantized_weight(at::kFloat).scalar_type() == at::kFloat);
  }
}

TEST_CASE("a model with a layer that cannot convert is left as it was", "[layers]") {
  torch::nn::Sequential model;
  QuantLinear good(4, 4, Recipe::from_name("qat-w8a8-token"));
  model->push_back("good", good);
  SECTION("a scale that was never observed") {
    model->push_back("bad", QuantLinear(4, 4, Recipe::from_name("qat-w8a8")));
    CHECK_THAT(value_error([&] { convert(*model); }), Contains("to be observed or loaded"));
  }
  SECTION("no weight spec") {
    Recipe recipe = Recipe::from_name("qat-w8a8-token");
    recipe.weight.reset();
    model->push_back("bad", QuantLinear(4, 4, recipe));
    CHECK_THAT(value_error([&] { convert(*model); }), Contains("expected a weight spec"));
  }
  SECTION("more than 8 bits") {
    Recipe recipe = Recipe::from_name("qat-w8a8-token");
    recipe.weight->bits = 12;
    model->push_back("bad", QuantLinear(4, 4, recipe));
    CHECK_THAT(value_error([&] { convert(*model); }), Contains("at most 8, got 12"));
  }
  CHECK_FALSE(good->converted());
  CHECK(good->named_parameters().contains("weight"));
}

TEST_CASE("a module with no quantized layer, or a converted one, is refused", "[layers]") {
  torch::nn::Sequential model(torch::nn::BatchNorm2d(3));
  CHECK_THAT(value_error([&] { convert(*model); }), Contains("expected a module with a quantized layer"));
  QuantLinear layer(4, 4, Recipe::from_name("qat-w8a8-token"));
  layer->convert_();
  CHECK_THAT(value_error([&] { layer->convert_(); }), Contains("got a converted one"));
}

TEST_CASE("Calibration observes in evaluation mode without rounding, and puts the modes back", "[layers]") {
  torch::manual_seed(8);
  QuantConvBn2d layer(torch::nn::Conv2dOptions(2, 4, 3), Recipe::from_name("qat-w4a4"));
  const at::Tensor x = at::randn({2, 2, 6, 6});
  {
    const Calibration calibration(*layer);
    CHECK_FALSE(layer->is_training());
    CHECK_FALSE(layer->forward(x).requires_grad());
  }
  CHECK(layer->is_training());
  CHECK(layer->bn->is_training());
  CHECK(layer->bn->num_batches_tracked.item<int64_t>() == 0);
  CHECK(layer->weight_fake_quant->has_scale());
  CHECK(layer->input_fake_quant->has_scale());
  CHECK(layer->input_fake_quant->observer_enabled());  // the range goes on following training
  CHECK(layer->input_fake_quant->fake_quant_enabled());
}

TEST_CASE("a quantized network learns under every recipe", "[layers]") {
  for (const char* name : {"qat-w8a8", "qat-w8a8-token", "qat-w4a8", "qat-w4a4"}) {
    INFO(name);
    torch::manual_seed(9);
    const Recipe recipe = Recipe::from_name(name);
    torch::nn::Sequential model(QuantConvBn2d(torch::nn::Conv2dOptions(1, 8, 3), recipe),
                                QuantConv2d(torch::nn::Conv2dOptions(8, 4, 3), recipe));
    const at::Tensor x = at::randn({16, 1, 8, 8});
    const at::Tensor target = at::randn({16, 4, 4, 4});
    torch::optim::SGD optimizer(model->parameters(), torch::optim::SGDOptions(0.05).momentum(0.9));
    double first = 0;
    double last = 0;
    for (int step = 0; step < 20; ++step) {
      const at::Tensor loss = (model->forward(x) - target).square().mean();
      optimizer.zero_grad();
      loss.backward();
      optimizer.step();
      last = loss.item<double>();
      if (step == 0) first = last;
    }
    CHECK(last < 0.95 * first);
  }
}

TEST_CASE("layers run in bfloat16, prepared and converted", "[layers]") {
  QuantLinear layer(8, 4, Recipe::from_name("qat-w8a8"));
  calibrate(layer, at::randn({4, 8}));
  layer->to(at::kBFloat16);
  const at::Tensor x = at::randn({4, 8}, at::kBFloat16);
  CHECK(layer->input_fake_quant->scale.scalar_type() == at::kFloat);
  check_conversion(layer, x);
  layer->to(at::kHalf);
  CHECK(layer->weight_codes.scalar_type() == at::kChar);
  CHECK(layer->weight_scale.scalar_type() == at::kFloat);
  CHECK(layer->dequantized_weight().scalar_type() == at::kHalf);
}

TEST_CASE("NaN in the input is seen in the output", "[layers]") {
  QuantLinear layer(4, 2, Recipe::from_name("qat-w8a8-token"));
  at::Tensor x = at::ones({3, 4});
  x[1][2] = std::numeric_limits<float>::quiet_NaN();
  CHECK(layer->forward(x).isnan().any(1).equal(at::tensor({0, 1, 0}).to(at::kBool)));
}

TEST_CASE("layers refuse options they cannot keep", "[layers]") {
  const Recipe recipe = Recipe::from_name("qat-w8a8");
  CHECK_THAT(value_error([&] { QuantConv2d layer(torch::nn::Conv2dOptions(4, 6, 3).groups(4), recipe); }),
             Contains("expected groups to divide 4 input and 6 output channels, got 4"));
  CHECK_THAT(
      value_error([&] { QuantConv2d layer(torch::nn::Conv2dOptions(4, 6, 3).padding_mode(torch::kReflect), recipe); }),
      Contains("padding_mode zeros"));
  CHECK_THAT(value_error([&] {
               QuantConvBn2d layer(torch::nn::Conv2dOptions(4, 6, 3), recipe, torch::nn::BatchNorm2dOptions(5));
             }),
             Contains("over 6 channels, got 5"));
  CHECK_THAT(value_error([&] { QuantEmbedding layer(torch::nn::EmbeddingOptions(4, 6).max_norm(1.0), recipe); }),
             Contains("no max_norm"));
  Recipe empty;
  CHECK_THROWS_AS(QuantLinear(4, 4, empty), std::invalid_argument);
}

TEST_CASE("layers train and convert on a GPU as on the CPU", "[layers][cuda]") {
  if (!support::has_cuda()) {
    WARN("skipped: no GPU");
    return;
  }
  at::globalContext().setAllowTF32CuDNN(false);
  torch::manual_seed(10);
  QuantConvBn2d layer(torch::nn::Conv2dOptions(3, 8, 3), Recipe::from_name("qat-w4a4"));
  const at::Tensor x = at::randn({4, 3, 10, 10});
  calibrate(layer, x);
  layer->eval();
  const at::NoGradGuard no_grad;
  const at::Tensor cpu = layer->forward(x);
  layer->to(at::kCUDA);
  CHECK(largest_difference(layer->forward(x.cuda()).cpu(), cpu) < 1e-3);
  check_conversion(layer, x.cuda());
}
