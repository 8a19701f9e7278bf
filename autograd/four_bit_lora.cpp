#include "ops/four_bit_lora.h"

#include <ATen/ops/addmm.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/four_bit_kept.h"
#include "autograd/node.h"
#include "autograd/second_derivative.h"
#include "ops/common/dispatch.h"

// The derivative of linear_4bit_lora. With T = scaling dY B and D the dropout:
//
//   grad_input = dY W + D(T A)      grad_lora_a = T^T D(x)      grad_lora_b = scaling dY^T U,  U = D(x) A^T
//
// Saved are x, U, the packed weight and the state that D's mask is computed from again.

namespace quantrain {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;
using OptionalGenerator = std::optional<at::Generator>;

struct Linear4bitLoraFunction : torch::autograd::Function<Linear4bitLoraFunction> {
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& lora_a, const Variable& lora_b,
                          const OptionalTensor& bias, const PackedWeight& weight, const Lora& lora,
                          std::string_view method, const std::optional<c10::SymInt>& out_features,
                          const DropoutDraw& draw) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const LoraForward result = linear_4bit_lora_forward(input, weight, bias, lora, method, out_features, draw);
    FourBitKept::save(ctx, weight, method,
                      {lora_a.requires_grad() ? input : Variable(), result.u, lora_a, lora_b, result.state});
    ctx->saved_data["in_features"] = input.sym_size(-1);
    ctx->saved_data["scaling"] = lora.scaling;
    ctx->saved_data["dropout"] = lora.dropout;
    ctx->saved_data["has_bias"] = bias && bias->defined();
    ctx->saved_data["bias_type"] = bias && bias->defined() ? bias->scalar_type() : input.scalar_type();
    return result.output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const FourBitKept kept(ctx);
    const Variable &input = kept.others(0), &u = kept.others(1), &lora_a = kept.others(2), &lora_b = kept.others(3),
                   &state = kept.others(4);
    const double scaling = ctx->saved_data["scaling"].toDouble(), p = ctx->saved_data["dropout"].toDouble();
    const Variable& grad_output = grad_outputs[0];
    variable_list gradients(9);
    {
      const at::NoGradGuard no_grad;
      const at::Tensor g = matrix(grad_output);
      const at::ScalarType type = g.scalar_type();
      const bool needs_a = ctx->needs_input_grad(1), needs_input = ctx->needs_input_grad(0);
      at::Tensor t;
      if (needs_a || needs_input) t = g.mm(in_type(lora_b, type)).mul_(scaling);
      if (needs_input) {
        static const auto op = find_operator<Linear4bitGradInputSignature>("_linear_4bit_grad_input");
        const PackedWeight w = kept.weight();
        at::Tensor dx = op.call(grad_output, w.codes, w.scale, w.zero_point, w.scale_scale, w.scale_offset,
                                ctx->saved_data["in_features"].toSymInt(), w.format, w.table, kept.method);
        if (state.defined())
          matrix(dx).add_(dropped_out(t.mm(in_type(lora_a, type)), state, p));
        else
          matrix(dx).addmm_(t, in_type(lora_a, type));
        gradients[0] = dx;
      }
      if (needs_a) gradients[1] = in_type(t.t().mm(dropped_out(matrix(input), state, p)), lora_a.scalar_type());
      if (ctx->needs_input_grad(2)) gradients[2] = in_type(g.t().mm(u).mul_(scaling), lora_b.scalar_type());
      if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(3))
        gradients[3] = g.sum(0).to(ctx->saved_data["bias_type"].toScalarType());
    }
    refuse_second_derivative(gradients, grad_output, "linear_4bit_lora");
    return gradients;
  }
};

at::Tensor differentiable(const at::Tensor& input, const PackedWeight& weight, const OptionalTensor& bias,
                          const Lora& lora, std::string_view method, const std::optional<c10::SymInt>& out_features,
                          const DropoutDraw& draw) {
  check_linear_4bit_lora(input, weight, bias, lora, method, out_features);
  refuse_transforms("linear_4bit_lora", {input, lora.a, lora.b});
  if (needs_grad(input) || needs_grad(lora.a) || needs_grad(lora.b) || (bias && needs_grad(*bias)))
    return Linear4bitLoraFunction::apply(input, lora.a, lora.b, bias, weight, lora, method, out_features, draw);
  const at::AutoDispatchBelowADInplaceOrView below;
  return linear_4bit_lora_forward(input, weight, bias, lora, method, out_features, draw).output;
}

at::Tensor lora_autograd(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                         const OptionalTensor& zero_point, const OptionalTensor& bias,
                         const OptionalTensor& scale_scale, const OptionalTensor& scale_offset,
                         const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling, double dropout,
                         std::string_view format, const OptionalTensor& table, std::string_view method,
                         std::optional<c10::SymInt> out_features, const OptionalGenerator& generator) {
  return differentiable(input, {codes, scale, zero_point, scale_scale, scale_offset, format, table}, bias,
                        {lora_a, lora_b, scaling, dropout}, method, out_features, {generator, std::nullopt});
}

at::Tensor lora_seeded_autograd(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                                const OptionalTensor& zero_point, const OptionalTensor& bias,
                                const OptionalTensor& scale_scale, const OptionalTensor& scale_offset,
                                const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling, double dropout,
                                std::string_view format, const OptionalTensor& table, std::string_view method,
                                std::optional<c10::SymInt> out_features, int64_t seed, int64_t offset) {
  return differentiable(input, {codes, scale, zero_point, scale_scale, scale_offset, format, table}, bias,
                        {lora_a, lora_b, scaling, dropout}, method, out_features,
                        {std::nullopt, std::pair(seed, offset)});
}

}  // namespace
}  // namespace quantrain

TORCH_LIBRARY_IMPL(quantrain, Autograd, m) {
  m.impl("linear_4bit_lora", &quantrain::lora_autograd);
  m.impl("linear_4bit_lora.seeded", &quantrain::lora_seeded_autograd);
}
