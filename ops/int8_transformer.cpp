#include "quantrain/ops/int8_transformer.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <cmath>

#include "csrc/common/rotary.h"
#include "csrc/cpu/int8.h"
#include "ops/attention.h"
#include "ops/common/check.h"
#include "ops/common/dispatch.h"
#include "ops/common/launch.h"
#include "ops/int8_transformer_launch.h"
#include "ops/int8_values.h"

#if defined(QUANTRAIN_WITH_CUDA)
#include "csrc/cuda/int8.h"
#endif

// A transformer layer of the int8 family's operators and PyTorch's attention.

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

// ---- checks, shared with Meta ---------------------------------------------------------------------------------------

int64_t kv_heads(const Options& o) { return o.kv_heads > 0 ? o.kv_heads : o.heads; }

int64_t head_size(const Weights& w, const Options& o) {
  return w.qkv.weight.codes.size(0) / (o.heads + 2 * kv_heads(o));
}

void check_rows(const char* name, const Product& p, int64_t rows) {
  QUANTRAIN_CHECK_VALUE(p.weight.codes.dim() == 2 && p.weight.codes.size(0) == rows,
                        "{}: expected {} codes of {} rows, got {}", kLayer, name, rows,
                        detail::shape_text(p.weight.codes));
}

// A weight that is not rounded has no codes, and stands in their place.
bool is_float(const Product& p) { return p.weight.codes.is_floating_point(); }

void check_columns(const char* name, const Product& p, int64_t columns) {
  const auto type = p.weight.codes.scalar_type();
  QUANTRAIN_CHECK_TYPE(type == at::kChar || type == at::kByte || is_float(p),
                       "{}: expected {} codes of int8, uint8 or a floating type, got {}", kLayer, name,
                       c10::toString(type));
  const int64_t held = p.weight.codes.size(1);
  QUANTRAIN_CHECK_VALUE(type != at::kByte ? held == columns : held * 2 >= columns,
                        "{}: expected {} codes of {} columns, got {}", kLayer, name, columns,
                        detail::shape_text(p.weight.codes));
}

void check_norm(const char* name, const OptionalTensor& tensor, const at::Tensor& input) {
  if (!tensor) return;
  QUANTRAIN_CHECK_TYPE((tensor->scalar_type() == input.scalar_type() || tensor->scalar_type() == at::kFloat) &&
                           tensor->device() == input.device(),
                       "{}: expected {} of type {} or float32 on {}, got {} on {}", kLayer, name,
                       c10::toString(input.scalar_type()), input.device().str(), c10::toString(tensor->scalar_type()),
                       tensor->device().str());
  QUANTRAIN_CHECK_VALUE(tensor->dim() == 1 && TORCH_GUARD_OR_TRUE(tensor->sym_size(0).sym_eq(input.sym_size(2))),
                        "{}: expected {} of input's last dimension, got {} and {}", kLayer, name,
                        detail::shape_text(*tensor), detail::shape_text(input));
}

