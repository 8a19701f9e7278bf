// A tile of a matrix whose codes are written transposed: bytes change places four by four in registers, and then in
// shared memory.
#pragma once

#include "csrc/cuda/int8.cuh"

namespace quantrain::cuda {

constexpr int kTileRows = 128;  // of the input
constexpr int kTileColumns = 64;
constexpr int kTilesInOne = 4;  // one below the other, for a thread block of 256
constexpr int kQuads = kTileRows / 4;
constexpr int kTileWords = kTileColumns * (kQuads + 1);

// A thread's part of a tile: eight columns of four rows.
struct TilePlace {
  int group;       // of eight columns
  int quad;        // of four rows
  int64_t column;  // the first of them in the matrix

  __device__ __forceinline__ explicit TilePlace(int64_t first_column)
      : group(threadIdx.x % 8), quad(threadIdx.x / 8), column(first_column + group * kItem) {}
};

// The multipliers of a thread's columns, and a mask of bytes for each four of them.
__device__ __forceinline__ void load_columns(const TilePlace& place, const float* inverses, const uint32_t* masks,
                                             float (&inverse)[kItem], uint32_t (&mask)[2]) {
  mask[0] = mask[1] = 0;
#pragma unroll
  for (int j = 0; j < kItem; ++j) {
    inverse[j] = inverses[place.group * kItem + j];
    mask[j / 4] |= masks[place.group * kItem + j] << (8 * (j % 4));
  }
}

// Four words of four bytes each, transposed.
__device__ __forceinline__ void transpose_bytes(uint32_t (&w)[4]) {
  const uint32_t t0 = __byte_perm(w[0], w[1], 0x5140), t1 = __byte_perm(w[2], w[3], 0x5140);
  const uint32_t t2 = __byte_perm(w[0], w[1], 0x7362), t3 = __byte_perm(w[2], w[3], 0x7362);
  w[0] = __byte_perm(t0, t1, 0x5410);
  w[1] = __byte_perm(t0, t1, 0x7632);
  w[2] = __byte_perm(t2, t3, 0x5410);
  w[3] = __byte_perm(t2, t3, 0x7632);
}

// words[h][i]: codes of row i of the thread's four, columns 4 h to 4 h + 3.
__device__ __forceinline__ void put_transposed(const TilePlace& place, uint32_t (&words)[2][4], uint32_t* tile) {
  const int spread = place.quad ^ (place.group >> 2 << 2);  // the columns' halves lie in different banks
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    transpose_bytes(words[h]);
#pragma unroll
    for (int i = 0; i < 4; ++i) tile[(place.group * kItem + h * 4 + i) * (kQuads + 1) + spread] = words[h][i];
  }
}

// Four rows per word, a row of 128 bytes for a warp.
__device__ __forceinline__ void write_tile(const uint32_t* tile, int64_t first_row, int64_t first_column, int64_t rows,
                                           int64_t columns, int8_t* __restrict__ codes) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = first_row + lane * 4;
#pragma unroll
  for (int i = 0; i < kTileColumns / 8; ++i) {
    const int c = warp * (kTileColumns / 8) + i;
    if (first_column + c < columns && row < rows)
      *reinterpret_cast<uint32_t*>(codes + (first_column + c) * rows + row) =
          tile[c * (kQuads + 1) + (lane ^ (c >> 5 << 2))];
  }
}

}  // namespace quantrain::cuda
