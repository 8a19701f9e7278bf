#include "quantrain/ops/int8.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include <tuple>

#include "csrc/cpu/int8.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/common/random.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/int8.h"
#endif

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalGenerator = std::optional<at::Generator>;
using Pair = std::tuple<at::Tensor, at::Tensor>;
using Triple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Quadruple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

constexpr std::string_view kRows = "int8_quantize_rows";
constexpr std::string_view kColumns = "int8_quantize_columns";
constexpr std::string_view kRowsAndColumns = "int8_quantize_rows_and_columns";
constexpr std::string_view kTranspose = "int8_transpose";
constexpr std::string_view kWeightTranspose = "int8_weight_transpose";

// ---- checks and shapes, shared with Meta ----------------------------------------------------------------------------

void check_input(std::string_view op, const char* name, const at::Tensor& input, bool codes_allowed = false) {
  const auto type = input.scalar_type();
  const bool codes = codes_allowed && type == at::kChar;
  QUANTRAIN_CHECK_TYPE(codes || type == at::kFloat || type == at::kHalf || type == at::kBFloat16,
                       "{}: expected {} of float32, float16{}, got {}", op, name,
                       codes_allowed ? ", bfloat16 or int8" : " or bfloat16", c10::toString(type));
  detail::check_dense(op, name, input);
  QUANTRAIN_CHECK_VALUE(input.dim() >= 1 && TORCH_GUARD_OR_TRUE(input.sym_size(-1).sym_gt(0)),
                        "{}: expected {} with at least one column, got {}", op, name, detail::shape_text(input));
}

void check_factor(std::string_view op, const char* name, const OptionalTensor& factor, const c10::SymInt& size,
                  const at::Tensor& input) {
  if (!factor) return;
  detail::check_type(op, name, *factor, at::kFloat, "float32");
  detail::check_device(op, name, *factor, input, "input's");
  QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(factor->sym_numel().sym_eq(size)), "{}: expected {} of {} elements, got {}",
                        op, name, c10::str(size), detail::shape_text(*factor));
}

Pair allocate_rows(const at::Tensor& input) {
  std::vector<c10::SymInt> scale_sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  scale_sizes.back() = 1;
  return {at::empty_symint(input.sym_sizes(), input.options().dtype(at::kChar)),
          at::empty_symint(scale_sizes, input.options().dtype(at::kFloat))};
}

Pair allocate_columns(const at::Tensor& input) {
  const c10::SymInt columns = input.sym_size(-1);
  return {at::empty_symint({columns, rows_of(input)}, input.options().dtype(at::kChar)),
          at::empty_symint({columns, 1}, input.options().dtype(at::kFloat))};
}

Pair rows_meta(const at::Tensor& input, const OptionalTensor& column_factor, bool, const OptionalGenerator&) {
  check_input(kRows, "input", input);
  check_factor(kRows, "column_factor", column_factor, input.sym_size(-1), input);
  return allocate_rows(input);
}

Pair rows_nearest_meta(const at::Tensor& input, const OptionalTensor& column_factor) {
  return rows_meta(input, column_factor, false, std::nullopt);
}

Pair rows_seeded_meta(const at::Tensor& input, const OptionalTensor& column_factor, int64_t, int64_t) {
  return rows_meta(input, column_factor, true, std::nullopt);
}

Pair columns_meta(const at::Tensor& input, const OptionalTensor& row_factor, bool, const OptionalGenerator&) {
  check_input(kColumns, "input", input);
  check_factor(kColumns, "row_factor", row_factor, rows_of(input), input);
  return allocate_columns(input);
}

Pair columns_nearest_meta(const at::Tensor& input, const OptionalTensor& row_factor) {
  return columns_meta(input, row_factor, false, std::nullopt);
}

Pair columns_seeded_meta(const at::Tensor& input, const OptionalTensor& row_factor, int64_t, int64_t) {
  return columns_meta(input, row_factor, true, std::nullopt);
}

Quadruple rows_and_columns_meta(const at::Tensor& input, const OptionalTensor& column_factor,
                                const OptionalTensor& row_factor, bool, const OptionalGenerator&) {
  check_input(kRowsAndColumns, "input", input);
  check_factor(kRowsAndColumns, "column_factor", column_factor, input.sym_size(-1), input);
  check_factor(kRowsAndColumns, "row_factor", row_factor, rows_of(input), input);
  return std::tuple_cat(allocate_rows(input), allocate_columns(input));
}

