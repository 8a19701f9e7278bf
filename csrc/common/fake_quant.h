// The formulas of the fake_quant family, once for host and device, and the arguments of its kernels.
//
//   code v = rint(x * (1 / scale)) + zero_point          (half to even)
//   q = clamp(v, quant_min, quant_max),  y = (q - zero_point) * scale
//
// All in float32 and without fused multiply-add, so that CPU and CUDA agree bit for bit. NaN passes through every
// function.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "csrc/common/grouping.h"
#include "csrc/common/macros.h"
#include "csrc/common/philox.h"
#include "csrc/common/types.h"
#if defined(__CUDACC__)
#include "csrc/cuda/ptx.cuh"
#endif

namespace quantrain {

struct QuantRange {
  float min = -128.0f;
  float max = 127.0f;
};

struct QParams {
  float scale;
  float inv_scale;
  float zero_point;
};

// A scale that is not positive gives NaN, here and so in every result: a device tensor cannot be checked without
// waiting for it.
QUANTRAIN_HOST_DEVICE QParams make_qparams(float scale, float zero_point) {
  const float checked = scale > 0.0f ? scale : detail::bits_to_float(0x7fc00000u);
  return QParams{checked, 1.0f / checked, zero_point};
}

QUANTRAIN_HOST_DEVICE float round_half_even(float x) { return rintf(x); }

// NaN stays: on the host because the comparisons are then false, on the device by max.NaN (one instruction); fmin and
// fmax drop it.
QUANTRAIN_HOST_DEVICE float clamp_code(float v, QuantRange range) {
#if defined(__CUDA_ARCH__)
  return cuda::ptx::min_nan(cuda::ptx::max_nan(v, range.min), range.max);
#else
  v = range.min > v ? range.min : v;
  return range.max < v ? range.max : v;
#endif
}

QUANTRAIN_HOST_DEVICE float unclamped_code(float x, QParams p) {
  return round_half_even(x * p.inv_scale) + p.zero_point;
}

QUANTRAIN_HOST_DEVICE float dequantized(float code, QParams p) { return (code - p.zero_point) * p.scale; }

// Straight-through estimator: the end codes pass, what lies beyond them and NaN does not.
QUANTRAIN_HOST_DEVICE bool code_in_range(float v, QuantRange range) { return clamp_code(v, range) == v; }

// The estimator of the fixed_point family: the end codes do not pass either.
QUANTRAIN_HOST_DEVICE bool code_inside_range(float v, QuantRange range) { return (v > range.min) & (v < range.max); }

// A learned zero point is a float that the forward pass rounds and holds inside the code range.
QUANTRAIN_HOST_DEVICE float rounded_zero_point(float zero_point, QuantRange range) {
  return clamp_code(round_half_even(zero_point), range);
}

// LSQ (Esser et al., ICLR 2020, eq. 3) with a zero point (LSQ+, Bhalgat et al. 2020, eq. 4 and 5), per unit of
// grad_output:
//   dy/dscale      = inside: (y - x) / scale = q - zero_point - x / scale;  outside: end code - zero_point
//   dy/dzero_point = inside: 0;  outside: -scale
struct LearnableGradient {
  float scale;
  float zero_point;
  uint32_t inside;  // all bits, or none
};

// `inside` must be all bits or none. By bits on the host: there a choice between floats becomes a branch, and the loop
// stays scalar.
QUANTRAIN_HOST_DEVICE float select(uint32_t inside, float then, float otherwise) {
#if defined(__CUDA_ARCH__)
  return inside ? then : otherwise;
#else
  return detail::bits_to_float((detail::float_to_bits(then) & inside) | (detail::float_to_bits(otherwise) & ~inside));
#endif
}

QUANTRAIN_HOST_DEVICE LearnableGradient learnable_gradient(float x, QParams p, QuantRange range) {
  const float v = unclamped_code(x, p);
  const float distance = clamp_code(v, range) - p.zero_point;
  // NaN is outside, and reaches the scale's gradient through `distance`.
  const uint32_t inside = 0u - static_cast<uint32_t>(code_in_range(v, range));
  const float within = (distance * p.scale - x) * p.inv_scale;
  return LearnableGradient{select(inside, within, distance), select(inside, 0.0f, -p.scale), inside};
}

// Unbiased rounding: up with probability v - floor(v). The difference is exact in float32, so the mean error is at most
// 2^-24.
QUANTRAIN_HOST_DEVICE float round_stochastic(float v, float uniform) {
  const float low = floorf(v);
  return low + (uniform < v - low ? 1.0f : 0.0f);
}

// Stored codes cannot hold NaN: it becomes the code nearest to real zero, and the block's NaN scale carries it on.
QUANTRAIN_HOST_DEVICE float storable_code(float v, QParams p, QuantRange range) {
  const float q = clamp_code(v, range);
  return q == q ? q : clamp_code(p.zero_point, range);
}

// scale and zero_point from a range of real numbers. Symmetric: neither end of [-absmax, absmax] clips. Affine: the
// range is widened to hold 0, which then is a code exactly. An all-zero range has scale 1; NaN or Inf gives scale NaN
// and zero_point 0.
QUANTRAIN_HOST_DEVICE QParams qparams_from_range(float min, float max, QuantRange range, bool symmetric) {
  const bool finite = fabsf(min) <= FLT_MAX && fabsf(max) <= FLT_MAX;  // false with a NaN
  float width, steps;
  if (symmetric) {
    const float low = fabsf(range.min), high = fabsf(range.max);
    steps = range.min < 0.0f && range.max > 0.0f ? (low < high ? low : high) : (low > high ? low : high);
    width = fabsf(min) > fabsf(max) ? fabsf(min) : fabsf(max);
  } else {
    min = min < 0.0f ? min : 0.0f;
    max = max > 0.0f ? max : 0.0f;
    steps = range.max - range.min;
    width = max - min;
  }
  // Halves where the width overflows because both ends are huge; a scale beyond float32 is its largest.
  float scale = width <= FLT_MAX ? width / steps : (0.5f * max - 0.5f * min) / (0.5f * steps);
  scale = scale > FLT_MAX ? FLT_MAX : scale;
  scale = scale < FLT_MIN ? FLT_MIN : scale;  // 1 / scale stays finite
  if (!(width > 0.0f)) scale = 1.0f;
  float zero_point = symmetric ? 0.0f : clamp_code(range.min - round_half_even(min / scale), range);
  if (!finite) {
    scale = detail::bits_to_float(0x7fc00000u);
    zero_point = 0.0f;
  }
  return QParams{scale, 1.0f / scale, zero_point};
}

// ---- kernel arguments -----------------------------------------------------------------------------------------------

struct QParamTensors {
  const float* scale;                        // [groups]
  const int32_t* zero_point;                 // [groups] or null: symmetric
  const float* float_zero_point;             // [groups] or null: a learned zero point
  const int32_t* fraction_length = nullptr;  // [groups], and the three above null: the scale is 2^-fraction_length
};

// Through the read-only path on the device: the compiler may then move the load above the stores of results.
template <typename T>
QUANTRAIN_HOST_DEVICE T load_parameter(const T* parameter) {
#if defined(__CUDA_ARCH__)
  return __ldg(parameter);
#else
  return *parameter;
#endif
}

// A fraction length must leave a code of the range to 1: 0 <= FL and 2^FL <= max + 1. Another gives NaN, as a scale
// that is not positive.
QUANTRAIN_HOST_DEVICE QParams fixed_point_qparams(int32_t fraction_length, QuantRange range) {
  const uint32_t bounded =
      fraction_length >= 0 && fraction_length <= 16 ? static_cast<uint32_t>(fraction_length) : 127u;
  const float inv_scale = detail::bits_to_float((127u + bounded) << 23);
  const float scale = detail::bits_to_float((127u - bounded) << 23);
  const bool valid = inv_scale <= range.max + 1.0f;
  const float nan = detail::bits_to_float(0x7fc00000u);
  return QParams{valid ? scale : nan, valid ? inv_scale : nan, 0.0f};
}

QUANTRAIN_HOST_DEVICE QParams load_scaled_qparams(const QParamTensors& t, int64_t index, QuantRange range) {
  const float zero_point = t.zero_point         ? static_cast<float>(load_parameter(t.zero_point + index))
                           : t.float_zero_point ? rounded_zero_point(load_parameter(t.float_zero_point + index), range)
                                                : 0.0f;
  return make_qparams(load_parameter(t.scale + index), zero_point);
}

QUANTRAIN_HOST_DEVICE QParams load_qparams(const QParamTensors& t, int64_t index, QuantRange range) {
  if (t.fraction_length) return fixed_point_qparams(load_parameter(t.fraction_length + index), range);
  return load_scaled_qparams(t, index, range);
}

struct FakeQuantizeArgs {
  const void* x;  // [numel]
  void* y;        // [numel]
  uint8_t* mask;  // [ceil(numel / 8)] or null; element i is bit i % 8 of byte i / 8
  DType dtype;
  Grouping grouping;
  QParamTensors qparams;
  QuantRange range;
  bool ends_pass = true;  // in the mask: code_in_range, or code_inside_range
};

struct FakeQuantizeBackwardArgs {
  const void* grad_output;  // [numel]
  const uint8_t* mask;      // [ceil(numel / 8)]
  void* grad_input;         // [numel]
  DType dtype;
  int64_t numel;
};

struct QuantizeArgs {
  const void* x;  // [numel]
  void* codes;    // [numel]
  DType dtype;
  DType code_dtype;
  Grouping grouping;
  QParamTensors qparams;
  QuantRange range;
  bool stochastic;
  PhiloxState philox;
};

struct DequantizeArgs {
  const void* codes;  // [numel]
  void* y;            // [numel]
  DType code_dtype;
  DType dtype;
  Grouping grouping;
  QParamTensors qparams;
};

// Reductions over rows go in two steps: a row is cut into chunks, each chunk gives one partial result, and the operator
// adds (or takes the extremes of) the partial results in a fixed order. The cut depends on the shape alone, so results
// repeat.
constexpr int64_t kRowChunk = 8192;

inline int64_t chunks_per_row(const Grouping& g) { return (g.inner + kRowChunk - 1) / kRowChunk; }

// The order in which range_error adds the errors of a row chunk, on every device. Element i of the chunk goes to sum i
// % (size * lanes); those sums are added by halves within a lane (sums lane * size to lane * size + size), then lanes
// by halves within 32 of them, then the 32s one after the other.
struct SumOrder {
  int size;   // elements of one load: 16 bytes
  int lanes;  // threads of a chunk on the device
};

inline SumOrder range_error_order(const Grouping& g, DType dtype) {
  const int size = dtype == DType::kFloat32 ? 4 : 8;
  const int64_t loads = ((g.inner < kRowChunk ? g.inner : kRowChunk) + size - 1) / size;
  return {size, loads >= 1024 ? 256 : loads >= 32 ? 32 : loads >= 8 ? 8 : 1};
}

constexpr int kMaxSums = 256 * 8;  // of a SumOrder

struct LearnableBackwardArgs {
  const void* grad_output;    // [numel]
  const void* x;              // [numel]
  void* grad_input;           // [numel]
  float* partial_scale;       // [rows, chunks]
  float* partial_zero_point;  // [rows, chunks] or null
  DType dtype;
  Grouping grouping;
  QParamTensors qparams;
  QuantRange range;
};

struct MinMaxArgs {
  const void* x;       // [numel]
  float* partial_min;  // [rows, chunks]
  float* partial_max;  // [rows, chunks]
  DType dtype;
  Grouping grouping;
};

struct RangeErrorArgs {
  const void* x;         // [numel]
  const float* min;      // [groups]
  const float* max;      // [groups]
  float* partial_error;  // [steps, rows, chunks]: candidate k has the range times (k + 1) / steps
  DType dtype;
  Grouping grouping;
  QuantRange range;
  bool symmetric;
  int64_t steps;
};

struct ObserveArgs {
  const float* low;         // [groups]: a batch's range
  const float* high;        // [groups]
  const bool* counts;       // [groups] or null: which groups are taken; null: those that are finite
  float* min;               // [groups]: the range of the batches
  float* max;               // [groups]
  float* scale;             // [groups] or null: nothing is computed from the range
  int32_t* zero_point;      // [groups] or null
  float* in_force;          // [groups] or null: scale, NaN where the batch does not count and `marks`
  int32_t* point_in_force;  // [groups] or null: zero_point
  int64_t groups;
  float averaging_constant;  // 0: the extremes of all batches
  QuantRange range;
  bool symmetric;
  bool marks;
};

struct QParamsFromRangeArgs {
  const float* min;     // [groups]
  const float* max;     // [groups]
  float* scale;         // [groups]
  int32_t* zero_point;  // [groups]
  int64_t groups;
  QuantRange range;
  bool symmetric;
};

// ---- observers ------------------------------------------------------------------------------------------------------

// Takes a batch's range into account where it counts. The first batch sets the range. A group of zeros sets that of a
// group that saw nothing (inf, -inf) to [0, 0] and changes no other; the first group that is not zero sets it anew.
QUANTRAIN_HOST_DEVICE void observe_group(const ObserveArgs& a, int64_t i) {
  const float low = a.low[i], high = a.high[i];
  float min = a.min[i], max = a.max[i];
  const bool counts = a.counts ? a.counts[i] : fabsf(low) <= FLT_MAX && fabsf(high) <= FLT_MAX;  // false with a NaN
  const bool nothing = fabsf(min) > FLT_MAX, zero = low == 0.0f && high == 0.0f;
  if (counts && (nothing || !zero)) {
    if (nothing || (min == 0.0f && max == 0.0f)) {
      min = low;
      max = high;
    } else if (a.averaging_constant > 0.0f) {
      min = min + a.averaging_constant * (low - min);
      max = max + a.averaging_constant * (high - max);
    } else {
      min = low < min ? low : min;
      max = high > max ? high : max;
    }
    a.min[i] = min;
    a.max[i] = max;
  }
  if (!a.scale) return;
  QParams p = qparams_from_range(min, max, a.range, a.symmetric);  // a scale of NaN where nothing was seen
  a.scale[i] = p.scale;
  if (a.zero_point) a.zero_point[i] = static_cast<int32_t>(p.zero_point);
  if (a.point_in_force) a.point_in_force[i] = static_cast<int32_t>(p.zero_point);
  if (a.in_force) a.in_force[i] = a.marks && !counts ? detail::bits_to_float(0x7fc00000u) : p.scale;
}

}  // namespace quantrain
