#include "quantrain/ops/gradient_quant.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sort.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "csrc/cpu/fake_quant.h"
#include "csrc/cpu/gradient_quant.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/common/random.h"
#include "ops/gradient_quant_check.h"
#include "quantrain/ops/fake_quant.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/fake_quant.h"
#include "csrc/cuda/gradient_quant.h"
#endif

namespace quantrain {
namespace {

using OptionalGenerator = std::optional<at::Generator>;
using CodesTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

enum class Quantizer { kPerTensor, kPerSample, kPerChannel, kHouseholder };

constexpr std::string_view kQuantize = "quantize_gradient";
constexpr std::string_view kBoth = "_quantize_gradient_both";
constexpr int64_t kAnyGroup = 128;  // of quantizers without groups
constexpr std::string_view kCodes = "quantize_gradient_codes";
constexpr std::string_view kDequantize = "dequantize_gradient";
constexpr std::string_view kReflect = "_reflect_rows";

// What is asked for, checked. The schemas carry it as single arguments.
struct Request {
  int bits = 8;
  Quantizer quantizer = Quantizer::kPerTensor;
  bool token_rows = false;
  bool preserve_zero = false;
  int64_t max_group = 128;
};

// ---- checks and shapes, shared with Meta ----------------------------------------------------------------------------

// Of a name that was checked.
Quantizer parse_quantizer(std::string_view quantizer) {
  if (quantizer == "per_tensor") return Quantizer::kPerTensor;
  if (quantizer == "per_sample") return Quantizer::kPerSample;
  return quantizer == "per_channel" ? Quantizer::kPerChannel : Quantizer::kHouseholder;
}

// N and D.
std::pair<c10::SymInt, c10::SymInt> matrix_size(const at::Tensor& grad, bool token_rows) {
  c10::SymInt rows = 1, columns = 1;
  const int64_t row_dims = token_rows ? grad.dim() - 1 : 1;
  for (int64_t d = 0; d < grad.dim(); ++d) (d < row_dims ? rows : columns) *= grad.sym_size(d);
  return {rows, columns};
}

Request check_request(std::string_view op, const at::Tensor& grad, int64_t bits, std::string_view quantizer,
                      std::string_view rows, bool preserve_zero, int64_t max_group) {
  const GradientQuantizer given{std::string(quantizer), bits, std::string(rows), preserve_zero, max_group};
  const std::string fault = detail::gradient_quantizer_fault(given, "quantizer", "", {});
  QUANTRAIN_CHECK_VALUE(fault.empty(), "{}: expected {}", op, fault);
  const Quantizer parsed = parse_quantizer(quantizer);
  const auto type = grad.scalar_type();
  detail::check_float(op, "grad", type);
  detail::check_dense(op, "grad", grad);
  QUANTRAIN_CHECK_VALUE(grad.dim() >= 1, "{}: expected grad with at least one dimension, got {}", op, grad.dim());
  const bool token_rows = rows == "token";
  QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(matrix_size(grad, token_rows).first.sym_gt(0)),
                        "{}: expected at least one {}, got grad of shape {}", op, rows, detail::shape_text(grad));
  return Request{static_cast<int>(bits), parsed, token_rows, preserve_zero || parsed == Quantizer::kPerTensor,
                 max_group};
}

// What a quantizer finds out beside the codes: QuantizedGradient's scale, offset, order and reflector.
struct Plan {
  at::Tensor scale;
  at::Tensor offset;
  at::Tensor order;
  at::Tensor reflector;
};

Plan allocate_plan(const Request& request, const c10::SymInt& rows, const c10::SymInt& columns,
                   const at::TensorOptions& options) {
  const bool by_column = request.quantizer == Quantizer::kPerChannel;
  const bool reflects = request.quantizer == Quantizer::kHouseholder;
  const bool by_row = reflects || request.quantizer == Quantizer::kPerSample;
  const c10::SymInt grid[2] = {by_row ? rows : c10::SymInt(1), by_column ? columns : c10::SymInt(1)};
  const c10::SymInt reflected = reflects ? rows : c10::SymInt(0);
  return {at::empty_symint(grid, options.dtype(at::kFloat)), at::empty_symint(grid, options.dtype(at::kFloat)),
          at::empty_symint({reflected}, options.dtype(at::kInt)),
          at::empty_symint({reflected, 4}, options.dtype(at::kFloat))};
}

CodesTuple allocate_codes(const at::Tensor& grad, const Request& request) {
  const auto [rows, columns] = matrix_size(grad, request.token_rows);
  const Plan plan = allocate_plan(request, rows, columns, grad.options());
  return {at::empty_symint({rows, columns}, grad.options().dtype(at::kChar)), plan.scale, plan.offset, plan.order,
          plan.reflector};
}

at::Tensor quantize_gradient_meta(const at::Tensor& grad, int64_t bits, c10::string_view quantizer,
                                  c10::string_view rows, bool preserve_zero, int64_t max_group, bool,
                                  const OptionalGenerator&) {
  check_request(kQuantize, grad, bits, quantizer, rows, preserve_zero, max_group);
  return at::empty_like(grad);
}

std::tuple<at::Tensor, at::Tensor> quantize_gradient_both_meta(const at::Tensor& grad, int64_t bits, bool preserve_zero,
                                                               int64_t column_bits, bool column_preserve_zero,
                                                               c10::string_view rows, const OptionalGenerator&) {
  check_request(kBoth, grad, bits, "per_sample", rows, preserve_zero, kAnyGroup);
  check_request(kBoth, grad, column_bits, "per_channel", rows, column_preserve_zero, kAnyGroup);
  return {at::empty_like(grad), at::empty_like(grad)};
}

at::Tensor quantize_gradient_seeded_meta(const at::Tensor& grad, int64_t bits, c10::string_view quantizer,
                                         c10::string_view rows, bool preserve_zero, int64_t max_group, int64_t,
                                         int64_t) {
  check_request(kQuantize, grad, bits, quantizer, rows, preserve_zero, max_group);
  return at::empty_like(grad);
}

CodesTuple quantize_gradient_codes_meta(const at::Tensor& grad, int64_t bits, c10::string_view quantizer,
                                        c10::string_view rows, bool preserve_zero, int64_t max_group, bool,
                                        const OptionalGenerator&) {
  return allocate_codes(grad, check_request(kCodes, grad, bits, quantizer, rows, preserve_zero, max_group));
}

CodesTuple quantize_gradient_codes_seeded_meta(const at::Tensor& grad, int64_t bits, c10::string_view quantizer,
                                               c10::string_view rows, bool preserve_zero, int64_t max_group, int64_t,
                                               int64_t) {
  return allocate_codes(grad, check_request(kCodes, grad, bits, quantizer, rows, preserve_zero, max_group));
}

void check_reflection(std::string_view op, const at::Tensor& on, const at::Tensor& order, const at::Tensor& reflector) {
  detail::check_type(op, "order", order, at::kInt, "int32");
  detail::check_type(op, "reflector", reflector, at::kFloat, "float32");
  QUANTRAIN_CHECK_TYPE(order.device() == on.device() && reflector.device() == on.device(),
                       "{}: expected order and reflector on {}, got {} and {}", op, on.device().str(),
                       order.device().str(), reflector.device().str());
  QUANTRAIN_CHECK_VALUE(order.dim() == 1 && (order.sym_size(0) == on.sym_size(0) || order.sym_size(0) == 0),
                        "{}: expected order of shape [{}] or [0], got {}", op, c10::str(on.sym_size(0)),
                        detail::shape_text(order));
  QUANTRAIN_CHECK_VALUE(
      reflector.dim() == 2 && reflector.sym_size(0) == order.sym_size(0) && reflector.sym_size(1) == 4,
      "{}: expected reflector of shape [{}, 4], got {}", op, c10::str(order.sym_size(0)),
      detail::shape_text(reflector));
}

at::Tensor dequantize_gradient_meta(const at::Tensor& codes, const at::Tensor& scale, const at::Tensor& offset,
                                    const at::Tensor& order, const at::Tensor& reflector, at::ScalarType dtype) {
  detail::check_type(kDequantize, "codes", codes, at::kChar, "int8");
  QUANTRAIN_CHECK_VALUE(codes.dim() == 2, "{}: expected codes [N, D], got shape {}", kDequantize,
                        detail::shape_text(codes));
  QUANTRAIN_CHECK_TYPE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16,
                       "{}: expected dtype float32, float16 or bfloat16, got {}", kDequantize, c10::toString(dtype));
  for (const at::Tensor* grid : {&scale, &offset}) {
    QUANTRAIN_CHECK_TYPE(grid->scalar_type() == at::kFloat && grid->device() == codes.device(),
                         "{}: expected scale and offset of float32 on {}, got {} on {}", kDequantize,
                         codes.device().str(), c10::toString(grid->scalar_type()), grid->device().str());
    QUANTRAIN_CHECK_VALUE(grid->dim() == 2 && (grid->sym_size(0) == 1 || grid->sym_size(0) == codes.sym_size(0)) &&
                              (grid->sym_size(1) == 1 || grid->sym_size(1) == codes.sym_size(1)),
                          "{}: expected scale and offset [1, 1], [N, 1] or [1, D] for codes {}, got {}", kDequantize,
                          detail::shape_text(codes), detail::shape_text(*grid));
  }
  check_reflection(kDequantize, codes, order, reflector);
  return at::empty_symint(codes.sym_sizes(), codes.options().dtype(dtype));
}

