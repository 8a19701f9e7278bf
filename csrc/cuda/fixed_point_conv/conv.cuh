// Pieces of the fixed-point convolution kernels: what happens to a tile of sums.
#pragma once

#include "csrc/common/fixed_point.h"
#include "csrc/common/fixed_point_conv.h"
#include "csrc/cuda/common.cuh"
#include "csrc/cuda/ptx.cuh"

namespace quantrain::cuda::conv {

constexpr int kChunk = 16;  // bytes of one copy and of one row of ldmatrix

using ptx::SharedAddress;

// Zeros where not inside; the address is then not read.
__device__ __forceinline__ void copy_chunk(SharedAddress to, const void* from, bool inside) {
  ptx::cp_async_16(to, from, inside ? kChunk : 0);
}

// ---- one output, any shift ------------------------------------------------------------------------------------------

__device__ __forceinline__ void write_output(const FixedPointConvArgs& g, int64_t index, int64_t channel, int32_t sum) {
  if (g.bias) sum += g.bias[channel];
  fixed_point_conv_output(g, sum, index, channel);
}

// Not inlined: the code of a tile's end would be ten times as long.
static __device__ __noinline__ void write_any(const FixedPointConvArgs& g, int64_t index, int64_t channel,
                                              int32_t sum) {
  write_output(g, index, channel, sum);
}

// ---- requantization in single precision -----------------------------------------------------------------------------

// A sum is added to the bits of 2^23 (1.5 2^23 where codes are signed), which gives the float of 2^23 + sum. One fused
// multiply and add brings it to 2^23 + sum 2^-shift, rounded half to even since neighbours there are 1 apart; the code
// is the low byte. Sums are first clamped to what rounds to the range's ends, so nothing leaves [2^23, 2^24) up to this
// shift: 255 2^15 < 2^23.
constexpr int kFastShift = 15;

__device__ __forceinline__ int32_t code_base(bool is_signed) { return is_signed ? 0x4b400000 : 0x4b000000; }

// Whether it serves a channel of sums of `depth` products: then a sum, a residual's code and the base keep to 32 bits.
__device__ __forceinline__ bool is_fast(int32_t bias, int shift, int64_t depth) {
  const int64_t most = (bias < 0 ? -int64_t{bias} : int64_t{bias}) + depth * (128 * 255);
  return shift >= 0 && shift <= kFastShift && most <= 850'000'000;
}

// What the codes of a tensor have in common.
struct CodeRange {
  float base, lowest, largest;

  __device__ __forceinline__ explicit CodeRange(bool is_signed) {
    base = __uint_as_float(static_cast<uint32_t>(code_base(is_signed)));
    lowest = is_signed ? -127.f : 0.f;
    largest = is_signed ? 127.f : 255.f;
  }
};

// What an output channel's sums go through.
struct ChannelRule {
  int32_t start;      // added to a sum: bias and base
  int32_t low, high;  // base and what rounds to the range's ends
  float scale;        // 2^-shift
  float offset;       // base (1 - 2^-shift)

