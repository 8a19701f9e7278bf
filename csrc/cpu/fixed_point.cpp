#include "csrc/cpu/fixed_point.h"

#include <algorithm>
#include <cstring>

#include "csrc/cpu/simd.h"

namespace quantrain::cpu {
namespace {

constexpr int kBlock = 512;  // elements, in the first-level cache; as in fake_quant.cpp
constexpr int kLanes = 8;    // one AVX-512 register of float64

// Sums in vector registers whatever the optimizer makes of the loop, folded in a fixed order.
using Lanes = double __attribute__((vector_size(kLanes * sizeof(double))));

QUANTRAIN_INLINE double folded(const Lanes& lanes) {
  double lane[kLanes];
  std::memcpy(lane, &lanes, sizeof(lane));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
  return lane[0];
}

// values[0, n) with zeros up to a whole vector: sums do not notice.
QUANTRAIN_INLINE void pad(double* values, int n) {
  for (int i = n; i % kLanes != 0; ++i) values[i] = 0.0;
}

template <typename T>
void fraction_length_partial_typed(const FractionLengthArgs& a, int64_t begin, int64_t end) {
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    const T* __restrict__ x = static_cast<const T*>(a.x);
    const FractionLengthRule rule = a.rule;
    const bool mse = rule.method == FractionLengthMethod::kMse;
    const int64_t chunks = chunks_per_group(a);
    const int terms = statistic_terms(rule);
    alignas(64) float xs[kBlock];
    alignas(64) double values[kBlock];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / chunks, start = group * a.elements;
      const int64_t first = start + task % chunks * kRowChunk, last = std::min(first + kRowChunk, start + a.elements);
      const double origin = rule.method == FractionLengthMethod::kStd ? static_cast<double>(to_float(x[start])) : 0.0;
      Lanes sum[kMaxFractionLengths] = {};
      for (int64_t at = first; at < last; at += kBlock) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, last - at));
        for (int i = 0; i < n; ++i) xs[i] = to_float(x[at + i]);
        for (int f = 0; mse && f < terms; ++f) {
          const QParams p = fixed_point_qparams(f, rule.range);
          for (int i = 0; i < n; ++i) {
            const float y = dequantized(clamp_code(unclamped_code(xs[i], p), rule.range), p);
            const double error = static_cast<double>(y) - static_cast<double>(xs[i]);
            values[i] = error * error;
          }
          pad(values, n);
          for (int i = 0; i < n; i += kLanes) {
            Lanes next;
            std::memcpy(&next, values + i, sizeof(next));
            sum[f] += next;
          }
        }
        if (mse) continue;
        for (int i = 0; i < n; ++i) values[i] = static_cast<double>(xs[i]) - origin;
        pad(values, n);
        for (int i = 0; i < n; i += kLanes) {
          Lanes next;
          std::memcpy(&next, values + i, sizeof(next));
          sum[0] += next;
          sum[1] += next * next;
        }
      }
      for (int k = 0; k < terms; ++k) a.partial[task * terms + k] = folded(sum[k]);
    }
  });
}

}  // namespace

void fraction_length_partial(const FractionLengthArgs& a, int64_t begin, int64_t end) {
  dispatch_float(a.dtype, [&](auto* type) {
    fraction_length_partial_typed<std::remove_pointer_t<decltype(type)>>(a, begin, end);
  });
}

void fraction_length_finish(const FractionLengthArgs& a, int64_t begin, int64_t end) {
  const int64_t chunks = chunks_per_group(a);
  const int terms = statistic_terms(a.rule);
  for (int64_t group = begin; group < end; ++group) {
    double sum[kMaxFractionLengths] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int k = 0; k < terms; ++k) sum[k] += a.partial[(group * chunks + chunk) * terms + k];
    a.result[group] = chosen_fraction_length(sum, a.elements, a.rule, a.previous ? a.previous[group] : -1);
  }
}

void fixed_point_requantize(const FixedPointRequantizeArgs& a, int64_t begin, int64_t end) {
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    const int32_t* __restrict__ accumulator = a.accumulator;
    const int32_t* __restrict__ lengths = a.accumulator_fraction_length;
    uint8_t* __restrict__ output = static_cast<uint8_t*>(a.output);  // an int8 is its low byte
    const Grouping& g = a.grouping;
    const int fraction_length = a.fraction_length;
    const bool is_signed = a.is_signed;
    if (g.levels > 0 && g.inner == 1) {  // channels in the last dimension
      for (int64_t at = begin; at < end;) {
        const int64_t n = std::min(g.modulus[0] - at % g.modulus[0], end - at), index = g.scale_index(at);
        for (int64_t i = 0; i < n; ++i)
          output[at + i] = static_cast<uint8_t>(fixed_point_requantized_int32(
              accumulator[at + i], requantize_shift(lengths[index + i], fraction_length), is_signed));
        at += n;
      }
      return;
    }
    for (int64_t at = begin; at < end;) {
      const int64_t row = at / g.inner, n = std::min((row + 1) * g.inner, end) - at;
      const int shift = requantize_shift(lengths[g.scale_index(row)], fraction_length);
      for (int64_t i = 0; i < n; ++i)
        output[at + i] = static_cast<uint8_t>(fixed_point_requantized_int32(accumulator[at + i], shift, is_signed));
      at += n;
    }
  });
}

}  // namespace quantrain::cpu
