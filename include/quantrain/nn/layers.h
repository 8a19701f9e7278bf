// Quantized layers: torch::nn layers whose weight, input and output pass a FakeQuantize, and convert in place to stored
// integers.
//
// Life of a layer: declare it with a Recipe, calibrate and train it, then convert(). Before, `weight` and `bias` are
// parameters and the children weight_fake_quant, input_fake_quant and output_fake_quant are those the recipe has.
// After, `weight` is undefined and `weight_codes` a buffer of integers (int8 symmetric, uint8 affine; at most 4 bits:
// uint8, two codes per byte along each flattened row), with buffers `weight_scale` (float32), `weight_zero_point`
// (int32, affine only) and `bias`; dequantized_weight() is the float weight that they stand for. The forward pass
// dequantizes and computes as before, so its output equals the fake-quantized layer's in evaluation mode bit for bit.
// Under a scheme of integer products (Linear layers only) a converted layer multiplies integers instead (int8_mm): the
// same codes, the output within float32 rounding of the sum. It has no gradient, and a NaN that meets a stored input
// scale becomes 0. The names are those of the Python layers.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/nn/module.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/options/conv.h>
#include <torch/nn/options/embedding.h>
#include <torch/nn/options/linear.h>
#include <torch/nn/pimpl.h>

#include "quantrain/nn/calibration.h"
#include "quantrain/nn/fake_quantize.h"
#include "quantrain/nn/recipe.h"
#include "quantrain/ops/export.h"

namespace quantrain::nn {

// What the layers share: the recipe, the fake-quantizers and the conversion. Inputs float32, float16 or bfloat16.
class QUANTRAIN_API QuantModule : public torch::nn::Module, public HasRecipe, public FinishesCalibration {
 public:
  bool has_bias() const { return bias_; }
  const Recipe& recipe() const override { return recipe_; }
  bool converted() const { return converted_; }
  bool left_float() const { return left_float_; }  // by leave_float(): a float layer from then on
  const std::vector<int64_t>& weight_shape() const {
    return weight_shape_;
  }  // of the float weight; codes may be packed

  // Throws ValueError where this layer cannot convert: no weight spec, more than 8 weight bits, already converted, or
  // (check_observed) a scale that was neither observed nor loaded, or a weight with NaN or infinity. Names the layer by
  // its path where Calibration, convert(module) or load_checkpoint has seen it in its model.
  void check_convertible(bool check_observed = true);

  // Makes the layer's quantizers anew for another recipe, before anything is observed. ValueError: a range that was
  // observed or loaded, a converted layer.
  void use_recipe(const Recipe& recipe);

  // Takes over the switches of another, which include whether it is converted: the skeleton of a clone.
  void copy_switches(const QuantModule& other);

  // The path that error messages name, e.g. "layer1.0.conv1"; the quantizers' begin with it.
  void set_label(const std::string& label);

  // The weight as conversion will store it, before quantization: of a folded convolution the folded weight.
  at::Tensor weight_to_quantize() const { return float_weight(); }

  void observe_weight() override;
  void freeze_for_inference() override;

  // Replaces the float weight by its codes, in place, and sets evaluation mode. check_observed = false makes a skeleton
  // to load a converted checkpoint into.
  void convert_(bool check_observed = true);

  // Makes this a float layer again: drops the quantizers and what the recipe says of gradients. What convert(module)
  // does to a layer that no batch reached. ValueError for a converted one.
  void leave_float();

  bool ready();    // whether every scale is observed, loaded or dynamic
  bool dynamic();  // whether every scale is computed from its tensor at each call, so that none needs a batch

  // Converted: (codes - zero_point) * scale in weight_shape(); without `dtype` in the type of the float weight, or that
  // of to() since. Computed at each call. ValueError before conversion, where `weight` is the float weight.
  virtual at::Tensor dequantized_weight(std::optional<at::ScalarType> dtype = std::nullopt) const;

  // As torch::nn::Module::to; codes, scales and a converted bias keep their dtypes.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;

  void pretty_print(std::ostream& stream) const override;

  // Off: gradients are those of the float product, whatever grad_input and grad_weight of the recipe say.
  void enable_gradient_quant(bool on = true) { gradient_quant_enabled_ = on; }

  // On: training keeps tensors as they are, not as codes, and goes operator by operator, so that gradients have
  // gradients (a gradient penalty). Off at first.
  void enable_second_derivatives(bool on = true) { second_derivatives_ = on; }
  bool second_derivatives() const { return second_derivatives_; }

