// Convolution as a matrix product on tensor cores: pixels by output channels, the sum over the taps' channels in chunks of 16.
#pragma once

#include "csrc/cuda/fixed_point_conv.cuh"

namespace quantrain::cuda::conv {

// ---- channels in whole chunks ----------------------------------------------------------------------------------------------

// kDepth bytes of the sum a stage, kStages stages in flight.
template <typename Shape_, int kDepth_, int kStages_, int kMinBlocks_>
struct MmaTile : Shape_ {
  using Shape = Shape_;
  static constexpr int kDepth = kDepth_, kStages = kStages_, kMinBlocks = kMinBlocks_;
  static constexpr int kStageBytes = (Shape::kTileM + Shape::kTileN) * kDepth;
  static constexpr int kChunks = kDepth / kChunk;               // a row
  static constexpr int kRowsAPass = Shape::kThreads / kChunks;  // that the threads copy at once
  static constexpr int kPassesA = Shape::kTileM / kRowsAPass, kPassesB = Shape::kTileN / kRowsAPass;
  static_assert(kPassesA * kRowsAPass == Shape::kTileM && kPassesB * kRowsAPass == Shape::kTileN);
};

struct MmaParams {
  FixedPointConvArgs g;
  FastDivisor image, row;  // of pixels: oh * ow and ow
  int pixels;
  int column_tiles;
  int stages;  // that have shared memory: no more than there are steps
  int steps;
  // Where they lie in shared memory. Codes are staged where the stages were, unless the residual's codes wait there.
  int rules, staging;
  Residual residual;
  bool wide;
};

// Lays out shared memory and gives its size.
inline int lay_out(MmaParams& p, int stage_bytes, int staging_bytes, int rule_bytes) {
  const bool apart = p.residual == Residual::kUInt8 || p.residual == Residual::kInt8;
  const int stages = p.stages * stage_bytes;
  p.rules = apart || stages > staging_bytes ? stages : staging_bytes;
  p.staging = apart ? p.rules + rule_bytes : 0;
  return p.rules + rule_bytes + (apart ? staging_bytes : 0);
}

// Chunks are permuted so that eight rows' chunks of one column lie in different banks.
template <int kDepth>
__device__ __forceinline__ int chunk_place(int row, int chunk) {
  if constexpr (kDepth == 64)  // two rows fill a line of 128 bytes
    return row * kDepth + ((chunk ^ (row >> 1 & 3)) * kChunk);
  else
    return row * kDepth + ((chunk ^ (row & 7)) * kChunk);
}

template <typename Tile, bool kInputSigned>
__device__ __forceinline__ void multiply_stage(typename Tile::Sums& sums, SharedAddress a_stage, int lane, int warp) {
  constexpr int kSlices = Tile::kDepth / 32;
  const SharedAddress b_stage = a_stage + Tile::kTileM * Tile::kDepth;
  const int a_row = warp / Tile::kWarpsN * Tile::kWarpM + lane % 16;
  const int b_row = warp % Tile::kWarpsN * Tile::kWarpN + lane % 8 + lane / 16 * 8;
  uint32_t a[2][Tile::kTilesM][4], b[2][Tile::kTilesN / 2][4];
  const auto load = [&](int slice) {
#pragma unroll
    for (int i = 0; i < Tile::kTilesM; ++i)
      load_matrices(a[slice % 2][i], a_stage + chunk_place<Tile::kDepth>(a_row + i * 16, slice * 2 + lane / 16));
    // Two tiles of 8 channels at once, each with both chunks.
#pragma unroll
    for (int j = 0; j < Tile::kTilesN / 2; ++j)
      load_matrices(b[slice % 2][j], b_stage + chunk_place<Tile::kDepth>(b_row + j * 16, slice * 2 + lane / 8 % 2));
  };
  load(0);
#pragma unroll
  for (int slice = 0; slice < kSlices; ++slice) {
    if (slice + 1 < kSlices) load(slice + 1);
#pragma unroll
    for (int i = 0; i < Tile::kTilesM; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kTilesN; ++j)
        multiply<kInputSigned>(sums[i][j], a[slice % 2][i], b[slice % 2][j / 2][j % 2 * 2],
                               b[slice % 2][j / 2][j % 2 * 2 + 1]);
  }
}

// How a stage is multiplied: by mma.sync, at once. Another engine may start what it finishes after the next stage's copies.
struct MmaEngine {
  static __device__ __forceinline__ void publish() {}

