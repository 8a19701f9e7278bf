// A block of 256 elements in the registers of a warp, eight to a lane: loads, the step, codes, stores.
#pragma once

#include "csrc/common/adamw_8bit.h"
#include "csrc/cuda/common.cuh"

namespace quantrain::cuda {

constexpr int kThreads = 1024;  // 64 registers a thread fill a multiprocessor
constexpr int kWarps = kThreads / 32;
constexpr int kLaneElements = kStateBlock / 32;

// ---- tables ---------------------------------------------------------------------------------------------------------

static __device__ const DynamicMap kDeviceMaps[2] = {kUnsignedMap, kSignedMap};
static __device__ const UnsignedBins kDeviceUnsignedBins = detail::make_unsigned_bins();
static __device__ const SignedBins kDeviceSignedBins = detail::make_signed_bins();

// A lane reads its own copy of a map, so that 32 lanes never meet in a bank.
struct Tables {
  float signed_map[kDynamicCodes * 32];
  float unsigned_map[kDynamicCodes * 32];
  uint32_t signed_bins[2 * kBins];
  uint32_t unsigned_bins[kBins];

  __device__ void fill() {
    for (int i = threadIdx.x; i < kDynamicCodes * 32; i += kThreads) {
      unsigned_map[i] = kDeviceMaps[0].value[i / 32];
      signed_map[i] = kDeviceMaps[1].value[i / 32];
    }
    for (int i = threadIdx.x; i < 2 * kBins; i += kThreads) signed_bins[i] = kDeviceSignedBins.entry[i];
    for (int i = threadIdx.x; i < kBins; i += kThreads) unsigned_bins[i] = kDeviceUnsignedBins.entry[i];
    __syncthreads();
  }
};

// The value of byte j of a word of codes.
__device__ __forceinline__ float decode(const float* map, uint32_t word, int j, uint32_t lane) {
  const uint32_t code_times_128 = j == 0 ? word << 7 : word >> (8 * j - 7);
  const uint32_t offset = (code_times_128 & 0x7f80u) | lane << 2;
  return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(map) + offset);
}

// Bytes 2 of four words.
__device__ __forceinline__ uint32_t gather_codes(const uint32_t (&words)[4]) {
  return __byte_perm(__byte_perm(words[0], words[1], 0x0062), __byte_perm(words[2], words[3], 0x0062), 0x5410);
}

// 0x7f in the bytes of what is negative. prmt's digits from 8 on repeat a byte's sign.
__device__ __forceinline__ uint32_t negative_bytes(const float* m) {
  uint32_t low, high, all;
  asm("prmt.b32 %0, %1, %2, 0xfb;" : "=r"(low) : "r"(__float_as_uint(m[0])), "r"(__float_as_uint(m[1])));
  asm("prmt.b32 %0, %1, %2, 0xfb;" : "=r"(high) : "r"(__float_as_uint(m[2])), "r"(__float_as_uint(m[3])));
  asm("prmt.b32 %0, %1, %2, 0x5410;" : "=r"(all) : "r"(low), "r"(high));
  return all & 0x7f7f7f7fu;
}

// The codes of four elements.
__device__ __forceinline__ uint32_t signed_codes(const float* m, float inverse, const uint32_t* bins) {
  uint32_t words[4];
  float clean[4];  // without -0
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    clean[j] = m[j] + 0.0f;
    words[j] = signed_state_code(m[j], inverse, bins);
  }
  return gather_codes(words) ^ negative_bytes(clean);
}

__device__ __forceinline__ uint32_t unsigned_codes(const float* v, float inverse, const uint32_t* bins) {
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) words[j] = unsigned_state_code(v[j], inverse, bins);
  return gather_codes(words);
}

constexpr uint32_t kSignedZeros = 0x7f7f7f7fu;

// ---- lists ----------------------------------------------------------------------------------------------------------

constexpr uint8_t kHasCodes = 16, kIsAligned = 32;  // in `kind`, above 4 * gradient's type + parameter's type