void check_layer(const at::Tensor& input, const Weights& w, const Options& o) {
  detail::check_float(kLayer, "input", input.scalar_type());
  detail::check_dense(kLayer, "input", input);
  QUANTRAIN_CHECK_VALUE(input.dim() == 3, "{}: expected input [B, T, C], got {}", kLayer, detail::shape_text(input));
  QUANTRAIN_CHECK_VALUE(o.heads >= 1 && o.kv_heads >= 0 && o.heads % kv_heads(o) == 0,
                        "{}: expected heads to be a multiple of kv_heads, got {} and {}", kLayer, o.heads, o.kv_heads);
  QUANTRAIN_CHECK_VALUE(o.norm == "layer_norm" || o.norm == "rms_norm",
                        "{}: expected norm layer_norm or rms_norm, got '{}'", kLayer, o.norm);
  const bool gated = o.activation == "silu_mul";
  QUANTRAIN_CHECK_VALUE(gated || o.activation == "gelu" || o.activation == "gelu_tanh" || o.activation == "relu",
                        "{}: expected activation gelu, gelu_tanh, relu or silu_mul, got '{}'", kLayer, o.activation);
  QUANTRAIN_CHECK_VALUE(o.eps >= 0 && o.softmax_scale >= 0 && std::isfinite(o.softmax_scale),
                        "{}: expected eps and softmax_scale of at least 0, got {} and {}", kLayer, o.eps,
                        o.softmax_scale);
  for (const auto& [name, p] :
       {std::pair("qkv", &w.qkv), std::pair("out", &w.out), std::pair("up", &w.up), std::pair("down", &w.down)})
    QUANTRAIN_CHECK_VALUE(p->weight.codes.dim() == 2, "{}: expected {} codes of two dimensions, got {}", kLayer, name,
                          detail::shape_text(p->weight.codes));
  const int64_t size = head_size(w, o), width = input.sym_size(2).guard_int(__FILE__, __LINE__);
  QUANTRAIN_CHECK_VALUE(size > 0, "{}: expected qkv codes of at least heads + 2 kv_heads rows, got {}", kLayer,
                        detail::shape_text(w.qkv.weight.codes));
  check_rows("qkv", w.qkv, size * (o.heads + 2 * kv_heads(o)));
  check_rows("out", w.out, width);
  check_rows("down", w.down, width);
  const int64_t up = w.up.weight.codes.size(0);
  QUANTRAIN_CHECK_VALUE(!gated || up % 2 == 0, "{}: expected up codes of an even number of rows for silu_mul, got {}",
                        kLayer, up);
  check_columns("qkv", w.qkv, width);
  check_columns("out", w.out, o.heads * size);
  check_columns("up", w.up, width);
  check_columns("down", w.down, gated ? up / 2 : up);
  check_norm("norm_1_weight", w.norm_1.weight, input);
  check_norm("norm_1_bias", w.norm_1.bias, input);
  check_norm("norm_2_weight", w.norm_2.weight, input);
  check_norm("norm_2_bias", w.norm_2.bias, input);
  QUANTRAIN_CHECK_VALUE(o.norm == "layer_norm" || (!w.norm_1.bias && !w.norm_2.bias),
                        "{}: expected no bias of rms_norm, got one", kLayer);
}

void check_inputs(const at::Tensor& input, const Weights& w, const Options& o, const Inputs& in) {
  detail::check_angles(kLayer, input, in.cos, in.sin, head_size(w, o));
  QUANTRAIN_CHECK_VALUE(in.cache ? in.position && !in.mask : !in.position && !in.kept,
                        "{}: expected a cache with a position and without a mask, or neither, got others", kLayer);
  if (in.mask) {
    detail::check_device(kLayer, "mask", *in.mask, input, "input's");
    QUANTRAIN_CHECK_TYPE(in.mask->scalar_type() == at::kBool || in.mask->is_floating_point(),
                         "{}: expected mask of bool or a floating type, got {}", kLayer,
                         c10::toString(in.mask->scalar_type()));
    const c10::SymInt sizes[4] = {input.sym_size(0), o.heads, input.sym_size(1), input.sym_size(1)};
    const int64_t dims = in.mask->dim();
    bool fits = dims >= 2 && dims <= 4;
    for (int64_t d = 0; fits && d < dims; ++d) {
      const c10::SymInt& size = in.mask->sym_size(dims - 1 - d);
      fits = TORCH_GUARD_OR_TRUE(size.sym_eq(sizes[3 - d])) || TORCH_GUARD_OR_FALSE(size.sym_eq(1));
    }
    QUANTRAIN_CHECK_VALUE(fits, "{}: expected mask [B, heads, T, T], got {}", kLayer, detail::shape_text(*in.mask));
  }
  if (in.codes) {
    const auto& [codes, scale] = *in.codes;
    detail::check_type(kLayer, "codes", codes, at::kChar, "int8");
    detail::check_type(kLayer, "scale", scale, at::kFloat, "float32");
    QUANTRAIN_CHECK_VALUE(TORCH_GUARD_OR_TRUE(codes.sym_numel().sym_eq(input.sym_numel())) &&
                              TORCH_GUARD_OR_TRUE((scale.sym_numel() * input.sym_size(2)).sym_eq(input.sym_numel())),
                          "{}: expected codes of input's shape and a scale for each token, got {} and {}", kLayer,
                          detail::shape_text(codes), detail::shape_text(scale));
  }
}

// ---- the layer ------------------------------------------------------------------------------------------------------

bool plain(const Product& p, const Options& o) { return detail::int8_transformer_plain(p, o); }

bool gives_codes(const Weights& w, const Options& o) {
  return !o.pre_norm && plain(w.qkv, o) && !w.qkv.weight.input_factor;
}

// What a product reads: float values, or codes in their place or beside them.
struct Operand {
  at::Tensor values;
  std::optional<Int8Codes> codes;
};

