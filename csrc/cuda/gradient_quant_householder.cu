#include <algorithm>
#include <type_traits>

#include "csrc/cuda/gradient_quant.cuh"
#include "csrc/cuda/gradient_quant.h"

// Block Householder. A thread block keeps a tile on chip: the rows of one block of rows by kThreads 32-bit words. A thread owns the
// columns of one word and walks the rows in the order of positions, so that its sums are those of the CPU.

namespace quantrain::cuda {
namespace {

constexpr int kThreads = 128;  // the words of a tile's row
constexpr int kWarps = kThreads / 32;
constexpr int kPlanThreads = static_cast<int>(kMaxGroup);

// ---- the plan --------------------------------------------------------------------------------------------------------------

// One thread block a block of rows; csrc/cpu/gradient_quant.cpp has the same steps one after the other.
__global__ void __launch_bounds__(kPlanThreads) plan_reflectors_kernel(const PlanReflectorsArgs a) {
  __shared__ float range[kPlanThreads];
  __shared__ double sum[kPlanThreads];  // of the largest i + 1 ranges
  __shared__ int upto[kPlanThreads];    // small rows that leaders 0 to i take
  __shared__ int leaders;
  const int64_t block = blockIdx.x, first = a.blocks.first(block);
  const int rows = static_cast<int>(a.blocks.size(block)), i = static_cast<int>(threadIdx.x);
  int64_t row = 0;
  bool zero_row = false;
  if (i < rows) {
    row = a.by_range[a.blocks.rank(block, i)];
    range[i] = ordering_range(a.min[row], a.max[row]);
    zero_row = a.min[row] == 0.0f && a.max[row] == 0.0f;
  }
  __syncthreads();
  if (i == 0) {
    leaders = 1;
    double total = 0.0;
    for (int j = 0; j < rows; ++j) sum[j] = total += static_cast<double>(range[j]);
  }
  __syncthreads();
  if (i + 1 < rows && static_cast<double>(rows - i - 1) * static_cast<double>(range[i]) > sum[i])
    atomicMax(&leaders, i + 1);
  __syncthreads();
  const int small = rows - leaders;
  if (i < leaders && i < rows) upto[i] = static_cast<int>(small_rows_upto(i, leaders, small, sum[i], sum[leaders - 1]));
  __syncthreads();
  if (i >= rows) return;
  int64_t position = i;
  Reflector reflector = make_reflector(1, true, 0.0f, 0.0f, zero_row);
  if (rows >= 3) {
    int group = i;
    if (i >= leaders) {  // the first leader whose small rows reach past this one
      int low = 0, high = leaders - 1;
      while (low < high) {
        const int middle = (low + high) / 2;
        if (upto[middle] > i - leaders)
          high = middle;
        else
          low = middle + 1;
      }
      group = low;
    }
    const int taken = group > 0 ? upto[group - 1] : 0, k = 1 + upto[group] - taken;
    position = i < leaders ? i + taken : group + 1 + i - leaders;
    reflector = make_reflector(k, i < leaders, range[group], k > 1 ? range[leaders + taken] : 0.0f, zero_row);
  }
  a.order[first + position] = static_cast<int32_t>(row);
  a.reflector[first + position] = reflector;
}

// ---- tiles -----------------------------------------------------------------------------------------------------------------

// The columns of one 32-bit word.
template <typename T>
struct Word {
  static constexpr int kColumns = static_cast<int>(sizeof(uint32_t) / sizeof(T));
  static constexpr int kTile = kThreads * kColumns;  // columns of a tile

  __device__ static __forceinline__ void unpack(uint32_t word, float (&values)[kColumns]) {
    if constexpr (kColumns == 1) {
      values[0] = __uint_as_float(word);
    } else {
      values[0] = to_float(T{static_cast<uint16_t>(word & 0xffffu)});
      values[1] = to_float(T{static_cast<uint16_t>(word >> 16)});
    }
  }
};

// What a row needs on its way through a tile.
struct RowParams {
  Reflector reflector;
  float scale;
  float offset;
  float inv_scale;
  int32_t row;
};

struct Span {
  int64_t first;  // position
  int rows;
  int64_t begin, end;  // columns

