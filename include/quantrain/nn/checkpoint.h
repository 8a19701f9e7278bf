// Checkpoints: one safetensors file holds a module's state, its recipe, and what packed weights need to be read back.
// The Python package writes and reads the same files (quantrain.save_checkpoint, quantrain.load_checkpoint).
//
// Format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header
// {name: {"dtype", "shape", "data_offsets"}, "__metadata__": {string: string}}, then the tensors' bytes without gaps.
// Metadata here: "format" "quantrain", "version" "1", "recipe" (Recipe::to_json, "" for a plain float model),
// "converted" "true" or "false", "layers" (JSON {layer: {"bits", "shape"}} of converted layers), "layer_recipes" (JSON
// {"recipes": [Recipe, ...], "of": {layer: index}} of every quantized layer).
//
// A pruned weight has a buffer weight_mask (<quantrain/ops/pruning.h>), which loading adds to a module without one. Of
// a converted layer whose mask drops codes of 0 the file has `weight_codes_kept` in place of weight_codes: those that
// are kept, in row-major order.
//
// Every reader checks the whole file and the whole match before it changes anything; errors are ValueError that name
// the file, the rule and the value, or Error (c10) where the file cannot be opened or written.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>

#include <torch/nn/module.h>

#include "quantrain/nn/recipe.h"
#include "quantrain/ops/export.h"

namespace quantrain::nn {

struct QUANTRAIN_API SafeTensors {
  std::map<std::string, at::Tensor> tensors;  // on CPU, contiguous
  std::map<std::string, std::string> metadata;
};

// Any safetensors file of the dtypes F64, F32, F16, BF16, I64, I32, I16, I8, U8 and BOOL.
QUANTRAIN_API SafeTensors read_safetensors(const std::string& path);

// Writes to a temporary file beside `path` and renames it, so that an interrupted write leaves an earlier file whole.
QUANTRAIN_API void write_safetensors(const std::string& path, const SafeTensors& content);

// What a checkpoint says about itself, without its tensors.
struct QUANTRAIN_API CheckpointInfo {
  std::optional<Recipe> recipe;  // absent for a plain float model
  bool converted = false;
  std::map<std::string, Recipe> layers;  // of every quantized layer, with edge bits; empty in files that do not say
};

QUANTRAIN_API CheckpointInfo read_checkpoint_info(const std::string& path);

// Writes parameters and buffers of `module` under their dotted names. ValueError: a recipe that no layer of the module
// was made with, or any recipe for a module without quantized layers.
QUANTRAIN_API void save_checkpoint(const std::string& path, const torch::nn::Module& module,
                                   const std::optional<Recipe>& recipe = std::nullopt);

// Copies a checkpoint's tensors into the module's parameters and buffers, on whatever device they are. The names must
// be the module's, all of them and no other (but `observer.frozen`, which files of earlier releases lack); shapes
// equal; dtypes equal or both floating point; "converted" and every layer's bits, symmetry and granularity as the
// module's (for a converted checkpoint: quantrain::nn::convert(module, false) first).
QUANTRAIN_API CheckpointInfo load_checkpoint(const std::string& path, torch::nn::Module& module);

// Copies the weights of a float model, from any safetensors file, into a module of quantized layers: its
// fake-quantizers, activations and fraction lengths stay as they are. Names must match as in load_checkpoint. file_name
// gives a tensor's name in the file for its name in the module where the two differ: a float model's batch norm stands
// beside its convolution, that of QuantConvBn2d ("conv1.bn.weight") below it.
QUANTRAIN_API void load_float(const std::string& path, torch::nn::Module& module,
                              const std::function<std::string(const std::string&)>& file_name = {});

// The copying half of load_checkpoint, for tensors under names that the caller mapped: all or nothing. `source` is for
// messages.
QUANTRAIN_API void load_tensors(const std::map<std::string, at::Tensor>& tensors, torch::nn::Module& module,
                                const std::string& source);

}  // namespace quantrain::nn