  // Called in each forward pass before conversion with the result of the layer's product, before batch norm and
  // output_fake_quant, and whether its backward pass is that of the float product. An empty function takes the hook
  // away.
  using OutputHook = std::function<void(const at::Tensor& output, bool exact_backward)>;
  void set_output_hook(OutputHook hook) { output_hook_ = std::move(hook); }

  at::Tensor weight;             // float [O, ...], a parameter; converted: undefined
  at::Tensor bias;               // [O] or undefined
  at::Tensor weight_codes;       // converted only: a buffer
  at::Tensor weight_scale;       // converted only: [1], [O, 1, ...] or [O, K / group_size]
  at::Tensor weight_zero_point;  // converted and affine only: as weight_scale
  FakeQuantize weight_fake_quant{nullptr};
  FakeQuantize input_fake_quant{nullptr};
  FakeQuantize output_fake_quant{nullptr};

 protected:
  QuantModule(std::string name, const Recipe& recipe, std::vector<int64_t> weight_shape,
              std::vector<int64_t> token_shape);

  // The weight and bias that conversion stores: those the evaluation forward pass uses, before quantization.
  virtual at::Tensor float_weight() const { return weight; }
  virtual at::Tensor float_bias() const { return bias; }
  virtual void drop_float_children() {}

  // The part of conversion that registers what stands for the float weight.
  virtual void store_codes(bool check_observed);

  void reset_weight_and_bias(bool has_bias);  // torch.nn.Linear's initial distribution
  at::Tensor quantized_weight(const at::Tensor& float_weight, const at::Tensor& zero = {});
  at::Tensor quantized_input(const at::Tensor& input);
  at::Tensor quantized_output(const at::Tensor& output);
  bool multiplies_integers() const {
    return converted_ && recipe_.scheme && recipe_.scheme->integer_products() && input_fake_quant->fake_quant_enabled();
  }
  bool quantizes_gradients() const {
    return gradient_quant_enabled_ && !converted_ && !left_float_ && recipe_.scheme &&
           recipe_.scheme->quantizes_gradients();
  }
  // Whether a node may stand in for the layer's operators.
  bool keeps_codes() const { return !converted_ && weight.requires_grad() && !second_derivatives_; }
  // The products before output_fake_quant: the scheme's where quantizes_gradients(), else the float ones.
  at::Tensor linear_product(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) const;
  at::Tensor conv2d_product(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                            const Conv2dArguments& arguments) const;
  bool is_watched() const { return static_cast<bool>(output_hook_); }
  const at::Tensor& watched(const at::Tensor& output) const {
    if (output_hook_) output_hook_(output, !quantizes_gradients());
    return output;
  }
  at::Tensor unpacked(const at::Tensor& codes) const;  // [rows, ...] packed or not -> [rows, weight_shape[1:]]
  at::ScalarType float_dtype() const {
    return converted_ ? float_dtype_ : weight.scalar_type();
  }  // converted: the dtype it had, or that of to() since

 private:
  void make_fake_quants();

  Recipe recipe_;
  std::string label_;
  std::vector<int64_t> weight_shape_;
  std::vector<int64_t> token_shape_;
  at::ScalarType float_dtype_ = at::kFloat;
  bool bias_ = false;
  bool converted_ = false;
  bool left_float_ = false;
  bool gradient_quant_enabled_ = true;
  bool second_derivatives_ = false;
  OutputHook output_hook_;
};

// y = x W^T + b on quantized x and W. Input [..., in_features], output [..., out_features]. ValueError for a recipe
// with int8, which Int8Linear (int8_linear.h) takes. Where the recipe has grad_input or grad_weight, gradients are
// computed from the quantized gradient of y before output_fake_quant (fqt_linear); convolutions alike. A training step
// is one node, which keeps the input as codes and rounds the weight anew in its backward pass, where the weight has a
// symmetric scale of its own per row or group, and the product is the float one or fqt_linear.
class QUANTRAIN_API QuantLinearImpl : public Copied<QuantLinearImpl, QuantModule> {
 public:
  QuantLinearImpl(int64_t in_features, int64_t out_features, const Recipe& recipe)
      : QuantLinearImpl(torch::nn::LinearOptions(in_features, out_features), recipe) {}
  QuantLinearImpl(const torch::nn::LinearOptions& options, const Recipe& recipe);
  at::Tensor forward(const at::Tensor& input);