  template <typename Tile, bool kInputSigned>
  static __device__ __forceinline__ void start(typename Tile::Sums&, SharedAddress) {}

  template <typename Tile, bool kInputSigned>
  static __device__ __forceinline__ void finish(typename Tile::Sums& sums, SharedAddress stage) {
    multiply_stage<Tile, kInputSigned>(sums, stage, threadIdx.x % 32, threadIdx.x / 32);
  }
};

template <typename Engine, typename Tile, bool kInputSigned>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks) fixed_point_conv_mma_kernel(const MmaParams p) {
  using Shape = typename Tile::Shape;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  const FixedPointConvArgs& g = p.g;
  auto* const rules = reinterpret_cast<ChannelRule*>(shared_bytes + p.rules);
  uint8_t* const staging = shared_bytes + p.staging;
  const SharedAddress shared = shared_address(shared_bytes);
  // Channels vary first: the tiles that read one block of pixels run side by side.
  const int column_tile = static_cast<int>(blockIdx.x) % p.column_tiles;
  const int row_tile = static_cast<int>(blockIdx.x) / p.column_tiles;
  const TilePlace at{static_cast<int64_t>(row_tile) * Shape::kTileM, p.pixels, column_tile * Shape::kTileN,
                     static_cast<int>(g.o), p.wide};

  // This thread copies one chunk of a stage's row, in every kRowsAPass-th row; (r, s, channel) is where that chunk stands in the window.
  const int tid = threadIdx.x, chunk = tid % Tile::kChunks, copy_row = tid / Tile::kChunks;
  const int h = static_cast<int>(g.h), w = static_cast<int>(g.w), c = static_cast<int>(g.c);
  const int kh = static_cast<int>(g.kh), kw = static_cast<int>(g.kw), depth = kh * kw * c;
  const uint32_t first_image = p.image.divide(static_cast<uint32_t>(at.first_pixel));
  const auto* const images = static_cast<const uint8_t*>(g.input) + static_cast<int64_t>(first_image) * h * w * c;
  int offset[Tile::kPassesA], corner[Tile::kPassesA];  // of the window's first tap: in bytes; y and x, 16 bits each
#pragma unroll
  for (int i = 0; i < Tile::kPassesA; ++i) {
    const int64_t pixel = at.first_pixel + copy_row + i * Tile::kRowsAPass;
    if (pixel < at.pixels) {
      const uint32_t image = p.image.divide(static_cast<uint32_t>(pixel));
      const uint32_t in_image = static_cast<uint32_t>(pixel) - image * p.image.divisor;
      const uint32_t oy = p.row.divide(in_image), ox = in_image - oy * p.row.divisor;
      const int y = static_cast<int>(oy * g.stride_h) - static_cast<int>(g.padding_h);
      const int x = static_cast<int>(ox * g.stride_w) - static_cast<int>(g.padding_w);
      offset[i] = ((static_cast<int>(image - first_image) * h + y) * w + x) * c;
      corner[i] = static_cast<int>(static_cast<uint32_t>(y) << 16 | (static_cast<uint32_t>(x) & 0xffff));
    } else {
      offset[i] = 0;
      corner[i] = static_cast<int>(0x80000000u);  // y = -2^15: never inside
    }
  }
  const int8_t* weight = g.weight + static_cast<int64_t>(at.first_channel + copy_row) * depth + chunk * kChunk;
  int r = 0, s = 0, channel = chunk * kChunk, tap = channel;  // tap: of this chunk, in bytes from the window's first
  const auto settle = [&] {
    while (channel >= c && r < kh) {
      channel -= c;
      if (++s == kw) {
        s = 0;
        ++r;
        tap += (w - kw) * c;
      }
    }
  };
  settle();

  int filled = 0, fill_slot = 0;
  const auto start_stage = [&] {
    if (filled < p.steps) {
      const SharedAddress stage = shared + fill_slot * Tile::kStageBytes;
      const bool in_window = r < kh;
#pragma unroll
      for (int i = 0; i < Tile::kPassesA; ++i) {
        const int y = (corner[i] >> 16) + r, x = static_cast<int16_t>(corner[i] & 0xffff) + s;
        const bool inside = in_window && static_cast<uint32_t>(y) < static_cast<uint32_t>(h) &&
                            static_cast<uint32_t>(x) < static_cast<uint32_t>(w);
        copy_chunk(stage + chunk_place<Tile::kDepth>(copy_row + i * Tile::kRowsAPass, chunk),
                   inside ? images + (offset[i] + tap) : images, inside);
      }
#pragma unroll
      for (int i = 0; i < Tile::kPassesB; ++i) {
        const int row = copy_row + i * Tile::kRowsAPass;
        const bool inside = in_window && at.first_channel + row < at.channels;
        copy_chunk(stage + Shape::kTileM * Tile::kDepth + chunk_place<Tile::kDepth>(row, chunk),
                   inside ? weight + static_cast<int64_t>(i * Tile::kRowsAPass) * depth : g.weight, inside);
      }
      weight += Tile::kDepth;
      channel += Tile::kDepth;
      tap += Tile::kDepth;
      settle();
      ++filled;
      fill_slot = fill_slot + 1 == p.stages ? 0 : fill_slot + 1;
    }
    commit_copies();
  };

  if (p.residual == Residual::kUInt8 || p.residual == Residual::kInt8) start_residual<Shape>(staging, g, at);
#pragma unroll
  for (int i = 0; i < Tile::kStages - 1; ++i) start_stage();
  load_rules<Shape>(rules, g, at);
  typename Tile::Sums sums;
  start_sums<Shape>(sums, g.bias, at);

  int slot = 0;
  for (int step = 0; step < p.steps; ++step) {
    wait_copies<Tile::kStages - 2>();
    Engine::publish();
    __syncthreads();
    const SharedAddress stage = shared + slot * Tile::kStageBytes;
    Engine::template start<Tile, kInputSigned>(sums, stage);
    start_stage();
    Engine::template finish<Tile, kInputSigned>(sums, stage);
    slot = slot + 1 == p.stages ? 0 : slot + 1;
  }
  if (p.staging == 0) __syncthreads();  // the stages are free
  write_tile<Shape>(sums, staging, rules, g, at, p.residual);
}

