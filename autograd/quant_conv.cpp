#include "autograd/quant_conv.h"

#include <ATen/ops/convolution_backward.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/convolution.h"
#include "autograd/gradient_quantizer.h"
#include "autograd/kept_codes.h"
#include "autograd/node.h"
#include "autograd/second_derivative.h"
#include "autograd/straight_through.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/fqt_check.h"
#include "ops/quant_conv_check.h"
#include "quantrain/ops/batch_norm.h"
#include "quantrain/ops/fake_quant.h"
#include "quantrain/ops/quant_conv.h"

// Gradients of quant_conv2d: PyTorch's products, of an input that is decoded from its codes.

namespace quantrain {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;

OptionalTensor given(const at::Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

struct QuantConv2dFunction : torch::autograd::Function<QuantConv2dFunction> {
  static constexpr bool is_traceable = true;

  // An absent tensor has no place among those that needs_input_grad counts, so they stand last.
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& given_weight,
                          const Variable& codes, const Variable& scale, const OptionalTensor& bias,
                          const OptionalTensor& zero_point, const Convolution& window) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor weight = regular_weight(given_weight);
    ctx->save_for_backward({codes, scale, zero_point.value_or(at::Tensor()), weight});
    ctx->saved_data["type"] = input.scalar_type();
    ctx->saved_data["has_bias"] = bias.has_value();
    window.save(ctx);
    return at::convolution_symint(input, weight, bias, window.stride, window.padding, window.dilation,
                                  /*transposed=*/false, {0, 0}, window.groups);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const bool of_bias = ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(4);
    variable_list gradients(7);
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      const at::Tensor input =
          decoded(saved[0], saved[1], saved[2], ctx->saved_data["type"].toScalarType(), ctx->needs_input_grad(1));
      auto [grad_input, grad_weight, grad_bias] = at::convolution_backward_symint(
          grad_outputs[0], input, plain_weight(saved[3]),
          at::OptionalSymIntArrayRef(c10::SymIntArrayRef({saved[3].sym_size(0)})),
          ctx->saved_data["stride"].toSymIntVector(), ctx->saved_data["padding"].toSymIntVector(),
          ctx->saved_data["dilation"].toSymIntVector(), /*transposed=*/false, {0, 0},
          ctx->saved_data["groups"].toSymInt(), {ctx->needs_input_grad(0), ctx->needs_input_grad(1), of_bias});
      gradients[0] = grad_input;
      gradients[1] = grad_weight;
      gradients[4] = grad_bias;
    }
    refuse_second_derivative(gradients, grad_outputs[0], "quant_conv2d");
    return gradients;
  }
};

struct FakeQuantizeCodesFunction : torch::autograd::Function<FakeQuantizeCodesFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& input, const Variable& scale,
                               const OptionalTensor& zero_point, int64_t quant_min, int64_t quant_max) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [output, codes, mask] = fake_quantize_codes_forward(input, scale, zero_point, quant_min, quant_max, true);
    ctx->save_for_backward({mask});
    ctx->saved_data["stride"] = output.sym_strides();
    ctx->set_materialize_grads(false);  // the codes have none
    ctx->mark_non_differentiable({codes});
    return {output, codes};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    if (!grad_outputs[0].defined()) return variable_list(5);
    const auto stride = ctx->saved_data["stride"].toSymIntVector();
    return {fake_quantize_backward(grad_outputs[0], ctx->get_saved_variables()[0], stride), {}, {}, {}, {}};
  }
};

