#include "csrc/cpu/fixed_point_conv.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "csrc/cpu/simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define QUANTRAIN_X86 1
#endif

namespace quantrain::cpu {
namespace {

constexpr int64_t kBlock = 16;               // output channels that are packed side by side
constexpr int64_t kFlatRow = 112;            // pixels of a row of a sequence: a multiple of every tile
constexpr int64_t kBandBytes = 48 * 1024;    // of input, gone through once for each block of output channels
constexpr int64_t kGroupBytes = 320 * 1024;  // of weight that stays in the second-level cache
constexpr int64_t kGrainMacs = 3'000'000;    // below it a second thread costs more than it brings
constexpr int64_t kMaxTile = 16 * 64;        // sums

// ---- register tiles --------------------------------------------------------------------------------------------------------

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

// Multiples of the pixel step that the address unit cannot make, kept in registers: the compiler would recompute or spill them.
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

// A macro, because intrinsics go only into functions that name their instruction set, and a template cannot take that as an argument.
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

using Lanes4 = int32_t __attribute__((vector_size(16)));

#if defined(QUANTRAIN_X86)  // SSE2
#define QUANTRAIN_DOT(sum, b, a) (sum + (Lanes4)_mm_madd_epi16((__m128i)b, (__m128i)a))
#else
#define QUANTRAIN_DOT(sum, b, a) (sum + ((a) << 16 >> 16) * ((b) << 16 >> 16) + ((a) >> 16) * ((b) >> 16))
#endif
QUANTRAIN_CONV_TILE(plain_tile, , Lanes4, QUANTRAIN_DOT)
#undef QUANTRAIN_DOT

#if defined(QUANTRAIN_X86)
using Lanes8 = int32_t __attribute__((vector_size(32)));
using Lanes16 = int32_t __attribute__((vector_size(64)));
using Long8 = long long __attribute__((vector_size(64)));

#define QUANTRAIN_DOT(sum, b, a) (sum + (Lanes8)_mm256_madd_epi16((__m256i)b, (__m256i)a))
QUANTRAIN_CONV_TILE(avx2_tile, __attribute__((target("avx2"))), Lanes8, QUANTRAIN_DOT)
#undef QUANTRAIN_DOT

#define QUANTRAIN_DOT(sum, b, a) (sum + (Lanes16)_mm512_madd_epi16((__m512i)b, (__m512i)a))
QUANTRAIN_CONV_TILE(avx512_tile, __attribute__((target("avx512f,avx512bw"))), Lanes16, QUANTRAIN_DOT)
#undef QUANTRAIN_DOT

// The instruction multiplies unsigned bytes, the input, by signed ones, the weight.
#define QUANTRAIN_DOT(sum, b, a) ((Lanes8)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b))
QUANTRAIN_CONV_TILE(avx_vnni_tile, __attribute__((target("avx2,avxvnni"))), Lanes8, QUANTRAIN_DOT)
#undef QUANTRAIN_DOT

#define QUANTRAIN_DOT(sum, b, a) ((Lanes16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b))
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

Tiles tiles_of(Int8Isa isa, int pixels) {
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

bool takes_bytes(Int8Isa isa) { return isa == Int8Isa::kAvx512Vnni || isa == Int8Isa::kAvxVnni; }

// The run that covers a row with the least waste; 7 has the larger tile.
int run_pixels(int64_t row_pixels, bool direct) {
  if (row_pixels < 4) return 1;
  if (direct && row_pixels < 7) return 4;
  if (row_pixels <= 4) return 4;
  const auto covered = [&](int64_t run) { return (row_pixels + run - 1) / run * run; };
  if (direct && row_pixels < 8) return 7;
  return covered(7) <= covered(8) ? 7 : 8;
}

// ---- results ---------------------------------------------------------------------------------------------------------------

QUANTRAIN_INLINE int32_t residual_at(const FixedPointConvArgs& args, int64_t i) {
  if (args.residual_type == DType::kInt32) return static_cast<const int32_t*>(args.residual)[i];
  if (args.residual_type == DType::kInt8) return static_cast<const int8_t*>(args.residual)[i];
  return static_cast<const uint8_t*>(args.residual)[i];
}

// Output element i, of channel o, from its sum, for any shift.
QUANTRAIN_INLINE void write(const FixedPointConvArgs& args, int32_t sum, int64_t i, int64_t o) {
  if (!args.shift) {
    static_cast<int32_t*>(args.output)[i] = sum;
    return;
  }
  const int shift = args.shift[o * args.shift_stride];
  const int32_t code = args.residual ? fixed_point_requantized_sum(sum, residual_at(args, i), shift,
                                                                   args.residual_shift[o * args.residual_shift_stride],
                                                                   args.output_signed)
                                     : fixed_point_requantized(sum, shift, args.output_signed);
  static_cast<uint8_t*>(args.output)[i] = static_cast<uint8_t>(code);
}

// Shifts of every channel, [blocks * 16] each.
struct Shifts {
  const int32_t* shift;       // of sum and residual to the right, or the negative to the left
  const int32_t* below_half;  // 2^(shift - 1) - 1; 0 where shift <= 0
  const int32_t* residual;    // of the residual to the left, before it is added
  const int32_t* sum;         // of the sum to the left, likewise
  bool small;                 // everything stays inside int32, every shift is at least 1 and none of the sum is
};

// Elements i to i + n of the output, of channels o to o + n.
template <typename Residual, bool has_residual>
QUANTRAIN_INLINE void write_codes(const FixedPointConvArgs& args, const Shifts& shifts,
                                  const int32_t* __restrict__ sums, int64_t i, int64_t o, int64_t n) {
  const int32_t lo = args.output_signed ? -127 : 0, hi = args.output_signed ? 127 : 255;
  uint8_t* __restrict__ output = static_cast<uint8_t*>(args.output) + i;
  const Residual* residual = static_cast<const Residual*>(args.residual) + (has_residual ? i : 0);
  const int32_t *shift = shifts.shift + o, *below_half = shifts.below_half + o, *left = shifts.residual + o;
  for (int64_t j = 0; j < n; ++j) {
    int32_t t = sums[j];
    if constexpr (has_residual) t += static_cast<int32_t>(residual[j]) << left[j];
    t = (t + below_half[j] + ((t >> shift[j]) & 1)) >> shift[j];
    output[j] = static_cast<uint8_t>(std::min(std::max(t, lo), hi));
  }
}

#if defined(QUANTRAIN_X86)
#define QUANTRAIN_V4 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define QUANTRAIN_V4_LAMBDA __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512dq")))

template <typename Residual, bool has_residual, bool is_signed>
QUANTRAIN_V4 void write_codes_512(const FixedPointConvArgs& args, const Shifts& shifts, const int32_t* sums,
                                  int64_t stride, int64_t pixels, int64_t i, int64_t o, int64_t n) {
  for (int64_t j = 0; j < n; j += kBlock) {
    const auto mask = static_cast<__mmask16>(n - j >= kBlock ? 0xffff : (1 << (n - j)) - 1);
    Lanes16 shift, below_half, left;
    std::memcpy(&shift, shifts.shift + o + j, sizeof(shift));
    std::memcpy(&below_half, shifts.below_half + o + j, sizeof(below_half));
    std::memcpy(&left, shifts.residual + o + j, sizeof(left));
    uint8_t* output = static_cast<uint8_t*>(args.output) + i + j;
    const Residual* residual = static_cast<const Residual*>(args.residual) + (has_residual ? i + j : 0);
    const int32_t* sum = sums + j;
    // Masked conversions alone: gcc 12 warns of the others' undefined lanes.
    const auto codes_of = [&](const __m128i& residuals) QUANTRAIN_V4_LAMBDA {
      Lanes16 t;
      std::memcpy(&t, sum, sizeof(t));
      if constexpr (has_residual)
        t += (Lanes16)(Residual(-1) < 0 ? _mm512_maskz_cvtepi8_epi32(0xffff, residuals)
                                        : _mm512_maskz_cvtepu8_epi32(0xffff, residuals))
             << left;
      t = (t + (below_half + ((t >> shift) & 1))) >> shift;
      const Lanes16 lo = Lanes16{} + (is_signed ? -127 : 0);
      t = t > lo ? t : lo;
      return is_signed ? _mm512_maskz_cvtsepi32_epi8(0xffff, (__m512i)t)
                       : _mm512_maskz_cvtusepi32_epi8(0xffff, (__m512i)t);
    };
    if (mask == 0xffff)  // a masked store of bytes is slow
      for (int64_t p = 0; p < pixels; ++p, output += args.o, residual += args.o, sum += stride) {
        __m128i residuals{};
        if constexpr (has_residual) std::memcpy(&residuals, residual, sizeof(residuals));
        const __m128i codes = codes_of(residuals);
        std::memcpy(output, &codes, sizeof(codes));
      }
    else
      for (int64_t p = 0; p < pixels; ++p, output += args.o, residual += args.o, sum += stride) {
        __m128i residuals{};
        if constexpr (has_residual) residuals = _mm_maskz_loadu_epi8(mask, residual);
        _mm_mask_storeu_epi8(output, mask, codes_of(residuals));
      }
  }
}

// The same for any shift and residual, in int64.
template <typename Residual, bool has_residual>
QUANTRAIN_V4 void write_codes_exact_512(const FixedPointConvArgs& args, const Shifts& shifts, const int32_t* sums,
                                        int64_t stride, int64_t pixels, int64_t i, int64_t o, int64_t n) {
  constexpr int64_t kLanes = 8;
  const Long8 lo = Long8{} + (args.output_signed ? -127 : 0), hi = Long8{} + (args.output_signed ? 127 : 255);
  const Long8 least = Long8{} + INT32_MIN, most = Long8{} + INT32_MAX;
  for (int64_t j = 0; j < n; j += kLanes) {
    const auto mask = static_cast<__mmask8>(n - j >= kLanes ? 0xff : (1 << (n - j)) - 1);
    const auto load = [&](const int32_t* from) QUANTRAIN_V4_LAMBDA {
      Lanes8 lanes;
      std::memcpy(&lanes, from, sizeof(lanes));
      return __builtin_convertvector(lanes, Long8);
    };
    const Long8 shift = load(shifts.shift + o + j), left = load(shifts.residual + o + j), up = load(shifts.sum + o + j);
    const Long8 right = shift > 0 ? shift : Long8{} + 1, back = shift < 0 ? -shift : Long8{};
    const Long8 below_half = ((Long8{} + 1) << (right - 1)) - 1;
    uint8_t* output = static_cast<uint8_t*>(args.output) + i + j;
    const Residual* residual = static_cast<const Residual*>(args.residual) + (has_residual ? i + j : 0);
    const int32_t* sum = sums + j;
    for (int64_t p = 0; p < pixels; ++p, output += args.o, residual += args.o, sum += stride) {
      Long8 t = load(sum) << up;
      if constexpr (has_residual) {
        __m512i r;
        if constexpr (sizeof(Residual) == 4)
          r = _mm512_maskz_cvtepi32_epi64(mask, _mm256_maskz_loadu_epi32(mask, residual));
        else if constexpr (Residual(-1) < 0)
          r = _mm512_maskz_cvtepi8_epi64(mask, _mm_maskz_loadu_epi8(mask, residual));
        else
          r = _mm512_maskz_cvtepu8_epi64(mask, _mm_maskz_loadu_epi8(mask, residual));
        t += (Long8)r << left;
      }
      const Long8 rounded = (t + (below_half + ((t >> right) & 1))) >> right;
      Long8 inside = t > least ? t : least;
      inside = inside < most ? inside : most;
      t = shift > 0 ? rounded : inside << back;
      t = t > lo ? t : lo;
      t = t < hi ? t : hi;
      const __m128i codes = _mm512_maskz_cvtepi64_epi8(mask, (__m512i)t);
      if (mask == 0xff)  // as above
        std::memcpy(output, &codes, kLanes);
      else
        _mm_mask_storeu_epi8(output, mask, codes);
    }
  }
}
#endif

// ---- any shape -------------------------------------------------------------------------------------------------------------

template <typename T>
QUANTRAIN_INLINE void plain_row(const FixedPointConvArgs& args, int64_t row) {
  const int64_t channels = args.c / args.groups, per_group = args.o / args.groups;
  const int64_t n = row / args.oh, top = row % args.oh * args.stride_h - args.padding_h;
  const T* image = static_cast<const T*>(args.input) + n * args.h * args.w * args.c;
  for (int64_t ox = 0; ox < args.ow; ++ox) {
    const int64_t left = ox * args.stride_w - args.padding_w;
    for (int64_t o = 0; o < args.o; ++o) {
      int32_t sum = args.bias ? args.bias[o] : 0;
      for (int64_t ky = std::max<int64_t>(-top, 0); ky < std::min(args.kh, args.h - top); ++ky)
        for (int64_t kx = std::max<int64_t>(-left, 0); kx < std::min(args.kw, args.w - left); ++kx) {
          const T* x = image + ((top + ky) * args.w + left + kx) * args.c + o / per_group * channels;
          const int8_t* w = args.weight + ((o * args.kh + ky) * args.kw + kx) * channels;
          int32_t part = 0;
          for (int64_t c = 0; c < channels; ++c) part += x[c] * w[c];
          sum += part;
        }
      write(args, sum, (row * args.ow + ox) * args.o + o, o);
    }
  }
}

// ---- one channel in, one out -----------------------------------------------------------------------------------------------

// 64 channels at a time: products fit int16, sums int32. w: [kh, kw, c].
template <typename T>
QUANTRAIN_INLINE void depthwise_row(const FixedPointConvArgs& args, const int16_t* w, const Shifts& shifts,
                                    int64_t row) {
  constexpr int64_t kChannels = 64;
  const int64_t n = row / args.oh, top = row % args.oh * args.stride_h - args.padding_h;
  const T* image = static_cast<const T*>(args.input) + n * args.h * args.w * args.c;
  const int64_t y_begin = std::max<int64_t>(-top, 0), y_end = std::min(args.kh, args.h - top);
  const bool fast = args.shift && shifts.small && (!args.residual || args.residual_type != DType::kInt32);
  for (int64_t first = 0; first < args.c; first += kChannels) {
    const int64_t channels = std::min(kChannels, args.c - first);
    for (int64_t ox = 0; ox < args.ow; ++ox) {
      const int64_t left = ox * args.stride_w - args.padding_w;
      const int64_t x_begin = std::max<int64_t>(-left, 0), x_end = std::min(args.kw, args.w - left);
      int32_t sums[kChannels];
      for (int64_t c = 0; c < kChannels; ++c) sums[c] = c < channels && args.bias ? args.bias[first + c] : 0;
      for (int64_t ky = y_begin; ky < y_end; ++ky)
        for (int64_t kx = x_begin; kx < x_end; ++kx) {
          const T* x = image + ((top + ky) * args.w + left + kx) * args.c + first;
          const int16_t* tap = w + (ky * args.kw + kx) * args.c + first;
          const auto add = [&](int64_t count) QUANTRAIN_INLINE_LAMBDA {
            for (int64_t c = 0; c < count; ++c) sums[c] += static_cast<int16_t>(static_cast<int16_t>(x[c]) * tap[c]);
          };
          channels == kChannels ? add(kChannels) : add(channels);
        }
      const int64_t i = (row * args.ow + ox) * args.o + first;
      if (!fast)
        for (int64_t c = 0; c < channels; ++c) write(args, sums[c], i + c, first + c);
      else if (!args.residual)
        write_codes<uint8_t, false>(args, shifts, sums, i, first, channels);
      else if (args.residual_type == DType::kInt8)
        write_codes<int8_t, true>(args, shifts, sums, i, first, channels);
      else
        write_codes<uint8_t, true>(args, shifts, sums, i, first, channels);
    }
  }
}

// ---- memory of a thread ----------------------------------------------------------------------------------------------------

// Kept between calls, so that a warm layer allocates nothing.
struct Segment {
  const uint8_t* x;
  int64_t pixel;    // of the output
  int skip, count;  // pixels skip to count are written
};

struct Scratch {
  std::vector<uint8_t> input;
  std::vector<const uint8_t*> rows;
  std::vector<Segment> segments;
  std::vector<int32_t> shifts;
  alignas(64) int32_t sums[kMaxTile];

  uint8_t* aligned_input(int64_t bytes) {
    if (static_cast<int64_t>(input.size()) < bytes + 64) input.resize(static_cast<size_t>(bytes + 64));
    return input.data() + (64 - reinterpret_cast<uintptr_t>(input.data()) % 64) % 64;
  }
};

Scratch& scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// bound: no sum is larger.
Shifts shifts_of(const FixedPointConvArgs& args, int64_t blocks, int64_t bound, std::vector<int32_t>& memory) {
  const int64_t n = blocks * kBlock;
  if (static_cast<int64_t>(memory.size()) < 4 * n) memory.resize(static_cast<size_t>(4 * n));
  int32_t *shift = memory.data(), *below_half = shift + n, *residual = below_half + n, *sum = residual + n;
  Shifts shifts{shift, below_half, residual, sum, false};
  if (!args.shift) return shifts;
  int32_t least = 62, most = 0, most_residual = 0, most_sum = 0;
  vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
    for (int64_t o = 0; o < n; ++o) {
      const int64_t channel = std::min(o, args.o - 1);
      const int32_t d = args.residual ? args.residual_shift[channel * args.residual_shift_stride] : 0;
      residual[o] = std::max(d, 0);
      sum[o] = std::max(-d, 0);
      shift[o] = args.shift[channel * args.shift_stride] + sum[o];
      below_half[o] = shift[o] > 0 ? static_cast<int32_t>((1u << ((shift[o] - 1) & 31)) - 1) : 0;
      least = std::min(least, shift[o]);
      most = std::max(most, shift[o]);
      most_residual = std::max(most_residual, residual[o]);
      most_sum = std::max(most_sum, sum[o]);
    }
  });
  if (least < 1 || most > 31 || most_sum > 0 || (args.residual && args.residual_type == DType::kInt32)) return shifts;
  const int64_t largest = bound + (args.residual ? int64_t{255} << most_residual : 0) + (int64_t{1} << most);
  shifts.small = largest <= INT32_MAX;
  return shifts;
}

QUANTRAIN_INLINE void copy_bytes(const uint8_t* __restrict__ from, uint8_t* __restrict__ to, int64_t n, uint8_t flip) {
  if (!flip) {
    std::memcpy(to, from, static_cast<size_t>(n));
    return;
  }
  for (int64_t i = 0; i < n; ++i) to[i] = from[i] ^ flip;
}

template <typename T>
QUANTRAIN_INLINE void widen(const T* __restrict__ from, int16_t* __restrict__ to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// n codes as bytes, the signed ones 128 too large, or as int16.
QUANTRAIN_INLINE void copy_codes(const uint8_t* from, uint8_t* to, int64_t n, bool bytes, bool is_signed) {
  if (bytes)
    copy_bytes(from, to, n, is_signed ? 0x80 : 0);
  else if (is_signed)
    widen(reinterpret_cast<const int8_t*>(from), reinterpret_cast<int16_t*>(to), n);
  else
    widen(from, reinterpret_cast<int16_t*>(to), n);
}

}  // namespace

// ---- packing ---------------------------------------------------------------------------------------------------------------

FixedPointConvKernel::FixedPointConvKernel(const FixedPointConvArgs& args, Int8Isa isa)
    : path_(args.groups == 1                                 ? Path::kTiles
            : args.groups == args.c && args.groups == args.o ? Path::kDepthwise
                                                             : Path::kPlain),
      isa_(isa),
      row_words_((args.kw * args.c + (takes_bytes(isa) ? 3 : 1)) / (takes_bytes(isa) ? 4 : 2)),
      blocks_((args.o + kBlock - 1) / kBlock),
      bound_(0),
      weight_(nullptr) {
  const int64_t row = args.kh * args.kw * (args.c / std::max<int64_t>(args.groups, 1));
  const int64_t largest = args.input_signed ? 128 : 255;
  for (int64_t o = 0; o < args.o; ++o) {
    int64_t sum = args.bias ? std::abs(static_cast<int64_t>(args.bias[o])) : 0;
    for (int64_t i = 0; i < row; ++i) sum += largest * std::abs(static_cast<int>(args.weight[o * row + i]));
    bound_ = std::max(bound_, sum);
  }
  if (path_ == Path::kTiles) pack(args);
  if (path_ == Path::kDepthwise) {
    memory_.resize(static_cast<size_t>((args.kh * args.kw * args.c + 1) / 2));
    auto* w = reinterpret_cast<int16_t*>(memory_.data());
    for (int64_t o = 0; o < args.o; ++o)
      for (int64_t tap = 0; tap < args.kh * args.kw; ++tap)
        w[tap * args.c + o] = args.weight[o * args.kh * args.kw + tap];
    weight_ = memory_.data();
  }
}

void FixedPointConvKernel::pack(const FixedPointConvArgs& args) {
  const bool bytes = takes_bytes(isa_);
  const int64_t row = args.kw * args.c, block_words = args.kh * row_words_ * kBlock, per_word = bytes ? 4 : 2;
  memory_.assign(static_cast<size_t>(blocks_ * block_words + kBlock), 0u);
  const auto address = reinterpret_cast<uintptr_t>(memory_.data());
  uint32_t* packed = memory_.data() + (64 - address % 64) % 64 / 4;
  weight_ = packed;
  start_.assign(static_cast<size_t>(blocks_ * kBlock), 0);
  for (int64_t o = 0; o < args.o; ++o) {
    uint32_t sum = 0;  // unsigned: parts may wrap
    for (int64_t ky = 0; ky < args.kh; ++ky) {
      const int8_t* w = args.weight + (o * args.kh + ky) * row;
      uint32_t* words = packed + o / kBlock * block_words + ky * row_words_ * kBlock + o % kBlock;
      for (int64_t i = 0; i < row; ++i) {
        sum += static_cast<uint32_t>(w[i]);
        const int64_t lane = i % per_word;
        words[i / per_word * kBlock] |= bytes ? static_cast<uint32_t>(static_cast<uint8_t>(w[i])) << 8 * lane
                                              : static_cast<uint32_t>(static_cast<uint16_t>(w[i])) << 16 * lane;
      }
    }
    // A signed input is taken 128 too large: the sums begin with what that adds.
    const uint32_t bias = args.bias ? static_cast<uint32_t>(args.bias[o]) : 0u;
    start_[static_cast<size_t>(o)] = static_cast<int32_t>(bias - (bytes && args.input_signed ? 128u * sum : 0u));
  }
}

// ---- running ---------------------------------------------------------------------------------------------------------------

FixedPointConvPlan FixedPointConvKernel::plan(const FixedPointConvArgs& args) const {
  FixedPointConvPlan plan{};
  plan.pixels = args.n * args.oh * args.ow;
  plan.rows = args.n * args.oh;
  plan.row_pixels = args.ow;
  const int64_t depth = args.kh * args.kw * (args.c / args.groups);
  plan.group_blocks = blocks_;
  int64_t groups = 1;
  if (path_ == Path::kTiles) {
    const bool unpadded = args.padding_h == 0 && args.padding_w == 0;
    plan.flat = args.kh == 1 && args.kw == 1 && args.stride_h == 1 && args.stride_w == 1 && unpadded;
    plan.direct = unpadded && takes_bytes(isa_) && !args.input_signed && args.kw * args.c % 4 == 0;
    if (plan.flat) {
      plan.row_pixels = std::min(plan.pixels, kFlatRow);
      plan.rows = (plan.pixels + kFlatRow - 1) / kFlatRow;
    }
    const int64_t block_bytes = std::max<int64_t>(depth * kBlock, 1);
    const int64_t fitting = std::max<int64_t>(kGroupBytes / block_bytes / 4 * 4, 4);
    plan.group_blocks = std::min(blocks_, plan.rows < 8 ? std::min<int64_t>(fitting, 4) : fitting);
    groups = (blocks_ + plan.group_blocks - 1) / plan.group_blocks;
  }
  plan.tasks = plan.rows * groups;
  const int64_t macs = std::max<int64_t>(plan.row_pixels * std::max<int64_t>(depth, 8) * args.o / groups, 1);
  plan.grain = std::max<int64_t>(kGrainMacs / macs, 1);
  return plan;
}

namespace {

// Rows [begin, end) of one group of channels, as long as one copy of their input stays in the cache.
class Band {
 public:
  Band(const FixedPointConvArgs& args, const FixedPointConvPlan& plan, bool bytes)
      : args_(args), plan_(plan), bytes_(bytes), memory_(scratch()) {
    pixel_bytes_ = bytes ? args.c : 2 * args.c;
    const int64_t columns = plan.flat ? plan.row_pixels : args.w + 2 * args.padding_w;
    pitch_ = plan.direct ? args.w * args.c : columns * pixel_bytes_;
    run_ = run_pixels(plan.row_pixels, plan.direct);
  }

