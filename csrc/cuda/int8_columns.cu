#include "csrc/cuda/int8.cuh"
#include "csrc/cuda/int8.h"
#include "csrc/cuda/int8_tile.cuh"

// Codes of columns, written as rows: the operands of products whose sum runs over the rows. Bytes are transposed in
// registers, four by four, and then in shared memory.

namespace quantrain::cuda {
namespace {

constexpr int kThreads = 256;

// ---- largest magnitudes of columns ----------------------------------------------------------------------------------

constexpr int kAbsmaxColumns = 32 * kItem;  // of a thread block: one item per lane
constexpr int kAbsmaxRows = 256;            // of a thread block: fewer atomics against more of them at work

// Marks columns of a weight that need no magnitude: it is folded.
constexpr float kFolded = -1.0f;

template <typename T, bool kFactor, bool kWeight>
__global__ void __launch_bounds__(kThreads) column_absmax_kernel(const T* __restrict__ x,           // [rows, columns]
                                                                 const float* __restrict__ factor,  // [rows]
                                                                 float* __restrict__ absmax,        // [columns]
                                                                 int64_t rows, int64_t columns) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kAbsmaxColumns + lane * kItem;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kAbsmaxRows;
  const int64_t end = first + kAbsmaxRows < rows ? first + kAbsmaxRows : rows;
  if (kWeight && absmax[0] == kFolded) return;
  uint32_t most[kItem] = {};
  if (column < columns) {
#pragma unroll 4
    for (int64_t row = first + warp; row < end; row += kThreads / 32) {
      float values[kItem];
      unpack(load(reinterpret_cast<const Pack<T, kItem>*>(x + row * columns + column)), values);
      const float f = kFactor ? factor[row] : 1.0f;
#pragma unroll
      for (int j = 0; j < kItem; ++j) most[j] = max(most[j], magnitude(kFactor ? values[j] * f : values[j]));
    }
  }
  __shared__ uint32_t of_warp[kThreads / 32][kAbsmaxColumns + 4];
#pragma unroll
  for (int j = 0; j < kItem; ++j) of_warp[warp][lane * kItem + j] = most[j];
  __syncthreads();
  uint32_t result = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) result = max(result, of_warp[w][threadIdx.x]);
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * kAbsmaxColumns + threadIdx.x;
  if (mine < columns) atomicMax(reinterpret_cast<uint32_t*>(absmax) + mine, result);
}

// Any sizes, one element per thread at a time.
template <typename T, bool kWeight>
__global__ void __launch_bounds__(kThreads)
    column_absmax_elements_kernel(const T* __restrict__ x, const float* __restrict__ factor, float* __restrict__ absmax,
                                  int64_t rows, int64_t columns) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kAbsmaxRows;
  const int64_t end = first + kAbsmaxRows < rows ? first + kAbsmaxRows : rows;
  if (column >= columns || (kWeight && absmax[0] == kFolded)) return;
  uint32_t most = 0;
  for (int64_t row = first; row < end; ++row) {
    const float value = to_float(x[row * columns + column]);
    most = max(most, magnitude(factor ? value * factor[row] : value));
  }
  atomicMax(reinterpret_cast<uint32_t*>(absmax) + column, most);
}

template <typename T, bool kWeight>
void launch_column_absmax(const void* x_pointer, const float* factor, float* absmax, int64_t rows, int64_t columns,
                          cudaStream_t stream) {
  const auto* x = static_cast<const T*>(x_pointer);
  const auto row_blocks = static_cast<unsigned>(ceil_div(rows, kAbsmaxRows));
  if (columns % kItem == 0 && is_aligned(x)) {
    const dim3 grid(static_cast<unsigned>(ceil_div(columns, kAbsmaxColumns)), row_blocks);
    dispatch_bool(factor != nullptr, [&](auto with_factor) {
      column_absmax_kernel<T, with_factor.value, kWeight>
          <<<grid, kThreads, 0, stream>>>(x, factor, absmax, rows, columns);
    });
  } else {
    const dim3 grid(static_cast<unsigned>(ceil_div(columns, kThreads)), row_blocks);
    column_absmax_elements_kernel<T, kWeight><<<grid, kThreads, 0, stream>>>(x, factor, absmax, rows, columns);
  }
}

// ---- codes, transposed ----------------------------------------------------------------------------------------------

