#include "quantrain/amp/grad_scaler.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_amp_foreach_non_finite_check_and_unscale.h>
#include <ATen/ops/_amp_update_scale.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "ops/amp.h"
#include "ops/common/check.h"

namespace quantrain::amp {
namespace {

void check_options(const GradScalerOptions& options) {
  QUANTRAIN_CHECK_VALUE(options.init_scale > 0.0 && std::isfinite(options.init_scale),
                        "GradScaler: expected a positive, finite init_scale, got {}", options.init_scale);
  QUANTRAIN_CHECK_VALUE(options.growth_factor > 1.0, "GradScaler: expected growth_factor > 1, got {}",
                        options.growth_factor);
  QUANTRAIN_CHECK_VALUE(options.backoff_factor > 0.0 && options.backoff_factor < 1.0,
                        "GradScaler: expected backoff_factor in (0, 1), got {}", options.backoff_factor);
  QUANTRAIN_CHECK_VALUE(options.growth_interval > 0, "GradScaler: expected growth_interval > 0, got {}",
                        options.growth_interval);
}

OptimizerView view_of(torch::optim::Optimizer& optimizer) {
  OptimizerView view;
  view.id = &optimizer;
  view.parameters = [&optimizer] {
    std::vector<at::Tensor> parameters;
    for (auto& group : optimizer.param_groups())
      parameters.insert(parameters.end(), group.params().begin(), group.params().end());
    return parameters;
  };
  view.step = [&optimizer] { optimizer.step(); };
  if (auto* scaled = dynamic_cast<ScaledOptimizer*>(&optimizer))
    view.step_scaled = [scaled](const at::Tensor& grad_scale, const at::Tensor& found_inf) {
      scaled->step_scaled(grad_scale, found_inf);
    };
  return view;
}

}  // namespace

// The gradients of an optimizer's parameters; of sparse ones the values, coalesced.
struct GradScaler::Gradients {
  std::vector<at::Tensor> values;
  std::vector<const void*> parameters;

  Gradients(const OptimizerView& optimizer, const at::Tensor& scale, const char* method, bool allow_half) {
    const std::vector<at::Tensor> all = optimizer.parameters();
    for (const at::Tensor& parameter : all) check(parameter.grad(), scale, method, allow_half);
    for (const at::Tensor& parameter : all) {
      at::Tensor grad = parameter.grad();
      if (!grad.defined()) continue;
      if (grad.is_sparse()) {
        grad = grad.coalesce();
        parameter.mutable_grad() = grad;
        grad = grad._values();
      }
      values.push_back(grad);
      parameters.push_back(parameter.unsafeGetTensorImpl());
    }
  }

