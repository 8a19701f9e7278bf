// A Llama model (Touvron et al., arXiv:2302.13971; grouped-query attention as in Llama 2 and 3), with the parameter
// names and arithmetic of transformers' LlamaForCausalLM.
#pragma once

#include <quantrain/nn/four_bit.h>
#include <quantrain/nn/int8_transformer.h>
#include <quantrain/nn/layers.h>
#include <quantrain/nn/ptq.h>
#include <quantrain/ops/fake_quant.h>
#include <quantrain/ops/int8.h>
#include <quantrain/ops/kv_cache.h>
#include <torch/nn/init.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "llama_config.h"
#include "recompute.h"

namespace example {

// How the linear layers of the blocks run.
struct BlockRecipe {
  BlockRecipe() = default;  // in floating point
  BlockRecipe(quantrain::nn::Recipe recipe) : recipe(std::move(recipe)) {}

  // Of the layer of that name: outside of the targets without LoRA.
  std::optional<quantrain::nn::Recipe> of(const std::string& name) const {
    if (!own.empty()) return own.contains(name) ? std::optional(own.at(name)) : std::nullopt;
    std::optional<quantrain::nn::Recipe> result = recipe;
    if (result && !result->weight) return std::nullopt;
    if (!result || targets.empty() || targets.contains(name)) return result;
    if (auto* four_bit = result->scheme_as<quantrain::nn::FourBitSpec>()) four_bit->lora_rank = 0;
    return result;
  }

  // Whether attention reads its keys and values as int8 codes.
  bool int8_cache() const {
    const auto asks = [](const quantrain::nn::Recipe& of) {
      const auto* ptq = of.scheme_as<quantrain::nn::PtqSpec>();
      return ptq && ptq->kv_cache == "int8";
    };
    return (recipe && asks(*recipe)) ||
           std::any_of(own.begin(), own.end(), [&](const auto& item) { return asks(item.second); });
  }

  std::optional<quantrain::nn::Recipe> recipe;
  std::set<std::string> targets;  // names of layers ("q_proj") that get the recipe's LoRA; empty: all
  std::map<std::string, quantrain::nn::Recipe> own;  // of this block's layers alone, by name, in place of `recipe`
};

// The recipes of each block where a file says them by layer ("model.layers.0.mlp.up_proj"): block i gets blocks[i].
using BlockRecipes = std::map<int64_t, BlockRecipe>;

// torch::nn::Linear without a recipe; Linear4bit or LoraLinear under one that packs 4 bits, PtqLinear under one of
// scheme ptq, else QuantLinear. Registered in its parent under `name`.
class AnyLinear {
 public:
  AnyLinear(torch::nn::Module& parent, const std::string& name, int64_t in_features, int64_t out_features, bool bias,
            const BlockRecipe& recipes)
      : name_(name) {
    const std::optional<quantrain::nn::Recipe> recipe = recipes.of(name);
    const auto options = torch::nn::LinearOptions(in_features, out_features).bias(bias);
    const auto* four_bit = recipe ? recipe->scheme_as<quantrain::nn::FourBitSpec>() : nullptr;
    if (four_bit && four_bit->lora_rank > 0) {
      four_bit_ = parent.register_module(name, quantrain::nn::LoraLinear(options, *recipe));
    } else if (four_bit) {
      four_bit_ = parent.register_module(name, quantrain::nn::Linear4bit(options, *recipe));
    } else if (recipe && recipe->scheme_as<quantrain::nn::PtqSpec>()) {
      ptq_ = parent.register_module(name, quantrain::nn::PtqLinear(options, *recipe));
    } else if (recipe) {
      quantized_ = parent.register_module(name, quantrain::nn::QuantLinear(options, *recipe));
    } else {
      plain_ = parent.register_module(name, torch::nn::Linear(options));
    }
  }

  // at::linear and not Linear::forward, which adds the bias in a kernel of its own, after rounding the product in 16
  // bit.
  at::Tensor operator()(const at::Tensor& x) {
    if (four_bit_) return four_bit_->forward(x);
    if (ptq_) return ptq_->forward(x);
    return quantized_ ? quantized_->forward(x) : at::linear(x, plain_->weight, plain_->bias);
  }