template <int kCapacity>
struct DeviceList {
  AdamW8bitArgs args;  // without its tensors
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  int64_t base_block;  // blocks of earlier launches
  int32_t count;
  int32_t blocks;
  void* param[kCapacity];
  const void* grad[kCapacity];
  void* exp_avg[kCapacity];
  void* exp_avg_sq[kCapacity];
  float* exp_avg_scale[kCapacity];
  float* exp_avg_sq_scale[kCapacity];
  float* step[kCapacity];
  const uint8_t* mask[kCapacity];
  int64_t numel[kCapacity];
  int32_t first_block[kCapacity];  // of the tensor, within this launch
  uint8_t kind[kCapacity];
};

// A tensor of the list as the slow path takes it. The fast one reads the list where it needs a pointer: from constant
// memory that costs less than registers, of which there are too few.
struct Work {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  float* exp_avg_scale;
  float* exp_avg_sq_scale;
  const uint8_t* mask;
  AdamW8bitFactors factors;
  uint64_t first_draw;  // of the tensor
};

// ---- a block of 256 -------------------------------------------------------------------------------------------------

// kVec elements that lie side by side, kLaneElements / kVec times: of part i the lane's are from
// i * 32 * kVec + lane * kVec on.
template <typename T, int kVec>
__device__ __forceinline__ void load(const T* x, uint32_t lane, float (&values)[kLaneElements]) {
  const auto* packs = reinterpret_cast<const Pack<T, kVec>*>(x);
  Pack<T, kVec> loaded[kLaneElements / kVec];
#pragma unroll
  for (int i = 0; i < kLaneElements / kVec; ++i) loaded[i] = packs[i * 32 + lane];
#pragma unroll
  for (int i = 0; i < kLaneElements / kVec; ++i) {
    float part[kVec];
    unpack(loaded[i], part);
#pragma unroll
    for (int j = 0; j < kVec; ++j) values[i * kVec + j] = part[j];
  }
}

template <typename T, int kVec>
__device__ __forceinline__ void store(T* x, uint32_t lane, const float (&values)[kLaneElements]) {
  auto* packs = reinterpret_cast<Pack<T, kVec>*>(x);
#pragma unroll
  for (int i = 0; i < kLaneElements / kVec; ++i) {
    float part[kVec];
#pragma unroll
    for (int j = 0; j < kVec; ++j) part[j] = values[i * kVec + j];
    packs[i * 32 + lane] = pack<T, kVec>(part);
  }
}

// Four codes a word.
template <int kVec>
__device__ __forceinline__ void load_codes(const uint8_t* codes, uint32_t lane, uint32_t (&words)[2]) {
  if constexpr (kVec == 8) {
    const uint2 both = reinterpret_cast<const uint2*>(codes)[lane];
    words[0] = both.x;
    words[1] = both.y;
  } else {
    words[0] = reinterpret_cast<const uint32_t*>(codes)[lane];
    words[1] = reinterpret_cast<const uint32_t*>(codes)[32 + lane];
  }
}

template <int kVec>
__device__ __forceinline__ void store_codes(uint8_t* codes, uint32_t lane, const uint32_t (&words)[2]) {
  if constexpr (kVec == 8) {
    reinterpret_cast<uint2*>(codes)[lane] = make_uint2(words[0], words[1]);
  } else {
    reinterpret_cast<uint32_t*>(codes)[lane] = words[0];
    reinterpret_cast<uint32_t*>(codes)[32 + lane] = words[1];
  }
}

// The largest magnitude's bits, which are in the order of the numbers; NaN is the largest.
__device__ __forceinline__ uint32_t largest_magnitude(const float (&values)[kLaneElements]) {
  uint32_t most = 0;
#pragma unroll
  for (int j = 0; j < kLaneElements; ++j) most = max(most, magnitude_bits(values[j]));
  return __reduce_max_sync(0xffffffffu, most);
}

// Likewise of numbers that are not negative.
__device__ __forceinline__ uint32_t largest_number(const float (&values)[kLaneElements]) {
  uint32_t most = 0;
#pragma unroll
  for (int j = 0; j < kLaneElements; ++j) most = max(most, __float_as_uint(values[j]));
  return __reduce_max_sync(0xffffffffu, most);
}

// The quotient m / (sqrt(v) + eps) with both operations rounded to nearest, without the checks that the compiler makes
// at each: 14 instructions in place of 24, and no branch. The sequences are the compiler's own. m and v are multiplied
// by 2^64 and are then either 0 or far from the subnormal numbers; 2^-126 beside them is nothing, and of v = 0 it makes
// a root that is nothing beside eps.
constexpr uint32_t kLargestFastM = 0x44800000u;  // 2^10
constexpr uint32_t kLargestFastV = 0x5d800000u;  // 2^60
constexpr float kLeastFastEps = 0x1p-50f;

