#include "support.h"

#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>
#include <quantrain/ops/fake_quant.h>

using Catch::Matchers::Contains;
using support::same_bits;
using support::value_error;

namespace {

at::Tensor positive_scale(at::IntArrayRef shape) { return at::rand(shape) * 0.1 + 0.01; }

}  // namespace

TEST_CASE("fake_quantize equals PyTorch's operator, forward and gradient", "[fake_quant]") {
  torch::manual_seed(20);
  for (const auto& shape : std::vector<std::vector<int64_t>>{{1}, {33, 7}, {4, 3, 5, 5}}) {
    const at::Tensor x = (at::randn(shape) * 6).requires_grad_();
    const at::Tensor mine_scale = positive_scale({1});
    const at::Tensor zero_point = at::full({1}, 3, at::kInt);
    const at::Tensor mine = quantrain::fake_quantize(x, mine_scale, zero_point, -8, 7);
    const at::Tensor grad = at::randn(shape);
    mine.backward(grad);
    const at::Tensor mine_grad = x.grad().clone();
    x.mutable_grad().reset();
    const at::Tensor native = at::fake_quantize_per_tensor_affine(x, mine_scale.item<double>(), 3, -8, 7);
    native.backward(grad);
    CHECK(same_bits(mine.detach(), native.detach()));
    CHECK(same_bits(mine_grad, x.grad()));
  }
}

TEST_CASE("a scale per channel or group acts on its own elements", "[fake_quant]") {
  torch::manual_seed(21);
  const at::Tensor x = at::randn({6, 64});
  const at::Tensor channels = positive_scale({6, 1});
  const at::Tensor zeros = at::zeros({6}, at::kInt);
  CHECK(same_bits(quantrain::fake_quantize(x, channels),
                  at::fake_quantize_per_channel_affine(x, channels.reshape(-1), zeros, 0, -128, 127)));
  const at::Tensor groups = positive_scale({6, 2});
  const at::Tensor whole = quantrain::fake_quantize(x, groups);
  for (int64_t half = 0; half < 2; ++half) {
    CHECK(same_bits(whole.narrow(1, 32 * half, 32),
                    quantrain::fake_quantize(x.narrow(1, 32 * half, 32), groups.narrow(1, half, 1))));
  }
}

TEST_CASE("strides do not matter", "[fake_quant]") {
  const at::Tensor x = at::randn({5, 9}).t();
  const at::Tensor scale = positive_scale({9, 1});
  CHECK(same_bits(quantrain::fake_quantize(x, scale), quantrain::fake_quantize(x.contiguous(), scale)));
}

TEST_CASE("NaN stays NaN and infinity saturates", "[fake_quant]") {
  const at::Tensor x = at::tensor({NAN, INFINITY, -INFINITY});
  const at::Tensor y = quantrain::fake_quantize(x, at::tensor({0.5f}), {}, -8, 7);
  CHECK(same_bits(y, at::tensor({NAN, 3.5f, -4.0f})));
}

TEST_CASE("codes and dequantize give the fake-quantized values", "[fake_quant]") {
  torch::manual_seed(22);
  const at::Tensor x = at::randn({7, 9});
  const auto [scale, zero_point] = quantrain::choose_qparams(x, {7, 1}, 0, 15, false);
  const at::Tensor codes = quantrain::quantize(x, scale, zero_point, 0, 15, at::kByte);
  CHECK(codes.max().item<int64_t>() == 15);
  const at::Tensor expected = quantrain::fake_quantize(x, scale, zero_point, 0, 15);
  CHECK(same_bits(quantrain::dequantize(codes, scale, zero_point), expected));
  CHECK(same_bits(quantrain::fake_quantize_dynamic(x, {7, 1}, 0, 15, false), expected));
  const at::Tensor packed = quantrain::pack_int4(codes);
  CHECK(packed.sizes().vec() == std::vector<int64_t>{7, 5});
  CHECK(quantrain::unpack_int4(packed, 9, false).equal(codes));
}

TEST_CASE("stochastic rounding follows the generator and is unbiased", "[fake_quant]") {
  const at::Tensor x = at::full({100000}, 0.3f);
  const at::Tensor scale = at::ones({1});
  const auto draw = [&](uint64_t seed) {
    return quantrain::quantize(x, scale, {}, -8, 7, at::kChar, true, at::make_generator<at::CPUGeneratorImpl>(seed));
  };
  CHECK(draw(1).equal(draw(1)));
  CHECK_FALSE(draw(1).equal(draw(2)));
  // 5 standard deviations of the mean of 100,000 draws: a false alarm in 1.7 million runs; the seed is fixed.
  CHECK(std::abs(draw(3).to(at::kDouble).mean().item<double>() - 0.3) < 5 * std::sqrt(0.21 / 100000));
}

TEST_CASE("the learnable scale's gradient is LSQ's", "[fake_quant]") {
  const at::Tensor x = at::tensor({0.33f, 2.0f, -0.41f}).requires_grad_();
  const at::Tensor scale = at::tensor({0.1f}).requires_grad_();
  quantrain::fake_quantize_learnable(x, scale, {}, -8, 7, 0.5).sum().backward();
  CHECK(scale.grad().item<double>() == Approx(0.5 * ((3 - 3.3) + 7 + (-4 + 4.1))).epsilon(1e-4));
  CHECK(x.grad().equal(at::tensor({1.0f, 0.0f, 1.0f})));
}

TEST_CASE("bad arguments raise with the operator, the rule and the value", "[fake_quant]") {
  const at::Tensor x = at::ones({4, 48});
  const at::Tensor scale = at::ones({1});
  CHECK_THAT(value_error([&] { quantrain::fake_quantize(x, at::ones({4, 7})); }),
             Contains("fake_quantize: expected") && Contains("48") && Contains("7"));
  CHECK_THAT(value_error([&] { quantrain::fake_quantize(x, scale, {}, 7, -8); }), Contains("quant_min"));
  CHECK_THAT(value_error([&] { quantrain::fake_quantize(x, -scale); }), Contains("fake_quantize: expected"));
  CHECK_THROWS_AS(quantrain::fake_quantize(x.to(at::kInt), scale), c10::TypeError);
}

TEST_CASE("CPU and CUDA agree bit for bit", "[fake_quant][cuda]") {
  if (!support::has_cuda()) {
    WARN("skipped: no GPU");
    return;
  }
  torch::manual_seed(23);
  for (const at::ScalarType dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
    const at::Tensor x = at::randn({33, 64}).to(dtype);
    for (const auto& shape : std::vector<std::vector<int64_t>>{{1}, {33, 1}, {33, 2}}) {
      const at::Tensor scale = positive_scale(shape);
      CHECK(same_bits(quantrain::fake_quantize(x.cuda(), scale.cuda()).cpu(), quantrain::fake_quantize(x, scale)));
    }
  }
}
