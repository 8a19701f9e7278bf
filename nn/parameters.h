// The parameters of a layer with a weight, with the values that PyTorch's layers begin with. Private to the library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <ATen/ops/empty.h>
#include <torch/nn/init.h>
#include <torch/nn/module.h>

namespace quantrain::nn::detail {

// Elements of one index of dimension 0.
inline int64_t row_size(const std::vector<int64_t>& shape) {
  int64_t size = 1;
  for (size_t d = 1; d < shape.size(); ++d) size *= shape[d];
  return size;
}

// Registers them as "weight" and "bias".
inline void register_weight_and_bias(torch::nn::Module& module, const std::vector<int64_t>& weight_shape, bool has_bias,
                                     at::Tensor& weight, at::Tensor& bias) {
  weight = module.register_parameter("weight", at::empty(weight_shape, at::kFloat));
  torch::nn::init::kaiming_uniform_(weight, std::sqrt(5.0));
  if (!has_bias) return;
  bias = module.register_parameter("bias", at::empty({weight_shape[0]}, at::kFloat));
  const double bound = 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(row_size(weight_shape), 1)));
  torch::nn::init::uniform_(bias, -bound, bound);
}

}  // namespace quantrain::nn::detail