Quadruple rows_and_columns_nearest_meta(const at::Tensor& input, const OptionalTensor& column_factor,
                                        const OptionalTensor& row_factor) {
  return rows_and_columns_meta(input, column_factor, row_factor, false, std::nullopt);
}

Quadruple rows_and_columns_seeded_meta(const at::Tensor& input, const OptionalTensor& column_factor,
                                       const OptionalTensor& row_factor, int64_t, int64_t) {
  return rows_and_columns_meta(input, column_factor, row_factor, true, std::nullopt);
}

at::Tensor transpose_meta(const at::Tensor& codes) {
  detail::check_type(kTranspose, "codes", codes, at::kChar, "int8");
  QUANTRAIN_CHECK_VALUE(codes.dim() == 2, "{}: expected codes [M, K], got {}", kTranspose, detail::shape_text(codes));
  return at::empty_symint({codes.sym_size(1), codes.sym_size(0)}, codes.options());
}

Int8WeightScheme parse_scheme(std::string_view scheme) {
  if (scheme == "fold") return Int8WeightScheme::kFold;
  if (scheme == "columns") return Int8WeightScheme::kColumns;
  QUANTRAIN_CHECK_VALUE(scheme == "auto", "{}: expected scheme fold, columns or auto, got '{}'", kWeightTranspose,
                        scheme);
  return Int8WeightScheme::kAuto;
}

Triple weight_transpose_meta(const at::Tensor& weight, const at::Tensor& scale, std::string_view scheme) {
  parse_scheme(scheme);
  check_input(kWeightTranspose, "weight", weight, /*codes_allowed=*/true);
  QUANTRAIN_CHECK_VALUE(weight.dim() == 2, "{}: expected weight [O, K], got {}", kWeightTranspose,
                        detail::shape_text(weight));
  check_factor(kWeightTranspose, "scale", scale, weight.sym_size(0), weight);
  const c10::SymInt out = weight.sym_size(0), in = weight.sym_size(1);
  return {at::empty_symint({in, out}, weight.options().dtype(at::kChar)),
          at::empty_symint({out}, weight.options().dtype(at::kFloat)),
          at::empty_symint({in, 1}, weight.options().dtype(at::kFloat))};
}

// ---- CPU and CUDA ---------------------------------------------------------------------------------------------------

int64_t matrix_rows(const at::Tensor& input) { return input.numel() / input.size(-1); }

// The factor's memory, kept alive by `keep`.
const float* factor_pointer(const OptionalTensor& factor, at::Tensor& keep) {
  if (!factor) return nullptr;
  keep = factor->contiguous();
  return keep.const_data_ptr<float>();
}

Int8QuantizeRowsArgs rows_args(const at::Tensor& x, const float* column_factor, const Random& random,
                               const Pair& result) {
  const auto& [codes, scale] = result;
  return {x.const_data_ptr(),
          column_factor,
          codes.mutable_data_ptr<int8_t>(),
          scale.mutable_data_ptr<float>(),
          dtype_of(x),
          matrix_rows(x),
          x.size(-1),
          random.stochastic,
          random.philox};
}

void quantize_rows(const at::Tensor& x, const OptionalTensor& column_factor, const Random& random, const Pair& result) {
  if (x.numel() == 0) return;
  at::Tensor keep;
  const Int8QuantizeRowsArgs args = rows_args(x, factor_pointer(column_factor, keep), random, result);
  run_tasks(args, args.rows, std::max<int64_t>(32768 / args.columns, 1), x, QUANTRAIN_KERNELS(int8_quantize_rows));
}

at::Tensor empty_columns(const at::Tensor& x) { return at::empty({x.size(-1)}, x.options().dtype(at::kFloat)); }

// Codes of columns whose largest magnitudes are known.
void round_columns(const at::Tensor& x, const float* row_factor, const at::Tensor& absmax, const Random& random,
                   const Pair& result) {
  const auto& [codes, scale] = result;
  const Int8QuantizeColumnsArgs args{x.const_data_ptr(),
                                     row_factor,
                                     absmax.const_data_ptr<float>(),
                                     codes.mutable_data_ptr<int8_t>(),
                                     scale.mutable_data_ptr<float>(),
                                     dtype_of(x),
                                     matrix_rows(x),
                                     x.size(-1),
                                     random.stochastic,
                                     random.philox};
  run_tasks(args, cpu::int8_column_tiles(args.columns), 1, x, QUANTRAIN_KERNELS(int8_quantize_columns));
}