// With a learned scale: LSQ's gradient needs the input itself.
struct FakeQuantizeLearnedCodesFunction : torch::autograd::Function<FakeQuantizeLearnedCodesFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& input, const Variable& scale,
                               const OptionalTensor& zero_point, int64_t quant_min, int64_t quant_max,
                               double grad_factor) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [output, codes, mask] = fake_quantize_codes_forward(input, scale, zero_point, quant_min, quant_max, false);
    ctx->save_for_backward({input, scale, zero_point.value_or(at::Tensor())});
    ctx->saved_data["quant_min"] = quant_min;
    ctx->saved_data["quant_max"] = quant_max;
    ctx->saved_data["grad_factor"] = grad_factor;
    ctx->set_materialize_grads(false);  // the codes have none
    ctx->mark_non_differentiable({codes});
    return {output, codes};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    static const auto op = find_operator<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t, int64_t, double)>(
        "_fake_quantize_learnable_backward");
    variable_list gradients(6);
    if (!grad_outputs[0].defined()) return gradients;
    const variable_list saved = ctx->get_saved_variables();
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      std::tie(gradients[0], gradients[1], std::ignore) =
          op.call(grad_outputs[0], saved[0], saved[1], given(saved[2]), ctx->saved_data["quant_min"].toInt(),
                  ctx->saved_data["quant_max"].toInt(), ctx->saved_data["grad_factor"].toDouble());
    }
    refuse_second_derivative(gradients, grad_outputs[0], "fake_quantize_codes");
    return gradients;
  }
};

// ---- a layer's training step ----------------------------------------------------------------------------------------

using Fold = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&,
                                                                        const at::Tensor&, double, int64_t, int64_t,
                                                                        bool, std::string_view, const OptionalTensor&);
using FoldBackward = std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const OptionalTensor&,
                                                                    const at::Tensor&, const at::Tensor&,
                                                                    const at::Tensor&, const at::Tensor&, double,
                                                                    const OptionalTensor&, int64_t, int64_t);
using NormForward = std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const OptionalTensor&,
                                                                   const OptionalTensor&, const OptionalTensor&,
                                                                   const OptionalTensor&, const OptionalTensor&,
                                                                   const OptionalTensor&, const OptionalTensor&,
                                                                   const OptionalTensor&, std::string_view, double,
                                                                   int64_t, int64_t, bool);
using NormBackward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, std::string_view, double, bool, bool,
    const OptionalTensor&, const OptionalTensor&, int64_t, int64_t);

