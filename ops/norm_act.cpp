#include "quantrain/ops/norm_act.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "csrc/cpu/norm_act.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/fake_quant_check.h"
#include "ops/norm_act_operators.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/norm_act.h"
#endif

// Norms and activations with the rounding of what a linear layer reads: results and gradients.

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int64_t kRowsOfPart = 64;  // on the CPU: rows whose columns' gradients are added in float32
constexpr int64_t kParts = 4 * 132;  // on a GPU: thread blocks, of an H200's multiprocessors, several
constexpr int64_t kLeastOfPart = 8;  // rows that are worth a thread block

RowFunction function_named(std::string_view op, std::string_view name) {
  if (name == "identity") return RowFunction::kIdentity;
  if (name == "relu") return RowFunction::kRelu;
  if (name == "silu") return RowFunction::kSilu;
  if (name == "gelu") return RowFunction::kGelu;
  if (name == "gelu_tanh") return RowFunction::kGeluTanh;
  if (name == "silu_mul") return RowFunction::kSiluMul;
  if (name == "layer_norm") return RowFunction::kLayerNorm;
  QUANTRAIN_CHECK_VALUE(name == "rms_norm",
                        "{}: expected function to be identity, relu, silu, gelu, gelu_tanh, silu_mul, layer_norm or "
                        "rms_norm, got '{}'",
                        op, name);
  return RowFunction::kRmsNorm;
}

// ---- shapes, shared with Meta ---------------------------------------------------------------------------------------

void check_like(std::string_view op, std::string_view name, const at::Tensor& tensor, const at::Tensor& input,
                at::ScalarType type) {
  QUANTRAIN_CHECK_TYPE(tensor.scalar_type() == type, "{}: expected {} of {}, got {}", op, name, c10::toString(type),
                       c10::toString(tensor.scalar_type()));
  detail::check_dense(op, name, tensor);
  detail::check_device(op, name, tensor, input, "input's");
  bool same = tensor.dim() == input.dim();
  for (int64_t d = 0; same && d < input.dim(); ++d)
    same = TORCH_GUARD_OR_TRUE(tensor.sym_size(d).sym_eq(input.sym_size(d)));
  QUANTRAIN_CHECK_VALUE(same, "{}: expected {} of input's shape {}, got {}", op, name, detail::shape_text(input),
                        detail::shape_text(tensor));
}

RowFunction check_given(std::string_view op, const at::Tensor& input, std::string_view name,
                        const OptionalTensor& other, const OptionalTensor& weight, const OptionalTensor& bias) {
  const RowFunction function = function_named(op, name);
  detail::check_dense(op, "input", input);
  detail::check_float(op, "input", input.scalar_type());
  QUANTRAIN_CHECK_VALUE(input.dim() >= 1, "{}: expected input [..., K], got {}", op, detail::shape_text(input));
  QUANTRAIN_CHECK_VALUE(other.has_value() == (function == RowFunction::kSiluMul),
                        "{}: expected other with silu_mul and with nothing else, got {} {}", op, name,
                        other ? "with it" : "without it");
  if (other) check_like(op, "other", *other, input, input.scalar_type());
  for (const auto& [label, tensor] : {std::pair<std::string_view, const OptionalTensor&>{"weight", weight},
                                      std::pair<std::string_view, const OptionalTensor&>{"bias", bias}}) {
    if (!tensor) continue;
    QUANTRAIN_CHECK_VALUE(is_norm(function) && (label == "weight" || function == RowFunction::kLayerNorm),
                          "{}: expected {} with {}, got function '{}'", op, label,
                          label == "weight" ? "layer_norm or rms_norm" : "layer_norm", name);
    QUANTRAIN_CHECK_TYPE(tensor->scalar_type() == input.scalar_type() || tensor->scalar_type() == at::kFloat,
                         "{}: expected {} of input's type {} or float32, got {}", op, label,
                         c10::toString(input.scalar_type()), c10::toString(tensor->scalar_type()));
    detail::check_dense(op, label, *tensor);
    detail::check_device(op, label, *tensor, input, "input's");
    QUANTRAIN_CHECK_VALUE(tensor->dim() == 1 && TORCH_GUARD_OR_TRUE(tensor->sym_size(0).sym_eq(input.sym_size(-1))),
                          "{}: expected {} of one element per column, got {} for an input of {}", op, label,
                          detail::shape_text(*tensor), detail::shape_text(input));
  }
  return function;
}

