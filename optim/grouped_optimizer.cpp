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

void GroupedOptimizer::set_mask(const at::Tensor& parameter, const at::Tensor& mask) {
  size_t place = 0;
  for (size_t group = 0; group < param_groups_.size(); ++group) {
    for (const at::Tensor& own : param_groups_[group].params()) {
      if (own.is_same(parameter)) {
        if (mask.defined()) {
          check_takes_masks(group);
          detail::check_type("set_mask", "mask", mask, at::kByte, "uint8");
          detail::check_device("set_mask", "mask", mask, parameter, "the parameter's");
          QUANTRAIN_CHECK_VALUE(mask.dim() == 1 && mask.numel() == (parameter.numel() + 7) / 8,
                                "set_mask: expected a mask of {} bytes for a parameter {}, got {}",
                                (parameter.numel() + 7) / 8, detail::shape_text(parameter), detail::shape_text(mask));
        }
        masks_.resize(all_parameters().size());
        masks_[place] = mask;
        return;
      }
      ++place;
    }
  }
  QUANTRAIN_CHECK_VALUE(false, "set_mask: expected a parameter of this optimizer, got another tensor {}",
                        detail::shape_text(parameter));
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
