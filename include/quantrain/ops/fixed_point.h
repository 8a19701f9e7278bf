// Fixed-point numbers of F8Net (Jin et al., ICLR 2022, arXiv:2202.05239): the fixed_point family.
//
//   value = code * 2^-FL,   code in [-(2^(WL-1) - 1), 2^(WL-1) - 1] (signed) or [0, 2^WL - 1] (unsigned)
//
// word_length WL in 2..16; a fraction length FL is an int32 tensor, 0 <= FL <= WL - signed. Codes are rounded half to
// even. Signed words leave the most negative code unused. Rescaling between fraction lengths is a shift, so a network
// of such numbers needs no multiplication but that of codes.
//
// Granularity as in fake_quant.h: a fraction length has one element, or the rank of `input` with sizes that divide the
// input's. A fraction length out of range raises on CPU; on CUDA, where the check would wait for the device, it makes
// the results of its group NaN (fixed_point_quantize), or shifts by what it says, saturating (fixed_point_requantize).
// All results are deterministic. CPU and CUDA agree bit for bit, except for a statistic within 1e-12 of a threshold,
// which their orders of addition may set apart.
//
// Errors: c10::ValueError for shapes and values, c10::TypeError for element types and devices; nothing is changed.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "quantrain/ops/export.h"

namespace quantrain {

// clamp(rint(input * 2^FL)) * 2^-FL with input's element type (float32, float16, bfloat16) and strides. NaN stays,
// +-Inf saturates. Gradient: the paper's straight-through estimator, which is strict: grad_input = grad_output where
// lowest code < unclamped code < highest code, else 0. The end codes do not pass, unlike in every other family: an
// unsigned code 0 is then the dead side of the ReLU that the clamp stands for. One bit per element is kept for it; it
// may be differentiated again. The fraction length gets none.
QUANTRAIN_API at::Tensor fixed_point_quantize(const at::Tensor& input, const at::Tensor& fraction_length,
                                              int64_t word_length = 8, bool is_signed = true);

// The fraction length, int32, that suits `input`: of shape [1], or with `axis` one per index of that dimension, [1, ..,
// C, .., 1].
//   "std"  the number of f in 1..WL - signed with s <= c / 2^f, s the unbiased standard deviation over all elements; c
//          = 40 signed, 70 unsigned at 8 bits (unsigned: of the tensor before its ReLU). One element, or equal ones:
//          the longest.
//   "rms"  the same with the root mean square; c = 40 and 50 (unsigned: of the tensor after its ReLU).
//   "mse"  the fraction length of least squared error; the longer one where two are equal.
// For other word lengths c is where a Gaussian is rounded equally well with f and f - 1 (csrc/common/fixed_point.h).
// Sums are float64. `previous` (int32, the result's shape) is kept unless the statistic is more than `hysteresis`
// octaves past the threshold that separates it from the answer; with "mse", unless its root mean squared error exceeds
// the least by more. An infinity or NaN gives 0; a group without elements the longest. No gradient, no wait for the
// device.
QUANTRAIN_API at::Tensor fixed_point_fraction_length(
    const at::Tensor& input, std::optional<int64_t> axis = std::nullopt, int64_t word_length = 8, bool is_signed = true,
    std::string_view method = "std", const std::optional<at::Tensor>& previous = std::nullopt, double hysteresis = 0.0);

// 8-bit codes (int8, or uint8 where not is_signed) at `fraction_length` of int32 accumulators at
// `accumulator_fraction_length` (0..31, one element or as above): with n = their difference, the accumulator / 2^n
// rounded half to even, or times 2^-n, clamped to the code range. Exact for every accumulator. No gradient.
QUANTRAIN_API at::Tensor fixed_point_requantize(const at::Tensor& accumulator,
                                                const at::Tensor& accumulator_fraction_length, int64_t fraction_length,
                                                bool is_signed = true);

}  // namespace quantrain
