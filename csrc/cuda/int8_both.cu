#include "csrc/cuda/int8.cuh"
#include "csrc/cuda/int8.h"
#include "csrc/cuda/int8_tile.cuh"

// Codes of rows and of columns of one matrix. First the largest magnitudes of both, then both codes of a tile from one
// reading of it and one draw of random numbers.

namespace quantrain::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAbsmaxColumns = 32 * kItem;  // of a thread block: one item per lane
constexpr int kAbsmaxRows = 128;

template <typename T, bool kColumnFactor, bool kRowFactor>
__global__ void __launch_bounds__(kThreads) absmax_kernel(const Int8RowsAndColumnsArgs a) {
  const T* __restrict__ x = static_cast<const T*>(a.x);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kAbsmaxColumns + lane * kItem;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kAbsmaxRows;
  const int64_t end = first + kAbsmaxRows < a.rows ? first + kAbsmaxRows : a.rows;
  const bool inside = column < a.columns;
  auto* of_rows = reinterpret_cast<uint32_t*>(a.absmax);
  auto* of_columns = of_rows + a.rows;
  float factor[kItem];
#pragma unroll
  for (int j = 0; j < kItem; ++j) factor[j] = kColumnFactor && inside ? a.column_factor[column + j] : 1.0f;
  uint32_t most[kItem] = {};
#pragma unroll 4
  for (int64_t row = first + warp; row < end; row += kThreads / 32) {
    uint32_t row_most = 0;
    if (inside) {
      const auto item = *reinterpret_cast<const Pack<T, kItem>*>(x + row * a.columns + column);
      float values[kItem];
      unpack(item, values);
      const float f = kRowFactor ? a.row_factor[row] : 1.0f;
#pragma unroll
      for (int j = 0; j < kItem; ++j) {
        most[j] = max(most[j], magnitude(kRowFactor ? values[j] * f : values[j]));
        if (kColumnFactor) row_most = max(row_most, magnitude(values[j] * factor[j]));
      }
      if (!kColumnFactor) row_most = largest_magnitude(item);
    }
    row_most = __reduce_max_sync(0xffffffffu, row_most);
    if (lane == 0) atomicMax(of_rows + row, row_most);
  }
  __shared__ uint32_t of_warp[kThreads / 32][kAbsmaxColumns + 4];
#pragma unroll
  for (int j = 0; j < kItem; ++j) of_warp[warp][lane * kItem + j] = most[j];
  __syncthreads();
  uint32_t result = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) result = max(result, of_warp[w][threadIdx.x]);
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * kAbsmaxColumns + threadIdx.x;
  if (mine < a.columns) atomicMax(of_columns + mine, result);
}

