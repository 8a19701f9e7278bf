#include "quantrain/ops/ptq.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/cholesky_inverse.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/round.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "csrc/cpu/ptq.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/inverse_factor.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/ptq.h"
#endif

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr std::string_view kStatistics = "column_statistics_";
constexpr std::string_view kSmooth = "smooth_factor";
constexpr std::string_view kGptq = "gptq_round";
constexpr std::string_view kAwq = "awq_scale";
constexpr int kDampings = 11;

void check_matrix(std::string_view op, std::string_view name, const at::Tensor& tensor, const c10::SymInt& rows,
                  const c10::SymInt& columns) {
  QUANTRAIN_CHECK_VALUE(tensor.dim() == 2 && TORCH_GUARD_OR_TRUE(tensor.sym_size(0).sym_eq(rows)) &&
                            TORCH_GUARD_OR_TRUE(tensor.sym_size(1).sym_eq(columns)),
                        "{}: expected {} [{}, {}], got {}", op, name, c10::str(rows), c10::str(columns),
                        detail::shape_text(tensor));
}

void check_vector(std::string_view op, std::string_view name, const at::Tensor& tensor, const c10::SymInt& k) {
  detail::check_type(op, name, tensor, at::kFloat, "float32");
  QUANTRAIN_CHECK_VALUE(tensor.dim() == 1 && TORCH_GUARD_OR_TRUE(tensor.sym_size(0).sym_eq(k)),
                        "{}: expected {} of {} elements, got {}", op, name, c10::str(k), detail::shape_text(tensor));
}

void check_weight(std::string_view op, const at::Tensor& weight) {
  QUANTRAIN_CHECK_TYPE(weight.is_floating_point() && weight.layout() == at::kStrided,
                       "{}: expected a dense weight of a floating type, got {}", op,
                       c10::toString(weight.scalar_type()));
  QUANTRAIN_CHECK_VALUE(weight.dim() == 2, "{}: expected weight [O, K], got {}", op, detail::shape_text(weight));
}

void check_hessian(std::string_view op, const at::Tensor& hessian, const at::Tensor& weight) {
  QUANTRAIN_CHECK_TYPE(hessian.scalar_type() == at::kFloat || hessian.scalar_type() == at::kDouble,
                       "{}: expected hessian of float32 or float64, got {}", op, c10::toString(hessian.scalar_type()));
  detail::check_dense(op, "hessian", hessian);
  detail::check_device(op, "hessian", hessian, weight, "weight's");
  check_matrix(op, "hessian", hessian, weight.sym_size(1), weight.sym_size(1));
}

void check_bits(std::string_view op, int64_t bits, int64_t group_size) {
  QUANTRAIN_CHECK_VALUE(bits >= 2 && bits <= 8, "{}: expected bits in 2 to 8, got {}", op, bits);
  QUANTRAIN_CHECK_VALUE(group_size >= 1 && group_size <= kMaxWindow, "{}: expected group_size in 1 to {}, got {}", op,
                        kMaxWindow, group_size);
}

// weight: floats or codes [O, K].
void check_grid(std::string_view op, const at::Tensor& weight, const ColumnGrid& grid) {
  QUANTRAIN_CHECK_VALUE(weight.dim() == 2, "{}: expected weight [O, K], got {}", op, detail::shape_text(weight));
  QUANTRAIN_CHECK_VALUE(grid.group_size >= 1 && grid.group_size <= kMaxWindow,
                        "{}: expected group_size in 1 to {}, got {}", op, kMaxWindow, grid.group_size);
  QUANTRAIN_CHECK_VALUE(grid.quant_min < grid.quant_max && grid.quant_min >= -128 && grid.quant_max <= 127,
                        "{}: expected quant_min below quant_max in -128 to 127, got {} and {}", op, grid.quant_min,
                        grid.quant_max);
  const c10::SymInt groups = (weight.sym_size(1) + grid.group_size - 1) / grid.group_size;
  detail::check_type(op, "scale", grid.scale, at::kFloat, "float32");
  detail::check_device(op, "scale", grid.scale, weight, "weight's");
  check_matrix(op, "scale", grid.scale, weight.sym_size(0), groups);
  if (grid.zero_point) {
    detail::check_type(op, "zero_point", *grid.zero_point, at::kInt, "int32");
    detail::check_device(op, "zero_point", *grid.zero_point, weight, "weight's");
    check_matrix(op, "zero_point", *grid.zero_point, weight.sym_size(0), groups);
  }
}

