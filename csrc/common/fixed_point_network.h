// Kernel arguments of what an integer network does beside its layers: copies of images, and additions that end in
// codes.
#pragma once

#include <cstdint>

#include "csrc/common/fixed_point_conv.h"

namespace quantrain {

// output[i, j, k, l] = input[i, j, k, l - first] for first <= l < last, else 0. The output is contiguous, the input of
// any strides.
struct FixedPointCopyArgs {
  const void* input;
  void* output;
  int64_t element_size;  // 1 or 4 bytes
  int64_t size[4];       // of the output
  int64_t stride[4];     // of the input, in elements
  int64_t first, last;
};

// The code of a + b, or of a where b is null: fixed_point_requantized_sum, a in place of the accumulator.
struct FixedPointSumArgs {
  const void* a;  // [numel], kUInt8, kInt8 or kInt32, channels innermost
  DType a_type;
  const void* b;  // [numel] or null
  DType b_type;
  const int32_t* shift;  // [channels] with stride 1, [1] with stride 0
  int64_t shift_stride;
  const int32_t* residual_shift;  // likewise; null where b is
  int64_t residual_shift_stride;
  void* output;  // [numel], uint8 or int8
  bool output_signed;
  int64_t numel, channels;
};

// Element i of the output. A code's byte is the same signed or not.
QUANTRAIN_HOST_DEVICE void fixed_point_sum_element(const FixedPointSumArgs& args, int64_t i) {
  const int64_t channel = i % args.channels;
  const int shift = args.shift[channel * args.shift_stride];
  const int32_t a = fixed_point_integer(args.a, args.a_type, i);
  const int32_t code = args.b ? fixed_point_requantized_sum(a, fixed_point_integer(args.b, args.b_type, i), shift,
                                                            args.residual_shift[channel * args.residual_shift_stride],
                                                            args.output_signed)
                              : fixed_point_requantized(a, shift, args.output_signed);
  static_cast<uint8_t*>(args.output)[i] = static_cast<uint8_t>(code);
}

}  // namespace quantrain
