// Gradient checkpointing (Chen et al., arXiv:1604.06174): what a part of a model computes is not kept for the backward
// pass but computed again there, from its input.
#pragma once

#include <functional>
#include <utility>

#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <torch/autograd.h>

namespace example {

using Part = std::function<at::Tensor(const at::Tensor&)>;

namespace detail {

struct Recomputed : torch::CustomClassHolder {
  Part part;
  at::Tensor random_state;  // of the device's default generator before the part, so that dropout draws the same again
};

class RecomputeFunction : public torch::autograd::Function<RecomputeFunction> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& input, const Part& part) {
    auto recomputed = c10::make_intrusive<Recomputed>();
    recomputed->part = part;
    recomputed->random_state = state_of(input.device());
    ctx->saved_data["recomputed"] = at::IValue::make_capsule(recomputed);
    ctx->save_for_backward({input});
    return part(input);  // without gradients: autograd's functions run so
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto recomputed = c10::static_intrusive_pointer_cast<Recomputed>(ctx->saved_data["recomputed"].toCapsule());
    at::Tensor input = ctx->get_saved_variables()[0].detach();
    input.requires_grad_(true);
    at::Tensor output;
    {
      const at::AutoGradMode with_gradients(true);
      const at::Tensor later = state_of(input.device());
      set_state(input.device(), recomputed->random_state);
      output = recomputed->part(input);
      set_state(input.device(), later);
    }
    torch::autograd::backward({output}, {grads[0]});  // adds to the gradients of the part's parameters
    return {input.grad(), {}};
  }

 private:
  static at::Tensor state_of(at::Device device) {
    at::Generator generator = at::globalContext().defaultGenerator(device);
    const std::lock_guard<std::mutex> lock(generator.mutex());
    return generator.get_state();
  }

  static void set_state(at::Device device, const at::Tensor& state) {
    at::Generator generator = at::globalContext().defaultGenerator(device);
    const std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_state(state);
  }
};

}  // namespace detail

// part(input), without keeping what lies between. `part` must still be there in the backward pass. Without gradients
// it is the plain call. The input must require grad, or the part's parameters get none.
inline at::Tensor recompute(const Part& part, const at::Tensor& input) {
  if (!at::GradMode::is_enabled()) return part(input);
  TORCH_CHECK_VALUE(input.requires_grad(), "recompute: expected an input that requires grad, got one that does not");
  return detail::RecomputeFunction::apply(input, part);
}

}  // namespace example
