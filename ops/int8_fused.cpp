#include "quantrain/ops/int8_fused.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "csrc/cpu/int8.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/common/matrix.h"
#include "ops/int8_values.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/int8.h"
#endif

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Pair = std::tuple<at::Tensor, at::Tensor>;
using Triple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// ---- checks and shapes, shared with Meta ----------------------------------------------------------------------------

void check_input(std::string_view op, const char* name, const at::Tensor& input) {
  const auto type = input.scalar_type();
  detail::check_float(op, name, type);
  QUANTRAIN_CHECK_VALUE(input.dim() >= 1 && TORCH_GUARD_OR_TRUE(input.sym_size(-1).sym_gt(0)),
                        "{}: expected {} with at least one column, got {}", op, name, detail::shape_text(input));
}

void check_same(std::string_view op, const char* name, const at::Tensor& other, const at::Tensor& input) {
  QUANTRAIN_CHECK_TYPE(other.scalar_type() == input.scalar_type() && other.device() == input.device(),
                       "{}: expected {} of the first argument's type {} on {}, got {} on {}", op, name,
                       c10::toString(input.scalar_type()), input.device().str(), c10::toString(other.scalar_type()),
                       other.device().str());
  bool same = other.dim() == input.dim();
  for (int64_t d = 0; same && d < input.dim(); ++d)
    same = TORCH_GUARD_OR_TRUE(other.sym_size(d).sym_eq(input.sym_size(d)));
  QUANTRAIN_CHECK_VALUE(same, "{}: expected {} of the first argument's shape, got {} and {}", op, name,
                        detail::shape_text(other), detail::shape_text(input));
}

void check_parameter(std::string_view op, const char* name, const OptionalTensor& parameter, const at::Tensor& input) {
  if (!parameter) return;
  QUANTRAIN_CHECK_TYPE((parameter->scalar_type() == input.scalar_type() || parameter->scalar_type() == at::kFloat) &&
                           parameter->device() == input.device(),
                       "{}: expected {} of type {} or float32 on {}, got {} on {}", op, name,
                       c10::toString(input.scalar_type()), input.device().str(),
                       c10::toString(parameter->scalar_type()), parameter->device().str());
  QUANTRAIN_CHECK_VALUE(parameter->dim() == 1 && TORCH_GUARD_OR_TRUE(parameter->sym_size(0).sym_eq(input.sym_size(-1))),
                        "{}: expected {} of input's last dimension, got {} and {}", op, name,
                        detail::shape_text(*parameter), detail::shape_text(input));
}

// Any shape of so many elements, as int8_quantize_rows takes it.
void check_factor(std::string_view op, const OptionalTensor& factor, const at::Tensor& input) {
  if (!factor) return;
  detail::check_type(op, "column_factor", *factor, at::kFloat, "float32");
  detail::check_device(op, "column_factor", *factor, input, "input's");
  QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(factor->sym_numel().sym_eq(input.sym_size(-1))),
                        "{}: expected column_factor of {} elements, got {}", op, c10::str(input.sym_size(-1)),
                        detail::shape_text(*factor));
}

Pair allocate(const at::Tensor& input) {
  std::vector<c10::SymInt> scale_sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  scale_sizes.back() = 1;
  return {at::empty_symint(input.sym_sizes(), input.options().dtype(at::kChar)),
          at::empty_symint(scale_sizes, input.options().dtype(at::kFloat))};
}

// What the four norms share.
struct Norm {
  std::string_view op;
  const at::Tensor& input;
  OptionalTensor residual;
  OptionalTensor weight;
  OptionalTensor bias;
  double eps;
  bool rms;
  bool post_norm;
  OptionalTensor column_factor;
};

Triple norm_meta(const Norm& n) {
  check_input(n.op, "input", n.input);
  if (n.residual) check_same(n.op, "residual", *n.residual, n.input);
  check_parameter(n.op, "weight", n.weight, n.input);
  check_parameter(n.op, "bias", n.bias, n.input);
  check_factor(n.op, n.column_factor, n.input);
  QUANTRAIN_CHECK_TYPE(!n.weight || !n.bias || n.weight->scalar_type() == n.bias->scalar_type(),
                       "{}: expected weight and bias of one type, got {} and {}", n.op,
                       c10::toString(n.weight->scalar_type()), c10::toString(n.bias->scalar_type()));
  QUANTRAIN_CHECK_VALUE(n.eps >= 0, "{}: expected eps of at least 0, got {}", n.op, n.eps);
  const at::Tensor carried = n.residual ? at::empty_symint(n.input.sym_sizes(), n.input.options()) : at::Tensor();
  return std::tuple_cat(allocate(n.input), std::tuple(carried));
}

