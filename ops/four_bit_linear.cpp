#include "ops/four_bit_linear.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "csrc/cpu/four_bit.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "quantrain/ops/four_bit.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/four_bit.h"
#endif

// Products with a packed weight. Their derivatives are in autograd/four_bit_linear.cpp.

namespace quantrain {

using OptionalTensor = std::optional<at::Tensor>;

namespace {

void check_method(std::string_view op, std::string_view method) {
  QUANTRAIN_CHECK_VALUE(method == "auto" || method == "fused" || method == "dequantize" || method == "int8",
                        "{}: expected method to be one of auto, fused, dequantize, int8, got '{}'", op, method);
}

}  // namespace

c10::SymInt check_linear_4bit(std::string_view op, const at::Tensor& input, const PackedWeight& weight,
                              const OptionalTensor& bias, std::string_view method,
                              const std::optional<c10::SymInt>& out_features) {
  detail::check_float(op, "input", input.scalar_type());
  detail::check_dense(op, "input", input);
  QUANTRAIN_CHECK_VALUE(input.dim() >= 1 && TORCH_GUARD_OR_TRUE(input.sym_size(-1).sym_gt(0)),
                        "{}: expected input with at least one column, got {}", op, detail::shape_text(input));
  check_method(op, method);
  check_packed(op, weight);
  detail::check_device(op, "codes", weight.codes, input, "input's");
  const c10::SymInt rows = packed_rows(op, weight, input.sym_size(-1), out_features);
  check_packed_size(op, weight, rows * input.sym_size(-1), input.sym_size(-1));
  if (bias) {
    detail::check_float(op, "bias", bias->scalar_type());
    detail::check_device(op, "bias", *bias, input, "input's");
    QUANTRAIN_CHECK_VALUE(bias->dim() == 1 && TORCH_GUARD_OR_TRUE(bias->sym_size(0).sym_eq(rows)),
                          "{}: expected bias of {} elements, the rows of the weight, got {}", op, c10::str(rows),
                          detail::shape_text(*bias));
  }
  return rows;
}

namespace {

constexpr std::string_view kLinear = "linear_4bit";
constexpr std::string_view kGradInput = "_linear_4bit_grad_input";

at::Tensor linear_meta(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                       const OptionalTensor& zero_point, const OptionalTensor& bias, const OptionalTensor& scale_scale,
                       const OptionalTensor& scale_offset, std::string_view format, const OptionalTensor& table,
                       std::string_view method, std::optional<c10::SymInt> out_features) {
  const c10::SymInt rows = check_linear_4bit(
      kLinear, input, {codes, scale, zero_point, scale_scale, scale_offset, format, table}, bias, method, out_features);
  std::vector<c10::SymInt> sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  sizes.back() = rows;
  return at::empty_symint(sizes, input.options());
}

at::Tensor grad_input_meta(const at::Tensor& grad_output, const at::Tensor& codes, const at::Tensor& scale,
                           const OptionalTensor& zero_point, const OptionalTensor& scale_scale,
                           const OptionalTensor& scale_offset, c10::SymInt in_features, std::string_view format,
                           const OptionalTensor& table, std::string_view method) {
  detail::check_float(kGradInput, "grad_output", grad_output.scalar_type());
  check_method(kGradInput, method);
  const PackedWeight weight{codes, scale, zero_point, scale_scale, scale_offset, format, table};
  check_packed(kGradInput, weight);
  detail::check_device(kGradInput, "codes", codes, grad_output, "grad_output's");
  QUANTRAIN_CHECK_VALUE(grad_output.dim() >= 1, "{}: expected grad_output of at least one dimension, got none",
                        kGradInput);
  QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(in_features.sym_gt(0)), "{}: expected in_features of at least 1, got {}",
                        kGradInput, c10::str(in_features));
  packed_rows(kGradInput, weight, in_features, grad_output.sym_size(-1));
  check_packed_size(kGradInput, weight, grad_output.sym_size(-1) * in_features, in_features);
  std::vector<c10::SymInt> sizes(grad_output.sym_sizes().begin(), grad_output.sym_sizes().end());
  sizes.back() = in_features;
  return at::empty_symint(sizes, grad_output.options());
}

// The float weight [rows, k] of an element type.
at::Tensor dequantized(const PackedWeight& w, int64_t rows, int64_t k, at::ScalarType type) {
  return dequantize_4bit(w.codes, w.scale, {rows, k}, w.format, {w.zero_point, w.scale_scale, w.scale_offset, w.table},
                         type);
}

// Dense and, as the CUDA kernels' copies want it, on 16 bytes.
at::Tensor aligned(const at::Tensor& tensor) {
  const at::Tensor dense = tensor.contiguous();
  return !dense.is_cuda() || reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : dense.clone();
}

// The arguments of a kernel; the tensors that they point into live as long.
struct FusedCall {
  at::Tensor x, codes, bias;
  PackedWeight weight;
  PackedPointers packed;
  FourBitLinearArgs args;