  int run() const { return run_; }
  int64_t step() const { return plan_.flat ? pixel_bytes_ : args_.stride_w * pixel_bytes_; }
  int64_t pitch() const { return pitch_; }

  // The segments of as many rows as fit, at least one; returns the first row that is left.
  int64_t load(int64_t begin, int64_t end, int run) {
    memory_.rows.clear();
    const int64_t last = plan_.flat     ? load_flat(begin, end)
                         : plan_.direct ? load_direct(begin, end)
                                        : load_copy(begin, end);
    cut(begin, last, run);
    return last;
  }

 private:
  int64_t load_flat(int64_t begin, int64_t end) {
    const auto* input = static_cast<const uint8_t*>(args_.input);
    const int64_t row_bytes = plan_.row_pixels * pixel_bytes_;
    const int64_t last = std::min(end, begin + std::max<int64_t>(kBandBytes / std::max<int64_t>(row_bytes, 1), 1));
    if (plan_.direct) {
      for (int64_t row = begin; row < last; ++row) memory_.rows.push_back(input + row * row_bytes);
      return last;
    }
    uint8_t* copy = memory_.aligned_input((last - begin) * row_bytes + 16 * pixel_bytes_ + 16);
    const int64_t first = begin * kFlatRow, count = std::min(last * kFlatRow, plan_.pixels) - first;
    copy_codes(input + first * args_.c, copy, count * args_.c, bytes_, args_.input_signed);
    for (int64_t row = begin; row < last; ++row) memory_.rows.push_back(copy + (row - begin) * row_bytes);
    return last;
  }