at::Tensor empty_of(const at::Tensor& like, c10::SymIntArrayRef shape, at::ScalarType type) {
  return at::empty_symint(shape, like.options().dtype(type));
}

// Of each row: [..., 1].
std::vector<c10::SymInt> row_shape(const at::Tensor& input) {
  auto sizes = input.sym_sizes().vec();
  sizes.back() = 1;
  return sizes;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_act_forward_meta(
    const at::Tensor& input, const OptionalTensor& other, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& scale, const OptionalTensor& zero_point, std::string_view name, double, int64_t quant_min,
    int64_t quant_max, bool, std::string_view dtype, bool with_codes, bool with_mask) {
  const std::string_view op = scale ? "norm_act_fake_quantize" : "norm_act_fake_quantize_dynamic";
  const RowFunction function = check_given(op, input, name, other, weight, bias);
  check_range(op, quant_min, quant_max);
  QUANTRAIN_CHECK_VALUE(quant_min >= 0 ? quant_max <= 255 : quant_min >= -128 && quant_max <= 127,
                        "{}: expected codes of at most 8 bits, got {} to {}", op, quant_min, quant_max);
  QUANTRAIN_CHECK_VALUE(scale || quant_min < quant_max, "{}: expected quant_min < quant_max, got {} and {}", op,
                        quant_min, quant_max);
  if (scale) {
    check_qparams(op, input, *scale, zero_point);
    QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(scale->sym_numel().sym_eq(1)),
                          "{}: expected one scale for the tensor, got {}", op, detail::shape_text(*scale));
  }
  QUANTRAIN_CHECK_VALUE(scale || !zero_point, "{}: expected zero_point beside a scale, got it alone", op);
  const at::ScalarType type = dtype.empty() ? input.scalar_type() : detail::named_type(op, "dtype", dtype);
  detail::check_float(op, "dtype", type);
  QUANTRAIN_CHECK_TYPE(type == input.scalar_type() || input.scalar_type() == at::kFloat,
                       "{}: expected dtype to be input's {}, got {}", op, c10::toString(input.scalar_type()),
                       c10::toString(type));
  const at::ScalarType code_type = quant_min < 0 ? at::kChar : at::kByte;
  const auto none = [&](at::ScalarType t) { return empty_of(input, {0}, t); };
  at::Tensor moments = none(at::kFloat);
  if (is_norm(function)) moments = empty_of(input, {rows_of(input), 2}, at::kFloat);
  return {empty_of(input, input.sym_sizes(), type),
          with_codes ? empty_of(input, input.sym_sizes(), code_type) : none(code_type),
          with_mask ? allocate_mask(input) : none(at::kByte),
          moments,
          scale ? none(at::kFloat) : empty_of(input, row_shape(input), at::kFloat),
          scale ? none(at::kInt) : empty_of(input, row_shape(input), at::kInt)};
}

