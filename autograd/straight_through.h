// The straight-through estimator from a mask: what fake_quant and fixed_point share.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>

#include <tuple>

#include "ops/common/dispatch.h"

namespace quantrain {

// grad_output where the mask's bit is set, else 0, with the given strides; differentiable itself, with the same mask.
inline at::Tensor fake_quantize_backward(const at::Tensor& grad_output, const at::Tensor& mask,
                                         c10::SymIntArrayRef stride) {
  static const auto op =
      find_operator<at::Tensor(const at::Tensor&, const at::Tensor&, c10::SymIntArrayRef)>("_fake_quantize_backward");
  return op.call(grad_output, mask, stride);
}

// The same derivative made of PyTorch's own operators, for forward mode and torch.func, which no custom node serves:
// the result is output - (kept - kept), exactly output, with the derivative of kept = input where the mask lets it
// pass. forward() gives output and mask.
template <typename Forward>
at::Tensor straight_through(const at::Tensor& input, const Forward& forward) {
  at::Tensor output, passes;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    at::Tensor mask;
    std::tie(output, mask) = forward();
    passes = fake_quantize_backward(at::ones_like(output), mask, output.sym_strides()).ne(0);
  }
  const at::Tensor kept = at::where(passes, input, 0.0);
  return output.sub(kept.detach().sub(kept));
}

}  // namespace quantrain
