// Fused steps over a list of gradients: what a loss scaler does between the backward pass and the optimizer.
//
// Tensors float32, float16 or bfloat16, mixed freely, dense (any strides that fill memory), on one device; empty ones
// and an empty list are allowed. `scale`: the loss scale, float32 of one element on that device. No host
// synchronization; deterministic. Errors: TypeError for other types, layouts or several devices; ValueError for a scale
// that is not one element.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>

#include "quantrain/ops/export.h"

namespace quantrain::detail {

// What one reading of the gradients tells. All float32 on their device.
struct NormCheck {
  at::Tensor found_inf;  // []: 1 where some element is Inf or NaN, else 0
  at::Tensor norm;       // []: sqrt(sum (g / scale)^2), summed in float32 per chunk of 16384 and in float64 over chunks
  at::Tensor grad_scale;  // []: scale / min(1, max_norm / (norm + 1e-6)), what clips and unscales as a divisor
  at::Tensor non_finite;  // [number of tensors]: 1 where that tensor holds Inf or NaN, else 0
};

QUANTRAIN_API NormCheck amp_check_norm(at::TensorList grads, const at::Tensor& scale,
                                       std::optional<double> max_norm = std::nullopt);

// g = g * (1 / scale) * min(1, max_norm / (norm + 1e-6)) in place, rounded once; without `norm` or `max_norm` no
// clipping.
QUANTRAIN_API void amp_scale_(at::TensorList grads, const at::Tensor& scale,
                              const std::optional<at::Tensor>& norm = std::nullopt,
                              std::optional<double> max_norm = std::nullopt);

// parameters[i] = masters[i] rounded to float16 or bfloat16 up or down at random: E[result] = master. Values that the
// type holds stay, Inf and NaN too; a finite value that rounds to nearest finitely stays finite. Random numbers: Philox
// by (seed, offset, element).
QUANTRAIN_API void amp_round_stochastic_(at::TensorList parameters, at::TensorList masters,
                                         const std::optional<at::Generator>& generator = std::nullopt);

}  // namespace quantrain::detail
