// The four_bit family's decoding in AVX2: a chunk of 64 elements, 32 bytes, at a time. A table of 16 float32 is four
// byte shuffles, one for each byte of a value, and the bytes are put together again: exact, and half an instruction an
// element.
//
// In every register the lower half belongs to the chunk's first 32 elements and the upper half to its last 32, so that
// blocks of 32 elements have a scale for each half.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#include "csrc/common/types.h"

namespace quantrain::cpu::avx2 {

#define QUANTRAIN_AVX2 __attribute__((target("avx2,fma,f16c")))
#define QUANTRAIN_AVX2_INLINE inline __attribute__((always_inline, target("avx2,fma,f16c")))

constexpr int kChunk = 64;

// Byte b of the 16 values, in both halves.
struct Table {
  __m256i byte[4];
};

QUANTRAIN_AVX2_INLINE Table table_of(const float* values) {
  alignas(16) uint8_t bytes[4][16];
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = detail::float_to_bits(values[i]);
    for (int b = 0; b < 4; ++b) bytes[b][i] = static_cast<uint8_t>(bits >> (8 * b));
  }
  Table table;
  for (int b = 0; b < 4; ++b)
    table.byte[b] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[b])));
  return table;
}

// The values of 32 codes, one in the low nibble of each byte: register j has those of bytes 4 j to 4 j + 3, and of
// bytes 16 + 4 j to 16 + 4 j + 3.
QUANTRAIN_AVX2_INLINE void values_of(const Table& table, __m256i codes, __m256 (&value)[4]) {
  const __m256i b0 = _mm256_shuffle_epi8(table.byte[0], codes), b1 = _mm256_shuffle_epi8(table.byte[1], codes);
  const __m256i b2 = _mm256_shuffle_epi8(table.byte[2], codes), b3 = _mm256_shuffle_epi8(table.byte[3], codes);
  const __m256i low0 = _mm256_unpacklo_epi8(b0, b1), low1 = _mm256_unpackhi_epi8(b0, b1);
  const __m256i high0 = _mm256_unpacklo_epi8(b2, b3), high1 = _mm256_unpackhi_epi8(b2, b3);
  value[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0));
  value[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0));
  value[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1));
  value[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1));
}

// Of a chunk, the even elements in value[0] and the odd ones in value[1].
QUANTRAIN_AVX2_INLINE void decode(const Table& table, bool high_first, const uint8_t* bytes, __m256 (&value)[2][4]) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)), mask = _mm256_set1_epi8(15);
  const __m256i low = _mm256_and_si256(both, mask), high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
  values_of(table, high_first ? high : low, value[0]);
  values_of(table, high_first ? low : high, value[1]);
}

// Where element i of a chunk is in the order of decode().
inline int place_of(int i) {
  const int byte = i / 2, half = byte / 16, j = byte % 16 / 4;
  return i % 2 * 32 + j * 8 + half * 4 + byte % 4;
}

QUANTRAIN_AVX2_INLINE __m256 halves(float low, float high) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_set1_ps(low)), _mm_set1_ps(high), 1);
}

QUANTRAIN_AVX2_INLINE float total(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// bfloat16 of numbers that are no NaN, half to even, in the low 16 bits.
QUANTRAIN_AVX2_INLINE __m256i bfloat16_bits(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
}

// A chunk's elements in their order, times the scale of each half: none of them NaN.
template <typename T>
QUANTRAIN_AVX2_INLINE void store_chunk(const __m256 (&value)[2][4], __m256 zero_point, __m256 scale, T* y) {
  for (int j = 0; j < 4; ++j) {
    const __m256 even = _mm256_mul_ps(_mm256_sub_ps(value[0][j], zero_point), scale);
    const __m256 odd = _mm256_mul_ps(_mm256_sub_ps(value[1][j], zero_point), scale);
    // Elements 8 j to 8 j + 3 and to 8 j + 7; 32 elements further in the upper half.
    const __m256 first = _mm256_unpacklo_ps(even, odd), last = _mm256_unpackhi_ps(even, odd);
    if constexpr (std::is_same_v<T, float>) {
      _mm_storeu_ps(y + 8 * j, _mm256_castps256_ps128(first));
      _mm_storeu_ps(y + 8 * j + 4, _mm256_castps256_ps128(last));
      _mm_storeu_ps(y + 32 + 8 * j, _mm256_extractf128_ps(first, 1));
      _mm_storeu_ps(y + 32 + 8 * j + 4, _mm256_extractf128_ps(last, 1));
    } else {
      __m256i packed;
      if constexpr (std::is_same_v<T, BFloat16>) {
        packed = _mm256_packus_epi32(bfloat16_bits(first), bfloat16_bits(last));
      } else {
        const __m128i a = _mm256_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT);
        const __m128i b = _mm256_cvtps_ph(last, _MM_FROUND_TO_NEAREST_INT);
        packed = _mm256_set_m128i(_mm_unpackhi_epi64(a, b), _mm_unpacklo_epi64(a, b));
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(y + 8 * j), _mm256_castsi256_si128(packed));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(y + 32 + 8 * j), _mm256_extracti128_si256(packed, 1));
    }
  }
}

}  // namespace quantrain::cpu::avx2

#endif
