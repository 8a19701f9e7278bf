#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/node.h"
#include "autograd/second_derivative.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "quantrain/ops/batch_norm.h"

// The gradient of fold_fake_quantize: straight through the rounding, then through the product with conv_scale.

namespace quantrain {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

struct FoldSettings {
  double eps;
  int64_t quant_min;
  int64_t quant_max;
  bool symmetric;
  std::string_view dtype;
};

struct FoldFunction : torch::autograd::Function<FoldFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& weight, const Variable& bn_weight,
                               const Variable& running_var, const FoldSettings& settings) {
    static const auto op = find_operator<std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, const at::Tensor&, const at::Tensor&, double, int64_t, int64_t, bool, std::string_view,
        const std::optional<at::Tensor>&)>("_fold_fake_quantize");
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [output, conv_scale, mask, variance] =
        op.call(weight, bn_weight, running_var, settings.eps, settings.quant_min, settings.quant_max,
                settings.symmetric, settings.dtype, std::nullopt);
    ctx->save_for_backward({weight, mask, bn_weight, variance});  // the buffer may move before the backward pass
    ctx->saved_data["eps"] = settings.eps;
    ctx->set_materialize_grads(false);
    return {output, conv_scale};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    static const auto op = find_operator<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
        const at::Tensor&, double, const std::optional<at::Tensor>&, int64_t, int64_t)>("_fold_fake_quantize_backward");
    const variable_list saved = ctx->get_saved_variables();
    variable_list gradients(4);
    if (!grad_outputs[0].defined() && !grad_outputs[1].defined()) return gradients;
    const std::optional<at::Tensor> of_scale =
        grad_outputs[1].defined() ? std::optional<at::Tensor>(grad_outputs[1]) : std::nullopt;
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      const at::Tensor of_output = grad_outputs[0].defined() ? grad_outputs[0] : at::zeros_like(saved[0]);
      auto [grad_weight, grad_gamma, none] = op.call(of_output, of_scale, saved[0], saved[1], saved[2], saved[3],
                                                     ctx->saved_data["eps"].toDouble(), std::nullopt, -128, 127);
      gradients[0] = grad_weight;
      gradients[1] = grad_gamma.to(saved[2].scalar_type());
    }
    refuse_second_derivative(gradients, grad_outputs[0].defined() ? grad_outputs[0] : grad_outputs[1],
                             "fold_fake_quantize");
    return gradients;
  }
};

std::tuple<at::Tensor, at::Tensor> fold_fake_quantize_autograd(const at::Tensor& weight, const at::Tensor& bn_weight,
                                                               const at::Tensor& running_var, double eps,
                                                               int64_t quant_min, int64_t quant_max, bool symmetric,
                                                               std::string_view dtype) {
  refuse_transforms("fold_fake_quantize", {weight, bn_weight});
  QUANTRAIN_CHECK_VALUE(!needs_grad(running_var), "{}: expected running_var without requires_grad, got {}",
                        "fold_fake_quantize", "a variance that requires a gradient");
  if (needs_grad(weight) || needs_grad(bn_weight)) {
    const variable_list results =
        FoldFunction::apply(weight, bn_weight, running_var, FoldSettings{eps, quant_min, quant_max, symmetric, dtype});
    return {results[0], results[1]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return fold_fake_quantize(weight, bn_weight, running_var, eps, quant_min, quant_max, symmetric, dtype);
}

}  // namespace
}  // namespace quantrain

TORCH_LIBRARY_IMPL(quantrain, Autograd, m) { m.impl("fold_fake_quantize", &quantrain::fold_fake_quantize_autograd); }
