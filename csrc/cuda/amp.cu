#include "csrc/cuda/amp.h"
#include "csrc/cuda/common.cuh"

// Lists of gradients, one block of threads per chunk. The list travels in the kernel's arguments (up to 32 KB of them
// since CUDA 12.1), so that no table has to be copied to the device before, and a captured graph holds it. Partial
// results are written, not added by atomics: the norm repeats bit for bit.

namespace quantrain::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSmallList = 192;   // tensors of a launch: GPT-2 has 148
constexpr int kLargeList = 1024;  // 28 KB of arguments; longer lists take several launches

template <int kCapacity>
struct DeviceList {
  void* data[kCapacity];  // [numel] of dtype
  int64_t numel[kCapacity];
  int32_t first_chunk[kCapacity];  // of the tensor, within this launch
  uint8_t dtype[kCapacity];
  int32_t count;
  int32_t chunks;
  int64_t first_tensor;  // of the list, in this launch
  int64_t base_chunk;    // chunks of earlier launches
};

struct ListChunk {
  int tensor;
  int64_t first;  // element
  int64_t size;
};

// The last tensor whose first chunk is not after `chunk`; tensors without elements share their first chunk with the
// next.
template <int kCapacity>
__device__ __forceinline__ ListChunk find_list_chunk(const DeviceList<kCapacity>& list, int chunk) {
  int low = 0, high = list.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (list.first_chunk[middle] <= chunk)
      low = middle;
    else
      high = middle - 1;
  }
  const int64_t first = static_cast<int64_t>(chunk - list.first_chunk[low]) * kListChunk;
  const int64_t left = list.numel[low] - first;
  return {low, first, left < kListChunk ? left : kListChunk};
}

template <typename F>
__device__ __forceinline__ void dispatch_device(uint8_t dtype, const F& f) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat16:
      return f(static_cast<Half*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

// ---- kernels --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float sum_over_block(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  __shared__ float warp_value[kThreads / 32];
  if (threadIdx.x % 32 == 0) warp_value[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) value += warp_value[warp];
  return value;
}

template <int kCapacity>
__global__ void __launch_bounds__(kThreads)
    check_norm_kernel(const __grid_constant__ DeviceList<kCapacity> list, const float* __restrict__ scale,
                      float* __restrict__ partial,       // [chunks]
                      float* __restrict__ non_finite) {  // [tensors]
  const ListChunk chunk = find_list_chunk(list, static_cast<int>(blockIdx.x));
  const float inv_scale = inverse_scale(*scale);
  float sum = 0.0f;
  bool bad = false;
  dispatch_device(list.dtype[chunk.tensor], [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kSize = kVectorBytes / sizeof(T);
    constexpr int kUnroll = 8;  // loads in flight per thread
    const T* __restrict__ x = static_cast<const T*>(list.data[chunk.tensor]) + chunk.first;
    const auto add = [&](float value) {
      bad |= !is_finite_bits(value);
      const float unscaled = value * inv_scale;
      sum += unscaled * unscaled;
    };
    const bool aligned = reinterpret_cast<uintptr_t>(x) % kVectorBytes == 0;
    const int vectors = aligned ? static_cast<int>(chunk.size / kSize) : 0;
    int at = threadIdx.x;
    for (; at + (kUnroll - 1) * kThreads < vectors; at += kUnroll * kThreads) {
      Pack<T, kSize> packs[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) packs[u] = reinterpret_cast<const Pack<T, kSize>*>(x)[at + u * kThreads];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float values[kSize];
        unpack(packs[u], values);
#pragma unroll
        for (int j = 0; j < kSize; ++j) add(values[j]);
      }
    }
    for (; at < vectors; at += kThreads) {
      float values[kSize];
      unpack(reinterpret_cast<const Pack<T, kSize>*>(x)[at], values);
#pragma unroll
      for (int j = 0; j < kSize; ++j) add(values[j]);
    }
    for (int64_t i = static_cast<int64_t>(vectors) * kSize + threadIdx.x; i < chunk.size; i += kThreads)
      add(to_float(x[i]));
  });
  if (bad) non_finite[list.first_tensor + chunk.tensor] = 1.0f;  // every writer writes the same
  sum = sum_over_block(sum);
  if (threadIdx.x == 0) partial[list.base_chunk + blockIdx.x] = sum;
}

constexpr int kFinishThreads = 1024;

__global__ void __launch_bounds__(kFinishThreads) finish_norm_kernel(const FinishNormArgs a) {
  double sum = 0.0;
  float found = 0.0f;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < a.chunks; i += kFinishThreads) sum += static_cast<double>(a.partial[i]);
  for (int64_t t = threadIdx.x; t < a.count; t += kFinishThreads) found = fmaxf(found, a.non_finite[t]);
  const bool any = __syncthreads_or(found > 0.0f);
  __shared__ double warp_sum[kFinishThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0.0;
  for (int warp = 0; warp < kFinishThreads / 32; ++warp) sum += warp_sum[warp];
  const float norm = static_cast<float>(sqrt(sum));
  *a.found_inf = any ? 1.0f : 0.0f;
  *a.norm = norm;
  *a.grad_scale = *a.scale / clip_coefficient(norm, a.max_norm);
}

