// Formulas and kernel arguments of the four_bit family; formats, layouts and rules are in quantrain/ops/four_bit.h.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "csrc/common/fake_quant.h"
#include "csrc/common/macros.h"
#include "csrc/common/types.h"

namespace quantrain {

enum class FourBitFormat { kNf4, kFp4, kE2m1, kInt4, kUint4, kTable };

constexpr int kFourBitCodes = 16;
constexpr int kScaleBlock = 256;  // scales that share a scale where they are compressed

QUANTRAIN_HOST_DEVICE QuantRange four_bit_range(bool affine) {
  return affine ? QuantRange{0.0f, 15.0f} : QuantRange{-8.0f, 7.0f};
}

// The values of a format's codes. Of nf4 by its float32 bits: recomputed quantiles differ in the last place.
struct FourBitValues {
  float value[kFourBitCodes];
};

constexpr FourBitValues four_bit_values(FourBitFormat format) {
  switch (format) {
    case FourBitFormat::kNf4:
      return {{-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
               -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
               0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
               0.7229568362236023f, 1.0f}};
    case FourBitFormat::kFp4:
      return {{0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 0.5f, 2.0f / 12, 0.25f, -0.0f, -0.0625f / 12, -8.0f / 12,
               -1.0f, -4.0f / 12, -0.5f, -2.0f / 12, -0.25f}};
    case FourBitFormat::kE2m1:
      return {{0.0f, 0.5f / 6, 1.0f / 6, 1.5f / 6, 2.0f / 6, 0.5f, 4.0f / 6, 1.0f, -0.0f, -0.5f / 6, -1.0f / 6,
               -1.5f / 6, -2.0f / 6, -0.5f, -4.0f / 6, -1.0f}};
    case FourBitFormat::kInt4:
      return {{0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1}};
    default:
      return {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}};
  }
}

// Which nibble of a byte holds the first of its two elements.
QUANTRAIN_HOST_DEVICE bool four_bit_high_first(FourBitFormat format) {
  return format != FourBitFormat::kInt4 && format != FourBitFormat::kUint4;
}

// Codes by nearest value: a number above so many thresholds has that rank, and the rank's code. With sign_magnitude the
// number is |r| and bit 3 of the code its sign.
struct FourBitRanks {
  float threshold[kFourBitCodes - 1];  // ascending midpoints of neighboring values, float32
  float value[kFourBitCodes];          // ascending
  uint8_t code[kFourBitCodes];         // of that value
  uint8_t zero;                        // the code of 0
  bool sign_magnitude;
  int thresholds;
};

QUANTRAIN_HOST_DEVICE int four_bit_rank(const FourBitRanks& ranks, float r) {
  int rank = 0;
  for (int i = 0; i < ranks.thresholds; ++i) rank += r > ranks.threshold[i];
  return rank;
}

// Of 16 values in any order. Device code calls it with one thread.
QUANTRAIN_HOST_DEVICE FourBitRanks four_bit_ranks(const float* values, bool sign_magnitude) {
  FourBitRanks ranks;
  const int count = sign_magnitude ? kFourBitCodes / 2 : kFourBitCodes;
  ranks.sign_magnitude = sign_magnitude;
  ranks.thresholds = count - 1;
  for (int i = 0; i < count; ++i) {
    int rank = 0;
    for (int j = 0; j < count; ++j) rank += values[j] < values[i] || (values[j] == values[i] && j < i);
    ranks.value[rank] = values[i];
    ranks.code[rank] = static_cast<uint8_t>(i);
  }
  for (int i = 0; i + 1 < count; ++i) ranks.threshold[i] = (ranks.value[i] + ranks.value[i + 1]) * 0.5f;
  ranks.zero = ranks.code[four_bit_rank(ranks, 0.0f)];
  return ranks;
}

// ---- scales ---------------------------------------------------------------------------------------------------------

enum class FourBitScaleRule { kAbsmax, kSigned, kSearch };

constexpr int kSearchFactors = 25;
QUANTRAIN_HOST_DEVICE float four_bit_search_factor(int i) { return static_cast<float>(0.8 + 0.0125 * i); }

// absmax: the largest magnitude, or NaN or Inf where the block holds one.
QUANTRAIN_HOST_DEVICE float four_bit_scale(FourBitFormat format, float absmax) {
  if (!(absmax <= FLT_MAX)) return detail::bits_to_float(0x7fc00000u);
  if (absmax < FLT_MIN) return 0.0f;
  if (format != FourBitFormat::kInt4) return absmax;
  const float scale = absmax / 7.0f;
  return scale < FLT_MIN ? FLT_MIN : scale;
}

// largest: the first element of the largest magnitude.
QUANTRAIN_HOST_DEVICE float four_bit_signed_scale(float largest) {
  const float absmax = fabsf(largest);
  if (!(absmax <= FLT_MAX)) return detail::bits_to_float(0x7fc00000u);
  if (absmax < FLT_MIN) return 0.0f;
  const float scale = largest / -8.0f;
  return fabsf(scale) < FLT_MIN ? (scale < 0.0f ? -FLT_MIN : FLT_MIN) : scale;
}

