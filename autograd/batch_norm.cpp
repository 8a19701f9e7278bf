#include "quantrain/ops/batch_norm.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/node.h"
#include "autograd/second_derivative.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"

// Gradients of batch_norm_act and batch_norm_act_fake_quantize: one node, which keeps the input and a bit per element.

namespace quantrain {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;

// ---- operators, below this layer ------------------------------------------------------------------------------------

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const OptionalTensor&,
                                                               const OptionalTensor&, const OptionalTensor&,
                                                               const OptionalTensor&, const OptionalTensor&,
                                                               const OptionalTensor&, const OptionalTensor&,
                                                               const OptionalTensor&, std::string_view, double, int64_t,
                                                               int64_t, bool);
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, std::string_view, double, bool, bool,
    const OptionalTensor&, const OptionalTensor&, int64_t, int64_t);

// ---- the node -------------------------------------------------------------------------------------------------------

struct Settings {
  std::string_view activation;
  double eps;
  bool batch_statistics;
  int64_t quant_min = -128;
  int64_t quant_max = 127;
};

struct BatchNormFunction : torch::autograd::Function<BatchNormFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& input, const Variable& mean,
                               const Variable& variance, const OptionalTensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& conv_scale, const OptionalTensor& residual,
                               const OptionalTensor& scale, const OptionalTensor& zero_point,
                               const Settings& settings) {
    static const auto op = find_operator<Forward>("_batch_norm_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    const bool bends = settings.activation == "relu" || settings.activation == "relu6";
    auto [output, codes, mask] =
        op.call(input, mean, variance, weight, bias, conv_scale, residual, scale, zero_point, settings.activation,
                settings.eps, settings.quant_min, settings.quant_max, bends || scale.has_value());
    const auto or_none = [](const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); };
    ctx->save_for_backward({input, mask, mean, variance, or_none(weight), or_none(bias), or_none(conv_scale)});
    ctx->saved_data["activation"] = std::string(settings.activation);
    ctx->saved_data["eps"] = settings.eps;
    ctx->saved_data["batch_statistics"] = settings.batch_statistics;
    ctx->saved_data["with_residual"] = residual.has_value();
    ctx->saved_data["fake_quantized"] = scale.has_value();
    ctx->set_materialize_grads(false);  // the codes have none
    if (!scale) return {output};
    ctx->mark_non_differentiable({codes});
    return {output, codes};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    static const auto op = find_operator<Backward>("_batch_norm_backward");
    variable_list gradients(10);
    const Variable& given = grad_outputs[0];
    if (!given.defined()) return gradients;
    const variable_list saved = ctx->get_saved_variables();
    const auto optional = [&](size_t i) { return saved[i].defined() ? OptionalTensor(saved[i]) : std::nullopt; };
    const OptionalTensor weight = optional(4), bias = optional(5), conv_scale = optional(6);
    const bool with_residual = ctx->saved_data["with_residual"].toBool();
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      const at::Tensor grad_output =
          given.scalar_type() == saved[0].scalar_type() ? given : given.to(saved[0].scalar_type());
      auto [grad_input, grad_residual, grad_weight, grad_bias, grad_scale, none] =
          op.call(grad_output, saved[0], saved[1], saved[2], saved[3], weight, bias, conv_scale,
                  ctx->saved_data["activation"].toStringRef(), ctx->saved_data["eps"].toDouble(),
                  ctx->saved_data["batch_statistics"].toBool(), with_residual, std::nullopt, std::nullopt, -128, 127);
      gradients[0] = grad_input;
      if (weight) gradients[3] = grad_weight.to(weight->scalar_type());
      if (bias) gradients[4] = grad_bias.to(bias->scalar_type());
      if (conv_scale) gradients[5] = grad_scale.to(conv_scale->scalar_type());
      if (with_residual) gradients[6] = grad_residual;
    }
    refuse_second_derivative(
        gradients, given,
        ctx->saved_data["fake_quantized"].toBool() ? "batch_norm_act_fake_quantize" : "batch_norm_act");
    return gradients;
  }
};

bool any_needs_grad(const at::Tensor& input,
                    std::initializer_list<std::reference_wrapper<const OptionalTensor>> others) {
  if (needs_grad(input)) return true;
  for (const OptionalTensor& other : others)
    if (other && needs_grad(*other)) return true;
  return false;
}

void refuse(const char* op, const at::Tensor& input, const at::Tensor& mean, const at::Tensor& variance,
            const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& conv_scale,
            const OptionalTensor& residual) {
  refuse_transforms(op, {input, weight ? *weight : input, bias ? *bias : input, conv_scale ? *conv_scale : input,
                         residual ? *residual : input});
  QUANTRAIN_CHECK_VALUE(
      !needs_grad(mean) && !needs_grad(variance),
      "{}: expected mean and variance without requires_grad (their gradients are part of input's), got {}", op,
      "statistics that require a gradient");
}

// ---- Autograd kernels -----------------------------------------------------------------------------------------------

at::Tensor batch_norm_act_autograd(const at::Tensor& input, const at::Tensor& mean, const at::Tensor& variance,
                                   const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& conv_scale, const OptionalTensor& residual,
                                   std::string_view activation, double eps, bool batch_statistics) {
  refuse("batch_norm_act", input, mean, variance, weight, bias, conv_scale, residual);
  if (any_needs_grad(input, {weight, bias, conv_scale, residual}))
    return BatchNormFunction::apply(input, mean, variance, weight, bias, conv_scale, residual, OptionalTensor(),
                                    OptionalTensor(), Settings{activation, eps, batch_statistics})[0];
  const at::AutoDispatchBelowADInplaceOrView below;
  return batch_norm_act(input, mean, variance, weight, bias, conv_scale, residual, activation, eps, batch_statistics);
}

std::tuple<at::Tensor, at::Tensor> batch_norm_act_fake_quantize_autograd(
    const at::Tensor& input, const at::Tensor& mean, const at::Tensor& variance, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& conv_scale, const OptionalTensor& residual,
    const at::Tensor& scale, const OptionalTensor& zero_point, std::string_view activation, double eps,
    bool batch_statistics, int64_t quant_min, int64_t quant_max) {
  refuse("batch_norm_act_fake_quantize", input, mean, variance, weight, bias, conv_scale, residual);
  QUANTRAIN_CHECK_VALUE(!needs_grad(scale), "{}: expected scale without requires_grad, got {}",
                        "batch_norm_act_fake_quantize", "a scale that requires a gradient");
  if (any_needs_grad(input, {weight, bias, conv_scale, residual})) {
    const variable_list results =
        BatchNormFunction::apply(input, mean, variance, weight, bias, conv_scale, residual, OptionalTensor(scale),
                                 zero_point, Settings{activation, eps, batch_statistics, quant_min, quant_max});
    return {results[0], results[1]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return batch_norm_act_fake_quantize(input, mean, variance, weight, bias, conv_scale, residual, scale, zero_point,
                                      activation, eps, batch_statistics, quant_min, quant_max);
}

}  // namespace
}  // namespace quantrain

TORCH_LIBRARY_IMPL(quantrain, Autograd, m) {
  m.impl("batch_norm_act", &quantrain::batch_norm_act_autograd);
  m.impl("batch_norm_act_fake_quantize", &quantrain::batch_norm_act_fake_quantize_autograd);
}
