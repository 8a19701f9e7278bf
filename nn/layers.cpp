#include "quantrain/nn/layers.h"

// The forward passes call the same ATen operators in the same order as the Python layers, so that both train alike.

#include <cmath>
#include <map>
#include <optional>
#include <set>
#include <variant>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include "nn/labels.h"
#include "nn/layer_arguments.h"
#include "nn/parameters.h"
#include "quantrain/ops/fake_quant.h"
#include "quantrain/ops/quant_conv.h"

namespace quantrain::nn {

using detail::defined_or_none;

namespace {

constexpr int64_t kPackedBits = 4;  // codes of at most this many bits are stored two per byte

std::vector<int64_t> conv_weight_shape(const std::string& name, const torch::nn::Conv2dOptions& options) {
  const int64_t groups = options.groups();
  TORCH_CHECK_VALUE(groups > 0 && options.in_channels() % groups == 0 && options.out_channels() % groups == 0, name,
                    ": expected groups to divide ", options.in_channels(), " input and ", options.out_channels(),
                    " output channels, got ", groups);
  TORCH_CHECK_VALUE(std::holds_alternative<torch::enumtype::kZeros>(options.padding_mode()), name,
                    ": expected padding_mode zeros, got another");
  const at::ArrayRef<int64_t> kernel = *options.kernel_size();
  return {options.out_channels(), options.in_channels() / groups, kernel[0], kernel[1]};
}

at::Tensor rows_of(const at::Tensor& table, const at::Tensor& indices) {
  std::vector<int64_t> shape = indices.sizes().vec();
  shape.insert(shape.end(), table.sizes().begin() + 1, table.sizes().end());
  return at::index_select(table, 0, indices.reshape(-1)).reshape(shape);
}

// Rows of a scale (or zero point): as they are where one serves the whole table.
at::Tensor scale_rows_of(const at::Tensor& scale, const at::Tensor& indices) {
  return !scale.defined() || scale.numel() == 1 ? scale : rows_of(scale, indices);
}

}  // namespace

QuantModule::QuantModule(std::string name, const Recipe& recipe, std::vector<int64_t> weight_shape,
                         std::vector<int64_t> token_shape)
    : torch::nn::Module(std::move(name)),
      recipe_(recipe),
      weight_shape_(std::move(weight_shape)),
      token_shape_(std::move(token_shape)) {
  if (recipe_.scheme) recipe_.scheme->check_layer(this->name(), recipe_);
  recipe_.validate();
  make_fake_quants();
}

void QuantModule::make_fake_quants() {
  const auto make = [this](const char* tensor, const std::optional<QuantSpec>& spec, FakeQuantize& member) {
    const std::string key = std::string(tensor) + "_fake_quant";
    if (member) unregister_module(key);
    member = nullptr;
    if (!spec) return;
    const bool per_token = spec->granularity == Granularity::kPerToken;
    member = FakeQuantize(*spec, key == "weight_fake_quant" ? spec->weight_scale_shape(weight_shape_)
                                 : per_token                ? token_shape_
                                                            : std::vector<int64_t>{1});
    member->set_of_weight(key == "weight_fake_quant");
    member->train(is_training());
    register_module(key, member);
  };
  const bool packed = recipe_.scheme && recipe_.scheme->packs_weight();
  make("weight", packed ? std::nullopt : recipe_.weight, weight_fake_quant);
  make("input", recipe_.input, input_fake_quant);
  make("output", recipe_.output, output_fake_quant);
  set_label(label_);
}

void QuantModule::use_recipe(const Recipe& recipe) {
  TORCH_CHECK_VALUE(!converted_, "use_recipe: expected a ", name(), " that is not converted, got a converted one");
  TORCH_CHECK_VALUE(recipe.scheme == recipe_.scheme, "use_recipe: expected a recipe of the same layers as '",
                    recipe_.name, "', got '", recipe.name, "'");
  for (const FakeQuantize& fake_quant : {weight_fake_quant, input_fake_quant, output_fake_quant}) {
    TORCH_CHECK_VALUE(!fake_quant || fake_quant->dynamic() || !FakeQuantize(fake_quant)->has_scale(),
                      "use_recipe: expected a ", name(), " before calibration and training, got one with a range");
  }
  const bool without_input = !recipe_.input;  // an embedding
  recipe_ = recipe;
  recipe_.validate();
  if (without_input) recipe_.input.reset();
  const at::Device device = weight.device();
  make_fake_quants();
  for (FakeQuantize* fake_quant : {&weight_fake_quant, &input_fake_quant, &output_fake_quant}) {
    if (*fake_quant) (*fake_quant)->to(device);
  }
}

void QuantModule::set_label(const std::string& label) {
  label_ = label;
  const std::string path = label.empty() ? "" : label + ".";
  if (weight_fake_quant) weight_fake_quant->set_label(path + "weight_fake_quant");
  if (input_fake_quant) input_fake_quant->set_label(path + "input_fake_quant");
  if (output_fake_quant) output_fake_quant->set_label(path + "output_fake_quant");
}

void QuantModule::copy_switches(const QuantModule& other) {
  gradient_quant_enabled_ = other.gradient_quant_enabled_;
  second_derivatives_ = other.second_derivatives_;
  if (other.left_float_ && !left_float_) leave_float();
  if (other.converted_ && !converted_) convert_(/*check_observed=*/false);
  float_dtype_ = other.float_dtype_;
  set_label(other.label_);
}

void QuantModule::reset_weight_and_bias(bool has_bias) {
  bias_ = has_bias;
  detail::register_weight_and_bias(*this, weight_shape_, has_bias, weight, bias);
}

at::Tensor QuantModule::quantized_weight(const at::Tensor& float_weight, const at::Tensor& zero) {
  if (!weight_fake_quant) return float_weight;
  if (recipe_.scheme && recipe_.scheme->has_weight_rule() && weight_fake_quant->fake_quant_enabled()) {
    const WeightQparams own = recipe_.scheme->weight_qparams(float_weight.detach());
    return quantrain::fake_quantize(float_weight, own.scale, defined_or_none(own.zero_point), own.quant_min,
                                    own.quant_max);
  }
  return weight_fake_quant->forward(float_weight, zero);
}

at::Tensor QuantModule::quantized_input(const at::Tensor& input) {
  return input_fake_quant ? input_fake_quant->forward(input) : input;
}

at::Tensor QuantModule::quantized_output(const at::Tensor& output) {
  return output_fake_quant ? output_fake_quant->forward(output) : output;
}

at::Tensor QuantModule::unpacked(const at::Tensor& codes) const {
  if (recipe_.weight->bits > kPackedBits) {
    return codes;
  }
  std::vector<int64_t> shape = codes.sizes().vec();
  shape.pop_back();
  shape.insert(shape.end(), weight_shape_.begin() + 1, weight_shape_.end());
  return quantrain::unpack_int4(codes, detail::row_size(weight_shape_), recipe_.weight->symmetric).reshape(shape);
}

at::Tensor QuantModule::dequantized_weight(std::optional<at::ScalarType> dtype) const {
  TORCH_CHECK_VALUE(converted_, "dequantized_weight: expected a converted ", name(), ", got one with a float weight");
  return quantrain::dequantize(unpacked(weight_codes), weight_scale, defined_or_none(weight_zero_point),
                               dtype.value_or(float_dtype()));
}

at::Tensor QuantModule::linear_product(const at::Tensor& input, const at::Tensor& weight,
                                       const at::Tensor& bias) const {
  return quantizes_gradients() ? recipe_.scheme->linear(input, weight, bias) : at::linear(input, weight, bias);
}

at::Tensor QuantModule::conv2d_product(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                                       const Conv2dArguments& arguments) const {
  return quantizes_gradients() ? recipe_.scheme->conv2d(input, weight, bias, arguments)
                               : detail::float_conv2d(input, weight, bias, arguments);
}

void QuantModule::check_convertible(bool check_observed) {
  const std::string who = label_.empty() ? name() : "layer '" + label_ + "' (" + name() + ")";
  TORCH_CHECK_VALUE(!converted_, "convert: expected a ", who, " that is not converted yet, got a converted one");
  TORCH_CHECK_VALUE(!left_float_, "convert: expected a quantized ", who, ", got one left in floating point");
  TORCH_CHECK_VALUE(recipe_.weight, "convert: expected a weight spec in the recipe of ", who, ", got none in '",
                    recipe_.name, "'");
  TORCH_CHECK_VALUE(recipe_.weight->bits <= 8, "convert: expected a ", who, " with weight bits of at most 8, got ",
                    recipe_.weight->bits);
  if (!check_observed) return;
  TORCH_CHECK_VALUE(ready(), "convert: expected every scale of ", who,
                    " to be observed or loaded, got none (calibrate, train or load a checkpoint first)");
  const at::NoGradGuard no_grad;
  TORCH_CHECK_VALUE(float_weight().isfinite().all().item<bool>(), "convert: expected finite weights in ", who,
                    ", got NaN or infinity");
}

bool QuantModule::ready() {
  for (FakeQuantize* fake_quant : {&weight_fake_quant, &input_fake_quant, &output_fake_quant}) {
    if (*fake_quant && !(*fake_quant)->has_scale()) return false;
  }
  return true;
}

bool QuantModule::dynamic() {
  for (FakeQuantize* fake_quant : {&weight_fake_quant, &input_fake_quant, &output_fake_quant}) {
    if (*fake_quant && !(*fake_quant)->dynamic()) return false;
  }
  return true;
}

void QuantModule::observe_weight() {
  if (converted_ || !weight_fake_quant || weight_fake_quant->has_scale()) return;
  weight_fake_quant->observe(weight_to_quantize());
}

void QuantModule::freeze_for_inference() {
  if (recipe_.training) return;
  for (const FakeQuantize& item : {weight_fake_quant, input_fake_quant, output_fake_quant}) {
    FakeQuantize fake_quant = item;
    if (!fake_quant || !fake_quant->has_scale()) continue;
    if (fake_quant->of_weight() || !fake_quant->sees_only_zeros()) fake_quant->enable_observer(false);
  }
}

void QuantModule::leave_float() {
  TORCH_CHECK_VALUE(!converted_, "leave_float: expected a ", name(), " that is not converted, got a converted one");
  left_float_ = true;
  const auto drop = [this](const char* key, FakeQuantize& member) {
    if (member) unregister_module(key);
    member = nullptr;
  };
  drop("weight_fake_quant", weight_fake_quant);
  drop("input_fake_quant", input_fake_quant);
  drop("output_fake_quant", output_fake_quant);
}

void QuantModule::convert_(bool check_observed) {
  check_convertible(check_observed);
  const at::NoGradGuard no_grad;
  eval();
  const at::Tensor stored_bias = float_bias();
  store_codes(check_observed);
  float_dtype_ = weight.scalar_type();
  parameters_.erase("weight");
  weight = at::Tensor();
  if (bias.defined()) {
    parameters_.erase("bias");
  }
  bias = at::Tensor();
  if (stored_bias.defined()) {
    bias = register_buffer("bias", stored_bias.detach().clone());
  }
  if (weight_fake_quant) unregister_module("weight_fake_quant");
  weight_fake_quant = nullptr;
  if (input_fake_quant) input_fake_quant->freeze();
  if (output_fake_quant) output_fake_quant->freeze();
  drop_float_children();
  converted_ = true;
}

void QuantModule::store_codes(bool check_observed) {
  const QuantSpec& spec = *recipe_.weight;
  const at::Tensor values = float_weight().detach();
  at::Tensor scale;
  at::Tensor zero_point;
  at::Tensor codes;
  if (check_observed || weight_fake_quant->has_scale()) {
    int64_t quant_min = spec.quant_min(), quant_max = spec.quant_max();
    if (recipe_.scheme && recipe_.scheme->has_weight_rule()) {
      const WeightQparams own = recipe_.scheme->weight_qparams(values);
      scale = own.scale;
      zero_point = own.zero_point;
      quant_min = own.quant_min;
      quant_max = own.quant_max;
    } else {
      std::tie(scale, zero_point) = weight_fake_quant->calculate_qparams(values);
    }
    codes = quantrain::quantize(values, scale, defined_or_none(zero_point), quant_min, quant_max,
                                spec.symmetric ? at::kChar : at::kByte);
  } else {
    scale = at::full_like(weight_fake_quant->scale, std::nan(""));
    zero_point = weight_fake_quant->zero_point;
    codes = at::zeros(weight_shape_, values.options().dtype(spec.symmetric ? at::kChar : at::kByte));
  }
  if (spec.bits <= kPackedBits) {
    codes = quantrain::pack_int4(codes.reshape({weight_shape_[0], -1}));
  }
  weight_codes = register_buffer("weight_codes", codes);
  weight_scale = register_buffer("weight_scale", scale.detach().clone());
  if (!spec.symmetric) {
    weight_zero_point = register_buffer("weight_zero_point", zero_point.clone());
  }
}

void QuantModule::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  if (converted_) {
    to(device, non_blocking);
    to(dtype, non_blocking);
  } else {
    torch::nn::Module::to(device, dtype, non_blocking);
  }
}

