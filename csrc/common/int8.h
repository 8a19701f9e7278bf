// Formulas and kernel arguments of the int8 family: symmetric codes with one scale per row, and their integer matrix
// product.
//
//   scale = absmax(row) / 127        code = rint(x * (1 / scale))  in [-127, 127]        (half to even)
//   stochastic: code = rint(x * (1 / scale) * (1 - 2^-20) + d),  d uniform in [-1/2, 1/2) with 16 bits
//
// The product's mean is x / scale within 2e-4 steps: the factor keeps the row's largest element below 127.5 for every
// d. Rounded to nearest, codes and scale are those of choose_qparams and quantize (fake_quant.h). An all-zero row has
// scale 1; NaN or Inf in a row makes its scale NaN and its codes 0.
#pragma once

#include <cfloat>
#include <cstdint>

#include "csrc/common/fake_quant.h"
#include "csrc/common/macros.h"
#include "csrc/common/philox.h"
#include "csrc/common/types.h"

namespace quantrain {

constexpr float kInt8Max = 127.0f;
constexpr int kInt8Item = 8;  // elements that one Philox block serves, consecutive in a row of the input
constexpr float kInt8Shrink = 1.0f - 0x1p-20f;  // see above

QUANTRAIN_HOST_DEVICE int64_t int8_items_per_row(int64_t columns) { return (columns + kInt8Item - 1) / kInt8Item; }

// absmax: NaN where the row holds NaN.
QUANTRAIN_HOST_DEVICE float int8_scale(float absmax) {
  if (!(absmax <= FLT_MAX)) return detail::bits_to_float(0x7fc00000u);
  return qparams_from_range(-absmax, absmax, QuantRange{-kInt8Max, kInt8Max}, true).scale;
}

// What an element is multiplied by before it is rounded.
QUANTRAIN_HOST_DEVICE float int8_inverse(float scale, bool stochastic) {
  const float inverse = 1.0f / scale;
  return stochastic ? inverse * kInt8Shrink : inverse;
}

// Half h (0 low, 1 high) of a random word, n, as n 2^-16 - 1/2, exactly. Its mean is 2^-17 below 0, and 0 stays 0.
QUANTRAIN_HOST_DEVICE float int8_dither(uint32_t word, int half) {
#if defined(__CUDA_ARCH__)
  const float whole = detail::bits_to_float(__byte_perm(word, 0x4b000000u, half ? 0x7632 : 0x7610));  // 2^23 + n
  return __fmaf_rn(whole, 0x1p-16f, -128.5f);
#else
  const uint32_t n = half ? word >> 16 : word & 0xffffu;
  return detail::bits_to_float(0x3f800000u | n << 7) - 1.5f;
#endif
}

// The code in the low byte. scaled = x * int8_inverse; dither 0 rounds to nearest. Adding 3 * 2^22 leaves the integer
// in the low bits, without the conversion instruction, which is slow on the device. Of a NaN the byte says nothing:
// kernels write 0 where the scale is NaN.
QUANTRAIN_HOST_DEVICE uint32_t int8_code(float scaled, float dither) {
  return detail::float_to_bits((scaled + dither) + 12582912.0f);
}

// Outlier columns (quantrain/ops/int8_outliers.h) as q = rint(x / s2) = 128 hi + lo of 15 bits, on a grid that is the
// other columns' but for a power of two, so that one int32 sum holds both:
//
//   s2 = s1 2^e,  e the least that q fits        sum = main b^T + ((128 hi + lo) bo^T) 2^e
//   s1 = max(absmax of the others / 127, absmax of the outlier columns / (16256 2^limit)),  1 for zeros
//
// With the limit, Ko 2^limit <= 512, the second term stays below 2^30. It is met where an outlier is 4096 times as
// large as all others (16 columns), whose codes then matter less than the outlier's own rounding.
constexpr int kInt8Plane = 128;  // what hi counts
constexpr float kInt8LargestOutlier = 127.0f * kInt8Plane;
constexpr int64_t kInt8Outliers = 512;        // columns up to which that holds
constexpr int64_t kInt8OutlierDepth = 65536;  // of main: its own sum is below 2^30

QUANTRAIN_HOST_DEVICE int int8_outlier_limit(int64_t count) {
  int limit = 0;
  while (count << (limit + 1) <= kInt8Outliers && limit < 9) ++limit;
  return limit;
}

struct Int8OutlierScales {
  float main, outlier;  // s1, s2
};

// Of finite parts. main: int8_scale of the other columns, 0 where they are zeros; absmax: of the outlier columns.
QUANTRAIN_HOST_DEVICE Int8OutlierScales int8_outlier_scales(float main, float absmax, int64_t count) {
  const int limit = int8_outlier_limit(count);
  float least = absmax / (kInt8LargestOutlier * static_cast<float>(1 << limit));
  // Not smaller: the reciprocal of a subnormal number may be Inf.
  if (absmax != 0.0f && least < FLT_MIN) least = FLT_MIN;
  Int8OutlierScales scales{main > least ? main : least, 0.0f};
  if (scales.main == 0.0f) scales.main = 1.0f;
  scales.outlier = scales.main;
  for (int e = 0; e < limit && absmax > kInt8LargestOutlier * scales.outlier; ++e) scales.outlier *= 2.0f;
  return scales;
}

// q of a value that is scaled already.
QUANTRAIN_HOST_DEVICE int32_t int8_outlier_code(float scaled) {
  const float code = rintf(scaled);
  return static_cast<int32_t>(code > kInt8LargestOutlier    ? kInt8LargestOutlier
                              : code < -kInt8LargestOutlier ? -kInt8LargestOutlier
                                                            : code);
}

QUANTRAIN_HOST_DEVICE int32_t int8_outlier_high(int32_t q) { return (q + kInt8Plane / 2) >> 7; }

// e; 0 where a scale is NaN. Of scales that int8_outlier_scales did not give it is some e that fits.
QUANTRAIN_HOST_DEVICE int int8_outlier_shift(float main_scale, float outlier_scale, int64_t count) {
  const float ratio = outlier_scale / main_scale;
  if (!(ratio >= 1.0f && ratio <= FLT_MAX)) return 0;
  const int shift = static_cast<int>(detail::float_to_bits(ratio) >> 23) - 127, limit = int8_outlier_limit(count);
  return shift < limit ? shift : limit;
}

// ---- kernel arguments -----------------------------------------------------------------------------------------------

// Codes and scales of rows. With column_factor the matrix is x[r, c] * column_factor[c].
struct Int8QuantizeRowsArgs {
  const void* x;               // [rows, columns] of dtype
  const float* column_factor;  // [columns] or null
  int8_t* codes;               // [rows, columns]
  float* scale;                // [rows]
  DType dtype;
  int64_t rows;
  int64_t columns;
  bool stochastic;
  PhiloxState philox;  // block r * int8_items_per_row(columns) + c / 8 serves element (r, c)
};

// absmax of the columns of x[r, c] * row_factor[r]; NaN where a column holds NaN.
struct Int8ColumnAbsmaxArgs {
  const void* x;            // [rows, columns] of dtype
  const float* row_factor;  // [rows] or null
  float* absmax;            // [columns]
  DType dtype;
  int64_t rows;
  int64_t columns;
};

// Codes of the columns of x[r, c] * row_factor[r], written as rows (transposed).
struct Int8QuantizeColumnsArgs {
  const void* x;            // [rows, columns] of dtype
  const float* row_factor;  // [rows] or null
  const float* absmax;      // [columns]
  int8_t* codes;            // [columns, rows]
  float* scale;             // [columns]
  DType dtype;
  int64_t rows;
  int64_t columns;
  bool stochastic;
  PhiloxState philox;  // as for rows: by element (r, c) of x
};

struct Int8TransposeArgs {
  const int8_t* codes;  // [rows, columns]
  int8_t* transposed;   // [columns, rows]
  int64_t rows;
  int64_t columns;
};

// How a weight [out, in] enters dX = dY W, whose sum runs over `out`: its codes transposed, [in, out]. The scale s of a
// row stands inside that sum, so either dY's columns are multiplied by it ("fold": the codes are the forward's), or the
// columns are quantized anew ("columns"). Folding is exact, but a token's scale then follows its largest dY * s; its
// variance grows by at most max(s^2) / mean(s^2).
enum class Int8WeightScheme { kFold, kColumns, kAuto };  // kAuto: fold where that bound is at most kInt8FoldBound

constexpr float kInt8FoldBound = 4.0f;

struct Int8WeightTransposeArgs {
  const void* weight;      // [out, in] of dtype
  const float* row_scale;  // [out], of the forward's codes
  int8_t* codes;           // [in, out]
  float* column_factor;    // [out]: row_scale where folded, else 1
  float* scale;            // [in]: 1 where folded, else of the columns
  DType dtype;
  int64_t out;
  int64_t in;
  Int8WeightScheme scheme;
  float* absmax;  // [in], scratch
};

// Rows whose outlier columns lie apart. A row with NaN or Inf in either part gets scales NaN, codes and planes 0.
struct Int8QuantizeOutliersArgs {
  const void* x;               // [rows, columns] of dtype
  const float* column_factor;  // [columns] or null
  const int64_t* outliers;     // [count]; negative: a column of zeros
  int8_t* codes;               // [rows, columns], 0 in those columns
  int8_t* planes;              // [rows, 2 count]: hi, then lo
  float* scale;                // [rows, 2]: s1, s2
  DType dtype;
  int64_t rows;
  int64_t columns;
  int64_t count;
};

// Of Int8MmArgs: what its sums begin with.
struct Int8MmOutliers {
  int64_t count = 0;               // columns; 0: none
  const int8_t* planes = nullptr;  // [m, 2 count]
  const int8_t* codes = nullptr;   // [n, count]
  const float* scale = nullptr;    // [m, 2]: s1, s2
  const float* sums = nullptr;     // on the CPU: [m, 2, n], of both planes with codes
  const int8_t* side = nullptr;    // for Hopper's kernels: [m, 80], see csrc/cuda/int8_mm/sm90/with_outliers.cuh
};

// d = (float(a b^T) * b_scale) * a_scale + bias, rounded to dtype; the sum is exact in int32. With accumulate: d +=
// that, in float32.
struct Int8MmArgs {
  const int8_t* a;       // [m, k], k a multiple of 16, on a 16-byte boundary
  const int8_t* b;       // [n, k] likewise
  const float* a_scale;  // [m] or, with a_scale_stride 0, [1]; null: 1
  const float* b_scale;  // [n] or [1] likewise
  int64_t a_scale_stride;
  int64_t b_scale_stride;
  const float* bias;  // [n] or null
  void* d;            // [m, n] of dtype
  DType dtype;
  int64_t m;
  int64_t n;
  int64_t k;
  bool accumulate;
  void* workspace;  // of int8_mm_workspace bytes
  Int8MmOutliers outliers = {};
};

// y = (x codes^T) * scale + bias, x of floating point: sums in float32.
struct Int8WeightMmArgs {
  const void* x;        // [m, k] of dtype; on the CPU float32
  const int8_t* codes;  // [n, k]
  const float* scale;   // [n] or, with scale_stride 0, [1]
  int64_t scale_stride;
  const float* bias;  // [n] or null
  void* y;            // [m, n] of x's type
  DType dtype;
  int64_t m;
  int64_t n;
  int64_t k;
};

}  // namespace quantrain
