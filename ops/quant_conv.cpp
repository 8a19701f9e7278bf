#include "quantrain/ops/quant_conv.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/convolution.h>
#include <torch/library.h>

#include <vector>

#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/layout.h"
#include "ops/fqt_check.h"
#include "ops/quant_conv_check.h"

// The output of quant_conv2d: that of PyTorch's convolution. Its derivative is in autograd/quant_conv.cpp.

namespace quantrain {

using OptionalTensor = std::optional<at::Tensor>;

void check_quant_conv2d(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                        const OptionalTensor& zero_point, const at::Tensor& weight, const OptionalTensor& bias,
                        c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                        const c10::SymInt& groups) {
  constexpr std::string_view kOp = "quant_conv2d";
  const GradientQuantizer none{.rows = "sample"};
  check_fqt_conv2d(input, weight, bias, stride, padding, dilation, groups, none, none);
  QUANTRAIN_CHECK_VALUE(input.dim() == 4, "{}: expected input [N, C, H, W], got {}", kOp, detail::shape_text(input));
  QUANTRAIN_CHECK_TYPE(codes.scalar_type() == at::kChar || codes.scalar_type() == at::kByte,
                       "{}: expected codes of int8 or uint8, got {}", kOp, c10::toString(codes.scalar_type()));
  detail::check_device(kOp, "codes", codes, input, "input's");
  bool same = codes.dim() == input.dim();
  for (int64_t d = 0; same && d < input.dim(); ++d)
    same = TORCH_GUARD_OR_TRUE(codes.sym_size(d).sym_eq(input.sym_size(d)));
  QUANTRAIN_CHECK_VALUE(same, "{}: expected codes of input's shape {}, got {}", kOp, detail::shape_text(input),
                        detail::shape_text(codes));
  detail::check_type(kOp, "scale", scale, at::kFloat, "float32");
  detail::check_device(kOp, "scale", scale, input, "input's");
  QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(scale.sym_numel().sym_eq(1)),
                        "{}: expected one scale for the tensor, got {}", kOp, detail::shape_text(scale));
  if (!zero_point) return;
  QUANTRAIN_CHECK_TYPE(holds_integers(*zero_point), "{}: expected zero_point of an integer type, got {}", kOp,
                       c10::toString(zero_point->scalar_type()));
  detail::check_device(kOp, "zero_point", *zero_point, input, "input's");
  QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(zero_point->sym_numel().sym_eq(1)),
                        "{}: expected one zero_point for the tensor, got {}", kOp, detail::shape_text(*zero_point));
}

namespace {

at::Tensor quant_conv2d_kernel(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                               const OptionalTensor& zero_point, const at::Tensor& weight, const OptionalTensor& bias,
                               c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                               c10::SymInt groups) {
  check_quant_conv2d(input, codes, scale, zero_point, weight, bias, stride, padding, dilation, groups);
  return at::convolution_symint(input, regular_weight(weight), bias, stride, padding, dilation, /*transposed=*/false,
                                {0, 0}, groups);
}

template <c10::DeviceType kDevice>
at::Tensor quant_conv2d_autocast(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                                 const OptionalTensor& zero_point, const at::Tensor& weight, const OptionalTensor& bias,
                                 c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                                 c10::SymInt groups) {
  static const auto op = find_operator<decltype(quant_conv2d_kernel)>("quant_conv2d");
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const at::ScalarType type = at::autocast::get_autocast_dtype(kDevice);
  const auto cast = [&](const at::Tensor& t) { return at::autocast::cached_cast(type, t, kDevice); };
  return op.call(cast(input), codes, scale, zero_point, cast(weight), bias ? OptionalTensor(cast(*bias)) : bias, stride,
                 padding, dilation, groups);
}

std::vector<c10::SymInt> two(at::IntArrayRef sizes) {
  return sizes.size() == 1 ? std::vector<c10::SymInt>{sizes[0], sizes[0]}
                           : std::vector<c10::SymInt>(sizes.begin(), sizes.end());
}

// Where no gradient is needed. The norm's pass without a norm.
std::tuple<at::Tensor, at::Tensor> fake_quantize_codes_kernel(const at::Tensor& input, const at::Tensor& scale,
                                                              const OptionalTensor& zero_point, int64_t quant_min,
                                                              int64_t quant_max, double) {
  auto [output, codes, mask] = fake_quantize_codes_forward(input, scale, zero_point, quant_min, quant_max, false);
  return {output, codes};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quantize_codes_forward(const at::Tensor& input,
                                                                           const at::Tensor& scale,
                                                                           const OptionalTensor& zero_point,
                                                                           int64_t quant_min, int64_t quant_max,
                                                                           bool with_mask) {
  static const auto op = find_operator<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, std::string_view,
      double, int64_t, int64_t, bool)>("_batch_norm_forward");
  const OptionalTensor none;
  return op.call(input, none, none, none, none, none, none, scale, zero_point, "identity", 0.0, quant_min, quant_max,
                 with_mask);
}

// ---- public functions -----------------------------------------------------------------------------------------------

at::Tensor quant_conv2d(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                        const std::optional<at::Tensor>& zero_point, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                        at::IntArrayRef dilation, int64_t groups) {
  static const auto op = find_operator<decltype(quant_conv2d_kernel)>("quant_conv2d");
  return op.call(input, codes, scale, zero_point, weight, bias, two(stride), two(padding), two(dilation), groups);
}

std::tuple<at::Tensor, at::Tensor> fake_quantize_codes(const at::Tensor& input, const at::Tensor& scale,
                                                       const std::optional<at::Tensor>& zero_point, int64_t quant_min,
                                                       int64_t quant_max, double grad_factor) {
  static const auto op = find_operator<decltype(fake_quantize_codes_kernel)>("fake_quantize_codes");
  return op.call(input, scale, zero_point, quant_min, quant_max, grad_factor);
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  m.def(
      "quant_conv2d(Tensor input, Tensor codes, Tensor scale, Tensor? zero_point, Tensor weight, Tensor? bias=None, "
      "SymInt[2] stride=1, SymInt[2] padding=0, SymInt[2] dilation=1, SymInt groups=1) -> Tensor");
  m.def(
      "fake_quantize_codes(Tensor input, Tensor scale, Tensor? zero_point=None, *, int quant_min=-128, "
      "int quant_max=127, float grad_factor=1.) -> (Tensor output, Tensor codes)");
}

TORCH_LIBRARY_IMPL(quantrain, CompositeExplicitAutograd, m) {
  m.impl("quant_conv2d", &quantrain::quant_conv2d_kernel);
  m.impl("fake_quantize_codes", &quantrain::fake_quantize_codes_kernel);
}
TORCH_LIBRARY_IMPL(quantrain, AutocastCPU, m) { m.impl("quant_conv2d", &quantrain::quant_conv2d_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(quantrain, AutocastCUDA, m) { m.impl("quant_conv2d", &quantrain::quant_conv2d_autocast<at::kCUDA>); }
