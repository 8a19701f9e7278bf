// ResNet-20 for small images (He et al., arXiv:1512.03385, section 4.2) of quantized layers: each convolution holds its
// batch norm. The state's names are those of the Python job's model after prepare(), so that checkpoints pass between
// the two.
#pragma once

#include <cstdint>
#include <string>

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/relu.h>
#include <quantrain/nn/layers.h>
#include <torch/nn/init.h>
#include <torch/nn/modules/container/sequential.h>

namespace example {

namespace qnn = quantrain::nn;

inline qnn::QuantConvBn2d conv3x3(int64_t in_planes, int64_t planes, int64_t stride, const qnn::Recipe& recipe) {
  qnn::QuantConvBn2d conv(torch::nn::Conv2dOptions(in_planes, planes, 3).stride(stride).padding(1).bias(false), recipe);
  torch::nn::init::kaiming_normal_(conv->weight);
  return conv;
}

// Two 3x3 convolutions with a shortcut without parameters (option A): with stride 2 it takes every second row and
// column and pads the new channels with zeros, half on either side. [N, in_planes, H, W] -> [N, planes, H / stride, W /
// stride].
class BasicBlockImpl : public torch::nn::Module {
 public:
  BasicBlockImpl(int64_t in_planes, int64_t planes, int64_t stride, const qnn::Recipe& recipe)
      : conv1(register_module("conv1", conv3x3(in_planes, planes, stride, recipe))),
        conv2(register_module("conv2", conv3x3(planes, planes, 1, recipe))),
        stride_(stride),
        extra_planes_(planes - in_planes) {}

  // As Python's block after prepare(fuse=True): the first batch norm's pass also rounds the second convolution's input.
  at::Tensor forward(const at::Tensor& input) {
    const qnn::Quantized inner =
        conv1->forward_act_quantized(conv1->quantize_input(input), {}, "relu", conv2->input_fake_quant);
    return conv2->forward_act_quantized(inner, shortcut(input), "relu").values;
  }

  qnn::QuantConvBn2d conv1;
  qnn::QuantConvBn2d conv2;

 private:
  at::Tensor shortcut(const at::Tensor& input) const {
    if (stride_ == 1 && extra_planes_ == 0) return input;
    const at::Tensor cut = input.slice(2, 0, std::nullopt, stride_).slice(3, 0, std::nullopt, stride_);
    const int64_t before = extra_planes_ / 2;
    return at::constant_pad_nd(cut, {0, 0, 0, 0, before, extra_planes_ - before});
  }

  int64_t stride_;
  int64_t extra_planes_;
};
TORCH_MODULE(BasicBlock);

// [N, in_channels, H, W] with H and W at least 4 -> [N, classes] logits. The first convolution and the last layer take
// the recipe's edge bits.
class ResNet20Impl : public torch::nn::Module {
 public:
  ResNet20Impl(int64_t classes, int64_t in_channels, const qnn::Recipe& recipe)
      : conv1(register_module("conv1", conv3x3(in_channels, 16, 1, recipe.edge()))),
        layer1(register_module("layer1", stage(16, 16, 1, recipe))),
        layer2(register_module("layer2", stage(16, 32, 2, recipe))),
        layer3(register_module("layer3", stage(32, 64, 2, recipe))),
        linear(register_module("linear", qnn::QuantLinear(64, classes, recipe.edge()))) {
    torch::nn::init::kaiming_normal_(linear->weight);
  }

  at::Tensor forward(const at::Tensor& input) {
    at::Tensor out = conv1->forward_act(input, {}, "relu");
    out = layer3->forward(layer2->forward(layer1->forward(out)));
    return linear->forward(at::mean(out, {2, 3}));
  }

  qnn::QuantConvBn2d conv1;
  torch::nn::Sequential layer1;
  torch::nn::Sequential layer2;
  torch::nn::Sequential layer3;
  qnn::QuantLinear linear;

 private:
  static torch::nn::Sequential stage(int64_t in_planes, int64_t planes, int64_t stride, const qnn::Recipe& recipe) {
    return torch::nn::Sequential(BasicBlock(in_planes, planes, stride, recipe), BasicBlock(planes, planes, 1, recipe),
                                 BasicBlock(planes, planes, 1, recipe));
  }
};
TORCH_MODULE(ResNet20);

// Names of the float model, whose batch norms stand beside their convolutions: "conv1.bn.weight" there is "bn1.weight".
// What only a quantized model has (fake-quantizers; activations, fraction lengths and the size of a pool in fixed
// point) gives "".
inline std::string float_name(const std::string& name) {
  for (const char* part : {"_fake_quant.", "activation.", "fraction_length", "mean."}) {
    if (name.find(part) != std::string::npos) return "";
  }
  const size_t at = name.rfind(".bn.");
  if (at == std::string::npos) return name;
  const size_t conv = name.rfind("conv", at);
  return name.substr(0, conv) + "bn" + name.substr(conv + 4, at - conv - 4) + name.substr(at + 3);
}

}  // namespace example
