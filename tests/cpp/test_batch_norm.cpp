#include "support.h"

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <quantrain/nn/layers.h>
#include <quantrain/ops/batch_norm.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>

using Catch::Matchers::Contains;
using support::largest_difference;
using support::same_bits;
using support::value_error;

namespace {

constexpr double kEps = 1e-3;

// Per channel, beside [N, C, H, W].
at::Tensor beside(const at::Tensor& channels) { return channels.reshape({1, -1, 1, 1}); }

struct Operands {
  at::Tensor y, weight, bias, conv_scale, residual, grad;
};

// Channels of other sizes and means; a factor of either sign.
Operands operands(at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  const at::Tensor sizes = beside(at::rand({6}) + 0.3), means = beside(at::randn({6}));
  return {(at::randn({4, 6, 5, 7}) * sizes + means).contiguous(format),
          at::randn({6}),
          at::randn({6}),
          (at::rand({6}) + 0.2) * at::tensor({1.0f, -1.0f, 1.0f, 1.0f, -1.0f, 1.0f}),
          at::randn({4, 6, 5, 7}).contiguous(format),
          at::randn({4, 6, 5, 7})};
}

// In float64, by ATen: the batch norm of y / conv_scale with the batch's statistics, and what follows it.
at::Tensor composed(const Operands& x, const std::string& activation) {
  const at::Tensor scaled = x.y / beside(x.conv_scale);
  const at::Tensor mean = scaled.mean({0, 2, 3}, true), variance = scaled.var({0, 2, 3}, false, true);
  const at::Tensor z = (scaled - mean) / at::sqrt(variance + kEps) * beside(x.weight) + beside(x.bias) + x.residual;
  return activation == "relu" ? at::relu(z) : activation == "relu6" ? at::clamp(z, 0, 6) : z;
}

// Every operand as a leaf of its own, in another type or not.
Operands leaves(const Operands& x, at::ScalarType type) {
  const auto leaf = [&](const at::Tensor& t) { return t.detach().to(type).clone().requires_grad_(); };
  return {leaf(x.y), leaf(x.weight), leaf(x.bias), leaf(x.conv_scale), leaf(x.residual), x.grad.to(type)};
}

std::vector<at::Tensor> gradients(const Operands& x) {
  return {x.y.grad(), x.weight.grad(), x.bias.grad(), x.conv_scale.grad(), x.residual.grad()};
}

std::tuple<at::Tensor, at::Tensor> mean_and_variance(const at::Tensor& y) {
  const at::Tensor statistics = quantrain::detail::batch_norm_statistics(y.detach());
  return {statistics[0], statistics[1]};
}

}  // namespace

TEST_CASE("batch_norm_statistics are ATen's means, variances and extremes", "[batch_norm]") {
  torch::manual_seed(60);
  for (const auto format : {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast}) {
    const at::Tensor y = operands(format).y;
    const at::Tensor found = quantrain::detail::batch_norm_statistics(y);
    REQUIRE(found.sizes().vec() == std::vector<int64_t>{4, 6});
    const at::Tensor wide = y.to(at::kDouble);
    CHECK(largest_difference(found[0], wide.mean({0, 2, 3})) < 1e-6);
    CHECK(largest_difference(found[1], wide.var({0, 2, 3}, false)) < 1e-5);
    CHECK(same_bits(found[2], y.amin({0, 2, 3})));
    CHECK(same_bits(found[3], y.amax({0, 2, 3})));
  }
}

TEST_CASE("batch_norm_act equals the composition of ATen's operators, forward and gradient", "[batch_norm]") {
  torch::manual_seed(61);
  for (const auto format : {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast}) {
    for (const std::string activation : {"identity", "relu", "relu6"}) {
      INFO(activation);
      const Operands drawn = operands(format), mine = leaves(drawn, at::kFloat), exact = leaves(drawn, at::kDouble);
      const auto [mean, variance] = mean_and_variance(mine.y);
      const at::Tensor z = quantrain::batch_norm_act(mine.y, mean, variance, mine.weight, mine.bias, mine.conv_scale,
                                                     mine.residual, activation, kEps);
      const at::Tensor want = composed(exact, activation);
      CHECK(largest_difference(z, want) < 1e-5);
      CHECK(z.strides().vec() == mine.y.strides().vec());
      z.backward(mine.grad);
      want.backward(exact.grad);
      const std::vector<at::Tensor> found = gradients(mine), wanted = gradients(exact);
      for (size_t i = 0; i < found.size(); ++i)
        CHECK(largest_difference(found[i], wanted[i]) < 1e-4 * (1 + wanted[i].abs().max().item<double>()));
    }
  }
}

