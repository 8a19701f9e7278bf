#include <algorithm>
#include <type_traits>

#include "csrc/cuda/device.h"
#include "csrc/cuda/four_bit.h"
#include "csrc/cuda/four_bit/decode.cuh"
#include "csrc/cuda/ptx.cuh"

// y^T = W x^T on tensor cores for few rows of x. W is the left operand: lane t of a group of four owns 16 consecutive
// elements, 8 bytes, of a chunk of 64, so that a byte is one register of the fragment and nothing is shuffled; x is
// read in the same order. A byte becomes two 16-bit values by a table of 256 pairs in shared memory, of which each lane
// has a copy. The values are those of the format; the scale of a block multiplies its sum, in float32.
//
// A thread block keeps a slice of x's columns in shared memory and goes through tiles of rows of W. Its warps share a
// tile's columns (and its rows), each with a ring of its own that codes are copied into ahead, across tiles; then they
// add their sums. Where x has several slices, a second kernel adds the slices' partial results, in order.

namespace quantrain::cuda {
namespace {

constexpr int kChunk = 64;     // elements of a row of W that make one sum before its scale
constexpr int kTileRows = 32;  // rows of W of a warp: two fragments
constexpr int kFragments = 2;
constexpr int kPairs = 256;
constexpr int kTableBytes = kPairs * 32 * 4;
constexpr int kPad = 8;          // elements after a row of x in shared memory: its reads meet in no bank
constexpr int kStageChunks = 2;  // of a copy: 64 bytes of a row
constexpr int kCodeBytes = kTileRows * kStageChunks * kChunk / 2;
constexpr int kMaxSlices = 32;
constexpr int kGap = kTableBytes - 1024;  // before the table: 1024 bytes of shared memory come before a kernel's own

template <typename T>
__device__ __forceinline__ uint32_t packed_pair(float first, float second);
template <>
__device__ __forceinline__ uint32_t packed_pair<BFloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ __forceinline__ uint32_t packed_pair<Half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <typename T>
__device__ __forceinline__ uint32_t subtracted(uint32_t pair, uint32_t zero_point) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __nv_bfloat162 d =
        __hsub2(reinterpret_cast<const __nv_bfloat162&>(pair), reinterpret_cast<const __nv_bfloat162&>(zero_point));
    return reinterpret_cast<const uint32_t&>(d);
  } else {
    const __half2 d = __hsub2(reinterpret_cast<const __half2&>(pair), reinterpret_cast<const __half2&>(zero_point));
    return reinterpret_cast<const uint32_t&>(d);
  }
}

// c += a b: a [16, 16], b [16, 8], row by column, float32 sums.
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>)
    ptx::mma_m16n8k16_bf16(c, a, b0, b1);
  else
    ptx::mma_m16n8k16_f16(c, a, b0, b1);
}

// How a thread block's warps share a tile, by the eights of rows of x.
template <int kTiles>
struct Shape {
  static constexpr int kWarps = kTiles <= 2 ? 16 : 8;
  static constexpr int kWarpsN = kTiles;               // that share a tile's rows of W
  static constexpr int kWarpsK = kWarps / kWarpsN;     // and its columns
  static constexpr int kStages = kTiles <= 2 ? 3 : 4;  // of a warp's ring
  static constexpr int kThreads = kWarps * 32;
};

// What comes with a scale: of a stage, words of each row that are copied beside its codes.
enum class Extra { kNone, kCompressed, kZeroPoint };
constexpr int words_of(Extra extra) { return extra == Extra::kNone ? kStageChunks : 2 * kStageChunks; }
constexpr int stage_bytes(Extra extra) { return kCodeBytes + kTileRows * words_of(extra) * 4; }

struct Plan {
  int slices;     // of k
  int slice;      // elements of each but the last: whole stages
  int groups;     // thread blocks of a slice
  size_t shared;  // bytes
};

struct LinearParams {
  FourBitLinearArgs args;
  float* partial;  // [slices, m, n] or null: y is written
  int slice;
  int block_shift;  // 2^block_shift chunks share a scale
  int64_t blocks_per_row;
  bool paired;  // the scales of a stage lie together, on 8 bytes
};

