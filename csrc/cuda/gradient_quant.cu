#include "csrc/cuda/gradient_quant.h"

#include <algorithm>
#include <type_traits>

#include "csrc/common/gradient_quant.h"
#include "csrc/cuda/common.cuh"
#include "csrc/cuda/ptx.cuh"

// Grids of blocks, and rounding on them. A thread rounds kPhiloxElements consecutive elements of a row with the numbers
// of one Philox block. Rows that fit the registers of a thread block are read once; others in two passes.

namespace quantrain::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kItem = kPhiloxElements;
constexpr int kManySplits = 64;  // from this many partial extremes on a thread block folds them, not a thread

__device__ __forceinline__ void warp_extremes(float& min, float& max) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    min = ptx::min_nan(min, __shfl_xor_sync(0xffffffffu, min, step));
    max = ptx::max_nan(max, __shfl_xor_sync(0xffffffffu, max, step));
  }
}

// ---- grids ----------------------------------------------------------------------------------------------------------

__global__ void gradient_grids_kernel(const GradientGridsArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.groups) return;
  const float *mins = a.min + i * a.group_stride, *maxs = a.max + i * a.group_stride;
  float min = *mins, max = *maxs;
  for (int64_t split = 1; split < a.splits; ++split) {
    min = ptx::min_nan(min, mins[split * a.split_stride]);
    max = ptx::max_nan(max, maxs[split * a.split_stride]);
  }
  const Grid grid = make_grid(min, max, a.bits, a.preserve_zero);
  a.scale[i] = grid.scale;
  a.offset[i] = grid.offset;
}

// One thread block per group.
__global__ void folded_grids_kernel(const GradientGridsArgs a) {
  __shared__ float mins[kThreads / 32], maxs[kThreads / 32];
  const int64_t i = blockIdx.x;
  const float *all_mins = a.min + i * a.group_stride, *all_maxs = a.max + i * a.group_stride;
  float min = *all_mins, max = *all_maxs;
  for (int64_t split = threadIdx.x; split < a.splits; split += kThreads) {
    min = ptx::min_nan(min, all_mins[split * a.split_stride]);
    max = ptx::max_nan(max, all_maxs[split * a.split_stride]);
  }
  warp_extremes(min, max);
  if (threadIdx.x % 32 == 0) {
    mins[threadIdx.x / 32] = min;
    maxs[threadIdx.x / 32] = max;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kThreads / 32; ++w) {
    min = ptx::min_nan(min, mins[w]);
    max = ptx::max_nan(max, maxs[w]);
  }
  const Grid grid = make_grid(min, max, a.bits, a.preserve_zero);
  a.scale[i] = grid.scale;
  a.offset[i] = grid.offset;
}

__global__ void ordering_ranges_kernel(const OrderingRangesArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.rows) return;
  float min = a.partial_min[i * a.splits], max = a.partial_max[i * a.splits];
  for (int64_t split = 1; split < a.splits; ++split) {
    min = ptx::min_nan(min, a.partial_min[i * a.splits + split]);
    max = ptx::max_nan(max, a.partial_max[i * a.splits + split]);
  }
  a.min[i] = min;
  a.max[i] = max;
  a.range[i] = ordering_range(min, max);
}

// ---- items: consecutive elements of a row ---------------------------------------------------------------------------

// kAligned: rows hold whole items, on 16-byte boundaries. `left` elements of the row remain from the item's first on;
// past them the first is repeated.
template <bool kAligned, typename T>
__device__ __forceinline__ Pack<T, kItem> load_item(const T* __restrict__ x, int64_t left) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const Pack<T, kItem>*>(x);
  } else {
    Pack<T, kItem> item;
#pragma unroll
    for (int j = 0; j < kItem; ++j) item.value[j] = x[j < left ? j : 0];
    return item;
  }
}

