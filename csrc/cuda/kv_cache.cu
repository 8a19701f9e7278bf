#include "csrc/cuda/kv_cache.h"

#include <cmath>

#include "csrc/common/rotary.h"
#include "csrc/cuda/common.cuh"
#include "csrc/cuda/device.h"
#include "csrc/cuda/overlap.cuh"
#include "csrc/cuda/ptx.cuh"

// A new token's heads into the cache, a warp each; and attention of a few tokens to all that is kept: keys are shared
// among thread blocks, warps and the lanes of a warp, each with a running maximum and sum (arXiv:1805.02867) of its
// own, and the parts meet at the end ("Flash-Decoding", Dao et al. 2023).

namespace quantrain::cuda {
namespace {

constexpr int kAppendWarps = 4;
constexpr int kMaxPairs = 4;  // of a lane: heads of up to 256

template <typename T, typename Angle>
__global__ void __launch_bounds__(kAppendWarps * 32) append_kernel(const KvAppendArgs a) {
  ptx::begin_overlapping();
  const KvCacheShape& s = a.shape;
  const int lane = threadIdx.x % 32;
  const int64_t all_heads = s.heads + 2 * s.key_heads;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kAppendWarps + threadIdx.x / 32;
  if (index >= s.batches * s.tokens * all_heads) return;
  const int64_t token = index / all_heads, head = index - token * all_heads;
  const int64_t batch = token / s.tokens, in_sequence = token - batch * s.tokens;
  const int half = static_cast<int>(s.size) / 2;
  T* const x = static_cast<T*>(a.qkv) + index * s.size;
  const bool turned = a.cos && head < s.heads + s.key_heads, kept = head >= s.heads;
  if (!turned && !kept) return;
  float low[kMaxPairs], high[kMaxPairs];
  const int64_t at = (a.one_sequence ? in_sequence : token) * s.size;
#pragma unroll
  for (int p = 0; p < kMaxPairs; ++p) {
    const int i = p * 32 + lane;
    low[p] = high[p] = 0.0f;
    if (i >= half) continue;
    low[p] = to_float(x[i]);
    high[p] = to_float(x[i + half]);
    if (turned) {
      const Angle* cos = static_cast<const Angle*>(a.cos) + at;
      const Angle* sin = static_cast<const Angle*>(a.sin) + at;
      const RotatedPair y = rotated(low[p], high[p], to_float(cos[i]), to_float(cos[i + half]), to_float(sin[i]),
                                    to_float(sin[i + half]));
      const T first = from_float<T>(y.low), second = from_float<T>(y.high);
      x[i] = first;
      x[i + half] = second;
      low[p] = to_float(first);
      high[p] = to_float(second);
    }
  }
  const int64_t place = s.position[batch * s.position_stride] + in_sequence;
  if (!kept || place < 0 || place >= s.capacity) return;
  uint32_t most = 0;  // magnitudes as integers: NaN is the largest
#pragma unroll
  for (int p = 0; p < kMaxPairs; ++p)
    most = max(most, max(__float_as_uint(low[p]) & 0x7fffffffu, __float_as_uint(high[p]) & 0x7fffffffu));
  const float scale = int8_scale(__uint_as_float(__reduce_max_sync(0xffffffffu, most)));
  const float inverse = int8_inverse(scale, false);
  const bool is_key = head < s.heads + s.key_heads;
  const int64_t key_head = head - s.heads - (is_key ? 0 : s.key_heads);
  const int64_t row = (batch * s.key_heads + key_head) * s.capacity + place;
  int8_t* const codes = (is_key ? a.cache.key_codes : a.cache.value_codes) + row * s.size;
  const auto code = [&](float value) {
    return scale == scale ? static_cast<int8_t>(static_cast<uint8_t>(int8_code(value * inverse, 0.0f))) : int8_t{0};
  };
#pragma unroll
  for (int p = 0; p < kMaxPairs; ++p) {
    const int i = p * 32 + lane;
    if (i >= half) continue;
    codes[i] = code(low[p]);
    codes[i + half] = code(high[p]);
  }
  if (lane == 0) (is_key ? a.cache.key_scale : a.cache.value_scale)[row] = scale;
}

// ---- attention ------------------------------------------------------------------------------------------------------

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kElements = 16;  // of a key that a lane holds: 16 bytes
constexpr int kRows = 4;       // query heads of one key head that a thread block takes
constexpr float kLog2E = 1.44269504f;
constexpr int kPartKeys = 128;  // fewer are not worth a thread block of their own
constexpr int kMostParts = 64;

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void decode(const uint4& codes, float (&values)[kElements]) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int w = 0; w < 4; ++w)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      values[w * 4 + j] = static_cast<float>(static_cast<int8_t>(static_cast<uint8_t>(words[w] >> (8 * j))));
}

