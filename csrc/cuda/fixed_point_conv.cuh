// Pieces of the fixed-point convolution kernels: tensor-core instructions, asynchronous copies, and what happens to a tile of sums.
#pragma once

#include "csrc/common/fixed_point.h"
#include "csrc/common/fixed_point_conv.h"
#include "csrc/cuda/common.cuh"

namespace quantrain::cuda::conv {

constexpr int kChunk = 16;  // bytes of one copy and of one row of ldmatrix

// ---- instructions ----------------------------------------------------------------------------------------------------------

#if !defined(QUANTRAIN_EMULATED)  // an emulation on the CPU, which checks the index arithmetic, has its own
using SharedAddress = uint32_t;

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Zeros where not inside; the address is then not read.
__device__ __forceinline__ void copy_chunk(SharedAddress to, const void* from, bool inside) {
  const int bytes = inside ? kChunk : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], SharedAddress from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// c += a b over 32 bytes of depth: a [16, 32], b [32, 8].
template <bool kInputSigned>
__device__ __forceinline__ void multiply(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define QUANTRAIN_MMA(type)                                                                                         \
  asm("mma.sync.aligned.m16n8k32.row.col.s32." type ".s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                                                              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (kInputSigned)
    QUANTRAIN_MMA("s8");
  else
    QUANTRAIN_MMA("u8");
#undef QUANTRAIN_MMA
}
#endif

// ---- requantisation --------------------------------------------------------------------------------------------------------

constexpr int kFastShift = 22;  // up to here 255 << shift plus a half of it fits in 32 bits

// What an output channel's sums go through. Where 1 <= shift <= kFastShift and a residual is aligned without overflow (codes by up to
// kFastShift, sums by nothing) 32 bits suffice: the residual is added with saturation and the sum clamped to what rounds to the range's ends,
// which gives the same codes. All else goes through 64 bits.
struct alignas(16) ChannelRule {
  int shift;
  int half;  // 2^(shift - 1) - 1
  int low, high;
  int left;      // the sum is shifted by this
  int residual;  // the residual by this
  int fast;
  int unused;
};

__device__ __forceinline__ ChannelRule channel_rule(const FixedPointConvArgs& g, int64_t channel) {
  const int d = g.residual && g.residual_shift ? g.residual_shift[channel * g.residual_shift_stride] : 0;
  ChannelRule rule;
  rule.left = d < 0 ? -d : 0;
  rule.residual = d > 0 ? d : 0;
  rule.shift = g.shift[channel * g.shift_stride] + rule.left;
  const int aligned = g.residual_type == DType::kInt32 ? 0 : kFastShift;
  rule.fast = rule.shift >= 1 && rule.shift <= kFastShift && d >= 0 && d <= aligned;
  const int shift = rule.fast ? rule.shift : 1;
  rule.half = (1 << (shift - 1)) - 1;
  rule.low = g.output_signed ? -127 * (1 << shift) : 0;
  rule.high = (g.output_signed ? 127 : 255) << shift;
  rule.unused = 0;
  return rule;
}

__device__ __forceinline__ int32_t fast_code(int32_t sum, const ChannelRule& rule) {
  sum = min(max(sum, rule.low), rule.high);
  return (sum + rule.half + ((sum >> rule.shift) & 1)) >> rule.shift;
}

__device__ __forceinline__ int32_t saturating_add(int32_t a, int32_t b) {
#if defined(__CUDA_ARCH__)
  int32_t sum;
  asm("add.sat.s32 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
#else
  const int64_t sum = int64_t{a} + b;
  return static_cast<int32_t>(sum < INT32_MIN ? INT32_MIN : sum > INT32_MAX ? INT32_MAX : sum);
#endif
}

// Any shift. Not inlined: the code of a tile's end would be ten times as long.
static __device__ __noinline__ int32_t slow_code(int32_t sum, int32_t residual, int left, int residual_left, int shift,
                                                 bool is_signed) {
  return fixed_point_requantized(
      static_cast<int64_t>(sum) * (int64_t{1} << left) + static_cast<int64_t>(residual) * (int64_t{1} << residual_left),
      shift, is_signed);
}

__device__ __forceinline__ int32_t code_of(int32_t sum, int32_t residual, const ChannelRule& rule, bool is_signed) {
  if (rule.fast) return fast_code(saturating_add(sum, residual << rule.residual), rule);
  return slow_code(sum, residual, rule.left, rule.residual, rule.shift, is_signed);
}

__device__ __forceinline__ int32_t residual_at(const FixedPointConvArgs& g, int64_t index) {
  if (!g.residual) return 0;
  if (g.residual_type == DType::kUInt8) return static_cast<const uint8_t*>(g.residual)[index];
  if (g.residual_type == DType::kInt8) return static_cast<const int8_t*>(g.residual)[index];
  return static_cast<const int32_t*>(g.residual)[index];
}

// One output of a kernel that is not tiled.
__device__ __forceinline__ void write_output(const FixedPointConvArgs& g, int64_t index, int64_t channel, int32_t sum) {
  if (g.bias) sum += g.bias[channel];
  if (!g.shift) {
    static_cast<int32_t*>(g.output)[index] = sum;
    return;
  }
  static_cast<uint8_t*>(g.output)[index] =
      static_cast<uint8_t>(code_of(sum, residual_at(g, index), channel_rule(g, channel), g.output_signed));
}

// ---- a tile of sums --------------------------------------------------------------------------------------------------------

enum class Residual { kNone, kUInt8, kInt8, kInt32 };

inline Residual residual_kind(const FixedPointConvArgs& g) {
  if (!g.residual) return Residual::kNone;
  return g.residual_type == DType::kUInt8  ? Residual::kUInt8
         : g.residual_type == DType::kInt8 ? Residual::kInt8
                                           : Residual::kInt32;
}

// Tiles of kTileM pixels by kTileN channels, kWarpsM x kWarpsN warps.
template <int kTileM_, int kTileN_, int kWarpsM_, int kWarpsN_>
struct TileShape {
  static constexpr int kTileM = kTileM_, kTileN = kTileN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kThreads = kWarpsM * kWarpsN * 32;
  static constexpr int kWarpM = kTileM / kWarpsM, kWarpN = kTileN / kWarpsN;  // a warp's part
  static constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;           // in tiles of one instruction
  static constexpr int kPitch = kTileN + kChunk;  // of a row of staged codes: eight rows meet no bank twice
  static constexpr int kStagingBytes = kTileM * kPitch;
  static constexpr int kRuleBytes = kTileN * static_cast<int>(sizeof(ChannelRule));
  using Sums = int[kTilesM][kTilesN][4];
};

// Where a tile lies. Pixels and channels beyond the ends are computed and not written.
struct TilePlace {
  int64_t first_pixel, pixels;
  int first_channel, channels;
  bool wide;  // rows of codes are whole 16-byte vectors
};

template <typename Shape>
__device__ __forceinline__ void start_sums(typename Shape::Sums& sums, const int32_t* __restrict__ bias,
                                           const TilePlace& at) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = at.first_channel + warp % Shape::kWarpsN * Shape::kWarpN + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < Shape::kTilesN; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int channel = first + j * 8 + c;
      const int value = bias && channel < at.channels ? bias[channel] : 0;
#pragma unroll
      for (int i = 0; i < Shape::kTilesM; ++i) sums[i][j][c] = sums[i][j][c + 2] = value;
    }
  }
}