// Widens [min, max] to hold an item. The 16-bit types are compared two at a time.
template <typename T>
__device__ __forceinline__ void widen(const Pack<T, kItem>& item, float& min, float& max) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int j = 0; j < kItem; ++j) {
      min = ptx::min_nan(min, item.value[j]);
      max = ptx::max_nan(max, item.value[j]);
    }
  } else {
    using Pair = std::conditional_t<std::is_same_v<T, BFloat16>, __nv_bfloat162, __half2>;
    const auto* pairs = reinterpret_cast<const Pair*>(item.value);
    Pair low = pairs[0], high = pairs[0];
#pragma unroll
    for (int j = 1; j < kItem / 2; ++j) {
      low = __hmin2_nan(low, pairs[j]);
      high = __hmax2_nan(high, pairs[j]);
    }
    min = ptx::min_nan(min, ptx::min_nan(static_cast<float>(low.x), static_cast<float>(low.y)));
    max = ptx::max_nan(max, ptx::max_nan(static_cast<float>(high.x), static_cast<float>(high.y)));
  }
}

template <bool kAligned, typename T>
__device__ __forceinline__ void store_item(T* __restrict__ y, int64_t left, const float (&values)[kItem]) {
  if constexpr (kAligned) {
    *reinterpret_cast<Pack<T, kItem>*>(y) = pack<T>(values);
  } else {
#pragma unroll
    for (int j = 0; j < kItem; ++j)
      if (j < left) y[j] = from_float<T>(values[j]);
  }
}

template <bool kAligned>
__device__ __forceinline__ void store_codes(int8_t* __restrict__ codes, int64_t left, const float (&values)[kItem]) {
  Pack<int8_t, kItem> pack;
#pragma unroll
  for (int j = 0; j < kItem; ++j) pack.value[j] = static_cast<int8_t>(static_cast<int>(values[j]));
  if constexpr (kAligned) {
    *reinterpret_cast<Pack<int8_t, kItem>*>(codes) = pack;
  } else {
#pragma unroll
    for (int j = 0; j < kItem; ++j)
      if (j < left) codes[j] = pack.value[j];
  }
}

// Where one launch's results go, and how it rounds: to values, or (kCodes) to codes.
template <typename T, bool kCodes>
struct Rounding {
  std::conditional_t<kCodes, int8_t, T>* __restrict__ results;
  float half;
  bool stochastic;

  // grids: the grid and the inverse scale of element j.
  template <bool kAligned, typename Grids>
  __device__ __forceinline__ void item(const float (&values)[kItem], int64_t at, int64_t left, const PhiloxKey& key,
                                       uint64_t index, const Grids& grids) const {
    float uniform[kItem];
#pragma unroll
    for (int j = 0; j < kItem; ++j) uniform[j] = 0.5f;
    if (stochastic) {
      const Philox4 block = key.block(index);
#pragma unroll
      for (int j = 0; j < kItem; ++j) uniform[j] = philox_uniform16(block, j);
    }
    float rounded[kItem];
#pragma unroll
    for (int j = 0; j < kItem; ++j) {
      const Rounded result = round_to_grid<std::conditional_t<kCodes, float, T>>(values[j], grids.grid(j),
                                                                                 grids.inverse(j), half, uniform[j]);
      rounded[j] = kCodes ? result.code : result.value;
    }
    if constexpr (kCodes)
      store_codes<kAligned>(results + at, left, rounded);
    else
      store_item<kAligned>(results + at, left, rounded);
  }
};

struct SameGrid {
  Grid value;
  float inv_scale;
  __device__ __forceinline__ Grid grid(int) const { return value; }
  __device__ __forceinline__ float inverse(int) const { return inv_scale; }
};

// Of the columns from `column` on.
struct ItemGrids {
  Grid value[kItem];
  float inv_scale[kItem];

  __device__ __forceinline__ ItemGrids(const float* __restrict__ scale, const float* __restrict__ offset,
                                       int64_t column, int64_t columns) {
#pragma unroll
    for (int j = 0; j < kItem; ++j) {
      const int64_t k = column + j < columns ? column + j : column;
      value[j] = Grid{scale[k], offset[k]};
      inv_scale[j] = 1.0f / scale[k];
    }
  }

  __device__ __forceinline__ Grid grid(int j) const { return value[j]; }
  __device__ __forceinline__ float inverse(int j) const { return inv_scale[j]; }
};

