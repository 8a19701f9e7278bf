// What the nodes of convolutions share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>
#include <torch/csrc/autograd/custom_function.h>

namespace quantrain {

struct Convolution {
  c10::SymIntArrayRef stride, padding, dilation;
  c10::SymInt groups;

  // Under the names of its fields.
  void save(torch::autograd::AutogradContext* ctx) const {
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
  }
};

// With one pixel in a row, channels_last is not a layout that PyTorch's own backward pass takes on the CPU.
inline at::Tensor plain_weight(const at::Tensor& weight) {
  const auto is_one = [&](int64_t dim) { return TORCH_GUARD_OR_FALSE(weight.sym_size(dim).sym_eq(1)); };
  return is_one(2) || is_one(3) ? weight.contiguous() : weight;
}

}  // namespace quantrain
