#include "quantrain/ops/int8_transformer.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "csrc/common/rotary.h"
#include "csrc/cpu/int8.h"
#include "ops/attention.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/int8_transformer_layer.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/int8.h"
#endif

// A transformer layer as operators, and rotary embedding of its heads.

namespace quantrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Product = Int8TransformerProduct;
using Norm = Int8TransformerNorm;
using Weights = Int8TransformerWeights;
using Options = Int8TransformerOptions;
using Inputs = Int8TransformerInputs;
using Triple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr std::string_view kLayer = "int8_transformer_layer";
constexpr std::string_view kRotate = "rotate_heads_";

// ---- weights as a schema takes them ---------------------------------------------------------------------------------

using TensorList = c10::List<OptionalTensor>;

Weights weights_of(const TensorList& list) { return int8_transformer_weights(list.vec()); }

TensorList list_of(const Weights& w) {
  TensorList list;
  for (const Norm* norm : {&w.norm_1, &w.norm_2}) {
    list.push_back(norm->weight);
    list.push_back(norm->bias);
  }
  for (const Product* p : {&w.qkv, &w.out, &w.up, &w.down}) {
    for (const OptionalTensor& tensor :
         {OptionalTensor(p->weight.codes), p->weight.scale.defined() ? OptionalTensor(p->weight.scale) : std::nullopt,
          p->bias, p->weight.input_factor, p->weight.input_scale, p->weight.outlier_columns, p->weight.outlier_codes,
          p->weight.outlier_scale})
      list.push_back(tensor);
  }
  return list;
}

// ---- as operators ---------------------------------------------------------------------------------------------------

Options options_of(int64_t heads, int64_t kv_heads, c10::string_view norm, bool pre_norm, c10::string_view activation,
                   bool causal, double eps, double softmax_scale, bool quantize_input, double outlier_threshold,
                   int64_t capacity, bool few_rows_float) {
  return {heads,
          kv_heads,
          std::string(norm),
          pre_norm,
          std::string(activation),
          causal,
          eps,
          softmax_scale,
          {quantize_input, outlier_threshold, capacity, few_rows_float}};
}

Inputs inputs_of(const OptionalTensor& mask, const OptionalTensor& cos, const OptionalTensor& sin,
                 const OptionalTensor& codes, const OptionalTensor& scale) {
  QUANTRAIN_CHECK_VALUE(codes.has_value() == scale.has_value(), "{}: expected codes and scale together, got one",
                        kLayer);
  Inputs in{mask, cos, sin};
  if (codes) in.codes = Int8Codes{*codes, *scale};
  return in;
}

Triple result_like(const at::Tensor& input, const Weights& w, const Options& o) {
  const at::Tensor output = at::empty_symint(input.sym_sizes(), input.options());
  const auto bytes = input.options().dtype(at::kChar), floats = input.options().dtype(at::kFloat);
  if (!detail::int8_transformer_gives_codes(w, o)) return {output, at::empty({0}, bytes), at::empty({0}, floats)};
  std::vector<c10::SymInt> scales(input.sym_sizes().begin(), input.sym_sizes().end());
  scales.back() = 1;
  return {output, at::empty_symint(input.sym_sizes(), bytes), at::empty_symint(scales, floats)};
}

Triple as_triple(Int8TransformerResult result, const at::Tensor& input) {
  if (result.codes) return {std::move(result.output), std::move(result.codes->codes), std::move(result.codes->scale)};
  return {std::move(result.output), at::empty({0}, input.options().dtype(at::kChar)),
          at::empty({0}, input.options().dtype(at::kFloat))};
}

#define QUANTRAIN_LAYER_OPTIONS                                                                                    \
  int64_t heads, int64_t kv_heads, c10::string_view norm, bool pre_norm, c10::string_view activation, bool causal, \
      double eps, double softmax_scale, bool quantize_input, double outlier_threshold, int64_t capacity,           \
      bool few_rows_float
#define QUANTRAIN_LAYER_OPTIONS_PASSED                                                                        \
  heads, kv_heads, norm, pre_norm, activation, causal, eps, softmax_scale, quantize_input, outlier_threshold, \
      capacity, few_rows_float
#define QUANTRAIN_LAYER_INPUTS                                                                                   \
  const OptionalTensor &mask, const OptionalTensor &cos, const OptionalTensor &sin, const OptionalTensor &codes, \
      const OptionalTensor &scale