struct Pair {
  float value[kStageChunks];
};

template <typename T, int kTiles, Extra kExtra>
__global__ void __launch_bounds__(Shape<kTiles>::kThreads, 1)
    linear_kernel(const LinearParams p, const FourBitValues values) {
  using S = Shape<kTiles>;
  constexpr bool kAffine = kExtra == Extra::kZeroPoint;
  constexpr int kStageBytes = stage_bytes(kExtra);
  extern __shared__ __align__(128) uint8_t shared[];
  const FourBitLinearArgs& a = p.args;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_n = warp % S::kWarpsN, warp_k = warp / S::kWarpsN;
  const int g = lane / 4, t = lane % 4;
  const int m_rows = static_cast<int>(a.m);
  const int first_k = blockIdx.x * p.slice;
  const int slice = min(p.slice, static_cast<int>(a.k) - first_k);
  const int stride = p.slice + kPad;

  // The table's shared address is a multiple of its size, so that a byte's place is or-ed to it; the rings of the first
  // warps lie before it.
  constexpr int kRing = S::kStages * kStageBytes, kBefore = kGap / kRing < S::kWarps ? kGap / kRing : S::kWarps;
  auto* table = reinterpret_cast<uint32_t*>(shared + kGap);  // [256][32]
  if (ptx::shared_address(table) % kTableBytes != 0) __trap();
  auto* map = reinterpret_cast<float*>(shared + kGap + kTableBytes);  // [256]
  uint8_t* rings = shared + kGap + kTableBytes + (kExtra == Extra::kCompressed ? 1024 : 0);
  uint8_t* ring = warp < kBefore ? shared + warp * kRing : rings + (warp - kBefore) * kRing;
  auto* sums = reinterpret_cast<float*>(rings + (S::kWarps - kBefore) * kRing);  // [warps_k][warps_n][m][32]
  auto* x_shared = reinterpret_cast<T*>(sums + S::kWarps * kTileRows * m_rows);  // [m][slice + kPad]

  // This warp's stages of a tile, one after another in its columns.
  const int chunks = slice / kChunk;
  const int stages = (chunks + kStageChunks - 1) / kStageChunks;
  const int stages_of_warp = (stages + S::kWarpsK - 1) / S::kWarpsK;
  const int first_stage = warp_k * stages_of_warp;
  const int my_stages = max(min(stages - first_stage, stages_of_warp), 0);
  constexpr int kRows = S::kWarpsN * kTileRows;
  const int tiles = static_cast<int>((a.n + kRows - 1) / kRows);
  const int my_tiles =
      (tiles - static_cast<int>(blockIdx.y) + static_cast<int>(gridDim.y) - 1) / static_cast<int>(gridDim.y);
  const int items = my_tiles * my_stages;
  const auto row_of = [&](int tile_index, int row) {  // rows past the end read the last one, and are not written
    const int64_t tile = blockIdx.y + static_cast<int64_t>(tile_index) * gridDim.y;
    return min(tile * kRows + warp_n * kTileRows + row, a.n - 1);
  };

  // What is copied next: of four rows their codes from this lane's 16 bytes on, of row `lane` its scales.
  int copied = 0, copied_tile = 0, copied_stage = 0;
  const uint8_t* from[kTileRows / 8];
  int64_t scales_of_row = 0;
  const auto start_tile = [&] {
#pragma unroll
    for (int i = 0; i < kTileRows / 8; ++i)
      from[i] = a.codes + (row_of(copied_tile, i * 8 + g) * a.k + first_k) / 2 + first_stage * 64 + t * 16;
    scales_of_row = row_of(copied_tile, lane) * p.blocks_per_row;
  };
  // Where, among a row's scales, that of a stage's chunk is.
  const auto block_of = [&](int stage, int c) {
    return (first_k / kChunk + min((first_stage + stage) * kStageChunks + c, chunks - 1)) >> p.block_shift;
  };
  // The chunks of every other two rows change places, so that the reads of a warp meet in no bank.
  const uint32_t ring_address = ptx::shared_address(ring), place = g * 64 + (t ^ (g & 2)) * 16;
  const auto copy_next = [&] {
    if (copied < items) {
      const ptx::SharedAddress to = ring_address + copied % S::kStages * kStageBytes;
      const int bytes = (first_stage + copied_stage) * kStageChunks + t / 2 < chunks ? 16 : 0;
#pragma unroll
      for (int i = 0; i < kTileRows / 8; ++i) {
        ptx::cp_async_16(to + place + i * 512, bytes ? from[i] : a.codes, bytes);
        from[i] += 64;
      }
      const ptx::SharedAddress words = to + kCodeBytes + lane * words_of(kExtra) * 4;
      const bool paired = kExtra != Extra::kCompressed && p.paired;
      if (paired) {
        const int64_t block = scales_of_row + block_of(copied_stage, 0);
        ptx::cp_async_8(words, a.scales.scale + block);
        if constexpr (kAffine) ptx::cp_async_8(words + kStageChunks * 4, a.scales.zero_point + block);
      }
#pragma unroll
      for (int c = 0; c < kStageChunks && !paired; ++c) {
        const int64_t block = scales_of_row + block_of(copied_stage, c);
        if constexpr (kExtra == Extra::kCompressed) {
          // The word that holds the code: 4 bytes are the least that is copied.
          const auto code = reinterpret_cast<uintptr_t>(a.scales.scale_codes + block);
          ptx::cp_async_4(words + c * 8, reinterpret_cast<const void*>(code & ~uintptr_t{3}));
          ptx::cp_async_4(words + c * 8 + 4, a.scales.scale_scale + block / kScaleBlock);
        } else {
          ptx::cp_async_4(words + c * 4, a.scales.scale + block);
          if constexpr (kAffine) ptx::cp_async_4(words + (kStageChunks + c) * 4, a.scales.zero_point + block);
        }
      }
      ++copied;
      if (++copied_stage == my_stages) {
        copied_stage = 0;
        ++copied_tile;
        start_tile();
      }
    }
    ptx::cp_async_commit_group();
  };
  const float offset = kExtra == Extra::kCompressed ? __ldg(a.scales.scale_offset) : 0.0f;

  const auto* x = static_cast<const T*>(a.x);
  const int vectors = slice / 8;
  for (int i = threadIdx.x; i < m_rows * vectors; i += S::kThreads) {
    const int m = i / vectors, at = (i - m * vectors) * 8;
    ptx::cp_async_16(ptx::shared_address(x_shared + m * stride + at), x + m * a.k + first_k + at);
  }
  // Copies are under way while the table is filled.
  start_tile();
#pragma unroll
  for (int s = 0; s < S::kStages - 1; ++s) copy_next();
  if constexpr (kExtra == Extra::kCompressed)
    for (int i = threadIdx.x; i < 256; i += S::kThreads) map[i] = device_signed_map.value[i];
  const bool high_first = four_bit_high_first(a.format);
  {
    const float mine = a.table ? a.table[lane % 16] : values.value[lane % 16];
    for (int byte = warp; byte < kPairs; byte += S::kWarps) {
      const float high = __shfl_sync(0xffffffffu, mine, byte >> 4), low = __shfl_sync(0xffffffffu, mine, byte & 15);
      table[byte * 32 + lane] = high_first ? packed_pair<T>(high, low) : packed_pair<T>(low, high);
    }
  }
  ptx::cp_async_wait_group<S::kStages - 2>();  // x came with the first stage
  __syncthreads();

  const uint32_t table_lane = ptx::shared_address(table + lane);
  const auto pair_of = [table_lane](uint32_t shifted) {  // of the byte in bits 7 to 14
    uint32_t pair;
    asm("ld.shared.b32 %0, [%1];" : "=r"(pair) : "r"((shifted & 0x7f80u) | table_lane));
    return pair;
  };
  const T* x_lane = x_shared + g * stride + t * 16;

  int item = 0;
  for (int tile_index = 0; tile_index < my_tiles; ++tile_index) {
    float sum[kFragments][kTiles][4] = {};
    const int64_t scale_row = kExtra == Extra::kCompressed ? row_of(tile_index, lane) * p.blocks_per_row : 0;
    for (int stage = 0; stage < my_stages; ++stage, ++item) {
      copy_next();
      ptx::cp_async_wait_group<S::kStages - 1>();
      __syncwarp();
      const uint8_t* now = ring + item % S::kStages * kStageBytes;
      Pair scale, zero_point;  // of row `lane`
      {
        const auto* words = reinterpret_cast<const uint32_t*>(now + kCodeBytes) + lane * words_of(kExtra);
#pragma unroll
        for (int c = 0; c < kStageChunks; ++c) {
          if constexpr (kExtra == Extra::kCompressed) {
            const auto byte = (reinterpret_cast<uintptr_t>(a.scales.scale_codes) + scale_row + block_of(stage, c)) & 3;
            const uint32_t code = words[c * 2] >> (8 * byte) & 0xffu;
            scale.value[c] = four_bit_decompressed(map[code], __uint_as_float(words[c * 2 + 1]), offset);
          } else {
            scale.value[c] = __uint_as_float(words[c]);
            if constexpr (kAffine)
              zero_point.value[c] = static_cast<float>(static_cast<int32_t>(words[kStageChunks + c]));
          }
        }
      }
#pragma unroll
      for (int c = 0; c < kStageChunks; ++c) {
        const int chunk = (first_stage + stage) * kStageChunks + c;
        const bool inside = chunk < chunks;  // past the slice x is 0
        uint2 codes[2 * kFragments];
#pragma unroll
        for (int i = 0; i < 2 * kFragments; ++i) {
          const int row = i * 8 + g, piece = (c * 2 + t / 2) ^ (row & 2);
          codes[i] = *reinterpret_cast<const uint2*>(now + row * 64 + piece * 16 + t % 2 * 8);
        }
        float block_sum[kFragments][kTiles][4] = {};
        uint32_t zero[2 * kFragments];
        if constexpr (kAffine) {
#pragma unroll
          for (int i = 0; i < 2 * kFragments; ++i) {
            const float z = __shfl_sync(0xffffffffu, zero_point.value[c], i * 8 + g);
            zero[i] = packed_pair<T>(z, z);
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // 8 of a lane's 16 elements
          uint4 b[kTiles];
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            b[n] = uint4{};
            if (inside && n * 8 + g < m_rows)
              b[n] = *reinterpret_cast<const uint4*>(x_lane + n * 8 * stride + chunk * kChunk + half * 8);
          }
#pragma unroll
          for (int f = 0; f < kFragments; ++f) {
            const uint32_t top = half ? codes[2 * f].y : codes[2 * f].x;
            const uint32_t bottom = half ? codes[2 * f + 1].y : codes[2 * f + 1].x;
#pragma unroll
            for (int step = 0; step < 2; ++step) {
              uint32_t fragment[4];
              if (step == 0) {
                fragment[0] = pair_of(top << 7);
                fragment[1] = pair_of(bottom << 7);
                fragment[2] = pair_of(top >> 1);
                fragment[3] = pair_of(bottom >> 1);
              } else {
                fragment[0] = pair_of(top >> 9);
                fragment[1] = pair_of(bottom >> 9);
                fragment[2] = pair_of(top >> 17);
                fragment[3] = pair_of(bottom >> 17);
              }
              if constexpr (kAffine) {
#pragma unroll
                for (int i = 0; i < 4; ++i) fragment[i] = subtracted<T>(fragment[i], zero[2 * f + i % 2]);
              }
#pragma unroll
              for (int n = 0; n < kTiles; ++n)
                mma<T>(block_sum[f][n], fragment, step ? b[n].z : b[n].x, step ? b[n].w : b[n].y);
            }
          }
        }
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          const float top = __shfl_sync(0xffffffffu, scale.value[c], 2 * f * 8 + g);
          const float bottom = __shfl_sync(0xffffffffu, scale.value[c], (2 * f + 1) * 8 + g);
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            sum[f][n][0] = __fmaf_rn(block_sum[f][n][0], top, sum[f][n][0]);
            sum[f][n][1] = __fmaf_rn(block_sum[f][n][1], top, sum[f][n][1]);
            sum[f][n][2] = __fmaf_rn(block_sum[f][n][2], bottom, sum[f][n][2]);
            sum[f][n][3] = __fmaf_rn(block_sum[f][n][3], bottom, sum[f][n][3]);
          }
        }
      }
      __syncwarp();  // the slot is copied into next
    }
    // The sums of the warps that share rows are added, in the order of their columns.
    float* mine = sums + warp * kTileRows * m_rows;
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int m = n * 8 + t * 2 + c % 2, row = f * 16 + c / 2 * 8 + g;
          if (m < m_rows) mine[m * kTileRows + row] = sum[f][n][c];
        }
    __syncthreads();
    const int64_t first_row = (blockIdx.y + static_cast<int64_t>(tile_index) * gridDim.y) * kRows;
    for (int i = threadIdx.x; i < kRows * m_rows; i += S::kThreads) {
      const int m = i / kRows, row = i % kRows;
      const int64_t n = first_row + row;
      const float* parts = sums + (row / kTileRows * m_rows + m) * kTileRows + row % kTileRows;
      float total = parts[0];
#pragma unroll
      for (int k = 1; k < S::kWarpsK; ++k) total += parts[k * S::kWarpsN * kTileRows * m_rows];
      if (n >= a.n) continue;
      if (p.partial)
        p.partial[(blockIdx.x * a.m + m) * a.n + n] = total;
      else
        static_cast<T*>(a.y)[m * a.n + n] = from_float<T>(total + four_bit_bias(a, n));
    }
    __syncthreads();
  }
}

