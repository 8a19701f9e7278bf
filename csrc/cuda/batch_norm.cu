#include "csrc/cuda/batch_norm.h"

#include "csrc/cuda/common.cuh"
#include "csrc/cuda/joins.cuh"

// Batch norm in training: two passes over a tensor forward, two backward, with everything that follows a convolution in
// them. Where channels lie side by side (channels last) a thread keeps eight of them and goes down the rows; where a
// channel's elements do (contiguous), eight elements share one. Sums go in parts, which are added in their order.
// Compiled with --fmad=false, as fake_quant.cu.

namespace quantrain::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;  // elements: a byte of the mask, 16 bytes of a 16-bit type
constexpr int kUnroll = 4;

// ---- the walk over a tensor -----------------------------------------------------------------------------------------

// How the elements of a thread's vector lie: kSide, eight channels; kAlong, eight elements of one channel. kSize is 8,
// or 1 where the sizes are no multiples or a tensor does not begin on 16 bytes.
enum class Lie { kSide, kAlong };

// Calls visit(first elements, how many) for a thread's vectors of one part of a channel (kAlong) or of its eight
// (kSide), kUnroll at a time, so that what is read can be asked for before what is written.
template <Lie kLie, int kSize, typename Visit>
__device__ __forceinline__ void for_each_of_part(const ChannelLayout& l, int64_t parts, int lanes, const Visit& visit) {
  const int64_t rows = (l.outer + parts - 1) / parts, begin = blockIdx.y * rows;
  const int64_t end = begin + rows < l.outer ? begin + rows : l.outer;
  int64_t at[kUnroll];
  if constexpr (kLie == Lie::kSide) {
    const int64_t column = (static_cast<int64_t>(blockIdx.x) * lanes + threadIdx.x % lanes) * kSize;
    if (column >= l.channels) return;
    const int step = kThreads / lanes;
    for (int64_t row = begin + threadIdx.x / lanes; row < end; row += kUnroll * step) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) at[u] = (row + u * step) * l.channels + column;
      const int64_t left = (end - row + step - 1) / step;
      visit(at, left < kUnroll ? static_cast<int>(left) : kUnroll);
    }
  } else {
    const uint32_t per_row = static_cast<uint32_t>(l.inner / kSize);
    const int64_t count = (end - begin) * per_row;
    for (int64_t k = threadIdx.x; k < count; k += kUnroll * kThreads) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t vector = k + u * kThreads, row = vector / per_row;
        at[u] = ((begin + row) * l.channels + blockIdx.x) * l.inner + (vector - row * per_row) * kSize;
      }
      const int64_t left = (count - k + kThreads - 1) / kThreads;
      visit(at, left < kUnroll ? static_cast<int>(left) : kUnroll);
    }
  }
}

// The vectors at `at` that are there.
template <typename T, int kSize>
__device__ __forceinline__ void load_all(const void* __restrict__ from, const int64_t (&at)[kUnroll], int count,
                                         Pack<T, kSize> (&packs)[kUnroll]) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u)
    if (u < count) packs[u] = *reinterpret_cast<const Pack<T, kSize>*>(static_cast<const T*>(from) + at[u]);
}

template <typename T, int kSize>
__device__ __forceinline__ void load_values(const void* __restrict__ from, int64_t at, float (&values)[kSize]) {
  unpack(*reinterpret_cast<const Pack<T, kSize>*>(static_cast<const T*>(from) + at), values);
}

template <typename T, int kSize>
__device__ __forceinline__ void store_values(void* __restrict__ to, int64_t at, const float (&values)[kSize]) {
  *reinterpret_cast<Pack<T, kSize>*>(static_cast<T*>(to) + at) = pack<T, kSize>(values);
}

// The bits of kSize elements, in the lowest places.
template <int kSize>
__device__ __forceinline__ uint32_t mask_bits(const uint8_t* __restrict__ mask, int64_t at) {
  if constexpr (kSize == kVector) return mask[at / 8];
  return mask[at / 8] >> (at % 8) & 1u;
}