  // unit: 2^shift. All of it is exact.
  __device__ __forceinline__ ChannelRule(int32_t bias_and_base, float unit, const CodeRange& range) {
    start = bias_and_base;
    low = static_cast<int32_t>(__float_as_uint(fmaf(range.lowest, unit, range.base)));
    high = static_cast<int32_t>(__float_as_uint(fmaf(range.largest, unit, range.base)));
    scale = __uint_as_float(0x7f000000u - __float_as_uint(unit));
    offset = fmaf(-range.base, scale, range.base);
  }
};

__device__ __forceinline__ float unit_of(int shift) {
  return __uint_as_float(static_cast<uint32_t>(127 + shift) << 23);
}

// The float whose low byte is the code of a sum.
__device__ __forceinline__ uint32_t rounded(int32_t sum, const ChannelRule& rule) {
  const int32_t clamped = min(max(sum + rule.start, rule.low), rule.high);
  return __float_as_uint(fmaf(__uint_as_float(static_cast<uint32_t>(clamped)), rule.scale, rule.offset));
}

__device__ __forceinline__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// Byte i of a word as an integer.
__device__ __forceinline__ int32_t byte_at(uint32_t word, int i, bool is_signed) {
  return static_cast<int32_t>(ptx::prmt(word, 0, is_signed ? (8 + i) * 0x1110 + i : 0x4440 + i));
}

__device__ __forceinline__ int32_t saturated(int64_t value) {
  const auto low = static_cast<int32_t>(value), high = static_cast<int32_t>(value >> 32);
  return high == low >> 31 ? low : (high >> 31) ^ INT32_MAX;
}

// ---- a tile of sums -------------------------------------------------------------------------------------------------

// Tiles of kTileM pixels by kTileN channels, kWarpsM x kWarpsN warps. An instruction leaves a thread two neighbouring
// columns of every eight; the weight's rows are laid out so that those of a group are kVector neighbouring channels,
// which leave as one vector.
template <int kTileM_, int kTileN_, int kWarpsM_, int kWarpsN_>
struct TileShape {
  static constexpr int kTileM = kTileM_, kTileN = kTileN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kThreads = kWarpsM * kWarpsN * 32;
  static constexpr int kWarpM = kTileM / kWarpsM, kWarpN = kTileN / kWarpsN;  // a warp's part
  static constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;           // in tiles of one instruction
  static constexpr int kGroup = kWarpN < 64 ? kWarpN : 64;                    // channels of four threads
  static constexpr int kVector = kGroup / 4, kGroups = kWarpN / kGroup;
  // Words of an array with one per channel; gaps after a thread's channels keep those of four threads in different
  // banks.
  static constexpr int kRulePitch = kTileN + kTileN / kVector * 4;
  static constexpr int kRuleBytes = 4 * kRulePitch * 4;
  static_assert(kVector == 8 || kVector == 16);
  using Sums = int[kTilesM][kTilesN][4];

  static __device__ __forceinline__ int rule_place(int channel) { return channel + channel / kVector * 4; }

  // The channel, from the tile's first, whose weights lie in a row. A permutation of the row's bits: rows without
  // common bits add.
  static __host__ __device__ constexpr int row_channel(int row) {
    return (row & ~(kGroup - 1)) | (row >> 1 & 3) * kVector | (row >> 3 & (kGroup / 8 - 1)) * 2 | (row & 1);
  }
};

// Where a tile's channels lie. Those beyond the end are computed and not written.
struct TilePlace {
  int first_channel, channels;
  int vector;  // neighbouring codes that are read and written at once: 16, 8, or 1 where rows are not aligned
};

inline int vector_of(const FixedPointConvArgs& g) {
  const bool aligned = is_aligned(g.output) && is_aligned(g.residual);
  return aligned && g.o % 16 == 0 ? 16 : aligned && g.o % 8 == 0 ? 8 : 1;
}

// What happens to the sums: written as they are; to codes with no residual, with one of codes by shifts to the left, or
// with any; or all that is slow, one output at a time.
enum class Ending { kSums, kCodes, kResidualCodes, kAligned, kAny };

// The rules of a tile's channels in shared memory, by Shape::rule_place.
struct TileRules {
  int32_t* start;
  float* unit;                            // 2^shift
  int32_t *sum_factor, *residual_factor;  // 2^n that align a sum and its residual

