// Products with a packed weight on Hopper, for sm_90a: y^T = W x^T, and with kTransposed y^T = W^T x^T, the gradient of
// the input, where x is that of the output.
//
// A thread block makes a tile of [64 outputs a warp group, kColumns rows of x]. One warp copies codes and x through a
// ring of stages (TMA); each warp group decodes its 64 rows of the left operand straight into the registers that wgmma
// takes it from, the scale multiplied in, while the product before it runs; x is read from shared memory. So a weight
// is decoded once for kColumns rows of x, and decoded weights are stored nowhere. Where there are few tiles, the thread
// blocks of a cluster share a tile's contraction and add their sums in each other's shared memory, in order.
#pragma once

#include <cuda.h>

#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "csrc/cuda/device.h"
#include "csrc/cuda/four_bit/fragment.cuh"
#include "csrc/cuda/four_bit/wgmma.h"
#include "csrc/cuda/tensor_map.h"

namespace quantrain::cuda::sm90 {

namespace gmma = cute::SM90::GMMA;

template <typename T, int kColumns>
struct Wgmma;
#define QUANTRAIN_WGMMA(columns)                                                             \
  template <>                                                                                \
  struct Wgmma<BFloat16, columns> {                                                          \
    using Type = gmma::MMA_64x##columns##x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::K>; \
  };                                                                                         \
  template <>                                                                                \
  struct Wgmma<Half, columns> {                                                              \
    using Type = gmma::MMA_64x##columns##x16_F32F16F16_RS<gmma::Major::K, gmma::Major::K>;   \
  }
QUANTRAIN_WGMMA(32);
QUANTRAIN_WGMMA(64);
QUANTRAIN_WGMMA(128);
QUANTRAIN_WGMMA(256);
#undef QUANTRAIN_WGMMA

template <typename Mma, int kSums, size_t... kI>
__device__ __forceinline__ void multiply(float (&sum)[kSums], const uint32_t* a, uint64_t b, bool accumulate,
                                         std::index_sequence<kI...>) {
  Mma::fma(a[0], a[1], a[2], a[3], b, sum[kI]..., accumulate ? gmma::ScaleOut::One : gmma::ScaleOut::Zero);
}

// Registers of instructions that the compiler does not see end: they are ready before, and not touched until later.
template <typename R, int kSize>
__device__ __forceinline__ void fence(R (&registers)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) cute::warpgroup_fence_operand(registers[i]);
}

// Rows of 128 bytes in a swizzle of 128, groups of eight rows one after another.
__device__ __forceinline__ uint64_t operand_descriptor(ptx::SharedAddress address) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

// kGroups warp groups; stages of kChunks chunks of 64 of the contraction.
template <int kGroups_, int kColumns_, int kChunks_, int kStages_>
struct Tile {
  static constexpr int kGroups = kGroups_, kColumns = kColumns_, kChunks = kChunks_, kStages = kStages_;
  static constexpr int kRows = kGroups * 64, kConsumers = kGroups * 128,
                       kThreads = kConsumers + (kGroups == 2 ? 128 : 32);
  static constexpr int kCodeBytes = kRows * kChunks * kChunk / 2, kXBytes = kColumns * kChunk * 2;
  static constexpr int kStageBytes = kCodeBytes + kChunks * kXBytes;
  static constexpr int kSums = kColumns / 2;
  static constexpr bool kSplits = kColumns <= 128;               // clusters may share its sum
  static constexpr int kPiece = kColumns < 64 ? kColumns : 64;   // columns that are written together
  static constexpr int kPitch = 144;                             // bytes of one of them in shared memory
  static constexpr int kScaleBytes = kGroups * 2 * 2 * 128 * 4;  // transposed: two buffers of pairs, of zero points too
  static constexpr int kOutBytes = kGroups * kPiece * kPitch;
  // Of the sums that a thread block of a cluster receives, for each other one.
  static constexpr int received_bytes(int split) { return (kColumns / 8 + split - 1) / split * 16 * kConsumers; }
  static constexpr size_t shared_bytes(int split) {
    const int received = (split - 1) * received_bytes(split), out = received > kOutBytes ? received : kOutBytes;
    return 1024 + static_cast<size_t>(kStages) * kStageBytes + kTableBytes + 1024 + kScaleBytes + out + 256;
  }
};

