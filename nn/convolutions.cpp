#include "quantrain/nn/convolutions.h"

// The forward passes call the same ATen operators in the same order as the Python layers, so that both train alike.

#include <cmath>
#include <variant>

#include <ATen/ops/conv1d.h>
#include <ATen/ops/conv_transpose2d.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/nn/init.h>

#include "nn/layer_arguments.h"
#include "nn/parameters.h"

namespace quantrain::nn {

namespace {

void check_groups(const std::string& name, int64_t groups, int64_t in, int64_t out, bool zeros) {
  TORCH_CHECK_VALUE(groups > 0 && in % groups == 0 && out % groups == 0, name, ": expected groups to divide ", in,
                    " input and ", out, " output channels, got ", groups);
  TORCH_CHECK_VALUE(zeros, name, ": expected padding_mode zeros, got another");
}

std::vector<int64_t> conv1d_shape(const torch::nn::Conv1dOptions& options) {
  check_groups("QuantConv1d", options.groups(), options.in_channels(), options.out_channels(),
               std::holds_alternative<torch::enumtype::kZeros>(options.padding_mode()));
  return {options.out_channels(), options.in_channels() / options.groups(), (*options.kernel_size())[0]};
}

std::vector<int64_t> transposed_shape(const torch::nn::ConvTranspose2dOptions& options) {
  check_groups("QuantConvTranspose2d", options.groups(), options.in_channels(), options.out_channels(),
               std::holds_alternative<torch::enumtype::kZeros>(options.padding_mode()));
  const at::ArrayRef<int64_t> kernel = *options.kernel_size();
  return {options.out_channels(), options.in_channels() / options.groups(), kernel[0], kernel[1]};
}

}  // namespace

QuantConv1dImpl::QuantConv1dImpl(const torch::nn::Conv1dOptions& options, const Recipe& recipe)
    : Copied("QuantConv1d", recipe, conv1d_shape(options), {-1, 1, 1}), options_(options) {
  reset_weight_and_bias(options.bias());
}

at::Tensor QuantConv1dImpl::convolve(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) const {
  const auto* sizes = std::get_if<torch::ExpandingArray<1>>(&options_.padding());
  const char* named = std::holds_alternative<torch::enumtype::kSame>(options_.padding()) ? "same" : "valid";
  if (!quantizes_gradients()) {
    const at::Tensor y =
        sizes ? at::conv1d(input, weight, bias, options_.stride(), *sizes, options_.dilation(), options_.groups())
              : at::conv1d(input, weight, bias, options_.stride(), named, options_.dilation(), options_.groups());
    return y.unsqueeze(-2);
  }
  return conv2d_product(input.unsqueeze(-2), weight.unsqueeze(-2), bias,
                        {{1, (*options_.stride())[0]},
                         sizes ? std::vector<int64_t>{0, (**sizes)[0]} : std::vector<int64_t>(),
                         {1, (*options_.dilation())[0]},
                         sizes ? "" : named,
                         options_.groups()});
}

at::Tensor QuantConv1dImpl::forward(const at::Tensor& input) {
  const at::Tensor x = quantized_input(input);
  if (!converted()) {
    // Shaped as an image, so that a hook sees which rows are samples.
    return quantized_output(watched(convolve(x, quantized_weight(weight), bias)).squeeze(-2));
  }
  const at::Tensor bias_in_dtype = bias.defined() ? bias.to(x.scalar_type()) : bias;
  return quantized_output(convolve(x, dequantized_weight(x.scalar_type()), bias_in_dtype).squeeze(-2));
}

QuantConvTranspose2dImpl::QuantConvTranspose2dImpl(const torch::nn::ConvTranspose2dOptions& options,
                                                   const Recipe& recipe)
    : Copied("QuantConvTranspose2d", recipe, transposed_shape(options), {-1, 1, 1, 1}), options_(options) {
  std::vector<int64_t> shape = weight_shape();
  shape[0] = options.in_channels();
  shape[1] = options.out_channels() / options.groups();
  weight = register_parameter("weight", at::empty(shape, at::kFloat));
  torch::nn::init::kaiming_uniform_(weight, std::sqrt(5.0));
  if (options.bias()) {
    bias = register_parameter("bias", at::empty({options.out_channels()}, at::kFloat));
    const double bound = 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(detail::row_size(shape), 1)));
    torch::nn::init::uniform_(bias, -bound, bound);
  }
}

at::Tensor QuantConvTranspose2dImpl::swapped(const at::Tensor& weight) const {
  return weight.unflatten(0, {options_.groups(), -1}).transpose(1, 2).flatten(0, 1).contiguous();
}

at::Tensor QuantConvTranspose2dImpl::float_weight() const { return swapped(weight); }

at::Tensor QuantConvTranspose2dImpl::forward(const at::Tensor& input) {
  const at::Tensor x = quantized_input(input);
  const at::Tensor rows = converted() ? dequantized_weight(x.scalar_type()) : quantized_weight(float_weight());
  const at::Tensor b = converted() && bias.defined() ? bias.to(x.scalar_type()) : bias;
  const at::Tensor y = at::conv_transpose2d(x, swapped(rows), b, options_.stride(), options_.padding(),
                                            options_.output_padding(), options_.groups(), options_.dilation());
  return quantized_output(converted() ? y : watched(y));
}

}  // namespace quantrain::nn
