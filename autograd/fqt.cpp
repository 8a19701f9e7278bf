#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/convolution.h"
#include "autograd/gradient_quantizer.h"
#include "autograd/node.h"
#include "autograd/second_derivative.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/fqt_check.h"

// Gradients of fqt_linear and fqt_conv2d: PyTorch's own products, of a gradient that is quantized anew for each.

namespace quantrain {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;

// ---- what both share ------------------------------------------------------------------------------------------------

bool is_tensor(const OptionalTensor& tensor) { return tensor && tensor->defined(); }

// Whether the bias needs its gradient. Without a bias it has no edge that could be asked.
bool needs_bias_grad(AutogradContext* ctx) { return ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2); }

bool any_needs_grad(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias) {
  return needs_grad(input) || needs_grad(weight) || (bias && needs_grad(*bias));
}

// ---- nodes ----------------------------------------------------------------------------------------------------------

struct FqtLinearFunction : torch::autograd::Function<FqtLinearFunction> {
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& weight,
                          const OptionalTensor& bias, const GradientQuantizer& grad_input,
                          const GradientQuantizer& grad_weight) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({weight.requires_grad() ? input : Variable(), input.requires_grad() ? weight : Variable()});
    ctx->saved_data["has_bias"] = is_tensor(bias);
    save_gradient_quantizer(ctx, "grad_input", grad_input);
    save_gradient_quantizer(ctx, "grad_weight", grad_weight);
    return at::linear(input, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Variable& grad_output = grad_outputs[0];
    const variable_list tensors = ctx->get_saved_variables();
    const Variable &input = tensors[0], &weight = tensors[1];
    variable_list gradients(5);
    {
      const at::NoGradGuard no_grad;
      const GradientQuantizer for_input = saved_gradient_quantizer(ctx, "grad_input"),
                              for_weight = saved_gradient_quantizer(ctx, "grad_weight");
      const bool of_input = ctx->needs_input_grad(0), of_weight = ctx->needs_input_grad(1);
      at::Tensor by_input, by_weight;
      if (of_input && of_weight)
        std::tie(by_input, by_weight) = quantized_gradients(grad_output, for_input, for_weight);
      else if (of_input || of_weight)
        (of_input ? by_input : by_weight) = quantized_gradient(grad_output, of_input ? for_input : for_weight);
      if (of_input) gradients[0] = at::matmul(by_input, weight);
      if (of_weight) gradients[1] = matrix(by_weight).t().mm(matrix(input));
      if (needs_bias_grad(ctx)) gradients[2] = matrix(grad_output).sum(0);
    }
    refuse_second_derivative(gradients, grad_output, "fqt_linear");
    return gradients;
  }
};

struct FqtConv2dFunction : torch::autograd::Function<FqtConv2dFunction> {
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& given_weight,
                          const OptionalTensor& bias, const Convolution& conv, const GradientQuantizer& grad_input,
                          const GradientQuantizer& grad_weight) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor weight = regular_weight(given_weight);
    ctx->save_for_backward({input, weight});
    conv.save(ctx);
    ctx->saved_data["has_bias"] = is_tensor(bias);
    save_gradient_quantizer(ctx, "grad_input", grad_input);
    save_gradient_quantizer(ctx, "grad_weight", grad_weight);
    return at::convolution_symint(input, weight, bias, conv.stride, conv.padding, conv.dilation, /*transposed=*/false,
                                  {0, 0}, conv.groups);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Variable& grad_output = grad_outputs[0];
    const variable_list tensors = ctx->get_saved_variables();
    const Variable& input = tensors[0];
    const at::Tensor weight = plain_weight(tensors[1]);
    const auto stride = ctx->saved_data["stride"].toSymIntVector();
    const auto padding = ctx->saved_data["padding"].toSymIntVector();
    const auto dilation = ctx->saved_data["dilation"].toSymIntVector();
    const c10::SymInt groups = ctx->saved_data["groups"].toSymInt();
    const auto products = [&](const at::Tensor& gradient, bool of_input, bool of_weight) {
      return at::convolution_backward_symint(gradient, input, weight, at::OptionalSymIntArrayRef(), stride, padding,
                                             dilation, /*transposed=*/false, {0, 0}, groups,
                                             {of_input, of_weight, false});
    };
    variable_list gradients(6);
    {
      const at::NoGradGuard no_grad;
      if (ctx->needs_input_grad(0))
        gradients[0] = std::get<0>(
            products(quantized_gradient(grad_output, saved_gradient_quantizer(ctx, "grad_input")), true, false));
      if (ctx->needs_input_grad(1))
        gradients[1] = std::get<1>(
            products(quantized_gradient(grad_output, saved_gradient_quantizer(ctx, "grad_weight")), false, true));
      if (needs_bias_grad(ctx)) gradients[2] = grad_output.sum({0, 2, 3});
    }
    refuse_second_derivative(gradients, grad_output, "fqt_conv2d");
    return gradients;
  }
};

// ---- Autograd kernels -----------------------------------------------------------------------------------------------

at::Tensor fqt_linear_autograd(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                               QUANTRAIN_GRADIENTS_PARAMETERS) {
  const auto for_input = QUANTRAIN_GRADIENT_STRUCT(grad_input), for_weight = QUANTRAIN_GRADIENT_STRUCT(grad_weight);
  check_fqt_linear(input, weight, bias, for_input, for_weight);
  refuse_transforms("fqt_linear", {input, weight, bias ? *bias : weight});
  if (any_needs_grad(input, weight, bias)) return FqtLinearFunction::apply(input, weight, bias, for_input, for_weight);
  const at::AutoDispatchBelowADInplaceOrView below;
  return at::linear(input, weight, bias);
}

at::Tensor fqt_conv2d_autograd(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                               c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                               c10::SymInt groups, QUANTRAIN_GRADIENTS_PARAMETERS) {
  const auto for_input = QUANTRAIN_GRADIENT_STRUCT(grad_input), for_weight = QUANTRAIN_GRADIENT_STRUCT(grad_weight);
  check_fqt_conv2d(input, weight, bias, stride, padding, dilation, groups, for_input, for_weight);
  refuse_transforms("fqt_conv2d", {input, weight, bias ? *bias : weight});
  const bool batched = input.dim() == 4;
  const at::Tensor batch = batched ? input : input.unsqueeze(0);
  at::Tensor output;
  if (any_needs_grad(input, weight, bias)) {
    output = FqtConv2dFunction::apply(batch, weight, bias, Convolution{stride, padding, dilation, groups}, for_input,
                                      for_weight);
  } else {
    const at::AutoDispatchBelowADInplaceOrView below;
    output = at::convolution_symint(batch, regular_weight(weight), bias, stride, padding, dilation,
                                    /*transposed=*/false, {0, 0}, groups);
  }
  return batched ? output : output.squeeze(0);
}

}  // namespace
}  // namespace quantrain

TORCH_LIBRARY_IMPL(quantrain, Autograd, m) {
  m.impl("fqt_linear", &quantrain::fqt_linear_autograd);
  m.impl("fqt_conv2d", &quantrain::fqt_conv2d_autograd);
}
