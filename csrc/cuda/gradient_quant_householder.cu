#include <algorithm>
#include <type_traits>

#include "csrc/common/gradient_quant.h"
#include "csrc/cuda/common.cuh"
#include "csrc/cuda/device.h"
#include "csrc/cuda/gradient_quant.h"
#include "csrc/cuda/ptx.cuh"

// Block Householder. A thread block keeps a tile on chip: the rows of one block of rows, and some columns. Sums over a
// group go down the rows, one thread per column, in the order of positions, as on the CPU; everything else goes along
// rows, one thread per row, whose parameters then stay in registers and whose random numbers come from one Philox block
// for eight elements.

namespace quantrain::cuda {
namespace {

constexpr int kThreads = 256;
static_assert(kThreads >= kMaxGroup);  // one thread per row
constexpr int kPlanThreads = static_cast<int>(kMaxGroup);

// ---- the plan -------------------------------------------------------------------------------------------------------

// One thread block per block of rows; csrc/cpu/gradient_quant.cpp has the same steps one after the other.
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

// ---- tiles ----------------------------------------------------------------------------------------------------------

constexpr int kWide = 128;   // columns of a tile
constexpr int kNarrow = 32;  // where a device has less shared memory, or rows are many

// A row of a tile is padded by 16 bytes: threads that read 16 bytes each of 32 different rows then meet no bank
// conflict.
template <typename T, int kColumns>
struct TileShape {
  static constexpr int kChunk = kVectorBytes / static_cast<int>(sizeof(T));  // elements of 16 bytes
  static constexpr int kStride = kColumns + kChunk;                          // of a row, in elements
  static constexpr int kSumStride = kColumns + 4;                            // of a group's sums, in floats
  static constexpr int kWord = 8 / static_cast<int>(sizeof(T));              // columns of a thread that walks down rows
  static constexpr int kWords = kColumns / kWord;                            // threads that share the columns
  static constexpr int kParts = kThreads / kWords;                           // and the groups
};

// What a row needs on its way through a tile, in two readings of 16 bytes.
struct alignas(16) RowParams {
  float s, n;
  int32_t
      // of its group's sums, times 2; odd for the last row of a group. Rows on their own share slot 0, which stays zero
      slot;
  int32_t row;
  float m, t;
  Grid grid;
};
static_assert(sizeof(RowParams) == 32);

// Shared memory: the tile, the sums of its groups (slot 0 and at most one for two rows) and the rows' parameters.
template <typename T, int kColumns>
struct Shared {
  using Shape = TileShape<T, kColumns>;
  T* tile;            // [rows, kStride]
  int* parts;         // [kParts + 1]: where each part of the threads begins, always at a group
  float* sums;        // [rows / 2 + 1, kSumStride]
  RowParams* params;  // [rows]

  static constexpr int64_t bytes(int64_t rows) {
    return rows * (Shape::kStride * static_cast<int64_t>(sizeof(T)) + static_cast<int64_t>(sizeof(RowParams))) +
           (rows / 2 + 1) * Shape::kSumStride * static_cast<int64_t>(sizeof(float));
  }

  __device__ __forceinline__ Shared(uint4* memory, int rows) {
    params = reinterpret_cast<RowParams*>(memory);
    sums = reinterpret_cast<float*>(params + rows);
    tile = reinterpret_cast<T*>(sums + (rows / 2 + 1) * Shape::kSumStride);
  }

  // The parameters of a block's rows, at most kThreads of them. Ends with a barrier.
  __device__ __forceinline__ void load_params(const Reflector* reflector, const int32_t* order, const float* scale,
                                              const float* offset, int64_t first, int rows) {
    __shared__ int leaders[kThreads / 32];
    __shared__ int first_group[Shape::kParts + 1];
    parts = first_group;
    const int p = static_cast<int>(threadIdx.x), warp = p / 32;
    Reflector r{1.0f, 0.0f, 0.0f, 1.0f};
    if (p < rows) r = reflector[first + p];
    const uint32_t leads = __ballot_sync(0xffffffffu, r.n < 0.0f);
    if (p % 32 == 0) leaders[warp] = __popc(leads);
    if (p <= Shape::kParts) first_group[p] = p > 0 ? rows : 0;
    for (int i = p; i < Shape::kSumStride; i += kThreads) sums[i] = 0.0f;
    __syncthreads();
    if (p < rows) {
      if (!(r.n > 0.0f))
        for (int part = 1; part < Shape::kParts; ++part)
          if (p * Shape::kParts >= part * rows) atomicMin(&first_group[part], p);
      int group = __popc(leads & (0xffffffffu >> (31 - p % 32)));
      for (int w = 0; w < warp; ++w) group += leaders[w];
      const bool last = p + 1 == rows || !(reflector[first + p + 1].n > 0.0f);
      const int32_t row = order[first + p];
      const Grid grid{scale ? scale[row] : 0.0f, offset ? offset[row] : 0.0f};
      params[p] = RowParams{r.s, r.n, r.n == 0.0f ? 0 : 2 * group + last, row, r.m, r.t, grid};
    }
    __syncthreads();
  }
};

struct Span {
  int64_t first;  // position
  int rows;
  int64_t begin, end;  // columns

