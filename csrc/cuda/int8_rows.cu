#include "csrc/cuda/int8.cuh"
#include "csrc/cuda/int8.h"
#include "csrc/cuda/overlap.cuh"

// Codes and scales of rows. A row of whole items that fits the registers of a thread block is read once; others twice.

namespace quantrain::cuda {
namespace {

constexpr int kWideThreads = 512;

// A row for blockDim.x threads, kItems items each; blockDim.y rows per thread block, then of one warp each.
template <typename T, int kItems, bool kStochastic, bool kFactor>
__global__ void __launch_bounds__(kRowThreads)
    quantize_rows_kernel(const T* __restrict__ x,           // [rows, columns]
                         const float* __restrict__ factor,  // [columns]
                         int8_t* __restrict__ codes,        // [rows, columns]
                         float* __restrict__ scale,         // [rows]
                         int64_t rows, uint32_t items_per_row, PhiloxState philox) {
  ptx::begin_overlapping();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (blockDim.y > 1 && row >= rows) return;
  const int64_t first = row * items_per_row;
  // With a factor the products are kept, else what was read.
  using Kept = std::conditional_t<kFactor, Pack<float, kItem>, Pack<T, kItem>>;
  Kept kept[kItems];
  uint32_t most = 0;
#pragma unroll
  for (int u = 0; u < kItems; ++u) {
    const uint32_t item = u * blockDim.x + threadIdx.x;
    if (item >= items_per_row) continue;
    const auto read = reinterpret_cast<const Pack<T, kItem>*>(x)[first + item];
    if constexpr (kFactor) {
      const auto factors = reinterpret_cast<const Pack<float, kItem>*>(factor)[item];
      float values[kItem];
      unpack(read, values);
#pragma unroll
      for (int j = 0; j < kItem; ++j) kept[u].value[j] = values[j] * factors.value[j];
    } else {
      kept[u] = read;
    }
    most = max(most, largest_magnitude(kept[u]));
  }
  most = block_max(most);
  const float row_scale = int8_scale(__uint_as_float(most));
  if (threadIdx.x == 0) scale[row] = row_scale;
  const float inverse = int8_inverse(row_scale, kStochastic);
  const PhiloxKey key(philox);
#pragma unroll
  for (int u = 0; u < kItems; ++u) {
    const uint32_t item = u * blockDim.x + threadIdx.x;
    if (item >= items_per_row) continue;
    float values[kItem];
    unpack(kept[u], values);
#pragma unroll
    for (int j = 0; j < kItem; ++j) values[j] *= inverse;
    uint2 result = item_codes<kStochastic>(values, key, static_cast<uint64_t>(first + item));
    if (!(row_scale == row_scale)) result = {0, 0};
    reinterpret_cast<uint2*>(codes)[first + item] = result;
  }
}

// Any row, by elements.
template <typename T>
__global__ void __launch_bounds__(kWideThreads) quantize_wide_rows_kernel(const Int8QuantizeRowsArgs a) {
  const int64_t row = blockIdx.x;
  const T* __restrict__ x = static_cast<const T*>(a.x) + row * a.columns;
  const auto product = [&](int64_t c) {
    return a.column_factor ? to_float(x[c]) * a.column_factor[c] : to_float(x[c]);
  };
  uint32_t most = 0;
  for (int64_t c = threadIdx.x; c < a.columns; c += kWideThreads) most = max(most, magnitude(product(c)));
  most = block_max(most);
  const float row_scale = int8_scale(__uint_as_float(most));
  if (threadIdx.x == 0) a.scale[row] = row_scale;
  const float inverse = int8_inverse(row_scale, a.stochastic);
  const PhiloxKey key(a.philox);
  const uint64_t first = static_cast<uint64_t>(row * int8_items_per_row(a.columns));
  for (int64_t c = threadIdx.x; c < a.columns; c += kWideThreads) {
    const int8_t code = element_code(product(c) * inverse, a.stochastic, key, first + static_cast<uint64_t>(c / kItem),
                                     static_cast<int>(c % kItem));
    a.codes[row * a.columns + c] = row_scale == row_scale ? code : 0;
  }
}

}  // namespace

int int8_quantize_rows(const Int8QuantizeRowsArgs& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const bool whole = is_read_once(a.columns, a.x, a.codes, a.column_factor);
  const auto items = static_cast<uint32_t>(a.columns / kItem);
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (!whole) {
      quantize_wide_rows_kernel<T><<<static_cast<unsigned>(a.rows), kWideThreads, 0, stream>>>(a);
      return;
    }
    dispatch_bool(a.stochastic, [&](auto stochastic) {
      dispatch_bool(a.column_factor != nullptr, [&](auto factor) {
        launch_item_rows(a.rows, items, [&](auto of_thread, unsigned blocks, dim3 threads) {
          launch_overlapping(quantize_rows_kernel<T, of_thread.value, stochastic.value, factor.value>, dim3(blocks),
                             threads, 0, stream, static_cast<const T*>(a.x), a.column_factor, a.codes, a.scale, a.rows,
                             items, a.philox);
        });
      });
    });
  });
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
