#include "csrc/cuda/attention.h"

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "csrc/cuda/common.cuh"
#include "csrc/cuda/device.h"
#include "csrc/cuda/overlap.cuh"
#include "csrc/cuda/pair.cuh"
#include "csrc/cuda/ptx.cuh"

// A thread block takes 128 queries of a head, or 64, 16 a warp, and goes through the keys 64 at a time: scores on
// tensor cores, a running maximum and sum of each row (Milakov and Gimelshein, arXiv:1805.02867), and the scores as the
// left operand of the second product without leaving the registers (Dao, "FlashAttention-2", arXiv:2307.08691). Keys
// and values come by asynchronous copies, two blocks ahead: all that a short sequence has is under way at once.

namespace quantrain::cuda {
namespace {

constexpr int kKeys = 64;
constexpr float kLog2E = 1.44269504f;

// Rows of kSize 16-bit elements and 16 bytes more: eight rows' chunks of one column lie in different banks.
template <int kSize>
struct Tile {
  static constexpr int kPitch = kSize * 2 + 16;
  static constexpr int kChunks = kSize / 8;
  static constexpr int kBytes = kKeys * kPitch;
};

// Queries, two blocks of keys, two of values.
template <int kSize, int kWarps>
constexpr int kSharedBytes = kWarps * 16 * Tile<kSize>::kPitch + 4 * Tile<kSize>::kBytes;

// kRows rows from `first` on; zeros past the end.
template <typename T, int kSize, int kRows, int kThreads>
__device__ __forceinline__ void copy_rows(ptx::SharedAddress to, const T* __restrict__ from, int64_t stride, int first,
                                          int rows) {
  using Of = Tile<kSize>;
#pragma unroll
  for (int index = threadIdx.x; index < kRows * Of::kChunks; index += kThreads) {
    const int row = index / Of::kChunks, chunk = index % Of::kChunks;
    const bool inside = first + row < rows;
    ptx::cp_async_16(to + row * Of::kPitch + chunk * 16, inside ? from + (first + row) * stride + chunk * 8 : from,
                     inside ? 16 : 0);
  }
}

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The mask of keys `key` and key + 1 in a row, as what is added to their scores. kPaired: they lie side by side, whole
// pairs on their own alignment.
template <typename M, bool kPaired>
struct MaskPair {
  float low, high;

  // In units of 2. The least finite number, by which others mask, stays finite: a row of nothing else is an average.
  static __device__ __forceinline__ float added(float mask) {
    return mask == -INFINITY ? mask : fmaxf(mask * kLog2E, -0.5f * FLT_MAX);
  }

  __device__ __forceinline__ MaskPair(const M* row, int key, int keys, int64_t stride) {
    M value[2];
    if constexpr (kPaired) {
      const auto pair = *reinterpret_cast<const Pack<M, 2>*>(row + min(key, keys - 2));
      value[0] = pair.value[0];
      value[1] = pair.value[1];
    } else {
      value[0] = row[min(key, keys - 1) * stride];
      value[1] = row[min(key + 1, keys - 1) * stride];
    }
    if constexpr (std::is_same_v<M, uint8_t>) {
      low = value[0] ? 0.0f : -INFINITY;
      high = value[1] ? 0.0f : -INFINITY;
    } else {
      low = added(to_float(value[0]));
      high = added(to_float(value[1]));
    }
  }
};

template <typename T, int kSize, int kWarps, AttentionMask kMask, bool kPaired>
__global__ void __launch_bounds__(kWarps * 32, kSize <= 64 ? 16 / kWarps : 1) attention_kernel(const AttentionArgs a) {
  constexpr int kThreads = kWarps * 32, kQueries = kWarps * 16;
  using Of = Tile<kSize>;
  ptx::begin_overlapping();
  using M = std::conditional_t<kMask == AttentionMask::kAdded, T, uint8_t>;
  uint8_t* const shared_bytes = ptx::dynamic_shared();
  const ptx::SharedAddress q_tile = ptx::shared_address(shared_bytes), k_tiles = q_tile + kQueries * Of::kPitch,
                           v_tiles = k_tiles + 2 * Of::kBytes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int head = static_cast<int>(blockIdx.y), key_head = head / static_cast<int>(a.group);
  const int64_t batch = blockIdx.z;
  const int first_query = static_cast<int>(blockIdx.x) * kQueries;
  const int queries = static_cast<int>(a.queries), keys = static_cast<int>(a.keys);
  const T* const q = static_cast<const T*>(a.q) + batch * a.q_strides.batch + head * a.q_strides.head;
  const T* const k = static_cast<const T*>(a.k) + batch * a.k_strides.batch + key_head * a.k_strides.head;
  const T* const v = static_cast<const T*>(a.v) + batch * a.v_strides.batch + key_head * a.v_strides.head;
  const int attended = a.causal ? min(keys, first_query + kQueries) : keys;
  const int blocks = (attended + kKeys - 1) / kKeys;

  // Blocks of keys and of values, each a group of copies of its own, empty past the end.
  const auto start_keys = [&](int block) {
    if (block < blocks)
      copy_rows<T, kSize, kKeys, kThreads>(k_tiles + block % 2 * Of::kBytes, k, a.k_strides.token, block * kKeys, keys);
    ptx::cp_async_commit_group();
  };
  const auto start_values = [&](int block) {
    if (block < blocks)
      copy_rows<T, kSize, kKeys, kThreads>(v_tiles + block % 2 * Of::kBytes, v, a.v_strides.token, block * kKeys, keys);
    ptx::cp_async_commit_group();
  };
  copy_rows<T, kSize, kQueries, kThreads>(q_tile, q, a.q_strides.token, first_query, queries);
  start_keys(0);
  start_values(0);
  start_keys(1);
  start_values(1);

  // Rows g and g + 8 of the warp's 16.
  const int row_0 = first_query + warp * 16 + g;
  const M* mask[2] = {};
  if constexpr (kMask != AttentionMask::kNone) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      mask[r] = static_cast<const M*>(a.mask) + batch * a.mask_strides[0] + head * a.mask_strides[1] +
                min(row_0 + r * 8, queries - 1) * a.mask_strides[2];
  }
  uint32_t q_fragment[kSize / 16][4];
  float y[kSize / 8][4] = {};
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {};
  const float scale = a.scale * kLog2E;

