#include "csrc/cuda/device.h"
#include "csrc/cuda/int8.cuh"
#include "csrc/cuda/int8.h"
#include "csrc/cuda/overlap.cuh"

// Norms and activations whose results are quantized before they leave the registers: one row per thread block. Rows of
// whole items that fit are read once; others are read anew for each of the passes over them.

namespace quantrain::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kWarpItems = 4;  // of a lane, where a warp takes a row
constexpr int kWarpRows = 8;   // of a thread block then
constexpr int kItems = 2;      // of a thread, where a thread block takes a row: float32 results wait in registers

constexpr int kShortItems = 256;  // of a row whose threads have one each

// The sum over a row's threads, for each of them. value[u]: of item u * blockDim.x + threadIdx.x. Items i, i + 32, ...
// are added one after another, then 32 sums in a tree: an order that depends on the row's length alone, not on how many
// threads share it. kTurn: each sum of a kernel has its own shared memory, so that one barrier does.
template <int kTurn, int kOf>
__device__ __forceinline__ float row_sum(const float (&value)[kOf], uint32_t items_per_row) {
  float sum = 0.0f;
  if (kOf == kWarpItems || blockDim.x == 32) {
#pragma unroll
    for (int u = 0; u < kOf; ++u) sum += value[u];
  } else {
    __shared__ float of_item[kOf == 1 ? kShortItems : kOf == kItems ? kMaxThreads * kItems : 1];
#pragma unroll
    for (int u = 0; u < kOf; ++u) {
      const uint32_t item = u * blockDim.x + threadIdx.x;
      if (item < items_per_row) of_item[item] = value[u];
    }
    __syncthreads();
    for (uint32_t item = threadIdx.x % 32; item < items_per_row; item += 32) sum += of_item[item];
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum;
}

// The same of single elements, one sum per thread.
template <int kTurn>
__device__ __forceinline__ float thread_sum(float value) {
  __shared__ float of_warp[32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
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

// Calls f(u, item) for this thread's items. kFull: there are as many for each thread, and no branch keeps the compiler
// from starting all loads at once.
template <int kOf, bool kFull, typename F>
__device__ __forceinline__ void for_items(uint32_t items_per_row, const F& f) {
#pragma unroll
  for (int u = 0; u < kOf; ++u) {
    const uint32_t item = u * blockDim.x + threadIdx.x;
    if (kFull || item < items_per_row) f(u, item);
  }
}

// The codes and the scale of a row whose values a row's threads hold; kOf items each. factor: on 16 bytes, or null.
template <int kOf, bool kFull>
__device__ __forceinline__ void quantize_row(float (&values)[kOf][kItem], const float* __restrict__ factor,
                                             uint32_t items_per_row, int64_t row, int8_t* __restrict__ codes,
                                             float* __restrict__ scales) {
  if (factor) {
    for_items<kOf, kFull>(items_per_row, [&](int u, uint32_t item) {
      const auto factors = load(reinterpret_cast<const Pack<float, kItem>*>(factor) + item);
#pragma unroll
      for (int j = 0; j < kItem; ++j) values[u][j] *= factors.value[j];
    });
  }
  uint32_t most = 0;
  for_items<kOf, kFull>(items_per_row, [&](int u, uint32_t) { most = max(most, largest_magnitude(values[u])); });
  const float scale = int8_scale(__uint_as_float(block_max(most)));
  if (threadIdx.x == 0) scales[row] = scale;
  const float inverse = int8_inverse(scale, false);
  const PhiloxKey none{PhiloxState{}};
  for_items<kOf, kFull>(items_per_row, [&](int u, uint32_t item) {
    float scaled[kItem];
#pragma unroll
    for (int j = 0; j < kItem; ++j) scaled[j] = values[u][j] * inverse;
    uint2 result = item_codes<false>(scaled, none, 0);
    if (!(scale == scale)) result = {0, 0};
    reinterpret_cast<uint2*>(codes)[row * items_per_row + item] = result;
  });
}

// values * weight + bias, parameters of type P.
template <typename P, int kOf, bool kFull, bool kAligned>
__device__ __forceinline__ void scale_and_shift(const Int8NormArgs& a, uint32_t items_per_row,
                                                float (&values)[kOf][kItem]) {
  float parameter[kOf][kItem];
  if (a.weight) {
    for_items<kOf, kFull>(items_per_row,
                          [&](int u, uint32_t item) { unpack(load_item<P, kAligned>(a.weight, item), parameter[u]); });
    for_items<kOf, kFull>(items_per_row, [&](int u, uint32_t) {
#pragma unroll
      for (int j = 0; j < kItem; ++j) values[u][j] *= parameter[u][j];
    });
  }
  if (a.bias) {
    for_items<kOf, kFull>(items_per_row,
                          [&](int u, uint32_t item) { unpack(load_item<P, kAligned>(a.bias, item), parameter[u]); });
    for_items<kOf, kFull>(items_per_row, [&](int u, uint32_t) {
#pragma unroll
      for (int j = 0; j < kItem; ++j) values[u][j] += parameter[u][j];
    });
  }
}

// kAligned: x, residual, weight and bias begin on 16 bytes. A row's result does not depend on it, nor on how many
// threads share the row.
template <typename T, int kOf, bool kFull, bool kAligned>
__global__ void __launch_bounds__(kOf == kWarpItems ? 32 * kWarpRows : kMaxThreads)
    norm_kernel(const Int8NormArgs a, uint32_t items_per_row) {
  ptx::begin_overlapping();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (blockDim.y > 1 && row >= a.rows) return;
  const int64_t first = row * items_per_row;
  const void* __restrict__ residual = a.residual;
  auto* __restrict__ carried = static_cast<Pack<T, kItem>*>(a.carried);
  float values[kOf][kItem] = {};
  Pack<T, kItem> read[kOf];
  for_items<kOf, kFull>(items_per_row,
                        [&](int u, uint32_t item) { read[u] = load_item<T, kAligned>(a.x, first + item); });
  if (residual) {
    Pack<T, kItem> other[kOf];
    for_items<kOf, kFull>(items_per_row,
                          [&](int u, uint32_t item) { other[u] = load_item<T, kAligned>(residual, first + item); });
    for_items<kOf, kFull>(items_per_row, [&](int u, uint32_t item) {
      float added[kItem];
      unpack(read[u], values[u]);
      unpack(other[u], added);
#pragma unroll
      for (int j = 0; j < kItem; ++j) values[u][j] += added[j];
      read[u] = pack<T>(values[u]);
      if (!a.post_norm) carried[first + item] = read[u];
    });
  }
  float sums[kOf] = {};
  for_items<kOf, kFull>(items_per_row, [&](int u, uint32_t) {
    unpack(read[u], values[u]);
#pragma unroll
    for (int j = 0; j < kItem; ++j) sums[u] += values[u][j];
  });
  const auto columns = static_cast<float>(a.columns);
  Moments m{0.0f, 0.0f};
  if (!a.rms) m.mean = row_sum<0>(sums, items_per_row) / columns;
  for_items<kOf, kFull>(items_per_row, [&](int u, uint32_t) {
    sums[u] = 0.0f;
#pragma unroll
    for (int j = 0; j < kItem; ++j) {
      values[u][j] -= m.mean;
      sums[u] = fmaf(values[u][j], values[u][j], sums[u]);
    }
  });
  m.inverse = 1.0f / sqrtf(row_sum<1>(sums, items_per_row) / columns + a.eps);
#pragma unroll
  for (int u = 0; u < kOf; ++u)
#pragma unroll
    for (int j = 0; j < kItem; ++j) values[u][j] *= m.inverse;
  if (a.parameter_dtype == DType::kFloat32)
    scale_and_shift<float, kOf, kFull, kAligned>(a, items_per_row, values);
  else
    scale_and_shift<T, kOf, kFull, kAligned>(a, items_per_row, values);
  if (residual && a.post_norm)
    for_items<kOf, kFull>(items_per_row, [&](int u, uint32_t item) { carried[first + item] = pack<T>(values[u]); });
  if (a.values) {
    auto* __restrict__ result = static_cast<Pack<T, kItem>*>(a.values);
    for_items<kOf, kFull>(items_per_row, [&](int u, uint32_t item) { result[first + item] = pack<T>(values[u]); });
    return;
  }
  quantize_row<kOf, kFull>(values, a.column_factor, items_per_row, row, a.codes, a.scale);
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
    m.mean = thread_sum<0>(sum) / columns;
  }
  float squares = 0.0f;
  for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x) {
    const float distance = summed<T>(a, first + c) - m.mean;
    squares += distance * distance;
  }
  m.inverse = 1.0f / sqrtf(thread_sum<1>(squares) / columns + a.eps);
  const auto result = [&](int64_t c, float s) {
    return normalized(s, m, parameter<T>(a.weight, a.parameter_dtype, c, 1.0f),
                      parameter<T>(a.bias, a.parameter_dtype, c, 0.0f));
  };
  const auto factor = [&](int64_t c) { return a.column_factor ? a.column_factor[c] : 1.0f; };
  if (a.values) {
    for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x) {
      const float s = summed<T>(a, first + c), y = result(c, s);
      static_cast<T*>(a.values)[first + c] = from_float<T>(y);
      if (a.carried) static_cast<T*>(a.carried)[first + c] = from_float<T>(a.post_norm ? y : s);
    }
    return;
  }
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
  if constexpr (kActivation == Int8Activation::kRelu) return relu(x);
  return silu(x) * up;
}