template <typename Shape>
__device__ __forceinline__ void load_rules(ChannelRule* rules, const FixedPointConvArgs& g, const TilePlace& at) {
  if (!g.shift) return;
  for (int i = threadIdx.x; i < Shape::kTileN; i += Shape::kThreads)
    rules[i] = channel_rule(g, min(at.first_channel + i, at.channels - 1));
}

// Brings the tile's residual codes to where its own will be staged; they are there after the next wait and barrier.
template <typename Shape>
__device__ __forceinline__ void start_residual(uint8_t* staging, const FixedPointConvArgs& g, const TilePlace& at) {
  const auto* residual = static_cast<const uint8_t*>(g.residual);
  if (at.wide) {
    constexpr int kChunks = Shape::kTileN / kChunk;
    const auto shared = shared_address(staging);
    for (int i = threadIdx.x; i < Shape::kTileM * kChunks; i += Shape::kThreads) {
      const int row = i / kChunks, column = i % kChunks * kChunk;
      const bool inside = at.first_pixel + row < at.pixels && at.first_channel + column < at.channels;
      const int64_t index = (at.first_pixel + row) * at.channels + at.first_channel + column;
      copy_chunk(shared + row * Shape::kPitch + column, inside ? residual + index : residual, inside);
    }
  } else {
    for (int i = threadIdx.x; i < Shape::kTileM * Shape::kTileN; i += Shape::kThreads) {
      const int row = i / Shape::kTileN, column = i % Shape::kTileN;
      if (at.first_pixel + row < at.pixels && at.first_channel + column < at.channels)
        staging[row * Shape::kPitch + column] =
            residual[(at.first_pixel + row) * at.channels + at.first_channel + column];
    }
  }
}

