// A BERT encoder (Devlin et al., arXiv:1810.04805) whose linear layers are converted ones, with the parameter names and
// arithmetic of transformers' BertModel and BertForSequenceClassification. For inference.
#pragma once

#include <quantrain/nn/checkpoint.h>
#include <quantrain/nn/int8_linear.h>
#include <quantrain/nn/int8_transformer.h>
#include <quantrain/nn/layers.h>
#include <quantrain/nn/ptq.h>
#include <quantrain/nn/schemes/int8.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include "llama_config.h"

namespace example {

namespace qnn = quantrain::nn;

struct BertConfig {
  int64_t vocab = 0;
  int64_t width = 0;
  int64_t inner = 0;  // of the feed-forward network
  int64_t layers = 0;
  int64_t heads = 0;  // divides width
  int64_t context = 512;
  int64_t token_types = 2;
  double norm_eps = 1e-12;
  std::string activation = "gelu";  // as int8_transformer_layer calls it: gelu, gelu_tanh or relu
};

// Throws std::invalid_argument that names the file, the field, the rule and the value: no BERT, a decoder, relative
// positions, an activation that is not known, a size out of its range.
inline BertConfig read_bert_config(const std::string& path) {
  const detail::JsonFields fields(path, detail::read_json_object(path));
  if (fields.text("model_type", "") != "bert") fields.fail("\"model_type\" to be \"bert\"", "model_type");
  if (fields.flag("is_decoder", false)) fields.fail("an encoder, \"is_decoder\" false", "is_decoder");
  if (fields.text("position_embedding_type", "absolute") != "absolute") {
    fields.fail("\"position_embedding_type\" to be \"absolute\"", "position_embedding_type");
  }
  static const std::map<std::string, std::string> kActivations = {
      {"gelu", "gelu"}, {"gelu_new", "gelu_tanh"}, {"gelu_pytorch_tanh", "gelu_tanh"}, {"relu", "relu"}};
  const auto activation = kActivations.find(fields.text("hidden_act", "gelu"));
  if (activation == kActivations.end()) {
    fields.fail("\"hidden_act\" to be gelu, gelu_new, gelu_pytorch_tanh or relu", "hidden_act");
  }
  BertConfig config;
  config.activation = activation->second;
  config.vocab = fields.size("vocab_size");
  config.width = fields.size("hidden_size");
  config.inner = fields.size("intermediate_size");
  config.layers = fields.size("num_hidden_layers");
  config.heads = fields.size("num_attention_heads");
  if (config.width % config.heads != 0) {
    fields.fail("\"num_attention_heads\" to divide " + std::to_string(config.width), "num_attention_heads");
  }
  config.context = fields.size("max_position_embeddings", config.context);
  config.token_types = fields.size("type_vocab_size", config.token_types);
  config.norm_eps = fields.number("layer_norm_eps", config.norm_eps, 0);
  return config;
}

using LayerRecipes = std::map<std::string, qnn::Recipe>;  // by path; layers that are not there are float

// A module of the model and the path to it: place / "attention" / "self" is where transformers has that part.
struct Place {
  torch::nn::Module& module;
  std::string path = "";  // with its last point

  Place operator/(const std::string& name) const {
    return {*module.register_module(name, std::make_shared<torch::nn::Module>(name)), path + name + "."};
  }
};

// torch::nn::Linear without a recipe, else the layer that the recipe's scheme converts to.
class BertLinear {
 public:
  BertLinear(const Place& place, const std::string& name, int64_t in_features, int64_t out_features,
             const LayerRecipes& recipes)
      : path_(place.path + name) {
    const torch::nn::LinearOptions options(in_features, out_features);
    const auto found = recipes.find(path_);
    if (found == recipes.end()) {
      float_ = place.module.register_module(name, torch::nn::Linear(options));
      return;
    }
    const qnn::Recipe& recipe = found->second;
    const auto* int8 = recipe.scheme_as<qnn::Int8Spec>();
    if (recipe.scheme_as<qnn::PtqSpec>()) {
      ptq_ = place.module.register_module(name, qnn::PtqLinear(options, recipe));
    } else if (int8 && int8->training) {
      int8_ = place.module.register_module(name, qnn::Int8Linear(options, recipe));
    } else if (int8) {
      quant_ = place.module.register_module(name, qnn::QuantLinear(options, recipe));
    } else {
      throw std::invalid_argument("expected layers of scheme int8 or ptq, got '" + recipe.name + "' at " + path_);
    }
  }

  at::Tensor operator()(const at::Tensor& x) {
    if (ptq_) return ptq_->forward(x);
    if (int8_) return int8_->forward(x);
    return quant_ ? quant_->forward(x) : at::linear(x, float_->weight, float_->bias);
  }

