#include "quantrain/optim/grouped_optimizer.h"

#include <ATen/core/grad_mode.h>

#include "ops/common/check.h"

namespace quantrain::optim {

at::Tensor GroupedOptimizer::step(LossClosure closure) {
  at::Tensor loss;
  if (closure) {
    const at::AutoGradMode with_grad(true);
    loss = closure();
  }
  step_scaled({}, {});
  return loss;
}

void GroupedOptimizer::step_scaled(const at::Tensor& grad_scale, const at::Tensor& found_inf) {
  const at::NoGradGuard no_grad;
  make_states();
  size_t first_parameter = 0;
  for (size_t group = 0; group < param_groups_.size(); ++group) {
    step_group(group, first_parameter, grad_scale, found_inf);
    first_parameter += param_groups_[group].params().size();
  }
}

std::vector<at::Tensor> GroupedOptimizer::all_parameters() const {
  std::vector<at::Tensor> parameters;
  for (const auto& group : param_groups_)
    parameters.insert(parameters.end(), group.params().begin(), group.params().end());
  return parameters;
}

void GroupedOptimizer::check_parameters(const char* optimizer) const {
  const std::vector<at::Tensor> parameters = all_parameters();
  QUANTRAIN_CHECK_VALUE(!parameters.empty(), "{}: expected at least one parameter, got none", optimizer);
  for (const at::Tensor& parameter : parameters) {
    QUANTRAIN_CHECK_VALUE(parameter.device() == parameters[0].device(),
                          "{}: expected parameters on one device, got {} and {}", optimizer,
                          parameters[0].device().str(), parameter.device().str());
  }
}

}  // namespace quantrain::optim
