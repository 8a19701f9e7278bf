#include <cmath>
#include <type_traits>

#include "csrc/cuda/device.h"
#include "csrc/cuda/four_bit.h"
#include "csrc/cuda/four_bit/decode.cuh"
#include "csrc/cuda/ptx.cuh"

// Blocks of 32 to 256 elements, 8 elements a thread, are read once; any others by one warp each, which reads them
// again.

namespace quantrain::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kItem = 8;  // elements of a thread: 16 bytes of a 16-bit type, 4 bytes of codes
constexpr int kUnrolled = 4;
constexpr int kBins = 32;  // of the interval that r lies in, narrow enough that a bin holds one threshold at most
constexpr float kSignedBins = 15.5f, kMagnitudeBins = 31.0f;

__device__ __forceinline__ bool whole_numbers(FourBitFormat format) {
  return format == FourBitFormat::kInt4 || format == FourBitFormat::kUint4;
}

__host__ __device__ __forceinline__ int bin_of(float r, bool sign_magnitude) {
#if defined(__CUDA_ARCH__)
  return static_cast<int>(sign_magnitude ? r * kMagnitudeBins : __fmaf_rn(r, kSignedBins, kSignedBins));
#else
  return static_cast<int>(sign_magnitude ? r * kMagnitudeBins : std::fma(r, kSignedBins, kSignedBins));
#endif
}

// A bin's threshold, with the codes below it (low half) and above it (high half).
struct Bin {
  float threshold;
  uint32_t codes;
};
struct Bins {
  Bin bin[kBins];
  uint8_t zero;  // the code of 0
};
struct Tables {
  Bin bin[kBins][32];  // a copy for each lane: no two meet in a bank
};

bool is_sign_magnitude(FourBitFormat format) { return format == FourBitFormat::kFp4 || format == FourBitFormat::kE2m1; }

// On the host: one thread of each thread block took longer for it than the block's share of the elements.
Bins bins_of(FourBitFormat format, const FourBitValues& values) {
  const FourBitRanks ranks = four_bit_ranks(values.value, is_sign_magnitude(format));
  Bins bins{};
  bins.zero = ranks.zero;
  for (int bin = 0; bin < kBins; ++bin) {
    int below = 0;
    float threshold = INFINITY;
    for (int i = 0; i < ranks.thresholds; ++i) {
      const int at = bin_of(ranks.threshold[i], ranks.sign_magnitude);
      below += at < bin;
      if (at == bin) threshold = ranks.threshold[i];
    }
    const int above = threshold == INFINITY ? below : below + 1;
    bins.bin[bin] = {threshold, ranks.code[below] | static_cast<uint32_t>(ranks.code[above]) << 16};
  }
  return bins;
}

__device__ FourBitRanks ranks_of(FourBitFormat format, const float* table, const FourBitValues& values) {
  const bool sign_magnitude = format == FourBitFormat::kFp4 || format == FourBitFormat::kE2m1;
  return four_bit_ranks(table ? table : values.value, sign_magnitude);
}

// The largest magnitude as bits: NaN is above Inf, and that above all numbers.
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