void check_gptq(const at::Tensor& weight, const at::Tensor& hessian, const ColumnGrid& grid,
                const GptqOptions& options) {
  check_weight(kGptq, weight);
  check_grid(kGptq, weight, grid);
  check_hessian(kGptq, hessian, weight);
  QUANTRAIN_CHECK_VALUE(options.order == "activation" || options.order == "natural",
                        "{}: expected order to be 'activation' or 'natural', got '{}'", kGptq, options.order);
  QUANTRAIN_CHECK_VALUE(options.damping > 0 && std::isfinite(options.damping), "{}: expected damping above 0, got {}",
                        kGptq, options.damping);
  QUANTRAIN_CHECK_VALUE(options.keep.has_value() == options.keep_scale.has_value(),
                        "{}: expected keep and keep_scale together, got one", kGptq);
  if (!options.keep) return;
  const at::Tensor &keep = *options.keep, &scale = *options.keep_scale;
  QUANTRAIN_CHECK_TYPE(keep.scalar_type() == at::kLong || keep.scalar_type() == at::kInt,
                       "{}: expected keep of int32 or int64, got {}", kGptq, c10::toString(keep.scalar_type()));
  QUANTRAIN_CHECK_VALUE(keep.dim() == 1, "{}: expected keep [Ko], got {}", kGptq, detail::shape_text(keep));
  detail::check_device(kGptq, "keep", keep, weight, "weight's");
  detail::check_type(kGptq, "keep_scale", scale, at::kFloat, "float32");
  detail::check_device(kGptq, "keep_scale", scale, weight, "weight's");
  check_matrix(kGptq, "keep_scale", scale, weight.sym_size(0), 1);
}

void check_awq(const at::Tensor& weight, const at::Tensor& hessian, const at::Tensor& mean_abs, int64_t bits,
               int64_t group_size, int64_t steps) {
  check_weight(kAwq, weight);
  check_hessian(kAwq, hessian, weight);
  check_vector(kAwq, "mean_abs", mean_abs, weight.sym_size(1));
  detail::check_device(kAwq, "mean_abs", mean_abs, weight, "weight's");
  check_bits(kAwq, bits, group_size);
  QUANTRAIN_CHECK_VALUE(steps >= 1 && steps <= 1000, "{}: expected steps in 1 to 1000, got {}", kAwq, steps);
}

// One column per column of the weight.
at::Tensor spread(const at::Tensor& per_group, int64_t group_size, int64_t k) {
  return per_group.repeat_interleave(group_size, 1).narrow(1, 0, k);
}

// What a column is multiplied by, divided by and shifted by: float64 [O, K] each; zero_point may be undefined.
struct Spread {
  at::Tensor inverse, scale, zero_point;
};

Spread spread_grid(const ColumnGrid& grid, int64_t k) {
  const at::Tensor scale = spread(grid.scale, grid.group_size, k).to(at::kDouble);
  const at::Tensor inverse = at::where(scale == 0, at::zeros_like(scale), scale.reciprocal());
  const at::Tensor zero_point =
      grid.zero_point ? spread(*grid.zero_point, grid.group_size, k).to(at::kDouble) : at::Tensor();
  return {inverse, scale, zero_point};
}

double weighted(const at::Tensor& difference, const at::Tensor& hessian) {
  return (at::mm(difference, hessian) * difference).sum(at::kDouble).item<double>();
}

double relative(double error, double whole) { return whole > 0 ? error / whole : 0.0; }