// ---- launching -------------------------------------------------------------------------------------------------------------

#if !defined(QUANTRAIN_EMULATED)
template <typename Engine, typename Tile, bool kInputSigned>
int launch_tile(const MmaParams& p, int blocks, int shared, cudaStream_t stream) {
  auto* const kernel = &fixed_point_conv_mma_kernel<Engine, Tile, kInputSigned>;
  if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared))
    return error;
  kernel<<<static_cast<unsigned>(blocks), Tile::kThreads, static_cast<size_t>(shared), stream>>>(p);
  return cudaGetLastError();
}

struct Candidate {
  const char* name;
  int tile_m, tile_n, depth, stages, stage_bytes, staging_bytes, rule_bytes,
      blocks;   // blocks: a multiprocessor, by registers
  double rate;  // of multiplications, relative
  int (*run_unsigned)(const MmaParams&, int, int, cudaStream_t);
  int (*run_signed)(const MmaParams&, int, int, cudaStream_t);
};

template <typename Engine, typename Tile>
constexpr Candidate candidate(const char* name, double rate) {
  return {name,
          Tile::kTileM,
          Tile::kTileN,
          Tile::kDepth,
          Tile::kStages,
          Tile::kStageBytes,
          Tile::kStagingBytes,
          Tile::kRuleBytes,
          Tile::kMinBlocks,
          rate,
          &launch_tile<Engine, Tile, false>,
          &launch_tile<Engine, Tile, true>};
}

struct Candidates {
  const Candidate* first;
  int count;
};

Candidates wgmma_candidates();  // compiled for sm_90a
#endif

}  // namespace quantrain::cuda::conv