void QuantModule::to(torch::Dtype dtype, bool non_blocking) {
  if (!converted_) {
    torch::nn::Module::to(dtype, non_blocking);
  } else if (at::isFloatingType(dtype)) {
    float_dtype_ = dtype;
  }
}

void QuantModule::to(torch::Device device, bool non_blocking) { torch::nn::Module::to(device, non_blocking); }

void QuantModule::pretty_print(std::ostream& stream) const {
  stream << "quantrain::nn::" << name() << "(weight " << at::IntArrayRef(weight_shape_);
  const auto print = [this, &stream](const char* tensor, const std::optional<QuantSpec>& spec) {
    if (!spec || left_float_) return;
    stream << tensor << (spec->symmetric ? "int" : "uint") << spec->bits << ' ' << name_of(spec->granularity) << " ("
           << name_of(spec->observer) << (spec->learnable ? ", learned)" : ")");
  };
  print(" ", recipe_.weight);
  print(", input ", recipe_.input);
  print(", output ", recipe_.output);
  stream << ", recipe " << recipe_.name << (converted_ ? ", converted)" : left_float_ ? ", left float)" : ")");
}

QuantConv2dImpl::QuantConv2dImpl(const std::string& name, const torch::nn::Conv2dOptions& options, const Recipe& recipe)
    : Copied(name, recipe, conv_weight_shape(name, options), {-1, 1, 1, 1}), options_(options) {
  reset_weight_and_bias(options.bias());
}

