#include "quantrain/optim/fused_adamw.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_sub.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/serialize/archive.h>

#include <map>

#include "ops/common/check.h"
#include "optim/options.h"
#include "quantrain/ops/adamw_8bit.h"

namespace quantrain::optim {
namespace {

using torch::optim::AdamWOptions;
using torch::optim::OptimizerParamGroup;

const AdamWOptions& options_of(const OptimizerParamGroup& group) {
  return static_cast<const AdamWOptions&>(group.options());
}

void check_gradient(const at::Tensor& parameter, c10::Device device) {
  const at::Tensor& grad = parameter.grad();
  QUANTRAIN_CHECK_VALUE(grad.layout() == at::kStrided, "FusedAdamW: expected dense gradients, got layout {}",
                        c10::str(grad.layout()));
  QUANTRAIN_CHECK_VALUE(grad.device() == device, "FusedAdamW: expected gradients on {}, got {}", device.str(),
                        grad.device().str());
}

std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

// What one call of the fused kernel takes: one element type per call.
struct Lists {
  std::vector<at::Tensor> parameters, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps;
};

}  // namespace

FusedAdamW::FusedAdamW(const std::vector<OptimizerParamGroup>& param_groups, const AdamWOptions& defaults)
    : GroupedOptimizer(param_groups, std::make_unique<AdamWOptions>(defaults)) {
  for (const auto& group : param_groups_) check_adamw_options("FusedAdamW", options_of(group));
  check_parameters("FusedAdamW");
  for (const at::Tensor& parameter : all_parameters()) {
    QUANTRAIN_CHECK_VALUE(at::isFloatingType(parameter.scalar_type()),
                          "FusedAdamW: expected floating-point parameters, got {}",
                          c10::toString(parameter.scalar_type()));
  }
}

FusedAdamW::FusedAdamW(std::vector<at::Tensor> parameters, const AdamWOptions& defaults)
    : FusedAdamW(std::vector<OptimizerParamGroup>{OptimizerParamGroup(std::move(parameters))}, defaults) {}

// ---- step -----------------------------------------------------------------------------------------------------------

void FusedAdamW::step_group(size_t group, size_t first_parameter, const at::Tensor& grad_scale,
                            const at::Tensor& found_inf) {
  const auto& parameters = param_groups_[group].params();
  const AdamWOptions& options = options_of(param_groups_[group]);
  std::map<at::ScalarType, Lists> by_type;
  std::vector<size_t> masked;
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (!parameters[i].grad().defined()) continue;
    check_gradient(parameters[i], parameters[i].device());
    if (mask_of(first_parameter + i).defined()) {
      masked.push_back(i);
      continue;
    }
    State& state = states_[first_parameter + i];
    // Of a parameter that had a mask they are float32.
    state.exp_avg = state.exp_avg.to(parameters[i].scalar_type());
    state.exp_avg_sq = state.exp_avg_sq.to(parameters[i].scalar_type());
    Lists& lists = by_type[parameters[i].scalar_type()];
    lists.parameters.push_back(parameters[i]);
    lists.grads.push_back(parameters[i].grad());
    lists.exp_avgs.push_back(state.exp_avg);
    lists.exp_avg_sqs.push_back(state.exp_avg_sq);
    if (options.amsgrad()) lists.max_exp_avg_sqs.push_back(state.max_exp_avg_sq);
    lists.steps.push_back(state.step);
  }
  if (!masked.empty()) step_masked(group, masked, first_parameter, grad_scale, found_inf);
  const auto [beta1, beta2] = options.betas();
  for (auto& [type, lists] : by_type) {
    at::_foreach_add_(lists.steps, 1);
    const auto run = [&](const auto& lr) {
      at::_fused_adamw_(lists.parameters, lists.grads, lists.exp_avgs, lists.exp_avg_sqs, lists.max_exp_avg_sqs,
                        lists.steps, lr, beta1, beta2, options.weight_decay(), options.eps(), options.amsgrad(),
                        /*maximize=*/false, optional(grad_scale), optional(found_inf));
    };
    if (lr_.defined())
      run(lr_);
    else
      run(options.lr());
    // PyTorch's operator leaves the versions alone; what is kept of a parameter (include/quantrain/nn/int8_linear.h)
    // would seem current.
    for (const at::Tensor& parameter : lists.parameters) parameter.unsafeGetTensorImpl()->bump_version();
    // A step that the device skips does not count.
    if (found_inf.defined())
      at::_foreach_sub_(lists.steps, std::vector<at::Tensor>(lists.steps.size(), found_inf.reshape({})));
  }
}

void FusedAdamW::check_takes_masks(size_t group) const {
  QUANTRAIN_CHECK_VALUE(!options_of(param_groups_[group]).amsgrad(),
                        "FusedAdamW.set_mask: expected options without amsgrad, got {}", "amsgrad");
}

void FusedAdamW::step_masked(size_t group, const std::vector<size_t>& places, size_t first_parameter,
                             const at::Tensor& grad_scale, const at::Tensor& found_inf) {
  const auto& parameters = param_groups_[group].params();
  const AdamWOptions& options = options_of(param_groups_[group]);
  const auto floats = parameters[0].options().dtype(at::kFloat).requires_grad(false);
  const at::Tensor no_scale = at::empty({0}, floats);
  AdamW8bitTensors tensors;
  for (const size_t i : places) {
    State& state = states_[first_parameter + i];
    state.exp_avg = state.exp_avg.to(at::kFloat);
    state.exp_avg_sq = state.exp_avg_sq.to(at::kFloat);
    tensors.params.push_back(parameters[i]);
    tensors.grads.push_back(parameters[i].grad());
    tensors.exp_avg.push_back(state.exp_avg);
    tensors.exp_avg_scale.push_back(no_scale);
    tensors.exp_avg_sq.push_back(state.exp_avg_sq);
    tensors.exp_avg_sq_scale.push_back(no_scale);
    tensors.steps.push_back(state.step);
    tensors.masks.push_back(mask_of(first_parameter + i));
  }
  AdamW8bitArguments arguments;
  arguments.lr = lr_.defined() ? lr_ : at::full({}, options.lr(), floats);
  std::tie(arguments.beta1, arguments.beta2) = options.betas();
  arguments.eps = options.eps();
  arguments.weight_decay = options.weight_decay();
  arguments.grad_scale = optional(grad_scale);
  arguments.found_inf = optional(found_inf);
  adamw_8bit_(tensors, arguments);
}

