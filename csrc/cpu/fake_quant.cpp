#include "csrc/cpu/fake_quant.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "csrc/cpu/simd.h"

// Plain loops over blocks that stay in the first-level cache. Half-precision types pass through float32 buffers;
// float32 is read and written in place.

namespace quantrain::cpu {
namespace {

constexpr int kBlock = 512;  // elements; 256 to 2048 measured alike, bench_fake_quant
constexpr int kLanes = 16;   // independent sums: one AVX-512 register of float32

QUANTRAIN_INLINE const float* load_block(const float* x, int, float*) { return x; }

template <typename T>
QUANTRAIN_INLINE const float* load_block(const T* x, int n, float* buffer) {
  for (int i = 0; i < n; ++i) buffer[i] = to_float(x[i]);
  return buffer;
}

QUANTRAIN_INLINE float* store_target(float* y, float*) { return y; }

template <typename T>
QUANTRAIN_INLINE float* store_target(T*, float* buffer) {
  return buffer;
}

QUANTRAIN_INLINE void store_block(float*, int, const float*) {}

template <typename T>
QUANTRAIN_INLINE void store_block(T* y, int n, const float* buffer) {
  for (int i = 0; i < n; ++i) y[i] = from_float<T>(buffer[i]);
}

// Byte masks (0 or 1) to bits: eight bytes times this constant gather their lowest bits in the top byte.
QUANTRAIN_INLINE void pack_bits(const uint8_t* inside, int n, uint8_t* mask) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t bytes;
    std::memcpy(&bytes, inside + i, 8);
    mask[i / 8] = static_cast<uint8_t>(bytes * 0x0102040810204080ull >> 56);
  }
  if (i < n) {
    uint8_t tail = 0;
    for (int j = 0; i + j < n; ++j) tail = static_cast<uint8_t>(tail | inside[i + j] << j);
    mask[i / 8] = tail;
  }
}

// The parameters of consecutive elements: one set for all, or one an element where the scale varies along the last
// dimension.
struct BlockQParams {
  float scale[kBlock];
  float inv_scale[kBlock];
  float zero_point[kBlock];

  QUANTRAIN_INLINE QParams operator[](int i) const { return QParams{scale[i], inv_scale[i], zero_point[i]}; }

  QUANTRAIN_INLINE void load(const QParamTensors& t, int64_t first, int n, QuantRange range) {
    if (t.fraction_length)
      for (int i = 0; i < n; ++i) set(i, fixed_point_qparams(t.fraction_length[first + i], range));
    else
      for (int i = 0; i < n; ++i) set(i, load_scaled_qparams(t, first + i, range));
  }

  QUANTRAIN_INLINE void set(int i, QParams p) {
    scale[i] = p.scale;
    inv_scale[i] = p.inv_scale;
    zero_point[i] = p.zero_point;
  }
};

struct SameQParams {
  QParams p;
  QUANTRAIN_INLINE QParams operator[](int) const { return p; }
};

// Calls f(offset, length, params) for each run of elements in [begin, end) whose parameters are known together.
template <typename F>
QUANTRAIN_INLINE void for_each_run(const Grouping& g, const QParamTensors& t, QuantRange range, int64_t begin,
                                   int64_t end, BlockQParams& scratch, const F& f) {
  if (g.levels > 0 && g.inner == 1) {
    for (int64_t at = begin; at < end;) {
      const int64_t left = g.modulus[0] - at % g.modulus[0];
      const int n = static_cast<int>(std::min(left, end - at));
      scratch.load(t, g.scale_index(at), n, range);
      f(static_cast<int>(at - begin), n, scratch);
      at += n;
    }
    return;
  }
  int64_t row = begin / g.inner;
  for (int64_t at = begin; at < end; ++row) {
    const int n = static_cast<int>(std::min((row + 1) * g.inner, end) - at);
    f(static_cast<int>(at - begin), n, SameQParams{load_qparams(t, g.scale_index(row), range)});
    at += n;
  }
}

// Calls f(offset, n) for each block of [begin, end).
template <typename F>
QUANTRAIN_INLINE void for_each_block(int64_t begin, int64_t end, const F& f) {
  for (int64_t at = begin; at < end; at += kBlock) f(at, static_cast<int>(std::min<int64_t>(kBlock, end - at)));
}

