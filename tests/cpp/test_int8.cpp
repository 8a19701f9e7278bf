#include "support.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>
#include <quantrain/ops/fake_quant.h>
#include <quantrain/ops/int8.h>
#include <quantrain/ops/int8_fused.h>

using Catch::Matchers::Contains;
using quantrain::Int8QuantizeOptions;
using support::same_bits;
using support::value_error;

namespace {

at::Generator generator(uint64_t seed) { return at::make_generator<at::CPUGeneratorImpl>(seed); }

at::Tensor codes(at::IntArrayRef shape) { return at::randint(-128, 128, shape, at::kChar); }

// The exact sums, then one float32 operation at a time.
at::Tensor expected_product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_scale,
                            const at::Tensor& b_scale) {
  return at::matmul(a.to(at::kDouble), b.to(at::kDouble).t()).to(at::kFloat).mul(b_scale).mul(a_scale.view({-1, 1}));
}

}  // namespace

TEST_CASE("codes and scales of rows and columns", "[int8]") {
  torch::manual_seed(70);
  const at::Tensor x = at::randn({37, 70});
  const auto rows = quantrain::int8_quantize_rows(x);
  const at::Tensor scale = x.abs().amax({1}, true).div(127);
  CHECK(rows.codes.scalar_type() == at::kChar);
  CHECK(same_bits(rows.scale, scale));
  CHECK(same_bits(rows.codes, at::round(x * (1 / scale)).to(at::kChar)));
  CHECK(same_bits(quantrain::dequantize(rows.codes, rows.scale), rows.codes.to(at::kFloat) * scale));

  const auto columns = quantrain::int8_quantize_columns(x), of_transposed = quantrain::int8_quantize_rows(x.t());
  CHECK(columns.codes.is_contiguous());
  CHECK(same_bits(columns.codes, of_transposed.codes));
  CHECK(same_bits(columns.scale, of_transposed.scale));

  Int8QuantizeOptions options;
  options.column_factor = at::rand({70}) + 0.5;
  options.row_factor = at::rand({37}) + 0.5;
  const auto both = quantrain::int8_quantize_rows_and_columns(x, options);
  CHECK(same_bits(both.rows.codes, quantrain::int8_quantize_rows(x * *options.column_factor).codes));
  CHECK(same_bits(both.columns.codes, quantrain::int8_quantize_columns(x * options.row_factor->view({37, 1})).codes));
}

TEST_CASE("stochastic codes follow their generator and are unbiased", "[int8]") {
  torch::manual_seed(71);
  const at::Tensor x = at::randn({1000, 500});
  Int8QuantizeOptions options;
  options.stochastic = true;
  const auto draw = [&](uint64_t seed) {
    options.generator = generator(seed);
    return quantrain::int8_quantize_rows(x, options);
  };
  const auto first = draw(1);
  CHECK(same_bits(first.codes, draw(1).codes));
  CHECK_FALSE(first.codes.equal(draw(2).codes));
  const at::Tensor exact = x.to(at::kDouble) / first.scale.to(at::kDouble);
  const at::Tensor share = exact - exact.floor(), error = first.codes.to(at::kDouble) - exact;
  CHECK(error.abs().max().item<double>() < 1 + 2e-4);
  // 5.5 standard errors of the sum of half a million errors: a false alarm in 2e7 seeds.
  CHECK(std::abs(error.sum().item<double>()) < 5.5 * std::sqrt((share * (1 - share)).sum().item<double>()) + 1);
}

TEST_CASE("rows without a finite range", "[int8]") {
  at::Tensor x = at::ones({4, 20});
  x[0].zero_();
  x[1][3] = std::numeric_limits<float>::quiet_NaN();
  x[2][19] = std::numeric_limits<float>::infinity();
  const auto rows = quantrain::int8_quantize_rows(x);
  CHECK(rows.scale[0].item<float>() == 1.0f);
  CHECK(rows.scale[1].isnan().item<bool>());
  CHECK(rows.scale[2].isnan().item<bool>());
  CHECK(rows.codes.narrow(0, 0, 3).abs().max().item<int>() == 0);
  CHECK(rows.codes[3].eq(127).all().item<bool>());
  const at::Tensor product = quantrain::int8_mm(rows.codes, rows.codes, rows.scale, std::nullopt);
  CHECK(product[1].isnan().all().item<bool>());
  CHECK(product[3].isfinite().all().item<bool>());
}