void quantize_columns(const at::Tensor& x, const OptionalTensor& row_factor, const Random& random, const Pair& result) {
  if (x.numel() == 0) {
    std::get<1>(result).fill_(1.0);
    return;
  }
  at::Tensor keep;
  const at::Tensor absmax = empty_columns(x);
  const Int8ColumnAbsmaxArgs args{x.const_data_ptr(),
                                  factor_pointer(row_factor, keep),
                                  absmax.mutable_data_ptr<float>(),
                                  dtype_of(x),
                                  matrix_rows(x),
                                  x.size(-1)};
  run_tasks(args, cpu::int8_column_tiles(args.columns), 1, x, QUANTRAIN_KERNELS(int8_column_absmax));
  round_columns(x, args.row_factor, absmax, random, result);
}

// On CUDA, for sizes that suit: in two readings of x.
bool quantize_both_on_cuda([[maybe_unused]] const at::Tensor& x, [[maybe_unused]] const OptionalTensor& column_factor,
                           [[maybe_unused]] const OptionalTensor& row_factor, [[maybe_unused]] const Random& random,
                           [[maybe_unused]] const Quadruple& result) {
#if defined(QUANTRAIN_WITH_CUDA)
  if (!x.is_cuda() || x.numel() == 0) return false;
  const auto& [codes, scale, codes_t, scale_t] = result;
  at::Tensor keep_columns, keep_rows;
  const int64_t rows = matrix_rows(x), columns = x.size(-1);
  const at::Tensor absmax = at::empty({rows + columns}, scale.options());
  const cuda::Int8RowsAndColumnsArgs args{x.const_data_ptr(),
                                          factor_pointer(column_factor, keep_columns),
                                          factor_pointer(row_factor, keep_rows),
                                          absmax.mutable_data_ptr<float>(),
                                          codes.mutable_data_ptr<int8_t>(),
                                          scale.mutable_data_ptr<float>(),
                                          codes_t.mutable_data_ptr<int8_t>(),
                                          scale_t.mutable_data_ptr<float>(),
                                          dtype_of(x),
                                          rows,
                                          columns,
                                          random.stochastic,
                                          random.philox};
  return cuda::int8_suits_rows_and_columns(args) && run_on_cuda(args, x, &cuda::int8_rows_and_columns);
#else
  return false;
#endif
}

Pair rows_kernel(const at::Tensor& input, const OptionalTensor& column_factor, bool stochastic,
                 const OptionalGenerator& generator) {
  const Pair result = rows_meta(input, column_factor, stochastic, generator);
  quantize_rows(input.contiguous(), column_factor, draw(kRows, input.device(), stochastic, generator), result);
  return result;
}

Pair rows_nearest_kernel(const at::Tensor& input, const OptionalTensor& column_factor) {
  return rows_kernel(input, column_factor, false, std::nullopt);
}

Pair rows_seeded_kernel(const at::Tensor& input, const OptionalTensor& column_factor, int64_t seed, int64_t offset) {
  const Pair result = rows_meta(input, column_factor, true, std::nullopt);
  quantize_rows(input.contiguous(), column_factor, seeded(seed, offset), result);
  return result;
}

Pair columns_kernel(const at::Tensor& input, const OptionalTensor& row_factor, bool stochastic,
                    const OptionalGenerator& generator) {
  const Pair result = columns_meta(input, row_factor, stochastic, generator);
  quantize_columns(input.contiguous(), row_factor, draw(kColumns, input.device(), stochastic, generator), result);
  return result;
}

Pair columns_nearest_kernel(const at::Tensor& input, const OptionalTensor& row_factor) {
  return columns_kernel(input, row_factor, false, std::nullopt);
}

Pair columns_seeded_kernel(const at::Tensor& input, const OptionalTensor& row_factor, int64_t seed, int64_t offset) {
  const Pair result = columns_meta(input, row_factor, true, std::nullopt);
  quantize_columns(input.contiguous(), row_factor, seeded(seed, offset), result);
  return result;
}