at::Tensor reflect_rows_meta(const at::Tensor& input, const at::Tensor& order, const at::Tensor& reflector, bool) {
  detail::check_type(kReflect, "input", input, at::kFloat, "float32");
  QUANTRAIN_CHECK_VALUE(input.dim() == 2, "{}: expected input [N, K], got shape {}", kReflect,
                        detail::shape_text(input));
  check_reflection(kReflect, input, order, reflector);
  return at::empty_symint(input.sym_sizes(), input.options());
}

// ---- CPU and CUDA ---------------------------------------------------------------------------------------------------

// A tensor whose memory is the matrix X [N, D]: rows one after the other. Columns may lie in another order than the
// dimensions'.
at::Tensor row_major(const at::Tensor& grad, bool token_rows) {
  if (grad.is_contiguous()) return grad;
  if (token_rows) return grad.contiguous();
  const at::Tensor tensor = dense(grad);
  const bool rows_outermost = grad.size(0) == 1 || tensor.stride(0) == tensor.numel() / grad.size(0);
  return rows_outermost ? tensor : grad.contiguous();
}

// One quantization of a matrix: the pieces that the quantizers share. The results go to values or to codes.
struct Rounding {
  at::Tensor x;  // [N, D], row-major
  const Request& request;
  const Random& random;
  void* values;
  int8_t* codes;
  Plan plan;

