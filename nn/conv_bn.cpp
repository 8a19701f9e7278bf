#include "quantrain/nn/layers.h"

// A convolution and its batch norm. The forward passes call the same operators in the same order as the Python layer,
// so that both train alike.

#include <cmath>
#include <optional>
#include <string_view>

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>

#include "autograd/quant_conv.h"
#include "nn/layer_arguments.h"
#include "quantrain/ops/batch_norm.h"

namespace quantrain::nn {

using detail::defined_or_none;

namespace {

// Rises or is flat, so that the range of a result follows from that of its channels; and goes with a residual.
bool is_piecewise(std::string_view activation) {
  return activation == "identity" || activation == "relu" || activation == "relu6";
}

void check_activation(const std::string& activation) {
  TORCH_CHECK_VALUE(is_piecewise(activation) || activation == "hardswish" || activation == "silu",
                    "QuantConvBn2d: expected activation to be identity, relu, relu6, hardswish or silu, got '",
                    activation, "'");
}

at::Tensor activated(const at::Tensor& x, const std::string& activation) {
  if (activation == "identity") return x;
  if (activation == "relu") return at::relu(x);
  if (activation == "relu6") return at::hardtanh(x, 0.0, 6.0);
  return activation == "hardswish" ? at::hardswish(x) : at::silu(x);
}

Quantized read_by(FakeQuantize reader, const at::Tensor& y) {
  if (!reader) return {y};
  return y.dim() == 4 ? reader->with_codes(y) : Quantized{reader->forward(y)};
}

// What follows the batch norm, one after the other.
Quantized finished(const at::Tensor& y, const at::Tensor& residual, const std::string& activation,
                   const FakeQuantize& reader) {
  return read_by(reader, activated(residual.defined() ? y + residual : y, activation));
}

// What a call has to know of the fake-quantizer that reads its result, of so many elements.
void rounds_for(FakeQuantize reader, int64_t numel, ConvBatchNorm& call) {
  const QuantSpec& spec = reader->spec();
  call.quant_min = spec.quant_min();
  call.quant_max = spec.quant_max();
  call.symmetric = spec.symmetric;
  call.observes = reader->observing();
  if (!call.observes) {
    std::tie(call.scale, call.zero_point) = reader->calculate_qparams();
    if (spec.learnable) call.grad_factor = reader->grad_factor(numel);
    return;
  }
  const bool raises = spec.nan_policy == NanPolicy::kRaise, waits = !call.input.is_cuda() || !reader->has_scale();
  call.min_val = reader->observer->min_val;
  call.max_val = reader->observer->max_val;
  call.scale = reader->scale;
  call.zero_point = reader->zero_point;
  call.averaging_constant = reader->observer->averaging_constant();
  call.marks = raises && !waits;
  if (raises && waits) call.label = reader->observer->label();
}

}  // namespace

QuantConvBn2dImpl::QuantConvBn2dImpl(const torch::nn::Conv2dOptions& options, const Recipe& recipe,
                                     const torch::nn::BatchNorm2dOptions& bn_options)
    : Copied("QuantConvBn2d", options, recipe), bn_options_(bn_options) {
  TORCH_CHECK_VALUE(
      bn_options.num_features() == options.out_channels() && bn_options.affine() && bn_options.track_running_stats(),
      "QuantConvBn2d: expected an affine batch norm with running statistics over ", options.out_channels(),
      " channels, got ", bn_options.num_features(), " channels, affine ", bn_options.affine(), ", track_running_stats ",
      bn_options.track_running_stats());
  bn = register_module("bn", torch::nn::BatchNorm2d(bn_options));
}

std::shared_ptr<QuantConvBn2dImpl> QuantConvBn2dImpl::fresh() const {
  return std::make_shared<QuantConvBn2dImpl>(options_, recipe(), bn_options_);
}

void QuantConvBn2dImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  const at::Tensor count = bn ? bn->num_batches_tracked.clone() : at::Tensor();
  QuantModule::to(device, dtype, non_blocking);
  if (bn) bn->num_batches_tracked.set_data(count.to(device));
}

