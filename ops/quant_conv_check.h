// What the operators of the quant_conv family and their derivatives share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>

#include <optional>
#include <tuple>

namespace quantrain {

void check_quant_conv2d(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale,
                        const std::optional<at::Tensor>& zero_point, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                        c10::SymIntArrayRef dilation, const c10::SymInt& groups);

// output, codes, and where with_mask the straight-through estimator's mask, in the order of output's memory.
std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quantize_codes_forward(const at::Tensor& input,
                                                                           const at::Tensor& scale,
                                                                           const std::optional<at::Tensor>& zero_point,
                                                                           int64_t quant_min, int64_t quant_max,
                                                                           bool with_mask);

}  // namespace quantrain
