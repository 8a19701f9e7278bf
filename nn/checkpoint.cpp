#include "quantrain/nn/checkpoint.h"

#include <algorithm>
#include <fstream>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <nlohmann/json.hpp>

#include "nn/json.h"
#include "nn/labels.h"
#include "nn/masked_codes.h"
#include "nn/safetensors.h"
#include "nn/schemes/table.h"
#include "quantrain/nn/calibration.h"
#include "quantrain/nn/layers.h"

namespace quantrain::nn {

using detail::fail_file;
using detail::in_quotes;
using detail::open_to_read;
using detail::read_header;
using detail::read_tensors;
using detail::SafeTensorsHeader;
using detail::shape_text;

namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kNamesInMessage = 5;

std::string listed(const std::set<std::string>& names) {
  std::string text;
  size_t shown = 0;
  for (const std::string& name : names) {
    if (shown++ == kNamesInMessage) return text + " and " + std::to_string(names.size() - kNamesInMessage) + " more";
    text += (text.empty() ? "" : ", ") + in_quotes(name);
  }
  return text;
}

// Whether files of earlier releases lack the tensor: the module's own value stays.
bool may_lack(const std::string& name) { return name.ends_with("observer.frozen"); }

std::map<std::string, at::Tensor> state_of(const torch::nn::Module& module) {
  std::map<std::string, at::Tensor> state;
  for (const auto& item : module.named_parameters()) state[item.key()] = item.value();
  for (const auto& item : module.named_buffers()) state[item.key()] = item.value();
  return state;
}

Json converted_layers(const torch::nn::Module& module) {
  Json layers = Json::object();
  for (const auto& item : module.named_modules("", /*include_self=*/false)) {
    const auto* layer = dynamic_cast<const QuantModule*>(item.value().get());
    if (layer && layer->converted()) {
      layers[item.key()] = {{"bits", layer->recipe().weight->bits}, {"shape", layer->weight_shape()}};
    }
  }
  if (const auto* layer = dynamic_cast<const QuantModule*>(&module); layer && layer->converted()) {
    layers[""] = {{"bits", layer->recipe().weight->bits}, {"shape", layer->weight_shape()}};
  }
  return layers;
}

// Quantized layer -> its recipe.
std::map<std::string, Recipe> layer_recipes(const torch::nn::Module& module) {
  std::map<std::string, Recipe> recipes;
  const auto add = [&recipes](const std::string& name, const torch::nn::Module& child) {
    const auto* layer = dynamic_cast<const QuantModule*>(&child);
    if (layer && !layer->left_float()) recipes[name] = layer->recipe();
  };
  add("", module);
  for (const auto& item : module.named_modules("", /*include_self=*/false)) add(item.key(), *item.value());
  return recipes;
}

std::string layer_recipes_text(const torch::nn::Module& module) {
  Json recipes = Json::array();
  Json of = Json::object();
  std::vector<std::string> texts;
  for (const auto& [name, recipe] : layer_recipes(module)) {
    const std::string text = recipe.to_json();
    const auto found = std::find(texts.begin(), texts.end(), text);
    of[name] = found - texts.begin();
    if (found != texts.end()) continue;
    texts.push_back(text);
    recipes.push_back(Json::parse(text));
  }
  return Json{{"recipes", recipes}, {"of", of}}.dump();
}

std::string format_of(const char* tensor, const QuantSpec& spec) {
  const std::string codes = spec.format != Format::kInt
                                ? " " + name_of(spec.format)
                                : (spec.symmetric ? " int" : " uint") + std::to_string(spec.bits);
  return tensor + codes + " " + name_of(spec.granularity) +
         (spec.granularity == Granularity::kPerGroup ? " of " + std::to_string(spec.group_size) : "");
}

// What decides a layer's codes. with_input: false for an embedding, whose input is indices.
std::string formats(const Recipe& recipe, bool with_input) {
  std::string text;
  const auto add = [&text](const char* tensor, const std::optional<QuantSpec>& spec) {
    if (spec) text += (text.empty() ? "" : ", ") + format_of(tensor, *spec);
  };
  add("weight", recipe.weight);
  if (with_input) add("input", recipe.input);
  add("output", recipe.output);
  if (const std::string form = recipe.scheme ? recipe.scheme->stored_form() : ""; !form.empty()) text += ", " + form;
  return text;
}

bool made_with(const Recipe& layer, const Recipe& recipe) {
  const bool with_input = layer.input.has_value();
  const std::string ours = formats(layer, with_input);
  return ours == formats(recipe, with_input) || ours == formats(recipe.edge(), with_input);
}

void check_recipe_of(const torch::nn::Module& module, const Recipe& recipe) {
  std::map<std::string, Recipe> layers = layer_recipes(module);
  for (const auto& item : module.named_modules()) {
    if (const auto* layer = dynamic_cast<const HasRecipe*>(item.value().get()); layer && !layers.contains(item.key())) {
      layers[item.key()] = layer->recipe();
    }
  }
  TORCH_CHECK_VALUE(!layers.empty(), "save_checkpoint: expected no recipe for a float model, got '", recipe.name, "'");
  for (const auto& item : layers) {
    if (made_with(item.second, recipe)) return;
  }
  const auto& [name, layer] = *layers.begin();
  TORCH_CHECK_VALUE(false, "save_checkpoint: expected the recipe of the module's layers ('", name,
                    "': ", formats(layer, true), "), got '", recipe.name, "': ", formats(recipe, true));
}

std::string metadata_value(const std::string& path, const SafeTensorsHeader& header, const std::string& key) {
  const auto found = header.metadata.find(key);
  if (found == header.metadata.end())
    fail_file(path, "metadata " + in_quotes(key) + " of a quantrain checkpoint", "none");
  return found->second;
}

std::map<std::string, Recipe> read_layer_recipes(const std::string& path, const std::string& text) {
  const Json json = detail::parse_json(text);
  const std::string rule = "recipes and the layers they are of in metadata layer_recipes";
  if (!json.is_object() || !json.contains("recipes") || !json["recipes"].is_array() || !json.contains("of") ||
      !json["of"].is_object()) {
    fail_file(path, rule, in_quotes(text.substr(0, 40)));
  }
  std::vector<Recipe> recipes;
  for (const Json& recipe : json["recipes"]) {
    try {
      recipes.push_back(Recipe::from_json(recipe.dump()));
    } catch (const std::invalid_argument& error) {
      fail_file(path, rule, error.what());
    }
  }
  std::map<std::string, Recipe> layers;
  for (const auto& [name, index] : json["of"].items()) {
    if (!index.is_number_unsigned() || index.get<uint64_t>() >= recipes.size()) fail_file(path, rule, index.dump());
    layers[name] = recipes[index.get<size_t>()];
  }
  return layers;
}

CheckpointInfo info_of(const std::string& path, const SafeTensorsHeader& header) {
  const std::string format = metadata_value(path, header, "format");
  for (const SchemeEntry& scheme : detail::scheme_entries()) {
    if (format != scheme.network_format) continue;
    fail_file(path, "a checkpoint of a module", "an integer network, which " + scheme.network_reader + " reads");
  }
  if (format != "quantrain") fail_file(path, "metadata format 'quantrain'", in_quotes(format));
  const std::string version = metadata_value(path, header, "version");
  if (version != "1") fail_file(path, "metadata version '1'", in_quotes(version));
  const std::string converted = metadata_value(path, header, "converted");
  if (converted != "true" && converted != "false")
    fail_file(path, "metadata converted 'true' or 'false'", in_quotes(converted));
  CheckpointInfo info;
  info.converted = converted == "true";
  const std::string recipe = metadata_value(path, header, "recipe");
  if (!recipe.empty()) {
    try {
      info.recipe = Recipe::from_json(recipe);
    } catch (const std::invalid_argument& error) {
      fail_file(path, "a valid recipe in the metadata", error.what());
    }
  }
  if (const auto found = header.metadata.find("layer_recipes"); found != header.metadata.end()) {
    info.layers = read_layer_recipes(path, found->second);
  }
  return info;
}

// The file's layers must be quantized as the module's are.
void check_recipes(const std::string& path, const SafeTensorsHeader& header, const CheckpointInfo& info,
                   const torch::nn::Module& module) {
  const std::map<std::string, Recipe> ours = layer_recipes(module);
  if (header.metadata.count("layer_recipes")) {
    for (const auto& [name, recipe] : ours) {
      const std::string want = formats(recipe, true);
      const auto found = info.layers.find(name);
      if (found == info.layers.end())
        fail_file(path, "the layer " + in_quotes(name) + " with " + want, "a layer in floating point");
      const std::string given = formats(found->second, recipe.input.has_value());
      if (given != want) fail_file(path, "the layer " + in_quotes(name) + " with " + want, given);
    }
    return;
  }
  if (ours.empty() || !info.recipe) return;  // a file without layer_recipes: its recipe is that of some layer
  for (const auto& item : ours) {
    if (made_with(item.second, *info.recipe)) return;
  }
  const auto& [name, recipe] = *ours.begin();
  fail_file(path, "the layer " + in_quotes(name) + " with " + formats(recipe, true),
            formats(*info.recipe, true) + " (" + in_quotes(info.recipe->name) + ")");
}

void check_layers(const std::string& path, const SafeTensorsHeader& header, const torch::nn::Module& module) {
  const Json ours = converted_layers(module);
  const std::string text = metadata_value(path, header, "layers");
  const Json theirs = detail::parse_json(text);
  if (!theirs.is_object()) fail_file(path, "metadata layers to be a JSON object", in_quotes(text.substr(0, 40)));
  for (const auto& [name, layer] : ours.items()) {
    if (!theirs.contains(name)) fail_file(path, "the converted layer " + in_quotes(name) + " in the metadata", "none");
    // Compared by value: a writer may order the two keys otherwise.
    const nlohmann::json wanted = nlohmann::json::parse(layer.dump());
    const nlohmann::json given = nlohmann::json::parse(theirs[name].dump());
    if (wanted != given) fail_file(path, "the layer " + in_quotes(name) + " to be " + wanted.dump(), given.dump());
  }
}

// Codes had the name "weight" in older files; a float tensor of that name is left to be refused.
void name_codes(std::map<std::string, at::Tensor>& tensors, const torch::nn::Module& module) {
  for (const auto& item : state_of(module)) {
    const std::string& codes = item.first;
    constexpr std::string_view kCodes = "weight_codes";
    if (codes.size() < kCodes.size() || codes.compare(codes.size() - kCodes.size(), kCodes.size(), kCodes) != 0)
      continue;
    const auto old = tensors.find(codes.substr(0, codes.size() - std::string_view("_codes").size()));
    if (old == tensors.end() || tensors.count(codes) || old->second.is_floating_point()) continue;
    tensors[codes] = old->second;
    tensors.erase(old);
  }
}

}  // namespace

