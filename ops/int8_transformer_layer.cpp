#include "ops/int8_transformer_layer.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>

#include <cmath>

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

int64_t detail::int8_transformer_kv_heads(const Int8TransformerOptions& o) {
  return o.kv_heads > 0 ? o.kv_heads : o.heads;
}

int64_t detail::int8_transformer_head_size(const Int8TransformerWeights& w, const Int8TransformerOptions& o) {
  return w.qkv.weight.codes.size(0) / (o.heads + 2 * int8_transformer_kv_heads(o));
}

bool detail::int8_transformer_plain(const Int8TransformerProduct& p, const Int8TransformerOptions& o) {
  return p.weight.codes.scalar_type() == at::kChar && !p.weight.outlier_columns && !p.weight.input_scale &&
         o.product.quantize_input && o.product.outlier_threshold == 0;
}

bool detail::int8_transformer_gives_codes(const Int8TransformerWeights& w, const Int8TransformerOptions& o) {
  return !o.pre_norm && int8_transformer_plain(w.qkv, o) && !w.qkv.weight.input_factor;
}

namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Product = Int8TransformerProduct;
using Norm = Int8TransformerNorm;
using Weights = Int8TransformerWeights;
using Options = Int8TransformerOptions;
using Inputs = Int8TransformerInputs;

constexpr std::string_view kLayer = "int8_transformer_layer";

// ---- checks, shared with Meta ---------------------------------------------------------------------------------------

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
  QUANTRAIN_CHECK_VALUE(o.heads >= 1 && o.kv_heads >= 0 && o.heads % detail::int8_transformer_kv_heads(o) == 0,
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
  const int64_t size = detail::int8_transformer_head_size(w, o),
                width = input.sym_size(2).guard_int(__FILE__, __LINE__);
  QUANTRAIN_CHECK_VALUE(size > 0, "{}: expected qkv codes of at least heads + 2 kv_heads rows, got {}", kLayer,
                        detail::shape_text(w.qkv.weight.codes));
  check_rows("qkv", w.qkv, size * (o.heads + 2 * detail::int8_transformer_kv_heads(o)));
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
  detail::check_angles(kLayer, input, in.cos, in.sin, detail::int8_transformer_head_size(w, o));
  QUANTRAIN_CHECK_VALUE(in.cache ? in.position && !in.mask : !in.position && !in.kept,
                        "{}: expected a cache with a position and without a mask, or neither, got others", kLayer);
  if (in.mask)
    detail::check_mask(kLayer, *in.mask, input, {input.sym_size(0), o.heads, input.sym_size(1), input.sym_size(1)},
                       "[B, heads, T, T]");
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

void check_attended(const at::Tensor& input, const at::Tensor& attended, const Weights& w, const Options& o) {
  QUANTRAIN_CHECK_TYPE(attended.scalar_type() == input.scalar_type() && attended.device() == input.device(),
                       "{}: expected attended of input's type on {}, got {} on {}", kLayer, input.device().str(),
                       c10::toString(attended.scalar_type()), attended.device().str());
  QUANTRAIN_CHECK_VALUE(
      attended.dim() == 3 && TORCH_GUARD_OR_TRUE(attended.sym_size(0).sym_eq(input.sym_size(0))) &&
          TORCH_GUARD_OR_TRUE(attended.sym_size(1).sym_eq(input.sym_size(1))) &&
          TORCH_GUARD_OR_TRUE(attended.sym_size(2).sym_eq(o.heads * detail::int8_transformer_head_size(w, o))),
      "{}: expected attended [B, T, heads D], got {}", kLayer, detail::shape_text(attended));
}

// ---- the layer ------------------------------------------------------------------------------------------------------

bool plain(const Product& p, const Options& o) { return detail::int8_transformer_plain(p, o); }

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
    if (in.cos) rotate_heads_(heads, *in.cos, *in.sin, o_.heads + detail::int8_transformer_kv_heads(o_));
    return heads;
  }

  // [B, T, heads + 2 kv_heads, D]
  at::Tensor unrotated(const at::Tensor& input, const Inputs& in) const {
#if defined(QUANTRAIN_WITH_CUDA)
    if (launches_)
      return detail::int8_transformer_launch_qkv(input, w_, o_,
                                                 detail::int8_transformer_gives_codes(w_, o_) ? in : Inputs{});
#endif
    Operand x{input, std::nullopt};
    if (o_.pre_norm)
      x = normalized(input);
    else if (takes_codes(w_.qkv))
      x.codes = in.codes && detail::int8_transformer_gives_codes(w_, o_) ? *in.codes : rows(input, w_.qkv);
    return multiply(w_.qkv, x).view({input.size(0), input.size(1), o_.heads + 2 * detail::int8_transformer_kv_heads(o_),
                                     detail::int8_transformer_head_size(w_, o_)});
  }

  // With what the cache holds, which takes the new tokens' keys and values.
  at::Tensor attended_with_cache(at::Tensor qkv, const Inputs& in) const {
    kv_cache_append_(qkv, *in.cache, *in.position, in.cos, in.sin);
    return kv_cache_attention(qkv.narrow(2, 0, o_.heads), *in.cache, *in.position, scale_of(qkv), in.kept).flatten(2);
  }

  // [B, T, heads + 2 kv_heads, D] -> [B, T, heads D]
  at::Tensor attended(const at::Tensor& qkv, const OptionalTensor& mask) const {
    return detail::attention_of_heads(qkv, o_.heads, detail::int8_transformer_kv_heads(o_), mask,
                                      o_.causal && !mask && qkv.size(1) > 1, scale_of(qkv));
  }

  Int8TransformerResult output(const at::Tensor& input, const at::Tensor& attended) const {
#if defined(QUANTRAIN_WITH_CUDA)
    if (launches_)
      return detail::int8_transformer_launch_output(input, attended, w_, o_,
                                                    detail::int8_transformer_gives_codes(w_, o_));
#endif
    Operand mixed{attended, std::nullopt};
    if (takes_codes(w_.out)) mixed.codes = rows(attended, w_.out);
    const Carried middle = add_norm(multiply(w_.out, mixed), input, o_.pre_norm ? w_.norm_2 : w_.norm_1, w_.up);
    const at::Tensor branch = multiply(w_.down, activated(multiply(w_.up, middle.normalized)));
    if (o_.pre_norm) return {sum(middle.carried, branch), std::nullopt};
    Carried last = add_norm(branch, middle.carried, w_.norm_2, w_.qkv);
    if (!detail::int8_transformer_gives_codes(w_, o_)) last.normalized.codes.reset();
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

}  // namespace

