#include "quantrain/nn/observers.h"

// Only nan_policy "raise" waits for the device: the update of the range is an operator without a branch on the data.

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/logical_or.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/serialize/input-archive.h>

#include "quantrain/ops/fake_quant.h"

namespace quantrain::nn {
namespace detail {

KeepRandomState::KeepRandomState() : state_(at::detail::getDefaultCPUGenerator().get_state()) {}

KeepRandomState::~KeepRandomState() { at::Generator(at::detail::getDefaultCPUGenerator()).set_state(state_); }

}  // namespace detail

void FixedDtypeModule::to(torch::Device device, torch::Dtype /*dtype*/, bool non_blocking) {
  torch::nn::Module::to(device, non_blocking);
}

void FixedDtypeModule::to(torch::Dtype /*dtype*/, bool /*non_blocking*/) {}

void FixedDtypeModule::to(torch::Device device, bool non_blocking) { torch::nn::Module::to(device, non_blocking); }

ObserverImpl::ObserverImpl(const QuantSpec& spec, std::vector<int64_t> scale_shape)
    : Copied("Observer"), spec_(spec), scale_shape_(std::move(scale_shape)) {
  spec_.validate();
  TORCH_CHECK_VALUE(!spec_.dynamic(), "Observer: expected an observer that stores a range, got 'dynamic'");
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  min_val = register_buffer("min_val", at::full(scale_shape_, kInfinity, at::kFloat));
  max_val = register_buffer("max_val", at::full(scale_shape_, -kInfinity, at::kFloat));
  frozen = register_buffer("frozen", at::zeros({1}, at::kBool));
}

void ObserverImpl::load(torch::serialize::InputArchive& archive) {
  archive.read("min_val", min_val, /*is_buffer=*/true);
  archive.read("max_val", max_val, /*is_buffer=*/true);
  archive.try_read("frozen", frozen, /*is_buffer=*/true);
}

void ObserverImpl::forward(const at::Tensor& input) {
  if (input.numel() > 0) update(measure(input));
}

ObserverImpl::Range ObserverImpl::measure(const at::Tensor& input, bool check) const {
  const at::NoGradGuard no_grad;
  const at::Tensor x = input.detach();
  // A percentile can step over the NaN, so the check reads the whole input, by its minimum and maximum.
  const auto [low, high] = quantrain::detail::min_max(x, scale_shape_);
  const at::Tensor finite = at::logical_and(at::isfinite(low), at::isfinite(high));
  if (check && spec_.nan_policy == NanPolicy::kRaise) {
    TORCH_CHECK_VALUE(finite.all().item<bool>(), label_,
                      ": expected a batch without NaN or infinity, got one that holds some ",
                      "(nan_policy 'skip' passes over it)");
  }
  const auto [min, max] = spec_.observer == ObserverKind::kPercentile || spec_.observer == ObserverKind::kMse
                              ? batch_range(x)
                              : std::make_tuple(low, high);
  return {min, max, finite};
}

void ObserverImpl::update(const Range& range) {
  const at::NoGradGuard no_grad;
  quantrain::detail::observe_(min_val, max_val, range.low, range.high, range.finite, averaging_constant());
}

std::tuple<at::Tensor, at::Tensor> ObserverImpl::observe_qparams(const at::Tensor& input, at::Tensor& scale,
                                                                 const at::Tensor& zero_point, bool check,
                                                                 bool marks_nonfinite) {
  const at::NoGradGuard no_grad;
  at::Tensor low, high;
  std::optional<at::Tensor> finite;
  if (check || !of_extremes()) {
    const Range range = measure(input, check);
    low = range.low;
    high = range.high;
    finite = range.finite;
  } else {
    std::tie(low, high) = quantrain::detail::min_max(input.detach(), scale_shape_);
  }
  return take(low, high, finite, scale, zero_point, marks_nonfinite);
}

std::tuple<at::Tensor, at::Tensor> ObserverImpl::take(const at::Tensor& low, const at::Tensor& high,
                                                      const std::optional<at::Tensor>& finite, at::Tensor& scale,
                                                      const at::Tensor& zero_point, bool marks_nonfinite) {
  const at::NoGradGuard no_grad;
  return quantrain::detail::observe_qparams_(
      min_val, max_val, scale, zero_point.defined() ? std::optional<at::Tensor>(zero_point) : std::nullopt, low, high,
      finite, averaging_constant(), spec_.quant_min(), spec_.quant_max(), spec_.symmetric, marks_nonfinite);
}

bool ObserverImpl::of_extremes() const {
  return spec_.observer == ObserverKind::kMinMax || spec_.observer == ObserverKind::kMovingAverage;
}

void ObserverImpl::check_range(const at::Tensor& low, const at::Tensor& high) const {
  const at::Tensor finite = at::logical_and(at::isfinite(low), at::isfinite(high));
  TORCH_CHECK_VALUE(finite.all().item<bool>(), label_, ": expected a finite batch, got one from ",
                    low.min().item<float>(), " to ", high.max().item<float>(),
                    " (nan_policy 'skip' would leave it out)");
}

double ObserverImpl::averaging_constant() const {
  return spec_.observer == ObserverKind::kMinMax ? 0.0 : spec_.averaging_constant;
}

at::Tensor ObserverImpl::only_zeros() const { return at::logical_and(min_val == 0, max_val == 0); }

at::Tensor ObserverImpl::unseen() const {
  return at::logical_not(at::logical_and(at::isfinite(min_val), at::isfinite(max_val)));
}

std::tuple<at::Tensor, at::Tensor> ObserverImpl::batch_range(const at::Tensor& input) const {
  if (spec_.observer == ObserverKind::kMse) {
    return quantrain::detail::mse_range(input, scale_shape_, spec_.quant_min(), spec_.quant_max(), spec_.symmetric);
  }
  return quantrain::detail::percentile_range(input, scale_shape_, spec_.percentile);
}

std::tuple<at::Tensor, at::Tensor> ObserverImpl::qparams_of(const at::Tensor& low, const at::Tensor& high) const {
  const at::NoGradGuard no_grad;
  return quantrain::detail::qparams_from_range(low, high, spec_.quant_min(), spec_.quant_max(), spec_.symmetric);
}

std::tuple<at::Tensor, at::Tensor> ObserverImpl::calculate_qparams() const {
  const at::NoGradGuard no_grad;
  const auto [scale, zero_point] = qparams_of(min_val, max_val);
  const at::Tensor nothing = unseen();
  const at::Tensor nan = at::full({}, std::numeric_limits<float>::quiet_NaN(), scale.options());
  return {at::where(nothing, nan, scale), at::where(nothing, at::zeros({}, zero_point.options()), zero_point)};
}

}  // namespace quantrain::nn