// Empty where H has no Cholesky factor with this damping.
at::Tensor factor_or_none(const at::Tensor& hessian, double damping) {
  at::Tensor damped = hessian.clone();
  damped.diagonal().add_(damping);
  const auto [factor, info] = at::linalg_cholesky_ex(damped);
  if (info.item<int>() != 0) return {};
  const auto [upper, again] = at::linalg_cholesky_ex(at::cholesky_inverse(factor), /*upper=*/true);
  return again.item<int>() != 0 || !upper.isfinite().all().item<bool>() ? at::Tensor() : upper;
}

// GPTQ's codes, float64 [O, K], of w [O, K], which is used up. upper: of the inverse, [K, K]; columns in their order.
at::Tensor round_blocks(at::Tensor& w, const at::Tensor& upper, const Spread& by, const at::Tensor& low,
                        const at::Tensor& high) {
  const int64_t rows = w.size(0), k = w.size(1);
  at::Tensor codes = at::empty_like(w);
  if (rows == 0) return codes;
  const at::Tensor inverse = by.inverse.contiguous(), scale = by.scale.contiguous();
  const at::Tensor zero_point = by.zero_point.defined() ? by.zero_point.contiguous() : at::Tensor();
  for (int64_t begin = 0; begin < k; begin += kGptqBlock) {
    const int64_t count = std::min(kGptqBlock, k - begin), end = begin + count;
    const at::Tensor among = upper.narrow(0, begin, count).narrow(1, begin, count).contiguous();
    const at::Tensor errors = at::empty({rows, count}, w.options());
    const GptqBlockArgs args{w.const_data_ptr<double>() + begin,
                             inverse.const_data_ptr<double>() + begin,
                             scale.const_data_ptr<double>() + begin,
                             zero_point.defined() ? zero_point.const_data_ptr<double>() + begin : nullptr,
                             codes.mutable_data_ptr<double>() + begin,
                             errors.mutable_data_ptr<double>(),
                             among.const_data_ptr<double>(),
                             low.const_data_ptr<double>() + begin,
                             high.const_data_ptr<double>() + begin,
                             rows,
                             count,
                             k};
    run_tasks(args, rows, grain_of(count * count), w, QUANTRAIN_KERNELS(gptq_block));
    if (end < k) w.narrow(1, end, k - end).addmm_(errors, upper.narrow(0, begin, count).narrow(1, end, k - end), 1, -1);
  }
  return codes;
}

void statistics_check(const at::Tensor& absmax, const at::Tensor& mean_abs, const OptionalTensor& hessian,
                      const at::Tensor& rows, const at::Tensor& input) {
  detail::check_float(kStatistics, "input", input.scalar_type());
  QUANTRAIN_CHECK_VALUE(input.dim() >= 1, "{}: expected input of at least one dimension, got a scalar", kStatistics);
  detail::check_dense(kStatistics, "input", input);
  const c10::SymInt k = input.sym_size(-1);
  check_vector(kStatistics, "absmax", absmax, k);
  check_vector(kStatistics, "mean_abs", mean_abs, k);
  detail::check_type(kStatistics, "rows", rows, at::kLong, "int64");
  QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(rows.sym_numel().sym_eq(1)), "{}: expected rows of one element, got {}",
                        kStatistics, detail::shape_text(rows));
  // What is counted may lie in the host's memory, where the statistics of many layers have room.
  QUANTRAIN_CHECK_TYPE(absmax.device() == input.device() || absmax.is_cpu(),
                       "{}: expected absmax on input's device {} or on the CPU, got {}", kStatistics,
                       input.device().str(), absmax.device().str());
  if (hessian) {
    detail::check_type(kStatistics, "hessian", *hessian, at::kFloat, "float32");
    detail::check_device(kStatistics, "hessian", *hessian, absmax, "absmax's");
    check_matrix(kStatistics, "hessian", *hessian, k, k);
  }
  detail::check_device(kStatistics, "mean_abs", mean_abs, absmax, "absmax's");
  detail::check_device(kStatistics, "rows", rows, absmax, "absmax's");
}

