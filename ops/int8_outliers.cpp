#include "quantrain/ops/int8_outliers.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "csrc/cpu/int8.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/common/parallel.h"
#include "ops/int8_mm.h"
#include "quantrain/ops/int8.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/int8.h"
#endif

// The rows are read once, and the product is int8_mm's, whose sums begin with what the outlier columns give.

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Triple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr std::string_view kRows = "int8_quantize_rows_outliers";
constexpr std::string_view kMm = "int8_mm_outliers";
constexpr std::string_view kColumns = "int8_outlier_columns";

void check_columns(const at::Tensor& columns, const at::Tensor& input) {
  QUANTRAIN_CHECK_TYPE(columns.scalar_type() == at::kInt || columns.scalar_type() == at::kLong,
                       "{}: expected outlier_columns of int32 or int64, got {}", kRows,
                       c10::toString(columns.scalar_type()));
  QUANTRAIN_CHECK_VALUE(columns.dim() == 1, "{}: expected outlier_columns [Ko], got {}", kRows,
                        detail::shape_text(columns));
  detail::check_device(kRows, "outlier_columns", columns, input, "input's");
}

Triple rows_meta(const at::Tensor& input, const at::Tensor& columns, const OptionalTensor& column_factor) {
  detail::check_float(kRows, "input", input.scalar_type());
  detail::check_dense(kRows, "input", input);
  QUANTRAIN_CHECK_VALUE(input.dim() >= 1 && TORCH_GUARD_OR_TRUE(input.sym_size(-1).sym_gt(0)),
                        "{}: expected input with at least one column, got {}", kRows, detail::shape_text(input));
  check_columns(columns, input);
  if (column_factor) {
    detail::check_type(kRows, "column_factor", *column_factor, at::kFloat, "float32");
    detail::check_device(kRows, "column_factor", *column_factor, input, "input's");
    QUANTRAIN_CHECK_VALUE(
        column_factor->dim() == 1 && TORCH_GUARD_OR_TRUE(column_factor->sym_size(0).sym_eq(input.sym_size(-1))),
        "{}: expected column_factor of {} elements, the columns of input, got {}", kRows, c10::str(input.sym_size(-1)),
        detail::shape_text(*column_factor));
  }
  std::vector<c10::SymInt> sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  const auto codes = at::empty_symint(sizes, input.options().dtype(at::kChar));
  sizes.back() = columns.sym_size(0) * 2;
  const auto planes = at::empty_symint(sizes, input.options().dtype(at::kChar));
  sizes.back() = 2;
  return {codes, planes, at::empty_symint(sizes, input.options().dtype(at::kFloat))};
}

// The main codes by int8_quantize_rows with a factor of 0 in the outlier columns, which then have a pass of their own.
void rows_cpu(const Int8QuantizeOutliersArgs& args, const at::Tensor& x) {
  at::Tensor factor = at::ones({args.columns}, x.options().dtype(at::kFloat));
  auto* const factors = factor.mutable_data_ptr<float>();
  if (args.column_factor) std::copy_n(args.column_factor, args.columns, factors);
  for (int64_t i = 0; i < args.count; ++i) {
    QUANTRAIN_CHECK_VALUE(args.outliers[i] < args.columns,
                          "{}: expected outlier_columns below {}, the columns of input, got {}", kRows, args.columns,
                          args.outliers[i]);
    if (args.outliers[i] >= 0) factors[args.outliers[i]] = 0.0f;
  }
  const at::Tensor scale = at::empty({args.rows}, factor.options());
  const auto* const main_scale = scale.mutable_data_ptr<float>();
  const Int8QuantizeRowsArgs main{args.x,     factors,   args.codes,   scale.mutable_data_ptr<float>(),
                                  args.dtype, args.rows, args.columns, /*stochastic=*/false,
                                  {}};
  parallel_for(args.rows, grain_of(args.columns), [&](int64_t begin, int64_t end) {
    cpu::int8_quantize_rows(main, begin, end);
    cpu::int8_outlier_planes(args, main_scale, begin, end);
  });
}

