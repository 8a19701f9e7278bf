#include "support.h"

#include <thread>
#include <vector>

#include <quantrain/ops/fixed_point_conv.h>

using Catch::Matchers::Contains;
using quantrain::FixedPointConv;
using quantrain::FixedPointConvOptions;
using support::same_bits;
using support::value_error;

namespace {

at::Tensor codes(at::IntArrayRef shape) { return at::randint(0, 256, shape, at::kByte); }

at::Tensor weights(at::IntArrayRef shape) { return at::randint(-127, 128, shape, at::kChar); }

at::Tensor ints(int64_t low, int64_t high, at::IntArrayRef shape) { return at::randint(low, high, shape, at::kInt); }

// Exact: float64 holds every sum here.
at::Tensor expected_sums(const at::Tensor& x, const at::Tensor& w, const at::Tensor& bias,
                         const FixedPointConvOptions& options) {
  return at::conv2d(x.to(at::kDouble), w.to(at::kDouble), bias.to(at::kDouble), options.stride, options.padding, 1,
                    options.groups);
}

// at::round rounds half to even.
at::Tensor expected_codes(const at::Tensor& sums, const at::Tensor& shift) {
  return at::round(sums * at::pow(2.0, -shift.to(at::kDouble)).view({1, -1, 1, 1})).clamp(0, 255).to(at::kByte);
}

at::Tensor channels_last(const at::Tensor& x) { return x.contiguous(at::MemoryFormat::ChannelsLast); }

at::Tensor empty_like_output(const FixedPointConv& conv, const at::Tensor& x, at::ScalarType type) {
  return at::empty(conv.output_size(x.sizes()), x.options().dtype(type), at::MemoryFormat::ChannelsLast);
}

}  // namespace

TEST_CASE("a convolution of codes is exact", "[fixed_point_conv]") {
  torch::manual_seed(70);
  const at::Tensor x = codes({2, 16, 9, 11}), w = weights({24, 16, 3, 3}), bias = ints(-5000, 5000, {24});
  const FixedPointConvOptions options{{2, 1}, {1, 1}, 1};
  const at::Tensor sums = expected_sums(x, w, bias, options);
  const at::Tensor found = quantrain::fixed_point_conv2d(x, w, bias, options);
  CHECK(found.is_contiguous(at::MemoryFormat::ChannelsLast));
  CHECK(same_bits(found, sums.to(at::kInt)));

  const at::Tensor shift = ints(6, 12, {24});
  CHECK(same_bits(quantrain::fixed_point_conv2d_requantize(x, w, bias, shift, std::nullopt, std::nullopt, options),
                  expected_codes(sums, shift)));
  const at::Tensor residual = codes(sums.sizes()), residual_shift = ints(0, 5, {24});
  const at::Tensor raised = residual.to(at::kDouble) * at::pow(2.0, residual_shift.to(at::kDouble)).view({1, -1, 1, 1});
  CHECK(same_bits(quantrain::fixed_point_conv2d_requantize(x, w, bias, shift, residual, residual_shift, options),
                  expected_codes(sums + raised, shift)));
}

TEST_CASE("the CPU path that QUANTRAIN_CPU_INT8 names is here", "[.][path_is_here]") {
  CHECK_NOTHROW(quantrain::fixed_point_linear(codes({1, 1}), weights({1, 1})));
}

// Strides beyond the kernel, images of several bands of the cache, signed codes: scripts/sanitize.sh looks for what is
// read and written beside them.
TEST_CASE("convolutions of drawn sizes are exact", "[fixed_point_conv]") {
  torch::manual_seed(73);
  const auto draw = [](int64_t low, int64_t high) { return at::randint(low, high, {1}, at::kLong).item<int64_t>(); };
  for (int i = 0; i < 60; ++i) {
    const bool is_signed = draw(0, 2) == 1;
    const int64_t kernel = draw(1, 4), c = draw(1, 130), side = draw(kernel, i % 3 == 0 ? 70 : 20);
    const FixedPointConvOptions options{{draw(1, 5), draw(1, 5)}, {draw(0, kernel), draw(0, kernel)}, 1};
    const at::Tensor x =
        is_signed ? weights({draw(1, 3), c, side, draw(kernel, 60)}) : codes({draw(1, 3), c, side, draw(kernel, 60)});
    const at::Tensor w = weights({draw(1, 70), c, kernel, kernel}), bias = ints(-5000, 5000, {w.size(0)});
    CAPTURE(i, x.sizes(), w.sizes(), options.stride[0], options.stride[1], options.padding[0], options.padding[1]);
    CHECK(
        same_bits(quantrain::fixed_point_conv2d(x, w, bias, options), expected_sums(x, w, bias, options).to(at::kInt)));
  }
}

