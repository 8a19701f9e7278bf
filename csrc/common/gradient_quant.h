// Formulas and kernel arguments of the gradient_quant family: StatQuant (Chen, Gai, Yao, Mahoney, Gonzalez, "A
// statistical framework for low-bitwidth training of deep neural networks", NeurIPS 2020). A gradient is a matrix X [N,
// D], one row per sample (or token).
//
// Grid. B = 2^bits - 1 steps over the range of a block (tensor, row or column): value(c) = c * scale + offset for int8
// codes c in [-2^(bits-1), 2^(bits-1) - 1]. An element becomes one of its two neighbours on the grid, such that its
// mean is the element.
//
// Householder (BHQ). Rows are put into groups, one large row (the leader) with k - 1 small ones. T = Q diag(s) with Q =
// I - 2 n n^T / ||n||^2, n = 1 / sqrt(k) - e_1, spreads the leader over the k rows of its group, which are then rounded
// as rows: x^ = T^-1 Q_rows(T x).
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "csrc/common/macros.h"
#include "csrc/common/philox.h"
#include "csrc/common/types.h"

namespace quantrain {

// NaN wins.
QUANTRAIN_HOST_DEVICE float smaller(float a, float b) { return a < b || !(a == a) ? a : b; }
QUANTRAIN_HOST_DEVICE float larger(float a, float b) { return a > b || !(a == a) ? a : b; }

// ---- the grid -------------------------------------------------------------------------------------------------------

struct Grid {
  float scale;
  float offset;
};

QUANTRAIN_HOST_DEVICE Grid nan_grid() {
  const float nan = detail::bits_to_float(0x7fc00000u);
  return Grid{nan, nan};
}

// Codes of `bits` bits, as floats.
QUANTRAIN_HOST_DEVICE float half_codes(int bits) { return static_cast<float>(1 << (bits - 1)); }

// The smallest grid over [min, max]; NaN where the range is not finite, so that a loss scaler sees it. A constant block
// is code 0.
QUANTRAIN_HOST_DEVICE Grid affine_grid(float min, float max, int bits) {
  const float range = max - min, half = half_codes(bits);
  if (!(range <= FLT_MAX)) return nan_grid();
  if (range == 0.0f) return Grid{1.0f, min};
  float scale = range / (2.0f * half - 1.0f);
  scale = scale < FLT_MIN ? FLT_MIN : scale;  // 1 / scale stays finite
  return Grid{scale, min + half * scale};
}

// The scale that covers [min, max] with zero at step `zero` of B, for min <= 0 <= max.
QUANTRAIN_HOST_DEVICE float scale_with_zero(float min, float max, float zero, float steps) {
  const float below = min < 0.0f ? -min / zero : 0.0f;
  const float above = max > 0.0f ? max / (steps - zero) : 0.0f;
  return below > above ? below : above;
}

// The smallest grid over [min, max] and 0 that holds 0 exactly: most elements of a sparse gradient are then kept as
// they are.
QUANTRAIN_HOST_DEVICE Grid zero_grid(float min, float max, int bits) {
  const float half = half_codes(bits), steps = 2.0f * half - 1.0f;
  if (!(max - min <= FLT_MAX)) return nan_grid();
  min = min < 0.0f ? min : 0.0f;
  max = max > 0.0f ? max : 0.0f;
  const float width = max - min;
  if (!(width <= FLT_MAX)) return nan_grid();
  if (width == 0.0f) return Grid{1.0f, 0.0f};
  float zero = floorf(-min / width * steps);
  zero = zero > steps - 1.0f ? steps - 1.0f : zero;
  const float down = scale_with_zero(min, max, zero, steps);  // infinite where a side has no code
  const float up = scale_with_zero(min, max, zero + 1.0f, steps);
  float scale = up < down ? up : down;
  zero = up < down ? zero + 1.0f : zero;
  scale = scale < FLT_MIN ? FLT_MIN : scale;
  return Grid{scale, (half - zero) * scale};
}

QUANTRAIN_HOST_DEVICE Grid make_grid(float min, float max, int bits, bool preserve_zero) {
  return preserve_zero ? zero_grid(min, max, bits) : affine_grid(min, max, bits);
}

// ---- random numbers: sixteen bits an element ------------------------------------------------------------------------

constexpr int kPhiloxElements = 8;  // elements that one Philox block serves, consecutive in a row
constexpr uint64_t kSecondRounding = 1ull
                                     << 62;  // added to the block's index: numbers for rounding the result to its type

QUANTRAIN_HOST_DEVICE int64_t philox_blocks_per_row(int64_t columns) {
  return (columns + kPhiloxElements - 1) / kPhiloxElements;
}

// (h + 1/2) 2^-16 for half h (0 low, 1 high) of a word, exactly: never 0 or 1. A probability is met to 2^-17.
QUANTRAIN_HOST_DEVICE float uniform_of_half(uint32_t word, int half) {
#if defined(__CUDA_ARCH__)
  const float whole = detail::bits_to_float(__byte_perm(word, 0x4b000000u, half ? 0x7632 : 0x7610));  // 2^23 + h
  return __fmaf_rn(whole, 0x1p-16f, -(128.0f - 0x1p-17f));
#else
  const uint32_t h = half ? word >> 16 : word & 0xffffu;
  return detail::bits_to_float(0x3f800000u | h << 7) - (1.0f - 0x1p-17f);
#endif
}

QUANTRAIN_HOST_DEVICE float uniform16(uint32_t h) { return uniform_of_half(h, 0); }

// Number j of a block.
QUANTRAIN_HOST_DEVICE float philox_uniform16(const Philox4& block, int j) {
  return uniform_of_half(block.word[j / 2], j % 2);
}

// ---- rounding -------------------------------------------------------------------------------------------------------

// To nearest, halves to even, for |value| < 2^22: two additions, where an instruction for it is slow on the device.
QUANTRAIN_HOST_DEVICE float round_small(float value) { return value + 12582912.0f - 12582912.0f; }

QUANTRAIN_HOST_DEVICE float clamp_between(float value, float low, float high) {
#if defined(__CUDA_ARCH__)
  return fminf(fmaxf(value, low), high);
#else
  value = value > low ? value : low;  // NaN becomes low, as there
  return value < high ? value : high;
#endif
}

// Two values in T, to nearest, as floats.
template <typename T>
QUANTRAIN_HOST_DEVICE void pair_in_type(float& low, float& high) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 2) {  // both at once: the conversion of one is an eighth as fast
    uint32_t word;
    if constexpr (std::is_same_v<T, BFloat16>) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
      memcpy(&word, &pair, sizeof(word));
    } else {
      const __half2 pair = __floats2half2_rn(low, high);
      memcpy(&word, &pair, sizeof(word));
    }
    low = to_float(T{static_cast<uint16_t>(word & 0xffffu)});
    high = to_float(T{static_cast<uint16_t>(word >> 16)});
  }
