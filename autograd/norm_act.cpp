#include "quantrain/ops/norm_act.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/node.h"
#include "autograd/second_derivative.h"
#include "autograd/straight_through.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/norm_act_operators.h"

// Gradients of norm_act_fake_quantize and norm_act_fake_quantize_dynamic: one node, which keeps what the function
// reads, a norm's moments, and a bit per element where a code may clip.

namespace quantrain {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;

struct Settings {
  std::string_view function;
  double eps;
  int64_t quant_min;
  int64_t quant_max;
  bool symmetric;
  std::string_view dtype;
};

struct NormActFunction : torch::autograd::Function<NormActFunction> {
  static constexpr bool is_traceable = true;

  // output, codes, and the rows' own scale and zero_point where no scale is given.
  static variable_list forward(AutogradContext* ctx, const Variable& input, const OptionalTensor& other,
                               const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& scale,
                               const OptionalTensor& zero_point, const Settings& s) {
    static const auto op = find_operator<NormActForward>("_norm_act_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    const bool bends = s.function == "relu", plain = bends || s.function == "identity";
    const bool straddles = s.quant_min < 0 && s.quant_max > 0;  // else what has the other sign clips
    const bool clips = scale.has_value() || !s.symmetric || !straddles || bends;
    auto [output, codes, mask, moments, row_scale, row_zero_point] =
        op.call(input, other, weight, bias, scale, zero_point, s.function, s.eps, s.quant_min, s.quant_max, s.symmetric,
                s.dtype, true, clips);
    const auto or_none = [](const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); };
    // Of the two that the mask says all of, nothing else is asked.
    ctx->save_for_backward({plain ? at::Tensor() : input, or_none(other), or_none(weight), moments, mask});
    ctx->saved_data["type"] = input.scalar_type();
    ctx->saved_data["function"] = std::string(s.function);
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["bias_type"] = bias ? bias->scalar_type() : at::kFloat;
    ctx->saved_data["dynamic"] = !scale;
    ctx->set_materialize_grads(false);  // codes, scale and zero_point have none
    if (scale) {
      ctx->mark_non_differentiable({codes});
      return {output, codes};
    }
    ctx->mark_non_differentiable({codes, row_scale, row_zero_point});
    return {output, codes, row_scale, row_zero_point};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    static const auto op = find_operator<NormActBackward>("_norm_act_backward");
    variable_list gradients(7);
    const Variable& given = grad_outputs[0];
    if (!given.defined()) return gradients;
    const variable_list saved = ctx->get_saved_variables();
    const auto optional = [&](size_t i) { return saved[i].defined() ? OptionalTensor(saved[i]) : std::nullopt; };
    const OptionalTensor other = optional(1), weight = optional(2);
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      if (!saved[0].defined()) {
        const bool clips = TORCH_GUARD_OR_TRUE(saved[4].sym_numel().sym_ne(0));
        const at::Tensor grad = given.contiguous();
        gradients[0] = in_type(clips ? fake_quantize_backward(grad, saved[4], grad.sym_strides()) : grad,
                               ctx->saved_data["type"].toScalarType());
      } else {
        auto [grad_input, grad_other, grad_weight, grad_bias] =
            op.call(given, saved[0], other, weight, saved[3], saved[4], ctx->saved_data["function"].toStringRef());
        gradients[0] = grad_input;
        if (other) gradients[1] = grad_other;
        if (weight) gradients[2] = in_type(grad_weight, weight->scalar_type());
        if (ctx->saved_data["has_bias"].toBool())
          gradients[3] = in_type(grad_bias, ctx->saved_data["bias_type"].toScalarType());
      }
    }
    const bool dynamic = ctx->saved_data["dynamic"].toBool();
    refuse_second_derivative(gradients, given, dynamic ? "norm_act_fake_quantize_dynamic" : "norm_act_fake_quantize");
    return gradients;
  }
};

bool any_needs_grad(const at::Tensor& input, const OptionalTensor& other, const OptionalTensor& weight,
                    const OptionalTensor& bias) {
  return needs_grad(input) || (other && needs_grad(*other)) || (weight && needs_grad(*weight)) ||
         (bias && needs_grad(*bias));
}

// ---- Autograd kernels -----------------------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> norm_act_fake_quantize_autograd(
    const at::Tensor& input, const OptionalTensor& other, const OptionalTensor& weight, const OptionalTensor& bias,
    const at::Tensor& scale, const OptionalTensor& zero_point, std::string_view function, double eps, int64_t quant_min,
    int64_t quant_max, std::string_view dtype) {
  refuse_transforms("norm_act_fake_quantize",
                    {input, other ? *other : input, weight ? *weight : input, bias ? *bias : input});
  QUANTRAIN_CHECK_VALUE(!needs_grad(scale), "{}: expected scale without requires_grad, got {}",
                        "norm_act_fake_quantize", "a scale that requires a gradient");
  if (any_needs_grad(input, other, weight, bias)) {
    const variable_list results =
        NormActFunction::apply(input, other, weight, bias, OptionalTensor(scale), zero_point,
                               Settings{function, eps, quant_min, quant_max, !zero_point, dtype});
    return {results[0], results[1]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return norm_act_fake_quantize(input, function, other, weight, bias, scale, zero_point, eps, quant_min, quant_max,
                                dtype);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_act_fake_quantize_dynamic_autograd(
    const at::Tensor& input, const OptionalTensor& other, const OptionalTensor& weight, const OptionalTensor& bias,
    std::string_view function, double eps, int64_t quant_min, int64_t quant_max, bool symmetric,
    std::string_view dtype) {
  refuse_transforms("norm_act_fake_quantize_dynamic",
                    {input, other ? *other : input, weight ? *weight : input, bias ? *bias : input});
  if (any_needs_grad(input, other, weight, bias)) {
    const variable_list results =
        NormActFunction::apply(input, other, weight, bias, OptionalTensor(), OptionalTensor(),
                               Settings{function, eps, quant_min, quant_max, symmetric, dtype});
    return {results[0], results[1], results[2], results[3]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return norm_act_fake_quantize_dynamic(input, function, other, weight, bias, eps, quant_min, quant_max, symmetric,
                                        dtype);
}

}  // namespace
}  // namespace quantrain

TORCH_LIBRARY_IMPL(quantrain, Autograd, m) {
  m.impl("norm_act_fake_quantize", &quantrain::norm_act_fake_quantize_autograd);
  m.impl("norm_act_fake_quantize_dynamic", &quantrain::norm_act_fake_quantize_dynamic_autograd);
}
