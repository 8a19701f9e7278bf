#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "csrc/cpu/int8.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/common/matrix.h"
#include "quantrain/ops/fake_quant.h"
#include "quantrain/ops/int8.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/int8.h"
#endif

// The product of a float input with an int8 weight. Its derivative is in autograd/int8_weight_mm.cpp.

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&);

constexpr std::string_view kName = "int8_weight_mm";

at::Tensor int8_weight_mm_meta(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                               const OptionalTensor& bias) {
  detail::check_float(kName, "input", input.scalar_type());
  detail::check_dense(kName, "input", input);
  QUANTRAIN_CHECK_TYPE(codes.scalar_type() == at::kChar, "{}: expected codes of int8, got {}", kName,
                       c10::toString(codes.scalar_type()));
  QUANTRAIN_CHECK_TYPE(scale.scalar_type() == at::kFloat, "{}: expected scale of float32, got {}", kName,
                       c10::toString(scale.scalar_type()));
  detail::check_device(kName, "codes", codes, input, "input's");
  detail::check_device(kName, "scale", scale, input, "input's");
  QUANTRAIN_CHECK_VALUE(codes.dim() == 2, "{}: expected codes [N, K], got {}", kName, detail::shape_text(codes));
  QUANTRAIN_CHECK_VALUE(input.dim() >= 1 && TORCH_GUARD_OR_TRUE(input.sym_size(-1).sym_eq(codes.sym_size(1))),
                        "{}: expected input of {} columns, as codes have, got {}", kName, c10::str(codes.sym_size(1)),
                        detail::shape_text(input));
  const c10::SymInt rows = codes.sym_size(0);
  QUANTRAIN_CHECK_VALUE(
      TORCH_GUARD_OR_TRUE(scale.sym_numel().sym_eq(rows)) || TORCH_GUARD_OR_FALSE(scale.sym_numel().sym_eq(1)),
      "{}: expected scale of {} elements, the rows of codes, or of one, got {}", kName, c10::str(rows),
      detail::shape_text(scale));
  if (bias) {
    detail::check_float(kName, "bias", bias->scalar_type());
    detail::check_device(kName, "bias", *bias, input, "input's");
    QUANTRAIN_CHECK_VALUE(bias->dim() == 1 && TORCH_GUARD_OR_TRUE(bias->sym_size(0).sym_eq(rows)),
                          "{}: expected bias of {} elements, the rows of codes, got {}", kName, c10::str(rows),
                          detail::shape_text(*bias));
  }
  std::vector<c10::SymInt> sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  sizes.back() = rows;
  return at::empty_symint(sizes, input.options());
}

at::Tensor int8_weight_mm_kernel(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                                 const OptionalTensor& bias) {
  at::Tensor y = int8_weight_mm_meta(input, codes, scale, bias);
  if (y.numel() == 0) return y;
  const int64_t n = codes.size(0), k = codes.size(1);
  const at::Tensor x = matrix(input).contiguous(), weight = codes.contiguous();
  const at::Tensor factors = scale.contiguous().view(-1);
  const at::Tensor added = bias ? in_type(*bias, at::kFloat).contiguous() : at::Tensor();
  Int8WeightMmArgs args{x.const_data_ptr(),
                        weight.const_data_ptr<int8_t>(),
                        factors.const_data_ptr<float>(),
                        factors.numel() == 1 ? 0 : 1,
                        bias ? added.const_data_ptr<float>() : nullptr,
                        y.mutable_data_ptr(),
                        dtype_of(x),
                        x.size(0),
                        n,
                        k};
#if defined(QUANTRAIN_WITH_CUDA)
  if (x.is_cuda()) {
    const c10::cuda::CUDAGuard guard(x.device());
    if (cuda::int8_weight_mm_suits(args)) {
      run_on_cuda(args, x, &cuda::int8_weight_mm);
      return y;
    }
  }
#endif
  if (x.is_cpu() && args.m <= cpu::int8_weight_mm_rows()) {
    const at::Tensor wide = in_type(x, at::kFloat);
    const at::Tensor result = y.scalar_type() == at::kFloat ? y : at::empty(y.sizes(), wide.options());
    args.x = wide.const_data_ptr();
    args.y = result.mutable_data_ptr();
    parallel_for(n, grain_of(k), [&](int64_t begin, int64_t end) { cpu::int8_weight_mm(args, begin, end); });
    if (!result.is_same(y)) y.copy_(result);
    return y;
  }
  const at::Tensor per_row = factors.numel() == 1 ? factors : factors.view({-1, 1});
  const OptionalTensor b = bias ? OptionalTensor(in_type(*bias, input.scalar_type())) : std::nullopt;
  return at::linear(input, quantrain::dequantize(codes, per_row, std::nullopt, input.scalar_type()), b);
}

// Under autocast as at::linear: the input is cast, codes and scale are what they are.
template <c10::DeviceType kDevice>
at::Tensor int8_weight_mm_autocast(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                                   const OptionalTensor& bias) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  static const auto op = find_operator<Signature>(kName);
  return op.call(at::autocast::cached_cast(at::autocast::get_autocast_dtype(kDevice), input, kDevice), codes, scale,
                 bias);
}

}  // namespace

at::Tensor int8_weight_mm(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                          const OptionalTensor& bias) {
  static const auto op = find_operator<Signature>(kName);
  return op.call(input, codes, scale, bias);
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  m.def("int8_weight_mm(Tensor input, Tensor codes, Tensor scale, Tensor? bias=None) -> Tensor",
        {at::Tag::needs_exact_strides});
}

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { m.impl("int8_weight_mm", &quantrain::int8_weight_mm_kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { m.impl("int8_weight_mm", &quantrain::int8_weight_mm_meta); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { m.impl("int8_weight_mm", &quantrain::int8_weight_mm_kernel); }
#endif
TORCH_LIBRARY_IMPL(quantrain, AutocastCPU, m) {
  m.impl("int8_weight_mm", &quantrain::int8_weight_mm_autocast<at::kCPU>);
}
TORCH_LIBRARY_IMPL(quantrain, AutocastCUDA, m) {
  m.impl("int8_weight_mm", &quantrain::int8_weight_mm_autocast<at::kCUDA>);
}
