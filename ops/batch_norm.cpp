#include "quantrain/ops/batch_norm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>

#include "csrc/cpu/batch_norm.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/fake_quant_check.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/batch_norm.h"
#endif

// Batch norm in training: its statistics, its result and its gradients.

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int64_t kRowsOfPart = 256;   // on the CPU: elements that a sum goes over in float32
constexpr int64_t kBlocks = 8 * 132;   // on a GPU: of an H200's multiprocessors, several
constexpr int64_t kMostParts = 65535;  // a grid's second dimension
constexpr int64_t kLeastOfPart = 64;   // rows that are worth a thread block

Activation activation_named(std::string_view op, std::string_view name) {
  if (name == "identity") return Activation::kIdentity;
  if (name == "relu") return Activation::kRelu;
  if (name == "relu6") return Activation::kRelu6;
  if (name == "hardswish") return Activation::kHardswish;
  QUANTRAIN_CHECK_VALUE(name == "silu",
                        "{}: expected activation to be identity, relu, relu6, hardswish or silu, got '{}'", op, name);
  return Activation::kSilu;
}

// ---- shapes, shared with Meta ---------------------------------------------------------------------------------------

void check_batch(std::string_view op, const at::Tensor& input) {
  detail::check_dense(op, "input", input);
  detail::check_float(op, "input", input.scalar_type());
  QUANTRAIN_CHECK_VALUE(input.dim() >= 2, "{}: expected input [N, C, ...], got {}", op, detail::shape_text(input));
}

void check_channels(std::string_view op, std::string_view name, const OptionalTensor& tensor, const at::Tensor& input,
                    const c10::SymInt& channels) {
  if (!tensor) return;
  QUANTRAIN_CHECK_TYPE(tensor->is_floating_point(), "{}: expected {} of a floating type, got {}", op, name,
                       c10::toString(tensor->scalar_type()));
  detail::check_device(op, name, *tensor, input, "input's");
  QUANTRAIN_CHECK_VALUE(tensor->dim() == 1 && TORCH_GUARD_OR_TRUE(tensor->sym_size(0).sym_eq(channels)),
                        "{}: expected {} of one element per channel, got {} for an input of {}", op, name,
                        detail::shape_text(*tensor), detail::shape_text(input));
}

void check_same(std::string_view op, std::string_view name, const at::Tensor& tensor, const at::Tensor& input) {
  QUANTRAIN_CHECK_TYPE(tensor.scalar_type() == input.scalar_type(), "{}: expected {} of input's type {}, got {}", op,
                       name, c10::toString(input.scalar_type()), c10::toString(tensor.scalar_type()));
  detail::check_device(op, name, tensor, input, "input's");
  bool same = tensor.dim() == input.dim();
  for (int64_t d = 0; same && d < input.dim(); ++d)
    same = TORCH_GUARD_OR_TRUE(tensor.sym_size(d).sym_eq(input.sym_size(d)));
  QUANTRAIN_CHECK_VALUE(same, "{}: expected {} of input's shape {}, got {}", op, name, detail::shape_text(input),
                        detail::shape_text(tensor));
}

at::Tensor floats(const at::Tensor& like, c10::SymIntArrayRef shape) {
  return at::empty_symint(shape, like.options().dtype(at::kFloat));
}

at::Tensor batch_norm_statistics_meta(const at::Tensor& input) {
  constexpr std::string_view kOp = "_batch_norm_statistics";
  check_batch(kOp, input);
  QUANTRAIN_CHECK_VALUE(input.sym_numel() > 0, "{}: expected input with at least one element, got shape {}", kOp,
                        detail::shape_text(input));
  return floats(input, {4, input.sym_size(1)});
}

