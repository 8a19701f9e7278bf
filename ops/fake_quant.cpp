#include "quantrain/ops/fake_quant.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "csrc/cpu/fake_quant.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/fake_quant_check.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/fake_quant.h"
#endif

// Fake-quantization and its gradients. Codes are in fake_quant_codes.cpp, ranges in fake_quant_range.cpp.

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// ---- shapes, shared with Meta ---------------------------------------------------------------------------------------

void check_fake_quantize(std::string_view op, const at::Tensor& input, const at::Tensor& scale,
                         const OptionalTensor& zero_point, int64_t quant_min, int64_t quant_max, bool learnable) {
  check_range(op, quant_min, quant_max);
  check_input(op, input);
  check_qparams(op, input, scale, zero_point, learnable);
}

at::Tensor fake_quantize_meta(const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& zero_point,
                              int64_t quant_min, int64_t quant_max) {
  check_fake_quantize("fake_quantize", input, scale, zero_point, quant_min, quant_max, false);
  return at::empty_like(input);
}

std::tuple<at::Tensor, at::Tensor> fake_quantize_mask_meta(const at::Tensor& input, const at::Tensor& scale,
                                                           const OptionalTensor& zero_point, int64_t quant_min,
                                                           int64_t quant_max, bool) {
  check_fake_quantize("fake_quantize", input, scale, zero_point, quant_min, quant_max, false);
  return {at::empty_like(input), allocate_mask(input)};
}

void check_dynamic(const at::Tensor& input, c10::SymIntArrayRef scale_shape, int64_t quant_min, int64_t quant_max) {
  check_range("fake_quantize_dynamic", quant_min, quant_max);
  check_input("fake_quantize_dynamic", input);
  check_scale_shape("fake_quantize_dynamic", "scale_shape", input.sym_sizes(), scale_shape);
}

at::Tensor fake_quantize_dynamic_meta(const at::Tensor& input, c10::SymIntArrayRef scale_shape, int64_t quant_min,
                                      int64_t quant_max, bool) {
  check_dynamic(input, scale_shape, quant_min, quant_max);
  return at::empty_like(input);
}

