// What the schemas, kernels and derivatives of fqt_linear and fqt_conv2d share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>

#include <optional>
#include <string_view>

#include "quantrain/ops/fqt.h"

// The ten arguments of the two quantizers in a schema, as parameters of a kernel and as arguments of a call.
#define QUANTRAIN_GRADIENT_PARAMETERS(name)                                                            \
  std::string_view name, int64_t name##_bits, std::string_view name##_rows, bool name##_preserve_zero, \
      int64_t name##_max_group
#define QUANTRAIN_GRADIENTS_PARAMETERS \
  QUANTRAIN_GRADIENT_PARAMETERS(grad_input), QUANTRAIN_GRADIENT_PARAMETERS(grad_weight)
#define QUANTRAIN_GRADIENT_ARGUMENTS(name) name, name##_bits, name##_rows, name##_preserve_zero, name##_max_group
#define QUANTRAIN_GRADIENTS_ARGUMENTS \
  QUANTRAIN_GRADIENT_ARGUMENTS(grad_input), QUANTRAIN_GRADIENT_ARGUMENTS(grad_weight)
#define QUANTRAIN_GRADIENT_STRUCT(name)                                                              \
  ::quantrain::GradientQuantizer {                                                                   \
    std::string(name), name##_bits, std::string(name##_rows), name##_preserve_zero, name##_max_group \
  }

namespace quantrain {

using FqtLinearSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                                      QUANTRAIN_GRADIENTS_PARAMETERS);
using FqtConv2dSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                                      c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                      c10::SymIntArrayRef dilation, c10::SymInt groups, QUANTRAIN_GRADIENTS_PARAMETERS);

// All that can be wrong with a call: types, devices, shapes and quantizers.
void check_fqt_linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      const GradientQuantizer& grad_input, const GradientQuantizer& grad_weight);
void check_fqt_conv2d(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                      const c10::SymInt& groups, const GradientQuantizer& grad_input,
                      const GradientQuantizer& grad_weight);

// The weight itself where it is contiguous or channels_last, else a contiguous copy: PyTorch 2.11's CPU convolution
// crashes, or has a wrong gradient, with a weight of other dense strides.
at::Tensor regular_weight(const at::Tensor& weight);

}  // namespace quantrain