template <typename T, bool kStochastic>
__global__ void __launch_bounds__(kThreads, 3) both_codes_kernel(const Int8RowsAndColumnsArgs a) {
  __shared__ float column_inverses[kTileColumns], row_inverses[2][kTileRows];
  __shared__ uint32_t masks[kTileColumns];
  __shared__ uint32_t tile[2][kTileWords];
  const T* __restrict__ x = static_cast<const T*>(a.x);
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kTileColumns;
  if (threadIdx.x < kTileColumns) {
    const int64_t column = first_column + threadIdx.x;
    const float scale = int8_scale(column < a.columns ? a.absmax[a.rows + column] : 0.0f);
    column_inverses[threadIdx.x] = int8_inverse(scale, kStochastic);
    masks[threadIdx.x] = scale == scale ? 0xffu : 0u;
    if (blockIdx.y == 0 && column < a.columns) a.column_scale[column] = scale;
  }
  // The rows that the pass before read last come first: they are still in the second-level cache.
  const int64_t first_tile = static_cast<int64_t>(gridDim.y - 1 - blockIdx.y) * kTilesInOne;
  const TilePlace place(first_column);
  const int64_t column = place.column;
  const bool inside = column < a.columns;
  float inverse[kItem], factor[kItem];
  uint32_t mask[2];
  const PhiloxKey key(a.philox);
  const int64_t items_per_row = a.columns / kItem;
#pragma unroll 1
  for (int t = 0; t < kTilesInOne; ++t) {
    const int64_t first_row = (first_tile + t) * kTileRows;
    if (first_row >= a.rows) return;
    if (threadIdx.x < kTileRows) {
      const int64_t row = first_row + threadIdx.x;
      const float scale = int8_scale(row < a.rows ? a.absmax[row] : 0.0f);
      row_inverses[t % 2][threadIdx.x] = scale == scale ? int8_inverse(scale, kStochastic) : scale;
      if (blockIdx.x == 0 && row < a.rows) a.row_scale[row] = scale;
    }
    const int64_t row = first_row + place.quad * 4;
    const bool here = inside && row < a.rows;
    Pack<T, kItem> items[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (here) items[i] = *reinterpret_cast<const Pack<T, kItem>*>(x + (row + i) * a.columns + column);
    __syncthreads();
    if (t == 0) {
      load_columns(place, column_inverses, masks, inverse, mask);
#pragma unroll
      for (int j = 0; j < kItem; ++j) factor[j] = a.column_factor && inside ? a.column_factor[column + j] : 1.0f;
    }
    uint32_t words[2][4] = {};
    if (here) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float row_inverse = row_inverses[t % 2][place.quad * 4 + i];
        const float row_factor = a.row_factor ? a.row_factor[row + i] : 1.0f;
        const int64_t item = (row + i) * items_per_row + column / kItem;
        Philox4 block;
        if constexpr (kStochastic) block = key.block(static_cast<uint64_t>(item));
        float values[kItem];
        unpack(items[i], values);
        uint32_t by_row[kItem], by_column[kItem];
#pragma unroll
        for (int j = 0; j < kItem; ++j) {
          const float r = (values[j] * factor[j]) * row_inverse, c = (values[j] * row_factor) * inverse[j];
          if constexpr (kStochastic) {
            const float dither = int8_dither(block.word[j / 2], j % 2);
            by_row[j] = int8_code(r, dither);
            by_column[j] = int8_code(c, dither);
          } else {
            by_row[j] = __float_as_uint(r + 12582912.0f);
            by_column[j] = __float_as_uint(c + 12582912.0f);
          }
        }
        uint2 codes{low_bytes(by_row[0], by_row[1], by_row[2], by_row[3]),
                    low_bytes(by_row[4], by_row[5], by_row[6], by_row[7])};
        if (!(row_inverse == row_inverse)) codes = {0, 0};
        reinterpret_cast<uint2*>(a.row_codes)[item] = codes;
        words[0][i] = low_bytes(by_column[0], by_column[1], by_column[2], by_column[3]) & mask[0];
        words[1][i] = low_bytes(by_column[4], by_column[5], by_column[6], by_column[7]) & mask[1];
      }
    }
    put_transposed(place, words, tile[t % 2]);
    __syncthreads();
    write_tile(tile[t % 2], first_row, first_column, a.rows, a.columns, a.column_codes);
  }
}

}  // namespace

bool int8_suits_rows_and_columns(const Int8RowsAndColumnsArgs& a) {
  return a.columns % kItem == 0 && a.rows % 4 == 0 && is_aligned(a.x) && is_aligned(a.row_codes) &&
         is_aligned(a.column_codes) && a.rows / kAbsmaxRows < 65535;
}

int int8_rows_and_columns(const Int8RowsAndColumnsArgs& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const auto numbers = static_cast<size_t>(a.rows + a.columns);
  if (const auto error = cudaMemsetAsync(a.absmax, 0, numbers * sizeof(float), stream)) return error;
  const dim3 absmax_grid(static_cast<unsigned>(ceil_div(a.columns, kAbsmaxColumns)),
                         static_cast<unsigned>(ceil_div(a.rows, kAbsmaxRows)));
  const dim3 grid(static_cast<unsigned>(ceil_div(a.columns, kTileColumns)),
                  static_cast<unsigned>(ceil_div(a.rows, kTileRows * kTilesInOne)));
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dispatch_bool(a.column_factor != nullptr, [&](auto column_factor) {
      dispatch_bool(a.row_factor != nullptr, [&](auto row_factor) {
        absmax_kernel<T, column_factor.value, row_factor.value><<<absmax_grid, kThreads, 0, stream>>>(a);
      });
    });
    dispatch_bool(a.stochastic,
                  [&](auto stochastic) { both_codes_kernel<T, stochastic.value><<<grid, kThreads, 0, stream>>>(a); });
  });
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