at::Tensor batch_norm_update_meta(const at::Tensor& statistics, const OptionalTensor& weight,
                                  const OptionalTensor& bias, const OptionalTensor& conv_scale,
                                  const OptionalTensor& running_mean, const OptionalTensor& running_var, int64_t count,
                                  double, double, std::string_view activation, bool range) {
  constexpr std::string_view kOp = "_batch_norm_update_";
  detail::check_type(kOp, "statistics", statistics, at::kFloat, "float32");
  QUANTRAIN_CHECK_VALUE(statistics.dim() == 2 && TORCH_GUARD_OR_TRUE(statistics.sym_size(0).sym_eq(4)),
                        "{}: expected statistics [4, C], got {}", kOp, detail::shape_text(statistics));
  const c10::SymInt channels = statistics.sym_size(1);
  check_channels(kOp, "weight", weight, statistics, channels);
  check_channels(kOp, "bias", bias, statistics, channels);
  check_channels(kOp, "conv_scale", conv_scale, statistics, channels);
  check_channels(kOp, "running_mean", running_mean, statistics, channels);
  check_channels(kOp, "running_var", running_var, statistics, channels);
  QUANTRAIN_CHECK_VALUE(running_mean.has_value() == running_var.has_value(),
                        "{}: expected running_mean and running_var, or neither, got one", kOp);
  QUANTRAIN_CHECK_VALUE(count >= 1, "{}: expected count >= 1, got {}", kOp, count);
  QUANTRAIN_CHECK_VALUE(!range || is_piecewise(activation_named(kOp, activation)),
                        "{}: expected an activation that rises (identity, relu, relu6) for its range, got '{}'", kOp,
                        activation);
  return floats(statistics, {range ? 2 : 0});
}

struct Channels {
  const OptionalTensor& mean;
  const OptionalTensor& variance;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& conv_scale;
};