 private:
  // All of them before the first is touched.
  static void check(const at::Tensor& grad, const at::Tensor& scale, const char* method, bool allow_half) {
    if (!grad.defined()) return;
    const auto type = grad.scalar_type();
    QUANTRAIN_CHECK_TYPE(at::isFloatingType(type), "GradScaler.{}: expected floating-point gradients, got {}", method,
                         c10::toString(type));
    QUANTRAIN_CHECK_VALUE(allow_half || type != at::kHalf,
                          "GradScaler.{}: expected gradients of float32 or bfloat16, got float16: unscaled they would "
                          "underflow; keep the model in float32 under autocast, or step float32 MasterWeights",
                          method);
    QUANTRAIN_CHECK_TYPE(
        grad.device() == scale.device(),
        "GradScaler.{}: expected every gradient on {}, where the loss was scaled, got one on {}; use a "
        "scaler for each device",
        method, scale.device().str(), grad.device().str());
  }
};

GradScaler::GradScaler(const GradScalerOptions& options) : options_(options), initial_scale_(options.init_scale) {
  if (options.enabled) check_options(options);
}

// ---- scale ----------------------------------------------------------------------------------------------------------

at::Tensor GradScaler::scale(const at::Tensor& outputs) {
  if (!options_.enabled) return outputs;
  if (!scale_.defined()) {
    scale_ = at::full({}, initial_scale_, outputs.options().dtype(at::kFloat).requires_grad(false));
    growth_tracker_ = at::full({}, initial_growth_tracker_, scale_.options().dtype(at::kInt));
  }
  return outputs * scale_.to(outputs.device(), scale_.scalar_type(), /*non_blocking=*/true);
}

std::vector<at::Tensor> GradScaler::scale(const std::vector<at::Tensor>& outputs) {
  std::vector<at::Tensor> scaled;
  scaled.reserve(outputs.size());
  for (const at::Tensor& output : outputs) scaled.push_back(scale(output));
  return scaled;
}

void GradScaler::check_scale(const char* method) const {
  TORCH_CHECK(scale_.defined(), "GradScaler.", method,
              ": expected scale(loss) to be called before, got no scale yet: call scaler.scale(loss).backward()");
}

// ---- unscale, check and clip ----------------------------------------------------------------------------------------

GradScaler::PerOptimizer& GradScaler::state_of(const OptimizerView& optimizer, const char* method) {
  check_scale(method);
  PerOptimizer& state = per_optimizer_[optimizer.id];
  TORCH_CHECK(state.stage != Stage::kStepped, "GradScaler.", method,
              ": expected update() between two steps of an optimizer, got a call after its step()");
  return state;
}

void GradScaler::note_found_inf(PerOptimizer& state, at::Tensor found_inf) {
  if (found_inf_hook_) found_inf_hook_(found_inf);
  state.found_inf = std::move(found_inf);
}

// Reads the gradients once; counts overflows on the device, because the host will not learn of them.
void GradScaler::check_gradients(PerOptimizer& state, const Gradients& gradients, std::optional<double> max_norm,
                                 at::Tensor* norm) {
  detail::NormCheck check = detail::amp_check_norm(gradients.values, scale_, max_norm);
  Overflows& overflows = overflows_of(gradients);
  overflows.count.add_(check.non_finite);
  overflows.first.add_(overflows.count.eq(0));
  if (norm) *norm = check.norm;
  state.grad_scale = check.grad_scale;
  note_found_inf(state, check.found_inf);
}

void GradScaler::unscale_(torch::optim::Optimizer& optimizer) { unscale_(view_of(optimizer)); }

void GradScaler::unscale_(const OptimizerView& optimizer) {
  if (!options_.enabled) return;
  const at::NoGradGuard no_grad;
  PerOptimizer& state = state_of(optimizer, "unscale_");
  TORCH_CHECK(state.stage == Stage::kReady && !state.grad_scale.defined(),
              "GradScaler.unscale_: expected one call for an optimizer between two update() calls, got a second "
              "(clip_grad_norm_ unscales too)");
  const Gradients gradients(optimizer, scale_, "unscale_", /*allow_half=*/false);
  state.stage = Stage::kUnscaled;
  if (gradients.values.empty()) return;
  const at::Tensor inv_scale = scale_.to(at::kDouble).reciprocal().to(at::kFloat);
  at::Tensor found_inf = at::zeros({}, scale_.options());
  std::map<at::ScalarType, std::vector<at::Tensor>> by_type;
  for (const at::Tensor& grad : gradients.values) by_type[grad.scalar_type()].push_back(grad);
  for (auto& [type, grads] : by_type) {
    if (type == at::kBFloat16) {  // PyTorch's kernel has no bfloat16 on CUDA
      found_inf.add_(detail::amp_check_norm(grads, scale_).found_inf);
      detail::amp_scale_(grads, scale_);
    } else {
      at::_amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inv_scale);
    }
  }
  note_found_inf(state, found_inf);
}

at::Tensor GradScaler::clip_grad_norm_(torch::optim::Optimizer& optimizer, double max_norm) {
  return clip_grad_norm_(view_of(optimizer), max_norm);
}

