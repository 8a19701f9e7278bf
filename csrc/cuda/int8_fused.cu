#include "csrc/cuda/int8.cuh"
#include "csrc/cuda/int8.h"

// Norms and activations whose results are quantised before they leave the registers: a row for a thread block. Rows of whole items that fit are
// read once; others are read anew for each of the passes over them.

namespace quantrain::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kRowItems = 2;  // of a thread: the float32 results wait in registers

// The sum over a thread block, for every thread, in a fixed order.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float of_warp[32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (blockDim.x == 32) return value;
  __syncthreads();  // the last sum's readers are done
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  const uint32_t lane = threadIdx.x % 32;
  value = lane < blockDim.x / 32 ? of_warp[lane] : 0.0f;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// Where a row's numbers are: in a thread's registers (kItems > 0), or in memory, to be computed again in every pass (kItems 0, kElements).
template <typename T>
__device__ __forceinline__ float parameter(const void* values, DType type, int64_t column, float otherwise) {
  if (!values) return otherwise;
  return type == DType::kFloat32 ? static_cast<const float*>(values)[column]
                                 : to_float(static_cast<const T*>(values)[column]);
}

// s = x + residual, rounded to T.
template <typename T>
__device__ __forceinline__ float summed(const Int8NormArgs& a, int64_t at) {
  const float x = to_float(static_cast<const T*>(a.x)[at]);
  return a.residual ? to_float(from_float<T>(x + to_float(static_cast<const T*>(a.residual)[at]))) : x;
}

struct Moments {
  float mean;
  float inverse;  // of the standard deviation, or of the root mean square
};

__device__ __forceinline__ float normalised(float s, Moments m, float weight, float bias) {
  return (s - m.mean) * m.inverse * weight + bias;
}

template <typename T, int kItems>
__global__ void __launch_bounds__(kMaxThreads) norm_kernel(const Int8NormArgs a, uint32_t items_per_row) {
  const int64_t row = blockIdx.x, first = row * items_per_row;
  const auto* __restrict__ x = static_cast<const Pack<T, kItem>*>(a.x);
  const auto* __restrict__ residual = static_cast<const Pack<T, kItem>*>(a.residual);
  auto* __restrict__ carried = static_cast<Pack<T, kItem>*>(a.carried);
  float values[kItems][kItem];
  float sum = 0.0f;
#pragma unroll
  for (int u = 0; u < kItems; ++u) {
    const uint32_t item = u * blockDim.x + threadIdx.x;
#pragma unroll
    for (int j = 0; j < kItem; ++j) values[u][j] = 0.0f;
    if (item >= items_per_row) continue;
    unpack(x[first + item], values[u]);
    if (residual) {
      float other[kItem];
      unpack(residual[first + item], other);
#pragma unroll
      for (int j = 0; j < kItem; ++j) values[u][j] += other[j];
      const auto rounded = pack<T>(values[u]);
      if (!a.post_norm) carried[first + item] = rounded;
      unpack(rounded, values[u]);
    }
#pragma unroll
    for (int j = 0; j < kItem; ++j) sum += values[u][j];
  }
  const auto columns = static_cast<float>(a.columns);
  Moments m{0.0f, 0.0f};
  if (!a.rms) m.mean = block_sum(sum) / columns;
  float squares = 0.0f;
#pragma unroll
  for (int u = 0; u < kItems; ++u) {
    if (u * blockDim.x + threadIdx.x >= items_per_row) continue;
#pragma unroll
    for (int j = 0; j < kItem; ++j) squares += (values[u][j] - m.mean) * (values[u][j] - m.mean);
  }
  m.inverse = 1.0f / sqrtf(block_sum(squares) / columns + a.eps);
  uint32_t most = 0;
#pragma unroll
  for (int u = 0; u < kItems; ++u) {
    const uint32_t item = u * blockDim.x + threadIdx.x;
    if (item >= items_per_row) continue;
#pragma unroll
    for (int j = 0; j < kItem; ++j) {
      const int64_t column = static_cast<int64_t>(item) * kItem + j;
      values[u][j] = normalised(values[u][j], m, parameter<T>(a.weight, a.parameter_dtype, column, 1.0f),
                                parameter<T>(a.bias, a.parameter_dtype, column, 0.0f));
    }
    most = max(most, largest_magnitude(values[u]));
    if (residual && a.post_norm) carried[first + item] = pack<T>(values[u]);
  }
  const float scale = int8_scale(__uint_as_float(block_max(most)));
  if (threadIdx.x == 0) a.scale[row] = scale;
  const float inverse = int8_inverse(scale, false);
  const PhiloxKey none{PhiloxState{}};
#pragma unroll
  for (int u = 0; u < kItems; ++u) {
    const uint32_t item = u * blockDim.x + threadIdx.x;
    if (item >= items_per_row) continue;
#pragma unroll
    for (int j = 0; j < kItem; ++j) values[u][j] *= inverse;
    uint2 codes = item_codes<false>(values[u], none, 0);
    if (!(scale == scale)) codes = {0, 0};
    reinterpret_cast<uint2*>(a.codes)[first + item] = codes;
  }
}