  int64_t rows() const { return x.size(0); }
  int64_t columns() const { return x.size(1); }
  at::TensorOptions floats() const { return x.options().dtype(at::kFloat); }

  // Extremes of blocks in pieces: piece `split` of block `group` lies at group * group_stride + split * split_stride.
  struct Extremes {
    at::Tensor min, max;
    int64_t group_stride, splits, split_stride;
  };

  // Of X, of its rows, or of its columns.
  Extremes extremes(GridAxis axis) const {
    if (axis == GridAxis::kColumn) {
      const auto [min, max] = detail::min_max(x, plan.scale.sizes());
      return {min, max, 1, 1, 0};
    }
    const int64_t scale_sizes[2] = {axis == GridAxis::kRow ? rows() : 1, 1};
    MinMaxArgs args{x.const_data_ptr(), nullptr, nullptr, dtype_of(x), {}};
    make_grouping(x.sizes().data(), scale_sizes, 2, args.grouping);
    const int64_t splits = chunks_per_row(args.grouping);
    const Extremes found{at::empty({args.grouping.rows * splits}, floats()),
                         at::empty({args.grouping.rows * splits}, floats()), splits, splits, 1};
    args.partial_min = found.min.mutable_data_ptr<float>();
    args.partial_max = found.max.mutable_data_ptr<float>();
    run_rows(args, x, QUANTRAIN_KERNELS(min_max));
    return found;
  }

  void make_grids(const Extremes& found) {
    const GradientGridsArgs args{found.min.const_data_ptr<float>(),
                                 found.max.const_data_ptr<float>(),
                                 plan.scale.mutable_data_ptr<float>(),
                                 plan.offset.mutable_data_ptr<float>(),
                                 plan.scale.numel(),
                                 found.group_stride,
                                 found.splits,
                                 found.split_stride,
                                 request.bits,
                                 request.preserve_zero};
    run_tasks(args, args.groups, 1024, x, QUANTRAIN_KERNELS(gradient_grids));
  }