  template <typename T>
  __device__ static __forceinline__ Span of(const RowBlocks& blocks, int64_t columns, int64_t splits) {
    const int64_t block = blockIdx.x, split = blockIdx.y, tiles = (columns + Word<T>::kTile - 1) / Word<T>::kTile;
    Span span;
    span.first = blocks.first(block);
    span.rows = static_cast<int>(blocks.size(block));
    span.begin = tiles * split / splits * Word<T>::kTile;
    span.end = tiles * (split + 1) / splits * Word<T>::kTile;
    span.end = span.end < columns ? span.end : columns;
    return span;
  }
};

// 16 bytes from global to shared memory, past the registers.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Columns past the last are zero. kAligned: rows begin on 16-byte boundaries and hold whole 16 bytes.
template <typename T, bool kAligned>
__device__ __forceinline__ void load_tile(uint32_t* tile,           // [rows, kThreads]
                                          const T* __restrict__ x,  // [N, columns]
                                          const RowParams* params,  // [rows]
                                          int rows, int64_t columns, int64_t at) {
  if constexpr (kAligned) {
    constexpr int kChunk = kVectorBytes / static_cast<int>(sizeof(T));  // columns of 16 bytes
    const int chunk = threadIdx.x % 32;
    const int64_t column = at + chunk * kChunk;
    for (int p = threadIdx.x / 32; p < rows; p += kWarps) {
      uint32_t* to = tile + p * kThreads + chunk * 4;
      if (column < columns)
        copy_async(to, x + params[p].row * columns + column);
      else
        *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
    }
    wait_copies();
  } else {
    const int64_t column = at + threadIdx.x * Word<T>::kColumns;
    for (int p = 0; p < rows; ++p) {
      const T* from = x + params[p].row * columns + column;
      uint32_t word = 0;
#pragma unroll
      for (int c = 0; c < Word<T>::kColumns; ++c)
        if (column + c < columns) {
          if constexpr (Word<T>::kColumns == 1)
            word = __float_as_uint(to_float(from[c]));
          else
            word |= static_cast<uint32_t>(from[c].bits) << (16 * c);
        }
      tile[p * kThreads + threadIdx.x] = word;
    }
  }
  __syncthreads();
}

// sum_q n_q s_q x_q of the thread's columns over the group [begin, end).
template <typename T>
__device__ __forceinline__ void sum_group(const uint32_t* tile, const RowParams* params, int begin, int end,
                                          float (&sum)[Word<T>::kColumns]) {
#pragma unroll
  for (int c = 0; c < Word<T>::kColumns; ++c) sum[c] = 0.0f;
#pragma unroll 4
  for (int q = begin; q < end; ++q) {
    const float s = params[q].reflector.s, n = params[q].reflector.n;
    float values[Word<T>::kColumns];
    Word<T>::unpack(tile[q * kThreads + threadIdx.x], values);
#pragma unroll
    for (int c = 0; c < Word<T>::kColumns; ++c) sum[c] += n * (values[c] * s);
  }
}

__device__ __forceinline__ int group_end_of(const RowParams* params, int p, int rows) {
  if (!(params[p].reflector.n < 0.0f)) return p + 1;
  int last = p + 1;
  while (last < rows && params[last].reflector.n > 0.0f) ++last;
  return last;
}

// Floats in the order of unsigned integers; NaN lies outside the infinities.
__device__ __forceinline__ uint32_t to_ordered(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ float from_ordered(uint32_t ordered) {
  return __uint_as_float(ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered);
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) reflected_ranges_kernel(const ReflectedRangesArgs a) {
  extern __shared__ uint4 shared[];
  const Span span = Span::of<T>(a.blocks, a.columns, a.splits);
  const int rows = span.rows, warp = threadIdx.x / 32;
  auto* tile = reinterpret_cast<uint32_t*>(shared);                     // [rows, kThreads]
  auto* params = reinterpret_cast<RowParams*>(tile + rows * kThreads);  // [rows]
  auto* low = reinterpret_cast<uint32_t*>(params + rows);               // [kWarps, rows]
  uint32_t* high = low + kWarps * rows;                                 // [kWarps, rows]
  for (int p = threadIdx.x; p < rows; p += kThreads) {
    params[p].reflector = a.reflector[span.first + p];
    params[p].row = a.order[span.first + p];
  }
  for (int i = threadIdx.x; i < kWarps * rows; i += kThreads) {
    low[i] = to_ordered(INFINITY);
    high[i] = to_ordered(-INFINITY);
  }
  for (int64_t at = span.begin; at < span.end; at += Word<T>::kTile) {
    __syncthreads();
    load_tile<T, kAligned>(tile, static_cast<const T*>(a.x), params, rows, a.columns, at);
    const int64_t column = at + threadIdx.x * Word<T>::kColumns;
    for (int p = 0; p < rows;) {
      const int end = group_end_of(params, p, rows);
      float sum[Word<T>::kColumns];
      sum_group<T>(tile, params, p, end, sum);
#pragma unroll 4
      for (int q = p; q < end; ++q) {
        const float s = params[q].reflector.s, m = params[q].reflector.m;
        float values[Word<T>::kColumns];
        Word<T>::unpack(tile[q * kThreads + threadIdx.x], values);
        uint32_t least = 0xffffffffu, most = 0;
#pragma unroll
        for (int c = 0; c < Word<T>::kColumns; ++c) {
          const uint32_t ordered = to_ordered(values[c] * s - m * sum[c]);
          if (column + c < a.columns) {
            least = ordered < least ? ordered : least;
            most = ordered > most ? ordered : most;
          }
        }
        least = __reduce_min_sync(0xffffffffu, least);
        most = __reduce_max_sync(0xffffffffu, most);
        if (threadIdx.x % 32 == 0) {
          const int i = warp * rows + q;
          low[i] = least < low[i] ? least : low[i];
          high[i] = most > high[i] ? most : high[i];
        }
      }
      p = end;
    }
  }
  __syncthreads();
  for (int p = threadIdx.x; p < rows; p += kThreads) {
    uint32_t least = low[p], most = high[p];
    for (int w = 1; w < kWarps; ++w) {
      least = min(least, low[w * rows + p]);
      most = max(most, high[w * rows + p]);
    }
    const int64_t to = static_cast<int64_t>(blockIdx.y) * a.blocks.rows + params[p].row;
    a.partial_min[to] = from_ordered(least);
    a.partial_max[to] = from_ordered(most);
  }
}

// The numbers of kRows rows of a warp's columns, made at once: a Philox block a lane.
template <typename T>
struct WarpNumbers {
  static constexpr int kBlocks = 32 * Word<T>::kColumns / kPhiloxElements;  // of a row
  static constexpr int kRows = 32 / kBlocks;

  uint16_t* numbers;  // [kRows, 32 * kColumns]

  // For the rows from p on, p a multiple of kRows. `first_block`: the block of the warp's first column.
  __device__ __forceinline__ void refill(const RowParams* params, int p, int rows, int64_t blocks_per_row,
                                         uint64_t first_block, const PhiloxKey& key) {
    const int lane = threadIdx.x % 32, position = p + lane / kBlocks;
    __syncwarp();
    if (position < rows) {
      const uint64_t row = static_cast<uint64_t>(params[position].row);
      const Philox4 block =
          key.block(row * static_cast<uint64_t>(blocks_per_row) + first_block + static_cast<uint64_t>(lane % kBlocks));
      reinterpret_cast<uint4*>(numbers)[lane] = make_uint4(block.word[0], block.word[1], block.word[2], block.word[3]);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void read(int p, uint32_t (&random)[Word<T>::kColumns]) const {
    const int at = p % kRows * 32 + threadIdx.x % 32;
    if constexpr (Word<T>::kColumns == 1) {
      random[0] = numbers[at];
    } else {
      const uint32_t pair = reinterpret_cast<const uint32_t*>(numbers)[at];
      random[0] = pair & 0xffffu;
      random[1] = pair >> 16;
    }
  }
};

// A rounded value of T x, kept in the word that its element came from: float32 as it is, else as codes.
template <typename T>
__device__ __forceinline__ uint32_t keep_rounded(const Rounded (&rounded)[Word<T>::kColumns]) {
  if constexpr (Word<T>::kColumns == 1)
    return __float_as_uint(rounded[0].value);
  else
    return (static_cast<uint32_t>(static_cast<int>(rounded[0].code)) & 0xffffu) |
           static_cast<uint32_t>(static_cast<int>(rounded[1].code)) << 16;
}

template <typename T>
__device__ __forceinline__ void kept_values(uint32_t word, const RowParams& row, float (&values)[Word<T>::kColumns]) {
  if constexpr (Word<T>::kColumns == 1) {
    values[0] = __uint_as_float(word);
  } else {
    values[0] = static_cast<float>(static_cast<int16_t>(word & 0xffffu)) * row.scale + row.offset;
    values[1] = static_cast<float>(static_cast<int16_t>(word >> 16)) * row.scale + row.offset;
  }
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) round_reflected_kernel(const RoundReflectedArgs a) {
  constexpr int kColumns = Word<T>::kColumns;
  extern __shared__ uint4 shared[];
  __shared__ uint4 number_storage[2][kWarps][32];
  const Span span = Span::of<T>(a.blocks, a.columns, a.splits);
  const int rows = span.rows, warp = threadIdx.x / 32;
  auto* tile = reinterpret_cast<uint32_t*>(shared);                     // [rows, kThreads]
  auto* params = reinterpret_cast<RowParams*>(tile + rows * kThreads);  // [rows]
  for (int p = threadIdx.x; p < rows; p += kThreads) {
    const int32_t row = a.order[span.first + p];
    params[p] = RowParams{a.reflector[span.first + p], a.scale[row], a.offset[row], 1.0f / a.scale[row], row};
  }
  const PhiloxKey key(a.philox);
  const float half = half_codes(a.bits);
  const int64_t blocks_per_row = philox_blocks_per_row(a.columns);
  WarpNumbers<T> first_numbers{reinterpret_cast<uint16_t*>(number_storage[0][warp])};
  WarpNumbers<T> second_numbers{reinterpret_cast<uint16_t*>(number_storage[1][warp])};
  for (int64_t at = span.begin; at < span.end; at += Word<T>::kTile) {
    __syncthreads();
    load_tile<T, kAligned>(tile, static_cast<const T*>(a.x), params, rows, a.columns, at);
    const int64_t column = at + threadIdx.x * kColumns;
    const auto first_block = static_cast<uint64_t>((at + warp * 32 * kColumns) / kPhiloxElements);
    for (int p = 0; p < rows;) {
      const int end = group_end_of(params, p, rows);
      float sum[kColumns], back[kColumns];
      sum_group<T>(tile, params, p, end, sum);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) back[c] = 0.0f;
#pragma unroll 2
      for (int q = p; q < end; ++q) {
        if (a.stochastic && q % WarpNumbers<T>::kRows == 0)
          first_numbers.refill(params, q, rows, blocks_per_row, first_block, key);
        const RowParams row = params[q];
        uint32_t random[kColumns];
        first_numbers.read(q, random);
        float values[kColumns];
        Word<T>::unpack(tile[q * kThreads + threadIdx.x], values);
        Rounded rounded[kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const float y = values[c] * row.reflector.s - row.reflector.m * sum[c];
          const float uniform = a.stochastic ? uniform16(random[c]) : 0.5f;
          rounded[c] = round_to_grid<float>(y, Grid{row.scale, row.offset}, row.inv_scale, half, uniform);
          back[c] += row.reflector.n * rounded[c].value;
        }
        if (a.codes) {
#pragma unroll
          for (int c = 0; c < kColumns; ++c)
            if (column + c < a.columns)
              a.codes[row.row * a.columns + column + c] = static_cast<int8_t>(static_cast<int>(rounded[c].code));
        } else {
          tile[q * kThreads + threadIdx.x] = keep_rounded<T>(rounded);
        }
      }
      if (!a.codes) {
#pragma unroll 2
        for (int q = p; q < end; ++q) {
          uint32_t random[kColumns] = {};
          if constexpr (kColumns > 1) {
            if (a.stochastic && q % WarpNumbers<T>::kRows == 0)
              second_numbers.refill(params, q, rows, blocks_per_row, kSecondRounding + first_block, key);
            second_numbers.read(q, random);
          }
          const RowParams row = params[q];
          float values[kColumns];
          kept_values<T>(tile[q * kThreads + threadIdx.x], row, values);
          T results[kColumns];
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            const float result = (values[c] - row.reflector.m * back[c]) * row.reflector.t;
            results[c] = a.stochastic ? round_to_type<T>(result, random[c]) : from_float<T>(result);
          }
          T* to = static_cast<T*>(a.y) + row.row * a.columns + column;
          if constexpr (kAligned) {
            if (column < a.columns)
              *reinterpret_cast<Pack<T, kColumns>*>(to) = *reinterpret_cast<Pack<T, kColumns>*>(results);
          } else {
#pragma unroll
            for (int c = 0; c < kColumns; ++c)
              if (column + c < a.columns) to[c] = results[c];
          }
        }
      }
      p = end;
    }
  }
}

// ---- T x and T^-1 x --------------------------------------------------------------------------------------------------------

constexpr int kReflectPositions = 64;  // a thread block takes the groups that begin among so many positions

__global__ void __launch_bounds__(kThreads) reflect_rows_kernel(const ReflectRowsArgs a) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= a.columns) return;
  const int64_t stop = min(a.rows, (static_cast<int64_t>(blockIdx.y) + 1) * kReflectPositions);
  for (int64_t p = static_cast<int64_t>(blockIdx.y) * kReflectPositions; p < stop;) {
    if (a.reflector[p].n > 0.0f) {  // in the middle of a group
      ++p;
      continue;
    }
    const int64_t end = group_end(a.reflector, p, min(a.rows, p + kMaxGroup));
    float sum = 0.0f;
    for (int64_t q = p; q < end; ++q) {
      const float s = a.inverse ? 1.0f : a.reflector[q].s;
      sum += a.reflector[q].n * (a.x[a.order[q] * a.columns + column] * s);
    }
    for (int64_t q = p; q < end; ++q) {
      const float s = a.inverse ? 1.0f : a.reflector[q].s, t = a.inverse ? a.reflector[q].t : 1.0f;
      const int64_t at = a.order[q] * a.columns + column;
      a.y[at] = (a.x[at] * s - a.reflector[q].m * sum) * t;
    }
    p = end;
  }
}

// ---- launches --------------------------------------------------------------------------------------------------------------

template <typename T>
bool rows_aligned(const void* x, const void* y, int64_t columns) {
  return columns * static_cast<int64_t>(sizeof(T)) % kVectorBytes == 0 && is_aligned(x) && is_aligned(y);
}

// Shared memory above 48 KiB must be asked for; the call is cheap and safe under capture.
template <typename Args>
int launch_tiles(void (*kernel)(Args), const Args& a, size_t bytes_per_row, void* stream) {
  const auto bytes = static_cast<size_t>(a.blocks.size(0)) * bytes_per_row;
  const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(a.blocks.blocks), static_cast<unsigned>(a.splits));
  kernel<<<grid, kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

}  // namespace

