// Convolution as a matrix product on tensor cores: pixels by output channels, the sum over the taps' channels in chunks
// of 16.
#pragma once

#include "csrc/cuda/fixed_point_conv/conv.cuh"

namespace quantrain::cuda::conv {

// ---- channels in whole chunks ---------------------------------------------------------------------------------------

// kDepth bytes of the sum per stage, kStages stages in flight.
template <typename Shape_, int kDepth_, int kStages_, int kMinBlocks_>
struct MmaTile : Shape_ {
  using Shape = Shape_;
  static constexpr int kDepth = kDepth_, kStages = kStages_, kMinBlocks = kMinBlocks_;
  static constexpr int kChunks = kDepth / kChunk;               // a row
  static constexpr int kRowsAPass = Shape::kThreads / kChunks;  // that the threads copy at once
  static constexpr int kPassesA = Shape::kTileM / kRowsAPass, kPassesB = Shape::kTileN / kRowsAPass;
  static_assert(kPassesA * kRowsAPass == Shape::kTileM && kPassesB * kRowsAPass == Shape::kTileN);
};

struct MmaParams {
  FixedPointConvArgs g;
  FastDivisor image, row;  // of pixels: oh * ow and ow
  int pixels, row_tiles, column_tiles;
  int row_step;  // a block's next tile of its column is so many further
  int steps, stages;
  int stage_bytes;
  bool resident;       // all of the column's weights stay in shared memory; a stage then holds pixels alone
  bool flat;           // a window is a pixel: no taps, strides or padding
  int weights, rules;  // where they lie in shared memory
  int vector;
};

// What does not depend on the tile.
inline MmaParams mma_params(const FixedPointConvArgs& a) {
  MmaParams p;
  p.g = a;
  p.image = FastDivisor(static_cast<uint32_t>(a.oh * a.ow));
  p.row = FastDivisor(static_cast<uint32_t>(a.ow));
  p.pixels = static_cast<int>(a.n * a.oh * a.ow);
  p.flat = a.kh * a.kw == 1 && a.stride_h * a.stride_w == 1 && a.padding_h + a.padding_w == 0;
  p.vector = vector_of(a);
  return p;
}

// Lays out shared memory, stages first, and gives its size.
inline int lay_out(MmaParams& p, int pixel_bytes, int weight_bytes, int rule_bytes) {
  p.stage_bytes = pixel_bytes + (p.resident ? 0 : weight_bytes);
  p.weights = p.stages * p.stage_bytes;
  p.rules = p.weights + (p.resident ? p.steps * weight_bytes : 0);
  return p.rules + rule_bytes;
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
__device__ __forceinline__ void multiply_stage(typename Tile::Sums& sums, SharedAddress a_stage, SharedAddress b_stage,
                                               int lane, int warp) {
  constexpr int kSlices = Tile::kDepth / 32;
  const int a_row = warp / Tile::kWarpsN * Tile::kWarpM + lane % 16;
  const int b_row = warp % Tile::kWarpsN * Tile::kWarpN + lane % 8 + lane / 16 * 8;
  uint32_t a[2][Tile::kTilesM][4], b[2][Tile::kTilesN / 2][4];
  const auto load = [&](int slice) {
#pragma unroll
    for (int i = 0; i < Tile::kTilesM; ++i)
      ptx::ldmatrix_x4(a[slice % 2][i], a_stage + chunk_place<Tile::kDepth>(a_row + i * 16, slice * 2 + lane / 16));
    // Two tiles of 8 channels at once, each with both chunks.
#pragma unroll
    for (int j = 0; j < Tile::kTilesN / 2; ++j)
      ptx::ldmatrix_x4(b[slice % 2][j], b_stage + chunk_place<Tile::kDepth>(b_row + j * 16, slice * 2 + lane / 8 % 2));
  };
  load(0);
#pragma unroll
  for (int slice = 0; slice < kSlices; ++slice) {
    if (slice + 1 < kSlices) load(slice + 1);
#pragma unroll
    for (int i = 0; i < Tile::kTilesM; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kTilesN; ++j)
        ptx::mma_m16n8k32<kInputSigned>(sums[i][j], a[slice % 2][i], b[slice % 2][j / 2][j % 2 * 2],
                                        b[slice % 2][j / 2][j % 2 * 2 + 1]);
  }
}

// How a stage is multiplied: by mma.sync, at once. Another engine may start what it finishes after the next stage's
// copies.
struct MmaEngine {
  template <typename Tile>
  static __device__ __forceinline__ void begin(typename Tile::Sums& sums) {
#pragma unroll
    for (int i = 0; i < Tile::kTilesM; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kTilesN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] = 0;
  }

  static __device__ __forceinline__ void publish() {}

  template <typename Tile, bool kInputSigned>
  static __device__ __forceinline__ void start(typename Tile::Sums&, SharedAddress, SharedAddress, bool) {}

  template <typename Tile, bool kInputSigned>
  static __device__ __forceinline__ void finish(typename Tile::Sums& sums, SharedAddress a, SharedAddress b) {
    multiply_stage<Tile, kInputSigned>(sums, a, b, threadIdx.x % 32, threadIdx.x / 32);
  }
};

// A block goes down one column of tiles. Copies run ahead through the ring of stages, into the next tile while this
// one's sums become codes.
template <typename Engine, typename Tile, bool kInputSigned>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    fixed_point_conv_mma_kernel(const __grid_constant__ MmaParams p) {
  using Shape = typename Tile::Shape;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  const FixedPointConvArgs& g = p.g;
  const auto rules = TileRules::at<Shape>(shared_bytes + p.rules);
  const SharedAddress shared = ptx::shared_address(shared_bytes);
  // Channels vary first: the tiles that read one block of pixels run side by side.
  const int column_tile = static_cast<int>(blockIdx.x) % p.column_tiles;
  const int first_row_tile = static_cast<int>(blockIdx.x) / p.column_tiles;
  const TilePlace at{column_tile * Shape::kTileN, static_cast<int>(g.o), p.vector};

  // This thread copies one chunk of a stage's row, in every kRowsAPass-th row; (r, s, channel) is where that chunk
  // stands in the window.
  const int tid = threadIdx.x, chunk = tid % Tile::kChunks, copy_row = tid / Tile::kChunks;
  const int h = static_cast<int>(g.h), w = static_cast<int>(g.w), c = static_cast<int>(g.c);
  const int kh = static_cast<int>(g.kh), kw = static_cast<int>(g.kw), depth = kh * kw * c;
  const uint8_t* images = nullptr;
  int offset[Tile::kPassesA], corner[Tile::kPassesA];      // of the window's first tap: in bytes; y and x, 16 bits each
  constexpr int kNowhere = static_cast<int>(0x80000000u);  // y = -2^15: never inside
  const auto place_rows = [&](int row_tile) {
    const int first_pixel = row_tile * Shape::kTileM;
    if (p.flat) {
      images = static_cast<const uint8_t*>(g.input) + static_cast<int64_t>(first_pixel) * c;
#pragma unroll
      for (int i = 0; i < Tile::kPassesA; ++i) {
        const int row = copy_row + i * Tile::kRowsAPass;
        offset[i] = row * c;
        corner[i] = first_pixel + row < p.pixels ? 0 : kNowhere;
      }
      return;
    }
    const uint32_t first_image = p.image.divide(static_cast<uint32_t>(first_pixel));
    images = static_cast<const uint8_t*>(g.input) + static_cast<int64_t>(first_image) * h * w * c;
#pragma unroll
    for (int i = 0; i < Tile::kPassesA; ++i) {
      const int pixel = first_pixel + copy_row + i * Tile::kRowsAPass;
      const uint32_t image = p.image.divide(static_cast<uint32_t>(pixel));
      const uint32_t in_image = static_cast<uint32_t>(pixel) - image * p.image.divisor;
      const uint32_t oy = p.row.divide(in_image), ox = in_image - oy * p.row.divisor;
      const int y = static_cast<int>(oy * g.stride_h) - static_cast<int>(g.padding_h);
      const int x = static_cast<int>(ox * g.stride_w) - static_cast<int>(g.padding_w);
      offset[i] = ((static_cast<int>(image - first_image) * h + y) * w + x) * c;
      corner[i] = pixel < p.pixels
                      ? static_cast<int>(static_cast<uint32_t>(y) << 16 | (static_cast<uint32_t>(x) & 0xffff))
                      : kNowhere;
    }
  };

  const int first_row_channel = at.first_channel + Shape::row_channel(copy_row);
  const int8_t* const weight = g.weight + static_cast<int64_t>(first_row_channel) * depth + chunk * kChunk;
  const auto copy_weights = [&](SharedAddress to, int step) {
    const bool in_window = step * Tile::kDepth + chunk * kChunk < depth;
#pragma unroll
    for (int i = 0; i < Tile::kPassesB; ++i) {
      constexpr int kRow = Tile::kRowsAPass;
      const int further = Shape::row_channel(i * kRow);
      const bool inside = in_window && first_row_channel + further < at.channels;
      copy_chunk(to + chunk_place<Tile::kDepth>(copy_row + i * kRow, chunk),
                 inside ? weight + (static_cast<int64_t>(further) * depth + step * Tile::kDepth) : g.weight, inside);
    }
  };

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
  int fill_tile = first_row_tile, fill_step = 0, fill_slot = 0;
  settle();
  place_rows(fill_tile);
  const auto start_stage = [&] {
    if (fill_tile < p.row_tiles) {
      const SharedAddress stage = shared + fill_slot * p.stage_bytes;
      const bool in_window = r < kh;
#pragma unroll
      for (int i = 0; i < Tile::kPassesA; ++i) {
        const int y = (corner[i] >> 16) + r, x = static_cast<int16_t>(corner[i] & 0xffff) + s;
        const bool inside = in_window && static_cast<uint32_t>(y) < static_cast<uint32_t>(h) &&
                            static_cast<uint32_t>(x) < static_cast<uint32_t>(w);
        copy_chunk(stage + chunk_place<Tile::kDepth>(copy_row + i * Tile::kRowsAPass, chunk),
                   inside ? images + (offset[i] + tap) : images, inside);
      }
      if (!p.resident) copy_weights(stage + Shape::kTileM * Tile::kDepth, fill_step);
      fill_slot = fill_slot + 1 == p.stages ? 0 : fill_slot + 1;
      if (++fill_step < p.steps) {
        channel += Tile::kDepth;
        tap += Tile::kDepth;
        settle();
      } else {
        fill_step = 0;
        fill_tile += p.row_step;
        r = s = 0;
        channel = tap = chunk * kChunk;
        settle();
        if (fill_tile < p.row_tiles) place_rows(fill_tile);
      }
    }
    ptx::cp_async_commit_group();
  };

  if (p.resident)
    for (int step = 0; step < p.steps; ++step)
      copy_weights(shared + p.weights + step * (Shape::kTileN * Tile::kDepth), step);
#pragma unroll
  for (int i = 0; i < Tile::kStages - 1; ++i) start_stage();
  const Ending ending = load_rules<Shape>(rules, g, at, depth);

  const bool has_codes = g.residual && g.residual_type != DType::kInt32;
  int slot = 0;
  for (int row_tile = first_row_tile; row_tile < p.row_tiles; row_tile += p.row_step) {
    const int first_pixel = row_tile * Shape::kTileM;
    if (has_codes && tid < Shape::kTileM && first_pixel + tid < p.pixels)
      ptx::prefetch_global_l2(static_cast<const uint8_t*>(g.residual) +
                              static_cast<int64_t>(first_pixel + tid) * at.channels + at.first_channel);
    typename Tile::Sums sums;
    Engine::template begin<Tile>(sums);
    for (int step = 0; step < p.steps; ++step) {
      ptx::cp_async_wait_group<Tile::kStages - 2>();
      Engine::publish();
      __syncthreads();
      const SharedAddress a = shared + slot * p.stage_bytes;
      const SharedAddress b =
          p.resident ? shared + p.weights + step * (Shape::kTileN * Tile::kDepth) : a + Shape::kTileM * Tile::kDepth;
      Engine::template start<Tile, kInputSigned>(sums, a, b, step == 0);
      start_stage();
      Engine::template finish<Tile, kInputSigned>(sums, a, b);
      slot = slot + 1 == p.stages ? 0 : slot + 1;
    }
    write_tile<Shape>(sums, rules, ending, g, at, [&](int row) {
      return first_pixel + row < p.pixels ? static_cast<int64_t>(first_pixel + row) : int64_t{-1};
    });
  }
}

// ---- launching ------------------------------------------------------------------------------------------------------

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
  int tile_m, tile_n, depth, stages, rule_bytes;
  int blocks;   // a multiprocessor, by registers
  double rate;  // of products, in parts of the peak, as the estimate of times has it
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