// ---- learning rate --------------------------------------------------------------------------------------------------

void FusedAdamW::set_lr(double lr) {
  QUANTRAIN_CHECK_VALUE(lr >= 0, "FusedAdamW.set_lr: expected lr >= 0, got {}", lr);
  for (auto& group : param_groups_) group.options().set_lr(lr);
  if (lr_.defined()) lr_.fill_(lr);
}

void FusedAdamW::use_tensor_lr() {
  const double lr = options_of(param_groups_[0]).lr();
  for (const auto& group : param_groups_)
    QUANTRAIN_CHECK_VALUE(options_of(group).lr() == lr,
                          "FusedAdamW.use_tensor_lr: expected one lr for all groups, got {} and {}", lr,
                          options_of(group).lr());
  lr_ = at::full({}, lr, all_parameters()[0].options().dtype(at::kFloat).requires_grad(false));
}

// ---- state ----------------------------------------------------------------------------------------------------------

const std::vector<FusedAdamW::State>& FusedAdamW::state_tensors() {
  if (!states_.empty()) return states_;
  const at::NoGradGuard no_grad;
  for (const auto& group : param_groups_) {
    for (const at::Tensor& parameter : group.params()) {
      State state;
      state.exp_avg = at::zeros_like(parameter, at::MemoryFormat::Preserve);
      state.exp_avg_sq = at::zeros_like(parameter, at::MemoryFormat::Preserve);
      if (options_of(group).amsgrad()) state.max_exp_avg_sq = at::zeros_like(parameter, at::MemoryFormat::Preserve);
      state.step = at::zeros({}, parameter.options().dtype(at::kFloat).requires_grad(false));
      states_.push_back(std::move(state));
    }
  }
  return states_;
}

void FusedAdamW::load_state_(const std::vector<State>& states) {
  const at::NoGradGuard no_grad;
  state_tensors();
  QUANTRAIN_CHECK_VALUE(states.size() == states_.size(),
                        "FusedAdamW.load_state_: expected the state of {} parameters, got {}", states_.size(),
                        states.size());
  const auto check = [](const char* name, size_t i, const at::Tensor& own, const at::Tensor& other) {
    QUANTRAIN_CHECK_VALUE(own.defined() == other.defined() && (!own.defined() || own.sizes() == other.sizes()),
                          "FusedAdamW.load_state_: expected {} of parameter {} to have shape {}, got {}", name, i,
                          own.defined() ? detail::shape_text(own) : "none",
                          other.defined() ? detail::shape_text(other) : "none");
  };
  for (size_t i = 0; i < states.size(); ++i) {
    check("exp_avg", i, states_[i].exp_avg, states[i].exp_avg);
    check("exp_avg_sq", i, states_[i].exp_avg_sq, states[i].exp_avg_sq);
    check("max_exp_avg_sq", i, states_[i].max_exp_avg_sq, states[i].max_exp_avg_sq);
    check("step", i, states_[i].step, states[i].step);
  }
  for (size_t i = 0; i < states.size(); ++i) {
    states_[i].exp_avg.copy_(states[i].exp_avg);
    states_[i].exp_avg_sq.copy_(states[i].exp_avg_sq);
    if (states_[i].max_exp_avg_sq.defined()) states_[i].max_exp_avg_sq.copy_(states[i].max_exp_avg_sq);
    states_[i].step.copy_(states[i].step);
  }
}

void FusedAdamW::save(torch::serialize::OutputArchive& archive) const {
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    torch::serialize::OutputArchive options(archive.compilation_unit());
    options_of(param_groups_[g]).serialize(options);
    archive.write("options/" + std::to_string(g), options);
  }
  for (size_t i = 0; i < states_.size(); ++i) {
    const std::string prefix = "state/" + std::to_string(i) + "/";
    archive.write(prefix + "exp_avg", states_[i].exp_avg);
    archive.write(prefix + "exp_avg_sq", states_[i].exp_avg_sq);
    if (states_[i].max_exp_avg_sq.defined()) archive.write(prefix + "max_exp_avg_sq", states_[i].max_exp_avg_sq);
    archive.write(prefix + "step", states_[i].step);
  }
}

void FusedAdamW::load(torch::serialize::InputArchive& archive) {
  std::vector<State> states;
  for (size_t i = 0; i < all_parameters().size(); ++i) {
    const std::string prefix = "state/" + std::to_string(i) + "/";
    State state;
    if (!archive.try_read(prefix + "exp_avg", state.exp_avg)) break;
    archive.read(prefix + "exp_avg_sq", state.exp_avg_sq);
    archive.try_read(prefix + "max_exp_avg_sq", state.max_exp_avg_sq);
    archive.read(prefix + "step", state.step);
    states.push_back(std::move(state));
  }
  if (!states.empty()) load_state_(states);
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    torch::serialize::InputArchive options;
    archive.read("options/" + std::to_string(g), options);
    param_groups_[g].options().serialize(options);
  }
  if (lr_.defined()) set_lr(options_of(param_groups_[0]).lr());
}

}  // namespace quantrain::optim