  // x [M, K] and y [M, N], or for grad_input x [M, N] and y [M, K].
  FusedCall(const at::Tensor& given_x, const PackedWeight& given, const OptionalTensor& given_bias, const at::Tensor& y,
            int64_t n, int64_t k)
      : x(aligned(given_x)),
        codes(aligned(given.codes)),
        bias(given_bias ? given_bias->contiguous() : at::Tensor()),
        weight{codes, given.scale, given.zero_point, given.scale_scale, given.scale_offset, given.format, given.table},
        packed(weight, parse_four_bit_format(kLinear, weight.format, weight.table)),
        args{x.const_data_ptr(),
             packed.codes,
             packed.scales,
             parse_four_bit_format(kLinear, weight.format, weight.table),
             packed.table,
             packed_block(kLinear, weight, n * k, k),
             given_bias ? bias.const_data_ptr() : nullptr,
             given_bias ? dtype_of(bias) : DType::kFloat32,
             y.mutable_data_ptr(),
             dtype_of(x),
             x.size(0),
             n,
             k,
             nullptr} {}
};

// Decoded inside the product; false where no kernel takes these arguments. x [M, K] contiguous, y [M, N].
bool fused(const at::Tensor& given_x, const PackedWeight& given, const OptionalTensor& bias, const at::Tensor& y,
           bool wanted) {
  FusedCall call(given_x, given, bias, y, y.size(1), given_x.size(1));
  const at::Tensor& x = call.x;
  FourBitLinearArgs& args = call.args;
#if defined(QUANTRAIN_WITH_CUDA)
  if (x.is_cuda()) {
    const c10::cuda::CUDAGuard guard(x.device());
    if (!cuda::four_bit_linear_suits(args) || !(wanted || cuda::four_bit_linear_pays(args))) return false;
    at::Tensor workspace;
    if (const size_t bytes = cuda::four_bit_linear_workspace(args)) {
      workspace = at::empty({static_cast<int64_t>(bytes)}, x.options().dtype(at::kByte));
      args.workspace = workspace.mutable_data_ptr();
    }
    return run_on_cuda(args, x, &cuda::four_bit_linear);
  }
#endif
  if (!wanted && args.m > cpu::four_bit_linear_rows(args)) return false;
  const at::Tensor wide = in_type(x, at::kFloat);
  const at::Tensor result = x.scalar_type() == at::kFloat ? y : at::empty(y.sizes(), wide.options());
  args.x = wide.const_data_ptr();
  args.y = result.mutable_data_ptr();
  args.dtype = DType::kFloat32;
  parallel_for(args.n, grain_of(args.k), [&](int64_t begin, int64_t end) { cpu::four_bit_linear(args, begin, end); });
  if (!result.is_same(y)) y.copy_(result);
  return true;
}

at::Tensor linear_kernel(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                         const OptionalTensor& zero_point, const OptionalTensor& bias,
                         const OptionalTensor& scale_scale, const OptionalTensor& scale_offset, std::string_view format,
                         const OptionalTensor& table, std::string_view method,
                         std::optional<c10::SymInt> out_features) {
  at::Tensor y = linear_meta(input, codes, scale, zero_point, bias, scale_scale, scale_offset, format, table, method,
                             out_features);
  const PackedWeight weight{codes, scale, zero_point, scale_scale, scale_offset, format, table};
  const int64_t k = input.size(-1), rows = y.size(-1);
  packed_block(kLinear, weight, rows * k, k);
  if (y.numel() == 0) return y;
  if (method == "int8") return linear_4bit_int8(input, weight, bias, rows);
  if (method != "dequantize") {
    const at::Tensor x = input.reshape({-1, k}).contiguous();
    if (fused(x, weight, bias, y.view({-1, rows}), method == "fused")) return y;
    QUANTRAIN_CHECK_VALUE(method == "auto",
                          "{}: expected for method 'fused' on CUDA float16 or bfloat16 input, before Hopper of at most "
                          "32 rows, K and blocks of whole 64 elements and no float zero point, got {} {}, blocks of {} "
                          "elements",
                          kLinear, c10::toString(input.scalar_type()), detail::shape_text(input),
                          packed_block(kLinear, weight, rows * k, k));
  }
  const OptionalTensor b = bias ? OptionalTensor(in_type(*bias, input.scalar_type())) : std::nullopt;
  return at::linear(input, dequantized(weight, rows, k, input.scalar_type()), b);
}

at::Tensor grad_input_kernel(const at::Tensor& grad_output, const at::Tensor& codes, const at::Tensor& scale,
                             const OptionalTensor& zero_point, const OptionalTensor& scale_scale,
                             const OptionalTensor& scale_offset, c10::SymInt in_features, std::string_view format,
                             const OptionalTensor& table, std::string_view method) {
  at::Tensor grad_input = grad_input_meta(grad_output, codes, scale, zero_point, scale_scale, scale_offset, in_features,
                                          format, table, method);
  const PackedWeight weight{codes, scale, zero_point, scale_scale, scale_offset, format, table};
  const int64_t k = grad_input.size(-1), rows = grad_output.size(-1);
  packed_block(kGradInput, weight, rows * k, k);
  if (grad_input.numel() == 0) return grad_input;
  if (rows == 0) return grad_input.zero_();
#if defined(QUANTRAIN_WITH_CUDA)
  if (grad_output.is_cuda() && (method == "auto" || method == "fused")) {
    const c10::cuda::CUDAGuard guard(grad_output.device());
    const FusedCall call(grad_output.reshape({-1, rows}), weight, std::nullopt, grad_input, rows, k);
    if (cuda::four_bit_grad_input_suits(call.args) &&
        (method == "fused" || cuda::four_bit_grad_input_pays(call.args)) &&
        run_on_cuda(call.args, call.x, &cuda::four_bit_grad_input))
      return grad_input;
  }
#endif
  return at::matmul(grad_output, dequantized(weight, rows, k, grad_output.scalar_type()));
}

// Under autocast as at::linear: the input is cast, the packed weight is what it is.
template <c10::DeviceType kDevice>
at::Tensor linear_autocast(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                           const OptionalTensor& zero_point, const OptionalTensor& bias,
                           const OptionalTensor& scale_scale, const OptionalTensor& scale_offset,
                           std::string_view format, const OptionalTensor& table, std::string_view method,
                           std::optional<c10::SymInt> out_features) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  static const auto op = find_operator<Linear4bitSignature>(kLinear);
  const at::Tensor cast = at::autocast::cached_cast(at::autocast::get_autocast_dtype(kDevice), input, kDevice);
  return op.call(cast, codes, scale, zero_point, bias, scale_scale, scale_offset, format, table, method, out_features);
}

}  // namespace

