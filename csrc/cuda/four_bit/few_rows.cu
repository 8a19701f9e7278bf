#include <algorithm>
#include <bit>
#include <type_traits>

#include "csrc/cuda/device.h"
#include "csrc/cuda/four_bit/few_rows.h"
#include "csrc/cuda/four_bit/fragment.cuh"
#include "csrc/cuda/tensor_map.h"

// y^T = W x^T on tensor cores for few rows of x. W is the left operand: lane t of a group of four owns 16 consecutive
// elements, 8 bytes, of a chunk of 64, so that a byte is one register of the fragment and nothing is shuffled; x is
// read in the same order. A byte becomes two 16-bit values by a table in shared memory. The values are those of the
// format; the scale of a block multiplies its sum, in float32.
//
// A thread block keeps a slice of x's columns in shared memory and a run of W's rows to itself. Its warps share the
// slice's columns and the run's rows; each goes through its rows by tiles, with a ring of its own that codes and scales
// are copied into ahead (one thread, by Hopper's tensor memory accelerator: loads by the lanes took longer than the
// arithmetic, 32 bytes of a row at a time), and then they add their sums. The thread blocks of a cluster have a slice
// each and add theirs, in order, in each other's shared memory; where there are no clusters a second kernel does.

namespace quantrain::cuda {
namespace {

constexpr int kPad = 8;  // elements after a row of x in shared memory: its reads meet in no bank
constexpr int kMaxCluster = 8;

constexpr int kFragments = 2;  // of 16 rows of W: a tile of a warp
constexpr int kRows = kFragments * 16;
constexpr int kStageChunks = 2;  // of a copy: 64 bytes of a row
constexpr int kStages = 3;       // of a warp's ring
constexpr int kCodeBytes = kRows * kStageChunks * kChunk / 2;
constexpr int kScaleBytes = kRows * 16;  // of a group: beside its first stage

constexpr int stage_bytes(Extra extra) { return kCodeBytes + kScaleBytes * (extra == Extra::kZeroPoint ? 2 : 1); }

constexpr int kStride = kRows + 4;  // of a column of sums: the writes of a warp meet in no bank

// By the eights of rows of x.
template <int kTiles>
struct Shape {
  static constexpr int kWarps = kTiles == 1 ? 16 : 8;
  static constexpr int kLogWarps = kTiles == 1 ? 4 : 3;
  static constexpr int kThreads = kWarps * 32;
};

struct Plan {
  int slices;      // of k
  int chunks;      // of each slice but the last: whole groups
  int log_k;       // 2^log_k warps of a thread block share a tile's columns, the others its rows
  int blocks;      // that share n, of each slice
  int passes;      // tiles of each warp
  bool cluster;    // the slices' thread blocks are one
  int log_slices;  // cluster: slices is 2^log_slices
  size_t shared;
};

// Boxes of W's codes: a stage of a tile, and of its half;
// and its group's scales.
struct CodeMaps {
  CUtensorMap whole;
  CUtensorMap half;
  CUtensorMap scales;
  CUtensorMap zero_points;
};

struct LinearParams {
  FourBitLinearArgs args;
  ScaleLayout scales;
  float* partial;  // [slices, m, n] or null: y is written
  Plan plan;
  bool scales_copied;  // beside the codes: scales.grouped, and the copies take their rows
  // Rows of W by sixteens, for each row of warps: units or, the first `more`, one more.
  int units;
  int more;
};

template <typename T>
__device__ __forceinline__ void write_sum(const LinearParams& p, int slice, int64_t m, int64_t n, float sum) {
  if (p.partial)
    p.partial[(slice * p.args.m + m) * p.args.n + n] = sum;
  else
    static_cast<T*>(p.args.y)[m * p.args.n + n] = from_float<T>(sum + four_bit_bias(p.args, n));
}

// Where in a stage of rows of 64 bytes 16 bytes lie: exchanged so that eight rows of 32 bytes meet in no bank. It is
// the copies' swizzle of 64 bytes.
__device__ __forceinline__ int place(int row, int piece) { return row * 64 + (piece ^ (row >> 1 & 3)) * 16; }

template <typename T, int kTiles, Extra kExtra>
__global__ void __launch_bounds__(Shape<kTiles>::kThreads, 1)
    linear_kernel(const LinearParams p, const FourBitValues values, const __grid_constant__ CodeMaps codes) {
  using S = Shape<kTiles>;
  constexpr int kStageBytes = stage_bytes(kExtra);
  extern __shared__ __align__(1024) uint8_t shared[];
  const FourBitLinearArgs& a = p.args;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  const int row_of_g = (g & 1) | (g & 2) << 1 | (g & 4) >> 1;  // of eight: those of half a warp meet in no bank
  const int m_rows = static_cast<int>(a.m);
  const int warps_k = 1 << p.plan.log_k, warps_n = S::kWarps >> p.plan.log_k;
  const int warp_n = warp & (warps_n - 1), warp_k = warp / warps_n;
  ptx::griddepcontrol_launch_dependents();

  const int n_rows = static_cast<int>(a.n);
  const auto first_unit = [&p](int share) { return share * p.units + min(share, p.more); };
  const int share = blockIdx.y * warps_n + warp_n;
  const int my_unit = first_unit(share), end_unit = first_unit(share + 1);

  // Chunks of the row: those of this slice, and the groups of them that are this warp's.
  const int all_chunks = static_cast<int>(a.k / kChunk);
  const int slice_chunk = min(static_cast<int>(blockIdx.x) * p.plan.chunks, all_chunks);
  const int slice_end = min(slice_chunk + p.plan.chunks, all_chunks);
  const int groups = (slice_end - slice_chunk + kGroup - 1) / kGroup, share_k = (groups + warps_k - 1) / warps_k;
  const int my_group = warp_k * share_k, my_groups = max(min(share_k, groups - my_group), 0);
  const int my_chunk = slice_chunk + my_group * kGroup;

  uint8_t* ring = shared + warp * kStages * kStageBytes;
  auto* table = reinterpret_cast<uint32_t*>(shared + S::kWarps * kStages * kStageBytes);
  auto* map = reinterpret_cast<float*>(table + kTableBytes / 4);  // [256]
  auto* barriers = reinterpret_cast<uint64_t*>(map + 256);        // [warps][stages], and three
  const int sum_columns = min(m_rows, 8);
  auto* all_sums = reinterpret_cast<float*>(barriers + S::kWarps * kStages + 4);  // [2][warps][columns][kStride]
  const int sum_size = S::kWarps * sum_columns * kStride;
  auto* received = all_sums + 2 * sum_size;  // [2][slices][columns][part]
  const int columns = (slice_end - slice_chunk) * kChunk, stride = p.plan.chunks * kChunk + kPad;
  const int tile_rows = warps_n * kRows;
  auto* x_shared = reinterpret_cast<T*>(received + (p.plan.cluster ? 2 * sum_columns * tile_rows : 0));  // [m][stride]

#if __CUDA_ARCH__ >= 900
  const ptx::SharedAddress full = ptx::shared_address(barriers + S::kWarps * kStages);  // of what is received
  const ptx::SharedAddress x_filled = full + 16, filled = ptx::shared_address(barriers + warp * kStages);
  if (lane == 0) {
    for (int i = 0; i < kStages; ++i) ptx::mbarrier_init(filled + i * 8, 1);
    if (warp == 0) {
      ptx::mbarrier_init(full, 1);
      ptx::mbarrier_init(full + 8, 1);
      ptx::mbarrier_init(x_filled, 1);
      ptx::prefetch_tensormap(&codes.whole);
    }
    ptx::fence_mbarrier_init();
  }
  __syncwarp();
  if (p.plan.cluster) ptx::barrier_cluster_arrive();
#else
  const int64_t row_bytes = a.k / 2;
#endif

  // A walk through this warp's stages, pass by pass: what is copied next.
  const int my_stages = my_groups * (kGroup / kStageChunks);
  int copied_pass = my_stages > 0 ? 0 : p.plan.passes, copied_stage = 0, copied_slot = 0;
  const auto copy_next = [&] {
    if (copied_pass < p.plan.passes) {
      const int unit = my_unit + copied_pass * kFragments, row = unit * 16;
      const int units = min(end_unit - unit, kFragments);
      const int chunk = my_chunk + copied_stage * kStageChunks;
      const ptx::SharedAddress to = ptx::shared_address(ring + copied_slot * kStageBytes);
#if __CUDA_ARCH__ >= 900
      if (lane == 0 && units > 0) {
        const ptx::SharedAddress barrier = filled + copied_slot * 8;
        const bool scales = p.scales_copied && copied_stage % 2 == 0;
        ptx::mbarrier_arrive_expect_tx(barrier,
                                       units * (kCodeBytes / kFragments) + (scales ? kStageBytes - kCodeBytes : 0));
        ptx::cp_async_bulk_tensor_2d(to, units == kFragments ? &codes.whole : &codes.half, chunk * (kChunk / 2), row,
                                     barrier);
        if (scales) {
          // Copies start at multiples of 16 bytes.
          ptx::cp_async_bulk_tensor_2d(to + kCodeBytes, &codes.scales,
                                       kExtra == Extra::kCompressed ? chunk & ~15 : chunk, row, barrier);
          if constexpr (kExtra == Extra::kZeroPoint)
            ptx::cp_async_bulk_tensor_2d(to + kCodeBytes + kScaleBytes, &codes.zero_points, chunk, row, barrier);
        }
      }
#else
#pragma unroll
      for (int i = 0; i < kRows / 8; ++i) {
        const int of_row = i * 8 + g;
        const bool inside = i / 2 < units && row + of_row < n_rows && chunk + t / 2 < slice_end;
        ptx::cp_async_16(to + place(of_row, t),
                         inside ? a.codes + (row + of_row) * row_bytes + chunk * (kChunk / 2) + t * 16 : a.codes,
                         inside * 16);
      }
      if (p.scales_copied && copied_stage % 2 == 0) {
        const int64_t block = min(row + lane, n_rows - 1) * p.scales.blocks_per_row + chunk;
        ptx::cp_async_16(to + kCodeBytes + lane * 16, a.scales.scale + block);
        if constexpr (kExtra == Extra::kZeroPoint)
          ptx::cp_async_16(to + kCodeBytes + kScaleBytes + lane * 16, a.scales.zero_point + block);
      }
#endif
      if (++copied_stage == my_stages) {
        copied_stage = 0;
        ++copied_pass;
      }
    }
    copied_slot = copied_slot == kStages - 1 ? 0 : copied_slot + 1;
#if __CUDA_ARCH__ < 900
    ptx::cp_async_commit_group();
#endif
  };

  const auto copy_x = [&] {
    const auto* x = static_cast<const T*>(a.x) + slice_chunk * kChunk;
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0 && columns > 0) {
      ptx::mbarrier_arrive_expect_tx(x_filled, m_rows * columns * sizeof(T));
      for (int m = 0; m < m_rows; ++m)
        ptx::cp_async_bulk(ptx::shared_address(x_shared + m * stride), x + m * a.k, columns * sizeof(T), x_filled);
    }
#else
    for (int m = 0; m < m_rows; ++m)
      for (int i = threadIdx.x; i < columns / 8; i += S::kThreads)
        ptx::cp_async_16(ptx::shared_address(x_shared + m * stride + i * 8), x + m * a.k + i * 8);
#endif
    // The slice's last group may go past its end: there x is 0.
    const int rest = groups * kGroup * kChunk - columns;
    for (int i = threadIdx.x; i < m_rows * rest; i += S::kThreads)
      x_shared[i / rest * stride + columns + i % rest] = T{};
  };

