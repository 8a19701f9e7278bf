#include "quantrain/prune/pruner.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <torch/nn/modules/embedding.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include "ops/common/check.h"
#include "quantrain/nn/layers.h"
#include "quantrain/ops/pruning.h"
#include "quantrain/optim/grouped_optimizer.h"

namespace quantrain::prune {
namespace {

constexpr std::string_view kName = "Pruner";

bool below(const std::string& name, const std::string& module) {
  return name == module || (name.size() > module.size() && name.starts_with(module) && name[module.size()] == '.');
}

bool is_embedding(const torch::nn::Module& module) {
  return dynamic_cast<const torch::nn::EmbeddingImpl*>(&module) || dynamic_cast<const nn::QuantEmbeddingImpl*>(&module);
}

int64_t columns_of(const at::Tensor& weight) { return weight.numel() / std::max<int64_t>(weight.size(0), 1); }

// Moments of the parameter's shape.
std::vector<at::Tensor> moments_of(torch::optim::OptimizerParamState& state) {
  std::vector<at::Tensor> moments;
  const auto add = [&](const at::Tensor& moment) {
    if (moment.defined()) moments.push_back(moment);
  };
  if (auto* sgd = dynamic_cast<torch::optim::SGDParamState*>(&state)) {
    add(sgd->momentum_buffer());
  } else if (auto* adam = dynamic_cast<torch::optim::AdamParamState*>(&state)) {
    add(adam->exp_avg());
    add(adam->exp_avg_sq());
    add(adam->max_exp_avg_sq());
  } else if (auto* adamw = dynamic_cast<torch::optim::AdamWParamState*>(&state)) {
    add(adamw->exp_avg());
    add(adamw->exp_avg_sq());
    add(adamw->max_exp_avg_sq());
  } else if (auto* rmsprop = dynamic_cast<torch::optim::RMSpropParamState*>(&state)) {
    add(rmsprop->square_avg());
    add(rmsprop->momentum_buffer());
    add(rmsprop->grad_avg());
  } else if (auto* adagrad = dynamic_cast<torch::optim::AdagradParamState*>(&state)) {
    add(adagrad->sum());
  } else {
    QUANTRAIN_CHECK_VALUE(false, "{}: expected SGD, Adam, AdamW, RMSprop, Adagrad, FusedAdamW or AdamW8bit, got {}",
                          kName, "an optimizer whose moments are not known");
  }
  return moments;
}

at::Tensor mask_of(const nn::PruneSpec& spec, const at::Tensor& weight, double sparsity, const at::Tensor& input) {
  const std::optional<at::Tensor> norm = input.defined() ? std::optional<at::Tensor>(input) : std::nullopt;
  return prune_mask(weight, norm, sparsity, spec.pattern);
}

}  // namespace

Pruner::Pruner(torch::nn::Module& module, nn::PruneSpec spec, int64_t steps, const std::vector<std::string>& skip,
               const Inputs& inputs)
    : spec_(std::move(spec)), steps_(steps) {
  spec_.validate();
  QUANTRAIN_CHECK_VALUE(steps >= 1, "{}: expected at least one step, got {}", kName, steps);
  const auto modules = module.named_modules("", /*include_self=*/true);
  for (const std::string& name : skip)
    QUANTRAIN_CHECK_VALUE(modules.contains(name), "{}: expected the name of a module in skip, got '{}'", kName, name);
  std::map<std::string, std::shared_ptr<torch::nn::Module>> owners;
  std::string ragged;
  for (const auto& item : modules) {
    const auto parameters = item.value()->named_parameters(/*recurse=*/false);
    const bool skipped =
        std::any_of(skip.begin(), skip.end(), [&](const auto& name) { return below(item.key(), name); });
    if (skipped || is_embedding(*item.value()) || !parameters.contains("weight")) continue;
    const at::Tensor weight = parameters["weight"];
    if (weight.dim() < 2 || !weight.is_floating_point()) continue;
    const size_t colon = spec_.pattern.find(':');
    if (colon != std::string::npos && columns_of(weight) % std::stoll(spec_.pattern.substr(colon + 1)) != 0)
      ragged += fmt::format("{}{} ({} columns)", ragged.empty() ? "" : ", ", item.key(), columns_of(weight));
    const bool once = spec_.schedule == nn::PruneSchedule::kOneShot;
    QUANTRAIN_CHECK_VALUE(!spec_.needs_batches() || !once || inputs.contains(item.key()),
                          "{}: expected inputs of layer '{}' for score {}, got none", kName, item.key(),
                          name_of(spec_.score));
    weights_[item.key()] = weight;
    owners[item.key()] = item.value();
  }
  QUANTRAIN_CHECK_VALUE(!weights_.empty(), "{}: expected a module with weights of two or more dimensions, got none",
                        kName);
  QUANTRAIN_CHECK_VALUE(ragged.empty(), "{}: expected columns in groups for pattern {}, got {}", kName, spec_.pattern,
                        ragged);
  for (const auto& [name, weight] : weights_) {
    const auto buffers = owners[name]->named_buffers(/*recurse=*/false);
    const int64_t bytes = (weight.numel() + 7) / 8;
    if (buffers.contains("weight_mask")) {
      masks_[name] = buffers["weight_mask"];
      QUANTRAIN_CHECK_VALUE(masks_[name].numel() == bytes && masks_[name].scalar_type() == at::kByte,
                            "{}: expected a mask of {} bytes at layer '{}', got {}", kName, bytes, name,
                            detail::shape_text(masks_[name]));
    } else {
      const at::Tensor all = at::full({weight.numel()}, true, weight.options().dtype(at::kBool).requires_grad(false));
      masks_[name] = pack_mask(all);
    }
  }
  if (spec_.schedule == nn::PruneSchedule::kOneShot) renew(spec_.sparsity, inputs);
  for (const auto& [name, mask] : masks_)
    if (!owners[name]->named_buffers(/*recurse=*/false).contains("weight_mask"))
      owners[name]->register_buffer("weight_mask", mask);
}

void Pruner::renew(double sparsity, const Inputs& inputs) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> weights;
  for (const auto& [name, weight] : weights_) weights.push_back(weight);
  std::vector<at::Tensor> made;
  if (spec_.scope == nn::PruneScope::kGlobal) {
    made = prune_masks(weights, sparsity);
  } else if (spec_.score == nn::PruneScore::kSparseGpt) {
    for (const auto& [name, weight] : weights_) {
      const at::Tensor matrix = weight.reshape({weight.size(0), -1});
      auto [kept, mask] = sparsegpt_prune(matrix, inputs.at(name), {sparsity, spec_.pattern});
      weight.detach().copy_(kept.view(weight.sizes()));
      made.push_back(mask);
    }
  } else {
    for (const auto& [name, weight] : weights_) {
      const auto found = inputs.find(name);
      QUANTRAIN_CHECK_VALUE(!spec_.needs_batches() || found != inputs.end(),
                            "{}: expected inputs of layer '{}' for score {}, got none", kName, name,
                            name_of(spec_.score));
      made.push_back(mask_of(spec_, weight, sparsity, spec_.needs_batches() ? found->second : at::Tensor()));
    }
  }
  size_t i = 0;
  std::vector<at::Tensor> masks;
  for (auto& [name, mask] : masks_) {  // in place: an optimizer and a captured graph know where they are
    mask.copy_(made[i++]);
    masks.push_back(mask);
  }
  for (at::Tensor& weight : weights) weight = weight.detach();
  apply_masks_(weights, masks);
}

