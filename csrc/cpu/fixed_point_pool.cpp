#include "csrc/cpu/fixed_point_pool.h"

#include <algorithm>
#include <cstring>

#include "csrc/cpu/simd.h"

namespace quantrain::cpu {
namespace {

template <typename T>
QUANTRAIN_INLINE void max_pool_row(const FixedPointPoolArgs& args, int64_t row) {
  const int64_t n = row / args.oh, top = row % args.oh * args.stride_h - args.padding_h;
  const int64_t y_begin = std::max<int64_t>(top, 0), y_end = std::min(top + args.kh, args.h);
  const T* image = static_cast<const T*>(args.input) + n * args.h * args.w * args.c;
  T* output = static_cast<T*>(args.output) + row * args.ow * args.c;
  for (int64_t ox = 0; ox < args.ow; ++ox, output += args.c) {
    const int64_t left = ox * args.stride_w - args.padding_w;
    const int64_t x_begin = std::max<int64_t>(left, 0), x_end = std::min(left + args.kw, args.w);
    std::memcpy(output, image + (y_begin * args.w + x_begin) * args.c, static_cast<size_t>(args.c));
    for (int64_t y = y_begin; y < y_end; ++y)
      for (int64_t x = x_begin; x < x_end; ++x) {
        const T* pixel = image + (y * args.w + x) * args.c;
        for (int64_t c = 0; c < args.c; ++c) output[c] = std::max(output[c], pixel[c]);
      }
  }
}

template <typename T>
QUANTRAIN_INLINE void sum_pool_image(const FixedPointPoolArgs& args, int64_t n) {
  const T* pixel = static_cast<const T*>(args.input) + n * args.h * args.w * args.c;
  int32_t* __restrict__ output = static_cast<int32_t*>(args.output) + n * args.c;
  std::fill(output, output + args.c, 0);
  for (int64_t i = 0; i < args.h * args.w; ++i, pixel += args.c)
    for (int64_t c = 0; c < args.c; ++c) output[c] += pixel[c];
}

}  // namespace

void fixed_point_max_pool2d(const FixedPointPoolArgs& args, int64_t begin, int64_t end) {
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    for (int64_t row = begin; row < end; ++row)
      args.input_signed ? max_pool_row<int8_t>(args, row) : max_pool_row<uint8_t>(args, row);
  });
}

void fixed_point_sum_pool2d(const FixedPointPoolArgs& args, int64_t begin, int64_t end) {
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    for (int64_t n = begin; n < end; ++n)
      args.input_signed ? sum_pool_image<int8_t>(args, n) : sum_pool_image<uint8_t>(args, n);
  });
}

void fixed_point_add(const FixedPointAddArgs& args, int64_t begin, int64_t end) {
  dispatch_codes(args.a_type, [&](auto* a_type) {
    dispatch_codes(args.b_type, [&](auto* b_type) {
      const auto* a = static_cast<decltype(a_type)>(const_cast<void*>(args.a));
      const auto* b = static_cast<decltype(b_type)>(const_cast<void*>(args.b));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t channel = i / args.inner % args.channels;
        args.output[i] = fixed_point_added(a[i], b[i], args.a_fraction_length[channel * args.a_fraction_length_stride],
                                           args.b_fraction_length[channel * args.b_fraction_length_stride]);
      }
    });
  });
}

}  // namespace quantrain::cpu