// code = rint((x * row multiplier) * column multiplier). For columns of a gradient these are the row factor and the
// inverse column scale; for a folded weight the inverse row scale and 1.
struct ColumnCodes {
  const void* x;            // [rows, columns]
  const float* row_factor;  // [rows] or null: 1
  const float* absmax;      // [columns]; kFolded: a weight whose rows' inverse scales are the row multipliers
  int8_t* codes;            // [columns, rows]
  float* scale;             // [columns]
  int64_t rows;
  int64_t columns;
  PhiloxState philox;
};

// A weight in floating point that is not folded takes its own values, not the forward's.
template <typename T, bool kWeight>
__device__ __forceinline__ float multiplier_of_row(const ColumnCodes& a, int64_t row, bool folded) {
  if constexpr (kWeight && !std::is_same_v<T, int8_t>) {
    return folded ? int8_inverse(a.row_factor[row], false) : 1.0f;
  } else if constexpr (kWeight) {
    return folded ? 1.0f : a.row_factor[row];
  } else {
    return a.row_factor ? a.row_factor[row] : 1.0f;
  }
}

// columns % 8 == 0, rows % 4 == 0, aligned.
template <typename T, bool kStochastic, bool kWeight>
__global__ void __launch_bounds__(kThreads) quantize_columns_kernel(const ColumnCodes a) {
  __shared__ float inverses[kTileColumns];
  __shared__ uint32_t masks[kTileColumns];  // 0xff, or 0 where the scale is NaN
  __shared__ uint32_t tile[2][kTileWords];
  const T* __restrict__ x = static_cast<const T*>(a.x);
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * kTileColumns;
  if (threadIdx.x < kTileColumns) {
    const int64_t column = first_column + threadIdx.x;
    const float absmax = column < a.columns ? a.absmax[column] : 0.0f;
    const bool folded = kWeight && absmax == kFolded;
    const float scale = folded ? 1.0f : int8_scale(absmax);
    inverses[threadIdx.x] = int8_inverse(scale, kStochastic);
    masks[threadIdx.x] = scale == scale ? 0xffu : 0u;
    if (blockIdx.x == 0 && column < a.columns) a.scale[column] = scale;
  }
  __syncthreads();
  const bool folded = kWeight && a.absmax[0] == kFolded;
  const TilePlace place(first_column);
  const int64_t column = place.column;
  const bool inside = column < a.columns;
  float inverse[kItem];
  uint32_t mask[2];
  load_columns(place, inverses, masks, inverse, mask);
  const PhiloxKey key(a.philox);
  const int64_t items_per_row = a.columns / kItem;
#pragma unroll 1
  for (int t = 0; t < kTilesInOne; ++t) {
    const int64_t first_row = (static_cast<int64_t>(blockIdx.x) * kTilesInOne + t) * kTileRows;
    if (first_row >= a.rows) return;
    const int64_t row = first_row + place.quad * 4;
    uint32_t words[2][4] = {};  // of columns 0 to 3 and 4 to 7: a row each
    if (inside && row < a.rows) {
      Pack<T, kItem> items[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        items[i] = *reinterpret_cast<const Pack<T, kItem>*>(x + (row + i) * a.columns + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float multiplier = multiplier_of_row<T, kWeight>(a, row + i, folded);
        float values[kItem];
        unpack(items[i], values);
#pragma unroll
        for (int j = 0; j < kItem; ++j) values[j] = (values[j] * multiplier) * inverse[j];
        uint2 codes =
            item_codes<kStochastic>(values, key, static_cast<uint64_t>((row + i) * items_per_row + column / kItem));
        if (kWeight && !(multiplier == multiplier)) codes = {0, 0};
        words[0][i] = codes.x & mask[0];
        words[1][i] = codes.y & mask[1];
      }
    }
    put_transposed(place, words, tile[t % 2]);
    __syncthreads();
    write_tile(tile[t % 2], first_row, first_column, a.rows, a.columns, a.codes);
  }
}

constexpr int kSmallTile = 32;

// Any sizes, element by element.
template <typename T, bool kWeight>
__global__ void __launch_bounds__(kThreads) quantize_columns_elements_kernel(const ColumnCodes a, bool stochastic) {
  __shared__ int8_t tile[kSmallTile][kSmallTile + 4];
  const T* __restrict__ x = static_cast<const T*>(a.x);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kSmallTile;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * kSmallTile;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const PhiloxKey key(a.philox);
  const int64_t column = first_column + lane;
  const bool folded = kWeight && a.absmax[0] == kFolded;
  if (column < a.columns) {
    const float scale = folded ? 1.0f : int8_scale(a.absmax[column]);
    const float inverse = int8_inverse(scale, stochastic);
    if (blockIdx.x == 0 && warp == 0) a.scale[column] = scale;
    for (int r = warp; r < kSmallTile && first_row + r < a.rows; r += kThreads / 32) {
      const int64_t row = first_row + r;
      const float multiplier = multiplier_of_row<T, kWeight>(a, row, folded);
      const float scaled = (to_float(x[row * a.columns + column]) * multiplier) * inverse;
      const auto index = static_cast<uint64_t>(row * int8_items_per_row(a.columns) + column / kItem);
      const bool finite = scale == scale && (!kWeight || multiplier == multiplier);
      tile[lane][r] = finite ? element_code(scaled, stochastic, key, index, static_cast<int>(column % kItem)) : 0;
    }
  }
  __syncthreads();
  const int64_t row = first_row + lane;
  if (row >= a.rows) return;
  for (int c = warp; c < kSmallTile && first_column + c < a.columns; c += kThreads / 32)
    a.codes[(first_column + c) * a.rows + row] = tile[c][lane];
}

template <typename T, bool kWeight>
void launch_column_codes(const ColumnCodes& a, bool stochastic, cudaStream_t stream) {
  if (a.columns % kItem == 0 && a.rows % 4 == 0 && is_aligned(a.x) && is_aligned(a.codes)) {
    const dim3 grid(static_cast<unsigned>(ceil_div(a.rows, kTileRows * kTilesInOne)),
                    static_cast<unsigned>(ceil_div(a.columns, kTileColumns)));
    if constexpr (kWeight) {
      quantize_columns_kernel<T, false, true><<<grid, kThreads, 0, stream>>>(a);
    } else {
      dispatch_bool(stochastic, [&](auto random) {
        quantize_columns_kernel<T, random.value, false><<<grid, kThreads, 0, stream>>>(a);
      });
    }
  } else {
    const dim3 grid(static_cast<unsigned>(ceil_div(a.rows, kSmallTile)),
                    static_cast<unsigned>(ceil_div(a.columns, kSmallTile)));
    quantize_columns_elements_kernel<T, kWeight><<<grid, kThreads, 0, stream>>>(a, stochastic);
  }
}

// ---- transposition of codes -----------------------------------------------------------------------------------------

constexpr int kByteTile = 128;

// columns % 16 == 0, rows % 4 == 0, aligned.
__global__ void __launch_bounds__(kThreads) transpose_kernel(const Int8TransposeArgs a) {
  __shared__ uint32_t tile[kByteTile * (kQuads + 1)];
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kByteTile;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * kByteTile;
  const int group = threadIdx.x % 8, quad = threadIdx.x / 8;  // sixteen columns, four rows
  const int64_t row = first_row + quad * 4, column = first_column + group * 16;
  uint4 read[4] = {};
  if (row < a.rows && column < a.columns) {
#pragma unroll
    for (int i = 0; i < 4; ++i) read[i] = *reinterpret_cast<const uint4*>(a.codes + (row + i) * a.columns + column);
  }
#pragma unroll
  for (int h = 0; h < 4; ++h) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = h == 0 ? read[i].x : h == 1 ? read[i].y : h == 2 ? read[i].z : read[i].w;
    transpose_bytes(words);
    const int place = quad ^ (group >> 1 << 2);  // spreads eight groups over the banks, with the four columns of each
#pragma unroll
    for (int i = 0; i < 4; ++i) tile[(group * 16 + h * 4 + i) * (kQuads + 1) + place] = words[i];
  }
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t out_row = first_row + lane * 4;
#pragma unroll
  for (int i = 0; i < kByteTile / 8; ++i) {
    const int c = warp * (kByteTile / 8) + i;
    if (first_column + c < a.columns && out_row < a.rows)
      *reinterpret_cast<uint32_t*>(a.transposed + (first_column + c) * a.rows + out_row) =
          tile[c * (kQuads + 1) + (lane ^ (c >> 5 << 2))];
  }
}