  for (int block = 0; block < blocks; ++block) {
    const int first_key = block * kKeys;
    const ptx::SharedAddress k_tile = k_tiles + block % 2 * Of::kBytes, v_tile = v_tiles + block % 2 * Of::kBytes;
    // Behind its keys are three groups at first, then two: the values of the block before have been used.
    if (block == 0) {
      ptx::cp_async_wait_group<3>();
      __syncthreads();
    } else {
      ptx::cp_async_wait_group<2>();
      __syncthreads();
      start_values(block + 1);
    }
    if (block == 0) {
#pragma unroll
      for (int d = 0; d < kSize / 16; ++d)
        ptx::ldmatrix_x4(q_fragment[d], q_tile + (warp * 16 + lane % 16) * Of::kPitch + d * 32 + lane / 16 * 16);
    }
    float score[kKeys / 8][4] = {};
#pragma unroll
    for (int d = 0; d < kSize / 16; ++d)
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, k_tile + (n * 16 + lane % 8 + lane / 16 * 8) * Of::kPitch + d * 32 + lane / 8 % 2 * 16);
        mma<T>(score[n * 2], q_fragment[d], b[0], b[1]);
        mma<T>(score[n * 2 + 1], q_fragment[d], b[2], b[3]);
      }

    float row_most[2] = {most[0], most[1]};
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float &low = score[n][r * 2], &high = score[n][r * 2 + 1];
        low *= scale;
        high *= scale;
        if constexpr (kMask != AttentionMask::kNone) {
          const MaskPair<M, kPaired> added(mask[r], first_key + n * 8 + t * 2, keys, a.mask_strides[3]);
          low += added.low;
          high += added.high;
        }
      }
    if (first_key + kKeys > keys || (a.causal && first_key + kKeys > first_query)) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int key = first_key + n * 8 + t * 2 + c % 2;
          if (key >= keys || (a.causal && key > row_0 + c / 2 * 8)) score[n][c] = -INFINITY;
        }
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) row_most[c / 2] = fmaxf(row_most[c / 2], score[n][c]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_most[r] = fmaxf(row_most[r], __shfl_xor_sync(0xffffffffu, row_most[r], 1));
      row_most[r] = fmaxf(row_most[r], __shfl_xor_sync(0xffffffffu, row_most[r], 2));
      // A row that has attended to nothing yet: its scores stay -Inf below.
      const float base = row_most[r] == -INFINITY ? 0.0f : row_most[r];
      const float shrink = exp2_of(most[r] - base);
      most[r] = row_most[r];
      total[r] *= shrink;
#pragma unroll
      for (int n = 0; n < kSize / 8; ++n) {
        y[n][r * 2] *= shrink;
        y[n][r * 2 + 1] *= shrink;
      }
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& p = score[n][r * 2 + c];
          p = exp2_of(p - base);
          total[r] += p;
        }
    }

    ptx::cp_async_wait_group<2>();  // the values of this block
    __syncthreads();
    start_keys(block + 2);  // the keys of this one have been used
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      const uint32_t p[4] = {packed_pair<T>(score[n * 2][0], score[n * 2][1]),
                             packed_pair<T>(score[n * 2][2], score[n * 2][3]),
                             packed_pair<T>(score[n * 2 + 1][0], score[n * 2 + 1][1]),
                             packed_pair<T>(score[n * 2 + 1][2], score[n * 2 + 1][3])};
#pragma unroll
      for (int d = 0; d < kSize / 16; ++d) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, v_tile + (n * 16 + lane % 16) * Of::kPitch + d * 32 + lane / 16 * 16);
        mma<T>(y[d * 2], p, b[0], b[1]);
        mma<T>(y[d * 2 + 1], p, b[2], b[3]);
      }
    }
  }

  // Through the warp's own queries' place in shared memory, for whole chunks to be written.
  uint8_t* const rows = shared_bytes + warp * 16 * Of::kPitch;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
    const float inverse = total[r] == 0.0f ? 0.0f : 1.0f / total[r];  // 0: nothing to attend to