template <typename T, typename Tile, Extra kExtra, bool kTransposed>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    wgmma_kernel(const WgmmaParams p, const FourBitValues values, const __grid_constant__ CUtensorMap code_map,
                 const __grid_constant__ CUtensorMap x_map) {
  extern __shared__ uint8_t raw_shared[];
  uint8_t* shared = raw_shared + (1024 - ptx::shared_address(raw_shared) % 1024) % 1024;
  const FourBitLinearArgs& a = p.args;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  uint8_t* const stages = shared;
  auto* table = reinterpret_cast<uint32_t*>(shared + Tile::kStages * Tile::kStageBytes);
  auto* map = reinterpret_cast<float*>(table + kTableBytes / 4);  // [256]
  auto* scale_pairs = reinterpret_cast<uint32_t*>(map + 256);     // transposed: [groups][2][2][128]
  uint8_t* out = reinterpret_cast<uint8_t*>(scale_pairs) + Tile::kScaleBytes;
  const int out_bytes = static_cast<int>(Tile::shared_bytes(p.split)) - 1024 - 256 - 1024 - kTableBytes -
                        Tile::kScaleBytes - Tile::kStages * Tile::kStageBytes;
  const ptx::SharedAddress full = ptx::shared_address(out + out_bytes), empty = full + Tile::kStages * 8,
                           received = empty + Tile::kStages * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; ++i) {
      ptx::mbarrier_init(full + i * 8, 1);
      ptx::mbarrier_init(empty + i * 8, Tile::kGroups);
    }
    ptx::mbarrier_init(received, 1);
    ptx::fence_mbarrier_init();
  }
  fill_pair_table<T>(table, a.table ? 0.0f : values.value[lane % kFourBitCodes], four_bit_high_first(a.format), warp,
                     Tile::kThreads / 32);
  if constexpr (kExtra == Extra::kCompressed)
    for (int i = threadIdx.x; i < 256; i += Tile::kThreads) map[i] = device_signed_map.value[i];
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (a.table) {
    __syncthreads();
    fill_pair_table<T>(table, a.table[lane % kFourBitCodes], four_bit_high_first(a.format), warp, Tile::kThreads / 32);
  }
  __syncthreads();
  if (p.split > 1) {
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_wait();
  }
  const int rank = p.split > 1 ? static_cast<int>(blockIdx.x) % p.split : 0;
  const int first_tile = static_cast<int>(blockIdx.x) / p.split, tile_step = static_cast<int>(gridDim.x) / p.split;
  const int all_chunks = static_cast<int>((p.contraction + kChunk - 1) / kChunk);
  // Whole fours: what lies past the end reads as 0. A branch among the products would make the compiler wait for each.
  const int first_chunk = rank * p.chunks, chunks = max(min(p.chunks, (all_chunks - first_chunk + 3) / 4 * 4), 0);
  const int tiles = p.tiles_m * p.tiles_n;

  if (warp >= Tile::kConsumers / 32) {
    if constexpr (Tile::kGroups == 2) cutlass::arch::warpgroup_reg_dealloc<40>();
    if (warp == Tile::kConsumers / 32 && lane == 0) {
      int slot = 0;
      uint32_t parity = 1;  // a stage is empty at first
      for (int tile = first_tile; tile < tiles; tile += tile_step) {
        const int row = tile / p.tiles_m * Tile::kRows, column = tile % p.tiles_m * Tile::kColumns;
        for (int c = 0; c < chunks; c += Tile::kChunks) {
          ptx::mbarrier_wait(empty + slot * 8, parity);
          ptx::mbarrier_arrive_expect_tx(full + slot * 8, Tile::kStageBytes);
          const ptx::SharedAddress to = ptx::shared_address(stages + slot * Tile::kStageBytes);
          const int at = (first_chunk + c) * kChunk;
          if constexpr (kTransposed)
            ptx::cp_async_bulk_tensor_2d(to + Tile::kChunks * Tile::kXBytes, &code_map, row / 2, at, full + slot * 8);
          else
            ptx::cp_async_bulk_tensor_2d(to + Tile::kChunks * Tile::kXBytes, &code_map, at / 2, row, full + slot * 8);
#pragma unroll
          for (int i = 0; i < Tile::kChunks; ++i)
            ptx::cp_async_bulk_tensor_2d(to + i * Tile::kXBytes, &x_map, at + i * kChunk, column, full + slot * 8);
          if (++slot == Tile::kStages) {
            slot = 0;
            parity ^= 1;
          }
        }
      }
    }
  } else {
    if constexpr (Tile::kGroups == 2) cutlass::arch::warpgroup_reg_alloc<232>();
    const int group = warp / 4, warp_row = group * 64 + warp % 4 * 16;  // of the tile: the first of this warp's
    const int g = lane / 4, t = lane % 4;
    const uint32_t lane_place = static_cast<uint32_t>(ptx::opaque(lane * 4));
    const auto* table_bytes = reinterpret_cast<const uint8_t*>(table);
    const auto pair_of = [&](uint32_t shifted) {  // of the byte in bits 7 to 14
      return *reinterpret_cast<const uint32_t*>(table_bytes + ((shifted & 0x7f80u) | lane_place));
    };
    const float offset = kExtra == Extra::kCompressed ? __ldg(a.scales.scale_offset) : 0.0f;
    int slot = 0;
    uint32_t parity = 0;
    using Mma = typename Wgmma<T, Tile::kColumns>::Type;
    constexpr auto kIndices = std::make_index_sequence<Tile::kSums>{};

    for (int tile = first_tile; tile < tiles; tile += tile_step) {
      const int tile_row = tile / p.tiles_m * Tile::kRows, tile_column = tile % p.tiles_m * Tile::kColumns;
      float sum[Tile::kSums];
      uint32_t fragment[2][16];

      // The scales of the next four chunks. Forward: of this warp's row lane % 16. Transposed: of two rows of the
      // contraction, of the block that this warp group's outputs are in; the group shares them in shared memory.
      RawScales<kExtra> raw;
      uint32_t next_scale[2] = {}, next_zero[2] = {}, next_scale_scale[2] = {};
      const int64_t scale_row =
          min(static_cast<int64_t>(tile_row + warp_row + lane % 16), a.n - 1) * p.scales.blocks_per_row;
      const auto load_scales = [&](int c) {
        if constexpr (kTransposed) {
          const int64_t in_row = min(tile_row + group * 64, static_cast<int>(a.k) - 1) / kChunk >> p.scales.block_shift;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int row = (first_chunk + c) * kChunk + static_cast<int>(threadIdx.x) % 128 * 2 + i;
            const int64_t block = min(static_cast<int64_t>(row), a.n - 1) * p.scales.blocks_per_row + in_row;
            if constexpr (kExtra == Extra::kCompressed) {
              next_scale[i] = __ldg(a.scales.scale_codes + block);
              ptx::ld_global_nc(next_scale_scale[i], a.scales.scale_scale + block / kScaleBlock, true);
            } else {
              ptx::ld_global_nc(next_scale[i], a.scales.scale + block, true);
              if constexpr (kExtra == Extra::kZeroPoint)
                ptx::ld_global_nc(next_zero[i], a.scales.zero_point + block, true);
            }
          }
        } else {
          raw.load(p.scales, scale_row, first_chunk + c, all_chunks);
        }
      };
      const auto both = [](float value) { return packed_pair<T>(value, value); };
      uint32_t scale[4], zero[4];       // forward: pairs of four chunks
      const uint32_t* pairs = nullptr;  // transposed: [4][32]
      const auto take_scales = [&](int c) {
        if constexpr (kTransposed) {
          uint32_t* to = scale_pairs + (group * 4 + c / 4 % 2 * 2) * 128;
          float of_row[2], zero_of_row[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            of_row[i] = __uint_as_float(next_scale[i]);
            if constexpr (kExtra == Extra::kCompressed)
              of_row[i] = four_bit_decompressed(map[next_scale[i]], __uint_as_float(next_scale_scale[i]), offset);
            zero_of_row[i] = static_cast<float>(static_cast<int32_t>(next_zero[i]));
          }
          to[threadIdx.x % 128] = packed_pair<T>(of_row[0], of_row[1]);
          if constexpr (kExtra == Extra::kZeroPoint)
            to[128 + threadIdx.x % 128] = packed_pair<T>(zero_of_row[0], zero_of_row[1]);
          asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
          pairs = to;
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            scale[i] = both(raw.value(p.scales, map, offset, i));
            if constexpr (kExtra == Extra::kZeroPoint)
              zero[i] = both(static_cast<float>(static_cast<int32_t>(raw.zero_point[i])));
          }
        }
      };
      const auto scaled = [&](uint32_t pair, uint32_t by, [[maybe_unused]] uint32_t zero_point) {
        if constexpr (kExtra == Extra::kZeroPoint) pair = subtracted<T>(pair, zero_point);
        return multiplied<T>(pair, by);
      };

      // The left operand of chunk i of the stage, whose scales are those of number c of four.
      const auto decode = [&](uint32_t (&to)[16], const uint8_t* codes, int i, int c) {
        if constexpr (kTransposed) {
          // A byte holds outputs 2g and 2g + 1 of a row of the contraction: rows g and g + 8 of the fragment. Two rows
          // of the contraction make the pairs.
          const int byte = warp_row / 2 + g, piece = byte / 16;
          constexpr int kPitch = Tile::kRows / 2;
#pragma unroll
          for (int step = 0; step < 4; ++step) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int row = step * 16 + half * 8 + t * 2;
              uint32_t pair[2];
#pragma unroll
              for (int j = 0; j < 2; ++j) {
                const int turned = piece ^ (kPitch == 64 ? row >> 1 & 3 : (row + j) & 7);
                pair[j] = pair_of(
                    static_cast<uint32_t>(codes[(i * kChunk + row + j) * kPitch + turned * 16 + byte % 16]) << 7);
              }
              const uint32_t by = pairs[c * 32 + row / 2];
              const uint32_t zero_point = kExtra == Extra::kZeroPoint ? pairs[128 + c * 32 + row / 2] : 0;
              to[step * 4 + half * 2] = scaled(__byte_perm(pair[0], pair[1], 0x5410), by, zero_point);
              to[step * 4 + half * 2 + 1] = scaled(__byte_perm(pair[0], pair[1], 0x7632), by, zero_point);
            }
          }
        } else {
          const uint32_t turn = (8 * t + 25) % 32;
#pragma unroll
          for (int half = 0; half < 2; ++half) {  // rows g and g + 8 of the warp's
            const int row = warp_row + half * 8 + g;
            const uint32_t by = __shfl_sync(0xffffffffu, scale[c], half * 8 + g);
            uint32_t zero_point = 0;
            if constexpr (kExtra == Extra::kZeroPoint) zero_point = __shfl_sync(0xffffffffu, zero[c], half * 8 + g);
#pragma unroll
            for (int part = 0; part < 2; ++part) {
              const int piece = i * 2 + part;
              const int at = Tile::kChunks == 2 ? row * 64 + (piece ^ (row >> 1 & 3)) * 16
                                                : row * 32 + (piece ^ (row >> 2 & 1)) * 16;
              const uint4 words = *reinterpret_cast<const uint4*>(codes + at);
              const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
              for (int w = 0; w < 4; ++w)
                to[(part * 2 + w / 2) * 4 + w % 2 * 2 + half] =
                    scaled(pair_of(__funnelshift_r(word[w], word[w], turn)), by, zero_point);
            }
          }
        }
      };

      load_scales(0);