  int64_t load_direct(int64_t begin, int64_t end) {
    const auto* input = static_cast<const uint8_t*>(args_.input);
    const int64_t row_bytes = args_.stride_h * pitch_;
    const int64_t last = std::min(end, begin + std::max<int64_t>(kBandBytes / std::max<int64_t>(row_bytes, 1), 1));
    for (int64_t row = begin; row < last; ++row)
      memory_.rows.push_back(input + row / args_.oh * args_.h * pitch_ + row % args_.oh * row_bytes);
    return last;
  }

  int64_t load_copy(int64_t begin, int64_t end) {
    const int64_t budget = std::max<int64_t>(kBandBytes / std::max<int64_t>(pitch_, 1), 1);
    // Rows of one image share rows of input; `taken` counts rows of the copy.
    int64_t taken = 0, last = begin;
    int64_t needed = 0;
    for (int64_t row = begin; row < end;) {
      const int64_t left = args_.oh - row % args_.oh;
      const int64_t room = std::max<int64_t>((budget - needed - args_.kh) / args_.stride_h + 1, needed == 0 ? 1 : 0);
      const int64_t rows = std::min({left, room, end - row});
      if (rows <= 0) break;
      needed += (rows - 1) * args_.stride_h + args_.kh;
      row += rows;
      last = row;
    }
    uint8_t* copy = memory_.aligned_input(needed * pitch_ + 16 * args_.stride_w * pixel_bytes_ + 16);
    for (int64_t row = begin; row < last;) {
      const int64_t rows = std::min(args_.oh - row % args_.oh, last - row);
      const int64_t height = (rows - 1) * args_.stride_h + args_.kh;
      copy_rows(row / args_.oh, row % args_.oh * args_.stride_h - args_.padding_h, height, copy + taken * pitch_);
      for (int64_t y = 0; y < rows; ++y) memory_.rows.push_back(copy + (taken + y * args_.stride_h) * pitch_);
      taken += height;
      row += rows;
    }
    return last;
  }

