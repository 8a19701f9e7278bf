#include "quantrain/ops/int8_linear.h"

#include <algorithm>
#include <string>

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/layout.h"
#include "ops/int8_linear_check.h"
#include "ops/int8_linear_plan.h"
#include "quantrain/ops/fake_quant.h"
#include "quantrain/ops/int8.h"

// Arguments and output of int8_linear. Its derivative is in autograd/int8_linear.cpp.

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr std::string_view kOp = "int8_linear";

// ---- checks ---------------------------------------------------------------------------------------------------------

void check_float(const char* name, const at::Tensor& tensor, const at::Tensor& input) {
  const at::ScalarType type = tensor.scalar_type();
  detail::check_float(kOp, name, type);
  detail::check_device(kOp, name, tensor, input, "input's");
  detail::check_dense(kOp, name, tensor);
}

void check_weight_codes(const at::Tensor& codes, const at::Tensor& scale, const at::Tensor& weight) {
  QUANTRAIN_CHECK_TYPE(codes.scalar_type() == at::kChar && scale.scalar_type() == at::kFloat,
                       "{}: expected weight_codes of int8 and weight_scale of float32, got {} and {}", kOp,
                       c10::toString(codes.scalar_type()), c10::toString(scale.scalar_type()));
  QUANTRAIN_CHECK_TYPE(codes.device() == weight.device() && scale.device() == weight.device(),
                       "{}: expected weight_codes and weight_scale on weight's device {}, got {} and {}", kOp,
                       weight.device().str(), codes.device().str(), scale.device().str());
  QUANTRAIN_CHECK_VALUE(codes.dim() == 2 && TORCH_GUARD_OR_TRUE(codes.sym_size(0).sym_eq(weight.sym_size(0))) &&
                            TORCH_GUARD_OR_TRUE(codes.sym_size(1).sym_eq(weight.sym_size(1))) &&
                            TORCH_GUARD_OR_TRUE(scale.sym_numel().sym_eq(weight.sym_size(0))),
                        "{}: expected weight_codes [O, K] and weight_scale of O elements for weight {}, got {} and {}",
                        kOp, detail::shape_text(weight), detail::shape_text(codes), detail::shape_text(scale));
}

Int8Mode parse_mode(std::string_view mode) {
  return mode == "int8" ? Int8Mode::kInt8 : mode == "auto" ? Int8Mode::kAuto : Int8Mode::kNone;
}

int64_t known_or_largest(const c10::SymInt& size) { return size.maybe_as_int().value_or(int64_t{1} << 20); }

// ---- kernel, also of Meta -------------------------------------------------------------------------------------------

OptionalTensor cast_to(const OptionalTensor& tensor, at::ScalarType type) {
  return tensor ? OptionalTensor(in_type(*tensor, type)) : std::nullopt;
}

// At or below the dispatcher's autograd: nobody needs a gradient.
at::Tensor int8_linear_kernel(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                              std::string_view output, std::string_view grad_input, std::string_view grad_weight,
                              std::string_view weight_scheme, bool simulate, const OptionalTensor& weight_codes,
                              const OptionalTensor& weight_scale) {
  const Int8LinearTensors tensors{input, weight, bias, weight_codes, weight_scale};
  check_int8_linear(tensors);
  const Int8LinearOptions options{output, grad_input, grad_weight, weight_scheme, simulate};
  return int8_linear_forward(tensors, plan_int8_linear(tensors, options, false, false)).output;
}

c10::TypedOperatorHandle<Int8LinearSignature> int8_linear_operator() {
  static const auto op = find_operator<Int8LinearSignature>("int8_linear");
  return op;
}

// ---- autocast -------------------------------------------------------------------------------------------------------

bool needs_grad(const at::Tensor& tensor) { return at::GradMode::is_enabled() && tensor.requires_grad(); }

// Where no product is in int8, that is linear's business: it casts the weight, once for several calls.
template <c10::DeviceType device>
at::Tensor int8_linear_autocast(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                std::string_view output, std::string_view grad_input, std::string_view grad_weight,
                                std::string_view weight_scheme, bool simulate, const OptionalTensor& weight_codes,
                                const OptionalTensor& weight_scale) {
  const at::Tensor x = at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), input, device);
  const Int8LinearTensors tensors{x, weight, bias, weight_codes, weight_scale};
  check_int8_linear(tensors);
  const Int8LinearPlan plan = plan_int8_linear(tensors, {output, grad_input, grad_weight, weight_scheme, simulate},
                                               needs_grad(x), needs_grad(weight));
  if (!plan.any()) return at::linear(x, weight, bias);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto mode = [](bool int8) -> std::string_view { return int8 ? "int8" : "none"; };
  return int8_linear_operator().call(x, weight, bias, mode(plan.int8.output), mode(plan.int8.grad_input),
                                     mode(plan.int8.grad_weight), plan.weight_scheme, simulate, weight_codes,
                                     weight_scale);
}

}  // namespace

// ---- what the derivative uses too -----------------------------------------------------------------------------------

