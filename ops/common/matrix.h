// A tensor as a product takes it: of a type, and as rows.
#pragma once

#include <ATen/core/Tensor.h>

namespace quantrain {

// The tensor itself where it has the type: `to` says so too, but at the cost of a call, and not below autograd.
inline at::Tensor in_type(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

// [..., K] as [rows, K].
inline at::Tensor matrix(const at::Tensor& tensor) {
  if (tensor.dim() == 2) return tensor;
  return tensor.dim() == 1 ? tensor.unsqueeze(0) : tensor.flatten(0, -2);
}

}  // namespace quantrain
