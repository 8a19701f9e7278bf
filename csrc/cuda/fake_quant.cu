#include "csrc/cuda/fake_quant.h"

#include "csrc/cuda/common.cuh"

// Elementwise kernels: one 16-byte vector of the floating-point side at a time, kUnroll vectors in flight per thread.
// Compiled with --fmad=false: a fused multiply-add would break bit equality with the CPU.

namespace quantrain::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

// How the parameters of a vector are found.
enum class Mode {
  kTensor,  // one set for the whole tensor
  kRow,     // one set per vector: rows hold whole vectors
  // consecutive sets for consecutive elements, the same for all vectors of a thread: the scale varies along the last
  // dimension
  kColumn,
  kAny,  // a vector may cross rows
};

// ---- kernels --------------------------------------------------------------------------------------------------------

template <typename Index>
struct Lookup {
  DeviceGrouping<Index> grouping;
  QParamTensors tensors;
  QuantRange range;
  Index inner_elements;
  Index rows;
  int64_t column_step;  // kColumn: vectors between those of one thread, a multiple of a row
};

// The vectors of one thread: neighbours in a block, or, where columns have their own parameters, kUnroll rows of one
// column.
template <Mode kMode, int kSize, typename Index>
struct ThreadVectors {
  int64_t base;
  int64_t step;
  int64_t end;  // vectors at or past it are not this thread's

  __device__ __forceinline__ ThreadVectors(const Lookup<Index>& lookup, int64_t numel) {
    if constexpr (kMode == Mode::kColumn) {
      base = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
      step = lookup.column_step;
      end = base < step ? numel / kSize : 0;
    } else {
      base = static_cast<int64_t>(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x;
      step = kThreads;
      end = (numel + kSize - 1) / kSize;
    }
  }

  __device__ __forceinline__ int64_t vector(int u) const { return base + u * step; }
  __device__ __forceinline__ bool valid(int u) const { return vector(u) < end; }
  __device__ __forceinline__ int64_t first(int u) const { return vector(u) * kSize; }

  // Every vector of every thread of this block is there and full: the same answer for all threads.
  __device__ __forceinline__ bool whole_block(int64_t numel) const {
    const int64_t past = kMode == Mode::kColumn
                             ? (static_cast<int64_t>(blockIdx.x) + 1) * kThreads + (kUnroll - 1) * step
                             : (static_cast<int64_t>(blockIdx.x) + 1) * (kThreads * kUnroll);
    return past * kSize <= numel &&
           (kMode != Mode::kColumn || (static_cast<int64_t>(blockIdx.x) + 1) * kThreads <= step);
  }
};

// Parameters of a thread's vectors, looked up before the first store: a load behind a store would wait for it.
template <Mode kMode, int kSize, typename Index>
struct ThreadParams {
  static constexpr int kSets = kMode == Mode::kTensor ? 1 : kMode == Mode::kRow ? kUnroll : kSize;
  QParams set[kSets];

  __device__ __forceinline__ ThreadParams(const Lookup<Index>& lookup,
                                          const ThreadVectors<kMode, kSize, Index>& vectors) {
    if constexpr (kMode == Mode::kTensor) {
      set[0] = load_qparams(lookup.tensors, 0, lookup.range);
    } else if constexpr (kMode == Mode::kRow) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        // Past the end the first row's serve: every lane must reach the exchange of mask bits.
        const Index row =
            lookup.grouping.inner.divide(vectors.valid(u) ? static_cast<Index>(vectors.vector(u)) : Index{0});
        set[u] = load_qparams(lookup.tensors, lookup.grouping.scale_index(row), lookup.range);
      }
    } else if constexpr (kMode == Mode::kColumn) {
      const Index first =
          lookup.grouping.scale_index(vectors.valid(0) ? static_cast<Index>(vectors.first(0)) : Index{0});
#pragma unroll
      for (int j = 0; j < kSize; ++j) set[j] = load_qparams(lookup.tensors, first + j, lookup.range);
    }
  }

  __device__ void enter(const Lookup<Index>& lookup, const ThreadVectors<kMode, kSize, Index>& vectors, int u) {
    if constexpr (kMode == Mode::kAny) {
      const Index first = vectors.valid(u) ? static_cast<Index>(vectors.first(u)) : Index{0};
      Index row = lookup.grouping.inner.divide(first);
      Index column = first - row * lookup.inner_elements;
      const Index rows = lookup.rows;
      QParams p = load_qparams(lookup.tensors, lookup.grouping.scale_index(row), lookup.range);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        if (column == lookup.inner_elements) {
          column = 0;
          ++row;
          if (row < rows) p = load_qparams(lookup.tensors, lookup.grouping.scale_index(row), lookup.range);
        }
        set[j] = p;
        ++column;
      }
    }
  }

  __device__ __forceinline__ const QParams& get(int u, int j) const {
    if constexpr (kMode == Mode::kTensor)
      return set[0];
    else if constexpr (kMode == Mode::kRow)
      return set[u];
    else
      return set[j];
  }
};

