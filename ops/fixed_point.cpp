#include "quantrain/ops/fixed_point.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <cmath>

#include "csrc/cpu/fake_quant.h"
#include "csrc/cpu/fixed_point.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/fake_quant_check.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/fake_quant.h"
#include "csrc/cuda/fixed_point.h"
#endif

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr std::string_view kQuantize = "fixed_point_quantize";
constexpr std::string_view kFractionLength = "fixed_point_fraction_length";
constexpr std::string_view kRequantize = "fixed_point_requantize";
constexpr int64_t kLongestAccumulator = 31;  // an int32 holds no longer fraction

// ---- checks and shapes, shared with Meta ----------------------------------------------------------------------------

void check_word_length(std::string_view op, int64_t word_length) {
  QUANTRAIN_CHECK_VALUE(word_length >= 2 && word_length <= kMaxWordLength,
                        "{}: expected word_length in [2, {}], got {}", op, kMaxWordLength, word_length);
}

void check_lengths(std::string_view op, std::string_view name, const at::Tensor& input, const at::Tensor& lengths) {
  check_integers(op, name, lengths);
  detail::check_device(op, name, lengths, input, "the input's");
}

// What only a look at the values can tell; CPU tensors alone.
void check_length_values(std::string_view op, std::string_view name, const at::Tensor& lengths, int64_t longest) {
  if (!lengths.is_cpu()) return;
  const at::Tensor flat = lengths.to(at::kLong).contiguous();
  const int64_t* value = flat.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < flat.numel(); ++i)
    QUANTRAIN_CHECK_VALUE(value[i] >= 0 && value[i] <= longest, "{}: expected {} in [0, {}], got {} at index {}", op,
                          name, longest, value[i], i);
}

void check_quantize(const at::Tensor& input, const at::Tensor& fraction_length, int64_t word_length) {
  check_word_length(kQuantize, word_length);
  check_input(kQuantize, input);
  check_lengths(kQuantize, "fraction_length", input, fraction_length);
  check_scale_shape(kQuantize, "fraction_length", input.sym_sizes(), fraction_length.sym_sizes());
}

at::Tensor fixed_point_quantize_meta(const at::Tensor& input, const at::Tensor& fraction_length, int64_t word_length,
                                     bool) {
  check_quantize(input, fraction_length, word_length);
  return at::empty_like(input);
}

std::tuple<at::Tensor, at::Tensor> fixed_point_quantize_mask_meta(const at::Tensor& input,
                                                                  const at::Tensor& fraction_length,
                                                                  int64_t word_length, bool) {
  check_quantize(input, fraction_length, word_length);
  return {at::empty_like(input), allocate_mask(input)};
}

FractionLengthMethod parse_method(std::string_view method) {
  QUANTRAIN_CHECK_VALUE(method == "std" || method == "rms" || method == "mse",
                        "{}: expected method \"std\", \"rms\" or \"mse\", got \"{}\"", kFractionLength, method);
  return method == "std"   ? FractionLengthMethod::kStd
         : method == "rms" ? FractionLengthMethod::kRms
                           : FractionLengthMethod::kMse;
}

at::Tensor fixed_point_fraction_length_meta(const at::Tensor& input, std::optional<int64_t> axis, int64_t word_length,
                                            bool, c10::string_view method, const OptionalTensor& previous,
                                            double hysteresis) {
  check_word_length(kFractionLength, word_length);
  parse_method(method);
  check_input(kFractionLength, input);
  QUANTRAIN_CHECK_VALUE(hysteresis >= 0.0 && std::isfinite(hysteresis),
                        "{}: expected hysteresis to be finite and not negative, got {}", kFractionLength, hysteresis);
  c10::SymDimVector shape{1};
  if (axis) {
    const int64_t rank = input.dim();
    QUANTRAIN_CHECK_VALUE(*axis >= -rank && *axis < rank, "{}: expected axis in [{}, {}], got {}", kFractionLength,
                          -rank, rank - 1, *axis);
    shape.assign(rank, 1);
    const int64_t dimension = *axis < 0 ? *axis + rank : *axis;
    shape[dimension] = input.sym_size(dimension);
  }
  const at::Tensor result = at::empty_symint(shape, input.options().dtype(at::kInt));
  if (previous) {
    check_lengths(kFractionLength, "previous", input, *previous);
    QUANTRAIN_CHECK_VALUE(previous->sym_sizes() == result.sym_sizes(),
                          "{}: expected previous to have the result's shape {}, got {}", kFractionLength,
                          detail::shape_text(result), detail::shape_text(*previous));
  }
  return result;
}