TEST_CASE("int8 products are exact", "[int8]") {
  torch::manual_seed(72);
  for (const int64_t m : {1, 8, 37, 130})
    for (const int64_t n : {1, 48, 49})
      for (const int64_t k : {1, 3, 16, 515}) {
        const at::Tensor a = codes({m, k}), b = codes({n, k}), a_scale = at::rand({m}), b_scale = at::rand({n});
        const at::Tensor expected = expected_product(a, b, a_scale, b_scale);
        CHECK(same_bits(quantrain::int8_mm(a, b, a_scale, b_scale), expected));
        const at::Tensor bias = at::randn({n});
        CHECK(same_bits(quantrain::int8_mm(a, b, a_scale, b_scale, bias, at::kBFloat16),
                        (expected + bias).to(at::kBFloat16)));
        at::Tensor total = at::randn({m, n});
        const at::Tensor start = total.clone();
        quantrain::int8_mm_accumulate_(total, a, b, a_scale, b_scale);
        CHECK(same_bits(total, start + expected));
      }
  const at::Tensor bias = at::randn({3});
  CHECK(same_bits(quantrain::int8_mm(codes({2, 0}), codes({3, 0}), std::nullopt, std::nullopt, bias),
                  bias.expand({2, 3}).contiguous()));
  CHECK(quantrain::int8_mm(codes({0, 4}), codes({3, 4}), std::nullopt, std::nullopt).sizes().vec() ==
        std::vector<int64_t>{0, 3});
}

TEST_CASE("a training step's products", "[int8]") {
  torch::manual_seed(73);
  const at::Tensor x = at::randn({64, 48}), w = at::randn({40, 48}) * 0.05, dy = at::randn({64, 40});
  const auto xq = quantrain::int8_quantize_rows(x), wq = quantrain::int8_quantize_rows(w);
  const auto close = [](const at::Tensor& found, const at::Tensor& exact) {
    return (found - exact).norm().item<double>() < 0.02 * exact.norm().item<double>();
  };
  CHECK(close(quantrain::int8_mm(xq.codes, wq.codes, xq.scale, wq.scale), at::matmul(x, w.t())));
  for (const std::string scheme : {"fold", "columns", "auto"}) {
    for (const at::Tensor& weight : {w, wq.codes}) {
      const auto wt = quantrain::int8_weight_transpose(weight, wq.scale, scheme);
      Int8QuantizeOptions options;
      options.stochastic = true;
      options.column_factor = wt.column_factor;
      options.row_factor = xq.scale;
      const auto g = quantrain::int8_quantize_rows_and_columns(dy, options);
      CHECK(close(quantrain::int8_mm(g.rows.codes, wt.codes, g.rows.scale, wt.scale), at::matmul(dy, w)));
      const at::Tensor xt = quantrain::int8_transpose(xq.codes);
      CHECK(close(quantrain::int8_mm(g.columns.codes, xt, g.columns.scale, std::nullopt), at::matmul(dy.t(), x)));
    }
  }
}

