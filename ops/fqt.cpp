#include "quantrain/ops/fqt.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <vector>

#include "csrc/common/gradient_quant.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/fqt_check.h"
#include "ops/gradient_quant_check.h"

// Outputs of fqt_linear and fqt_conv2d: those of PyTorch's operators. Their derivatives are in autograd/fqt.cpp.

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// ---- checks ---------------------------------------------------------------------------------------------------------

void check_quantizer(std::string_view op, std::string_view gradient, const GradientQuantizer& quantizer) {
  const std::string prefix = std::string(gradient) + "_";
  const std::string fault = detail::gradient_quantizer_fault(quantizer, gradient, prefix, {"none"});
  QUANTRAIN_CHECK_VALUE(fault.empty(), "{}: expected {}", op, fault);
}

bool may_quantize(at::ScalarType type) { return type == at::kFloat || type == at::kHalf || type == at::kBFloat16; }

void check_image(std::string_view op, const at::Tensor& input, const at::Tensor& weight) {
  const auto at_least_one = [](const c10::SymInt& size) { return TORCH_GUARD_OR_TRUE(size.sym_ge(1)); };
  QUANTRAIN_CHECK_VALUE(weight.dim() == 4 && at_least_one(weight.sym_size(0)),
                        "{}: expected weight [O, C / groups, kh, kw] with O of at least 1, got {}", op,
                        detail::shape_text(weight));
  QUANTRAIN_CHECK_VALUE(
      (input.dim() == 3 || input.dim() == 4) && at_least_one(input.sym_size(-1)) && at_least_one(input.sym_size(-2)),
      "{}: expected input [N, C, H, W] or [C, H, W] of at least one pixel, got {}", op, detail::shape_text(input));
  detail::check_dense(op, "input", input);
  detail::check_dense(op, "weight", weight);
}

void check_tensors(std::string_view op, const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                   const GradientQuantizer& grad_input, const GradientQuantizer& grad_weight) {
  check_quantizer(op, "grad_input", grad_input);
  check_quantizer(op, "grad_weight", grad_weight);
  const bool exact = grad_input.quantizer == "none" && grad_weight.quantizer == "none";
  const at::ScalarType type = input.scalar_type();
  QUANTRAIN_CHECK_TYPE(may_quantize(type) || (exact && type == at::kDouble),
                       "{}: expected input of float32, float16 or bfloat16{}, got {}", op, exact ? " or float64" : "",
                       c10::toString(type));
  const auto check_like_input = [&](std::string_view name, const at::Tensor& tensor) {
    QUANTRAIN_CHECK_TYPE(tensor.scalar_type() == type, "{}: expected {} of input's type {}, got {}", op, name,
                         c10::toString(type), c10::toString(tensor.scalar_type()));
    detail::check_device(op, name, tensor, input, "input's");
  };
  detail::check_dense(op, "input", input);
  detail::check_dense(op, "weight", weight);
  if (bias) detail::check_dense(op, "bias", *bias);
  check_like_input("weight", weight);
  if (!bias) return;
  check_like_input("bias", *bias);
  QUANTRAIN_CHECK_VALUE(bias->dim() == 1 && TORCH_GUARD_OR_TRUE(bias->sym_size(0).sym_eq(weight.sym_size(0))),
                        "{}: expected bias of weight's dimension 0, got {} and {}", op, detail::shape_text(*bias),
                        detail::shape_text(weight));
}

void check_windows(c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation) {
  QUANTRAIN_CHECK_VALUE(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                        "fqt_conv2d: expected two sizes each for stride, padding and dilation, got {}, {} and {}",
                        stride.size(), padding.size(), dilation.size());
  const auto check = [](const char* name, c10::SymIntArrayRef sizes, int64_t least) {
    for (const c10::SymInt& size : sizes)
      QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(size.sym_ge(least)) && TORCH_GUARD_OR_TRUE(size.sym_le(kMaxWindow)),
                            "fqt_conv2d: expected {} in [{}, {}], got {}", name, least, kMaxWindow, c10::str(size));
  };
  check("stride", stride, 1);
  check("padding", padding, 0);
  check("dilation", dilation, 1);
}

