#include <ATen/ops/clone.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/node.h"
#include "autograd/second_derivative.h"
#include "autograd/straight_through.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "quantrain/ops/fake_quant.h"

// Gradients of the fake_quant family. Where nothing needs a gradient the call goes straight to the kernel: no mask, no
// node.

namespace quantrain {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;

// ---- operators, below and above this layer --------------------------------------------------------------------------

using DynamicSignature = at::Tensor(const at::Tensor&, c10::SymIntArrayRef, int64_t, int64_t, bool);

std::tuple<at::Tensor, at::Tensor> fake_quantize_mask(const at::Tensor& input, const at::Tensor& scale,
                                                      const OptionalTensor& zero_point, int64_t quant_min,
                                                      int64_t quant_max, bool check_values) {
  static const auto op = find_operator<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t, int64_t, bool)>("_fake_quantize_mask");
  return op.call(input, scale, zero_point, quant_min, quant_max, check_values);
}

// ---- nodes ----------------------------------------------------------------------------------------------------------

struct FakeQuantizeFunction : torch::autograd::Function<FakeQuantizeFunction> {
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& scale,
                          const OptionalTensor& zero_point, int64_t quant_min, int64_t quant_max, bool check_values) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [output, mask] = fake_quantize_mask(input, scale, zero_point, quant_min, quant_max, check_values);
    ctx->save_for_backward({mask});
    ctx->saved_data["stride"] = output.sym_strides();
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto stride = ctx->saved_data["stride"].toSymIntVector();
    return {fake_quantize_backward(grad_outputs[0], ctx->get_saved_variables()[0], stride), {}, {}, {}, {}, {}};
  }
};

// The gradient is linear in grad_output, with the same mask: gradients of gradients are this function again.
struct FakeQuantizeBackwardFunction : torch::autograd::Function<FakeQuantizeBackwardFunction> {
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& grad_output, const Variable& mask,
                          c10::SymIntArrayRef stride) {
    const at::AutoDispatchBelowADInplaceOrView below;
    at::Tensor grad_input = fake_quantize_backward(grad_output, mask, stride);  // first: it checks them
    ctx->save_for_backward({mask});
    ctx->saved_data["stride"] = stride;
    return grad_input;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto stride = ctx->saved_data["stride"].toSymIntVector();
    return {fake_quantize_backward(grad_outputs[0], ctx->get_saved_variables()[0], stride), {}, {}};
  }
};

struct FakeQuantizeLearnableFunction : torch::autograd::Function<FakeQuantizeLearnableFunction> {
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& scale,
                          const OptionalTensor& zero_point, int64_t quant_min, int64_t quant_max, double grad_factor) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({input, scale, zero_point.value_or(at::Tensor())});
    ctx->saved_data["quant_min"] = quant_min;
    ctx->saved_data["quant_max"] = quant_max;
    ctx->saved_data["grad_factor"] = grad_factor;
    return fake_quantize_learnable(input, scale, zero_point, quant_min, quant_max, grad_factor);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    static const auto op = find_operator<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t, int64_t, double)>(
        "_fake_quantize_learnable_backward");
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto saved = ctx->get_saved_variables();
    const OptionalTensor zero_point = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    auto [grad_input, grad_scale, grad_zero_point] =
        op.call(grad_outputs[0], saved[0], saved[1], zero_point, ctx->saved_data["quant_min"].toInt(),
                ctx->saved_data["quant_max"].toInt(), ctx->saved_data["grad_factor"].toDouble());
    const bool learned = zero_point && zero_point->is_floating_point();
    variable_list gradients{grad_input, grad_scale, learned ? grad_zero_point : at::Tensor(), {}, {}, {}};
    refuse_second_derivative(gradients, grad_outputs[0], "fake_quantize_learnable");
    return gradients;
  }
};

// ---- Autograd kernels -----------------------------------------------------------------------------------------------

at::Tensor fake_quantize_autograd(const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& zero_point,
                                  int64_t quant_min, int64_t quant_max) {
  QUANTRAIN_CHECK_VALUE(
      !needs_grad(scale),
      "fake_quantize: expected scale without requires_grad (fake_quantize_learnable learns it), got {}",
      "a scale that requires a gradient");
  if (is_transformed(input))
    return straight_through(input,
                            [&] { return fake_quantize_mask(input, scale, zero_point, quant_min, quant_max, true); });
  if (needs_grad(input)) return FakeQuantizeFunction::apply(input, scale, zero_point, quant_min, quant_max, true);
  const at::AutoDispatchBelowADInplaceOrView below;
  return fake_quantize(input, scale, zero_point, quant_min, quant_max);
}

at::Tensor fake_quantize_dynamic_autograd(const at::Tensor& input, c10::SymIntArrayRef scale_shape, int64_t quant_min,
                                          int64_t quant_max, bool symmetric) {
  static const auto dynamic = find_operator<DynamicSignature>("fake_quantize_dynamic");
  static const auto choose =
      find_operator<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, c10::SymIntArrayRef, int64_t, int64_t, bool)>(
          "choose_qparams");
  if (needs_grad(input) && input.sym_numel() == 0) {
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      dynamic.call(input, scale_shape, quant_min, quant_max, symmetric);  // for its checks
    }
    return input.clone();
  }
  const bool transformed = is_transformed(input);
  if (!needs_grad(input) && !transformed) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return dynamic.call(input, scale_shape, quant_min, quant_max, symmetric);
  }
  at::Tensor scale;
  OptionalTensor zero_point;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    std::tie(scale, zero_point) = choose.call(input, scale_shape, quant_min, quant_max, symmetric);
  }
  if (symmetric) zero_point.reset();
  if (transformed)
    return straight_through(input,
                            [&] { return fake_quantize_mask(input, scale, zero_point, quant_min, quant_max, false); });
  return FakeQuantizeFunction::apply(input, scale, zero_point, quant_min, quant_max, false);
}

at::Tensor fake_quantize_backward_autograd(const at::Tensor& grad_output, const at::Tensor& mask,
                                           c10::SymIntArrayRef stride) {
  if (needs_grad(grad_output)) return FakeQuantizeBackwardFunction::apply(grad_output, mask, stride);
  const at::AutoDispatchBelowADInplaceOrView below;
  return fake_quantize_backward(grad_output, mask, stride);
}

at::Tensor fake_quantize_learnable_autograd(const at::Tensor& input, const at::Tensor& scale,
                                            const OptionalTensor& zero_point, int64_t quant_min, int64_t quant_max,
                                            double grad_factor) {
  refuse_transforms("fake_quantize_learnable", {input, scale, zero_point ? *zero_point : scale});
  if (needs_grad(input) || needs_grad(scale) || (zero_point && needs_grad(*zero_point)))
    return FakeQuantizeLearnableFunction::apply(input, scale, zero_point, quant_min, quant_max, grad_factor);
  const at::AutoDispatchBelowADInplaceOrView below;
  return fake_quantize_learnable(input, scale, zero_point, quant_min, quant_max, grad_factor);
}

}  // namespace
}  // namespace quantrain

TORCH_LIBRARY_IMPL(quantrain, Autograd, m) {
  m.impl("fake_quantize", &quantrain::fake_quantize_autograd);
  m.impl("fake_quantize_dynamic", &quantrain::fake_quantize_dynamic_autograd);
  m.impl("fake_quantize_learnable", &quantrain::fake_quantize_learnable_autograd);
  m.impl("_fake_quantize_backward", &quantrain::fake_quantize_backward_autograd);
}