TEST_CASE("norms and activations that end in int8 rows", "[int8]") {
  torch::manual_seed(74);
  const at::Tensor x = at::randn({9, 120}), residual = at::randn({9, 120}), weight = at::rand({120}),
                   bias = at::randn({120});
  const auto check = [](const quantrain::Int8Codes& found, const at::Tensor& exact) {
    const at::Tensor error = (found.codes.to(at::kFloat) * found.scale - exact).abs();
    CHECK(error.le(0.501 * found.scale + 1e-6).all().item<bool>());
    CHECK(at::allclose(found.scale, exact.abs().amax({1}, true) / 127, 1e-4));
  };
  const at::Tensor sum = x + residual;
  const auto layer_norm = [&](const at::Tensor& s) { return at::layer_norm(s, {120}, weight, bias, 1e-5); };
  const auto rms_norm = [&](const at::Tensor& s) { return s * at::rsqrt(s.square().mean({1}, true) + 1e-6) * weight; };
  check(quantrain::int8_layer_norm(x, weight, bias), layer_norm(x));
  check(quantrain::int8_rms_norm(x, weight), rms_norm(x));
  const auto pre = quantrain::int8_add_layer_norm(x, residual, weight, bias);
  check(pre.result, layer_norm(sum));
  CHECK(same_bits(pre.carried, sum));
  const auto post = quantrain::int8_add_rms_norm(x, residual, weight, 1e-6, /*post_norm=*/true);
  check(post.result, rms_norm(sum));
  CHECK(at::allclose(post.carried, rms_norm(sum), 1e-4, 1e-5));
  check(quantrain::int8_gelu(x), at::gelu(x));
  check(quantrain::int8_gelu(x, "tanh"), at::gelu(x, "tanh"));
  check(quantrain::int8_silu_mul(x, residual), at::silu(x) * residual);

  const at::Tensor factor = at::rand({120}) + 0.5;
  check(quantrain::int8_layer_norm(x, weight, bias, 1e-5, factor), layer_norm(x) * factor);
  check(quantrain::int8_rms_norm(x, weight, 1e-6, factor), rms_norm(x) * factor);
  const auto added = quantrain::int8_add_layer_norm(x, residual, weight, bias, 1e-5, /*post_norm=*/true, factor);
  check(added.result, layer_norm(sum) * factor);
  CHECK(at::allclose(added.carried, layer_norm(sum), 1e-4, 1e-5));
  check(quantrain::int8_gelu(x, "none", factor), at::gelu(x) * factor);
  check(quantrain::int8_silu_mul(x, residual, factor), at::silu(x) * residual * factor);
}

TEST_CASE("int8 operators refuse what has no meaning", "[int8]") {
  const at::Tensor x = at::randn({4, 6});
  CHECK_THAT(value_error([&] { quantrain::int8_quantize_rows(x.narrow(1, 0, 0)); }),
             Contains("int8_quantize_rows: expected input with at least one column, got [4, 0]"));
  CHECK_THAT(value_error([&] { quantrain::int8_mm(codes({4, 6}), codes({5, 7}), std::nullopt, std::nullopt); }),
             Contains("int8_mm: expected a [..., K] and b [N, K], got [4, 6] and [5, 7]"));
  CHECK_THAT(value_error([&] { quantrain::int8_weight_transpose(x, at::ones({4}), "rows"); }),
             Contains("int8_weight_transpose: expected scheme fold, columns or auto, got 'rows'"));
  CHECK_THROWS_AS(quantrain::int8_quantize_rows(x.to(at::kDouble)), c10::TypeError);
  CHECK_THROWS_AS(quantrain::int8_transpose(x), c10::TypeError);
}

TEST_CASE("int8 operators agree on CPU and CUDA bit for bit", "[int8][cuda]") {
  if (!support::has_cuda()) return;
  torch::manual_seed(75);
  for (const auto dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
    const at::Tensor x = at::randn({130, 333}).to(dtype);
    Int8QuantizeOptions options;
    const auto cpu = quantrain::int8_quantize_rows_and_columns(x, options);
    const auto cuda = quantrain::int8_quantize_rows_and_columns(x.cuda(), options);
    CHECK(same_bits(cuda.rows.codes.cpu(), cpu.rows.codes));
    CHECK(same_bits(cuda.rows.scale.cpu(), cpu.rows.scale));
    CHECK(same_bits(cuda.columns.codes.cpu(), cpu.columns.codes));
    CHECK(same_bits(cuda.columns.scale.cpu(), cpu.columns.scale));
    const at::Tensor w = codes({70, 333}), bias = at::randn({70});
    CHECK(same_bits(
        quantrain::int8_mm(cuda.rows.codes, w.cuda(), cuda.rows.scale, std::nullopt, bias.cuda(), dtype).cpu(),
        quantrain::int8_mm(cpu.rows.codes, w, cpu.rows.scale, std::nullopt, bias, dtype)));
  }
}
