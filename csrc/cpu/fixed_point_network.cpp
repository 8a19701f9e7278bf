#include "csrc/cpu/fixed_point_network.h"

#include <algorithm>
#include <cstring>

namespace quantrain::cpu {
namespace {

template <typename T>
void copy_rows(const FixedPointCopyArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.size[2], channels = args.size[3], copied = args.last - args.first;
  for (int64_t row = begin; row < end; ++row) {
    const T* input =
        static_cast<const T*>(args.input) + row / args.size[1] * args.stride[0] + row % args.size[1] * args.stride[1];
    T* output = static_cast<T*>(args.output) + row * width * channels;
    if (copied == channels && args.stride[3] == 1 && args.stride[2] == channels) {
      std::memcpy(output, input, width * channels * sizeof(T));
      continue;
    }
    for (int64_t k = 0; k < width; ++k, output += channels, input += args.stride[2]) {
      if (copied != channels) std::memset(output, 0, channels * sizeof(T));
      if (args.stride[3] == 1)
        std::memcpy(output + args.first, input, copied * sizeof(T));
      else
        for (int64_t l = 0; l < copied; ++l) output[args.first + l] = input[l * args.stride[3]];
    }
  }
}

}  // namespace

void fixed_point_copy(const FixedPointCopyArgs& args, int64_t begin, int64_t end) {
  if (args.element_size == 1)
    copy_rows<uint8_t>(args, begin, end);
  else
    copy_rows<int32_t>(args, begin, end);
}

void fixed_point_sum(const FixedPointSumArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) fixed_point_sum_element(args, i);
}

}  // namespace quantrain::cpu