template <typename T, bool kCodes, GridAxis kAxis, bool kAligned, typename Index>
__global__ void __launch_bounds__(kThreads)
    round_gradient_kernel(const T* __restrict__ x,           // [rows, columns]
                          const float* __restrict__ scale,   // [1], [rows] or [columns]
                          const float* __restrict__ offset,  // likewise
                          int64_t columns, Index items, typename DivisorFor<Index>::type items_per_row,
                          Rounding<T, kCodes> rounding, PhiloxState philox) {
  const PhiloxKey key(philox);
  const Index item = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= items) return;
  const Index row = items_per_row.divide(item);
  const int64_t column = static_cast<int64_t>(item - row * static_cast<Index>(items_per_row.divisor)) * kItem;
  const int64_t at = static_cast<int64_t>(row) * columns + column;
  float values[kItem];
  unpack(load_item<kAligned>(x + at, columns - column), values);
  if constexpr (kAxis == GridAxis::kColumn) {
    rounding.template item<kAligned>(values, at, columns - column, key, item,
                                     ItemGrids(scale, offset, column, columns));
  } else {
    const int64_t k = kAxis == GridAxis::kRow ? static_cast<int64_t>(row) : 0;
    const SameGrid grid{Grid{scale[k], offset[k]}, 1.0f / scale[k]};
    rounding.template item<kAligned>(values, at, columns - column, key, item, grid);
  }
}

// ---- whole rows in registers ----------------------------------------------------------------------------------------

constexpr int kMaxRowThreads = 1024;
constexpr int kRowItems = 4;  // items of a thread, but for short rows

// A row for blockDim.x threads, kItems items each; blockDim.y rows per thread block, then of one warp each.
template <typename T, bool kCodes, int kItems, bool kAligned, bool kBoth>
__global__ void __launch_bounds__(kMaxRowThreads)
    round_rows_kernel(const T* __restrict__ x,     // [rows, columns]
                      float* __restrict__ scale,   // [rows]
                      float* __restrict__ offset,  // [rows]
                      int64_t rows, int64_t columns, int bits, bool preserve_zero, Rounding<T, kCodes> rounding,
                      PhiloxState philox, const float* __restrict__ column_scale,  // [columns]
                      const float* __restrict__ column_offset,                     // [columns]
                      Rounding<T, false> column_rounding, PhiloxState column_philox) {
  const PhiloxKey key(philox), column_key(kBoth ? column_philox : philox);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool one_warp = blockDim.x == 32;
  if (one_warp && row >= rows) return;
  Pack<T, kItem> items[kItems];
  float min = INFINITY, max = -INFINITY;
#pragma unroll
  for (int u = 0; u < kItems; ++u) {
    const int64_t column = (static_cast<int64_t>(u) * blockDim.x + threadIdx.x) * kItem;
    if (column < columns) {
      items[u] = load_item<kAligned>(x + row * columns + column, columns - column);
      widen(items[u], min, max);
    }
  }
  warp_extremes(min, max);
  if (!one_warp) {
    __shared__ float mins[32], maxs[32];
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) {
      mins[warp] = min;
      maxs[warp] = max;
    }
    __syncthreads();
    const int lane = threadIdx.x % 32 < blockDim.x / 32 ? threadIdx.x % 32 : 0;
    min = mins[lane];
    max = maxs[lane];
    warp_extremes(min, max);
  }
  const Grid grid = make_grid(min, max, bits, preserve_zero);
  if (threadIdx.x == 0) {
    scale[row] = grid.scale;
    offset[row] = grid.offset;
  }
  const SameGrid same{grid, 1.0f / grid.scale};
  const uint64_t first_index = static_cast<uint64_t>(row * philox_blocks_per_row(columns));
#pragma unroll
  for (int u = 0; u < kItems; ++u) {
    const int64_t item = static_cast<int64_t>(u) * blockDim.x + threadIdx.x, column = item * kItem;
    if (column < columns) {
      float values[kItem];
      unpack(items[u], values);
      rounding.template item<kAligned>(values, row * columns + column, columns - column, key,
                                       first_index + static_cast<uint64_t>(item), same);
      if constexpr (kBoth)
        column_rounding.template item<kAligned>(values, row * columns + column, columns - column, column_key,
                                                first_index + static_cast<uint64_t>(item),
                                                ItemGrids(column_scale, column_offset, column, columns));
    }
  }
}

template <typename T>
bool items_aligned(const void* x, const void* y, const void* codes, int64_t columns) {
  return columns % kItem == 0 && is_aligned(x) && is_aligned(y) && is_aligned(codes);
}

