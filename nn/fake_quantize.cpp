#include "quantrain/nn/fake_quantize.h"

// FakeQuantize's three sources of a scale: the input, an observer, the optimizer.

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/clamp_min.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/logical_or.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/graph_task.h>

#include "quantrain/ops/fake_quant.h"
#include "quantrain/ops/quant_conv.h"

namespace quantrain::nn {
namespace {

constexpr double kSmallestScale = 1e-8;  // an optimizer's step can carry a learnable scale through zero

std::optional<at::Tensor> defined_or_none(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

}  // namespace

FakeQuantizeImpl::FakeQuantizeImpl(const QuantSpec& spec, std::vector<int64_t> scale_shape)
    : Copied("FakeQuantize"), spec_(spec), scale_shape_(std::move(scale_shape)) {
  spec_.validate();
  if (dynamic()) {
    return;
  }
  const bool stored = std::all_of(scale_shape_.begin(), scale_shape_.end(), [](int64_t size) { return size > 0; });
  TORCH_CHECK_VALUE(stored, "FakeQuantize: expected positive sizes in the shape of a stored scale, got ",
                    at::IntArrayRef(scale_shape_));
  const at::Tensor unset = at::full(scale_shape_, std::numeric_limits<float>::quiet_NaN(), at::kFloat);
  scale = spec_.learnable ? register_parameter("scale", unset) : register_buffer("scale", unset);
  if (!spec_.symmetric) {
    zero_point = register_buffer("zero_point", at::zeros(scale_shape_, at::kInt));
  }
  observer = register_module("observer", Observer(spec_, scale_shape_));
}

std::shared_ptr<FakeQuantizeImpl> FakeQuantizeImpl::fresh() const {
  auto copy = std::make_shared<FakeQuantizeImpl>(spec_, scale_shape_);
  if (!observer) copy->freeze();
  return copy;
}

void FakeQuantizeImpl::copy_switches(const FakeQuantizeImpl& other) {
  fake_quant_enabled_ = other.fake_quant_enabled_;
  calibrating_ = other.calibrating_;
  of_weight_ = other.of_weight_;
  label_ = other.label_;
  state_changed();
  if (!observer) observer_enabled_ = other.observer_enabled_;
}

at::Tensor FakeQuantizeImpl::forward(const at::Tensor& input, const at::Tensor& zero) {
  const auto [scale_now, zero_point_now] = observe(input, zero);
  if (!fake_quant_enabled_) {
    return input;
  }
  if (dynamic()) {
    return quantrain::fake_quantize_dynamic(input, scale_shape_of(input), spec_.quant_min(), spec_.quant_max(),
                                            spec_.symmetric);
  }
  if (input.numel() == 0 && !has_scale()) {
    return input;
  }
  const auto [scale_in_force, zero_point_in_force] =
      scale_now.defined() ? std::make_tuple(scale_now, zero_point_now) : calculate_qparams();
  return quantize_dequantize(input, scale_in_force, zero_point_in_force);
}

Quantized FakeQuantizeImpl::with_codes(const at::Tensor& input) {
  const bool fits = is_training() && at::GradMode::is_enabled() && has_codes() && fake_quant_enabled_ && !calibrating_;
  if (!fits || input.dim() < 2 || input.scalar_type() == at::kDouble || input.numel() == 0) return {forward(input)};
  auto [scale_in_force, zero_point_in_force] = observe(input);
  if (!scale_in_force.defined()) std::tie(scale_in_force, zero_point_in_force) = calculate_qparams();
  const auto [values, codes] = quantrain::fake_quantize_codes(
      input, scale_in_force, defined_or_none(zero_point_in_force), spec_.quant_min(), spec_.quant_max());
  return {values, codes, scale_in_force, zero_point_in_force};
}

bool FakeQuantizeImpl::has_codes() const {
  const int64_t least = spec_.quant_min() >= 0 ? 0 : -128, greatest = least + 255;
  return !dynamic() && !spec_.learnable && scale.numel() == 1 && least <= spec_.quant_min() &&
         spec_.quant_max() <= greatest;
}

bool FakeQuantizeImpl::takes_range() {
  if (!has_codes() || calibrating_ || !fake_quant_enabled_) return false;
  return observing() ? observer->of_extremes() : has_scale();
}

std::tuple<at::Tensor, at::Tensor> FakeQuantizeImpl::observe_range(const at::Tensor& low, const at::Tensor& high) {
  if (!observing()) return calculate_qparams();
  const bool raises = spec_.nan_policy == NanPolicy::kRaise, waits = !low.is_cuda() || !has_scale();
  if (raises && waits) observer->check_range(low, high);
  auto qparams = observer->take(low.view(scale_shape_), high.view(scale_shape_), std::nullopt, scale, zero_point,
                                raises && !waits);
  if (spec_.symmetric) std::get<1>(qparams) = at::Tensor();
  return qparams;
}

bool FakeQuantizeImpl::has_scale() {
  if (!has_scale_) {
    has_scale_ = dynamic() || at::isfinite(scale.detach()).all().item<bool>();  // learnable: <= 0 is pulled up in use
  }
  return has_scale_;
}

void FakeQuantizeImpl::enable_observer(bool on) {
  observer_enabled_ = on;
  if (observer) {
    const at::NoGradGuard no_grad;
    observer->frozen.fill_(!on);
    version_ = static_cast<uint32_t>(observer->frozen._version());
  }
}

// Read anew only where the buffer was written, as loading does.
bool FakeQuantizeImpl::observer_enabled() const {
  if (observer && (!version_ || *version_ != observer->frozen._version())) {
    observer_enabled_ = !observer->frozen.item<bool>();
    version_ = static_cast<uint32_t>(observer->frozen._version());
  }
  return observer_enabled_;
}

bool FakeQuantizeImpl::sees_only_zeros() const { return observer && observer->only_zeros().all().item<bool>(); }

void FakeQuantizeImpl::begin_calibration() {
  calibrating_ = true;
  before_.clear();
  for (const auto& item : named_parameters()) before_.emplace_back(item.value(), item.value().detach().clone());
  for (const auto& item : named_buffers()) before_.emplace_back(item.value(), item.value().clone());
}

void FakeQuantizeImpl::end_calibration(bool keep) {
  calibrating_ = false;
  if (!keep) {
    const at::NoGradGuard no_grad;
    for (auto& [tensor, copy] : before_) tensor.copy_(copy);
    state_changed();
  }
  before_.clear();
}

Calibrates::Reached FakeQuantizeImpl::reached_by_calibration() {
  if (of_weight_) return Reached::kNotAsked;
  if (!has_scale()) return Reached::kNothing;
  return sees_only_zeros() ? Reached::kOnlyZeros : Reached::kSomething;
}

void FakeQuantizeImpl::set_label(const std::string& path) {
  label_ = "FakeQuantize '" + path + "'";
  if (observer) observer->set_label("Observer '" + path + ".observer'");
}

void FakeQuantizeImpl::state_changed() {
  has_scale_ = settled_ = follows_zeros_ = false;
  version_.reset();
}

bool FakeQuantizeImpl::observing() const {
  if (!observer || !(calibrating_ || (is_training() && observer_enabled()))) return false;
  return (calibrating_ || !settled_ || !spec_.learnable) && !in_backward();
}

std::tuple<at::Tensor, at::Tensor> FakeQuantizeImpl::observe(const at::Tensor& input, const at::Tensor& zero) {
  if (input.numel() == 0 || !observing()) return {};
  const at::NoGradGuard no_grad;
  if (spec_.learnable && !calibrating_) {
    observe_first(input, zero);
    return {};
  }
  const bool waits = calibrating_ || !has_scale_ || !input.is_cuda();
  const bool marks = !waits && spec_.nan_policy == NanPolicy::kRaise;
  auto qparams = observer->observe_qparams(input, scale, zero_point, waits, marks);
  if (spec_.learnable || !has_scale()) return {};
  if (spec_.symmetric) std::get<1>(qparams) = at::Tensor();
  return qparams;
}

at::Tensor FakeQuantizeImpl::unset() const {
  return at::logical_or(at::logical_not(at::isfinite(scale.detach())), observer->only_zeros());
}

// Gives a first value to the blocks of a learnable scale that have none.
void FakeQuantizeImpl::observe_first(const at::Tensor& input, const at::Tensor& zero) {
  const at::Tensor before = unset();
  if (has_scale_ && !follows_zeros_ && !before.any().item<bool>()) {
    settled_ = true;
    return;
  }
  const ObserverImpl::Range range = observer->measure(input);
  at::Tensor zeros = observer->only_zeros();
  if (zero.defined()) zeros = at::logical_or(zeros, at::logical_and(zero, before));
  const at::Tensor sets = at::logical_and(range.finite, before);
  observer->update({range.low, range.high, sets});
  if (of_weight_) {  // what began as zeros stays marked as zeros: its scale follows
    observer->min_val.masked_fill_(zeros, 0.0);
    observer->max_val.masked_fill_(zeros, 0.0);
  }
  const auto [observed_scale, observed_zero_point] = observer->qparams_of(range.low, range.high);
  // Past the version: an earlier call of the layer in this graph saved the scale, whose blocks in use stay as they are.
  scale.variable_data().copy_(at::where(sets, observed_scale, scale));
  if (zero_point.defined()) zero_point.variable_data().copy_(at::where(sets, observed_zero_point, zero_point));
  settled_ = has_scale() && !unset().any().item<bool>();
  follows_zeros_ = of_weight_ && has_scale_ && !settled_;
}

std::tuple<at::Tensor, at::Tensor> FakeQuantizeImpl::calculate_qparams(const std::optional<at::Tensor>& input) {
  if (dynamic()) {
    TORCH_CHECK_VALUE(input, label_, ": expected an input to compute a dynamic scale from, got none");
    auto qparams = quantrain::choose_qparams(input->detach(), scale_shape_of(*input), spec_.quant_min(),
                                             spec_.quant_max(), spec_.symmetric);
    if (spec_.symmetric) {
      std::get<1>(qparams) = at::Tensor();
    }
    return qparams;
  }
  TORCH_CHECK_VALUE(has_scale(), label_, ": expected a scale that was observed or loaded, got none");
  if (spec_.learnable) {
    scale.variable_data().clamp_min_(kSmallestScale);
  }
  return {scale, zero_point};
}

at::Tensor FakeQuantizeImpl::quantize_dequantize(const at::Tensor& input, const at::Tensor& scale_in_force,
                                                 const at::Tensor& zero_point_in_force) const {
  const std::optional<at::Tensor> zero = defined_or_none(zero_point_in_force);
  if (!spec_.learnable) {
    return quantrain::fake_quantize(input, scale_in_force, zero, spec_.quant_min(), spec_.quant_max());
  }
  const double per_scale =
      static_cast<double>(input.numel()) / static_cast<double>(std::max<int64_t>(scale_in_force.numel(), 1));
  const double top = static_cast<double>(std::max<int64_t>(spec_.quant_max(), 1));
  return quantrain::fake_quantize_learnable(input, scale_in_force, zero, spec_.quant_min(), spec_.quant_max(),
                                            1.0 / std::sqrt(std::max(per_scale * top, 1.0)));
}

void FakeQuantizeImpl::freeze() {
  if (observer) {
    unregister_module("observer");
    observer = nullptr;
  }
  if (spec_.learnable) {
    const at::Tensor value = at::clamp_min(scale.detach(), kSmallestScale);
    parameters_.erase("scale");
    scale = register_buffer("scale", value);
    spec_.learnable = false;
  }
}

std::vector<int64_t> FakeQuantizeImpl::scale_shape_of(const at::Tensor& input) const {
  std::vector<int64_t> shape = scale_shape_;
  if (spec_.granularity == Granularity::kPerToken && shape.size() == 1) {
    shape.assign(input.dim(), -1);
    if (!shape.empty()) shape.back() = 1;
  }
  if (spec_.granularity == Granularity::kPerToken && shape.size() > static_cast<size_t>(input.dim())) {
    shape.erase(shape.begin(), shape.end() - input.dim());  // one sample without its batch dimension
  }
  for (size_t d = 0; d < shape.size(); ++d) {
    if (shape[d] == -1) shape[d] = input.size(static_cast<int64_t>(d));
  }
  return shape;
}

bool in_backward() { return torch::autograd::get_current_graph_task_id() != -1; }

}  // namespace quantrain::nn
