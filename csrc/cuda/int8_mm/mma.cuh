// The int8 matrix product for sm_80 and later (mma.sync), any m and n.
#pragma once

#include "csrc/common/int8.h"
#include "csrc/cuda/common.cuh"
#include "csrc/cuda/ptx.cuh"

namespace quantrain::cuda::mma {

constexpr int kTile = 128;  // of d, both ways
constexpr int kDepth = 64;  // bytes of a row that a stage holds
constexpr int kStages = 4;
constexpr int kThreads = 256;  // eight warps, two down and four across: 64 x 32 of d each
constexpr int kChunk = 16;     // bytes of one cp.async and of one row of ldmatrix
constexpr int kStageBytes = 2 * kTile * kDepth;
constexpr int kSharedBytes = kStages * kStageBytes;
constexpr int kBand = 8;  // row tiles that run side by side, so that their operands are met in the second-level cache

// Two rows fill a line of 128 bytes; chunks are permuted so that eight rows' chunks of one column lie in different
// banks.
__device__ __forceinline__ int chunk_place(int row, int chunk) {
  return row * kDepth + ((chunk ^ (row >> 1 & 3)) * kChunk);
}

// One operand's part of a stage: kTile rows of kDepth bytes, two chunks per thread.
__device__ __forceinline__ void copy_operand(uint32_t shared, const int8_t* __restrict__ x, int64_t first_row,
                                             int64_t rows, int64_t first_byte, int64_t k) {
#pragma unroll
  for (int i = 0; i < kTile * kDepth / kChunk / kThreads; ++i) {
    const int index = static_cast<int>(threadIdx.x) + i * kThreads;
    const int row = index / (kDepth / kChunk), chunk = index % (kDepth / kChunk);
    const int64_t byte = first_byte + chunk * kChunk;
    const bool inside = first_row + row < rows && byte < k;
    // The rest is filled with zeros.
    ptx::cp_async_16(shared + chunk_place(row, chunk), inside ? x + (first_row + row) * k + byte : x,
                     inside ? kChunk : 0);
  }
}

// One operand's part of a step over outlier columns: 32 of them from `column` on, of `columns` in rows of `stride`.
__device__ __forceinline__ void fill_operand(uint8_t* shared, const int8_t* __restrict__ x, int64_t first_row,
                                             int64_t rows, int64_t column, int64_t columns, int64_t stride) {
  const int row = static_cast<int>(threadIdx.x) / 2, chunk = static_cast<int>(threadIdx.x) % 2;
  const int64_t first = column + chunk * kChunk;
  alignas(kChunk) int8_t codes[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    codes[i] = first_row + row < rows && first + i < columns ? x[(first_row + row) * stride + first + i] : int8_t{0};
  *reinterpret_cast<uint4*>(shared + chunk_place(row, chunk)) = *reinterpret_cast<const uint4*>(codes);
}

template <typename Out, bool kOutliers>
__global__ void __launch_bounds__(kThreads, 2) int8_mm_kernel(const Int8MmArgs g, int row_tiles, int column_tiles) {
  uint8_t* const shared_bytes = ptx::dynamic_shared();
  const ptx::SharedAddress shared = ptx::shared_address(shared_bytes);
  // Bands of kBand row tiles, within a band column by column.
  const int band = static_cast<int>(blockIdx.x) / (kBand * column_tiles);
  const int height = min(kBand, row_tiles - band * kBand);
  const int in_band = static_cast<int>(blockIdx.x) - band * kBand * column_tiles;
  const int64_t first_row = static_cast<int64_t>(band * kBand + in_band % height) * kTile;
  const int64_t first_column = static_cast<int64_t>(in_band / height) * kTile;

  const auto start_stage = [&](int64_t step) {
    const uint32_t stage = shared + static_cast<uint32_t>(step % kStages) * kStageBytes;
    if (step * kDepth < g.k) {
      copy_operand(stage, g.a, first_row, g.m, step * kDepth, g.k);
      copy_operand(stage + kTile * kDepth, g.b, first_column, g.n, step * kDepth, g.k);
    }
    ptx::cp_async_commit_group();
  };

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 32;
  int sums[4][4][4] = {};  // four tiles of 16 rows by four of 8 columns
  // Half a stage's depth, 32 bytes.
  const auto multiply = [&](uint32_t a_stage, int half) {
    const uint32_t b_stage = a_stage + kTile * kDepth;
    uint32_t a[4][4], b[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      ptx::ldmatrix_x4(a[i], a_stage + chunk_place(warp_row + i * 16 + lane % 16, half * 2 + lane / 16));
    // Two column tiles at once: rows 0 to 7 and 8 to 15 of b, each with both chunks.
#pragma unroll
    for (int j = 0; j < 2; ++j)
      ptx::ldmatrix_x4(b[j],
                       b_stage + chunk_place(warp_column + j * 16 + lane % 8 + lane / 16 * 8, half * 2 + lane / 8 % 2));
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        ptx::mma_m16n8k32<true>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  };
  const auto for_rows = [&](const auto& f) {  // f(row of the tile's, i, r) for this thread's
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) f(first_row + warp_row + i * 16 + r * 8 + lane / 4, i, r);
  };
  if constexpr (kOutliers) {
    // hi, then lo of the outlier columns, 32 at a time, in the first stage.
    const int64_t count = g.outliers.count;
    for (int plane = 0; plane < 2; ++plane) {
      if (plane == 1) {
#pragma unroll
        for (int i = 0; i < 64; ++i) sums[i / 16][i / 4 % 4][i % 4] *= kInt8Plane;
      }
      for (int64_t column = 0; column < count; column += 32) {
        __syncthreads();
        fill_operand(shared_bytes, g.outliers.planes + plane * count, first_row, g.m, column, count, 2 * count);
        fill_operand(shared_bytes + kTile * kDepth, g.outliers.codes, first_column, g.n, column, count, count);
        __syncthreads();
        multiply(shared, 0);
      }
    }
    for_rows([&](int64_t row, int i, int r) {
      const float* scale = g.outliers.scale + row * 2;
      const int shift = row < g.m ? int8_outlier_shift(scale[0], scale[1], count) : 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[i][j / 2][r * 2 + j % 2] <<= shift;
    });
    __syncthreads();
  }
  const int64_t steps = (g.k + kDepth - 1) / kDepth;
  for (int s = 0; s < kStages - 1; ++s) start_stage(s);
  for (int64_t step = 0; step < steps; ++step) {
    ptx::cp_async_wait_group<kStages - 2>();
    __syncthreads();
    start_stage(step + kStages - 1);
#pragma unroll
    for (int half = 0; half < kDepth / 32; ++half)
      multiply(shared + static_cast<uint32_t>(step % kStages) * kStageBytes, half);
  }
  ptx::cp_async_wait_group<0>();

  Out* __restrict__ d = static_cast<Out*>(g.d);
  for_rows([&](int64_t row, int i, int r) {
    if (row >= g.m) return;
    const float a_scale = g.a_scale ? g.a_scale[row * g.a_scale_stride] : 1.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int64_t column = first_column + warp_column + j * 8 + lane % 4 * 2 + c;
        if (column >= g.n) continue;
        const float b_scale = g.b_scale ? g.b_scale[column * g.b_scale_stride] : 1.0f;
        Out* at = d + row * g.n + column;
        const float added = g.accumulate ? to_float(*at) : g.bias ? g.bias[column] : 0.0f;
        *at = from_float<Out>((static_cast<float>(sums[i][j][r * 2 + c]) * b_scale) * a_scale + added);
      }
    }
  });
}

}  // namespace quantrain::cuda::mma
