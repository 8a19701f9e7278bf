// A transformer layer of converted linear layers, as one call.
#pragma once

#include <memory>
#include <vector>

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include "quantrain/nn/layers.h"
#include "quantrain/ops/int8_transformer.h"

namespace quantrain::nn {

// The rows of converted linear layers that read one tensor (queries, keys and values; gate and up) as one product. From
// then on the layers' codes lie in the product's memory, so that no second copy is held. A single layer is taken as it
// is. PtqLinear, and Int8Linear and QuantLinear with integer products. ValueError: a layer that is not converted or has
// no integer products, one whose output is rounded, layers whose input factors, stored scales or outlier columns
// differ.
QUANTRAIN_API Int8TransformerProduct int8_transformer_product(const std::vector<std::shared_ptr<QuantModule>>& layers);

// How converted layers of the recipe multiply: Int8TransformerOptions::product.
QUANTRAIN_API PtqProduct int8_product_options(const Recipe& recipe);

// int8_transformer_layer on buffers, named as Python's WEIGHT_NAMES ("qkv_codes", "norm_1_weight"), without those that
// are absent. Their types stay under to(dtype), but for the norms', which are of input's type or float32. For
// inference.
class QUANTRAIN_API Int8TransformerLayerImpl : public torch::nn::Module {
 public:
  Int8TransformerLayerImpl(const Int8TransformerWeights& weights, Int8TransformerOptions options);

  // input [B, T, C] -> the same shape; with codes for the next layer where it has use for them.
  Int8TransformerResult forward(const at::Tensor& input, const Int8TransformerInputs& inputs = {});

  const Int8TransformerOptions& options() const { return call_.options(); }

  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;

 private:
  Int8TransformerCall call_;  // on the buffers' own tensors
};
TORCH_MODULE(Int8TransformerLayer);

}  // namespace quantrain::nn
