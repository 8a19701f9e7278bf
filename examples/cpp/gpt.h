// A GPT-2-style language model (Radford et al. 2019), with the parameter names and arithmetic of
// examples/python/gpt.py.
#pragma once

#include <quantrain/nn/int8_linear.h>
#include <quantrain/nn/layers.h>
#include <quantrain/nn/schemes/int8.h>
#include <torch/nn/functional/activation.h>
#include <torch/nn/functional/dropout.h>
#include <torch/nn/init.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/scaled_dot_product_attention.h>

namespace example {

// Sizes of the model; dropout acts on the embeddings, the attention weights and both residual branches.
struct GPTConfig {
  int64_t layers = 4;
  int64_t heads = 4;
  int64_t width = 128;
  int64_t context = 128;
  int64_t vocab = 256;
  double dropout = 0.0;
};

// torch::nn::Linear, or Int8Linear or QuantLinear where there is a recipe; registered in its parent under `name`.
class AnyLinear {
 public:
  AnyLinear(torch::nn::Module& parent, const std::string& name, int64_t in_features, int64_t out_features,
            const std::optional<quantrain::nn::Recipe>& recipe) {
    const auto* int8 = recipe ? recipe->scheme_as<quantrain::nn::Int8Spec>() : nullptr;
    if (int8 && int8->training) {
      int8_ = parent.register_module(name, quantrain::nn::Int8Linear(in_features, out_features, *recipe));
    } else if (recipe) {
      quantized_ = parent.register_module(name, quantrain::nn::QuantLinear(in_features, out_features, *recipe));
    } else {
      plain_ = parent.register_module(name, torch::nn::Linear(in_features, out_features));
    }
  }

  // at::linear and not Linear::forward, which adds the bias in a kernel of its own, after rounding the product in 16
  // bit.
  at::Tensor operator()(const at::Tensor& x) {
    if (int8_) return int8_->forward(x);
    return quantized_ ? quantized_->forward(x) : at::linear(x, plain_->weight, plain_->bias);
  }

 private:
  torch::nn::Linear plain_{nullptr};
  quantrain::nn::QuantLinear quantized_{nullptr};
  quantrain::nn::Int8Linear int8_{nullptr};
};

// Causal self-attention, x [B, T, width] -> the same shape.
class AttentionImpl : public torch::nn::Module {
 public:
  AttentionImpl(const GPTConfig& config, const std::optional<quantrain::nn::Recipe>& first,
                const std::optional<quantrain::nn::Recipe>& recipe)
      : heads_(config.heads),
        dropout_(config.dropout),
        c_attn_(*this, "c_attn", config.width, 3 * config.width, first),
        c_proj_(*this, "c_proj", config.width, config.width, recipe) {}

  at::Tensor forward(const at::Tensor& x) {
    const int64_t batch = x.size(0), length = x.size(1), width = x.size(2);
    std::vector<at::Tensor> parts = c_attn_(x).split(width, /*dim=*/2);
    for (at::Tensor& part : parts) part = part.view({batch, length, heads_, width / heads_}).transpose(1, 2);
    at::Tensor y = at::scaled_dot_product_attention(parts[0], parts[1], parts[2], /*attn_mask=*/{},
                                                    is_training() ? dropout_ : 0.0, /*is_causal=*/true);
    y = c_proj_(y.transpose(1, 2).reshape({batch, length, width}));
    return at::dropout(y, dropout_, is_training());
  }

 private:
  int64_t heads_;
  double dropout_;
  AnyLinear c_attn_;
  AnyLinear c_proj_;
};
TORCH_MODULE(Attention);

// Two linear layers with GELU (its tanh form) between, four times as wide inside.
class MLPImpl : public torch::nn::Module {
 public:
  MLPImpl(const GPTConfig& config, const std::optional<quantrain::nn::Recipe>& recipe,
          const std::optional<quantrain::nn::Recipe>& last)
      : dropout_(config.dropout),
        c_fc_(*this, "c_fc", config.width, 4 * config.width, recipe),
        c_proj_(*this, "c_proj", 4 * config.width, config.width, last) {}

  at::Tensor forward(const at::Tensor& x) {
    return at::dropout(c_proj_(at::gelu(c_fc_(x), "tanh")), dropout_, is_training());
  }

