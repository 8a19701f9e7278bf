// Models and ids from files: the folder of safetensors files that transformers writes, and ids as text or binary.
#pragma once

#include <quantrain/nn/checkpoint.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <ATen/Functions.h>

#include "llama.h"

namespace example {

// The sizes of a folder's model. Throws std::invalid_argument: no folder, or as read_llama_config.
inline LlamaConfig config_of(const std::string& folder) {
  if (!std::filesystem::is_directory(folder)) {
    throw std::invalid_argument(folder + ": expected the folder of a model, got none");
  }
  return read_llama_config((std::filesystem::path(folder) / "config.json").string());
}

// The tensors of a model's folder, by name: those of model.safetensors, or of the files that
// model.safetensors.index.json names. A file is read when its first tensor is taken, and what was taken is not kept.
class WeightFolder {
 public:
  explicit WeightFolder(const std::string& folder) : folder_(folder) {
    const std::string index = path("model.safetensors.index.json"), whole = path("model.safetensors");
    if (std::filesystem::is_regular_file(index)) {
      read_index(index);
    } else if (std::filesystem::is_regular_file(whole)) {
      open_.emplace("model.safetensors", read(whole));
      for (const auto& [name, tensor] : open_.begin()->second) files_[name] = "model.safetensors";
    } else {
      throw std::invalid_argument(folder + ": expected model.safetensors or model.safetensors.index.json, got neither");
    }
  }

  // Throws std::invalid_argument: no such tensor, another shape, a type that is not floating.
  at::Tensor take(const std::string& name, at::IntArrayRef sizes) {
    auto entry = files_.extract(name);
    if (!entry) throw std::invalid_argument(folder_ + ": expected a tensor '" + name + "', got none");
    const std::string& file = entry.mapped();
    if (!open_.contains(file)) open_.emplace(file, read(path(file)));
    auto& tensors = open_.at(file);
    const auto found = tensors.extract(name);
    if (!found) throw std::invalid_argument(path(file) + ": expected a tensor '" + name + "', got none");
    if (tensors.empty()) open_.erase(file);
    const at::Tensor& tensor = found.mapped();
    TORCH_CHECK_VALUE(tensor.sizes() == sizes && tensor.is_floating_point(), folder_, ": expected '", name,
                      "' of floats and shape ", sizes, ", got ", tensor.scalar_type(), " and ", tensor.sizes());
    return tensor;
  }

  // Throws where tensors are left that the model has no place for. Files may repeat a tied head, and those of early
  // releases hold rotary frequencies, which the config determines.
  void finish(bool tied) const {
    for (const auto& [name, file] : files_) {
      if ((tied && name == "lm_head.weight") || name.ends_with(".rotary_emb.inv_freq")) continue;
      throw std::invalid_argument(path(file) + ": expected the tensors of config.json's model alone, got '" + name +
                                  "' too");
    }
  }

 private:
  using Tensors = std::map<std::string, at::Tensor>;

  std::string path(const std::string& file) const { return (std::filesystem::path(folder_) / file).string(); }
  static Tensors read(const std::string& path) { return quantrain::nn::read_safetensors(path).tensors; }

  void read_index(const std::string& index) {
    const nlohmann::json json = detail::read_json_object(index);
    if (!json.contains("weight_map") || !json["weight_map"].is_object()) {
      throw std::invalid_argument(index + ": expected an object \"weight_map\", got none");
    }
    for (const auto& [name, file] : json["weight_map"].items()) {
      if (!file.is_string()) throw std::invalid_argument(index + ": expected a file for '" + name + "', got none");
      files_[name] = file.get<std::string>();
    }
  }