// Joins a block's values into partial[statistic], in a fixed order. Every thread calls it, those without a channel too.
template <Lie kLie, int kSize, typename Join>
__device__ __forceinline__ void join_block(const float (&values)[kSize], int lanes, int64_t channels,
                                           float* __restrict__ partial, const Join& join) {
  __shared__ float of_thread[kThreads * kSize];
  __syncthreads();  // what was joined before may still be read
  if constexpr (kLie == Lie::kSide) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) of_thread[threadIdx.x * kSize + j] = values[j];
    __syncthreads();
    const int width = lanes * kSize;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * width + threadIdx.x;
    if (threadIdx.x < width && column < channels) {
      float total = of_thread[threadIdx.x];
      for (int row = 1; row < kThreads / lanes; ++row) total = join(total, of_thread[row * width + threadIdx.x]);
      partial[column] = total;
    }
  } else {
    float value = values[0];
#pragma unroll
    for (int j = 1; j < kSize; ++j) value = join(value, values[j]);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value = join(value, __shfl_xor_sync(0xffffffffu, value, offset));
    if (threadIdx.x % 32 == 0) of_thread[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int warp = 1; warp < kThreads / 32; ++warp) value = join(value, of_thread[warp]);
      partial[blockIdx.x] = value;
    }
  }
}

// The channel of element j of a thread's vector.
template <Lie kLie, int kSize>
__device__ __forceinline__ int64_t channel_of(int j, int lanes) {
  if constexpr (kLie == Lie::kAlong) return blockIdx.x;
  return (static_cast<int64_t>(blockIdx.x) * lanes + threadIdx.x % lanes) * kSize + j;
}

// The norms of a thread's channels: kSize of them, or one.
template <Lie kLie, int kSize>
struct ThreadNorms {
  ChannelNorm norm[kLie == Lie::kSide ? kSize : 1];

  __device__ __forceinline__ ThreadNorms(const BatchNormParams& p, int64_t channels, int lanes) {
#pragma unroll
    for (int j = 0; j < (kLie == Lie::kSide ? kSize : 1); ++j) {
      const int64_t c = channel_of<kLie, kSize>(j, lanes);
      norm[j] = channel_norm(p, c < channels ? c : 0);
    }
  }

  __device__ __forceinline__ ChannelNorm operator[](int j) const { return norm[kLie == Lie::kSide ? j : 0]; }
};

// ---- kernels --------------------------------------------------------------------------------------------------------

template <typename T, Lie kLie, int kSize>
__global__ void __launch_bounds__(kThreads) statistics_kernel(const BatchNormStatisticsArgs a, int lanes) {
  const int64_t channels = a.layout.channels;
  float first[kSize], sum[kSize], squares[kSize], low[kSize], high[kSize];
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const int64_t c = channel_of<kLie, kSize>(j, lanes);
    first[j] = to_float(static_cast<const T*>(a.y)[(c < channels ? c : 0) * a.layout.inner]);
    sum[j] = squares[j] = 0.0f;
    low[j] = Min::kNothing;
    high[j] = Max::kNothing;
  }
  for_each_of_part<kLie, kSize>(a.layout, a.parts, lanes, [&](const int64_t (&at)[kUnroll], int count) {
    Pack<T, kSize> packs[kUnroll];
    load_all(a.y, at, count, packs);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= count) break;
      float y[kSize];
      unpack(packs[u], y);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float distance = y[j] - first[j];
        sum[j] += distance;
        squares[j] = __fmaf_rn(distance, distance, squares[j]);
        low[j] = Min{}(low[j], y[j]);
        high[j] = Max{}(high[j], y[j]);
      }
    }
  });
  float* __restrict__ partial = a.partial + blockIdx.y * 4 * channels;
  join_block<kLie>(sum, lanes, channels, partial, Sum{});
  join_block<kLie>(squares, lanes, channels, partial + channels, Sum{});
  join_block<kLie>(low, lanes, channels, partial + 2 * channels, Min{});
  join_block<kLie>(high, lanes, channels, partial + 3 * channels, Max{});
}

// 32 threads add a channel's parts, every 32nd each, then one adds theirs. Neighbours read neighbouring channels.
template <typename T>
__global__ void __launch_bounds__(kThreads) fold_kernel(const BatchNormFoldArgs a) {
  const int64_t channels = a.layout.channels;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x % (kThreads / 32);
  const int lane = threadIdx.x / (kThreads / 32);
  __shared__ double sum[kThreads], squares[kThreads];
  __shared__ float low[kThreads], high[kThreads];
  ChannelSums sums;
  if (c < channels)
    for (int64_t part = lane; part < a.parts; part += 32) {
      const float* __restrict__ p = a.partial + part * 4 * channels + c;
      sums.add(p[0], p[channels], p[2 * channels], p[3 * channels]);
    }
  sum[threadIdx.x] = sums.sum;
  squares[threadIdx.x] = sums.squares;
  low[threadIdx.x] = sums.min;
  high[threadIdx.x] = sums.max;
  __syncthreads();
  if (lane != 0 || c >= channels) return;
  for (int other = 1; other < 32; ++other) {
    const int from = other * (kThreads / 32) + static_cast<int>(threadIdx.x);
    sums.add(sum[from], squares[from], low[from], high[from]);
  }
  store_statistics(a, c, sums, to_float(static_cast<const T*>(a.y)[c * a.layout.inner]));
}

