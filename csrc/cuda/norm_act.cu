#include "csrc/cuda/norm_act.h"

#include "csrc/cuda/common.cuh"
#include "csrc/cuda/joins.cuh"

// Rows of whole items of eight elements that begin on 16 bytes are read once: some threads of a warp, a warp or a
// thread block hold a row in registers, take its moments, its extremes and its codes. Other rows go an element at a
// time, with a pass over them for each. Compiled with --fmad=false, as fake_quant.cu.

namespace quantrain::cuda {
namespace {

constexpr int kItem = 8;  // elements: a byte of the mask, 16 bytes of a 16-bit type
constexpr int kThreads = 256;
constexpr int kWideThreads = 1024;     // of a long row
constexpr int kBackwardThreads = 512;  // of a row's gradients: 128 registers each
constexpr int kAnyThreads = 256;

// ---- rows -----------------------------------------------------------------------------------------------------------

// Of the values of a row's threads, for each of them, in a fixed order. A row has blockDim.x threads: a power of two up
// to 32, or whole warps and then the block to itself.
template <typename Join>
__device__ __forceinline__ float joined(float value, const Join& join) {
  const int lanes = blockDim.x < 32 ? static_cast<int>(blockDim.x) : 32;
  for (int offset = lanes / 2; offset > 0; offset /= 2)
    value = join(value, __shfl_xor_sync(0xffffffffu, value, offset));
  if (blockDim.x <= 32) return value;
  __shared__ float of_warp[32];
  __syncthreads();  // what was joined before may still be read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  value = of_warp[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x / 32); ++warp) value = join(value, of_warp[warp]);
  return value;
}

template <typename T>
__device__ __forceinline__ void load_item(const void* __restrict__ from, int64_t item, float (&values)[kItem]) {
  unpack(static_cast<const Pack<T, kItem>*>(from)[item], values);
}

template <typename T>
__device__ __forceinline__ void load_parameters(const void* __restrict__ from, DType type, uint32_t item,
                                                float (&values)[kItem]) {
  type == DType::kFloat32 ? load_item<float>(from, item, values) : load_item<T>(from, item, values);
}

template <typename T>
__device__ __forceinline__ float load_parameter_of(const void* __restrict__ from, DType type, int64_t column,
                                                   float otherwise) {
  if (!from) return otherwise;
  return type == DType::kFloat32 ? static_cast<const float*>(from)[column]
                                 : to_float(static_cast<const T*>(from)[column]);
}

// The low byte of code + 3 2^22 is the code's, of either sign; NaN's code is the one nearest to zero.
__device__ __forceinline__ uint8_t stored_code(float code, QParams p, QuantRange range) {
  code = code == code ? code : clamp_code(p.zero_point, range);
  return static_cast<uint8_t>(__float_as_uint(code + 12582912.0f));
}

// ---- forward --------------------------------------------------------------------------------------------------------

// The extremes of a function with a valley: at the ends of x, and next to the valley on either side.
struct ValleyExtremes {
  float valley;
  float low = Min::kNothing, high = Max::kNothing, below = Max::kNothing, above = Min::kNothing;

  __device__ __forceinline__ void add(float x) {
    low = Min{}(low, x);
    high = Max{}(high, x);
    below = Max{}(below, x <= valley ? x : Max::kNothing);
    above = Min{}(above, x <= valley ? Min::kNothing : x);
  }

