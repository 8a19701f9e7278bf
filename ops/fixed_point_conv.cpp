#include "quantrain/ops/fixed_point_conv.h"

#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "csrc/common/fixed_point_conv.h"
#include "csrc/cpu/fixed_point_conv.h"
#include "csrc/cpu/fixed_point_pool.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/int8_mm_cpu.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/fixed_point_conv/conv.h"
#endif

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr std::string_view kConv = "fixed_point_conv2d";
constexpr std::string_view kRequantize = "fixed_point_conv2d_requantize";
constexpr std::string_view kLinear = "fixed_point_linear";
constexpr std::string_view kAdd = "fixed_point_add";
constexpr std::string_view kMaxPool = "fixed_point_max_pool2d";
constexpr std::string_view kSumPool = "fixed_point_sum_pool2d";
constexpr int kMaxShift = 31;

// ---- checks and shapes, shared with Meta ----------------------------------------------------------------------------

bool equal(const c10::SymInt& a, const c10::SymInt& b) { return TORCH_GUARD_OR_TRUE(a.sym_eq(b)); }

void check_codes(std::string_view op, const at::Tensor& input) {
  const at::ScalarType type = input.scalar_type();
  QUANTRAIN_CHECK_TYPE(type == at::kByte || type == at::kChar, "{}: expected uint8 or int8 codes, got {}", op,
                       type == at::kFloat ? "float32" : c10::toString(type));
}

void check_image(std::string_view op, const at::Tensor& input) {
  check_codes(op, input);
  QUANTRAIN_CHECK_VALUE(input.dim() == 4, "{}: expected input [N, C, H, W], got {}", op, detail::shape_text(input));
}

void check_device(std::string_view op, std::string_view name, const at::Tensor& tensor, const at::Tensor& input) {
  detail::check_device(op, name, tensor, input, "input's");
}

void check_weight(std::string_view op, const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias) {
  detail::check_type(op, "weight", weight, at::kChar, "int8");
  check_device(op, "weight", weight, input);
  if (!bias) return;
  detail::check_type(op, "bias", *bias, at::kInt, "int32");
  check_device(op, "bias", *bias, input);
  QUANTRAIN_CHECK_VALUE(bias->dim() == 1 && equal(bias->sym_size(0), weight.sym_size(0)),
                        "{}: expected bias of weight's dimension 0, got {} and {}", op, detail::shape_text(*bias),
                        detail::shape_text(weight));
}

// The size of one dimension of what windows leave. Bad sizes are refused where they are known.
c10::SymInt windows(std::string_view op, const c10::SymInt& size, const c10::SymInt& kernel, const c10::SymInt& stride,
                    const c10::SymInt& padding) {
  const auto text = [](const c10::SymInt& value) { return c10::str(value); };
  const auto check = [&](const char* name, const c10::SymInt& value, int64_t least) {
    QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(value.sym_ge(least)), "{}: expected {} of at least {}, got {}", op, name,
                          least, text(value));
    QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(value.sym_le(kMaxWindow)), "{}: expected {} of at most {}, got {}", op,
                          name, kMaxWindow, text(value));
  };
  check("stride", stride, 1);
  check("padding", padding, 0);
  const c10::SymInt padded = size + padding * 2;
  QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(kernel.sym_ge(1)) && TORCH_GUARD_OR_TRUE(padded.sym_ge(kernel)),
                        "{}: expected a kernel of at least 1 that fits the padded input, got {} and {}", op,
                        text(kernel), text(padded));
  return (padded - kernel) / stride + 1;
}

at::Tensor image_result(const at::Tensor& input, const c10::SymInt& channels, const c10::SymInt& height,
                        const c10::SymInt& width, at::ScalarType type) {
  const std::array<c10::SymInt, 4> sizes{input.sym_size(0), channels, height, width};
  return at::empty_symint(sizes, input.options().dtype(type).memory_format(at::MemoryFormat::ChannelsLast));
}

