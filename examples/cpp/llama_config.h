// The sizes of a Llama model, from the config.json that transformers writes (versions 4 and 5).
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <optional>
#include <stdexcept>
#include <string>

#include <nlohmann/json.hpp>

namespace example {

// Rotary frequencies: theta^(-2i / head_dim), and what stretches them to longer contexts.
struct Rope {
  enum class Kind { kDefault, kLinear, kLlama3 };
  Kind kind = Kind::kDefault;
  double theta = 10000;
  double factor = 1;
  double low_freq_factor = 1, high_freq_factor = 4;  // llama3, as the two below
  double original_context = 8192;
};

struct LlamaConfig {
  int64_t vocab = 0;
  int64_t width = 0;
  int64_t inner = 0;  // of the MLP
  int64_t layers = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;  // divides heads
  int64_t head_dim = 0;  // even
  int64_t context = 2048;
  double norm_eps = 1e-6;
  bool tied = false;  // the output head is the embedding's weight
  bool attention_bias = false;
  bool mlp_bias = false;
  double attention_dropout = 0;
  Rope rope;
};

namespace detail {

// Fields of a JSON object, checked; null counts as absent.
class JsonFields {
 public:
  JsonFields(std::string path, nlohmann::json json) : path_(std::move(path)), json_(std::move(json)) {}

  bool has(const std::string& name) const { return json_.contains(name) && !json_[name].is_null(); }

  int64_t size(const std::string& name, std::optional<int64_t> otherwise = std::nullopt) const {
    if (!has(name) && otherwise) return *otherwise;
    if (!has(name) || !json_[name].is_number_integer() || json_[name].get<int64_t>() < 1) {
      fail("\"" + name + "\" to be a whole number of at least 1", name);
    }
    return json_[name].get<int64_t>();
  }

  double number(const std::string& name, std::optional<double> otherwise, double above) const {
    if (!has(name) && otherwise) return *otherwise;
    if (!has(name) || !json_[name].is_number() || !(json_[name].get<double>() > above)) {
      fail("\"" + name + "\" to be a number above " + nlohmann::json(above).dump(), name);
    }
    return json_[name].get<double>();
  }

  double share(const std::string& name) const {  // absent: 0
    if (!has(name)) return 0;
    const double value = json_[name].is_number() ? json_[name].get<double>() : -1;
    if (!(value >= 0 && value < 1)) fail("\"" + name + "\" in [0, 1)", name);
    return value;
  }

  bool flag(const std::string& name, bool otherwise) const {
    if (!has(name)) return otherwise;
    if (!json_[name].is_boolean()) fail("\"" + name + "\" to be true or false", name);
    return json_[name].get<bool>();
  }

  std::string text(const std::string& name, const std::string& otherwise) const {
    if (!has(name)) return otherwise;
    if (!json_[name].is_string()) fail("\"" + name + "\" to be text", name);
    return json_[name].get<std::string>();
  }

  JsonFields object(const std::string& name) const {
    if (!has(name)) return {path_, nlohmann::json::object()};
    if (!json_[name].is_object()) fail("\"" + name + "\" to be an object", name);
    return {path_, json_[name]};
  }

  [[noreturn]] void fail(const std::string& rule, const std::string& name) const {
    const std::string got = json_.contains(name) ? json_[name].dump() : "none";
    throw std::invalid_argument(path_ + ": expected " + rule + ", got " + got);
  }

 private:
  std::string path_;
  nlohmann::json json_;
};

inline nlohmann::json read_json_object(const std::string& path) {
  std::ifstream file(path);
  if (!file || std::filesystem::is_directory(path)) {
    throw std::invalid_argument(path + ": expected a file that can be read, got none");
  }
  auto json = nlohmann::json::parse(file, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) throw std::invalid_argument(path + ": expected a JSON object, got something else");
  return json;
}

// transformers 5 has all in "rope_parameters", version 4 "rope_theta" and, where frequencies are stretched,
// "rope_scaling".
inline Rope rope_of(const JsonFields& config, int64_t context) {
  const bool current = config.has("rope_parameters");
  const JsonFields fields = config.object(current ? "rope_parameters" : "rope_scaling");
  Rope rope;
  rope.theta = (current && fields.has("rope_theta") ? fields : config).number("rope_theta", rope.theta, 0);
  const std::string kind = fields.text("rope_type", fields.text("type", "default"));
  if (kind == "default") return rope;
  if (kind != "linear" && kind != "llama3") {
    fields.fail("\"rope_type\" to be default, linear or llama3", fields.has("rope_type") ? "rope_type" : "type");
  }
  rope.factor = fields.number("factor", std::nullopt, 0);
  rope.kind = kind == "linear" ? Rope::Kind::kLinear : Rope::Kind::kLlama3;
  if (rope.kind == Rope::Kind::kLinear) return rope;
  rope.low_freq_factor = fields.number("low_freq_factor", std::nullopt, 0);
  rope.high_freq_factor = fields.number("high_freq_factor", std::nullopt, rope.low_freq_factor);
  rope.original_context = fields.number("original_max_position_embeddings", static_cast<double>(context), 0);
  return rope;
}

}  // namespace detail

// Throws std::invalid_argument that names the file, the field, the rule and the value: no Llama model, one with packed
// weights, a size out of its range, rotary embeddings of another kind.
inline LlamaConfig read_llama_config(const std::string& path) {
  const detail::JsonFields fields(path, detail::read_json_object(path));
  if (fields.text("model_type", "") != "llama") fields.fail("\"model_type\" to be \"llama\"", "model_type");
  if (fields.has("quantization_config")) {
    fields.fail("a model with float weights, without \"quantization_config\"", "quantization_config");
  }
  if (fields.text("hidden_act", "silu") != "silu") fields.fail("\"hidden_act\" to be \"silu\"", "hidden_act");
  LlamaConfig config;
  config.vocab = fields.size("vocab_size");
  config.width = fields.size("hidden_size");
  config.inner = fields.size("intermediate_size");
  config.layers = fields.size("num_hidden_layers");
  config.heads = fields.size("num_attention_heads");
  config.kv_heads = fields.size("num_key_value_heads", config.heads);
  if (config.heads % config.kv_heads != 0) {
    fields.fail("\"num_key_value_heads\" to divide " + std::to_string(config.heads) + " heads", "num_key_value_heads");
  }
  if (!fields.has("head_dim") && config.width % config.heads != 0) {
    fields.fail("\"num_attention_heads\" to divide " + std::to_string(config.width), "num_attention_heads");
  }
  config.head_dim = fields.size("head_dim", config.width / config.heads);
  if (config.head_dim % 2 != 0) fields.fail("an even \"head_dim\"", "head_dim");
  config.context = fields.size("max_position_embeddings", config.context);
  config.norm_eps = fields.number("rms_norm_eps", config.norm_eps, 0);
  config.tied = fields.flag("tie_word_embeddings", false);
  config.attention_bias = fields.flag("attention_bias", false);
  config.mlp_bias = fields.flag("mlp_bias", false);
  config.attention_dropout = fields.share("attention_dropout");
  config.rope = detail::rope_of(fields, config.context);
  return config;
}

}  // namespace example
