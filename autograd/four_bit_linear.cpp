#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/four_bit_kept.h"
#include "autograd/node.h"
#include "ops/common/dispatch.h"
#include "ops/four_bit_linear.h"

// The derivatives of linear_4bit: grad_input is linear in grad_output, and linear_4bit is its derivative in turn. What
// is saved is the packed weight.

namespace quantrain {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;

at::Tensor call_linear(const at::Tensor& input, const PackedWeight& w, const OptionalTensor& bias,
                       std::string_view method, std::optional<c10::SymInt> rows) {
  static const auto op = find_operator<Linear4bitSignature>("linear_4bit");
  return op.call(input, w.codes, w.scale, w.zero_point, bias, w.scale_scale, w.scale_offset, w.format, w.table, method,
                 std::move(rows));
}

at::Tensor call_grad_input(const at::Tensor& grad_output, const PackedWeight& w, const c10::SymInt& in_features,
                           std::string_view method) {
  static const auto op = find_operator<Linear4bitGradInputSignature>("_linear_4bit_grad_input");
  return op.call(grad_output, w.codes, w.scale, w.zero_point, w.scale_scale, w.scale_offset, in_features, w.format,
                 w.table, method);
}

struct Linear4bitFunction : torch::autograd::Function<Linear4bitFunction> {
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& input, const OptionalTensor& bias,
                          const PackedWeight& weight, std::string_view method, const std::optional<c10::SymInt>& rows) {
    const at::AutoDispatchBelowADInplaceOrView below;
    FourBitKept::save(ctx, weight, method);
    ctx->saved_data["in_features"] = input.sym_size(-1);
    ctx->saved_data["has_bias"] = bias && bias->defined();
    ctx->saved_data["bias_type"] = bias && bias->defined() ? bias->scalar_type() : input.scalar_type();
    return call_linear(input, weight, bias, method, rows);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const FourBitKept kept(ctx);
    const Variable& grad_output = grad_outputs[0];
    variable_list gradients(5);
    if (ctx->needs_input_grad(0))
      gradients[0] =
          call_grad_input(grad_output, kept.weight(), ctx->saved_data["in_features"].toSymInt(), kept.method);
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(1))
      gradients[1] = matrix(grad_output).sum(0).to(ctx->saved_data["bias_type"].toScalarType());
    return gradients;
  }
};

struct Linear4bitGradInputFunction : torch::autograd::Function<Linear4bitGradInputFunction> {
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& grad_output, const PackedWeight& weight,
                          const c10::SymInt& in_features, std::string_view method) {
    const at::AutoDispatchBelowADInplaceOrView below;
    FourBitKept::save(ctx, weight, method);
    ctx->saved_data["out_features"] = grad_output.sym_size(-1);
    return call_grad_input(grad_output, weight, in_features, method);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const FourBitKept kept(ctx);
    variable_list gradients(4);
    if (ctx->needs_input_grad(0))
      gradients[0] = call_linear(grad_outputs[0], kept.weight(), std::nullopt, kept.method,
                                 ctx->saved_data["out_features"].toSymInt());
    return gradients;
  }
};

at::Tensor linear_4bit_autograd(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                                const OptionalTensor& zero_point, const OptionalTensor& bias,
                                const OptionalTensor& scale_scale, const OptionalTensor& scale_offset,
                                std::string_view format, const OptionalTensor& table, std::string_view method,
                                std::optional<c10::SymInt> out_features) {
  const PackedWeight weight{codes, scale, zero_point, scale_scale, scale_offset, format, table};
  check_linear_4bit("linear_4bit", input, weight, bias, method, out_features);
  refuse_transforms("linear_4bit", {input, bias ? *bias : input});
  if (needs_grad(input) || (bias && needs_grad(*bias)))
    return Linear4bitFunction::apply(input, bias, weight, method, out_features);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_linear(input, weight, bias, method, out_features);
}

at::Tensor grad_input_autograd(const at::Tensor& grad_output, const at::Tensor& codes, const at::Tensor& scale,
                               const OptionalTensor& zero_point, const OptionalTensor& scale_scale,
                               const OptionalTensor& scale_offset, c10::SymInt in_features, std::string_view format,
                               const OptionalTensor& table, std::string_view method) {
  const PackedWeight weight{codes, scale, zero_point, scale_scale, scale_offset, format, table};
  if (needs_grad(grad_output) && grad_output.dim() > 0)
    return Linear4bitGradInputFunction::apply(grad_output, weight, in_features, method);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_grad_input(grad_output, weight, in_features, method);
}

}  // namespace
}  // namespace quantrain

TORCH_LIBRARY_IMPL(quantrain, Autograd, m) {
  m.impl("linear_4bit", &quantrain::linear_4bit_autograd);
  m.impl("_linear_4bit_grad_input", &quantrain::grad_input_autograd);
}
