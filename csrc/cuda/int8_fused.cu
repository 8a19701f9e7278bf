#include "csrc/cuda/int8.cuh"
#include "csrc/cuda/int8.h"

// Norms and activations whose results are quantized before they leave the registers: one row per thread block. Rows of
// whole items that fit are read once; others are read anew for each of the passes over them.

namespace quantrain::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kWarpItems = 4;  // of a lane, where a warp takes a row
constexpr int kWarpRows = 8;   // of a thread block then
constexpr int kItems = 2;      // of a thread, where a thread block takes a row: float32 results wait in registers

// The sum over a row's threads, for each of them, in a fixed order. kTurn: each sum of a kernel has its own shared
// memory, so that one barrier does.
template <int kTurn>
__device__ __forceinline__ float row_sum(float value) {
  __shared__ float of_warp[32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (blockDim.x == 32) return value;
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  const uint32_t lane = threadIdx.x % 32;
  value = lane < blockDim.x / 32 ? of_warp[lane] : 0.0f;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

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

__device__ __forceinline__ float normalized(float s, Moments m, float weight, float bias) {
  return (s - m.mean) * m.inverse * weight + bias;
}

// The item of eight elements at `index`, as vectors or an element at a time.
template <typename T, bool kAligned>
__device__ __forceinline__ Pack<T, kItem> load_item(const void* __restrict__ values, int64_t index) {
  if constexpr (kAligned) {
    return load(static_cast<const Pack<T, kItem>*>(values) + index);
  } else {
    Pack<T, kItem> item;
#pragma unroll
    for (int j = 0; j < kItem; ++j) item.value[j] = static_cast<const T*>(values)[index * kItem + j];
    return item;
  }
}

template <typename T, bool kAligned>
__device__ __forceinline__ void parameters(const void* values, DType type, uint32_t item, float (&result)[kItem]) {
  if (type == DType::kFloat32)
    unpack(load_item<float, kAligned>(values, item), result);
  else
    unpack(load_item<T, kAligned>(values, item), result);
}

// The codes and the scale of a row whose values a row's threads hold; kOf items each. factor: on 16 bytes, or null.
template <int kOf>
__device__ __forceinline__ void quantize_row(float (&values)[kOf][kItem], const float* __restrict__ factor,
                                             uint32_t items_per_row, int64_t row, int8_t* __restrict__ codes,
                                             float* __restrict__ scales) {
  if (factor) {
#pragma unroll
    for (int u = 0; u < kOf; ++u) {
      const uint32_t item = u * blockDim.x + threadIdx.x;
      if (item >= items_per_row) continue;
      const auto factors = load(reinterpret_cast<const Pack<float, kItem>*>(factor) + item);
#pragma unroll
      for (int j = 0; j < kItem; ++j) values[u][j] *= factors.value[j];
    }
  }
  uint32_t most = 0;
#pragma unroll
  for (int u = 0; u < kOf; ++u)
    if (u * blockDim.x + threadIdx.x < items_per_row) most = max(most, largest_magnitude(values[u]));
  const float scale = int8_scale(__uint_as_float(block_max(most)));
  if (threadIdx.x == 0) scales[row] = scale;
  const float inverse = int8_inverse(scale, false);
  const PhiloxKey none{PhiloxState{}};
#pragma unroll
  for (int u = 0; u < kOf; ++u) {
    const uint32_t item = u * blockDim.x + threadIdx.x;
    if (item >= items_per_row) continue;
    float scaled[kItem];
#pragma unroll
    for (int j = 0; j < kItem; ++j) scaled[j] = values[u][j] * inverse;
    uint2 result = item_codes<false>(scaled, none, 0);
    if (!(scale == scale)) result = {0, 0};
    reinterpret_cast<uint2*>(codes)[row * items_per_row + item] = result;
  }
}

// kAligned: x, residual, weight and bias begin on 16 bytes. Where they do not the sums keep their order, so that the
// result does not depend on where a tensor lies.
template <typename T, int kOf, bool kAligned>
__global__ void __launch_bounds__(kOf == kWarpItems ? 32 * kWarpRows : kMaxThreads)
    norm_kernel(const Int8NormArgs a, uint32_t items_per_row) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (blockDim.y > 1 && row >= a.rows) return;
  const int64_t first = row * items_per_row;
  const void* __restrict__ residual = a.residual;
  auto* __restrict__ carried = static_cast<Pack<T, kItem>*>(a.carried);
  float values[kOf][kItem];
  float sum = 0.0f;
#pragma unroll
  for (int u = 0; u < kOf; ++u) {
    const uint32_t item = u * blockDim.x + threadIdx.x;
#pragma unroll
    for (int j = 0; j < kItem; ++j) values[u][j] = 0.0f;
    if (item >= items_per_row) continue;
    unpack(load_item<T, kAligned>(a.x, first + item), values[u]);
    if (residual) {
      float other[kItem];
      unpack(load_item<T, kAligned>(residual, first + item), other);
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
  if (!a.rms) m.mean = row_sum<0>(sum) / columns;
  float squares = 0.0f;
#pragma unroll
  for (int u = 0; u < kOf; ++u) {
    if (u * blockDim.x + threadIdx.x >= items_per_row) continue;
#pragma unroll
    for (int j = 0; j < kItem; ++j) {
      values[u][j] -= m.mean;
      squares = fmaf(values[u][j], values[u][j], squares);
    }
  }
  m.inverse = 1.0f / sqrtf(row_sum<1>(squares) / columns + a.eps);
#pragma unroll
  for (int u = 0; u < kOf; ++u) {
    const uint32_t item = u * blockDim.x + threadIdx.x;
    if (item >= items_per_row) continue;
    float weight[kItem], bias[kItem];
    if (a.weight) parameters<T, kAligned>(a.weight, a.parameter_dtype, item, weight);
    if (a.bias) parameters<T, kAligned>(a.bias, a.parameter_dtype, item, bias);
#pragma unroll
    for (int j = 0; j < kItem; ++j) {
      values[u][j] *= m.inverse;
      if (a.weight) values[u][j] *= weight[j];
      if (a.bias) values[u][j] += bias[j];
    }
    if (residual && a.post_norm) carried[first + item] = pack<T>(values[u]);
  }
  quantize_row<kOf>(values, a.column_factor, items_per_row, row, a.codes, a.scale);
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
    m.mean = row_sum<0>(sum) / columns;
  }
  float squares = 0.0f;
  for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x) {
    const float distance = summed<T>(a, first + c) - m.mean;
    squares += distance * distance;
  }
  m.inverse = 1.0f / sqrtf(row_sum<1>(squares) / columns + a.eps);
  const auto result = [&](int64_t c, float s) {
    return normalized(s, m, parameter<T>(a.weight, a.parameter_dtype, c, 1.0f),
                      parameter<T>(a.bias, a.parameter_dtype, c, 0.0f));
  };
  const auto factor = [&](int64_t c) { return a.column_factor ? a.column_factor[c] : 1.0f; };
  uint32_t most = 0;
  for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x)
    most = max(most, magnitude(result(c, summed<T>(a, first + c)) * factor(c)));
  const float scale = int8_scale(__uint_as_float(block_max(most)));
  if (threadIdx.x == 0) a.scale[row] = scale;
  const float inverse = int8_inverse(scale, false);
  for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x) {
    const float s = summed<T>(a, first + c), y = result(c, s);
    const auto code = static_cast<int8_t>(static_cast<uint8_t>(int8_code(y * factor(c) * inverse, 0.0f)));
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

template <typename T, Int8Activation kActivation, int kOf>
__global__ void __launch_bounds__(kMaxThreads) activation_kernel(const Int8ActivationArgs a, uint32_t items_per_row) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (blockDim.y > 1 && row >= a.rows) return;
  const int64_t first = row * items_per_row;
  const auto* __restrict__ x = static_cast<const Pack<T, kItem>*>(a.x);
  const auto* __restrict__ up = static_cast<const Pack<T, kItem>*>(a.up);
  float values[kOf][kItem];
#pragma unroll
  for (int u = 0; u < kOf; ++u) {
    const uint32_t item = u * blockDim.x + threadIdx.x;
    if (item >= items_per_row) continue;
    float other[kItem] = {};
    unpack(load(x + first + item), values[u]);
    if constexpr (kActivation == Int8Activation::kSiluMul) unpack(load(up + first + item), other);
#pragma unroll
    for (int j = 0; j < kItem; ++j) values[u][j] = activated<kActivation>(values[u][j], other[j]);
  }
  quantize_row<kOf>(values, a.column_factor, items_per_row, row, a.codes, a.scale);
}

