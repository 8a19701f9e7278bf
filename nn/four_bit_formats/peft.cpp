#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>

#include <c10/util/Exception.h>
#include <nlohmann/json.hpp>

#include "nn/four_bit_formats/common.h"
#include "nn/json.h"
#include "nn/replace_file.h"
#include "quantrain/nn/checkpoint.h"
#include "quantrain/nn/lora_adapter.h"

// Names of tensors: "base_model.model.<layer>.lora_A.weight" [r, in] and ".lora_B.weight" [out, r]; what else is
// trained, such as biases, "base_model.model.<name>". Layout: peft 0.21.2, utils/save_and_load.py, tuners/lora.

namespace quantrain::nn {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kPrefix = "base_model.model.";
constexpr std::string_view kA = ".lora_A.weight";
constexpr std::string_view kB = ".lora_B.weight";

std::string file_in(const std::string& folder, const char* name) {
  return (std::filesystem::path(folder) / name).string();
}

// The fields of adapter_config.json, each with its rule.
class Config {
 public:
  explicit Config(const std::string& path) : path_(path) {
    std::ifstream file(path, std::ios::binary);
    TORCH_CHECK(file && !std::filesystem::is_directory(path), path, ": expected a file that can be read, got ",
                file ? "a folder" : std::strerror(errno));
    json_ = detail::parse_json(std::string(std::istreambuf_iterator<char>(file), {}));
    if (!json_.is_object()) fail("a JSON object", "other text");
  }

  [[noreturn]] void fail(const std::string& rule, const std::string& value) const {
    detail::fail_format(path_, rule, value);
  }
  // nullptr where the field is missing or null.
  const Json* find(const char* field) const {
    const auto found = json_.find(field);
    return found == json_.end() || found->is_null() ? nullptr : &*found;
  }
  bool flag(const char* field) const {
    const Json* value = find(field);
    if (value && !value->is_boolean()) fail_type(field, "true or false", *value);
    return value && value->get<bool>();
  }
  double number(const char* field, double otherwise) const {
    const Json* value = find(field);
    if (value && !value->is_number()) fail_type(field, "a number", *value);
    return value ? value->get<double>() : otherwise;
  }
  std::string text(const char* field, const std::string& otherwise) const {
    const Json* value = find(field);
    if (value && !value->is_string()) fail_type(field, "text", *value);
    return value ? value->get<std::string>() : otherwise;
  }
  std::vector<std::string> texts(const char* field) const {
    const Json* value = find(field);
    if (!value) return {};
    const bool good = value->is_array() &&
                      std::all_of(value->begin(), value->end(), [](const Json& item) { return item.is_string(); });
    if (!good) fail_type(field, "a list of text", *value);
    return value->get<std::vector<std::string>>();
  }
  [[noreturn]] void fail_type(const char* field, const std::string& kind, const Json& value) const {
    fail(std::string(field) + " to be " + kind,
         value.dump(-1, ' ', /*ensure_ascii=*/true, Json::error_handler_t::replace).substr(0, 40));
  }