#pragma unroll
    for (int n = 0; n < kSize / 8; ++n)
      *reinterpret_cast<uint32_t*>(rows + (r * 8 + g) * Of::kPitch + n * 16 + t * 4) =
          packed_pair<T>(y[n][r * 2] * inverse, y[n][r * 2 + 1] * inverse);
  }
  __syncwarp();
  T* const result = static_cast<T*>(a.y) + (batch * a.queries * a.heads + head) * kSize;
#pragma unroll
  for (int index = lane; index < 16 * Of::kChunks; index += 32) {
    const int row = index / Of::kChunks, chunk = index % Of::kChunks, query = first_query + warp * 16 + row;
    if (query >= queries) continue;
    *reinterpret_cast<uint4*>(result + query * a.heads * kSize + chunk * 8) =
        *reinterpret_cast<const uint4*>(rows + row * Of::kPitch + chunk * 16);
  }
}

// Of heads of other sizes there is one kernel a mask.
template <int kSize>
constexpr bool kUsual = kSize == 64 || kSize == 128;

template <typename T, int kSize, int kWarps, AttentionMask kMask, bool kPaired>
int launch(const AttentionArgs& a, cudaStream_t stream) {
  const auto kernel = attention_kernel<T, kSize, kWarps, kMask, kPaired>;
  constexpr int kShared = kSharedBytes<kSize, kWarps>;
  if constexpr (kShared > 48 * 1024) {
    if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared))
      return error;
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(a.queries, kWarps * 16)), static_cast<unsigned>(a.heads),
                  static_cast<unsigned>(a.batches));
  return launch_overlapping(kernel, grid, dim3(kWarps * 32), kShared, stream, a);
}

template <typename T, int kSize, int kWarps>
int launch(const AttentionArgs& a, cudaStream_t stream) {
  const auto* mask = static_cast<const uint8_t*>(a.mask);
  const int pair = a.mask_kind == AttentionMask::kBool ? 2 : 4;  // bytes
  const bool paired = kUsual<kSize> && a.keys % 2 == 0 && a.mask_strides[3] == 1 &&
                      reinterpret_cast<uintptr_t>(mask) % pair == 0 && a.mask_strides[0] % 2 == 0 &&
                      a.mask_strides[1] % 2 == 0 && a.mask_strides[2] % 2 == 0;
  switch (a.mask_kind) {
    case AttentionMask::kNone:
      return launch<T, kSize, kWarps, AttentionMask::kNone, false>(a, stream);
    case AttentionMask::kBool:
      return paired ? launch<T, kSize, kWarps, AttentionMask::kBool, kUsual<kSize>>(a, stream)
                    : launch<T, kSize, kWarps, AttentionMask::kBool, false>(a, stream);
    case AttentionMask::kAdded:
      return paired ? launch<T, kSize, kWarps, AttentionMask::kAdded, kUsual<kSize>>(a, stream)
                    : launch<T, kSize, kWarps, AttentionMask::kAdded, false>(a, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename T, int kSize>
int launch(const AttentionArgs& a, cudaStream_t stream) {
  // Few thread blocks with many queries each would leave multiprocessors idle.
  const bool wide = ceil_div(a.queries, 128) * a.heads * a.batches >= multiprocessors();
  return wide ? launch<T, kSize, kUsual<kSize> ? 8 : 4>(a, stream) : launch<T, kSize, 4>(a, stream);
}

template <typename T>
int launch(const AttentionArgs& a, cudaStream_t stream) {
  switch (a.size) {
    case 32:
      return launch<T, 32>(a, stream);
    case 64:
      return launch<T, 64>(a, stream);
    case 80:
      return launch<T, 80>(a, stream);
    case 96:
      return launch<T, 96>(a, stream);
    case 128:
      return launch<T, 128>(a, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

bool attention_suits(const AttentionArgs& a) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const bool size = a.size == 32 || a.size == 64 || a.size == 80 || a.size == 96 || a.size == 128;
  const auto lies_well = [](const void* pointer, const AttentionStrides& s) {
    return is_aligned(pointer) && s.batch % 8 == 0 && s.token % 8 == 0 && s.head % 8 == 0;
  };
  return (a.dtype == DType::kFloat16 || a.dtype == DType::kBFloat16) && size && a.queries > 0 && a.keys > 0 &&
         a.queries < kMost && a.keys < kMost && a.heads < 65536 && a.batches < 65536 && lies_well(a.q, a.q_strides) &&
         lies_well(a.k, a.k_strides) && lies_well(a.v, a.v_strides) &&
         device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8;
}

int attention(const AttentionArgs& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  return a.dtype == DType::kBFloat16 ? launch<BFloat16>(a, stream) : launch<Half>(a, stream);
}

}  // namespace quantrain::cuda
