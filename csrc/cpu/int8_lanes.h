// Vectors of int32 sums and the instructions that add products of small integers to them. Macros, because intrinsics go
// only into functions that name their instruction set.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define QUANTRAIN_X86 1
#endif

namespace quantrain::cpu {

using Lanes4 = int32_t __attribute__((vector_size(16)));
using Lanes8 = int32_t __attribute__((vector_size(32)));
using Lanes16 = int32_t __attribute__((vector_size(64)));

}  // namespace quantrain::cpu

// sum + the products of two int16 per lane.
#if defined(QUANTRAIN_X86)  // SSE2
#define QUANTRAIN_PAIRS4(sum, b, a) (sum + (Lanes4)_mm_madd_epi16((__m128i)b, (__m128i)a))
#else
#define QUANTRAIN_PAIRS4(sum, b, a) (sum + ((a) << 16 >> 16) * ((b) << 16 >> 16) + ((a) >> 16) * ((b) >> 16))
#endif
#define QUANTRAIN_PAIRS8(sum, b, a) (sum + (Lanes8)_mm256_madd_epi16((__m256i)b, (__m256i)a))
#define QUANTRAIN_PAIRS16(sum, b, a) (sum + (Lanes16)_mm512_madd_epi16((__m512i)b, (__m512i)a))

// sum + the products of four bytes per lane, unsigned ones by signed ones.
#define QUANTRAIN_BYTES8(sum, unsigned_bytes, signed_bytes) \
  ((Lanes8)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)unsigned_bytes, (__m256i)signed_bytes))
#define QUANTRAIN_BYTES16(sum, unsigned_bytes, signed_bytes) \
  ((Lanes16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)unsigned_bytes, (__m512i)signed_bytes))