void QuantConvBn2dImpl::to(torch::Dtype dtype, bool non_blocking) { to(weight.device(), dtype, non_blocking); }

// The running variance as it was before the batch: a pass that is computed anew comes after the first has moved it.
const at::Tensor& QuantConvBn2dImpl::folding_variance() const {
  return in_backward() && variance_.defined() ? variance_ : bn->running_var;
}

at::Tensor QuantConvBn2dImpl::scale_factor() const {
  at::Tensor sf = bn->weight / at::sqrt(folding_variance() + bn->options.eps());
  if (is_training()) {
    sf = at::where(sf == 0, at::ones_like(sf), sf);
  }
  return sf.reshape({-1, 1, 1, 1});
}

at::Tensor QuantConvBn2dImpl::float_weight() const { return weight * scale_factor(); }

at::Tensor QuantConvBn2dImpl::float_bias() const {
  const at::Tensor shift = bias.defined() ? bn->running_mean - bias : bn->running_mean;
  return bn->bias - shift * scale_factor().flatten();
}

void QuantConvBn2dImpl::drop_float_children() {
  unregister_module("bn");
  bn = nullptr;
  variance_ = at::Tensor();
}

at::Tensor QuantConvBn2dImpl::forward(const at::Tensor& input) { return forward_act(input, {}, "identity"); }

at::Tensor QuantConvBn2dImpl::forward_act(const at::Tensor& input, const at::Tensor& residual,
                                          const std::string& activation) {
  return forward_act_quantized(quantize_input(input), residual, activation).values;
}

at::Tensor QuantConvBn2dImpl::forward_quantized(const Quantized& input) { return forward_act_quantized(input).values; }

Quantized QuantConvBn2dImpl::forward_act_quantized(const Quantized& input, const at::Tensor& residual,
                                                   const std::string& activation, const FakeQuantize& reader) {
  check_activation(activation);
  if (converted()) return finished(QuantConv2dImpl::forward_quantized(input), residual, activation, reader);
  if (!is_training()) {
    const at::Tensor y = watched(convolve(input, quantized_weight(float_weight()), float_bias()));
    return finished(quantized_output(y), residual, activation, reader);
  }
  if (runs_as_one_node(input.values, residual, activation)) return node_step(input, residual, activation, reader);
  if (!in_backward()) variance_ = bn->running_var.clone();
  const auto [folded, sf] = folded_weight();
  const at::Tensor y = watched(convolve(input, folded, {}));
  return normalized(y, sf, residual, activation, reader);
}

// The fake-quantized folded weight, and sf, [O].
std::tuple<at::Tensor, at::Tensor> QuantConvBn2dImpl::folded_weight() {
  if (folds()) {
    const QuantSpec& spec = weight_fake_quant->spec();
    return quantrain::fold_fake_quantize(weight, bn->weight, folding_variance(), bn->options.eps(), spec.quant_min(),
                                         spec.quant_max(), spec.symmetric);
  }
  at::Tensor zero;  // where gamma is 0 and counts as 1, the weight that will be folded is still 0
  if (weight_fake_quant && weight_fake_quant->spec().learnable) {
    zero = bn->weight.detach() == 0;
    zero = weight_fake_quant->scale.numel() > 1 ? zero.reshape({-1, 1, 1, 1}) : zero.all();
  }
  const at::Tensor folded = quantized_weight(float_weight(), zero);
  return {folded, scale_factor().flatten()};
}

// With a scale per channel, of the weight itself, one operator folds and rounds it.
bool QuantConvBn2dImpl::folds() const { return rounds_channels() && weight_fake_quant->dynamic(); }

// Whether the weight has a scale per channel, and no rule of its own.
bool QuantConvBn2dImpl::rounds_channels() const {
  if (!weight_fake_quant || !weight_fake_quant->fake_quant_enabled()) return false;
  const bool own_rule = recipe().scheme && recipe().scheme->has_weight_rule();
  const std::vector<int64_t> rows{weight.size(0), 1, 1, 1};
  return !own_rule && weight_fake_quant->scale_shape() == rows && weight.scalar_type() != at::kDouble &&
         weight.numel() > 0;
}