CheckpointInfo read_checkpoint_info(const std::string& path) {
  std::ifstream file = open_to_read(path);
  return info_of(path, read_header(path, file));
}

void save_checkpoint(const std::string& path, const torch::nn::Module& module, const std::optional<Recipe>& recipe) {
  if (recipe) check_recipe_of(module, *recipe);
  const Json layers = converted_layers(module);
  std::map<std::string, at::Tensor> state = state_of(module);
  if (!layers.empty()) detail::keep_codes(state);
  write_safetensors(path, {state,
                           {{"format", "quantrain"},
                            {"version", "1"},
                            {"recipe", recipe ? recipe->to_json() : ""},
                            {"converted", layers.empty() ? "false" : "true"},
                            {"layers", layers.dump()},
                            {"layer_recipes", layer_recipes_text(module)}}});
}

CheckpointInfo load_checkpoint(const std::string& path, torch::nn::Module& module) {
  std::ifstream file = open_to_read(path);
  const SafeTensorsHeader header = read_header(path, file);
  const CheckpointInfo info = info_of(path, header);
  const bool converted = !converted_layers(module).empty();
  if (info.converted != converted) {
    fail_file(path,
              converted ? "a converted checkpoint, as the module is converted" : "a checkpoint that is not converted",
              info.converted ? "a converted one (call convert(module, false) first)" : "one that is not");
  }
  check_layers(path, header, module);
  check_recipes(path, header, info, module);
  detail::label_layers(module);
  SafeTensors content = read_tensors(path, file, header);
  std::map<std::string, std::vector<int64_t>> shapes;
  const Json layers = converted_layers(module);
  for (const auto& [name, layer] : layers.items()) shapes[name] = layer["shape"].get<std::vector<int64_t>>();
  detail::spread_codes(path, content.tensors, shapes);
  name_codes(content.tensors, module);
  const auto masks = detail::take_new_masks(path, content.tensors, module);
  load_tensors(content.tensors, module, path);
  detail::add_masks(module, masks);
  return info;
}