  std::shared_ptr<qnn::QuantModule> quantized() const {  // null: a float layer
    if (ptq_) return ptq_.ptr();
    if (int8_) return int8_.ptr();
    return quant_ ? std::shared_ptr<qnn::QuantModule>(quant_.ptr()) : nullptr;
  }

  const std::string& path() const { return path_; }

 private:
  std::string path_;
  torch::nn::Linear float_{nullptr};
  qnn::Int8Linear int8_{nullptr};
  qnn::QuantLinear quant_{nullptr};
  qnn::PtqLinear ptq_{nullptr};
};

inline torch::nn::LayerNorm make_norm(const Place& place, const BertConfig& config) {
  const auto options = torch::nn::LayerNormOptions({config.width}).eps(config.norm_eps);
  return place.module.register_module("LayerNorm", torch::nn::LayerNorm(options));
}

// norm_1(x + out(attention(x))), then norm_2(x + down(f(up(x)))): of separate layers, or after fuse() as one call.
class BertBlock {
 public:
  BertBlock(const BertConfig& config, const Place& place, const LayerRecipes& recipes)
      : BertBlock(config, place / "attention", place / "intermediate", place / "output", recipes) {}

  // States [B, T, width] with their codes where the block before gave some; mask bool [B, 1, 1, T], true where a token
  // is, or none.
  quantrain::Int8TransformerResult forward(const quantrain::Int8TransformerResult& x,
                                           const std::optional<at::Tensor>& mask) {
    if (fused_) return fused_->forward(x.output, {.mask = mask, .codes = x.codes});
    const at::Tensor middle = norm_1_->forward(out_(attended(x.output, mask)) + x.output);
    return {norm_2_->forward(down_(activated(up_(middle))) + middle), std::nullopt};
  }

  // Makes the block one call, or says why it stays as it is. Weights have their types and device by then: the call's
  // tensors are the layers', and to() would part them.
  std::string fuse() {
    const std::vector<const BertLinear*> layers = {&query_, &key_, &value_, &out_, &up_, &down_};
    std::vector<std::shared_ptr<qnn::QuantModule>> quantized;
    for (const BertLinear* layer : layers) {
      quantized.push_back(layer->quantized());
      if (!quantized.back()) return layer->path() + " is a float layer";
    }
    quantrain::Int8TransformerOptions options;
    options.heads = heads_;
    options.activation = activation_;
    options.eps = norm_1_->options.eps();
    options.product = qnn::int8_product_options(quantized.front()->recipe());
    for (size_t i = 1; i < layers.size(); ++i) {
      if (!same(options.product, qnn::int8_product_options(quantized[i]->recipe()))) {
        return layers[i]->path() + " multiplies otherwise than " + layers.front()->path();
      }
    }
    quantrain::Int8TransformerWeights weights;
    try {
      weights.qkv = qnn::int8_transformer_product({quantized[0], quantized[1], quantized[2]});
      weights.out = qnn::int8_transformer_product({quantized[3]});
      weights.up = qnn::int8_transformer_product({quantized[4]});
      weights.down = qnn::int8_transformer_product({quantized[5]});
    } catch (const c10::ValueError& error) {  // layers that cannot be joined still run one by one
      return error.what_without_backtrace();
    }
    weights.norm_1 = {norm_1_->weight, norm_1_->bias};
    weights.norm_2 = {norm_2_->weight, norm_2_->bias};
    fused_ = qnn::Int8TransformerLayer(weights, options);
    return "";
  }

 private:
  BertBlock(const BertConfig& config, const Place& attention, const Place& intermediate, const Place& output,
            const LayerRecipes& recipes)
      : BertBlock(config, attention / "self", attention / "output", intermediate, output, recipes) {}

  BertBlock(const BertConfig& config, const Place& self, const Place& self_output, const Place& intermediate,
            const Place& output, const LayerRecipes& recipes)
      : heads_(config.heads),
        activation_(config.activation),
        query_(self, "query", config.width, config.width, recipes),
        key_(self, "key", config.width, config.width, recipes),
        value_(self, "value", config.width, config.width, recipes),
        out_(self_output, "dense", config.width, config.width, recipes),
        up_(intermediate, "dense", config.width, config.inner, recipes),
        down_(output, "dense", config.inner, config.width, recipes),
        norm_1_(make_norm(self_output, config)),
        norm_2_(make_norm(output, config)) {}

  static bool same(const quantrain::PtqProduct& a, const quantrain::PtqProduct& b) {
    return a.quantize_input == b.quantize_input && a.outlier_threshold == b.outlier_threshold &&
           a.capacity == b.capacity && a.few_rows_float == b.few_rows_float;
  }

  at::Tensor attended(const at::Tensor& x, const std::optional<at::Tensor>& mask) {
    const auto heads = [&](const at::Tensor& y) { return y.view({x.size(0), x.size(1), heads_, -1}).transpose(1, 2); };
    const at::Tensor y = at::scaled_dot_product_attention(heads(query_(x)), heads(key_(x)), heads(value_(x)), mask);
    return y.transpose(1, 2).flatten(2);
  }

