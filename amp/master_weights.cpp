#include "quantrain/amp/master_weights.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/empty_like.h>

#include "ops/amp.h"
#include "ops/common/check.h"

namespace quantrain::amp {
namespace {

bool is_half_precision(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
}

}  // namespace

MasterWeights::MasterWeights(std::vector<at::Tensor> model_parameters, bool stochastic_rounding,
                             std::optional<at::Generator> generator)
    : model_(std::move(model_parameters)), stochastic_(stochastic_rounding), generator_(std::move(generator)) {
  const at::NoGradGuard no_grad;
  for (const at::Tensor& parameter : model_) {
    QUANTRAIN_CHECK_VALUE(is_half_precision(parameter) || parameter.scalar_type() == at::kFloat,
                          "MasterWeights: expected parameters of float16, bfloat16 or float32, got {}",
                          c10::toString(parameter.scalar_type()));
    if (is_half_precision(parameter))
      masters_.push_back(parameter.detach().to(at::kFloat).set_requires_grad(parameter.requires_grad()));
    else
      masters_.push_back(parameter);
  }
}

void MasterWeights::copy_gradients_() {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> from, to;
  for (size_t i = 0; i < model_.size(); ++i) {
    if (masters_[i].is_same(model_[i])) continue;
    at::Tensor& grad = model_[i].mutable_grad();
    if (!grad.defined()) {
      masters_[i].mutable_grad().reset();
      continue;
    }
    const at::Tensor source = grad.is_sparse() ? grad.to_dense() : grad;
    at::Tensor& master_grad = masters_[i].mutable_grad();
    if (!master_grad.defined()) master_grad = at::empty_like(masters_[i]);
    from.push_back(source);
    to.push_back(master_grad);
    grad.reset();
  }
  if (!to.empty()) at::_foreach_copy_(to, from);
}

void MasterWeights::write_back_() {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> from, to;
  for (size_t i = 0; i < model_.size(); ++i) {
    if (masters_[i].is_same(model_[i])) continue;
    from.push_back(masters_[i]);
    to.push_back(model_[i]);
  }
  if (to.empty()) return;
  if (stochastic_)
    detail::amp_round_stochastic_(to, from, generator_);
  else
    at::_foreach_copy_(to, from);
}

}  // namespace quantrain::amp