  // The scales of row 8t + row_of_g of a tile, of the next group: what does not come with the codes.
  RawScales<kExtra> raw;
  int scaled_pass = 0, scaled_group = 0;
  int64_t row_block = 0;
  const auto load_scales = [&] {
    if (scaled_pass >= p.plan.passes || my_groups == 0) return;
    if (scaled_group == 0) {
      const int row = (my_unit + scaled_pass * kFragments) * 16 + t * 8 + row_of_g;
      row_block = min(row, n_rows - 1) * p.scales.blocks_per_row;
    }
    if (p.scales_copied)
      raw.load_rest(p.scales, row_block, my_chunk + scaled_group * kGroup);
    else
      raw.load(p.scales, row_block, my_chunk + scaled_group * kGroup, all_chunks);
    if (++scaled_group == my_groups) {
      scaled_group = 0;
      ++scaled_pass;
    }
  };

  ptx::griddepcontrol_wait();
#if __CUDA_ARCH__ < 900
  copy_x();
#endif
#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) copy_next();
  load_scales();
#if __CUDA_ARCH__ >= 900
  copy_x();
#endif
  // Copies are under way while the table is filled.
  fill_pair_table<T>(table, values.value[lane % kFourBitCodes], four_bit_high_first(a.format), warp, S::kWarps);
  if constexpr (kExtra == Extra::kCompressed)
    for (int i = threadIdx.x; i < 256; i += S::kThreads) map[i] = device_signed_map.value[i];
  if (a.table) {
    __syncthreads();
    fill_pair_table<T>(table, a.table[lane % kFourBitCodes], four_bit_high_first(a.format), warp, S::kWarps);
  }
  const float offset = kExtra == Extra::kCompressed ? __ldg(a.scales.scale_offset) : 0.0f;
#if __CUDA_ARCH__ < 900
  ptx::cp_async_wait_group<kStages - 2>();  // x came with the first stage
#endif
  __syncthreads();
#if __CUDA_ARCH__ >= 900
  if (columns > 0) ptx::mbarrier_wait(x_filled, 0);
  if (p.plan.cluster) ptx::barrier_cluster_wait();
#endif