std::shared_ptr<QuantConv2dImpl> QuantConv2dImpl::fresh() const {
  return std::make_shared<QuantConv2dImpl>(options_, recipe());
}

Conv2dArguments QuantConv2dImpl::window() const {
  const auto sizes = [](const torch::ExpandingArray<2>& array) {
    return std::vector<int64_t>((*array).begin(), (*array).end());
  };
  Conv2dArguments arguments{sizes(options_.stride()), {}, sizes(options_.dilation()), "", options_.groups()};
  if (const auto* padding = std::get_if<torch::ExpandingArray<2>>(&options_.padding())) {
    arguments.padding = sizes(*padding);
  } else {
    arguments.padding_mode = std::holds_alternative<torch::enumtype::kSame>(options_.padding()) ? "same" : "valid";
  }
  return arguments;
}

// The codes are kept in the input's place where the product is the float one.
at::Tensor QuantConv2dImpl::convolve(const Quantized& input, const at::Tensor& weight, const at::Tensor& bias) const {
  const Conv2dArguments window = this->window();
  if (!input.codes.defined() || quantizes_gradients() || !window.padding_mode.empty())
    return conv2d_product(input.values, weight, bias, window);
  return quantrain::quant_conv2d(input.values, input.codes, input.scale, defined_or_none(input.zero_point), weight,
                                 defined_or_none(bias), window.stride, window.padding, window.dilation, window.groups);
}