// y = the sum of the slices' partial results, in their order, plus bias.
template <typename T>
__global__ void __launch_bounds__(256) add_slices_kernel(const float* __restrict__ partial,  // [slices, m, n]
                                                         const FourBitLinearArgs a, int slices) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x, size = a.m * a.n;
  if (i >= size) return;
  float sum = partial[i];
  for (int s = 1; s < slices; ++s) sum += partial[s * size + i];
  static_cast<T*>(a.y)[i] = from_float<T>(a.bias ? sum + four_bit_bias(a, i % a.n) : sum);
}

int tiles_of(int64_t m) { return m <= 8 ? 1 : m <= 16 ? 2 : 4; }

template <typename F>
auto with_tiles(int64_t m, const F& f) {
  switch (tiles_of(m)) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    default:
      return f(std::integral_constant<int, 4>{});
  }
}

// Of 64 << shift; -1 of another block.
int shift_of(int64_t block) {
  for (int shift = 0; shift < 20; ++shift)
    if (block == int64_t{kChunk} << shift) return shift;
  return -1;
}

bool is_paired(const FourBitLinearArgs& a) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 8 == 0; };
  return a.block == kChunk && a.k % (kStageChunks * kChunk) == 0 && aligned(a.scales.scale) &&
         aligned(a.scales.zero_point);
}