// Whether tensors of these sizes and strides fill memory without gaps and overlaps. Unknown sizes do.
bool fills_memory(c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (size_t d = 0; d < sizes.size(); ++d) {
    const auto size = sizes[d].maybe_as_int(), stride = strides[d].maybe_as_int();
    if (!size || !stride) return true;
    if (*stride < 0) return false;
    if (*size == 0) return true;
    if (*size > 1) dimensions.emplace_back(*stride, *size);
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dimensions) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

void check_backward(const at::Tensor& grad_output, const at::Tensor& mask, c10::SymIntArrayRef stride) {
  constexpr std::string_view kOp = "_fake_quantize_backward";
  check_input(kOp, grad_output);
  QUANTRAIN_CHECK_TYPE(mask.scalar_type() == at::kByte && mask.device() == grad_output.device(),
                       "{}: expected mask of uint8 on {}, got {} on {}", kOp, grad_output.device().str(),
                       c10::toString(mask.scalar_type()), mask.device().str());
  QUANTRAIN_CHECK_VALUE(
      mask.dim() == 1 && TORCH_GUARD_OR_TRUE(mask.sym_size(0).sym_eq((grad_output.sym_numel() + 7) / 8)),
      "{}: expected mask of one bit per element of grad_output {}, got {}", kOp, detail::shape_text(grad_output),
      detail::shape_text(mask));
  QUANTRAIN_CHECK_VALUE(
      stride.size() == static_cast<size_t>(grad_output.dim()) && fills_memory(grad_output.sym_sizes(), stride),
      "{}: expected stride that fills memory with elements of shape {}, got {}", kOp, detail::shape_text(grad_output),
      c10::str(stride));
}

at::Tensor fake_quantize_backward_meta(const at::Tensor& grad_output, const at::Tensor& mask,
                                       c10::SymIntArrayRef stride) {
  check_backward(grad_output, mask, stride);
  return at::empty_strided_symint(grad_output.sym_sizes(), stride, grad_output.options());
}

at::Tensor fake_quantize_learnable_meta(const at::Tensor& input, const at::Tensor& scale,
                                        const OptionalTensor& zero_point, int64_t quant_min, int64_t quant_max,
                                        double) {
  check_fake_quantize("fake_quantize_learnable", input, scale, zero_point, quant_min, quant_max, true);
  return at::empty_like(input);
}

bool is_learned(const OptionalTensor& zero_point) { return zero_point && zero_point->is_floating_point(); }

void check_learnable_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale,
                              const OptionalTensor& zero_point, int64_t quant_min, int64_t quant_max) {
  constexpr std::string_view kOp = "_fake_quantize_learnable_backward";
  check_fake_quantize(kOp, input, scale, zero_point, quant_min, quant_max, true);
  QUANTRAIN_CHECK_TYPE(grad_output.is_floating_point() && grad_output.device() == input.device(),
                       "{}: expected grad_output of a floating type on {}, got {} on {}", kOp, input.device().str(),
                       c10::toString(grad_output.scalar_type()), grad_output.device().str());
  bool same = grad_output.dim() == input.dim();
  for (int64_t d = 0; same && d < input.dim(); ++d)
    same = TORCH_GUARD_OR_TRUE(grad_output.sym_size(d).sym_eq(input.sym_size(d)));
  QUANTRAIN_CHECK_VALUE(same, "{}: expected grad_output of input's shape {}, got {}", kOp, detail::shape_text(input),
                        detail::shape_text(grad_output));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quantize_learnable_backward_meta(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& zero_point,
    int64_t quant_min, int64_t quant_max, double) {
  check_learnable_backward(grad_output, input, scale, zero_point, quant_min, quant_max);
  const bool learned = is_learned(zero_point);
  return {at::empty_like(input), at::empty_symint(scale.sym_sizes(), scale.options()),
          learned ? at::empty_symint(scale.sym_sizes(), zero_point->options()) : at::empty({0}, scale.options())};
}

// ---- CPU and CUDA ---------------------------------------------------------------------------------------------------

// The forward pass without checks of values, which dynamic scales do not need. `mask` may be undefined.
at::Tensor fake_quantize_unchecked(std::string_view op, const at::Tensor& input, const at::Tensor& scale,
                                   const OptionalTensor& zero_point, int64_t quant_min, int64_t quant_max,
                                   const at::Tensor& mask) {
  if (input.scalar_type() == at::kDouble)
    return fake_quantize_unchecked(op, input.to(at::kFloat), scale, zero_point, quant_min, quant_max, mask)
        .to(at::kDouble);
  const Arranged arranged = arrange(op, input, scale, zero_point);
  at::Tensor output = at::empty_like(arranged.input);
  if (input.numel() == 0) return output;
  const FakeQuantizeArgs args{arranged.input.const_data_ptr(),
                              output.mutable_data_ptr(),
                              mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr,
                              dtype_of(input),
                              arranged.grouping,
                              arranged.qparams(),
                              make_range(quant_min, quant_max)};
  run_elementwise(args, output, QUANTRAIN_KERNELS(fake_quantize));
  return output;
}

void check_values_on_cpu(std::string_view op, const at::Tensor& scale, const OptionalTensor& zero_point,
                         int64_t quant_min, int64_t quant_max) {
  if (scale.is_cpu()) check_qparam_values(op, scale, zero_point, quant_min, quant_max);
}

at::Tensor fake_quantize_kernel(const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& zero_point,
                                int64_t quant_min, int64_t quant_max) {
  check_fake_quantize("fake_quantize", input, scale, zero_point, quant_min, quant_max, false);
  check_values_on_cpu("fake_quantize", scale, zero_point, quant_min, quant_max);
  return fake_quantize_unchecked("fake_quantize", input, scale, zero_point, quant_min, quant_max, {});
}

// Dynamic scales are not checked: their NaN is to spread.
std::tuple<at::Tensor, at::Tensor> fake_quantize_mask_kernel(const at::Tensor& input, const at::Tensor& scale,
                                                             const OptionalTensor& zero_point, int64_t quant_min,
                                                             int64_t quant_max, bool check_values) {
  check_fake_quantize("fake_quantize", input, scale, zero_point, quant_min, quant_max, false);
  if (check_values) check_values_on_cpu("fake_quantize", scale, zero_point, quant_min, quant_max);
  const at::Tensor mask = allocate_mask(input);
  return {fake_quantize_unchecked("fake_quantize", input, scale, zero_point, quant_min, quant_max, mask), mask};
}

at::Tensor fake_quantize_dynamic_kernel(const at::Tensor& input, c10::SymIntArrayRef scale_shape, int64_t quant_min,
                                        int64_t quant_max, bool symmetric) {
  check_dynamic(input, scale_shape, quant_min, quant_max);
  if (input.numel() == 0) return at::empty_like(input);
  const auto [scale, zero_point] =
      choose_qparams(input, C10_AS_INTARRAYREF_SLOW(scale_shape), quant_min, quant_max, symmetric);
  return fake_quantize_unchecked("fake_quantize_dynamic", input, scale, symmetric ? OptionalTensor() : zero_point,
                                 quant_min, quant_max, {});
}

at::Tensor fake_quantize_backward_kernel(const at::Tensor& grad_output, const at::Tensor& mask,
                                         c10::SymIntArrayRef symbolic_stride) {
  check_backward(grad_output, mask, symbolic_stride);
  const at::IntArrayRef stride = C10_AS_INTARRAYREF_SLOW(symbolic_stride);
  if (grad_output.scalar_type() == at::kDouble) {  // the mask as 0 and 1, since float32 would round the gradient
    const at::Tensor ones = at::ones(grad_output.sizes(), grad_output.options().dtype(at::kFloat));
    const at::Tensor kept = fake_quantize_backward_kernel(ones, mask, symbolic_stride);
    return at::empty_strided(grad_output.sizes(), stride, grad_output.options())
        .copy_(at::where(kept.ne(0), grad_output, 0.0));
  }
  at::Tensor grad = grad_output;
  if (grad.strides() != stride) grad = at::empty_strided(grad.sizes(), stride, grad.options()).copy_(grad_output);
  at::Tensor grad_input = at::empty_strided(grad.sizes(), stride, grad.options());
  if (grad.numel() == 0) return grad_input;
  const at::Tensor bits = mask.contiguous();
  const FakeQuantizeBackwardArgs args{grad.const_data_ptr(), bits.const_data_ptr<uint8_t>(),
                                      grad_input.mutable_data_ptr(), dtype_of(grad), grad.numel()};
  run_elementwise(args, grad_input, QUANTRAIN_KERNELS(fake_quantize_backward));
  return grad_input;
}

at::Tensor fake_quantize_learnable_kernel(const at::Tensor& input, const at::Tensor& scale,
                                          const OptionalTensor& zero_point, int64_t quant_min, int64_t quant_max,
                                          double) {
  check_fake_quantize("fake_quantize_learnable", input, scale, zero_point, quant_min, quant_max, true);
  check_values_on_cpu("fake_quantize_learnable", scale, zero_point, quant_min, quant_max);
  return fake_quantize_unchecked("fake_quantize_learnable", input, scale, zero_point, quant_min, quant_max, {});
}

// Rows of few elements: the same on a copy in which the elements of a group lie together.
std::tuple<at::Tensor, at::Tensor, at::Tensor> learnable_backward_regrouped(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& zero_point,
    int64_t quant_min, int64_t quant_max, double grad_factor);

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quantize_learnable_backward_kernel(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& zero_point,
    int64_t quant_min, int64_t quant_max, double grad_factor) {
  check_learnable_backward(grad_output, input, scale, zero_point, quant_min, quant_max);
  const bool learned = is_learned(zero_point);
  if (input.scalar_type() == at::kDouble) {
    const auto [grad_input, grad_scale, grad_zero_point] = fake_quantize_learnable_backward_kernel(
        grad_output.to(at::kFloat), input.to(at::kFloat), scale.to(at::kFloat),
        learned ? OptionalTensor(zero_point->to(at::kFloat)) : zero_point, quant_min, quant_max, grad_factor);
    return {grad_input.to(at::kDouble), grad_scale.to(scale.scalar_type()),
            grad_zero_point.to(learned ? zero_point->scalar_type() : scale.scalar_type())};
  }
  const Arranged arranged = arrange("_fake_quantize_learnable_backward", input, scale, zero_point);
  if (wants_regrouping(arranged.grouping)) {
    const OptionalTensor points = zero_point && zero_point->numel() != scale.numel()
                                      ? OptionalTensor(zero_point->reshape({1}).expand({scale.numel()}))
                                      : zero_point;
    return learnable_backward_regrouped(grad_output, input, scale, points, quant_min, quant_max, grad_factor);
  }
  const Grouping& grouping = arranged.grouping;
  at::Tensor grad_input = at::empty_like(arranged.input);
  if (input.numel() == 0)
    return {grad_input, at::zeros(scale.sizes(), scale.options()),
            learned ? at::zeros(scale.sizes(), scale.options()) : at::empty({0}, scale.options())};
  at::Tensor grad = grad_output;
  if (grad.strides() != grad_input.strides() || grad.scalar_type() != input.scalar_type())
    grad = at::empty_like(grad_input).copy_(grad_output);
  const int64_t tasks = grouping.rows * chunks_per_row(grouping);
  const at::Tensor partial_scale = at::empty({tasks}, scale.options());
  const at::Tensor partial_zero_point = learned ? at::empty({tasks}, scale.options()) : at::Tensor();
  const LearnableBackwardArgs args{grad.const_data_ptr(),
                                   arranged.input.const_data_ptr(),
                                   grad_input.mutable_data_ptr(),
                                   partial_scale.mutable_data_ptr<float>(),
                                   learned ? partial_zero_point.mutable_data_ptr<float>() : nullptr,
                                   dtype_of(input),
                                   grouping,
                                   arranged.qparams(),
                                   make_range(quant_min, quant_max)};
  run_rows(args, grad_input, QUANTRAIN_KERNELS(fake_quantize_learnable_backward));
  const auto fold = [&](const at::Tensor& partial) {
    return fold_partials(partial, grouping, arranged.scale.sizes(), arranged.order, Fold::kSum).mul_(grad_factor);
  };
  return {grad_input, fold(partial_scale), learned ? fold(partial_zero_point) : at::empty({0}, scale.options())};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> learnable_backward_regrouped(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& zero_point,
    int64_t quant_min, int64_t quant_max, double grad_factor) {
  const auto column = [](const at::Tensor& tensor) { return tensor.reshape({-1, 1}); };
  auto [grad_input, grad_scale, grad_zero_point] = fake_quantize_learnable_backward_kernel(
      regroup(grad_output, scale.sizes()), regroup(input, scale.sizes()), column(scale),
      zero_point ? OptionalTensor(column(*zero_point)) : zero_point, quant_min, quant_max, grad_factor);
  return {at::empty_like(input).copy_(ungroup(grad_input, input.sizes(), scale.sizes())),
          grad_scale.view(scale.sizes()),
          grad_zero_point.numel() > 0 ? grad_zero_point.view(scale.sizes()) : grad_zero_point};
}

}  // namespace

// ---- public functions -----------------------------------------------------------------------------------------------

at::Tensor fake_quantize(const at::Tensor& input, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
                         int64_t quant_min, int64_t quant_max) {
  static const auto op = find_operator<decltype(fake_quantize_kernel)>("fake_quantize");
  return op.call(input, scale, zero_point, quant_min, quant_max);
}

at::Tensor fake_quantize_learnable(const at::Tensor& input, const at::Tensor& scale,
                                   const std::optional<at::Tensor>& zero_point, int64_t quant_min, int64_t quant_max,
                                   double grad_factor) {
  static const auto op = find_operator<decltype(fake_quantize_learnable_kernel)>("fake_quantize_learnable");
  return op.call(input, scale, zero_point, quant_min, quant_max, grad_factor);
}

at::Tensor fake_quantize_dynamic(const at::Tensor& input, at::IntArrayRef scale_shape, int64_t quant_min,
                                 int64_t quant_max, bool symmetric) {
  static const auto op = find_operator<decltype(fake_quantize_dynamic_kernel)>("fake_quantize_dynamic");
  return op.call(input, c10::fromIntArrayRefSlow(scale_shape), quant_min, quant_max, symmetric);
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  m.def(
      "fake_quantize(Tensor input, Tensor scale, Tensor? zero_point=None, *, int quant_min=-128, int quant_max=127) "
      "-> Tensor");
  m.def(
      "fake_quantize_learnable(Tensor input, Tensor scale, Tensor? zero_point=None, *, int quant_min=-128, int "
      "quant_max=127, "
      "float grad_factor=1.0) -> Tensor");
  m.def(
      "fake_quantize_dynamic(Tensor input, SymInt[] scale_shape, *, int quant_min=-128, int quant_max=127, bool "
      "symmetric=True) "
      "-> Tensor");
  // The mask is in the order of memory: a compiler must keep the strides that it was traced with.
  m.def(
      "_fake_quantize_mask(Tensor input, Tensor scale, Tensor? zero_point, int quant_min, int quant_max, bool "
      "check_values) -> "
      "(Tensor output, Tensor mask)",
      {at::Tag::needs_exact_strides});
  m.def("_fake_quantize_backward(Tensor grad_output, Tensor mask, SymInt[] stride) -> Tensor");
  m.def(
      "_fake_quantize_learnable_backward(Tensor grad_output, Tensor input, Tensor scale, Tensor? zero_point, int "
      "quant_min, int "
      "quant_max, float grad_factor) -> (Tensor grad_input, Tensor grad_scale, Tensor grad_zero_point)");
}

#define QUANTRAIN_REGISTER_FAKE_QUANT(kind)                                      \
  m.impl("fake_quantize", &quantrain::fake_quantize_##kind);                     \
  m.impl("fake_quantize_learnable", &quantrain::fake_quantize_learnable_##kind); \
  m.impl("fake_quantize_dynamic", &quantrain::fake_quantize_dynamic_##kind);     \
  m.impl("_fake_quantize_mask", &quantrain::fake_quantize_mask_##kind);          \
  m.impl("_fake_quantize_backward", &quantrain::fake_quantize_backward_##kind);  \
  m.impl("_fake_quantize_learnable_backward", &quantrain::fake_quantize_learnable_backward_##kind)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_FAKE_QUANT(kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_FAKE_QUANT(meta); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_FAKE_QUANT(kernel); }
#endif
