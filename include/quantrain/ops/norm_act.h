// What lies before a linear layer, and the rounding of its input, in one pass over memory: the norm_act family.
//
//   z = f(input)                                identity, relu, silu, gelu (of erf), gelu_tanh
//   z = silu(input) other                       silu_mul: the gate of a gated feed-forward
//   z = (input - m) r weight + bias             layer_norm: over the last dimension, r = 1 / sqrt(variance + eps)
//   z = input r weight                          rms_norm: r = 1 / sqrt(mean(input^2) + eps)
//   output = fake_quantize(z)
//
// input [..., K]: float32, float16 or bfloat16; other like input; weight and bias [K], of input's type or float32, for
// the norms alone. Arithmetic in float32; z is not rounded to input's type in between. output is contiguous, of the
// type `dtype` ("" : input's; "float16" and "bfloat16" also for a float32 input, as autocast's products take it).
//
// Codes of at most 8 bits: int8, or uint8 where quant_min >= 0, of input's shape. quant_linear keeps them in place of
// its input.
//
// Gradients: straight-through as fake_quantize's, then f's or the norm's, of input, other, weight and bias. For them
// are kept input and other, a norm's two moments per row, and one bit per element where a code may clip (a symmetric
// range taken from the row itself never does). They have no derivative: asking for one raises. Sums go in a fixed
// order: results repeat.
//
// NaN and Inf: a NaN in a given range is NaN in the output; in a range taken from the row the row's scale is NaN, its
// zero_point 0 and its output NaN.
//
// Errors: c10::ValueError for shapes and values, c10::TypeError for element types and devices.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "quantrain/ops/export.h"

namespace quantrain {

// (output, codes), with one scale and zero_point for the tensor.
QUANTRAIN_API std::tuple<at::Tensor, at::Tensor> norm_act_fake_quantize(
    const at::Tensor& input, std::string_view function, const std::optional<at::Tensor>& other,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, const at::Tensor& scale,
    const std::optional<at::Tensor>& zero_point = std::nullopt, double eps = 1e-5, int64_t quant_min = -128,
    int64_t quant_max = 127, std::string_view dtype = "");

// (output, codes, scale, zero_point) with a scale per row taken from z, as fake_quantize_dynamic with scale_shape
// [..., 1]; zero_point (int32) is 0 where symmetric.
QUANTRAIN_API std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_act_fake_quantize_dynamic(
    const at::Tensor& input, std::string_view function = "identity",
    const std::optional<at::Tensor>& other = std::nullopt, const std::optional<at::Tensor>& weight = std::nullopt,
    const std::optional<at::Tensor>& bias = std::nullopt, double eps = 1e-5, int64_t quant_min = -128,
    int64_t quant_max = 127, bool symmetric = true, std::string_view dtype = "");

namespace detail {

// [2], float32: the minimum and maximum of z. No gradient.
QUANTRAIN_API at::Tensor norm_act_range(const at::Tensor& input, std::string_view function,
                                        const std::optional<at::Tensor>& other, const std::optional<at::Tensor>& weight,
                                        const std::optional<at::Tensor>& bias, double eps);

}  // namespace detail
}  // namespace quantrain
