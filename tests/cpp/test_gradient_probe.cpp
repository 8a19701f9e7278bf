#include "support.h"

#include <cmath>
#include <string>
#include <vector>

#include <quantrain/nn/gradient_probe.h>
#include <quantrain/nn/layers.h>
#include <quantrain/ops/gradient_quant.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>

using Catch::Matchers::Contains;
using namespace quantrain::nn;
using support::value_error;

namespace {

// A z-score above this is chance in 6e-7 of all rows.
constexpr double kAlarm = 5;

// Rows of unequal size, as gradients have them.
at::Tensor sample_gradient(int64_t rows = 48, int64_t columns = 64) {
  torch::manual_seed(1);
  return at::randn({rows, columns}) * at::randn({rows, 1}).mul(1.5).exp();
}

std::vector<GradientSpec> all_quantizers() {
  std::vector<GradientSpec> specs;
  for (const char* text : {"per_tensor:4", "per_sample:4", "per_channel:4", "householder:4", "householder:8"})
    specs.push_back(probe_quantizer(text));
  specs.push_back(specs[1]);
  specs.back().preserve_zero = true;
  return specs;
}

at::Tensor to_nearest(const at::Tensor& x, const GradientSpec& spec, int64_t) {
  return quantrain::quantize_gradient(x, spec.bits, spec.quantizer, {.stochastic = false});
}

// Two layers on 16 samples, calibrated; a fresh input and its loss at each call.
struct Net {
  Net() {
    torch::manual_seed(2);
    const Recipe recipe = Recipe::from_name("qat-w8a8");
    first = QuantLinear(12, 20, recipe);
    last = QuantLinear(20, 5, recipe);
    model->push_back("first", first);
    model->push_back("relu", torch::nn::ReLU());
    model->push_back("last", last);
    Calibration calibration(*model);
    model->forward(at::randn({64, 12}));
    calibration.finish();
    enable_observer(*model, false);  // the same loss at every call
  }
  at::Tensor loss(const at::Tensor& input) { return model->forward(input).square().mean(); }

  QuantLinear first{nullptr}, last{nullptr};
  torch::nn::Sequential model;
};

}  // namespace

TEST_CASE("a probe of unbiased quantizers: small z, the exact variance, within the bound", "[probe]") {
  GradientProbe probe({.quantizers = all_quantizers(), .draws = 200});
  probe.observe("layer", sample_gradient());
  const auto rows = probe.rows();
  REQUIRE(rows.size() == 6);
  for (const ProbeRow& row : rows) {
    CAPTURE(row.quantizer.quantizer, row.quantizer.bits, row.bias_z);
    CHECK(std::abs(row.bias_z) < kAlarm);
    // Each draw's squared error varies by at most 10 % here; the mean of 200 is then within 5 % but for chances below
    // 1e-9.
    CHECK(row.variance == Approx(row.exact_variance).epsilon(0.05));
    CHECK(row.exact_variance <= row.bound);
    CHECK(row.rows == 48);
    CHECK(row.columns == 64);
    CHECK(row.gradient_square == Approx(sample_gradient().to(at::kDouble).square().sum().item<double>()));
  }
  CHECK(rows[1].variance < rows[0].variance);  // per sample below per tensor
  CHECK(rows[3].variance < rows[1].variance);  // Householder below per sample
}

TEST_CASE("the numbers that Python gets", "[probe]") {
  // (exact_variance, bound, gradient_square), as in tests/python/nn/test_gradient_probe.py.
  const std::vector<std::pair<std::string, std::vector<double>>> expected = {
      {"per_tensor:4", {0.892134449, 4.89709522, 27.0738595}},
      {"per_sample:4", {0.176893992, 0.236920628, 27.0738595}},
      {"householder:4", {0.025876665, 0.0392873597, 27.0738595}}};
  GradientProbeOptions options{.draws = 8, .seed = 5};
  for (const auto& [name, numbers] : expected) options.quantizers.push_back(probe_quantizer(name));
  GradientProbe probe(options);
  const at::Tensor i = at::arange(24, at::kFloat).unsqueeze(1), j = at::arange(40, at::kFloat);
  probe.observe("layer", at::sin(1 + 7 * i + j) * at::exp2(-i));
  const auto rows = probe.rows();
  for (size_t q = 0; q < expected.size(); ++q) {
    CAPTURE(expected[q].first);
    CHECK(rows[q].exact_variance == Approx(expected[q].second[0]).epsilon(1e-4));
    CHECK(rows[q].bound == Approx(expected[q].second[1]).epsilon(1e-4));
    CHECK(rows[q].gradient_square == Approx(expected[q].second[2]).epsilon(1e-4));
  }
}