  std::shared_ptr<quantrain::nn::QuantModule> ptq() const {  // null: a layer of another scheme, or a float one
    if (ptq_) return ptq_.ptr();
    return nullptr;
  }
  const std::string& name() const { return name_; }

 private:
  std::string name_;
  torch::nn::Linear plain_{nullptr};
  quantrain::nn::QuantLinear quantized_{nullptr};
  quantrain::nn::PtqLinear ptq_{nullptr};
  std::shared_ptr<quantrain::nn::Linear4bitImpl> four_bit_;
};

// y = weight * (x / rms(x)), the quotient in float32 and then in x's type.
class RMSNormImpl : public torch::nn::Module {
 public:
  RMSNormImpl(int64_t width, double eps) : eps_(eps) { weight_ = register_parameter("weight", at::ones({width})); }

  at::Tensor forward(const at::Tensor& x) {
    const at::Tensor exact = x.to(at::kFloat);
    const at::Tensor variance = exact.pow(2).mean(-1, /*keepdim=*/true);
    return weight_ * (exact * at::rsqrt(variance + eps_)).to(x.scalar_type());
  }

  const at::Tensor& weight() const { return weight_; }

 private:
  double eps_;
  at::Tensor weight_;
};
TORCH_MODULE(RMSNorm);

// Angles' cosines and sines, each [T, head_dim]: the second half repeats the first.
struct Rotation {
  at::Tensor cos;
  at::Tensor sin;

  // x [B, H, T, head_dim], its pairs (i, i + head_dim / 2) turned.
  at::Tensor turn(const at::Tensor& x) const {
    const std::vector<at::Tensor> halves = x.chunk(2, -1);
    return x * cos + at::cat({-halves[1], halves[0]}, -1) * sin;
  }

  quantrain::Int8TransformerInputs as_inputs() const { return {.cos = cos.unsqueeze(0), .sin = sin.unsqueeze(0)}; }
};

// Frequencies [head_dim / 2], float32. llama3 divides those of wavelengths beyond the original context by the factor,
// leaves short ones, and goes from one to the other in between.
inline at::Tensor rope_frequencies(const Rope& rope, int64_t head_dim) {
  constexpr double kPi = 3.14159265358979323846;
  const at::Tensor exponent = at::arange(0, head_dim, 2, at::kFloat) / head_dim;
  const at::Tensor plain = 1.0 / at::pow(rope.theta, exponent);
  if (rope.kind == Rope::Kind::kDefault) return plain;
  const at::Tensor slow = plain / rope.factor;
  if (rope.kind == Rope::Kind::kLinear) return slow;
  const at::Tensor turns = rope.original_context / (2 * kPi / plain);  // within the original context
  const at::Tensor smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
  const at::Tensor between = (1 - smooth) * plain / rope.factor + smooth * plain;
  return at::where(turns < rope.low_freq_factor, slow, at::where(turns > rope.high_freq_factor, plain, between));
}

// What a cache of int8 codes, one scale per token and head, gives back.
inline at::Tensor as_int8(const at::Tensor& x) {
  const quantrain::Int8Codes rows = quantrain::int8_quantize_rows(x);
  return quantrain::dequantize(rows.codes, rows.scale, std::nullopt, x.scalar_type());
}

// Causal self-attention, x [B, T, width] -> the same shape; every heads / kv_heads query heads share a key and value.
class LlamaAttentionImpl : public torch::nn::Module {
 public:
  LlamaAttentionImpl(const LlamaConfig& config, const BlockRecipe& recipe)
      : head_dim_(config.head_dim),
        dropout_(config.attention_dropout),
        shared_(config.kv_heads != config.heads),
        int8_cache_(recipe.int8_cache()),
        q_proj_(*this, "q_proj", config.width, config.heads * config.head_dim, config.attention_bias, recipe),
        k_proj_(*this, "k_proj", config.width, config.kv_heads * config.head_dim, config.attention_bias, recipe),
        v_proj_(*this, "v_proj", config.width, config.kv_heads * config.head_dim, config.attention_bias, recipe),
        o_proj_(*this, "o_proj", config.heads * config.head_dim, config.width, config.attention_bias, recipe) {}