void detail::check_int8_transformer(const at::Tensor& input, const Weights& w, const Options& o, const Inputs& in) {
  check_layer(input, w, o);
  check_inputs(input, w, o, in);
}

void detail::check_int8_transformer_output(const at::Tensor& input, const at::Tensor& attended, const Weights& w,
                                           const Options& o) {
  check_layer(input, w, o);
  check_attended(input, attended, w, o);
}

Int8TransformerResult detail::run_int8_transformer(const at::Tensor& input, const Weights& w, const Options& o,
                                                   const Inputs& in) {
  check_int8_transformer(input, w, o, in);
  if (input.numel() == 0) return {at::empty_like(input), std::nullopt};
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor x = input.contiguous();
  const Layer layer(x, w, o);
  if (in.cache) return layer.output(x, layer.attended_with_cache(layer.unrotated(x, in), in));
  return layer.output(x, layer.attended(layer.qkv(x, in), in.mask));
}

at::Tensor detail::run_int8_transformer_qkv(const at::Tensor& input, const Weights& w, const Options& o,
                                            const Inputs& in) {
  check_int8_transformer(input, w, o, in);
  if (input.numel() == 0)
    return at::empty({input.size(0), input.size(1), o.heads + 2 * detail::int8_transformer_kv_heads(o),
                      detail::int8_transformer_head_size(w, o)},
                     input.options());
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor x = input.contiguous();
  return Layer(x, w, o).qkv(x, in);
}

Int8TransformerResult detail::run_int8_transformer_output(const at::Tensor& input, const at::Tensor& attended,
                                                          const Weights& w, const Options& o) {
  check_int8_transformer_output(input, attended, w, o);
  if (input.numel() == 0) return {at::empty_like(input), std::nullopt};
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor x = input.contiguous();
  return Layer(x, w, o).output(x, attended.contiguous());
}

Int8TransformerResult Int8TransformerCall::layer(const at::Tensor& input, const Int8TransformerInputs& inputs) const {
  return detail::run_int8_transformer(input, weights_, options_, inputs);
}

at::Tensor Int8TransformerCall::qkv(const at::Tensor& input, const Int8TransformerInputs& inputs) const {
  return detail::run_int8_transformer_qkv(input, weights_, options_, inputs);
}

Int8TransformerResult Int8TransformerCall::output(const at::Tensor& input, const at::Tensor& attended) const {
  return detail::run_int8_transformer_output(input, attended, weights_, options_);
}

}  // namespace quantrain