  __device__ static __forceinline__ Span of(const RowBlocks& blocks, int64_t columns, int64_t splits, int tile) {
    const int64_t block = blockIdx.x, split = blockIdx.y, tiles = (columns + tile - 1) / tile;
    Span span;
    span.first = blocks.first(block);
    span.rows = static_cast<int>(blocks.size(block));
    span.begin = tiles * split / splits * tile;
    span.end = tiles * (split + 1) / splits * tile;
    span.end = span.end < columns ? span.end : columns;
    return span;
  }
};

// 16 bytes from global to shared memory, past the registers.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  ptx::cp_async_16(ptx::shared_address(shared), global);
}

// Columns past the last are zero. kAligned: rows begin on 16-byte boundaries and hold whole 16 bytes. Ends with a
// barrier.
template <typename T, int kColumns, bool kAligned>
__device__ __forceinline__ void load_tile(const Shared<T, kColumns>& shared, const T* __restrict__ x,  // [N, columns]
                                          int rows, int64_t columns, int64_t at) {
  using Shape = TileShape<T, kColumns>;
  constexpr int kStep = kAligned ? Shape::kChunk : 1, kPerRow = kColumns / kStep;
  for (int i = threadIdx.x; i < rows * kPerRow; i += kThreads) {
    const int p = i / kPerRow, j = i % kPerRow * kStep;
    T* to = shared.tile + p * Shape::kStride + j;
    const T* from = x + shared.params[p].row * columns + at + j;
    if constexpr (kAligned) {
      if (at + j < columns)
        copy_async(to, from);
      else
        *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
    } else {
      *to = at + j < columns ? *from : T{};
    }
  }
  if constexpr (kAligned) ptx::cp_async_wait_all();
  __syncthreads();
}

// A rounded value of T x, where its element was: float32 as it is, the other types as the code, which they hold
// exactly.
template <typename T>
__device__ __forceinline__ float kept_value(float kept, const RowParams& params) {
  return std::is_same_v<T, float> ? kept : grid_value(kept, params.grid);
}

// Down the rows, one thread per word: sum_q n_q s_q x_q of each group, or of what was kept sum_q n_q y_q. Threads left
// over take other groups. Ends with a barrier.
template <typename T, int kColumns, bool kKept>
__device__ __forceinline__ void sum_groups(const Shared<T, kColumns>& shared) {
  using Shape = TileShape<T, kColumns>;
  constexpr int kWord = Shape::kWord;
  constexpr int kBatch = 8;  // rows whose loads go together, before a store could hold them up
  const int part = static_cast<int>(threadIdx.x) / Shape::kWords;
  const int column = static_cast<int>(threadIdx.x) % Shape::kWords * kWord;
  float sum[kWord] = {};
  const int end = shared.parts[part + 1];
  for (int first = shared.parts[part]; first < end; first += kBatch) {
    Pack<T, kWord> word[kBatch];
    RowParams params[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int p = first + b < end ? first + b : end - 1;
      word[b] = *reinterpret_cast<const Pack<T, kWord>*>(shared.tile + p * Shape::kStride + column);
      params[b] = shared.params[p];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const RowParams& row = params[b];
      if (row.n < 0.0f) {
#pragma unroll
        for (int c = 0; c < kWord; ++c) sum[c] = 0.0f;
      }
#pragma unroll
      for (int c = 0; c < kWord; ++c) {
        const float value = to_float(word[b].value[c]);
        sum[c] += row.n * (kKept ? kept_value<T>(value, row) : value * row.s);
      }
      if (row.slot % 2 != 0 && first + b < end)
        *reinterpret_cast<Pack<float, kWord>*>(shared.sums + row.slot / 2 * Shape::kSumStride + column) =
            pack<float>(sum);
    }
  }
  __syncthreads();
}

// Consecutive elements of a row, and of its group's sums.
template <typename T, int kColumns, int kSize = kPhiloxElements>
struct RowItem {
  float value[kSize];
  float sum[kSize];