template <typename T, bool kCodes, typename Args>
Rounding<T, kCodes> rounding_of(const Args& a) {
  if constexpr (kCodes)
    return {a.codes, half_codes(a.bits), a.stochastic};
  else
    return {static_cast<T*>(a.y), half_codes(a.bits), a.stochastic};
}

template <typename F>
void dispatch_axis(GridAxis axis, const F& f) {
  if (axis == GridAxis::kColumn) return f(std::integral_constant<GridAxis, GridAxis::kColumn>{});
  if (axis == GridAxis::kRow) return f(std::integral_constant<GridAxis, GridAxis::kRow>{});
  f(std::integral_constant<GridAxis, GridAxis::kTensor>{});
}

}  // namespace

int gradient_grids(const GradientGridsArgs& a, void* stream) {
  if (a.splits >= kManySplits)
    folded_grids_kernel<<<static_cast<unsigned>(a.groups), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  else
    gradient_grids_kernel<<<static_cast<unsigned>(ceil_div(a.groups, kThreads)), kThreads, 0,
                            static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

int ordering_ranges(const OrderingRangesArgs& a, void* stream) {
  ordering_ranges_kernel<<<static_cast<unsigned>(ceil_div(a.rows, kThreads)), kThreads, 0,
                           static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

int round_gradient(const RoundGradientArgs& a, void* stream) {
  const int64_t items_per_row = philox_blocks_per_row(a.columns), items = a.rows * items_per_row;
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto launch = [&](auto codes, auto axis, auto aligned, auto index) {
      using Index = decltype(index);
      using Divisor = typename DivisorFor<Index>::type;
      round_gradient_kernel<T, codes.value, axis.value, aligned.value, Index>
          <<<static_cast<unsigned>(ceil_div(items, kThreads)), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
              static_cast<const T*>(a.x), a.scale, a.offset, a.columns, static_cast<Index>(items),
              Divisor(static_cast<Index>(items_per_row)), rounding_of<T, codes.value>(a), a.philox);
    };
    dispatch_axis(a.axis, [&](auto axis) {
      dispatch_bool(a.codes != nullptr, [&](auto codes) {
        dispatch_bool(items_aligned<T>(a.x, a.y, a.codes, a.columns), [&](auto aligned) {
          if (items < (int64_t{1} << 31) - kThreads)
            launch(codes, axis, aligned, uint32_t{});
          else
            launch(codes, axis, aligned, uint64_t{});
        });
      });
    });
  });
  return cudaGetLastError();
}

int round_rows(const RoundRowsArgs& a, void* stream) {
  const int64_t items = philox_blocks_per_row(a.columns);
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto launch = [&](auto codes, auto items_per_thread, auto aligned, auto both) {
      const auto wide = static_cast<unsigned>(ceil_div(ceil_div(items, items_per_thread.value), 32) * 32);
      const dim3 threads(wide, wide == 32 ? 8 : 1);
      round_rows_kernel<T, codes.value, items_per_thread.value, aligned.value, both.value>
          <<<static_cast<unsigned>(ceil_div(a.rows, threads.y)), threads, 0, static_cast<cudaStream_t>(stream)>>>(
              static_cast<const T*>(a.x), a.scale, a.offset, a.rows, a.columns, a.bits, a.preserve_zero,
              rounding_of<T, codes.value>(a), a.philox, a.column_scale, a.column_offset,
              Rounding<T, false>{static_cast<T*>(a.column_y), half_codes(a.column_y ? a.column_bits : 8), a.stochastic},
              a.column_philox);
    };
    const auto dispatch_items = [&](auto codes, auto aligned, auto both) {
      if (items <= 64)
        launch(codes, std::integral_constant<int, 1>{}, aligned, both);
      else
        launch(codes, std::integral_constant<int, kRowItems>{}, aligned, both);
    };
    dispatch_bool(items_aligned<T>(a.x, a.y, a.codes, a.columns) && is_aligned(a.column_y), [&](auto aligned) {
      if (a.codes)
        dispatch_items(std::true_type{}, aligned, std::false_type{});
      else if (a.column_y)
        dispatch_items(std::false_type{}, aligned, std::true_type{});
      else
        dispatch_items(std::false_type{}, aligned, std::false_type{});
    });
  });
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