template <Activation kActivation>
__global__ void __launch_bounds__(kThreads) update_kernel(const BatchNormUpdateArgs a) {
  float low = Min::kNothing, high = Max::kNothing;
  for (int64_t c = threadIdx.x; c < a.channels; c += kThreads) {
    if (a.range) {
      const Extremes e = output_extremes<kActivation>(a, c);
      low = Min{}(low, e.min);
      high = Max{}(high, e.max);
    }
    if (a.running_mean) update_running(a, c);
  }
  if (!a.range) return;
  __shared__ float lows[kThreads / 32], highs[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    low = Min{}(low, __shfl_xor_sync(0xffffffffu, low, offset));
    high = Max{}(high, __shfl_xor_sync(0xffffffffu, high, offset));
  }
  if (threadIdx.x % 32 == 0) {
    lows[threadIdx.x / 32] = low;
    highs[threadIdx.x / 32] = high;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kThreads / 32; ++warp) {
    low = Min{}(low, lows[warp]);
    high = Max{}(high, highs[warp]);
  }
  a.range[0] = low;
  a.range[1] = high;
}

// What becomes of one vector's values after the norm: the activation, the codes and the mask.
struct Finish {
  QParams qparams;
  QuantRange range;
  bool quantizes;

  __device__ __forceinline__ explicit Finish(const BatchNormApplyArgs& a) : range(a.range), quantizes(a.qparams.scale) {
    qparams = quantizes ? load_qparams(a.qparams, 0, a.range) : QParams{};
  }

  template <Activation kActivation, int kSize>
  __device__ __forceinline__ uint32_t operator()(float (&z)[kSize], float (&codes)[kSize]) const {
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      bool passes = activation_slope<kActivation>(z[j]) != 0.0f;
      z[j] = activated<kActivation>(z[j]);
      if (quantizes) {
        const float v = unclamped_code(z[j], qparams);
        passes &= code_in_range(v, range);
        codes[j] = clamp_code(v, range);
        z[j] = dequantized(codes[j], qparams);
      }
      bits |= static_cast<uint32_t>(passes) << j;
    }
    return bits;
  }
};

// NaN's code is the one nearest to zero.
template <int kSize>
__device__ __forceinline__ void store_codes(void* __restrict__ to, int64_t at, const float (&codes)[kSize],
                                            const Finish& finish) {
  Pack<uint8_t, kSize> result;
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const float code = codes[j] == codes[j] ? codes[j] : clamp_code(finish.qparams.zero_point, finish.range);
    // The low byte of code + 3 2^22 is the code's, of either sign. A conversion would have a quarter of the rate.
    result.value[j] = static_cast<uint8_t>(__float_as_uint(code + 12582912.0f));
  }
  *reinterpret_cast<Pack<uint8_t, kSize>*>(static_cast<uint8_t*>(to) + at) = result;
}

template <typename T, Lie kLie, Activation kActivation>
__global__ void __launch_bounds__(kThreads) apply_kernel(const BatchNormApplyArgs a, int64_t parts, int lanes) {
  const Finish finish(a);
  const ThreadNorms<kLie, kVector> norms(a.params, a.layout.channels, lanes);
  for_each_of_part<kLie, kVector>(a.layout, parts, lanes, [&](const int64_t (&at)[kUnroll], int count) {
    Pack<T, kVector> packs[kUnroll], others[kUnroll];
    load_all(a.y, at, count, packs);
    if (a.residual) load_all(a.residual, at, count, others);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= count) break;
      float z[kVector], codes[kVector];
      unpack(packs[u], z);
#pragma unroll
      for (int j = 0; j < kVector; ++j) z[j] = normalized(z[j], norms[j]);
      if (a.residual) {
        float other[kVector];
        unpack(others[u], other);
#pragma unroll
        for (int j = 0; j < kVector; ++j) z[j] += other[j];
      }
      const uint32_t bits = finish.template operator()<kActivation>(z, codes);
      store_values<T>(a.output, at[u], z);
      if (a.codes) store_codes(a.codes, at[u], codes, finish);
      if (a.mask) a.mask[at[u] / 8] = static_cast<uint8_t>(bits);
    }
  });
}

