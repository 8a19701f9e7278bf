#include "csrc/cpu/fake_quant.h"

#include <cstdint>

#include "csrc/cpu/fake_quant_blocks.h"

// Codes of integers and back.

namespace quantrain::cpu {
namespace {

template <typename T, typename Code>
void quantize_typed(const QuantizeArgs& a, int64_t begin, int64_t end) {
  const T* __restrict__ x = static_cast<const T*>(a.x);
  Code* __restrict__ codes = static_cast<Code*>(a.codes);
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    alignas(64) float x_buffer[kBlock], uniform[kBlock + 8];
    BlockQParams scratch;
    for_each_block(begin, end, [&](int64_t at, int n) QUANTRAIN_INLINE_LAMBDA {
      const float* __restrict__ xs = load_block(x + at, n, x_buffer);
      Code* __restrict__ out = codes + at;
      const int skip = static_cast<int>(at % 4);  // element i uses word i % 4 of the block i / 4
      if (a.stochastic) {
        for (int i = 0; i < n + skip; i += 4) {
          const Philox4 random =
              philox4x32_10(a.philox.seed, a.philox.offset, static_cast<uint64_t>(at - skip + i) / 4);
          for (int j = 0; j < 4; ++j) uniform[i + j] = philox_uniform(random.word[j]);
        }
      }
      for_each_run(a.grouping, a.qparams, a.range, at, at + n, scratch,
                   [&](int offset, int length, const auto& params) QUANTRAIN_INLINE_LAMBDA {
                     if (a.stochastic) {
                       for (int i = 0; i < length; ++i) {
                         const QParams p = params[i];
                         const float v = round_stochastic(xs[offset + i] * p.inv_scale, uniform[skip + offset + i]);
                         out[offset + i] =
                             static_cast<Code>(static_cast<int32_t>(storable_code(v + p.zero_point, p, a.range)));
                       }
                     } else {
                       for (int i = 0; i < length; ++i) {
                         const QParams p = params[i];
                         const float v = unclamped_code(xs[offset + i], p);
                         out[offset + i] = static_cast<Code>(static_cast<int32_t>(storable_code(v, p, a.range)));
                       }
                     }
                   });
    });
  });
}

template <typename T, typename Code>
void dequantize_typed(const DequantizeArgs& a, int64_t begin, int64_t end) {
  const Code* __restrict__ codes = static_cast<const Code*>(a.codes);
  T* __restrict__ y = static_cast<T*>(a.y);
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    alignas(64) float y_buffer[kBlock];
    BlockQParams scratch;
    for_each_block(begin, end, [&](int64_t at, int n) QUANTRAIN_INLINE_LAMBDA {
      const Code* __restrict__ q = codes + at;
      float* __restrict__ ys = store_target(y + at, y_buffer);
      for_each_run(a.grouping, a.qparams, QuantRange{}, at, at + n, scratch,
                   [&](int offset, int length, const auto& params) QUANTRAIN_INLINE_LAMBDA {
                     for (int i = 0; i < length; ++i)
                       ys[offset + i] = dequantized(static_cast<float>(q[offset + i]), params[i]);
                   });
      store_block(y + at, n, y_buffer);
    });
  });
}

}  // namespace

void quantize(const QuantizeArgs& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype, [&](auto* type) {
    dispatch_codes(args.code_dtype, [&](auto* code) {
      quantize_typed<std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(code)>>(args, begin, end);
    });
  });
}

void dequantize(const DequantizeArgs& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype, [&](auto* type) {
    dispatch_codes(args.code_dtype, [&](auto* code) {
      dequantize_typed<std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(code)>>(args, begin, end);
    });
  });
}

}  // namespace quantrain::cpu