__global__ void __launch_bounds__(kThreads) transpose_bytes_kernel(const Int8TransposeArgs a) {
  __shared__ int8_t tile[kSmallTile][kSmallTile + 4];
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kSmallTile;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * kSmallTile;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (first_column + lane < a.columns)
    for (int r = warp; r < kSmallTile && first_row + r < a.rows; r += kThreads / 32)
      tile[lane][r] = a.codes[(first_row + r) * a.columns + first_column + lane];
  __syncthreads();
  if (first_row + lane >= a.rows) return;
  for (int c = warp; c < kSmallTile && first_column + c < a.columns; c += kThreads / 32)
    a.transposed[(first_column + c) * a.rows + first_row + lane] = tile[c][lane];
}

// ---- weights --------------------------------------------------------------------------------------------------------

constexpr int kSchemeThreads = 1024;

// One thread block: whether the weight is folded, into column_factor and absmax.
__global__ void __launch_bounds__(kSchemeThreads) weight_scheme_kernel(const Int8WeightTransposeArgs a) {
  __shared__ double of_warp_max[32];
  __shared__ double of_warp_sum[32];
  __shared__ bool folded;
  double largest = 0.0, sum = 0.0;
  if (a.scheme == Int8WeightScheme::kAuto) {
    for (int64_t o = threadIdx.x; o < a.out; o += kSchemeThreads) {
      const double scale = a.row_scale[o], square = scale * scale;  // in float32 it may leave the range
      largest = fmax(largest, square);
      sum += square;
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      largest = fmax(largest, __shfl_xor_sync(0xffffffffu, largest, step));
      sum += __shfl_xor_sync(0xffffffffu, sum, step);
    }
    if (threadIdx.x % 32 == 0) {
      of_warp_max[threadIdx.x / 32] = largest;
      of_warp_sum[threadIdx.x / 32] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    folded = a.scheme == Int8WeightScheme::kFold;
    if (a.scheme == Int8WeightScheme::kAuto) {
      for (int w = 1; w < 32; ++w) {
        largest = fmax(largest, of_warp_max[w]);
        sum += of_warp_sum[w];
      }
      folded = !(largest * static_cast<double>(a.out) > kInt8FoldBound * sum);
    }
  }
  __syncthreads();
  for (int64_t o = threadIdx.x; o < a.out; o += kSchemeThreads) a.column_factor[o] = folded ? a.row_scale[o] : 1.0f;
  for (int64_t i = threadIdx.x; i < a.in; i += kSchemeThreads) a.absmax[i] = folded ? kFolded : 0.0f;
}

template <typename T>
void launch_weight_transpose(const Int8WeightTransposeArgs& a, cudaStream_t stream) {
  weight_scheme_kernel<<<1, kSchemeThreads, 0, stream>>>(a);
  const float* value_factor = std::is_same_v<T, int8_t> ? a.row_scale : nullptr;
  if (a.scheme != Int8WeightScheme::kFold)
    launch_column_absmax<T, true>(a.weight, value_factor, a.absmax, a.out, a.in, stream);
  launch_column_codes<T, true>({a.weight, a.row_scale, a.absmax, a.codes, a.scale, a.out, a.in, {}}, false, stream);
}

}  // namespace

