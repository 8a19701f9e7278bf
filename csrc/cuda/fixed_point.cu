#include "csrc/cuda/fixed_point.h"

#include "csrc/cuda/common.cuh"

// Compiled with --fmad=false, as fake_quant.cu.

namespace quantrain::cuda {
namespace {

constexpr int kThreads = 256;

// ---- kernels --------------------------------------------------------------------------------------------------------

// The sum over a block, in a fixed order, for thread 0. Every thread must come.
__device__ __forceinline__ double block_sum(double value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  __shared__ double warp_value[kThreads / 32];
  __syncthreads();  // the previous sum may still be read
  if (threadIdx.x % 32 == 0) warp_value[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.0;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) total += warp_value[warp];
  return total;
}

// The elements of a chunk: one block.
struct Chunk {
  int64_t group;
  int64_t first;
  int64_t last;
};

__device__ __forceinline__ Chunk chunk_of(int64_t task, int64_t chunks, int64_t elements) {
  const int64_t group = task / chunks, start = group * elements;
  const int64_t first = start + (task - group * chunks) * kRowChunk, end = start + elements;
  return Chunk{group, first, first + kRowChunk < end ? first + kRowChunk : end};
}

// One block per chunk. kSize elements per load, or one where a group does not hold whole vectors.
template <typename T, int kSize, typename Visit>
__device__ __forceinline__ void for_each_value(const T* __restrict__ x, const Chunk& chunk, const Visit& visit) {
#pragma unroll 4
  for (int64_t at = chunk.first + threadIdx.x * kSize; at < chunk.last; at += kThreads * kSize) {
    const auto loaded = *reinterpret_cast<const Pack<T, kSize>*>(x + at);
    float values[kSize];
    unpack(loaded, values);
#pragma unroll
    for (int j = 0; j < kSize; ++j) visit(values[j]);
  }
}

// std and rms: two sums.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) moments_kernel(const T* __restrict__ x,       // [groups, elements]
                                                           double* __restrict__ partial,  // [groups, chunks, 2]
                                                           int64_t elements, int64_t chunks, bool centred) {
  const Chunk chunk = chunk_of(blockIdx.x, chunks, elements);
  const double origin = centred ? static_cast<double>(to_float(x[chunk.group * elements])) : 0.0;
  double sum = 0.0, squares = 0.0;
  for_each_value<T, kSize>(x, chunk, [&](float value) {
    const double d = static_cast<double>(value) - origin;
    sum += d;
    squares += d * d;
  });
  sum = block_sum(sum);
  squares = block_sum(squares);
  if (threadIdx.x == 0) {
    partial[2 * static_cast<int64_t>(blockIdx.x)] = sum;
    partial[2 * static_cast<int64_t>(blockIdx.x) + 1] = squares;
  }
}

// mse: a sum for each fraction length, of one reading. kTerms is at least `terms`, so that the sums stay in registers.
template <typename T, int kSize, int kTerms>
__global__ void __launch_bounds__(kThreads)
    errors_kernel(const T* __restrict__ x,       // [groups, elements]
                  double* __restrict__ partial,  // [groups, chunks, terms]
                  int64_t elements, int64_t chunks, int terms, QuantRange range) {
  double sum[kTerms] = {};
  for_each_value<T, kSize>(x, chunk_of(blockIdx.x, chunks, elements), [&](float value) {
    const double exact = static_cast<double>(value);
#pragma unroll
    for (int f = 0; f < kTerms; ++f) {
      const QParams p{detail::bits_to_float((127u - f) << 23), detail::bits_to_float((127u + f) << 23), 0.0f};
      const double error = static_cast<double>(dequantized(clamp_code(unclamped_code(value, p), range), p)) - exact;
      sum[f] += error * error;
    }
  });
#pragma unroll
  for (int f = 0; f < kTerms; ++f) {
    const double total = block_sum(sum[f]);
    if (threadIdx.x == 0 && f < terms) partial[static_cast<int64_t>(blockIdx.x) * terms + f] = total;
  }
}

// One block per group: its chunks' sums, and from them the answer.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const double* __restrict__ partial,    // [groups, chunks, terms]
                  const int32_t* __restrict__ previous,  // [groups] or null
                  int32_t* __restrict__ result,          // [groups]
                  int64_t elements, int64_t chunks, FractionLengthRule rule) {
  const int64_t group = blockIdx.x;
  const int terms = statistic_terms(rule);
  double sums[kMaxFractionLengths];
  for (int k = 0; k < terms; ++k) {
    double sum = 0.0;
    for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kThreads)
      sum += partial[(group * chunks + chunk) * terms + k];
    sums[k] = block_sum(sum);
  }
  if (threadIdx.x == 0) result[group] = chosen_fraction_length(sums, elements, rule, previous ? previous[group] : -1);
}