__device__ __forceinline__ float fast_quotient_times_2_64(float m, float v, float eps) {
  const float scaled = __fmaf_rn(v, 0x1p64f, 0x1p-126f);
  float inverse_root, inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse_root) : "f"(scaled));
  const float near_root = scaled * inverse_root;
  const float root = __fmaf_rn(__fmaf_rn(-near_root, near_root, scaled), inverse_root * 0.5f, near_root);
  const float divisor = __fmaf_rn(root, 0x1p-32f, eps);  // the product is exact
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(divisor));
  inverse = __fmaf_rn(inverse, __fmaf_rn(-divisor, inverse, 1.0f), inverse);
  const float dividend = m * 0x1p64f, near = dividend * inverse;
  return __fmaf_rn(inverse, __fmaf_rn(-divisor, near, dividend), near);
}

// All of a warp take the same way. The slow one is rare: one copy of its code, through which the elements rotate.
__device__ __forceinline__ void step(const AdamW8bitFactors& f, float (&p)[kLaneElements], float (&m)[kLaneElements],
                                     float (&v)[kLaneElements], uint32_t largest_m, uint32_t largest_v) {
  if (largest_m <= kLargestFastM && largest_v <= kLargestFastV && f.eps >= kLeastFastEps) {
    const float step_size = f.step_size * 0x1p-64f;
#pragma unroll
    for (int j = 0; j < kLaneElements; ++j)
      p[j] = p[j] * f.decay - step_size * fast_quotient_times_2_64(m[j], v[j], f.eps);
    return;
  }
  const auto rotate = [](float (&values)[kLaneElements], float last) {
#pragma unroll
    for (int j = 0; j + 1 < kLaneElements; ++j) values[j] = values[j + 1];
    values[kLaneElements - 1] = last;
  };
#pragma unroll 1
  for (int j = 0; j < kLaneElements; ++j) {
    rotate(p, adamw_8bit_param(f, p[0], m[0], v[0]));
    rotate(m, m[0]);
    rotate(v, v[0]);
  }
}

// Parameters of bfloat16, each to the value below or above it at random.
template <int kVec>
__device__ __forceinline__ void round_at_random(float (&p)[kLaneElements], const PhiloxKey& key, uint64_t draw,
                                                uint32_t lane) {
  Philox4 random;
#pragma unroll
  for (int j = 0; j < kLaneElements; ++j) {
    const uint32_t element = j / kVec * 32 * kVec + lane * kVec + j % kVec;
    if (j % kVec == 0) random = key.block(draw + element / kElementsOfDraw);
    // Of a draw a lane may have the second half: its words move down, so that the choice needs no array in memory.
    if (kVec < kElementsOfDraw && j % kVec == 0 && element % kElementsOfDraw != 0) {
      random.word[0] = random.word[2];
      random.word[1] = random.word[3];
    }
    p[j] = to_float(round_stochastic<BFloat16>(p[j], random_of_element(random, j % kVec)));
  }
}

// The bits of a lane's eight elements of block b, in their order.
template <int kVec>
__device__ __forceinline__ uint32_t kept_of_lane(const uint8_t* mask, int b, uint32_t lane) {
  mask += static_cast<int64_t>(b) * (kStateBlock / 8);
  if constexpr (kVec == 8) return mask[lane];
  const uint32_t shift = lane % 2 * 4;
  return (mask[lane / 2] >> shift & 15u) | (mask[16 + lane / 2] >> shift & 15u) << 4;
}

__device__ __forceinline__ void zero_dropped(uint32_t kept, float (&values)[kLaneElements]) {
#pragma unroll
  for (int j = 0; j < kLaneElements; ++j) values[j] = kept >> j & 1u ? values[j] : 0.0f;
}