void statistics_meta(at::Tensor& absmax, at::Tensor& mean_abs, const OptionalTensor& hessian, at::Tensor& rows,
                     const at::Tensor& input) {
  statistics_check(absmax, mean_abs, hessian, rows, input);
}

void statistics_kernel(at::Tensor& absmax, at::Tensor& mean_abs, const OptionalTensor& hessian, at::Tensor& rows,
                       const at::Tensor& input) {
  statistics_check(absmax, mean_abs, hessian, rows, input);
  const at::NoGradGuard no_grad;
  const at::Tensor x = input.reshape({-1, input.size(-1)}).to(at::kFloat);
  if (x.numel() == 0) return;
  rows.add_(x.size(0));
  // Of these rows in all; without the dimensions that `rows` may have.
  const at::Tensor share = rows.reshape({}).to(at::kFloat).reciprocal() * static_cast<double>(x.size(0));
  const at::Tensor magnitude = x.abs();
  const at::Device home = absmax.device();
  absmax.copy_(at::maximum(absmax, at::amax(magnitude, {0}).to(home)));
  mean_abs.add_((magnitude.mean(0).to(home) - mean_abs) * share);
  if (!hessian) return;
  at::Tensor sum = *hessian;
  sum.add_(((at::mm(x.t(), x) * (2.0 / static_cast<double>(x.size(0)))).to(home) - sum) * share);
}

at::Tensor smooth_meta(const at::Tensor& input_absmax, const at::Tensor& weight_absmax, double alpha) {
  QUANTRAIN_CHECK_VALUE(input_absmax.dim() == 1, "{}: expected input_absmax [K], got {}", kSmooth,
                        detail::shape_text(input_absmax));
  check_vector(kSmooth, "input_absmax", input_absmax, input_absmax.sym_size(0));
  check_vector(kSmooth, "weight_absmax", weight_absmax, input_absmax.sym_size(0));
  detail::check_device(kSmooth, "weight_absmax", weight_absmax, input_absmax, "input_absmax's");
  QUANTRAIN_CHECK_VALUE(alpha >= 0 && alpha <= 1, "{}: expected alpha in [0, 1], got {}", kSmooth, alpha);
  return at::empty_like(input_absmax);
}

at::Tensor smooth_kernel(const at::Tensor& input_absmax, const at::Tensor& weight_absmax, double alpha) {
  smooth_meta(input_absmax, weight_absmax, alpha);
  const at::Tensor s = (input_absmax.pow(alpha) / weight_absmax.pow(1 - alpha)).clamp_min(1e-5);
  return at::where((input_absmax == 0).logical_or(weight_absmax == 0), at::ones_like(s), s);
}

}  // namespace

at::Tensor detail::inverse_factor(std::string_view op, const at::Tensor& hessian, double damping, double share) {
  at::Tensor upper;
  for (int i = 0; i < kDampings && !upper.defined(); ++i, damping *= 2) upper = factor_or_none(hessian, damping);
  QUANTRAIN_CHECK_VALUE(upper.defined(),
                        "{}: expected a hessian that is positive definite after damping, got none up to a damping of "
                        "{} times the mean of its diagonal (more calibration data helps)",
                        op, share * (1 << (kDampings - 1)));
  return upper;
}

// ---- public functions -----------------------------------------------------------------------------------------------

void column_statistics_(at::Tensor& absmax, at::Tensor& mean_abs, const OptionalTensor& hessian, at::Tensor& rows,
                        const at::Tensor& input) {
  static const auto op = find_operator<decltype(statistics_kernel)>(kStatistics);
  op.call(absmax, mean_abs, hessian, rows, input);
}

at::Tensor smooth_factor(const at::Tensor& input_absmax, const at::Tensor& weight_absmax, double alpha) {
  static const auto op = find_operator<decltype(smooth_kernel)>(kSmooth);
  return op.call(input_absmax, weight_absmax, alpha);
}