// Four accumulators per thread: 16 bytes in, 4 bytes out. kTensor: one fraction length for all.
template <bool kTensor, bool kAligned, typename Index>
__global__ void __launch_bounds__(kThreads)
    requantize_kernel(const int32_t* __restrict__ accumulator,  // [numel]
                      const int32_t* __restrict__ lengths,      // one per group
                      uint8_t* __restrict__ output,             // [numel], uint8 or the low byte of int8
                      int64_t numel, const DeviceGrouping<Index> grouping, Index inner, int fraction_length,
                      bool is_signed) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4;
  if (first >= numel) return;
  const bool whole = kAligned && first + 4 <= numel;
  Pack<int32_t, 4> in;
  if (whole) {
    in = *reinterpret_cast<const Pack<int32_t, 4>*>(accumulator + first);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) in.value[j] = first + j < numel ? accumulator[first + j] : 0;
  }
  Index row = 0, column = 0;
  if constexpr (!kTensor) {
    row = grouping.inner.divide(static_cast<Index>(first));
    column = static_cast<Index>(first) - row * inner;
  }
  int shift = requantize_shift(__ldg(lengths + (kTensor ? 0 : grouping.scale_index(row))), fraction_length);
  Pack<uint8_t, 4> out;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if constexpr (!kTensor) {
      if (column == inner && first + j < numel) {
        column = 0;
        ++row;
        shift = requantize_shift(__ldg(lengths + grouping.scale_index(row)), fraction_length);
      }
      ++column;
    }
    out.value[j] = static_cast<uint8_t>(fixed_point_requantized_int32(in.value[j], shift, is_signed));
  }
  if (whole) {
    *reinterpret_cast<Pack<uint8_t, 4>*>(output + first) = out;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (first + j < numel) output[first + j] = out.value[j];
  }
}

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------

int fraction_length(const FractionLengthArgs& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t chunks = chunks_per_group(a);
  const unsigned blocks = static_cast<unsigned>(a.groups * chunks);
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kSize = kVectorBytes / sizeof(T);
    const T* x = static_cast<const T*>(a.x);
    const auto launch = [&](auto size) {
      if (a.rule.method != FractionLengthMethod::kMse)
        moments_kernel<T, size.value>
            <<<blocks, kThreads, 0, s>>>(x, a.partial, a.elements, chunks, a.rule.method == FractionLengthMethod::kStd);
      else if (a.rule.largest < 9)
        errors_kernel<T, size.value, 9>
            <<<blocks, kThreads, 0, s>>>(x, a.partial, a.elements, chunks, a.rule.largest + 1, a.rule.range);
      else
        errors_kernel<T, size.value, kMaxFractionLengths>
            <<<blocks, kThreads, 0, s>>>(x, a.partial, a.elements, chunks, a.rule.largest + 1, a.rule.range);
    };
    if (is_aligned(a.x) && a.elements % kSize == 0)
      launch(std::integral_constant<int, kSize>{});
    else
      launch(std::integral_constant<int, 1>{});
  });
  finish_kernel<<<static_cast<unsigned>(a.groups), kThreads, 0, s>>>(a.partial, a.previous, a.result, a.elements,
                                                                     chunks, a.rule);
  return cudaGetLastError();
}

int fixed_point_requantize(const FixedPointRequantizeArgs& a, void* stream) {
  const int64_t numel = a.grouping.numel;
  const unsigned blocks = static_cast<unsigned>(ceil_div(numel, int64_t{kThreads} * 4));
  const bool aligned = is_aligned(a.accumulator) && is_aligned(a.output);
  const auto launch = [&](auto tensor, auto is_aligned_type, auto index) {
    using Index = decltype(index);
    requantize_kernel<tensor.value, is_aligned_type.value, Index>
        <<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            a.accumulator, a.accumulator_fraction_length, static_cast<uint8_t*>(a.output), numel,
            DeviceGrouping<Index>(a.grouping, a.grouping.inner), static_cast<Index>(a.grouping.inner),
            a.fraction_length, a.is_signed);
  };
  dispatch_bool(a.grouping.levels == 0, [&](auto tensor) {
    dispatch_bool(aligned, [&](auto is_aligned_type) {
      if (tensor.value || numel >= (int64_t{1} << 31))  // one length for all: no index is divided
        launch(tensor, is_aligned_type, uint64_t{});
      else
        launch(tensor, is_aligned_type, uint32_t{});
    });
  });
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
