#include "autograd/quant_linear.h"

#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/gradient_quantizer.h"
#include "autograd/kept_codes.h"
#include "autograd/node.h"
#include "autograd/second_derivative.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/norm_act_operators.h"
#include "ops/quant_linear_check.h"
#include "quantrain/ops/norm_act.h"
#include "quantrain/ops/quant_linear.h"

// Gradients of quant_linear: PyTorch's products, of an input that is decoded from its codes.

namespace quantrain {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;

OptionalTensor given(const at::Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

at::Tensor weight_gradient(const at::Tensor& grad_output, const at::Tensor& input) {
  return matrix(grad_output).t().mm(matrix(input));
}

struct QuantLinearFunction : torch::autograd::Function<QuantLinearFunction> {
  static constexpr bool is_traceable = true;

  // An absent tensor has no place among those that needs_input_grad counts, so they stand last.
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& weight, const Variable& codes,
                          const Variable& scale, const OptionalTensor& bias, const OptionalTensor& zero_point,
                          int64_t groups, int64_t weight_min, int64_t weight_max) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["weight_min"] = weight_min;
    ctx->saved_data["weight_max"] = weight_max;
    ctx->saved_data["weight_type"] = weight.scalar_type();
    ctx->save_for_backward(
        {codes, scale, zero_point.value_or(at::Tensor()), input.requires_grad() ? weight : at::Tensor()});
    ctx->saved_data["type"] = input.scalar_type();
    ctx->saved_data["has_bias"] = bias.has_value();
    return at::linear(input, rounded_weight(weight, groups, weight_min, weight_max, input.scalar_type()), bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const Variable& grad_output = grad_outputs[0];
    variable_list gradients(9);
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      auto& data = ctx->saved_data;
      const at::ScalarType type = data["type"].toScalarType();
      if (ctx->needs_input_grad(0))
        gradients[0] =
            at::matmul(grad_output, rounded_weight(saved[3], data["groups"].toInt(), data["weight_min"].toInt(),
                                                   data["weight_max"].toInt(), type));
      if (ctx->needs_input_grad(1))
        gradients[1] = in_type(weight_gradient(grad_output, decoded(saved[0], saved[1], saved[2], type, true)),
                               data["weight_type"].toScalarType());
      if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(4)) gradients[4] = matrix(grad_output).sum(0);
    }
    refuse_second_derivative(gradients, grad_output, "quant_linear");
    return gradients;
  }
};

// ---- a layer's training step ----------------------------------------------------------------------------------------