struct Carried {
  Operand normalized;
  at::Tensor carried;  // what the next branch is added to
};

class Layer {
 public:
  Layer(const at::Tensor& input, const Weights& w, const Options& o) : w_(w), o_(o), type_(input.scalar_type()) {
    few_rows_ =
        o.product.few_rows_float && input.size(0) * input.size(1) <= (input.is_cpu() ? kFewRowsOnCpu : kFewRows);
#if defined(QUANTRAIN_WITH_CUDA)
    launches_ = !few_rows_ && detail::int8_transformer_launches(input, w, o);
#endif
  }

  at::Tensor qkv(const at::Tensor& input, const Inputs& in) const {
    at::Tensor heads = unrotated(input, in);
    if (in.cos) rotate_heads_(heads, *in.cos, *in.sin, o_.heads + kv_heads(o_));
    return heads;
  }

  // [B, T, heads + 2 kv_heads, D]
  at::Tensor unrotated(const at::Tensor& input, const Inputs& in) const {
#if defined(QUANTRAIN_WITH_CUDA)
    if (launches_) return detail::int8_transformer_launch_qkv(input, w_, o_, gives_codes(w_, o_) ? in : Inputs{});
#endif
    Operand x{input, std::nullopt};
    if (o_.pre_norm)
      x = normalized(input);
    else if (takes_codes(w_.qkv))
      x.codes = in.codes && gives_codes(w_, o_) ? *in.codes : rows(input, w_.qkv);
    return multiply(w_.qkv, x).view({input.size(0), input.size(1), o_.heads + 2 * kv_heads(o_), head_size(w_, o_)});
  }

  // With what the cache holds, which takes the new tokens' keys and values.
  at::Tensor attended_with_cache(at::Tensor qkv, const Inputs& in) const {
    kv_cache_append_(qkv, *in.cache, *in.position, in.cos, in.sin);
    return kv_cache_attention(qkv.narrow(2, 0, o_.heads), *in.cache, *in.position, scale_of(qkv), in.kept).flatten(2);
  }

  // [B, T, heads + 2 kv_heads, D] -> [B, T, heads D]
  at::Tensor attended(const at::Tensor& qkv, const OptionalTensor& mask) const {
    return detail::attention_of_heads(qkv, o_.heads, kv_heads(o_), mask, o_.causal && !mask && qkv.size(1) > 1,
                                      scale_of(qkv));
  }

  Int8TransformerResult output(const at::Tensor& input, const at::Tensor& attended) const {
#if defined(QUANTRAIN_WITH_CUDA)
    if (launches_) return detail::int8_transformer_launch_output(input, attended, w_, o_, gives_codes(w_, o_));
#endif
    Operand mixed{attended, std::nullopt};
    if (takes_codes(w_.out)) mixed.codes = rows(attended, w_.out);
    const Carried middle = add_norm(multiply(w_.out, mixed), input, o_.pre_norm ? w_.norm_2 : w_.norm_1, w_.up);
    const at::Tensor branch = multiply(w_.down, activated(multiply(w_.up, middle.normalized)));
    if (o_.pre_norm) return {sum(middle.carried, branch), std::nullopt};
    Carried last = add_norm(branch, middle.carried, w_.norm_2, w_.qkv);
    if (!gives_codes(w_, o_)) last.normalized.codes.reset();
    return {std::move(last.carried), std::move(last.normalized.codes)};
  }

 private:
  at::Tensor sum(const at::Tensor& x, const at::Tensor& branch) const {
#if defined(QUANTRAIN_WITH_CUDA)
    // Overlaps the product before it, as PyTorch's addition does not.
    if (x.is_cuda() && x.numel() % 8 == 0) {
      const c10::cuda::CUDAGuard guard(x.device());
      C10_CUDA_CHECK(static_cast<cudaError_t>(cuda::add_to(x.const_data_ptr(), branch.mutable_data_ptr(), dtype_of(x),
                                                           x.numel(), c10::cuda::getCurrentCUDAStream().stream())));
      return branch;
    }
#endif
    return x + branch;
  }
  double scale_of(const at::Tensor& qkv) const {
    return o_.softmax_scale > 0 ? o_.softmax_scale : 1 / std::sqrt(static_cast<double>(qkv.size(3)));
  }
  bool rms() const { return o_.norm == "rms_norm"; }
  bool takes_codes(const Product& p) const { return plain(p, o_) && !few_rows_; }