// Any row. In the order of norm_kernel's formulas, an element at a time.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) norm_elements_kernel(const Int8NormArgs a) {
  const int64_t row = blockIdx.x, first = row * a.columns;
  const auto columns = static_cast<float>(a.columns);
  Moments m{0.0f, 0.0f};
  if (!a.rms) {
    float sum = 0.0f;
    for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x) sum += summed<T>(a, first + c);
    m.mean = block_sum(sum) / columns;
  }
  float squares = 0.0f;
  for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x) {
    const float distance = summed<T>(a, first + c) - m.mean;
    squares += distance * distance;
  }
  m.inverse = 1.0f / sqrtf(block_sum(squares) / columns + a.eps);
  const auto result = [&](int64_t c, float s) {
    return normalised(s, m, parameter<T>(a.weight, a.parameter_dtype, c, 1.0f),
                      parameter<T>(a.bias, a.parameter_dtype, c, 0.0f));
  };
  uint32_t most = 0;
  for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x)
    most = max(most, magnitude(result(c, summed<T>(a, first + c))));
  const float scale = int8_scale(__uint_as_float(block_max(most)));
  if (threadIdx.x == 0) a.scale[row] = scale;
  const float inverse = int8_inverse(scale, false);
  for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x) {
    const float s = summed<T>(a, first + c), y = result(c, s);
    const auto code = static_cast<int8_t>(static_cast<uint8_t>(int8_code(y * inverse, 0.0f)));
    a.codes[first + c] = scale == scale ? code : 0;
    if (a.carried) static_cast<T*>(a.carried)[first + c] = from_float<T>(a.post_norm ? y : s);
  }
}

template <Int8Activation kActivation>
__device__ __forceinline__ float activated(float x, float up) {
  if constexpr (kActivation == Int8Activation::kGeluErf) return gelu_erf(x);
  if constexpr (kActivation == Int8Activation::kGeluTanh) return gelu_tanh(x);
  return silu(x) * up;
}

