// Linear and convolution whose gradients are computed from a quantized gradient of the output: fully quantized training
// (FQT).
//
// StatQuant, Chen et al. 2020 (arXiv:2010.14298), sections 3.1 and 3.2. With dY the gradient of the output,
//
//   grad_input  = (Q_b2(dY)) W        grad_weight = Q_b1(dY)^T X        grad_bias = sum of dY
//
// where Q is quantize_gradient (gradient_quant.h) and the two draws are independent ("gradient bifurcation"). Both Q
// are unbiased and both products linear in dY, so the expectation of a gradient is the gradient without Q. The output
// is that of at::linear and at::conv2d, computed once; X and W are taken as they are (the layers of nn pass them
// through fake_quantize).
//
// Draws come from the default generator of the device when the gradient is computed, first for grad_input, then for
// grad_weight; a gradient that nobody needs draws nothing. NaN and Inf in dY make NaN in the gradients. An empty dY is
// not quantized. float32, float16 and bfloat16; with both quantizers "none" also float64. Under autocast as linear and
// conv2d: the arguments are cast to the autocast type. The gradients themselves have no derivative: asking for one
// raises.
//
// Errors: c10::ValueError for shapes and values, c10::TypeError for element types and devices.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>

#include "quantrain/ops/export.h"
#include "quantrain/ops/gradient_quant.h"

namespace quantrain {

// y = input weight^T + bias. input [..., K], weight [O, K], bias [O]; y [..., O].
QUANTRAIN_API at::Tensor fqt_linear(const at::Tensor& input, const at::Tensor& weight,
                                    const std::optional<at::Tensor>& bias = std::nullopt,
                                    const GradientQuantizer& grad_input = {},
                                    const GradientQuantizer& grad_weight = {});

// 2-D convolution. input [N, C, H, W] or [C, H, W], weight [O, C / groups, kh, kw], bias [O].
QUANTRAIN_API at::Tensor fqt_conv2d(const at::Tensor& input, const at::Tensor& weight,
                                    const std::optional<at::Tensor>& bias = std::nullopt, at::IntArrayRef stride = 1,
                                    at::IntArrayRef padding = 0, at::IntArrayRef dilation = 1, int64_t groups = 1,
                                    const GradientQuantizer& grad_input = {},
                                    const GradientQuantizer& grad_weight = {});

// padding "valid" or "same" (stride 1).
QUANTRAIN_API at::Tensor fqt_conv2d(const at::Tensor& input, const at::Tensor& weight,
                                    const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                                    std::string_view padding, at::IntArrayRef dilation = 1, int64_t groups = 1,
                                    const GradientQuantizer& grad_input = {},
                                    const GradientQuantizer& grad_weight = {});

}  // namespace quantrain