 private:
  std::string path_;
  Json json_;
};

bool is_empty(const Json& value) { return (value.is_object() || value.is_array()) && value.empty(); }

// What would make the adapter compute something else.
void check_kind(const Config& config) {
  const std::string kind = config.text("peft_type", "LORA");
  if (kind != "LORA") config.fail("peft_type LORA", detail::in_quotes(kind));
  for (const char* field : {"use_dora", "lora_bias", "use_qalora"}) {
    if (config.flag(field)) config.fail(std::string(field) + " to be false", "true");
  }
  for (const char* field :
       {"alpha_pattern", "layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens",
        "arrow_config", "kasa_config", "lora_ga_config", "monteclora_config", "use_bdlora", "velora_config"}) {
    const Json* value = config.find(field);
    if (value && !is_empty(*value)) config.fail_type(field, "absent or empty", *value);
  }
  const Json* initialization = config.find("init_lora_weights");
  if (initialization && initialization->is_string()) {
    const std::string name = initialization->get<std::string>();
    for (const char* other : {"pissa", "olora", "corda", "loftq"}) {
      if (name.starts_with(other))
        config.fail("init_lora_weights that leaves the base model as it is", detail::in_quotes(name));
    }
  }
}

void read_config(const std::string& path, LoraAdapter& adapter) {
  const Config config(path);
  check_kind(config);
  const double r = config.number("r", 8);
  if (!(r >= 1 && r <= 1 << 30) || r != std::floor(r)) config.fail("r to be a positive integer", std::to_string(r));
  adapter.r = static_cast<int64_t>(r);
  adapter.lora_alpha = config.number("lora_alpha", 8);
  adapter.lora_dropout = config.number("lora_dropout", 0);
  if (!(adapter.lora_dropout >= 0 && adapter.lora_dropout < 1))
    config.fail("lora_dropout from 0 to less than 1", std::to_string(adapter.lora_dropout));
  adapter.use_rslora = config.flag("use_rslora");
  adapter.bias = config.text("bias", "none");
  if (adapter.bias != "none" && adapter.bias != "all" && adapter.bias != "lora_only")
    config.fail("bias to be none, all or lora_only", detail::in_quotes(adapter.bias));
  const Json* target = config.find("target_modules");
  if (target && target->is_string()) {
    adapter.target_pattern = target->get<std::string>();
  } else {
    adapter.target_modules = config.texts("target_modules");
  }
  adapter.modules_to_save = config.texts("modules_to_save");
  adapter.base_model = config.text("base_model_name_or_path", "");
  adapter.task_type = config.text("task_type", "");
}

// A [r, in] and B [out, r] of one layer.
void check_layer(const std::string& source, const std::string& name, const LoraWeight& layer) {
  const auto check = [&](std::string_view ending, const at::Tensor& tensor) {
    const std::string key = detail::in_quotes(std::string(kPrefix) + name + std::string(ending));
    if (!tensor.defined()) detail::fail_format(source, "a tensor " + key, "none");
    if (!tensor.is_floating_point() || tensor.dim() != 2 || tensor.numel() == 0)
      detail::fail_format(source, key + " to be a matrix of floats with elements",
                          std::string(c10::toString(tensor.scalar_type())) + " " + detail::sizes_text(tensor.sizes()));
  };
  check(kA, layer.a);
  check(kB, layer.b);
  if (layer.a.size(0) != layer.b.size(1))
    detail::fail_format(source,
                        detail::in_quotes(std::string(kPrefix) + name + std::string(kB)) + " of " +
                            std::to_string(layer.a.size(0)) + " columns, the rank of A",
                        std::to_string(layer.b.size(1)));
}

void read_tensors(const std::string& path, LoraAdapter& adapter) {
  for (const auto& [key, tensor] : read_safetensors(path).tensors) {
    if (!key.starts_with(kPrefix))
      detail::fail_format(path, "names that begin with base_model.model.", detail::in_quotes(key));
    const std::string name = key.substr(kPrefix.size());
    if (name.size() > kA.size() && name.ends_with(kA)) {
      adapter.layers[name.substr(0, name.size() - kA.size())].a = tensor;
    } else if (name.size() > kB.size() && name.ends_with(kB)) {
      adapter.layers[name.substr(0, name.size() - kB.size())].b = tensor;
    } else if (name.find("lora_") != std::string::npos) {
      detail::fail_format(path, "names of lora_A.weight and lora_B.weight", detail::in_quotes(key));
    } else {
      adapter.others[name] = tensor;
    }
  }
  if (adapter.layers.empty()) detail::fail_format(path, "a layer with lora_A.weight and lora_B.weight", "none");
  for (const auto& [name, layer] : adapter.layers) check_layer(path, name, layer);
}

Json config_json(const LoraAdapter& adapter) {
  const auto text_or_null = [](const std::string& text) { return text.empty() ? Json(nullptr) : Json(text); };
  Json ranks = Json::object();
  for (const auto& [name, layer] : adapter.layers) {
    if (layer.a.size(0) != adapter.r) ranks[name] = layer.a.size(0);
  }
  Json json;
  json["alpha_pattern"] = Json::object();
  json["base_model_name_or_path"] = text_or_null(adapter.base_model);
  json["bias"] = adapter.bias;
  json["fan_in_fan_out"] = false;
  json["inference_mode"] = true;
  json["init_lora_weights"] = true;
  // An integer where it is one, as PEFT writes it.
  const bool whole = adapter.lora_alpha == std::floor(adapter.lora_alpha) && std::abs(adapter.lora_alpha) < 1e15;
  json["lora_alpha"] = whole ? Json(static_cast<int64_t>(adapter.lora_alpha)) : Json(adapter.lora_alpha);
  json["lora_dropout"] = adapter.lora_dropout;
  json["modules_to_save"] = adapter.modules_to_save.empty() ? Json(nullptr) : Json(adapter.modules_to_save);
  json["peft_type"] = "LORA";
  json["r"] = adapter.r;
  json["rank_pattern"] = ranks;
  json["target_modules"] = adapter.target_pattern.empty() ? Json(adapter.target_modules) : Json(adapter.target_pattern);
  json["task_type"] = text_or_null(adapter.task_type);
  json["use_dora"] = false;
  json["use_rslora"] = adapter.use_rslora;
  return json;
}

}  // namespace

