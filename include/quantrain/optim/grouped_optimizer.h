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

 protected:
  using torch::optim::Optimizer::Optimizer;

  std::vector<at::Tensor> all_parameters() const;  // in the order of the groups

  // ValueError naming `optimizer`: no parameter, or several devices.
  void check_parameters(const char* optimizer) const;

  virtual void make_states() = 0;  // where there are none yet
  virtual void step_group(size_t group, size_t first_parameter, const at::Tensor& grad_scale,
                          const at::Tensor& found_inf) = 0;
};

}  // namespace quantrain::optim
