// Layers whose weight is packed in 4 bits, and LoRA beside it (QLoRA, Dettmers et al., arXiv:2305.14314).
//
// Life of a layer: declare it with a recipe of scheme four_bit, load or set its float weight, then convert(). Before,
// `weight` and `bias` are parameters and the layer computes in floating point. After, `weight` is undefined and the
// layer has weight_codes, weight_scale, weight_zero_point (affine), weight_scale_scale and weight_scale_offset
// (compressed scales) as <quantrain/ops/four_bit.h> says, and `bias`: buffers, or under storage "bfloat16" codes, scale
// and zero_point as frozen bfloat16 parameters that are views of their bytes. lora_a and lora_b of a LoraLinear are
// parameters before and after. The names are those of the Python layers.
//
//   quantrain::nn::LoraLinear layer(4096, 4096, quantrain::nn::Recipe::from_name("qlora"));
//   quantrain::nn::convert(*layer);                                   // packs the weight
//   torch::optim::AdamW optimizer(quantrain::nn::lora_parameters(*layer));
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "quantrain/nn/four_bit_formats.h"
#include "quantrain/nn/layers.h"
#include "quantrain/nn/lora_adapter.h"
#include "quantrain/nn/schemes/four_bit.h"
#include "quantrain/ops/export.h"

namespace quantrain::nn {

// The weight [N, K], of float32, float16 or bfloat16, as a recipe of scheme four_bit packs it.
QUANTRAIN_API FourBitWeight pack_four_bit(const at::Tensor& weight, const Recipe& recipe);

// The float weight that it stands for, its columns in the order of the input.
QUANTRAIN_API at::Tensor dequantized(const FourBitWeight& weight, at::ScalarType dtype = at::kFloat);

// A recipe whose layers hold such a weight: format, symmetry and group_size are the weight's. ValueError: blocks or
// values that no recipe can say.
QUANTRAIN_API Recipe recipe_of(const FourBitWeight& weight);

// What becomes of W + scaling B A in 16 (or 32) bits. Errors are Frobenius norms: what rounding to `dtype` changed,
// over the norm of W + scaling B A (weight_error) and over that of scaling B A (update_error; 0 where that is 0). An
// update_error near 1 means that the update is lost to rounding.
struct QUANTRAIN_API MergedWeight {
  at::Tensor weight;
  double weight_error = 0;
  double update_error = 0;
};

// lora_a, lora_b: undefined for a weight without adapter. dtype: float32, float16 or bfloat16.
QUANTRAIN_API MergedWeight merged_weight(const FourBitWeight& weight, const at::Tensor& lora_a,
                                         const at::Tensor& lora_b, double scaling, at::ScalarType dtype);

// What the layers share.
class QUANTRAIN_API FourBitModule : public QuantModule {
 public:
  // Of a converted layer; its tensors share memory with the layer's.
  FourBitWeight packed_weight() const;
  at::Tensor dequantized_weight(std::optional<at::ScalarType> dtype = std::nullopt) const override;

  // Takes a packed weight of the layer's shape, as a file of another library has it, and converts. ValueError: another
  // shape, or a format or block size that the layer's recipe does not say (recipe_of).
  void load_packed(const FourBitWeight& weight);

  at::Tensor weight_scale_scale;   // compressed scales: [ceil(number of scales / 256)]
  at::Tensor weight_scale_offset;  // compressed scales: []
  at::Tensor weight_table;         // of an imported weight: the 16 values, in place of the format's
  at::Tensor weight_permutation;   // of an imported weight: int64 [K], column j multiplies input column permutation[j]

 protected:
  FourBitModule(std::string name, const Recipe& recipe, std::vector<int64_t> weight_shape);
  const FourBitSpec& spec() const;
  void store_codes(bool check_observed) override;
  // Gives a new layer the buffers that this one has, if it is converted: a clone before its values are copied.
  void take_form(FourBitModule& layer) const;

 private:
  std::optional<FourBitWeight> given_;  // what store_codes takes in place of the float weight
};

// y = x W^T + b by linear_4bit. Input [..., in_features] of float32, float16 or bfloat16; differentiable in the input.
class QUANTRAIN_API Linear4bitImpl : public Copied<Linear4bitImpl, FourBitModule> {
 public:
  Linear4bitImpl(int64_t in_features, int64_t out_features, const Recipe& recipe = Recipe::from_name("nf4"))
      : Linear4bitImpl(torch::nn::LinearOptions(in_features, out_features), recipe) {}
  explicit Linear4bitImpl(const torch::nn::LinearOptions& options, const Recipe& recipe = Recipe::from_name("nf4"))
      : Linear4bitImpl("Linear4bit", options, recipe) {}
  virtual at::Tensor forward(const at::Tensor& input);