Triple rows_kernel(const at::Tensor& input, const at::Tensor& outlier_columns, const OptionalTensor& column_factor) {
  Triple result = rows_meta(input, outlier_columns, column_factor);
  const auto& [codes, planes, scale] = result;
  if (scale.numel() == 0) return result;
  const at::Tensor x = input.contiguous(), columns = outlier_columns.to(at::kLong).contiguous();
  const at::Tensor factor = column_factor ? column_factor->contiguous() : at::Tensor();
  const Int8QuantizeOutliersArgs args{x.const_data_ptr(),
                                      factor.defined() ? factor.const_data_ptr<float>() : nullptr,
                                      columns.const_data_ptr<int64_t>(),
                                      codes.mutable_data_ptr<int8_t>(),
                                      planes.mutable_data_ptr<int8_t>(),
                                      scale.mutable_data_ptr<float>(),
                                      dtype_of(x),
                                      scale.numel() / 2,
                                      x.size(-1),
                                      columns.numel()};
#if defined(QUANTRAIN_WITH_CUDA)
  if (run_on_cuda(args, x, &cuda::int8_quantize_outliers)) return result;
#endif
  rows_cpu(args, x);
  return result;
}

// Whether all dimensions of `tensor` but the last are those of `like`.
bool rows_of(const at::Tensor& tensor, const at::Tensor& like) {
  if (tensor.dim() != like.dim()) return false;
  for (int64_t d = 0; d + 1 < like.dim(); ++d) {
    if (!TORCH_GUARD_OR_TRUE(tensor.sym_size(d).sym_eq(like.sym_size(d)))) return false;
  }
  return true;
}

at::Tensor mm_meta(const at::Tensor& a, const at::Tensor& a_planes, const at::Tensor& a_scale, const at::Tensor& b,
                   const at::Tensor& b_outlier, const at::Tensor& b_scale, const OptionalTensor& bias,
                   c10::string_view out_dtype) {
  const at::ScalarType type = detail::named_type(kMm, "out_dtype", out_dtype);
  detail::check_float(kMm, "out_dtype", type);
  for (const auto& [name, tensor] : {std::pair{"a", a}, {"a_planes", a_planes}, {"b", b}, {"b_outlier", b_outlier}}) {
    detail::check_type(kMm, name, tensor, at::kChar, "int8");
    detail::check_device(kMm, name, tensor, a, "a's");
  }
  for (const auto& [name, tensor] : {std::pair{"a_scale", a_scale}, {"b_scale", b_scale}}) {
    detail::check_type(kMm, name, tensor, at::kFloat, "float32");
    detail::check_device(kMm, name, tensor, a, "a's");
  }
  QUANTRAIN_CHECK_VALUE(a.dim() >= 1 && b.dim() == 2 && TORCH_GUARD_OR_TRUE(a.sym_size(-1).sym_eq(b.sym_size(1))),
                        "{}: expected a [..., K] and b [N, K], got {} and {}", kMm, detail::shape_text(a),
                        detail::shape_text(b));
  QUANTRAIN_CHECK_VALUE(b_outlier.dim() == 2 && TORCH_GUARD_OR_TRUE(b_outlier.sym_size(0).sym_eq(b.sym_size(0))) &&
                            rows_of(a_planes, a) &&
                            TORCH_GUARD_OR_TRUE(a_planes.sym_size(-1).sym_eq(b_outlier.sym_size(1) * 2)),
                        "{}: expected a_planes [..., 2 Ko] and b_outlier [N, Ko], got {} and {}", kMm,
                        detail::shape_text(a_planes), detail::shape_text(b_outlier));
  QUANTRAIN_CHECK_VALUE(rows_of(a_scale, a) && TORCH_GUARD_OR_TRUE(a_scale.sym_size(-1).sym_eq(2)),
                        "{}: expected a_scale [..., 2], got {}", kMm, detail::shape_text(a_scale));
  QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(b_scale.sym_numel().sym_eq(b.sym_size(0))) ||
                            TORCH_GUARD_OR_FALSE(b_scale.sym_numel().sym_eq(1)),
                        "{}: expected b_scale of {} elements, the rows of b, or of one, got {}", kMm,
                        c10::str(b.sym_size(0)), detail::shape_text(b_scale));
  if (bias) {
    QUANTRAIN_CHECK_TYPE(bias->is_floating_point(), "{}: expected bias of a floating type, got {}", kMm,
                         c10::toString(bias->scalar_type()));
    detail::check_device(kMm, "bias", *bias, a, "a's");
    QUANTRAIN_CHECK_VALUE(bias->dim() == 1 && TORCH_GUARD_OR_TRUE(bias->sym_size(0).sym_eq(b.sym_size(0))),
                          "{}: expected bias of {} elements, the rows of b, got {}", kMm, c10::str(b.sym_size(0)),
                          detail::shape_text(*bias));
  }
  std::vector<c10::SymInt> sizes(a.sym_sizes().begin(), a.sym_sizes().end());
  sizes.back() = b.sym_size(0);
  return at::empty_symint(sizes, a.options().dtype(type));
}