Quadruple rows_and_columns(const at::Tensor& input, const OptionalTensor& column_factor,
                           const OptionalTensor& row_factor, const Random& random) {
  const Quadruple result = rows_and_columns_meta(input, column_factor, row_factor, true, std::nullopt);
  const at::Tensor x = input.contiguous();
  if (quantize_both_on_cuda(x, column_factor, row_factor, random, result)) return result;
  quantize_rows(x, column_factor, random, {std::get<0>(result), std::get<1>(result)});
  quantize_columns(x, row_factor, random, {std::get<2>(result), std::get<3>(result)});
  return result;
}

Quadruple rows_and_columns_kernel(const at::Tensor& input, const OptionalTensor& column_factor,
                                  const OptionalTensor& row_factor, bool stochastic,
                                  const OptionalGenerator& generator) {
  return rows_and_columns(input, column_factor, row_factor,
                          draw(kRowsAndColumns, input.device(), stochastic, generator));
}

Quadruple rows_and_columns_nearest_kernel(const at::Tensor& input, const OptionalTensor& column_factor,
                                          const OptionalTensor& row_factor) {
  return rows_and_columns_kernel(input, column_factor, row_factor, false, std::nullopt);
}

Quadruple rows_and_columns_seeded_kernel(const at::Tensor& input, const OptionalTensor& column_factor,
                                         const OptionalTensor& row_factor, int64_t seed, int64_t offset) {
  return rows_and_columns(input, column_factor, row_factor, seeded(seed, offset));
}

at::Tensor transpose_kernel(const at::Tensor& codes) {
  const at::Tensor result = transpose_meta(codes);
  if (codes.numel() == 0) return result;
  const at::Tensor x = codes.contiguous();
  const Int8TransposeArgs args{x.const_data_ptr<int8_t>(), result.mutable_data_ptr<int8_t>(), x.size(0), x.size(1)};
  run_tasks(args, cpu::int8_column_tiles(args.columns), 4, x, QUANTRAIN_KERNELS(int8_transpose));
  return result;
}

Triple weight_transpose_kernel(const at::Tensor& weight, const at::Tensor& scale, std::string_view scheme) {
  const Triple result = weight_transpose_meta(weight, scale, scheme);
  const auto& [codes, column_factor, column_scale] = result;
  if (weight.numel() == 0) {
    column_scale.fill_(1.0);
    return result;
  }
  const at::Tensor w = weight.contiguous(), s = scale.contiguous();
  const at::Tensor absmax = at::empty({w.size(1)}, column_scale.options());
  const Int8WeightTransposeArgs args{w.const_data_ptr(),
                                     s.const_data_ptr<float>(),
                                     codes.mutable_data_ptr<int8_t>(),
                                     column_factor.mutable_data_ptr<float>(),
                                     column_scale.mutable_data_ptr<float>(),
                                     dtype_of(w),
                                     w.size(0),
                                     w.size(1),
                                     parse_scheme(scheme),
                                     absmax.mutable_data_ptr<float>()};
  run_tasks(args, cpu::int8_column_tiles(args.in), 1, w, QUANTRAIN_KERNELS(int8_weight_transpose));
  return result;
}

}  // namespace

// ---- public functions -----------------------------------------------------------------------------------------------

Int8Codes int8_quantize_rows(const at::Tensor& input, const Int8QuantizeOptions& options) {
  static const auto op = find_operator<decltype(rows_kernel)>("int8_quantize_rows");
  auto [codes, scale] = op.call(input, options.column_factor, options.stochastic, options.generator);
  return {std::move(codes), std::move(scale)};
}

Int8Codes int8_quantize_columns(const at::Tensor& input, const Int8QuantizeOptions& options) {
  static const auto op = find_operator<decltype(columns_kernel)>("int8_quantize_columns");
  auto [codes, scale] = op.call(input, options.row_factor, options.stochastic, options.generator);
  return {std::move(codes), std::move(scale)};
}

Int8RowsAndColumns int8_quantize_rows_and_columns(const at::Tensor& input, const Int8QuantizeOptions& options) {
  static const auto op = find_operator<decltype(rows_and_columns_kernel)>("int8_quantize_rows_and_columns");
  auto [codes, scale, codes_t, scale_t] =
      op.call(input, options.column_factor, options.row_factor, options.stochastic, options.generator);
  return {{std::move(codes), std::move(scale)}, {std::move(codes_t), std::move(scale_t)}};
}