template <typename T, Int8Activation kActivation, int kItems>
__global__ void __launch_bounds__(kMaxThreads) activation_kernel(const Int8ActivationArgs a, uint32_t items_per_row) {
  const int64_t row = blockIdx.x, first = row * items_per_row;
  const auto* __restrict__ x = static_cast<const Pack<T, kItem>*>(a.x);
  const auto* __restrict__ up = static_cast<const Pack<T, kItem>*>(a.up);
  float values[kItems][kItem];
  uint32_t most = 0;
#pragma unroll
  for (int u = 0; u < kItems; ++u) {
    const uint32_t item = u * blockDim.x + threadIdx.x;
    if (item >= items_per_row) continue;
    float other[kItem] = {};
    unpack(x[first + item], values[u]);
    if constexpr (kActivation == Int8Activation::kSiluMul) unpack(up[first + item], other);
#pragma unroll
    for (int j = 0; j < kItem; ++j) values[u][j] = activated<kActivation>(values[u][j], other[j]);
    most = max(most, largest_magnitude(values[u]));
  }
  const float scale = int8_scale(__uint_as_float(block_max(most)));
  if (threadIdx.x == 0) a.scale[row] = scale;
  const float inverse = int8_inverse(scale, false);
  const PhiloxKey none{PhiloxState{}};
#pragma unroll
  for (int u = 0; u < kItems; ++u) {
    const uint32_t item = u * blockDim.x + threadIdx.x;
    if (item >= items_per_row) continue;
#pragma unroll
    for (int j = 0; j < kItem; ++j) values[u][j] *= inverse;
    uint2 codes = item_codes<false>(values[u], none, 0);
    if (!(scale == scale)) codes = {0, 0};
    reinterpret_cast<uint2*>(a.codes)[first + item] = codes;
  }
}

template <typename T, Int8Activation kActivation>
__global__ void __launch_bounds__(kMaxThreads) activation_elements_kernel(const Int8ActivationArgs a) {
  const int64_t row = blockIdx.x, first = row * a.columns;
  const auto result = [&](int64_t c) {
    const float x = to_float(static_cast<const T*>(a.x)[first + c]);
    return activated<kActivation>(x, a.up ? to_float(static_cast<const T*>(a.up)[first + c]) : 0.0f);
  };
  uint32_t most = 0;
  for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x) most = max(most, magnitude(result(c)));
  const float scale = int8_scale(__uint_as_float(block_max(most)));
  if (threadIdx.x == 0) a.scale[row] = scale;
  const float inverse = int8_inverse(scale, false);
  for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x) {
    const auto code = static_cast<int8_t>(static_cast<uint8_t>(int8_code(result(c) * inverse, 0.0f)));
    a.codes[first + c] = scale == scale ? code : 0;
  }
}

bool fits(int64_t columns) { return columns % kItem == 0 && columns <= int64_t{kMaxThreads} * kRowItems * kItem; }

// Threads for a row of so many items.
unsigned threads_for(int64_t items) { return static_cast<unsigned>(ceil_div(ceil_div(items, kRowItems), 32) * 32); }

constexpr unsigned kElementThreads = 512;

}  // namespace

int int8_norm(const Int8NormArgs& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const auto rows = static_cast<unsigned>(a.rows);
  const bool whole =
      fits(a.columns) && is_aligned(a.x) && is_aligned(a.residual) && is_aligned(a.carried) && is_aligned(a.codes);
  const auto items = static_cast<uint32_t>(a.columns / kItem);
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (whole)
      norm_kernel<T, kRowItems><<<rows, threads_for(items), 0, stream>>>(a, items);
    else
      norm_elements_kernel<T><<<rows, kElementThreads, 0, stream>>>(a);
  });
  return cudaGetLastError();
}

int int8_activation(const Int8ActivationArgs& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const auto rows = static_cast<unsigned>(a.rows);
  const bool whole = fits(a.columns) && is_aligned(a.x) && is_aligned(a.up) && is_aligned(a.codes);
  const auto items = static_cast<uint32_t>(a.columns / kItem);
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto launch = [&](auto activation) {
      if (whole)
        activation_kernel<T, activation.value, kRowItems><<<rows, threads_for(items), 0, stream>>>(a, items);
      else
        activation_elements_kernel<T, activation.value><<<rows, kElementThreads, 0, stream>>>(a);
    };
    switch (a.activation) {
      case Int8Activation::kGeluErf:
        return launch(std::integral_constant<Int8Activation, Int8Activation::kGeluErf>{});
      case Int8Activation::kGeluTanh:
        return launch(std::integral_constant<Int8Activation, Int8Activation::kGeluTanh>{});
      case Int8Activation::kSiluMul:
        return launch(std::integral_constant<Int8Activation, Int8Activation::kSiluMul>{});
    }
  });
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