void check_norm(std::string_view op, const at::Tensor& input, const Channels& given, const OptionalTensor& residual,
                Activation activation) {
  check_batch(op, input);
  const c10::SymInt channels = input.sym_size(1);
  QUANTRAIN_CHECK_VALUE(given.mean.has_value() == given.variance.has_value(),
                        "{}: expected mean and variance, or neither, got one", op);
  if (given.mean) {
    detail::check_type(op, "mean", *given.mean, at::kFloat, "float32");
    detail::check_type(op, "variance", *given.variance, at::kFloat, "float32");
  }
  check_channels(op, "mean", given.mean, input, channels);
  check_channels(op, "variance", given.variance, input, channels);
  check_channels(op, "weight", given.weight, input, channels);
  check_channels(op, "bias", given.bias, input, channels);
  check_channels(op, "conv_scale", given.conv_scale, input, channels);
  if (!residual) return;
  check_same(op, "residual", *residual, input);
  QUANTRAIN_CHECK_VALUE(is_piecewise(activation),
                        "{}: expected activation identity, relu or relu6 beside a residual, got {}", op,
                        activation == Activation::kSilu ? "silu" : "hardswish");
}

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// output, codes ([0] where nothing is quantized), mask ([0] where it is not asked for).
Forward batch_norm_forward_meta(const at::Tensor& input, const OptionalTensor& mean, const OptionalTensor& variance,
                                const OptionalTensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& conv_scale, const OptionalTensor& residual,
                                const OptionalTensor& scale, const OptionalTensor& zero_point,
                                std::string_view activation, double, int64_t quant_min, int64_t quant_max,
                                bool with_mask) {
  const std::string_view op = scale ? "batch_norm_act_fake_quantize" : "batch_norm_act";
  const Activation act = activation_named(op, activation);
  check_norm(op, input, {mean, variance, weight, bias, conv_scale}, residual, act);
  const at::ScalarType code_type = quant_min < 0 ? at::kChar : at::kByte;
  at::Tensor codes = at::empty({0}, input.options().dtype(code_type));
  if (scale) {
    check_range(op, quant_min, quant_max);
    QUANTRAIN_CHECK_VALUE(quant_min >= 0 ? quant_max <= 255 : quant_min >= -128 && quant_max <= 127,
                          "{}: expected codes of at most 8 bits, got {} to {}", op, quant_min, quant_max);
    check_qparams(op, input, *scale, zero_point);
    QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(scale->sym_numel().sym_eq(1)),
                          "{}: expected one scale for the tensor, got {}", op, detail::shape_text(*scale));
    QUANTRAIN_CHECK_VALUE(is_piecewise(act), "{}: expected activation identity, relu or relu6, got '{}'", op,
                          activation);
    codes = empty_regular(input, code_type);
  }
  return {empty_regular(input, input.scalar_type()), codes,
          with_mask ? allocate_mask(input) : at::empty({0}, input.options().dtype(at::kByte))};
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Of input, residual ([0] where there is none), weight, bias, conv_scale, and of a learned scale what each channel adds
// ([0] where none is given).
Gradients batch_norm_backward_meta(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mask,
                                   const at::Tensor& mean, const at::Tensor& variance, const OptionalTensor& weight,
                                   const OptionalTensor& bias, const OptionalTensor& conv_scale,
                                   std::string_view activation, double, bool, bool with_residual,
                                   const OptionalTensor& scale, const OptionalTensor& zero_point, int64_t quant_min,
                                   int64_t quant_max) {
  constexpr std::string_view kOp = "_batch_norm_backward";
  const Activation act = activation_named(kOp, activation);
  if (scale) {
    check_range(kOp, quant_min, quant_max);
    check_qparams(kOp, input, *scale, zero_point);
    QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(scale->sym_numel().sym_eq(1)),
                          "{}: expected one scale for the tensor, got {}", kOp, detail::shape_text(*scale));
    QUANTRAIN_CHECK_VALUE(
        is_piecewise(act) && !with_residual,
        "{}: expected a learned scale without a residual and with identity, relu or relu6, got '{}'{}", kOp, activation,
        with_residual ? " and a residual" : "");
  }
  const OptionalTensor means = mean, variances = variance;
  check_norm(kOp, input, {means, variances, weight, bias, conv_scale}, std::nullopt, act);
  check_same(kOp, "grad_output", grad_output, input);
  detail::check_type(kOp, "mask", mask, at::kByte, "uint8");
  detail::check_device(kOp, "mask", mask, input, "input's");
  const c10::SymInt bytes = (input.sym_numel() + 7) / 8;
  QUANTRAIN_CHECK_VALUE(mask.dim() == 1 && (TORCH_GUARD_OR_FALSE(mask.sym_numel().sym_eq(0)) ||
                                            TORCH_GUARD_OR_TRUE(mask.sym_numel().sym_eq(bytes))),
                        "{}: expected mask of one bit per element of input {}, or empty, got {}", kOp,
                        detail::shape_text(input), detail::shape_text(mask));
  const auto per_channel = [&] { return floats(input, {input.sym_size(1)}); };
  const at::ScalarType type = input.scalar_type();
  return {empty_regular(input, type),
          with_residual ? empty_regular(input, type) : at::empty({0}, input.options()),
          per_channel(),
          per_channel(),
          per_channel(),
          scale ? per_channel() : floats(input, {0})};
}

// ---- CPU and CUDA ---------------------------------------------------------------------------------------------------

ChannelLayout layout_of(const at::Tensor& input) {
  const int64_t channels = input.size(1), pixels = input.numel() / std::max<int64_t>(input.size(0) * channels, 1);
  if (input.is_contiguous()) return {input.size(0), channels, pixels};
  return {input.size(0) * pixels, channels, 1};
}

// How many parts the sums over a channel go in: by the shape alone.
int64_t parts_of(const ChannelLayout& l, bool on_cuda) {
  const int64_t rows = l.inner == 1 ? 1 : l.inner;  // elements of a channel in one of `outer`
  if (!on_cuda) return std::clamp<int64_t>(l.per_channel() / (kRowsOfPart * 4), 1, l.outer);
  const int64_t blocks = l.inner == 1 ? (l.channels + 255) / 256 : l.channels;
  const int64_t most = std::min(l.outer, std::max<int64_t>(l.per_channel() / (kLeastOfPart * rows), 1));
  return std::clamp<int64_t>(kBlocks / blocks, 1, std::min(most, kMostParts));
}

OptionalTensor as_floats(const OptionalTensor& tensor) {
  if (!tensor) return tensor;
  return tensor->to(at::kFloat).contiguous();
}

// The parameters of the channels in float32, and what the kernels take of them.
struct Parameters {
  OptionalTensor mean, variance, weight, bias, conv_scale;
  double eps;

