#include "csrc/cuda/common.cuh"
#include "csrc/cuda/fake_quant.h"
#include "csrc/cuda/joins.cuh"

// Row reductions of the fake_quant family: the gradient of a learned scale, the range of a group, the error of a range.
// A row chunk (kRowChunk elements) is read by kLanes neighbouring threads, so short rows share a warp and long ones
// fill a block. Partial results are written, never added by atomics: the sums repeat bit for bit.
// Compiled with --fmad=false, as fake_quant.cu.

namespace quantrain::cuda {
namespace {

constexpr int kThreads = 256;

// ---- kernels --------------------------------------------------------------------------------------------------------

template <int kLanes, typename Join>
__device__ __forceinline__ float reduce_over_lanes(float value, const Join& join) {
  constexpr int kWarpLanes = kLanes < 32 ? kLanes : 32;
#pragma unroll
  for (int offset = kWarpLanes / 2; offset > 0; offset /= 2)
    value = join(value, __shfl_xor_sync(0xffffffffu, value, offset));
  if constexpr (kLanes > 32) {
    __shared__ float warp_value[kThreads / 32];
    __syncthreads();  // the previous reduction may still be reading
    if (threadIdx.x % 32 == 0) warp_value[threadIdx.x / 32] = value;
    __syncthreads();
    value = warp_value[0];
#pragma unroll
    for (int warp = 1; warp < kThreads / 32; ++warp) value = join(value, warp_value[warp]);
  }
  return value;
}

struct Chunk {
  int64_t task;  // row * chunks + chunk
  int64_t row;
  int64_t first;  // element
  int64_t last;   // one past
};

template <int kLanes>
__device__ __forceinline__ bool find_chunk(const Grouping& g, int64_t chunks, Chunk& chunk) {
  chunk.task = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  const bool valid = chunk.task < g.rows * chunks;
  const int64_t task = valid ? chunk.task : 0;
  chunk.row = chunks == 1 ? task : task / chunks;
  chunk.first = chunk.row * g.inner + (task - chunk.row * chunks) * kRowChunk;
  const int64_t row_end = (chunk.row + 1) * g.inner;
  chunk.last = chunk.first + kRowChunk < row_end ? chunk.first + kRowChunk : row_end;
  if (!valid) chunk.last = chunk.first;  // no elements, but every lane must reach the exchanges
  return valid;
}

// Calls visit(element, n) for whole vectors of kSize elements, or for single elements where kSize is 1.
template <int kLanes, int kSize, typename Visit>
__device__ __forceinline__ void for_each_vector(const Chunk& chunk, const Visit& visit) {
#pragma unroll 4
  for (int64_t at = chunk.first + threadIdx.x % kLanes * kSize; at < chunk.last; at += kLanes * kSize) visit(at);
}

template <typename T, int kSize, int kLanes>
__global__ void __launch_bounds__(kThreads) learnable_backward_kernel(const LearnableBackwardArgs a, int64_t chunks) {
  const T* __restrict__ x = static_cast<const T*>(a.x);
  const T* __restrict__ grad_output = static_cast<const T*>(a.grad_output);
  T* __restrict__ grad_input = static_cast<T*>(a.grad_input);
  Chunk chunk;
  const bool valid = find_chunk<kLanes>(a.grouping, chunks, chunk);
  const QParams p = load_qparams(a.qparams, a.grouping.scale_index(chunk.row), a.range);
  float scale_sum = 0.0f, zero_point_sum = 0.0f;
  for_each_vector<kLanes, kSize>(chunk, [&](int64_t at) {
    const auto xs = *reinterpret_cast<const Pack<T, kSize>*>(x + at);
    const auto dys = *reinterpret_cast<const Pack<T, kSize>*>(grad_output + at);
    float values[kSize], dy[kSize];
    unpack(xs, values);
    unpack(dys, dy);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const LearnableGradient g = learnable_gradient(values[j], p, a.range);
      scale_sum += dy[j] * g.scale;
      zero_point_sum += dy[j] * g.zero_point;
      dy[j] = g.inside ? dy[j] : 0.0f;
    }
    *reinterpret_cast<Pack<T, kSize>*>(grad_input + at) = pack<T, kSize>(dy);  // exact: dy came from T
  });
  scale_sum = reduce_over_lanes<kLanes>(scale_sum, Sum{});
  zero_point_sum = reduce_over_lanes<kLanes>(zero_point_sum, Sum{});
  if (valid && threadIdx.x % kLanes == 0) {
    a.partial_scale[chunk.task] = scale_sum;
    if (a.partial_zero_point) a.partial_zero_point[chunk.task] = zero_point_sum;
  }
}

template <typename T, int kSize, int kLanes>
__global__ void __launch_bounds__(kThreads) min_max_kernel(const MinMaxArgs a, int64_t chunks) {
  const T* __restrict__ x = static_cast<const T*>(a.x);
  Chunk chunk;
  const bool valid = find_chunk<kLanes>(a.grouping, chunks, chunk);
  float min = detail::bits_to_float(0x7f800000u), max = detail::bits_to_float(0xff800000u);
  for_each_vector<kLanes, kSize>(chunk, [&](int64_t at) {
    const auto xs = *reinterpret_cast<const Pack<T, kSize>*>(x + at);
    float values[kSize];
    unpack(xs, values);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      min = Min{}(values[j], min);
      max = Max{}(values[j], max);
    }
  });
  min = reduce_over_lanes<kLanes>(min, Min{});
  max = reduce_over_lanes<kLanes>(max, Max{});
  if (valid && threadIdx.x % kLanes == 0) {
    a.partial_min[chunk.task] = min;
    a.partial_max[chunk.task] = max;
  }
}

