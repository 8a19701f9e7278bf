// The scale of a tensor whose range is observed as it is rounded: what the layers' nodes share.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

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
std::tuple<at::Tensor, std::optional<at::Tensor>> qparams_in_force(const Observed& observed, const at::Tensor& range);

}  // namespace quantrain