at::Tensor linear_4bit(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                       const OptionalTensor& bias, std::string_view format, const FourBitExtras& extras,
                       std::string_view method, std::optional<int64_t> out_features) {
  static const auto op = find_operator<Linear4bitSignature>(kLinear);
  const auto rows = out_features ? std::optional<c10::SymInt>(*out_features) : std::nullopt;
  return op.call(input, codes, scale, extras.zero_point, bias, extras.scale_scale, extras.scale_offset, format,
                 extras.table, method, rows);
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  const std::vector<at::Tag> fixed{at::Tag::needs_exact_strides};
  m.def(
      "linear_4bit(Tensor input, Tensor codes, Tensor scale, Tensor? zero_point=None, Tensor? bias=None, Tensor? "
      "scale_scale=None, Tensor? scale_offset=None, *, str format=\"nf4\", Tensor? table=None, str method=\"auto\", "
      "SymInt? out_features=None) -> Tensor",
      fixed);
  m.def(
      "_linear_4bit_grad_input(Tensor grad_output, Tensor codes, Tensor scale, Tensor? zero_point=None, Tensor? "
      "scale_scale=None, Tensor? scale_offset=None, *, SymInt in_features, str format=\"nf4\", Tensor? table=None, str "
      "method=\"auto\") -> Tensor",
      fixed);
}

#define QUANTRAIN_REGISTER_LINEAR_4BIT(kind)        \
  m.impl("linear_4bit", &quantrain::linear_##kind); \
  m.impl("_linear_4bit_grad_input", &quantrain::grad_input_##kind)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_LINEAR_4BIT(kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_LINEAR_4BIT(meta); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_LINEAR_4BIT(kernel); }
#endif
TORCH_LIBRARY_IMPL(quantrain, AutocastCPU, m) { m.impl("linear_4bit", &quantrain::linear_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(quantrain, AutocastCUDA, m) { m.impl("linear_4bit", &quantrain::linear_autocast<at::kCUDA>); }
