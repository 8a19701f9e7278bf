// Layers in fixed point: the fixed_point_conv family. 8-bit codes in, exact int32 sums, one shift out; no scale, no
// float.
//
// A number is code * 2^-FL; FL is its fraction length. Codes are uint8 in [0, 255] or int8 in [-127, 127]; weights are
// int8. The sums of a convolution have FL_acc = FL_input + FL_weight (per output channel where the weight's is), and so
// has the bias. Codes of FL_out come from sums by shift = FL_acc - FL_out: acc / 2^shift rounded half to even (acc *
// 2^-shift for shift <= 0), then clamped to the codes. Arithmetic in which a convolution is followed by a shift alone
// is F8Net's (Jin et al., ICLR 2022, section 3).
//
// Images are [N, C, H, W] in any strides, results are channels_last. CPU and CUDA give the same bits, whatever the
// number of threads. A sum that overflows int32 wraps: whoever builds a network must prove that none does. No
// gradients. Empty results are allowed; sizes are any. Errors: c10::ValueError for shapes and values, c10::TypeError
// for element types and devices ("expected uint8 or int8 codes, got Float").
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>

#include "quantrain/ops/export.h"

namespace quantrain {

struct FixedPointConvOptions {
  std::array<int64_t, 2> stride{1, 1};
  std::array<int64_t, 2> padding{0, 0};  // zeros
  int64_t groups = 1;
};

// int32 sums [N, O, OH, OW] of input [N, C, H, W] (uint8 or int8) and weight int8 [O, C / groups, KH, KW], plus bias
// int32 [O].
QUANTRAIN_API at::Tensor fixed_point_conv2d(const at::Tensor& input, const at::Tensor& weight,
                                            const std::optional<at::Tensor>& bias = std::nullopt,
                                            const FixedPointConvOptions& options = {});

// The same as codes, uint8 (clamped at 0, which includes a ReLU) or int8. shift is int32, of one element or O, in [-31,
// 31] (not checked on CUDA). residual is added before the one rounding: uint8, int8 or int32, of the result's shape,
// with residual_shift = FL_acc - FL_residual, as shift.
QUANTRAIN_API at::Tensor fixed_point_conv2d_requantize(const at::Tensor& input, const at::Tensor& weight,
                                                       const std::optional<at::Tensor>& bias, const at::Tensor& shift,
                                                       const std::optional<at::Tensor>& residual = std::nullopt,
                                                       const std::optional<at::Tensor>& residual_shift = std::nullopt,
                                                       const FixedPointConvOptions& options = {},
                                                       bool is_signed = false);

// int32 sums [..., O] of input [..., K] (uint8 or int8) and weight int8 [O, K], plus bias int32 [O].
QUANTRAIN_API at::Tensor fixed_point_linear(const at::Tensor& input, const at::Tensor& weight,
                                            const std::optional<at::Tensor>& bias = std::nullopt);

// a + b as int32 of fraction length max(a_fraction_length, b_fraction_length), saturating. Both uint8, int8 or int32,
// of one shape; fraction lengths int32 of one element, or of the operands' rank with one size other than 1: one per
// channel.
QUANTRAIN_API at::Tensor fixed_point_add(const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_fraction_length,
                                         const at::Tensor& b_fraction_length);

// Largest code of each window of [N, C, H, W]; the padding never wins, and is at most half the kernel.
QUANTRAIN_API at::Tensor fixed_point_max_pool2d(const at::Tensor& input, std::array<int64_t, 2> kernel_size,
                                                std::array<int64_t, 2> stride, std::array<int64_t, 2> padding = {0, 0});

// int32 [N, C, 1, 1]: the sum of each image's codes. An average pool is this and a shift.
QUANTRAIN_API at::Tensor fixed_point_sum_pool2d(const at::Tensor& input);

// ---- for whoever runs a layer many times ----------------------------------------------------------------------------
// Not through the dispatcher, nothing is checked and nothing allocated once warm: images are channels_last, of the
// shape and type that the operators above give, on one device.

// A convolution with its weight packed once. Copies share the packed weight; run may be called from many threads.
class QUANTRAIN_API FixedPointConv {
 public:
  FixedPointConv(const at::Tensor& weight, const std::optional<at::Tensor>& bias, const FixedPointConvOptions& options,
                 bool input_signed);

  // output: int32 where shift is undefined, else codes. A linear layer is a convolution of [N, K, 1, 1] with [O, K, 1,
  // 1].
  void run(const at::Tensor& input, at::Tensor& output, const at::Tensor& shift = {}, const at::Tensor& residual = {},
           const at::Tensor& residual_shift = {}) const;

  std::array<int64_t, 4> output_size(at::IntArrayRef input_size) const;

 private:
  struct Packed;
  std::shared_ptr<const Packed> packed_;
};

QUANTRAIN_API void fixed_point_max_pool2d_out(const at::Tensor& input, at::Tensor& output,
                                              std::array<int64_t, 2> kernel_size, std::array<int64_t, 2> stride,
                                              std::array<int64_t, 2> padding = {0, 0});
QUANTRAIN_API void fixed_point_sum_pool2d_out(const at::Tensor& input, at::Tensor& output);

}  // namespace quantrain
