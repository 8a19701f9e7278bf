#include "csrc/cpu/dropout.h"

#include <type_traits>

#include "csrc/cpu/simd.h"

namespace quantrain::cpu {

void dropout(const DropoutArgs& args, int64_t begin, int64_t end) {
  const auto seed = static_cast<uint64_t>(args.state[0]), offset = static_cast<uint64_t>(args.state[1]);
  dispatch_float(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* x = static_cast<const T*>(args.x);
    T* y = static_cast<T*>(args.y);
    vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
      for (int64_t i = begin; i < end; i += 4) {
        const Philox4 numbers = philox4x32_10(seed, offset, static_cast<uint64_t>(i / 4));
        for (int64_t j = i; j < end && j < i + 4; ++j)
          y[j] = from_float<T>(dropped(to_float(x[j]), numbers.word[j - i], args));
      }
    });
  });
}

void dropout_state(const DropoutStateArgs& args) {
  args.state[0] = static_cast<int64_t>(args.philox.seed);
  args.state[1] = static_cast<int64_t>(args.philox.offset);
}

}  // namespace quantrain::cpu