template <int kLanes>
__device__ __forceinline__ uint32_t lanes_max(uint32_t value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

template <int kLanes>
__device__ __forceinline__ float lanes_min(float value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value = fminf(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

template <FourBitFormat kFormat>
__device__ __forceinline__ uint32_t code_of(float x, float inverse, float zero_point, const Tables& tables, int lane) {
  if constexpr (kFormat == FourBitFormat::kInt4 || kFormat == FourBitFormat::kUint4) {
    return four_bit_integer_code(x, inverse, zero_point, four_bit_range(kFormat == FourBitFormat::kUint4));
  } else {
    constexpr bool kSignMagnitude = kFormat != FourBitFormat::kNf4;
    const float r = x * inverse;  // at most 1 and a rounding: a bin
    const float m = kSignMagnitude ? fabsf(r) : r;
    const Bin bin = tables.bin[bin_of(m, kSignMagnitude)][lane];
    const uint32_t code = m > bin.threshold ? bin.codes >> 16 : bin.codes & 0xffffu;
    return kSignMagnitude && x < 0.0f && inverse != 0.0f ? code | 8u : code;
  }
}

// kLanes threads a block of kLanes * 8 elements; rule absmax.
template <typename T, FourBitFormat kFormat, int kLanes>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const T* __restrict__ x,      // [blocks, kLanes * 8]
                    uint8_t* __restrict__ codes,  // [blocks, kLanes * 4]
                    float* __restrict__ scales,   // [blocks]
                    int32_t* __restrict__ zero_points, int64_t blocks, const Bins bins) {
  constexpr bool kAffine = kFormat == FourBitFormat::kUint4;
  constexpr bool kWhole = kAffine || kFormat == FourBitFormat::kInt4;
  __shared__ Tables tables;
  const int lane = threadIdx.x % 32;
  if constexpr (!kWhole) {
    for (int bin = threadIdx.x / 32; bin < kBins; bin += kThreads / 32) tables.bin[bin][lane] = bins.bin[bin];
    __syncthreads();
  }
  const int64_t items = blocks * kLanes;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  // Whole warps go on together: the lanes of a block exchange their largest magnitude. Past the end they read the last
  // item.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x - lane; first < items;
       first += kUnrolled * stride) {
    Pack<T, kItem> read[kUnrolled];
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u)
      read[u] = reinterpret_cast<const Pack<T, kItem>*>(x)[min(first + u * stride + lane, items - 1)];
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      const int64_t item = first + u * stride + lane;
      float v[kItem];
      unpack(read[u], v);
      uint32_t most = 0;
#pragma unroll
      for (int j = 0; j < kItem; ++j) most = max(most, magnitude(v[j]));
      most = lanes_max<kLanes>(most);
      const float absmax = __uint_as_float(most);
      QParams q{four_bit_scale(kFormat, absmax), 0.0f, 0.0f};
      if constexpr (kAffine) {
        float low = 0.0f, high = 0.0f;
#pragma unroll
        for (int j = 0; j < kItem; ++j) {
          low = fminf(low, v[j]);
          high = fminf(high, -v[j]);
        }
        low = lanes_min<kLanes>(low);
        high = -lanes_min<kLanes>(high);
        if (absmax <= FLT_MAX) q = four_bit_affine(low, high);
      }
      const bool valid = q.scale == q.scale;
      const float inverse = valid ? four_bit_inverse(q.scale) : 0.0f;
      uint32_t word = 0;
#pragma unroll
      for (int j = 0; j < kItem; ++j) {
        const uint32_t code = code_of<kFormat>(v[j], inverse, q.zero_point, tables, lane);
        word |= code << (4 * (kWhole ? j : j ^ 1));
      }
      if (!valid) word = kWhole ? 0 : bins.zero * 0x11111111u;
      if (item < items) {
        reinterpret_cast<uint32_t*>(codes)[item] = word;
        if (lane % kLanes == 0) {
          scales[item / kLanes] = q.scale;
          if constexpr (kAffine) zero_points[item / kLanes] = static_cast<int32_t>(q.zero_point);
        }
      }
    }
  }
}

// The factor with the least squared error, the first of equals. Lane c tries factor c, over the elements in their
// order.
template <typename T>
__device__ float searched_scale(const FourBitQuantizeArgs& a, const FourBitRanks& ranks, const T* x, int64_t n,
                                float base) {
  const int lane = threadIdx.x % 32;
  const float scale = base * four_bit_search_factor(min(lane, kSearchFactors - 1));
  const float inverse = four_bit_inverse(scale);
  float error = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float value = to_float(x[i]);
    const float r = value * inverse;
    float decoded;
    if (a.format == FourBitFormat::kInt4) {
      decoded = clamp_code(round_half_even(r), four_bit_range(/*affine=*/false));
    } else {
      decoded = ranks.value[four_bit_rank(ranks, ranks.sign_magnitude ? fabsf(r) : r)];
      if (ranks.sign_magnitude && r < 0.0f) decoded = -decoded;
    }
    const float off = value - decoded * scale;
    error += off * off;
  }
  if (lane >= kSearchFactors) error = INFINITY;
  int best = lane;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const float other_error = __shfl_xor_sync(0xffffffffu, error, step);
    const int other = __shfl_xor_sync(0xffffffffu, best, step);
    if (other_error < error || (other_error == error && other < best)) {
      error = other_error;
      best = other;
    }
  }
  return __shfl_sync(0xffffffffu, scale, best);
}