// The last vector of a tensor may be short, and a pointer may be unaligned: then elements move one by one.
template <bool kAligned, typename T, int kSize>
__device__ __forceinline__ Pack<T, kSize> load_pack(const T* __restrict__ x, int64_t first, int64_t numel) {
  Pack<T, kSize> pack;
  if (kAligned && first + kSize <= numel) {
    pack = *reinterpret_cast<const Pack<T, kSize>*>(x + first);
  } else {
#pragma unroll
    for (int j = 0; j < kSize; ++j) pack.value[j] = first + j < numel ? x[first + j] : T{};
  }
  return pack;
}

template <bool kAligned, typename T, int kSize>
__device__ __forceinline__ void store_pack(T* __restrict__ y, int64_t first, int64_t numel,
                                           const Pack<T, kSize>& pack) {
  if (kAligned && first + kSize <= numel) {
    *reinterpret_cast<Pack<T, kSize>*>(y + first) = pack;
  } else {
#pragma unroll
    for (int j = 0; j < kSize; ++j)
      if (first + j < numel) y[first + j] = pack.value[j];
  }
}

template <bool kAligned, bool kWhole, typename T, Mode kMode, int kSize, typename Index>
__device__ __forceinline__ Pack<T, kSize> load_vector(const ThreadVectors<kMode, kSize, Index>& vectors, int u,
                                                      const T* __restrict__ x, int64_t numel) {
  if constexpr (kWhole) {
    return *reinterpret_cast<const Pack<T, kSize>*>(x + vectors.first(u));
  } else {
    return vectors.valid(u) ? load_pack<kAligned, T, kSize>(x, vectors.first(u), numel) : Pack<T, kSize>{};
  }
}

template <bool kAligned, bool kWhole, typename T, Mode kMode, int kSize, typename Index>
__device__ __forceinline__ void store_vector(const ThreadVectors<kMode, kSize, Index>& vectors, int u,
                                             T* __restrict__ y, int64_t numel, const Pack<T, kSize>& pack) {
  if constexpr (kWhole)
    *reinterpret_cast<Pack<T, kSize>*>(y + vectors.first(u)) = pack;
  else if (vectors.valid(u))
    store_pack<kAligned, T, kSize>(y, vectors.first(u), numel, pack);
}

// Bits of one vector into the mask. A vector of four elements fills half a byte, so pairs of lanes join theirs.
template <int kSize>
__device__ __forceinline__ void store_mask(uint8_t* __restrict__ mask, int64_t first, bool valid, int64_t numel,
                                           uint32_t bits) {
  if (!valid) bits = 0;
  if (valid && first + kSize > numel) bits &= (1u << (numel - first)) - 1u;  // the byte's bits past the end are 0
  if constexpr (kSize == 4) {
    const uint32_t other = __shfl_down_sync(0xffffffffu, bits, 1);
    if (threadIdx.x % 2 == 0 && valid) mask[first / 8] = static_cast<uint8_t>(bits | other << 4);
  } else {
    if (valid) mask[first / 8] = static_cast<uint8_t>(bits);
  }
}

// What the mask notes of an element. A template's choice: fake_quantize reuses the clamped code.
enum class Mask {
  kNone,
  kInRange,      // the end codes pass
  kInsideRange,  // they do not: the fixed_point family
};