at::Tensor GradScaler::clip_grad_norm_(const OptimizerView& optimizer, double max_norm) {
  const at::NoGradGuard no_grad;
  if (!options_.enabled) {
    const std::vector<at::Tensor> parameters = optimizer.parameters();
    const auto with_grad =
        std::find_if(parameters.begin(), parameters.end(), [](const auto& p) { return p.grad().defined(); });
    if (with_grad == parameters.end()) return at::zeros({}, at::kFloat);
    const at::Tensor one = at::full({}, 1.0, with_grad->grad().options().dtype(at::kFloat).layout(at::kStrided));
    const Gradients gradients(optimizer, one, "clip_grad_norm_", /*allow_half=*/true);
    const detail::NormCheck check = detail::amp_check_norm(gradients.values, one, max_norm);
    detail::amp_scale_(gradients.values, one, check.norm, max_norm);
    return check.norm;
  }
  PerOptimizer& state = state_of(optimizer, "clip_grad_norm_");
  TORCH_CHECK(state.stage == Stage::kReady && !state.grad_scale.defined(),
              "GradScaler.clip_grad_norm_: expected gradients that are still scaled, got an optimizer that unscale_ or "
              "clip_grad_norm_ has been called for; after unscale_ use torch's clip_grad_norm_");
  const bool takes_scale = static_cast<bool>(optimizer.step_scaled);
  const Gradients gradients(optimizer, scale_, "clip_grad_norm_", takes_scale);
  at::Tensor norm = at::zeros({}, scale_.options());
  if (takes_scale) {
    if (!gradients.values.empty()) check_gradients(state, gradients, max_norm, &norm);
    return norm;
  }
  state.stage = Stage::kUnscaled;
  if (gradients.values.empty()) return norm;
  detail::NormCheck check = detail::amp_check_norm(gradients.values, scale_, max_norm);
  detail::amp_scale_(gradients.values, scale_, check.norm, max_norm);
  note_found_inf(state, check.found_inf);
  return check.norm;
}

// ---- step -----------------------------------------------------------------------------------------------------------

bool GradScaler::step(torch::optim::Optimizer& optimizer) { return step(view_of(optimizer)); }

bool GradScaler::step(torch::optim::Optimizer& optimizer, const torch::optim::Optimizer::LossClosure& closure) {
  if (!options_.enabled) {
    optimizer.step(closure);
    return true;
  }
  TORCH_CHECK(!closure,
              "GradScaler.step: expected no closure while the scaler is enabled, got one: its loss and gradients would "
              "not be scaled");
  return step(view_of(optimizer));
}

bool GradScaler::step(const OptimizerView& optimizer) {
  if (!options_.enabled) {
    optimizer.step();
    return true;
  }
  PerOptimizer& state = state_of(optimizer, "step");
  constexpr const char* kNoGradients =
      "GradScaler.step: expected an optimizer with gradients, got none: call scaler.scale(loss).backward() before";
  if (optimizer.step_scaled) {
    if (state.stage == Stage::kReady && !state.found_inf.defined()) {
      const at::NoGradGuard no_grad;
      const Gradients gradients(optimizer, scale_, "step", /*allow_half=*/true);
      TORCH_CHECK(!gradients.values.empty(), kNoGradients);
      check_gradients(state, gradients, std::nullopt, nullptr);
    }
    TORCH_CHECK(state.found_inf.defined(), kNoGradients);
    optimizer.step_scaled(state.grad_scale, state.found_inf);  // after unscale_, no scale is left to divide by
    state.stage = Stage::kStepped;
    return true;
  }
  TORCH_CHECK(
      !options_.capturable,
      "GradScaler.step: expected an optimizer that takes the scale in capturable mode (FusedAdamW, or in Python one "
      "with fused=True), got another: whether it steps would have to be decided on the host");
  if (state.stage == Stage::kReady) unscale_(optimizer);
  TORCH_CHECK(state.found_inf.defined(), kNoGradients);
  const bool overflowed = overflowed_on_host(state);
  if (overflowed) {
    const at::NoGradGuard no_grad;
    note_overflow_on_host(Gradients(optimizer, scale_, "step", /*allow_half=*/true));
  } else {
    optimizer.step();
  }
  state.stage = Stage::kStepped;
  return !overflowed;
}