  at::Tensor forward(const at::Tensor& x, const Rotation& rotation) {
    const auto heads = [&](const at::Tensor& y) {
      return y.view({x.size(0), x.size(1), -1, head_dim_}).transpose(1, 2);
    };
    const at::Tensor q = rotation.turn(heads(q_proj_(x)));
    at::Tensor k = rotation.turn(heads(k_proj_(x))), v = heads(v_proj_(x));
    if (int8_cache_) {
      k = as_int8(k);
      v = as_int8(v);
    }
    const at::Tensor y =
        at::scaled_dot_product_attention(q, k, v, /*attn_mask=*/{}, is_training() ? dropout_ : 0.0, /*is_causal=*/true,
                                         /*scale=*/std::nullopt, /*enable_gqa=*/shared_);
    return o_proj_(y.transpose(1, 2).flatten(2));
  }

  std::array<const AnyLinear*, 4> layers() const { return {&q_proj_, &k_proj_, &v_proj_, &o_proj_}; }

 private:
  int64_t head_dim_;
  double dropout_;
  bool shared_, int8_cache_;
  AnyLinear q_proj_, k_proj_, v_proj_, o_proj_;
};
TORCH_MODULE(LlamaAttention);

// SwiGLU (Shazeer, arXiv:2002.05202): down(silu(gate(x)) * up(x)).
class LlamaMLPImpl : public torch::nn::Module {
 public:
  LlamaMLPImpl(const LlamaConfig& config, const BlockRecipe& recipe)
      : gate_proj_(*this, "gate_proj", config.width, config.inner, config.mlp_bias, recipe),
        up_proj_(*this, "up_proj", config.width, config.inner, config.mlp_bias, recipe),
        down_proj_(*this, "down_proj", config.inner, config.width, config.mlp_bias, recipe) {}

  at::Tensor forward(const at::Tensor& x) { return down_proj_(at::silu(gate_proj_(x)) * up_proj_(x)); }

  std::array<const AnyLinear*, 3> layers() const { return {&gate_proj_, &up_proj_, &down_proj_}; }

 private:
  AnyLinear gate_proj_, up_proj_, down_proj_;
};
TORCH_MODULE(LlamaMLP);

// x + attention(norm(x)), then x + mlp(norm(x)): of separate layers, or after fuse() as one call.
class LlamaBlockImpl : public torch::nn::Module {
 public:
  LlamaBlockImpl(const LlamaConfig& config, const BlockRecipe& recipe)
      : config_(config), int8_cache_(recipe.int8_cache()) {
    self_attn_ = register_module("self_attn", LlamaAttention(config, recipe));
    mlp_ = register_module("mlp", LlamaMLP(config, recipe));
    input_layernorm_ = register_module("input_layernorm", RMSNorm(config.width, config.norm_eps));
    post_attention_layernorm_ = register_module("post_attention_layernorm", RMSNorm(config.width, config.norm_eps));
  }

  at::Tensor forward(const at::Tensor& input, const Rotation& rotation) {
    if (fused_ && int8_cache_) {  // attention reads what a cache of these tokens alone gives back
      quantrain::Int8KvCache cache = empty_cache(input.size(0), input.size(1), input.device());
      return forward(input, rotation, cache, at::zeros({1}, input.options().dtype(at::kLong)));
    }
    if (fused_) return fused_->forward(input, rotation.as_inputs()).output;
    const at::Tensor x = input + self_attn_->forward(input_layernorm_->forward(input), rotation);
    return x + mlp_->forward(post_attention_layernorm_->forward(x));
  }

  // After fuse() alone: input's tokens follow the `position` ones, int64 [1], whose keys and values the cache has.
  at::Tensor forward(const at::Tensor& input, const Rotation& rotation, quantrain::Int8KvCache& cache,
                     const at::Tensor& position) {
    quantrain::Int8TransformerInputs inputs = rotation.as_inputs();
    inputs.cache = &cache;
    inputs.position = position;
    return fused_->forward(input, inputs).output;
  }

  quantrain::Int8KvCache empty_cache(int64_t batches, int64_t capacity, at::Device device) const {
    return quantrain::Int8KvCache::zeros(batches, config_.kv_heads, capacity, config_.head_dim, device);
  }