void load_tensors(const std::map<std::string, at::Tensor>& tensors, torch::nn::Module& module,
                  const std::string& source) {
  const std::map<std::string, at::Tensor> state = state_of(module);
  std::set<std::string> missing;
  std::set<std::string> unexpected;
  for (const auto& item : state) {
    if (!tensors.count(item.first) && !may_lack(item.first)) missing.insert(item.first);
  }
  for (const auto& item : tensors) {
    if (!state.count(item.first)) unexpected.insert(item.first);
  }
  if (!missing.empty()) fail_file(source, "a tensor for every name of the module", "none for " + listed(missing));
  if (!unexpected.empty()) fail_file(source, "only names of the module", listed(unexpected));
  for (const auto& [name, given] : tensors) {
    const at::Tensor& target = state.at(name);
    if (!given.sizes().equals(target.sizes())) {
      fail_file(source, "the tensor " + in_quotes(name) + " of shape " + shape_text(target.sizes()),
                shape_text(given.sizes()));
    }
    if (given.scalar_type() != target.scalar_type() && !(given.is_floating_point() && target.is_floating_point())) {
      fail_file(source, "the tensor " + in_quotes(name) + " of dtype " + c10::toString(target.scalar_type()),
                c10::toString(given.scalar_type()));
    }
  }
  const at::NoGradGuard no_grad;
  for (const auto& [name, given] : tensors) at::Tensor(state.at(name)).copy_(given);
  for (const auto& child : module.modules()) {
    if (auto* fake_quantize = child->as<FakeQuantizeImpl>()) fake_quantize->state_changed();
  }
}

