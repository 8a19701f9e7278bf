// Formulas and kernel arguments of layers in fixed point: 8-bit codes in, int32 sums or 8-bit codes out. Everything is
// NHWC.
#pragma once

#include <cstdint>

#include "csrc/common/fixed_point.h"
#include "csrc/common/macros.h"
#include "csrc/common/types.h"

namespace quantrain {

// The code of acc + residual, where acc has FL_acc, the result has FL_acc - shift and the residual has FL_acc -
// residual_shift. Whichever of the two has fewer fraction bits is shifted left first, so nothing is lost before the one
// rounding. |shift|, |residual_shift| <= 31.
QUANTRAIN_HOST_DEVICE int32_t fixed_point_requantized_sum(int32_t acc, int32_t residual, int shift, int residual_shift,
                                                          bool is_signed) {
  return residual_shift >= 0
             ? fixed_point_requantized(acc + residual * (int64_t{1} << residual_shift), shift, is_signed)
             : fixed_point_requantized(acc * (int64_t{1} << -residual_shift) + residual, shift - residual_shift,
                                       is_signed);
}

// a 2^-a_fl + b 2^-b_fl in units of 2^-max(a_fl, b_fl), saturating at the ends of int32.
QUANTRAIN_HOST_DEVICE int32_t fixed_point_added(int32_t a, int32_t b, int a_fl, int b_fl) {
  // By unsigned arithmetic: on the device nobody has checked the two, and a difference that wraps must be defined.
  const int d = static_cast<int>(static_cast<uint32_t>(a_fl) - static_cast<uint32_t>(b_fl));
  const uint32_t left = d < 0 ? 0u - static_cast<uint32_t>(d) : static_cast<uint32_t>(d), shift = left > 31 ? 31 : left;
  const int64_t fine = d < 0 ? b : a, coarse = d < 0 ? a : b;
  return fixed_point_shift_round(fine + coarse * (int64_t{1} << shift), 0);
}

// Element i of uint8, int8 or int32.
QUANTRAIN_HOST_DEVICE int32_t fixed_point_integer(const void* data, DType type, int64_t i) {
  if (type == DType::kUInt8) return static_cast<const uint8_t*>(data)[i];
  if (type == DType::kInt8) return static_cast<const int8_t*>(data)[i];
  return static_cast<const int32_t*>(data)[i];
}

struct FixedPointConvArgs {
  const void* input;  // [n, h, w, c], uint8 or int8
  bool input_signed;
  const int8_t* weight;  // [o, kh, kw, c / groups]
  const int32_t* bias;   // [o] or null
  const int32_t* shift;  // [o] with stride 1, [1] with stride 0; null: the sums are written
  int64_t shift_stride;
  const void* residual;           // [n, oh, ow, o] or null
  DType residual_type;            // kUInt8, kInt8 or kInt32
  const int32_t* residual_shift;  // as shift
  int64_t residual_shift_stride;
  void* output;  // [n, oh, ow, o]: int32 sums, or uint8 / int8 codes
  bool output_signed;
  int64_t n, h, w, c, o, kh, kw, stride_h, stride_w, padding_h, padding_w, groups, oh, ow;
};

// Element i of the residual, and its shift in channel o; 0 where there is none.
QUANTRAIN_HOST_DEVICE int32_t fixed_point_residual(const FixedPointConvArgs& args, int64_t i) {
  return args.residual ? fixed_point_integer(args.residual, args.residual_type, i) : 0;
}

QUANTRAIN_HOST_DEVICE int fixed_point_residual_shift(const FixedPointConvArgs& args, int64_t o) {
  return args.residual && args.residual_shift ? args.residual_shift[o * args.residual_shift_stride] : 0;
}

// Output element i, of channel o, from its sum with the bias: any shift, any residual.
QUANTRAIN_HOST_DEVICE void fixed_point_conv_output(const FixedPointConvArgs& args, int32_t sum, int64_t i, int64_t o) {
  if (!args.shift) {
    static_cast<int32_t*>(args.output)[i] = sum;
    return;
  }
  const int32_t code =
      fixed_point_requantized_sum(sum, fixed_point_residual(args, i), args.shift[o * args.shift_stride],
                                  fixed_point_residual_shift(args, o), args.output_signed);
  static_cast<uint8_t*>(args.output)[i] = static_cast<uint8_t>(code);  // an int8 is its low byte
}

// Largest code of each window. The sum uses n, h, w and c alone and writes int32 [n, c].
struct FixedPointPoolArgs {
  const void* input;  // [n, h, w, c], uint8 or int8
  bool input_signed;
  void* output;  // [n, oh, ow, c], codes of the same type; int32 [n, c]
  int64_t n, h, w, c, kh, kw, stride_h, stride_w, padding_h, padding_w, oh, ow;
};

// Both operands in one order of memory, in which element i has channel i / inner % channels.
struct FixedPointAddArgs {
  const void* a;  // [numel], kUInt8, kInt8 or kInt32
  DType a_type;
  const void* b;  // [numel], likewise
  DType b_type;
  const int32_t* a_fraction_length;  // [channels] with stride 1, [1] with stride 0
  int64_t a_fraction_length_stride;
  const int32_t* b_fraction_length;  // likewise
  int64_t b_fraction_length_stride;
  int32_t* output;  // [numel]
  int64_t numel, inner, channels;
};

}  // namespace quantrain
