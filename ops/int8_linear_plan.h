// What the schema, the kernel and the derivative of int8_linear share.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>

#include "ops/common/matrix.h"
#include "ops/int8_auto.h"
#include "quantrain/ops/int8_linear.h"

namespace quantrain {

using Int8LinearSignature = at::Tensor(const at::Tensor& input, const at::Tensor& weight,
                                       const std::optional<at::Tensor>& bias, std::string_view output,
                                       std::string_view grad_input, std::string_view grad_weight,
                                       std::string_view weight_scheme, bool simulate,
                                       const std::optional<at::Tensor>& weight_codes,
                                       const std::optional<at::Tensor>& weight_scale);

// The operands of a call.
struct Int8LinearTensors {
  const at::Tensor& input;
  const at::Tensor& weight;
  const std::optional<at::Tensor>& bias;
  const std::optional<at::Tensor>& weight_codes;
  const std::optional<at::Tensor>& weight_scale;
};

// How a call runs: its arguments, checked, "auto" decided.
struct Int8LinearPlan {
  Int8Products<bool> int8{};
  std::string_view weight_scheme;  // static text
  bool simulate = false;

  bool any() const { return int8.output || int8.grad_input || int8.grad_weight; }
};

// All that can be wrong with a call's tensors.
void check_int8_linear(const Int8LinearTensors& tensors);

// input_grad, weight_grad: whether somebody needs that gradient; what nobody needs is not int8.
Int8LinearPlan plan_int8_linear(const Int8LinearTensors& tensors, const Int8LinearOptions& options, bool input_grad,
                                bool weight_grad);

// The output, and what was rounded for it.
struct Int8LinearResult {
  at::Tensor output;
  at::Tensor input_codes;   // where output or grad_weight is int8
  at::Tensor input_scale;   // likewise
  at::Tensor weight_scale;  // where output is int8
};

Int8LinearResult int8_linear_forward(const Int8LinearTensors& tensors, const Int8LinearPlan& plan);

// Codes a [..., K] times b [N, K], transposed: int8_mm, or that in float32 where simulated.
at::Tensor int8_product(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& a_scale,
                        const std::optional<at::Tensor>& b_scale, const std::optional<at::Tensor>& bias,
                        at::ScalarType dtype, bool simulate);

}  // namespace quantrain