template <typename T>
void fake_quantize_typed(const FakeQuantizeArgs& a, int64_t begin, int64_t end) {
  const T* __restrict__ x = static_cast<const T*>(a.x);
  T* __restrict__ y = static_cast<T*>(a.y);
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    alignas(64) float x_buffer[kBlock], y_buffer[kBlock];
    alignas(64) uint8_t inside[kBlock];
    BlockQParams scratch;
    for_each_block(begin, end, [&](int64_t at, int n) QUANTRAIN_INLINE_LAMBDA {
      const float* __restrict__ xs = load_block(x + at, n, x_buffer);
      float* __restrict__ ys = store_target(y + at, y_buffer);
      for_each_run(a.grouping, a.qparams, a.range, at, at + n, scratch,
                   [&](int offset, int length, const auto& params) QUANTRAIN_INLINE_LAMBDA {
                     if (a.mask && !a.ends_pass) {
                       for (int i = 0; i < length; ++i) {
                         const QParams p = params[i];
                         const float v = unclamped_code(xs[offset + i], p);
                         inside[offset + i] = code_inside_range(v, a.range);
                         ys[offset + i] = dequantized(clamp_code(v, a.range), p);
                       }
                     } else if (a.mask) {
                       for (int i = 0; i < length; ++i) {
                         const QParams p = params[i];
                         const float v = unclamped_code(xs[offset + i], p);
                         inside[offset + i] = code_in_range(v, a.range);
                         ys[offset + i] = dequantized(clamp_code(v, a.range), p);
                       }
                     } else {
                       for (int i = 0; i < length; ++i) {
                         const QParams p = params[i];
                         ys[offset + i] = dequantized(clamp_code(unclamped_code(xs[offset + i], p), a.range), p);
                       }
                     }
                   });
      store_block(y + at, n, y_buffer);
      if (a.mask) pack_bits(inside, n, a.mask + at / 8);
    });
  });
}

// Works on the bits of an element, whatever its type: it is kept or becomes +0.
template <typename Bits>
void masked_copy(const FakeQuantizeBackwardArgs& a, int64_t begin, int64_t end) {
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    // Declared in here: through the lambda's captures __restrict__ is lost, and with it the vector loop.
    const Bits* __restrict__ grad_output = static_cast<const Bits*>(a.grad_output);
    Bits* __restrict__ grad_input = static_cast<Bits*>(a.grad_input);
    const uint8_t* __restrict__ mask = a.mask;
    alignas(64) Bits keep[kBlock];
    for_each_block(begin, end, [&](int64_t at, int n) QUANTRAIN_INLINE_LAMBDA {
      const Bits* __restrict__ in = grad_output + at;
      Bits* __restrict__ out = grad_input + at;
      for (int byte = 0; byte * 8 < n; ++byte) {
        const uint32_t bits = mask[at / 8 + byte];
        for (int j = 0; j < 8; ++j) keep[byte * 8 + j] = static_cast<Bits>(0u - (bits >> j & 1u));
      }
      for (int i = 0; i < n; ++i) out[i] = static_cast<Bits>(in[i] & keep[i]);
    });
  });
}

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

// Sixteen values side by side, in vector registers whatever the optimiser makes of the loop around them.
using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));
using LaneMask = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

// The values from i on, `fill` past the end.
#define QUANTRAIN_LOAD_LANES(lanes, values, i, n, fill)                                     \
  Lanes lanes;                                                                              \
  if ((i) + kLanes <= (n)) {                                                                \
    std::memcpy(&lanes, (values) + (i), sizeof(lanes));                                     \
  } else {                                                                                  \
    for (int j = 0; j < kLanes; ++j) lanes[j] = (i) + j < (n) ? (values)[(i) + j] : (fill); \
  }

// Sixteen sums, folded in a fixed order: vector speed without letting the compiler reorder an addition.
struct LaneSum {
  Lanes lane = {};

  QUANTRAIN_INLINE void add(const float* values, int n) {
    for (int i = 0; i < n; i += kLanes) {
      QUANTRAIN_LOAD_LANES(next, values, i, n, 0.0f)
      lane += next;
    }
  }