at::Tensor convolution(std::string_view op, const at::Tensor& input, const at::Tensor& weight,
                       const OptionalTensor& bias, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                       const c10::SymInt& groups, at::ScalarType type) {
  check_image(op, input);
  QUANTRAIN_CHECK_VALUE(weight.dim() == 4, "{}: expected weight [O, C / groups, KH, KW], got {}", op,
                        detail::shape_text(weight));
  check_weight(op, input, weight, bias);
  QUANTRAIN_CHECK_VALUE(
      TORCH_GUARD_OR_TRUE(groups.sym_ge(1)) && equal(input.sym_size(1) % groups, 0) &&
          equal(weight.sym_size(1), input.sym_size(1) / groups) && equal(weight.sym_size(0) % groups, 0),
      "{}: expected input of C channels for weight [O, C / groups, KH, KW] and O divisible by groups, got {} and {} in "
      "{} groups",
      op, detail::shape_text(input), detail::shape_text(weight), c10::str(groups));
  QUANTRAIN_CHECK_VALUE(stride.size() == 2 && padding.size() == 2,
                        "{}: expected two sizes each for stride and padding, got {} and {}", op, stride.size(),
                        padding.size());
  return image_result(input, weight.sym_size(0),
                      windows(op, input.sym_size(2), weight.sym_size(2), stride[0], padding[0]),
                      windows(op, input.sym_size(3), weight.sym_size(3), stride[1], padding[1]), type);
}

void check_shift(std::string_view op, std::string_view name, const at::Tensor& shift, const at::Tensor& input,
                 const c10::SymInt& channels) {
  check_integers(op, name, shift);
  check_device(op, name, shift, input);
  QUANTRAIN_CHECK_VALUE(
      shift.dim() == 1 && (equal(shift.sym_size(0), channels) || TORCH_GUARD_OR_FALSE(shift.sym_size(0).sym_eq(1))),
      "{}: expected {} of one element or {}, got {}", op, name, c10::str(channels), detail::shape_text(shift));
  if (!input.is_cpu() || shift.numel() == 0) return;
  const auto [lo, hi] = at::aminmax(shift);
  const int64_t least = lo.item<int64_t>(), most = hi.item<int64_t>();
  QUANTRAIN_CHECK_VALUE(least >= -kMaxShift && most <= kMaxShift, "{}: expected {} in [-{}, {}], got {} to {}", op,
                        name, kMaxShift, kMaxShift, least, most);
}

at::Tensor conv2d_meta(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                       c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, const c10::SymInt& groups) {
  return convolution(kConv, input, weight, bias, stride, padding, groups, at::kInt);
}

at::Tensor conv2d_requantize_meta(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                  const at::Tensor& shift, const OptionalTensor& residual,
                                  const OptionalTensor& residual_shift, c10::SymIntArrayRef stride,
                                  c10::SymIntArrayRef padding, const c10::SymInt& groups, bool is_signed) {
  at::Tensor result =
      convolution(kRequantize, input, weight, bias, stride, padding, groups, is_signed ? at::kChar : at::kByte);
  check_shift(kRequantize, "shift", shift, input, weight.sym_size(0));
  QUANTRAIN_CHECK_VALUE(residual.has_value() == residual_shift.has_value(),
                        "{}: expected residual and residual_shift together, got {} alone", kRequantize,
                        residual ? "residual" : "residual_shift");
  if (!residual) return result;
  check_shift(kRequantize, "residual_shift", *residual_shift, input, weight.sym_size(0));
  const at::ScalarType type = residual->scalar_type();
  QUANTRAIN_CHECK_TYPE(type == at::kByte || type == at::kChar || type == at::kInt,
                       "{}: expected residual of uint8, int8 or int32, got {}", kRequantize, c10::toString(type));
  check_device(kRequantize, "residual", *residual, input);
  bool same = residual->dim() == 4;
  for (int64_t d = 0; same && d < 4; ++d) same = equal(residual->sym_size(d), result.sym_size(d));
  QUANTRAIN_CHECK_VALUE(same, "{}: expected residual of the result's shape {}, got {}", kRequantize,
                        detail::shape_text(result), detail::shape_text(*residual));
  return result;
}

at::Tensor linear_meta(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias) {
  check_codes(kLinear, input);
  QUANTRAIN_CHECK_VALUE(weight.dim() == 2, "{}: expected weight [O, K], got {}", kLinear, detail::shape_text(weight));
  check_weight(kLinear, input, weight, bias);
  QUANTRAIN_CHECK_VALUE(input.dim() >= 1 && equal(input.sym_size(-1), weight.sym_size(1)),
                        "{}: expected input [..., K] for weight [O, K], got {} and {}", kLinear,
                        detail::shape_text(input), detail::shape_text(weight));
  std::vector<c10::SymInt> sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  sizes.back() = weight.sym_size(0);
  return at::empty_symint(sizes, input.options().dtype(at::kInt));
}