  // Rows top to top + height of image n, padded with zeros.
  void copy_rows(int64_t n, int64_t top, int64_t height, uint8_t* to) const {
    const auto* image = static_cast<const uint8_t*>(args_.input) + n * args_.h * args_.w * args_.c;
    const int zero = bytes_ && args_.input_signed ? 0x80 : 0;
    const auto border = static_cast<size_t>(args_.padding_w * pixel_bytes_);
    for (int64_t y = top; y < top + height; ++y, to += pitch_) {
      if (y < 0 || y >= args_.h) {
        std::memset(to, zero, static_cast<size_t>(pitch_));
        continue;
      }
      std::memset(to, zero, border);
      copy_codes(image + y * args_.w * args_.c, to + border, args_.w * args_.c, bytes_, args_.input_signed);
      std::memset(to + border + args_.w * pixel_bytes_, zero, border);
    }
  }

  void cut(int64_t begin, int64_t end, int run) {
    memory_.segments.clear();
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = row * plan_.row_pixels, pixels = std::min(plan_.row_pixels, plan_.pixels - first);
      const uint8_t* x = memory_.rows[static_cast<size_t>(row - begin)];
      for (int64_t p = 0; p < pixels; p += run) {
        const int64_t back = pixels >= run ? std::max<int64_t>(p + run - pixels, 0) : 0;
        memory_.segments.push_back({x + (p - back) * step(), first + p - back, static_cast<int>(back),
                                    static_cast<int>(std::min<int64_t>(run, pixels - p + back))});
      }
    }
  }