  Parameters(const Channels& given, double epsilon)
      : mean(as_floats(given.mean)),
        variance(as_floats(given.variance)),
        weight(as_floats(given.weight)),
        bias(as_floats(given.bias)),
        conv_scale(as_floats(given.conv_scale)),
        eps(epsilon) {}

  BatchNormParams pointers() const {
    const auto pointer = [](const OptionalTensor& t) { return t ? t->const_data_ptr<float>() : nullptr; };
    return {pointer(mean), pointer(variance),   pointer(weight),
            pointer(bias), pointer(conv_scale), static_cast<float>(eps)};
  }
};

at::Tensor batch_norm_statistics_kernel(const at::Tensor& given) {
  at::Tensor statistics = batch_norm_statistics_meta(given);
  const at::Tensor input = regular(given);
  const ChannelLayout layout = layout_of(input);
  const int64_t parts = parts_of(layout, input.is_cuda());
  const at::Tensor partial = at::empty({parts, 4, layout.channels}, statistics.options());
  const BatchNormStatisticsArgs args{input.const_data_ptr(), partial.mutable_data_ptr<float>(), dtype_of(input), layout,
                                     parts};
  run_tasks(args, parts, 1, input, QUANTRAIN_KERNELS(batch_norm_statistics));
  const BatchNormFoldArgs fold{input.const_data_ptr(),
                               partial.const_data_ptr<float>(),
                               statistics.mutable_data_ptr<float>(),
                               dtype_of(input),
                               layout,
                               parts};
  run_tasks(fold, layout.channels, grain_of(parts * 4), input, QUANTRAIN_KERNELS(batch_norm_fold));
  return statistics;
}

at::Tensor batch_norm_update_kernel(const at::Tensor& given, const OptionalTensor& weight, const OptionalTensor& bias,
                                    const OptionalTensor& conv_scale, const OptionalTensor& running_mean,
                                    const OptionalTensor& running_var, int64_t count, double momentum, double eps,
                                    std::string_view activation, bool range) {
  at::Tensor result = batch_norm_update_meta(given, weight, bias, conv_scale, running_mean, running_var, count,
                                             momentum, eps, activation, range);
  const at::Tensor statistics = given.contiguous();
  const OptionalTensor means = statistics[0], variances = statistics[1];
  const Parameters params({means, variances, weight, bias, conv_scale}, eps);
  at::Tensor mean, variance;
  if (running_mean) {
    mean = running_mean->to(at::kFloat).contiguous();
    variance = running_var->to(at::kFloat).contiguous();
  }
  const BatchNormUpdateArgs args{statistics.const_data_ptr<float>(),
                                 params.pointers(),
                                 running_mean ? mean.mutable_data_ptr<float>() : nullptr,
                                 running_mean ? variance.mutable_data_ptr<float>() : nullptr,
                                 range ? result.mutable_data_ptr<float>() : nullptr,
                                 statistics.size(1),
                                 count,
                                 static_cast<float>(momentum),
                                 activation_named("_batch_norm_update_", activation)};
  run_tasks(args, 1, 1, statistics, QUANTRAIN_KERNELS(batch_norm_update));
  if (running_mean) {
    if (!mean.is_same(*running_mean)) running_mean->copy_(mean);
    if (!variance.is_same(*running_var)) running_var->copy_(variance);
  }
  return result;
}