#pragma unroll 1
      for (int first = 0; first < chunks; first += 4) {
        take_scales(first);
        if (first + 4 < chunks) load_scales(first + 4);
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          const int c = first + u;
          constexpr int kMask = Tile::kChunks - 1;
          const uint8_t* stage = stages + slot * Tile::kStageBytes;
          if ((u & kMask) == 0) ptx::mbarrier_wait(full + slot * 8, parity);
          decode(fragment[u % 2], stage + Tile::kChunks * Tile::kXBytes, u & kMask, u);
          const uint64_t b = operand_descriptor(ptx::shared_address(stage + (u & kMask) * Tile::kXBytes));
          fence(fragment[u % 2]);
          fence(sum);
          cute::warpgroup_arrive();
#pragma unroll
          for (int step = 0; step < 4; ++step)
            multiply<Mma>(sum, fragment[u % 2] + step * 4, b + step * 2, c > 0 || step > 0, kIndices);
          cute::warpgroup_commit_batch();
          fence(sum);
          // The product before this one is done: its stage is free, and its fragment.
          cute::warpgroup_wait<1>();
          if (c > 0 && (u & kMask) == 0) {
            if (threadIdx.x % 128 == 0) ptx::mbarrier_arrive(empty + (slot == 0 ? Tile::kStages - 1 : slot - 1) * 8);
          }
          if ((u & kMask) == kMask) {
            if (++slot == Tile::kStages) {
              slot = 0;
              parity ^= 1;
            }
          }
        }
      }
      cute::warpgroup_wait<0>();
      fence(sum);
      if (chunks > 0) {
        if (threadIdx.x % 128 == 0) ptx::mbarrier_arrive(empty + (slot == 0 ? Tile::kStages - 1 : slot - 1) * 8);
      } else {
#pragma unroll
        for (int i = 0; i < Tile::kSums; ++i) sum[i] = 0.0f;
      }

      // The cluster's sums: each thread block adds some eights of columns.
      constexpr int kEights = Tile::kColumns / 8;
      const auto owner_of = [&](int eight) { return Tile::kSplits ? eight * p.split / kEights : 0; };
      if (Tile::kSplits && p.split > 1) {
        const int most = (kEights + p.split - 1) / p.split;
        const auto first_of = [&](int owner) { return (owner * kEights + p.split - 1) / p.split; };
        const auto place_of = [&](int source, int eight, int owner) {
          source -= source > owner;
          return ptx::shared_address(out) +
                 static_cast<uint32_t>(((source * most + eight - first_of(owner)) * Tile::kConsumers + threadIdx.x) *
                                       16);
        };
#pragma unroll
        for (int eight = 0; eight < kEights; ++eight) {
          const int owner = owner_of(eight);
          if (owner == rank) continue;
          const uint32_t to = ptx::mapa(place_of(rank, eight, owner), owner), barrier = ptx::mapa(received, owner);
          ptx::st_async_4(to, sum[eight * 4], sum[eight * 4 + 1], sum[eight * 4 + 2], sum[eight * 4 + 3], barrier);
        }
        const int mine = first_of(rank + 1) - first_of(rank);
        if (threadIdx.x == 0)
          ptx::mbarrier_arrive_expect_tx(received, static_cast<uint32_t>((p.split - 1) * mine * Tile::kConsumers * 16));
        ptx::mbarrier_wait(received, 0);
#pragma unroll
        for (int eight = 0; eight < kEights; ++eight) {
          if (owner_of(eight) != rank) continue;
          float total[4] = {};
          for (int source = 0; source < p.split; ++source) {
            float4 part{sum[eight * 4], sum[eight * 4 + 1], sum[eight * 4 + 2], sum[eight * 4 + 3]};
            if (source != rank)
              part = *reinterpret_cast<const float4*>(out + (place_of(source, eight, rank) - ptx::shared_address(out)));
            total[0] += part.x, total[1] += part.y, total[2] += part.z, total[3] += part.w;
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[eight * 4 + i] = total[i];
        }
        asm volatile("bar.sync 7, %0;" ::"n"(Tile::kConsumers) : "memory");  // what was received is written over
      }

      // The sums through shared memory, so that rows of y are written by whole lines.
      const int outputs = static_cast<int>(kTransposed ? a.k : a.n), group_row = tile_row + group * 64;
      float bias[2] = {};
      if (!kTransposed && a.bias) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          bias[half] = four_bit_bias(a, min(static_cast<int64_t>(tile_row + warp_row + half * 8 + g), a.n - 1));
      }
      uint8_t* piece = out + group * Tile::kPiece * Tile::kPitch;
      auto* y = static_cast<T*>(a.y);
      const bool lines = outputs % 8 == 0 && p.lines && group_row + 64 <= outputs;