// The one synchronization of a step. After an overflow it fetches the scale too, to tell of one that has run out.
bool GradScaler::overflowed_on_host(const PerOptimizer& state) {
  if (!overflowed_last_) return overflowed_last_ = state.found_inf.item<float>() != 0.0f;
  const at::Tensor both = at::stack({state.found_inf.reshape({}), scale_}).cpu();
  const float scale = both.const_data_ptr<float>()[1];
  TORCH_CHECK(
      scale > 0.0f && std::isfinite(scale), "GradScaler.step: expected a positive, finite scale, got ", scale,
      ": gradients overflow whatever the scale is. See overflow_report() for the parameters; lower the learning rate, "
      "look for NaN in the data, and begin again from a good checkpoint with update(new_scale)");
  return overflowed_last_ = both.const_data_ptr<float>()[0] != 0.0f;
}

// ---- overflow report ------------------------------------------------------------------------------------------------

GradScaler::Overflows& GradScaler::overflows_of(const Gradients& gradients) {
  for (Overflows& overflows : overflows_)
    if (overflows.parameters == gradients.parameters) return overflows;
  const auto options = scale_.options().dtype(at::kDouble);
  const auto size = static_cast<int64_t>(gradients.parameters.size());
  overflows_.push_back(
      {gradients.parameters, at::zeros({size}, options), at::full({size}, static_cast<double>(checks_), options)});
  return overflows_.back();
}

void GradScaler::note_overflow_on_host(const Gradients& gradients) {
  std::vector<at::Tensor> values = gradients.values;
  for (at::Tensor& value : values)
    if (value.scalar_type() == at::kDouble) value = value.to(at::kFloat);
  const at::Tensor non_finite = detail::amp_check_norm(values, scale_).non_finite;
  Overflows& overflows = overflows_of(gradients);
  overflows.count.add_(non_finite);
  overflows.first.masked_fill_(overflows.count.le(non_finite), static_cast<double>(checks_));  // count became 1 now
}

std::vector<OverflowRecord> GradScaler::overflow_report(
    const std::vector<std::pair<std::string, at::Tensor>>& named_parameters) const {
  struct Found {
    int64_t count = 0;
    int64_t first = 0;
    int64_t place = 0;
  };
  std::map<const void*, Found> found;
  for (const Overflows& overflows : overflows_) {
    const at::Tensor count = overflows.count.cpu(), first = overflows.first.cpu();
    for (size_t i = 0; i < overflows.parameters.size(); ++i) {
      const auto times = static_cast<int64_t>(count.const_data_ptr<double>()[i]);
      const auto when = static_cast<int64_t>(first.const_data_ptr<double>()[i]);
      if (times == 0) continue;
      Found& entry = found[overflows.parameters[i]];
      entry.first = entry.count == 0 ? when : std::min(entry.first, when);
      entry.count += times;
      entry.place = static_cast<int64_t>(i);
    }
  }
  std::map<const void*, size_t> places;
  for (size_t i = 0; i < named_parameters.size(); ++i) places[named_parameters[i].second.unsafeGetTensorImpl()] = i;
  std::vector<std::pair<int64_t, OverflowRecord>> records;
  for (const auto& [parameter, entry] : found) {
    const auto place = places.find(parameter);
    const bool known = place != places.end();
    records.push_back({known ? static_cast<int64_t>(place->second) : entry.place,
                       {known ? named_parameters[place->second].first : "", entry.count, entry.first}});
  }
  std::sort(records.begin(), records.end(), [](const auto& a, const auto& b) {
    return a.second.first_step != b.second.first_step ? a.second.first_step < b.second.first_step : a.first > b.first;
  });
  std::vector<OverflowRecord> result;
  for (auto& [place, record] : records) result.push_back(std::move(record));
  return result;
}