  // The two halves of forward: the fake-quantized input, in training with the codes that are kept for the backward pass
  // in its place where it has some (FakeQuantize::of_rows), and what is computed from it. Layers that read one tensor
  // share it, rounded by the first one's input_fake_quant alone; with what lies before it, in one pass:
  //
  //   const Quantized x = q_proj->quantize_input(h, {.function = "rms_norm", .weight = norm, .eps = 1e-5});
  //   const at::Tensor q = q_proj->forward_quantized(x), k = k_proj->forward_quantized(x);
  //
  // Where ranges are stored, theirs have to be one: share_input. Under integer products a converted layer rounds in the
  // product, and quantize_input does not.
  Quantized quantize_input(const at::Tensor& input, const Before& before = {});
  at::Tensor forward_quantized(const Quantized& input);

  // Makes the other's input_fake_quant this layer's: of layers that read one tensor. Files keep every layer's names. In
  // a clone each layer has one of its own again. ValueError: none, another spec, a learned scale, a converted layer.
  void share_input(const QuantLinearImpl& with);

 private:
  friend Copied<QuantLinearImpl, QuantModule>;
  std::shared_ptr<QuantLinearImpl> fresh() const;
  bool has_known_product() const;
  bool runs_as_one_node(const at::Tensor& x) const;
  at::Tensor node_step(const Quantized& input);
};
TORCH_MODULE(QuantLinear);

// 2-D convolution on quantized input and weight; stride, padding ("same" and "valid" too), dilation and groups as
// torch::nn::Conv2d; zero padding only (ValueError otherwise). Input [N, C, H, W]. ValueError for a recipe of integer
// products, as QuantEmbedding.
class QUANTRAIN_API QuantConv2dImpl : public Copied<QuantConv2dImpl, QuantModule> {
 public:
  QuantConv2dImpl(const torch::nn::Conv2dOptions& options, const Recipe& recipe)
      : QuantConv2dImpl("QuantConv2d", options, recipe) {}
  virtual at::Tensor forward(const at::Tensor& input);

  // The two halves of forward: the fake-quantized input, in training with the codes that are kept for the backward pass
  // in its place where it has some (FakeQuantize::with_codes; not with "same" and "valid" padding, nor where gradients
  // are quantized), and what is computed from it, or from one that another layer's call gave.
  Quantized quantize_input(const at::Tensor& input);
  virtual at::Tensor forward_quantized(const Quantized& input);

 protected:
  QuantConv2dImpl(const std::string& name, const torch::nn::Conv2dOptions& options, const Recipe& recipe);
  Conv2dArguments window() const;
  at::Tensor convolve(const Quantized& input, const at::Tensor& weight, const at::Tensor& bias) const;

 private:
  friend Copied<QuantConv2dImpl, QuantModule>;
  std::shared_ptr<QuantConv2dImpl> fresh() const;

 protected:
  torch::nn::Conv2dOptions options_;
};
TORCH_MODULE(QuantConv2d);

// Convolution and batch norm as they will be folded, with the statistics still trained (Jacob et al., arXiv:1712.05877,
// section 3.2; Krishnamoorthi, arXiv:1806.08342, section 3.2.2). With sf = bn.weight / sqrt(bn.running_var + bn.eps)
// per output channel:
//   training    y = bn(conv(x, fake_quantize(W sf)) / sf + b)     (sf = 0 counts as 1)
//   evaluation  y = conv(x, fake_quantize(W sf)) + bn.bias - (bn.running_mean - b) sf
// Conversion stores the folded weight and bias and drops `bn`.
class QUANTRAIN_API QuantConvBn2dImpl : public Copied<QuantConvBn2dImpl, QuantConv2dImpl> {
 public:
  QuantConvBn2dImpl(const torch::nn::Conv2dOptions& options, const Recipe& recipe)
      : QuantConvBn2dImpl(options, recipe, torch::nn::BatchNorm2dOptions(options.out_channels())) {}
  QuantConvBn2dImpl(const torch::nn::Conv2dOptions& options, const Recipe& recipe,
                    const torch::nn::BatchNorm2dOptions& bn_options);
  at::Tensor forward(const at::Tensor& input) override;
  at::Tensor forward_quantized(const Quantized& input) override;

  // activation(y + residual), in the same passes over y in training (batch_norm.h). activation: "identity", "relu",
  // "relu6", "hardswish" or "silu"; residual may be undefined.
  at::Tensor forward_act(const at::Tensor& input, const at::Tensor& residual, const std::string& activation);