// Any sizes: a thread takes the elements of a byte of the mask, whose channels it looks up.
template <typename T, Activation kActivation>
__global__ void __launch_bounds__(kThreads) apply_any_kernel(const BatchNormApplyArgs a) {
  const Finish finish(a);
  const int64_t numel = a.layout.numel(), byte = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  uint32_t bits = 0;
  for (int j = 0; j < 8 && byte * 8 + j < numel; ++j) {
    const int64_t at = byte * 8 + j;
    float z[1], codes[1];
    load_values<T>(a.y, at, z);
    z[0] = normalized(z[0], channel_norm(a.params, at / a.layout.inner % a.layout.channels));
    if (a.residual) z[0] += to_float(static_cast<const T*>(a.residual)[at]);
    bits |= finish.template operator()<kActivation>(z, codes) << j;
    store_values<T>(a.output, at, z);
    if (a.codes) store_codes(a.codes, at, codes, finish);
  }
  if (a.mask && byte * 8 < numel) a.mask[byte] = static_cast<uint8_t>(bits);
}

// g: the gradient at the norm's output.
template <Activation kActivation>
__device__ __forceinline__ float norm_gradient(float grad_output, uint32_t passes, float y, ChannelNorm norm) {
  const float g = passes ? grad_output : 0.0f;
  if constexpr (kActivation == Activation::kIdentity) return g;
  return g * activation_slope<kActivation>(normalized(y, norm));
}

template <typename T, Lie kLie, int kSize, Activation kActivation, bool kLearned>
__global__ void __launch_bounds__(kThreads) reduce_kernel(const BatchNormReduceArgs a, int lanes) {
  const int64_t channels = a.layout.channels;
  const ThreadNorms<kLie, kSize> norms(a.params, channels, lanes);
  const QParams p = kLearned ? load_qparams(a.qparams, 0, a.range) : QParams{};
  float sum[kSize], product[kSize], of_step[kLearned ? kSize : 1];
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    sum[j] = product[j] = 0.0f;
    if constexpr (kLearned) of_step[j] = 0.0f;
  }
  for_each_of_part<kLie, kSize>(a.layout, a.parts, lanes, [&](const int64_t (&at)[kUnroll], int count) {
    Pack<T, kSize> ys[kUnroll], gradients[kUnroll];
    uint32_t bits[kUnroll];
    load_all(a.y, at, count, ys);
    load_all(a.grad_output, at, count, gradients);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) bits[u] = a.mask && u < count ? mask_bits<kSize>(a.mask, at[u]) : 0xffu;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= count) break;
      float y[kSize], g[kSize];
      unpack(ys[u], y);
      unpack(gradients[u], g);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        if constexpr (kLearned)
          of_step[j] += g[j] * learnable_gradient(activated<kActivation>(normalized(y[j], norms[j])), p, a.range).scale;
        g[j] = norm_gradient<kActivation>(g[j], bits[u] >> j & 1u, y[j], norms[j]);
        sum[j] += g[j];
        product[j] = __fmaf_rn(g[j], y[j] - norms[j].mean, product[j]);
      }
      if (a.grad_residual) store_values<T>(a.grad_residual, at[u], g);
    }
  });
  float* __restrict__ partial = a.partial + blockIdx.y * a.sums() * channels;
  join_block<kLie>(sum, lanes, channels, partial, Sum{});
  join_block<kLie>(product, lanes, channels, partial + channels, Sum{});
  if constexpr (kLearned) join_block<kLie>(of_step, lanes, channels, partial + 2 * channels, Sum{});
}

__global__ void __launch_bounds__(kThreads) gradients_kernel(const BatchNormGradientArgs a) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x % (kThreads / 32);
  const int lane = threadIdx.x / (kThreads / 32);
  __shared__ double sums[kThreads], products[kThreads], steps[kThreads];
  double sum = 0.0, product = 0.0, of_step = 0.0;
  if (c < a.channels)
    for (int64_t part = lane; part < a.parts; part += 32) {
      const float* __restrict__ partial = a.partial + part * a.sums() * a.channels + c;
      sum += partial[0];
      product += partial[a.channels];
      if (a.grad_step) of_step += partial[2 * a.channels];
    }
  sums[threadIdx.x] = sum;
  products[threadIdx.x] = product;
  steps[threadIdx.x] = of_step;
  __syncthreads();
  if (lane != 0 || c >= a.channels) return;
  for (int other = 1; other < 32; ++other) {
    sum += sums[other * (kThreads / 32) + threadIdx.x];
    product += products[other * (kThreads / 32) + threadIdx.x];
    of_step += steps[other * (kThreads / 32) + threadIdx.x];
  }
  store_gradients(a, c, sum, product);
  if (a.grad_step) a.grad_step[c] = static_cast<float>(of_step);
}