  void round(GridAxis axis) {
#if defined(QUANTRAIN_WITH_CUDA)
    if (x.is_cuda() && axis == GridAxis::kRow && cuda::fits_fused_rows(columns())) {
      const RoundRowsArgs args{x.const_data_ptr(),
                               values,
                               codes,
                               plan.scale.mutable_data_ptr<float>(),
                               plan.offset.mutable_data_ptr<float>(),
                               dtype_of(x),
                               rows(),
                               columns(),
                               request.bits,
                               request.preserve_zero,
                               random.stochastic,
                               random.philox};
      run_on_cuda(args, x, &cuda::round_rows);
      return;
    }
#endif
    make_grids(extremes(axis));
    const RoundGradientArgs args{x.const_data_ptr(),
                                 values,
                                 codes,
                                 plan.scale.const_data_ptr<float>(),
                                 plan.offset.const_data_ptr<float>(),
                                 dtype_of(x),
                                 rows(),
                                 columns(),
                                 axis,
                                 request.bits,
                                 random.stochastic,
                                 random.philox};
    const int64_t tasks = cpu::round_tasks(rows(), columns());
    const int64_t grain = std::max<int64_t>(32768 * tasks / x.numel(), 1);
    run_tasks(args, tasks, grain, x, QUANTRAIN_KERNELS(round_gradient));
  }

  void round_reflected() {
    const Extremes found = extremes(GridAxis::kRow);
    const at::Tensor extreme = at::empty({2, rows()}, floats()), range = at::empty({rows()}, floats());
    auto* min = extreme.mutable_data_ptr<float>();
    float* max = min + rows();
    const OrderingRangesArgs ranges{found.min.const_data_ptr<float>(),
                                    found.max.const_data_ptr<float>(),
                                    min,
                                    max,
                                    range.mutable_data_ptr<float>(),
                                    rows(),
                                    found.splits};
    run_tasks(ranges, rows(), 4096, x, QUANTRAIN_KERNELS(ordering_ranges));
    const at::Tensor by_range = std::get<1>(at::sort(range, /*stable=*/true, /*dim=*/0, /*descending=*/true));

    const RowBlocks blocks = make_row_blocks(rows(), request.max_group);
    auto* reflectors = reinterpret_cast<Reflector*>(plan.reflector.mutable_data_ptr<float>());
    const PlanReflectorsArgs planning{by_range.const_data_ptr<int64_t>(),     min,        max,
                                      plan.order.mutable_data_ptr<int32_t>(), reflectors, blocks};
    run_tasks(planning, blocks.blocks, 16, x, QUANTRAIN_KERNELS(plan_reflectors));

    const int64_t splits = column_splits(blocks);
    const at::Tensor partial = at::empty({2, splits, rows()}, floats());
    const ReflectedRangesArgs reflected{x.const_data_ptr(),
                                        plan.order.const_data_ptr<int32_t>(),
                                        reflectors,
                                        partial.mutable_data_ptr<float>(),
                                        partial.mutable_data_ptr<float>() + splits * rows(),
                                        dtype_of(x),
                                        columns(),
                                        splits,
                                        blocks};
    run_tasks(reflected, blocks.blocks * splits, 1, x, QUANTRAIN_KERNELS(reflected_ranges));
    make_grids({partial[0], partial[1], 1, splits, rows()});

    const RoundReflectedArgs round{x.const_data_ptr(),
                                   values,
                                   codes,
                                   plan.order.const_data_ptr<int32_t>(),
                                   reflectors,
                                   plan.scale.const_data_ptr<float>(),
                                   plan.offset.const_data_ptr<float>(),
                                   dtype_of(x),
                                   columns(),
                                   splits,
                                   blocks,
                                   request.bits,
                                   random.stochastic,
                                   random.philox};
    run_tasks(round, blocks.blocks * splits, 1, x, QUANTRAIN_KERNELS(round_reflected));
  }

  // Spans of columns that kernels work on apart: enough for every processor, and from the shape alone.
  int64_t column_splits(const RowBlocks& blocks) const {
    constexpr int64_t kTasks = 2048;
    return std::clamp<int64_t>(kTasks / blocks.blocks, 1, cpu::column_tiles(columns()));
  }

  void run() {
    switch (request.quantizer) {
      case Quantizer::kPerTensor:
        return round(GridAxis::kTensor);
      case Quantizer::kPerSample:
        return round(GridAxis::kRow);
      case Quantizer::kPerChannel:
        return round(GridAxis::kColumn);
      case Quantizer::kHouseholder:
        return round_reflected();
    }
  }
};