// Into codes and scale, or into values where those are defined.
void launch_norm(const Norm& n, const at::Tensor& codes, const at::Tensor& scale, const at::Tensor& carried,
                 const at::Tensor& values) {
  const at::Tensor x = n.input.contiguous(), residual = n.residual ? n.residual->contiguous() : at::Tensor();
  const at::Tensor weight = n.weight ? n.weight->contiguous() : at::Tensor();
  const at::Tensor bias = n.bias ? n.bias->contiguous() : at::Tensor();
  const at::Tensor factor = n.column_factor ? n.column_factor->contiguous() : at::Tensor();
  const auto pointer = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; };
  const auto written = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; };
  const int64_t columns = x.size(-1);
  const Int8NormArgs args{x.const_data_ptr(),
                          pointer(residual),
                          pointer(weight),
                          pointer(bias),
                          written(carried),
                          static_cast<int8_t*>(written(codes)),
                          static_cast<float*>(written(scale)),
                          dtype_of(x),
                          weight.defined() ? dtype_of(weight)
                          : bias.defined() ? dtype_of(bias)
                                           : dtype_of(x),
                          x.numel() / columns,
                          columns,
                          static_cast<float>(n.eps),
                          n.rms,
                          n.post_norm,
                          static_cast<const float*>(pointer(factor)),
                          written(values)};
  run_tasks(args, args.rows, std::max<int64_t>(32768 / columns, 1), x, QUANTRAIN_KERNELS(int8_norm));
}

Triple norm_kernel(const Norm& n) {
  const Triple result = norm_meta(n);
  const auto& [codes, scale, carried] = result;
  if (n.input.numel() > 0) launch_norm(n, codes, scale, carried, at::Tensor());
  return result;
}

Pair codes_of(const Triple& result) { return {std::get<0>(result), std::get<1>(result)}; }

// The schema's functions on a device's kernel or, with kMeta, on shapes alone.
template <bool kMeta>
Triple run_norm(const Norm& n) {
  return kMeta ? norm_meta(n) : norm_kernel(n);
}

template <bool kMeta>
Pair layer_norm(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                const OptionalTensor& factor) {
  return codes_of(run_norm<kMeta>({"int8_layer_norm", input, {}, weight, bias, eps, /*rms=*/false, false, factor}));
}

template <bool kMeta>
Pair rms_norm(const at::Tensor& input, const OptionalTensor& weight, double eps, const OptionalTensor& factor) {
  return codes_of(run_norm<kMeta>({"int8_rms_norm", input, {}, weight, {}, eps, /*rms=*/true, false, factor}));
}

template <bool kMeta>
Triple add_layer_norm(const at::Tensor& input, const at::Tensor& residual, const OptionalTensor& weight,
                      const OptionalTensor& bias, double eps, bool post_norm, const OptionalTensor& factor) {
  return run_norm<kMeta>({"int8_add_layer_norm", input, residual, weight, bias, eps, /*rms=*/false, post_norm, factor});
}

template <bool kMeta>
Triple add_rms_norm(const at::Tensor& input, const at::Tensor& residual, const OptionalTensor& weight, double eps,
                    bool post_norm, const OptionalTensor& factor) {
  return run_norm<kMeta>({"int8_add_rms_norm", input, residual, weight, {}, eps, /*rms=*/true, post_norm, factor});
}

// [rows, K], without a copy where the rows lie apart but each is whole: halves of one product's result.
at::Tensor rows_of(const at::Tensor& input) {
  const at::Tensor rows = matrix(input);
  return rows.stride(1) == 1 && rows.stride(0) >= rows.size(1) ? rows : rows.contiguous();
}

