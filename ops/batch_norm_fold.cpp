#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "csrc/cpu/batch_norm.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/fake_quant_check.h"
#include "quantrain/ops/batch_norm.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/batch_norm.h"
#endif

// The folded, fake-quantized weight of a convolution before a batch norm.

namespace quantrain {
namespace {

// ---- shapes, shared with Meta ---------------------------------------------------------------------------------------

void check_fold(std::string_view op, const at::Tensor& weight, const at::Tensor& gamma, const at::Tensor& variance) {
  detail::check_dense(op, "weight", weight);
  detail::check_float(op, "weight", weight.scalar_type());
  QUANTRAIN_CHECK_VALUE(weight.dim() >= 2, "{}: expected weight [O, ...], got {}", op, detail::shape_text(weight));
  for (const auto& [name, tensor] : {std::pair<std::string_view, const at::Tensor&>{"bn_weight", gamma},
                                     std::pair<std::string_view, const at::Tensor&>{"running_var", variance}}) {
    QUANTRAIN_CHECK_TYPE(tensor.is_floating_point(), "{}: expected {} of a floating type, got {}", op, name,
                         c10::toString(tensor.scalar_type()));
    detail::check_device(op, name, tensor, weight, "weight's");
    QUANTRAIN_CHECK_VALUE(tensor.dim() == 1 && TORCH_GUARD_OR_TRUE(tensor.sym_size(0).sym_eq(weight.sym_size(0))),
                          "{}: expected {} of one element per row of weight, got {} for {}", op, name,
                          detail::shape_text(tensor), detail::shape_text(weight));
  }
}

// float32, one element per row of weight, in any shape of them.
void check_row(std::string_view op, std::string_view name, const at::Tensor& tensor, const at::Tensor& weight) {
  detail::check_type(op, name, tensor, at::kFloat, "float32");
  detail::check_device(op, name, tensor, weight, "weight's");
  QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(tensor.sym_numel().sym_eq(weight.sym_size(0))),
                        "{}: expected {} of one element per row of weight, got {} for {}", op, name,
                        detail::shape_text(tensor), detail::shape_text(weight));
}

using Folded = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// output, conv_scale, mask, a copy of running_var.
Folded fold_meta(const at::Tensor& weight, const at::Tensor& gamma, const at::Tensor& variance, double,
                 int64_t quant_min, int64_t quant_max, bool, std::string_view dtype,
                 const std::optional<at::Tensor>& step) {
  constexpr std::string_view kOp = "fold_fake_quantize";
  check_fold(kOp, weight, gamma, variance);
  if (step) check_row(kOp, "scale", *step, weight);
  check_range(kOp, quant_min, quant_max);
  QUANTRAIN_CHECK_VALUE(quant_min < quant_max, "{}: expected quant_min < quant_max, got {} and {}", kOp, quant_min,
                        quant_max);
  const at::ScalarType type = dtype.empty() ? weight.scalar_type() : detail::named_type(kOp, "dtype", dtype);
  detail::check_float(kOp, "dtype", type);
  const c10::SymInt rows = weight.sym_size(0), columns = rows == 0 ? rows : weight.sym_numel() / rows;
  return {empty_regular(weight, type), at::empty_symint({rows}, weight.options().dtype(at::kFloat)),
          at::empty_symint({rows, (columns + 7) / 8}, weight.options().dtype(at::kByte)),
          at::empty_symint({rows}, weight.options().dtype(at::kFloat))};
}

using Pair = std::tuple<at::Tensor, at::Tensor>;
using Triple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Of weight, bn_weight and a learned scale ([0] where there is none).
Triple fold_backward_meta(const at::Tensor& grad_output, const std::optional<at::Tensor>& grad_scale,
                          const at::Tensor& weight, const at::Tensor& mask, const at::Tensor& gamma,
                          const at::Tensor& variance, double, const std::optional<at::Tensor>& step, int64_t quant_min,
                          int64_t quant_max) {
  constexpr std::string_view kOp = "_fold_fake_quantize_backward";
  check_fold(kOp, weight, gamma, variance);
  check_range(kOp, quant_min, quant_max);
  if (step) check_row(kOp, "scale", *step, weight);
  detail::check_float(kOp, "grad_output", grad_output.scalar_type());
  detail::check_device(kOp, "grad_output", grad_output, weight, "weight's");
  bool same = grad_output.dim() == weight.dim();
  for (int64_t d = 0; same && d < weight.dim(); ++d)
    same = TORCH_GUARD_OR_TRUE(grad_output.sym_size(d).sym_eq(weight.sym_size(d)));
  QUANTRAIN_CHECK_VALUE(same, "{}: expected grad_output of weight's shape {}, got {}", kOp, detail::shape_text(weight),
                        detail::shape_text(grad_output));
  if (grad_scale) check_row(kOp, "grad_scale", *grad_scale, weight);
  detail::check_type(kOp, "mask", mask, at::kByte, "uint8");
  detail::check_device(kOp, "mask", mask, weight, "weight's");
  const c10::SymInt rows = weight.sym_size(0), columns = rows == 0 ? rows : weight.sym_numel() / rows;
  QUANTRAIN_CHECK_VALUE(mask.dim() == 2 && TORCH_GUARD_OR_TRUE(mask.sym_size(0).sym_eq(rows)) &&
                            TORCH_GUARD_OR_TRUE(mask.sym_size(1).sym_eq((columns + 7) / 8)),
                        "{}: expected mask of one bit per element of each row of weight {}, got {}", kOp,
                        detail::shape_text(weight), detail::shape_text(mask));
  const auto floats = weight.options().dtype(at::kFloat);
  return {empty_regular(weight, weight.scalar_type()), at::empty_symint({rows}, floats),
          at::empty_symint({step ? rows : c10::SymInt(0)}, floats)};
}

// ---- CPU and CUDA ---------------------------------------------------------------------------------------------------

at::Tensor as_floats(const at::Tensor& tensor) { return tensor.to(at::kFloat).contiguous(); }

Folded fold_kernel(const at::Tensor& given, const at::Tensor& bn_weight, const at::Tensor& running_var, double eps,
                   int64_t quant_min, int64_t quant_max, bool symmetric, std::string_view dtype,
                   const std::optional<at::Tensor>& given_step) {
  auto [output, conv_scale, mask, kept] =
      fold_meta(given, bn_weight, running_var, eps, quant_min, quant_max, symmetric, dtype, given_step);
  if (given.size(0) == 0) return {output, conv_scale, mask, kept};
  const at::Tensor step = given_step ? given_step->contiguous() : at::Tensor();
  const at::Tensor weight = regular(given), gamma = as_floats(bn_weight), variance = as_floats(running_var);
  const int64_t rows = weight.size(0), columns = weight.numel() / rows;
  const FoldArgs args{weight.const_data_ptr(),
                      gamma.const_data_ptr<float>(),
                      variance.const_data_ptr<float>(),
                      given_step ? step.const_data_ptr<float>() : nullptr,
                      output.mutable_data_ptr(),
                      mask.mutable_data_ptr<uint8_t>(),
                      conv_scale.mutable_data_ptr<float>(),
                      kept.mutable_data_ptr<float>(),
                      dtype_of(weight),
                      dtype_of(output),
                      rows,
                      columns,
                      static_cast<float>(eps),
                      make_range(quant_min, quant_max),
                      symmetric};
  run_tasks(args, rows, grain_of(columns), weight, QUANTRAIN_KERNELS(fold_fake_quantize));
  return {output, conv_scale, mask, kept};
}

Triple fold_backward_kernel(const at::Tensor& given_grad, const std::optional<at::Tensor>& given_scale_grad,
                            const at::Tensor& given, const at::Tensor& mask, const at::Tensor& bn_weight,
                            const at::Tensor& running_var, double eps, const std::optional<at::Tensor>& given_step,
                            int64_t quant_min, int64_t quant_max) {
  auto [grad_weight, grad_gamma, grad_step] = fold_backward_meta(given_grad, given_scale_grad, given, mask, bn_weight,
                                                                 running_var, eps, given_step, quant_min, quant_max);
  if (given.size(0) == 0) return {grad_weight, grad_gamma, grad_step};
  const at::Tensor step = given_step ? given_step->contiguous() : at::Tensor();
  const at::Tensor weight = strided_as(given, grad_weight), grad_output = strided_as(given_grad, grad_weight);
  const at::Tensor bits = mask.contiguous();
  const at::Tensor gamma = as_floats(bn_weight), variance = as_floats(running_var);
  const at::Tensor grad_scale = given_scale_grad ? given_scale_grad->contiguous() : at::Tensor();
  const int64_t rows = weight.size(0), columns = weight.numel() / rows;
  const FoldBackwardArgs args{grad_output.const_data_ptr(),
                              grad_scale.defined() ? grad_scale.const_data_ptr<float>() : nullptr,
                              weight.const_data_ptr(),
                              bits.const_data_ptr<uint8_t>(),
                              gamma.const_data_ptr<float>(),
                              variance.const_data_ptr<float>(),
                              given_step ? step.const_data_ptr<float>() : nullptr,
                              grad_weight.mutable_data_ptr(),
                              grad_gamma.mutable_data_ptr<float>(),
                              given_step ? grad_step.mutable_data_ptr<float>() : nullptr,
                              dtype_of(weight),
                              dtype_of(grad_output),
                              rows,
                              columns,
                              static_cast<float>(eps),
                              make_range(quant_min, quant_max)};
  run_tasks(args, rows, grain_of(columns), weight, QUANTRAIN_KERNELS(fold_fake_quantize_backward));
  return {grad_weight, grad_gamma, grad_step};
}

// Where no gradient is needed.
Pair fold_fake_quantize_kernel(const at::Tensor& weight, const at::Tensor& bn_weight, const at::Tensor& running_var,
                               double eps, int64_t quant_min, int64_t quant_max, bool symmetric,
                               std::string_view dtype) {
  static const auto op = find_operator<decltype(fold_kernel)>("_fold_fake_quantize");
  auto [output, conv_scale, mask, kept] =
      op.call(weight, bn_weight, running_var, eps, quant_min, quant_max, symmetric, dtype, std::nullopt);
  return {output, conv_scale};
}

}  // namespace