// ---- kernels, also of Meta ------------------------------------------------------------------------------------------

at::Tensor fqt_linear_kernel(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                             QUANTRAIN_GRADIENTS_PARAMETERS) {
  check_fqt_linear(input, weight, bias, QUANTRAIN_GRADIENT_STRUCT(grad_input), QUANTRAIN_GRADIENT_STRUCT(grad_weight));
  return at::linear(input, weight, bias);
}

at::Tensor fqt_conv2d_kernel(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                             c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                             c10::SymInt groups, QUANTRAIN_GRADIENTS_PARAMETERS) {
  check_fqt_conv2d(input, weight, bias, stride, padding, dilation, groups, QUANTRAIN_GRADIENT_STRUCT(grad_input),
                   QUANTRAIN_GRADIENT_STRUCT(grad_weight));
  const bool batched = input.dim() == 4;
  const at::Tensor output = at::convolution_symint(batched ? input : input.unsqueeze(0), regular_weight(weight), bias,
                                                   stride, padding, dilation, /*transposed=*/false, {0, 0}, groups);
  return batched ? output : output.squeeze(0);
}

// ---- "same" and "valid" ---------------------------------------------------------------------------------------------

c10::TypedOperatorHandle<FqtConv2dSignature> fqt_conv2d_operator() {
  static const auto op = find_operator<FqtConv2dSignature>("fqt_conv2d");
  return op;
}

// As at::conv2d: an uneven padding has its larger half behind.
at::Tensor fqt_conv2d_padding(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                              c10::SymIntArrayRef stride, std::string_view padding, c10::SymIntArrayRef dilation,
                              c10::SymInt groups, QUANTRAIN_GRADIENTS_PARAMETERS) {
  QUANTRAIN_CHECK_VALUE(padding == "same" || padding == "valid",
                        "fqt_conv2d: expected padding to be sizes, 'same' or 'valid', got '{}'", padding);
  check_image("fqt_conv2d", input, weight);
  check_windows(stride, std::array<c10::SymInt, 2>{0, 0}, dilation);
  std::array<c10::SymInt, 2> symmetric = {0, 0};
  at::Tensor padded = input;
  if (padding == "same") {
    std::vector<c10::SymInt> extra(4, 0);  // last dimension first: before, behind
    bool uneven = false;
    for (const int d : {0, 1}) {
      QUANTRAIN_CHECK_VALUE(stride[d % stride.size()] == 1, "fqt_conv2d: expected stride 1 with padding 'same', got {}",
                            stride[d % stride.size()].guard_int(__FILE__, __LINE__));
      const c10::SymInt total = dilation[d % dilation.size()] * (weight.sym_size(2 + d) - 1);
      symmetric[d] = total / 2;
      extra[2 * (1 - d) + 1] = total - symmetric[d] * 2;
      uneven |= bool(extra[2 * (1 - d) + 1] != 0);
    }
    if (uneven) padded = at::constant_pad_nd_symint(input, extra, 0);
  }
  return fqt_conv2d_operator().call(padded, weight, bias, stride, symmetric, dilation, std::move(groups),
                                    QUANTRAIN_GRADIENTS_ARGUMENTS);
}

// ---- autocast -------------------------------------------------------------------------------------------------------

at::Tensor cast(const at::Tensor& tensor, c10::DeviceType device) {
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

OptionalTensor cast(const OptionalTensor& tensor, c10::DeviceType device) {
  return tensor ? OptionalTensor(cast(*tensor, device)) : std::nullopt;
}

template <c10::DeviceType device>
at::Tensor fqt_linear_autocast(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                               QUANTRAIN_GRADIENTS_PARAMETERS) {
  static const auto op = find_operator<FqtLinearSignature>("fqt_linear");
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  return op.call(cast(input, device), cast(weight, device), cast(bias, device), QUANTRAIN_GRADIENTS_ARGUMENTS);
}

template <c10::DeviceType device>
at::Tensor fqt_conv2d_autocast(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                               c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                               c10::SymInt groups, QUANTRAIN_GRADIENTS_PARAMETERS) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  return fqt_conv2d_operator().call(cast(input, device), cast(weight, device), cast(bias, device), stride, padding,
                                    dilation, std::move(groups), QUANTRAIN_GRADIENTS_ARGUMENTS);
}

