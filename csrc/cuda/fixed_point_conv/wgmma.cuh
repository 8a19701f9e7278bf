// Convolution as a matrix product on Hopper's tensor cores (wgmma), which read both operands from shared memory.
#pragma once

#include "csrc/cuda/fixed_point_conv/mma.cuh"

namespace quantrain::cuda::conv {

// Each warp has 16 pixels and all channels of the tile: how wgmma lays out its sums. Depth of 128 or 64 bytes is a row
// of a 128- or 64-byte swizzle.
template <int kTileM, int kTileN, int kDepth, int kStages, int kMinBlocks>
using WgmmaTile = MmaTile<TileShape<kTileM, kTileN, kTileM / 16, 1>, kDepth, kStages, kMinBlocks>;

#if !defined(QUANTRAIN_EMULATED)
// Of rows of kDepth bytes: groups of eight rows follow each other.
template <int kDepth>
__device__ __forceinline__ uint64_t operand_descriptor(SharedAddress address) {
  constexpr uint64_t kSwizzle = kDepth == 128 ? 1 : 2;
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | uint64_t{1} << 16 |
         static_cast<uint64_t>(8 * kDepth >> 4) << 32 | kSwizzle << 62;
}

#define QUANTRAIN_SUMS(i) "+r"(c[i][0]), "+r"(c[i][1]), "+r"(c[i][2]), "+r"(c[i][3])
#define QUANTRAIN_SUMS8(i)                                                                                       \
  QUANTRAIN_SUMS(i), QUANTRAIN_SUMS(i + 1), QUANTRAIN_SUMS(i + 2), QUANTRAIN_SUMS(i + 3), QUANTRAIN_SUMS(i + 4), \
      QUANTRAIN_SUMS(i + 5), QUANTRAIN_SUMS(i + 6), QUANTRAIN_SUMS(i + 7)

// c = a b + (accumulate ? c : 0) over 32 bytes of depth: a [64, 32] of the warp group, b [32, 64] or [32, 128].
template <bool kInputSigned>
__device__ __forceinline__ void multiply_group(int (&c)[8][4], uint64_t a, uint64_t b, int accumulate) {
#define QUANTRAIN_WGMMA(type)                                                                                   \
  asm volatile(                                                                                                 \
      "{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"                                                                \
      "wgmma.mma_async.sync.aligned.m64n64k32.s32." type                                                        \
      ".s8 "                                                                                                    \
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
      "%28,%29,%30,%31}, %32, %33, p; }"                                                                        \
      : QUANTRAIN_SUMS8(0)                                                                                      \
      : "l"(a), "l"(b), "r"(accumulate))
  if constexpr (kInputSigned)
    QUANTRAIN_WGMMA("s8");
  else
    QUANTRAIN_WGMMA("u8");
#undef QUANTRAIN_WGMMA
}

template <bool kInputSigned>
__device__ __forceinline__ void multiply_group(int (&c)[16][4], uint64_t a, uint64_t b, int accumulate) {
#define QUANTRAIN_WGMMA(type)                                                                                    \
  asm volatile(                                                                                                  \
      "{ .reg .pred p; setp.ne.b32 p, %66, 0;\n"                                                                 \
      "wgmma.mma_async.sync.aligned.m64n128k32.s32." type                                                        \
      ".s8 "                                                                                                     \
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,"  \
      "%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53," \
      "%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, p; }"                                                 \
      : QUANTRAIN_SUMS8(0), QUANTRAIN_SUMS8(8)                                                                   \
      : "l"(a), "l"(b), "r"(accumulate))
  if constexpr (kInputSigned)
    QUANTRAIN_WGMMA("s8");
  else
    QUANTRAIN_WGMMA("u8");
#undef QUANTRAIN_WGMMA
}
#undef QUANTRAIN_SUMS8
#undef QUANTRAIN_SUMS

__device__ __forceinline__ void begin_groups() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_groups() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// The sums pass through, so that nothing reads them before the wait.
template <int kN>
__device__ __forceinline__ void wait_groups(int (&c)[kN][4]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < kN; ++i) asm volatile("" : "+r"(c[i][0]), "+r"(c[i][1]), "+r"(c[i][2]), "+r"(c[i][3])::"memory");
}

__device__ __forceinline__ int warp_uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// Copies that this thread waited for become visible to wgmma, after the next barrier.
__device__ __forceinline__ void publish_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

struct WgmmaEngine {
  template <typename Tile>
  static __device__ __forceinline__ void begin(typename Tile::Sums&) {
  }  // the first product of a tile does not accumulate

  static __device__ __forceinline__ void publish() { publish_copies(); }

  template <typename Tile, bool kInputSigned>
  static __device__ __forceinline__ void start(typename Tile::Sums& sums, SharedAddress a_stage, SharedAddress b_stage,
                                               bool first) {
    static_assert(Tile::kTilesM == 1 && Tile::kWarpsN == 1);
    // The shuffle tells the compiler that a warp has one descriptor.
    const int group = warp_uniform(static_cast<int>(threadIdx.x) / 128);
    const auto a = operand_descriptor<Tile::kDepth>(a_stage + group * 64 * Tile::kDepth);
    const auto b = operand_descriptor<Tile::kDepth>(b_stage);
    begin_groups();
#pragma unroll
    for (int slice = 0; slice < Tile::kDepth / 32; ++slice)  // descriptors count in 16 bytes
      multiply_group<kInputSigned>(sums[0], a + slice * 2, b + slice * 2, slice > 0 || !first);
    commit_groups();
  }

  // The stage is then free.
  template <typename Tile, bool kInputSigned>
  static __device__ __forceinline__ void finish(typename Tile::Sums& sums, SharedAddress, SharedAddress) {
    wait_groups(sums[0]);
  }
};

}  // namespace quantrain::cuda::conv