// Block b of the tensor, whole and aligned.
template <typename P, typename G, bool kCodes, int kCapacity>
__device__ __forceinline__ void whole_block(const DeviceList<kCapacity>& list, int t, const AdamW8bitFactors& factors,
                                            int b, uint32_t lane, const Tables& tables) {
  constexpr int kVec = sizeof(P) == 4 || sizeof(G) == 4 || !kCodes ? 4 : 8;
  const int64_t first = static_cast<int64_t>(b) * kStateBlock;
  float p[kLaneElements], g[kLaneElements], m[kLaneElements], v[kLaneElements];
  P* param = static_cast<P*>(list.param[t]) + first;
  load<G, kVec>(static_cast<const G*>(list.grad[t]) + first, lane, g);
  load<P, kVec>(param, lane, p);
  const uint32_t kept = list.mask[t] ? kept_of_lane<kVec>(list.mask[t], b, lane) : 255u;
  if constexpr (kCodes) {
    uint32_t m_words[2], v_words[2];
    load_codes<kVec>(static_cast<const uint8_t*>(list.exp_avg[t]) + first, lane, m_words);
    load_codes<kVec>(static_cast<const uint8_t*>(list.exp_avg_sq[t]) + first, lane, v_words);
    const float m_scale = list.exp_avg_scale[t][b], v_scale = list.exp_avg_sq_scale[t][b];
#pragma unroll
    for (int j = 0; j < kLaneElements; ++j) {
      m[j] = decode(tables.signed_map, m_words[j / 4], j % 4, lane) * m_scale;
      v[j] = decode(tables.unsigned_map, v_words[j / 4], j % 4, lane) * v_scale;
    }
  } else {
    load<float, kVec>(static_cast<const float*>(list.exp_avg[t]) + first, lane, m);
    load<float, kVec>(static_cast<const float*>(list.exp_avg_sq[t]) + first, lane, v);
  }
#pragma unroll
  for (int j = 0; j < kLaneElements; ++j) adamw_8bit_moments(factors, g[j], m[j], v[j]);
  if (kept != 255u) {
    zero_dropped(kept, m);
    zero_dropped(kept, v);
  }
  const uint32_t largest_m = largest_magnitude(m), largest_v = largest_number(v);
  step(factors, p, m, v, largest_m, largest_v);
  if (kept != 255u) zero_dropped(kept, p);
  if constexpr (std::is_same_v<P, BFloat16>) {
    if (list.args.stochastic) {
      const uint64_t block = static_cast<uint64_t>(list.base_block + list.first_block[t] + b);
      round_at_random<kVec>(p, PhiloxKey(list.args.philox), block * kDrawsOfBlock, lane);
    }
  }
  store<P, kVec>(param, lane, p);
  if constexpr (kCodes) {
    const float m_scale = dynamic_scale(largest_m), v_scale = dynamic_scale(largest_v);
    uint32_t m_words[2] = {kSignedZeros, kSignedZeros}, v_words[2] = {0, 0};
    if (m_scale == m_scale) {  // else m may be NaN, which is in no bin
      const float inverse = dynamic_inverse(m_scale);
#pragma unroll
      for (int i = 0; i < 2; ++i) m_words[i] = signed_codes(m + 4 * i, inverse, tables.signed_bins);
    }
    if (v_scale == v_scale) {
      const float inverse = dynamic_inverse(v_scale);
#pragma unroll
      for (int i = 0; i < 2; ++i) v_words[i] = unsigned_codes(v + 4 * i, inverse, tables.unsigned_bins);
    }
    store_codes<kVec>(static_cast<uint8_t*>(list.exp_avg[t]) + first, lane, m_words);
    store_codes<kVec>(static_cast<uint8_t*>(list.exp_avg_sq[t]) + first, lane, v_words);
    if (lane == 0) {
      list.exp_avg_scale[t][b] = m_scale;
      list.exp_avg_sq_scale[t][b] = v_scale;
    }
  } else {
    store<float, kVec>(static_cast<float*>(list.exp_avg[t]) + first, lane, m);
    store<float, kVec>(static_cast<float*>(list.exp_avg_sq[t]) + first, lane, v);
  }
}

// One element of any type.
__device__ __forceinline__ float load_one(const void* x, uint32_t type, int64_t i) {
  if (type == static_cast<uint32_t>(DType::kFloat32)) return static_cast<const float*>(x)[i];
  if (type == static_cast<uint32_t>(DType::kFloat16)) return to_float(static_cast<const Half*>(x)[i]);
  return to_float(static_cast<const BFloat16*>(x)[i]);
}

