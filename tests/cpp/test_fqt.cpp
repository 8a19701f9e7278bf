// fqt_linear, fqt_conv2d and the layers that use them: gradients against quantize_gradient by hand, the same draws as
// in Python.

#include <string>
#include <vector>

#include <ATen/ops/conv2d.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/modules/container/functional.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/optim/sgd.h>

#include "support.h"

using Catch::Matchers::Contains;
using quantrain::GradientQuantizer;
using quantrain::nn::GradientSpec;
using quantrain::nn::Recipe;
namespace qnn = quantrain::nn;

namespace {

// Leaves that need a gradient; the values are the same on every device.
at::Tensor leaf(at::IntArrayRef shape, at::Device device, uint64_t seed, at::ScalarType dtype = at::kFloat) {
  torch::manual_seed(seed);
  return at::randn(shape, at::kFloat).to(device, dtype).requires_grad_();
}

std::vector<at::Tensor> gradients(const at::Tensor& output, const std::vector<at::Tensor>& leaves,
                                  const at::Tensor& grad_output, uint64_t seed = 7) {
  torch::manual_seed(seed);
  return torch::autograd::grad({output}, leaves, {grad_output}, /*retain_graph=*/true);
}

at::Tensor quantized(const at::Tensor& gradient, int64_t bits, const char* quantizer, const char* rows) {
  quantrain::GradientQuantOptions options;
  options.rows = rows;
  return quantrain::quantize_gradient(gradient, bits, quantizer, options);
}

void check_linear(at::Device device) {
  const at::Tensor x = leaf({4, 5, 6}, device, 0), w = leaf({3, 6}, device, 1), b = leaf({3}, device, 2);
  const at::Tensor y = quantrain::fqt_linear(x, w, b, {"householder", 5}, {"per_channel", 8});
  CHECK(support::same_bits(y, at::linear(x, w, b)));
  const at::Tensor g = leaf({4, 5, 3}, device, 3).detach();
  const auto found = gradients(y, {x, w, b}, g);
  torch::manual_seed(7);
  const at::Tensor first = quantized(g, 5, "householder", "token"), second = quantized(g, 8, "per_channel", "token");
  CHECK(at::allclose(found[0], at::matmul(first, w), 1e-4, 1e-5));
  CHECK(at::allclose(found[1], second.flatten(0, 1).t().mm(x.flatten(0, 1)), 1e-4, 1e-5));
  CHECK(at::allclose(found[2], g.flatten(0, 1).sum(0), 1e-4, 1e-5));
}

void check_conv2d(at::Device device) {
  const at::Tensor x = leaf({6, 4, 9, 8}, device, 0), w = leaf({6, 2, 3, 3}, device, 1), b = leaf({6}, device, 2);
  const at::Tensor y = quantrain::fqt_conv2d(x, w, b, 2, 1, 1, 2, {"per_sample", 4}, {"per_tensor"});
  const at::Tensor exact = at::conv2d(x, w, b, 2, 1, 1, 2);
  CHECK(support::same_bits(y, exact));
  const at::Tensor g = leaf(y.sizes(), device, 3).detach();
  const auto found = gradients(y, {x, w, b}, g);
  torch::manual_seed(7);
  const at::Tensor first = quantized(g, 4, "per_sample", "sample"), second = quantized(g, 8, "per_tensor", "sample");
  CHECK(at::allclose(found[0], gradients(exact, {x}, first)[0], 1e-4, 1e-5));
  CHECK(at::allclose(found[1], gradients(exact, {w}, second)[0], 1e-4, 1e-5));
  CHECK(at::allclose(found[2], g.sum({0, 2, 3}), 1e-4, 1e-5));
}

Recipe gradients_only(const GradientSpec& grad_input, const GradientSpec& grad_weight) {
  Recipe recipe;
  recipe.name = "gradients";
  recipe.scheme = quantrain::nn::GradientQuantSpec(grad_input, grad_weight);
  return recipe;
}

template <typename Layer>
void calibrate(Layer& layer, const at::Tensor& x) {
  const qnn::Calibration calibrating(*layer);
  layer->forward(x);
}

}  // namespace

TEST_CASE("fqt_linear draws twice from the default generator", "[fqt]") { check_linear(at::kCPU); }
TEST_CASE("fqt_conv2d draws twice from the default generator", "[fqt]") { check_conv2d(at::kCPU); }

TEST_CASE("fqt_linear and fqt_conv2d on a GPU", "[fqt][cuda]") {
  if (!support::has_cuda()) return;
  check_linear(at::kCUDA);
  check_conv2d(at::kCUDA);
}