  static Int8Codes rows(const at::Tensor& values, const Product& p) {
    Int8QuantizeOptions options;
    options.column_factor = p.weight.input_factor;
    return int8_quantize_rows(values, options);
  }

  at::Tensor multiply(const Product& p, const Operand& x) const {
    if (x.codes && takes_codes(p))
      return int8_mm(x.codes->codes, p.weight.codes, x.codes->scale, p.weight.scale, p.bias, type_);
    if (is_float(p)) {
      const OptionalTensor bias = p.bias ? OptionalTensor(p.bias->to(type_)) : std::nullopt;
      return at::linear(x.values, p.weight.codes.to(type_), bias);
    }
    return ptq_linear(x.values, p.weight, p.bias, o_.product);
  }

  detail::NormValues float_norm(const at::Tensor& x, const OptionalTensor& branch, const Norm& norm) const {
    return detail::norm_values(branch ? *branch : x, branch ? OptionalTensor(x) : std::nullopt, norm.weight, norm.bias,
                               o_.eps, rms());
  }

  Operand normalized(const at::Tensor& x) const {
    if (!takes_codes(w_.qkv)) return {float_norm(x, std::nullopt, w_.norm_1).values, std::nullopt};
    const OptionalTensor& factor = w_.qkv.weight.input_factor;
    return {{},
            rms() ? int8_rms_norm(x, w_.norm_1.weight, o_.eps, factor)
                  : int8_layer_norm(x, w_.norm_1.weight, w_.norm_1.bias, o_.eps, factor)};
  }

  // The norm of x + branch, as the product `next` reads it.
  Carried add_norm(const at::Tensor& branch, const at::Tensor& x, const Norm& norm, const Product& next) const {
    const bool post = !o_.pre_norm;
    if (!plain(next, o_) || (few_rows_ && o_.pre_norm)) {
      auto [values, sum] = float_norm(x, branch, norm);
      return {{values, std::nullopt}, post ? values : sum};
    }
    const OptionalTensor& factor = next.weight.input_factor;
    auto [codes, carried] = rms() ? int8_add_rms_norm(branch, x, norm.weight, o_.eps, post, factor)
                                  : int8_add_layer_norm(branch, x, norm.weight, norm.bias, o_.eps, post, factor);
    return {{post ? carried : at::Tensor(), std::move(codes)}, carried};
  }

  // f of up's result, as the product `down` reads it.
  Operand activated(const at::Tensor& x) const {
    const bool gated = o_.activation == "silu_mul";
    const int64_t half = x.size(2) / 2;
    const at::Tensor gate = gated ? x.narrow(2, 0, half) : x, up = gated ? x.narrow(2, half, half) : at::Tensor();
    if (takes_codes(w_.down)) {
      const OptionalTensor& factor = w_.down.weight.input_factor;
      if (gated) return {{}, int8_silu_mul(gate, up, factor)};
      if (o_.activation == "relu") return {{}, int8_relu(x, factor)};
      return {{}, int8_gelu(x, o_.activation == "gelu" ? "none" : "tanh", factor)};
    }
    const Int8Activation activation = gated                          ? Int8Activation::kSiluMul
                                      : o_.activation == "relu"      ? Int8Activation::kRelu
                                      : o_.activation == "gelu_tanh" ? Int8Activation::kGeluTanh
                                                                     : Int8Activation::kGeluErf;
    return {detail::activation_values(gate, gated ? OptionalTensor(up) : std::nullopt, activation), std::nullopt};
  }

  const Weights& w_;
  const Options& o_;
  at::ScalarType type_;
  bool few_rows_;
#if defined(QUANTRAIN_WITH_CUDA)
  bool launches_;
#endif
};

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
  if (!gives_codes(w, o)) return {output, at::empty({0}, bytes), at::empty({0}, floats)};
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

void check_attended(const at::Tensor& input, const at::Tensor& attended, const Weights& w, const Options& o) {
  QUANTRAIN_CHECK_TYPE(attended.scalar_type() == input.scalar_type() && attended.device() == input.device(),
                       "{}: expected attended of input's type on {}, got {} on {}", kLayer, input.device().str(),
                       c10::toString(attended.scalar_type()), attended.device().str());
  QUANTRAIN_CHECK_VALUE(attended.dim() == 3 && TORCH_GUARD_OR_TRUE(attended.sym_size(0).sym_eq(input.sym_size(0))) &&
                            TORCH_GUARD_OR_TRUE(attended.sym_size(1).sym_eq(input.sym_size(1))) &&
                            TORCH_GUARD_OR_TRUE(attended.sym_size(2).sym_eq(o.heads * head_size(w, o))),
                        "{}: expected attended [B, T, heads D], got {}", kLayer, detail::shape_text(attended));
}