#pragma unroll
      for (int q = 0; q < Tile::kColumns / Tile::kPiece; ++q) {
#pragma unroll
        for (int j = 0; j < Tile::kPiece / 8; ++j) {
          const float* s = sum + (q * Tile::kPiece / 8 + j) * 4;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t value = packed_pair<T>(s[half * 2] + bias[half], s[half * 2 + 1] + bias[half]);
            // Transposed into rows of columns of y; lane i of eight gives the place of row i.
            const ptx::SharedAddress at =
                ptx::shared_address(piece + (j * 8 + lane % 8) * Tile::kPitch + (warp % 4 * 16 + half * 8) * 2);
            ptx::stmatrix_trans(at, value);
          }
        }
        asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
        for (int i = threadIdx.x % 128; i < Tile::kPiece * 4; i += 128) {  // 16 outputs each
          const int column = i / 4, m = tile_column + q * Tile::kPiece + column, n = group_row + i % 4 * 16;
          if (m >= a.m || owner_of((q * Tile::kPiece + column) / 8) != rank) continue;
          const uint4* from = reinterpret_cast<const uint4*>(piece + column * Tile::kPitch + i % 4 * 32);
          uint4 low = from[0], high = from[1];
          if constexpr (kTransposed) {  // even outputs, odd outputs
            const uint4 even = low, odd = high;
            low = {__byte_perm(even.x, odd.x, 0x5410), __byte_perm(even.x, odd.x, 0x7632),
                   __byte_perm(even.y, odd.y, 0x5410), __byte_perm(even.y, odd.y, 0x7632)};
            high = {__byte_perm(even.z, odd.z, 0x5410), __byte_perm(even.z, odd.z, 0x7632),
                    __byte_perm(even.w, odd.w, 0x5410), __byte_perm(even.w, odd.w, 0x7632)};
          }
          T* to = y + static_cast<int64_t>(m) * outputs + n;
          if (lines) {
            reinterpret_cast<uint4*>(to)[0] = low;
            reinterpret_cast<uint4*>(to)[1] = high;
          } else {
            const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int e = 0; e < 16; ++e) {
              const auto bits = static_cast<uint16_t>(words[e / 2] >> (e % 2 * 16));
              if (n + e < outputs) to[e] = reinterpret_cast<const T&>(bits);
            }
          }
        }
        asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
      }
    }
  }
}