TEST_CASE("without quantizers the gradients are those of conv2d, with every padding", "[fqt]") {
  const at::Tensor x = leaf({3, 4, 9, 8}, at::kCPU, 0, at::kDouble), w = leaf({6, 2, 4, 3}, at::kCPU, 1, at::kDouble);
  const auto same = [&](const at::Tensor& mine, const at::Tensor& exact) {
    const at::Tensor g = leaf(exact.sizes(), at::kCPU, 2, at::kDouble).detach();
    const auto found = gradients(mine, {x, w}, g), expected = gradients(exact, {x, w}, g);
    return mine.equal(exact) && at::allclose(found[0], expected[0]) && at::allclose(found[1], expected[1]);
  };
  CHECK(same(quantrain::fqt_conv2d(x, w, {}, {2, 1}, {1, 2}, {1, 2}, 2),
             at::conv2d(x, w, {}, {2, 1}, {1, 2}, {1, 2}, 2)));
  CHECK(same(quantrain::fqt_conv2d(x, w, {}, 1, "same", 1, 2), at::conv2d(x, w, {}, 1, "same", 1, 2)));
  CHECK(same(quantrain::fqt_conv2d(x, w, {}, 1, "valid", 1, 2), at::conv2d(x, w, {}, 1, "valid", 1, 2)));
}

TEST_CASE("layers use the gradient specs of their recipe, and can switch them off", "[fqt]") {
  torch::manual_seed(0);
  qnn::QuantLinear layer(6, 5, Recipe::from_name("fqt-bhq5"));
  const at::Tensor x = leaf({12, 6}, at::kCPU, 1);
  calibrate(layer, x.detach());
  layer->eval();
  const at::Tensor g = leaf({12, 5}, at::kCPU, 2).detach();
  const at::Tensor input = layer->input_fake_quant->forward(x),
                   weight = layer->weight_fake_quant->forward(layer->weight);
  const at::Tensor by_hand = quantrain::fqt_linear(input, weight, layer->bias, {"householder", 5}, {"per_channel", 8});
  const auto expected = gradients(by_hand, {x, layer->weight, layer->bias}, g);
  const auto found = gradients(layer->forward(x), {x, layer->weight, layer->bias}, g);
  for (size_t i = 0; i < found.size(); ++i) CHECK(support::same_bits(found[i], expected[i]));

  qnn::enable_gradient_quant(*layer, false);
  const auto exact = gradients(at::linear(input, weight, layer->bias), {x, layer->weight}, g);
  const auto off = gradients(layer->forward(x), {x, layer->weight}, g);
  CHECK(support::same_bits(off[0], exact[0]));
  CHECK(support::same_bits(off[1], exact[1]));
  CHECK_FALSE(off[1].equal(found[1]));
}

TEST_CASE("convolution layers use them too, with and without a batch norm, until they are converted", "[fqt]") {
  const at::Tensor x = leaf({8, 4, 6, 6}, at::kCPU, 1);
  const at::Tensor g = leaf({8, 6, 6, 6}, at::kCPU, 2).detach();
  const Recipe recipe = gradients_only({4, "per_sample"}, {8, "auto"});
  for (const auto& padding : {torch::nn::Conv2dOptions::padding_t(torch::ExpandingArray<2>(1)),
                              torch::nn::Conv2dOptions::padding_t(torch::kSame)}) {
    torch::manual_seed(0);
    qnn::QuantConv2d conv(torch::nn::Conv2dOptions(4, 6, 3).padding(padding).groups(2), recipe);
    const auto expected =
        gradients(quantrain::fqt_conv2d(x, conv->weight, conv->bias, 1, 1, 1, 2, {"per_sample", 4}, {"per_tensor"}),
                  {x, conv->weight}, g);
    const auto found = gradients(conv->forward(x), {x, conv->weight}, g);
    CHECK(support::same_bits(found[0], expected[0]));
    CHECK(support::same_bits(found[1], expected[1]));
  }

  torch::manual_seed(0);
  qnn::QuantConvBn2d folded(torch::nn::Conv2dOptions(4, 6, 3).padding(1).bias(false),
                            Recipe::from_name("fqt-bhq4-paper"));
  calibrate(folded, x.detach());
  const at::Tensor y = folded->forward(x);
  const auto first = gradients(y, {folded->weight}, g, 1), again = gradients(y, {folded->weight}, g, 1);
  const auto other = gradients(y, {folded->weight}, g, 2);
  CHECK(first[0].equal(again[0]));
  CHECK_FALSE(first[0].equal(other[0]));
  folded->eval();
  const at::Tensor before = folded->forward(x.detach());
  qnn::convert(*folded);
  CHECK(folded->forward(x.detach()).equal(before));
}