  __device__ __forceinline__ RowItem(const Shared<T, kColumns>& shared, int p, int slot, int column) {
    using Shape = TileShape<T, kColumns>;
    unpack(*reinterpret_cast<const Pack<T, kSize>*>(shared.tile + p * Shape::kStride + column), value);
    unpack(*reinterpret_cast<const Pack<float, kSize>*>(shared.sums + slot / 2 * Shape::kSumStride + column), sum);
  }
};

// Shares a tile's rows among threads, one thread per row: a warp reads 32 rows. f(row, first column) for each item.
template <int kColumns, typename F>
__device__ __forceinline__ void for_row_items(int p, int segment, int segments, const F& f) {
  constexpr int kItems = kColumns / kPhiloxElements;
  for (int item = kItems * segment / segments; item < kItems * (segment + 1) / segments; ++item)
    f(p, item * kPhiloxElements);
}

// The row of a thread and its part of the columns.
struct RowShare {
  int p, segment, segments;

  __device__ __forceinline__ explicit RowShare(int rows) {
    const int padded = (rows + 31) / 32 * 32;
    segments = kThreads / padded;
    p = static_cast<int>(threadIdx.x) % padded;
    segment = static_cast<int>(threadIdx.x) / padded;
  }
  __device__ __forceinline__ bool valid(int rows) const { return p < rows && segment < segments; }
};

template <typename T, int kColumns, bool kAligned>
__global__ void __launch_bounds__(kThreads) reflected_ranges_kernel(const ReflectedRangesArgs a) {
  extern __shared__ uint4 memory[];
  __shared__ float mins[kThreads], maxs[kThreads];
  const Span span = Span::of(a.blocks, a.columns, a.splits, kColumns);
  const int rows = span.rows;
  Shared<T, kColumns> shared(memory, rows);
  shared.load_params(a.reflector, a.order, nullptr, nullptr, span.first, rows);
  const RowShare share(rows);
  float min = INFINITY, max = -INFINITY;
  for (int64_t at = span.begin; at < span.end; at += kColumns) {
    load_tile<T, kColumns, kAligned>(shared, static_cast<const T*>(a.x), rows, a.columns, at);
    sum_groups<T, kColumns, false>(shared);
    if (share.valid(rows)) {
      const RowParams params = shared.params[share.p];
      const bool whole = at + kColumns <= a.columns;
      for_row_items<kColumns>(share.p, share.segment, share.segments, [&](int p, int column) {
        const RowItem<T, kColumns> item(shared, p, params.slot, column);
#pragma unroll
        for (int j = 0; j < kPhiloxElements; ++j) {
          const float y = item.value[j] * params.s - params.m * item.sum[j];
          if (whole || at + column + j < a.columns) {
            min = ptx::min_nan(min, y);
            max = ptx::max_nan(max, y);
          }
        }
      });
    }
    __syncthreads();
  }
  mins[threadIdx.x] = min;
  maxs[threadIdx.x] = max;
  __syncthreads();
  if (share.segment > 0 || share.p >= rows) return;
  for (int segment = 1; segment < share.segments; ++segment) {
    const int other = static_cast<int>(threadIdx.x) + segment * ((rows + 31) / 32 * 32);
    min = ptx::min_nan(min, mins[other]);
    max = ptx::max_nan(max, maxs[other]);
  }
  const int64_t to = static_cast<int64_t>(blockIdx.y) * a.blocks.rows + shared.params[share.p].row;
  a.partial_min[to] = min;
  a.partial_max[to] = max;
}

template <typename T, bool kCodes, int kColumns, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2) round_reflected_kernel(const RoundReflectedArgs a) {
  using Shape = TileShape<T, kColumns>;
  extern __shared__ uint4 memory[];
  const Span span = Span::of(a.blocks, a.columns, a.splits, kColumns);
  const int rows = span.rows;
  Shared<T, kColumns> shared(memory, rows);
  shared.load_params(a.reflector, a.order, a.scale, a.offset, span.first, rows);
  const PhiloxKey key(a.philox);
  const float half = half_codes(a.bits);
  const int64_t blocks_per_row = philox_blocks_per_row(a.columns);
  const RowShare share(rows);
  for (int64_t at = span.begin; at < span.end; at += kColumns) {
    load_tile<T, kColumns, kAligned>(shared, static_cast<const T*>(a.x), rows, a.columns, at);
    sum_groups<T, kColumns, false>(shared);
    if (share.valid(rows)) {  // T x, rounded
      const RowParams params = shared.params[share.p];
      const float inv_scale = 1.0f / params.grid.scale;
      const auto first_block = static_cast<uint64_t>(params.row * blocks_per_row + at / kPhiloxElements);
      for_row_items<kColumns>(share.p, share.segment, share.segments, [&](int p, int column) {
        const RowItem<T, kColumns> item(shared, p, params.slot, column);
        float dither[kPhiloxElements] = {};
        if (a.stochastic) {
          const Philox4 block = key.block(first_block + static_cast<uint64_t>(column / kPhiloxElements));
#pragma unroll
          for (int j = 0; j < kPhiloxElements; ++j) dither[j] = philox_uniform16(block, j) - 0.5f;
        }
        float kept[kPhiloxElements];
#pragma unroll
        for (int j = 0; j < kPhiloxElements; ++j) {
          const float y = item.value[j] * params.s - params.m * item.sum[j];
          const float code = dithered_code(y, params.grid, inv_scale, half, dither[j]);
          kept[j] = std::is_same_v<T, float> && !kCodes ? grid_value(code, params.grid) : code;
        }
        *reinterpret_cast<Pack<T, kPhiloxElements>*>(shared.tile + p * Shape::kStride + column) = pack<T>(kept);
      });
    }
    __syncthreads();
    constexpr int kChunk = Shape::kChunk, kChunks = kColumns / kChunk;
    if constexpr (kCodes) {
      for (int i = threadIdx.x; i < rows * kChunks; i += kThreads) {
        const int p = i / kChunks, column = i % kChunks * kChunk;
        float code[kChunk];
        unpack(*reinterpret_cast<const Pack<T, kChunk>*>(shared.tile + p * Shape::kStride + column), code);
        Pack<int8_t, kChunk> pack;
#pragma unroll
        for (int j = 0; j < kChunk; ++j) pack.value[j] = static_cast<int8_t>(static_cast<int>(code[j]));
        int8_t* to = a.codes + shared.params[p].row * a.columns + at + column;
        if (kAligned && at + column < a.columns) {
          *reinterpret_cast<Pack<int8_t, kChunk>*>(to) = pack;
        } else {
#pragma unroll
          for (int j = 0; j < kChunk; ++j)
            if (at + column + j < a.columns) to[j] = pack.value[j];
        }
      }
      __syncthreads();
      continue;
    }
    sum_groups<T, kColumns, true>(shared);
    // T^-1, 16 bytes per thread: a warp writes its rows without gaps.
    for (int i = threadIdx.x; i < rows * kChunks; i += kThreads) {
      const int p = i / kChunks, column = i % kChunks * kChunk;
      if (at + column >= a.columns) continue;
      const RowParams params = shared.params[p];
      RowItem<T, kColumns, kChunk> item(shared, p, params.slot, column);
#pragma unroll
      for (int j = 0; j < kChunk; ++j)
        item.value[j] = (kept_value<T>(item.value[j], params) - params.m * item.sum[j]) * params.t;
      const int64_t to = params.row * a.columns + at + column;
      Pack<T, kChunk> results;
      if (std::is_same_v<T, float> || !a.stochastic) {
        results = pack<T>(item.value);
      } else {
        static_assert(kChunk == kPhiloxElements || std::is_same_v<T, float>);
        const Philox4 block = key.block(kSecondRounding + static_cast<uint64_t>(params.row * blocks_per_row) +
                                        static_cast<uint64_t>((at + column) / kPhiloxElements));
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          const uint32_t word = block.word[j / 2];
          results.value[j] = round_to_type<T>(item.value[j], j % 2 ? word >> 16 : word & 0xffffu);
        }
      }
      if constexpr (kAligned) {
        *reinterpret_cast<Pack<T, kChunk>*>(static_cast<T*>(a.y) + to) = results;
      } else {
#pragma unroll
        for (int j = 0; j < kChunk; ++j)
          if (at + column + j < a.columns) static_cast<T*>(a.y)[to + j] = results.value[j];
      }
    }
    __syncthreads();
  }
}

