// A convolution whose input was fake-quantized, and which keeps that as codes: the quant_conv family.
//
//   y = conv2d(input, weight) + bias,  input = (codes - zero_point) scale
//
// The output and the gradients are at::conv2d's. For the gradient of the weight the codes are kept, one byte per
// element, and decoded in the backward pass, where conv2d would keep the input itself. That the codes are input's is
// the caller's to see to: fake_quantize_codes and batch_norm_act_fake_quantize give both. One scale and zero_point for
// the tensor; neither has a gradient.
//
// float32, float16, bfloat16; deterministic as at::conv2d. Under autocast as conv2d: input, weight and bias are cast.
// The gradients have no derivative: asking for one raises. Errors: c10::ValueError for shapes and values,
// c10::TypeError for element types and devices.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "quantrain/ops/export.h"

namespace quantrain {

// input [N, C, H, W], codes of its shape (int8 or uint8), weight [O, C / groups, kh, kw], bias [O].
QUANTRAIN_API at::Tensor quant_conv2d(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                                      const std::optional<at::Tensor>& zero_point, const at::Tensor& weight,
                                      const std::optional<at::Tensor>& bias = std::nullopt, at::IntArrayRef stride = 1,
                                      at::IntArrayRef padding = 0, at::IntArrayRef dilation = 1, int64_t groups = 1);

// (fake_quantize(input), its codes) in one pass: int8, or uint8 where quant_min >= 0. One scale for the tensor, codes
// of at most 8 bits; input [N, C, ...]. Gradient: fake_quantize's; where scale requires one, fake_quantize_learnable's,
// that of scale times grad_factor, and then input is kept instead of a bit per element.
QUANTRAIN_API std::tuple<at::Tensor, at::Tensor> fake_quantize_codes(
    const at::Tensor& input, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point = std::nullopt,
    int64_t quant_min = -128, int64_t quant_max = 127, double grad_factor = 1.0);

}  // namespace quantrain