  // Makes the block one call, or says why it stays as it is. Weights have their types and device by then: the call's
  // tensors are the layers', and to() would part them.
  std::string fuse() {
    const auto [q, k, v, o] = self_attn_->layers();
    const auto [gate, up, down] = mlp_->layers();
    quantrain::Int8TransformerOptions options = {.heads = config_.heads,
                                                 .kv_heads = config_.kv_heads,
                                                 .norm = "rms_norm",
                                                 .pre_norm = true,
                                                 .activation = "silu_mul",
                                                 .causal = true,
                                                 .eps = config_.norm_eps};
    for (const AnyLinear* layer : {q, k, v, o, gate, up, down}) {
      const auto ptq = layer->ptq();
      if (!ptq) return layer->name() + " is not of scheme ptq";
      const quantrain::PtqProduct product = quantrain::nn::int8_product_options(ptq->recipe());
      if (layer == q) options.product = product;
      if (!same(product, options.product)) return layer->name() + " multiplies otherwise than " + q->name();
    }
    quantrain::Int8TransformerWeights weights;
    try {
      weights.qkv = quantrain::nn::int8_transformer_product({q->ptq(), k->ptq(), v->ptq()});
      weights.out = quantrain::nn::int8_transformer_product({o->ptq()});
      weights.up = quantrain::nn::int8_transformer_product({gate->ptq(), up->ptq()});
      weights.down = quantrain::nn::int8_transformer_product({down->ptq()});
    } catch (const c10::ValueError& error) {  // layers that cannot be joined still run one by one
      return error.what_without_backtrace();
    }
    weights.norm_1.weight = input_layernorm_->weight();
    weights.norm_2.weight = post_attention_layernorm_->weight();
    fused_ = quantrain::nn::Int8TransformerLayer(weights, options);
    return "";
  }

 private:
  static bool same(const quantrain::PtqProduct& a, const quantrain::PtqProduct& b) {
    return a.quantize_input == b.quantize_input && a.outlier_threshold == b.outlier_threshold &&
           a.capacity == b.capacity && a.few_rows_float == b.few_rows_float;
  }

  LlamaConfig config_;
  bool int8_cache_;
  quantrain::nn::Int8TransformerLayer fused_{nullptr};  // no child: its tensors have names already, those of the layers
  LlamaAttention self_attn_{nullptr};
  LlamaMLP mlp_{nullptr};
  RMSNorm input_layernorm_{nullptr};
  RMSNorm post_attention_layernorm_{nullptr};
};
TORCH_MODULE(LlamaBlock);

// Which blocks run as one call.
struct Fusion {
  int64_t fused = 0;
  std::map<std::string, int64_t> separate;  // why others do not, and how many
};

// Keys and values of the tokens that a model has read, by block.
using LlamaCache = std::vector<quantrain::Int8KvCache>;

// Called with the path and the module of each part (embedding, block, norm, head) as soon as it is built: whoever loads
// and converts there never holds more than one block in float32.
using PartReady = std::function<void(const std::string& path, torch::nn::Module& part)>;

// Tokens int64 [B, T] to final states [B, T, width].
class LlamaModelImpl : public torch::nn::Module {
 public:
  LlamaModelImpl(const LlamaConfig& config, const BlockRecipe& recipe, const PartReady& ready,
                 const BlockRecipes& blocks = {})
      : frequencies_(rope_frequencies(config.rope, config.head_dim)) {
    embed_tokens_ = register_module("embed_tokens", torch::nn::Embedding(config.vocab, config.width));
    ready("model.embed_tokens", *embed_tokens_);
    layers_ = register_module("layers", torch::nn::ModuleList());
    for (int64_t i = 0; i < config.layers; ++i) {
      const auto own = blocks.find(i);
      blocks_.emplace_back(config, own == blocks.end() ? recipe : own->second);
      layers_->push_back(blocks_.back());
      ready("model.layers." + std::to_string(i), *blocks_.back());
    }
    norm_ = register_module("norm", RMSNorm(config.width, config.norm_eps));
    ready("model.norm", *norm_);
  }

  at::Tensor forward(const at::Tensor& tokens, bool checkpointing) {
    at::Tensor x = embed_tokens_->forward(tokens);
    const Rotation rotation = rotation_of(x);
    // The embedding is frozen, and recompute() asks for an input that requires grad.
    if (checkpointing && at::GradMode::is_enabled() && !x.requires_grad()) x.requires_grad_(true);
    for (LlamaBlock& block : blocks_) {
      const Part part = [block = block.get(), rotation](const at::Tensor& y) { return block->forward(y, rotation); };
      x = checkpointing ? recompute(part, x) : part(x);
    }
    return norm_->forward(x);
  }