 private:
  double dropout_;
  AnyLinear c_fc_;
  AnyLinear c_proj_;
};
TORCH_MODULE(MLP);

// x + attention(norm(x)), then x + mlp(norm(x)). Under a recipe, the model's first and last layer have its edge_bits.
class BlockImpl : public torch::nn::Module {
 public:
  BlockImpl(const GPTConfig& config, const std::optional<quantrain::nn::Recipe>& recipe, int64_t index) {
    std::optional<quantrain::nn::Recipe> edge;
    if (recipe) edge = recipe->edge();
    const torch::nn::LayerNormOptions norm({config.width});
    ln_1_ = register_module("ln_1", torch::nn::LayerNorm(norm));
    attn_ = register_module("attn", Attention(config, index == 0 ? edge : recipe, recipe));
    ln_2_ = register_module("ln_2", torch::nn::LayerNorm(norm));
    mlp_ = register_module("mlp", MLP(config, recipe, index + 1 == config.layers ? edge : recipe));
  }

  at::Tensor forward(const at::Tensor& input) {
    const at::Tensor x = input + attn_->forward(ln_1_->forward(input));
    return x + mlp_->forward(ln_2_->forward(x));
  }

 private:
  torch::nn::LayerNorm ln_1_{nullptr};
  Attention attn_{nullptr};
  torch::nn::LayerNorm ln_2_{nullptr};
  MLP mlp_{nullptr};
};
TORCH_MODULE(Block);

// Tokens int64 [B, T], T at most config.context, to logits [B, T, vocab]; the head is wte's weight.
class GPTImpl : public torch::nn::Module {
 public:
  GPTImpl(const GPTConfig& config, const std::optional<quantrain::nn::Recipe>& recipe) : dropout_(config.dropout) {
    wte_ = register_module("wte", torch::nn::Embedding(config.vocab, config.width));
    wpe_ = register_module("wpe", torch::nn::Embedding(config.context, config.width));
    h_ = register_module("h", torch::nn::ModuleList());
    for (int64_t i = 0; i < config.layers; ++i) {
      blocks_.emplace_back(config, recipe, i);
      h_->push_back(blocks_.back());
    }
    ln_f_ = register_module("ln_f", torch::nn::LayerNorm(torch::nn::LayerNormOptions({config.width})));
  }

  at::Tensor forward(const at::Tensor& tokens) {
    // Positions are the first rows in order: a view of the table, where a look-up would make the gradient a scatter.
    at::Tensor x = wte_->forward(tokens) + wpe_->weight.slice(0, 0, tokens.size(1));
    x = at::dropout(x, dropout_, is_training());
    for (Block& block : blocks_) x = block->forward(x);
    return at::linear(ln_f_->forward(x), wte_->weight);
  }

 private:
  double dropout_;
  torch::nn::Embedding wte_{nullptr};
  torch::nn::Embedding wpe_{nullptr};
  torch::nn::ModuleList h_{nullptr};
  std::vector<Block> blocks_;
  torch::nn::LayerNorm ln_f_{nullptr};
};
TORCH_MODULE(GPT);

inline bool ends_with(const std::string& name, const std::string& end) {
  return name.size() >= end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
}

// Matrices, in contrast to biases, norms and learned scales: what is drawn at random, and what decays.
inline bool is_weight_matrix(const std::string& name, const at::Tensor& parameter) {
  return ends_with(name, ".weight") && parameter.dim() >= 2;
}

// GPT-2's: normal(0, 0.02), residual projections smaller by sqrt(2 layers), biases 0, norms 1. Draws from the default
// generator, in the order of the parameters.
inline void init_weights(torch::nn::Module& model, int64_t layers) {
  constexpr double kInitStd = 0.02;
  const at::NoGradGuard no_grad;
  for (const auto& item : model.named_parameters()) {
    at::Tensor parameter = item.value();
    if (is_weight_matrix(item.key(), parameter)) {
      const bool residual = ends_with(item.key(), "c_proj.weight");
      parameter.normal_(0.0, residual ? kInitStd / std::sqrt(static_cast<double>(2 * layers)) : kInitStd);
    } else if (ends_with(item.key(), ".bias")) {
      parameter.zero_();
    }
  }
}

// Mean cross-entropy in nats a token, computed in float32.
inline at::Tensor loss_of(const at::Tensor& logits, const at::Tensor& targets) {
  return at::cross_entropy_loss(logits.to(at::kFloat).flatten(0, 1), targets.flatten());
}

}  // namespace example