void check_int8_linear(const Int8LinearTensors& t) {
  check_float("input", t.input, t.input);
  check_float("weight", t.weight, t.input);
  QUANTRAIN_CHECK_VALUE(t.weight.dim() == 2, "{}: expected weight [O, K], got {}", kOp, detail::shape_text(t.weight));
  QUANTRAIN_CHECK_VALUE(t.input.dim() >= 1 && TORCH_GUARD_OR_TRUE(t.input.sym_size(-1).sym_eq(t.weight.sym_size(1))),
                        "{}: expected input [..., K] for weight [O, K], got {} and {}", kOp,
                        detail::shape_text(t.input), detail::shape_text(t.weight));
  if (t.bias) {
    check_float("bias", *t.bias, t.input);
    QUANTRAIN_CHECK_VALUE(t.bias->dim() == 1 && TORCH_GUARD_OR_TRUE(t.bias->sym_size(0).sym_eq(t.weight.sym_size(0))),
                          "{}: expected bias of weight's dimension 0, got {} and {}", kOp, detail::shape_text(*t.bias),
                          detail::shape_text(t.weight));
  }
  QUANTRAIN_CHECK_VALUE(t.weight_codes.has_value() == t.weight_scale.has_value(),
                        "{}: expected weight_codes and weight_scale together, got {} alone", kOp,
                        t.weight_codes ? "weight_codes" : "weight_scale");
  if (t.weight_codes) check_weight_codes(*t.weight_codes, *t.weight_scale, t.weight);
}

Int8LinearPlan plan_int8_linear(const Int8LinearTensors& t, const Int8LinearOptions& options, bool input_grad,
                                bool weight_grad) {
  const std::string fault = detail::int8_linear_fault(options);
  QUANTRAIN_CHECK_VALUE(fault.empty(), "{}: expected {}", kOp, fault);
  Int8Products<Int8Mode> asked{parse_mode(options.output), parse_mode(options.grad_input),
                               parse_mode(options.grad_weight)};
  if (!input_grad) asked.grad_input = Int8Mode::kNone;
  if (!weight_grad) asked.grad_weight = Int8Mode::kNone;
  Int8LinearPlan plan;
  plan.weight_scheme = *std::find(detail::kInt8WeightSchemes.begin(), detail::kInt8WeightSchemes.end(),
                                  options.weight_scheme);  // of static storage, as the plan outlives the arguments
  plan.simulate = options.simulate;
  const auto is_auto = [](Int8Mode mode) { return mode == Int8Mode::kAuto; };
  if (options.simulate || !(is_auto(asked.output) || is_auto(asked.grad_input) || is_auto(asked.grad_weight))) {
    const auto chosen = [](Int8Mode mode) { return mode != Int8Mode::kNone; };
    plan.int8 = {chosen(asked.output), chosen(asked.grad_input), chosen(asked.grad_weight)};
    return plan;
  }
  const Int8LinearShape shape{int8_token_bucket(rows_of(t.input)), known_or_largest(t.weight.sym_size(1)),
                              known_or_largest(t.weight.sym_size(0)), t.input.scalar_type(), t.weight.scalar_type()};
  plan.int8 = choose_int8(shape, t.input.device(), asked);
  return plan;
}

at::Tensor int8_product(const at::Tensor& a, const at::Tensor& b, const OptionalTensor& a_scale,
                        const OptionalTensor& b_scale, const OptionalTensor& bias, at::ScalarType dtype,
                        bool simulate) {
  if (!simulate) return int8_mm(a, b, a_scale, b_scale, bias, dtype);
  const auto values = [](const at::Tensor& codes, const OptionalTensor& scale) {
    return scale ? dequantize(codes, *scale, std::nullopt, at::kFloat) : codes.to(at::kFloat);
  };
  return in_type(at::linear(values(a, a_scale), values(b, b_scale), cast_to(bias, at::kFloat)), dtype);
}

Int8LinearResult int8_linear_forward(const Int8LinearTensors& t, const Int8LinearPlan& plan) {
  const at::ScalarType type = t.input.scalar_type();
  Int8LinearResult result;
  if (plan.int8.output || plan.int8.grad_weight) {
    Int8Codes x = int8_quantize_rows(t.input);
    result.input_codes = std::move(x.codes);
    result.input_scale = std::move(x.scale);
  }
  if (!plan.int8.output) {
    result.output = at::linear(t.input, in_type(t.weight, type), cast_to(t.bias, type));
    return result;
  }
  const Int8Codes w = t.weight_codes ? Int8Codes{*t.weight_codes, *t.weight_scale} : int8_quantize_rows(t.weight);
  result.output = int8_product(result.input_codes, w.codes, result.input_scale, w.scale, t.bias, type, plan.simulate);
  result.weight_scale = w.scale;
  return result;
}

// ---- public function ------------------------------------------------------------------------------------------------

at::Tensor int8_linear(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                       const Int8LinearOptions& options, const OptionalTensor& weight_codes,
                       const OptionalTensor& weight_scale) {
  return int8_linear_operator().call(input, weight, bias, options.output, options.grad_input, options.grad_weight,
                                     options.weight_scheme, options.simulate, weight_codes, weight_scale);
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  m.def(
      "int8_linear(Tensor input, Tensor weight, Tensor? bias=None, *, str output=\"int8\", str grad_input=\"int8\", "
      "str grad_weight=\"int8\", str weight_scheme=\"auto\", bool simulate=False, Tensor? weight_codes=None, "
      "Tensor? weight_scale=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(quantrain, CompositeExplicitAutograd, m) { m.impl("int8_linear", &quantrain::int8_linear_kernel); }
TORCH_LIBRARY_IMPL(quantrain, AutocastCPU, m) { m.impl("int8_linear", &quantrain::int8_linear_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(quantrain, AutocastCUDA, m) { m.impl("int8_linear", &quantrain::int8_linear_autocast<at::kCUDA>); }