// ---- public functions -----------------------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> fold_fake_quantize(const at::Tensor& weight, const at::Tensor& bn_weight,
                                                      const at::Tensor& running_var, double eps, int64_t quant_min,
                                                      int64_t quant_max, bool symmetric, std::string_view dtype) {
  static const auto op = find_operator<decltype(fold_fake_quantize_kernel)>("fold_fake_quantize");
  return op.call(weight, bn_weight, running_var, eps, quant_min, quant_max, symmetric, dtype);
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  m.def(
      "fold_fake_quantize(Tensor weight, Tensor bn_weight, Tensor running_var, *, float eps=1e-05, int quant_min=-128, "
      "int quant_max=127, bool symmetric=True, str dtype=\"\") -> (Tensor output, Tensor conv_scale)");
  m.def(
      "_fold_fake_quantize(Tensor weight, Tensor bn_weight, Tensor running_var, float eps, int quant_min, int "
      "quant_max, bool symmetric, str dtype, Tensor? scale=None) -> (Tensor output, Tensor conv_scale, Tensor mask, "
      "Tensor variance)");
  m.def(
      "_fold_fake_quantize_backward(Tensor grad_output, Tensor? grad_scale, Tensor weight, Tensor mask, Tensor "
      "bn_weight, Tensor running_var, float eps, Tensor? scale=None, int quant_min=-128, int quant_max=127) -> (Tensor "
      "grad_weight, Tensor grad_bn_weight, Tensor grad_scale)");
}

#define QUANTRAIN_REGISTER_FOLD(kind)                     \
  m.impl("_fold_fake_quantize", &quantrain::fold_##kind); \
  m.impl("_fold_fake_quantize_backward", &quantrain::fold_backward_##kind)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_FOLD(kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_FOLD(meta); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_FOLD(kernel); }
#endif
// It calls an operator that has a kernel for each device, and Meta.
TORCH_LIBRARY_IMPL(quantrain, CompositeExplicitAutograd, m) {
  m.impl("fold_fake_quantize", &quantrain::fold_fake_quantize_kernel);
}
