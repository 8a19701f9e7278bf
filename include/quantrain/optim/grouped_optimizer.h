// What the optimizers here share: parameter groups on one device, and a step that takes the loss scale and the overflow
// flag on the device.
#pragma once

#include <torch/optim/optimizer.h>

#include <vector>

#include "quantrain/amp/grad_scaler.h"
#include "quantrain/ops/export.h"

namespace quantrain::optim {

class QUANTRAIN_API GroupedOptimizer : public torch::optim::Optimizer, public amp::ScaledOptimizer {
 public:
  at::Tensor step(LossClosure closure = nullptr) override;
  void step_scaled(const at::Tensor& grad_scale, const at::Tensor& found_inf) override;

  // From the next step on what the mask drops of the parameter is 0 after each step, with its moments, whatever the
  // gradient, in the step's own pass. mask: packed as in <quantrain/ops/pruning.h>, on the parameter's device, and read
  // at each step; an undefined one ends it. It is not part of the saved state: masks belong to the model.
  // ValueError where the parameter is not of this optimizer, the mask has another size, or the step takes none.
  void set_mask(const at::Tensor& parameter, const at::Tensor& mask);

 protected:
  using torch::optim::Optimizer::Optimizer;

  std::vector<at::Tensor> all_parameters() const;  // in the order of the groups

  // ValueError naming `optimizer`: no parameter, or several devices.
  void check_parameters(const char* optimizer) const;

  // Of the parameter at that place in all_parameters(); undefined where there is none.
  at::Tensor mask_of(size_t parameter) const { return parameter < masks_.size() ? masks_[parameter] : at::Tensor(); }

  // ValueError naming the optimizer where a step with these options takes no masks.
  virtual void check_takes_masks(size_t group) const = 0;
  virtual void make_states() = 0;  // where there are none yet
  virtual void step_group(size_t group, size_t first_parameter, const at::Tensor& grad_scale,
                          const at::Tensor& found_inf) = 0;

 private:
  std::vector<at::Tensor> masks_;  // empty, or by place in all_parameters()
};

}  // namespace quantrain::optim
