#include <ATen/ops/add.h>
#include <ATen/ops/argmin.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/kthvalue.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "csrc/cpu/fake_quant.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/fake_quant_check.h"
#include "quantrain/ops/fake_quant.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/fake_quant.h"
#endif

// Ranges and the parameters that follow from them: what observers and dynamic quantization are made of.

namespace quantrain {
namespace {

using TensorPair = std::tuple<at::Tensor, at::Tensor>;
using OptionalTensor = std::optional<at::Tensor>;

// ---- shapes, shared with Meta ---------------------------------------------------------------------------------------

// A scale is a width over a number of steps: at least one.
void check_steps(std::string_view op, int64_t quant_min, int64_t quant_max) {
  check_range(op, quant_min, quant_max);
  QUANTRAIN_CHECK_VALUE(quant_min < quant_max, "{}: expected quant_min < quant_max, got {} and {}", op, quant_min,
                        quant_max);
}

void check_reduced_input(std::string_view op, const at::Tensor& input, c10::SymIntArrayRef scale_shape) {
  check_input(op, input);
  check_scale_shape(op, "scale_shape", input.sym_sizes(), scale_shape);
  QUANTRAIN_CHECK_VALUE(input.sym_numel() > 0, "{}: expected input with at least one element, got shape {}", op,
                        detail::shape_text(input));
}

at::Tensor empty_scale(const at::Tensor& like, c10::SymIntArrayRef shape, at::ScalarType type) {
  return at::empty_symint(shape, like.options().dtype(type));
}

TensorPair min_max_meta(const at::Tensor& input, c10::SymIntArrayRef scale_shape) {
  check_reduced_input("_min_max", input, scale_shape);
  return {empty_scale(input, scale_shape, at::kFloat), empty_scale(input, scale_shape, at::kFloat)};
}

TensorPair percentile_range_meta(const at::Tensor& input, c10::SymIntArrayRef scale_shape, double percentile) {
  check_reduced_input("_percentile_range", input, scale_shape);
  QUANTRAIN_CHECK_VALUE(percentile > 50 && percentile <= 100,
                        "_percentile_range: expected percentile in (50, 100], got {}", percentile);
  return {empty_scale(input, scale_shape, at::kFloat), empty_scale(input, scale_shape, at::kFloat)};
}

void check_observed(std::string_view op, const at::Tensor& min_val, double averaging_constant) {
  QUANTRAIN_CHECK_VALUE(averaging_constant >= 0 && averaging_constant <= 1,
                        "{}: expected averaging_constant in [0, 1], got {}", op, averaging_constant);
  detail::check_type(op, "min_val", min_val, at::kFloat, "float32");
}

// As min_val, but for the type.
void check_as_observed(std::string_view op, std::string_view name, const at::Tensor& tensor, const at::Tensor& min_val,
                       at::ScalarType type) {
  QUANTRAIN_CHECK_TYPE(tensor.scalar_type() == type && tensor.device() == min_val.device(),
                       "{}: expected {} of {} on min_val's device {}, got {} on {}", op, name, c10::toString(type),
                       min_val.device().str(), c10::toString(tensor.scalar_type()), tensor.device().str());
  QUANTRAIN_CHECK_VALUE(tensor.sym_sizes() == min_val.sym_sizes(), "{}: expected {} of min_val's shape {}, got {}", op,
                        name, detail::shape_text(min_val), detail::shape_text(tensor));
}

void observe_meta(at::Tensor& min_val, at::Tensor& max_val, const at::Tensor& low, const at::Tensor& high,
                  const at::Tensor& finite, double averaging_constant) {
  constexpr std::string_view kOp = "_observe_";
  check_observed(kOp, min_val, averaging_constant);
  check_as_observed(kOp, "max_val", max_val, min_val, at::kFloat);
  check_as_observed(kOp, "low", low, min_val, at::kFloat);
  check_as_observed(kOp, "high", high, min_val, at::kFloat);
  check_as_observed(kOp, "finite", finite, min_val, at::kBool);
}

TensorPair observe_qparams_meta(at::Tensor& min_val, at::Tensor& max_val, at::Tensor& scale,
                                const OptionalTensor& zero_point, const at::Tensor& low, const at::Tensor& high,
                                const OptionalTensor& finite, double averaging_constant, int64_t quant_min,
                                int64_t quant_max, bool, bool) {
  constexpr std::string_view kOp = "_observe_qparams_";
  check_steps(kOp, quant_min, quant_max);
  check_observed(kOp, min_val, averaging_constant);
  check_as_observed(kOp, "max_val", max_val, min_val, at::kFloat);
  check_as_observed(kOp, "scale", scale, min_val, at::kFloat);
  if (zero_point) check_as_observed(kOp, "zero_point", *zero_point, min_val, at::kInt);
  check_as_observed(kOp, "low", low, min_val, at::kFloat);
  check_as_observed(kOp, "high", high, min_val, at::kFloat);
  if (finite) check_as_observed(kOp, "finite", *finite, min_val, at::kBool);
  return {empty_scale(min_val, min_val.sym_sizes(), at::kFloat), empty_scale(min_val, min_val.sym_sizes(), at::kInt)};
}

TensorPair qparams_from_range_meta(const at::Tensor& min, const at::Tensor& max, int64_t quant_min, int64_t quant_max,
                                   bool) {
  check_steps("_qparams_from_range", quant_min, quant_max);
  QUANTRAIN_CHECK_TYPE(min.scalar_type() == at::kFloat && max.scalar_type() == at::kFloat,
                       "_qparams_from_range: expected min and max of float32, got {} and {}",
                       c10::toString(min.scalar_type()), c10::toString(max.scalar_type()));
  QUANTRAIN_CHECK_VALUE(min.sym_sizes() == max.sym_sizes(),
                        "_qparams_from_range: expected min and max of one shape, got {} and {}",
                        detail::shape_text(min), detail::shape_text(max));
  QUANTRAIN_CHECK_TYPE(min.device() == max.device(),
                       "_qparams_from_range: expected min and max on one device, got {} and {}", min.device().str(),
                       max.device().str());
  return {empty_scale(min, min.sym_sizes(), at::kFloat), empty_scale(min, min.sym_sizes(), at::kInt)};
}

TensorPair choose_qparams_meta(const at::Tensor& input, c10::SymIntArrayRef scale_shape, int64_t quant_min,
                               int64_t quant_max, bool) {
  check_steps("choose_qparams", quant_min, quant_max);
  check_reduced_input("choose_qparams", input, scale_shape);
  return {empty_scale(input, scale_shape, at::kFloat), empty_scale(input, scale_shape, at::kInt)};
}

TensorPair mse_range_meta(const at::Tensor& input, c10::SymIntArrayRef scale_shape, int64_t quant_min,
                          int64_t quant_max, bool, int64_t steps) {
  check_steps("_mse_range", quant_min, quant_max);
  QUANTRAIN_CHECK_VALUE(steps >= 1 && steps <= 65535, "_mse_range: expected steps in [1, 65535], got {}", steps);
  check_reduced_input("_mse_range", input, scale_shape);
  return {empty_scale(input, scale_shape, at::kFloat), empty_scale(input, scale_shape, at::kFloat)};
}

// ---- CPU and CUDA ---------------------------------------------------------------------------------------------------

TensorPair min_max_kernel(const at::Tensor& input, c10::SymIntArrayRef symbolic_shape) {
  check_reduced_input("_min_max", input, symbolic_shape);
  if (input.scalar_type() == at::kDouble) return min_max_kernel(input.to(at::kFloat), symbolic_shape);
  const at::IntArrayRef scale_shape = C10_AS_INTARRAYREF_SLOW(symbolic_shape);
  ArrangedShape arranged = arrange_shape("_min_max", input, scale_shape);
  if (wants_regrouping(arranged.grouping)) {
    const auto [min, max] =
        min_max_kernel(regroup(input, scale_shape),
                       c10::SymIntArrayRef({c10::SymInt(c10::multiply_integers(scale_shape)), c10::SymInt(1)}));
    return {min.view(scale_shape), max.view(scale_shape)};
  }
  const int64_t tasks = arranged.grouping.rows * chunks_per_row(arranged.grouping);
  const at::Tensor partial_min = at::empty({tasks}, input.options().dtype(at::kFloat));
  const at::Tensor partial_max = at::empty_like(partial_min);
  const MinMaxArgs args{arranged.input.const_data_ptr(), partial_min.mutable_data_ptr<float>(),
                        partial_max.mutable_data_ptr<float>(), dtype_of(input), arranged.grouping};
  run_rows(args, input, QUANTRAIN_KERNELS(min_max));
  return {fold_partials(partial_min, arranged.grouping, arranged.scale_sizes, arranged.order, Fold::kMin),
          fold_partials(partial_max, arranged.grouping, arranged.scale_sizes, arranged.order, Fold::kMax)};
}

TensorPair qparams_from_range_kernel(const at::Tensor& min, const at::Tensor& max, int64_t quant_min, int64_t quant_max,
                                     bool symmetric) {
  auto [scale, zero_point] = qparams_from_range_meta(min, max, quant_min, quant_max, symmetric);
  if (min.numel() == 0) return {scale, zero_point};
  const at::Tensor low = min.contiguous(), high = max.contiguous();
  const QParamsFromRangeArgs args{low.const_data_ptr<float>(),
                                  high.const_data_ptr<float>(),
                                  scale.mutable_data_ptr<float>(),
                                  zero_point.mutable_data_ptr<int32_t>(),
                                  min.numel(),
                                  make_range(quant_min, quant_max),
                                  symmetric};
#if defined(QUANTRAIN_WITH_CUDA)
  if (run_on_cuda(args, min, &cuda::qparams_from_range)) return {scale, zero_point};
#endif
  cpu::qparams_from_range(args);
  return {scale, zero_point};
}

TensorPair choose_qparams_kernel(const at::Tensor& input, c10::SymIntArrayRef scale_shape, int64_t quant_min,
                                 int64_t quant_max, bool symmetric) {
  check_steps("choose_qparams", quant_min, quant_max);
  check_reduced_input("choose_qparams", input, scale_shape);
  const auto [min, max] = min_max_kernel(input, scale_shape);
  return qparams_from_range_kernel(min, max, quant_min, quant_max, symmetric);
}

// The sum over the last dimension by halves: additions of two tensors, so in one order on every device. It decides
// scales.
at::Tensor sum_of_chunks(at::Tensor partial) {
  int64_t size = 1;
  while (size < partial.size(-1)) size *= 2;
  if (size > partial.size(-1)) partial = at::constant_pad_nd(partial, {0, size - partial.size(-1)}, 0.0);
  for (; size > 1; size /= 2)
    partial = at::add(partial.narrow(-1, 0, size / 2), partial.narrow(-1, size / 2, size / 2));
  return partial.squeeze(-1);
}

TensorPair mse_range_kernel(const at::Tensor& input, c10::SymIntArrayRef symbolic_shape, int64_t quant_min,
                            int64_t quant_max, bool symmetric, int64_t steps) {
  mse_range_meta(input, symbolic_shape, quant_min, quant_max, symmetric, steps);
  if (input.scalar_type() == at::kDouble)
    return mse_range_kernel(input.to(at::kFloat), symbolic_shape, quant_min, quant_max, symmetric, steps);
  const at::IntArrayRef scale_shape = C10_AS_INTARRAYREF_SLOW(symbolic_shape);
  const auto [min, max] = min_max_kernel(input, symbolic_shape);
  // Each group in one row: `min` and `max` then are in the order of the rows.
  const at::Tensor grouped = regroup(input, scale_shape);
  const ArrangedShape arranged = arrange_shape("_mse_range", grouped, {grouped.size(0), 1});
  const int64_t chunks = chunks_per_row(arranged.grouping);
  const at::Tensor partial = at::empty({steps, grouped.size(0), chunks}, input.options().dtype(at::kFloat));
  const RangeErrorArgs args{grouped.const_data_ptr(),
                            min.const_data_ptr<float>(),
                            max.const_data_ptr<float>(),
                            partial.mutable_data_ptr<float>(),
                            dtype_of(input),
                            arranged.grouping,
                            make_range(quant_min, quant_max),
                            symmetric,
                            steps};
  run_rows(args, input, QUANTRAIN_KERNELS(range_error));
  const at::Tensor error = sum_of_chunks(partial);
  const at::Tensor ratio = at::argmin(error, 0).add(1).to(at::kFloat).div_(steps).view(scale_shape);
  return {min.mul(ratio), max.mul(ratio)};
}

TensorPair percentile_range_kernel(const at::Tensor& input, c10::SymIntArrayRef symbolic_shape, double percentile) {
  const at::AutoDispatchBelowADInplaceOrView below;
  percentile_range_meta(input, symbolic_shape, percentile);
  const at::IntArrayRef scale_shape = C10_AS_INTARRAYREF_SLOW(symbolic_shape);
  const at::Tensor rows = regroup(input, scale_shape).to(at::kFloat);
  const int64_t n = rows.size(1);
  const auto rank = static_cast<int64_t>(std::ceil(percentile / 100.0 * static_cast<double>(n)));
  const int64_t k = std::clamp<int64_t>(rank, 1, n);
  if (k == n) return min_max_kernel(input, symbolic_shape);
  return {std::get<0>(at::kthvalue(rows, n + 1 - k, 1)).reshape(scale_shape),
          std::get<0>(at::kthvalue(rows, k, 1)).reshape(scale_shape)};
}

// A buffer as the kernel writes it; what is not contiguous is copied, and copied back by `written`.
at::Tensor writable(const at::Tensor& buffer) { return buffer.contiguous(); }
void written(const at::Tensor& buffer, const at::Tensor& result) {
  if (!result.is_same(buffer)) buffer.copy_(result);
}

void observe_kernel(at::Tensor& min_val, at::Tensor& max_val, const at::Tensor& low, const at::Tensor& high,
                    const at::Tensor& finite, double averaging_constant) {
  const at::AutoDispatchBelowADInplaceOrView below;
  observe_meta(min_val, max_val, low, high, finite, averaging_constant);
  if (min_val.numel() == 0) return;
  const at::Tensor lows = low.contiguous(), highs = high.contiguous(), counts = finite.contiguous();
  const at::Tensor min = writable(min_val), max = writable(max_val);
  ObserveArgs args{};
  args.low = lows.const_data_ptr<float>();
  args.high = highs.const_data_ptr<float>();
  args.counts = counts.const_data_ptr<bool>();
  args.min = min.mutable_data_ptr<float>();
  args.max = max.mutable_data_ptr<float>();
  args.groups = min.numel();
  args.averaging_constant = static_cast<float>(averaging_constant);
  run_tasks(args, args.groups, kGrainElements, min, QUANTRAIN_KERNELS(observe));
  written(min_val, min);
  written(max_val, max);
}

TensorPair observe_qparams_kernel(at::Tensor& min_val, at::Tensor& max_val, at::Tensor& scale,
                                  const OptionalTensor& zero_point, const at::Tensor& low, const at::Tensor& high,
                                  const OptionalTensor& finite, double averaging_constant, int64_t quant_min,
                                  int64_t quant_max, bool symmetric, bool marks_nonfinite) {
  const at::AutoDispatchBelowADInplaceOrView below;
  auto [in_force, point_in_force] =
      observe_qparams_meta(min_val, max_val, scale, zero_point, low, high, finite, averaging_constant, quant_min,
                           quant_max, symmetric, marks_nonfinite);
  if (min_val.numel() == 0) return {in_force, point_in_force};
  const at::Tensor lows = low.contiguous(), highs = high.contiguous();
  const at::Tensor min = writable(min_val), max = writable(max_val), scales = writable(scale);
  const at::Tensor points = zero_point ? writable(*zero_point) : at::Tensor();
  const at::Tensor counts = finite ? finite->contiguous() : at::Tensor();
  const ObserveArgs args{lows.const_data_ptr<float>(),
                         highs.const_data_ptr<float>(),
                         finite ? counts.const_data_ptr<bool>() : nullptr,
                         min.mutable_data_ptr<float>(),
                         max.mutable_data_ptr<float>(),
                         scales.mutable_data_ptr<float>(),
                         points.defined() ? points.mutable_data_ptr<int32_t>() : nullptr,
                         in_force.mutable_data_ptr<float>(),
                         point_in_force.mutable_data_ptr<int32_t>(),
                         min.numel(),
                         static_cast<float>(averaging_constant),
                         make_range(quant_min, quant_max),
                         symmetric,
                         marks_nonfinite};
  run_tasks(args, args.groups, kGrainElements, min, QUANTRAIN_KERNELS(observe));
  written(min_val, min);
  written(max_val, max);
  written(scale, scales);
  if (zero_point) written(*zero_point, points);
  return {in_force, point_in_force};
}

}  // namespace

// ---- public functions -----------------------------------------------------------------------------------------------

TensorPair choose_qparams(const at::Tensor& input, at::IntArrayRef scale_shape, int64_t quant_min, int64_t quant_max,
                          bool symmetric) {
  static const auto op = find_operator<decltype(choose_qparams_kernel)>("choose_qparams");
  return op.call(input, c10::fromIntArrayRefSlow(scale_shape), quant_min, quant_max, symmetric);
}

namespace detail {

TensorPair min_max(const at::Tensor& input, at::IntArrayRef scale_shape) {
  static const auto op = find_operator<decltype(min_max_kernel)>("_min_max");
  return op.call(input, c10::fromIntArrayRefSlow(scale_shape));
}

TensorPair qparams_from_range(const at::Tensor& min, const at::Tensor& max, int64_t quant_min, int64_t quant_max,
                              bool symmetric) {
  static const auto op = find_operator<decltype(qparams_from_range_kernel)>("_qparams_from_range");
  return op.call(min, max, quant_min, quant_max, symmetric);
}

TensorPair percentile_range(const at::Tensor& input, at::IntArrayRef scale_shape, double percentile) {
  static const auto op = find_operator<decltype(percentile_range_kernel)>("_percentile_range");
  return op.call(input, c10::fromIntArrayRefSlow(scale_shape), percentile);
}

void observe_(at::Tensor& min_val, at::Tensor& max_val, const at::Tensor& low, const at::Tensor& high,
              const at::Tensor& finite, double averaging_constant) {
  static const auto op = find_operator<decltype(observe_kernel)>("_observe_");
  op.call(min_val, max_val, low, high, finite, averaging_constant);
}

TensorPair observe_qparams_(at::Tensor& min_val, at::Tensor& max_val, at::Tensor& scale,
                            const std::optional<at::Tensor>& zero_point, const at::Tensor& low, const at::Tensor& high,
                            const std::optional<at::Tensor>& finite, double averaging_constant, int64_t quant_min,
                            int64_t quant_max, bool symmetric, bool marks_nonfinite) {
  static const auto op = find_operator<decltype(observe_qparams_kernel)>("_observe_qparams_");
  return op.call(min_val, max_val, scale, zero_point, low, high, finite, averaging_constant, quant_min, quant_max,
                 symmetric, marks_nonfinite);
}

TensorPair mse_range(const at::Tensor& input, at::IntArrayRef scale_shape, int64_t quant_min, int64_t quant_max,
                     bool symmetric, int64_t steps) {
  static const auto op = find_operator<decltype(mse_range_kernel)>("_mse_range");
  return op.call(input, c10::fromIntArrayRefSlow(scale_shape), quant_min, quant_max, symmetric, steps);
}

}  // namespace detail
}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  m.def(
      "choose_qparams(Tensor input, SymInt[] scale_shape, *, int quant_min=-128, int quant_max=127, bool "
      "symmetric=True) -> "
      "(Tensor scale, Tensor zero_point)");
  m.def("_min_max(Tensor input, SymInt[] scale_shape) -> (Tensor min, Tensor max)");
  m.def(
      "_qparams_from_range(Tensor min, Tensor max, *, int quant_min, int quant_max, bool symmetric) -> (Tensor "
      "scale, Tensor "
      "zero_point)");
  m.def("_percentile_range(Tensor input, SymInt[] scale_shape, *, float percentile) -> (Tensor min, Tensor max)");
  m.def(
      "_observe_(Tensor(a!) min_val, Tensor(b!) max_val, Tensor low, Tensor high, Tensor finite, *, float "
      "averaging_constant=0.) -> ()");
  m.def(
      "_observe_qparams_(Tensor(a!) min_val, Tensor(b!) max_val, Tensor(c!) scale, Tensor(d!)? zero_point, Tensor low, "
      "Tensor high, Tensor? finite=None, *, float averaging_constant, int quant_min, int quant_max, bool symmetric, "
      "bool marks_nonfinite) -> (Tensor scale_in_force, Tensor zero_point_in_force)");
  m.def(
      "_mse_range(Tensor input, SymInt[] scale_shape, *, int quant_min, int quant_max, bool symmetric, int "
      "steps=80) -> (Tensor "
      "min, Tensor max)");
}

#define QUANTRAIN_REGISTER_RANGE(kind)                                  \
  m.impl("choose_qparams", &quantrain::choose_qparams_##kind);          \
  m.impl("_min_max", &quantrain::min_max_##kind);                       \
  m.impl("_qparams_from_range", &quantrain::qparams_from_range_##kind); \
  m.impl("_percentile_range", &quantrain::percentile_range_##kind);     \
  m.impl("_observe_", &quantrain::observe_##kind);                      \
  m.impl("_observe_qparams_", &quantrain::observe_qparams_##kind);      \
  m.impl("_mse_range", &quantrain::mse_range_##kind)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_RANGE(kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_RANGE(meta); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_RANGE(kernel); }
#endif