#else
  low = to_float(from_float<T>(low));
  high = to_float(from_float<T>(high));
#endif
}

struct Rounded {
  float code;
  float value;  // representable in T
};

// Between the grid's two neighbours of x as T holds them, up with the probability that makes the mean x. Exact on grid
// points, the block's extremes among them. `uniform` 1/2 rounds to nearest, ties down. Where x is a grid point its
// neighbour below may count as the lower one; it then goes up.
template <typename T>
QUANTRAIN_HOST_DEVICE Rounded round_to_grid(float x, Grid grid, float inv_scale, float half, float uniform) {
  const float code = clamp_between(round_small((x - grid.offset) * inv_scale - 0.5f), -half, half - 2.0f);
  const float next = code + 1.0f;
  float low = code * grid.scale + grid.offset, high = next * grid.scale + grid.offset;
  if constexpr (std::is_same_v<
                    T, Half>) {  // a grid with zero may end above the largest half; its last point then is that half
    low = clamp_between(low, -65504.0f, 65504.0f) + (grid.scale - grid.scale);  // NaN stays
    high = clamp_between(high, -65504.0f, 65504.0f) + (grid.scale - grid.scale);
  }
  pair_in_type<T>(low, high);
  const bool up = x - low > uniform * (high - low);
  return Rounded{up ? next : code, up ? high : low};
}

