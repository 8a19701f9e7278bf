#include <ATen/ops/add.h>
#include <ATen/ops/argmin.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "csrc/cpu/fake_quant.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/fake_quant_check.h"
#include "quantrain/ops/fake_quant.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/fake_quant.h"
#endif

// Ranges and the parameters that follow from them: what observers and dynamic quantisation are made of.

namespace quantrain {
namespace {

using TensorPair = std::tuple<at::Tensor, at::Tensor>;

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
  m.def(
      "_mse_range(Tensor input, SymInt[] scale_shape, *, int quant_min, int quant_max, bool symmetric, int "
      "steps=80) -> (Tensor "
      "min, Tensor max)");
}

#define QUANTRAIN_REGISTER_RANGE(kind)                                  \
  m.impl("choose_qparams", &quantrain::choose_qparams_##kind);          \
  m.impl("_min_max", &quantrain::min_max_##kind);                       \
  m.impl("_qparams_from_range", &quantrain::qparams_from_range_##kind); \
  m.impl("_mse_range", &quantrain::mse_range_##kind)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_RANGE(kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_RANGE(meta); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_RANGE(kernel); }
#endif