void load_float(const std::string& path, torch::nn::Module& module,
                const std::function<std::string(const std::string&)>& file_name) {
  std::map<std::string, at::Tensor> given = read_safetensors(path).tensors;
  const auto masks = detail::take_new_masks(path, given, module);
  std::set<std::string> own;  // names that a float model does not have
  for (const auto& item : module.named_modules()) {
    const std::string prefix = item.key().empty() ? "" : item.key() + ".";
    const torch::nn::Module& child = *item.value();
    const auto* layer = dynamic_cast<const QuantModule*>(&child);
    if (layer && layer->converted()) {
      fail_file(path, "a module that is not converted, to load float weights into",
                "a converted layer " + in_quotes(item.key()));
    }
    const auto* calibrates = dynamic_cast<const Calibrates*>(&child);
    for (const auto& tensor : state_of(child)) {
      if (calibrates && calibrates->is_own_tensor(tensor.first)) own.insert(prefix + tensor.first);
    }
  }
  std::map<std::string, at::Tensor> tensors;
  std::set<std::string> missing;
  for (const auto& [name, tensor] : state_of(module)) {
    if (own.count(name)) {
      tensors[name] = tensor;
      continue;
    }
    const std::string in_file = file_name ? file_name(name) : name;
    if (auto node = given.extract(in_file))
      tensors[name] = node.mapped();
    else
      missing.insert(name == in_file ? name : in_file + " (" + name + ")");
  }
  if (!missing.empty()) fail_file(path, "a tensor for every weight of the module", "none for " + listed(missing));
  tensors.merge(given);  // names that the module does not know, for load_tensors to refuse
  load_tensors(tensors, module, path);
  detail::add_masks(module, masks);
}

}  // namespace quantrain::nn
