#include "quantrain/nn/int8_transformer.h"

#include <array>
#include <string>

#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>

#include "nn/layer_arguments.h"
#include "quantrain/nn/ptq.h"
#include "quantrain/nn/schemes/int8.h"
#include "quantrain/nn/schemes/ptq.h"

namespace quantrain::nn {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr const char* kProduct = "int8_transformer_product";
constexpr std::array kProducts = {"qkv", "out", "up", "down"};
constexpr std::array kProductTensors = {"codes",       "scale",           "bias",          "input_factor",
                                        "input_scale", "outlier_columns", "outlier_codes", "outlier_scale"};
constexpr std::array kNormTensors = {"norm_1_weight", "norm_1_bias", "norm_2_weight", "norm_2_bias"};

Int8TransformerProduct product_of(const QuantModule& layer) {
  TORCH_CHECK_VALUE(layer.converted() && layer.recipe().scheme, kProduct,
                    ": expected converted layers with integer products, got a ", layer.name(), " of recipe '",
                    layer.recipe().name, "'");
  TORCH_CHECK_VALUE(layer.output_fake_quant.is_empty(), kProduct, ": expected layers without a rounded output, got a ",
                    layer.name());
  const OptionalTensor bias = detail::defined_or_none(layer.bias);
  if (const auto* ptq = dynamic_cast<const PtqLinearImpl*>(&layer)) return {ptq->stored_weight(), bias};
  TORCH_CHECK_VALUE(layer.recipe().scheme->integer_products(), kProduct,
                    ": expected layers with integer products, got a ", layer.name(), " of recipe '",
                    layer.recipe().name, "'");
  PtqWeight weight{layer.weight_codes, layer.weight_scale.reshape({-1, 1})};
  if (!layer.input_fake_quant->dynamic()) weight.input_scale = layer.input_fake_quant->scale;
  return {weight, bias};
}

bool same(const OptionalTensor& a, const OptionalTensor& b) {
  return a.has_value() == b.has_value() && (!a || at::equal(*a, *b));
}

// Joined along the rows; the parts become views of the whole.
at::Tensor joined(std::vector<at::Tensor> parts) {
  at::Tensor whole = at::cat(parts);
  int64_t first = 0;
  for (at::Tensor& part : parts) {
    const int64_t rows = part.size(0);
    part.set_data(whole.narrow(0, first, rows));
    first += rows;
  }
  return whole;
}

}  // namespace

PtqProduct int8_product_options(const Recipe& recipe) {
  if (recipe.scheme_as<PtqSpec>()) return ptq_product(recipe);
  return {/*quantize_input=*/true, /*outlier_threshold=*/0, /*capacity=*/0, /*few_rows_float=*/false};
}

Int8TransformerProduct int8_transformer_product(const std::vector<std::shared_ptr<QuantModule>>& layers) {
  TORCH_CHECK_VALUE(!layers.empty(), kProduct, ": expected at least one layer, got none");
  std::vector<Int8TransformerProduct> products;
  for (const auto& layer : layers) products.push_back(product_of(*layer));
  Int8TransformerProduct result = products.front();
  if (products.size() == 1) return result;
  std::vector<at::Tensor> codes, scales, biases, outlier_codes, outlier_scales;
  bool any_bias = false;
  for (const auto& p : products) {
    const PtqWeight &w = p.weight, &first = result.weight;
    TORCH_CHECK_VALUE(same(w.input_factor, first.input_factor) && same(w.input_scale, first.input_scale) &&
                          same(w.outlier_columns, first.outlier_columns),
                      kProduct, ": expected layers of one input factor, input scale and outlier columns, got several");
    TORCH_CHECK_VALUE(w.codes.scalar_type() == first.codes.scalar_type() && w.codes.size(1) == first.codes.size(1) &&
                          w.scale.size(1) == first.scale.size(1),
                      kProduct, ": expected layers of one input and one form, got codes ", first.codes.sizes(), " and ",
                      w.codes.sizes());
    codes.push_back(w.codes);
    scales.push_back(w.scale.expand({w.codes.size(0), -1}));
    any_bias = any_bias || p.bias.has_value();
    biases.push_back(p.bias ? *p.bias : at::zeros({w.codes.size(0)}, w.scale.options()));
    if (w.outlier_codes) outlier_codes.push_back(*w.outlier_codes);
    if (w.outlier_scale) outlier_scales.push_back(*w.outlier_scale);
  }
  result.weight.codes = joined(codes);
  result.weight.scale = at::cat(scales);
  if (any_bias) result.bias = at::cat(biases);
  if (!outlier_codes.empty()) result.weight.outlier_codes = at::cat(outlier_codes);
  if (!outlier_scales.empty()) result.weight.outlier_scale = at::cat(outlier_scales);
  return result;
}

Int8TransformerLayerImpl::Int8TransformerLayerImpl(const Int8TransformerWeights& w, Int8TransformerOptions options)
    : torch::nn::Module("Int8TransformerLayer"), call_(w, std::move(options)) {
  const auto keep = [this](const std::string& name, const OptionalTensor& tensor) {
    if (tensor) register_buffer(name, *tensor);
  };
  const std::array<OptionalTensor, 4> norms = {w.norm_1.weight, w.norm_1.bias, w.norm_2.weight, w.norm_2.bias};
  for (size_t i = 0; i < norms.size(); ++i) keep(kNormTensors[i], norms[i]);
  const std::array products = {&w.qkv, &w.out, &w.up, &w.down};
  for (size_t i = 0; i < products.size(); ++i) {
    const Int8TransformerProduct& p = *products[i];
    const std::array<OptionalTensor, 8> tensors = {p.weight.codes,
                                                   detail::defined_or_none(p.weight.scale),
                                                   p.bias,
                                                   p.weight.input_factor,
                                                   p.weight.input_scale,
                                                   p.weight.outlier_columns,
                                                   p.weight.outlier_codes,
                                                   p.weight.outlier_scale};
    for (size_t j = 0; j < tensors.size(); ++j) keep(std::string(kProducts[i]) + "_" + kProductTensors[j], tensors[j]);
  }
  eval();
}

Int8TransformerResult Int8TransformerLayerImpl::forward(const at::Tensor& input, const Int8TransformerInputs& inputs) {
  return call_.layer(input, inputs);
}

void Int8TransformerLayerImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  to(device, non_blocking);
  to(dtype, non_blocking);
}

void Int8TransformerLayerImpl::to(torch::Dtype dtype, bool non_blocking) {
  for (auto& item : named_buffers(/*recurse=*/false))
    if (item.key().starts_with("norm_")) item.value().set_data(item.value().to(dtype, non_blocking));
}

void Int8TransformerLayerImpl::to(torch::Device device, bool non_blocking) {
  torch::nn::Module::to(device, non_blocking);
}

}  // namespace quantrain::nn