Quantized QuantConv2dImpl::quantize_input(const at::Tensor& input) {
  if (!input_fake_quant) return {input};
  const bool takes_codes = keeps_codes() && !quantizes_gradients() && window().padding_mode.empty() && input.dim() == 4;
  return takes_codes ? input_fake_quant->with_codes(input) : Quantized{input_fake_quant->forward(input)};
}

at::Tensor QuantConv2dImpl::forward(const at::Tensor& input) { return forward_quantized(quantize_input(input)); }

at::Tensor QuantConv2dImpl::forward_quantized(const Quantized& input) {
  if (!converted()) {
    return quantized_output(watched(convolve(input, quantized_weight(weight), bias)));
  }
  const at::ScalarType type = input.values.scalar_type();
  return quantized_output(convolve(input, dequantized_weight(type), bias.defined() ? bias.to(type) : bias));
}

QuantEmbeddingImpl::QuantEmbeddingImpl(const torch::nn::EmbeddingOptions& options, const Recipe& recipe)
    : Copied("QuantEmbedding",
             [&recipe] {
               Recipe without_input = recipe;
               without_input.input.reset();
               return without_input;
             }(),
             {options.num_embeddings(), options.embedding_dim()}, {1}),
      padding_idx_(options.padding_idx().value_or(-1)) {
  TORCH_CHECK_VALUE(!options.max_norm() && !options.scale_grad_by_freq() && !options.sparse(),
                    "QuantEmbedding: expected no max_norm, scale_grad_by_freq or sparse, got one of them");
  weight = register_parameter("weight", at::empty(weight_shape(), at::kFloat));
  torch::nn::init::normal_(weight);
  if (padding_idx_ >= 0) {
    const at::NoGradGuard no_grad;
    weight[padding_idx_].fill_(0);
  }
}

