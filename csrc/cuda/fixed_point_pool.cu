#include "csrc/cuda/common.cuh"
#include "csrc/cuda/fixed_point_conv/conv.h"

// Pools of codes and the addition of two tensors.

namespace quantrain::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSumSlices = 8;  // of the pixels of an image, one per row of the block

template <bool kSigned>
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
  return kSigned ? __vmaxs4(a, b) : __vmaxu4(a, b);
}

// Lanes: kWords words of four codes per thread, or with kWords 0 one code.
template <bool kSigned, int kWords>
__global__ void __launch_bounds__(kThreads) fixed_point_max_pool2d_kernel(const FixedPointPoolArgs g) {
  using Unit = std::conditional_t<kWords == 0, uint8_t, Pack<uint32_t, kWords == 0 ? 1 : kWords>>;
  const int64_t units = g.c / static_cast<int64_t>(sizeof(Unit)), total = g.n * g.oh * g.ow * units;
  const auto* __restrict__ input = static_cast<const Unit*>(g.input);
  auto* __restrict__ output = static_cast<Unit*>(g.output);
  constexpr uint32_t kLowest = kSigned ? 0x80808080u : 0u;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < total;
       index += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t unit = index % units, pixel = index / units;
    const int64_t ox = pixel % g.ow, line = pixel / g.ow, oy = line % g.oh, image = line / g.oh;
    const int64_t y0 = oy * g.stride_h - g.padding_h, x0 = ox * g.stride_w - g.padding_w;
    const int64_t y_begin = y0 > 0 ? y0 : 0, y_end = y0 + g.kh < g.h ? y0 + g.kh : g.h;
    const int64_t x_begin = x0 > 0 ? x0 : 0, x_end = x0 + g.kw < g.w ? x0 + g.kw : g.w;
    uint32_t best[kWords == 0 ? 1 : kWords];
#pragma unroll
    for (uint32_t& word : best) word = kLowest;
    for (int64_t y = y_begin; y < y_end; ++y) {
      for (int64_t x = x_begin; x < x_end; ++x) {
        const Unit value = input[((image * g.h + y) * g.w + x) * units + unit];
        if constexpr (kWords == 0) {
          best[0] = larger<kSigned>(best[0], value);
        } else {
#pragma unroll
          for (int i = 0; i < kWords; ++i) best[i] = larger<kSigned>(best[i], value.value[i]);
        }
      }
    }
    if constexpr (kWords == 0) {
      output[index] = static_cast<uint8_t>(best[0]);
    } else {
      Unit result;
#pragma unroll
      for (int i = 0; i < kWords; ++i) result.value[i] = best[i];
      output[index] = result;
    }
  }
}

// Threads (32 units of channels, kSumSlices). kUnit: channels of a thread, 1 or 4.
template <bool kSigned, int kUnit>
__global__ void __launch_bounds__(32 * kSumSlices)
    fixed_point_sum_pool2d_kernel(const FixedPointPoolArgs g, int64_t channel_blocks) {
  __shared__ int32_t parts[kSumSlices][32 * kUnit];
  const int64_t image = blockIdx.x / channel_blocks;
  const int64_t channel = (blockIdx.x % channel_blocks * 32 + threadIdx.x) * kUnit;
  int32_t sums[kUnit] = {};
  if (channel < g.c) {
    const auto* const first = static_cast<const uint8_t*>(g.input) + image * g.h * g.w * g.c + channel;
    for (int64_t pixel = threadIdx.y; pixel < g.h * g.w; pixel += kSumSlices) {
      uint32_t word;
      if constexpr (kUnit == 4)
        word = *reinterpret_cast<const uint32_t*>(first + pixel * g.c);
      else
        word = first[pixel * g.c];
#pragma unroll
      for (int i = 0; i < kUnit; ++i)
        sums[i] += kSigned ? static_cast<int8_t>(word >> i * 8) : static_cast<uint8_t>(word >> i * 8);
    }
  }
#pragma unroll
  for (int i = 0; i < kUnit; ++i) parts[threadIdx.y][threadIdx.x * kUnit + i] = sums[i];
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.y) * 32 + static_cast<int>(threadIdx.x);
  const int64_t mine = blockIdx.x % channel_blocks * 32 * kUnit + thread;
  if (thread >= 32 * kUnit || mine >= g.c) return;
  int32_t sum = 0;
#pragma unroll
  for (int slice = 0; slice < kSumSlices; ++slice) sum += parts[slice][thread];
  static_cast<int32_t*>(g.output)[image * g.c + mine] = sum;
}

__global__ void __launch_bounds__(kThreads) fixed_point_add_kernel(const FixedPointAddArgs g) {
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < g.numel;
       index += static_cast<int64_t>(gridDim.x) * kThreads) {
    int64_t channel = 0;
    if (g.a_fraction_length_stride | g.b_fraction_length_stride) channel = index / g.inner % g.channels;
    g.output[index] =
        fixed_point_added(fixed_point_integer(g.a, g.a_type, index), fixed_point_integer(g.b, g.b_type, index),
                          g.a_fraction_length[channel * g.a_fraction_length_stride],
                          g.b_fraction_length[channel * g.b_fraction_length_stride]);
  }
}

}  // namespace

int fixed_point_max_pool2d(const FixedPointPoolArgs& a, void* stream) {
  const int64_t total = a.n * a.oh * a.ow * a.c;
  if (total == 0) return cudaSuccess;
  const auto aligned = [&](uintptr_t bytes) {
    return a.c % static_cast<int64_t>(bytes) == 0 && reinterpret_cast<uintptr_t>(a.input) % bytes == 0 &&
           reinterpret_cast<uintptr_t>(a.output) % bytes == 0;
  };
  const auto s = static_cast<cudaStream_t>(stream);
  dispatch_bool(a.input_signed, [&](auto is_signed) {
    constexpr bool kSigned = is_signed.value;
    if (aligned(16))
      fixed_point_max_pool2d_kernel<kSigned, 4><<<grid_for(total / 16, kThreads), kThreads, 0, s>>>(a);
    else if (aligned(4))
      fixed_point_max_pool2d_kernel<kSigned, 1><<<grid_for(total / 4, kThreads), kThreads, 0, s>>>(a);
    else
      fixed_point_max_pool2d_kernel<kSigned, 0><<<grid_for(total, kThreads), kThreads, 0, s>>>(a);
  });
  return cudaGetLastError();
}

int fixed_point_sum_pool2d(const FixedPointPoolArgs& a, void* stream) {
  if (a.n * a.c == 0) return cudaSuccess;
  const bool words = a.c % 4 == 0 && reinterpret_cast<uintptr_t>(a.input) % 4 == 0;
  const int64_t channel_blocks = ceil_div(a.c, words ? 128 : 32);
  const dim3 block(32, kSumSlices);
  const auto blocks = static_cast<unsigned>(a.n * channel_blocks);
  const auto s = static_cast<cudaStream_t>(stream);
  dispatch_bool(a.input_signed, [&](auto is_signed) {
    constexpr bool kSigned = is_signed.value;
    if (words)
      fixed_point_sum_pool2d_kernel<kSigned, 4><<<blocks, block, 0, s>>>(a, channel_blocks);
    else
      fixed_point_sum_pool2d_kernel<kSigned, 1><<<blocks, block, 0, s>>>(a, channel_blocks);
  });
  return cudaGetLastError();
}

int fixed_point_add(const FixedPointAddArgs& a, void* stream) {
  if (a.numel == 0) return cudaSuccess;
  fixed_point_add_kernel<<<grid_for(a.numel, kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
