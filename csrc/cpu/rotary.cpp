#include "csrc/common/rotary.h"

#include "csrc/cpu/int8.h"
#include "csrc/cpu/simd.h"

namespace quantrain::cpu {
namespace {

template <typename T, typename Angle>
void rotate_typed(const RotaryArgs& a, int64_t begin, int64_t end) {
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    const int64_t half = a.size / 2;
    for (int64_t token = begin; token < end; ++token) {
      const int64_t at = (a.one_sequence ? token % a.length : token) * a.size;
      const Angle *cos = static_cast<const Angle*>(a.cos) + at, *sin = static_cast<const Angle*>(a.sin) + at;
      for (int64_t head = 0; head < a.heads; ++head) {
        T* x = static_cast<T*>(a.x) + (token * a.all_heads + head) * a.size;
        for (int64_t i = 0; i < half; ++i) {
          const RotatedPair y = rotated(to_float(x[i]), to_float(x[i + half]), to_float(cos[i]),
                                        to_float(cos[i + half]), to_float(sin[i]), to_float(sin[i + half]));
          x[i] = from_float<T>(y.low);
          x[i + half] = from_float<T>(y.high);
        }
      }
    }
  });
}

}  // namespace

void rotate_heads(const RotaryArgs& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype, [&](auto* type) {
    dispatch_float(args.angle_dtype, [&](auto* angle) {
      rotate_typed<std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(angle)>>(args, begin, end);
    });
  });
}

}  // namespace quantrain::cpu
