// The triangular factor that GPTQ and SparseGPT walk along.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

namespace quantrain::detail {

// U, upper, with U^T U = (H + d I)^-1, float64 [K, K]: d is `damping`, doubled up to ten times where H has no Cholesky
// factor with it. share: what `damping` is of the mean of H's diagonal, for the message. Waits for the device.
// ValueError naming `op` where none serves.
at::Tensor inverse_factor(std::string_view op, const at::Tensor& hessian, double damping, double share);

}  // namespace quantrain::detail