// ---- T x and T^-1 x -------------------------------------------------------------------------------------------------

constexpr int kReflectThreads = 128;
constexpr int kReflectPositions = 64;  // a thread block takes the groups that begin among this many positions

__global__ void __launch_bounds__(kReflectThreads) reflect_rows_kernel(const ReflectRowsArgs a) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kReflectThreads + threadIdx.x;
  if (column >= a.columns) return;
  const int64_t stop = min(a.rows, (static_cast<int64_t>(blockIdx.y) + 1) * kReflectPositions);
  for (int64_t p = static_cast<int64_t>(blockIdx.y) * kReflectPositions; p < stop;) {
    if (a.reflector[p].n > 0.0f) {  // in the middle of a group
      ++p;
      continue;
    }
    const int64_t end = group_end(a.reflector, p, min(a.rows, p + kMaxGroup));
    // An order that leads outside x, which a caller may have made by hand, touches nothing: checking it before would
    // wait.
    const auto outside = [&](int64_t q) { return a.order[q] < 0 || a.order[q] >= a.rows; };
    float sum = 0.0f;
    for (int64_t q = p; q < end; ++q) {
      if (outside(q)) continue;
      const float s = a.inverse ? 1.0f : a.reflector[q].s;
      sum += a.reflector[q].n * (a.x[a.order[q] * a.columns + column] * s);
    }
    for (int64_t q = p; q < end; ++q) {
      if (outside(q)) continue;
      const float s = a.inverse ? 1.0f : a.reflector[q].s, t = a.inverse ? a.reflector[q].t : 1.0f;
      const int64_t at = a.order[q] * a.columns + column;
      a.y[at] = (a.x[at] * s - a.reflector[q].m * sum) * t;
    }
    p = end;
  }
}