GradientQuantizer with_rows(GradientQuantizer quantizer, const char* rows) {
  if (quantizer.rows.empty()) quantizer.rows = rows;
  return quantizer;
}

std::vector<c10::SymInt> pair(at::IntArrayRef sizes) {
  return sizes.size() == 1 ? std::vector<c10::SymInt>(2, sizes[0])
                           : std::vector<c10::SymInt>(sizes.begin(), sizes.end());
}

}  // namespace

at::Tensor regular_weight(const at::Tensor& weight) {
  return weight.is_contiguous(at::MemoryFormat::ChannelsLast) ? weight : weight.contiguous();
}

void check_fqt_linear(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                      const GradientQuantizer& grad_input, const GradientQuantizer& grad_weight) {
  QUANTRAIN_CHECK_VALUE(weight.dim() == 2, "fqt_linear: expected weight [O, K], got {}", detail::shape_text(weight));
  QUANTRAIN_CHECK_VALUE(input.dim() >= 1 && TORCH_GUARD_OR_TRUE(input.sym_size(-1).sym_eq(weight.sym_size(1))),
                        "fqt_linear: expected input [..., K] for weight [O, K], got {} and {}",
                        detail::shape_text(input), detail::shape_text(weight));
  check_tensors("fqt_linear", input, weight, bias, grad_input, grad_weight);
}

void check_fqt_conv2d(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                      c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                      const c10::SymInt& groups, const GradientQuantizer& grad_input,
                      const GradientQuantizer& grad_weight) {
  check_image("fqt_conv2d", input, weight);
  check_windows(stride, padding, dilation);
  QUANTRAIN_CHECK_VALUE(
      TORCH_GUARD_OR_TRUE(groups.sym_gt(0)) && TORCH_GUARD_OR_TRUE((input.sym_size(-3) % groups).sym_eq(0)) &&
          TORCH_GUARD_OR_TRUE((input.sym_size(-3) / groups).sym_eq(weight.sym_size(1))) &&
          TORCH_GUARD_OR_TRUE((weight.sym_size(0) % groups).sym_eq(0)),
      "fqt_conv2d: expected input of C channels for weight [O, C / groups, kh, kw] and O divisible by groups, got {} "
      "and {} in {} groups",
      detail::shape_text(input), detail::shape_text(weight), groups.maybe_as_int().value_or(-1));
  for (const int64_t d : {0, 1}) {
    const c10::SymInt padded = input.sym_size(d - 2) + padding[d] * 2, kernel = weight.sym_size(2 + d);
    QUANTRAIN_CHECK_VALUE(
        TORCH_GUARD_OR_TRUE(kernel.sym_ge(1)) && TORCH_GUARD_OR_TRUE(padded.sym_gt(dilation[d] * (kernel - 1))),
        "fqt_conv2d: expected a kernel of at least 1 that fits the padded input, got {}, dilated by {}, and {}",
        c10::str(kernel), c10::str(dilation[d]), c10::str(padded));
  }
  check_tensors("fqt_conv2d", input, weight, bias, grad_input, grad_weight);
}

at::Tensor fqt_linear(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                      const GradientQuantizer& grad_input, const GradientQuantizer& grad_weight) {
  static const auto op = find_operator<FqtLinearSignature>("fqt_linear");
  const GradientQuantizer x = with_rows(grad_input, "token"), w = with_rows(grad_weight, "token");
  return op.call(input, weight, bias, x.quantizer, x.bits, x.rows, x.preserve_zero, x.max_group, w.quantizer, w.bits,
                 w.rows, w.preserve_zero, w.max_group);
}

