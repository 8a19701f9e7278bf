// Activation checkpointing: the forward pass runs without a graph, and once more in the backward pass.
#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

namespace support {

template <typename Module>
struct Recomputed : torch::autograd::Function<Recomputed<Module>> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, Module* module) {
    ctx->save_for_backward({x});
    ctx->saved_data["module"] = reinterpret_cast<int64_t>(module);
    const at::NoGradGuard no_grad;
    return module->get()->forward(x);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    auto* module = reinterpret_cast<Module*>(ctx->saved_data["module"].toInt());
    const at::Tensor x = ctx->get_saved_variables()[0].detach().requires_grad_();
    const at::AutoGradMode with_grad(true);
    module->get()->forward(x).backward(grads[0]);
    return {x.grad(), at::Tensor()};
  }
};

}  // namespace support