  const FixedPointConvArgs& args_;
  const FixedPointConvPlan& plan_;
  bool bytes_;
  Scratch& memory_;
  int64_t pixel_bytes_, pitch_;
  int run_;
};

// Calls f with a null pointer of the residual's type, and whether there is one.
template <typename F>
QUANTRAIN_INLINE void dispatch_residual(const FixedPointConvArgs& args, const F& f) {
  if (!args.residual) return f(static_cast<uint8_t*>(nullptr), std::false_type{});
  if (args.residual_type == DType::kInt32) return f(static_cast<int32_t*>(nullptr), std::true_type{});
  if (args.residual_type == DType::kInt8) return f(static_cast<int8_t*>(nullptr), std::true_type{});
  f(static_cast<uint8_t*>(nullptr), std::true_type{});
}

// Pixels of one segment from their sums [., stride], channels o to o + n.
void write_segment(const FixedPointConvArgs& args, const Shifts& shifts, const Segment& segment, const int32_t* sums,
                   int64_t stride, int64_t o, int64_t n) {
  const int64_t pixels = segment.count - segment.skip, i = (segment.pixel + segment.skip) * args.o + o;
  if (pixels <= 0) return;
  sums += segment.skip * stride;
  if (!args.shift) {
    for (int64_t p = 0; p < pixels; ++p)
      std::memcpy(static_cast<int32_t*>(args.output) + i + p * args.o, sums + p * stride, static_cast<size_t>(4 * n));
    return;
  }
#if defined(QUANTRAIN_X86)
  if (best_isa() == Isa::kV4)
    return dispatch_residual(args, [&](auto* type, auto has_residual) QUANTRAIN_INLINE_LAMBDA {
      using Residual = std::remove_pointer_t<decltype(type)>;
      if constexpr (sizeof(Residual) == 1)
        if (shifts.small)
          return args.output_signed
                     ? write_codes_512<Residual, has_residual(), true>(args, shifts, sums, stride, pixels, i, o, n)
                     : write_codes_512<Residual, has_residual(), false>(args, shifts, sums, stride, pixels, i, o, n);
      write_codes_exact_512<Residual, has_residual()>(args, shifts, sums, stride, pixels, i, o, n);
    });
#endif
  for (int64_t p = 0; p < pixels; ++p, sums += stride) {
    if (!shifts.small)
      for (int64_t j = 0; j < n; ++j) write(args, sums[j], i + p * args.o + j, o + j);
    else
      vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
        dispatch_residual(args, [&](auto* type, auto has_residual) QUANTRAIN_INLINE_LAMBDA {
          write_codes<std::remove_pointer_t<decltype(type)>, has_residual()>(args, shifts, sums, i + p * args.o, o, n);
        });
      });
  }
}

}  // namespace

