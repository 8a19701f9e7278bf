// What the nodes of convolutions share.
#pragma once

#include <ATen/core/Tensor.h>

namespace quantrain {

// With one pixel in a row, channels_last is not a layout that PyTorch's own backward pass takes on the CPU.
inline at::Tensor plain_weight(const at::Tensor& weight) {
  const auto is_one = [&](int64_t dim) { return TORCH_GUARD_OR_FALSE(weight.sym_size(dim).sym_eq(1)); };
  return is_one(2) || is_one(3) ? weight.contiguous() : weight;
}

}  // namespace quantrain
