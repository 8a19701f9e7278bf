// What lies before a linear layer and its rounding in one pass, against PyTorch's functions and fake_quantize.

#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include <quantrain/nn/fake_quantize.h>
#include <quantrain/ops/fake_quant.h>
#include <quantrain/ops/norm_act.h>
#include <quantrain/ops/quant_linear.h>
#include <torch/csrc/autograd/autograd.h>

#include "support.h"

using Catch::Matchers::Contains;
using quantrain::norm_act_fake_quantize;
using quantrain::norm_act_fake_quantize_dynamic;
using quantrain::quant_linear;
using support::largest_difference;
using support::same_bits;
using support::value_error;

namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr double kEps = 0.01;

// input, other, weight and bias, those that the function takes.
struct Operands {
  at::Tensor input;
  OptionalTensor other, weight, bias;

  std::vector<at::Tensor> given() const {
    std::vector<at::Tensor> all{input};
    for (const OptionalTensor& tensor : {other, weight, bias}) {
      if (tensor) all.push_back(*tensor);
    }
    return all;
  }

  Operands copy() const {
    const auto leaf = [](const OptionalTensor& tensor) {
      return tensor ? OptionalTensor(tensor->detach().clone().requires_grad_()) : tensor;
    };
    return {*leaf(input), leaf(other), leaf(weight), leaf(bias)};
  }
};

Operands operands(const std::string& function, at::IntArrayRef shape) {
  torch::manual_seed(0);
  const bool norm = function == "layer_norm" || function == "rms_norm";
  Operands all{2 * at::randn(shape) + 0.3, {}, {}, {}};
  if (function == "silu_mul") all.other = at::randn(shape);
  if (norm) all.weight = at::randn(shape.back());
  if (function == "layer_norm") all.bias = at::randn(shape.back());
  return all.copy();
}

at::Tensor plain(const std::string& function, const Operands& of) {
  const at::Tensor& x = of.input;
  if (function == "relu") return at::relu(x);
  if (function == "silu") return at::silu(x);
  if (function == "silu_mul") return at::silu(x) * *of.other;
  if (function == "gelu") return at::gelu(x);
  if (function == "gelu_tanh") return at::gelu(x, "tanh");
  if (function == "layer_norm") return at::layer_norm(x, {x.size(-1)}, of.weight, of.bias, kEps);
  if (function == "rms_norm") return at::rms_norm(x, {x.size(-1)}, of.weight, kEps);
  return x;
}

void check_gradients(const at::Tensor& y, const Operands& of, const at::Tensor& want, const Operands& others) {
  torch::manual_seed(1);
  const at::Tensor grad = at::randn(want.sizes());
  const auto found = torch::autograd::grad({y}, of.given(), {grad});
  const auto wanted = torch::autograd::grad({want}, others.given(), {grad});
  for (size_t i = 0; i < found.size(); ++i) {
    INFO("gradient " << i);
    CHECK(largest_difference(found[i], wanted[i]) < 1e-4 * (1 + wanted[i].abs().max().item<double>()));
  }
}

std::string function_name() {
  return GENERATE(as<std::string>{}, "identity", "relu", "silu", "silu_mul", "gelu", "gelu_tanh", "layer_norm",
                  "rms_norm");
}

}  // namespace

TEST_CASE("a function and one given scale are one pass, equal to one after the other", "[norm_act]") {
  const std::string function = function_name();
  const bool symmetric = GENERATE(true, false);
  INFO(function << ' ' << symmetric);
  const Operands of = operands(function, {2, 5, 48}), others = of.copy();
  const at::Tensor scale = at::full({1}, 0.03);
  const OptionalTensor zero_point = symmetric ? std::nullopt : OptionalTensor(at::full({1}, 7, at::kInt));
  const int64_t low = symmetric ? -50 : 0, high = symmetric ? 60 : 200;
  const auto [y, codes] =
      norm_act_fake_quantize(of.input, function, of.other, of.weight, of.bias, scale, zero_point, kEps, low, high);
  const at::Tensor want = quantrain::fake_quantize(plain(function, others), scale, zero_point, low, high);
  CHECK(codes.scalar_type() == (symmetric ? at::kChar : at::kByte));
  CHECK_FALSE(codes.requires_grad());
  CHECK(same_bits(quantrain::dequantize(codes, scale, zero_point), y.detach()));
  const at::Tensor off = (y - want).detach().abs();  // a code where float32 lies beside a midpoint
  CHECK(off.max().item<double>() <= 0.0301);
  CHECK((off > 1e-6).to(at::kFloat).mean().item<double>() < 0.01);
  check_gradients(y, of, want, others);
}

