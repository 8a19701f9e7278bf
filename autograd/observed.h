// The scale of a tensor whose range is observed as it is rounded: what the layers' nodes share.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "ops/common/check.h"
#include "quantrain/ops/fake_quant.h"

namespace quantrain {

// An observer of extremes and its fake-quantizer's state. Undefined tensors are absent.
struct Observed {
  at::Tensor min_val, max_val, scale, zero_point;
  double averaging_constant = 0.0;
  int64_t quant_min = -128, quant_max = 127;
  bool symmetric = true;
  // Whether the batch moves the range. A batch that is not finite raises in the name `label`; where that is empty, its
  // scale is NaN where `marks`.
  bool observes = false, marks = false;
  std::string label;
};

// The scale and zero_point in force for a tensor of the extremes `range`, [2], which are taken into account first.
inline std::tuple<at::Tensor, std::optional<at::Tensor>> qparams_in_force(const Observed& observed,
                                                                          const at::Tensor& range) {
  using OptionalTensor = std::optional<at::Tensor>;
  const OptionalTensor zero_point = observed.zero_point.defined() ? OptionalTensor(observed.zero_point) : std::nullopt;
  if (!observed.observes) return {observed.scale, zero_point};
  if (!observed.label.empty()) {
    const float low = range[0].item<float>(), high = range[1].item<float>();
    QUANTRAIN_CHECK_VALUE(std::isfinite(low) && std::isfinite(high),
                          "{}: expected a finite batch, got one from {} to {} (nan_policy='skip' would leave it out)",
                          observed.label, low, high);
  }
  at::Tensor min = observed.min_val, max = observed.max_val, scale = observed.scale;
  const auto shape = min.sizes();
  auto [in_force, point] = detail::observe_qparams_(
      min, max, scale, zero_point, range.narrow(0, 0, 1).view(shape), range.narrow(0, 1, 1).view(shape), std::nullopt,
      observed.averaging_constant, observed.quant_min, observed.quant_max, observed.symmetric, observed.marks);
  return {in_force, zero_point ? OptionalTensor(point) : std::nullopt};
}

}  // namespace quantrain