ColumnGrid absmax_grid(const at::Tensor& weight, int64_t bits, int64_t group_size) {
  QUANTRAIN_CHECK_VALUE(weight.dim() == 2, "absmax_grid: expected weight [O, K], got {}", detail::shape_text(weight));
  check_bits("absmax_grid", bits, group_size);
  const at::NoGradGuard no_grad;
  const int64_t most = (int64_t{1} << (bits - 1)) - 1, k = weight.size(1);
  const int64_t groups = (k + group_size - 1) / group_size;
  const at::Tensor padded = at::constant_pad_nd(weight.to(at::kFloat).abs(), {0, groups * group_size - k});
  const at::Tensor absmax = at::amax(padded.reshape({weight.size(0), groups, group_size}), {2});
  // Of what is not 0 not smaller than that: the reciprocal of a subnormal number may be Inf.
  const at::Tensor least = (absmax / static_cast<double>(most)).clamp_min(std::numeric_limits<float>::min());
  const at::Tensor scale = at::where(absmax == 0, at::zeros_like(least), least);
  // 8 bits as int8_quantize_rows, whose rows of zeros have scale 1; -128 is no code of theirs.
  ColumnGrid grid;
  grid.scale = bits == 8 ? at::where(absmax == 0, at::ones_like(scale), scale) : scale;
  grid.group_size = group_size;
  grid.quant_max = most;
  grid.quant_min = bits == 8 ? -most : -most - 1;
  return grid;
}

at::Tensor round_columns(const at::Tensor& weight, const ColumnGrid& grid) {
  check_grid("round_columns", weight, grid);
  const at::NoGradGuard no_grad;
  const at::Tensor scale = spread(grid.scale, grid.group_size, weight.size(1));
  const at::Tensor inverse = at::where(scale == 0, at::zeros_like(scale), scale.reciprocal());
  at::Tensor q = at::round(weight.to(at::kFloat) * inverse);
  if (grid.zero_point) q.add_(spread(*grid.zero_point, grid.group_size, weight.size(1)));
  return q.clamp(grid.quant_min, grid.quant_max).to(at::kChar);
}

at::Tensor decode_columns(const at::Tensor& codes, const ColumnGrid& grid) {
  check_grid("decode_columns", codes, grid);
  at::Tensor q = codes.to(at::kFloat);
  if (grid.zero_point) q = q - spread(*grid.zero_point, grid.group_size, codes.size(1));
  return q * spread(grid.scale, grid.group_size, codes.size(1));
}