at::Tensor int8_transpose(const at::Tensor& codes) {
  static const auto op = find_operator<decltype(transpose_kernel)>("int8_transpose");
  return op.call(codes);
}

Int8WeightTranspose int8_weight_transpose(const at::Tensor& weight, const at::Tensor& scale, std::string_view scheme) {
  static const auto op = find_operator<decltype(weight_transpose_kernel)>("int8_weight_transpose");
  auto [codes, column_factor, column_scale] = op.call(weight, scale, scheme);
  return {std::move(codes), std::move(column_factor), std::move(column_scale)};
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  const std::vector<at::Tag> fixed{at::Tag::needs_exact_strides};
  const std::vector<at::Tag> random{at::Tag::needs_exact_strides, at::Tag::nondeterministic_seeded};
  m.def(
      "int8_quantize_rows(Tensor input, *, Tensor? column_factor=None, bool stochastic=False, Generator? "
      "generator=None) -> "
      "(Tensor codes, Tensor scale)",
      random);
  m.def(
      "int8_quantize_rows.seeded(Tensor input, *, Tensor? column_factor=None, int seed, int offset) -> (Tensor codes, "
      "Tensor scale)",
      fixed);
  m.def(
      "int8_quantize_columns(Tensor input, *, Tensor? row_factor=None, bool stochastic=False, Generator? "
      "generator=None) -> "
      "(Tensor codes, Tensor scale)",
      random);
  m.def(
      "int8_quantize_columns.seeded(Tensor input, *, Tensor? row_factor=None, int seed, int offset) -> (Tensor codes, "
      "Tensor scale)",
      fixed);
  m.def(
      "int8_quantize_rows_and_columns(Tensor input, *, Tensor? column_factor=None, Tensor? row_factor=None, bool "
      "stochastic=False, Generator? generator=None) -> (Tensor codes, Tensor scale, Tensor codes_t, Tensor scale_t)",
      random);
  m.def(
      "int8_quantize_rows_and_columns.seeded(Tensor input, *, Tensor? column_factor=None, Tensor? row_factor=None, "
      "int seed, "
      "int offset) -> (Tensor codes, Tensor scale, Tensor codes_t, Tensor scale_t)",
      fixed);
  // To nearest: without the tag of random operators, so that a recomputation may repeat them.
  m.def("int8_quantize_rows.nearest(Tensor input, *, Tensor? column_factor=None) -> (Tensor codes, Tensor scale)",
        fixed);
  m.def("int8_quantize_columns.nearest(Tensor input, *, Tensor? row_factor=None) -> (Tensor codes, Tensor scale)",
        fixed);
  m.def(
      "int8_quantize_rows_and_columns.nearest(Tensor input, *, Tensor? column_factor=None, Tensor? row_factor=None) "
      "-> (Tensor "
      "codes, Tensor scale, Tensor codes_t, Tensor scale_t)",
      fixed);
  m.def("int8_transpose(Tensor codes) -> Tensor", fixed);
  m.def(
      "int8_weight_transpose(Tensor weight, Tensor scale, *, str scheme=\"auto\") -> (Tensor codes, Tensor "
      "column_factor, "
      "Tensor scale)",
      fixed);
}

#define QUANTRAIN_REGISTER_INT8(kind)                                                            \
  m.impl("int8_quantize_rows", &quantrain::rows_##kind);                                         \
  m.impl("int8_quantize_rows.nearest", &quantrain::rows_nearest_##kind);                         \
  m.impl("int8_quantize_columns.nearest", &quantrain::columns_nearest_##kind);                   \
  m.impl("int8_quantize_rows_and_columns.nearest", &quantrain::rows_and_columns_nearest_##kind); \
  m.impl("int8_quantize_rows.seeded", &quantrain::rows_seeded_##kind);                           \
  m.impl("int8_quantize_columns", &quantrain::columns_##kind);                                   \
  m.impl("int8_quantize_columns.seeded", &quantrain::columns_seeded_##kind);                     \
  m.impl("int8_quantize_rows_and_columns", &quantrain::rows_and_columns_##kind);                 \
  m.impl("int8_quantize_rows_and_columns.seeded", &quantrain::rows_and_columns_seeded_##kind);   \
  m.impl("int8_transpose", &quantrain::transpose_##kind);                                        \
  m.impl("int8_weight_transpose", &quantrain::weight_transpose_##kind)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_INT8(kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_INT8(meta); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_INT8(kernel); }
#endif