struct ConvBatchNormFunction : torch::autograd::Function<ConvBatchNormFunction> {
  // Present always: input, weight, bn_weight, bn_bias. Absent ones have no place among those that needs_input_grad
  // counts. weight_scale and learned_scale: where they are learned.
  static variable_list forward(AutogradContext* ctx, const Variable& input, const Variable& weight,
                               const Variable& bn_weight, const Variable& bn_bias, const OptionalTensor& residual,
                               const OptionalTensor& weight_scale, const OptionalTensor& learned_scale,
                               const ConvBatchNorm& call, ConvBatchNormResult* result) {
    static const auto fold = find_operator<Fold>("_fold_fake_quantize");
    static const auto norm = find_operator<NormForward>("_batch_norm_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor variance = call.folding_variance.defined() ? call.folding_variance : call.running_var;
    auto [rounded, conv_scale, weight_mask, kept] =
        fold.call(weight, bn_weight, variance, call.eps, call.weight_min, call.weight_max, call.weight_symmetric,
                  name_of(input.scalar_type()), weight_scale);
    const at::Tensor y = at::convolution(input, rounded, {}, call.stride, call.padding, call.dilation,
                                         /*transposed=*/false, {0, 0}, call.groups);
    const bool quantizes = call.scale.defined(), with_range = quantizes && call.observes;
    const at::Tensor statistics = detail::batch_norm_statistics(y);
    at::Tensor range;
    if (call.moves || with_range) {
      range = detail::batch_norm_update_(statistics, bn_weight, bn_bias, conv_scale,
                                         call.moves ? given(call.running_mean) : std::nullopt,
                                         call.moves ? given(call.running_var) : std::nullopt, y.numel() / y.size(1),
                                         call.momentum, call.eps, call.activation, with_range);
      if (call.moves) call.batches.add_(1);
    }
    OptionalTensor scale, zero_point;
    if (quantizes) std::tie(scale, zero_point) = qparams_in_force(call, range);
    const bool bends = call.activation == "relu" || call.activation == "relu6";
    auto [output, codes, mask] =
        norm.call(y, statistics[0], statistics[1], bn_weight, bn_bias, conv_scale, residual, scale, zero_point,
                  call.activation, call.eps, call.quant_min, call.quant_max, bends || quantizes);
    ctx->saved_data["packing"] = packing_of(call.codes, call.packs_codes);
    ctx->save_for_backward({call.codes.defined() ? packed(call.codes, call.packs_codes) : input, call.input_scale,
                            call.input_zero_point, weight, rounded, weight_mask, kept, bn_weight, bn_bias, conv_scale,
                            y, statistics, mask, weight_scale.value_or(at::Tensor()),
                            learned_scale.value_or(at::Tensor()),
                            learned_scale && zero_point ? *zero_point : at::Tensor()});
    auto& data = ctx->saved_data;
    data["type"] = input.scalar_type();
    data["coded"] = call.codes.defined();
    data["stride"] = call.stride;
    data["padding"] = call.padding;
    data["dilation"] = call.dilation;
    data["groups"] = call.groups;
    data["activation"] = call.activation;
    data["eps"] = call.eps;
    data["with_residual"] = residual.has_value();
    data["weight_min"] = call.weight_min;
    data["weight_max"] = call.weight_max;
    data["weight_grad_factor"] = call.weight_grad_factor;
    data["quant_min"] = call.quant_min;
    data["quant_max"] = call.quant_max;
    data["grad_factor"] = call.grad_factor;
    save_gradient_quantizer(ctx, "grad_input", call.grad_input);
    save_gradient_quantizer(ctx, "grad_weight", call.grad_weight);
    ctx->set_materialize_grads(false);  // most results have none
    result->folding_variance = kept;
    if (!quantizes) return {output};
    // Beside the node: it would take them for results with a gradient.
    result->codes = codes;
    result->scale = *scale;
    result->zero_point = zero_point.value_or(at::Tensor());
    return {output};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    static const auto norm = find_operator<NormBackward>("_batch_norm_backward");
    static const auto fold = find_operator<FoldBackward>("_fold_fake_quantize_backward");
    variable_list gradients(9);
    if (!grad_outputs[0].defined()) return gradients;
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor weight_scale = given(saved[13]), learned_scale = given(saved[14]);
    const auto& [kept_input, input_scale, input_point, weight, rounded, weight_mask, variance, bn_weight, bn_bias,
                 conv_scale, y, statistics, mask] =
        std::tie(saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6], saved[7], saved[8], saved[9],
                 saved[10], saved[11], saved[12]);
    auto& data = ctx->saved_data;
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      const at::ScalarType type = data["type"].toScalarType();
      const double eps = data["eps"].toDouble();
      const at::Tensor grad_output = grad_outputs[0].scalar_type() == type ? grad_outputs[0] : grad_outputs[0].to(type);
      auto [grad_y, grad_residual, of_weight, of_bias, of_scale, of_step] =
          norm.call(grad_output, y, mask, statistics[0], statistics[1], bn_weight, bn_bias, conv_scale,
                    data["activation"].toStringRef(), eps, true, data["with_residual"].toBool(), learned_scale,
                    given(saved[15]), data["quant_min"].toInt(), data["quant_max"].toInt());
      const bool needs_weight = ctx->needs_input_grad(1) || ctx->needs_input_grad(2) || weight_scale;
      const at::Tensor input = data["coded"].toBool() ? decoded(unpacked(kept_input, data["packing"]), input_scale,
                                                                input_point, type, needs_weight)
                                                      : kept_input;
      const auto stride = data["stride"].toIntVector(), padding = data["padding"].toIntVector(),
                 dilation = data["dilation"].toIntVector();
      const at::Tensor plain = plain_weight(rounded);
      const auto products = [&](const at::Tensor& gradient, bool of_input, bool of_rounded) {
        return at::convolution_backward(gradient, input, plain, c10::nullopt, stride, padding, dilation,
                                        /*transposed=*/false, {0, 0}, data["groups"].toInt(),
                                        {of_input, of_rounded, false});
      };
      const GradientQuantizer for_input = saved_gradient_quantizer(ctx, "grad_input"),
                              for_weight = saved_gradient_quantizer(ctx, "grad_weight");
      at::Tensor grad_rounded;
      if (for_input.quantizer == "none" && for_weight.quantizer == "none") {
        std::tie(gradients[0], grad_rounded, std::ignore) = products(grad_y, ctx->needs_input_grad(0), needs_weight);
      } else {
        if (ctx->needs_input_grad(0))
          gradients[0] = std::get<0>(products(quantized_gradient(grad_y, for_input), true, false));
        if (needs_weight) grad_rounded = std::get<1>(products(quantized_gradient(grad_y, for_weight), false, true));
      }
      if (needs_weight) {
        auto [grad_weight, of_folding, of_weight_scale] =
            fold.call(grad_rounded, OptionalTensor(of_scale), weight, weight_mask, bn_weight, variance, eps,
                      weight_scale, data["weight_min"].toInt(), data["weight_max"].toInt());
        gradients[1] = grad_weight;
        gradients[2] = of_weight.add_(of_folding).to(bn_weight.scalar_type());
        if (weight_scale)
          gradients[5] = of_weight_scale.mul_(data["weight_grad_factor"].toDouble()).view(weight_scale->sizes());
      }
      gradients[3] = of_bias.to(bn_bias.scalar_type());
      if (data["with_residual"].toBool()) gradients[4] = grad_residual;
      if (learned_scale) gradients[6] = of_step.sum().mul_(data["grad_factor"].toDouble()).view(learned_scale->sizes());
    }
    refuse_second_derivative(gradients, grad_outputs[0], "conv_batch_norm");
    return gradients;
  }
};