at::Tensor norm_act_range_meta(const at::Tensor& input, const OptionalTensor& other, const OptionalTensor& weight,
                               const OptionalTensor& bias, std::string_view name, double) {
  constexpr std::string_view kOp = "_norm_act_range";
  check_given(kOp, input, name, other, weight, bias);
  QUANTRAIN_CHECK_VALUE(input.sym_numel() > 0, "{}: expected input with at least one element, got shape {}", kOp,
                        detail::shape_text(input));
  return empty_of(input, {2}, at::kFloat);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_act_backward_meta(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& other, const OptionalTensor& weight,
    const at::Tensor& moments, const at::Tensor& mask, std::string_view name) {
  constexpr std::string_view kOp = "_norm_act_backward";
  const RowFunction function = check_given(kOp, input, name, other, weight, std::nullopt);
  detail::check_float(kOp, "grad_output", grad_output.scalar_type());
  const bool alike = input.scalar_type() == at::kFloat || grad_output.scalar_type() == input.scalar_type();
  check_like(kOp, "grad_output", grad_output, input, alike ? grad_output.scalar_type() : input.scalar_type());
  detail::check_type(kOp, "mask", mask, at::kByte, "uint8");
  detail::check_device(kOp, "mask", mask, input, "input's");
  const c10::SymInt bytes = (input.sym_numel() + 7) / 8;
  QUANTRAIN_CHECK_VALUE(mask.dim() == 1 && (TORCH_GUARD_OR_FALSE(mask.sym_numel().sym_eq(0)) ||
                                            TORCH_GUARD_OR_TRUE(mask.sym_numel().sym_eq(bytes))),
                        "{}: expected mask of one bit per element of input {}, or empty, got {}", kOp,
                        detail::shape_text(input), detail::shape_text(mask));
  detail::check_type(kOp, "moments", moments, at::kFloat, "float32");
  detail::check_device(kOp, "moments", moments, input, "input's");
  QUANTRAIN_CHECK_VALUE(
      !is_norm(function) || (moments.dim() == 2 && TORCH_GUARD_OR_TRUE(moments.sym_size(0).sym_eq(rows_of(input))) &&
                             TORCH_GUARD_OR_TRUE(moments.sym_size(1).sym_eq(2))),
      "{}: expected moments [rows, 2] of input {}, got {}", kOp, detail::shape_text(input),
      detail::shape_text(moments));
  const at::ScalarType type = input.scalar_type();
  const c10::SymInt columns = is_norm(function) ? input.sym_size(-1) : c10::SymInt(0);
  return {empty_of(input, input.sym_sizes(), type),
          other ? empty_of(input, input.sym_sizes(), type) : empty_of(input, {0}, type),
          empty_of(input, {columns}, at::kFloat), empty_of(input, {columns}, at::kFloat)};
}

// ---- CPU and CUDA ---------------------------------------------------------------------------------------------------

// What kernels read of an input, contiguous and alive as long as they do.
struct Given {
  at::Tensor x;
  OptionalTensor other, weight, bias;
  NormActInput input;

  Given(const at::Tensor& tensor, const OptionalTensor& other_tensor, const OptionalTensor& given_weight,
        const OptionalTensor& given_bias, RowFunction function, double eps)
      : x(tensor.contiguous()),
        other(contiguous(other_tensor)),
        weight(contiguous(given_weight)),
        bias(contiguous(given_bias)) {
    at::ScalarType type = at::kFloat;  // of parameters: one type for both
    const auto is_float = [](const OptionalTensor& t) { return t && t->scalar_type() == at::kFloat; };
    if (x.scalar_type() != at::kFloat && !is_float(weight) && !is_float(bias)) type = x.scalar_type();
    if (weight) weight = weight->to(type);
    if (bias) bias = bias->to(type);
    const auto pointer = [](const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; };
    const int64_t columns = x.size(-1);
    input = {x.const_data_ptr(),
             pointer(other),
             pointer(weight),
             pointer(bias),
             dtype_of(x),
             type == at::kFloat ? DType::kFloat32 : dtype_of(x),
             function,
             x.numel() / std::max<int64_t>(columns, 1),
             columns,
             static_cast<float>(eps)};
  }

  static OptionalTensor contiguous(const OptionalTensor& tensor) {
    return tensor ? OptionalTensor(tensor->contiguous()) : tensor;
  }
};

void run_norm_act(const NormActArgs& args, [[maybe_unused]] const at::Tensor& on) {
#if defined(QUANTRAIN_WITH_CUDA)
  if (run_on_cuda(args, on, &cuda::norm_act)) return;
#endif
  const NormActInput& in = args.input;
  if (is_norm(in.function) || args.row_scale || args.extremes)
    parallel_for(in.rows, grain_of(in.columns),
                 [&](int64_t begin, int64_t end) { cpu::norm_act_rows(args, begin, end); });
  if (args.extremes) return;
  parallel_for_elements(in.rows * in.columns,
                        [&](int64_t begin, int64_t end) { cpu::norm_act_elements(args, begin, end); });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_act_forward_kernel(
    const at::Tensor& input, const OptionalTensor& other, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& scale, const OptionalTensor& zero_point, std::string_view name, double eps, int64_t quant_min,
    int64_t quant_max, bool symmetric, std::string_view dtype, bool with_codes, bool with_mask) {
  auto [output, codes, mask, moments, row_scale, row_zero_point] =
      norm_act_forward_meta(input, other, weight, bias, scale, zero_point, name, eps, quant_min, quant_max, symmetric,
                            dtype, with_codes, with_mask);
  const std::string_view op = scale ? "norm_act_fake_quantize" : "norm_act_fake_quantize_dynamic";
  if (scale && scale->is_cpu()) check_qparam_values(op, *scale, zero_point, quant_min, quant_max);
  if (input.numel() == 0) {
    moments.zero_();  // of rows without columns
    if (!scale) row_scale.fill_(1.0), row_zero_point.zero_();
    return {output, codes, mask, moments, row_scale, row_zero_point};
  }
  const RowFunction function = function_named(op, name);
  const Given given(input, other, weight, bias, function, eps);
  const OptionalTensor scales = scale ? OptionalTensor(scale->to(at::kFloat).contiguous()) : scale;
  const OptionalTensor points = zero_point ? OptionalTensor(as_int32(*zero_point).contiguous()) : zero_point;
  NormActArgs args{};
  args.input = given.input;
  args.moments = is_norm(function) ? moments.mutable_data_ptr<float>() : nullptr;
  args.output = output.mutable_data_ptr();
  args.codes = with_codes ? codes.mutable_data_ptr() : nullptr;
  args.mask = with_mask ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  args.row_scale = scale ? nullptr : row_scale.mutable_data_ptr<float>();
  args.row_zero_point = scale ? nullptr : row_zero_point.mutable_data_ptr<int32_t>();
  args.output_dtype = dtype_of(output);
  args.qparams = {scales ? scales->const_data_ptr<float>() : nullptr,
                  points ? points->const_data_ptr<int32_t>() : nullptr, nullptr};
  args.range = make_range(quant_min, quant_max);
  args.symmetric = symmetric;
  run_norm_act(args, given.x);
  return {output, codes, mask, moments, row_scale, row_zero_point};
}

at::Tensor norm_act_range_kernel(const at::Tensor& input, const OptionalTensor& other, const OptionalTensor& weight,
                                 const OptionalTensor& bias, std::string_view name, double eps) {
  at::Tensor range = norm_act_range_meta(input, other, weight, bias, name, eps);
  const Given given(input, other, weight, bias, function_named("_norm_act_range", name), eps);
  const at::Tensor extremes = at::empty({given.input.rows, 2}, range.options());
  NormActArgs args{};
  args.input = given.input;
  args.extremes = extremes.mutable_data_ptr<float>();
  args.output_dtype = given.input.dtype;
  run_norm_act(args, given.x);
  const NormActRangeArgs fold{extremes.const_data_ptr<float>(), range.mutable_data_ptr<float>(), given.input.rows};
  run_tasks(fold, 1, 1, given.x, QUANTRAIN_KERNELS(norm_act_range));
  return range;
}

// How many parts the sums over the rows go in: by the shape alone.
int64_t parts_of(int64_t rows, bool on_cuda) {
  if (!on_cuda) return std::max<int64_t>(rows / kRowsOfPart, 1);
  return std::clamp<int64_t>(rows / kLeastOfPart, 1, kParts);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_act_backward_kernel(
    const at::Tensor& given_grad, const at::Tensor& input, const OptionalTensor& other, const OptionalTensor& weight,
    const at::Tensor& given_moments, const at::Tensor& given_mask, std::string_view name) {
  auto [grad_input, grad_other, grad_weight, grad_bias] =
      norm_act_backward_meta(given_grad, input, other, weight, given_moments, given_mask, name);
  if (input.numel() == 0) {
    grad_weight.zero_();
    grad_bias.zero_();
    return {grad_input, grad_other, grad_weight, grad_bias};
  }
  const RowFunction function = function_named("_norm_act_backward", name);
  const Given given(input, other, weight, std::nullopt, function, 0.0);
  const at::Tensor grad_output = given_grad.contiguous(), moments = given_moments.contiguous();
  const at::Tensor mask = given_mask.contiguous();
  const int64_t parts = parts_of(given.input.rows, input.is_cuda());
  const at::Tensor partial =
      is_norm(function) ? at::empty({parts, 2, given.input.columns}, grad_weight.options()) : at::Tensor();
  const NormActBackwardArgs args{given.input,
                                 grad_output.const_data_ptr(),
                                 mask.numel() > 0 ? mask.const_data_ptr<uint8_t>() : nullptr,
                                 is_norm(function) ? moments.const_data_ptr<float>() : nullptr,
                                 grad_input.mutable_data_ptr(),
                                 other ? grad_other.mutable_data_ptr() : nullptr,
                                 is_norm(function) ? partial.mutable_data_ptr<float>() : nullptr,
                                 dtype_of(grad_output),
                                 parts};
  if (!is_norm(function)) {
    run_elementwise(args, given.x, QUANTRAIN_KERNELS(norm_act_backward));
    return {grad_input, grad_other, grad_weight, grad_bias};
  }
  run_tasks(args, parts, 1, given.x, QUANTRAIN_KERNELS(norm_act_backward));
  const NormActGradientArgs sums{partial.const_data_ptr<float>(), grad_weight.mutable_data_ptr<float>(),
                                 grad_bias.mutable_data_ptr<float>(), given.input.columns, parts};
  run_tasks(sums, given.input.columns, grain_of(parts * 2), given.x, QUANTRAIN_KERNELS(norm_act_gradients));
  return {grad_input, grad_other, grad_weight, grad_bias};
}

// Where no gradient is needed.
std::tuple<at::Tensor, at::Tensor> norm_act_fake_quantize_kernel(
    const at::Tensor& input, const OptionalTensor& other, const OptionalTensor& weight, const OptionalTensor& bias,
    const at::Tensor& scale, const OptionalTensor& zero_point, std::string_view function, double eps, int64_t quant_min,
    int64_t quant_max, std::string_view dtype) {
  static const auto op = find_operator<NormActForward>("_norm_act_forward");
  const auto result = op.call(input, other, weight, bias, scale, zero_point, function, eps, quant_min, quant_max,
                              !zero_point, dtype, true, false);
  return {std::get<0>(result), std::get<1>(result)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_act_fake_quantize_dynamic_kernel(
    const at::Tensor& input, const OptionalTensor& other, const OptionalTensor& weight, const OptionalTensor& bias,
    std::string_view function, double eps, int64_t quant_min, int64_t quant_max, bool symmetric,
    std::string_view dtype) {
  static const auto op = find_operator<NormActForward>("_norm_act_forward");
  const auto result = op.call(input, other, weight, bias, std::nullopt, std::nullopt, function, eps, quant_min,
                              quant_max, symmetric, dtype, true, false);
  return {std::get<0>(result), std::get<1>(result), std::get<4>(result), std::get<5>(result)};
}

}  // namespace

// ---- public functions -----------------------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> norm_act_fake_quantize(
    const at::Tensor& input, std::string_view function, const std::optional<at::Tensor>& other,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, const at::Tensor& scale,
    const std::optional<at::Tensor>& zero_point, double eps, int64_t quant_min, int64_t quant_max,
    std::string_view dtype) {
  static const auto op = find_operator<decltype(norm_act_fake_quantize_kernel)>("norm_act_fake_quantize");
  return op.call(input, other, weight, bias, scale, zero_point, function, eps, quant_min, quant_max, dtype);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_act_fake_quantize_dynamic(
    const at::Tensor& input, std::string_view function, const std::optional<at::Tensor>& other,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, double eps, int64_t quant_min,
    int64_t quant_max, bool symmetric, std::string_view dtype) {
  static const auto op =
      find_operator<decltype(norm_act_fake_quantize_dynamic_kernel)>("norm_act_fake_quantize_dynamic");
  return op.call(input, other, weight, bias, function, eps, quant_min, quant_max, symmetric, dtype);
}

namespace detail {

at::Tensor norm_act_range(const at::Tensor& input, std::string_view function, const std::optional<at::Tensor>& other,
                          const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, double eps) {
  static const auto op = find_operator<decltype(norm_act_range_kernel)>("_norm_act_range");
  return op.call(input, other, weight, bias, function, eps);
}

}  // namespace detail
}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  m.def(
      "norm_act_fake_quantize(Tensor input, Tensor? other, Tensor? weight, Tensor? bias, Tensor scale, Tensor? "
      "zero_point=None, *, str function=\"identity\", float eps=1e-05, int quant_min=-128, int quant_max=127, str "
      "dtype=\"\") -> (Tensor output, Tensor codes)");
  m.def(
      "norm_act_fake_quantize_dynamic(Tensor input, Tensor? other=None, Tensor? weight=None, Tensor? bias=None, *, str "
      "function=\"identity\", float eps=1e-05, int quant_min=-128, int quant_max=127, bool symmetric=True, str "
      "dtype=\"\") -> (Tensor output, Tensor codes, Tensor scale, Tensor zero_point)");
  m.def(
      "_norm_act_range(Tensor input, Tensor? other, Tensor? weight, Tensor? bias, *, str function, float eps) -> "
      "Tensor");
  m.def(
      "_norm_act_forward(Tensor input, Tensor? other, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? zero_point, "
      "str function, float eps, int quant_min, int quant_max, bool symmetric, str dtype, bool with_codes, bool "
      "with_mask) -> (Tensor output, Tensor codes, Tensor mask, Tensor moments, Tensor row_scale, Tensor "
      "row_zero_point)");
  m.def(
      "_norm_act_backward(Tensor grad_output, Tensor input, Tensor? other, Tensor? weight, Tensor moments, Tensor "
      "mask, str function) -> (Tensor grad_input, Tensor grad_other, Tensor grad_weight, Tensor grad_bias)");
}

#define QUANTRAIN_REGISTER_NORM_ACT(kind)                           \
  m.impl("_norm_act_range", &quantrain::norm_act_range_##kind);     \
  m.impl("_norm_act_forward", &quantrain::norm_act_forward_##kind); \
  m.impl("_norm_act_backward", &quantrain::norm_act_backward_##kind)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_NORM_ACT(kernel); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_NORM_ACT(meta); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_NORM_ACT(kernel); }
#endif
// They call operators that have a kernel for each device, and Meta.
TORCH_LIBRARY_IMPL(quantrain, CompositeExplicitAutograd, m) {
  m.impl("norm_act_fake_quantize", &quantrain::norm_act_fake_quantize_kernel);
  m.impl("norm_act_fake_quantize_dynamic", &quantrain::norm_act_fake_quantize_dynamic_kernel);
}