void Pruner::step(int64_t step, torch::optim::Optimizer& optimizer, const Inputs& inputs) {
  if (spec_.renews_at(step, steps_)) renew(spec_.sparsity_at(step, steps_), inputs);
  keep_zeros(optimizer);
}

void Pruner::keep_zeros(torch::optim::Optimizer& optimizer) {
  const at::NoGradGuard no_grad;
  if (auto* fused = dynamic_cast<optim::GroupedOptimizer*>(&optimizer)) {
    std::vector<at::Tensor> own;
    for (const auto& group : optimizer.param_groups())
      own.insert(own.end(), group.params().begin(), group.params().end());
    for (const auto& [name, weight] : weights_) {
      const bool held = std::any_of(own.begin(), own.end(), [&](const at::Tensor& p) { return p.is_same(weight); });
      if (held) fused->set_mask(weight, masks_.at(name));
    }
    return;
  }
  std::vector<at::Tensor> tensors, masks;
  for (const auto& [name, weight] : weights_) {
    const at::Tensor& mask = masks_.at(name);
    tensors.push_back(weight.detach());
    masks.push_back(mask);
    const auto state = optimizer.state().find(weight.unsafeGetTensorImpl());
    if (state == optimizer.state().end()) continue;
    for (const at::Tensor& moment : moments_of(*state->second)) {
      tensors.push_back(moment);
      masks.push_back(mask);
    }
  }
  apply_masks_(tensors, masks);
}

double Pruner::sparsity() const {
  int64_t kept = 0, all = 0;
  for (const auto& [name, weight] : weights_) {
    kept += unpack_mask(masks_.at(name), {weight.numel()}).sum().item<int64_t>();
    all += weight.numel();
  }
  return 1 - static_cast<double>(kept) / static_cast<double>(all);
}

}  // namespace quantrain::prune