template <bool kMeta>
Triple layer(const at::Tensor& input, const TensorList& list, QUANTRAIN_LAYER_OPTIONS, QUANTRAIN_LAYER_INPUTS) {
  const Weights w = weights_of(list);
  const Options o = options_of(QUANTRAIN_LAYER_OPTIONS_PASSED);
  const Inputs in = inputs_of(mask, cos, sin, codes, scale);
  if (!kMeta && input.numel() > 0) return as_triple(detail::run_int8_transformer(input, w, o, in), input);
  detail::check_int8_transformer(input, w, o, in);
  return result_like(input, w, o);
}

template <bool kMeta>
at::Tensor qkv(const at::Tensor& input, const TensorList& list, QUANTRAIN_LAYER_OPTIONS, QUANTRAIN_LAYER_INPUTS) {
  const Weights w = weights_of(list);
  const Options o = options_of(QUANTRAIN_LAYER_OPTIONS_PASSED);
  const Inputs in = inputs_of(mask, cos, sin, codes, scale);
  if (!kMeta) return detail::run_int8_transformer_qkv(input, w, o, in);
  detail::check_int8_transformer(input, w, o, in);
  return at::empty_symint({input.sym_size(0), input.sym_size(1), o.heads + 2 * detail::int8_transformer_kv_heads(o),
                           detail::int8_transformer_head_size(w, o)},
                          input.options());
}

template <bool kMeta>
Triple output(const at::Tensor& input, const at::Tensor& attended, const TensorList& list, QUANTRAIN_LAYER_OPTIONS) {
  const Weights w = weights_of(list);
  const Options o = options_of(QUANTRAIN_LAYER_OPTIONS_PASSED);
  if (!kMeta && input.numel() > 0) return as_triple(detail::run_int8_transformer_output(input, attended, w, o), input);
  detail::check_int8_transformer_output(input, attended, w, o);
  return result_like(input, w, o);
}

void check_rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t heads) {
  detail::check_float(kRotate, "x", x.scalar_type());
  QUANTRAIN_CHECK_VALUE(x.dim() == 4 && heads >= 0 && TORCH_GUARD_OR_TRUE(x.sym_size(2).sym_ge(heads)),
                        "{}: expected x [B, T, H, D] of at least {} heads, got {}", kRotate, heads,
                        detail::shape_text(x));
  detail::check_angles(kRotate, x, cos, sin, x.sym_size(3).guard_int(__FILE__, __LINE__));
}

void rotate_meta(at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t heads) {
  check_rotate(x, cos, sin, heads);
}

void rotate_kernel(at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t heads) {
  check_rotate(x, cos, sin, heads);
  if (x.numel() == 0 || heads == 0) return;
  if (!x.is_contiguous()) {
    at::Tensor copy = x.contiguous();
    rotate_kernel(copy, cos, sin, heads);
    x.copy_(copy);
    return;
  }
  const at::Tensor c = cos.contiguous(), s = sin.contiguous();
  const RotaryArgs args{x.mutable_data_ptr(),  c.const_data_ptr(), s.const_data_ptr(), dtype_of(x), dtype_of(c),
                        x.size(0) * x.size(1), x.size(1),          x.size(2),          heads,       x.size(3),
                        c.size(0) == 1};
  run_tasks(args, args.tokens, grain_of(heads * x.size(3)), x, QUANTRAIN_KERNELS(rotate_heads));
}

}  // namespace

// ---- public functions -----------------------------------------------------------------------------------------------

Int8TransformerWeights int8_transformer_weights(const std::vector<OptionalTensor>& list) {
  constexpr size_t kNormTensors = 4, kProductTensors = 8, kTensors = kNormTensors + 4 * kProductTensors;
  QUANTRAIN_CHECK_VALUE(list.size() == kTensors, "{}: expected {} weights, got {}", kLayer, kTensors, list.size());
  const auto product = [&](size_t index) {
    const OptionalTensor* part = &list[kNormTensors + index * kProductTensors];
    QUANTRAIN_CHECK_VALUE(part[0] && (part[1] || part[0]->is_floating_point()),
                          "{}: expected codes and scale of each product, got none", kLayer);
    return Product{{*part[0], part[1] ? *part[1] : at::Tensor(), part[3], part[4], part[5], part[6], part[7]}, part[2]};
  };
  return {product(0), product(1), product(2), product(3), {list[0], list[1]}, {list[2], list[3]}};
}

namespace {

#define QUANTRAIN_OPTIONS_OF(o)                                                                                      \
  o.heads, o.kv_heads, o.norm, o.pre_norm, o.activation, o.causal, o.eps, o.softmax_scale, o.product.quantize_input, \
      o.product.outlier_threshold, o.product.capacity, o.product.few_rows_float
#define QUANTRAIN_INPUTS_OF(in)                                                       \
  in.mask, in.cos, in.sin, in.codes ? OptionalTensor(in.codes->codes) : std::nullopt, \
      in.codes ? OptionalTensor(in.codes->scale) : std::nullopt

Int8TransformerResult as_result(Triple triple) {
  auto& [output, codes, scale] = triple;
  if (codes.dim() == 1) return {std::move(output), std::nullopt};
  return {std::move(output), Int8Codes{std::move(codes), std::move(scale)}};
}

}  // namespace