TEST_CASE("a probe finds the bias of rounding to nearest", "[probe]") {
  GradientProbe probe({.quantizers = all_quantizers(), .draws = 8, .quantize = to_nearest});
  probe.observe("layer", sample_gradient());
  for (const ProbeRow& row : probe.rows()) {
    CAPTURE(row.quantizer.quantizer, row.quantizer.bits);
    CHECK(row.bias_z > kAlarm);
  }
}

TEST_CASE("an attached probe measures what a layer's noise does to its weight gradient", "[probe]") {
  Net net;
  GradientProbe probe({.quantizers = {probe_quantizer("per_sample:4")}, .draws = 400});
  probe.attach(*net.model);
  const at::Tensor input = at::randn({16, 12});
  const at::Tensor x = net.last->input_fake_quant->forward(at::relu(net.first->forward(input))).detach();
  const at::Tensor y = net.model->forward(input);
  y.square().mean().backward();

  const auto rows = probe.rows();
  REQUIRE(rows.size() == 2);
  CHECK(rows[0].layer == "first");
  CHECK(rows[1].layer == "last");
  CHECK(rows[1].observations == 1);
  // dW = E^T X with rows of E uncorrelated: the sum over samples of their noise times |x|^2.
  const at::Tensor g = 2 * y.detach() / static_cast<double>(y.numel());
  const auto plan = quantrain::quantize_gradient_codes(g, 4, "per_sample", {.stochastic = false});
  const at::Tensor steps = (g - plan.offset) / plan.scale, p = steps - steps.floor();
  const at::Tensor noise = (plan.scale.square() * p * (1 - p)).sum(1);
  const double expected = (noise * x.square().sum(1)).sum().item<double>();
  CHECK(*rows[1].weight_variance == Approx(expected).epsilon(0.1));
}

TEST_CASE("batch variance and repeats", "[probe]") {
  torch::manual_seed(3);
  at::Tensor weight = at::zeros({3, 4}).set_requires_grad(true);
  GradientProbe probe({.quantizers = {probe_quantizer("per_sample:4")}});
  probe.watch("layer", weight * 2, weight);
  const std::vector<at::Tensor> means = {at::randn({3, 4}), at::randn({3, 4}), at::randn({3, 4})};
  for (const at::Tensor& mean : means) {
    weight.mutable_grad() = mean;
    probe.end_batch();
  }
  const at::Tensor stacked = at::stack(means).to(at::kDouble);
  const ProbeLayer plain = probe.layers().at(0);
  CHECK(plain.batches == 3);
  CHECK(*plain.batch_variance == Approx(stacked.var(0, /*unbiased=*/true).sum().item<double>()));
  CHECK(*plain.gradient_square == Approx(stacked.mean(0).square().sum().item<double>()));
  CHECK(!plain.repeat_variance);

  // One batch twice: the second pass differs by d, whose halves' square sum is the passes' variance.
  const at::Tensor d = at::randn({3, 4});
  weight.mutable_grad() = means[2] + d;
  probe.end_repeat();
  const ProbeLayer repeated = probe.layers().at(0);
  CHECK(repeated.batches == 3);
  CHECK(*repeated.repeat_variance == Approx(d.square().sum().item<double>() / 2).epsilon(1e-5));
}