GptqCodes gptq_round(const at::Tensor& weight, const at::Tensor& hessian, const ColumnGrid& grid,
                     const GptqOptions& options) {
  check_gptq(weight, hessian, grid, options);
  const int64_t k = weight.size(1);
  const at::NoGradGuard no_grad;
  const at::Tensor exact = weight.to(at::kDouble), given = hessian.to(at::kDouble);
  QUANTRAIN_CHECK_VALUE(given.isfinite().all().item<bool>() && exact.isfinite().all().item<bool>(),
                        "{}: expected a finite weight and hessian, got NaN or Inf", kGptq);
  QUANTRAIN_CHECK_VALUE(grid.scale.isfinite().all().item<bool>() &&
                            (!options.keep_scale || options.keep_scale->isfinite().all().item<bool>()),
                        "{}: expected finite scales, got NaN or Inf", kGptq);
  Spread by = spread_grid(grid, k);
  at::Tensor low = at::full({k}, static_cast<double>(grid.quant_min), exact.options());
  at::Tensor high = at::full({k}, static_cast<double>(grid.quant_max), exact.options());
  at::Tensor w = exact.clone(), h = given.clone();
  const at::Tensor dead = h.diagonal() == 0;
  w.masked_fill_(dead, 0);
  h.diagonal().masked_fill_(dead, 1);
  at::Tensor damped = dead.logical_not();
  if (options.keep) {
    const at::Tensor keep = options.keep->to(at::kLong), scale = options.keep_scale->to(at::kDouble);
    QUANTRAIN_CHECK_VALUE((keep >= 0).logical_and(keep < k).all().item<bool>(),
                          "{}: expected keep in 0 to {}, got another column", kGptq, k - 1);
    by.scale.index_copy_(1, keep, scale.expand({-1, keep.numel()}));
    by.inverse.index_copy_(1, keep, scale.reciprocal().expand({-1, keep.numel()}));
    if (by.zero_point.defined()) by.zero_point.index_fill_(1, keep, 0);
    low.index_fill_(0, keep, -127);
    high.index_fill_(0, keep, 127);
    damped.index_fill_(0, keep, false);
  }
  if (!damped.any().item<bool>()) damped = at::ones_like(damped);
  const double damping = options.damping * h.diagonal().masked_select(damped).mean().item<double>();

  const at::Tensor order = options.order == "activation"
                               ? at::argsort(h.diagonal(), /*stable=*/true, /*dim=*/0, /*descending=*/true)
                               : at::arange(k, h.options().dtype(at::kLong));
  const auto in_order = [&](const at::Tensor& tensor) { return tensor.index_select(1, order); };
  w = in_order(w);
  h = in_order(h.index_select(0, order));
  const at::Tensor upper = detail::inverse_factor(kGptq, h, damping, options.damping);
  const Spread ordered{in_order(by.inverse), in_order(by.scale),
                       by.zero_point.defined() ? in_order(by.zero_point) : at::Tensor()};
  at::Tensor codes = round_blocks(w, upper, ordered, low.index_select(0, order), high.index_select(0, order));
  GptqCodes result;
  const at::Tensor back = at::argsort(order);
  codes = codes.index_select(1, back);
  result.codes = codes.to(at::kChar);
  const at::Tensor value = (by.zero_point.defined() ? codes - by.zero_point : codes) * by.scale;
  result.error = relative(weighted(exact - value, given), weighted(exact, given));
  return result;
}