at::Tensor fixed_point_requantize_meta(const at::Tensor& accumulator, const at::Tensor& accumulator_fraction_length,
                                       int64_t fraction_length, bool is_signed) {
  detail::check_type(kRequantize, "accumulator", accumulator, at::kInt, "int32");
  check_lengths(kRequantize, "accumulator_fraction_length", accumulator, accumulator_fraction_length);
  check_scale_shape(kRequantize, "accumulator_fraction_length", accumulator.sym_sizes(),
                    accumulator_fraction_length.sym_sizes());
  const int64_t longest = 8 - is_signed;
  QUANTRAIN_CHECK_VALUE(fraction_length >= 0 && fraction_length <= longest,
                        "{}: expected fraction_length in [0, {}], got {}", kRequantize, longest, fraction_length);
  return at::empty_like(accumulator, accumulator.options().dtype(is_signed ? at::kChar : at::kByte));
}

// ---- CPU and CUDA ---------------------------------------------------------------------------------------------------

QuantRange code_range(int64_t word_length, bool is_signed) {
  const int64_t largest = (int64_t{1} << (word_length - is_signed)) - 1;
  return make_range(is_signed ? -largest : 0, largest);
}

// `mask` may be undefined.
at::Tensor quantize_into(const at::Tensor& input, const at::Tensor& fraction_length, int64_t word_length,
                         bool is_signed, const at::Tensor& mask) {
  check_quantize(input, fraction_length, word_length);
  check_length_values(kQuantize, "fraction_length", fraction_length, word_length - is_signed);
  if (input.scalar_type() == at::kDouble)
    return quantize_into(input.to(at::kFloat), fraction_length, word_length, is_signed, mask).to(at::kDouble);
  const Arranged arranged = arrange(kQuantize, input, fraction_length, std::nullopt);
  at::Tensor output = at::empty_like(arranged.input);
  if (input.numel() == 0) return output;
  const FakeQuantizeArgs args{arranged.input.const_data_ptr(),
                              output.mutable_data_ptr(),
                              mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr,
                              dtype_of(input),
                              arranged.grouping,
                              {nullptr, nullptr, nullptr, arranged.scale.const_data_ptr<int32_t>()},
                              code_range(word_length, is_signed),
                              /*ends_pass=*/false};
  run_elementwise(args, output, QUANTRAIN_KERNELS(fake_quantize));
  return output;
}

at::Tensor fixed_point_quantize_kernel(const at::Tensor& input, const at::Tensor& fraction_length, int64_t word_length,
                                       bool is_signed) {
  return quantize_into(input, fraction_length, word_length, is_signed, {});
}

std::tuple<at::Tensor, at::Tensor> fixed_point_quantize_mask_kernel(const at::Tensor& input,
                                                                    const at::Tensor& fraction_length,
                                                                    int64_t word_length, bool is_signed) {
  const at::Tensor mask = allocate_mask(input);
  return {quantize_into(input, fraction_length, word_length, is_signed, mask), mask};
}

// [groups, elements of a group] in memory, in whatever order within a group.
at::Tensor grouped_by(const at::Tensor& input, std::optional<int64_t> axis) {
  if (!axis) return dense(input);
  const at::Tensor leading = input.movedim(*axis, 0);
  const int64_t elements = leading.size(0) > 0 ? leading.numel() / leading.size(0) : 0;
  const bool in_place = leading.is_non_overlapping_and_dense() && leading.stride(0) == elements;
  return in_place ? leading : leading.contiguous();
}

void run_fraction_length(const FractionLengthArgs& args, const at::Tensor& on) {
#if defined(QUANTRAIN_WITH_CUDA)
  if (run_on_cuda(args, on, &cuda::fraction_length)) return;
#endif
  const int64_t chunks = chunks_per_group(args), per_task = std::min(args.elements, kRowChunk);
  run_tasks(args, args.groups * chunks, grain_of(per_task), on, &cpu::fraction_length_partial, nullptr);
  cpu::fraction_length_finish(args, 0, args.groups);
}