  template <typename Shape>
  static __device__ __forceinline__ TileRules at(uint8_t* shared) {
    auto* const words = reinterpret_cast<int32_t*>(shared);
    return {words, reinterpret_cast<float*>(words + Shape::kRulePitch), words + 2 * Shape::kRulePitch,
            words + 3 * Shape::kRulePitch};
  }
};

// For all threads of the block, once per column of tiles. depth: products per sum. A barrier.
template <typename Shape>
__device__ __forceinline__ Ending load_rules(const TileRules& to, const FixedPointConvArgs& g, const TilePlace& at,
                                             int64_t depth) {
  bool fast = true, left_only = true;
  for (int i = threadIdx.x; i < Shape::kTileN; i += Shape::kThreads) {
    const int64_t channel = min(at.first_channel + i, at.channels - 1);
    const int32_t bias = g.bias ? g.bias[channel] : 0;
    const int place = Shape::rule_place(i);
    to.start[place] = bias;
    if (g.shift) {
      const int d = fixed_point_residual_shift(g, channel), left = max(-d, 0), right = max(d, 0);
      const int shift = g.shift[channel * g.shift_stride] + left;
      const bool suits = is_fast(bias, shift, depth) && left <= 30 && right <= 30;
      fast = fast && suits;
      left_only = left_only && left == 0 && right <= kFastShift;
      to.start[place] = bias + code_base(g.output_signed);
      to.unit[place] = unit_of(suits ? shift : 0);
      to.sum_factor[place] = 1 << min(left, 30);
      to.residual_factor[place] = 1 << min(right, 30);
    }
  }
  fast = __syncthreads_and(fast);
  left_only = __syncthreads_and(left_only);
  if (at.vector == 1) return Ending::kAny;
  if (!g.shift) return Ending::kSums;
  if (!fast) return Ending::kAny;
  if (!g.residual) return Ending::kCodes;
  return left_only && g.residual_type != DType::kInt32 ? Ending::kResidualCodes : Ending::kAligned;
}

// kVector codes from their place; zeros where not inside.
template <int kVector>
__device__ __forceinline__ void load_codes(uint32_t (&words)[kVector / 4], const uint8_t* from, int channels_left,
                                           int vector, bool inside) {
  if constexpr (kVector == 16) {
    if (vector == 16) {
      const int4 all = inside && channels_left > 0 ? *reinterpret_cast<const int4*>(from) : make_int4(0, 0, 0, 0);
      words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kVector / 8; ++i) {
    const int2 half = inside && channels_left > i * 8 ? *reinterpret_cast<const int2*>(from + i * 8) : make_int2(0, 0);
    words[i * 2] = half.x, words[i * 2 + 1] = half.y;
  }
}

template <int kVector>
__device__ __forceinline__ void store_codes(uint8_t* to, const uint32_t (&words)[kVector / 4], int channels_left,
                                            int vector) {
  if constexpr (kVector == 16) {
    if (vector == 16) {
      if (channels_left > 0) *reinterpret_cast<int4*>(to) = make_int4(words[0], words[1], words[2], words[3]);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kVector / 8; ++i)
    if (channels_left > i * 8) *reinterpret_cast<int2*>(to + i * 8) = make_int2(words[i * 2], words[i * 2 + 1]);
}

// A thread's part of a tile: rows first_row, + 8, ..., and of each group of columns kVector from `column`.
template <typename Shape>
struct TilePart {
  int first_row, column;

  __device__ __forceinline__ TilePart() {
    const int tid = ptx::opaque(static_cast<int>(threadIdx.x)), lane = tid % 32, warp = tid / 32;
    first_row = warp / Shape::kWarpsN * Shape::kWarpM + lane / 4;
    column = warp % Shape::kWarpsN * Shape::kWarpN + lane % 4 * Shape::kVector;
  }
};

// The sum at row i and at channel 4 v + e of a group's vector.
template <typename Shape>
__device__ __forceinline__ int& sum_at(typename Shape::Sums& sums, int group, int i, int v, int e) {
  return sums[i / 2][group * (Shape::kGroup / 8) + v * 2 + e / 2][i % 2 * 2 + e % 2];
}

// Rows: from a row of the tile to its pixel, or -1 where that does not exist.
template <typename Shape, typename Rows>
__device__ __forceinline__ void write_codes(typename Shape::Sums& sums, const TileRules& tile,
                                            const FixedPointConvArgs& g, const TilePlace& at, const Rows& rows) {
  constexpr int kRows = Shape::kTilesM * 2, kVector = Shape::kVector;
  const TilePart<Shape> part;
  const CodeRange range(g.output_signed);
#pragma unroll
  for (int group = 0; group < Shape::kGroups; ++group) {
    const int column = part.column + group * Shape::kGroup, channel = at.first_channel + column;
    uint32_t words[kRows][kVector / 4];
#pragma unroll
    for (int v = 0; v < kVector / 4; ++v) {
      const int place = Shape::rule_place(column) + v * 4;
      const int4 start = *reinterpret_cast<const int4*>(tile.start + place);
      const float4 unit = *reinterpret_cast<const float4*>(tile.unit + place);
      const ChannelRule rule[4] = {
          {start.x, unit.x, range}, {start.y, unit.y, range}, {start.z, unit.z, range}, {start.w, unit.w, range}};
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        uint32_t result[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) result[e] = rounded(sum_at<Shape>(sums, group, i, v, e), rule[e]);
        words[i][v] = low_bytes(result[0], result[1], result[2], result[3]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t pixel = rows(part.first_row + i * 8);
      if (pixel >= 0)
        store_codes<kVector>(static_cast<uint8_t*>(g.output) + pixel * at.channels + channel, words[i],
                             at.channels - channel, at.vector);
    }
  }
}

// Adds a residual of codes, shifted to the left.
template <typename Shape, typename Rows>
__device__ __forceinline__ void add_residual_codes(typename Shape::Sums& sums, const TileRules& tile,
                                                   const FixedPointConvArgs& g, const TilePlace& at, const Rows& rows) {
  constexpr int kRows = Shape::kTilesM * 2, kVector = Shape::kVector;
  const TilePart<Shape> part;
  const bool is_signed = g.residual_type == DType::kInt8;
#pragma unroll
  for (int group = 0; group < Shape::kGroups; ++group) {
    const int column = part.column + group * Shape::kGroup, channel = at.first_channel + column;
    uint32_t words[kRows][kVector / 4];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t pixel = rows(part.first_row + i * 8);
      load_codes<kVector>(words[i], static_cast<const uint8_t*>(g.residual) + pixel * at.channels + channel,
                          at.channels - channel, at.vector, pixel >= 0);
    }
#pragma unroll
    for (int v = 0; v < kVector / 4; ++v) {
      const int4 four = *reinterpret_cast<const int4*>(tile.residual_factor + Shape::rule_place(column) + v * 4);
      const int32_t factor[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 0; e < 4; ++e)
#pragma unroll
        for (int i = 0; i < kRows; ++i)
          sum_at<Shape>(sums, group, i, v, e) += byte_at(words[i][v], e, is_signed) * factor[e];
    }
  }
}

// Adds any residual, of which either side is shifted to the left. Leaves what rounds to the same codes: the total in 64
// bits, clamped to the range's ends, without the rule's bias.
template <typename Shape, typename Rows>
__device__ __forceinline__ void add_aligned_residual(typename Shape::Sums& sums, const TileRules& tile,
                                                     const FixedPointConvArgs& g, const TilePlace& at,
                                                     const Rows& rows) {
  constexpr int kVector = Shape::kVector;
  const TilePart<Shape> part;
  const CodeRange range(g.output_signed);
  const int32_t base = code_base(g.output_signed);
#pragma unroll
  for (int group = 0; group < Shape::kGroups; ++group) {
#pragma unroll
    for (int v = 0; v < kVector / 4; ++v) {
      const int column = part.column + group * Shape::kGroup + v * 4, channel = at.first_channel + column;
#pragma unroll
      for (int i = 0; i < Shape::kTilesM * 2; ++i) {
        const int64_t pixel = rows(part.first_row + i * 8), index = pixel * at.channels + channel;
        int4 residual = make_int4(0, 0, 0, 0);
        if (pixel >= 0 && channel < at.channels) {
          if (g.residual_type == DType::kInt32) {
            residual = *reinterpret_cast<const int4*>(static_cast<const int32_t*>(g.residual) + index);
          } else {
            const uint32_t word = *reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(g.residual) + index);
            const bool is_signed = g.residual_type == DType::kInt8;
            residual = make_int4(byte_at(word, 0, is_signed), byte_at(word, 1, is_signed), byte_at(word, 2, is_signed),
                                 byte_at(word, 3, is_signed));
          }
        }
        const int32_t values[4] = {residual.x, residual.y, residual.z, residual.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int place = Shape::rule_place(column) + e;
          const ChannelRule rule(tile.start[place], tile.unit[place], range);
          int& sum = sum_at<Shape>(sums, group, i, v, e);
          const int32_t bias = rule.start - base;
          const int32_t total = saturated(static_cast<int64_t>(sum + bias) * tile.sum_factor[place] +
                                          static_cast<int64_t>(values[e]) * tile.residual_factor[place]);
          sum = min(max(total, rule.low - base), rule.high - base) - bias;
        }
      }
    }
  }
}

// Sums as they are, or one output at a time. Rolled up through memory of the thread: these serve what is small or rare.
template <typename Shape, typename Rows>
__device__ __forceinline__ void write_sums(const typename Shape::Sums& sums, const TileRules& tile, bool any,
                                           const FixedPointConvArgs& g, const TilePlace& at, const Rows& rows) {
  const TilePart<Shape> part;
  int local[Shape::kTilesM * 2][Shape::kTilesN * 2];
#pragma unroll
  for (int i = 0; i < Shape::kTilesM * 2; ++i)
#pragma unroll
    for (int j = 0; j < Shape::kTilesN * 2; ++j) local[i][j] = sums[i / 2][j / 2][i % 2 * 2 + j % 2];
#pragma unroll 1
  for (int i = 0; i < Shape::kTilesM * 2; ++i) {
    const int64_t pixel = rows(part.first_row + i * 8);
    if (pixel < 0) continue;
#pragma unroll 1
    for (int j = 0; j < Shape::kTilesN * 2; j += 4) {
      const int column = part.column + j / Shape::kVector * Shape::kGroup + j % Shape::kVector;
      const int channel = at.first_channel + column;
      const int64_t index = pixel * at.channels + channel;
      if (any) {
#pragma unroll 1
        for (int e = 0; e < 4 && channel + e < at.channels; ++e) write_any(g, index + e, channel + e, local[i][j + e]);
      } else if (channel < at.channels) {
        const int4 bias = *reinterpret_cast<const int4*>(tile.start + Shape::rule_place(column));
        *reinterpret_cast<int4*>(static_cast<int32_t*>(g.output) + index) = make_int4(
            local[i][j] + bias.x, local[i][j + 1] + bias.y, local[i][j + 2] + bias.z, local[i][j + 3] + bias.w);
      }
    }
  }
}

// The end of a tile. Reads the rules and nothing else of shared memory.
template <typename Shape, typename Rows>
__device__ __forceinline__ void write_tile(typename Shape::Sums& sums, const TileRules& tile, Ending ending,
                                           const FixedPointConvArgs& g, const TilePlace& at, const Rows& rows) {
  if (ending == Ending::kSums || ending == Ending::kAny) {
    write_sums<Shape>(sums, tile, ending == Ending::kAny, g, at, rows);
    return;
  }
  if (ending == Ending::kResidualCodes) add_residual_codes<Shape>(sums, tile, g, at, rows);
  if (ending == Ending::kAligned) add_aligned_residual<Shape>(sums, tile, g, at, rows);
  write_codes<Shape>(sums, tile, g, at, rows);
}

}  // namespace quantrain::cuda::conv