QUANTRAIN_HOST_DEVICE QParams four_bit_affine(float min, float max) {
  if (fabsf(min) < FLT_MIN && fabsf(max) < FLT_MIN) return {0.0f, 0.0f, 0.0f};
  return qparams_from_range(min, max, four_bit_range(/*affine=*/true), /*symmetric=*/false);
}

// What elements are multiplied by; 0 where the scale is 0, so that their code is that of 0.
QUANTRAIN_HOST_DEVICE float four_bit_inverse(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

// ---- codes ----------------------------------------------------------------------------------------------------------

QUANTRAIN_HOST_DEVICE uint8_t four_bit_code(const FourBitRanks& ranks, float x, float inverse) {
  const float r = x * inverse;
  if (!ranks.sign_magnitude) return ranks.code[four_bit_rank(ranks, r)];
  const uint8_t code = ranks.code[four_bit_rank(ranks, fabsf(r))];
  return static_cast<uint8_t>(x < 0.0f && inverse != 0.0f ? code | 8 : code);
}

// Of int4 (zero_point 0) and uint4, in the low 4 bits. NaN: 0.
QUANTRAIN_HOST_DEVICE uint8_t four_bit_integer_code(float x, float inverse, float zero_point, QuantRange range) {
  const float v = round_half_even(x * inverse) + zero_point;
  const float q = v > range.max ? range.max : v > range.min ? v : range.min;
  return static_cast<uint8_t>(static_cast<int32_t>(q) & 15);
}

// ---- kernel arguments -----------------------------------------------------------------------------------------------

struct FourBitQuantizeArgs {
  const void* x;  // [numel] of dtype
  DType dtype;
  int64_t numel;
  int64_t block;  // elements that share a scale, in a run; even
  FourBitFormat format;
  FourBitScaleRule rule;
  const float* table;   // [16], format kTable
  uint8_t* codes;       // [(numel + 1) / 2]
  float* scale;         // [blocks]
  int32_t* zero_point;  // [blocks], format kUint4
  int64_t blocks;
};

// The scale of a block as it is stored.
struct FourBitScales {
  const float* scale;             // [blocks], or null: compressed
  const uint8_t* scale_codes;     // [blocks]
  const float* scale_scale;       // [ceil(blocks / 256)]
  const float* scale_offset;      // [1]
  const int32_t* zero_point;      // [blocks] or null
  const float* float_zero_point;  // [blocks] or null
};

QUANTRAIN_HOST_DEVICE float four_bit_decompressed(float map_value, float scale_scale, float offset) {
  return map_value * scale_scale + offset;
}

struct FourBitDequantizeArgs {
  const uint8_t* codes;  // [(numel + 1) / 2]
  FourBitScales scales;
  FourBitFormat format;
  const float* table;  // [16], format kTable
  int64_t block;
  int64_t numel;
  void* y;  // [numel] of dtype
  DType dtype;
};

// The rows of a weight as int8 codes with one scale each: a second rounding, for products of integers.
struct FourBitToInt8Args {
  const uint8_t* codes;
  FourBitScales scales;
  FourBitFormat format;
  const float* table;      // [16], format kTable
  int64_t block;           // divides k; a multiple of 8
  const float* row_scale;  // [n]
  int8_t* y;               // [n, k]
  int64_t n;
  int64_t k;
};

// NaN: 0, as its row's scale says so.
QUANTRAIN_HOST_DEVICE int8_t four_bit_row_code(float value, float zero_point, float scale, float inverse) {
  const float v = round_half_even((value - zero_point) * scale * inverse);
  const float q = v > 127.0f ? 127.0f : v > -127.0f ? v : v <= -127.0f ? -127.0f : 0.0f;
  return static_cast<int8_t>(static_cast<int32_t>(q));
}

// y[m, n] = sum over k of x[m, k] w[n, k], plus bias[n]. On the CPU x and y are float32.
struct FourBitLinearArgs {
  const void* x;  // [m, k] of dtype
  const uint8_t* codes;
  FourBitScales scales;
  FourBitFormat format;
  const float* table;  // [16], format kTable
  int64_t block;       // elements of the weight that share a scale, in a run
  const void* bias;    // [n] of bias_dtype, or null
  DType bias_dtype;
  void* y;  // [m, n] of dtype
  DType dtype;
  int64_t m;
  int64_t n;
  int64_t k;
  void* workspace;  // CUDA: of four_bit_linear_workspace bytes
};

QUANTRAIN_HOST_DEVICE float four_bit_bias(const FourBitLinearArgs& a, int64_t n) {
  if (!a.bias) return 0.0f;
  if (a.bias_dtype == DType::kFloat16) return to_float(static_cast<const Half*>(a.bias)[n]);
  if (a.bias_dtype == DType::kBFloat16) return to_float(static_cast<const BFloat16*>(a.bias)[n]);
  return static_cast<const float*>(a.bias)[n];
}

}  // namespace quantrain