template <typename T, typename Tile, Extra kExtra, bool kTransposed>
int launch(const WgmmaParams& p, void* stream) {
  const FourBitLinearArgs& a = p.args;
  constexpr int kInner = kTransposed ? Tile::kRows / 2 : Tile::kChunks * kChunk / 2;  // bytes of a row of codes
  constexpr auto kSwizzle = kInner == 32   ? CU_TENSOR_MAP_SWIZZLE_32B
                            : kInner == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                           : CU_TENSOR_MAP_SWIZZLE_128B;
  // First: it makes the device's context that of this thread, which a backward pass may have begun, and which the
  // driver's function below needs.
  const auto kernel = wgmma_kernel<T, Tile, kExtra, kTransposed>;
  const size_t shared = Tile::shared_bytes(p.split);
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
      error != cudaSuccess)
    return error;
  CUtensorMap codes{}, x{};
  if (!encode_tensor_map(&codes, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, a.codes, a.n, a.k / 2,
                         kTransposed ? Tile::kChunks * kChunk : Tile::kRows, kInner, kSwizzle) ||
      !encode_tensor_map(&x, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, a.x, a.m, p.contraction, Tile::kColumns, kChunk,
                         CU_TENSOR_MAP_SWIZZLE_128B))
    return cudaErrorInvalidValue;
  const int tiles = p.tiles_m * p.tiles_n, processors = multiprocessors();
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(p.split), 1, 1};
  cudaLaunchConfig_t config{};
  // Alone, thread blocks go on from tile to tile; those of a cluster have one.
  config.gridDim = dim3(static_cast<unsigned>(p.split > 1 ? tiles * p.split : tiles < processors ? tiles : processors));
  config.blockDim = dim3(Tile::kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = p.split > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, p, four_bit_values(a.format), codes, x);
}