// kWhole: every vector of the block is there, full and aligned. Such blocks run without a check, and their packs stay
// whole words.
template <typename T, Mode kMode, Mask kMask, bool kAligned, bool kWhole, typename Index>
__device__ __forceinline__ void fake_quantize_block(const T* __restrict__ x, T* __restrict__ y,
                                                    uint8_t* __restrict__ mask, int64_t numel,
                                                    const Lookup<Index>& lookup) {
  constexpr int kSize = kVectorBytes / sizeof(T);
  const ThreadVectors<kMode, kSize, Index> vectors(lookup, numel);
  Pack<T, kSize> in[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) in[u] = load_vector<kAligned, kWhole>(vectors, u, x, numel);
  ThreadParams<kMode, kSize, Index> params(lookup, vectors);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    params.enter(lookup, vectors, u);
    float values[kSize];
    unpack(in[u], values);
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float v = unclamped_code(values[j], params.get(u, j));
      if constexpr (kMask == Mask::kInRange) bits |= (code_in_range(v, lookup.range) ? 1u : 0u) << j;
      if constexpr (kMask == Mask::kInsideRange) bits |= (code_inside_range(v, lookup.range) ? 1u : 0u) << j;
      values[j] = dequantized(clamp_code(v, lookup.range), params.get(u, j));
    }
    store_vector<kAligned, kWhole>(vectors, u, y, numel, pack<T, kSize>(values));
    if constexpr (kMask != Mask::kNone)
      store_mask<kSize>(mask, vectors.first(u), kWhole || vectors.valid(u), numel, bits);
  }
}

template <typename T, Mode kMode, Mask kMask, bool kAligned, typename Index>
__global__ void __launch_bounds__(kThreads)
    fake_quantize_kernel(const T* __restrict__ x,     // [numel]
                         T* __restrict__ y,           // [numel]
                         uint8_t* __restrict__ mask,  // [ceil(numel / 8)], but for Mask::kNone
                         int64_t numel, const Lookup<Index> lookup) {
  constexpr int kSize = kVectorBytes / sizeof(T);
  if (kAligned && ThreadVectors<kMode, kSize, Index>(lookup, numel).whole_block(numel))
    fake_quantize_block<T, kMode, kMask, kAligned, true>(x, y, mask, numel, lookup);
  else
    fake_quantize_block<T, kMode, kMask, kAligned, false>(x, y, mask, numel, lookup);
}

// Keeps or clears the elements of a 32-bit word by its lowest bits: one element of four bytes, or two of two.
template <typename Bits>
__device__ __forceinline__ uint32_t masked_word(uint32_t word, uint32_t bits) {
  const uint32_t low = 0u - (bits & 1u);
  if constexpr (sizeof(Bits) == 4) return word & low;
  return word & __byte_perm(low, 0u - (bits >> 1 & 1u), 0x5410);  // two bytes of each
}