int int8_column_absmax(const Int8ColumnAbsmaxArgs& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  if (const auto error = cudaMemsetAsync(a.absmax, 0, static_cast<size_t>(a.columns) * sizeof(float), stream))
    return error;
  dispatch_float(a.dtype, [&](auto* type) {
    launch_column_absmax<std::remove_pointer_t<decltype(type)>, false>(a.x, a.row_factor, a.absmax, a.rows, a.columns,
                                                                       stream);
  });
  return cudaGetLastError();
}

int int8_quantize_columns(const Int8QuantizeColumnsArgs& a, void* stream) {
  dispatch_float(a.dtype, [&](auto* type) {
    launch_column_codes<std::remove_pointer_t<decltype(type)>, false>(
        {a.x, a.row_factor, a.absmax, a.codes, a.scale, a.rows, a.columns, a.philox}, a.stochastic,
        static_cast<cudaStream_t>(stream));
  });
  return cudaGetLastError();
}

int int8_transpose(const Int8TransposeArgs& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const auto grid = [&](int tile) {
    return dim3(static_cast<unsigned>(ceil_div(a.rows, tile)), static_cast<unsigned>(ceil_div(a.columns, tile)));
  };
  if (a.columns % 16 == 0 && a.rows % 4 == 0 && is_aligned(a.codes) && is_aligned(a.transposed))
    transpose_kernel<<<grid(kByteTile), kThreads, 0, stream>>>(a);
  else
    transpose_bytes_kernel<<<grid(kSmallTile), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

int int8_weight_transpose(const Int8WeightTransposeArgs& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  if (a.dtype == DType::kInt8)
    launch_weight_transpose<int8_t>(a, stream);
  else
    dispatch_float(a.dtype,
                   [&](auto* type) { launch_weight_transpose<std::remove_pointer_t<decltype(type)>>(a, stream); });
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