// In three products, where a sum might not fit int32.
at::Tensor mm_parts(const at::Tensor& a, const at::Tensor& planes, const at::Tensor& scale, const at::Tensor& b,
                    const at::Tensor& b_outlier, const at::Tensor& b_scale) {
  const int64_t outliers = b_outlier.size(1);
  at::Tensor sum = int8_mm(a, b, scale.select(1, 0), b_scale);
  const at::Tensor s2 = scale.select(1, 1);
  int8_mm_accumulate_(sum, planes.narrow(1, 0, outliers), b_outlier, s2 * static_cast<double>(kInt8Plane), b_scale);
  int8_mm_accumulate_(sum, planes.narrow(1, outliers, outliers), b_outlier, s2, b_scale);
  return sum;
}

at::Tensor mm_kernel(const at::Tensor& a, const at::Tensor& a_planes, const at::Tensor& a_scale, const at::Tensor& b,
                     const at::Tensor& b_outlier, const at::Tensor& b_scale, const OptionalTensor& bias,
                     c10::string_view out_dtype) {
  at::Tensor result = mm_meta(a, a_planes, a_scale, b, b_outlier, b_scale, bias, out_dtype);
  if (result.numel() == 0) return result;
  const int64_t outliers = b_outlier.size(1), k = b.size(1);
  const at::Tensor scale = a_scale.reshape({-1, 2}).contiguous();
  if (outliers == 0) return int8_mm(a, b, scale.select(1, 0), b_scale, bias, result.scalar_type());
  const at::Tensor x = a.reshape({scale.size(0), k}).contiguous(), y = b.contiguous(), apart = b_outlier.contiguous();
  const at::Tensor planes = a_planes.reshape({-1, 2 * outliers}).contiguous();
  if (k == 0 || outliers > kInt8Outliers || k > kInt8OutlierDepth) {
    at::Tensor sum = mm_parts(x, planes, scale, y, apart, b_scale);
    if (bias) sum.add_(bias->to(at::kFloat));
    return result.copy_(sum.view(result.sizes()));
  }
  Int8MmOutliers args{outliers, planes.const_data_ptr<int8_t>(), apart.const_data_ptr<int8_t>(),
                      scale.const_data_ptr<float>(), nullptr};
  at::Tensor sums;
  if (a.is_cpu()) {  // exact: below 2^24
    sums = int8_mm(planes.view({-1, outliers}), apart, std::nullopt, std::nullopt);
    args.sums = sums.const_data_ptr<float>();
  }
  const at::Tensor y_scale = b_scale.contiguous();
  const OptionalTensor shift = bias ? OptionalTensor(bias->to(at::kFloat).contiguous()) : std::nullopt;
  detail::int8_mm_with(args, x, y, y_scale, shift, result);
  return result;
}