double LoraAdapter::scaling(const std::string& layer) const {
  const auto found = layers.find(layer);
  if (found == layers.end()) detail::fail_format("scaling", "a layer of the adapter", detail::in_quotes(layer));
  const auto rank = static_cast<double>(found->second.a.size(0));
  return lora_alpha / (use_rslora ? std::sqrt(rank) : rank);
}

LoraAdapter load_lora_adapter(const std::string& folder) {
  LoraAdapter adapter;
  read_config(file_in(folder, "adapter_config.json"), adapter);
  read_tensors(file_in(folder, "adapter_model.safetensors"), adapter);
  return adapter;
}

void save_lora_adapter(const std::string& folder, const LoraAdapter& adapter) {
  const std::string source = "save_lora_adapter";
  if (adapter.layers.empty()) detail::fail_format(source, "an adapter with layers", "none");
  if (adapter.r < 1) detail::fail_format(source, "r of at least 1", std::to_string(adapter.r));
  if (!std::isfinite(adapter.lora_alpha) || !(adapter.lora_dropout >= 0 && adapter.lora_dropout < 1))
    detail::fail_format(source, "a finite lora_alpha and lora_dropout from 0 to less than 1",
                        std::to_string(adapter.lora_alpha) + " and " + std::to_string(adapter.lora_dropout));
  if (adapter.bias != "none" && adapter.bias != "all" && adapter.bias != "lora_only")
    detail::fail_format(source, "bias to be none, all or lora_only", detail::in_quotes(adapter.bias));
  SafeTensors content;
  content.metadata["format"] = "pt";
  for (const auto& [name, layer] : adapter.layers) {
    check_layer(source, name, layer);
    content.tensors[std::string(kPrefix) + name + std::string(kA)] = layer.a.detach();
    content.tensors[std::string(kPrefix) + name + std::string(kB)] = layer.b.detach();
  }
  for (const auto& [name, tensor] : adapter.others) content.tensors[std::string(kPrefix) + name] = tensor.detach();
  const std::string config = config_json(adapter).dump(2);
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  TORCH_CHECK(!error, folder, ": expected a folder that is there or can be made, got ", error.message());
  write_safetensors(file_in(folder, "adapter_model.safetensors"), content);
  detail::replace_file(file_in(folder, "adapter_config.json"), {config});
}

}  // namespace quantrain::nn