// A running sum of probabilities times values: of the row's maximum so far, in units of 2.
struct Running {
  float most = -INFINITY, total = 0.0f;
  float value[kElements] = {};

  __device__ __forceinline__ void add(float other_most, float other_total, const float (&other)[kElements]) {
    const float both = fmaxf(most, other_most), base = both == -INFINITY ? 0.0f : both;
    const float mine = exp2_of(most - base), theirs = exp2_of(other_most - base);
    most = both;
    total = total * mine + other_total * theirs;
#pragma unroll
    for (int i = 0; i < kElements; ++i) value[i] = value[i] * mine + other[i] * theirs;
  }
};

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) cached_attention_kernel(const CachedAttentionArgs a, int parts) {
  ptx::begin_overlapping();
  constexpr int kLanes = kSize / kElements;  // of a key
  constexpr int kSlots = 32 / kLanes;        // keys that a warp takes at a time
  __shared__ float shared_value[kWarps][kRows][kSize];
  __shared__ float shared_most[kWarps][kRows], shared_total[kWarps][kRows];
  const KvCacheShape& s = a.shape;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, chunk = lane % kLanes, slot = lane / kLanes;
  const int group = static_cast<int>(s.heads / s.key_heads), row_blocks = (group + kRows - 1) / kRows;
  const int key_head = static_cast<int>(blockIdx.y) / row_blocks,
            first_row = static_cast<int>(blockIdx.y) % row_blocks * kRows;
  const int64_t token = blockIdx.z, batch = token / s.tokens, in_sequence = token - batch * s.tokens;
  const int part = static_cast<int>(blockIdx.x);
  const int64_t position = s.position[batch * s.position_stride] + in_sequence + 1;
  const int keys = static_cast<int>(position < s.capacity ? position : s.capacity);
  const int each = ((keys + parts - 1) / parts + kSlots * kWarps - 1) / (kSlots * kWarps) * (kSlots * kWarps);
  const int begin = part * each, end = min(keys, begin + each);

  const T* const q = static_cast<const T*>(a.q) + batch * a.batch_stride + in_sequence * a.token_stride;
  float query[kRows][kElements];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int head = key_head * group + min(first_row + r, group - 1);  // rows past the end are not written
    const auto* from = reinterpret_cast<const Pack<T, 8>*>(q + head * kSize + chunk * kElements);
#pragma unroll
    for (int h = 0; h < kElements / 8; ++h) {
      float values[8];
      const Pack<T, 8> eight = from[h];
      unpack(eight, values);
#pragma unroll
      for (int i = 0; i < 8; ++i) query[r][h * 8 + i] = values[i] * (a.scale * kLog2E);
    }
  }
  const int64_t row = (batch * s.key_heads + key_head) * s.capacity;
  const auto* keys_of = reinterpret_cast<const uint4*>(a.cache.key_codes + row * kSize);
  const auto* values_of = reinterpret_cast<const uint4*>(a.cache.value_codes + row * kSize);
  Running running[kRows];
  for (int first = begin + warp * kSlots; first < end; first += kWarps * kSlots) {
    const int key = first + slot;
    const bool inside = key < end;
    const int held = inside ? key : end - 1;
    const uint4 key_codes = __ldg(keys_of + held * kLanes + chunk),
                value_codes = __ldg(values_of + held * kLanes + chunk);
    const float key_scale = __ldg(a.cache.key_scale + row + held),
                value_scale = __ldg(a.cache.value_scale + row + held);
    const bool attended = inside && (!a.mask || a.mask[batch * a.mask_stride + held]);
    float values[kElements];
    decode(key_codes, values);
    float score[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      score[r] = 0.0f;
#pragma unroll
      for (int i = 0; i < kElements; ++i) score[r] = fmaf(query[r][i], values[i], score[r]);
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) score[r] += __shfl_xor_sync(0xffffffffu, score[r], step);
      score[r] = attended ? score[r] * key_scale : -INFINITY;
    }
    decode(value_codes, values);