__device__ __forceinline__ void store_one(void* x, uint32_t type, int64_t i, float value) {
  if (type == static_cast<uint32_t>(DType::kFloat32))
    static_cast<float*>(x)[i] = value;
  else if (type == static_cast<uint32_t>(DType::kFloat16))
    static_cast<Half*>(x)[i] = from_float<Half>(value);
  else
    static_cast<BFloat16*>(x)[i] = from_float<BFloat16>(value);
}

// Block b of `size` elements, of any types and at any address: element by element, of which the lane's are lane + 32 j.
static __device__ __noinline__ void any_block(const Work w, uint32_t kind, int64_t b, int size, uint32_t lane,
                                              const Tables& tables, bool stochastic, const PhiloxState& philox) {
  const int64_t first = b * kStateBlock;
  const uint32_t type = kind & 3u, grad_type = kind >> 2 & 3u;
  const bool codes = kind & kHasCodes;
  auto* m_codes = static_cast<uint8_t*>(w.exp_avg) + first;
  auto* v_codes = static_cast<uint8_t*>(w.exp_avg_sq) + first;
  const float m_before = codes ? w.exp_avg_scale[b] : 0.0f, v_before = codes ? w.exp_avg_sq_scale[b] : 0.0f;
  float m[kLaneElements] = {}, v[kLaneElements] = {};
#pragma unroll
  for (int j = 0; j < kLaneElements; ++j) {
    const int i = static_cast<int>(lane) + 32 * j;
    if (i >= size) continue;
    if (codes) {
      m[j] = decode(tables.signed_map, m_codes[i], 0, lane) * m_before;
      v[j] = decode(tables.unsigned_map, v_codes[i], 0, lane) * v_before;
    } else {
      m[j] = static_cast<const float*>(w.exp_avg)[first + i];
      v[j] = static_cast<const float*>(w.exp_avg_sq)[first + i];
    }
    adamw_8bit_moments(w.factors, load_one(w.grad, grad_type, first + i), m[j], v[j]);
    const bool kept = !w.mask || is_kept(w.mask, first + i);
    if (!kept) m[j] = v[j] = 0.0f;
    float p = kept ? adamw_8bit_param(w.factors, load_one(w.param, type, first + i), m[j], v[j]) : 0.0f;
    if (stochastic && type == static_cast<uint32_t>(DType::kBFloat16)) {
      const uint64_t draw = w.first_draw + static_cast<uint64_t>(first + i) / kElementsOfDraw;
      const Philox4 random = PhiloxKey(philox).block(draw);
      uint32_t word = 0;
#pragma unroll
      for (int e = 0; e < kElementsOfDraw; ++e)
        if (i % kElementsOfDraw == e) word = random_of_element(random, e);
      p = to_float(round_stochastic<BFloat16>(p, word));
    }
    store_one(w.param, type, first + i, p);
    if (!codes) {
      static_cast<float*>(w.exp_avg)[first + i] = m[j];
      static_cast<float*>(w.exp_avg_sq)[first + i] = v[j];
    }
  }
  if (!codes) return;
  const float m_scale = dynamic_scale(largest_magnitude(m)), v_scale = dynamic_scale(largest_number(v));
  const float m_inverse = dynamic_inverse(m_scale), v_inverse = dynamic_inverse(v_scale);
#pragma unroll
  for (int j = 0; j < kLaneElements; ++j) {
    const int i = static_cast<int>(lane) + 32 * j;
    if (i >= size) continue;
    uint32_t m_code = kSignedZero, v_code = 0;
    if (m_scale == m_scale)
      m_code = signed_state_code(m[j], m_inverse, tables.signed_bins) >> 16 ^ (m[j] < 0.0f ? kSignedZero : 0u);
    if (v_scale == v_scale) v_code = unsigned_state_code(v[j], v_inverse, tables.unsigned_bins) >> 16;
    m_codes[i] = static_cast<uint8_t>(m_code);
    v_codes[i] = static_cast<uint8_t>(v_code);
  }
  if (lane == 0) {
    w.exp_avg_scale[b] = m_scale;
    w.exp_avg_sq_scale[b] = v_scale;
  }
}

}  // namespace quantrain::cuda