template <typename Bits, bool kAligned, bool kWhole>
__device__ __forceinline__ void fake_quantize_backward_block(const Bits* __restrict__ grad_output,
                                                             const uint8_t* __restrict__ mask,
                                                             Bits* __restrict__ grad_input, int64_t numel) {
  constexpr int kSize = kVectorBytes / sizeof(Bits), kWords = kVectorBytes / 4, kPerWord = kSize / kWords;
  const int64_t base = static_cast<int64_t>(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x;
  Pack<Bits, kSize> in[kUnroll];
  uint32_t bits[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t first = (base + u * kThreads) * kSize;
    if constexpr (kWhole)
      in[u] = *reinterpret_cast<const Pack<Bits, kSize>*>(grad_output + first);
    else
      in[u] = load_pack<kAligned, Bits, kSize>(grad_output, first, numel);
    bits[u] = kWhole || first < numel ? static_cast<uint32_t>(mask[first / 8]) >> (first % 8) : 0u;
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t first = (base + u * kThreads) * kSize;
    uint32_t* words = reinterpret_cast<uint32_t*>(in[u].value);
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = masked_word<Bits>(words[w], bits[u] >> (w * kPerWord));
    if constexpr (kWhole)
      *reinterpret_cast<Pack<Bits, kSize>*>(grad_input + first) = in[u];
    else
      store_pack<kAligned, Bits, kSize>(grad_input, first, numel, in[u]);
  }
}

template <typename Bits, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    fake_quantize_backward_kernel(const Bits* __restrict__ grad_output,  // [numel]
                                  const uint8_t* __restrict__ mask,      // [ceil(numel / 8)]
                                  Bits* __restrict__ grad_input,         // [numel]
                                  int64_t numel) {
  constexpr int64_t kBlockElements = int64_t{kThreads} * kUnroll * (kVectorBytes / sizeof(Bits));
  if (kAligned && (blockIdx.x + int64_t{1}) * kBlockElements <= numel)
    fake_quantize_backward_block<Bits, kAligned, true>(grad_output, mask, grad_input, numel);
  else
    fake_quantize_backward_block<Bits, kAligned, false>(grad_output, mask, grad_input, numel);
}

// A whole number below 2^22 in magnitude as an int: the addition leaves it in the low bits. The conversion instruction
// has an eighth of the addition's rate.
__device__ __forceinline__ int code_to_int(float code) { return __float_as_int(code + 12582912.0f) - 0x4b400000; }

// Codes beside a vector of kSize floating-point elements; the type of the codes is a run-time value, the same for all
// threads.
template <bool kAligned, int kSize>
__device__ __forceinline__ void store_codes(void* codes, DType type, int64_t first, int64_t numel,
                                            const int (&q)[kSize]) {
  const auto store = [&](auto* typed) {
    using Code = std::remove_pointer_t<decltype(typed)>;
    Pack<Code, kSize> pack;
#pragma unroll
    for (int j = 0; j < kSize; ++j) pack.value[j] = static_cast<Code>(q[j]);
    store_pack<kAligned, Code, kSize>(typed, first, numel, pack);
  };
  if (type == DType::kInt16)
    store(static_cast<int16_t*>(codes));
  else if (type == DType::kInt32)
    store(static_cast<int32_t*>(codes));
  else
    store(static_cast<int8_t*>(codes));  // uint8 has the same low byte
}

template <bool kAligned, int kSize>
__device__ __forceinline__ void load_codes(const void* codes, DType type, int64_t first, int64_t numel,
                                           float (&q)[kSize]) {
  const auto load = [&](const auto* typed) {
    using Code = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    const Pack<Code, kSize> pack = load_pack<kAligned, Code, kSize>(typed, first, numel);
#pragma unroll
    for (int j = 0; j < kSize; ++j) q[j] = static_cast<float>(pack.value[j]);
  };
  if (type == DType::kInt16)
    load(static_cast<const int16_t*>(codes));
  else if (type == DType::kInt32)
    load(static_cast<const int32_t*>(codes));
  else if (type == DType::kUInt8)
    load(static_cast<const uint8_t*>(codes));
  else
    load(static_cast<const int8_t*>(codes));
}

template <typename T, Mode kMode, bool kAligned, typename Index>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const T* __restrict__ x,   // [numel]
                    void* __restrict__ codes,  // [numel] of code_dtype
                    DType code_dtype, int64_t numel, const Lookup<Index> lookup, bool stochastic, PhiloxState philox) {
  constexpr int kSize = kVectorBytes / sizeof(T);
  const PhiloxKey key(philox);
  const ThreadVectors<kMode, kSize, Index> vectors(lookup, numel);
  Pack<T, kSize> in[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) in[u] = load_vector<kAligned, false>(vectors, u, x, numel);
  ThreadParams<kMode, kSize, Index> params(lookup, vectors);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (!vectors.valid(u)) return;
    params.enter(lookup, vectors, u);
    const int64_t first = vectors.first(u);
    float values[kSize];
    unpack(in[u], values);
    int q[kSize];
    if (stochastic) {
#pragma unroll
      for (int j = 0; j < kSize; j += 4) {
        const Philox4 random = key.block(static_cast<uint64_t>(first + j) / 4);
#pragma unroll
        for (int k = j; k < j + 4; ++k) {
          const QParams& p = params.get(u, k);
          const float v = round_stochastic(values[k] * p.inv_scale, philox_uniform(random.word[k - j]));
          q[k] = code_to_int(storable_code(v + p.zero_point, p, lookup.range));
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const QParams& p = params.get(u, j);
        q[j] = code_to_int(storable_code(unclamped_code(values[j], p), p, lookup.range));
      }
    }
    store_codes<kAligned, kSize>(codes, code_dtype, first, numel, q);
  }
}