template <typename T, Lie kLie, Activation kActivation>
__global__ void __launch_bounds__(kThreads) backward_kernel(const BatchNormBackwardArgs a, int64_t parts, int lanes) {
  const int64_t channels = a.layout.channels;
  const ThreadNorms<kLie, kVector> norms(a.params, channels, lanes);
  float constant[kLie == Lie::kSide ? kVector : 1], slope[kLie == Lie::kSide ? kVector : 1];
#pragma unroll
  for (int j = 0; j < (kLie == Lie::kSide ? kVector : 1); ++j) {
    const int64_t c = channel_of<kLie, kVector>(j, lanes), known = c < channels ? c : 0;
    constant[j] = a.terms[known];
    slope[j] = a.terms[channels + known];
  }
  for_each_of_part<kLie, kVector>(a.layout, parts, lanes, [&](const int64_t (&at)[kUnroll], int count) {
    Pack<T, kVector> ys[kUnroll], gradients[kUnroll];
    uint32_t bits[kUnroll];
    load_all(a.y, at, count, ys);
    load_all(a.grad_output, at, count, gradients);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) bits[u] = a.mask && u < count ? a.mask[at[u] / 8] : 0xffu;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= count) break;
      float y[kVector], g[kVector];
      unpack(ys[u], y);
      unpack(gradients[u], g);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const int own = kLie == Lie::kSide ? j : 0;
        g[j] = norm_gradient<kActivation>(g[j], bits[u] >> j & 1u, y[j], norms[j]);
        g[j] = input_gradient(g[j], y[j], norms[j], constant[own], slope[own]);
      }
      store_values<T>(a.grad_input, at[u], g);
    }
  });
}

template <typename T, Activation kActivation>
__global__ void __launch_bounds__(kThreads) backward_any_kernel(const BatchNormBackwardArgs a) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= a.layout.numel()) return;
  const int64_t c = at / a.layout.inner % a.layout.channels;
  const ChannelNorm norm = channel_norm(a.params, c);
  const float y = to_float(static_cast<const T*>(a.y)[at]), g = to_float(static_cast<const T*>(a.grad_output)[at]);
  const uint32_t passes = a.mask ? mask_bits<1>(a.mask, at) : 1u;
  const float result = input_gradient(norm_gradient<kActivation>(g, passes, y, norm), y, norm, a.terms[c],
                                      a.terms[a.layout.channels + c]);
  static_cast<T*>(a.grad_input)[at] = from_float<T>(result);
}

// ---- launchers ------------------------------------------------------------------------------------------------------

bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers)
    if (!is_aligned(pointer)) return false;
  return true;
}

// Vectors side by side in a block of 256: the power of two up to 32 that leaves the fewest threads without a channel.
int lanes_for(int64_t vectors) {
  int best = 1;
  for (int lanes = 1; lanes <= 32; lanes *= 2)
    if (lanes < 2 * vectors && ceil_div(vectors, lanes) * lanes <= ceil_div(vectors, best) * best + vectors / 8)
      best = lanes;
  return best;
}

template <typename T, Lie kLie, int kSize>
struct Walk {
  static constexpr Lie lie = kLie;
  static constexpr int size = kSize;
  int lanes = 1;
  unsigned columns = 1;  // blocks along the channels

  explicit Walk(const ChannelLayout& l) {
    if constexpr (kLie == Lie::kSide) {
      const int64_t vectors = ceil_div(l.channels, kSize);
      lanes = lanes_for(vectors);
      columns = static_cast<unsigned>(ceil_div(vectors, lanes));
    } else {
      columns = static_cast<unsigned>(l.channels);
    }
  }
};

// Calls f(walk) for the widest vectors that sizes and addresses allow.
template <typename T, typename F>
void dispatch_walk(const ChannelLayout& l, bool on_16_bytes, const F& f) {
  if (l.inner == 1) {
    on_16_bytes&& l.channels % kVector == 0 ? f(Walk<T, Lie::kSide, kVector>(l)) : f(Walk<T, Lie::kSide, 1>(l));
  } else {
    on_16_bytes&& l.inner % kVector == 0 ? f(Walk<T, Lie::kAlong, kVector>(l)) : f(Walk<T, Lie::kAlong, 1>(l));
  }
}