at::Tensor fqt_conv2d(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                      at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                      const GradientQuantizer& grad_input, const GradientQuantizer& grad_weight) {
  const GradientQuantizer x = with_rows(grad_input, "sample"), w = with_rows(grad_weight, "sample");
  return fqt_conv2d_operator().call(input, weight, bias, pair(stride), pair(padding), pair(dilation), groups,
                                    x.quantizer, x.bits, x.rows, x.preserve_zero, x.max_group, w.quantizer, w.bits,
                                    w.rows, w.preserve_zero, w.max_group);
}

at::Tensor fqt_conv2d(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                      at::IntArrayRef stride, std::string_view padding, at::IntArrayRef dilation, int64_t groups,
                      const GradientQuantizer& grad_input, const GradientQuantizer& grad_weight) {
  const GradientQuantizer x = with_rows(grad_input, "sample"), w = with_rows(grad_weight, "sample");
  return fqt_conv2d_padding(input, weight, bias, pair(stride), padding, pair(dilation), groups, x.quantizer, x.bits,
                            x.rows, x.preserve_zero, x.max_group, w.quantizer, w.bits, w.rows, w.preserve_zero,
                            w.max_group);
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  m.def(
      "fqt_linear(Tensor input, Tensor weight, Tensor? bias=None, *, "
      "str grad_input=\"none\", int grad_input_bits=8, str grad_input_rows=\"token\", bool "
      "grad_input_preserve_zero=False, "
      "int grad_input_max_group=128, "
      "str grad_weight=\"none\", int grad_weight_bits=8, str grad_weight_rows=\"token\", bool "
      "grad_weight_preserve_zero=False, "
      "int grad_weight_max_group=128) -> Tensor");
  m.def(
      "fqt_conv2d(Tensor input, Tensor weight, Tensor? bias=None, SymInt[2] stride=1, SymInt[2] padding=0, "
      "SymInt[2] dilation=1, SymInt groups=1, *, "
      "str grad_input=\"none\", int grad_input_bits=8, str grad_input_rows=\"sample\", bool "
      "grad_input_preserve_zero=False, "
      "int grad_input_max_group=128, "
      "str grad_weight=\"none\", int grad_weight_bits=8, str grad_weight_rows=\"sample\", bool "
      "grad_weight_preserve_zero=False, "
      "int grad_weight_max_group=128) -> Tensor");
  m.def(
      "fqt_conv2d.padding(Tensor input, Tensor weight, Tensor? bias=None, SymInt[2] stride=1, str padding=\"valid\", "
      "SymInt[2] dilation=1, SymInt groups=1, *, "
      "str grad_input=\"none\", int grad_input_bits=8, str grad_input_rows=\"sample\", bool "
      "grad_input_preserve_zero=False, "
      "int grad_input_max_group=128, "
      "str grad_weight=\"none\", int grad_weight_bits=8, str grad_weight_rows=\"sample\", bool "
      "grad_weight_preserve_zero=False, "
      "int grad_weight_max_group=128) -> Tensor");
}

TORCH_LIBRARY_IMPL(quantrain, CompositeExplicitAutograd, m) {
  m.impl("fqt_linear", &quantrain::fqt_linear_kernel);
  m.impl("fqt_conv2d", &quantrain::fqt_conv2d_kernel);
}
TORCH_LIBRARY_IMPL(quantrain, CompositeImplicitAutograd, m) {
  m.impl("fqt_conv2d.padding", &quantrain::fqt_conv2d_padding);
}
TORCH_LIBRARY_IMPL(quantrain, AutocastCPU, m) {
  m.impl("fqt_linear", &quantrain::fqt_linear_autocast<at::kCPU>);
  m.impl("fqt_conv2d", &quantrain::fqt_conv2d_autocast<at::kCPU>);
}
TORCH_LIBRARY_IMPL(quantrain, AutocastCUDA, m) {
  m.impl("fqt_linear", &quantrain::fqt_linear_autocast<at::kCUDA>);
  m.impl("fqt_conv2d", &quantrain::fqt_conv2d_autocast<at::kCUDA>);
}