  __device__ __forceinline__ float2 of(RowFunction function) const {
    float2 result = make_float2(Min::kNothing, Max::kNothing);
    dispatch_function(function, [&](auto f) {
      const auto at = [](float x) { return function_at<decltype(f)::value>(x).value; };
      result.y = Max{}(at(low), at(high));
      if (below != Max::kNothing) result.x = at(below);
      if (above != Min::kNothing) result.x = Min{}(result.x, at(above));
      result.x = Min{}(result.x, result.y);  // NaN of an infinity
    });
    return result;
  }
};

// kOf items of each thread.
template <typename T, typename U, bool kNorm, int kOf, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) forward_kernel(const NormActArgs a, uint32_t items) {
  const NormActInput& in = a.input;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool there = row < in.rows;
  const int64_t first = row * items;
  const auto has = [&](int u) { return there && u * blockDim.x + threadIdx.x < items; };
  const auto item_of = [&](int u) { return first + u * blockDim.x + threadIdx.x; };
  float z[kOf][kItem];
#pragma unroll
  for (int u = 0; u < kOf; ++u) {
#pragma unroll
    for (int j = 0; j < kItem; ++j) z[u][j] = 0.0f;
    if (has(u)) load_item<T>(in.x, item_of(u), z[u]);
  }
  if constexpr (kNorm) {
    const auto columns = static_cast<float>(in.columns);
    RowMoments m{0.0f, 0.0f};
    if (in.function == RowFunction::kLayerNorm) {
      float sum = 0.0f;
#pragma unroll
      for (int u = 0; u < kOf; ++u)
#pragma unroll
        for (int j = 0; j < kItem; ++j) sum += z[u][j];
      m.mean = joined(sum, Sum{}) / columns;
    }
    float squares = 0.0f;
#pragma unroll
    for (int u = 0; u < kOf; ++u) {
      if (!has(u)) continue;
#pragma unroll
      for (int j = 0; j < kItem; ++j) squares = __fmaf_rn(z[u][j] - m.mean, z[u][j] - m.mean, squares);
    }
    m.inverse = inverse_root(joined(squares, Sum{}) / columns, in.eps);
    if (threadIdx.x == 0 && there && a.moments)
      reinterpret_cast<float2*>(a.moments)[row] = make_float2(m.mean, m.inverse);
#pragma unroll
    for (int u = 0; u < kOf; ++u) {
      if (!has(u)) continue;
      const uint32_t column = u * blockDim.x + threadIdx.x;
      float weight[kItem], bias[kItem];
      if (in.weight) load_parameters<T>(in.weight, in.parameter_dtype, column, weight);
      if (in.bias) load_parameters<T>(in.bias, in.parameter_dtype, column, bias);
#pragma unroll
      for (int j = 0; j < kItem; ++j) {
        z[u][j] = row_normalized(z[u][j], m);
        if (in.weight) z[u][j] *= weight[j];
        if (in.bias) z[u][j] += bias[j];
      }
    }
  } else {
    if (a.extremes && valley_of(in.function) == valley_of(in.function)) {
      ValleyExtremes e{valley_of(in.function)};
#pragma unroll
      for (int u = 0; u < kOf; ++u) {
        if (!has(u)) continue;
#pragma unroll
        for (int j = 0; j < kItem; ++j) e.add(z[u][j]);
      }
      e.low = joined(e.low, Min{});
      e.high = joined(e.high, Max{});
      e.below = joined(e.below, Max{});
      e.above = joined(e.above, Min{});
      if (threadIdx.x == 0 && there) reinterpret_cast<float2*>(a.extremes)[row] = e.of(in.function);
      return;
    }
    dispatch_function(in.function, [&](auto function) {
      if constexpr (function.value != RowFunction::kIdentity) {
#pragma unroll
        for (int u = 0; u < kOf; ++u) {
          float other[kItem];
          if constexpr (function.value == RowFunction::kSiluMul)
            if (has(u)) load_item<T>(in.other, item_of(u), other);
          if (!has(u)) continue;
#pragma unroll
          for (int j = 0; j < kItem; ++j) {
            z[u][j] = function_at<function.value>(z[u][j]).value;
            if constexpr (function.value == RowFunction::kSiluMul) z[u][j] *= other[j];
          }
        }
      }
    });
  }
  QParams p;
  if (a.row_scale || a.extremes) {
    float low = Min::kNothing, high = Max::kNothing;
#pragma unroll
    for (int u = 0; u < kOf; ++u) {
      if (!has(u)) continue;
#pragma unroll
      for (int j = 0; j < kItem; ++j) {
        low = Min{}(low, z[u][j]);
        high = Max{}(high, z[u][j]);
      }
    }
    low = joined(low, Min{});
    high = joined(high, Max{});
    if (a.extremes) {
      if (threadIdx.x == 0 && there) reinterpret_cast<float2*>(a.extremes)[row] = make_float2(low, high);
      return;
    }
    p = quantrain::qparams_from_range(low, high, a.range, a.symmetric);
    if (threadIdx.x == 0 && there) {
      a.row_scale[row] = p.scale;
      if (a.row_zero_point) a.row_zero_point[row] = static_cast<int32_t>(p.zero_point);
    }
  } else {
    p = load_qparams(a.qparams, 0, a.range);
  }
#pragma unroll
  for (int u = 0; u < kOf; ++u) {
    if (!has(u)) continue;
    Pack<uint8_t, kItem> codes;
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kItem; ++j) {
      const float v = unclamped_code(z[u][j], p), code = clamp_code(v, a.range);
      bits |= static_cast<uint32_t>(gradient_passes(in.function, z[u][j], code == v)) << j;
      codes.value[j] = stored_code(code, p, a.range);
      z[u][j] = dequantized(code, p);
    }
    static_cast<Pack<U, kItem>*>(a.output)[item_of(u)] = pack<U>(z[u]);
    if (a.codes) static_cast<Pack<uint8_t, kItem>*>(a.codes)[item_of(u)] = codes;
    if (a.mask) a.mask[item_of(u)] = static_cast<uint8_t>(bits);
  }
}