TEST_CASE("advice follows the law of bits", "[probe]") {
  Net net;
  GradientProbe probe({.quantizers = {probe_quantizer("per_tensor:2"), probe_quantizer("per_tensor:8")}});
  probe.attach(*net.model);
  for (int i = 0; i < 4; ++i) {
    net.model->zero_grad();
    net.loss(at::randn({16, 12})).backward();
    probe.end_batch();
  }
  const auto advice = probe.recommend();
  REQUIRE(advice.size() == 4);
  int64_t lack = 9;
  for (const ProbeAdvice& a : advice) {
    CHECK(a.basis == "weight");
    const auto at_bits = [&](int64_t bits) {
      return a.ratio * std::pow((std::exp2(a.quantizer.bits) - 1) / (std::exp2(bits) - 1), 2);
    };
    CHECK((a.bits_needed > 8 || at_bits(a.bits_needed) <= a.allowed));
    CHECK((a.bits_needed == 2 || at_bits(a.bits_needed - 1) > a.allowed));
    const int64_t own = std::max<int64_t>(a.bits_needed - a.quantizer.bits, 0);
    CHECK(own <= lack);
    lack = own;
  }
  // A looser limit never asks for more bits, and one above every ratio for two.
  for (const ProbeAdvice& a : probe.recommend(1e9)) CHECK(a.bits_needed == 2);
  CHECK_THAT(probe.table(), Contains("first") && Contains("per_tensor:2"));
  CHECK_THAT(probe.to_json(), Contains("\"bits_needed\""));
}

TEST_CASE("what one layer's noise does to the whole network", "[probe]") {
  Net net;
  GradientProbe probe({.quantizers = {probe_quantizer("per_sample:4")}, .draws = 200});
  probe.attach(*net.model);
  const at::Tensor input = at::randn({16, 12});
  net.loss(input).backward();
  probe.end_batch();
  probe.measure_network([&] { return net.loss(input); }, 400);
  for (const ProbeRow& row : probe.rows()) {
    CAPTURE(row.layer);
    // Nothing lies before the first layer: its term is its own. The last one's holds the first's weights too.
    if (row.layer == "first") CHECK(*row.network_variance == Approx(*row.weight_variance).epsilon(0.1));
    if (row.layer == "last") CHECK(*row.network_variance > 1.05 * *row.weight_variance);
  }
}

TEST_CASE("a probe leaves training as it is, and goes when it goes", "[probe]") {
  Net net;
  const at::Tensor input = at::randn({16, 12});
  net.loss(input).backward();
  std::vector<at::Tensor> before;
  for (const auto& p : net.model->parameters()) before.push_back(p.grad().clone());
  net.model->zero_grad();
  at::Tensor loss;
  torch::manual_seed(4);
  {
    GradientProbe probe;
    probe.attach(*net.model);
    net.loss(input).backward();
    CHECK(probe.rows().size() == 6);
    loss = net.loss(input);
  }
  const at::Tensor next = at::rand({4});
  torch::manual_seed(4);
  CHECK(next.equal(at::rand({4})));  // no number was drawn from the program's generator
  size_t i = 0;
  for (const auto& p : net.model->parameters()) CHECK(p.grad().equal(before[i++]));
  loss.backward();  // the hooks outlive the probe and do nothing
}

TEST_CASE("what a probe refuses", "[probe]") {
  CHECK_THAT(value_error([] { GradientProbe({.draws = 5}); }), Contains("expected an even number of draws"));
  CHECK_THAT(value_error([] { GradientProbe({.fraction = -1}); }), Contains("expected a positive fraction, got -1"));
  CHECK_THAT(value_error([] { probe_quantizer("per_sample"); }), Contains("expected quantizer:bits"));
  CHECK_THROWS_WITH(probe_quantizer("per_sample:9"), Contains("9"));
  CHECK_THROWS_WITH(probe_quantizer("hadamard:5"), Contains("hadamard"));
  GradientProbe probe;
  CHECK_THAT(value_error([&] { probe.observe("x", at::ones({2, 2}), "row"); }), Contains("got 'row'"));
  torch::nn::Sequential without{torch::nn::ReLU()};
  CHECK_THAT(value_error([&] { probe.attach(*without); }), Contains("expected a module with a quantized layer"));
  const double nan = std::nan("");
  probe.observe("x", at::full({2, 2}, nan));
  CHECK(probe.rows().at(0).skipped == 1);
  CHECK(probe.rows().at(0).observations == 0);
}