at::Tensor quantize_with(const at::Tensor& grad, const Request& request, const Random& random) {
  at::Tensor result = at::empty_like(grad);
  if (grad.numel() == 0) return result;
  const at::Tensor input = row_major(grad, request.token_rows);
  const bool direct = result.strides() == input.strides();
  const at::Tensor target = direct ? result : at::empty_like(input);
  const auto [rows, columns] = matrix_size(grad, request.token_rows);
  const at::Tensor x = input.as_strided_symint({rows, columns}, {columns, 1});
  Rounding{x, request, random, target.mutable_data_ptr(), nullptr, allocate_plan(request, rows, columns, x.options())}
      .run();
  return direct ? result : result.copy_(target);
}

using Pair = std::tuple<at::Tensor, at::Tensor>;

// A gradient rounded twice, with a grid per row and with one per column, in one reading where a row fits.
Pair both_with(const at::Tensor& grad, const Request& by_row, const Random& first, const Request& by_column,
               const Random& second) {
#if defined(QUANTRAIN_WITH_CUDA)
  const auto [rows, columns] = matrix_size(grad, by_row.token_rows);
  const at::Tensor input = grad.numel() > 0 ? row_major(grad, by_row.token_rows) : grad;
  at::Tensor of_row = at::empty_like(grad), of_column = at::empty_like(grad);
  const bool direct = of_row.strides() == input.strides();
  if (grad.is_cuda() && grad.numel() > 0 && direct && cuda::fits_fused_rows(columns.guard_int(__FILE__, __LINE__))) {
    const at::Tensor x = input.as_strided_symint({rows, columns}, {columns, 1});
    Rounding columnwise{x, by_column, second, nullptr, nullptr, allocate_plan(by_column, rows, columns, x.options())};
    columnwise.make_grids(columnwise.extremes(GridAxis::kColumn));
    const Plan plan = allocate_plan(by_row, rows, columns, x.options());
    RoundRowsArgs args{x.const_data_ptr(),
                       of_row.mutable_data_ptr(),
                       nullptr,
                       plan.scale.mutable_data_ptr<float>(),
                       plan.offset.mutable_data_ptr<float>(),
                       dtype_of(x),
                       x.size(0),
                       x.size(1),
                       by_row.bits,
                       by_row.preserve_zero,
                       first.stochastic,
                       first.philox};
    args.column_y = of_column.mutable_data_ptr();
    args.column_scale = columnwise.plan.scale.const_data_ptr<float>();
    args.column_offset = columnwise.plan.offset.const_data_ptr<float>();
    args.column_bits = by_column.bits;
    args.column_philox = second.philox;
    run_on_cuda(args, x, &cuda::round_rows);
    return {of_row, of_column};
  }
#endif
  return {quantize_with(grad, by_row, first), quantize_with(grad, by_column, second)};
}

CodesTuple codes_with(const at::Tensor& grad, const Request& request, const Random& random) {
  CodesTuple result = allocate_codes(grad, request);
  const auto& [codes, scale, offset, order, reflector] = result;
  if (grad.numel() == 0) {  // the plan of a block that holds nothing but zeros
    scale.fill_(1.0);
    offset.zero_();
    reflector.zero_();
    order.copy_(at::arange(order.numel(), order.options()));
    return result;
  }
  const at::Tensor x = grad.contiguous().view(codes.sizes());
  Rounding{x, request, random, nullptr, codes.mutable_data_ptr<int8_t>(), {scale, offset, order, reflector}}.run();
  return result;
}

at::Tensor quantize_gradient_kernel(const at::Tensor& grad, int64_t bits, c10::string_view quantizer,
                                    c10::string_view rows, bool preserve_zero, int64_t max_group, bool stochastic,
                                    const OptionalGenerator& generator) {
  const Request request = check_request(kQuantize, grad, bits, quantizer, rows, preserve_zero, max_group);
  return quantize_with(grad, request, draw(kQuantize, grad.device(), stochastic, generator));
}

// The draws of quantize_gradient called for each, one after the other.
Pair quantize_gradient_both_kernel(const at::Tensor& grad, int64_t bits, bool preserve_zero, int64_t column_bits,
                                   bool column_preserve_zero, c10::string_view rows,
                                   const OptionalGenerator& generator) {
  const Request by_row = check_request(kBoth, grad, bits, "per_sample", rows, preserve_zero, kAnyGroup);
  const Request by_column =
      check_request(kBoth, grad, column_bits, "per_channel", rows, column_preserve_zero, kAnyGroup);
  const Random first = draw(kBoth, grad.device(), true, generator),
               second = draw(kBoth, grad.device(), true, generator);
  return both_with(grad, by_row, first, by_column, second);
}