Extra extra_of(const FourBitLinearArgs& a) {
  return a.scales.scale == nullptr ? Extra::kCompressed : a.scales.zero_point ? Extra::kZeroPoint : Extra::kNone;
}

// As few slices as let x fit in shared memory and give each multiprocessor a tile.
Plan plan_of(const FourBitLinearArgs& a) {
  return with_tiles(a.m, [&](auto tiles) {
    using S = Shape<tiles.value>;
    const int processors = std::max(multiprocessors(), 1);
    const auto most = static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
    const int64_t stages = (a.k + kStageChunks * kChunk - 1) / (kStageChunks * kChunk);
    const int64_t row_tiles = (a.n + S::kWarpsN * kTileRows - 1) / (S::kWarpsN * kTileRows);
    Plan best{};
    double best_time = 1e30;
    for (int slices = 1; slices <= kMaxSlices && slices <= stages; ++slices) {
      const int64_t slice_stages = (stages + slices - 1) / slices;
      if ((stages + slice_stages - 1) / slice_stages != slices) continue;
      const int64_t slice = slice_stages * kStageChunks * kChunk;
      const size_t ring = S::kStages * stage_bytes(extra_of(a));
      const size_t shared = kGap + kTableBytes + 1024 + (S::kWarps - std::min<size_t>(kGap / ring, S::kWarps)) * ring +
                            sizeof(float) * static_cast<size_t>(S::kWarps * kTileRows * a.m) +
                            sizeof(uint16_t) * static_cast<size_t>(a.m * (slice + kPad));
      if (shared > most) continue;
      const int64_t groups = std::min<int64_t>(std::max(processors / slices, 1), row_tiles);
      const int64_t rounds = (row_tiles + groups - 1) / groups;
      // Bytes of W that the busiest thread block reads, and x, and per round the sums, in KB.
      const double time = static_cast<double>(rounds * S::kWarpsN * kTileRows * slice) * 0.5625 / 1024 +
                          static_cast<double>(a.m * slice) / 1024 +
                          static_cast<double>(rounds * S::kWarps * kTileRows * a.m) * 2.0 / 1024 + 4.0 * rounds +
                          (slices > 1 ? 60.0 + static_cast<double>(a.m * a.n * slices) * 8.0 / 1024 / processors : 0.0);
      if (time < best_time) {
        best_time = time;
        best = {slices, static_cast<int>(slice), static_cast<int>(groups), shared};
      }
    }
    return best;
  });
}