// The dimension along which fraction lengths differ; -1: one for all.
int64_t fraction_length_axis(std::string_view name, const at::Tensor& fraction_length, const at::Tensor& input) {
  check_integers(kAdd, name, fraction_length);
  check_device(kAdd, name, fraction_length, input);
  if (TORCH_GUARD_OR_FALSE(fraction_length.sym_numel().sym_eq(1))) return -1;
  int64_t axis = -1;
  bool fits = fraction_length.dim() == input.dim();
  for (int64_t d = 0; fits && d < input.dim(); ++d) {
    if (TORCH_GUARD_OR_FALSE(fraction_length.sym_size(d).sym_eq(1))) continue;
    fits = axis < 0 && equal(fraction_length.sym_size(d), input.sym_size(d));
    axis = d;
  }
  QUANTRAIN_CHECK_VALUE(fits && axis >= 0,
                        "{}: expected {} of one element or of one along a single dimension of {}, got {}", kAdd, name,
                        detail::shape_text(input), detail::shape_text(fraction_length));
  return axis;
}

at::Tensor add_meta(const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_fraction_length,
                    const at::Tensor& b_fraction_length) {
  for (const at::Tensor& operand : {a, b}) {
    const at::ScalarType type = operand.scalar_type();
    QUANTRAIN_CHECK_TYPE(type == at::kByte || type == at::kChar || type == at::kInt,
                         "{}: expected a and b of uint8, int8 or int32, got {}", kAdd, c10::toString(type));
  }
  check_device(kAdd, "b", b, a);
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = equal(a.sym_size(d), b.sym_size(d));
  QUANTRAIN_CHECK_VALUE(same, "{}: expected a and b of one shape, got {} and {}", kAdd, detail::shape_text(a),
                        detail::shape_text(b));
  const int64_t a_axis = fraction_length_axis("a_fraction_length", a_fraction_length, a);
  const int64_t b_axis = fraction_length_axis("b_fraction_length", b_fraction_length, a);
  QUANTRAIN_CHECK_VALUE(a_axis < 0 || b_axis < 0 || a_axis == b_axis,
                        "{}: expected fraction lengths along one dimension, got {} and {}", kAdd, a_axis, b_axis);
  return at::empty_symint(a.sym_sizes(),
                          a.options().dtype(at::kInt).memory_format(a.dim() == 4 ? at::MemoryFormat::ChannelsLast
                                                                                 : at::MemoryFormat::Contiguous));
}

at::Tensor max_pool2d_meta(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                           at::IntArrayRef padding) {
  check_image(kMaxPool, input);
  QUANTRAIN_CHECK_VALUE(kernel_size.size() == 2 && stride.size() == 2 && padding.size() == 2,
                        "{}: expected two sizes each for kernel_size, stride and padding, got {}, {} and {}", kMaxPool,
                        kernel_size.size(), stride.size(), padding.size());
  // Then no window lies in the padding alone, but for an image without pixels.
  QUANTRAIN_CHECK_VALUE(
      TORCH_GUARD_OR_TRUE(input.sym_size(2).sym_ge(1)) && TORCH_GUARD_OR_TRUE(input.sym_size(3).sym_ge(1)),
      "{}: expected an image of at least one pixel, got {}", kMaxPool, detail::shape_text(input));
  QUANTRAIN_CHECK_VALUE(padding[0] <= kernel_size[0] / 2 && padding[1] <= kernel_size[1] / 2,
                        "{}: expected padding of at most half the kernel, got {} and {}", kMaxPool, padding,
                        kernel_size);
  return image_result(input, input.sym_size(1),
                      windows(kMaxPool, input.sym_size(2), kernel_size[0], stride[0], padding[0]),
                      windows(kMaxPool, input.sym_size(3), kernel_size[1], stride[1], padding[1]), input.scalar_type());
}

at::Tensor sum_pool2d_meta(const at::Tensor& input) {
  check_image(kSumPool, input);
  return image_result(input, input.sym_size(1), 1, 1, at::kInt);
}

// ---- arguments of kernels -------------------------------------------------------------------------------------------

const void* pointer(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }

const int32_t* int_pointer(const at::Tensor& tensor) { return static_cast<const int32_t*>(pointer(tensor)); }

