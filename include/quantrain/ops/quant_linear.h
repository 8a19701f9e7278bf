// A linear layer whose input was fake-quantized, and which keeps that as codes: the quant_linear family.
//
//   y = input weight^T + bias,  input = (codes - zero_point) scale
//
// The output and the gradients are at::linear's. For the gradient of the weight the codes are kept, one byte per
// element, and decoded in the backward pass, where linear would keep the input itself. That the codes are input's is
// the caller's to see to: norm_act_fake_quantize, its dynamic form and fake_quantize_codes give both. scale (float32)
// has one element, or is [..., 1], one per token; zero_point likewise; neither has a gradient.
//
// weight_groups: 0, weight is taken as it is; else it is fake-quantized first, as fake_quantize_dynamic does, each row
// in so many equal parts with a symmetric scale of its own taken from them, to codes of weight_min to weight_max. Then
// weight may be float32 beside a 16-bit input, and it is rounded anew in the backward pass: nothing but weight itself
// is kept.
//
// float32, float16, bfloat16; deterministic as at::linear. Under autocast as linear: input, weight and bias are cast.
// The gradients have no derivative: asking for one raises. Errors: c10::ValueError for shapes and values,
// c10::TypeError for element types and devices.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "quantrain/ops/export.h"

namespace quantrain {

// input [..., K], codes of its shape (int8 or uint8), weight [N, K], bias [N]; returns [..., N].
QUANTRAIN_API at::Tensor quant_linear(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                                      const std::optional<at::Tensor>& zero_point, const at::Tensor& weight,
                                      const std::optional<at::Tensor>& bias = std::nullopt, int64_t weight_groups = 0,
                                      int64_t weight_min = -128, int64_t weight_max = 127);

}  // namespace quantrain