Int8TransformerResult run_layer(const at::Tensor& input, const Weights& w, const Options& o, const Inputs& in) {
  check_layer(input, w, o);
  check_inputs(input, w, o, in);
  if (input.numel() == 0) return {at::empty_like(input), std::nullopt};
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor x = input.contiguous();
  const Layer layer(x, w, o);
  if (in.cache) return layer.output(x, layer.attended_with_cache(layer.unrotated(x, in), in));
  return layer.output(x, layer.attended(layer.qkv(x, in), in.mask));
}

at::Tensor run_qkv(const at::Tensor& input, const Weights& w, const Options& o, const Inputs& in) {
  check_layer(input, w, o);
  check_inputs(input, w, o, in);
  if (input.numel() == 0)
    return at::empty({input.size(0), input.size(1), o.heads + 2 * kv_heads(o), head_size(w, o)}, input.options());
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor x = input.contiguous();
  return Layer(x, w, o).qkv(x, in);
}

Int8TransformerResult run_output(const at::Tensor& input, const at::Tensor& attended, const Weights& w,
                                 const Options& o) {
  check_layer(input, w, o);
  check_attended(input, attended, w, o);
  if (input.numel() == 0) return {at::empty_like(input), std::nullopt};
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor x = input.contiguous();
  return Layer(x, w, o).output(x, attended.contiguous());
}

template <bool kMeta>
Triple layer(const at::Tensor& input, const TensorList& list, QUANTRAIN_LAYER_OPTIONS, QUANTRAIN_LAYER_INPUTS) {
  const Weights w = weights_of(list);
  const Options o = options_of(QUANTRAIN_LAYER_OPTIONS_PASSED);
  const Inputs in = inputs_of(mask, cos, sin, codes, scale);
  if (!kMeta && input.numel() > 0) return as_triple(run_layer(input, w, o, in), input);
  check_layer(input, w, o);
  check_inputs(input, w, o, in);
  return result_like(input, w, o);
}

template <bool kMeta>
at::Tensor qkv(const at::Tensor& input, const TensorList& list, QUANTRAIN_LAYER_OPTIONS, QUANTRAIN_LAYER_INPUTS) {
  const Weights w = weights_of(list);
  const Options o = options_of(QUANTRAIN_LAYER_OPTIONS_PASSED);
  const Inputs in = inputs_of(mask, cos, sin, codes, scale);
  if (!kMeta) return run_qkv(input, w, o, in);
  check_layer(input, w, o);
  check_inputs(input, w, o, in);
  return at::empty_symint(
      {input.sym_size(0), input.sym_size(1), o.heads + 2 * ::quantrain::kv_heads(o), head_size(w, o)}, input.options());
}

template <bool kMeta>
Triple output(const at::Tensor& input, const at::Tensor& attended, const TensorList& list, QUANTRAIN_LAYER_OPTIONS) {
  const Weights w = weights_of(list);
  const Options o = options_of(QUANTRAIN_LAYER_OPTIONS_PASSED);
  if (!kMeta && input.numel() > 0) return as_triple(run_output(input, attended, w, o), input);
  check_layer(input, w, o);
  check_attended(input, attended, w, o);
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

bool detail::int8_transformer_plain(const Product& p, const Options& o) {
  return p.weight.codes.scalar_type() == at::kChar && !p.weight.outlier_columns && !p.weight.input_scale &&
         o.product.quantize_input && o.product.outlier_threshold == 0;
}

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

Int8TransformerResult Int8TransformerCall::layer(const at::Tensor& input, const Int8TransformerInputs& inputs) const {
  return run_layer(input, weights_, options_, inputs);
}

at::Tensor Int8TransformerCall::qkv(const at::Tensor& input, const Int8TransformerInputs& inputs) const {
  return run_qkv(input, weights_, options_, inputs);
}

Int8TransformerResult Int8TransformerCall::output(const at::Tensor& input, const at::Tensor& attended) const {
  return run_output(input, attended, weights_, options_);
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