int64_t step(const at::Tensor& per_channel) { return per_channel.defined() && per_channel.numel() != 1; }

at::Tensor channels_last(const at::Tensor& image) { return image.contiguous(at::MemoryFormat::ChannelsLast); }

FixedPointPoolArgs pool_args(const at::Tensor& input, const at::Tensor& output, std::array<int64_t, 2> kernel_size,
                             std::array<int64_t, 2> stride, std::array<int64_t, 2> padding) {
  return {input.const_data_ptr(),
          input.scalar_type() == at::kChar,
          output.mutable_data_ptr(),
          input.size(0),
          input.size(2),
          input.size(3),
          input.size(1),
          kernel_size[0],
          kernel_size[1],
          stride[0],
          stride[1],
          padding[0],
          padding[1],
          output.size(2),
          output.size(3)};
}

std::array<int64_t, 2> pair(at::IntArrayRef sizes) { return {sizes[0], sizes[1]}; }

FixedPointConvOptions options_of(c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, const c10::SymInt& groups) {
  const auto known = [](const c10::SymInt& size) { return size.guard_int(__FILE__, __LINE__); };
  return {{known(stride[0]), known(stride[1])}, {known(padding[0]), known(padding[1])}, known(groups)};
}

// ---- CPU and CUDA ---------------------------------------------------------------------------------------------------

at::Tensor conv2d_kernel(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                         c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, const c10::SymInt& groups) {
  at::Tensor result = conv2d_meta(input, weight, bias, stride, padding, groups);
  if (result.numel() == 0) return result;
  const FixedPointConv conv(weight, bias, options_of(stride, padding, groups), input.scalar_type() == at::kChar);
  conv.run(channels_last(input), result);
  return result;
}

at::Tensor conv2d_requantize_kernel(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                    const at::Tensor& shift, const OptionalTensor& residual,
                                    const OptionalTensor& residual_shift, c10::SymIntArrayRef stride,
                                    c10::SymIntArrayRef padding, const c10::SymInt& groups, bool is_signed) {
  at::Tensor result =
      conv2d_requantize_meta(input, weight, bias, shift, residual, residual_shift, stride, padding, groups, is_signed);
  if (result.numel() == 0) return result;
  const FixedPointConv conv(weight, bias, options_of(stride, padding, groups), input.scalar_type() == at::kChar);
  conv.run(channels_last(input), result, as_int32(shift).contiguous(),
           residual ? channels_last(*residual) : at::Tensor(),
           residual_shift ? as_int32(*residual_shift).contiguous() : at::Tensor());
  return result;
}

at::Tensor linear_kernel(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias) {
  at::Tensor result = linear_meta(input, weight, bias);
  if (result.numel() == 0) return result;
  const int64_t k = weight.size(1), o = weight.size(0), rows = result.numel() / o;
  const FixedPointConv conv(weight.reshape({o, k, 1, 1}), bias, {}, input.scalar_type() == at::kChar);
  at::Tensor sums = result.view({rows, o, 1, 1});
  conv.run(input.contiguous().view({rows, k, 1, 1}), sums);
  return result;
}

at::Tensor add_kernel(const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_fraction_length,
                      const at::Tensor& b_fraction_length) {
  at::Tensor result = add_meta(a, b, a_fraction_length, b_fraction_length);
  if (result.numel() == 0) return result;
  const auto format = result.suggest_memory_format();
  const at::Tensor x = a.contiguous(format), y = b.contiguous(format), x_fl = as_int32(a_fraction_length).contiguous(),
                   y_fl = as_int32(b_fraction_length).contiguous();
  const int64_t axis = std::max(fraction_length_axis("a_fraction_length", a_fraction_length, a),
                                fraction_length_axis("b_fraction_length", b_fraction_length, a));
  const FixedPointAddArgs args{x.const_data_ptr(),
                               dtype_of(x),
                               y.const_data_ptr(),
                               dtype_of(y),
                               int_pointer(x_fl),
                               step(x_fl),
                               int_pointer(y_fl),
                               step(y_fl),
                               result.mutable_data_ptr<int32_t>(),
                               result.numel(),
                               axis < 0 ? 1 : result.stride(axis),
                               axis < 0 ? 1 : result.size(axis)};
  run_elementwise(args, result, QUANTRAIN_KERNELS(fixed_point_add));
  return result;
}