// z of one element.
template <typename T>
__device__ __forceinline__ float element(const NormActInput& in, int64_t row, int64_t column, RowMoments m) {
  const int64_t at = row * in.columns + column;
  float z = to_float(static_cast<const T*>(in.x)[at]);
  if (is_norm(in.function))
    return row_normalized(z, m) * load_parameter_of<T>(in.weight, in.parameter_dtype, column, 1.0f) +
           load_parameter_of<T>(in.bias, in.parameter_dtype, column, 0.0f);
  dispatch_function(in.function, [&](auto function) { z = function_at<function.value>(z).value; });
  return in.function == RowFunction::kSiluMul ? z * to_float(static_cast<const T*>(in.other)[at]) : z;
}

// Any row: its moments, extremes and scale, by a thread block.
template <typename T>
__global__ void __launch_bounds__(kAnyThreads) rows_any_kernel(const NormActArgs a) {
  const NormActInput& in = a.input;
  const int64_t row = blockIdx.x;
  const T* __restrict__ x = static_cast<const T*>(in.x) + row * in.columns;
  const auto columns = static_cast<float>(in.columns);
  RowMoments m{0.0f, 1.0f};
  if (is_norm(in.function)) {
    if (in.function == RowFunction::kLayerNorm) {
      float sum = 0.0f;
      for (int64_t c = threadIdx.x; c < in.columns; c += kAnyThreads) sum += to_float(x[c]);
      m.mean = joined(sum, Sum{}) / columns;
    }
    float squares = 0.0f;
    for (int64_t c = threadIdx.x; c < in.columns; c += kAnyThreads) {
      const float distance = to_float(x[c]) - m.mean;
      squares = __fmaf_rn(distance, distance, squares);
    }
    m.inverse = inverse_root(joined(squares, Sum{}) / columns, in.eps);
    if (threadIdx.x == 0 && a.moments) reinterpret_cast<float2*>(a.moments)[row] = make_float2(m.mean, m.inverse);
  }
  if (!a.row_scale && !a.extremes) return;
  float low = Min::kNothing, high = Max::kNothing;
  for (int64_t c = threadIdx.x; c < in.columns; c += kAnyThreads) {
    const float z = element<T>(in, row, c, m);
    low = Min{}(low, z);
    high = Max{}(high, z);
  }
  low = joined(low, Min{});
  high = joined(high, Max{});
  if (threadIdx.x != 0) return;
  if (a.extremes) {
    reinterpret_cast<float2*>(a.extremes)[row] = make_float2(low, high);
    return;
  }
  const QParams p = quantrain::qparams_from_range(low, high, a.range, a.symmetric);
  a.row_scale[row] = p.scale;
  if (a.row_zero_point) a.row_zero_point[row] = static_cast<int32_t>(p.zero_point);
}

// Any row, once its moments and scale are known: a thread takes the elements of a byte of the mask.
template <typename T, typename U>
__global__ void __launch_bounds__(kAnyThreads) elements_any_kernel(const NormActArgs a) {
  const NormActInput& in = a.input;
  const int64_t numel = in.rows * in.columns, byte = static_cast<int64_t>(blockIdx.x) * kAnyThreads + threadIdx.x;
  uint32_t bits = 0;
  for (int j = 0; j < kItem && byte * kItem + j < numel; ++j) {
    const int64_t at = byte * kItem + j, row = at / in.columns;
    RowMoments m{0.0f, 1.0f};
    if (is_norm(in.function)) m = RowMoments{a.moments[2 * row], a.moments[2 * row + 1]};
    const QParams p = a.row_scale ? make_qparams(a.row_scale[row], a.row_zero_point ? a.row_zero_point[row] : 0)
                                  : load_qparams(a.qparams, 0, a.range);
    const float z = element<T>(in, row, at - row * in.columns, m);
    const float v = unclamped_code(z, p), code = clamp_code(v, a.range);
    bits |= static_cast<uint32_t>(gradient_passes(in.function, z, code == v)) << j;
    if (a.codes) static_cast<uint8_t*>(a.codes)[at] = stored_code(code, p, a.range);
    static_cast<U*>(a.output)[at] = from_float<U>(dequantized(code, p));
  }
  if (a.mask && byte * kItem < numel) a.mask[byte] = static_cast<uint8_t>(bits);
}