TEST_CASE("a function and a scale per row of its result are one pass", "[norm_act]") {
  const std::string function = function_name();
  const bool symmetric = GENERATE(true, false);
  INFO(function << ' ' << symmetric);
  const Operands of = operands(function, {2, 5, 48}), others = of.copy();
  const int64_t low = symmetric ? -128 : 0, high = symmetric ? 127 : 255;
  const auto [y, codes, scale, zero_point] =
      norm_act_fake_quantize_dynamic(of.input, function, of.other, of.weight, of.bias, kEps, low, high, symmetric);
  const at::Tensor z = plain(function, others);
  const at::Tensor want = quantrain::fake_quantize_dynamic(z, {2, 5, 1}, low, high, symmetric);
  CHECK(scale.sizes().vec() == std::vector<int64_t>{2, 5, 1});
  const auto [wanted_scale, wanted_zero_point] = quantrain::choose_qparams(z.detach(), {2, 5, 1}, low, high, symmetric);
  CHECK(largest_difference(scale, wanted_scale) < 1e-6);
  CHECK(same_bits(zero_point, wanted_zero_point));
  CHECK(same_bits(quantrain::dequantize(codes, scale, symmetric ? std::nullopt : OptionalTensor(zero_point)),
                  y.detach()));
  const at::Tensor off = ((y - want) / scale).detach().abs();
  CHECK(off.max().item<double>() <= 1.01);
  CHECK((off > 1e-2).to(at::kFloat).mean().item<double>() < 0.01);
  if (function == "identity") CHECK(same_bits(y.detach(), want.detach()));
  check_gradients(y, of, want, others);
}

TEST_CASE("the range of a function's result is found without the result", "[norm_act]") {
  const std::string function = function_name();
  INFO(function);
  const Operands of = operands(function, {9, 80});
  const at::NoGradGuard no_grad;
  const at::Tensor range = quantrain::detail::norm_act_range(of.input, function, of.other, of.weight, of.bias, kEps);
  const at::Tensor z = plain(function, of);
  CHECK(range.sizes().vec() == std::vector<int64_t>{2});
  CHECK(range[0].item<float>() == Approx(z.min().item<float>()).margin(1e-5));
  CHECK(range[1].item<float>() == Approx(z.max().item<float>()).margin(1e-5));
}

TEST_CASE("Before computes a function by PyTorch's operators", "[norm_act]") {
  const std::string function = function_name();
  INFO(function);
  const Operands of = operands(function, {3, 16});
  const auto or_none = [](const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); };
  const quantrain::nn::Before before{function, or_none(of.other), or_none(of.weight), or_none(of.bias), kEps};
  CHECK(same_bits(before(of.input), plain(function, of)));
  CHECK_THAT(value_error([&] { quantrain::nn::Before{"tanh"}(of.input); }),
             Contains("Before: expected function to be identity") && Contains("got 'tanh'"));
}

TEST_CASE("float32 becomes 16 bits in the pass", "[norm_act]") {
  const Operands of = operands("layer_norm", {6, 48});
  const at::Tensor scale = at::full({1}, 0.03);
  const auto run = [&](std::string_view dtype) {
    return norm_act_fake_quantize(of.input, "layer_norm", {}, of.weight, of.bias, scale, {}, kEps, -128, 127, dtype);
  };
  const auto [wide, codes] = run("");
  const auto [narrow, same] = run("bfloat16");
  CHECK(narrow.scalar_type() == at::kBFloat16);
  CHECK(same_bits(codes, same));
  CHECK(same_bits(narrow.detach(), wide.detach().to(at::kBFloat16)));
  const auto grad = torch::autograd::grad({narrow.sum()}, {of.input, *of.weight});
  CHECK(grad[0].scalar_type() == at::kFloat);
  CHECK(grad[1].scalar_type() == at::kFloat);
}

