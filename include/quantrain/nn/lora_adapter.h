// LoRA adapters in the files of PEFT: a folder with adapter_model.safetensors and adapter_config.json.
//
// Errors are c10::ValueError that name the file, the tensor or field, the rule and the value; c10::Error where a file
// cannot be opened or written.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "quantrain/ops/export.h"

namespace quantrain::nn {

// y += scaling * B A dropout(x)
struct QUANTRAIN_API LoraWeight {
  at::Tensor a;  // [r, in]
  at::Tensor b;  // [out, r]
};

struct QUANTRAIN_API LoraAdapter {
  std::map<std::string, LoraWeight> layers;  // by the layer's path in the base model
  std::map<std::string, at::Tensor> others;  // trained biases and modules_to_save, by their name in the base model
  int64_t r = 8;                             // of layers that have no rank of their own
  double lora_alpha = 8;
  double lora_dropout = 0;
  std::vector<std::string> target_modules;
  std::string target_pattern;  // in place of target_modules: a regular expression, or "all-linear"
  std::vector<std::string> modules_to_save;
  bool use_rslora = false;
  std::string bias = "none";  // none, all or lora_only
  std::string base_model;     // base_model_name_or_path
  std::string task_type;

  // lora_alpha / rank of the layer, with rslora lora_alpha / sqrt(rank). ValueError: no such layer.
  double scaling(const std::string& layer) const;
};

// ValueError for what would compute something else: another peft_type, use_dora, an alpha_pattern, bias terms of B, an
// initialization that changes the base model (PiSSA, OLoRA, CorDA, LoftQ), layer_replication.
QUANTRAIN_API LoraAdapter load_lora_adapter(const std::string& folder);

// Writes both files, the tensors under PEFT's names; makes the folder where it is missing. Layers of another rank than
// r are named in rank_pattern.
QUANTRAIN_API void save_lora_adapter(const std::string& folder, const LoraAdapter& adapter);

}  // namespace quantrain::nn
