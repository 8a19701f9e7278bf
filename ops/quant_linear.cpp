#include "quantrain/ops/quant_linear.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/matrix.h"
#include "ops/fake_quant_check.h"
#include "ops/norm_act_operators.h"
#include "ops/quant_linear_check.h"

// The output of quant_linear: that of PyTorch's linear. Its derivative is in autograd/quant_linear.cpp.

namespace quantrain {

using OptionalTensor = std::optional<at::Tensor>;

void check_quant_linear(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                        const OptionalTensor& zero_point, const at::Tensor& weight, const OptionalTensor& bias,
                        int64_t weight_groups, int64_t weight_min, int64_t weight_max) {
  constexpr std::string_view kOp = "quant_linear";
  detail::check_dense(kOp, "input", input);
  detail::check_dense(kOp, "weight", weight);
  detail::check_float(kOp, "input", input.scalar_type());
  const auto check_like_input = [&](std::string_view name, const at::Tensor& tensor) {
    QUANTRAIN_CHECK_TYPE(tensor.scalar_type() == input.scalar_type(), "{}: expected {} of input's type {}, got {}", kOp,
                         name, c10::toString(input.scalar_type()), c10::toString(tensor.scalar_type()));
    detail::check_device(kOp, name, tensor, input, "input's");
  };
  if (weight_groups == 0 || weight.scalar_type() != at::kFloat) check_like_input("weight", weight);
  detail::check_device(kOp, "weight", weight, input, "input's");
  QUANTRAIN_CHECK_VALUE(weight_min < weight_max && weight_min >= -128 && weight_max <= 127,
                        "{}: expected codes of the weight within -128 to 127, got {} to {}", kOp, weight_min,
                        weight_max);
  QUANTRAIN_CHECK_VALUE(
      input.dim() >= 1 && weight.dim() == 2 && TORCH_GUARD_OR_TRUE(weight.sym_size(1).sym_eq(input.sym_size(-1))),
      "{}: expected weight [N, K] of input's last dimension, got {} and {}", kOp, detail::shape_text(weight),
      detail::shape_text(input));
  QUANTRAIN_CHECK_VALUE(
      weight_groups >= 0 && (weight_groups == 0 || TORCH_GUARD_OR_TRUE((weight.sym_size(1) % weight_groups).sym_eq(0))),
      "{}: expected weight_groups that divide the rows of weight {}, or 0, got {}", kOp, detail::shape_text(weight),
      weight_groups);
  if (bias) {
    detail::check_dense(kOp, "bias", *bias);
    check_like_input("bias", *bias);
    QUANTRAIN_CHECK_VALUE(bias->dim() == 1 && TORCH_GUARD_OR_TRUE(bias->sym_size(0).sym_eq(weight.sym_size(0))),
                          "{}: expected bias of weight's dimension 0, got {} and {}", kOp, detail::shape_text(*bias),
                          detail::shape_text(weight));
  }
  QUANTRAIN_CHECK_TYPE(codes.scalar_type() == at::kChar || codes.scalar_type() == at::kByte,
                       "{}: expected codes of int8 or uint8, got {}", kOp, c10::toString(codes.scalar_type()));
  detail::check_device(kOp, "codes", codes, input, "input's");
  bool same = codes.dim() == input.dim();
  for (int64_t d = 0; same && d < input.dim(); ++d)
    same = TORCH_GUARD_OR_TRUE(codes.sym_size(d).sym_eq(input.sym_size(d)));
  QUANTRAIN_CHECK_VALUE(same, "{}: expected codes of input's shape {}, got {}", kOp, detail::shape_text(input),
                        detail::shape_text(codes));
  check_qparams(kOp, input, scale, zero_point);
}

at::Tensor rounded_weight(const at::Tensor& weight, int64_t groups, int64_t quant_min, int64_t quant_max,
                          at::ScalarType type) {
  static const auto op = find_operator<NormActForward>("_norm_act_forward");
  if (groups == 0) return in_type(weight, type);
  const OptionalTensor none;
  const at::Tensor rows = weight.reshape_symint({weight.sym_size(0) * groups, weight.sym_size(1) / groups});
  const std::string_view name = type == at::kFloat ? "float32" : type == at::kHalf ? "float16" : "bfloat16";
  return std::get<0>(op.call(rows, none, none, none, none, none, "identity", 0.0, quant_min, quant_max,
                             /*symmetric=*/true, name, /*with_codes=*/false, /*with_mask=*/false))
      .view_symint(weight.sym_sizes());
}

namespace {

at::Tensor quant_linear_kernel(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                               const OptionalTensor& zero_point, const at::Tensor& weight, const OptionalTensor& bias,
                               int64_t weight_groups, int64_t weight_min, int64_t weight_max) {
  check_quant_linear(input, codes, scale, zero_point, weight, bias, weight_groups, weight_min, weight_max);
  return at::linear(input, rounded_weight(weight, weight_groups, weight_min, weight_max, input.scalar_type()), bias);
}

template <c10::DeviceType kDevice>
at::Tensor quant_linear_autocast(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                                 const OptionalTensor& zero_point, const at::Tensor& weight, const OptionalTensor& bias,
                                 int64_t weight_groups, int64_t weight_min, int64_t weight_max) {
  static const auto op = find_operator<decltype(quant_linear_kernel)>("quant_linear");
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const at::ScalarType type = at::autocast::get_autocast_dtype(kDevice);
  const auto cast = [&](const at::Tensor& t) { return at::autocast::cached_cast(type, t, kDevice); };
  const bool rounds = weight_groups > 0 && weight.scalar_type() == at::kFloat;  // straight to the product's type
  return op.call(cast(input), codes, scale, zero_point, rounds ? weight : cast(weight),
                 bias ? OptionalTensor(cast(*bias)) : bias, weight_groups, weight_min, weight_max);
}

}  // namespace

// ---- public functions -----------------------------------------------------------------------------------------------

at::Tensor quant_linear(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                        const std::optional<at::Tensor>& zero_point, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, int64_t weight_groups, int64_t weight_min,
                        int64_t weight_max) {
  static const auto op = find_operator<decltype(quant_linear_kernel)>("quant_linear");
  return op.call(input, codes, scale, zero_point, weight, bias, weight_groups, weight_min, weight_max);
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  m.def(
      "quant_linear(Tensor input, Tensor codes, Tensor scale, Tensor? zero_point, Tensor weight, Tensor? bias=None, *, "
      "int weight_groups=0, int weight_min=-128, int weight_max=127) -> Tensor");
}

TORCH_LIBRARY_IMPL(quantrain, CompositeExplicitAutograd, m) { m.impl("quant_linear", &quantrain::quant_linear_kernel); }
TORCH_LIBRARY_IMPL(quantrain, AutocastCPU, m) { m.impl("quant_linear", &quantrain::quant_linear_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(quantrain, AutocastCUDA, m) { m.impl("quant_linear", &quantrain::quant_linear_autocast<at::kCUDA>); }