  at::Tensor activated(const at::Tensor& x) const {
    if (activation_ == "relu") return at::relu(x);
    return at::gelu(x, activation_ == "gelu" ? "none" : "tanh");
  }

  int64_t heads_;
  std::string activation_;
  BertLinear query_, key_, value_, out_, up_, down_;
  torch::nn::LayerNorm norm_1_, norm_2_;
  qnn::Int8TransformerLayer fused_{nullptr};  // no child: its tensors have names already, those of the layers
};

// Ids int64 [B, T], all of token type 0, to logits [B, labels]; of a model without a classifier (labels 0) to the
// pooler's values [B, width].
class BertImpl : public torch::nn::Module {
 public:
  BertImpl(const BertConfig& config, const LayerRecipes& recipes, int64_t labels) {
    const Place whole{*this};
    const Place root = labels > 0 ? whole / "bert" : whole;
    const Place embeddings = root / "embeddings";
    const auto table = [&](const std::string& name, int64_t rows) {
      return embeddings.module.register_module(name, torch::nn::Embedding(rows, config.width));
    };
    words_ = table("word_embeddings", config.vocab);
    positions_ = table("position_embeddings", config.context);
    types_ = table("token_type_embeddings", config.token_types);
    norm_ = make_norm(embeddings, config);
    const Place layers = root / "encoder" / "layer";
    for (int64_t i = 0; i < config.layers; ++i) blocks_.emplace_back(config, layers / std::to_string(i), recipes);
    pooler_.emplace(root / "pooler", "dense", config.width, config.width, recipes);
    if (labels > 0) classifier_.emplace(whole, "classifier", config.width, labels, recipes);
  }

  // mask: bool [B, 1, 1, T], true where a token is; none where all are.
  at::Tensor forward(const at::Tensor& ids, const std::optional<at::Tensor>& mask) {
    const at::Tensor position = positions_->weight.narrow(0, 0, ids.size(1));
    const at::Tensor sum = words_->forward(ids) + types_->weight.select(0, 0) + position;
    quantrain::Int8TransformerResult states{norm_->forward(sum), std::nullopt};
    for (BertBlock& block : blocks_) states = block.forward(states, mask);
    const at::Tensor pooled = (*pooler_)(states.output.select(1, 0)).tanh();
    return classifier_ ? (*classifier_)(pooled) : pooled;
  }

  // Makes every block one call that can be. Why others stay separate, by block.
  std::map<size_t, std::string> fuse() {
    std::map<size_t, std::string> separate;
    for (size_t i = 0; i < blocks_.size(); ++i) {
      if (const std::string reason = blocks_[i].fuse(); !reason.empty()) separate[i] = reason;
    }
    return separate;
  }

  size_t blocks() const { return blocks_.size(); }
  bool has_classifier() const { return classifier_.has_value(); }

 private:
  torch::nn::Embedding words_{nullptr}, positions_{nullptr}, types_{nullptr};
  torch::nn::LayerNorm norm_{nullptr};
  std::vector<BertBlock> blocks_;
  std::optional<BertLinear> pooler_, classifier_;
};
TORCH_MODULE(Bert);

// The sizes of a folder's model. Throws std::invalid_argument: no folder, or as read_bert_config.
inline BertConfig bert_config_of(const std::string& folder) {
  if (!std::filesystem::is_directory(folder)) {
    throw std::invalid_argument(folder + ": expected the folder of a model, got none");
  }
  return read_bert_config((std::filesystem::path(folder) / "config.json").string());
}

// The model of a folder's config.json and model.safetensors, which quantrain.save_checkpoint wrote of the converted
// model. Its layers are those of the file, quantized or left float.
inline Bert load_bert(const std::string& folder, at::ScalarType dtype, at::Device device) {
  const BertConfig config = bert_config_of(folder);
  const std::string path = (std::filesystem::path(folder) / "model.safetensors").string();
  const qnn::CheckpointInfo info = qnn::read_checkpoint_info(path);
  if (!info.converted || info.layers.empty()) {
    throw std::invalid_argument(path + ": expected a checkpoint of converted layers, got " +
                                (info.converted ? "one that does not name them" : "one that is not converted"));
  }
  // The config does not say how many labels there are, nor whether there is a classifier.
  const std::map<std::string, at::Tensor> tensors = qnn::read_safetensors(path).tensors;
  const auto classifier = tensors.find("classifier.bias");
  Bert model(config, info.layers, classifier == tensors.end() ? 0 : classifier->second.numel());
  qnn::convert(*model, /*check_observed=*/false);
  qnn::load_tensors(tensors, *model, path);
  for (at::Tensor& parameter : model->parameters()) parameter.requires_grad_(false);
  model->to(device, dtype);
  model->eval();
  return model;
}

}  // namespace example