// ---- launches -------------------------------------------------------------------------------------------------------

template <typename T>
bool rows_aligned(const void* x, const void* y, int64_t columns) {
  return columns * static_cast<int64_t>(sizeof(T)) % kVectorBytes == 0 && is_aligned(x) && is_aligned(y);
}

// The shared memory that a thread block may ask for on this device.
int64_t shared_memory_limit() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - 4096;  // what the kernels declare beside it
}

template <typename Args>
int launch_tiles(void (*kernel)(Args), const Args& a, int64_t bytes, void* stream) {
  const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(a.blocks.blocks), static_cast<unsigned>(a.splits));
  kernel<<<grid, kThreads, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

// Calls f(type, columns of a tile, aligned) with what fits.
template <typename F>
void dispatch_tiles(DType dtype, int64_t rows, bool aligned32, bool aligned16, const F& f) {
  dispatch_float(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto pick = [&](auto columns) {
      (sizeof(T) == 4 ? aligned32 : aligned16) ? f(type, columns, std::true_type{})
                                               : f(type, columns, std::false_type{});
    };
    if (Shared<T, kWide>::bytes(rows) <= shared_memory_limit())
      pick(std::integral_constant<int, kWide>{});
    else
      pick(std::integral_constant<int, kNarrow>{});
  });
}

}  // namespace

int plan_reflectors(const PlanReflectorsArgs& a, void* stream) {
  plan_reflectors_kernel<<<static_cast<unsigned>(a.blocks.blocks), kPlanThreads, 0,
                           static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

int reflected_ranges(const ReflectedRangesArgs& a, void* stream) {
  int error = cudaSuccess;
  const int64_t rows = a.blocks.size(0);
  dispatch_tiles(a.dtype, rows, rows_aligned<float>(a.x, nullptr, a.columns),
                 rows_aligned<Half>(a.x, nullptr, a.columns), [&](auto* type, auto columns, auto aligned) {
                   using T = std::remove_pointer_t<decltype(type)>;
                   error = launch_tiles(&reflected_ranges_kernel<T, columns.value, aligned.value>, a,
                                        Shared<T, columns.value>::bytes(rows), stream);
                 });
  return error;
}

int round_reflected(const RoundReflectedArgs& a, void* stream) {
  int error = cudaSuccess;
  const int64_t rows = a.blocks.size(0);
  dispatch_tiles(a.dtype, rows, rows_aligned<float>(a.x, a.y, a.columns), rows_aligned<Half>(a.x, a.y, a.columns),
                 [&](auto* type, auto columns, auto aligned) {
                   using T = std::remove_pointer_t<decltype(type)>;
                   const auto launch = [&](auto kernel) {
                     error = launch_tiles(kernel, a, Shared<T, columns.value>::bytes(rows), stream);
                   };
                   a.codes ? launch(&round_reflected_kernel<T, true, columns.value, aligned.value>)
                           : launch(&round_reflected_kernel<T, false, columns.value, aligned.value>);
                 });
  return error;
}

int reflect_rows(const ReflectRowsArgs& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(a.columns, kReflectThreads)),
                  static_cast<unsigned>(ceil_div(a.rows, kReflectPositions)));
  reflect_rows_kernel<<<grid, kReflectThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