// Parts of an elementwise pass: some vectors in flight for each thread, and blocks for the whole device.
template <typename Walk>
int64_t elementwise_parts(const ChannelLayout& l, const Walk& walk) {
  const int64_t rows_together = Walk::lie == Lie::kSide ? kThreads / walk.lanes : 1;
  const int64_t vectors_per_row = Walk::lie == Lie::kSide ? 1 : ceil_div(l.inner / Walk::size, kThreads);
  const int64_t parts = ceil_div(l.outer * vectors_per_row, rows_together * 2 * kUnroll);
  return parts < 65535 ? (parts > l.outer ? l.outer : parts) : 65535;
}

}  // namespace

int batch_norm_statistics(const BatchNormStatisticsArgs& a, void* stream) {
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dispatch_walk<T>(a.layout, aligned({a.y}), [&](const auto& walk) {
      const dim3 grid(walk.columns, static_cast<unsigned>(a.parts));
      statistics_kernel<T, walk.lie, walk.size>
          <<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a, walk.lanes);
    });
  });
  return cudaGetLastError();
}

int batch_norm_fold(const BatchNormFoldArgs& a, void* stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(a.layout.channels, kThreads / 32));
  dispatch_float(a.dtype, [&](auto* type) {
    fold_kernel<std::remove_pointer_t<decltype(type)>><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  });
  return cudaGetLastError();
}

int batch_norm_update(const BatchNormUpdateArgs& a, void* stream) {
  dispatch_activation(a.activation, [&](auto activation) {
    update_kernel<activation.value><<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  });
  return cudaGetLastError();
}

int batch_norm_apply(const BatchNormApplyArgs& a, void* stream) {
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dispatch_activation(a.activation, [&](auto activation) {
      dispatch_walk<T>(a.layout, aligned({a.y, a.residual, a.output, a.codes}), [&](const auto& walk) {
        constexpr int kSize = std::remove_cvref_t<decltype(walk)>::size;
        constexpr Lie kLie = std::remove_cvref_t<decltype(walk)>::lie;
        if constexpr (kSize == kVector) {
          const int64_t parts = elementwise_parts(a.layout, walk);
          const dim3 grid(walk.columns, static_cast<unsigned>(parts));
          apply_kernel<T, kLie, activation.value>
              <<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a, parts, walk.lanes);
        } else {
          const unsigned blocks = grid_for(ceil_div(a.layout.numel(), 8), kThreads);
          apply_any_kernel<T, activation.value><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
        }
      });
    });
  });
  return cudaGetLastError();
}

int batch_norm_reduce(const BatchNormReduceArgs& a, void* stream) {
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dispatch_activation(a.activation, [&](auto activation) {
      dispatch_walk<T>(a.layout, aligned({a.y, a.grad_output, a.grad_residual}), [&](const auto& walk) {
        const dim3 grid(walk.columns, static_cast<unsigned>(a.parts));
        const auto launch = [&](auto learned) {
          reduce_kernel<T, walk.lie, walk.size, activation.value, learned.value>
              <<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a, walk.lanes);
        };
        if constexpr (is_piecewise(activation.value))
          dispatch_bool(a.learned, launch);
        else
          launch(std::false_type{});
      });
    });
  });
  return cudaGetLastError();
}

int batch_norm_gradients(const BatchNormGradientArgs& a, void* stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(a.channels, kThreads / 32));
  gradients_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

int batch_norm_backward(const BatchNormBackwardArgs& a, void* stream) {
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dispatch_activation(a.activation, [&](auto activation) {
      dispatch_walk<T>(a.layout, aligned({a.y, a.grad_output, a.grad_input}), [&](const auto& walk) {
        constexpr int kSize = std::remove_cvref_t<decltype(walk)>::size;
        constexpr Lie kLie = std::remove_cvref_t<decltype(walk)>::lie;
        if constexpr (kSize == kVector) {
          const int64_t parts = elementwise_parts(a.layout, walk);
          const dim3 grid(walk.columns, static_cast<unsigned>(parts));
          backward_kernel<T, kLie, activation.value>
              <<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a, parts, walk.lanes);
        } else {
          const unsigned blocks = grid_for(a.layout.numel(), kThreads);
          backward_any_kernel<T, activation.value><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
        }
      });
    });
  });
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
