// Simulated and stored integer quantization: the fake_quant family.
//
//   q = clamp(rint(input * (1 / scale)) + zero_point, quant_min, quant_max),   y = (q - zero_point) * scale
//
// computed in float32, rounding half to even, for input of float32, float16 or bfloat16, any strides.
//
// Granularity. `scale` (float32) has one element, or the rank of `input` with sizes that divide the input's: along each
// dimension element i uses scale index i / (input size / scale size). So [O, 1, 1, 1] is per output channel of a
// convolution's weight, [O, K / 32] groups of 32, [B, T, 1] per token. `zero_point` (int32) has the scale's shape;
// absent it is 0 (symmetric).
//
// NaN gives NaN in simulated results; +-Inf saturates. On CPU a scale that is not positive raises; on CUDA, where the
// check would wait for the device, it makes every result of its group NaN. All results are deterministic, and equal on
// CPU and CUDA bit for bit where no sum is involved.
//
// Errors: c10::ValueError for shapes and values, c10::TypeError for element types and devices; nothing is changed.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "quantrain/ops/export.h"

namespace quantrain {

// Fake-quantizes: y above, with input's element type and strides.
// Gradient: straight-through (Bengio et al. 2013): grad_input = grad_output where quant_min <= unclamped code <=
// quant_max, else 0; NaN inputs count as outside. One bit per element is kept for it. scale and zero_point get none:
// see fake_quantize_learnable.
QUANTRAIN_API at::Tensor fake_quantize(const at::Tensor& input, const at::Tensor& scale,
                                       const std::optional<at::Tensor>& zero_point = std::nullopt,
                                       int64_t quant_min = -128, int64_t quant_max = 127);

// Learned step size (LSQ, Esser et al. 2020), forward as fake_quantize. zero_point may be int32 (fixed) or float32:
// learned (LSQ+, Bhalgat et al. 2020), rounded and held in [quant_min, quant_max] by the forward pass.
// Gradient: grad_input as above; grad_scale = grad_factor * sum over the group of grad_output * (q - zero_point - input
// / scale inside the range, end code - zero_point outside); grad_zero_point = grad_factor * sum of grad_output * (0
// inside, -scale outside). Esser et al. use grad_factor = 1 / sqrt(group size * quant_max). The sums are deterministic.
QUANTRAIN_API at::Tensor fake_quantize_learnable(const at::Tensor& input, const at::Tensor& scale,
                                                 const std::optional<at::Tensor>& zero_point = std::nullopt,
                                                 int64_t quant_min = -128, int64_t quant_max = 127,
                                                 double grad_factor = 1.0);

// choose_qparams and fake_quantize in one call: the scale is the input's own (dynamic quantization: per token with [B,
// T, 1]). A NaN makes its group NaN rather than raising. Gradient: straight-through, the scale held constant.
QUANTRAIN_API at::Tensor fake_quantize_dynamic(const at::Tensor& input, at::IntArrayRef scale_shape,
                                               int64_t quant_min = -128, int64_t quant_max = 127,
                                               bool symmetric = true);

// (scale, zero_point) of `scale_shape` from the extremes of each group. symmetric: scale = absmax / d with
// d = min(-quant_min, quant_max) (or the larger magnitude where the range has one sign), zero_point 0. Affine: the
// range widened to hold 0, scale = (max - min) / (quant_max - quant_min), zero_point = clamp(quant_min - rint(min /
// scale)). An all-zero group has scale 1; NaN gives scale NaN. No gradient.
QUANTRAIN_API std::tuple<at::Tensor, at::Tensor> choose_qparams(const at::Tensor& input, at::IntArrayRef scale_shape,
                                                                int64_t quant_min = -128, int64_t quant_max = 127,
                                                                bool symmetric = true);

// Codes q as int8, uint8, int16 or int32. `stochastic` rounds up with probability equal to the fraction, from Philox
// numbers by (seed, offset, element index): unbiased for elements that do not saturate, and the same on CPU and CUDA.
// NaN becomes the code nearest to zero_point. No gradient.
QUANTRAIN_API at::Tensor quantize(const at::Tensor& input, const at::Tensor& scale,
                                  const std::optional<at::Tensor>& zero_point = std::nullopt, int64_t quant_min = -128,
                                  int64_t quant_max = 127, at::ScalarType dtype = at::kChar, bool stochastic = false,
                                  const std::optional<at::Generator>& generator = std::nullopt);

// quantize with stochastic rounding from the given seed and offset: a pure function of its arguments.
QUANTRAIN_API at::Tensor quantize_seeded(const at::Tensor& input, const at::Tensor& scale,
                                         const std::optional<at::Tensor>& zero_point, int64_t quant_min,
                                         int64_t quant_max, at::ScalarType dtype, int64_t seed, int64_t offset);

// (codes - zero_point) * scale. No gradient.
QUANTRAIN_API at::Tensor dequantize(const at::Tensor& input, const at::Tensor& scale,
                                    const std::optional<at::Tensor>& zero_point = std::nullopt,
                                    at::ScalarType dtype = at::kFloat);

// Codes of 4 bits, two per byte along the last dimension: element 2i in the low half. int8 (-8..7) or uint8 (0..15) in,
// uint8 [..., ceil(K / 2)] out; an odd row ends in a zero half. Values outside the range raise on CPU, and lose their
// high bits on CUDA.
QUANTRAIN_API at::Tensor pack_int4(const at::Tensor& input);

// The inverse: int8 (is_signed) or uint8 codes [..., size].
QUANTRAIN_API at::Tensor unpack_int4(const at::Tensor& input, int64_t size, bool is_signed = true);

namespace detail {

// The pieces that observers are made of. float32 results of `scale_shape`; NaN in a group gives NaN.
QUANTRAIN_API std::tuple<at::Tensor, at::Tensor> min_max(const at::Tensor& input, at::IntArrayRef scale_shape);
QUANTRAIN_API std::tuple<at::Tensor, at::Tensor> qparams_from_range(const at::Tensor& min, const at::Tensor& max,
                                                                    int64_t quant_min, int64_t quant_max,
                                                                    bool symmetric);
// With n elements in a group and k = clamp(ceil(percentile / 100 n), 1, n) (nearest rank, no interpolation): the (n + 1
// - k)-th and the k-th smallest. percentile in (50, 100].
QUANTRAIN_API std::tuple<at::Tensor, at::Tensor> percentile_range(const at::Tensor& input, at::IntArrayRef scale_shape,
                                                                  double percentile);
// Takes a batch's range low, high into account in min_val, max_val, block by block where it is finite: the extremes of
// all batches, or with averaging_constant c > 0 m + c (batch - m). The first batch sets the range. A block of zeros
// sets that of a block that saw nothing to [0, 0] and changes no other; the first block that is not zero sets it anew.
QUANTRAIN_API void observe_(at::Tensor& min_val, at::Tensor& max_val, const at::Tensor& low, const at::Tensor& high,
                            const at::Tensor& finite, double averaging_constant = 0);
// observe_ (where finite, or where it is absent: where low and high are finite), then scale and zero_point from the
// range (NaN and 0 where nothing was seen), in one kernel. Returns the scale to use with this batch: scale, but NaN in
// the groups that do not count where marks_nonfinite.
QUANTRAIN_API std::tuple<at::Tensor, at::Tensor> observe_qparams_(
    at::Tensor& min_val, at::Tensor& max_val, at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
    const at::Tensor& low, const at::Tensor& high, const std::optional<at::Tensor>& finite, double averaging_constant,
    int64_t quant_min, int64_t quant_max, bool symmetric, bool marks_nonfinite);
// The group's range times the ratio in {1 / steps, 2 / steps, ..., 1} whose quantization error is least in the squared
// sense.
QUANTRAIN_API std::tuple<at::Tensor, at::Tensor> mse_range(const at::Tensor& input, at::IntArrayRef scale_shape,
                                                           int64_t quant_min, int64_t quant_max, bool symmetric,
                                                           int64_t steps = 80);

}  // namespace detail
}  // namespace quantrain