  std::string folder_;
  std::map<std::string, std::string> files_;  // of what was not taken yet: tensor -> file
  std::map<std::string, Tensors> open_;
};

// The model of a folder. With a recipe, each block is converted as soon as its weights are there, so that the memory
// needed beyond the packed model is that of one block and of the files being read. `dtype` is that of weights,
// activations and what is packed; lora_a and lora_b are float32.
inline Llama load_llama(const std::string& folder, const BlockRecipe& recipe, at::ScalarType dtype, at::Device device) {
  const LlamaConfig config = config_of(folder);
  WeightFolder weights(folder);
  const auto fill = [&](const std::string& path, torch::nn::Module& part) {
    const at::NoGradGuard no_grad;
    const auto is_lora = [](const std::string& name) { return name.ends_with(".lora_a") || name.ends_with(".lora_b"); };
    std::map<std::string, at::Tensor> lora;
    for (const auto& item : part.named_parameters()) {
      if (is_lora(item.key())) lora[item.key()] = item.value().clone();
    }
    part.to(dtype);
    for (auto& item : part.named_parameters()) {
      at::Tensor& parameter = item.value();
      if (is_lora(item.key())) {
        parameter.set_data(lora.at(item.key()));
        continue;
      }
      parameter.copy_(weights.take(path + "." + item.key(), parameter.sizes()));
      parameter.requires_grad_(false);
    }
    part.to(device);
    if (recipe.recipe && dynamic_cast<LlamaBlockImpl*>(&part)) quantrain::nn::convert(part);
  };
  Llama model(config, recipe, fill);
  weights.finish(config.tied);
  model->eval();
  return model;
}

// Whether the folder's model.safetensors is a checkpoint of converted layers, as `quantrain quantize` writes it.
inline bool is_quantized(const std::string& folder) {
  const std::string path = (std::filesystem::path(folder) / "model.safetensors").string();
  if (!std::filesystem::is_regular_file(path)) return false;
  std::ifstream file(path, std::ios::binary);
  uint64_t size = 0;  // of the header, little-endian, before it
  if (!file.read(reinterpret_cast<char*>(&size), sizeof(size)) || size > (uint64_t{100} << 20)) return false;
  std::string header(size, ' ');
  if (!file.read(header.data(), static_cast<std::streamsize>(size))) return false;
  const nlohmann::json json = nlohmann::json::parse(header, nullptr, /*allow_exceptions=*/false);
  return json.is_object() && json.value(nlohmann::json::json_pointer("/__metadata__/format"), "") == "quantrain";
}

// The model of such a folder: its layers by the recipes that the file has of them.
inline Llama load_quantized_llama(const std::string& folder, at::ScalarType dtype, at::Device device) {
  const LlamaConfig config = config_of(folder);
  const std::string path = (std::filesystem::path(folder) / "model.safetensors").string();
  const quantrain::nn::CheckpointInfo info = quantrain::nn::read_checkpoint_info(path);
  // Of a recipe for the cache alone no layer is converted.
  const BlockRecipe whole = info.recipe ? BlockRecipe(*info.recipe) : BlockRecipe();
  if (!info.converted && !(info.layers.empty() && whole.int8_cache())) {
    throw std::invalid_argument(path + ": expected a checkpoint of converted layers, got another");
  }
  BlockRecipes blocks;
  for (const auto& [layer, recipe] : info.layers) {
    const std::string prefix = "model.layers.";
    if (!layer.starts_with(prefix)) {
      throw std::invalid_argument(path + ": expected quantized layers in the blocks alone, got '" + layer + "'");
    }
    blocks[std::stoll(layer.substr(prefix.size()))].own.emplace(layer.substr(layer.rfind('.') + 1), recipe);
  }
  Llama model(
      config, info.layers.empty() ? whole : BlockRecipe(), [](const std::string&, torch::nn::Module&) {}, blocks);
  if (!info.layers.empty()) quantrain::nn::convert(*model, /*check_observed=*/false);
  std::map<std::string, at::Tensor> tensors = quantrain::nn::read_safetensors(path).tensors;
  if (config.tied) tensors.erase("lm_head.weight");
  quantrain::nn::load_tensors(tensors, *model, path);
  model->to(device, dtype);
  for (at::Tensor& parameter : model->parameters()) parameter.requires_grad_(false);
  model->eval();
  return model;
}

// Windows of that length fit into the model's context, or std::invalid_argument.
inline void check_length(int64_t length, const LlamaConfig& config) {
  if (length <= config.context) return;
  throw std::invalid_argument("expected --length of at most the model's context " + std::to_string(config.context) +
                              ", got " + std::to_string(length));
}

// A recipe of scheme four_bit with the rank, the layers and the alpha of an adapter, with rslora the alpha that scales
// alike.
inline BlockRecipe recipe_for(const quantrain::nn::LoraAdapter& adapter, quantrain::nn::Recipe recipe) {
  if (adapter.layers.empty()) throw std::invalid_argument("expected --adapter with layers, got one without");
  const auto& [first, weight] = *adapter.layers.begin();
  auto* spec = recipe.scheme_as<quantrain::nn::FourBitSpec>();
  spec->lora_rank = weight.a.size(0);
  spec->lora_alpha = adapter.scaling(first) * static_cast<double>(spec->lora_rank);
  BlockRecipe result(recipe);
  for (const auto& item : adapter.layers) result.targets.insert(item.first.substr(item.first.rfind('.') + 1));
  return result;
}

// What the parameters and buffers of a module take.
inline int64_t bytes_of(const torch::nn::Module& module) {
  int64_t bytes = 0;
  for (const at::Tensor& tensor : module.parameters()) bytes += static_cast<int64_t>(tensor.nbytes());
  for (const at::Tensor& tensor : module.buffers()) bytes += static_cast<int64_t>(tensor.nbytes());
  return bytes;
}

namespace detail {

inline at::Tensor parse_ids(const std::string& path, const std::string& text) {
  std::vector<int32_t> ids;
  const char* at = text.data();
  const char* const end = at + text.size();
  const auto separates = [](unsigned char c) { return std::isspace(c) || c == ','; };
  while (true) {
    at = std::find_if_not(at, end, separates);
    if (at == end) break;
    const char* const word_end = std::find_if(at, end, separates);
    int32_t id = 0;
    const auto [stop, error] = std::from_chars(at, word_end, id);
    if (error != std::errc() || stop != word_end) {
      throw std::invalid_argument(path + ": expected ids as whole numbers, got '" +
                                  std::string(at, std::min(word_end, at + 40)) + "'");
    }
    ids.push_back(id);
    at = word_end;
  }
  return at::tensor(ids, at::kInt);
}

}  // namespace detail

// Ids, int32 [N]. A file whose name ends in .bin holds `binary` ("int32" or "uint16"), little-endian; another one text:
// whole numbers between spaces, line ends or commas. Throws std::invalid_argument: no file, what is not ids, an id
// outside [0, vocab), fewer than `least` ids.
inline at::Tensor read_ids(const std::string& path, const std::string& binary, int64_t vocab, int64_t least) {
  std::ifstream file(path, std::ios::binary);
  if (!file || std::filesystem::is_directory(path)) {
    throw std::invalid_argument(path + ": expected a file of ids that can be read, got none");
  }
  const std::string content{std::istreambuf_iterator<char>(file), {}};
  at::Tensor ids;
  if (path.ends_with(".bin")) {
    const at::ScalarType type = binary == "int32" ? at::kInt : at::kUInt16;
    const auto size = static_cast<int64_t>(c10::elementSize(type)), bytes = static_cast<int64_t>(content.size());
    if (bytes % size != 0) {
      throw std::invalid_argument(path + ": expected ids of " + std::to_string(size) + " bytes (--ids-dtype " + binary +
                                  "), got a file of " + std::to_string(bytes) + " bytes");
    }
    ids = at::empty({bytes / size}, type);
    std::copy(content.begin(), content.end(), static_cast<char*>(ids.data_ptr()));
    ids = ids.to(at::kInt);
  } else {
    ids = detail::parse_ids(path, content);
  }
  if (ids.numel() < least) {
    throw std::invalid_argument(path + ": expected at least " + std::to_string(least) + " ids, got " +
                                std::to_string(ids.numel()));
  }
  const at::Tensor outside = at::nonzero((ids < 0).logical_or_(ids >= vocab));
  if (outside.numel() > 0) {
    const int64_t place = outside[0].item<int64_t>();
    throw std::invalid_argument(path + ": expected ids from 0 to " + std::to_string(vocab - 1) + ", got " +
                                std::to_string(ids[place].item<int64_t>()) + " at place " + std::to_string(place));
  }
  return ids;
}

}  // namespace example