at::Tensor quantize_gradient_seeded_kernel(const at::Tensor& grad, int64_t bits, c10::string_view quantizer,
                                           c10::string_view rows, bool preserve_zero, int64_t max_group, int64_t seed,
                                           int64_t offset) {
  const Request request = check_request(kQuantize, grad, bits, quantizer, rows, preserve_zero, max_group);
  return quantize_with(grad, request, seeded(seed, offset));
}

CodesTuple quantize_gradient_codes_kernel(const at::Tensor& grad, int64_t bits, c10::string_view quantizer,
                                          c10::string_view rows, bool preserve_zero, int64_t max_group, bool stochastic,
                                          const OptionalGenerator& generator) {
  const Request request = check_request(kCodes, grad, bits, quantizer, rows, preserve_zero, max_group);
  return codes_with(grad, request, draw(kCodes, grad.device(), stochastic, generator));
}

CodesTuple quantize_gradient_codes_seeded_kernel(const at::Tensor& grad, int64_t bits, c10::string_view quantizer,
                                                 c10::string_view rows, bool preserve_zero, int64_t max_group,
                                                 int64_t seed, int64_t offset) {
  const Request request = check_request(kCodes, grad, bits, quantizer, rows, preserve_zero, max_group);
  return codes_with(grad, request, seeded(seed, offset));
}

// A plan made by hand must not lead outside the tensor, and must leave no row out. On CUDA the check would wait for the
// device.
void check_positions(const at::Tensor& order) {
  if (!order.is_cpu()) return;
  const auto* positions = order.const_data_ptr<int32_t>();
  std::vector<bool> seen(static_cast<size_t>(order.numel()), false);
  for (int64_t p = 0; p < order.numel(); ++p) {
    const int32_t position = positions[p];
    QUANTRAIN_CHECK_VALUE(position >= 0 && position < order.numel(), "{}: expected order in [0, {}), got {}", kReflect,
                          order.numel(), position);
    QUANTRAIN_CHECK_VALUE(!seen[static_cast<size_t>(position)],
                          "{}: expected order to name each row once, got {} twice", kReflect, position);
    seen[static_cast<size_t>(position)] = true;
  }
}

// The reflection's blocks need not be known: a group never crosses one, and a leader opens each group.
at::Tensor reflect_rows_kernel(const at::Tensor& input, const at::Tensor& order, const at::Tensor& reflector,
                               bool inverse) {
  at::Tensor result = reflect_rows_meta(input, order, reflector, inverse);
  if (order.numel() == 0) return result.copy_(input);
  if (input.numel() == 0) return result;
  if (!input.is_cpu()) result.zero_();  // rows that `order` may leave out, unchecked
  const at::Tensor x = input.contiguous(), positions = order.contiguous(), by_position = reflector.contiguous();
  check_positions(positions);
  const ReflectRowsArgs args{x.const_data_ptr<float>(),
                             result.mutable_data_ptr<float>(),
                             positions.const_data_ptr<int32_t>(),
                             reinterpret_cast<const Reflector*>(by_position.const_data_ptr<float>()),
                             input.size(0),
                             input.size(1),
                             inverse};
  run_tasks(args, cpu::column_tiles(args.columns), 1, x, QUANTRAIN_KERNELS(reflect_rows));
  return result;
}

at::Tensor dequantize_gradient_kernel(const at::Tensor& codes, const at::Tensor& scale, const at::Tensor& offset,
                                      const at::Tensor& order, const at::Tensor& reflector, at::ScalarType dtype) {
  dequantize_gradient_meta(codes, scale, offset, order, reflector, dtype);
  const at::Tensor values = codes.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous)
                                .mul_(scale)
                                .add_(offset);
  return (order.numel() == 0 ? values : reflect_rows_kernel(values, order, reflector, true)).to(dtype);
}

}  // namespace

// ---- public functions -----------------------------------------------------------------------------------------------

at::Tensor quantize_gradient(const at::Tensor& grad, int64_t bits, std::string_view quantizer,
                             const GradientQuantOptions& options, const OptionalGenerator& generator) {
  static const auto op = find_operator<decltype(quantize_gradient_kernel)>("quantize_gradient");
  return op.call(grad, bits, quantizer, options.rows, options.preserve_zero, options.max_group, options.stochastic,
                 generator);
}