TEST_CASE("NaN and infinity reach the result", "[norm_act]") {
  Operands of = operands("gelu", {4, 16});
  const at::NoGradGuard no_grad;
  of.input[1][3] = std::numeric_limits<float>::quiet_NaN();
  of.input[2][5] = std::numeric_limits<float>::infinity();
  const auto [y, codes] = norm_act_fake_quantize(of.input, "gelu", {}, {}, {}, at::full({1}, 0.05));
  CHECK(y[1][3].isnan().item<bool>());
  CHECK_FALSE(y[0].isnan().any().item<bool>());
  const auto [rows, row_codes, scale, zero_point] = norm_act_fake_quantize_dynamic(of.input, "gelu");
  CHECK(rows.isnan().all(1).equal(at::tensor({0, 1, 1, 0}).to(at::kBool)));
  CHECK(scale.isnan().flatten().equal(at::tensor({0, 1, 1, 0}).to(at::kBool)));
  CHECK(zero_point.eq(0).all().item<bool>());
}

TEST_CASE("norm_act says what it takes", "[norm_act]") {
  const at::Tensor x = at::zeros({2, 8}), weight = at::ones(8), scale = at::full({1}, 0.1);
  const auto refusal = [&](std::string_view function, const OptionalTensor& other, const OptionalTensor& w,
                           const OptionalTensor& bias, const at::Tensor& given) {
    return value_error([&] { norm_act_fake_quantize(x, function, other, w, bias, given); });
  };
  CHECK_THAT(refusal("tanh", {}, {}, {}, scale), Contains("norm_act_fake_quantize: expected function to be identity"));
  CHECK_THAT(refusal("silu_mul", {}, {}, {}, scale), Contains("expected other with silu_mul"));
  CHECK_THAT(refusal("silu_mul", x.narrow(0, 0, 1), {}, {}, scale), Contains("expected other of input's shape"));
  CHECK_THAT(refusal("identity", {}, weight, {}, scale), Contains("expected weight with layer_norm or rms_norm"));
  CHECK_THAT(refusal("rms_norm", {}, weight, weight, scale), Contains("expected bias with layer_norm"));
  CHECK_THAT(refusal("identity", {}, {}, {}, at::ones({2, 1})), Contains("expected one scale"));
  CHECK_THAT(refusal("identity", {}, {}, {}, at::ones(1).requires_grad_()),
             Contains("expected scale without requires_grad"));
  CHECK_THROWS_AS(norm_act_fake_quantize_dynamic(x.to(at::kDouble)), c10::TypeError);
}

TEST_CASE("quant_linear is linear, its input kept as codes", "[norm_act]") {
  torch::manual_seed(2);
  const bool rows = GENERATE(true, false);
  const at::Tensor x = at::randn({2, 5, 24}).requires_grad_(), other = x.detach().clone().requires_grad_();
  const at::Tensor weight = at::randn({7, 24}).requires_grad_(), bias = at::randn(7).requires_grad_();
  at::Tensor values, codes, scale = at::full({1}, 0.03), zero_point, want;
  if (rows) {
    std::tie(values, codes, scale, zero_point) =
        norm_act_fake_quantize_dynamic(x, "identity", {}, {}, {}, 1e-5, 0, 255, /*symmetric=*/false);
    want = quantrain::fake_quantize_dynamic(other, {2, 5, 1}, 0, 255, false);
  } else {
    std::tie(values, codes) = norm_act_fake_quantize(x, "identity", {}, {}, {}, scale);
    want = quantrain::fake_quantize(other, scale);
  }
  const OptionalTensor zero = rows ? OptionalTensor(zero_point) : std::nullopt;
  const at::Tensor y = quant_linear(values, codes, scale, zero, weight, bias);
  const at::Tensor z = at::linear(want, weight, bias);
  CHECK(same_bits(y.detach(), z.detach()));
  const at::Tensor grad = at::randn_like(y);
  const auto found = torch::autograd::grad({y}, {x, weight, bias}, {grad});
  const auto wanted = torch::autograd::grad({z}, {other, weight, bias}, {grad});
  for (size_t i = 0; i < found.size(); ++i) CHECK(largest_difference(found[i], wanted[i]) < 1e-5);
  CHECK_THAT(value_error([&] { quant_linear(values, codes.narrow(0, 0, 1), scale, zero, weight, bias); }),
             Contains("quant_linear: expected"));
}