Forward batch_norm_forward_kernel(const at::Tensor& given, const OptionalTensor& mean, const OptionalTensor& variance,
                                  const OptionalTensor& weight, const OptionalTensor& bias,
                                  const OptionalTensor& conv_scale, const OptionalTensor& given_residual,
                                  const OptionalTensor& scale, const OptionalTensor& zero_point,
                                  std::string_view activation, double eps, int64_t quant_min, int64_t quant_max,
                                  bool with_mask) {
  auto [output, codes, mask] =
      batch_norm_forward_meta(given, mean, variance, weight, bias, conv_scale, given_residual, scale, zero_point,
                              activation, eps, quant_min, quant_max, with_mask);
  if (scale && scale->is_cpu())
    check_qparam_values("batch_norm_act_fake_quantize", *scale, zero_point, quant_min, quant_max);
  if (given.numel() == 0) return {output, codes, mask};
  const at::Tensor input = strided_as(given, output);
  const at::Tensor residual = given_residual ? strided_as(*given_residual, output) : at::Tensor();
  const Parameters params({mean, variance, weight, bias, conv_scale}, eps);
  const OptionalTensor scales = as_floats(scale);
  const OptionalTensor points = zero_point ? OptionalTensor(as_int32(*zero_point).contiguous()) : zero_point;
  const BatchNormApplyArgs args{input.const_data_ptr(),
                                residual.defined() ? residual.const_data_ptr() : nullptr,
                                output.mutable_data_ptr(),
                                scale ? codes.mutable_data_ptr() : nullptr,
                                with_mask ? mask.mutable_data_ptr<uint8_t>() : nullptr,
                                dtype_of(input),
                                layout_of(input),
                                params.pointers(),
                                activation_named("batch_norm_act", activation),
                                {scales ? scales->const_data_ptr<float>() : nullptr,
                                 points ? points->const_data_ptr<int32_t>() : nullptr, nullptr},
                                scale ? make_range(quant_min, quant_max) : QuantRange{}};
  run_elementwise(args, output, QUANTRAIN_KERNELS(batch_norm_apply));
  return {output, codes, mask};
}

Gradients batch_norm_backward_kernel(const at::Tensor& given_grad, const at::Tensor& given, const at::Tensor& mask,
                                     const at::Tensor& mean, const at::Tensor& variance, const OptionalTensor& weight,
                                     const OptionalTensor& bias, const OptionalTensor& conv_scale,
                                     std::string_view activation, double eps, bool batch_statistics, bool with_residual,
                                     const OptionalTensor& scale, const OptionalTensor& zero_point, int64_t quant_min,
                                     int64_t quant_max) {
  auto [grad_input, grad_residual, grad_weight, grad_bias, grad_scale, grad_step] =
      batch_norm_backward_meta(given_grad, given, mask, mean, variance, weight, bias, conv_scale, activation, eps,
                               batch_statistics, with_residual, scale, zero_point, quant_min, quant_max);
  if (given.numel() == 0) {
    for (const at::Tensor& gradient : {grad_weight, grad_bias, grad_scale, grad_step}) gradient.zero_();
    return {grad_input, grad_residual, grad_weight, grad_bias, grad_scale, grad_step};
  }
  const at::Tensor input = strided_as(given, grad_input), grad_output = strided_as(given_grad, grad_input);
  const at::Tensor bits = mask.contiguous();
  const OptionalTensor means = mean, variances = variance;
  const Parameters params({means, variances, weight, bias, conv_scale}, eps);
  const Activation act = activation_named("_batch_norm_backward", activation);
  const Activation left =
      is_piecewise(act) && mask.numel() > 0 ? Activation::kIdentity : act;  // what the mask does not say
  const OptionalTensor scales = as_floats(scale);
  const OptionalTensor points = zero_point ? OptionalTensor(as_int32(*zero_point).contiguous()) : zero_point;
  const QParamTensors qparams{scales ? scales->const_data_ptr<float>() : nullptr,
                              points ? points->const_data_ptr<int32_t>() : nullptr, nullptr};
  const ChannelLayout layout = layout_of(input);
  const int64_t parts = parts_of(layout, input.is_cuda());
  const at::Tensor partial = at::empty({parts, scale ? 3 : 2, layout.channels}, grad_weight.options());
  const at::Tensor terms = at::empty({2, layout.channels}, grad_weight.options());
  const uint8_t* mask_pointer = mask.numel() > 0 ? bits.const_data_ptr<uint8_t>() : nullptr;
  const BatchNormReduceArgs reduce{input.const_data_ptr(),
                                   grad_output.const_data_ptr(),
                                   mask_pointer,
                                   with_residual ? grad_residual.mutable_data_ptr() : nullptr,
                                   partial.mutable_data_ptr<float>(),
                                   dtype_of(input),
                                   layout,
                                   params.pointers(),
                                   scale ? act : left,
                                   parts,
                                   scale.has_value(),
                                   qparams,
                                   scale ? make_range(quant_min, quant_max) : QuantRange{}};
  run_tasks(reduce, parts, 1, input, QUANTRAIN_KERNELS(batch_norm_reduce));
  const BatchNormGradientArgs sums{partial.const_data_ptr<float>(),
                                   grad_weight.mutable_data_ptr<float>(),
                                   grad_bias.mutable_data_ptr<float>(),
                                   grad_scale.mutable_data_ptr<float>(),
                                   scale ? grad_step.mutable_data_ptr<float>() : nullptr,
                                   terms.mutable_data_ptr<float>(),
                                   params.pointers(),
                                   layout.channels,
                                   layout.per_channel(),
                                   parts,
                                   batch_statistics};
  run_tasks(sums, layout.channels, grain_of(parts * 2), input, QUANTRAIN_KERNELS(batch_norm_gradients));
  // The residual's gradient is what the mask lets through already.
  const BatchNormBackwardArgs args{input.const_data_ptr(),
                                   with_residual ? grad_residual.const_data_ptr() : grad_output.const_data_ptr(),
                                   with_residual ? nullptr : mask_pointer,
                                   terms.const_data_ptr<float>(),
                                   grad_input.mutable_data_ptr(),
                                   dtype_of(input),
                                   layout,
                                   params.pointers(),
                                   with_residual ? Activation::kIdentity : left};
  run_elementwise(args, grad_input, QUANTRAIN_KERNELS(batch_norm_backward));
  return {grad_input, grad_residual, grad_weight, grad_bias, grad_scale, grad_step};
}

