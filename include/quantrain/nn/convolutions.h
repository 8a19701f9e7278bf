// More quantized layers: Conv1d and ConvTranspose2d. What they share with the others is in layers.h.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <torch/nn/options/conv.h>
#include <torch/nn/pimpl.h>

#include "quantrain/nn/layers.h"
#include "quantrain/nn/recipe.h"
#include "quantrain/ops/export.h"

namespace quantrain::nn {

// 1-D convolution on quantized input and weight; stride, padding ("same" and "valid" too), dilation and groups as
// torch::nn::Conv1d; zero padding only (ValueError otherwise). Input [N, C, L]; weight [O, C / groups, k]. Where the
// recipe has grad_input or grad_weight, its gradients are those of an image of one row (fqt_conv2d). ValueError for a
// recipe of integer products.
class QUANTRAIN_API QuantConv1dImpl : public Copied<QuantConv1dImpl, QuantModule> {
 public:
  QuantConv1dImpl(const torch::nn::Conv1dOptions& options, const Recipe& recipe);
  at::Tensor forward(const at::Tensor& input);

 private:
  friend Copied<QuantConv1dImpl, QuantModule>;
  std::shared_ptr<QuantConv1dImpl> fresh() const { return std::make_shared<QuantConv1dImpl>(options_, recipe()); }
  // [N, O, 1, L]
  at::Tensor convolve(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) const;

  torch::nn::Conv1dOptions options_;
};
TORCH_MODULE(QuantConv1d);

// Transposed 2-D convolution on quantized input and weight; stride, padding, output_padding, dilation and groups as
// torch::nn::ConvTranspose2d. Input [N, C, H, W]; `weight` is [C, O / groups, kh, kw], while scales, codes and
// weight_shape() are those of the weight seen as [O, C / groups, kh, kw], one scale per output channel. ValueError for
// a recipe of integer products, or one that quantizes gradients.
class QUANTRAIN_API QuantConvTranspose2dImpl : public Copied<QuantConvTranspose2dImpl, QuantModule> {
 public:
  QuantConvTranspose2dImpl(const torch::nn::ConvTranspose2dOptions& options, const Recipe& recipe);
  at::Tensor forward(const at::Tensor& input);

 protected:
  at::Tensor float_weight() const override;

 private:
  friend Copied<QuantConvTranspose2dImpl, QuantModule>;
  std::shared_ptr<QuantConvTranspose2dImpl> fresh() const {
    return std::make_shared<QuantConvTranspose2dImpl>(options_, recipe());
  }
  at::Tensor swapped(const at::Tensor& weight) const;  // [C, O / groups, ...] <-> [O, C / groups, ...]

  torch::nn::ConvTranspose2dOptions options_;
};
TORCH_MODULE(QuantConvTranspose2d);

}  // namespace quantrain::nn