at::Tensor columns_meta(const at::Tensor& input, double threshold, int64_t capacity) {
  detail::check_float(kColumns, "input", input.scalar_type());
  QUANTRAIN_CHECK_VALUE(input.dim() >= 1, "{}: expected input of at least one dimension, got a scalar", kColumns);
  QUANTRAIN_CHECK_VALUE(threshold > 0, "{}: expected threshold above 0, got {}", kColumns, threshold);
  QUANTRAIN_CHECK_VALUE(capacity >= 1, "{}: expected capacity of at least 1, got {}", kColumns, capacity);
  return at::empty({capacity}, input.options().dtype(at::kLong));
}

at::Tensor columns_kernel(const at::Tensor& input, double threshold, int64_t capacity) {
  const at::Tensor result = columns_meta(input, threshold, capacity);
  const int64_t k = input.size(-1), most = std::min(capacity, k);
  result.fill_(-1);
  if (input.numel() == 0) return result;
  const at::Tensor absmax = at::amax(input.abs().reshape({-1, k}), {0}).to(at::kFloat);
  const auto [value, index] = at::topk(absmax, most);
  result.narrow(0, 0, most).copy_(at::where(value >= threshold, index, at::full_like(index, -1)));
  return result;
}

}  // namespace

// ---- public functions -----------------------------------------------------------------------------------------------

Int8OutlierCodes int8_quantize_rows_outliers(const at::Tensor& input, const at::Tensor& outlier_columns,
                                             const OptionalTensor& column_factor) {
  static const auto op = find_operator<decltype(rows_kernel)>(kRows);
  auto [codes, planes, scale] = op.call(input, outlier_columns, column_factor);
  return {std::move(codes), std::move(planes), std::move(scale)};
}

at::Tensor int8_mm_outliers(const at::Tensor& a, const at::Tensor& a_planes, const at::Tensor& a_scale,
                            const at::Tensor& b, const at::Tensor& b_outlier, const at::Tensor& b_scale,
                            const OptionalTensor& bias, at::ScalarType out_dtype) {
  static const auto op = find_operator<decltype(mm_kernel)>(kMm);
  detail::check_float(kMm, "out_dtype", out_dtype);
  const c10::string_view name = out_dtype == at::kFloat ? "float32" : out_dtype == at::kHalf ? "float16" : "bfloat16";
  return op.call(a, a_planes, a_scale, b, b_outlier, b_scale, bias, name);
}

at::Tensor int8_outlier_columns(const at::Tensor& input, double threshold, int64_t capacity) {
  static const auto op = find_operator<decltype(columns_kernel)>(kColumns);
  return op.call(input, threshold, capacity);
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  const std::vector<at::Tag> fixed{at::Tag::needs_exact_strides};
  m.def(
      "int8_quantize_rows_outliers(Tensor input, Tensor outlier_columns, *, Tensor? column_factor=None) -> (Tensor "
      "codes, Tensor planes, Tensor scale)",
      fixed);
  m.def(
      "int8_mm_outliers(Tensor a, Tensor a_planes, Tensor a_scale, Tensor b, Tensor b_outlier, Tensor b_scale, Tensor? "
      "bias=None, *, str out_dtype=\"float32\") -> Tensor",
      fixed);
  m.def("int8_outlier_columns(Tensor input, *, float threshold, int capacity) -> Tensor", fixed);
}

#define QUANTRAIN_REGISTER_INT8_OUTLIERS(kind)                    \
  m.impl("int8_quantize_rows_outliers", &quantrain::rows_##kind); \
  m.impl("int8_mm_outliers", &quantrain::mm_##kind);              \
  m.impl("int8_outlier_columns", &quantrain::columns_##kind)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_INT8_OUTLIERS(kernel); }
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_INT8_OUTLIERS(kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_INT8_OUTLIERS(meta); }