template <typename Shape>
__device__ __forceinline__ void write_sums(const typename Shape::Sums& sums, const FixedPointConvArgs& g,
                                           const TilePlace& at) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto* __restrict__ output = static_cast<int32_t*>(g.output);
#pragma unroll
  for (int i = 0; i < Shape::kTilesM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t pixel = at.first_pixel + warp / Shape::kWarpsN * Shape::kWarpM + i * 16 + half * 8 + lane / 4;
      if (pixel >= at.pixels) continue;
#pragma unroll
      for (int j = 0; j < Shape::kTilesN; ++j) {
        const int channel = at.first_channel + warp % Shape::kWarpsN * Shape::kWarpN + j * 8 + lane % 4 * 2;
        int32_t* const to = output + pixel * at.channels + channel;
        if (at.wide && channel < at.channels) {
          *reinterpret_cast<int2*>(to) = make_int2(sums[i][j][half * 2], sums[i][j][half * 2 + 1]);
        } else {
          if (channel < at.channels) to[0] = sums[i][j][half * 2];
          if (channel + 1 < at.channels) to[1] = sums[i][j][half * 2 + 1];
        }
      }
    }
  }
}

// The residual's values at this thread's places of 8 channels: of a tile's rows, two neighbours each.
template <typename Shape, Residual kResidual>
__device__ __forceinline__ void load_residual(int32_t (&residual)[Shape::kTilesM * 2][2], const uint8_t* staging,
                                              int first_row, int column, const FixedPointConvArgs& g,
                                              const TilePlace& at) {
  constexpr int kRows = Shape::kTilesM * 2;
  if constexpr (kResidual == Residual::kUInt8 || kResidual == Residual::kInt8) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint16_t pair = *reinterpret_cast<const uint16_t*>(staging + (first_row + i * 8) * Shape::kPitch + column);
      residual[i][0] = kResidual == Residual::kInt8 ? static_cast<int8_t>(pair & 0xff) : pair & 0xff;
      residual[i][1] = kResidual == Residual::kInt8 ? static_cast<int8_t>(pair >> 8) : pair >> 8;
    }
  } else if constexpr (kResidual == Residual::kInt32) {
    const int channel = at.first_channel + column;
    const auto* const from =
        static_cast<const int32_t*>(g.residual) + (at.first_pixel + first_row) * at.channels + channel;
#pragma unroll
    for (int i = 0; i < kRows; ++i) residual[i][0] = residual[i][1] = 0;
    if (at.wide) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (at.first_pixel + first_row + i * 8 >= at.pixels || channel >= at.channels) continue;
        const int2 pair = *reinterpret_cast<const int2*>(from + static_cast<int64_t>(i * 8) * at.channels);
        residual[i][0] = pair.x;
        residual[i][1] = pair.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (at.first_pixel + first_row + i * 8 < at.pixels && channel + c < at.channels)
            residual[i][c] = from[static_cast<int64_t>(i * 8) * at.channels + c];
      }
    }
  }
}