TEST_CASE("a frozen batch norm takes its statistics as constants", "[batch_norm]") {
  torch::manual_seed(62);
  const Operands drawn = operands();
  const at::Tensor mean = at::randn({6}), variance = at::rand({6}) + 0.5;
  const at::Tensor mine = drawn.y.clone().requires_grad_(), theirs = drawn.y.clone().requires_grad_();
  const at::Tensor z = quantrain::batch_norm_act(mine, mean, variance, drawn.weight, drawn.bias, std::nullopt,
                                                 std::nullopt, "identity", kEps, /*batch_statistics=*/false);
  const at::Tensor want = at::batch_norm(theirs, drawn.weight, drawn.bias, mean, variance, false, 0.1, kEps, false);
  CHECK(largest_difference(z, want) < 1e-5);
  z.backward(drawn.grad);
  want.backward(drawn.grad);
  CHECK(largest_difference(mine.grad(), theirs.grad()) < 1e-5);
}

TEST_CASE("batch_norm_act_fake_quantize is the norm followed by fake_quantize", "[batch_norm]") {
  torch::manual_seed(63);
  const Operands drawn = operands(), mine = leaves(drawn, at::kFloat), theirs = leaves(drawn, at::kFloat);
  const auto [mean, variance] = mean_and_variance(drawn.y);
  const at::Tensor scale = at::tensor({0.02f}), zero_point = at::full({1}, 40, at::kInt);
  const auto [output, codes] = quantrain::batch_norm_act_fake_quantize(
      mine.y, mean, variance, mine.weight, mine.bias, mine.conv_scale, mine.residual, scale, zero_point, "relu", kEps,
      /*batch_statistics=*/true, 0, 255);
  const at::Tensor z = quantrain::batch_norm_act(theirs.y, mean, variance, theirs.weight, theirs.bias,
                                                 theirs.conv_scale, theirs.residual, "relu", kEps);
  const at::Tensor want = quantrain::fake_quantize(z, scale, zero_point, 0, 255);
  CHECK(same_bits(output.detach(), want.detach()));
  CHECK(codes.equal(quantrain::quantize(z.detach(), scale, zero_point, 0, 255, at::kByte)));
  CHECK_FALSE(codes.requires_grad());
  output.backward(drawn.grad);
  want.backward(drawn.grad);
  const std::vector<at::Tensor> found = gradients(mine), wanted = gradients(theirs);
  for (size_t i = 0; i < found.size(); ++i) CHECK(same_bits(found[i], wanted[i]));
}

TEST_CASE("fold_fake_quantize is the product followed by fake_quantize_dynamic", "[batch_norm]") {
  torch::manual_seed(64);
  const at::Tensor drawn = at::randn({5, 3, 3, 3}), drawn_gamma = at::randn({5}), variance = at::rand({5}) + 0.1;
  drawn_gamma[2] = 0;  // counts as a factor of 1
  const at::Tensor weight = drawn.clone().requires_grad_(), gamma = drawn_gamma.clone().requires_grad_();
  const at::Tensor other = drawn.clone().requires_grad_(), other_gamma = drawn_gamma.clone().requires_grad_();
  const auto [output, conv_scale] = quantrain::fold_fake_quantize(weight, gamma, variance, kEps, -8, 7);
  at::Tensor factor = other_gamma / at::sqrt(variance + kEps);
  factor = at::where(factor == 0, at::ones_like(factor), factor);
  CHECK(largest_difference(conv_scale, factor) < 1e-5);
  const at::Tensor product = other * factor.reshape({-1, 1, 1, 1});
  const at::Tensor want = quantrain::fake_quantize_dynamic(product, {5, 1, 1, 1}, -8, 7);
  CHECK(largest_difference(output, want) < 1e-4);
  const at::Tensor grad = at::randn_like(output), grad_factor = at::randn({5});
  ((output * grad).sum() + (conv_scale * grad_factor).sum()).backward();
  ((want * grad).sum() + (factor * grad_factor).sum()).backward();
  CHECK(largest_difference(weight.grad(), other.grad()) < 1e-4);
  CHECK(largest_difference(gamma.grad(), other_gamma.grad()) < 1e-3);
  CHECK(gamma.grad()[2].item<float>() == 0);
  CHECK(std::get<0>(quantrain::fold_fake_quantize(drawn, drawn_gamma, variance, kEps, -8, 7, true, "bfloat16"))
            .scalar_type() == at::kBFloat16);
}