  const PairTable pairs(table);
  const T* x_lane = x_shared + g * stride + t * 16 + my_group * kGroup * kChunk;
  int slot = 0, buffer = 0;
  [[maybe_unused]] uint32_t parity = 0, full_parity = 0;
#pragma unroll 1
  for (int pass = 0; pass < p.plan.passes; ++pass) {
    float sum[kFragments][kTiles][4] = {};
    const int units = end_unit - my_unit - pass * kFragments;
#pragma unroll 1
    for (int group = 0; group < my_groups && units > 0; ++group) {
      float scale[kGroup], zero_point[kGroup];
#pragma unroll
      for (int c = 0; c < kGroup; ++c) {
        if (c % kStageChunks == 0) {
          copy_next();
#if __CUDA_ARCH__ >= 900
          ptx::mbarrier_wait(filled + slot * 8, parity);
#else
          ptx::cp_async_wait_group<kStages - 1>();
          __syncwarp();
#endif
        }
        if (c == 0) {
          if (p.scales_copied) {
            const auto* words = reinterpret_cast<const uint4*>(ring + slot * kStageBytes + kCodeBytes);
            raw.take(words[t * 8 + row_of_g], kExtra == Extra::kZeroPoint ? words[kRows + t * 8 + row_of_g] : uint4{},
                     my_chunk + group * kGroup);
          }
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            scale[i] = raw.value(p.scales, map, offset, i);
            if constexpr (kExtra == Extra::kZeroPoint)
              zero_point[i] = static_cast<float>(static_cast<int32_t>(raw.zero_point[i]));
          }
          load_scales();
        }
        const uint8_t* now = ring + slot * kStageBytes;
        uint2 code[2 * kFragments];
#pragma unroll
        for (int i = 0; i < 2 * kFragments; ++i)
          code[i] =
              *reinterpret_cast<const uint2*>(now + place(i * 8 + row_of_g, c % kStageChunks * 2 + t / 2) + t % 2 * 8);
        uint4 b[kTiles][2];
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            b[n][half] = uint4{};
            if (n * 8 + g < m_rows)
              b[n][half] =
                  *reinterpret_cast<const uint4*>(x_lane + n * 8 * stride + (group * kGroup + c) * kChunk + half * 8);
          }
        const auto multiply = [&](int f) {
          float block_sum[kTiles][4] = {};
          [[maybe_unused]] uint32_t zero[2];
          if constexpr (kExtra == Extra::kZeroPoint) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float z = __shfl_sync(0xffffffffu, zero_point[c], 2 * f + i, 4);
              zero[i] = packed_pair<T>(z, z);
            }
          }
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            const uint32_t top = step < 2 ? code[2 * f].x : code[2 * f].y;
            const uint32_t bottom = step < 2 ? code[2 * f + 1].x : code[2 * f + 1].y;
            uint32_t fragment[4];
            fragment[0] = pairs.pair(top, step % 2 * 2);
            fragment[1] = pairs.pair(bottom, step % 2 * 2);
            fragment[2] = pairs.pair(top, step % 2 * 2 + 1);
            fragment[3] = pairs.pair(bottom, step % 2 * 2 + 1);
            if constexpr (kExtra == Extra::kZeroPoint) {
#pragma unroll
              for (int i = 0; i < 4; ++i) fragment[i] = subtracted<T>(fragment[i], zero[i % 2]);
            }
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
              const uint4& v = b[n][step / 2];
              mma<T>(block_sum[n], fragment, step % 2 ? v.z : v.x, step % 2 ? v.w : v.y);
            }
          }
          const float top = __shfl_sync(0xffffffffu, scale[c], 2 * f, 4);
          const float bottom = __shfl_sync(0xffffffffu, scale[c], 2 * f + 1, 4);
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            sum[f][n][0] = __fmaf_rn(block_sum[n][0], top, sum[f][n][0]);
            sum[f][n][1] = __fmaf_rn(block_sum[n][1], top, sum[f][n][1]);
            sum[f][n][2] = __fmaf_rn(block_sum[n][2], bottom, sum[f][n][2]);
            sum[f][n][3] = __fmaf_rn(block_sum[n][3], bottom, sum[f][n][3]);
          }
        };
        if (units > 1) {
          multiply(0);
          multiply(1);
        } else {
          multiply(0);
        }
        if (c % kStageChunks == kStageChunks - 1) {
          __syncwarp();  // the slot is copied into next
          slot = slot == kStages - 1 ? 0 : slot + 1;
          parity ^= slot == 0;
        }
      }
    }
    // The sums of warps that share rows are added, in the order of their columns, eight rows of x at a time.
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int m_now = min(m_rows - n * 8, 8);
      if (m_now <= 0) continue;
      float* sums = all_sums + buffer * sum_size;
      float* mine = sums + warp * sum_columns * kStride;
