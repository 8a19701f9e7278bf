#include "quantrain/ops/quant_linear.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/fake_quant_check.h"
#include "ops/quant_linear_check.h"

// The output of quant_linear: that of PyTorch's linear. Its derivative is in autograd/quant_linear.cpp.

namespace quantrain {

using OptionalTensor = std::optional<at::Tensor>;

void check_quant_linear(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                        const OptionalTensor& zero_point, const at::Tensor& weight, const OptionalTensor& bias) {
  constexpr std::string_view kOp = "quant_linear";
  detail::check_dense(kOp, "input", input);
  detail::check_dense(kOp, "weight", weight);
  detail::check_float(kOp, "input", input.scalar_type());
  const auto check_like_input = [&](std::string_view name, const at::Tensor& tensor) {
    QUANTRAIN_CHECK_TYPE(tensor.scalar_type() == input.scalar_type(), "{}: expected {} of input's type {}, got {}", kOp,
                         name, c10::toString(input.scalar_type()), c10::toString(tensor.scalar_type()));
    detail::check_device(kOp, name, tensor, input, "input's");
  };
  check_like_input("weight", weight);
  QUANTRAIN_CHECK_VALUE(
      input.dim() >= 1 && weight.dim() == 2 && TORCH_GUARD_OR_TRUE(weight.sym_size(1).sym_eq(input.sym_size(-1))),
      "{}: expected weight [N, K] of input's last dimension, got {} and {}", kOp, detail::shape_text(weight),
      detail::shape_text(input));
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

namespace {

at::Tensor quant_linear_kernel(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                               const OptionalTensor& zero_point, const at::Tensor& weight, const OptionalTensor& bias) {
  check_quant_linear(input, codes, scale, zero_point, weight, bias);
  return at::linear(input, weight, bias);
}

template <c10::DeviceType kDevice>
at::Tensor quant_linear_autocast(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                                 const OptionalTensor& zero_point, const at::Tensor& weight,
                                 const OptionalTensor& bias) {
  static const auto op = find_operator<decltype(quant_linear_kernel)>("quant_linear");
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const at::ScalarType type = at::autocast::get_autocast_dtype(kDevice);
  const auto cast = [&](const at::Tensor& t) { return at::autocast::cached_cast(type, t, kDevice); };
  return op.call(cast(input), codes, scale, zero_point, cast(weight), bias ? OptionalTensor(cast(*bias)) : bias);
}

}  // namespace

// ---- public functions -----------------------------------------------------------------------------------------------

at::Tensor quant_linear(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                        const std::optional<at::Tensor>& zero_point, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias) {
  static const auto op = find_operator<decltype(quant_linear_kernel)>("quant_linear");
  return op.call(input, codes, scale, zero_point, weight, bias);
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  m.def(
      "quant_linear(Tensor input, Tensor codes, Tensor scale, Tensor? zero_point, Tensor weight, Tensor? bias=None) -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(quantrain, CompositeExplicitAutograd, m) { m.impl("quant_linear", &quantrain::quant_linear_kernel); }
TORCH_LIBRARY_IMPL(quantrain, AutocastCPU, m) { m.impl("quant_linear", &quantrain::quant_linear_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(quantrain, AutocastCUDA, m) { m.impl("quant_linear", &quantrain::quant_linear_autocast<at::kCUDA>); }