at::Tensor quantize_gradient_seeded(const at::Tensor& grad, int64_t bits, std::string_view quantizer,
                                    const GradientQuantOptions& options, int64_t seed, int64_t offset) {
  static const auto op = find_operator<decltype(quantize_gradient_seeded_kernel)>("quantize_gradient", "seeded");
  return op.call(grad, bits, quantizer, options.rows, options.preserve_zero, options.max_group, seed, offset);
}

QuantizedGradient quantize_gradient_codes(const at::Tensor& grad, int64_t bits, std::string_view quantizer,
                                          const GradientQuantOptions& options, const OptionalGenerator& generator) {
  static const auto op = find_operator<decltype(quantize_gradient_codes_kernel)>("quantize_gradient_codes");
  auto [codes, scale, offset, order, reflector] = op.call(grad, bits, quantizer, options.rows, options.preserve_zero,
                                                          options.max_group, options.stochastic, generator);
  return {codes, scale, offset, order, reflector};
}

at::Tensor dequantize_gradient(const QuantizedGradient& quantized, at::ScalarType dtype) {
  static const auto op = find_operator<decltype(dequantize_gradient_kernel)>("dequantize_gradient");
  return op.call(quantized.codes, quantized.scale, quantized.offset, quantized.order, quantized.reflector, dtype);
}

namespace detail {

at::Tensor reflect_rows(const at::Tensor& input, const at::Tensor& order, const at::Tensor& reflector, bool inverse) {
  static const auto op = find_operator<decltype(reflect_rows_kernel)>("_reflect_rows");
  return op.call(input, order, reflector, inverse);
}

}  // namespace detail
}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  const std::vector<at::Tag> random{at::Tag::nondeterministic_seeded};
  m.def(
      "quantize_gradient(Tensor grad, int bits, str quantizer, *, str rows=\"sample\", bool preserve_zero=False, int "
      "max_group=128, bool stochastic=True, Generator? generator=None) -> Tensor",
      random);
  m.def(
      "quantize_gradient.seeded(Tensor grad, int bits, str quantizer, *, str rows=\"sample\", bool "
      "preserve_zero=False, int "
      "max_group=128, int seed, int offset) -> Tensor");
  m.def(
      "quantize_gradient_codes(Tensor grad, int bits, str quantizer, *, str rows=\"sample\", bool "
      "preserve_zero=False, int "
      "max_group=128, bool stochastic=True, Generator? generator=None) -> (Tensor codes, Tensor scale, Tensor offset, "
      "Tensor order, Tensor reflector)",
      random);
  m.def(
      "quantize_gradient_codes.seeded(Tensor grad, int bits, str quantizer, *, str rows=\"sample\", bool "
      "preserve_zero=False, int max_group=128, int seed, int offset) -> (Tensor codes, Tensor scale, Tensor offset, "
      "Tensor order, Tensor reflector)");
  m.def(
      "dequantize_gradient(Tensor codes, Tensor scale, Tensor offset, Tensor order, Tensor reflector, *, ScalarType "
      "dtype=float) -> Tensor");
  m.def(
      "_quantize_gradient_both(Tensor grad, int bits, bool preserve_zero, int column_bits, bool column_preserve_zero, "
      "*, str rows=\"sample\", Generator? generator=None) -> (Tensor by_row, Tensor by_column)",
      random);
  m.def("_reflect_rows(Tensor input, Tensor order, Tensor reflector, *, bool inverse=False) -> Tensor");
}

#define QUANTRAIN_REGISTER_GRADIENT(kind)                                                      \
  m.impl("quantize_gradient", &quantrain::quantize_gradient_##kind);                           \
  m.impl("quantize_gradient.seeded", &quantrain::quantize_gradient_seeded_##kind);             \
  m.impl("_quantize_gradient_both", &quantrain::quantize_gradient_both_##kind);                \
  m.impl("quantize_gradient_codes", &quantrain::quantize_gradient_codes_##kind);               \
  m.impl("quantize_gradient_codes.seeded", &quantrain::quantize_gradient_codes_seeded_##kind); \
  m.impl("dequantize_gradient", &quantrain::dequantize_gradient_##kind);                       \
  m.impl("_reflect_rows", &quantrain::reflect_rows_##kind)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_GRADIENT(kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_GRADIENT(meta); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_GRADIENT(kernel); }
#endif