at::Tensor max_pool2d_kernel(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                             at::IntArrayRef padding) {
  at::Tensor result = max_pool2d_meta(input, kernel_size, stride, padding);
  if (result.numel() == 0) return result;
  fixed_point_max_pool2d_out(channels_last(input), result, pair(kernel_size), pair(stride), pair(padding));
  return result;
}

at::Tensor sum_pool2d_kernel(const at::Tensor& input) {
  at::Tensor result = sum_pool2d_meta(input);
  if (result.numel() == 0) return result;
  fixed_point_sum_pool2d_out(channels_last(input), result);
  return result;
}

std::array<c10::SymInt, 2> symbolic(const std::array<int64_t, 2>& sizes) { return {sizes[0], sizes[1]}; }

}  // namespace

// ---- a layer that runs many times -----------------------------------------------------------------------------------

struct FixedPointConv::Packed {
  at::Tensor weight;  // [o, kh, kw, c / groups]
  at::Tensor bias;    // undefined: none
  FixedPointConvArgs args{};
  std::unique_ptr<const cpu::FixedPointConvKernel> cpu;  // null on CUDA
};

FixedPointConv::FixedPointConv(const at::Tensor& weight, const OptionalTensor& bias,
                               const FixedPointConvOptions& options, bool input_signed) {
  auto packed = std::make_shared<Packed>();
  packed->weight = weight.permute({0, 2, 3, 1}).contiguous();
  if (bias) packed->bias = bias->contiguous();
  FixedPointConvArgs& args = packed->args;
  args.input_signed = input_signed;
  args.weight = packed->weight.const_data_ptr<int8_t>();
  args.bias = int_pointer(packed->bias);
  args.o = weight.size(0);
  args.c = weight.size(1) * options.groups;
  args.kh = weight.size(2);
  args.kw = weight.size(3);
  args.stride_h = options.stride[0];
  args.stride_w = options.stride[1];
  args.padding_h = options.padding[0];
  args.padding_w = options.padding[1];
  args.groups = options.groups;
  if (weight.is_cpu())
    packed->cpu = std::make_unique<const cpu::FixedPointConvKernel>(args, named_int8_isa("fixed_point_conv2d"));
  packed_ = std::move(packed);
}

void FixedPointConv::run(const at::Tensor& input, at::Tensor& output, const at::Tensor& shift,
                         const at::Tensor& residual, const at::Tensor& residual_shift) const {
  FixedPointConvArgs args = packed_->args;
  args.input = input.const_data_ptr();
  args.output = output.mutable_data_ptr();
  args.output_signed = output.scalar_type() == at::kChar;
  args.shift = int_pointer(shift);
  args.shift_stride = step(shift);
  if (residual.defined()) {
    args.residual = residual.const_data_ptr();
    args.residual_type = dtype_of(residual);
    args.residual_shift = int_pointer(residual_shift);
    args.residual_shift_stride = step(residual_shift);
  }
  args.n = input.size(0);
  args.h = input.size(2);
  args.w = input.size(3);
  args.oh = output.size(2);
  args.ow = output.size(3);
  // A stride past the image is that of one window; kernels size their memory by it.
  args.stride_h = std::min(args.stride_h, std::max<int64_t>(args.h + 2 * args.padding_h, 1));
  args.stride_w = std::min(args.stride_w, std::max<int64_t>(args.w + 2 * args.padding_w, 1));
#if defined(QUANTRAIN_WITH_CUDA)
  if (run_on_cuda(args, input, &cuda::fixed_point_conv2d)) return;
#endif
  const cpu::FixedPointConvKernel& kernel = *packed_->cpu;
  const cpu::FixedPointConvPlan plan = kernel.plan(args);
  parallel_for(plan.tasks, plan.grain, [&](int64_t begin, int64_t end) { kernel.run(args, plan, begin, end); });
}

std::array<int64_t, 4> FixedPointConv::output_size(at::IntArrayRef input_size) const {
  const FixedPointConvArgs& args = packed_->args;
  return {input_size[0], args.o, (input_size[2] + 2 * args.padding_h - args.kh) / args.stride_h + 1,
          (input_size[3] + 2 * args.padding_w - args.kw) / args.stride_w + 1};
}

