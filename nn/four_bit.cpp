#include "quantrain/nn/four_bit.h"

#include <cmath>
#include <set>
#include <utility>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/nn/init.h>

#include "nn/layer_arguments.h"
#include "quantrain/ops/four_bit.h"

namespace quantrain::nn {

using detail::defined_or_none;

namespace {

FourBitExtras extras_of(const FourBitWeight& weight) {
  return {defined_or_none(weight.zero_point), defined_or_none(weight.scale_scale), defined_or_none(weight.scale_offset),
          defined_or_none(weight.table)};
}

const FourBitSpec& spec_of(const char* op, const Recipe& recipe) {
  const auto* spec = recipe.scheme_as<FourBitSpec>();
  TORCH_CHECK_VALUE(spec && recipe.weight, op, ": expected a recipe of scheme four_bit, got '", recipe.name, "'");
  return *spec;
}

double length(const at::Tensor& tensor) { return at::linalg_vector_norm(tensor.to(at::kDouble)).item<double>(); }

// The view of a tensor's bytes that FSDP2 shards: frozen, of a floating type.
at::Tensor as_bfloat16(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(
      tensor.dim() == 2 && tensor.size(1) * tensor.element_size() % 2 == 0, "FourBitSpec: expected ", name,
      " of a matrix whose rows are whole blocks and an even number of bytes with storage 'bfloat16', got ",
      tensor.sizes());
  return tensor.contiguous().view(at::kBFloat16);
}

at::Tensor as_stored(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.defined() && tensor.scalar_type() == at::kBFloat16 ? tensor.view(dtype) : tensor;
}

// Each LoraLinear of the module by its path.
std::map<std::string, std::shared_ptr<LoraLinearImpl>> lora_layers(const torch::nn::Module& module) {
  std::map<std::string, std::shared_ptr<LoraLinearImpl>> layers;
  for (const auto& item : module.named_modules("", /*include_self=*/true)) {
    if (auto layer = std::dynamic_pointer_cast<LoraLinearImpl>(item.value())) layers[item.key()] = std::move(layer);
  }
  return layers;
}

// What else the module trains.
std::map<std::string, at::Tensor> others_trained(const torch::nn::Module& module) {
  std::set<const void*> lora;
  for (const at::Tensor& parameter : lora_parameters(module)) lora.insert(parameter.unsafeGetTensorImpl());
  std::map<std::string, at::Tensor> others;
  for (const auto& item : module.named_parameters()) {
    if (item.value().requires_grad() && !lora.contains(item.value().unsafeGetTensorImpl())) {
      others[item.key()] = item.value();
    }
  }
  return others;
}

// How PEFT names modules: by the last part of their paths, or by the paths where another module has such a part.
std::vector<std::string> suffixes(const torch::nn::Module& module, const std::set<std::string>& names) {
  const auto last_of = [](const std::string& name) { return name.substr(name.rfind('.') + 1); };
  std::set<std::string> last;
  for (const std::string& name : names) last.insert(last_of(name));
  bool alone = true;
  for (const auto& item : module.named_modules("", /*include_self=*/false))
    alone = alone && (names.contains(item.key()) || !last.contains(last_of(item.key())));
  const std::set<std::string>& used = alone ? last : names;
  return {used.begin(), used.end()};
}

// Whether modules lie below others.
bool has_paths(const torch::nn::Module& module) {
  for (const auto& item : module.named_modules("", /*include_self=*/false))
    if (item.key().find('.') != std::string::npos) return true;
  return false;
}

}  // namespace

FourBitWeight pack_four_bit(const at::Tensor& weight, const Recipe& recipe) {
  const FourBitSpec& spec = spec_of("pack_four_bit", recipe);
  TORCH_CHECK_VALUE(weight.dim() == 2, "pack_four_bit: expected weight [N, K], got shape ", weight.sizes());
  recipe.validate();
  const at::NoGradGuard no_grad;
  FourBitWeight packed;
  packed.format = four_bit_format(*recipe.weight);
  packed.size = weight.sizes().vec();
  packed.block_size = recipe.weight->group_size;
  packed.dtype = weight.scalar_type();
  const at::Tensor values = weight.detach().contiguous();
  if (packed.format == "uint4") {
    std::tie(packed.codes, packed.scale, packed.zero_point) =
        quantrain::quantize_4bit_affine(values, packed.block_size);
    return packed;
  }
  FourBitCodes codes =
      quantrain::quantize_4bit(values, packed.block_size, packed.format, std::nullopt, spec.scale_rule);
  packed.codes = std::move(codes.codes);
  packed.scale = std::move(codes.scale);
  if (spec.compress_scale) {
    std::tie(packed.scale, packed.scale_scale, packed.scale_offset) = quantrain::compress_scale(packed.scale);
  }
  return packed;
}

at::Tensor dequantized(const FourBitWeight& weight, at::ScalarType dtype) {
  const at::NoGradGuard no_grad;
  const at::Tensor values =
      quantrain::dequantize_4bit(weight.codes, weight.scale, weight.size, weight.format, extras_of(weight), dtype);
  if (!weight.permutation.defined()) return values;
  return at::empty_like(values).index_copy_(-1, weight.permutation, values);
}

Recipe recipe_of(const FourBitWeight& weight) {
  Recipe recipe = Recipe::from_name("nf4");
  QuantSpec& spec = *recipe.weight;
  recipe.name = weight.format;
  if (weight.format == "int4" || weight.format == "uint4") {
    spec.format = Format::kInt;
    spec.symmetric = weight.format == "int4";
  } else if (weight.format != "table") {  // the table itself goes with the weight
    spec.format = value_of<Format>(weight.format, "format");
  }
  spec.group_size = weight.block_size;
  recipe.scheme_as<FourBitSpec>()->compress_scale = weight.scale_scale.defined();
  recipe.validate();
  return recipe;
}

MergedWeight merged_weight(const FourBitWeight& weight, const at::Tensor& lora_a, const at::Tensor& lora_b,
                           double scaling, at::ScalarType dtype) {
  const at::NoGradGuard no_grad;
  at::Tensor exact = dequantized(weight);
  at::Tensor update;
  if (lora_a.defined()) {
    update = at::matmul(lora_b.to(at::kFloat), lora_a.to(at::kFloat)).mul_(scaling);
    exact = exact + update;
  }
  MergedWeight merged;
  merged.weight = exact.to(dtype);
  const double error = length(merged.weight.to(at::kFloat) - exact), size = length(exact);
  const double update_size = update.defined() ? length(update) : 0.0;
  merged.weight_error = size == 0 ? 0.0 : error / size;
  merged.update_error = update_size == 0 ? 0.0 : error / update_size;
  return merged;
}

FourBitModule::FourBitModule(std::string name, const Recipe& recipe, std::vector<int64_t> weight_shape)
    : QuantModule(std::move(name), recipe, std::move(weight_shape), {1}) {
  spec_of(this->name().c_str(), recipe);
}

const FourBitSpec& FourBitModule::spec() const { return *recipe().scheme_as<FourBitSpec>(); }

FourBitWeight FourBitModule::packed_weight() const {
  TORCH_CHECK_VALUE(converted(), "packed_weight: expected a converted ", name(), ", got one with a float weight");
  FourBitWeight weight;
  weight.format = weight_table.defined() ? "table" : four_bit_format(*recipe().weight);
  weight.size = weight_shape();
  weight.block_size = recipe().weight->group_size;
  weight.dtype = float_dtype();
  weight.codes = as_stored(weight_codes, at::kByte);
  weight.scale = as_stored(weight_scale, weight_scale_scale.defined() ? at::kByte : at::kFloat);
  weight.zero_point = as_stored(weight_zero_point, at::kInt);
  weight.scale_scale = weight_scale_scale;
  weight.scale_offset = weight_scale_offset;
  weight.table = weight_table;
  weight.permutation = weight_permutation;
  weight.bias = bias;
  return weight;
}

at::Tensor FourBitModule::dequantized_weight(std::optional<at::ScalarType> dtype) const {
  return dequantized(packed_weight(), dtype.value_or(float_dtype()));
}

void FourBitModule::load_packed(const FourBitWeight& weight) {
  TORCH_CHECK_VALUE(!converted(), "load_packed: expected a ", name(), " that is not converted, got a converted one");
  TORCH_CHECK_VALUE(weight.size == weight_shape(), "load_packed: expected a weight ", at::IntArrayRef(weight_shape()),
                    ", got ", at::IntArrayRef(weight.size));
  const Recipe theirs = recipe_of(weight);
  const bool compressed = theirs.scheme_as<FourBitSpec>()->compress_scale;
  TORCH_CHECK_VALUE(*theirs.weight == *recipe().weight && compressed == spec().compress_scale,
                    "load_packed: expected a weight of format ", four_bit_format(*recipe().weight), " in blocks of ",
                    recipe().weight->group_size, spec().compress_scale ? " with" : " without",
                    " compressed scales, got ", four_bit_format(*theirs.weight), " in blocks of ",
                    theirs.weight->group_size, compressed ? " with" : " without", " compressed scales");
  TORCH_CHECK_VALUE(weight.bias.defined() == has_bias(), "load_packed: expected a weight ",
                    has_bias() ? "with" : "without", " bias, got one ", has_bias() ? "without" : "with");
  // What the parts must be to each other is dequantize_4bit's to check.
  dequantized(weight, at::kHalf);
  const at::Device device = this->weight.device();
  if (has_bias()) {
    const at::NoGradGuard no_grad;
    bias.copy_(weight.bias);
  }
  given_ = weight;
  for (at::Tensor* part : {&given_->codes, &given_->scale, &given_->zero_point, &given_->scale_scale,
                           &given_->scale_offset, &given_->table, &given_->permutation}) {
    if (part->defined()) *part = part->to(device).clone();
  }
  convert_(/*check_observed=*/false);
  to(weight.dtype);
}

void FourBitModule::store_codes(bool /*check_observed*/) {
  const FourBitWeight packed = given_ ? *std::exchange(given_, std::nullopt) : pack_four_bit(float_weight(), recipe());
  const auto keep = [this](const char* name, const at::Tensor& tensor, at::Tensor& member, bool shardable) {
    if (!tensor.defined()) return;
    // Bytes of a row of scales that are no whole bfloat16 numbers stay a buffer.
    const bool whole = tensor.dim() == 2 && tensor.size(1) * tensor.element_size() % 2 == 0;
    const bool as_parameter = shardable && (whole || std::string_view(name) == "weight_codes");
    member = as_parameter && spec().storage == PackedStorage::kBfloat16
                 ? register_parameter(name, as_bfloat16(tensor, name), /*requires_grad=*/false)
                 : register_buffer(name, tensor);
  };
  keep("weight_codes", packed.codes, weight_codes, true);
  keep("weight_scale", packed.scale, weight_scale, true);
  keep("weight_zero_point", packed.zero_point, weight_zero_point, true);
  keep("weight_scale_scale", packed.scale_scale, weight_scale_scale, false);
  keep("weight_scale_offset", packed.scale_offset, weight_scale_offset, false);
  keep("weight_table", packed.table, weight_table, false);
  keep("weight_permutation", packed.permutation, weight_permutation, false);
}

void FourBitModule::take_form(FourBitModule& layer) const {
  if (converted()) layer.load_packed(packed_weight());
}

Linear4bitImpl::Linear4bitImpl(const std::string& name, const torch::nn::LinearOptions& options, const Recipe& recipe)
    : Copied(name, recipe, std::vector<int64_t>{options.out_features(), options.in_features()}) {
  reset_weight_and_bias(options.bias());
}

torch::nn::LinearOptions Linear4bitImpl::options() const {
  return torch::nn::LinearOptions(weight_shape()[1], weight_shape()[0]).bias(has_bias());
}

std::shared_ptr<Linear4bitImpl> Linear4bitImpl::fresh() const {
  auto layer = std::make_shared<Linear4bitImpl>(options(), recipe());
  take_form(*layer);
  return layer;
}

at::Tensor Linear4bitImpl::in_order(const at::Tensor& input) const {
  return weight_permutation.defined() ? at::index_select(input, -1, weight_permutation) : input;
}

at::Tensor Linear4bitImpl::forward(const at::Tensor& input) {
  if (!converted()) return watched(at::linear(input, weight, bias));
  const FourBitWeight packed = packed_weight();
  return quantrain::linear_4bit(in_order(input), packed.codes, packed.scale, defined_or_none(bias), packed.format,
                                extras_of(packed), "auto", weight_shape()[0]);
}

LoraLinearImpl::LoraLinearImpl(const torch::nn::LinearOptions& options, const Recipe& recipe)
    : Copied("LoraLinear", options, recipe) {
  const int64_t rank = spec().lora_rank;
  lora_a = register_parameter("lora_a", at::empty({rank, options.in_features()}, at::kFloat));
  torch::nn::init::kaiming_uniform_(lora_a, std::sqrt(5.0));
  lora_b = register_parameter("lora_b", at::zeros({options.out_features(), rank}, at::kFloat));
}

std::shared_ptr<LoraLinearImpl> LoraLinearImpl::fresh() const {
  auto layer = std::make_shared<LoraLinearImpl>(options(), recipe());
  take_form(*layer);
  return layer;
}

at::Tensor LoraLinearImpl::forward(const at::Tensor& input) {
  if (!lora_enabled_) return Linear4bitImpl::forward(input);
  const double dropout = is_training() ? spec().lora_dropout : 0.0;
  if (!converted()) {
    const at::Tensor u = at::linear(at::dropout(input, dropout, is_training()), lora_a.to(input.scalar_type()));
    return watched(at::linear(input, weight, bias)) + scaling() * at::linear(u, lora_b.to(input.scalar_type()));
  }
  const FourBitWeight packed = packed_weight();
  // The columns of A are in the order of the input's, those of the codes in that of the permutation.
  const at::Tensor a = weight_permutation.defined() ? at::index_select(lora_a, 1, weight_permutation) : lora_a;
  return quantrain::linear_4bit_lora(in_order(input), packed.codes, packed.scale, a, lora_b, scaling(), dropout,
                                     defined_or_none(bias), packed.format, extras_of(packed), "auto",
                                     weight_shape()[0]);
}

MergedWeight LoraLinearImpl::merged_weight(std::optional<at::ScalarType> dtype) const {
  return quantrain::nn::merged_weight(packed_weight(), lora_a, lora_b, scaling(), dtype.value_or(float_dtype()));
}

Embedding4bitImpl::Embedding4bitImpl(const torch::nn::EmbeddingOptions& options, const Recipe& recipe)
    : Copied(
          "Embedding4bit",
          [&recipe] {  // a row is decoded by itself, and a scale of scales serves many rows
            Recipe plain = recipe;
            if (auto* spec = plain.scheme_as<FourBitSpec>()) spec->compress_scale = false;
            return plain;
          }(),
          std::vector<int64_t>{options.num_embeddings(), options.embedding_dim()}),
      padding_idx_(options.padding_idx().value_or(-1)) {
  TORCH_CHECK_VALUE(!options.max_norm() && !options.scale_grad_by_freq() && !options.sparse(),
                    "Embedding4bit: expected no max_norm, scale_grad_by_freq or sparse, got one of them");
  const int64_t block = this->recipe().weight->group_size;
  TORCH_CHECK_VALUE(options.embedding_dim() % block == 0,
                    "Embedding4bit: expected embedding_dim to be whole blocks of ", block, ", got ",
                    options.embedding_dim());
  weight = register_parameter("weight", at::empty(weight_shape(), at::kFloat));
  torch::nn::init::normal_(weight);
  if (padding_idx_ >= 0) {
    const at::NoGradGuard no_grad;
    weight[padding_idx_].fill_(0);
  }
}

std::shared_ptr<Embedding4bitImpl> Embedding4bitImpl::fresh() const {
  torch::nn::EmbeddingOptions options(weight_shape()[0], weight_shape()[1]);
  if (padding_idx_ >= 0) options.padding_idx(padding_idx_);
  auto layer = std::make_shared<Embedding4bitImpl>(options, recipe());
  take_form(*layer);
  return layer;
}

at::Tensor Embedding4bitImpl::forward(const at::Tensor& indices) {
  if (!converted()) return watched(at::embedding(weight, indices, padding_idx_));
  FourBitWeight rows = packed_weight();
  const auto taken = [&indices](at::Tensor& table) {
    if (table.defined()) table = at::index_select(table, 0, indices.reshape(-1));
  };
  taken(rows.codes);
  taken(rows.scale);
  taken(rows.zero_point);
  rows.size[0] = indices.numel();
  std::vector<int64_t> shape = indices.sizes().vec();
  shape.push_back(weight_shape()[1]);
  return dequantized(rows, float_dtype()).reshape(shape);
}

std::vector<at::Tensor> lora_parameters(const torch::nn::Module& module) {
  std::vector<at::Tensor> parameters;
  for (const auto& child : module.modules()) {
    if (const auto* layer = dynamic_cast<const LoraLinearImpl*>(child.get())) {
      parameters.push_back(layer->lora_a);
      parameters.push_back(layer->lora_b);
    }
  }
  return parameters;
}

std::vector<at::Tensor> freeze_but_lora(torch::nn::Module& module) {
  std::vector<at::Tensor> parameters = lora_parameters(module);
  TORCH_CHECK_VALUE(!parameters.empty(), "freeze_but_lora: expected a module with a LoraLinear, got none");
  for (at::Tensor& parameter : module.parameters()) parameter.requires_grad_(false);
  for (at::Tensor& parameter : parameters) parameter.requires_grad_(true);
  return parameters;
}

LoraAdapter lora_adapter(const torch::nn::Module& module) {
  const auto layers = lora_layers(module);
  TORCH_CHECK_VALUE(!layers.empty(), "lora_adapter: expected a module with a LoraLinear, got none");
  const auto copy = [](const at::Tensor& tensor) { return tensor.detach().to(at::kCPU).clone(); };
  LoraAdapter adapter;
  const FourBitSpec& first = *layers.begin()->second->recipe().scheme_as<FourBitSpec>();
  adapter.r = first.lora_rank;
  adapter.lora_alpha = first.lora_alpha;
  adapter.lora_dropout = first.lora_dropout;
  std::set<std::string> targets;
  for (const auto& [name, layer] : layers) {
    const FourBitSpec& spec = *layer->recipe().scheme_as<FourBitSpec>();
    TORCH_CHECK_VALUE(spec.lora_alpha == adapter.lora_alpha, "lora_adapter: expected one lora_alpha, got ",
                      adapter.lora_alpha, " and, of '", name, "', ", spec.lora_alpha);
    adapter.layers[name] = {copy(layer->lora_a), copy(layer->lora_b)};
    targets.insert(name);
  }
  const std::vector<std::string> names(targets.begin(), targets.end());
  adapter.target_modules = suffixes(module, targets);
  if (adapter.target_modules == names && has_paths(module)) {
    // A name in PEFT's list also means the modules whose paths end so; a pattern means what it says.
    adapter.target_modules.clear();
    for (const std::string& name : names) {
      if (!adapter.target_pattern.empty()) adapter.target_pattern += "|";
      for (const char c : name) adapter.target_pattern += c == '.' ? "\\." : std::string(1, c);
    }
  }
  std::set<std::string> saved;
  for (const auto& [name, tensor] : others_trained(module)) {
    adapter.others[name] = copy(tensor);
    if (const size_t dot = name.rfind('.'); dot != std::string::npos) saved.insert(name.substr(0, dot));
  }
  adapter.modules_to_save = suffixes(module, saved);
  return adapter;
}

void set_lora_adapter(torch::nn::Module& module, const LoraAdapter& adapter) {
  const auto layers = lora_layers(module);
  std::vector<std::pair<at::Tensor, at::Tensor>> copies;
  const auto add = [&copies](const std::string& name, const at::Tensor& to, const at::Tensor& from) {
    TORCH_CHECK_VALUE(to.sizes() == from.sizes(), "set_lora_adapter: expected ", name, " of shape ", to.sizes(),
                      ", got ", from.sizes());
    copies.emplace_back(to, from);
  };
  for (const auto& [name, given] : adapter.layers) {
    const auto found = layers.find(name);
    TORCH_CHECK_VALUE(found != layers.end(),
                      "set_lora_adapter: expected a LoraLinear for every layer of the adapter, got"
                      " none for '",
                      name, "'");
    add("lora_a of '" + name + "'", found->second->lora_a, given.a);
    add("lora_b of '" + name + "'", found->second->lora_b, given.b);
    const double ours = found->second->scaling(), theirs = adapter.scaling(name);
    TORCH_CHECK_VALUE(std::abs(ours - theirs) <= 1e-6 * std::abs(theirs),
                      "set_lora_adapter: expected the adapter's scaling ", theirs, " at '", name, "' (lora_alpha of ",
                      theirs * static_cast<double>(given.a.size(0)), " in the recipe), got ", ours);
  }
  for (const auto& item : layers) {
    TORCH_CHECK_VALUE(adapter.layers.contains(item.first),
                      "set_lora_adapter: expected a layer of the adapter for every LoraLinear, got none for '",
                      item.first, "'");
  }
  const auto parameters = module.named_parameters();
  for (const auto& [name, given] : adapter.others) {
    const at::Tensor* parameter = parameters.find(name);
    TORCH_CHECK_VALUE(parameter,
                      "set_lora_adapter: expected a parameter of the module for every other tensor of the "
                      "adapter, got none for '",
                      name, "'");
    add("'" + name + "'", *parameter, given);
  }
  const at::NoGradGuard no_grad;
  for (auto& [to, from] : copies) to.copy_(from);
}

MergedModel merged_model(const torch::nn::Module& module, at::ScalarType dtype) {
  MergedModel merged;
  const auto put = [&merged](const std::string& name, const at::Tensor& tensor) {
    if (tensor.defined()) merged.tensors[name] = tensor.detach();
  };
  std::set<std::string> own;  // prefixes of what is merged
  for (const auto& item : module.named_modules("", /*include_self=*/true)) {
    const auto* layer = dynamic_cast<const FourBitModule*>(item.value().get());
    if (!layer || layer->left_float()) continue;
    const std::string prefix = item.key().empty() ? "" : item.key() + ".";
    const auto* lora = dynamic_cast<const LoraLinearImpl*>(layer);
    const FourBitWeight packed = layer->packed_weight();
    MergedWeight result = lora ? lora->merged_weight(dtype) : quantrain::nn::merged_weight(packed, {}, {}, 0.0, dtype);
    put(prefix + "weight", result.weight);
    if (layer->bias.defined()) put(prefix + "bias", layer->bias.to(dtype));
    merged.layers[item.key()] = std::move(result);
    own.insert(prefix);
  }
  const auto rest = [&](const std::string& name, const at::Tensor& tensor) {
    if (!own.contains(name.substr(0, name.rfind('.') + 1))) put(name, tensor);
  };
  for (const auto& item : module.named_parameters()) rest(item.key(), item.value());
  for (const auto& item : module.named_buffers()) rest(item.key(), item.value());
  return merged;
}

}  // namespace quantrain::nn