#pragma unroll
      for (int f = 0; f < kFragments; ++f)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          if (t * 2 + c % 2 < m_now) mine[(t * 2 + c % 2) * kStride + f * 16 + c / 2 * 8 + row_of_g] = sum[f][n][c];
      __syncthreads();
      [[maybe_unused]] const int part = tile_rows >> p.plan.log_slices;  // of a thread block of the cluster
      const auto row_of = [&](int row) {                                 // of the tile; -1 past the end
        const int owner = blockIdx.y * warps_n + row / kRows;
        const int at = (first_unit(owner) + pass * kFragments) * 16 + row % kRows;
        return at < min(first_unit(owner + 1) * 16, n_rows) ? at : -1;
      };
      for (int i = threadIdx.x; i < m_now * tile_rows; i += S::kThreads) {
        const int row = i & (tile_rows - 1), m = i / kRows >> (S::kLogWarps - p.plan.log_k);
        const float* parts = sums + (row / kRows * sum_columns + m) * kStride + row % kRows;
        float total = parts[0];
#pragma unroll 4
        for (int k = 1; k < warps_k; ++k) total += parts[k * warps_n * sum_columns * kStride];
#if __CUDA_ARCH__ >= 900
        if (p.plan.cluster) {
          const int rank = row / part;
          const float* to =
              received + ((buffer * p.plan.slices + blockIdx.x) * sum_columns + m) * part + row - rank * part;
          ptx::st_async(ptx::mapa(ptx::shared_address(to), rank), total, ptx::mapa(full + buffer * 8, rank));
          continue;
        }
#endif
        if (const int at = row_of(row); at >= 0) write_sum<T>(p, blockIdx.x, n * 8 + m, at, total);
      }