TEST_CASE("a packed convolution gives the operator's bits, from many threads", "[fixed_point_conv]") {
  torch::manual_seed(71);
  for (const int64_t groups : {1, 32}) {
    const FixedPointConvOptions options{{1, 1}, {1, 1}, groups};
    const at::Tensor x = channels_last(codes({3, 32, 14, 14})), w = weights({32, 32 / groups, 3, 3});
    const at::Tensor bias = ints(-5000, 5000, {32}), shift = ints(6, 12, {32});
    const FixedPointConv conv(w, bias, options, /*input_signed=*/false);
    CHECK(at::IntArrayRef(conv.output_size(x.sizes())) == at::IntArrayRef({3, 32, 14, 14}));
    at::Tensor sums = empty_like_output(conv, x, at::kInt);
    conv.run(x, sums);
    CHECK(same_bits(sums, quantrain::fixed_point_conv2d(x, w, bias, options)));

    const at::Tensor expected =
        quantrain::fixed_point_conv2d_requantize(x, w, bias, shift, x, shift, options, /*is_signed=*/true);
    std::vector<at::Tensor> results;
    for (int i = 0; i < 4; ++i) results.push_back(empty_like_output(conv, x, at::kChar));
    std::vector<std::thread> threads;
    for (at::Tensor& result : results)
      threads.emplace_back([&result, conv, &x, &shift] { conv.run(x, result, shift, x, shift); });
    for (std::thread& thread : threads) thread.join();
    for (const at::Tensor& result : results) CHECK(same_bits(result, expected));
  }
}

TEST_CASE("the residual may be the output's memory", "[fixed_point_conv]") {
  torch::manual_seed(72);
  const at::Tensor x = channels_last(codes({2, 16, 13, 15})), w = weights({16, 16, 3, 3});
  const at::Tensor shift = at::full({1}, 9, at::kInt);
  const FixedPointConv conv(w, std::nullopt, {{1, 1}, {1, 1}, 1}, false);
  const at::Tensor expected = quantrain::fixed_point_conv2d_requantize(x, w, std::nullopt, shift, x, shift,
                                                                       FixedPointConvOptions{{1, 1}, {1, 1}, 1});
  at::Tensor output = x.clone();
  conv.run(x, output, shift, output, shift);
  CHECK(same_bits(output, expected));
}

TEST_CASE("linear, pools and sums", "[fixed_point_conv]") {
  torch::manual_seed(73);
  const at::Tensor x = codes({5, 100}), w = weights({10, 100});
  CHECK(same_bits(quantrain::fixed_point_linear(x, w),
                  at::matmul(x.to(at::kDouble), w.to(at::kDouble).t()).to(at::kInt)));
  const at::Tensor image = codes({2, 20, 9, 8});
  CHECK(same_bits(quantrain::fixed_point_max_pool2d(image, {3, 3}, {2, 2}, {1, 1}),
                  at::max_pool2d(image.to(at::kDouble), {3, 3}, {2, 2}, {1, 1}).to(at::kByte)));
  CHECK(same_bits(quantrain::fixed_point_sum_pool2d(image), image.sum({2, 3}, true, at::kInt)));
  const at::Tensor two = at::full({1}, 2, at::kInt), five = at::full({1}, 5, at::kInt);
  CHECK(same_bits(quantrain::fixed_point_add(image, image, two, five), image.to(at::kInt) * 9));
}

TEST_CASE("what fixed-point layers refuse", "[fixed_point_conv]") {
  const at::Tensor x = codes({1, 4, 5, 5}), w = weights({4, 4, 3, 3});
  CHECK_THROWS_AS(quantrain::fixed_point_conv2d(x.to(at::kFloat), w), c10::TypeError);
  CHECK_THAT(value_error([&] { quantrain::fixed_point_conv2d(x, w, std::nullopt, {{0, 1}, {0, 0}, 1}); }),
             Contains("fixed_point_conv2d: expected stride of at least 1, got 0"));
  CHECK_THAT(
      value_error([&] { quantrain::fixed_point_conv2d_requantize(x, w, std::nullopt, at::full({1}, 40, at::kInt)); }),
      Contains("expected shift in [-31, 31], got 40 to 40"));
}
