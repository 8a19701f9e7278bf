#include "quantrain/nn/fake_quantize.h"

// FakeQuantize's three sources of a scale: the input, an observer, the optimiser.

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/clamp_min.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include "quantrain/nn/fixed_point_layers.h"
#include "quantrain/ops/fake_quant.h"

namespace quantrain::nn {
namespace {

constexpr double kSmallestScale = 1e-8;  // an optimiser's step can carry a learnable scale through zero

std::optional<at::Tensor> defined_or_none(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

}  // namespace

FakeQuantizeImpl::FakeQuantizeImpl(const QuantSpec& spec, std::vector<int64_t> scale_shape)
    : FixedDtypeModule("FakeQuantize"), spec_(spec), scale_shape_(std::move(scale_shape)) {
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

at::Tensor FakeQuantizeImpl::forward(const at::Tensor& input) {
  observe(input);
  if (!fake_quant_enabled_) {
    return input;
  }
  if (dynamic()) {
    return quantrain::fake_quantize_dynamic(input, scale_shape_of(input), spec_.quant_min(), spec_.quant_max(),
                                            spec_.symmetric);
  }
  const auto [scale_in_force, zero_point_in_force] = calculate_qparams();
  return quantize_dequantize(input, scale_in_force, zero_point_in_force);
}

bool FakeQuantizeImpl::has_scale() {
  if (!has_scale_) {
    has_scale_ = dynamic() || at::isfinite(scale.detach()).all().item<bool>();  // learnable: <= 0 is pulled up in use
  }
  return has_scale_;
}

void FakeQuantizeImpl::observe(const at::Tensor& input) {
  if (!observer || !observer_enabled_ || !(is_training() || calibrating_) || input.numel() == 0) {
    return;
  }
  const at::NoGradGuard no_grad;
  observer->forward(input);
  const auto [observed_scale, observed_zero_point] = observer->calculate_qparams();
  scale.copy_(observed_scale);
  if (zero_point.defined()) {
    zero_point.copy_(observed_zero_point);
  }
  if (spec_.learnable && !calibrating_ && has_scale()) {
    observer_enabled_ = false;
  }
}

std::tuple<at::Tensor, at::Tensor> FakeQuantizeImpl::calculate_qparams(const std::optional<at::Tensor>& input) {
  if (dynamic()) {
    TORCH_CHECK_VALUE(input, "FakeQuantize: expected an input to compute a dynamic scale from, got none");
    auto qparams = quantrain::choose_qparams(input->detach(), scale_shape_of(*input), spec_.quant_min(),
                                             spec_.quant_max(), spec_.symmetric);
    if (spec_.symmetric) {
      std::get<1>(qparams) = at::Tensor();
    }
    return qparams;
  }
  TORCH_CHECK_VALUE(has_scale(), "FakeQuantize: expected a scale that was observed or loaded, got none");
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
  if (spec_.granularity == "per_token" && shape.size() == 1) {
    shape.assign(input.dim(), -1);
    if (!shape.empty()) shape.back() = 1;
  }
  if (spec_.granularity == "per_token" && shape.size() > static_cast<size_t>(input.dim())) {
    shape.erase(shape.begin(), shape.end() - input.dim());  // one sample without its batch dimension
  }
  for (size_t d = 0; d < shape.size(); ++d) {
    if (shape[d] == -1) shape[d] = input.size(static_cast<int64_t>(d));
  }
  return shape;
}

void enable_observer(torch::nn::Module& module, bool on) {
  for (const auto& child : module.modules()) {
    if (auto* fake_quantize = child->as<FakeQuantizeImpl>()) fake_quantize->enable_observer(on);
  }
}

void enable_fake_quant(torch::nn::Module& module, bool on) {
  for (const auto& child : module.modules()) {
    if (auto* fake_quantize = child->as<FakeQuantizeImpl>()) fake_quantize->enable_fake_quant(on);
    if (auto* fixed_point = dynamic_cast<FixedPointSwitch*>(child.get())) fixed_point->enable_fake_quant(on);
  }
}

}  // namespace quantrain::nn
