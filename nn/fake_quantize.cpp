#include "quantrain/nn/fake_quantize.h"

// FakeQuantize's three sources of a scale: the input, an observer, the optimizer.

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/clamp_min.h>
#include <ATen/ops/full.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/logical_or.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/graph_task.h>

#include "autograd/kept_codes.h"
#include "nn/layer_arguments.h"
#include "quantrain/ops/fake_quant.h"
#include "quantrain/ops/norm_act.h"
#include "quantrain/ops/quant_conv.h"

namespace quantrain::nn {

using detail::defined_or_none;

namespace {

constexpr double kSmallestScale = 1e-8;  // an optimizer's step can carry a learnable scale through zero

bool is_row_type(at::ScalarType type) { return type == at::kFloat || type == at::kHalf || type == at::kBFloat16; }

// What a linear layer of this input computes in, where its rows can come in that type.
at::ScalarType product_type(const at::Tensor& input) {
  const at::ScalarType type = detail::output_type(input);
  return input.scalar_type() == at::kFloat && is_row_type(type) ? type : input.scalar_type();
}

// LSQ's factor of a scale's gradient (Esser et al., arXiv:1902.08153, section 2.2).
double lsq_factor(int64_t elements, int64_t scales, const QuantSpec& spec) {
  const double per_scale = static_cast<double>(elements) / static_cast<double>(std::max<int64_t>(scales, 1));
  const double top = static_cast<double>(std::max<int64_t>(spec.quant_max(), 1));
  return 1.0 / std::sqrt(std::max(per_scale * top, 1.0));
}

at::Tensor detached(const at::Tensor& tensor) { return tensor.defined() ? tensor.detach() : tensor; }

}  // namespace

at::Tensor Before::operator()(const at::Tensor& x) const {
  if (function == "identity") return x;
  if (function == "relu") return at::relu(x);
  if (function == "silu") return at::silu(x);
  if (function == "silu_mul") return at::silu(x) * other;
  if (function == "gelu") return at::gelu(x);
  if (function == "gelu_tanh") return at::gelu(x, "tanh");
  if (function == "layer_norm")
    return at::layer_norm(x, {x.size(-1)}, defined_or_none(weight), defined_or_none(bias), eps);
  TORCH_CHECK_VALUE(function == "rms_norm",
                    "Before: expected function to be identity, relu, silu, gelu, gelu_tanh, silu_mul, layer_norm or "
                    "rms_norm, got '",
                    function, "'");
  return at::rms_norm(x, {x.size(-1)}, defined_or_none(weight), eps);
}

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
  const bool takes =
      is_training() && at::GradMode::is_enabled() && fake_quant_enabled_ && !calibrating_ && input.dim() >= 2;
  if (!takes || !(has_codes() || learns_codes()) || input.scalar_type() == at::kDouble || input.numel() == 0)
    return {forward(input)};
  auto [scale_in_force, zero_point_in_force] = spec_.learnable ? std::tuple<at::Tensor, at::Tensor>() : observe(input);
  if (!scale_in_force.defined()) std::tie(scale_in_force, zero_point_in_force) = calculate_qparams();
  const auto [values, codes] =
      quantrain::fake_quantize_codes(input, scale_in_force, defined_or_none(zero_point_in_force), spec_.quant_min(),
                                     spec_.quant_max(), spec_.learnable ? grad_factor(input.numel()) : 1.0);
  return {values, codes, scale_in_force.detach(), zero_point_in_force};
}

std::optional<Quantized> FakeQuantizeImpl::of_rows(const at::Tensor& input, const Before& before) {
  const bool identity = before.function == "identity";
  if (!takes_rows(input, identity)) return std::nullopt;
  const std::optional<at::Tensor> other = defined_or_none(before.other), weight = defined_or_none(before.weight),
                                  bias = defined_or_none(before.bias);
  const std::string_view type = quantrain::name_of(product_type(input));
  if (dynamic()) {
    const auto [values, codes, row_scale, row_zero_point] =
        quantrain::norm_act_fake_quantize_dynamic(input, before.function, other, weight, bias, before.eps,
                                                  spec_.quant_min(), spec_.quant_max(), spec_.symmetric, type);
    return Quantized{values, codes, row_scale, spec_.symmetric ? at::Tensor() : row_zero_point};
  }
  at::Tensor scale_in_force, zero_point_in_force;
  if (observing() && identity) {
    std::tie(scale_in_force, zero_point_in_force) = observe(input);
  } else if (observing()) {
    const at::Tensor range = quantrain::detail::norm_act_range(
        input.detach(), before.function, defined_or_none(detached(before.other)),
        defined_or_none(detached(before.weight)), defined_or_none(detached(before.bias)), before.eps);
    std::tie(scale_in_force, zero_point_in_force) = observe_range(range.narrow(0, 0, 1), range.narrow(0, 1, 1));
  }
  if (!scale_in_force.defined()) std::tie(scale_in_force, zero_point_in_force) = calculate_qparams();
  const auto [values, codes] = quantrain::norm_act_fake_quantize(
      input, before.function, other, weight, bias, scale_in_force, defined_or_none(zero_point_in_force), before.eps,
      spec_.quant_min(), spec_.quant_max(), type);
  return Quantized{values, codes, scale_in_force, zero_point_in_force};
}

// Whether of_rows serves for this input. identity: nothing goes before the rounding.
bool FakeQuantizeImpl::takes_rows(const at::Tensor& input, bool identity) {
  if (!is_training() || !at::GradMode::is_enabled() || !fake_quant_enabled_ || calibrating_) return false;
  if (!is_row_type(input.scalar_type()) || input.dim() < 2 || input.numel() == 0) return false;
  // {1}: each row of a linear layer's input has a scale of its own.
  if (dynamic())
    return spec_.granularity == Granularity::kPerToken && scale_shape_ == std::vector<int64_t>{1} && fits_byte();
  if (!has_codes() || !(observing() || has_scale())) return false;
  return identity || takes_range() || !observing();
}

bool FakeQuantizeImpl::rounds_rows() const {
  const bool clips = spec_.quant_min() >= 0 || spec_.quant_max() <= 0;
  return dynamic() && spec_.symmetric && scale_shape_.size() == 2 && fits_byte() && fake_quant_enabled_ && !clips;
}

bool FakeQuantizeImpl::has_codes() const { return !dynamic() && !spec_.learnable && scale.numel() == 1 && fits_byte(); }

bool FakeQuantizeImpl::has_learned() {
  if (in_backward()) return had_learned_;
  had_learned_ = spec_.learnable && !calibrating_ && fake_quant_enabled_ && has_scale();
  if (!had_learned_) return false;
  if (!settled_ && !follows_zeros_) settled_ = !unset().any().item<bool>();
  return had_learned_ = !observing();
}

bool FakeQuantizeImpl::learns_codes() { return spec_.learnable && scale.numel() == 1 && fits_byte() && has_learned(); }

bool FakeQuantizeImpl::fits_byte() const {
  const int64_t least = spec_.quant_min() >= 0 ? 0 : -128;
  return least <= spec_.quant_min() && spec_.quant_max() <= least + 255;
}

double FakeQuantizeImpl::grad_factor(int64_t numel) const { return lsq_factor(numel, scale.numel(), spec_); }

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
  has_scale_ = settled_ = follows_zeros_ = had_learned_ = false;
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
  return quantrain::fake_quantize_learnable(input, scale_in_force, zero, spec_.quant_min(), spec_.quant_max(),
                                            lsq_factor(input.numel(), scale_in_force.numel(), spec_));
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