std::shared_ptr<QuantEmbeddingImpl> QuantEmbeddingImpl::fresh() const {
  torch::nn::EmbeddingOptions options(weight_shape()[0], weight_shape()[1]);
  if (padding_idx_ >= 0) options.padding_idx(padding_idx_);
  return std::make_shared<QuantEmbeddingImpl>(options, recipe());
}

at::Tensor QuantEmbeddingImpl::forward(const at::Tensor& indices) {
  if (!converted()) {
    return quantized_output(quantized_rows(indices));
  }
  const at::Tensor zero_point = scale_rows_of(weight_zero_point, indices);
  return quantized_output(quantrain::dequantize(unpacked(rows_of(weight_codes, indices)),
                                                scale_rows_of(weight_scale, indices), defined_or_none(zero_point),
                                                float_dtype()));
}

at::Tensor QuantEmbeddingImpl::quantized_rows(const at::Tensor& indices) {
  const at::Tensor rows = at::embedding(weight, indices, padding_idx_);
  if (!weight_fake_quant) {
    return rows;
  }
  weight_fake_quant->observe(weight);
  if (!weight_fake_quant->fake_quant_enabled()) {
    return rows;
  }
  // Each row has its own scales, so a dynamic scale of the gathered rows is the table's scale, gathered.
  if (weight_fake_quant->dynamic() && weight_fake_quant->spec().granularity != Granularity::kPerTensor) {
    const QuantSpec& spec = weight_fake_quant->spec();
    std::vector<int64_t> shape = indices.sizes().vec();
    shape.push_back(weight_fake_quant->scale_shape()[1]);
    auto [scale, zero_point] =
        quantrain::choose_qparams(rows.detach(), shape, spec.quant_min(), spec.quant_max(), spec.symmetric);
    return weight_fake_quant->quantize_dequantize(rows, scale, spec.symmetric ? at::Tensor() : zero_point);
  }
  const auto [scale, zero_point] = weight_fake_quant->calculate_qparams(weight);
  return weight_fake_quant->quantize_dequantize(rows, scale_rows_of(scale, indices),
                                                scale_rows_of(zero_point, indices));
}

void enable_gradient_quant(torch::nn::Module& module, bool on) {
  for (const auto& child : module.modules()) {
    if (auto* layer = dynamic_cast<QuantModule*>(child.get())) layer->enable_gradient_quant(on);
  }
}

void use_edge_recipes(torch::nn::Module& module) {
  std::vector<QuantModule*> layers;
  for (const auto& child : module.modules()) {
    if (auto* layer = dynamic_cast<QuantModule*>(child.get())) layers.push_back(layer);
  }
  TORCH_CHECK_VALUE(!layers.empty(), "use_edge_recipes: expected a module with a quantized layer, got none");
  for (QuantModule* layer : {layers.front(), layers.back()}) {
    if (layer->recipe().edge_bits > 0) layer->use_recipe(layer->recipe().edge());
  }
}