__global__ void __launch_bounds__(kWideThreads) range_kernel(const NormActRangeArgs a) {
  float low = Min::kNothing, high = Max::kNothing;
  for (int64_t row = threadIdx.x; row < a.rows; row += kWideThreads) {
    const float2 extremes = reinterpret_cast<const float2*>(a.extremes)[row];
    low = Min{}(low, extremes.x);
    high = Max{}(high, extremes.y);
  }
  low = joined(low, Min{});
  high = joined(high, Max{});
  if (threadIdx.x != 0) return;
  a.range[0] = low;
  a.range[1] = high;
}

// ---- backward -------------------------------------------------------------------------------------------------------

// The gradient at an item of z.
template <typename U>
__device__ __forceinline__ void load_gradient(const NormActBackwardArgs& a, int64_t item, float (&g)[kItem]) {
  load_item<U>(a.grad_output, item, g);
  if (!a.mask) return;
  const uint32_t bits = a.mask[item];
#pragma unroll
  for (int j = 0; j < kItem; ++j) g[j] = bits >> j & 1u ? g[j] : 0.0f;
}

template <typename T, typename U>
__global__ void __launch_bounds__(kThreads) activation_backward_kernel(const NormActBackwardArgs a, int64_t items) {
  const NormActInput& in = a.input;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; item < items; item += step) {
    float g[kItem], x[kItem];
    load_gradient<U>(a, item, g);
    if (in.function != RowFunction::kIdentity) load_item<T>(in.x, item, x);
    dispatch_function(in.function, [&](auto function) {
      float other[kItem];
      if constexpr (function.value == RowFunction::kSiluMul) load_item<T>(in.other, item, other);
#pragma unroll
      for (int j = 0; j < kItem; ++j) {
        if constexpr (function.value == RowFunction::kSiluMul) {
          const ValueAndSlope f = function_at<function.value>(x[j]);
          x[j] = g[j] * f.value;
          g[j] *= other[j] * f.slope;
        } else if constexpr (function.value != RowFunction::kIdentity) {
          g[j] *= function_at<function.value>(x[j]).slope;
        }
      }
    });
    static_cast<Pack<T, kItem>*>(a.grad_input)[item] = pack<T>(g);
    if (a.grad_other) static_cast<Pack<T, kItem>*>(a.grad_other)[item] = pack<T>(x);
  }
}

template <typename T, typename U>
__global__ void __launch_bounds__(kAnyThreads) activation_backward_any_kernel(const NormActBackwardArgs a) {
  const NormActInput& in = a.input;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kAnyThreads + threadIdx.x;
  if (at >= in.rows * in.columns) return;
  const bool passes = !a.mask || (a.mask[at / 8] >> (at % 8) & 1u);
  const float g = passes ? to_float(static_cast<const U*>(a.grad_output)[at]) : 0.0f;
  const float x = to_float(static_cast<const T*>(in.x)[at]);
  ValueAndSlope f{};
  dispatch_function(in.function, [&](auto function) { f = function_at<function.value>(x); });
  if (in.function == RowFunction::kSiluMul) {
    f.slope *= to_float(static_cast<const T*>(in.other)[at]);
    static_cast<T*>(a.grad_other)[at] = from_float<T>(g * f.value);
  }
  static_cast<T*>(a.grad_input)[at] = from_float<T>(g * f.slope);
}