template <typename T, Int8Activation kActivation>
__global__ void __launch_bounds__(kMaxThreads) activation_elements_kernel(const Int8ActivationArgs a) {
  const int64_t row = blockIdx.x, first = row * a.columns;
  const auto result = [&](int64_t c) {
    const float x = to_float(static_cast<const T*>(a.x)[first + c]);
    const float y = activated<kActivation>(x, a.up ? to_float(static_cast<const T*>(a.up)[first + c]) : 0.0f);
    return a.column_factor ? y * a.column_factor[c] : y;
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

bool fits(int64_t columns, const float* column_factor) {
  return columns % kItem == 0 && columns <= int64_t{kMaxThreads} * kItems * kItem && is_aligned(column_factor);
}

// Calls launch(items of a thread, thread blocks, threads) for rows of whole items that fit.
template <typename F>
void launch_rows(int64_t rows, int64_t items, const F& launch) {
  if (items <= 32 * kWarpItems) {
    launch(std::integral_constant<int, kWarpItems>{}, static_cast<unsigned>(ceil_div(rows, kWarpRows)),
           dim3(32, kWarpRows));
  } else {
    const auto threads = static_cast<unsigned>(ceil_div(ceil_div(items, kItems), 32) * 32);
    launch(std::integral_constant<int, kItems>{}, static_cast<unsigned>(rows), dim3(threads));
  }
}

constexpr unsigned kElementThreads = 512;

}  // namespace

int int8_norm(const Int8NormArgs& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const auto rows = static_cast<unsigned>(a.rows);
  // The results are ours, and aligned.
  const bool aligned = is_aligned(a.x) && is_aligned(a.residual) && is_aligned(a.weight) && is_aligned(a.bias);
  const auto items = static_cast<uint32_t>(a.columns / kItem);
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (fits(a.columns, a.column_factor))
      launch_rows(a.rows, items, [&](auto of_thread, unsigned blocks, dim3 threads) {
        if (aligned)
          norm_kernel<T, of_thread.value, true><<<blocks, threads, 0, stream>>>(a, items);
        else
          norm_kernel<T, of_thread.value, false><<<blocks, threads, 0, stream>>>(a, items);
      });
    else
      norm_elements_kernel<T><<<rows, kElementThreads, 0, stream>>>(a);
  });
  return cudaGetLastError();
}

int int8_activation(const Int8ActivationArgs& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const auto rows = static_cast<unsigned>(a.rows);
  const bool whole = fits(a.columns, a.column_factor) && is_aligned(a.x) && is_aligned(a.up) && is_aligned(a.codes);
  const auto items = static_cast<uint32_t>(a.columns / kItem);
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto launch = [&](auto activation) {
      if (whole)
        launch_rows(a.rows, items, [&](auto of_thread, unsigned blocks, dim3 threads) {
          activation_kernel<T, activation.value, of_thread.value><<<blocks, threads, 0, stream>>>(a, items);
        });
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
