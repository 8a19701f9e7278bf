// Batch norm in training, with what surrounds it in a network under quantization-aware training: the batch_norm family.
//
// With y the input [N, C, ...], and per channel m and v its batch's mean and biased variance, s a factor (conv_scale)
// that the weight of the convolution before was multiplied by, and
//
//   r = sign(s) / sqrt(v + eps s^2)
//   z = activation((y - m) (weight r) + bias + residual)
//
// z is the batch norm of y / s, exactly but for rounding: mean and variance of y / s are m / s and v / s^2. So a
// convolution whose weight was folded for quantization (Jacob et al. 2018, arXiv:1712.05877, section 3.2) needs no
// division of its output.
//
// input: float32, float16 or bfloat16, contiguous or channels last (anything else is copied); arithmetic in float32,
// the result rounded once. mean, variance, weight, bias and conv_scale: [C]; the first two float32, the others of any
// floating type. activation: "identity", "relu", "relu6", "hardswish" or "silu"; residual only with the first three.
//
// Gradients of input, weight, bias, conv_scale and residual; with batch_statistics mean and variance are taken to be
// those of input, and the gradients go through them, else they are constants (a frozen batch norm). For the backward
// pass are kept the input and, where the activation bends or the result is fake-quantized, one bit per element. The
// gradients have no derivative: asking for one raises. Sums go in a fixed order: results repeat.
//
// NaN and Inf: an element's own outside of the statistics; with batch_statistics its channel's, as in PyTorch.
//
// Errors: c10::ValueError for shapes and values, c10::TypeError for element types and devices.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "quantrain/ops/export.h"

namespace quantrain {

// z above, with input's element type and strides.
QUANTRAIN_API at::Tensor batch_norm_act(const at::Tensor& input, const at::Tensor& mean, const at::Tensor& variance,
                                        const std::optional<at::Tensor>& weight = std::nullopt,
                                        const std::optional<at::Tensor>& bias = std::nullopt,
                                        const std::optional<at::Tensor>& conv_scale = std::nullopt,
                                        const std::optional<at::Tensor>& residual = std::nullopt,
                                        std::string_view activation = "identity", double eps = 1e-5,
                                        bool batch_statistics = true);

// (fake_quantize of z, its codes), in the same pass over memory; z is not rounded to input's type in between. One scale
// and zero_point for the tensor, codes of at most 8 bits (int8, or uint8 where quant_min >= 0). Gradient:
// straight-through as in fake_quantize. activation "identity", "relu" or "relu6".
QUANTRAIN_API std::tuple<at::Tensor, at::Tensor> batch_norm_act_fake_quantize(
    const at::Tensor& input, const at::Tensor& mean, const at::Tensor& variance,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& conv_scale, const std::optional<at::Tensor>& residual, const at::Tensor& scale,
    const std::optional<at::Tensor>& zero_point, std::string_view activation = "identity", double eps = 1e-5,
    bool batch_statistics = true, int64_t quant_min = -128, int64_t quant_max = 127);

// The weight [O, ...] of a convolution before a batch norm, folded and fake-quantized with a scale per row taken from
// the row, and the factor it was folded with, [O] (float32), which batch_norm_act takes:
//
//   conv_scale = bn_weight / sqrt(running_var + eps), 1 where that is 0
//   output     = fake_quantize(weight conv_scale), as fake_quantize_dynamic with scale_shape [O, 1, ...]
//
// output has the type `dtype` ("float32", "float16", "bfloat16"; "": weight's), rounded once, and weight's strides
// where those are contiguous or channels last. A NaN or infinity makes its row NaN. Gradients: of weight,
// straight-through times conv_scale; of bn_weight through both results, 0 where conv_scale is a 1 in place of 0.
// running_var is a constant. Kept: weight, bn_weight, a copy of running_var and one bit per element.
QUANTRAIN_API std::tuple<at::Tensor, at::Tensor> fold_fake_quantize(const at::Tensor& weight,
                                                                    const at::Tensor& bn_weight,
                                                                    const at::Tensor& running_var, double eps = 1e-5,
                                                                    int64_t quant_min = -128, int64_t quant_max = 127,
                                                                    bool symmetric = true, std::string_view dtype = "");

namespace detail {

// [4, C], float32: each channel's mean, biased variance, minimum and maximum. No gradient.
QUANTRAIN_API at::Tensor batch_norm_statistics(const at::Tensor& input);

// Moves running_mean and running_var by momentum towards the statistics of input / conv_scale (the variance unbiased,
// count elements a channel), where they are given. Returns, where `range` says so, [2]: the minimum and maximum of the
// norm's output after an activation that rises ("identity", "relu", "relu6"), else [0].
QUANTRAIN_API at::Tensor batch_norm_update_(const at::Tensor& statistics, const std::optional<at::Tensor>& weight,
                                            const std::optional<at::Tensor>& bias,
                                            const std::optional<at::Tensor>& conv_scale,
                                            const std::optional<at::Tensor>& running_mean,
                                            const std::optional<at::Tensor>& running_var, int64_t count,
                                            double momentum, double eps, std::string_view activation, bool range);

}  // namespace detail
}  // namespace quantrain
