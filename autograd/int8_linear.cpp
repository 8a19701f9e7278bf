#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>

#include "autograd/node.h"
#include "autograd/second_derivative.h"
#include "ops/int8_linear_check.h"
#include "ops/int8_linear_plan.h"
#include "quantrain/ops/int8.h"

// Gradients of int8_linear (formulas in include/quantrain/ops/int8_linear.h).

namespace quantrain {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;

// What a node keeps beside its tensors, as one number: saved_data is a map of names, looked up in each pass.
struct Kept {
  bool grad_input;   // int8
  bool grad_weight;  // int8
  bool simulate;
  bool has_bias;
  int scheme;  // index in kInt8WeightSchemes
  at::ScalarType weight_type;
  at::ScalarType bias_type;

  int64_t packed() const {
    return grad_input | grad_weight << 1 | simulate << 2 | has_bias << 3 | scheme << 4 |
           static_cast<int>(weight_type) << 8 | static_cast<int>(bias_type) << 16;
  }

  static Kept unpacked(int64_t bits) {
    const auto type = [bits](int shift) { return static_cast<at::ScalarType>(bits >> shift & 0xff); };
    return {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0, static_cast<int>(bits >> 4 & 3),
            type(8),         type(16)};
  }
};

int scheme_index(std::string_view scheme) {
  int index = 0;
  while (detail::kInt8WeightSchemes[static_cast<size_t>(index)] != scheme) ++index;
  return index;
}

// Summed in float32 whatever the types.
at::Tensor sum_of_rows(const at::Tensor& grad_output, at::ScalarType type) {
  const at::Tensor rows = matrix(grad_output);
  return at::sum(rows, at::IntArrayRef{0}, /*keepdim=*/false, type);
}

struct Int8LinearFunction : torch::autograd::Function<Int8LinearFunction> {
  static constexpr bool is_traceable = true;
  static constexpr size_t kArguments = 6;
  enum Saved { kInput, kInputScale, kWeight, kWeightCodes, kWeightScale };

  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& weight,
                          const OptionalTensor& bias, const OptionalTensor& weight_codes,
                          const OptionalTensor& weight_scale, const Int8LinearPlan& plan) {
    const at::AutoDispatchBelowADInplaceOrView below;
    Int8LinearResult result = int8_linear_forward({input, weight, bias, weight_codes, weight_scale}, plan);
    const bool weight_grad = weight.requires_grad(), input_grad = input.requires_grad();
    variable_list saved(5);
    if (weight_grad && plan.int8.grad_weight) {
      saved[kInput] = std::move(result.input_codes);
      saved[kInputScale] = std::move(result.input_scale);
    } else if (weight_grad) {
      saved[kInput] = input;
    }
    if (input_grad) {
      saved[kWeight] = weight;
      if (plan.int8.grad_input) {
        if (weight_codes) saved[kWeightCodes] = *weight_codes;
        saved[kWeightScale] = weight_scale ? *weight_scale : std::move(result.weight_scale);
      }
    }
    ctx->save_for_backward(std::move(saved));
    const Kept kept{plan.int8.grad_input,
                    plan.int8.grad_weight,
                    plan.simulate,
                    bias.has_value(),
                    scheme_index(plan.weight_scheme),
                    weight.scalar_type(),
                    bias ? bias->scalar_type() : at::kFloat};
    ctx->saved_data["kept"] = kept.packed();
    return std::move(result.output);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Variable& grad_output = grad_outputs[0];
    const Kept kept = Kept::unpacked(ctx->saved_data["kept"].toInt());
    const variable_list saved = ctx->get_saved_variables();
    variable_list gradients(kArguments);
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      const bool input_grad = ctx->needs_input_grad(0), weight_grad = ctx->needs_input_grad(1);
      const bool rows = input_grad && kept.grad_input, columns = weight_grad && kept.grad_weight;
      Int8WeightTranspose weight;
      Int8QuantizeOptions options{.stochastic = true};
      if (rows) {
        weight = transposed_weight(saved, kept);
        options.column_factor = weight.column_factor;
      }
      if (columns) options.row_factor = saved[kInputScale];
      Int8RowsAndColumns codes;
      if (rows && columns) {
        codes = int8_quantize_rows_and_columns(grad_output, options);
      } else if (rows) {
        codes.rows = int8_quantize_rows(grad_output, options);
      } else if (columns) {
        codes.columns = int8_quantize_columns(grad_output, options);
      }
      const at::ScalarType type = grad_output.scalar_type();
      if (rows) {
        gradients[0] = int8_product(codes.rows.codes, weight.codes, codes.rows.scale, weight.scale, std::nullopt, type,
                                    kept.simulate);
      } else if (input_grad) {
        gradients[0] = at::matmul(grad_output, in_type(saved[kWeight], type));
      }
      if (columns) {
        gradients[1] = int8_product(codes.columns.codes, int8_transpose(matrix(saved[kInput])), codes.columns.scale,
                                    std::nullopt, std::nullopt, kept.weight_type, kept.simulate);
      } else if (weight_grad) {
        gradients[1] = in_type(at::matmul(matrix(grad_output).t(), matrix(saved[kInput])), kept.weight_type);
      }
      // Without a bias there is no edge that could be asked.
      if (kept.has_bias && ctx->needs_input_grad(2)) gradients[2] = sum_of_rows(grad_output, kept.bias_type);
    }
    refuse_second_derivative(gradients, grad_output, "int8_linear");
    return gradients;
  }

 private:
  static Int8WeightTranspose transposed_weight(const variable_list& saved, const Kept& kept) {
    const std::string_view scheme = detail::kInt8WeightSchemes[static_cast<size_t>(kept.scheme)];
    // The codes serve where they are folded for sure. Columns are quantized from the weight, so that it is rounded
    // once.
    const at::Tensor &codes = saved[kWeightCodes], &scale = saved[kWeightScale];
    if (scale.defined() && codes.defined() && scheme == "fold") return int8_weight_transpose(codes, scale, scheme);
    if (scale.defined()) return int8_weight_transpose(saved[kWeight], scale, scheme);
    return int8_weight_transpose(saved[kWeight], int8_quantize_rows(saved[kWeight]).scale, scheme);
  }
};

at::Tensor int8_linear_autograd(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                std::string_view output, std::string_view grad_input, std::string_view grad_weight,
                                std::string_view weight_scheme, bool simulate, const OptionalTensor& weight_codes,
                                const OptionalTensor& weight_scale) {
  const Int8LinearTensors tensors{input, weight, bias, weight_codes, weight_scale};
  check_int8_linear(tensors);
  refuse_transforms("int8_linear", {input, weight, bias ? *bias : weight});
  const bool input_grad = needs_grad(input), weight_grad = needs_grad(weight);
  const Int8LinearPlan plan =
      plan_int8_linear(tensors, {output, grad_input, grad_weight, weight_scheme, simulate}, input_grad, weight_grad);
  if (!plan.any()) {
    const at::ScalarType type = input.scalar_type();
    return at::linear(input, in_type(weight, type), bias ? OptionalTensor(in_type(*bias, type)) : bias);
  }
  if (input_grad || weight_grad || (bias && needs_grad(*bias)))
    return Int8LinearFunction::apply(input, weight, bias, weight_codes, weight_scale, plan);
  const at::AutoDispatchBelowADInplaceOrView below;
  return int8_linear_forward(tensors, plan).output;
}

}  // namespace
}  // namespace quantrain

TORCH_LIBRARY_IMPL(quantrain, Autograd, m) { m.impl("int8_linear", &quantrain::int8_linear_autograd); }
