#include "csrc/cuda/adamw_8bit.h"
#include "csrc/cuda/common.cuh"
#include "csrc/cuda/device.h"

// A warp takes a block of 256 elements, eight to a lane, from its loads to its codes without leaving its registers, and
// without waiting for another warp. One thread block per multiprocessor goes through a run of blocks, whatever tensors
// they belong to: the tables of codes are written to shared memory once, and no thread block ends much later than
// another. The list of tensors travels in the kernel's arguments (up to 32 KB of them since CUDA 12.1), so that a
// captured graph holds it.
//
// 10 bytes an element leave some 80 instructions, of which the integer unit can issue half. Hence tables that give a
// code with one load and one addition (csrc/common/dynamic_map.h), and codes that are packed by bytes of words.

namespace quantrain::cuda {
namespace {

constexpr int kThreads = 1024;  // 64 registers a thread fill a multiprocessor
constexpr int kWarps = kThreads / 32;
constexpr int kLaneElements = kStateBlock / 32;
constexpr int kSmallList = 160;  // tensors of a launch: GPT-2 has 148
constexpr int kLargeList = 448;  // 32 KB of arguments; longer lists take several launches

// ---- tables ---------------------------------------------------------------------------------------------------------

__device__ const DynamicMap kDeviceMaps[2] = {kUnsignedMap, kSignedMap};
__device__ const UnsignedBins kDeviceUnsignedBins = detail::make_unsigned_bins();
__device__ const SignedBins kDeviceSignedBins = detail::make_signed_bins();

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
  const uint32_t largest_m = largest_magnitude(m), largest_v = largest_number(v);
  step(factors, p, m, v, largest_m, largest_v);
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
__device__ __noinline__ void any_block(const Work w, uint32_t kind, int64_t b, int size, uint32_t lane,
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
    float p = adamw_8bit_param(w.factors, load_one(w.param, type, first + i), m[j], v[j]);
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

// ---- kernels --------------------------------------------------------------------------------------------------------

template <typename F>
__device__ __forceinline__ void dispatch_type(uint32_t type, const F& f) {
  switch (static_cast<DType>(type)) {
    case DType::kFloat16:
      return f(static_cast<Half*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

// The last tensor whose first block is not after `block`.
template <int kCapacity>
__device__ __forceinline__ int find_tensor(const DeviceList<kCapacity>& list, int block) {
  int low = 0, high = list.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (list.first_block[middle] <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

template <int kCapacity>
__global__ void __launch_bounds__(kThreads, 1) adamw_8bit_kernel(const __grid_constant__ DeviceList<kCapacity> list) {
  const AdamW8bitArgs& a = list.args;
  if (a.found_inf && *a.found_inf != 0.0f) return;
  extern __shared__ uint4 shared[];
  Tables& tables = *reinterpret_cast<Tables*>(shared);
  tables.fill();
  const uint32_t lane = threadIdx.x % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const auto share = [&](unsigned block) { return static_cast<int>(int64_t{list.blocks} * block / gridDim.x); };
  const int begin = share(blockIdx.x), end = share(blockIdx.x + 1);
  const float lr = *a.lr, grad_factor = a.grad_scale ? inverse_scale(*a.grad_scale) : 1.0f;
  float counted = -1.0f;
  AdamW8bitFactors factors{};
  for (int t = find_tensor(list, begin); t < list.count && list.first_block[t] < end; ++t) {
    const int first = list.first_block[t], last = t + 1 < list.count ? list.first_block[t + 1] : list.blocks;
    const int from = max(begin, first), to = min(end, last);
    // Block i of all is for warp (i - begin) % kWarps, so that small tensors keep all warps busy.
    int block = from + (warp + kWarps - (from - begin) % kWarps) % kWarps;
    if (block >= to) continue;
    const float steps = *list.step[t];
    if (steps != counted) {
      counted = steps;
      factors = adamw_8bit_factors(a.beta1, a.beta2, a.eps, a.weight_decay, lr, grad_factor, steps);
      // From the kernel's arguments, where an instruction takes them without a register.
      factors.beta1 = list.beta1;
      factors.one_minus_beta1 = list.one_minus_beta1;
      factors.beta2 = list.beta2;
      factors.one_minus_beta2 = list.one_minus_beta2;
    }
    const uint32_t kind = list.kind[t];
    if (kind & kIsAligned) {
      const int stop = min(to, first + static_cast<int>(list.numel[t] / kStateBlock));
      dispatch_type(kind & 3u, [&](auto* param_type) {
        using P = std::remove_pointer_t<decltype(param_type)>;
        dispatch_type(kind >> 2 & 3u, [&](auto* grad_type) {
          using G = std::remove_pointer_t<decltype(grad_type)>;
          if (kind & kHasCodes)
            for (; block < stop; block += kWarps)
              whole_block<P, G, true>(list, t, factors, block - first, lane, tables);
          else
            for (; block < stop; block += kWarps)
              whole_block<P, G, false>(list, t, factors, block - first, lane, tables);
        });
      });
    }
    for (; block < to; block += kWarps) {
      const int64_t left = list.numel[t] - static_cast<int64_t>(block - first) * kStateBlock;
      const Work work{list.param[t],
                      list.grad[t],
                      list.exp_avg[t],
                      list.exp_avg_sq[t],
                      list.exp_avg_scale[t],
                      list.exp_avg_sq_scale[t],
                      factors,
                      static_cast<uint64_t>(list.base_block + first) * kDrawsOfBlock};
      any_block(work, kind, block - first, left < kStateBlock ? static_cast<int>(left) : kStateBlock, lane, tables,
                a.stochastic, a.philox);
    }
  }
}

constexpr int kCountThreads = 256;

template <int kCapacity>
struct StepList {
  const float* found_inf;  // [1], or null
  int32_t count;
  float* step[kCapacity];
};

template <int kCapacity>
__global__ void __launch_bounds__(kCountThreads) count_steps_kernel(const __grid_constant__ StepList<kCapacity> list) {
  const int t = static_cast<int>(blockIdx.x * kCountThreads + threadIdx.x);
  if (t < list.count && !(list.found_inf && *list.found_inf != 0.0f)) *list.step[t] += 1.0f;
}

constexpr int kCodesThreads = 256;

// A warp a block.
template <typename T>
__global__ void __launch_bounds__(kCodesThreads) quantize_state_kernel(const StateCodesArgs a) {
  const int64_t b = (static_cast<int64_t>(blockIdx.x) * kCodesThreads + threadIdx.x) / 32;
  const uint32_t lane = threadIdx.x % 32;
  const int64_t first = b * kStateBlock, left = a.numel - first;
  if (left <= 0) return;
  const T* x = static_cast<const T*>(a.values) + first;
  float values[kLaneElements] = {};
#pragma unroll
  for (int j = 0; j < kLaneElements; ++j)
    if (lane + 32 * j < left) values[j] = to_float(x[lane + 32 * j]);
  const float scale = dynamic_scale(largest_magnitude(values)), inverse = dynamic_inverse(scale);
#pragma unroll
  for (int j = 0; j < kLaneElements; ++j) {
    if (lane + 32 * j >= left) continue;
    uint32_t code = a.with_sign ? kSignedZero : 0u;
    if (scale == scale)
      code = a.with_sign ? signed_state_code(values[j], inverse, kDeviceSignedBins.entry) >> 16 ^
                               (values[j] < 0.0f ? kSignedZero : 0u)
                         : unsigned_state_code(values[j], inverse, kDeviceUnsignedBins.entry) >> 16;
    a.codes[first + lane + 32 * j] = static_cast<uint8_t>(code);
  }
  if (lane == 0) a.scale[b] = scale;
}

template <typename T>
__global__ void __launch_bounds__(kCodesThreads) dequantize_state_kernel(const StateCodesArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCodesThreads + threadIdx.x;
  if (i < a.numel)
    static_cast<T*>(a.values)[i] = from_float<T>(kDeviceMaps[a.with_sign].value[a.codes[i]] * a.scale[i / kStateBlock]);
}

// ---- launchers ------------------------------------------------------------------------------------------------------

uint8_t kind_of(const AdamW8bitTensor& t) {
  const bool aligned = is_aligned(t.param) && is_aligned(t.grad) && is_aligned(t.exp_avg) && is_aligned(t.exp_avg_sq);
  return static_cast<uint8_t>(static_cast<int>(t.dtype) + 4 * static_cast<int>(t.grad_dtype) +
                              (t.codes ? kHasCodes : 0) + (aligned ? kIsAligned : 0));
}

// A piece of the list: it ends where its capacity or 2^30 blocks are reached. Returns an error.
template <int kCapacity>
cudaError_t launch_pieces(const AdamW8bitArgs& a, cudaStream_t stream) {
  const auto kernel = &adamw_8bit_kernel<kCapacity>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(sizeof(Tables)));
  if (error != cudaSuccess) return error;
  DeviceList<kCapacity> list;
  StepList<kCapacity> steps;
  list.args = a;
  list.args.tensors = nullptr;  // host memory
  list.beta1 = static_cast<float>(a.beta1);
  list.one_minus_beta1 = static_cast<float>(1.0 - a.beta1);
  list.beta2 = static_cast<float>(a.beta2);
  list.one_minus_beta2 = static_cast<float>(1.0 - a.beta2);
  steps.found_inf = a.found_inf;
  int64_t base_block = 0;
  for (int64_t first = 0; first < a.count; first += kCapacity) {
    const int64_t last = first + kCapacity < a.count ? first + kCapacity : a.count;
    list.base_block = base_block;
    list.blocks = 0;
    for (int64_t t = first; t < last; ++t) {
      const AdamW8bitTensor& tensor = a.tensors[t];
      const int64_t i = t - first;
      list.param[i] = tensor.param;
      list.grad[i] = tensor.grad;
      list.exp_avg[i] = tensor.exp_avg;
      list.exp_avg_sq[i] = tensor.exp_avg_sq;
      list.exp_avg_scale[i] = tensor.exp_avg_scale;
      list.exp_avg_sq_scale[i] = tensor.exp_avg_sq_scale;
      list.step[i] = steps.step[i] = tensor.step;
      list.numel[i] = tensor.numel;
      list.kind[i] = kind_of(tensor);
      list.first_block[i] = list.blocks;
      list.blocks += static_cast<int32_t>(state_blocks_of(tensor.numel));
    }
    list.count = steps.count = static_cast<int32_t>(last - first);
    base_block += list.blocks;
    const unsigned grid = static_cast<unsigned>(
        ceil_div(list.blocks, kWarps) < multiprocessors() ? ceil_div(list.blocks, kWarps) : multiprocessors());
    if (grid > 0) kernel<<<grid, kThreads, sizeof(Tables), stream>>>(list);
    count_steps_kernel<kCapacity>
        <<<static_cast<unsigned>(ceil_div(steps.count, kCountThreads)), kCountThreads, 0, stream>>>(steps);
  }
  return cudaGetLastError();
}

}  // namespace

int adamw_8bit(const AdamW8bitArgs& a, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return a.count <= kSmallList ? launch_pieces<kSmallList>(a, on) : launch_pieces<kLargeList>(a, on);
}

int quantize_state(const StateCodesArgs& a, void* stream) {
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    quantize_state_kernel<T><<<static_cast<unsigned>(ceil_div(state_blocks_of(a.numel), kCodesThreads / 32)),
                               kCodesThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  });
  return cudaGetLastError();
}

int dequantize_state(const StateCodesArgs& a, void* stream) {
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dequantize_state_kernel<T><<<static_cast<unsigned>(ceil_div(a.numel, kCodesThreads)), kCodesThreads, 0,
                                 static_cast<cudaStream_t>(stream)>>>(a);
  });
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