at::Tensor quant_conv2d_autograd(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                                 const OptionalTensor& zero_point, const at::Tensor& weight, const OptionalTensor& bias,
                                 c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                                 c10::SymInt groups) {
  check_quant_conv2d(input, codes, scale, zero_point, weight, bias, stride, padding, dilation, groups);
  refuse_transforms("quant_conv2d", {input, weight, bias ? *bias : weight});
  if (needs_grad(input) || needs_grad(weight) || (bias && needs_grad(*bias)))
    return QuantConv2dFunction::apply(input, weight, codes, scale, bias, zero_point,
                                      Convolution{stride, padding, dilation, groups});
  const at::AutoDispatchBelowADInplaceOrView below;
  return at::convolution_symint(input, regular_weight(weight), bias, stride, padding, dilation, /*transposed=*/false,
                                {0, 0}, groups);
}

std::tuple<at::Tensor, at::Tensor> fake_quantize_codes_autograd(const at::Tensor& input, const at::Tensor& scale,
                                                                const OptionalTensor& zero_point, int64_t quant_min,
                                                                int64_t quant_max, double grad_factor) {
  refuse_transforms("fake_quantize_codes", {input, scale});
  if (needs_grad(scale)) {
    const variable_list results =
        FakeQuantizeLearnedCodesFunction::apply(input, scale, zero_point, quant_min, quant_max, grad_factor);
    return {results[0], results[1]};
  }
  if (needs_grad(input)) {
    const variable_list results = FakeQuantizeCodesFunction::apply(input, scale, zero_point, quant_min, quant_max);
    return {results[0], results[1]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return fake_quantize_codes(input, scale, zero_point, quant_min, quant_max, grad_factor);
}

}  // namespace

ConvBatchNormResult conv_batch_norm(const ConvBatchNorm& call) {
  ConvBatchNormResult result;
  const bool learns = call.scale.defined() && call.scale.requires_grad();
  result.output = ConvBatchNormFunction::apply(call.input, call.weight, call.bn_weight, call.bn_bias,
                                               given(call.residual), given(call.weight_scale),
                                               learns ? OptionalTensor(call.scale) : std::nullopt, call, &result)[0];
  return result;
}

}  // namespace quantrain

TORCH_LIBRARY_IMPL(quantrain, Autograd, m) {
  m.impl("quant_conv2d", &quantrain::quant_conv2d_autograd);
  m.impl("fake_quantize_codes", &quantrain::fake_quantize_codes_autograd);
}