template <typename T, int kTiles, Extra kExtra>
int launch(const LinearParams& params, const Plan& plan, cudaStream_t stream) {
  const auto kernel = linear_kernel<T, kTiles, kExtra>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared));
      error != cudaSuccess)
    return error;
  const dim3 grid(static_cast<unsigned>(plan.slices), static_cast<unsigned>(plan.groups));
  kernel<<<grid, Shape<kTiles>::kThreads, plan.shared, stream>>>(params, four_bit_values(params.args.format));
  return cudaGetLastError();
}

}  // namespace

bool four_bit_linear_suits(const FourBitLinearArgs& a) {
  const bool half = a.dtype == DType::kFloat16 || a.dtype == DType::kBFloat16;
  return half && a.m >= 1 && a.m <= kFourBitMaxRows && a.n > 0 && a.k % kChunk == 0 && a.k > 0 && a.k < (1 << 30) &&
         shift_of(a.block) >= 0 && a.k % a.block == 0 && !a.scales.float_zero_point &&
         (a.scales.scale || !a.scales.zero_point) && is_aligned(a.x) && is_aligned(a.codes) &&
         device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8 && plan_of(a).slices > 0;
}

size_t four_bit_linear_workspace(const FourBitLinearArgs& a) {
  const Plan plan = plan_of(a);
  return plan.slices > 1 ? sizeof(float) * static_cast<size_t>(plan.slices * a.m * a.n) : 0;
}

