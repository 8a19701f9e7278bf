// One safetensors file with all that a run needs to go on, the same in both languages.
//
// Tensors: the model's under their names, optimizer.{exp_avg,exp_avg_sq,step}.<parameter>, and rng.cpu.<rank>,
// rng.cuda.<rank> (generator states; this program is rank 0). Metadata: format, version, step, skipped, scaler (JSON,
// the keys of torch.amp.GradScaler.state_dict()), config (JSON, sizes of the model), recipe (JSON, "" for none) and
// settings (JSON, what decides the course of the training).
#pragma once

#include <quantrain/nn/checkpoint.h>
#include <quantrain/optim/fused_adamw.h>

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <ATen/Context.h>
#include <nlohmann/json.hpp>

namespace example {

struct Checkpoint {
  static constexpr const char* kFormat = "quantrain-train-gpt";
  static constexpr const char* kVersion = "1";

  std::string path;  // for messages
  std::map<std::string, at::Tensor> tensors;
  int64_t step = 0;
  int64_t skipped = 0;
  nlohmann::json scaler = nlohmann::json::object();
  nlohmann::json config;
  std::string recipe;
  nlohmann::json settings;

  void save() const {
    quantrain::nn::write_safetensors(path, {tensors,
                                            {{"format", kFormat},
                                             {"version", kVersion},
                                             {"step", std::to_string(step)},
                                             {"skipped", std::to_string(skipped)},
                                             {"scaler", scaler.dump()},
                                             {"config", config.dump()},
                                             {"recipe", recipe},
                                             {"settings", settings.dump()}}});
  }

  // Throws where the file is missing, damaged, or not of this program.
  static Checkpoint read(const std::string& path) {
    quantrain::nn::SafeTensors content = quantrain::nn::read_safetensors(path);
    std::map<std::string, std::string>& metadata = content.metadata;
    if (metadata["format"] != kFormat || metadata["version"] != kVersion) {
      const std::string found = metadata["format"].empty() ? "none" : metadata["format"] + " " + metadata["version"];
      throw std::invalid_argument(path + ": expected metadata format " + kFormat + " " + kVersion + ", got " + found);
    }
    const auto parsed = [&](const char* key) { return nlohmann::json::parse(metadata.at(key)); };
    return {path,
            std::move(content.tensors),
            parsed("step"),
            parsed("skipped"),
            parsed("scaler"),
            parsed("config"),
            metadata.at("recipe"),
            parsed("settings")};
  }

  // Throws, naming the size or the recipe, where the checkpoint's model is another one.
  void check_model(const nlohmann::json& expected_config, const std::string& expected_recipe,
                   bool float_allowed = false) const {
    check("size", config, expected_config);
    if (recipe != expected_recipe && !(float_allowed && recipe.empty())) {
      throw std::invalid_argument(path + ": expected a checkpoint of recipe " + recipe_name(expected_recipe) +
                                  ", got " + recipe_name(recipe));
    }
  }

  // Throws, naming the setting, where the checkpoint's training is another one.
  void check_settings(const nlohmann::json& expected) const { check("setting", settings, expected); }

  // Copies the model's tensors; a float checkpoint leaves the fake-quantizers of a quantized model as they are.
  void load_model(torch::nn::Module& model) const {
    std::map<std::string, at::Tensor> wanted;
    const auto collect = [&](const auto& items) {
      for (const auto& item : items) {
        const bool quantizer = item.key().find("_fake_quant.") != std::string::npos;
        const auto found = tensors.find(item.key());
        if (found != tensors.end()) {
          wanted[item.key()] = found->second;
        } else if (recipe.empty() && quantizer) {
          wanted[item.key()] = item.value();
        }
      }
    };
    collect(model.named_parameters());
    collect(model.named_buffers());
    quantrain::nn::load_tensors(wanted, model, path);
  }

  const at::Tensor& tensor(const std::string& name) const {
    const auto found = tensors.find(name);
    if (found == tensors.end()) throw std::invalid_argument(path + ": expected the tensor '" + name + "', got none");
    return found->second;
  }

 private:
  static std::string recipe_name(const std::string& json) {
    return json.empty() ? "none" : nlohmann::json::parse(json).value("name", "");
  }

  static std::string text(const nlohmann::json& value) {
    return value.is_string() ? value.get<std::string>() : value.dump();
  }

  void check(const std::string& kind, const nlohmann::json& found, const nlohmann::json& expected) const {
    for (const auto& [name, value] : expected.items()) {
      const nlohmann::json mine = found.contains(name) ? found[name] : nlohmann::json();
      if (mine == value) continue;
      throw std::invalid_argument(path + ": expected a checkpoint with the " + kind + " " + name + " = " + text(value) +
                                  ", got " + text(mine) + " (--restart begins again, --out names another folder)");
    }
  }
};

// The optimizer's state under the checkpoint's names; `names` are of its parameters, in its order.
inline void add_optimizer(std::map<std::string, at::Tensor>& tensors, quantrain::optim::FusedAdamW& optimizer,
                          const std::vector<std::string>& names) {
  const std::vector<quantrain::optim::FusedAdamW::State>& states = optimizer.state_tensors();
  for (size_t i = 0; i < names.size(); ++i) {
    tensors["optimizer.exp_avg." + names[i]] = states[i].exp_avg;
    tensors["optimizer.exp_avg_sq." + names[i]] = states[i].exp_avg_sq;
    tensors["optimizer.step." + names[i]] = states[i].step;
  }
}

inline void load_optimizer(const Checkpoint& stored, quantrain::optim::FusedAdamW& optimizer,
                           const std::vector<std::string>& names) {
  std::vector<quantrain::optim::FusedAdamW::State> states;
  for (size_t i = 0; i < names.size(); ++i) {
    quantrain::optim::FusedAdamW::State state;
    state.exp_avg = stored.tensor("optimizer.exp_avg." + names[i]);
    state.exp_avg_sq = stored.tensor("optimizer.exp_avg_sq." + names[i]);
    state.step = stored.tensor("optimizer.step." + names[i]).reshape({});
    states.push_back(std::move(state));
  }
  optimizer.load_state_(states);
}

// The default generators that a step draws from: the CPU's, and the GPU's on one.
inline std::map<std::string, at::Generator> generators(at::Device device) {
  std::map<std::string, at::Generator> found = {
      {"rng.cpu.0", at::globalContext().defaultGenerator(at::Device(at::kCPU))}};
  if (device.is_cuda()) found["rng.cuda.0"] = at::globalContext().defaultGenerator(device);
  return found;
}

}  // namespace example