  // The same of an input that is fake-quantized already. reader: the input_fake_quant of the layers that read the
  // result and nothing else does. The result is then fake-quantized by it, with codes where it has some, and goes to
  // those layers' forward_quantized or forward_act_quantized:
  //
  //   const Quantized y = conv1->forward_act_quantized(conv1->quantize_input(x), {}, "relu", conv2->input_fake_quant);
  //   return conv2->forward_act_quantized(y, x, "relu").values;
  Quantized forward_act_quantized(const Quantized& input, const at::Tensor& residual = {},
                                  const std::string& activation = "identity", const FakeQuantize& reader = nullptr);

  // bn.num_batches_tracked stays an integer.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  using QuantModule::to;

  torch::nn::BatchNorm2d bn{nullptr};

 protected:
  at::Tensor float_weight() const override;
  at::Tensor float_bias() const override;
  void drop_float_children() override;

 private:
  friend Copied<QuantConvBn2dImpl, QuantConv2dImpl>;
  std::shared_ptr<QuantConvBn2dImpl> fresh() const;
  const at::Tensor& folding_variance() const;
  at::Tensor scale_factor() const;  // sf, [O, 1, 1, 1]
  std::tuple<at::Tensor, at::Tensor> folded_weight();
  bool folds() const;
  bool rounds_channels() const;
  bool learns_channels();
  bool fuses(const at::Tensor& y) const;
  bool runs_as_one_node(const at::Tensor& input, const at::Tensor& residual, const std::string& activation);
  std::vector<int64_t> output_sizes(const at::Tensor& input) const;
  Quantized node_step(const Quantized& input, const at::Tensor& residual, const std::string& activation,
                      FakeQuantize reader);
  Quantized normalized(const at::Tensor& y, const at::Tensor& sf, const at::Tensor& residual,
                       const std::string& activation, FakeQuantize reader);
  at::Tensor move_statistics(const at::Tensor& statistics, const at::Tensor& y, const at::Tensor& sf,
                             const std::string& activation, bool with_range);

  torch::nn::BatchNorm2dOptions bn_options_;
  at::Tensor variance_;  // what the latest forward pass of training folded with
};
TORCH_MODULE(QuantConvBn2d);

// Rows of a quantized table. indices int32 or int64 [...], output [..., embedding_dim]; equal to quantizing the whole
// table and looking up, at the cost of the rows alone. recipe.input does not apply: the input is indices.
class QUANTRAIN_API QuantEmbeddingImpl : public Copied<QuantEmbeddingImpl, QuantModule> {
 public:
  QuantEmbeddingImpl(int64_t num_embeddings, int64_t embedding_dim, const Recipe& recipe)
      : QuantEmbeddingImpl(torch::nn::EmbeddingOptions(num_embeddings, embedding_dim), recipe) {}
  QuantEmbeddingImpl(const torch::nn::EmbeddingOptions& options, const Recipe& recipe);
  at::Tensor forward(const at::Tensor& indices);

 private:
  friend Copied<QuantEmbeddingImpl, QuantModule>;
  std::shared_ptr<QuantEmbeddingImpl> fresh() const;
  at::Tensor quantized_rows(const at::Tensor& indices);

  int64_t padding_idx_;
};
TORCH_MODULE(QuantEmbedding);

// QuantModule::enable_gradient_quant of every quantized layer in the module, itself included.
QUANTRAIN_API void enable_gradient_quant(torch::nn::Module& module, bool on = true);

// Gives the first and the last quantized layer of the module, in the order of registration, their recipe's edge()
// (Recipe::edge_bits), as Python's prepare() does: one call after the model is built, in place of passing recipe.edge()
// to the two. Nothing changes where edge_bits is 0. ValueError: no quantized layer; one of the two that has observed,
// loaded or stored something already.
QUANTRAIN_API void use_edge_recipes(torch::nn::Module& module);

// Converts every quantized layer in the module (held by a shared_ptr, as a module holder does), itself included.
//
// Where some layers have their ranges and others were never reached (heads that no batch used), the others become float
// layers (QuantModule::leave_float) and TORCH_WARN names them; so do those named in `skip`. A file of such a model
// loads after convert(module, false, {those names}). ValueError, with nothing changed, where the module has no
// quantized layer, `skip` names none, no layer that needs ranges has them, or a layer cannot convert
// (QuantModule::check_convertible).
QUANTRAIN_API void convert(torch::nn::Module& module, bool check_observed = true,
                           const std::vector<std::string>& skip = {});

}  // namespace quantrain::nn