  // The last token's state [B, 1, width], of blocks that are all fused: tokens follow the `position` ones of the cache,
  // int64 [1]. Nothing waits for the device.
  at::Tensor forward(const at::Tensor& tokens, LlamaCache& cache, const at::Tensor& position) {
    at::Tensor x = embed_tokens_->forward(tokens);
    const Rotation rotation = rotation_of(x, position);
    for (size_t i = 0; i < blocks_.size(); ++i) x = blocks_[i]->forward(x, rotation, cache[i], position);
    return norm_->forward(x.narrow(1, x.size(1) - 1, 1));
  }

  Fusion fuse() {
    Fusion result;
    for (LlamaBlock& block : blocks_) {
      const std::string reason = block->fuse();
      ++(reason.empty() ? result.fused : result.separate[reason]);
    }
    return result;
  }

  LlamaCache empty_cache(int64_t batches, int64_t capacity) const {
    LlamaCache cache;
    for (const LlamaBlock& block : blocks_) {
      cache.push_back(block->empty_cache(batches, capacity, embed_tokens_->weight.device()));
    }
    return cache;
  }

  const at::Tensor& embedding() const { return embed_tokens_->weight; }

 private:
  Rotation rotation_of(const at::Tensor& x, const std::optional<at::Tensor>& position = std::nullopt) {
    if (frequencies_.device() != x.device()) frequencies_ = frequencies_.to(x.device());
    at::Tensor places = at::arange(x.size(1), frequencies_.options());
    if (position) places = places + *position;
    const at::Tensor half = at::outer(places, frequencies_);
    const at::Tensor angles = at::cat({half, half}, -1);
    return {angles.cos().to(x.scalar_type()), angles.sin().to(x.scalar_type())};
  }

  at::Tensor frequencies_;
  torch::nn::Embedding embed_tokens_{nullptr};
  torch::nn::ModuleList layers_{nullptr};
  std::vector<LlamaBlock> blocks_;
  RMSNorm norm_{nullptr};
};
TORCH_MODULE(LlamaModel);

// Tokens int64 [B, T] to logits [B, T, vocab]. The recipe is for the linear layers of the blocks; embedding, norms and
// head stay float.
class LlamaImpl : public torch::nn::Module {
 public:
  LlamaImpl(const LlamaConfig& config, const BlockRecipe& recipe, const PartReady& ready,
            const BlockRecipes& blocks = {})
      : config_(config) {
    model_ = register_module("model", LlamaModel(config, recipe, ready, blocks));
    if (config.tied) return;
    lm_head_ =
        register_module("lm_head", torch::nn::Linear(torch::nn::LinearOptions(config.width, config.vocab).bias(false)));
    ready("lm_head", *lm_head_);
  }

  at::Tensor forward(const at::Tensor& tokens) { return logits_of(model_->forward(tokens, checkpointing_)); }

  // Logits [B, vocab] of the token that follows, as LlamaModel has its state.
  at::Tensor forward(const at::Tensor& tokens, LlamaCache& cache, const at::Tensor& position) {
    return logits_of(model_->forward(tokens, cache, position)).select(1, 0);
  }

  // Makes every block one call that can be. For inference, when the model is on its device.
  Fusion fuse() { return model_->fuse(); }
  LlamaCache empty_cache(int64_t batches, int64_t capacity) const { return model_->empty_cache(batches, capacity); }

  // Whether blocks are computed again in the backward pass, which then needs the memory of one.
  void use_checkpointing(bool on) { checkpointing_ = on; }
  const LlamaConfig& config() const { return config_; }

 private:
  at::Tensor logits_of(const at::Tensor& states) {
    return at::linear(states, lm_head_ ? lm_head_->weight : model_->embedding());
  }

  LlamaConfig config_;
  bool checkpointing_ = false;
  LlamaModel model_{nullptr};
  torch::nn::Linear lm_head_{nullptr};
};
TORCH_MODULE(Llama);

// Mean cross-entropy in nats per token, computed in float32.
inline at::Tensor loss_of(const at::Tensor& logits, const at::Tensor& targets) {
  return at::cross_entropy_loss(logits.to(at::kFloat).flatten(0, 1), targets.flatten());
}

}  // namespace example
