// What the nodes of several families ask of their tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <functional>
#include <initializer_list>

#include "ops/common/matrix.h"

namespace quantrain {

inline bool needs_grad(const at::Tensor& tensor) { return at::GradMode::is_enabled() && tensor.requires_grad(); }

// A tangent of forward-mode differentiation, whose nested level is always 0.
inline bool has_tangent(const at::Tensor& tensor) { return tensor.defined() && tensor._fw_grad(0).defined(); }

// What custom nodes cannot serve: forward-mode differentiation, and a derivative taken by torch.func.
inline bool is_transformed(const at::Tensor& tensor) {
  return has_tangent(tensor) || tensor.key_set().has(at::DispatchKey::FuncTorchGradWrapper);
}

// Refuses them with a sentence: a node would drop the tangent in silence.
inline void refuse_transforms(const char* op, std::initializer_list<std::reference_wrapper<const at::Tensor>> tensors) {
  for (const at::Tensor& tensor : tensors)
    TORCH_CHECK_NOT_IMPLEMENTED(
        !tensor.defined() || !is_transformed(tensor), op,
        ": expected a derivative in reverse mode (backward, torch.autograd.grad), got forward mode or torch.func");
}

}  // namespace quantrain