#pragma unroll
    for (int i = 0; i < kElements; ++i) values[i] *= value_scale;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (score[r] == -INFINITY) continue;
      running[r].add(score[r], 1.0f, values);
    }
  }
  // The slots of a warp, then the warps.
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int step = kLanes; step < 32; step *= 2) {
      const float most = __shfl_xor_sync(0xffffffffu, running[r].most, step);
      const float total = __shfl_xor_sync(0xffffffffu, running[r].total, step);
      float other[kElements];
#pragma unroll
      for (int i = 0; i < kElements; ++i) other[i] = __shfl_xor_sync(0xffffffffu, running[r].value[i], step);
      running[r].add(most, total, other);
    }
    if (slot == 0) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) shared_value[warp][r][chunk * kElements + i] = running[r].value[i];
      if (chunk == 0) {
        shared_most[warp][r] = running[r].most;
        shared_total[warp][r] = running[r].total;
      }
    }
  }
  __syncthreads();
  for (int index = threadIdx.x; index < kRows * kSize; index += kThreads) {
    const int r = index / kSize, element = index % kSize, head = key_head * group + first_row + r;
    if (first_row + r >= group) continue;
    float most = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, shared_most[w][r]);
    const float base = most == -INFINITY ? 0.0f : most;
    float total = 0.0f, value = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = exp2_of(shared_most[w][r] - base);
      total += shared_total[w][r] * weight;
      value += shared_value[w][r][element] * weight;
    }
    const int64_t result = token * s.heads + head;
    if (parts == 1) {
      static_cast<T*>(a.y)[result * kSize + element] = from_float<T>(total == 0.0f ? 0.0f : value / total);
    } else {
      float* const to = a.parts + (result * parts + part) * (kSize + 2);
      to[element] = value;
      if (element == 0) {
        to[kSize] = most;
        to[kSize + 1] = total;
      }
    }
  }
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kSize) combine_kernel(const CachedAttentionArgs a, int parts) {
  ptx::begin_overlapping();
  const int64_t result = blockIdx.x;
  const float* const from = a.parts + result * parts * (kSize + 2);
  float most = -INFINITY;
  for (int p = 0; p < parts; ++p) most = fmaxf(most, from[p * (kSize + 2) + kSize]);
  const float base = most == -INFINITY ? 0.0f : most;
  float total = 0.0f, value = 0.0f;
  for (int p = 0; p < parts; ++p) {
    const float* const part = from + p * (kSize + 2);
    const float weight = exp2_of(part[kSize] - base);
    total += part[kSize + 1] * weight;
    value += part[threadIdx.x] * weight;
  }
  static_cast<T*>(a.y)[result * kSize + threadIdx.x] = from_float<T>(total == 0.0f ? 0.0f : value / total);
}

int row_blocks(const KvCacheShape& s) { return static_cast<int>(ceil_div(s.heads / s.key_heads, kRows)); }