 protected:
  Linear4bitImpl(const std::string& name, const torch::nn::LinearOptions& options, const Recipe& recipe);
  at::Tensor in_order(const at::Tensor& input) const;  // the columns as the codes have them
  torch::nn::LinearOptions options() const;

 private:
  friend Copied<Linear4bitImpl, FourBitModule>;
  std::shared_ptr<Linear4bitImpl> fresh() const;
};
TORCH_MODULE(Linear4bit);

// y = x W^T + scaling D(x) A^T B^T + b by linear_4bit_lora, scaling = lora_alpha / r, D dropout in training. A [r, K]
// is drawn as torch::nn::Linear's weight, B [N, r] is 0, both float32 until to(dtype) casts them. Only A and B have
// gradients after conversion.
class QUANTRAIN_API LoraLinearImpl : public Copied<LoraLinearImpl, Linear4bitImpl> {
 public:
  LoraLinearImpl(int64_t in_features, int64_t out_features, const Recipe& recipe = Recipe::from_name("qlora"))
      : LoraLinearImpl(torch::nn::LinearOptions(in_features, out_features), recipe) {}
  explicit LoraLinearImpl(const torch::nn::LinearOptions& options, const Recipe& recipe = Recipe::from_name("qlora"));
  at::Tensor forward(const at::Tensor& input) override;

  double scaling() const { return spec().scaling(); }
  void enable_lora(bool on = true) { lora_enabled_ = on; }  // off: the base layer alone
  MergedWeight merged_weight(std::optional<at::ScalarType> dtype = std::nullopt) const;

  at::Tensor lora_a, lora_b;

 private:
  friend Copied<LoraLinearImpl, Linear4bitImpl>;
  std::shared_ptr<LoraLinearImpl> fresh() const;

  bool lora_enabled_ = true;
};
TORCH_MODULE(LoraLinear);

// Rows of a packed table [num_embeddings, embedding_dim]: only those asked for are decoded. Its scales are never
// compressed. ValueError: rows that are no whole blocks; max_norm, scale_grad_by_freq, sparse. No gradient.
class QUANTRAIN_API Embedding4bitImpl : public Copied<Embedding4bitImpl, FourBitModule> {
 public:
  Embedding4bitImpl(int64_t num_embeddings, int64_t embedding_dim, const Recipe& recipe = Recipe::from_name("nf4"))
      : Embedding4bitImpl(torch::nn::EmbeddingOptions(num_embeddings, embedding_dim), recipe) {}
  explicit Embedding4bitImpl(const torch::nn::EmbeddingOptions& options,
                             const Recipe& recipe = Recipe::from_name("nf4"));
  at::Tensor forward(const at::Tensor& indices);

 private:
  friend Copied<Embedding4bitImpl, FourBitModule>;
  std::shared_ptr<Embedding4bitImpl> fresh() const;

  int64_t padding_idx_;
};
TORCH_MODULE(Embedding4bit);

// lora_a and lora_b of every LoraLinear in the module, itself included, in order of registration.
QUANTRAIN_API std::vector<at::Tensor> lora_parameters(const torch::nn::Module& module);

// Leaves lora_a and lora_b alone with requires_grad; returns lora_parameters(module). ValueError: no LoraLinear.
QUANTRAIN_API std::vector<at::Tensor> freeze_but_lora(torch::nn::Module& module);

// The adapter that the module's LoraLinear layers make up, for save_lora_adapter: copies on the CPU. ValueError: no
// LoraLinear, or two of different lora_alpha.
QUANTRAIN_API LoraAdapter lora_adapter(const torch::nn::Module& module);

// Copies an adapter's matrices, and what else it trained, into the module: all or nothing. ValueError: a layer that is
// no LoraLinear of the module, one that the adapter lacks, another rank, shape or scaling.
QUANTRAIN_API void set_lora_adapter(torch::nn::Module& module, const LoraAdapter& adapter);

// The tensors of the float model: of each layer here `weight` in `dtype`, the adapter merged into it, and `bias`; all
// others as they are. errors: layer -> what the merge cost. ValueError: a layer that is not converted.
struct QUANTRAIN_API MergedModel {
  std::map<std::string, at::Tensor> tensors;
  std::map<std::string, MergedWeight> layers;
};
QUANTRAIN_API MergedModel merged_model(const torch::nn::Module& module, at::ScalarType dtype);

}  // namespace quantrain::nn