void FixedPointConvKernel::run(const FixedPointConvArgs& args, const FixedPointConvPlan& plan, int64_t begin,
                               int64_t end) const {
  Scratch& memory = scratch();
  if (path_ == Path::kPlain) {
    vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
      for (int64_t row = begin; row < end; ++row)
        args.input_signed ? plain_row<int8_t>(args, row) : plain_row<uint8_t>(args, row);
    });
    return;
  }
  const Shifts shifts = shifts_of(args, blocks_, bound_, memory.shifts);
  if (path_ == Path::kDepthwise) {
    const auto* w = reinterpret_cast<const int16_t*>(weight_);
    vectorized([&]() QUANTRAIN_INLINE_LAMBDA {
      for (int64_t row = begin; row < end; ++row)
        args.input_signed ? depthwise_row<int8_t>(args, w, shifts, row) : depthwise_row<uint8_t>(args, w, shifts, row);
    });
    return;
  }
  Band band(args, plan, takes_bytes(isa_));
  // The last row of a sequence may be shorter than a run: then its pixels go one by one.
  Tiles tiles = tiles_of(isa_, band.run());
  const int64_t rest = plan.flat ? plan.pixels % kFlatRow : 0;
  const int64_t block_words = args.kh * row_words_ * kBlock;
  while (begin < end) {
    const int64_t group = begin / plan.rows, first_row = begin % plan.rows;
    const int64_t rows_end = std::min(plan.rows, first_row + end - begin);
    const int64_t first_block = group * plan.group_blocks,
                  last_block = std::min(blocks_, first_block + plan.group_blocks);
    for (int64_t row = first_row; row < rows_end;) {
      const bool short_row = plan.direct && rest != 0 && row == plan.rows - 1 && rest < band.run();
      const Tiles& now = short_row ? (tiles = tiles_of(isa_, 1)) : tiles;
      const int64_t limit =
          plan.direct && rest != 0 && rest < band.run() && !short_row ? std::min(rows_end, plan.rows - 1) : rows_end;
      const int64_t next = band.load(row, limit, now.pixels);
      for (int64_t block = first_block; block < last_block;) {
        const TileShape& shape = last_block - block >= now.most.blocks ? now.most : now.last;
        const int64_t channels = std::min<int64_t>(shape.blocks * kBlock, args.o - block * kBlock);
        const std::vector<Segment>& segments = memory.segments;
        for (size_t s = 0; s < segments.size(); s += static_cast<size_t>(shape.segments)) {
          const Segment& one = segments[s];
          const bool both = shape.segments == 2 && s + 1 < segments.size();
          const Segment& two = both ? segments[s + 1] : one;
          (both ? shape.tile : shape.alone)({{one.x, two.x},
                                             band.step(),
                                             band.pitch(),
                                             args.kh,
                                             row_words_,
                                             weight_ + block * block_words,
                                             start_.data() + block * kBlock,
                                             memory.sums});
          const int64_t stride = shape.blocks * kBlock;
          if (both && one.skip == 0 && two.skip == 0 && two.pixel == one.pixel + now.pixels) {
            write_segment(args, shifts, {one.x, one.pixel, 0, now.pixels + two.count}, memory.sums, stride,
                          block * kBlock, channels);
            continue;
          }
          write_segment(args, shifts, one, memory.sums, stride, block * kBlock, channels);
          if (both)
            write_segment(args, shifts, two, memory.sums + now.pixels * stride, stride, block * kBlock, channels);
        }
        block += shape.blocks;
      }
      row = next;
    }
    begin += rows_end - first_row;
    if (begin < end) tiles = tiles_of(isa_, band.run());
  }
}

}  // namespace quantrain::cpu
