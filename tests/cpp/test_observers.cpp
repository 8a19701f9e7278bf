#include "support.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <quantrain/nn/fake_quantize.h>
#include <quantrain/nn/observers.h>

using Catch::Matchers::Contains;
using quantrain::nn::FakeQuantize;
using quantrain::nn::Observer;
using quantrain::nn::QuantSpec;
using support::same_bits;
using support::value_error;

namespace {

QuantSpec spec_of(const std::string& observer, int64_t bits = 8, bool symmetric = true) {
  QuantSpec spec;
  spec.observer = quantrain::nn::value_of<quantrain::nn::ObserverKind>(observer);
  spec.bits = bits;
  spec.symmetric = symmetric;
  return spec;
}

}  // namespace

TEST_CASE("min_max keeps the smallest and the largest value ever seen", "[observers]") {
  Observer observer(spec_of("min_max"));
  observer->forward(at::tensor({-1.0f, 3.0f}));
  observer->forward(at::tensor({-0.5f, 5.0f}));
  CHECK(observer->min_val.item<float>() == -1.0f);
  CHECK(observer->max_val.item<float>() == 5.0f);
}

TEST_CASE("moving_average starts at the first batch and then moves by the averaging constant", "[observers]") {
  QuantSpec spec = spec_of("moving_average");
  spec.averaging_constant = 0.25;
  Observer observer(spec);
  observer->forward(at::tensor({-1.0f, 4.0f}));
  CHECK(observer->max_val.item<float>() == 4.0f);
  observer->forward(at::tensor({-2.0f, 8.0f}));
  CHECK(observer->min_val.item<float>() == -1.25f);
  CHECK(observer->max_val.item<float>() == 5.0f);
}

TEST_CASE("percentile takes the nearest rank on both sides of each block", "[observers]") {
  QuantSpec spec = spec_of("percentile");
  spec.percentile = 90;
  Observer observer(spec);
  observer->forward(at::arange(1, 11).to(at::kFloat));
  CHECK(observer->min_val.item<float>() == 2.0f);
  CHECK(observer->max_val.item<float>() == 9.0f);

  Observer rows(spec, std::vector<int64_t>{2, 1});
  rows->forward(at::stack({at::arange(1, 11), at::arange(11, 21)}).to(at::kFloat));
  CHECK(rows->max_val.reshape(-1).equal(at::tensor({9.0f, 19.0f})));
  Observer groups(spec, std::vector<int64_t>{1, 2});
  groups->forward(
      at::stack({at::arange(0, 10), at::arange(10, 20)}).to(at::kFloat));  // blocks {0-4, 10-14} and {5-9, 15-19}
  CHECK(groups->max_val.reshape(-1).equal(at::tensor({13.0f, 18.0f})));
}

TEST_CASE("the mse range rounds with less squared error than the full range", "[observers]") {
  torch::manual_seed(1);
  const at::Tensor x = at::cat({at::randn({4096}), at::tensor({30.0f})});
  const auto error = [&x](const std::string& name) {
    Observer observer(spec_of(name, 4));
    observer->forward(x);
    const at::Tensor scale = std::get<0>(observer->calculate_qparams());
    return (quantrain::fake_quantize(x, scale, {}, -8, 7) - x).square().sum().item<double>();
  };
  CHECK(error("mse") < 0.9 * error("min_max"));
}

TEST_CASE("a batch with NaN or infinity raises and changes nothing", "[observers]") {
  const float bad = GENERATE(std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity());
  for (const char* name : {"min_max", "moving_average", "percentile", "mse"}) {
    INFO(name);
    Observer observer(spec_of(name));
    observer->forward(at::tensor({-1.0f, 1.0f}));
    const std::string message = value_error([&] { observer->forward(at::tensor({bad, 2.0f})); });
    CHECK_THAT(message, Contains("expected a batch without NaN or infinity"));
    CHECK(observer->max_val.item<float>() == Approx(1.0f).epsilon(0.3));
    CHECK(observer->max_val.isfinite().item<bool>());
  }
}

TEST_CASE("with nan_policy skip only the blocks that hold NaN stay as they were", "[observers]") {
  QuantSpec spec = spec_of("min_max");
  spec.nan_policy = quantrain::nn::NanPolicy::kSkip;
  Observer observer(spec, std::vector<int64_t>{2, 1});
  observer->forward(at::tensor({1.0f, 2.0f, 3.0f, 4.0f}).reshape({2, 2}));
  observer->forward(at::tensor({NAN, 9.0f, 3.0f, 8.0f}).reshape({2, 2}));
  CHECK(observer->max_val.reshape(-1).equal(at::tensor({2.0f, 8.0f})));
}

TEST_CASE("a block that never saw a finite batch has no scale", "[observers]") {
  for (const bool symmetric : {true, false}) {
    QuantSpec spec = spec_of("min_max", 8, symmetric);
    spec.nan_policy = quantrain::nn::NanPolicy::kSkip;
    FakeQuantize fake_quant(spec);
    CHECK_THAT(value_error([&] { fake_quant->forward(at::tensor({NAN, 1.0f})); }),
               Contains("observed or loaded, got none"));
    fake_quant->forward(at::tensor({-1.0f, 1.0f}));
    CHECK(fake_quant->has_scale());
  }
}