void fixed_point_max_pool2d_out(const at::Tensor& input, at::Tensor& output, std::array<int64_t, 2> kernel_size,
                                std::array<int64_t, 2> stride, std::array<int64_t, 2> padding) {
  const FixedPointPoolArgs args = pool_args(input, output, kernel_size, stride, padding);
  run_tasks(args, args.n * args.oh, grain_of(args.ow * args.c * args.kh * args.kw, kGrainBytes), input,
            QUANTRAIN_KERNELS(fixed_point_max_pool2d));
}

void fixed_point_sum_pool2d_out(const at::Tensor& input, at::Tensor& output) {
  const FixedPointPoolArgs args = pool_args(input, output, {1, 1}, {1, 1}, {0, 0});
  run_tasks(args, args.n, grain_of(args.h * args.w * args.c, kGrainBytes), input,
            QUANTRAIN_KERNELS(fixed_point_sum_pool2d));
}

// ---- public functions -----------------------------------------------------------------------------------------------

at::Tensor fixed_point_conv2d(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                              const FixedPointConvOptions& options) {
  static const auto op = find_operator<decltype(conv2d_kernel)>(kConv);
  return op.call(input, weight, bias, symbolic(options.stride), symbolic(options.padding), options.groups);
}

at::Tensor fixed_point_conv2d_requantize(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                         const at::Tensor& shift, const OptionalTensor& residual,
                                         const OptionalTensor& residual_shift, const FixedPointConvOptions& options,
                                         bool is_signed) {
  static const auto op = find_operator<decltype(conv2d_requantize_kernel)>(kRequantize);
  return op.call(input, weight, bias, shift, residual, residual_shift, symbolic(options.stride),
                 symbolic(options.padding), options.groups, is_signed);
}

at::Tensor fixed_point_linear(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias) {
  static const auto op = find_operator<decltype(linear_kernel)>(kLinear);
  return op.call(input, weight, bias);
}

at::Tensor fixed_point_add(const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_fraction_length,
                           const at::Tensor& b_fraction_length) {
  static const auto op = find_operator<decltype(add_kernel)>(kAdd);
  return op.call(a, b, a_fraction_length, b_fraction_length);
}

at::Tensor fixed_point_max_pool2d(const at::Tensor& input, std::array<int64_t, 2> kernel_size,
                                  std::array<int64_t, 2> stride, std::array<int64_t, 2> padding) {
  static const auto op = find_operator<decltype(max_pool2d_kernel)>(kMaxPool);
  return op.call(input, kernel_size, stride, padding);
}

at::Tensor fixed_point_sum_pool2d(const at::Tensor& input) {
  static const auto op = find_operator<decltype(sum_pool2d_kernel)>(kSumPool);
  return op.call(input);
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  const std::vector<at::Tag> fixed{at::Tag::needs_exact_strides};
  m.def(
      "fixed_point_conv2d(Tensor input, Tensor weight, Tensor? bias=None, *, SymInt[2] stride=1, SymInt[2] padding=0, "
      "SymInt groups=1) -> Tensor",
      fixed);
  m.def(
      "fixed_point_conv2d_requantize(Tensor input, Tensor weight, Tensor? bias, Tensor shift, Tensor? residual=None, "
      "Tensor? residual_shift=None, *, SymInt[2] stride=1, SymInt[2] padding=0, SymInt groups=1, bool signed=False) -> "
      "Tensor",
      fixed);
  m.def("fixed_point_linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor", fixed);
  m.def("fixed_point_add(Tensor a, Tensor b, Tensor a_fraction_length, Tensor b_fraction_length) -> Tensor", fixed);
  m.def("fixed_point_max_pool2d(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding=0) -> Tensor", fixed);
  m.def("fixed_point_sum_pool2d(Tensor input) -> Tensor", fixed);
}

#define QUANTRAIN_REGISTER_FIXED_POINT_LAYERS(kind)                              \
  m.impl("fixed_point_conv2d", &quantrain::conv2d_##kind);                       \
  m.impl("fixed_point_conv2d_requantize", &quantrain::conv2d_requantize_##kind); \
  m.impl("fixed_point_linear", &quantrain::linear_##kind);                       \
  m.impl("fixed_point_add", &quantrain::add_##kind);                             \
  m.impl("fixed_point_max_pool2d", &quantrain::max_pool2d_##kind);               \
  m.impl("fixed_point_sum_pool2d", &quantrain::sum_pool2d_##kind)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_FIXED_POINT_LAYERS(kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_FIXED_POINT_LAYERS(meta); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_FIXED_POINT_LAYERS(kernel); }
#endif