template <typename T, Mode kMode, bool kAligned, typename Index>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const void* __restrict__ codes,  // [numel] of code_dtype
                      T* __restrict__ y,               // [numel]
                      DType code_dtype, int64_t numel, const Lookup<Index> lookup) {
  constexpr int kSize = kVectorBytes / sizeof(T);
  const ThreadVectors<kMode, kSize, Index> vectors(lookup, numel);
  float q[kUnroll][kSize] = {};
#pragma unroll
  for (int u = 0; u < kUnroll; ++u)
    if (vectors.valid(u)) load_codes<kAligned, kSize>(codes, code_dtype, vectors.first(u), numel, q[u]);
  ThreadParams<kMode, kSize, Index> params(lookup, vectors);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (!vectors.valid(u)) return;
    params.enter(lookup, vectors, u);
#pragma unroll
    for (int j = 0; j < kSize; ++j) q[u][j] = dequantized(q[u][j], params.get(u, j));
    store_pack<kAligned, T, kSize>(y, vectors.first(u), numel, pack<T, kSize>(q[u]));
  }
}

__global__ void qparams_from_range_kernel(const float* __restrict__ min,     // [groups]
                                          const float* __restrict__ max,     // [groups]
                                          float* __restrict__ scale,         // [groups]
                                          int32_t* __restrict__ zero_point,  // [groups]
                                          int64_t groups, QuantRange range, bool symmetric) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= groups) return;
  const QParams p = quantrain::qparams_from_range(min[i], max[i], range, symmetric);
  scale[i] = p.scale;
  zero_point[i] = static_cast<int32_t>(p.zero_point);
}

__global__ void observe_kernel(const ObserveArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < a.groups) observe_group(a, i);
}

// ---- launchers ------------------------------------------------------------------------------------------------------

// Blocks that cover `numel` elements, kUnroll vectors per thread.
template <typename T>
unsigned grid_for(int64_t numel) {
  return static_cast<unsigned>(ceil_div(numel, int64_t{kThreads} * kUnroll * (kVectorBytes / sizeof(T))));
}

// The same for a mode, whose threads may be spread otherwise.
template <typename T, Mode kMode, typename Index>
unsigned grid_for(int64_t numel, const Lookup<Index>& lookup) {
  if (kMode == Mode::kColumn) return static_cast<unsigned>(ceil_div(lookup.column_step, kThreads));
  return grid_for<T>(numel);
}

// Calls launch(mode, aligned, lookup) with the cheapest way to find the parameters, all three as compile-time choices.
template <typename T, typename Launch>
void dispatch_lookup(const Grouping& g, const QParamTensors& tensors, QuantRange range, bool aligned,
                     const Launch& launch) {
  constexpr int64_t kSize = kVectorBytes / sizeof(T);
  using True = std::true_type;
  using False = std::false_type;
  const auto lookup = [&](auto index, int64_t inner_units) {
    using Index = decltype(index);
    // Rows of one column are shared out so that each thread has kUnroll of them. The step is even: where a vector fills
    // half a byte of the mask, an even thread and the next one then share bytes in every round.
    const int64_t row = g.levels > 0 ? g.modulus[0] / kSize * (g.modulus[0] / kSize % 2 + 1) : 0;
    const int64_t column_step = row > 0 ? row * ceil_div(ceil_div(g.numel / kSize, row), kUnroll) : 0;
    return Lookup<Index>{DeviceGrouping<Index>(g, inner_units),
                         tensors,
                         range,
                         static_cast<Index>(g.inner),
                         static_cast<Index>(g.rows),
                         column_step};
  };
  const bool small = g.numel < (int64_t{1} << 31);                  // elements as 31-bit indices
  const bool small_vectors = g.numel / kSize < (int64_t{1} << 31);  // vectors likewise
  if (aligned && small_vectors && g.levels == 0)
    return launch(std::integral_constant<Mode, Mode::kTensor>{}, True{}, lookup(uint32_t{}, 1));
  if (aligned && small_vectors && g.inner % kSize == 0)
    return launch(std::integral_constant<Mode, Mode::kRow>{}, True{}, lookup(uint32_t{}, g.inner / kSize));
  if (aligned && small && g.levels == 1 && g.inner == 1 && g.modulus[0] % kSize == 0)
    return launch(std::integral_constant<Mode, Mode::kColumn>{}, True{}, lookup(uint32_t{}, 1));
  if (aligned && small) return launch(std::integral_constant<Mode, Mode::kAny>{}, True{}, lookup(uint32_t{}, g.inner));
  launch(std::integral_constant<Mode, Mode::kAny>{}, False{}, lookup(uint64_t{}, g.inner));
}

}  // namespace