TEST_CASE("an observer refuses the spec that stores nothing", "[observers]") {
  CHECK_THAT(value_error([] { Observer observer(spec_of("dynamic")); }), Contains("got 'dynamic'"));
}

TEST_CASE("an empty batch changes nothing", "[observers]") {
  Observer observer(spec_of("mse"));
  observer->forward(at::empty({0, 3}));
  CHECK(observer->min_val.isinf().item<bool>());
}

TEST_CASE("ranges and scales stay float32 when the module is cast", "[observers]") {
  FakeQuantize fake_quant(spec_of("min_max"));
  fake_quant->forward(at::tensor({-1.0f, 1.0f / 3}));
  const at::Tensor scale = fake_quant->scale.clone();
  fake_quant->to(at::kBFloat16);
  CHECK(same_bits(fake_quant->scale, scale));
  CHECK(fake_quant->observer->min_val.scalar_type() == at::kFloat);
  CHECK(fake_quant->forward(at::ones({3}, at::kBFloat16)).scalar_type() == at::kBFloat16);
}

TEST_CASE("FakeQuantize computes the operator with the observed scale", "[fake_quantize]") {
  const at::Tensor x = at::linspace(-1, 3, 50);
  FakeQuantize fake_quant(spec_of("min_max", 8, false));
  const at::Tensor y = fake_quant->forward(x);
  CHECK(fake_quant->scale.item<float>() == Approx(4.0 / 255));
  CHECK(fake_quant->zero_point.item<int>() == 64);
  CHECK(same_bits(y, quantrain::fake_quantize(x, fake_quant->scale, fake_quant->zero_point, 0, 255)));
}

TEST_CASE("evaluation never moves a range, and enable_observer(false) stops training from it", "[fake_quantize]") {
  FakeQuantize fake_quant(spec_of("min_max"));
  fake_quant->forward(at::ones({4}));
  fake_quant->eval();
  fake_quant->forward(at::full({4}, 5.0f));
  CHECK(fake_quant->observer->max_val.item<float>() == 1.0f);
  fake_quant->train();
  fake_quant->enable_observer(false);
  fake_quant->forward(at::full({4}, 5.0f));
  CHECK(fake_quant->observer->max_val.item<float>() == 1.0f);
}

TEST_CASE("fake-quantization can be switched off", "[fake_quantize]") {
  FakeQuantize fake_quant(spec_of("dynamic", 2));
  const at::Tensor x = at::linspace(-1, 1, 9);
  quantrain::nn::enable_fake_quant(*fake_quant, false);
  CHECK(same_bits(fake_quant->forward(x), x));
  quantrain::nn::enable_fake_quant(*fake_quant, true);
  CHECK_FALSE(same_bits(fake_quant->forward(x), x));
}

TEST_CASE("a learnable scale takes its first batch's range and is then trained", "[fake_quantize]") {
  QuantSpec spec = spec_of("min_max", 4);
  spec.learnable = true;
  FakeQuantize fake_quant(spec);
  CHECK(fake_quant->named_parameters().contains("scale"));
  fake_quant->forward(at::tensor({-0.7f, 0.7f}));
  const at::Tensor x = at::tensor({0.33f, 2.0f, -0.41f}).requires_grad_();
  fake_quant->forward(x).sum().backward();
  CHECK(fake_quant->scale.item<float>() == Approx(0.1f));
  REQUIRE(fake_quant->scale.grad().defined());
  // inside: rint(v) - v with v = x / scale; outside: the end code
  const double expected = ((3 - 3.3) + 7 + (-4 + 4.1)) / std::sqrt(3.0 * 7.0);
  CHECK(fake_quant->scale.grad().item<double>() == Approx(expected).epsilon(1e-4));
  CHECK(x.grad().equal(at::tensor({1.0f, 0.0f, 1.0f})));
}

TEST_CASE("a learnable scale that a step took below zero is pulled up in use", "[fake_quantize]") {
  QuantSpec spec = spec_of("min_max", 4);
  spec.learnable = true;
  FakeQuantize fake_quant(spec);
  fake_quant->forward(at::ones({2}));
  fake_quant->scale.variable_data().fill_(-0.5f);
  CHECK(fake_quant->forward(at::ones({2})).isfinite().all().item<bool>());
  CHECK(fake_quant->scale.item<float>() == 1e-8f);
}

TEST_CASE("per-token scales cover all dimensions but the last", "[fake_quantize]") {
  QuantSpec spec = spec_of("dynamic");
  spec.granularity = quantrain::nn::Granularity::kPerToken;
  torch::manual_seed(2);
  const at::Tensor x = at::randn({2, 3, 8});
  FakeQuantize fake_quant(spec);
  const at::Tensor scale = std::get<0>(quantrain::choose_qparams(x, {2, 3, 1}));
  CHECK(same_bits(fake_quant->forward(x), quantrain::fake_quantize(x, scale)));
  CHECK(fake_quant->named_buffers().is_empty());
}

TEST_CASE("a stored scale that was neither observed nor loaded raises", "[fake_quantize]") {
  FakeQuantize fake_quant(spec_of("min_max"));
  fake_quant->eval();
  CHECK_THAT(value_error([&] { fake_quant->forward(at::ones({2})); }), Contains("observed or loaded, got none"));
  CHECK_THAT(value_error([] {
               FakeQuantize dynamic(spec_of("dynamic"));
               dynamic->calculate_qparams();
             }),
             Contains("expected an input"));
}