// Codes of the warp's sums, in place of the residual's codes where those were staged.
template <typename Shape, Residual kResidual>
__device__ __forceinline__ void stage_codes(const typename Shape::Sums& sums, uint8_t* staging,
                                            const ChannelRule* rules, const FixedPointConvArgs& g,
                                            const TilePlace& at) {
  constexpr int kRows = Shape::kTilesM * 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = warp / Shape::kWarpsN * Shape::kWarpM + lane / 4;  // and every eighth from there
#pragma unroll
  for (int j = 0; j < Shape::kTilesN; ++j) {
    const int column = warp % Shape::kWarpsN * Shape::kWarpN + j * 8 + lane % 4 * 2;
    const ChannelRule rule[2] = {rules[column], rules[column + 1]};
    int32_t residual[kRows][2];
    load_residual<Shape, kResidual>(residual, staging, first_row, column, g, at);
    const auto stage = [&](int i, uint32_t low, uint32_t high) {
      *reinterpret_cast<uint16_t*>(staging + (first_row + i * 8) * Shape::kPitch + column) =
          static_cast<uint16_t>((low & 0xff) | high << 8);
    };
    if (rule[0].fast & rule[1].fast) [[likely]] {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        int32_t code[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          int32_t sum = sums[i / 2][j][i % 2 * 2 + c];
          if constexpr (kResidual != Residual::kNone) sum = saturating_add(sum, residual[i][c] << rule[c].residual);
          code[c] = fast_code(sum, rule[c]);
        }
        stage(i, code[0], code[1]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        int32_t code[2];
#pragma unroll
        for (int c = 0; c < 2; ++c)
          code[c] = slow_code(sums[i / 2][j][i % 2 * 2 + c], kResidual == Residual::kNone ? 0 : residual[i][c],
                              rule[c].left, rule[c].residual, rule[c].shift, g.output_signed);
        stage(i, code[0], code[1]);
      }
    }
  }
}

template <typename Shape>
__device__ __forceinline__ void write_codes(const uint8_t* staging, const FixedPointConvArgs& g, const TilePlace& at) {
  auto* __restrict__ output = static_cast<uint8_t*>(g.output);
  if (at.wide) {
    constexpr int kChunks = Shape::kTileN / kChunk;
#pragma unroll
    for (int i = threadIdx.x; i < Shape::kTileM * kChunks; i += Shape::kThreads) {
      const int row = i / kChunks, column = i % kChunks * kChunk;
      if (at.first_pixel + row < at.pixels && at.first_channel + column < at.channels)
        *reinterpret_cast<int4*>(output + (at.first_pixel + row) * at.channels + at.first_channel + column) =
            *reinterpret_cast<const int4*>(staging + row * Shape::kPitch + column);
    }
  } else {
    for (int i = threadIdx.x; i < Shape::kTileM * Shape::kTileN; i += Shape::kThreads) {
      const int row = i / Shape::kTileN, column = i % Shape::kTileN;
      if (at.first_pixel + row < at.pixels && at.first_channel + column < at.channels)
        output[(at.first_pixel + row) * at.channels + at.first_channel + column] =
            staging[row * Shape::kPitch + column];
    }
  }
}

// The end of a tile: sums as they are, or as codes. All threads of the block come here.
template <typename Shape>
__device__ __forceinline__ void write_tile(const typename Shape::Sums& sums, uint8_t* staging, const ChannelRule* rules,
                                           const FixedPointConvArgs& g, const TilePlace& at, Residual residual) {
  if (!g.shift) {
    write_sums<Shape>(sums, g, at);
    return;
  }
  switch (residual) {
    case Residual::kUInt8:
      stage_codes<Shape, Residual::kUInt8>(sums, staging, rules, g, at);
      break;
    case Residual::kInt8:
      stage_codes<Shape, Residual::kInt8>(sums, staging, rules, g, at);
      break;
    case Residual::kInt32:
      stage_codes<Shape, Residual::kInt32>(sums, staging, rules, g, at);
      break;
    default:
      stage_codes<Shape, Residual::kNone>(sums, staging, rules, g, at);
  }
  __syncthreads();
  write_codes<Shape>(staging, g, at);
}

}  // namespace quantrain::cuda::conv