#if __CUDA_ARCH__ >= 900
      if (p.plan.cluster) {
        if (threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(full + buffer * 8, m_now * tile_rows * sizeof(float));
        ptx::mbarrier_wait(full + buffer * 8, full_parity >> buffer & 1);
        full_parity ^= 1 << buffer;
        for (int i = threadIdx.x; i < m_now * part; i += S::kThreads) {
          const int m = i / part, row = i - m * part;
          const float* parts = received + (buffer * p.plan.slices * sum_columns + m) * part + row;
          float total = parts[0];
          for (int k = 1; k < p.plan.slices; ++k) total += parts[k * sum_columns * part];
          if (const int at = row_of(blockIdx.x * part + row); at >= 0) write_sum<T>(p, 0, n * 8 + m, at, total);
        }
      }
#endif
      buffer ^= 1;
    }
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

// Whether a row's scales lie on 16 bytes, as copies want them.
bool rows_copied(const FourBitLinearArgs& a) {
  if (a.scales.scale) return true;  // they do where they are grouped
  return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 && a.k / a.block % 16 == 0 &&
         is_aligned(a.scales.scale_codes);
}

// The plan whose busiest thread block is done first.
Plan plan_of(const FourBitLinearArgs& a) {
  return with_tiles(a.m, [&](auto tiles) {
    using S = Shape<tiles.value>;
    const int processors = std::max(multiprocessors(), 1);
    const bool clusters = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
    const auto most = static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
    const int64_t groups = (a.k / kChunk + kGroup - 1) / kGroup, units = (a.n + 15) / 16;
    Plan best{};
    double best_time = 1e30;
    for (int wanted = 1; wanted <= 64 && wanted <= groups; wanted *= 2) {
      const int64_t slice_groups = (groups + wanted - 1) / wanted;
      const bool cluster = clusters && wanted > 1 && wanted <= kMaxCluster;
      const int slices = cluster ? wanted : static_cast<int>((groups + slice_groups - 1) / slice_groups);
      const int chunks = static_cast<int>(slice_groups * kGroup);
      for (int log_k = 0; log_k <= S::kLogWarps; ++log_k) {
        const int warps_k = 1 << log_k, warps_n = S::kWarps / warps_k, rows = warps_n * kRows;
        const int64_t columns = std::min<int64_t>(a.m, 8);
        const size_t shared =
            S::kWarps * kStages * stage_bytes(layout_of(a).extra()) + kTableBytes + 1024 +
            8 * (S::kWarps * kStages + 4) +
            sizeof(float) * 2 * static_cast<size_t>(columns * (S::kWarps * kStride + (cluster ? rows : 0))) +
            sizeof(uint16_t) * static_cast<size_t>(a.m * (chunks * kChunk + kPad));
        if (shared > most || (cluster && rows % slices != 0)) continue;
        // 132 multiprocessors lie in groups of 16 and 18.
        const int resident = slices <= 2 ? processors / slices : (processors - 12) / slices;
        const int64_t blocks = std::min<int64_t>(std::max(resident, 1), (units + warps_n - 1) / warps_n);
        const int64_t share = (units + blocks * warps_n - 1) / (blocks * warps_n);  // units of the busiest warp
        const int64_t passes = (share + kFragments - 1) / kFragments;
        const int64_t share_chunks = (slice_groups + warps_k - 1) / warps_k * kGroup;
        // Cycles: of a unit's chunk, by memory or by the tile's instructions, and of the tile's; of a pass's sums; of
        // x.
        const double per_unit = tiles.value == 1 ? 36.0 : 20.0 + 9.0 * tiles.value, per_tile = 4.0 + 6.0 * tiles.value;
        const double time =
            static_cast<double>(share_chunks * S::kWarps) *
                (static_cast<double>(share) * per_unit + static_cast<double>(passes) * per_tile) +
            static_cast<double>(passes * tiles.value) * (200.0 + (cluster ? 400.0 : 0.0)) +
            static_cast<double>(passes * a.m) * S::kWarps * kRows * 8.0 / 128 + static_cast<double>(a.m * chunks) +
            (slices > 1 && !cluster ? 4000.0 + static_cast<double>(a.m * a.n * slices) / processors / 8 : 0.0);
        if (time < best_time) {
          best_time = time;
          const int log_slices = std::bit_width(static_cast<unsigned>(slices)) - 1;
          best = {slices,  chunks,     log_k, static_cast<int>(blocks), static_cast<int>(passes),
                  cluster, log_slices, shared};
        }
      }
    }
    return best;
  });
}

