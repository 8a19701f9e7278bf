#include "csrc/cpu/four_bit.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "csrc/common/dynamic_map.h"
#include "csrc/cpu/four_bit_avx2.h"
#include "csrc/cpu/lanes.h"
#include "csrc/cpu/simd.h"

// Blocks are walked in pieces of kPiece elements, which stay in the first-level cache as float32 or as one code per
// byte.

namespace quantrain::cpu {
namespace {

constexpr int kPiece = 512;
constexpr int64_t kMaxRows = 8;  // of x that a decoded piece serves at once

bool integers(FourBitFormat format) { return format == FourBitFormat::kInt4 || format == FourBitFormat::kUint4; }

FourBitRanks ranks_of(FourBitFormat format, const float* table) {
  const FourBitValues values = four_bit_values(format);
  const bool sign_magnitude = format == FourBitFormat::kFp4 || format == FourBitFormat::kE2m1;
  return four_bit_ranks(table ? table : values.value, sign_magnitude);
}

// ---- quantize -------------------------------------------------------------------------------------------------------

struct Range {
  float min = 0.0f, max = 0.0f, largest = 0.0f;  // largest: the first element of the largest magnitude
  float absmax = 0.0f;                           // NaN or Inf where one is in the block
};

template <typename T>
QUANTRAIN_INLINE Range range_of(const T* x, int64_t n, bool with_sign) {
  int32_t magnitude = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto bits = static_cast<int32_t>(detail::float_to_bits(to_float(x[i])) & 0x7fffffffu);
    magnitude = std::max(magnitude, bits);
  }
  Range range;
  range.absmax = detail::bits_to_float(static_cast<uint32_t>(magnitude));
  if (!with_sign) return range;
  for (int64_t i = 0; i < n; ++i) {
    const float value = to_float(x[i]);
    range.min = value < range.min ? value : range.min;
    range.max = value > range.max ? value : range.max;
  }
  for (int64_t i = 0; i < n; ++i) {
    const float value = to_float(x[i]);
    if (std::fabs(value) == range.absmax) {
      range.largest = value;
      break;
    }
  }
  return range;
}

// The factor with the least squared error, the first of equals: all of them side by side.
template <typename T>
QUANTRAIN_INLINE float searched_scale(const FourBitQuantizeArgs& a, const FourBitRanks& ranks, const T* x, int64_t n,
                                      float base) {
  constexpr int kPadded = 32;
  float scale[kPadded], inverse[kPadded], error[kPadded];
  for (int c = 0; c < kPadded; ++c) {
    scale[c] = base * four_bit_search_factor(std::min(c, kSearchFactors - 1));
    inverse[c] = four_bit_inverse(scale[c]);
    error[c] = 0.0f;
  }
  for (int64_t i = 0; i < n; ++i) {
    const float value = to_float(x[i]);
    for (int c = 0; c < kPadded; ++c) {
      const float r = value * inverse[c];
      float decoded;
      if (a.format == FourBitFormat::kInt4) {
        decoded = clamp_code(round_half_even(r), four_bit_range(/*affine=*/false));
      } else {
        const float m = ranks.sign_magnitude ? std::fabs(r) : r;
        decoded = ranks.value[0];
        for (int t = 0; t < ranks.thresholds; ++t) decoded = m > ranks.threshold[t] ? ranks.value[t + 1] : decoded;
        decoded = ranks.sign_magnitude && r < 0.0f ? -decoded : decoded;
      }
      const float off = value - decoded * scale[c];
      error[c] += off * off;
    }
  }
  int best = 0;
  for (int c = 1; c < kSearchFactors; ++c) best = error[c] < error[best] ? c : best;
  return scale[best];
}

template <typename T>
QUANTRAIN_INLINE void quantize_block(const FourBitQuantizeArgs& a, const FourBitRanks& ranks, int64_t block) {
  const int64_t first = block * a.block, n = std::min(a.block, a.numel - first);
  const T* x = static_cast<const T*>(a.x) + first;
  const bool affine = a.format == FourBitFormat::kUint4, is_signed = a.rule == FourBitScaleRule::kSigned;
  const Range range = range_of(x, n, affine || is_signed);
  QParams qparams{0.0f, 0.0f, 0.0f};
  if (affine && range.absmax <= std::numeric_limits<float>::max())
    qparams = four_bit_affine(range.min, range.max);
  else if (is_signed && range.absmax <= std::numeric_limits<float>::max())
    qparams.scale = four_bit_signed_scale(range.largest);
  else
    qparams.scale = four_bit_scale(a.format, range.absmax);
  if (a.rule == FourBitScaleRule::kSearch && qparams.scale > 0.0f)
    qparams.scale = searched_scale(a, ranks, x, n, qparams.scale);
  a.scale[block] = qparams.scale;
  if (affine) a.zero_point[block] = static_cast<int32_t>(qparams.zero_point);
  const bool valid = qparams.scale == qparams.scale;
  const float inverse = valid ? four_bit_inverse(qparams.scale) : 0.0f;
  uint8_t* bytes = a.codes + first / 2;
  const bool whole_numbers = integers(a.format), high_first = four_bit_high_first(a.format);
  const QuantRange limits = four_bit_range(affine);
  const uint8_t zero = whole_numbers ? static_cast<uint8_t>(static_cast<int>(qparams.zero_point) & 15) : ranks.zero;
  uint8_t code[kPiece];
  for (int64_t at = 0; at < n; at += kPiece) {
    const int count = static_cast<int>(std::min<int64_t>(kPiece, n - at));
    if (!valid)
      for (int i = 0; i < count; ++i) code[i] = zero;
    else if (whole_numbers)
      for (int i = 0; i < count; ++i)
        code[i] = four_bit_integer_code(to_float(x[at + i]), inverse, qparams.zero_point, limits);
    else
      for (int i = 0; i < count; ++i) code[i] = four_bit_code(ranks, to_float(x[at + i]), inverse);
    if (count % 2 != 0) code[count] = zero;
    for (int i = 0; i < count; i += 2) {
      const int low = high_first ? code[i + 1] : code[i], high = high_first ? code[i] : code[i + 1];
      bytes[(at + i) / 2] = static_cast<uint8_t>(high << 4 | low);
    }
  }
}

// ---- decode ---------------------------------------------------------------------------------------------------------

struct BlockScale {
  float scale;
  float zero_point;
};

QUANTRAIN_INLINE BlockScale block_scale(const FourBitScales& s, int64_t block) {
  BlockScale result{0.0f, 0.0f};
  result.scale = s.scale ? s.scale[block]
                         : four_bit_decompressed(kSignedMap.value[s.scale_codes[block]],
                                                 s.scale_scale[block / kScaleBlock], *s.scale_offset);
  if (s.zero_point) result.zero_point = static_cast<float>(s.zero_point[block]);
  if (s.float_zero_point) result.zero_point = s.float_zero_point[block];
  return result;
}

// Values of `count` codes from element `first` on, which is even, less the zero point.
QUANTRAIN_INLINE void decode(const float* values, bool high_first, const uint8_t* codes, int64_t first, int count,
                             float zero_point, float* decoded) {
  const uint8_t* bytes = codes + first / 2;
  const int shift = high_first ? 4 : 0;
  for (int i = 0; i < (count + 1) / 2; ++i) {
    const int byte = bytes[i];
    decoded[2 * i] = values[byte >> shift & 15] - zero_point;
    decoded[2 * i + 1] = values[byte >> (4 - shift) & 15] - zero_point;
  }
}

// n elements from `first` on, which is even, all of one block.
template <typename T>
QUANTRAIN_INLINE void dequantize_run(const FourBitDequantizeArgs& a, const float* values, int64_t first, int64_t n) {
  const BlockScale s = block_scale(a.scales, first / a.block);
  T* y = static_cast<T*>(a.y) + first;
  alignas(64) float decoded[kPiece];
  for (int64_t at = 0; at < n; at += kPiece) {
    const int count = static_cast<int>(std::min<int64_t>(kPiece, n - at));
    decode(values, four_bit_high_first(a.format), a.codes, first + at, count, s.zero_point, decoded);
    for (int i = 0; i < count; ++i) y[at + i] = from_float<T>(decoded[i] * s.scale);
  }
}

template <typename T>
QUANTRAIN_INLINE void dequantize_block(const FourBitDequantizeArgs& a, const float* values, int64_t block) {
  const int64_t first = block * a.block;
  dequantize_run<T>(a, values, first, std::min(a.block, a.numel - first));
}

#if defined(QUANTRAIN_AVX2)

// Which block an element is of: a division a chunk would take as long as the chunk.
struct BlockIndex {
  explicit BlockIndex(int64_t size) : block(size) {
    const auto bits = static_cast<uint64_t>(size);
    shift = std::has_single_bit(bits) ? std::countr_zero(bits) : -1;
  }
  QUANTRAIN_INLINE int64_t operator()(int64_t element) const { return shift >= 0 ? element >> shift : element / block; }