template <int kCapacity>
__global__ void __launch_bounds__(kThreads)
    scale_list_kernel(const __grid_constant__ DeviceList<kCapacity> list, const float* __restrict__ scale,
                      const float* __restrict__ norm, float max_norm) {
  // Last chunks first: they are what the check that went before left in the second-level cache.
  const ListChunk chunk = find_list_chunk(list, list.chunks - 1 - static_cast<int>(blockIdx.x));
  const float inv_scale = inverse_scale(*scale);
  const float clip = norm ? clip_coefficient(*norm, max_norm) : 1.0f;
  dispatch_device(list.dtype[chunk.tensor], [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kSize = kVectorBytes / sizeof(T);
    constexpr int kUnroll = 4;
    T* x = static_cast<T*>(list.data[chunk.tensor]) + chunk.first;
    const auto scaled = [&](const Pack<T, kSize>& values_in) {
      float values[kSize];
      unpack(values_in, values);
#pragma unroll
      for (int j = 0; j < kSize; ++j) values[j] = values[j] * inv_scale * clip;
      return pack<T, kSize>(values);
    };
    const bool aligned = reinterpret_cast<uintptr_t>(x) % kVectorBytes == 0;
    const int vectors = aligned ? static_cast<int>(chunk.size / kSize) : 0;
    auto* packs = reinterpret_cast<Pack<T, kSize>*>(x);
    int at = threadIdx.x;
    for (; at + (kUnroll - 1) * kThreads < vectors; at += kUnroll * kThreads) {
      Pack<T, kSize> loaded[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) loaded[u] = packs[at + u * kThreads];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) packs[at + u * kThreads] = scaled(loaded[u]);
    }
    for (; at < vectors; at += kThreads) packs[at] = scaled(packs[at]);
    for (int64_t i = static_cast<int64_t>(vectors) * kSize + threadIdx.x; i < chunk.size; i += kThreads)
      x[i] = from_float<T>(to_float(x[i]) * inv_scale * clip);
  });
}

struct RoundArgs {
  void* data;           // [numel] of T
  const float* source;  // [numel]
  int64_t numel;
  int64_t first_number;
  PhiloxState philox;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) round_stochastic_kernel(const RoundArgs a) {
  const PhiloxKey key(a.philox);
  T* __restrict__ y = static_cast<T*>(a.data);
  const int64_t first = 4 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  if (first >= a.numel) return;
  const Philox4 random = key.block(static_cast<uint64_t>(a.first_number + first) / 4);
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (first + j < a.numel) y[first + j] = round_stochastic<T>(a.source[first + j], random.word[j]);
}

// ---- launchers ------------------------------------------------------------------------------------------------------

// Calls launch(list) for as many pieces as the list needs. A piece ends where its capacity or 2^30 chunks are reached.
template <int kCapacity, typename Launch>
void for_each_piece(const ListTensor* tensors, int64_t count, const Launch& launch) {
  DeviceList<kCapacity> list;
  int64_t base_chunk = 0;
  for (int64_t first = 0; first < count; first += kCapacity) {
    const int64_t last = first + kCapacity < count ? first + kCapacity : count;
    list.first_tensor = first;
    list.base_chunk = base_chunk;
    list.count = 0;
    list.chunks = 0;
    for (int64_t t = first; t < last; ++t) {
      list.data[list.count] = tensors[t].data;
      list.numel[list.count] = tensors[t].numel;
      list.dtype[list.count] = static_cast<uint8_t>(tensors[t].dtype);
      list.first_chunk[list.count++] = list.chunks;
      list.chunks += static_cast<int32_t>(chunks_of(tensors[t].numel));
    }
    base_chunk += list.chunks;
    if (list.chunks > 0) launch(list);
  }
}

template <typename Launch>
void for_each_list(const ListTensor* tensors, int64_t count, const Launch& launch) {
  if (count <= kSmallList)
    for_each_piece<kSmallList>(tensors, count, launch);
  else
    for_each_piece<kLargeList>(tensors, count, launch);
}

}  // namespace

int check_norm(const CheckNormArgs& a, void* stream) {
  for_each_list(a.tensors, a.count, [&](const auto& list) {
    check_norm_kernel<<<static_cast<unsigned>(list.chunks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        list, a.scale, a.partial, a.non_finite);
  });
  return cudaGetLastError();
}

int finish_norm(const FinishNormArgs& a, void* stream) {
  finish_norm_kernel<<<1, kFinishThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

int scale_list(const ScaleArgs& a, void* stream) {
  for_each_list(a.tensors, a.count, [&](const auto& list) {
    scale_list_kernel<<<static_cast<unsigned>(list.chunks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        list, a.scale, a.norm, a.max_norm);
  });
  return cudaGetLastError();
}

int round_stochastic_list(const StochasticRoundArgs& a, void* stream) {
  int64_t first_number = 0;
  for (int64_t t = 0; t < a.count; ++t) {
    const ListTensor& tensor = a.tensors[t];
    if (tensor.numel > 0) {
      const RoundArgs args{tensor.data, tensor.source, tensor.numel, first_number, a.philox};
      const auto blocks = static_cast<unsigned>(ceil_div(tensor.numel, 4 * kThreads));
      if (tensor.dtype == DType::kFloat16)
        round_stochastic_kernel<Half><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
      else
        round_stochastic_kernel<BFloat16><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    }
    first_number += numbers_of(tensor.numel);
  }
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