at::Tensor fixed_point_fraction_length_kernel(const at::Tensor& input, std::optional<int64_t> axis, int64_t word_length,
                                              bool is_signed, c10::string_view method, const OptionalTensor& previous,
                                              double hysteresis) {
  at::Tensor result =
      fixed_point_fraction_length_meta(input, axis, word_length, is_signed, method, previous, hysteresis);
  const int64_t longest = word_length - is_signed, groups = result.numel();
  if (previous) check_length_values(kFractionLength, "previous", *previous, longest);
  if (input.numel() == 0) return result.fill_(longest);
  FractionLengthRule rule;
  rule.method = parse_method(method);
  rule.largest = static_cast<int>(longest);
  rule.c = fraction_length_constant(rule.method, static_cast<int>(word_length), is_signed);
  rule.slack = std::exp2(hysteresis);
  rule.range = code_range(word_length, is_signed);
  const at::Tensor values = input.scalar_type() == at::kDouble ? input.to(at::kFloat) : input;
  const at::Tensor grouped = grouped_by(values, axis);
  const at::Tensor kept = previous ? as_int32(*previous).contiguous() : at::Tensor();
  FractionLengthArgs args{grouped.const_data_ptr(),
                          nullptr,
                          previous ? kept.const_data_ptr<int32_t>() : nullptr,
                          result.mutable_data_ptr<int32_t>(),
                          dtype_of(values),
                          groups,
                          input.numel() / groups,
                          rule};
  const at::Tensor partial =
      at::empty({groups, chunks_per_group(args), statistic_terms(rule)}, input.options().dtype(at::kDouble));
  args.partial = partial.mutable_data_ptr<double>();
  run_fraction_length(args, input);
  return result;
}

at::Tensor fixed_point_requantize_kernel(const at::Tensor& accumulator, const at::Tensor& accumulator_fraction_length,
                                         int64_t fraction_length, bool is_signed) {
  fixed_point_requantize_meta(accumulator, accumulator_fraction_length, fraction_length, is_signed);
  check_length_values(kRequantize, "accumulator_fraction_length", accumulator_fraction_length, kLongestAccumulator);
  const Arranged arranged = arrange(kRequantize, accumulator, accumulator_fraction_length, std::nullopt);
  at::Tensor output = at::empty_like(arranged.input, accumulator.options().dtype(is_signed ? at::kChar : at::kByte));
  if (accumulator.numel() == 0) return output;
  const FixedPointRequantizeArgs args{arranged.input.const_data_ptr<int32_t>(),
                                      arranged.scale.const_data_ptr<int32_t>(),
                                      output.mutable_data_ptr(),
                                      arranged.grouping,
                                      static_cast<int>(fraction_length),
                                      is_signed};
  run_elementwise(args, output, QUANTRAIN_KERNELS(fixed_point_requantize));
  return output;
}

}  // namespace

// ---- public functions -----------------------------------------------------------------------------------------------

at::Tensor fixed_point_quantize(const at::Tensor& input, const at::Tensor& fraction_length, int64_t word_length,
                                bool is_signed) {
  static const auto op = find_operator<decltype(fixed_point_quantize_kernel)>("fixed_point_quantize");
  return op.call(input, fraction_length, word_length, is_signed);
}

at::Tensor fixed_point_fraction_length(const at::Tensor& input, std::optional<int64_t> axis, int64_t word_length,
                                       bool is_signed, std::string_view method,
                                       const std::optional<at::Tensor>& previous, double hysteresis) {
  static const auto op = find_operator<decltype(fixed_point_fraction_length_kernel)>("fixed_point_fraction_length");
  return op.call(input, axis, word_length, is_signed, method, previous, hysteresis);
}

at::Tensor fixed_point_requantize(const at::Tensor& accumulator, const at::Tensor& accumulator_fraction_length,
                                  int64_t fraction_length, bool is_signed) {
  static const auto op = find_operator<decltype(fixed_point_requantize_kernel)>("fixed_point_requantize");
  return op.call(accumulator, accumulator_fraction_length, fraction_length, is_signed);
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  m.def("fixed_point_quantize(Tensor input, Tensor fraction_length, *, int word_length=8, bool signed=True) -> Tensor");
  m.def(
      "fixed_point_fraction_length(Tensor input, *, int? axis=None, int word_length=8, bool signed=True, str "
      "method=\"std\", "
      "Tensor? previous=None, float hysteresis=0.0) -> Tensor");
  m.def(
      "fixed_point_requantize(Tensor accumulator, Tensor accumulator_fraction_length, int fraction_length, *, bool "
      "signed=True) -> Tensor");
  // The mask is in the order of memory, as _fake_quantize_mask's; _fake_quantize_backward takes it.
  m.def(
      "_fixed_point_quantize_mask(Tensor input, Tensor fraction_length, int word_length, bool signed) -> (Tensor "
      "output, "
      "Tensor mask)",
      {at::Tag::needs_exact_strides});
}

#define QUANTRAIN_REGISTER_FIXED_POINT(kind)                                             \
  m.impl("fixed_point_quantize", &quantrain::fixed_point_quantize_##kind);               \
  m.impl("fixed_point_fraction_length", &quantrain::fixed_point_fraction_length_##kind); \
  m.impl("fixed_point_requantize", &quantrain::fixed_point_requantize_##kind);           \
  m.impl("_fixed_point_quantize_mask", &quantrain::fixed_point_quantize_mask_##kind)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_FIXED_POINT(kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_FIXED_POINT(meta); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_FIXED_POINT(kernel); }
#endif
