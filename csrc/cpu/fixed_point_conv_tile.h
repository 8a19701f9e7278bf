// Register tiles of the fixed-point convolution: sums of a few neighbouring pixels by blocks of 16 channels, for each
// instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/cpu/int8_lanes.h"
#include "csrc/cpu/int8_mm.h"
#include "csrc/cpu/simd.h"

namespace quantrain::cpu::conv {

constexpr int64_t kBlock = 16;  // output channels that are packed side by side

// Sums of `segments` runs of Q pixels and `blocks` of 16 channels.
struct Tile {
  const uint8_t* x[2];    // first pixel of each run, at its first tap
  int64_t step;           // bytes from a pixel to the next
  int64_t pitch;          // bytes from a row of taps to the next
  int64_t kh, row_words;  // taps: rows, and words in each
  const uint32_t* w;      // [blocks][kh * row_words][16]
  const int32_t* start;   // [blocks * 16]
  int32_t* sums;          // [segments * Q][blocks * 16]
};

// Multiples of the pixel step that the address unit cannot make, kept in registers: the compiler would recompute or
// spill them.
struct Steps {
  int64_t one, three, five, seven;
};

QUANTRAIN_INLINE int64_t offset_of(int q, const Steps& s) {
  switch (q) {
    case 0:
      return 0;
    case 1:
      return s.one;
    case 2:
      return 2 * s.one;
    case 3:
      return s.three;
    case 4:
      return 4 * s.one;
    case 5:
      return s.five;
    case 6:
      return 2 * s.three;
    default:
      return s.seven;
  }
}

QUANTRAIN_INLINE int32_t word_at(const uint8_t* x) {
  int32_t word;
  std::memcpy(&word, x, sizeof(word));
  return word;
}

// A macro, because intrinsics go only into functions that name their instruction set, and a template cannot take that
// as an argument.
#define QUANTRAIN_CONV_TILE(name, isa, Lanes, dot)                                                                 \
  template <int S, int Q, int B>                                                                                   \
  isa void name(const Tile& t) {                                                                                   \
    constexpr int kLanes = sizeof(Lanes) / sizeof(int32_t), kPerBlock = kBlock / kLanes, kVectors = B * kPerBlock; \
    const int64_t block_words = t.kh * t.row_words * kBlock;                                                       \
    Steps steps{t.step, 3 * t.step, 5 * t.step, 7 * t.step};                                                       \
    if constexpr (Q > 4) asm("" : "+r"(steps.three), "+r"(steps.five), "+r"(steps.seven));                         \
    Lanes sum[S * Q][kVectors];                                                                                    \
    _Pragma("GCC unroll 16") for (int v = 0; v < kVectors; ++v) {                                                  \
      Lanes start;                                                                                                 \
      std::memcpy(&start, t.start + v * kLanes, sizeof(start));                                                    \
      _Pragma("GCC unroll 16") for (int p = 0; p < S * Q; ++p) sum[p][v] = start;                                  \
    }                                                                                                              \
    const uint32_t* w = t.w;                                                                                       \
    for (int64_t ky = 0; ky < t.kh; ++ky) {                                                                        \
      const uint8_t *x0 = t.x[0] + ky * t.pitch, *x1 = t.x[S - 1] + ky * t.pitch;                                  \
      _Pragma("GCC unroll 1") for (int64_t i = 0; i < t.row_words; ++i, x0 += 4, x1 += 4, w += kBlock) {           \
        Lanes b[kVectors];                                                                                         \
        _Pragma("GCC unroll 16") for (int v = 0; v < kVectors; ++v)                                                \
            std::memcpy(&b[v], w + v / kPerBlock * block_words + v % kPerBlock * kLanes, sizeof(Lanes));           \
        _Pragma("GCC unroll 16") for (int p = 0; p < S * Q; ++p) {                                                 \
          const Lanes a = Lanes{} + word_at((p < Q ? x0 : x1) + offset_of(p % Q, steps));                          \
          _Pragma("GCC unroll 16") for (int v = 0; v < kVectors; ++v) sum[p][v] = dot(sum[p][v], b[v], a);         \
        }                                                                                                          \
      }                                                                                                            \
    }                                                                                                              \
    _Pragma("GCC unroll 16") for (int p = 0; p < S * Q; ++p)                                                       \
        _Pragma("GCC unroll 16") for (int v = 0; v < kVectors; ++v)                                                \
            std::memcpy(t.sums + p * B * kBlock + v * kLanes, &sum[p][v], sizeof(Lanes));                          \
  }

QUANTRAIN_CONV_TILE(plain_tile, , Lanes4, QUANTRAIN_PAIRS4)
#if defined(QUANTRAIN_X86)
QUANTRAIN_CONV_TILE(avx2_tile, __attribute__((target("avx2"))), Lanes8, QUANTRAIN_PAIRS8)
QUANTRAIN_CONV_TILE(avx512_tile, __attribute__((target("avx512f,avx512bw"))), Lanes16, QUANTRAIN_PAIRS16)

// a, the input, is the unsigned operand.
#define QUANTRAIN_DOT(sum, b, a) QUANTRAIN_BYTES8(sum, a, b)
QUANTRAIN_CONV_TILE(avx_vnni_tile, __attribute__((target("avx2,avxvnni"))), Lanes8, QUANTRAIN_DOT)
#undef QUANTRAIN_DOT
#define QUANTRAIN_DOT(sum, b, a) QUANTRAIN_BYTES16(sum, a, b)
QUANTRAIN_CONV_TILE(avx512_vnni_tile, __attribute__((target("avx512f,avx512vnni"))), Lanes16, QUANTRAIN_DOT)
#undef QUANTRAIN_DOT
#endif

using TileFunction = void (*)(const Tile&);

struct TileShape {
  TileFunction tile, alone;  // alone: of one segment, where a second is missing
  int segments, blocks;
};

// For runs of `pixels`: the tile for most channels, and one for the blocks that remain.
struct Tiles {
  int pixels;
  TileShape most, last;
};

// Registers of sums, of one row of weight and one input word must fit: 32 of 16 lanes, else 16.
#define QUANTRAIN_WIDE_TILES(tile)                                                                     \
  pixels == 7   ? Tiles{7, {tile<2, 7, 2>, tile<1, 7, 2>, 2, 2}, {tile<2, 7, 1>, tile<1, 7, 1>, 2, 1}} \
  : pixels == 8 ? Tiles{8, {tile<1, 8, 2>, tile<1, 8, 2>, 1, 2}, {tile<2, 8, 1>, tile<1, 8, 1>, 2, 1}} \
  : pixels == 4 ? Tiles{4, {tile<2, 4, 2>, tile<1, 4, 2>, 2, 2}, {tile<2, 4, 1>, tile<1, 4, 1>, 2, 1}} \
                : Tiles {                                                                              \
    1, {tile<1, 1, 4>, tile<1, 1, 4>, 1, 4}, {tile<1, 1, 1>, tile<1, 1, 1>, 1, 1}                      \
  }
#define QUANTRAIN_NARROW_TILES(tile)                                                                           \
  pixels >= 4 ? Tiles{4, {tile<1, 4, 1>, tile<1, 4, 1>, 1, 1}, {tile<1, 4, 1>, tile<1, 4, 1>, 1, 1}} : Tiles { \
    1, {tile<1, 1, 1>, tile<1, 1, 1>, 1, 1}, {tile<1, 1, 1>, tile<1, 1, 1>, 1, 1}                              \
  }

inline Tiles tiles_of(Int8Isa isa, int pixels) {
  switch (isa) {
#if defined(QUANTRAIN_X86)
    case Int8Isa::kAvx512Vnni:
      return QUANTRAIN_WIDE_TILES(avx512_vnni_tile);
    case Int8Isa::kAvxVnni:
      return QUANTRAIN_NARROW_TILES(avx_vnni_tile);
    case Int8Isa::kAvx512:
      return QUANTRAIN_WIDE_TILES(avx512_tile);
    case Int8Isa::kAvx2:
      return QUANTRAIN_NARROW_TILES(avx2_tile);
#endif
    default:
      return QUANTRAIN_NARROW_TILES(plain_tile);
  }
}

inline bool takes_bytes(Int8Isa isa) { return isa == Int8Isa::kAvx512Vnni || isa == Int8Isa::kAvxVnni; }

// The run that covers a row with the least waste; 7 has the larger tile.
inline int run_pixels(int64_t row_pixels, bool direct) {
  if (row_pixels < 4) return 1;
  if (direct && row_pixels < 7) return 4;
  if (row_pixels <= 4) return 4;
  const auto covered = [&](int64_t run) { return (row_pixels + run - 1) / run * run; };
  if (direct && row_pixels < 8) return 7;
  return covered(7) <= covered(8) ? 7 : 8;
}

#undef QUANTRAIN_WIDE_TILES
#undef QUANTRAIN_NARROW_TILES
#undef QUANTRAIN_CONV_TILE

}  // namespace quantrain::cpu::conv
