#include "csrc/cpu/fake_quant.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "csrc/cpu/fake_quant_blocks.h"

// Ranges: extremes, and the range of least squared error.

namespace quantrain::cpu {
namespace {

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

void observe(const ObserveArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) observe_group(args, i);
}

}  // namespace quantrain::cpu
