// QuantConv1d and QuantConvTranspose2d: against the operators they are made of, converted against fake-quantized, and
// what they refuse.

#include "support.h"

#include <vector>

#include <quantrain/nn/convolutions.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/modules/conv.h>

using Catch::Matchers::Contains;
using namespace quantrain::nn;
using support::same_bits;
using support::value_error;

namespace {

torch::nn::Conv1dOptions conv1d_options() {
  return torch::nn::Conv1dOptions(4, 6, 5).stride(2).padding(2).dilation(1).groups(2);
}

torch::nn::ConvTranspose2dOptions transposed_options(int64_t groups) {
  return torch::nn::ConvTranspose2dOptions(4, 6, {3, 2}).stride(2).padding(1).output_padding(1).groups(groups);
}

// Calibrates a layer on the input, converts it, and compares with its own evaluation mode.
template <typename Layer>
void check_conversion(Layer& layer, const at::Tensor& input) {
  {
    const Calibration calibration(*layer);
    layer->forward(input);
  }
  layer->eval();
  const at::NoGradGuard no_grad;
  const at::Tensor before = layer->forward(input);
  layer->convert_();
  CHECK(same_bits(layer->forward(input), before));
  CHECK(layer->parameters().empty());
}

}  // namespace

TEST_CASE("QuantConv1d is a convolution of quantized input and weight", "[layers]") {
  torch::manual_seed(1);
  QuantConv1d layer(conv1d_options(), Recipe::from_name("qat-w8a8-token"));
  const at::Tensor x = at::randn({3, 4, 16});
  const at::NoGradGuard no_grad;
  const at::Tensor w = quantrain::fake_quantize_dynamic(layer->weight, {6, 1, 1}, -128, 127, true);
  const at::Tensor input = quantrain::fake_quantize_dynamic(x, {3, 1, 1}, 0, 255, false);
  CHECK(same_bits(layer->forward(x), at::conv1d(input, w, layer->bias, 2, 2, 1, 2)));
}

TEST_CASE("converted QuantConv1d and QuantConvTranspose2d equal the fake-quantized ones", "[layers]") {
  torch::manual_seed(2);
  for (const char* name : {"qat-w8a8", "qat-w8a8-token", "qat-w4a8", "qat-w4a4", "ptq-w8a8", "ptq-w4a8"}) {
    INFO(name);
    const Recipe recipe = Recipe::from_name(name);
    QuantConv1d conv(conv1d_options(), recipe);
    check_conversion(conv, at::randn({3, 4, 16}));
    QuantConv1d same(torch::nn::Conv1dOptions(4, 6, 3).padding(torch::kSame).bias(false), recipe);
    check_conversion(same, at::randn({3, 4, 7}));
    for (const int64_t groups : {1, 2}) {
      QuantConvTranspose2d transposed(transposed_options(groups), recipe);
      const at::Tensor weight = transposed->weight.detach();
      check_conversion(transposed, at::randn({2, 4, 5, 6}));
      CHECK(transposed->weight_shape() == std::vector<int64_t>{6, 4 / groups, 3, 2});
      CHECK(transposed->dequantized_weight().sizes().vec() == transposed->weight_shape());
      CHECK(weight.sizes().vec() == std::vector<int64_t>{4, 6 / groups, 3, 2});
    }
  }
}

TEST_CASE("QuantConvTranspose2d has one scale an output channel and the float layer's gradient", "[layers]") {
  torch::manual_seed(3);
  for (const int64_t groups : {1, 2}) {
    QuantConvTranspose2d layer(transposed_options(groups), Recipe::from_name("qat-w8a8-token"));
    CHECK(layer->weight_fake_quant->scale_shape() == std::vector<int64_t>{6, 1, 1, 1});
    torch::nn::ConvTranspose2d reference(transposed_options(groups));
    {
      const at::NoGradGuard no_grad;
      // Every output channel of another size: a scale shared between two would cost the smaller its bits.
      const at::Tensor sizes = at::pow(10, at::arange(6 / groups).to(at::kFloat)).reshape({1, -1, 1, 1});
      layer->weight.mul_(sizes);
      reference->weight.copy_(layer->weight);
      reference->bias.copy_(layer->bias);
    }
    const at::Tensor x = at::randn({2, 4, 5, 6}).requires_grad_();
    const at::Tensor y = layer->forward(x);
    const at::Tensor expected = reference->forward(x);
    const at::Tensor error = (y - expected).detach().norm(2, {0, 2, 3}) / expected.detach().norm(2, {0, 2, 3});
    CHECK(error.max().item<double>() < 0.02);
    const at::Tensor mine = torch::autograd::grad({y.sum()}, {layer->weight})[0];
    const at::Tensor theirs = torch::autograd::grad({expected.sum()}, {reference->weight})[0];
    CHECK((mine - theirs).norm().item<double>() < 0.02 * theirs.norm().item<double>());
  }
}

TEST_CASE("QuantConv1d quantizes gradients as an image of one row", "[layers]") {
  const Recipe recipe = Recipe::from_name("fqt-bhq5");
  QuantConv1d one(conv1d_options(), recipe);
  QuantConv2d two(torch::nn::Conv2dOptions(4, 6, {1, 5}).stride({1, 2}).padding({0, 2}).groups(2), recipe);
  {
    const at::NoGradGuard no_grad;
    two->weight.copy_(one->weight.unsqueeze(2));
    two->bias.copy_(one->bias);
  }
  const at::Tensor x = at::randn({3, 4, 16});
  std::vector<at::Tensor> gradients;
  for (const bool first : {true, false}) {
    torch::manual_seed(4);
    at::Tensor batch = (first ? x : x.unsqueeze(2)).clone().requires_grad_();
    const at::Tensor y = first ? one->forward(batch) : two->forward(batch);
    const auto found = torch::autograd::grad({y.sin().sum()}, {batch, first ? one->weight : two->weight});
    for (const at::Tensor& gradient : found) gradients.push_back(gradient.flatten());
  }
  CHECK(same_bits(gradients[0], gradients[2]));
  CHECK(same_bits(gradients[1], gradients[3]));
}

TEST_CASE("QuantConv1d and QuantConvTranspose2d refuse what they cannot compute", "[layers]") {
  const Recipe recipe = Recipe::from_name("qat-w8a8");
  CHECK_THAT(value_error([&] { QuantConv1d(torch::nn::Conv1dOptions(4, 6, 3).groups(4), recipe); }),
             Contains("expected groups to divide 4 input and 6 output channels, got 4"));
  CHECK_THAT(value_error([&] { QuantConv1d(torch::nn::Conv1dOptions(4, 6, 3).padding_mode(torch::kReflect), recipe); }),
             Contains("expected padding_mode zeros"));
  CHECK_THAT(value_error([&] { QuantConv1d(torch::nn::Conv1dOptions(4, 6, 3), Recipe::from_name("int8-static")); }),
             Contains("expected a recipe without integer products"));
  CHECK_THAT(value_error([&] { QuantConvTranspose2d(transposed_options(1), Recipe::from_name("fqt-bhq5")); }),
             Contains("expected a recipe without grad_input and grad_weight"));
}
