// What the products with a packed weight share: bytes of codes as pairs of 16-bit values, by a table of which each lane
// has a copy, and the scales of blocks as a lane loads them.
#pragma once

#include "csrc/cuda/four_bit/decode.cuh"
#include "csrc/cuda/four_bit/scale_layout.h"
#include "csrc/cuda/pair.cuh"
#include "csrc/cuda/ptx.cuh"

namespace quantrain::cuda {

// ---- the table ------------------------------------------------------------------------------------------------------

constexpr int kPairs = 256;
constexpr int kTableBytes = kPairs * 32 * 4;  // [256][32]: a copy for each lane, no two meet in a bank

template <typename T>
__device__ __forceinline__ void fill_pair_table(uint32_t* table,  // [256][32]
                                                float mine,       // the value of this lane's number modulo 16
                                                bool high_first, int warp, int warps) {
  const int lane = threadIdx.x % 32;
  for (int byte = warp; byte < kPairs; byte += warps) {
    const float high = __shfl_sync(0xffffffffu, mine, byte >> 4), low = __shfl_sync(0xffffffffu, mine, byte & 15);
    table[byte * 32 + lane] = high_first ? packed_pair<T>(high, low) : packed_pair<T>(low, high);
  }
}

class PairTable {
 public:
  __device__ __forceinline__ explicit PairTable(const uint32_t* table)
      : table_(reinterpret_cast<const uint8_t*>(table)),
        lane_(static_cast<uint32_t>(ptx::opaque(static_cast<int>(threadIdx.x % 32 * 4)))) {}

  // Of byte `at` of the word.
  __device__ __forceinline__ uint32_t pair(uint32_t word, int at) const {
    const uint32_t shifted = at == 0 ? word << 7 : word >> (8 * at - 7);
    return *reinterpret_cast<const uint32_t*>(table_ + ((shifted & 0x7f80u) | lane_));
  }

 private:
  const uint8_t* table_;
  uint32_t lane_;
};

// ---- scales ---------------------------------------------------------------------------------------------------------

// The scales of a group of a row's chunks as they are loaded, some time before they are used.
template <Extra kExtra>
struct RawScales {
  uint32_t scale[kGroup] = {};  // float32; kCompressed: of the scales' scale, the first and the last
  uint32_t zero_point[kGroup] = {};
  uint32_t codes = 0, first = 0;  // kCompressed: one to a byte; the first's number among those that share a scale

  // From chunk `chunk` of a row on, which is a multiple of kGroup; past `chunks` the last one. row_block: the row's
  // first block.
  __device__ __forceinline__ void load(const ScaleLayout& s, int64_t row_block, int chunk, int chunks) {
    const int64_t block = row_block + (chunk >> s.block_shift);
    if constexpr (kExtra == Extra::kCompressed) {
      first = static_cast<uint32_t>(block) % kScaleBlock;
      ptx::ld_global_nc(codes, s.scales.scale_codes + block, s.grouped);
      ptx::ld_global_nc(scale[0], s.scales.scale_scale + block / kScaleBlock, true);
      if (!s.grouped) {
        codes = 0;
        int64_t at = block;
#pragma unroll
        for (int c = 0; c < kGroup; ++c) {
          at = row_block + (min(chunk + c, chunks - 1) >> s.block_shift);
          codes |= static_cast<uint32_t>(__ldg(s.scales.scale_codes + at)) << (8 * c);
        }
        ptx::ld_global_nc(scale[kGroup - 1], s.scales.scale_scale + at / kScaleBlock, true);
      }
    } else {
      ptx::ld_global_nc(scale, s.scales.scale + block, s.grouped);
      if constexpr (kExtra == Extra::kZeroPoint) ptx::ld_global_nc(zero_point, s.scales.zero_point + block, s.grouped);
      if (!s.grouped) {
#pragma unroll
        for (int c = 0; c < kGroup; ++c) {
          const int64_t at = row_block + (min(chunk + c, chunks - 1) >> s.block_shift);
          ptx::ld_global_nc(scale[c], s.scales.scale + at, true);
          if constexpr (kExtra == Extra::kZeroPoint) ptx::ld_global_nc(zero_point[c], s.scales.zero_point + at, true);
        }
      }
    }
  }

  // What of them does not come with the codes, and what does: 16 bytes of scales, and of zero points, of the row.
  __device__ __forceinline__ void load_rest(const ScaleLayout& s, int64_t row_block, int chunk) {
    if constexpr (kExtra == Extra::kCompressed)
      ptx::ld_global_nc(scale[0], s.scales.scale_scale + (row_block + chunk) / kScaleBlock, true);
  }

  // kCompressed: copies start at multiples of 16 codes.
  __device__ __forceinline__ void take(const uint4& scales, const uint4& zero_points, int chunk) {
    if constexpr (kExtra == Extra::kCompressed) {
      const uint32_t low = chunk & 4 ? scales.y : scales.x, high = chunk & 4 ? scales.w : scales.z;
      codes = chunk & 8 ? high : low;
    } else {
      scale[0] = scales.x, scale[1] = scales.y, scale[2] = scales.z, scale[3] = scales.w;
      zero_point[0] = zero_points.x, zero_point[1] = zero_points.y;
      zero_point[2] = zero_points.z, zero_point[3] = zero_points.w;
    }
  }

  // Of chunk c of the group.
  __device__ __forceinline__ float value(const ScaleLayout& s, const float* map, float offset, int c) const {
    if constexpr (kExtra == Extra::kCompressed) {
      const bool same = s.grouped || first + (c >> s.block_shift) < kScaleBlock;
      return four_bit_decompressed(map[codes >> (8 * c) & 0xffu], __uint_as_float(same ? scale[0] : scale[kGroup - 1]),
                                   offset);
    } else {
      return __uint_as_float(scale[c]);
    }
  }
};

}  // namespace quantrain::cuda