AwqScale awq_scale(const at::Tensor& weight, const at::Tensor& hessian, const at::Tensor& mean_abs, int64_t bits,
                   int64_t group_size, int64_t steps) {
  check_awq(weight, hessian, mean_abs, bits, group_size, steps);
  const at::NoGradGuard no_grad;
  const at::Tensor w = weight.to(at::kFloat), h = hessian.to(at::kFloat);
  QUANTRAIN_CHECK_VALUE(h.isfinite().all().item<bool>() && w.isfinite().all().item<bool>(),
                        "{}: expected a finite weight and hessian, got NaN or Inf", kAwq);
  const double whole = weighted(w, h);
  const auto error_of = [&](const at::Tensor& factor) {
    const at::Tensor scaled = w * factor;
    const ColumnGrid grid = absmax_grid(scaled, bits, group_size);
    return weighted(w - decode_columns(round_columns(scaled, grid), grid) / factor, h);
  };
  AwqScale best{at::ones_like(mean_abs), 0};
  double least = error_of(best.factor);
  const ColumnGrid grid = absmax_grid(w, bits, group_size);
  const at::Tensor largest = spread(grid.scale, group_size, w.size(1)) * static_cast<double>(grid.quant_max);
  const at::Tensor share = (w.abs() / largest.clamp_min(1e-12)).mean(0).clamp_min(1e-4);
  const at::Tensor magnitude = mean_abs.clamp_min(1e-4);
  for (int64_t i = 1; i <= steps; ++i) {
    const double r = static_cast<double>(i) / static_cast<double>(steps);
    for (const bool both : {false, true}) {
      if (both && i == steps) continue;  // the same
      at::Tensor factor = magnitude.pow(r);
      if (both) factor = factor / share.pow(1 - r);
      factor = factor / (factor.max() * factor.min()).sqrt();
      const double error = error_of(factor);
      if (error < least) {
        least = error;
        best.factor = factor;
      }
    }
  }
  best.error = relative(least, whole);
  return best;
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

namespace quantrain {
namespace {

// As operators, so that Python calls them: the struct's fields one by one.

ColumnGrid grid_of(const at::Tensor& scale, const OptionalTensor& zero_point, int64_t group_size, int64_t quant_min,
                   int64_t quant_max) {
  return {scale, zero_point, group_size, quant_min, quant_max};
}

using Pair = std::tuple<at::Tensor, at::Tensor>;

at::Tensor error_tensor(double error, const at::Tensor& like) {
  return at::scalar_tensor(error, like.options().dtype(at::kDouble));
}

Pair gptq_kernel(const at::Tensor& weight, const at::Tensor& hessian, const at::Tensor& scale,
                 const OptionalTensor& zero_point, int64_t group_size, int64_t quant_min, int64_t quant_max,
                 c10::string_view order, double damping, const OptionalTensor& keep, const OptionalTensor& keep_scale) {
  const GptqCodes result = gptq_round(weight, hessian, grid_of(scale, zero_point, group_size, quant_min, quant_max),
                                      {order, damping, keep, keep_scale});
  return {result.codes, error_tensor(result.error, weight)};
}

Pair gptq_meta(const at::Tensor& weight, const at::Tensor& hessian, const at::Tensor& scale,
               const OptionalTensor& zero_point, int64_t group_size, int64_t quant_min, int64_t quant_max,
               c10::string_view order, double damping, const OptionalTensor& keep, const OptionalTensor& keep_scale) {
  check_gptq(weight, hessian, grid_of(scale, zero_point, group_size, quant_min, quant_max),
             {order, damping, keep, keep_scale});
  return {at::empty_symint(weight.sym_sizes(), weight.options().dtype(at::kChar)),
          at::empty({}, weight.options().dtype(at::kDouble))};
}

Pair awq_kernel(const at::Tensor& weight, const at::Tensor& hessian, const at::Tensor& mean_abs, int64_t bits,
                int64_t group_size, int64_t steps) {
  const AwqScale result = awq_scale(weight, hessian, mean_abs, bits, group_size, steps);
  return {result.factor, error_tensor(result.error, weight)};
}

Pair awq_meta(const at::Tensor& weight, const at::Tensor& hessian, const at::Tensor& mean_abs, int64_t bits,
              int64_t group_size, int64_t steps) {
  check_awq(weight, hessian, mean_abs, bits, group_size, steps);
  return {at::empty_symint(mean_abs.sym_sizes(), mean_abs.options()),
          at::empty({}, weight.options().dtype(at::kDouble))};
}

}  // namespace
}  // namespace quantrain

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  m.def(
      "column_statistics_(Tensor(a!) absmax, Tensor(b!) mean_abs, Tensor(c!)? hessian, Tensor(d!) rows, Tensor input) "
      "-> ()");
  m.def("smooth_factor(Tensor input_absmax, Tensor weight_absmax, *, float alpha) -> Tensor");
  m.def(
      "gptq_round(Tensor weight, Tensor hessian, Tensor scale, Tensor? zero_point=None, *, int group_size, int "
      "quant_min=-8, int quant_max=7, str order=\"activation\", float damping=0.01, Tensor? keep=None, Tensor? "
      "keep_scale=None) -> (Tensor codes, Tensor error)");
  m.def(
      "awq_scale(Tensor weight, Tensor hessian, Tensor mean_abs, *, int bits, int group_size, int steps=20) -> (Tensor "
      "factor, Tensor error)");
}

#define QUANTRAIN_REGISTER_PTQ(kind)                           \
  m.impl("column_statistics_", &quantrain::statistics_##kind); \
  m.impl("smooth_factor", &quantrain::smooth_##kind);          \
  m.impl("gptq_round", &quantrain::gptq_##kind);               \
  m.impl("awq_scale", &quantrain::awq_##kind)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_PTQ(kernel); }
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_PTQ(kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_PTQ(meta); }
