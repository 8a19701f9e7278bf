#include "quantrain/nn/layers.h"

// QuantLinear. The forward pass calls the same operators in the same order as the Python layer, so that both train
// alike.

#include <tuple>

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linear.h>
#include <c10/util/Exception.h>

#include "autograd/quant_linear.h"
#include "nn/layer_arguments.h"
#include "quantrain/ops/int8.h"
#include "quantrain/ops/quant_linear.h"

namespace quantrain::nn {

using detail::defined_or_none;

QuantLinearImpl::QuantLinearImpl(const torch::nn::LinearOptions& options, const Recipe& recipe)
    : Copied("QuantLinear", recipe, {options.out_features(), options.in_features()}, {1}) {
  reset_weight_and_bias(options.bias());
}

std::shared_ptr<QuantLinearImpl> QuantLinearImpl::fresh() const {
  return std::make_shared<QuantLinearImpl>(
      torch::nn::LinearOptions(weight_shape()[1], weight_shape()[0]).bias(has_bias()), recipe());
}

at::Tensor QuantLinearImpl::forward(const at::Tensor& input) { return forward_quantized(quantize_input(input)); }

Quantized QuantLinearImpl::quantize_input(const at::Tensor& input, const Before& before) {
  if (!input_fake_quant || multiplies_integers()) return {before(input)};
  if (!keeps_codes() || !has_known_product()) return {input_fake_quant->forward(before(input))};
  if (const std::optional<Quantized> rows = input_fake_quant->of_rows(input, before)) return *rows;
  return {input_fake_quant->forward(before(input))};
}

at::Tensor QuantLinearImpl::forward_quantized(const Quantized& input) {
  const at::Tensor& x = input.values;
  if (multiplies_integers()) return quantized_output(recipe().scheme->integer_linear(*this, x));
  if (!converted()) {
    if (runs_as_one_node(x)) return quantized_output(watched(node_step(input)));
    if (!input.codes.defined() || quantizes_gradients() || !keeps_codes())
      return quantized_output(watched(linear_product(x, quantized_weight(weight), bias)));
    return quantized_output(
        watched(quantrain::quant_linear(x, input.codes, input.scale, defined_or_none(input.zero_point),
                                        quantized_weight(weight), defined_or_none(bias))));
  }
  // The input as it comes: no simulation has to be met bit for bit (recipe w8a16).
  const bool per_row = weight_scale.numel() == 1 || weight_scale.numel() == weight_shape()[0];
  if (!recipe().input && per_row && weight_codes.scalar_type() == at::kChar)
    return quantized_output(quantrain::int8_weight_mm(x, weight_codes, weight_scale, defined_or_none(bias)));
  return quantized_output(
      at::linear(x, dequantized_weight(x.scalar_type()), bias.defined() ? bias.to(x.scalar_type()) : bias));
}

void QuantLinearImpl::share_input(const QuantLinearImpl& with) {
  const FakeQuantize& other = with.input_fake_quant;
  TORCH_CHECK_VALUE(!converted() && !with.converted(),
                    "share_input: expected layers that are not converted, got a converted one");
  TORCH_CHECK_VALUE(input_fake_quant && other,
                    "share_input: expected layers that quantize their input, got one without");
  TORCH_CHECK_VALUE(input_fake_quant->spec() == other->spec(), "share_input: expected one spec of the input, got two");
  TORCH_CHECK_VALUE(!other->spec().learnable, "share_input: expected a scale that is not learned, got a learned one");
  input_fake_quant = replace_module("input_fake_quant", other);
}

// Whether the scheme's product, if it has one, is that of a node that takes codes.
bool QuantLinearImpl::has_known_product() const {
  return !quantizes_gradients() || recipe().scheme->linear_quantizers().has_value();
}

// Whether the training step is that of quant_linear's node, which rounds the weight anew in its backward pass.
bool QuantLinearImpl::runs_as_one_node(const at::Tensor& x) const {
  if (!is_training() || !at::GradMode::is_enabled() || !keeps_codes() || !has_known_product()) return false;
  if (!weight_fake_quant || !weight_fake_quant->rounds_rows()) return false;
  if (recipe().scheme && recipe().scheme->has_weight_rule()) return false;
  if (weight_fake_quant->scale_shape()[0] != weight.size(0)) return false;
  if (x.dim() < 2 || x.numel() == 0 || weight.numel() == 0 || x.size(-1) != weight.size(1)) return false;
  const at::ScalarType type = detail::output_type(x);
  if (type != at::kFloat && type != at::kHalf && type != at::kBFloat16) return false;
  const bool autocast = at::autocast::is_autocast_enabled(x.device().type());
  return weight.scalar_type() == type || (autocast && weight.scalar_type() == at::kFloat);
}

at::Tensor QuantLinearImpl::node_step(const Quantized& input) {
  const QuantSpec& weights = weight_fake_quant->spec();
  quantrain::QuantLinear call;
  call.input = input.values.to(detail::output_type(input.values));
  call.codes = input.codes;
  call.input_scale = input.scale;
  call.input_zero_point = input.zero_point;
  call.weight = weight;
  call.weight_groups = weight_fake_quant->scale_shape()[1];
  call.weight_min = weights.quant_min();
  call.weight_max = weights.quant_max();
  call.bias = bias;
  if (quantizes_gradients()) std::tie(call.grad_input, call.grad_weight) = *recipe().scheme->linear_quantizers();
  return quantrain::quant_linear(call);
}

}  // namespace quantrain::nn