TEST_CASE("QuantConvBn2d in training is the division and the batch norm done by hand", "[batch_norm]") {
  torch::manual_seed(65);
  const auto options = torch::nn::Conv2dOptions(3, 6, 3).padding(1).bias(false);
  quantrain::nn::QuantConvBn2d layer(options, quantrain::nn::Recipe::from_name("qat-w8a8"));
  torch::nn::BatchNorm2d bn(6);
  const at::Tensor weight = layer->weight.detach().clone().requires_grad_();
  {
    const at::NoGradGuard no_grad;
    layer->bn->weight.normal_();
    layer->bn->weight[4] = 0;
    layer->bn->bias.normal_();
    layer->bn->running_var.uniform_(0.5, 2.0);
    bn->weight.copy_(layer->bn->weight);
    bn->bias.copy_(layer->bn->bias);
    bn->running_var.copy_(layer->bn->running_var);
  }
  quantrain::nn::enable_fake_quant(*layer, false);
  for (int batch = 0; batch < 2; ++batch) {
    layer->zero_grad();
    bn->zero_grad();
    weight.mutable_grad().reset();
    const at::Tensor x = at::randn({4, 3, 8, 8}), grad = at::randn({4, 6, 8, 8});
    at::Tensor sf = bn->weight / at::sqrt(bn->running_var.clone() + bn->options.eps());
    sf = at::where(sf == 0, at::ones_like(sf), sf).reshape({-1, 1, 1, 1});
    const at::Tensor y = at::conv2d(x, weight * sf, {}, {1, 1}, {1, 1}) / sf.reshape({-1, 1, 1});
    const at::Tensor want = bn->forward(y), found = layer->forward(x);
    CHECK(largest_difference(found, want) < 1e-4);
    found.backward(grad);
    want.backward(grad);
    CHECK(largest_difference(layer->weight.grad(), weight.grad()) < 1e-3);
    CHECK(largest_difference(layer->bn->weight.grad(), bn->weight.grad()) < 1e-3);
    CHECK(largest_difference(layer->bn->bias.grad(), bn->bias.grad()) < 1e-3);
  }
  CHECK(largest_difference(layer->bn->running_mean, bn->running_mean) < 1e-5);
  CHECK(largest_difference(layer->bn->running_var, bn->running_var) < 1e-4);
}

TEST_CASE("batch norms refuse with the operator, the rule and the value", "[batch_norm]") {
  const at::Tensor y = at::ones({4, 3, 2, 2}), mean = at::zeros({3}), variance = at::ones({3});
  CHECK_THAT(value_error([&] { quantrain::batch_norm_act(y, at::zeros({4}), variance); }),
             Contains("batch_norm_act: expected mean of one element per channel, got [4]"));
  CHECK_THAT(value_error([&] { quantrain::batch_norm_act(y, mean, variance, {}, {}, {}, {}, "gelu"); }),
             Contains("batch_norm_act: expected activation to be identity, relu") && Contains("gelu"));
  CHECK_THAT(value_error([&] { quantrain::fold_fake_quantize(y, at::ones({3}), at::ones({4})); }),
             Contains("fold_fake_quantize: expected bn_weight of one element per row of weight"));
  CHECK_THROWS_AS(quantrain::batch_norm_act(y.to(at::kDouble), mean, variance), c10::TypeError);
}

TEST_CASE("batch norms on CPU and CUDA agree bit for bit where nothing is summed", "[batch_norm][cuda]") {
  if (!support::has_cuda()) {
    WARN("skipped: no GPU");
    return;
  }
  torch::manual_seed(66);
  for (const at::ScalarType dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
    const Operands x = operands();
    const at::Tensor y = x.y.to(dtype), scale = at::tensor({0.02f});
    const auto [mean, variance] = mean_and_variance(y);
    for (const std::string activation : {"identity", "relu6", "silu"}) {
      const at::Tensor here =
          quantrain::batch_norm_act(y, mean, variance, x.weight, x.bias, x.conv_scale, {}, activation);
      const at::Tensor there = quantrain::batch_norm_act(y.cuda(), mean.cuda(), variance.cuda(), x.weight.cuda(),
                                                         x.bias.cuda(), x.conv_scale.cuda(), {}, activation);
      CHECK(same_bits(there.cpu(), here));
    }
    const auto here = quantrain::batch_norm_act_fake_quantize(y, mean, variance, x.weight, x.bias, {}, {}, scale, {});
    const auto there = quantrain::batch_norm_act_fake_quantize(y.cuda(), mean.cuda(), variance.cuda(), x.weight.cuda(),
                                                               x.bias.cuda(), {}, {}, scale.cuda(), {});
    CHECK(same_bits(std::get<0>(there).cpu(), std::get<0>(here)));
    CHECK(same_bits(std::get<1>(there).cpu(), std::get<1>(here)));
    CHECK(largest_difference(quantrain::detail::batch_norm_statistics(y.cuda()).cpu(),
                             quantrain::detail::batch_norm_statistics(y)) < 1e-5);
    const at::Tensor weight = at::randn({5, 9}).to(dtype), gamma = at::randn({5}), spread = at::rand({5});
    CHECK(same_bits(std::get<0>(quantrain::fold_fake_quantize(weight.cuda(), gamma.cuda(), spread.cuda())).cpu(),
                    std::get<0>(quantrain::fold_fake_quantize(weight, gamma, spread))));
  }
}