int four_bit_linear(const FourBitLinearArgs& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const Plan plan = plan_of(a);
  const LinearParams params{a,
                            plan.slices > 1 ? static_cast<float*>(a.workspace) : nullptr,
                            plan.slice,
                            shift_of(a.block),
                            a.k / a.block,
                            is_paired(a)};
  int error = 0;
  const auto with_type = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    error = with_tiles(a.m, [&](auto tiles) {
      switch (extra_of(a)) {
        case Extra::kCompressed:
          return launch<T, tiles.value, Extra::kCompressed>(params, plan, stream);
        case Extra::kZeroPoint:
          return launch<T, tiles.value, Extra::kZeroPoint>(params, plan, stream);
        default:
          return launch<T, tiles.value, Extra::kNone>(params, plan, stream);
      }
    });
    if (error == 0 && plan.slices > 1) {
      add_slices_kernel<T>
          <<<static_cast<unsigned>(ceil_div(a.m * a.n, 256)), 256, 0, stream>>>(params.partial, a, plan.slices);
      error = cudaGetLastError();
    }
  };
  if (a.dtype == DType::kBFloat16)
    with_type(static_cast<BFloat16*>(nullptr));
  else
    with_type(static_cast<Half*>(nullptr));
  return error;
}

}  // namespace quantrain::cuda