namespace detail {

void copy_state(const torch::nn::Module& from, torch::nn::Module& to, const std::optional<torch::Device>& device) {
  const at::NoGradGuard no_grad;
  const auto modules = from.modules();
  for (size_t i = 0; i < modules.size(); ++i) {  // before the tensors: conversion makes parameters buffers
    if (const auto* layer = dynamic_cast<const QuantModule*>(modules[i].get())) {
      dynamic_cast<QuantModule&>(*to.modules()[i]).copy_switches(*layer);
    }
  }
  const auto take = [&device](const at::Tensor& source, at::Tensor& target) {
    target.set_data(source.detach().to(device.value_or(source.device()), source.scalar_type(), /*non_blocking=*/false,
                                       /*copy=*/true));
  };
  const auto parameters = from.named_parameters();
  for (auto& item : to.named_parameters()) {
    take(parameters[item.key()], item.value());
    item.value().set_requires_grad(parameters[item.key()].requires_grad());
  }
  for (size_t i = 0; i < modules.size(); ++i) {  // what pruning registered
    const auto own = modules[i]->named_buffers(/*recurse=*/false);
    const auto* mask = own.find("weight_mask");
    if (mask && !to.modules()[i]->named_buffers(/*recurse=*/false).contains("weight_mask"))
      to.modules()[i]->register_buffer("weight_mask", mask->clone());
  }
  const auto buffers = from.named_buffers();
  for (auto& item : to.named_buffers()) take(buffers[item.key()], item.value());
  const auto copies = to.modules();
  for (size_t i = 0; i < modules.size(); ++i) {
    if (auto* quantizer = copies[i]->as<FakeQuantizeImpl>()) {
      quantizer->copy_switches(*modules[i]->as<FakeQuantizeImpl>());
    }
    if (const auto* calibrates = dynamic_cast<const Calibrates*>(modules[i].get())) {
      dynamic_cast<Calibrates&>(*copies[i]).enable_fake_quant(calibrates->fake_quant_enabled());
    }
  }
  for (size_t i = 0; i < modules.size(); ++i) copies[i]->train(modules[i]->is_training());
}

void label_layers(const torch::nn::Module& module) {
  for (const auto& item : module.named_modules("", /*include_self=*/false)) {
    if (auto* layer = dynamic_cast<QuantModule*>(item.value().get())) layer->set_label(item.key());
  }
}

}  // namespace detail

void convert(torch::nn::Module& module, bool check_observed, const std::vector<std::string>& skip) {
  detail::label_layers(module);
  std::map<std::string, QuantModule*> layers;
  std::set<const QuantModule*> seen;
  bool any = false, ready = false;
  for (const auto& item : module.named_modules("", /*include_self=*/true)) {
    auto* layer = dynamic_cast<QuantModule*>(item.value().get());
    any = any || layer;
    if (layer && !layer->converted() && !layer->left_float() && seen.insert(layer).second) layers[item.key()] = layer;
  }
  TORCH_CHECK_VALUE(any, "convert: expected a module with a quantized layer to convert, got none");
  TORCH_CHECK_VALUE(!layers.empty(),
                    "convert: expected a module with a layer that is not converted yet, got one converted already");
  std::vector<QuantModule*> left;
  for (const std::string& name : skip) {
    const auto found = layers.find(name);
    TORCH_CHECK_VALUE(found != layers.end(), "convert: expected skip to name a layer that is not converted yet, got '",
                      name, "'");
    left.push_back(found->second);
    layers.erase(found);
  }
  for (const auto& item : layers) ready = ready || (item.second->ready() && !item.second->dynamic());
  std::vector<std::string> unreached;
  for (auto item = layers.begin(); check_observed && ready && item != layers.end();) {
    if (item->second->ready()) {
      ++item;
      continue;
    }
    unreached.push_back(item->first);
    left.push_back(item->second);
    item = layers.erase(item);
  }
  for (const auto& item : layers) item.second->check_convertible(check_observed);
  if (!unreached.empty()) {
    TORCH_WARN(detail::listed(unreached, "convert: layers that stay in floating point, as no batch reached them"));
  }
  for (QuantModule* layer : left) layer->leave_float();
  for (const auto& item : layers) item.second->convert_(check_observed);
}

}  // namespace quantrain::nn