// Any block, any rule: a warp each.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_any_kernel(const FourBitQuantizeArgs a, const FourBitValues values, int64_t first_block) {
  __shared__ FourBitRanks ranks;
  if (threadIdx.x == 0) ranks = ranks_of(a.format, a.table, values);
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int64_t block = first_block + static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (block >= a.blocks) return;
  const int64_t first = block * a.block, n = min(a.block, a.numel - first);
  const T* x = static_cast<const T*>(a.x) + first;
  uint32_t most = 0;
  float low = 0.0f, high = 0.0f;
  for (int64_t i = lane; i < n; i += 32) {
    const float value = to_float(x[i]);
    most = max(most, magnitude(value));
    low = fminf(low, value);
    high = fminf(high, -value);
  }
  most = lanes_max<32>(most);
  const float absmax = __uint_as_float(most);
  QParams q{four_bit_scale(a.format, absmax), 0.0f, 0.0f};
  if (absmax <= FLT_MAX && a.format == FourBitFormat::kUint4)
    q = four_bit_affine(lanes_min<32>(low), -lanes_min<32>(high));
  if (absmax <= FLT_MAX && a.rule == FourBitScaleRule::kSigned) {
    int64_t at = n;  // of the first element of that magnitude
    for (int64_t i = lane; i < n && at == n; i += 32)
      if (magnitude(to_float(x[i])) == most) at = i;
    for (int step = 16; step > 0; step /= 2) at = min(at, __shfl_xor_sync(0xffffffffu, at, step));
    q.scale = four_bit_signed_scale(to_float(x[at]));
  }
  if (a.rule == FourBitScaleRule::kSearch && q.scale > 0.0f) q.scale = searched_scale(a, ranks, x, n, q.scale);
  if (lane == 0) {
    a.scale[block] = q.scale;
    if (a.zero_point) a.zero_point[block] = static_cast<int32_t>(q.zero_point);
  }
  const bool valid = q.scale == q.scale, whole = whole_numbers(a.format);
  const float inverse = valid ? four_bit_inverse(q.scale) : 0.0f;
  const QuantRange limits = four_bit_range(a.format == FourBitFormat::kUint4);
  const uint8_t zero = whole ? static_cast<uint8_t>(static_cast<int>(q.zero_point) & 15) : ranks.zero;
  for (int64_t i = 2 * lane; i < n; i += 64) {
    uint8_t code[2] = {zero, zero};
    for (int j = 0; j < 2 && valid && i + j < n; ++j) {
      const float value = to_float(x[i + j]);
      code[j] =
          whole ? four_bit_integer_code(value, inverse, q.zero_point, limits) : four_bit_code(ranks, value, inverse);
    }
    a.codes[(first + i) / 2] = static_cast<uint8_t>(whole ? code[1] << 4 | code[0] : code[0] << 4 | code[1]);
  }
}

template <typename F>
void dispatch_format(FourBitFormat format, const F& f) {
  switch (format) {
    case FourBitFormat::kNf4:
      return f(std::integral_constant<FourBitFormat, FourBitFormat::kNf4>{});
    case FourBitFormat::kFp4:
      return f(std::integral_constant<FourBitFormat, FourBitFormat::kFp4>{});
    case FourBitFormat::kE2m1:
      return f(std::integral_constant<FourBitFormat, FourBitFormat::kE2m1>{});
    case FourBitFormat::kInt4:
      return f(std::integral_constant<FourBitFormat, FourBitFormat::kInt4>{});
    default:
      return f(std::integral_constant<FourBitFormat, FourBitFormat::kUint4>{});
  }
}

template <typename F>
void dispatch_lanes(int64_t block, const F& f) {
  switch (block) {
    case 32:
      return f(std::integral_constant<int, 4>{});
    case 64:
      return f(std::integral_constant<int, 8>{});
    case 128:
      return f(std::integral_constant<int, 16>{});
    default:
      return f(std::integral_constant<int, 32>{});
  }
}

}  // namespace

int four_bit_quantize(const FourBitQuantizeArgs& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const FourBitValues values = four_bit_values(a.format);
  const bool fast = a.rule == FourBitScaleRule::kAbsmax && a.format != FourBitFormat::kTable && is_aligned(a.x) &&
                    reinterpret_cast<uintptr_t>(a.codes) % 4 == 0 &&
                    (a.block == 32 || a.block == 64 || a.block == 128 || a.block == 256);
  const int64_t whole = fast ? a.numel / a.block : 0;
  const Bins bins = bins_of(a.format, values);
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (whole > 0) {
      dispatch_format(a.format, [&](auto format) {
        dispatch_lanes(a.block, [&](auto lanes) {
          const int64_t wanted = ceil_div(whole * lanes.value, kThreads);
          const int64_t resident = static_cast<int64_t>(multiprocessors()) * 8;
          const auto grid = static_cast<unsigned>(wanted < resident ? wanted : resident);
          quantize_kernel<T, format.value, lanes.value>
              <<<grid, kThreads, 0, stream>>>(static_cast<const T*>(a.x), a.codes, a.scale, a.zero_point, whole, bins);
        });
      });
    }
    if (whole < a.blocks) {
      const auto grid = static_cast<unsigned>(ceil_div(a.blocks - whole, kThreads / 32));
      quantize_any_kernel<T><<<grid, kThreads, 0, stream>>>(a, values, whole);
    }
  });
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