// Enough thread blocks for the device; by the capacity, as how many tokens are kept is known to the device alone.
int parts_of(const KvCacheShape& s) {
  const int64_t blocks = s.key_heads * row_blocks(s) * s.batches * s.tokens;
  const int64_t wanted = ceil_div(2 * multiprocessors(), blocks), most = ceil_div(s.capacity, kPartKeys);
  const int64_t parts = wanted < most ? wanted : most;
  return static_cast<int>(parts < 1 ? 1 : parts > kMostParts ? kMostParts : parts);
}

template <typename T, int kSize>
int launch(const CachedAttentionArgs& a, cudaStream_t stream) {
  const KvCacheShape& s = a.shape;
  const int parts = parts_of(s);
  const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(s.key_heads * row_blocks(s)),
                  static_cast<unsigned>(s.batches * s.tokens));
  if (const auto error =
          launch_overlapping(cached_attention_kernel<T, kSize>, grid, dim3(kThreads), 0, stream, a, parts))
    return error;
  if (parts == 1) return cudaSuccess;
  const dim3 results(static_cast<unsigned>(s.batches * s.tokens * s.heads));
  return launch_overlapping(combine_kernel<T, kSize>, results, dim3(kSize), 0, stream, a, parts);
}

template <typename T>
int launch(const CachedAttentionArgs& a, cudaStream_t stream) {
  switch (a.shape.size) {
    case 32:
      return launch<T, 32>(a, stream);
    case 64:
      return launch<T, 64>(a, stream);
    case 128:
      return launch<T, 128>(a, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

bool kv_append_suits(const KvAppendArgs& a) {
  return (a.shape.dtype == DType::kFloat16 || a.shape.dtype == DType::kBFloat16) && a.shape.size % 2 == 0 &&
         a.shape.size <= 64 * kMaxPairs;
}

int kv_append(const KvAppendArgs& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const int64_t rows = a.shape.batches * a.shape.tokens * (a.shape.heads + 2 * a.shape.key_heads);
  cudaError_t error = cudaSuccess;
  const auto with = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dispatch_float(a.cos ? a.angle_dtype : DType::kFloat32, [&](auto* angle) {
      error = launch_overlapping(append_kernel<T, std::remove_pointer_t<decltype(angle)>>,
                                 dim3(static_cast<unsigned>(ceil_div(rows, kAppendWarps))), dim3(kAppendWarps * 32), 0,
                                 stream, a);
    });
  };
  if (a.shape.dtype == DType::kBFloat16)
    with(static_cast<BFloat16*>(nullptr));
  else
    with(static_cast<Half*>(nullptr));
  return error;
}

bool cached_attention_suits(const CachedAttentionArgs& a) {
  const KvCacheShape& s = a.shape;
  return (s.dtype == DType::kFloat16 || s.dtype == DType::kBFloat16) &&
         (s.size == 32 || s.size == 64 || s.size == 128) && s.capacity < (int64_t{1} << 24) &&
         s.batches * s.tokens < 65536 && s.key_heads * row_blocks(s) < 65536 && is_aligned(a.q) &&
         a.batch_stride % 8 == 0 && a.token_stride % 8 == 0 && is_aligned(a.cache.key_codes) &&
         is_aligned(a.cache.value_codes);
}

size_t cached_attention_part_bytes(const CachedAttentionArgs& a) {
  const int parts = parts_of(a.shape);
  if (parts == 1) return 0;
  return static_cast<size_t>(a.shape.batches * a.shape.tokens * a.shape.heads * parts * (a.shape.size + 2)) *
         sizeof(float);
}

int cached_attention(const CachedAttentionArgs& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  return a.shape.dtype == DType::kBFloat16 ? launch<BFloat16>(a, stream) : launch<Half>(a, stream);
}

}  // namespace quantrain::cuda
