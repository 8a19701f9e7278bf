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