TEST_CASE("NaN in the gradient of the output reaches the parameters", "[fqt]") {
  qnn::QuantLinear layer(6, 5, Recipe::from_name("fqt-bhq4"));
  const at::Tensor x = leaf({12, 6}, at::kCPU, 1);
  calibrate(layer, x.detach());
  at::Tensor g = at::ones({12, 5});
  g[3][1] = std::nan("");
  for (const at::Tensor& gradient : gradients(layer->forward(x), {x, layer->weight, layer->bias}, g)) {
    CHECK_FALSE(gradient.isfinite().all().item<bool>());
  }
}

TEST_CASE("the mean of the quantized gradients is the exact gradient", "[fqt]") {
  const at::Tensor x = leaf({24, 6}, at::kCPU, 0), w = leaf({5, 6}, at::kCPU, 1);
  const at::Tensor y = quantrain::fqt_linear(x, w, {}, {"householder", 3}, {"per_channel", 3});
  const at::Tensor g = leaf({24, 5}, at::kCPU, 2).detach() * at::logspace(0, -3, 24).reshape({24, 1});
  const auto exact = gradients(at::linear(x, w), {x, w}, g);
  constexpr int kDraws = 3000;
  double sums[2] = {}, squares[2] = {};
  const std::vector<at::Tensor> along = {leaf({24, 6}, at::kCPU, 5).detach(), leaf({5, 6}, at::kCPU, 6).detach()};
  for (int draw = 0; draw < kDraws; ++draw) {
    const auto found = gradients(y, {x, w}, g, 100 + draw);
    for (size_t i = 0; i < 2; ++i) {
      const double error = ((found[i] - exact[i]) * along[i]).sum(at::kDouble).item<double>();
      sums[i] += error;
      squares[i] += error * error;
    }
  }
  for (size_t i = 0; i < 2; ++i) {
    const double mean = sums[i] / kDraws, variance = squares[i] / kDraws - mean * mean;
    CHECK(variance > 0);
    CHECK(std::abs(mean) / std::sqrt(variance / kDraws) < 5.03);  // two tests, false alarm 1e-6 together
  }
}

TEST_CASE("a network with quantized gradients trains, saves and loads its recipe", "[fqt]") {
  torch::manual_seed(0);
  const Recipe recipe = Recipe::from_name("fqt-bhq5");
  qnn::QuantLinear first(8, 16, recipe), second(16, 2, recipe);
  torch::nn::Sequential model(first, torch::nn::Functional(at::relu), second);
  const at::Tensor x = at::randn({64, 8}), labels = (x.sum(1) > 0).to(at::kLong);
  {
    const qnn::Calibration calibrating(*model);
    model->forward(x);
  }
  torch::optim::SGD optimizer(model->parameters(), torch::optim::SGDOptions(0.5).momentum(0.9));
  double before = 0, after = 0;
  for (int step = 0; step < 60; ++step) {
    const at::Tensor loss = at::cross_entropy_loss(model->forward(x), labels);
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    (step == 0 ? before : after) = loss.item<double>();
  }
  CHECK(after < 0.3 * before);

  const support::TemporaryFolder folder;
  qnn::save_checkpoint(folder.file("model.safetensors"), *model, recipe);
  CHECK(*qnn::read_checkpoint_info(folder.file("model.safetensors")).recipe == recipe);
}

TEST_CASE("bad arguments of fqt_linear and fqt_conv2d are refused by the forward pass", "[fqt]") {
  const at::Tensor x = at::ones({4, 6}), w = at::ones({5, 6});
  const auto message = [&](const GradientQuantizer& quantizer) {
    return support::value_error([&] { quantrain::fqt_linear(x, w, {}, quantizer); });
  };
  CHECK_THAT(message({"bhq"}),
             Contains("fqt_linear: expected grad_input to be one of none, per_tensor") && Contains("got 'bhq'"));
  CHECK_THAT(message({"per_sample", 1}), Contains("expected grad_input_bits in 2 to 8, got 1"));
  CHECK_THAT(message({"per_sample", 8, "row"}), Contains("expected grad_input_rows to be one of sample, token"));
  CHECK_THAT(support::value_error([&] { quantrain::fqt_linear(x, at::ones({5, 7})); }),
             Contains("expected input [..., K]"));
  CHECK_THROWS_AS(quantrain::fqt_linear(x, w.to(at::kHalf)), c10::TypeError);
  CHECK_THAT(support::value_error(
                 [&] { quantrain::fqt_conv2d(at::ones({1, 2, 5, 5}), at::ones({2, 2, 3, 3}), {}, 2, "same"); }),
             Contains("expected stride 1 with padding 'same', got 2"));
}