template <typename T, int kTiles, Extra kExtra>
int launch(LinearParams params, cudaStream_t stream) {
  const auto kernel = linear_kernel<T, kTiles, kExtra>;
  const Plan& plan = params.plan;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared));
      error != cudaSuccess)
    return error;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.slices), static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(Shape<kTiles>::kThreads);
  config.dynamicSmemBytes = plan.shared;
  config.stream = stream;
  config.attrs = attributes;
  const bool hopper = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  if (hopper) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    if (plan.cluster) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(plan.slices), 1, 1};
    }
  }
  CodeMaps codes{};
  const FourBitLinearArgs& a = params.args;
  const auto encode = [&](CUtensorMap* map, int rows) {
    return encode_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, a.codes, a.n, a.k / 2, rows,
                             kStageChunks * kChunk / 2, CU_TENSOR_MAP_SWIZZLE_64B);
  };
  if (hopper && !(encode(&codes.whole, kRows) && encode(&codes.half, kRows / 2))) return cudaErrorInvalidValue;
  if (hopper && params.scales_copied) {
    const int64_t blocks = params.scales.blocks_per_row;
    const bool compressed = kExtra == Extra::kCompressed;
    const void* scales = compressed ? static_cast<const void*>(a.scales.scale_codes) : a.scales.scale;
    params.scales_copied =
        encode_tensor_map(&codes.scales, compressed ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                          compressed ? 1 : 4, scales, a.n, blocks, kRows, compressed ? 16 : 4,
                          CU_TENSOR_MAP_SWIZZLE_NONE) &&
        (kExtra != Extra::kZeroPoint ||
         encode_tensor_map(&codes.zero_points, CU_TENSOR_MAP_DATA_TYPE_INT32, 4, a.scales.zero_point, a.n, blocks,
                           kRows, 4, CU_TENSOR_MAP_SWIZZLE_NONE));
  }
  return cudaLaunchKernelEx(&config, kernel, params, four_bit_values(a.format), codes);
}

}  // namespace