std::vector<OverflowRecord> GradScaler::overflow_report(const torch::nn::Module& module) const {
  std::vector<std::pair<std::string, at::Tensor>> named;
  for (const auto& item : module.named_parameters()) named.emplace_back(item.key(), item.value());
  return overflow_report(named);
}

// ---- update and state -----------------------------------------------------------------------------------------------

void GradScaler::end_step() {
  per_optimizer_.clear();
  ++checks_;
}

void GradScaler::update() {
  if (!options_.enabled) return;
  const at::NoGradGuard no_grad;
  check_scale("update");
  at::Tensor found_inf;
  for (const auto& [id, state] : per_optimizer_) {
    if (!state.found_inf.defined()) continue;
    found_inf = found_inf.defined() ? found_inf + state.found_inf : state.found_inf;
  }
  TORCH_CHECK(found_inf.defined(),
              "GradScaler.update: expected a step() or unscale_() of an optimizer with gradients before, got none");
  at::_amp_update_scale_(scale_, growth_tracker_, found_inf, options_.growth_factor, options_.backoff_factor,
                         options_.growth_interval);
  end_step();
}

void GradScaler::update(double new_scale) {
  if (!options_.enabled) return;
  check_scale("update");
  QUANTRAIN_CHECK_VALUE(new_scale > 0.0 && std::isfinite(new_scale),
                        "GradScaler.update: expected a positive, finite new_scale, got {}", new_scale);
  scale_.fill_(new_scale);
  overflowed_last_ = false;
  end_step();
}

void GradScaler::update(const at::Tensor& new_scale) {
  if (!options_.enabled) return;
  check_scale("update");
  QUANTRAIN_CHECK_TYPE(new_scale.scalar_type() == at::kFloat && !new_scale.requires_grad(),
                       "GradScaler.update: expected new_scale of float32 without requires_grad, got {}{}",
                       c10::toString(new_scale.scalar_type()), new_scale.requires_grad() ? " with requires_grad" : "");
  QUANTRAIN_CHECK_VALUE(new_scale.numel() == 1, "GradScaler.update: expected new_scale with one element, got shape {}",
                        detail::shape_text(new_scale));
  scale_.copy_(new_scale.reshape({}));
  overflowed_last_ = false;
  end_step();
}

double GradScaler::get_scale() const {
  if (!options_.enabled) return 1.0;
  return scale_.defined() ? scale_.item<float>() : initial_scale_;
}

void GradScaler::set_options(GradScalerOptions options) {
  check_options(options);
  options_ = options;
}

void GradScaler::set_growth_factor(double value) {
  GradScalerOptions options = options_;
  options.growth_factor = value;
  set_options(options);
}

void GradScaler::set_backoff_factor(double value) {
  GradScalerOptions options = options_;
  options.backoff_factor = value;
  set_options(options);
}

void GradScaler::set_growth_interval(int64_t value) {
  GradScalerOptions options = options_;
  options.growth_interval = value;
  set_options(options);
}

GradScalerState GradScaler::state_dict() const {
  TORCH_CHECK(options_.enabled, "GradScaler.state_dict: expected an enabled scaler, got one with enabled = false");
  const int64_t tracker = growth_tracker_.defined() ? growth_tracker_.item<int>() : initial_growth_tracker_;
  return {get_scale(), options_.growth_factor, options_.backoff_factor, options_.growth_interval, tracker};
}

void GradScaler::load_state_dict(const GradScalerState& state) {
  if (!options_.enabled) return;
  GradScalerOptions options = options_;
  options.init_scale = state.scale;
  options.growth_factor = state.growth_factor;
  options.backoff_factor = state.backoff_factor;
  options.growth_interval = state.growth_interval;
  set_options(options);
  initial_scale_ = state.scale;
  initial_growth_tracker_ = state.growth_tracker;
  overflowed_last_ = false;
  if (!scale_.defined()) return;
  scale_.fill_(state.scale);
  growth_tracker_.fill_(state.growth_tracker);
}

}  // namespace quantrain::amp
