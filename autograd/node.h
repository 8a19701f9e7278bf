// What the nodes of several families ask of their tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

namespace quantrain {

inline bool needs_grad(const at::Tensor& tensor) { return at::GradMode::is_enabled() && tensor.requires_grad(); }

// [..., K] as [rows, K].
inline at::Tensor matrix(const at::Tensor& tensor) {
  if (tensor.dim() == 2) return tensor;
  return tensor.dim() == 1 ? tensor.unsqueeze(0) : tensor.flatten(0, -2);
}

}  // namespace quantrain