bool few_rows_suit(const FourBitLinearArgs& a) {
  return suits(a) && a.m <= kFourBitFewRows && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8 &&
         plan_of(a).slices > 0;
}

size_t few_rows_workspace(const FourBitLinearArgs& a) {
  const Plan plan = plan_of(a);
  return plan.slices > 1 && !plan.cluster ? sizeof(float) * static_cast<size_t>(plan.slices * a.m * a.n) : 0;
}

int few_rows_linear(const FourBitLinearArgs& a, void* stream_pointer) {
  if (int4_rows_suit(a)) return int4_rows(a, stream_pointer);
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  LinearParams params{a, {}, nullptr, plan_of(a), false, 0, 0};
  const Plan& plan = params.plan;
  if (plan.slices > 1 && !plan.cluster) params.partial = static_cast<float*>(a.workspace);
  int error = 0;
  const auto with_type = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    error = with_tiles(a.m, [&](auto tiles) {
      using S = Shape<tiles.value>;
      params.scales = layout_of(a);
      params.scales_copied = params.scales.grouped && rows_copied(a);
      const int units = static_cast<int>((a.n + 15) / 16), shares = plan.blocks * (S::kWarps >> plan.log_k);
      params.units = units / shares;
      params.more = units % shares;
      switch (params.scales.extra()) {
        case Extra::kCompressed:
          return launch<T, tiles.value, Extra::kCompressed>(params, stream);
        case Extra::kZeroPoint:
          return launch<T, tiles.value, Extra::kZeroPoint>(params, stream);
        default:
          return launch<T, tiles.value, Extra::kNone>(params, stream);
      }
    });
    if (error == 0 && params.partial) {
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