Int8TransformerResult int8_transformer_layer(const at::Tensor& input, const Int8TransformerWeights& weights,
                                             const Int8TransformerOptions& options,
                                             const Int8TransformerInputs& inputs) {
  static const auto op = find_operator<decltype(layer<false>)>("int8_transformer_layer");
  return as_result(op.call(input, list_of(weights), QUANTRAIN_OPTIONS_OF(options), QUANTRAIN_INPUTS_OF(inputs)));
}

at::Tensor int8_transformer_qkv(const at::Tensor& input, const Int8TransformerWeights& weights,
                                const Int8TransformerOptions& options, const Int8TransformerInputs& inputs) {
  static const auto op = find_operator<decltype(qkv<false>)>("int8_transformer_qkv");
  return op.call(input, list_of(weights), QUANTRAIN_OPTIONS_OF(options), QUANTRAIN_INPUTS_OF(inputs));
}

Int8TransformerResult int8_transformer_output(const at::Tensor& input, const at::Tensor& attended,
                                              const Int8TransformerWeights& weights,
                                              const Int8TransformerOptions& options) {
  static const auto op = find_operator<decltype(output<false>)>("int8_transformer_output");
  return as_result(op.call(input, attended, list_of(weights), QUANTRAIN_OPTIONS_OF(options)));
}

void rotate_heads_(at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t heads) {
  static const auto op = find_operator<decltype(rotate_kernel)>("rotate_heads_");
  op.call(x, cos, sin, heads);
}

}  // namespace quantrain

// ---- registration ---------------------------------------------------------------------------------------------------

#define QUANTRAIN_LAYER_SCHEMA                                                                                      \
  ", *, int heads, int kv_heads=0, str norm=\"layer_norm\", bool pre_norm=False, str activation=\"gelu\", bool "    \
  "causal=False, float eps=1e-05, float softmax_scale=0.0, bool quantize_input=True, float outlier_threshold=0.0, " \
  "int capacity=0, bool few_rows_float=True"
#define QUANTRAIN_LAYER_INPUTS_SCHEMA \
  ", Tensor? mask=None, Tensor? cos=None, Tensor? sin=None, Tensor? codes=None, Tensor? scale=None"

TORCH_LIBRARY_FRAGMENT(quantrain, m) {
  const std::vector<at::Tag> fixed{at::Tag::needs_exact_strides};
  m.def("int8_transformer_layer(Tensor input, Tensor?[] weights" QUANTRAIN_LAYER_SCHEMA QUANTRAIN_LAYER_INPUTS_SCHEMA
        ") -> (Tensor output, Tensor codes, Tensor scale)",
        fixed);
  m.def("int8_transformer_qkv(Tensor input, Tensor?[] weights" QUANTRAIN_LAYER_SCHEMA QUANTRAIN_LAYER_INPUTS_SCHEMA
        ") -> Tensor",
        fixed);
  m.def("int8_transformer_output(Tensor input, Tensor attended, Tensor?[] weights" QUANTRAIN_LAYER_SCHEMA
        ") -> (Tensor output, Tensor codes, Tensor scale)",
        fixed);
  m.def("rotate_heads_(Tensor(a!) x, Tensor cos, Tensor sin, int heads) -> ()", fixed);
}

#define QUANTRAIN_REGISTER_INT8_TRANSFORMER(meta)              \
  m.impl("int8_transformer_layer", &quantrain::layer<meta>);   \
  m.impl("int8_transformer_qkv", &quantrain::qkv<meta>);       \
  m.impl("int8_transformer_output", &quantrain::output<meta>); \
  m.impl("rotate_heads_", meta ? &quantrain::rotate_meta : &quantrain::rotate_kernel)

TORCH_LIBRARY_IMPL(quantrain, CPU, m) { QUANTRAIN_REGISTER_INT8_TRANSFORMER(false); }
TORCH_LIBRARY_IMPL(quantrain, Meta, m) { QUANTRAIN_REGISTER_INT8_TRANSFORMER(true); }
#if defined(QUANTRAIN_WITH_CUDA)
TORCH_LIBRARY_IMPL(quantrain, CUDA, m) { QUANTRAIN_REGISTER_INT8_TRANSFORMER(false); }
#endif