int plan_reflectors(const PlanReflectorsArgs& a, void* stream) {
  plan_reflectors_kernel<<<static_cast<unsigned>(a.blocks.blocks), kPlanThreads, 0,
                           static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

int reflected_ranges(const ReflectedRangesArgs& a, void* stream) {
  constexpr size_t kBytes = kThreads * sizeof(uint32_t) + sizeof(RowParams) + 2 * kWarps * sizeof(uint32_t);
  int error = cudaSuccess;
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    error = rows_aligned<T>(a.x, nullptr, a.columns)
                ? launch_tiles(&reflected_ranges_kernel<T, true>, a, kBytes, stream)
                : launch_tiles(&reflected_ranges_kernel<T, false>, a, kBytes, stream);
  });
  return error;
}

int round_reflected(const RoundReflectedArgs& a, void* stream) {
  constexpr size_t kBytes = kThreads * sizeof(uint32_t) + sizeof(RowParams);
  int error = cudaSuccess;
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    error = rows_aligned<T>(a.x, a.y, a.columns) ? launch_tiles(&round_reflected_kernel<T, true>, a, kBytes, stream)
                                                 : launch_tiles(&round_reflected_kernel<T, false>, a, kBytes, stream);
  });
  return error;
}

int reflect_rows(const ReflectRowsArgs& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(a.columns, kThreads)),
                  static_cast<unsigned>(ceil_div(a.rows, kReflectPositions)));
  reflect_rows_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