// Whether the folded weight has a learned scale per channel that has its first value.
bool QuantConvBn2dImpl::learns_channels() {
  return rounds_channels() && weight_fake_quant->spec().learnable && weight_fake_quant->spec().symmetric &&
         weight_fake_quant->has_learned();
}

// Whether batch_norm_act serves for y, the convolution's output or its input.
bool QuantConvBn2dImpl::fuses(const at::Tensor& y) const {
  return !bias.defined() && bn->options.momentum().has_value() && y.scalar_type() != at::kDouble && y.numel() > 0;
}

// Whether the step is that of conv_batch_norm: one node for what forward_act_quantized does in several.
bool QuantConvBn2dImpl::runs_as_one_node(const at::Tensor& input, const at::Tensor& residual,
                                         const std::string& activation) {
  if (!bn->is_training() || !fuses(input) || input.dim() != 4 || !(folds() || learns_channels())) return false;
  if (is_watched() || output_fake_quant || !window().padding_mode.empty() || !keeps_codes()) return false;
  if (quantizes_gradients() && !recipe().scheme->conv2d_quantizers()) return false;
  // Types that differ are the convolution's to refuse.
  if (input.scalar_type() != weight.scalar_type() && !at::autocast::is_autocast_enabled(input.device().type()))
    return false;
  if (!residual.defined()) return true;
  // What promotes or broadcasts is PyTorch's to add.
  return residual.sizes() == output_sizes(input) && residual.scalar_type() == detail::output_type(input) &&
         is_piecewise(activation);
}

std::vector<int64_t> QuantConvBn2dImpl::output_sizes(const at::Tensor& input) const {
  const Conv2dArguments window = this->window();
  std::vector<int64_t> sizes{input.size(0), weight.size(0)};
  for (const int64_t d : {0, 1}) {
    const int64_t reach = window.dilation[d] * (weight.size(d + 2) - 1) + 1;
    sizes.push_back((input.size(d + 2) + 2 * window.padding[d] - reach) / window.stride[d] + 1);
  }
  return sizes;
}

Quantized QuantConvBn2dImpl::node_step(const Quantized& input, const at::Tensor& residual,
                                       const std::string& activation, FakeQuantize reader) {
  const bool again = in_backward();
  const QuantSpec& weights = weight_fake_quant->spec();
  const Conv2dArguments window = this->window();
  ConvBatchNorm call;
  call.input = input.values.to(detail::output_type(input.values));
  call.codes = input.codes;
  call.input_scale = input.scale;
  call.input_zero_point = input.zero_point;
  call.weight = weight;
  call.stride = window.stride;
  call.padding = window.padding;
  call.dilation = window.dilation;
  call.groups = window.groups;
  if (quantizes_gradients()) std::tie(call.grad_input, call.grad_weight) = *recipe().scheme->conv2d_quantizers();
  call.weight_min = weights.quant_min();
  call.weight_max = weights.quant_max();
  call.weight_symmetric = weights.symmetric;
  if (weights.learnable) {
    call.weight_scale = std::get<0>(weight_fake_quant->calculate_qparams());
    call.weight_grad_factor = weight_fake_quant->grad_factor(weight.numel());
  }
  call.bn_weight = bn->weight;
  call.bn_bias = bn->bias;
  call.running_mean = bn->running_mean;
  call.running_var = bn->running_var;
  call.batches = bn->num_batches_tracked;
  if (again) call.folding_variance = variance_;
  call.momentum = *bn->options.momentum();
  call.eps = bn->options.eps();
  call.moves = !again;
  call.residual = residual;
  call.activation = activation;
  const bool at_once =
      reader && !residual.defined() && is_piecewise(activation) && (reader->learns_codes() || reader->takes_range());
  if (at_once) rounds_for(reader, c10::multiply_integers(output_sizes(call.input)), call);
  const ConvBatchNormResult result = conv_batch_norm(call);
  if (!again) variance_ = result.folding_variance;
  if (at_once) return {result.output, result.codes, result.scale.detach(), result.zero_point};
  return read_by(reader, result.output);
}