  int64_t block;
  int shift;
};

// Whether chunks of 64 elements have a block for each half or one for both.
bool has_chunks(int64_t block) { return best_isa() != Isa::kBaseline && (block == 32 || block % avx2::kChunk == 0); }

// Whole chunks of the elements from `first` to `last`; where it ended.
template <typename T>
QUANTRAIN_AVX2 int64_t dequantize_chunks(const FourBitDequantizeArgs& a, const float* values, int64_t first,
                                         int64_t last) {
  const avx2::Table table = avx2::table_of(values);
  const bool high_first = four_bit_high_first(a.format);
  const BlockIndex block_of(a.block);
  T* y = static_cast<T*>(a.y);
  for (; first + avx2::kChunk <= last; first += avx2::kChunk) {
    const BlockScale low = block_scale(a.scales, block_of(first));
    const BlockScale high = a.block == 32 ? block_scale(a.scales, block_of(first + 32)) : low;
    if (low.scale != low.scale || high.scale != high.scale) {  // NaN: what bfloat16 makes of it is not rounding
      dequantize_run<T>(a, values, first, 32);
      dequantize_run<T>(a, values, first + 32, 32);
      continue;
    }
    __m256 value[2][4];
    avx2::decode(table, high_first, a.codes + first / 2, value);
    avx2::store_chunk(value, avx2::halves(low.zero_point, high.zero_point), avx2::halves(low.scale, high.scale),
                      y + first);
  }
  return first;
}

#endif

// ---- product --------------------------------------------------------------------------------------------------------

QUANTRAIN_INLINE float dot(const float* a, const float* b, int n) {
  Lanes sum = {};
  for (int i = 0; i < n; i += kLanes) {
    QUANTRAIN_LOAD_LANES(left, a, i, n, 0.0f)
    QUANTRAIN_LOAD_LANES(right, b, i, n, 0.0f)
    sum += left * right;
  }
  float total = 0.0f;
  for (int j = 0; j < kLanes; ++j) total += sum[j];
  return total;
}

// Rows `begin` to `end` of the weight against up to kMaxRows of x, which is float32 here.
QUANTRAIN_INLINE void linear_rows(const FourBitLinearArgs& a, const float* values, int64_t row, int64_t first_m,
                                  int rows) {
  const auto* x = static_cast<const float*>(a.x) + first_m * a.k;
  float sum[kMaxRows] = {};
  alignas(64) float decoded[kPiece];
  for (int64_t at = 0; at < a.k;) {
    const int64_t element = row * a.k + at, block = element / a.block;
    const int64_t left = std::min((block + 1) * a.block - element, a.k - at);
    const int count = static_cast<int>(std::min<int64_t>(kPiece, left));
    const BlockScale s = block_scale(a.scales, block);
    // Rows of an odd number of elements begin in the middle of a byte.
    const int odd = static_cast<int>(element & 1);
    decode(values, four_bit_high_first(a.format), a.codes, element - odd, std::min(count + odd, kPiece), s.zero_point,
           decoded);
    const int used = std::min(count, kPiece - odd);
    for (int m = 0; m < rows; ++m) sum[m] += dot(x + m * a.k + at, decoded + odd, used) * s.scale;
    at += used;
  }
  const float bias = four_bit_bias(a, row);
  auto* y = static_cast<float*>(a.y);
  for (int m = 0; m < rows; ++m) y[(first_m + m) * a.n + row] = sum[m] + bias;
}

#if defined(QUANTRAIN_AVX2)

// kRows rows of x, arranged as decode() gives the elements, against a row of the weight of whole chunks.
template <int kRows>
QUANTRAIN_AVX2 void linear_chunks(const FourBitLinearArgs& a, const avx2::Table& table, const float* x, int64_t first_m,
                                  int64_t row) {
  const bool high_first = four_bit_high_first(a.format), has_zero = a.scales.zero_point || a.scales.float_zero_point;
  const BlockIndex block_of(a.block);
  __m256 total[kRows];
  for (int m = 0; m < kRows; ++m) total[m] = _mm256_setzero_ps();
  for (int64_t at = 0; at < a.k; at += avx2::kChunk) {
    const int64_t element = row * a.k + at;
    const BlockScale low = block_scale(a.scales, block_of(element));
    const BlockScale high = a.block == 32 ? block_scale(a.scales, block_of(element + 32)) : low;
    __m256 value[2][4];
    avx2::decode(table, high_first, a.codes + element / 2, value);
    if (has_zero) {
      const __m256 zero_point = avx2::halves(low.zero_point, high.zero_point);
      for (auto& set : value)
        for (__m256& v : set) v = _mm256_sub_ps(v, zero_point);
    }
    const __m256 scale = avx2::halves(low.scale, high.scale);
    for (int m = 0; m < kRows; ++m) {
      const float* xs = x + m * a.k + at;
      __m256 even = _mm256_mul_ps(value[0][0], _mm256_loadu_ps(xs));  // two sums: one would wait for each addition
      __m256 odd = _mm256_mul_ps(value[1][0], _mm256_loadu_ps(xs + 32));
      for (int i = 1; i < 4; ++i) {
        even = _mm256_fmadd_ps(value[0][i], _mm256_loadu_ps(xs + 8 * i), even);
        odd = _mm256_fmadd_ps(value[1][i], _mm256_loadu_ps(xs + 32 + 8 * i), odd);
      }
      total[m] = _mm256_fmadd_ps(_mm256_add_ps(even, odd), scale, total[m]);
    }
  }
  const float bias = four_bit_bias(a, row);
  auto* y = static_cast<float*>(a.y);
  for (int m = 0; m < kRows; ++m) y[(first_m + m) * a.n + row] = avx2::total(total[m]) + bias;
}

QUANTRAIN_AVX2 void linear_in_chunks(const FourBitLinearArgs& a, const float* values, int64_t begin, int64_t end) {
  const avx2::Table table = avx2::table_of(values);
  int place[avx2::kChunk];
  for (int i = 0; i < avx2::kChunk; ++i) place[i] = avx2::place_of(i);
  constexpr int64_t kRows = 4;  // whose sums stay in registers beside a chunk
  std::vector<float> arranged(static_cast<size_t>(std::min(a.m, kRows) * a.k));
  for (int64_t m = 0; m < a.m; m += kRows) {
    const int64_t rows = std::min(kRows, a.m - m);
    const auto* x = static_cast<const float*>(a.x) + m * a.k;
    for (int64_t i = 0; i < rows * a.k; ++i) arranged[i / avx2::kChunk * avx2::kChunk + place[i % avx2::kChunk]] = x[i];
    for (int64_t row = begin; row < end; ++row) {
      switch (rows) {
        case 1:
          linear_chunks<1>(a, table, arranged.data(), m, row);
          break;
        case 2:
          linear_chunks<2>(a, table, arranged.data(), m, row);
          break;
        case 3:
          linear_chunks<3>(a, table, arranged.data(), m, row);
          break;
        default:
          linear_chunks<4>(a, table, arranged.data(), m, row);
      }
    }
  }
}

#endif

}  // namespace