int fake_quantize(const FakeQuantizeArgs& a, void* stream) {
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool aligned = is_aligned(a.x) && is_aligned(a.y);
    dispatch_lookup<T>(a.grouping, a.qparams, a.range, aligned, [&](auto mode, auto is_aligned_type, auto lookup) {
      using Index = decltype(lookup.inner_elements);
      const auto launch = [&](auto with_mask) {
        fake_quantize_kernel<T, mode.value, with_mask.value, is_aligned_type.value, Index>
            <<<grid_for<T, mode.value>(a.grouping.numel, lookup), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
                static_cast<const T*>(a.x), static_cast<T*>(a.y), a.mask, a.grouping.numel, lookup);
      };
      if (!a.mask)
        launch(std::integral_constant<Mask, Mask::kNone>{});
      else if (a.ends_pass)
        launch(std::integral_constant<Mask, Mask::kInRange>{});
      else
        launch(std::integral_constant<Mask, Mask::kInsideRange>{});
    });
  });
  return cudaGetLastError();
}

int fake_quantize_backward(const FakeQuantizeBackwardArgs& a, void* stream) {
  const bool aligned = is_aligned(a.grad_output) && is_aligned(a.grad_input);
  const auto launch = [&](auto* type, auto is_aligned_type) {
    using Bits = std::remove_pointer_t<decltype(type)>;
    fake_quantize_backward_kernel<Bits, is_aligned_type.value>
        <<<grid_for<Bits>(a.numel), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            static_cast<const Bits*>(a.grad_output), a.mask, static_cast<Bits*>(a.grad_input), a.numel);
  };
  const auto pick = [&](auto* type) { aligned ? launch(type, std::true_type{}) : launch(type, std::false_type{}); };
  if (a.dtype == DType::kFloat32)
    pick(static_cast<uint32_t*>(nullptr));
  else
    pick(static_cast<uint16_t*>(nullptr));
  return cudaGetLastError();
}

int quantize(const QuantizeArgs& a, void* stream) {
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool aligned = is_aligned(a.x) && is_aligned(a.codes);
    dispatch_lookup<T>(a.grouping, a.qparams, a.range, aligned, [&](auto mode, auto is_aligned_type, auto lookup) {
      quantize_kernel<T, mode.value, is_aligned_type.value, decltype(lookup.inner_elements)>
          <<<grid_for<T, mode.value>(a.grouping.numel, lookup), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
              static_cast<const T*>(a.x), a.codes, a.code_dtype, a.grouping.numel, lookup, a.stochastic, a.philox);
    });
  });
  return cudaGetLastError();
}

int dequantize(const DequantizeArgs& a, void* stream) {
  dispatch_float(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool aligned = is_aligned(a.codes) && is_aligned(a.y);
    dispatch_lookup<T>(a.grouping, a.qparams, QuantRange{}, aligned, [&](auto mode, auto is_aligned_type, auto lookup) {
      dequantize_kernel<T, mode.value, is_aligned_type.value, decltype(lookup.inner_elements)>
          <<<grid_for<T, mode.value>(a.grouping.numel, lookup), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
              a.codes, static_cast<T*>(a.y), a.code_dtype, a.grouping.numel, lookup);
    });
  });
  return cudaGetLastError();
}

int qparams_from_range(const QParamsFromRangeArgs& a, void* stream) {
  qparams_from_range_kernel<<<static_cast<unsigned>(ceil_div(a.groups, kThreads)), kThreads, 0,
                              static_cast<cudaStream_t>(stream)>>>(a.min, a.max, a.scale, a.zero_point, a.groups,
                                                                   a.range, a.symmetric);
  return cudaGetLastError();
}

int observe(const ObserveArgs& a, void* stream) {
  observe_kernel<<<static_cast<unsigned>(ceil_div(a.groups, kThreads)), kThreads, 0,
                   static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

}  // namespace quantrain::cuda