// A block takes the rows of one part, blockDim.y at a time, and adds up its columns' gradients.
template <typename T, typename U, int kOf, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) norm_backward_kernel(const NormActBackwardArgs a, uint32_t items) {
  const NormActInput& in = a.input;
  const int64_t of_part = (in.rows + a.parts - 1) / a.parts, begin = blockIdx.x * of_part;
  const int64_t end = begin + of_part < in.rows ? begin + of_part : in.rows;
  const bool layer = in.function == RowFunction::kLayerNorm;
  const auto columns = static_cast<float>(in.columns);
  const auto has = [&](int u) { return u * blockDim.x + threadIdx.x < items; };
  float along[kOf][kItem], total[kOf][kItem];
#pragma unroll
  for (int u = 0; u < kOf; ++u)
#pragma unroll
    for (int j = 0; j < kItem; ++j) along[u][j] = total[u][j] = 0.0f;
  for (int64_t base = begin; base < end; base += blockDim.y) {
    const int64_t row = base + threadIdx.y;
    const bool there = row < end;
    RowMoments m{0.0f, 0.0f};
    if (there) {
      const float2 moments = reinterpret_cast<const float2*>(a.moments)[row];
      m = RowMoments{moments.x, moments.y};
    }
    float g[kOf][kItem], x[kOf][kItem], sum = 0.0f, product = 0.0f;
#pragma unroll
    for (int u = 0; u < kOf; ++u) {
#pragma unroll
      for (int j = 0; j < kItem; ++j) g[u][j] = x[u][j] = 0.0f;
      if (!there || !has(u)) continue;
      const uint32_t column = u * blockDim.x + threadIdx.x;
      const int64_t item = row * items + column;
      load_gradient<U>(a, item, g[u]);
      load_item<T>(in.x, item, x[u]);
      float weight[kItem];
      if (in.weight) load_parameters<T>(in.weight, in.parameter_dtype, column, weight);
#pragma unroll
      for (int j = 0; j < kItem; ++j) {
        x[u][j] = row_normalized(x[u][j], m);
        total[u][j] += g[u][j];
        along[u][j] = __fmaf_rn(g[u][j], x[u][j], along[u][j]);
        if (in.weight) g[u][j] *= weight[j];
        sum += g[u][j];
        product = __fmaf_rn(g[u][j], x[u][j], product);
      }
    }
    const float mean_g = layer ? joined(sum, Sum{}) / columns : 0.0f;
    const float mean_product = joined(product, Sum{}) / columns;
#pragma unroll
    for (int u = 0; u < kOf; ++u) {
      if (!there || !has(u)) continue;
#pragma unroll
      for (int j = 0; j < kItem; ++j) g[u][j] = row_gradient(g[u][j], x[u][j], m, mean_g, mean_product);
      static_cast<Pack<T, kItem>*>(a.grad_input)[row * items + u * blockDim.x + threadIdx.x] = pack<T>(g[u]);
    }
  }
  if (!a.partial) return;
  float* __restrict__ partial = a.partial + static_cast<int64_t>(blockIdx.x) * 2 * in.columns;
  if (blockDim.y == 1) {
#pragma unroll
    for (int u = 0; u < kOf; ++u) {
      if (!has(u)) continue;
      const int64_t column = u * blockDim.x + threadIdx.x;
      reinterpret_cast<Pack<float, kItem>*>(partial)[column] = pack<float>(along[u]);
      reinterpret_cast<Pack<float, kItem>*>(partial + in.columns)[column] = pack<float>(total[u]);
    }
    return;
  }
  // Several rows side by side: their sums are added in the order of the rows.
  __shared__ float of_thread[kThreads * kItem];
#pragma unroll
  for (int statistic = 0; statistic < 2; ++statistic) {
#pragma unroll
    for (int u = 0; u < kOf; ++u) {
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kItem; ++j)
        of_thread[(threadIdx.y * blockDim.x + threadIdx.x) * kItem + j] = statistic == 0 ? along[u][j] : total[u][j];
      __syncthreads();
      const int width = static_cast<int>(blockDim.x) * kItem;
      for (int c = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); c < width; c += kThreads) {
        const int64_t column = static_cast<int64_t>(u) * width + c;
        if (column >= in.columns) continue;
        float result = of_thread[c];
        for (int y = 1; y < static_cast<int>(blockDim.y); ++y) result += of_thread[y * width + c];
        partial[statistic * in.columns + column] = result;
      }
    }
  }
}