// Where no gradient is needed.
at::Tensor batch_norm_act_kernel(const at::Tensor& input, const at::Tensor& mean, const at::Tensor& variance,
                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& conv_scale, const OptionalTensor& residual,
                                 std::string_view activation, double eps, bool) {
  static const auto op = find_operator<decltype(batch_norm_forward_kernel)>("_batch_norm_forward");
  return std::get<0>(op.call(input, mean, variance, weight, bias, conv_scale, residual, std::nullopt, std::nullopt,
                             activation, eps, -128, 127, false));
}

std::tuple<at::Tensor, at::Tensor> batch_norm_act_fake_quantize_kernel(
    const at::Tensor& input, const at::Tensor& mean, const at::Tensor& variance, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& conv_scale, const OptionalTensor& residual,
    const at::Tensor& scale, const OptionalTensor& zero_point, std::string_view activation, double eps, bool,
    int64_t quant_min, int64_t quant_max) {
  static const auto op = find_operator<decltype(batch_norm_forward_kernel)>("_batch_norm_forward");
  auto [output, codes, mask] = op.call(input, mean, variance, weight, bias, conv_scale, residual, scale, zero_point,
                                       activation, eps, quant_min, quant_max, false);
  return {output, codes};
}

}  // namespace

// ---- public functions -----------------------------------------------------------------------------------------------

at::Tensor batch_norm_act(const at::Tensor& input, const at::Tensor& mean, const at::Tensor& variance,
                          const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                          const std::optional<at::Tensor>& conv_scale, const std::optional<at::Tensor>& residual,
                          std::string_view activation, double eps, bool batch_statistics) {
  static const auto op = find_operator<decltype(batch_norm_act_kernel)>("batch_norm_act");
  return op.call(input, mean, variance, weight, bias, conv_scale, residual, activation, eps, batch_statistics);
}

std::tuple<at::Tensor, at::Tensor> batch_norm_act_fake_quantize(
    const at::Tensor& input, const at::Tensor& mean, const at::Tensor& variance,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& conv_scale, const std::optional<at::Tensor>& residual, const at::Tensor& scale,
    const std::optional<at::Tensor>& zero_point, std::string_view activation, double eps, bool batch_statistics,
    int64_t quant_min, int64_t quant_max) {
  static const auto op = find_operator<decltype(batch_norm_act_fake_quantize_kernel)>("batch_norm_act_fake_quantize");
  return op.call(input, mean, variance, weight, bias, conv_scale, residual, scale, zero_point, activation, eps,
                 batch_statistics, quant_min, quant_max);
}