template <typename T, Int8Activation kActivation, int kOf, bool kFull>
__global__ void __launch_bounds__(kMaxThreads) activation_kernel(const Int8ActivationArgs a, uint32_t items_per_row) {
  ptx::begin_overlapping();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (blockDim.y > 1 && row >= a.rows) return;
  const int64_t first = row * (a.stride / kItem);
  const auto* __restrict__ x = static_cast<const Pack<T, kItem>*>(a.x);
  const auto* __restrict__ up = static_cast<const Pack<T, kItem>*>(a.up);
  Pack<T, kItem> read[kOf], other[kOf];
  for_items<kOf, kFull>(items_per_row, [&](int u, uint32_t item) {
    read[u] = load(x + first + item);
    if constexpr (kActivation == Int8Activation::kSiluMul) other[u] = load(up + first + item);
  });
  float values[kOf][kItem];
  for_items<kOf, kFull>(items_per_row, [&](int u, uint32_t) {
    float factor[kItem] = {};
    unpack(read[u], values[u]);
    if constexpr (kActivation == Int8Activation::kSiluMul) unpack(other[u], factor);
#pragma unroll
    for (int j = 0; j < kItem; ++j) values[u][j] = activated<kActivation>(values[u][j], factor[j]);
  });
  if (a.values) {
    auto* __restrict__ result = static_cast<Pack<T, kItem>*>(a.values) + row * items_per_row;
    for_items<kOf, kFull>(items_per_row, [&](int u, uint32_t item) { result[item] = pack<T>(values[u]); });
    return;
  }
  quantize_row<kOf, kFull>(values, a.column_factor, items_per_row, row, a.codes, a.scale);
}