// Moves the running statistics, but for a pass that is computed anew, which the first has moved. Returns the range of
// the norm's output, [2], where asked for.
at::Tensor QuantConvBn2dImpl::move_statistics(const at::Tensor& statistics, const at::Tensor& y, const at::Tensor& sf,
                                              const std::string& activation, bool with_range) {
  const at::NoGradGuard no_grad;
  const bool moves = !in_backward();
  if (!moves && !with_range) return {};
  if (moves) bn->num_batches_tracked.add_(1);
  return quantrain::detail::batch_norm_update_(
      statistics, bn->weight, bn->bias, sf.detach(), moves ? std::optional(bn->running_mean) : std::nullopt,
      moves ? std::optional(bn->running_var) : std::nullopt, y.numel() / y.size(1), *bn->options.momentum(),
      bn->options.eps(), activation, with_range);
}

// activation(bn(y / sf) + residual) of the convolution's output, without the division where batch_norm_act serves.
Quantized QuantConvBn2dImpl::normalized(const at::Tensor& y, const at::Tensor& sf, const at::Tensor& residual,
                                        const std::string& activation, FakeQuantize reader) {
  if (!fuses(y)) {
    const at::Tensor divided = y / sf.reshape({-1, 1, 1});
    const at::Tensor z = bn->forward(bias.defined() ? divided + bias.reshape({-1, 1, 1}) : divided);
    return finished(quantized_output(z), residual, activation, reader);
  }
  if (y.dim() == 3) {
    const at::Tensor beside = residual.defined() ? residual.unsqueeze(0) : residual;
    return read_by(reader, normalized(y.unsqueeze(0), sf, beside, activation, nullptr).values.squeeze(0));
  }
  const bool apart = output_fake_quant ||
                     (residual.defined() && (residual.sizes() != y.sizes() ||
                                             residual.scalar_type() != y.scalar_type() || !is_piecewise(activation)));
  const std::string inner = apart ? "identity" : activation;
  // In the same pass, where the range follows from the channels' extremes.
  const bool at_once =
      reader && !apart && !residual.defined() && is_piecewise(activation) && bn->is_training() && reader->takes_range();
  const double eps = bn->options.eps();
  const std::optional<at::Tensor> other = apart ? std::nullopt : defined_or_none(residual);
  at::Tensor z;
  if (bn->is_training()) {
    const at::Tensor statistics = quantrain::detail::batch_norm_statistics(y.detach());
    const at::Tensor range = move_statistics(statistics, y, sf, inner, at_once);
    if (at_once) {
      const QuantSpec& spec = reader->spec();
      const auto [scale, zero_point] = reader->observe_range(range.narrow(0, 0, 1), range.narrow(0, 1, 1));
      const auto [values, codes] = quantrain::batch_norm_act_fake_quantize(
          y, statistics[0], statistics[1], bn->weight, bn->bias, sf, std::nullopt, scale, defined_or_none(zero_point),
          inner, eps, /*batch_statistics=*/true, spec.quant_min(), spec.quant_max());
      return {values, codes, scale, zero_point};
    }
    z = quantrain::batch_norm_act(y, statistics[0], statistics[1], bn->weight, bn->bias, sf, other, inner, eps);
  } else {  // with running statistics the division's factor is known beforehand: 1, or 0 where weight is
    const at::Tensor factor = bn->weight / at::sqrt(bn->running_var + eps);
    z = quantrain::batch_norm_act(y, at::zeros_like(bn->running_mean), at::ones_like(bn->running_var), factor / sf,
                                  bn->bias - bn->running_mean * factor, std::nullopt, other, inner, 0.0,
                                  /*batch_statistics=*/false);
  }
  return apart ? finished(quantized_output(z), residual, activation, reader) : read_by(reader, z);
}

}  // namespace quantrain::nn