void four_bit_quantize(const FourBitQuantizeArgs& args, int64_t begin, int64_t end) {
  const FourBitRanks ranks = ranks_of(args.format, args.table);
  dispatch_float(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
      for (int64_t block = begin; block < end; ++block) quantize_block<T>(args, ranks, block);
    });
  });
}

void four_bit_dequantize(const FourBitDequantizeArgs& args, int64_t begin, int64_t end) {
  const FourBitValues known = four_bit_values(args.format);
  const float* values = args.table ? args.table : known.value;
  dispatch_float(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#if defined(QUANTRAIN_AVX2)
    if (has_chunks(args.block)) {
      const int64_t last = std::min(end * args.block, args.numel);
      int64_t at = dequantize_chunks<T>(args, values, begin * args.block, last);
      for (; at < last; at += std::min<int64_t>(args.block, last - at))  // less than a chunk
        dequantize_run<T>(args, values, at, std::min<int64_t>(args.block, last - at));
      return;
    }
#endif
    vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
      for (int64_t block = begin; block < end; ++block) dequantize_block<T>(args, values, block);
    });
  });
}

void four_bit_to_int8(const FourBitToInt8Args& args, int64_t begin, int64_t end) {
  const FourBitValues known = four_bit_values(args.format);
  const float* values = args.table ? args.table : known.value;
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    alignas(64) float decoded[kPiece];
    for (int64_t row = begin; row < end; ++row) {
      const float inverse = 1.0f / args.row_scale[row];
      for (int64_t at = 0; at < args.k;) {
        const int64_t element = row * args.k + at, block = element / args.block;
        const int count = static_cast<int>(std::min<int64_t>(kPiece, (block + 1) * args.block - element));
        const BlockScale s = block_scale(args.scales, block);
        decode(values, four_bit_high_first(args.format), args.codes, element, count, 0.0f, decoded);
        for (int i = 0; i < count; ++i)
          args.y[element + i] = four_bit_row_code(decoded[i], s.zero_point, s.scale, inverse);
        at += count;
      }
    }
  });
}

int64_t four_bit_linear_rows([[maybe_unused]] const FourBitLinearArgs& args) {
#if defined(QUANTRAIN_AVX2)
  // At 64 rows of 4096 x 4096 half of the time, or a quarter in bfloat16 (EPYC, AVX2, two threads).
  if (has_chunks(args.block) && args.k % avx2::kChunk == 0) return 64;
#endif
  return 8;
}

void four_bit_linear(const FourBitLinearArgs& args, int64_t begin, int64_t end) {
  const FourBitValues known = four_bit_values(args.format);
  const float* values = args.table ? args.table : known.value;
#if defined(QUANTRAIN_AVX2)
  if (has_chunks(args.block) && args.k % avx2::kChunk == 0) return linear_in_chunks(args, values, begin, end);
#endif
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    for (int64_t m = 0; m < args.m; m += kMaxRows)
      for (int64_t row = begin; row < end; ++row)
        linear_rows(args, values, row, m, static_cast<int>(std::min(kMaxRows, args.m - m)));
  });
}

}  // namespace quantrain::cpu
