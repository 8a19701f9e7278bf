// Int8Linear: a Linear layer that trains on int8 matrix products.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <torch/nn/options/linear.h>
#include <torch/nn/pimpl.h>

#include "quantrain/nn/layers.h"
#include "quantrain/nn/recipe.h"
#include "quantrain/ops/export.h"

namespace quantrain::nn {

// y = x W^T + b by int8_linear (<quantrain/ops/int8_linear.h>), as the recipe's Int8Spec says: each of output,
// grad_input and grad_weight in int8 or floating point. Input [..., in_features], output [..., out_features]. `weight`
// and `bias` stay floating point, float32 or 16 bit, and are trained as any other; under autocast the weight is not
// cast. With Int8Spec::simulate the codes are multiplied in float32.
//
// enable_gradient_quant(false): gradients in floating point. enable_fake_quant(*layer, false): all three. Converted, it
// multiplies its stored codes, or under Int8Spec::simulate dequantizes them as QuantLinear does.
//
// ValueError: a recipe without an Int8Spec for training.
class QUANTRAIN_API Int8LinearImpl : public Copied<Int8LinearImpl, QuantModule> {
 public:
  Int8LinearImpl(int64_t in_features, int64_t out_features, const Recipe& recipe = Recipe::from_name("int8-training"))
      : Int8LinearImpl(torch::nn::LinearOptions(in_features, out_features), recipe) {}
  explicit Int8LinearImpl(const torch::nn::LinearOptions& options,
                          const Recipe& recipe = Recipe::from_name("int8-training"));
  at::Tensor forward(const at::Tensor& input);

  // Set by WeightCache.
  void set_cache_weight(bool on);
  bool cache_weight() const { return cache_weight_; }

  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;

 protected:
  void drop_float_children() override { kept_ = {}; }

 private:
  friend Copied<Int8LinearImpl, QuantModule>;
  std::shared_ptr<Int8LinearImpl> fresh() const {
    return std::make_shared<Int8LinearImpl>(
        torch::nn::LinearOptions(weight_shape()[1], weight_shape()[0]).bias(has_bias()), recipe());
  }
  struct WeightCodes {
    at::Tensor codes;
    at::Tensor scale;
    const void* data = nullptr;
    uint32_t version = 0;
  };

  const WeightCodes& kept_codes();

  bool cache_weight_ = false;
  WeightCodes kept_;
};
TORCH_MODULE(Int8Linear);

// While it lives, every Int8Linear in `module`, itself included, keeps its weight's codes from one forward pass to the
// next: make one around the micro-batches of a step with gradient accumulation, and all but the first save the pass
// over the weight. Costs 1 byte per parameter. The weights must not change meanwhile (the optimizers of torch::optim
// write past a tensor's version, so that nothing would be noticed; in-place operators and quantrain::optim::FusedAdamW
// are). Not used while gradients are off or a CUDA graph is captured.
class QUANTRAIN_API WeightCache {
 public:
  explicit WeightCache(torch::nn::Module& module);
  ~WeightCache();
  WeightCache(const WeightCache&) = delete;
  WeightCache& operator=(const WeightCache&) = delete;

 private:
  std::vector<std::shared_ptr<Int8LinearImpl>> layers_;
};

}  // namespace quantrain::nn
