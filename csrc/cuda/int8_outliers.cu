#include "csrc/cuda/int8.cuh"
#include "csrc/cuda/int8.h"

// Codes of rows with outlier columns apart: one reading, as in int8_rows.cu. The outlier columns are read once more by
// the first threads of a row, from the first-level cache.

namespace quantrain::cuda {
namespace {

constexpr int kWideThreads = 512;

struct Pair {
  uint32_t first, second;
};

// block_max of two values at once.
__device__ __forceinline__ Pair block_max(Pair value) {
  __shared__ Pair of_warp[32];
  value = {__reduce_max_sync(0xffffffffu, value.first), __reduce_max_sync(0xffffffffu, value.second)};
  if (blockDim.x == 32) return value;
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  const uint32_t lane = threadIdx.x % 32;
  value = lane < blockDim.x / 32 ? of_warp[lane] : Pair{0u, 0u};
  return {__reduce_max_sync(0xffffffffu, value.first), __reduce_max_sync(0xffffffffu, value.second)};
}

struct RowScales {
  float main, outlier;
  bool finite;
};

__device__ __forceinline__ RowScales row_scales(Pair most, int64_t count) {
  if (max(most.first, most.second) > __float_as_uint(FLT_MAX)) {
    const float nan = int8_scale(INFINITY);
    return {nan, nan, false};
  }
  const float main = most.first == 0 ? 0.0f : int8_scale(__uint_as_float(most.first));
  const Int8OutlierScales scales = int8_outlier_scales(main, __uint_as_float(most.second), count);
  return {scales.main, scales.outlier, true};
}

template <typename T>
__device__ __forceinline__ float element(const Int8QuantizeOutliersArgs& a, int64_t row, int64_t column) {
  const float value = to_float(static_cast<const T*>(a.x)[row * a.columns + column]);
  return a.column_factor ? value * a.column_factor[column] : value;
}

// Outlier column i of a row. One that x does not have is a column of zeros.
template <typename T>
__device__ __forceinline__ float outlier(const Int8QuantizeOutliersArgs& a, int64_t row, int64_t i) {
  const int64_t column = a.outliers[i];
  return column < 0 || column >= a.columns ? 0.0f : element<T>(a, row, column);
}

template <typename T>
__device__ __forceinline__ uint32_t largest_outlier(const Int8QuantizeOutliersArgs& a, int64_t row) {
  uint32_t most = 0;
  for (int64_t i = threadIdx.x; i < a.count; i += blockDim.x) most = max(most, magnitude(outlier<T>(a, row, i)));
  return most;
}

template <typename T>
__device__ __forceinline__ void write_planes(const Int8QuantizeOutliersArgs& a, int64_t row, const RowScales& scales) {
  if (threadIdx.x == 0) reinterpret_cast<float2*>(a.scale)[row] = {scales.main, scales.outlier};
  const float inverse = 1.0f / scales.outlier;
  int8_t* __restrict__ planes = a.planes + row * 2 * a.count;
  for (int64_t i = threadIdx.x; i < a.count; i += blockDim.x) {
    const int32_t q = scales.finite ? int8_outlier_code(outlier<T>(a, row, i) * inverse) : 0;
    const int32_t high = int8_outlier_high(q);
    planes[i] = static_cast<int8_t>(high);
    planes[a.count + i] = static_cast<int8_t>(q - kInt8Plane * high);
  }
}

// A row for blockDim.x threads, kItems items each; blockDim.y rows per thread block, then of one warp each.
template <typename T, int kItems, bool kFactor>
__global__ void __launch_bounds__(kRowThreads) outlier_rows_kernel(const Int8QuantizeOutliersArgs a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (blockDim.y > 1 && row >= a.rows) return;
  const auto items_per_row = static_cast<uint32_t>(a.columns / kItem);
  const int64_t first = row * items_per_row;
  // A bit for each element that is apart.
  uint32_t apart[kItems] = {};
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t column = a.outliers[i];
    if (column < 0 || column >= a.columns) continue;
    const auto item = static_cast<uint32_t>(column / kItem);
#pragma unroll
    for (int u = 0; u < kItems; ++u)
      if (item == u * blockDim.x + threadIdx.x) apart[u] |= 1u << column % kItem;
  }
  using Kept = std::conditional_t<kFactor, Pack<float, kItem>, Pack<T, kItem>>;
  Kept kept[kItems];
  Pair most{0u, 0u};
#pragma unroll
  for (int u = 0; u < kItems; ++u) {
    const uint32_t item = u * blockDim.x + threadIdx.x;
    if (item >= items_per_row) continue;
    const auto read = reinterpret_cast<const Pack<T, kItem>*>(a.x)[first + item];
    if constexpr (kFactor) {
      const auto factors = reinterpret_cast<const Pack<float, kItem>*>(a.column_factor)[item];
      float values[kItem];
      unpack(read, values);
#pragma unroll
      for (int j = 0; j < kItem; ++j) kept[u].value[j] = values[j] * factors.value[j];
    } else {
      kept[u] = read;
    }
    if (apart[u] != 0) {
#pragma unroll
      for (int j = 0; j < kItem; ++j)
        if (apart[u] >> j & 1) kept[u].value[j] = {};
    }
    most.first = max(most.first, largest_magnitude(kept[u]));
  }
  most.second = largest_outlier<T>(a, row);
  const RowScales scales = row_scales(block_max(most), a.count);
  write_planes<T>(a, row, scales);
  const float inverse = int8_inverse(scales.main, false);
  const PhiloxKey none{PhiloxState{}};
#pragma unroll
  for (int u = 0; u < kItems; ++u) {
    const uint32_t item = u * blockDim.x + threadIdx.x;
    if (item >= items_per_row) continue;
    float values[kItem];
    unpack(kept[u], values);
#pragma unroll
    for (int j = 0; j < kItem; ++j) values[j] *= inverse;
    uint2 result = item_codes<false>(values, none, 0);
    if (!scales.finite) result = {0, 0};
    reinterpret_cast<uint2*>(a.codes)[first + item] = result;
  }
}

// Any row, by elements.
template <typename T>
__global__ void __launch_bounds__(kWideThreads) wide_outlier_rows_kernel(const Int8QuantizeOutliersArgs a) {
  const int64_t row = blockIdx.x;
  const auto main = [&](int64_t column) {
    for (int64_t i = 0; i < a.count; ++i)
      if (a.outliers[i] == column) return 0.0f;
    return element<T>(a, row, column);
  };
  Pair most{0u, largest_outlier<T>(a, row)};
  for (int64_t c = threadIdx.x; c < a.columns; c += kWideThreads) most.first = max(most.first, magnitude(main(c)));
  const RowScales scales = row_scales(block_max(most), a.count);
  write_planes<T>(a, row, scales);
  const float inverse = int8_inverse(scales.main, false);
  const PhiloxKey none{PhiloxState{}};
  for (int64_t c = threadIdx.x; c < a.columns; c += kWideThreads) {
    const int8_t code = element_code(main(c) * inverse, false, none, 0, 0);
    a.codes[row * a.columns + c] = scales.finite ? code : 0;
  }
}

}  // namespace

int int8_quantize_outliers(const Int8QuantizeOutliersArgs& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const bool whole = is_read_once(a.columns, a.x, a.codes, a.column_factor);
  const auto items = static_cast<uint32_t>(a.columns / kItem);
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (!whole) {
      wide_outlier_rows_kernel<T><<<static_cast<unsigned>(a.rows), kWideThreads, 0, stream>>>(a);
      return;
    }
    dispatch_bool(a.column_factor != nullptr, [&](auto factor) {
      launch_item_rows(a.rows, items, [&](auto of_thread, unsigned blocks, dim3 threads) {
        outlier_rows_kernel<T, of_thread.value, factor.value><<<blocks, threads, 0, stream>>>(a);
      });
    });
  });
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