  QUANTRAIN_INLINE float total() const {
    float folded[kLanes];
    for (int j = 0; j < kLanes; ++j) folded[j] = lane[j];
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int j = 0; j < width; ++j) folded[j] += folded[j + width];
    return folded[0];
  }
};

// Calls f(task, row, first element, end element) for each row chunk of [begin, end).
template <typename F>
QUANTRAIN_INLINE void for_each_chunk(const Grouping& g, int64_t begin, int64_t end, const F& f) {
  const int64_t chunks = chunks_per_row(g);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / chunks, start = row * g.inner + task % chunks * kRowChunk;
    f(task, row, start, std::min(start + kRowChunk, (row + 1) * g.inner));
  }
}

template <typename T>
void learnable_backward_typed(const LearnableBackwardArgs& a, int64_t begin, int64_t end) {
  const T* __restrict__ grad_output = static_cast<const T*>(a.grad_output);
  const T* __restrict__ x = static_cast<const T*>(a.x);
  T* __restrict__ grad_input = static_cast<T*>(a.grad_input);
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    alignas(64) float x_buffer[kBlock], dy_buffer[kBlock], dx_buffer[kBlock], scale_term[kBlock],
        zero_point_term[kBlock];
    for_each_chunk(a.grouping, begin, end,
                   [&](int64_t task, int64_t row, int64_t first, int64_t last) QUANTRAIN_INLINE_LAMBDA {
                     const QParams p = load_qparams(a.qparams, a.grouping.scale_index(row), a.range);
                     LaneSum scale_sum, zero_point_sum;
                     for_each_block(first, last, [&](int64_t at, int n) QUANTRAIN_INLINE_LAMBDA {
                       const float* __restrict__ xs = load_block(x + at, n, x_buffer);
                       const float* __restrict__ dys = load_block(grad_output + at, n, dy_buffer);
                       float* __restrict__ dxs = store_target(grad_input + at, dx_buffer);
                       const QParams params = p;  // copies: through a reference the loop would stay scalar
                       const QuantRange range = a.range;
                       for (int i = 0; i < n; ++i) {
                         const LearnableGradient g = learnable_gradient(xs[i], params, range);
                         dxs[i] = select(g.inside, dys[i], 0.0f);
                         scale_term[i] = dys[i] * g.scale;
                         zero_point_term[i] = dys[i] * g.zero_point;
                       }
                       store_block(grad_input + at, n, dx_buffer);
                       scale_sum.add(scale_term, n);
                       zero_point_sum.add(zero_point_term, n);
                     });
                     a.partial_scale[task] = scale_sum.total();
                     if (a.partial_zero_point) a.partial_zero_point[task] = zero_point_sum.total();
                   });
  });
}

template <typename T>
void min_max_typed(const MinMaxArgs& a, int64_t begin, int64_t end) {
  const T* __restrict__ x = static_cast<const T*>(a.x);
  constexpr float kInf = std::numeric_limits<float>::infinity();
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    alignas(64) float x_buffer[kBlock];
    for_each_chunk(a.grouping, begin, end,
                   [&](int64_t task, int64_t, int64_t first, int64_t last) QUANTRAIN_INLINE_LAMBDA {
                     Lanes low = Lanes{} + kInf, high = Lanes{} - kInf;
                     LaneMask nan = {};
                     for_each_block(first, last, [&](int64_t at, int n) QUANTRAIN_INLINE_LAMBDA {
                       const float* __restrict__ xs = load_block(x + at, n, x_buffer);
                       for (int i = 0; i < n; i += kLanes) {
                         QUANTRAIN_LOAD_LANES(next, xs, i, n, xs[0])
                         // The comparisons are false for NaN, which is noted beside them.
                         low = next < low ? next : low;
                         high = next > high ? next : high;
                         nan |= next != next;
                       }
                     });
                     float min = kInf, max = -kInf;
                     int32_t any_nan = 0;
                     for (int j = 0; j < kLanes; ++j) {
                       min = low[j] < min ? low[j] : min;
                       max = high[j] > max ? high[j] : max;
                       any_nan |= nan[j];
                     }
                     a.partial_min[task] = any_nan ? NAN : min;
                     a.partial_max[task] = any_nan ? NAN : max;
                   });
  });
}