// One candidate range per grid row: the tensor is read once per candidate, from the second-level cache where it fits.
// Sums in SumOrder.
template <typename T, int kLanes, bool kWhole>
__global__ void __launch_bounds__(kThreads) range_error_kernel(const RangeErrorArgs a, int64_t chunks) {
  constexpr int kSize = kVectorBytes / sizeof(T);
  const T* __restrict__ x = static_cast<const T*>(a.x);
  Chunk chunk;
  const bool valid = find_chunk<kLanes>(a.grouping, chunks, chunk);
  const int64_t group = a.grouping.scale_index(chunk.row), k = blockIdx.y;
  const float ratio = static_cast<float>(k + 1) / static_cast<float>(a.steps);
  const QParams p = quantrain::qparams_from_range(a.min[group] * ratio, a.max[group] * ratio, a.range, a.symmetric);
  float sums[kSize] = {};
  for_each_vector<kLanes, kSize>(chunk, [&](int64_t at) {
    Pack<T, kSize> xs;
    if constexpr (kWhole) {
      xs = *reinterpret_cast<const Pack<T, kSize>*>(x + at);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) xs.value[j] = at + j < chunk.last ? x[at + j] : T{};
    }
    float values[kSize];
    unpack(xs, values);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float distance = dequantized(clamp_code(unclamped_code(values[j], p), a.range), p) - values[j];
      sums[j] += kWhole || at + j < chunk.last ? distance * distance : 0.0f;
    }
  });
#pragma unroll
  for (int width = kSize / 2; width > 0; width /= 2)
#pragma unroll
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  const float sum = reduce_over_lanes<kLanes>(sums[0], Sum{});
  if (valid && threadIdx.x % kLanes == 0) a.partial_error[k * a.grouping.rows * chunks + chunk.task] = sum;
}

// ---- launchers ------------------------------------------------------------------------------------------------------

// Calls launch(size, lanes, blocks): the elements of a load, the threads of a row chunk, and the blocks that cover all
// chunks.
template <typename T, typename Launch>
void dispatch_rows(const Grouping& g, bool aligned, const Launch& launch) {
  constexpr int kSize = kVectorBytes / sizeof(T);
  const int64_t tasks = g.rows * chunks_per_row(g);
  const auto with_lanes = [&](auto size, auto lanes) {
    launch(size, lanes, static_cast<unsigned>(ceil_div(tasks, kThreads / lanes.value)));
  };
  const auto with_size = [&](auto size) {
    const int64_t loads = ceil_div(g.inner < kRowChunk ? g.inner : kRowChunk, size.value);
    // One block per chunk only where it is long: 3136 elements leave the fourth round of 256 threads nearly empty.
    if (loads >= 1024)
      with_lanes(size, std::integral_constant<int, kThreads>{});
    else if (loads >= 32)
      with_lanes(size, std::integral_constant<int, 32>{});
    else if (loads >= 8)
      with_lanes(size, std::integral_constant<int, 8>{});
    else
      with_lanes(size, std::integral_constant<int, 1>{});
  };
  if (aligned && g.inner % kSize == 0)
    with_size(std::integral_constant<int, kSize>{});
  else
    with_size(std::integral_constant<int, 1>{});
}

}  // namespace

int fake_quantize_learnable_backward(const LearnableBackwardArgs& a, void* stream) {
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool aligned = is_aligned(a.x) && is_aligned(a.grad_output) && is_aligned(a.grad_input);
    dispatch_rows<T>(a.grouping, aligned, [&](auto size, auto lanes, unsigned blocks) {
      learnable_backward_kernel<T, size.value, lanes.value>
          <<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a, chunks_per_row(a.grouping));
    });
  });
  return cudaGetLastError();
}

int min_max(const MinMaxArgs& a, void* stream) {
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dispatch_rows<T>(a.grouping, is_aligned(a.x), [&](auto size, auto lanes, unsigned blocks) {
      min_max_kernel<T, size.value, lanes.value>
          <<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a, chunks_per_row(a.grouping));
    });
  });
  return cudaGetLastError();
}

int range_error(const RangeErrorArgs& a, void* stream) {
  const SumOrder order = range_error_order(a.grouping, a.dtype);
  const int64_t chunks = chunks_per_row(a.grouping);
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto launch = [&](auto lanes) {
      const int64_t blocks = ceil_div(a.grouping.rows * chunks, kThreads / lanes.value);
      const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(a.steps));
      dispatch_bool(is_aligned(a.x) && a.grouping.inner % order.size == 0, [&](auto whole) {
        range_error_kernel<T, lanes.value, whole.value>
            <<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a, chunks);
      });
    };
    if (order.lanes == kThreads)
      launch(std::integral_constant<int, kThreads>{});
    else if (order.lanes == 32)
      launch(std::integral_constant<int, 32>{});
    else if (order.lanes == 8)
      launch(std::integral_constant<int, 8>{});
    else
      launch(std::integral_constant<int, 1>{});
  });
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