template <typename T, Int8Activation kActivation>
__global__ void __launch_bounds__(kMaxThreads) activation_elements_kernel(const Int8ActivationArgs a) {
  const int64_t row = blockIdx.x, first = row * a.columns;
  const auto result = [&](int64_t c) {
    const float x = to_float(static_cast<const T*>(a.x)[row * a.stride + c]);
    const float y = activated<kActivation>(x, a.up ? to_float(static_cast<const T*>(a.up)[row * a.stride + c]) : 0.0f);
    return a.column_factor ? y * a.column_factor[c] : y;
  };
  if (a.values) {
    for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x)
      static_cast<T*>(a.values)[first + c] = from_float<T>(result(c));
    return;
  }
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

// Calls launch(items of a thread, whether each has as many, thread blocks, threads) for rows of whole items that fit. A
// warp takes a row where it fits and there are rows enough for all multiprocessors; else many threads share it.
template <typename F>
void launch_rows(int64_t rows, int64_t items, const F& launch) {
  const auto with = [&](auto of_thread, unsigned blocks, dim3 threads) {
    dispatch_bool(items == static_cast<int64_t>(threads.x) * of_thread.value,
                  [&](auto full) { launch(of_thread, full, blocks, threads); });
  };
  const auto by_blocks = [&](auto of_thread) {
    const auto threads = static_cast<unsigned>(ceil_div(ceil_div(items, of_thread.value), 32) * 32);
    with(of_thread, static_cast<unsigned>(rows), dim3(threads));
  };
  if (items <= 32 * kWarpItems && rows >= int64_t{kWarpRows} * multiprocessors())
    with(std::integral_constant<int, kWarpItems>{}, static_cast<unsigned>(ceil_div(rows, kWarpRows)),
         dim3(32, kWarpRows));
  else if (items <= kShortItems)
    by_blocks(std::integral_constant<int, 1>{});
  else
    by_blocks(std::integral_constant<int, kItems>{});
}

