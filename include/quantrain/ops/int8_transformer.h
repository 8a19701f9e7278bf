// A transformer layer for inference in one call: attention and feed-forward network with int8 products, every rounding
// done by the kernel that makes what is rounded (int8_fused.h). Yao et al., "ZeroQuant" (NeurIPS 2022), section 4.3.
//
//   pre_norm    x1 = x + out(attention(qkv(norm_1(x))))        y = x1 + down(f(up(norm_2(x1))))
//   otherwise   x1 = norm_1(x + out(attention(qkv(x))))        y = norm_2(x1 + down(f(up(x1))))
//
// f: gelu (of erf), gelu_tanh, relu, or silu_mul: silu(first half) times the second half of up's result. Attention is
// softmax(scale q k^T + mask) v of each head in the input's type; query head h reads key head h / (heads / kv_heads).
// The four products are ptq_linear's (ptq_linear.h) with whatever factors, stored scales and outlier columns they have;
// between plain ones of 8 bits nothing is written in floating point but qkv, attention's result and up's result. Rows
// come in int8 with one scale per token, so a token's result does not depend on the batch. With few_rows_float few
// tokens are multiplied unrounded (W8A16).
//
// input [B, T, C], float32, float16 or bfloat16, as is the result. CPU and CUDA. For inference: no gradients. NaN in a
// token gives NaN in that token's result and in those that attend to it; it may reach others of its sequence, which
// multiply it by 0. Nothing waits for the device.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "quantrain/ops/int8.h"
#include "quantrain/ops/kv_cache.h"
#include "quantrain/ops/ptq_linear.h"

namespace quantrain {

// A weight of floating point in codes' place, without a scale, is multiplied as it is.
struct Int8TransformerProduct {
  PtqWeight weight;
  std::optional<at::Tensor> bias = std::nullopt;  // float32 [O]
};

struct Int8TransformerNorm {
  std::optional<at::Tensor> weight = std::nullopt;  // [C], of input's type or float32
  std::optional<at::Tensor> bias = std::nullopt;    // likewise; of layer_norm only
};

// qkv: rows of queries, keys and values, [(heads + 2 kv_heads) D, C]; out [C, heads D]; up [F, C], with silu_mul gate
// and up, [2 F, C]; down [C, F].
struct Int8TransformerWeights {
  Int8TransformerProduct qkv, out, up, down;
  Int8TransformerNorm norm_1, norm_2;
};

// From the order in which operators take them, absent ones without a value: norm_1's and norm_2's weight and bias, then
// of each product codes, scale, bias, input_factor, input_scale, outlier_columns, outlier_codes and outlier_scale.
QUANTRAIN_API Int8TransformerWeights int8_transformer_weights(const std::vector<std::optional<at::Tensor>>& list);

struct Int8TransformerOptions {
  int64_t heads = 1;
  int64_t kv_heads = 0;             // 0: heads
  std::string norm = "layer_norm";  // or rms_norm
  bool pre_norm = false;
  std::string activation = "gelu";
  bool causal = false;       // where there is no mask and more than one token
  double eps = 1e-5;         // of both norms
  double softmax_scale = 0;  // 0: D^-0.5
  PtqProduct product = {};
};

// What differs from call to call.
struct Int8TransformerInputs {
  std::optional<at::Tensor> mask =
      std::nullopt;  // bool (true: attend) or floating (added), broadcast to [B, heads, T, T]
  std::optional<at::Tensor> cos = std::nullopt, sin = std::nullopt;  // [B or 1, T, D]: queries and keys are rotated,
                                                                     // y = x cos + (-second half, first half) sin
  std::optional<Int8Codes> codes = std::nullopt;                     // of input, where the layer before gave them
  // Keys and values of the tokens before, to which input's are added from `position` on, int64 (kv_cache.h): of
  // Int8TransformerCall alone, without a mask but `kept`, bool [B, capacity].
  Int8KvCache* cache = nullptr;
  std::optional<at::Tensor> position = std::nullopt, kept = std::nullopt;
};

struct Int8TransformerResult {
  at::Tensor output;
  std::optional<Int8Codes> codes;  // of output, for the next layer; not of every layer
};

QUANTRAIN_API Int8TransformerResult int8_transformer_layer(const at::Tensor& input,
                                                           const Int8TransformerWeights& weights,
                                                           const Int8TransformerOptions& options,
                                                           const Int8TransformerInputs& inputs = {});

// The layer in two parts, for keys and values that are kept elsewhere: qkv, rotated, [B, T, heads + 2 kv_heads, D]; and
// what follows attention, of which `attended` is the result [B, T, heads D].
QUANTRAIN_API at::Tensor int8_transformer_qkv(const at::Tensor& input, const Int8TransformerWeights& weights,
                                              const Int8TransformerOptions& options,
                                              const Int8TransformerInputs& inputs = {});
QUANTRAIN_API Int8TransformerResult int8_transformer_output(const at::Tensor& input, const at::Tensor& attended,
                                                            const Int8TransformerWeights& weights,
                                                            const Int8TransformerOptions& options);

// The same three with weights and options that are kept, for programs that call a layer often: past the dispatcher,
// which takes as long as two kernels' launches. Under torch.compile and where a gradient is asked for use the functions
// above.
class QUANTRAIN_API Int8TransformerCall {
 public:
  Int8TransformerCall(Int8TransformerWeights weights, Int8TransformerOptions options)
      : weights_(std::move(weights)), options_(std::move(options)) {}

  Int8TransformerResult layer(const at::Tensor& input, const Int8TransformerInputs& inputs = {}) const;
  at::Tensor qkv(const at::Tensor& input, const Int8TransformerInputs& inputs = {}) const;
  Int8TransformerResult output(const at::Tensor& input, const at::Tensor& attended) const;

  const Int8TransformerWeights& weights() const { return weights_; }
  const Int8TransformerOptions& options() const { return options_; }

 private:
  Int8TransformerWeights weights_;
  Int8TransformerOptions options_;
};

// x [B, T, H, D] rotated in place in its first `heads` heads, as Int8TransformerInputs says (Su et al., "RoFormer",
// arXiv:2104.09864). The arithmetic is in float32, rounded once.
QUANTRAIN_API void rotate_heads_(at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t heads);

}  // namespace quantrain
