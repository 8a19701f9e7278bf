// AdamW (Loshchilov & Hutter, arXiv:1711.05101) whose step is one fused kernel for all parameters, takes the loss scale
// and the overflow flag on the device, and so needs no host synchronization and fits in a CUDA graph.
#pragma once

#include <torch/optim/adamw.h>

#include <vector>

#include "quantrain/ops/export.h"
#include "quantrain/optim/grouped_optimizer.h"

namespace quantrain::optim {

// Parameters of float32, float16 or bfloat16 on one device (CPU or CUDA); dense gradients. The arithmetic is
// torch::_fused_adamw_, as that of Python's torch.optim.AdamW(fused=True): from one state both take the same steps.
//
// lr of every group is read at each step. Under CUDA graph capture a number would be frozen: call use_tensor_lr()
// before the capture, and set_lr() before each replay.
// Parameters with a mask take the step of adamw_8bit_ (ops/adamw_8bit.h) with moments in float32, also those of 16-bit
// parameters, which become so at the first of these steps: the same formula, within a rounding of the other kernel.
// No masks with amsgrad.
//
// Errors: ValueError for parameters or gradients of other types, sparse gradients, or several devices.
class QUANTRAIN_API FusedAdamW : public GroupedOptimizer {
 public:
  explicit FusedAdamW(const std::vector<torch::optim::OptimizerParamGroup>& param_groups,
                      const torch::optim::AdamWOptions& defaults = {});
  explicit FusedAdamW(std::vector<at::Tensor> parameters, const torch::optim::AdamWOptions& defaults = {});

  // The learning rate of every group, also as a float32 tensor on the device where use_tensor_lr() was called.
  void set_lr(double lr);
  void use_tensor_lr();

  // State by parameter, in the order of the groups: exp_avg and exp_avg_sq (of the parameter's shape and type; with
  // amsgrad also max_exp_avg_sq) and step (float32 without dimensions), zero before the first step. load_state_ copies;
  // ValueError where number or shapes differ, with nothing changed.
  struct State {
    at::Tensor exp_avg;
    at::Tensor exp_avg_sq;
    at::Tensor max_exp_avg_sq;  // undefined without amsgrad
    at::Tensor step;
  };
  const std::vector<State>& state_tensors();
  void load_state_(const std::vector<State>& states);

  // As torch::optim's: torch::save(optimizer, path). By place in the groups.
  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

 private:
  void make_states() override { state_tensors(); }
  void check_takes_masks(size_t group) const override;
  void step_masked(size_t group, const std::vector<size_t>& parameters, size_t first_parameter,
                   const at::Tensor& grad_scale, const at::Tensor& found_inf);
  void step_group(size_t group, size_t first_parameter, const at::Tensor& grad_scale,
                  const at::Tensor& found_inf) override;

  std::vector<State> states_;  // empty before first use
  at::Tensor lr_;              // float32 without dimensions; undefined: options().lr() is read
};

}  // namespace quantrain::optim
