#include "support.h"

#include <cmath>
#include <cstdint>
#include <vector>

#include <quantrain/ops/fake_quant.h>
#include <quantrain/ops/fixed_point.h>

using Catch::Matchers::Contains;
using support::same_bits;
using support::value_error;

namespace {

at::Tensor length(int64_t value) { return at::full({1}, value, at::kInt); }

}  // namespace

TEST_CASE("fixed_point_quantize rounds to multiples of a power of two", "[fixed_point]") {
  torch::manual_seed(40);
  const at::Tensor x = at::randn({33, 7}) * 3;
  CHECK(same_bits(quantrain::fixed_point_quantize(x, length(4)),
                  quantrain::fake_quantize(x, at::full({1}, 0.0625f), {}, -127, 127)));
  CHECK(same_bits(quantrain::fixed_point_quantize(x, length(3), 4, false),
                  quantrain::fake_quantize(x, at::full({1}, 0.125f), {}, 0, 15)));
  const at::Tensor special = at::tensor({NAN, INFINITY, -INFINITY});
  CHECK(same_bits(quantrain::fixed_point_quantize(special, length(2), 4), at::tensor({NAN, 1.75f, -1.75f})));
}

TEST_CASE("each channel has its own fraction length", "[fixed_point]") {
  torch::manual_seed(41);
  const at::Tensor x = at::randn({4, 6, 5, 5});
  const at::Tensor lengths = at::arange(6, at::kInt).view({1, 6, 1, 1});
  const at::Tensor y = quantrain::fixed_point_quantize(x, lengths);
  for (int64_t c = 0; c < 6; ++c)
    CHECK(same_bits(y.select(1, c), quantrain::fixed_point_quantize(x.select(1, c), length(c))));
  const at::Tensor last = x.contiguous(at::MemoryFormat::ChannelsLast);
  CHECK(same_bits(quantrain::fixed_point_quantize(last, lengths), y));
}

TEST_CASE("the end codes do not pass the gradient", "[fixed_point]") {
  const at::Tensor x = at::tensor({63.0f, 63.5f, 64.0f, -63.0f, -63.5f}).requires_grad_();
  const at::Tensor y = quantrain::fixed_point_quantize(x, length(1));
  y.sum().backward();
  CHECK(x.grad().equal(at::tensor({1.0f, 0.0f, 0.0f, 1.0f, 0.0f})));
}

TEST_CASE("the fraction length follows the paper's thresholds", "[fixed_point]") {
  const at::Tensor unit = at::tensor({-1.0f, 0.0f, 1.0f});  // unbiased standard deviation 1
  for (int64_t f = 1; f <= 7; ++f) {
    const float sigma = 40.0f / static_cast<float>(1 << f);
    CHECK(quantrain::fixed_point_fraction_length(unit * sigma).item<int64_t>() == f);
    CHECK(quantrain::fixed_point_fraction_length(unit * sigma * 1.001f).item<int64_t>() == f - 1);
  }
  const at::Tensor rows = at::stack({unit * 0.2f, unit * 100.0f, unit * NAN});
  const at::Tensor lengths = quantrain::fixed_point_fraction_length(rows, 0);
  CHECK(lengths.sizes().vec() == std::vector<int64_t>{3, 1});
  CHECK(lengths.flatten().equal(at::tensor({7, 0, 0}, at::kInt)));
  CHECK(quantrain::fixed_point_fraction_length(at::tensor({0.5f, 1.0f}), {}, 8, true, "mse").item<int64_t>() == 6);
  const at::Tensor kept = quantrain::fixed_point_fraction_length(unit * 1.3f, {}, 8, true, "std", length(5), 0.2);
  CHECK(kept.item<int64_t>() == 5);
}

TEST_CASE("requantize rounds half to even and saturates", "[fixed_point]") {
  const at::Tensor acc = at::tensor({24, 40, -40, 8, INT32_MAX, INT32_MIN}, at::kInt);
  CHECK(quantrain::fixed_point_requantize(acc, length(9), 5).equal(at::tensor({2, 2, -2, 0, 127, -127}, at::kChar)));
  CHECK(quantrain::fixed_point_requantize(acc, length(9), 5, false).equal(at::tensor({2, 2, 0, 0, 255, 0}, at::kByte)));
  CHECK(quantrain::fixed_point_requantize(acc, length(3), 7)
            .equal(at::tensor({127, 127, -127, 127, 127, -127}, at::kChar)));
}

TEST_CASE("fixed_point names what it refuses", "[fixed_point]") {
  const at::Tensor x = at::randn({2, 3});
  CHECK_THAT(value_error([&] { quantrain::fixed_point_quantize(x, length(8)); }),
             Contains("fixed_point_quantize: expected fraction_length in [0, 7], got 8 at index 0"));
  CHECK_THAT(value_error([&] { quantrain::fixed_point_fraction_length(x, {}, 8, true, "max"); }),
             Contains("got \"max\""));
}

TEST_CASE("fixed_point on a GPU equals the CPU", "[fixed_point]") {
  if (!support::has_cuda()) return;
  torch::manual_seed(42);
  const at::Tensor x = at::randn({5, 1001}) * 4;
  const at::Tensor lengths = quantrain::fixed_point_fraction_length(x, 0);
  const at::Tensor on_gpu = x.cuda();
  CHECK(quantrain::fixed_point_fraction_length(on_gpu, 0).cpu().equal(lengths));
  CHECK(same_bits(quantrain::fixed_point_quantize(on_gpu, lengths.cuda()).cpu(),
                  quantrain::fixed_point_quantize(x, lengths)));
  const at::Tensor acc = (x * 1e5f).to(at::kInt);
  CHECK(quantrain::fixed_point_requantize(acc.cuda(), length(12).cuda(), 5)
            .cpu()
            .equal(quantrain::fixed_point_requantize(acc, length(12), 5)));
}