// Any row. Its columns' sums are added by norm_sums_any_kernel.
template <typename T, typename U>
__global__ void __launch_bounds__(kAnyThreads) norm_backward_any_kernel(const NormActBackwardArgs a) {
  const NormActInput& in = a.input;
  const int64_t row = blockIdx.x, first = row * in.columns;
  const RowMoments m{a.moments[2 * row], a.moments[2 * row + 1]};
  const auto gradient = [&](int64_t c) {
    const int64_t at = first + c;
    const bool passes = !a.mask || (a.mask[at / 8] >> (at % 8) & 1u);
    const float g = passes ? to_float(static_cast<const U*>(a.grad_output)[at]) : 0.0f;
    return in.weight ? g * load_parameter_of<T>(in.weight, in.parameter_dtype, c, 1.0f) : g;
  };
  const auto value = [&](int64_t c) { return row_normalized(to_float(static_cast<const T*>(in.x)[first + c]), m); };
  float sum = 0.0f, product = 0.0f;
  for (int64_t c = threadIdx.x; c < in.columns; c += kAnyThreads) {
    sum += gradient(c);
    product = __fmaf_rn(gradient(c), value(c), product);
  }
  const auto columns = static_cast<float>(in.columns);
  const float mean_g = in.function == RowFunction::kLayerNorm ? joined(sum, Sum{}) / columns : 0.0f;
  const float mean_product = joined(product, Sum{}) / columns;
  for (int64_t c = threadIdx.x; c < in.columns; c += kAnyThreads)
    static_cast<T*>(a.grad_input)[first + c] =
        from_float<T>(row_gradient(gradient(c), value(c), m, mean_g, mean_product));
}

template <typename T, typename U>
__global__ void __launch_bounds__(kAnyThreads) norm_sums_any_kernel(const NormActBackwardArgs a) {
  const NormActInput& in = a.input;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kAnyThreads + threadIdx.x;
  if (column >= in.columns) return;
  const int64_t of_part = (in.rows + a.parts - 1) / a.parts, begin = blockIdx.x * of_part;
  const int64_t end = begin + of_part < in.rows ? begin + of_part : in.rows;
  float along = 0.0f, total = 0.0f;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * in.columns + column;
    const bool passes = !a.mask || (a.mask[at / 8] >> (at % 8) & 1u);
    const float g = passes ? to_float(static_cast<const U*>(a.grad_output)[at]) : 0.0f;
    const float x = row_normalized(to_float(static_cast<const T*>(in.x)[at]),
                                   RowMoments{a.moments[2 * row], a.moments[2 * row + 1]});
    along = __fmaf_rn(g, x, along);
    total += g;
  }
  float* __restrict__ partial = a.partial + static_cast<int64_t>(blockIdx.x) * 2 * in.columns;
  partial[column] = along;
  partial[in.columns + column] = total;
}

// 32 columns of a block; 8 threads add a column's parts, every 8th each, then one adds theirs.
__global__ void __launch_bounds__(kThreads) gradients_kernel(const NormActGradientArgs a) {
  constexpr int kSide = 32, kAdders = kThreads / kSide;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSide + threadIdx.x % kSide;
  const int adder = static_cast<int>(threadIdx.x) / kSide;
  __shared__ double alongs[kThreads], totals[kThreads];
  double along = 0.0, total = 0.0;
  if (column < a.columns)
    for (int64_t part = adder; part < a.parts; part += kAdders) {
      along += a.partial[part * 2 * a.columns + column];
      total += a.partial[(part * 2 + 1) * a.columns + column];
    }
  alongs[threadIdx.x] = along;
  totals[threadIdx.x] = total;
  __syncthreads();
  if (adder != 0 || column >= a.columns) return;
  for (int other = 1; other < kAdders; ++other) {
    along += alongs[other * kSide + threadIdx.x];
    total += totals[other * kSide + threadIdx.x];
  }
  a.grad_weight[column] = static_cast<float>(along);
  a.grad_bias[column] = static_cast<float>(total);
}

// ---- launchers ------------------------------------------------------------------------------------------------------

bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers)
    if (!is_aligned(pointer)) return false;
  return true;
}

// The threads of a row of so many items, `of` each.
unsigned threads_of_row(int64_t items, int of) {
  const int64_t threads = ceil_div(items, of);
  if (threads > 32) return static_cast<unsigned>(ceil_div(threads, 32) * 32);
  unsigned lanes = 1;
  while (lanes < threads) lanes *= 2;
  return lanes;
}

// A row's threads, and as many rows side by side as a block of kThreads holds where a warp or less takes a row.
dim3 block_of(int64_t items, int of) {
  const unsigned threads = threads_of_row(items, of);
  return dim3(threads, threads <= 32 ? kThreads / threads : 1);
}