// The code of a float32 y without bias, where no point of the grid need be met exactly: fewer steps than round_to_grid.
// `dither` is uniform in (-1/2, 1/2); 0 rounds to nearest.
QUANTRAIN_HOST_DEVICE float dithered_code(float y, Grid grid, float inv_scale, float half, float dither) {
  return clamp_between(round_small((y - grid.offset) * inv_scale + dither), -half, half - 1.0f);
}

QUANTRAIN_HOST_DEVICE float grid_value(float code, Grid grid) { return code * grid.scale + grid.offset; }

// value in T without bias: down or up to a neighbour in T. Inf and NaN stay.
template <typename T>
QUANTRAIN_HOST_DEVICE T round_to_type(float value, uint32_t random16);

template <>
QUANTRAIN_HOST_DEVICE float round_to_type<float>(float value, uint32_t) {
  return value;
}

template <>
QUANTRAIN_HOST_DEVICE BFloat16 round_to_type<BFloat16>(float value, uint32_t random16) {
  const uint32_t bits = detail::float_to_bits(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  const uint32_t sum = bits + (finite ? random16 : 0u);  // carries with probability (dropped bits) / 2^16
  return BFloat16{static_cast<uint16_t>((sum >> 16) | (!finite && (bits & 0x007fffffu) ? 0x40u : 0u))};
}

template <>
QUANTRAIN_HOST_DEVICE Half round_to_type<Half>(float value, uint32_t random16) {
  const uint32_t bits = detail::float_to_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // A half's step at this magnitude: 2^(exponent - 10), at least 2^-24.
  const uint32_t exponent = magnitude >> 23 > 113u ? magnitude >> 23 : 113u;
  const float step = detail::bits_to_float((exponent - 10u) << 23);
  const float inv_step = detail::bits_to_float((264u - exponent) << 23);
  const float steps = detail::bits_to_float(magnitude) * inv_step;  // exact: a power of two
  const float whole = floorf(steps);
  const float rounded = (whole + (steps - whole > uniform16(random16) ? 1.0f : 0.0f)) * step;
  const bool in_range =
      magnitude < 0x477fe000u;  // 65504, the largest half; above it, Inf and NaN as from_float has them
  const float result = detail::bits_to_float(
      detail::float_to_bits(in_range ? rounded : detail::bits_to_float(magnitude)) | (bits & 0x80000000u));
  return from_float<Half>(result);
}

// ---- the reflector of a group ---------------------------------------------------------------------------------------

// A row of T: y_p = s x_p - m sum_q(n_q s_q x_q) over the rows q of the group, and back x_p = t (y_p - m sum_q(n_q
// y_q)). A row on its own has n = m = 0. n is negative at a group's first row, the leader, and nowhere else.
struct Reflector {
  float s;
  float n;
  float m;
  float t;
};

// Past the last row of the group that begins at position p.
QUANTRAIN_HOST_DEVICE int64_t group_end(const Reflector* reflector, int64_t p, int64_t end) {
  if (!(reflector[p].n < 0.0f)) return p + 1;
  int64_t last = p + 1;
  while (last < end && reflector[last].n > 0.0f) ++last;
  return last;
}

// The cube root for a in [2^-60, 2^60], by operations that every machine rounds alike.
QUANTRAIN_HOST_DEVICE double cube_root(double a) {
  uint64_t bits;
  memcpy(&bits, &a, sizeof(bits));
  bits = bits / 3 + 0x2a9f7893782da1ceull;  // 2/3 of the exponent's bias: right to about 4 %
  double y;
  memcpy(&y, &bits, sizeof(y));
  for (int i = 0; i < 5; ++i) y = (2.0 * y + a / (y * y)) / 3.0;  // Newton: 4 %, 1e-3, 3e-6, 1e-11, exact
  return y;
}

// The largest magnitude in Q of size k.
QUANTRAIN_HOST_DEVICE double largest_reflector_entry(int64_t k) {
  const double root = sqrt(static_cast<double>(k)), off = 1.0 / (static_cast<double>(k) - root);
  double largest = 1.0 / root;
  const double diagonal = off > 1.0 ? off - 1.0 : 1.0 - off;
  largest = diagonal > largest ? diagonal : largest;
  return k > 2 && off > largest ? off : largest;
}

// s_1 / s_2 of a group (statquant's code; the paper's equation for s_1 and s_2 with Q's largest entry for its factor
// 2): the row ranges of T x are then balanced. Only the ratio matters, each row of T x having its own grid.
QUANTRAIN_HOST_DEVICE float leader_scale(int64_t k, float leader_range, float small_range) {
  const double lead = leader_range;
  if (!(lead > 0.0)) return 1.0f;
  const double least = lead * 0x1p-30;  // of rows without a range; T stays well conditioned
  const double small = small_range > least ? static_cast<double>(small_range) : least;
  const double root = sqrt(static_cast<double>(k));
  return static_cast<float>(cube_root(small / lead * largest_reflector_entry(k) * root / static_cast<double>(k - 1)));
}

QUANTRAIN_HOST_DEVICE Reflector make_reflector(int64_t k, bool leads, float leader_range, float small_range,
                                               bool zero_row) {
  Reflector r{1.0f, 0.0f, 0.0f, 1.0f};
  if (k > 1) {
    const double root = sqrt(static_cast<double>(k));
    r.n = static_cast<float>(leads ? 1.0 / root - 1.0 : 1.0 / root);
    r.m = static_cast<float>(leads ? -1.0 : 1.0 / (root - 1.0));
    if (leads) {
      r.s = leader_scale(k, leader_range, small_range);
      r.t = 1.0f / r.s;
    }
  }
  if (zero_row) r.t = 0.0f;  // its value is known: no noise needed
  return r;
}

// Small rows that the leaders 0 to i take together, of `small`: in proportion to their ranges (`sum` of those, `total`
// of all leaders), halves rounded up. Each leader's share is above one, so each gets at least one.
QUANTRAIN_HOST_DEVICE int64_t small_rows_upto(int64_t i, int64_t leaders, int64_t small, double sum, double total) {
  if (i + 1 == leaders || !(total > 0.0)) return small;
  return static_cast<int64_t>(floor(static_cast<double>(small) * sum / total + 0.5));
}

// What a row's range counts as when rows are ordered: rows with NaN or Inf count as small, and make their group NaN.
QUANTRAIN_HOST_DEVICE float ordering_range(float min, float max) {
  const float range = max - min;
  return range <= FLT_MAX ? range : 0.0f;
}

// ---- blocks of rows -------------------------------------------------------------------------------------------------

constexpr int64_t kMaxGroup = 256;  // rows of a block, and so of a group, at most: what a kernel keeps on chip

// Rows in order of falling range are dealt to `blocks` blocks: block j has those of rank j, j + blocks, ... Each block
// then has its share of large rows, and is grouped by itself.
struct RowBlocks {
  int64_t rows = 0;
  int64_t blocks = 0;

  QUANTRAIN_HOST_DEVICE int64_t size(int64_t block) const { return rows / blocks + (block < rows % blocks ? 1 : 0); }
  QUANTRAIN_HOST_DEVICE int64_t first(int64_t block) const {
    const int64_t larger = rows % blocks;
    return rows / blocks * block + (block < larger ? block : larger);
  }
  QUANTRAIN_HOST_DEVICE int64_t rank(int64_t block, int64_t i) const { return block + i * blocks; }
};

inline RowBlocks make_row_blocks(int64_t rows, int64_t max_group) {
  return RowBlocks{rows, (rows + max_group - 1) / max_group};
}

// ---- kernel arguments -----------------------------------------------------------------------------------------------

enum class GridAxis { kTensor, kRow, kColumn };

struct GradientGridsArgs {
  const float* min;  // [groups] by group_stride, [splits] by split_stride
  const float* max;  // likewise
  float* scale;      // [groups]
  float* offset;     // [groups]
  int64_t groups;
  int64_t group_stride;
  int64_t splits;
  int64_t split_stride;
  int bits;
  bool preserve_zero;
};

struct RoundGradientArgs {
  const void* x;        // [rows, columns]
  void* y;              // [rows, columns] of dtype, or null
  int8_t* codes;        // [rows, columns], or null
  const float* scale;   // [1], [rows] or [columns]
  const float* offset;  // likewise
  DType dtype;
  int64_t rows;
  int64_t columns;
  GridAxis axis;
  int bits;
  bool stochastic;
  PhiloxState philox;
};

// Grid and rounding in one pass, one grid per row; rows up to kFusedColumns columns. With column_y also a second rounding,
// of values, with a draw and grids of its own, one per column, which are known.
struct RoundRowsArgs {
  const void* x;  // [rows, columns]
  void* y;        // [rows, columns] of dtype, or null
  int8_t* codes;  // [rows, columns], or null
  float* scale;   // [rows], or null
  float* offset;  // [rows], or null
  DType dtype;
  int64_t rows;
  int64_t columns;
  int bits;
  bool preserve_zero;
  bool stochastic;
  PhiloxState philox;
  void* column_y = nullptr;              // [rows, columns] of dtype, or null
  const float* column_scale = nullptr;   // [columns]
  const float* column_offset = nullptr;  // [columns]
  int column_bits = 0;
  PhiloxState column_philox = {};
};

// Partial extremes [rows, splits] of rows to whole ones, and the ranges by which rows are ordered.
struct OrderingRangesArgs {
  const float* partial_min;  // [rows, splits]
  const float* partial_max;  // [rows, splits]
  float* min;                // [rows]
  float* max;                // [rows]
  float* range;              // [rows]
  int64_t rows;
  int64_t splits;
};

struct PlanReflectorsArgs {
  const int64_t* by_range;  // [rows], row indices by falling range
  const float* min;         // [rows]
  const float* max;         // [rows]
  int32_t* order;           // [rows], row at each position: block after block, group after group, leaders first
  Reflector* reflector;     // [rows], by position
  RowBlocks blocks;
};

// Ranges of the rows of T x, over `splits` spans of columns.
struct ReflectedRangesArgs {
  const void* x;               // [rows, columns]
  const int32_t* order;        // [rows]
  const Reflector* reflector;  // [rows]
  float* partial_min;          // [splits, rows], by row
  float* partial_max;          // [splits, rows]
  DType dtype;
  int64_t columns;
  int64_t splits;
  RowBlocks blocks;
};

struct RoundReflectedArgs {
  const void* x;               // [rows, columns]
  void* y;                     // [rows, columns] of dtype, or null
  int8_t* codes;               // [rows, columns], or null
  const int32_t* order;        // [rows]
  const Reflector* reflector;  // [rows]
  const float* scale;          // [rows] of T x
  const float* offset;         // [rows]
  DType dtype;
  int64_t columns;
  int64_t splits;
  RowBlocks blocks;
  int bits;
  bool stochastic;
  PhiloxState philox;
};

// T x, or T^-1 x.
struct ReflectRowsArgs {
  const float* x;              // [rows, columns]
  float* y;                    // [rows, columns]
  const int32_t* order;        // [rows]
  const Reflector* reflector;  // [rows]
  int64_t rows;
  int64_t columns;
  bool inverse;
};

}  // namespace quantrain