constexpr unsigned kElementThreads = 512;

// y += x, eight elements a thread.
template <typename T>
__global__ void __launch_bounds__(256)
    add_kernel(const Pack<T, kItem>* __restrict__ x, Pack<T, kItem>* __restrict__ y, int64_t items) {
  ptx::begin_overlapping();
  const int64_t item = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (item >= items) return;
  float a[kItem], b[kItem];
  unpack(load(x + item), a);
  unpack(load(y + item), b);
#pragma unroll
  for (int j = 0; j < kItem; ++j) b[j] += a[j];
  y[item] = pack<T>(b);
}

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
      launch_rows(a.rows, items, [&](auto of_thread, auto full, unsigned blocks, dim3 threads) {
        const auto kernel =
            aligned ? norm_kernel<T, of_thread.value, full.value, true> : norm_kernel<T, of_thread.value, false, false>;
        launch_overlapping(kernel, dim3(blocks), threads, 0, stream, a, items);
      });
    else
      norm_elements_kernel<T><<<rows, kElementThreads, 0, stream>>>(a);
  });
  return cudaGetLastError();
}

int add_to(const void* x, void* y, DType dtype, int64_t elements, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const int64_t items = elements / kItem;
  dispatch_float(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch_overlapping(add_kernel<T>, dim3(static_cast<unsigned>(ceil_div(items, 256))), dim3(256), 0, stream,
                       static_cast<const Pack<T, kItem>*>(x), static_cast<Pack<T, kItem>*>(y), items);
  });
  return cudaGetLastError();
}

int int8_activation(const Int8ActivationArgs& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const auto rows = static_cast<unsigned>(a.rows);
  const bool whole = fits(a.columns, a.column_factor) && a.stride % kItem == 0 && is_aligned(a.x) && is_aligned(a.up) &&
                     is_aligned(a.codes);
  const auto items = static_cast<uint32_t>(a.columns / kItem);
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto launch = [&](auto activation) {
      if (whole)
        launch_rows(a.rows, items, [&](auto of_thread, auto full, unsigned blocks, dim3 threads) {
          launch_overlapping(activation_kernel<T, activation.value, of_thread.value, full.value>, dim3(blocks), threads,
                             0, stream, a, items);
        });
      else
        activation_elements_kernel<T, activation.value><<<rows, kElementThreads, 0, stream>>>(a);
    };
    switch (a.activation) {
      case Int8Activation::kGeluErf:
        return launch(std::integral_constant<Int8Activation, Int8Activation::kGeluErf>{});
      case Int8Activation::kGeluTanh:
        return launch(std::integral_constant<Int8Activation, Int8Activation::kGeluTanh>{});
      case Int8Activation::kRelu:
        return launch(std::integral_constant<Int8Activation, Int8Activation::kRelu>{});
      case Int8Activation::kSiluMul:
        return launch(std::integral_constant<Int8Activation, Int8Activation::kSiluMul>{});
    }
  });
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