template <typename Pointer>
using Element = std::remove_pointer_t<Pointer>;

constexpr int64_t kMostItems = int64_t{kWideThreads} * 4;  // of a row that is read once

}  // namespace

int norm_act(const NormActArgs& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const NormActInput& in = a.input;
  const int64_t items = in.columns / kItem;
  const bool whole = in.columns % kItem == 0 && items <= kMostItems &&
                     aligned({in.x, in.other, in.weight, in.bias, a.output, a.codes});
  dispatch_types(in.dtype, a.output_dtype, [&](auto* type, auto* output) {
    using T = Element<decltype(type)>;
    using U = Element<decltype(output)>;
    if (!whole) {
      if (is_norm(in.function) || a.row_scale || a.extremes)
        rows_any_kernel<T><<<static_cast<unsigned>(in.rows), kAnyThreads, 0, stream>>>(a);
      if (a.extremes) return;
      elements_any_kernel<T, U>
          <<<grid_for(ceil_div(in.rows * in.columns, kItem), kAnyThreads), kAnyThreads, 0, stream>>>(a);
      return;
    }
    dispatch_bool(is_norm(in.function), [&](auto norm) {
      const auto launch = [&](auto of, auto most) {
        const dim3 block = block_of(items, of.value);
        const auto blocks = static_cast<unsigned>(ceil_div(in.rows, block.y));
        forward_kernel<T, U, norm.value, of.value, most.value>
            <<<blocks, block, 0, stream>>>(a, static_cast<uint32_t>(items));
      };
      if (items <= 32)
        launch(std::integral_constant<int, 1>{}, std::integral_constant<int, kThreads>{});
      else if (items <= 4 * kThreads)
        launch(std::integral_constant<int, 4>{}, std::integral_constant<int, kThreads>{});
      else
        launch(std::integral_constant<int, 4>{}, std::integral_constant<int, kWideThreads>{});
    });
  });
  return cudaGetLastError();
}

int norm_act_range(const NormActRangeArgs& a, void* stream) {
  range_kernel<<<1, kWideThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

int norm_act_backward(const NormActBackwardArgs& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const NormActInput& in = a.input;
  const int64_t items = in.columns / kItem, numel = in.rows * in.columns;
  const bool on_16_bytes = aligned({in.x, in.other, in.weight, a.grad_output, a.grad_input, a.grad_other});
  dispatch_types(in.dtype, a.output_dtype, [&](auto* type, auto* output) {
    using T = Element<decltype(type)>;
    using U = Element<decltype(output)>;
    if (!is_norm(in.function)) {
      if (on_16_bytes && numel % kItem == 0)
        activation_backward_kernel<T, U><<<grid_for(numel / kItem, kThreads), kThreads, 0, stream>>>(a, numel / kItem);
      else
        activation_backward_any_kernel<T, U><<<grid_for(numel, kAnyThreads), kAnyThreads, 0, stream>>>(a);
      return;
    }
    if (!on_16_bytes || in.columns % kItem != 0 || items > 4 * kBackwardThreads) {
      norm_backward_any_kernel<T, U><<<static_cast<unsigned>(in.rows), kAnyThreads, 0, stream>>>(a);
      const dim3 grid(static_cast<unsigned>(a.parts), static_cast<unsigned>(ceil_div(in.columns, kAnyThreads)));
      if (a.partial) norm_sums_any_kernel<T, U><<<grid, kAnyThreads, 0, stream>>>(a);
      return;
    }
    const auto launch = [&](auto of, auto most) {
      norm_backward_kernel<T, U, of.value, most.value>
          <<<static_cast<unsigned>(a.parts), block_of(items, of.value), 0, stream>>>(a, static_cast<uint32_t>(items));
    };
    if (items <= 32)
      launch(std::integral_constant<int, 1>{}, std::integral_constant<int, kThreads>{});
    else if (items <= 2 * kBackwardThreads)
      launch(std::integral_constant<int, 2>{}, std::integral_constant<int, kBackwardThreads>{});
    else
      launch(std::integral_constant<int, 4>{}, std::integral_constant<int, kBackwardThreads>{});
  });
  return cudaGetLastError();
}

int norm_act_gradients(const NormActGradientArgs& a, void* stream) {
  gradients_kernel<<<static_cast<unsigned>(ceil_div(a.columns, 32)), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      a);
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