// The first of `count` values becomes their sum, added by halves; count is a power of two.
QUANTRAIN_INLINE void add_by_halves(float* values, int count) {
  for (int width = count / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) values[j] += values[j + width];
}

// SumOrder's sums of one chunk; `sums` is overwritten.
QUANTRAIN_INLINE float sum_in_order(float* __restrict__ sums, SumOrder order) {
  float lane[256];
  for (int l = 0; l < order.lanes; ++l) {
    add_by_halves(sums + l * order.size, order.size);
    lane[l] = sums[l * order.size];
  }
  float total = 0.0f;
  const int together = order.lanes < 32 ? order.lanes : 32;
  for (int first = 0; first < order.lanes; first += together) {
    add_by_halves(lane + first, together);
    total = first == 0 ? lane[0] : total + lane[first];
  }
  return total;
}

template <typename T>
void range_error_typed(const RangeErrorArgs& a, int64_t begin, int64_t end) {
  const T* __restrict__ x = static_cast<const T*>(a.x);
  const int64_t tasks = a.grouping.rows * chunks_per_row(a.grouping);
  const SumOrder order = range_error_order(a.grouping, a.dtype);
  const int count = order.size * order.lanes;  // divides kBlock or is a multiple of it
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    alignas(64) float x_buffer[kBlock], sums[kMaxSums];
    for_each_chunk(
        a.grouping, begin, end, [&](int64_t task, int64_t row, int64_t first, int64_t last) QUANTRAIN_INLINE_LAMBDA {
          const int64_t group = a.grouping.scale_index(row);
          for (int64_t k = 0; k < a.steps; ++k) {
            const float ratio = static_cast<float>(k + 1) / static_cast<float>(a.steps);
            const QParams p = qparams_from_range(a.min[group] * ratio, a.max[group] * ratio, a.range, a.symmetric);
            for (int i = 0; i < count; ++i) sums[i] = 0.0f;
            for_each_block(first, last, [&](int64_t at, int n) QUANTRAIN_INLINE_LAMBDA {
              const float* __restrict__ xs = load_block(x + at, n, x_buffer);
              const QParams params = p;  // copies, as above
              const QuantRange range = a.range;
              const int start = static_cast<int>((at - first) % count), step = std::min(count, kBlock);
              for (int i = 0; i < n; i += step) {
                float* __restrict__ to = sums + start;
                const int length = std::min(step, n - i);
                for (int j = 0; j < length; ++j) {
                  const float value = xs[i + j];
                  const float distance = dequantized(clamp_code(unclamped_code(value, params), range), params) - value;
                  to[j] += distance * distance;
                }
              }
            });
            a.partial_error[k * tasks + task] = sum_in_order(sums, order);
          }
        });
  });
}

}  // namespace

void fake_quantize(const FakeQuantizeArgs& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype,
                 [&](auto* type) { fake_quantize_typed<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

void fake_quantize_backward(const FakeQuantizeBackwardArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::kFloat32)
    masked_copy<uint32_t>(args, begin, end);
  else
    masked_copy<uint16_t>(args, begin, end);
}

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

void fake_quantize_learnable_backward(const LearnableBackwardArgs& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype, [&](auto* type) {
    learnable_backward_typed<std::remove_pointer_t<decltype(type)>>(args, begin, end);
  });
}

void min_max(const MinMaxArgs& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype,
                 [&](auto* type) { min_max_typed<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

void range_error(const RangeErrorArgs& args, int64_t begin, int64_t end) {
  dispatch_float(args.dtype,
                 [&](auto* type) { range_error_typed<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

void qparams_from_range(const QParamsFromRangeArgs& args) {
  for (int64_t i = 0; i < args.groups; ++i) {
    const QParams p = quantrain::qparams_from_range(args.min[i], args.max[i], args.range, args.symmetric);
    args.scale[i] = p.scale;
    args.zero_point[i] = static_cast<int32_t>(p.zero_point);
  }
}

}  // namespace quantrain::cpu
