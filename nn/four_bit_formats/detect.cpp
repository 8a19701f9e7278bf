#include <algorithm>
#include <cctype>

#include <nlohmann/json.hpp>

#include "nn/four_bit_formats/common.h"
#include "nn/json.h"

// Which layers of a file are packed and how, and what a model's config.json says of it.

namespace quantrain::nn {
namespace {

using Json = nlohmann::ordered_json;

// GPTQ packs along the input, AWQ along the output: the width of qweight is N or N / 8, that of scales always N.
std::string gptq_or_awq(const FourBitTensors& tensors, const std::string& prefix) {
  const detail::LayerTensors layer("four_bit_layers", tensors, prefix);
  const at::Tensor qweight = layer.get_matrix("qweight", {at::kInt});
  const at::Tensor scales = layer.get_matrix("scales", detail::kFloatTypes);
  if (qweight.size(1) == scales.size(1)) return "gptq";
  if (qweight.size(1) * 8 == scales.size(1)) return "awq";
  layer.fail(detail::in_quotes(layer.key("scales")) + " of " + std::to_string(qweight.size(1)) + " columns (GPTQ) or " +
                 std::to_string(qweight.size(1) * 8) + " (AWQ)",
             std::to_string(scales.size(1)));
}

[[noreturn]] void fail_config(const std::string& rule, const std::string& value) {
  detail::fail_format("read_four_bit_config", rule, value);
}

std::string value_text(const Json& value) { return value.dump(-1, ' ', /*ensure_ascii=*/true).substr(0, 40); }

std::string lowercase(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return text;
}

std::string text_of(const Json& json, const char* field, const std::string& otherwise) {
  const auto found = json.find(field);
  if (found == json.end() || found->is_null()) return otherwise;
  if (!found->is_string()) fail_config(std::string(field) + " to be text", value_text(*found));
  return lowercase(found->get<std::string>());
}

int64_t integer_of(const Json& json, const char* field, int64_t otherwise) {
  const auto found = json.find(field);
  if (found == json.end() || found->is_null()) return otherwise;
  if (!found->is_number_integer()) fail_config(std::string(field) + " to be an integer", value_text(*found));
  return found->get<int64_t>();
}

void check_bits(int64_t bits) {
  if (bits != 4) fail_config("4 bits", std::to_string(bits));
}

void read_gptq(const Json& json, FourBitConfig& config) {
  check_bits(integer_of(json, "bits", 4));
  config.group_size = std::max(integer_of(json, "group_size", 0), int64_t{0});
  const std::string format = text_of(json, "checkpoint_format", "gptq");
  const auto marlin = json.find("is_marlin_format");
  if ((format != "gptq" && format != "gptq_v2") || (marlin != json.end() && *marlin == true))
    fail_config("checkpoint_format gptq or gptq_v2", detail::in_quotes(format == "gptq" ? "marlin" : format));
  config.version = format == "gptq" ? 1 : 2;
}

void read_awq(const Json& json, FourBitConfig& config) {
  check_bits(integer_of(json, "bits", integer_of(json, "w_bit", 4)));
  config.group_size = std::max(integer_of(json, "group_size", integer_of(json, "q_group_size", 0)), int64_t{0});
  const std::string layout = text_of(json, "version", "gemm");
  if (layout != "gemm") fail_config("AWQ of version gemm", detail::in_quotes(layout));
}

void read_compressed_tensors(const Json& json) {
  const std::string format = text_of(json, "format", "pack-quantized");
  if (format != "pack-quantized") fail_config("format pack-quantized", detail::in_quotes(format));
  const auto groups = json.find("config_groups");
  if (groups == json.end() || !groups->is_object()) return;
  for (const auto& [name, group] : groups->items()) {
    if (group.is_object() && group.contains("weights") && group["weights"].is_object())
      check_bits(integer_of(group["weights"], "num_bits", 4));
  }
}

void read_bitsandbytes(const Json& json) {
  const auto found = json.find("load_in_4bit");
  const auto private_name = json.find("_load_in_4bit");
  const bool four = (found != json.end() && *found == true) || (private_name != json.end() && *private_name == true);
  if (!four) fail_config("load_in_4bit of true", found == json.end() ? "none" : value_text(*found));
}

}  // namespace

std::map<std::string, std::string> four_bit_layers(const FourBitTensors& tensors) {
  std::map<std::string, std::string> layers;
  // The path of the layer that `name` ends, "" for a file of one layer.
  const auto path = [](const std::string& name, std::string_view ending) -> std::optional<std::string> {
    if (name == ending) return "";
    if (name.size() <= ending.size() || !name.ends_with(ending) || name[name.size() - ending.size() - 1] != '.')
      return std::nullopt;
    return name.substr(0, name.size() - ending.size() - 1);
  };
  for (const auto& [name, tensor] : tensors) {
    for (const char* ending :
         {"weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4",
          "weight_quant_state.bitsandbytes__nf4", "weight_quant_state.bitsandbytes__fp4", "weight_quant_state"}) {
      if (const auto layer = path(name, ending)) layers[*layer] = "bitsandbytes";
    }
    if (const auto layer = path(name, "qweight")) layers[*layer] = gptq_or_awq(tensors, *layer);
    if (const auto layer = path(name, "weight_packed")) layers[*layer] = "compressed-tensors";
    if (const auto layer = path(name, "W_q")) layers[*layer] = "hqq";
  }
  return layers;
}

FourBitConfig read_four_bit_config(const std::string& json) {
  const Json whole = detail::parse_json(json);
  if (!whole.is_object()) fail_config("a JSON object", "other text");
  const auto inner = whole.find("quantization_config");
  if (inner != whole.end() && !inner->is_object())
    fail_config("quantization_config to be an object", value_text(*inner));
  const Json& config_json = inner == whole.end() ? whole : *inner;
  FourBitConfig config;
  const bool is_auto_gptq = inner == whole.end() && whole.contains("bits") && whole.contains("desc_act");
  config.method = text_of(config_json, "quant_method", is_auto_gptq ? "gptq" : "");
  if (config.method == "gptq") {
    read_gptq(config_json, config);
  } else if (config.method == "awq") {
    read_awq(config_json, config);
  } else if (config.method == "compressed-tensors") {
    read_compressed_tensors(config_json);
  } else if (config.method == "bitsandbytes") {
    read_bitsandbytes(config_json);
  } else if (config.method != "hqq") {
    fail_config("quant_method bitsandbytes, gptq, awq, compressed-tensors or hqq",
                config.method.empty() ? "none" : detail::in_quotes(config.method));
  }
  return config;
}

std::map<std::string, FourBitWeight> load_four_bit_layers(const FourBitTensors& tensors,
                                                          const std::optional<FourBitConfig>& config) {
  std::map<std::string, FourBitWeight> weights;
  for (const auto& [prefix, format] : four_bit_layers(tensors)) {
    const int64_t group_size = config ? config->group_size : 0;
    if (config && config->method != format)
      detail::fail_format(
          "load_four_bit_layers",
          "the layer " + detail::in_quotes(prefix) + " in format " + config->method + ", as the config says", format);
    if (format == "bitsandbytes") {
      weights[prefix] = load_bitsandbytes(tensors, prefix);
    } else if (format == "gptq") {
      if (!config)
        detail::fail_format(
            "load_four_bit_layers",
            "a config for the GPTQ layer " + detail::in_quotes(prefix) + ", whose tensors do not say their version",
            "none");
      weights[prefix] = from_gptq(tensors, prefix, config->version, group_size);
    } else if (format == "awq") {
      weights[prefix] = from_awq(tensors, prefix, group_size);
    } else if (format == "compressed-tensors") {
      weights[prefix] = from_compressed_tensors(tensors, prefix);
    } else {
      weights[prefix] = from_hqq(tensors, prefix);
    }
  }
  return weights;
}

}  // namespace quantrain::nn