void launch_activation(const at::Tensor& input, const OptionalTensor& up, Int8Activation activation,
                       const OptionalTensor& column_factor, const at::Tensor& codes, const at::Tensor& scale,
                       const at::Tensor& values) {
  at::Tensor x = rows_of(input), other = up ? rows_of(*up) : at::Tensor();
  if (up && other.stride(0) != x.stride(0)) {
    x = x.contiguous();
    other = other.contiguous();
  }
  const at::Tensor factor = column_factor ? column_factor->contiguous() : at::Tensor();
  const auto written = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; };
  const Int8ActivationArgs args{x.const_data_ptr(),
                                other.defined() ? other.const_data_ptr() : nullptr,
                                static_cast<int8_t*>(written(codes)),
                                static_cast<float*>(written(scale)),
                                dtype_of(x),
                                x.size(0),
                                x.size(1),
                                x.stride(0),
                                activation,
                                factor.defined() ? factor.const_data_ptr<float>() : nullptr,
                                written(values)};
  run_tasks(args, args.rows, std::max<int64_t>(8192 / args.columns, 1), x, QUANTRAIN_KERNELS(int8_activation));
}

Pair activation_kernel(const at::Tensor& input, const OptionalTensor& up, Int8Activation activation,
                       const OptionalTensor& column_factor, const Pair& result) {
  const auto& [codes, scale] = result;
  if (input.numel() > 0) launch_activation(input, up, activation, column_factor, codes, scale, at::Tensor());
  return result;
}

template <bool kMeta>
Pair gelu(const at::Tensor& input, std::string_view approximate, const OptionalTensor& factor) {
  check_input("int8_gelu", "input", input);
  check_factor("int8_gelu", factor, input);
  QUANTRAIN_CHECK_VALUE(approximate == "none" || approximate == "tanh",
                        "int8_gelu: expected approximate none or tanh, got '{}'", approximate);
  const Pair result = allocate(input);
  if constexpr (kMeta) return result;
  return activation_kernel(input, std::nullopt,
                           approximate == "none" ? Int8Activation::kGeluErf : Int8Activation::kGeluTanh, factor,
                           result);
}

template <bool kMeta>
Pair rectify(const at::Tensor& input, const OptionalTensor& factor) {
  check_input("int8_relu", "input", input);
  check_factor("int8_relu", factor, input);
  const Pair result = allocate(input);
  if constexpr (kMeta) return result;
  return activation_kernel(input, std::nullopt, Int8Activation::kRelu, factor, result);
}

template <bool kMeta>
Pair silu_mul(const at::Tensor& gate, const at::Tensor& up, const OptionalTensor& factor) {
  check_input("int8_silu_mul", "gate", gate);
  check_same("int8_silu_mul", "up", up, gate);
  check_factor("int8_silu_mul", factor, gate);
  const Pair result = allocate(gate);
  if constexpr (kMeta) return result;
  return activation_kernel(gate, up, Int8Activation::kSiluMul, factor, result);
}

Int8Codes as_codes(Pair pair) { return {std::move(std::get<0>(pair)), std::move(std::get<1>(pair))}; }

Int8AddNorm as_add_norm(Triple triple) {
  auto& [codes, scale, carried] = triple;
  return {{std::move(codes), std::move(scale)}, std::move(carried)};
}

}  // namespace

detail::NormValues detail::norm_values(const at::Tensor& input, const OptionalTensor& residual,
                                       const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool rms) {
  const Norm n{"", input, residual, weight, bias, eps, rms, /*post_norm=*/false, std::nullopt};
  NormValues result{at::empty(input.sizes(), input.options()), {}};
  if (residual) result.carried = at::empty(input.sizes(), input.options());
  if (input.numel() > 0) launch_norm(n, {}, {}, result.carried, result.values);
  return result;
}

at::Tensor detail::activation_values(const at::Tensor& input, const OptionalTensor& up, Int8Activation activation) {
  at::Tensor values = at::empty(input.sizes(), input.options());
  if (input.numel() > 0) launch_activation(input, up, activation, std::nullopt, {}, {}, values);
  return values;
}

// ---- public functions -----------------------------------------------------------------------------------------------

Int8Codes int8_layer_norm(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                          const OptionalTensor& column_factor) {
  static const auto op = find_operator<decltype(layer_norm<false>)>("int8_layer_norm");
  return as_codes(op.call(input, weight, bias, eps, column_factor));
}

