#include <ATen/ops/matmul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/node.h"
#include "ops/common/dispatch.h"
#include "quantrain/ops/fake_quant.h"

// The derivative of int8_weight_mm: grad_input = grad_output W, W decoded in grad_output's type. Saved are codes and
// scale.

namespace quantrain {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;
using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&);

at::Tensor call(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale, const OptionalTensor& bias) {
  static const auto op = find_operator<Signature>("int8_weight_mm");
  return op.call(input, codes, scale, bias);
}

struct Int8WeightMmFunction : torch::autograd::Function<Int8WeightMmFunction> {
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& input, const OptionalTensor& bias,
                          const Variable& codes, const Variable& scale) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({codes, scale});
    ctx->saved_data["has_bias"] = bias && bias->defined();
    ctx->saved_data["bias_type"] = bias && bias->defined() ? bias->scalar_type() : input.scalar_type();
    return call(input, codes, scale, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const Variable& grad_output = grad_outputs[0];
    variable_list gradients(4);
    if (ctx->needs_input_grad(0)) {
      const at::Tensor scale = saved[1].reshape({-1, 1});
      gradients[0] =
          at::matmul(grad_output, quantrain::dequantize(saved[0], scale, std::nullopt, grad_output.scalar_type()));
    }
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(1))
      gradients[1] = matrix(grad_output).sum(0).to(ctx->saved_data["bias_type"].toScalarType());
    return gradients;
  }
};

at::Tensor int8_weight_mm_autograd(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                                   const OptionalTensor& bias) {
  refuse_transforms("int8_weight_mm", {input, bias ? *bias : input});
  if (needs_grad(input) || (bias && needs_grad(*bias)))
    return Int8WeightMmFunction::apply(input, bias, codes, scale.detach());
  const at::AutoDispatchBelowADInplaceOrView below;
  return call(input, codes, scale, bias);
}

}  // namespace
}  // namespace quantrain

TORCH_LIBRARY_IMPL(quantrain, Autograd, m) { m.impl("int8_weight_mm", &quantrain::int8_weight_mm_autograd); }