struct QuantLinearStepFunction : torch::autograd::Function<QuantLinearStepFunction> {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& weight,
                          const OptionalTensor& bias, const QuantLinear& call) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::ScalarType type = input.scalar_type();
    auto& data = ctx->saved_data;
    data["packing"] = packing_of(call.codes, call.packs_codes);
    data["weight_type"] = weight.scalar_type();
    // The weight for the input's gradient alone: without one it may change before the backward pass.
    const bool of_input = input.requires_grad();
    ctx->save_for_backward({call.codes.defined() ? packed(call.codes, call.packs_codes) : input, call.input_scale,
                            call.input_zero_point, of_input ? weight : at::Tensor(),
                            of_input ? call.rounded : at::Tensor()});
    data["type"] = type;
    data["coded"] = call.codes.defined();
    data["groups"] = call.weight_groups;
    data["weight_min"] = call.weight_min;
    data["weight_max"] = call.weight_max;
    data["has_bias"] = bias.has_value();
    if (bias) data["bias_type"] = bias->scalar_type();
    save_gradient_quantizer(ctx, "grad_input", call.grad_input);
    save_gradient_quantizer(ctx, "grad_weight", call.grad_weight);
    const at::Tensor rounded = call.rounded.defined()
                                   ? call.rounded
                                   : rounded_weight(weight, call.weight_groups, call.weight_min, call.weight_max, type);
    return at::linear(input, rounded, bias ? OptionalTensor(in_type(*bias, type)) : bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor& weight = saved[3];
    auto& data = ctx->saved_data;
    variable_list gradients(4);
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      const at::ScalarType type = data["type"].toScalarType();
      const at::Tensor grad_output = in_type(grad_outputs[0], type);
      const GradientQuantizer for_input = saved_gradient_quantizer(ctx, "grad_input"),
                              for_weight = saved_gradient_quantizer(ctx, "grad_weight");
      const bool of_input = ctx->needs_input_grad(0), of_weight = ctx->needs_input_grad(1);
      at::Tensor by_input, by_weight;
      if (of_input && of_weight)
        std::tie(by_input, by_weight) = quantized_gradients(grad_output, for_input, for_weight);
      else if (of_input || of_weight)
        (of_input ? by_input : by_weight) = quantized_gradient(grad_output, of_input ? for_input : for_weight);
      if (of_input) {
        const at::Tensor rounded = saved[4].defined()
                                       ? saved[4]
                                       : rounded_weight(weight, data["groups"].toInt(), data["weight_min"].toInt(),
                                                        data["weight_max"].toInt(), type);
        gradients[0] = at::matmul(by_input, rounded);
        by_input.reset();
      }
      if (of_weight) {
        const at::Tensor input = data["coded"].toBool()
                                     ? decoded(unpacked(saved[0], data["packing"]), saved[1], saved[2], type, true)
                                     : saved[0];
        gradients[1] = in_type(weight_gradient(by_weight, input), data["weight_type"].toScalarType());
      }
      if (data["has_bias"].toBool() && ctx->needs_input_grad(2))
        gradients[2] = in_type(matrix(grad_output).sum(0), data["bias_type"].toScalarType());
    }
    refuse_second_derivative(gradients, grad_outputs[0], "quant_linear");
    return gradients;
  }
};

at::Tensor quant_linear_autograd(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                                 const OptionalTensor& zero_point, const at::Tensor& weight, const OptionalTensor& bias,
                                 int64_t weight_groups, int64_t weight_min, int64_t weight_max) {
  check_quant_linear(input, codes, scale, zero_point, weight, bias, weight_groups, weight_min, weight_max);
  refuse_transforms("quant_linear", {input, weight, bias ? *bias : weight});
  if (needs_grad(input) || needs_grad(weight) || (bias && needs_grad(*bias)))
    return QuantLinearFunction::apply(input, weight, codes, scale, bias, zero_point, weight_groups, weight_min,
                                      weight_max);
  const at::AutoDispatchBelowADInplaceOrView below;
  return quant_linear(input, codes, scale, zero_point, weight, bias, weight_groups, weight_min, weight_max);
}

}  // namespace

RoundedRows round_rows(const RowRounding& call) {
  const OptionalTensor other = given(call.other), weight = given(call.weight), bias = given(call.bias);
  if (call.dynamic) {
    auto [values, codes, scale, zero_point] =
        norm_act_fake_quantize_dynamic(call.input, call.function, other, weight, bias, call.eps, call.quant_min,
                                       call.quant_max, call.symmetric, call.dtype);
    return {values, codes, scale, call.symmetric ? at::Tensor() : zero_point};
  }
  at::Tensor range;
  if (call.observes) {
    const at::NoGradGuard no_grad;
    range = detail::norm_act_range(call.input, call.function, other, weight, bias, call.eps);
  }
  const auto [scale, zero_point] = qparams_in_force(call, range);
  auto [values, codes] = norm_act_fake_quantize(call.input, call.function, other, weight, bias, scale, zero_point,
                                                call.eps, call.quant_min, call.quant_max, call.dtype);
  return {values, codes, scale, zero_point.value_or(at::Tensor())};
}

at::Tensor rounded_weight(const QuantLinear& call) {
  const at::NoGradGuard no_grad;
  return rounded_weight(call.weight, call.weight_groups, call.weight_min, call.weight_max, call.input.scalar_type());
}

at::Tensor quant_linear(const QuantLinear& call) {
  return QuantLinearStepFunction::apply(call.input, call.weight, given(call.bias), call);
}

}  // namespace quantrain

TORCH_LIBRARY_IMPL(quantrain, Autograd, m) { m.impl("quant_linear", &quantrain::quant_linear_autograd); }