Int8Codes int8_rms_norm(const at::Tensor& input, const OptionalTensor& weight, double eps,
                        const OptionalTensor& column_factor) {
  static const auto op = find_operator<decltype(rms_norm<false>)>("int8_rms_norm");
  return as_codes(op.call(input, weight, eps, column_factor));
}

Int8AddNorm int8_add_layer_norm(const at::Tensor& input, const at::Tensor& residual, const OptionalTensor& weight,
                                const OptionalTensor& bias, double eps, bool post_norm,
                                const OptionalTensor& column_factor) {
  static const auto op = find_operator<decltype(add_layer_norm<false>)>("int8_add_layer_norm");
  return as_add_norm(op.call(input, residual, weight, bias, eps, post_norm, column_factor));
}

Int8AddNorm int8_add_rms_norm(const at::Tensor& input, const at::Tensor& residual, const OptionalTensor& weight,
                              double eps, bool post_norm, const OptionalTensor& column_factor) {
  static const auto op = find_operator<decltype(add_rms_norm<false>)>("int8_add_rms_norm");
  return as_add_norm(op.call(input, residual, weight, eps, post_norm, column_factor));
}

Int8Codes int8_gelu(const at::Tensor& input, std::string_view approximate, const OptionalTensor& column_factor) {
  static const auto op = find_operator<decltype(gelu<false>)>("int8_gelu");
  return as_codes(op.call(input, approximate, column_factor));
}

Int8Codes int8_relu(const at::Tensor& input, const OptionalTensor& column_factor) {
  static const auto op = find_operator<decltype(rectify<false>)>("int8_relu");
  return as_codes(op.call(input, column_factor));
}

Int8Codes int8_silu_mul(const at::Tensor& gate, const at::Tensor& up, const OptionalTensor& column_factor) {
  static const auto op = find_operator<decltype(silu_mul<false>)>("int8_silu_mul");
  return as_codes(op.call(gate, up, column_factor));
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  const std::vector<at::Tag> fixed{at::Tag::needs_exact_strides};
  m.def(
      "int8_layer_norm(Tensor input, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, *, Tensor? "
      "column_factor=None) -> (Tensor codes, Tensor scale)",
      fixed);
  m.def(
      "int8_rms_norm(Tensor input, Tensor? weight=None, float eps=1e-06, *, Tensor? column_factor=None) -> (Tensor "
      "codes, Tensor scale)",
      fixed);
  m.def(
      "int8_add_layer_norm(Tensor input, Tensor residual, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, *, "
      "bool post_norm=False, Tensor? column_factor=None) -> (Tensor codes, Tensor scale, Tensor carried)",
      fixed);
  m.def(
      "int8_add_rms_norm(Tensor input, Tensor residual, Tensor? weight=None, float eps=1e-06, *, bool "
      "post_norm=False, Tensor? column_factor=None) -> (Tensor codes, Tensor scale, Tensor carried)",
      fixed);
  m.def(
      "int8_gelu(Tensor input, *, str approximate=\"none\", Tensor? column_factor=None) -> (Tensor codes, Tensor "
      "scale)",
      fixed);
  m.def("int8_relu(Tensor input, *, Tensor? column_factor=None) -> (Tensor codes, Tensor scale)", fixed);
  m.def("int8_silu_mul(Tensor gate, Tensor up, *, Tensor? column_factor=None) -> (Tensor codes, Tensor scale)", fixed);
}

#define QUANTRAIN_REGISTER_INT8_FUSED(meta)                        \
  m.impl("int8_layer_norm", &quantrain::layer_norm<meta>);         \
  m.impl("int8_rms_norm", &quantrain::rms_norm<meta>);             \
  m.impl("int8_add_layer_norm", &quantrain::add_layer_norm<meta>); \
  m.impl("int8_add_rms_norm", &quantrain::add_rms_norm<meta>);     \
  m.impl("int8_gelu", &quantrain::gelu<meta>);                     \
  m.impl("int8_relu", &quantrain::rectify<meta>);                  \
  m.impl("int8_silu_mul", &quantrain::silu_mul<meta>)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_INT8_FUSED(false); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_INT8_FUSED(true); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_INT8_FUSED(false); }
#endif
