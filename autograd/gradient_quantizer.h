// The quantizers of a gradient in a node: what is kept of them, and their draws.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <string>
#include <tuple>

#include "ops/common/dispatch.h"
#include "quantrain/ops/gradient_quant.h"

namespace quantrain {

inline void save_gradient_quantizer(torch::autograd::AutogradContext* ctx, const std::string& name,
                                    const GradientQuantizer& q) {
  ctx->saved_data[name] = q.quantizer;
  ctx->saved_data[name + "_bits"] = q.bits;
  ctx->saved_data[name + "_rows"] = q.rows;
  ctx->saved_data[name + "_preserve_zero"] = q.preserve_zero;
  ctx->saved_data[name + "_max_group"] = q.max_group;
}

inline GradientQuantizer saved_gradient_quantizer(torch::autograd::AutogradContext* ctx, const std::string& name) {
  return {ctx->saved_data[name].toStringRef(), ctx->saved_data[name + "_bits"].toInt(),
          ctx->saved_data[name + "_rows"].toStringRef(), ctx->saved_data[name + "_preserve_zero"].toBool(),
          ctx->saved_data[name + "_max_group"].toInt()};
}

// Q(dY), a new draw at each call.
inline at::Tensor quantized_gradient(const at::Tensor& grad_output, const GradientQuantizer& q) {
  static const auto op =
      find_operator<at::Tensor(const at::Tensor&, int64_t, std::string_view, std::string_view, bool, int64_t, bool,
                               const std::optional<at::Generator>&)>("quantize_gradient");
  if (q.quantizer == "none" || grad_output.sym_numel() == 0) return grad_output;
  return op.call(grad_output, q.bits, q.quantizer, q.rows, q.preserve_zero, q.max_group, /*stochastic=*/true,
                 std::nullopt);
}

// The same for both products, in one reading of dY where one takes a grid per row and the other one per column; the draws
// are those of quantized_gradient for the first, then for the second.
inline std::tuple<at::Tensor, at::Tensor> quantized_gradients(const at::Tensor& grad_output,
                                                              const GradientQuantizer& first,
                                                              const GradientQuantizer& second) {
  static const auto op = find_operator<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, int64_t, bool, int64_t, bool, std::string_view, const std::optional<at::Generator>&)>(
      "_quantize_gradient_both");
  const bool both = first.quantizer == "per_sample" && second.quantizer == "per_channel" && first.rows == second.rows;
  if (both && grad_output.sym_numel() != 0)
    return op.call(grad_output, first.bits, first.preserve_zero, second.bits, second.preserve_zero, first.rows,
                   std::nullopt);
  at::Tensor of_first = quantized_gradient(grad_output, first);
  return {of_first, quantized_gradient(grad_output, second)};
}

}  // namespace quantrain