namespace detail {

at::Tensor batch_norm_statistics(const at::Tensor& input) {
  static const auto op = find_operator<decltype(batch_norm_statistics_kernel)>("_batch_norm_statistics");
  return op.call(input);
}

at::Tensor batch_norm_update_(const at::Tensor& statistics, const std::optional<at::Tensor>& weight,
                              const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& conv_scale,
                              const std::optional<at::Tensor>& running_mean,
                              const std::optional<at::Tensor>& running_var, int64_t count, double momentum, double eps,
                              std::string_view activation, bool range) {
  static const auto op = find_operator<decltype(batch_norm_update_kernel)>("_batch_norm_update_");
  return op.call(statistics, weight, bias, conv_scale, running_mean, running_var, count, momentum, eps, activation,
                 range);
}

}  // namespace detail
}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  m.def(
      "batch_norm_act(Tensor input, Tensor mean, Tensor variance, Tensor? weight=None, Tensor? bias=None, Tensor? "
      "conv_scale=None, Tensor? residual=None, *, str activation=\"identity\", float eps=1e-05, bool "
      "batch_statistics=True) -> Tensor");
  m.def(
      "batch_norm_act_fake_quantize(Tensor input, Tensor mean, Tensor variance, Tensor? weight, Tensor? bias, Tensor? "
      "conv_scale, Tensor? residual, Tensor scale, Tensor? zero_point=None, *, str activation=\"identity\", float "
      "eps=1e-05, bool batch_statistics=True, int quant_min=-128, int quant_max=127) -> (Tensor output, Tensor codes)");
  m.def("_batch_norm_statistics(Tensor input) -> Tensor");
  m.def(
      "_batch_norm_update_(Tensor statistics, Tensor? weight, Tensor? bias, Tensor? conv_scale, Tensor(a!)? "
      "running_mean, Tensor(b!)? running_var, *, int count, float momentum, float eps, str activation=\"identity\", "
      "bool range=False) -> Tensor");
  // The mask is in the order of memory: a compiler must keep the strides that it was traced with.
  m.def(
      "_batch_norm_forward(Tensor input, Tensor? mean, Tensor? variance, Tensor? weight, Tensor? bias, Tensor? "
      "conv_scale, Tensor? residual, Tensor? scale, Tensor? zero_point, str activation, float eps, int quant_min, int "
      "quant_max, bool with_mask) -> (Tensor output, Tensor codes, Tensor mask)",
      {at::Tag::needs_exact_strides});
  m.def(
      "_batch_norm_backward(Tensor grad_output, Tensor input, Tensor mask, Tensor mean, Tensor variance, Tensor? "
      "weight, Tensor? bias, Tensor? conv_scale, str activation, float eps, bool batch_statistics, bool with_residual, "
      "Tensor? scale=None, Tensor? zero_point=None, int quant_min=-128, int quant_max=127) -> (Tensor grad_input, "
      "Tensor grad_residual, Tensor grad_weight, Tensor grad_bias, Tensor grad_conv_scale, Tensor grad_scale)",
      {at::Tag::needs_exact_strides});
}

#define QUANTRAIN_REGISTER_BATCH_NORM(kind)                                   \
  m.impl("_batch_norm_statistics", &quantrain::batch_norm_statistics_##kind); \
  m.impl("_batch_norm_update_", &quantrain::batch_norm_update_##kind);        \
  m.impl("_batch_norm_forward", &quantrain::batch_norm_forward_##kind);       \
  m.impl("_batch_norm_backward", &quantrain::batch_norm_backward_##kind)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_BATCH_NORM(kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_BATCH_NORM(meta); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_BATCH_NORM(kernel); }
#endif
// They call operators that have a kernel for each device, and Meta.
TORCH_LIBRARY_IMPL(quantrain, CompositeExplicitAutograd, m) {
  m.impl("batch_norm_act", &quantrain::batch_norm_act_kernel);
  m.impl("batch_norm_act_fake_quantize", &quantrain::batch_norm_act_fake_quantize_kernel);
}