template <typename T, bool kTransposed, typename Tile>
int with_extra(const WgmmaParams& p, void* stream) {
  switch (p.scales.extra()) {
    case Extra::kCompressed:
      return launch<T, Tile, Extra::kCompressed, kTransposed>(p, stream);
    case Extra::kZeroPoint:
      return launch<T, Tile, Extra::kZeroPoint, kTransposed>(p, stream);
    default:
      return launch<T, Tile, Extra::kNone, kTransposed>(p, stream);
  }
}

// Stages as shared memory holds beside the sums that a cluster's thread block receives.
template <typename T, bool kTransposed>
int with_tile(const WgmmaParams& p, const WgmmaPlan& plan, void* stream) {
  if constexpr (!kTransposed) {  // four groups share a table: where codes are what takes time
    if (plan.groups == 4)
      return plan.columns == 32 ? with_extra<T, kTransposed, Tile<4, 32, 2, 5>>(p, stream)
                                : with_extra<T, kTransposed, Tile<4, 64, 2, 4>>(p, stream);
  }
  switch (plan.columns) {
    case 32:
      return with_extra<T, kTransposed, Tile<2, 32, 2, 8>>(p, stream);
    case 64:
      return with_extra<T, kTransposed, Tile<2, 64, 2, 6>>(p, stream);
    case 128:
      return with_extra<T, kTransposed, Tile<2, 128, 2, 3>>(p, stream);
    default:
      return with_extra<T, kTransposed, Tile<2, 256, 1, 4>>(p, stream);
  }
}

template <typename T>
int run(const WgmmaParams& p, bool transposed, const WgmmaPlan& plan, void* stream) {
  return transposed ? with_tile<T, true>(p, plan, stream) : with_tile<T, false>(p, plan, stream);
}

}  // namespace quantrain::cuda::sm90
