#include <cmath>

#include "csrc/cuda/common.cuh"
#include "csrc/cuda/device.h"
#include "csrc/cuda/int8.h"
#include "csrc/cuda/int8_mm/mma.cuh"

#if defined(QUANTRAIN_WITH_SM90)
#include "csrc/cuda/int8_mm/sm90/kernels.h"
#endif

// The int8 matrix product: its launch on sm_80 and later, and the choice between that kernel and Hopper's.

namespace quantrain::cuda {
namespace {

using namespace mma;

// ---- mma.sync -------------------------------------------------------------------------------------------------------

template <typename Out, bool kOutliers>
int launch_sm80(const Int8MmArgs& a, cudaStream_t stream) {
  const auto kernel = int8_mm_kernel<Out, kOutliers>;
  if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes))
    return error;
  const auto row_tiles = static_cast<int>(ceil_div(a.m, kTile)), column_tiles = static_cast<int>(ceil_div(a.n, kTile));
  const int64_t tiles = static_cast<int64_t>(row_tiles) * column_tiles;
  kernel<<<static_cast<unsigned>(tiles), kThreads, kSharedBytes, stream>>>(a, row_tiles, column_tiles);
  return cudaGetLastError();
}

// ---- Hopper: which kernel -------------------------------------------------------------------------------------------

#if defined(QUANTRAIN_WITH_SM90)
struct Candidate {
  const char* name;
  int (*run)(const Int8MmArgs&, const sm90::Tuning&, void*);
  size_t (*workspace)(const Int8MmArgs&, const sm90::Tuning&);
  int tile_rows, tile_columns, cluster_rows;
  // Microseconds: of a wave of tiles (one per multiprocessor) for each 1000 of k, of a wave beside that, and of the
  // launch. Fitted to 60 shapes of transformers on an H200 (benchmarks/fits/int8_mm_sweep.py,
  // results/int8-mm-sweep-h200-2026-11-23.csv): the kernel that the fit picks takes 0.3 % longer than the best of the
  // four on average, 3 % at worst.
  double by_depth, by_wave, fixed;
};

#define QUANTRAIN_CANDIDATE(name) #name, &sm90::name, &sm90::name##_workspace
constexpr Candidate kNarrow[] = {
    {QUANTRAIN_CANDIDATE(pingpong_128x128_2x1), 128, 128, 2, 2.58, 0.87, 3.9},
    {QUANTRAIN_CANDIDATE(pingpong_64x128_2x1), 64, 128, 2, 1.70, 0.55, 3.2},
    {QUANTRAIN_CANDIDATE(cooperative_128x192_2x1), 128, 192, 2, 3.82, 2.55, 2.2},
    {QUANTRAIN_CANDIDATE(cooperative_128x256_1x1), 128, 256, 1, 5.07, 3.37, 1.2},
};
constexpr Candidate kNarrowStreamK = {QUANTRAIN_CANDIDATE(stream_k_128x128_2x1), 128, 128, 2, 2.69, 0.0, 10.5};
constexpr Candidate kWide[] = {{QUANTRAIN_CANDIDATE(cooperative_128x256_2x1_float32), 128, 256, 2, 5.07, 3.37, 1.2}};
constexpr Candidate kWideStreamK = {QUANTRAIN_CANDIDATE(stream_k_128x128_2x1_float32), 128, 128, 2, 2.69, 0.0, 10.5};
constexpr Candidate kAccumulate = {QUANTRAIN_CANDIDATE(cooperative_128x128_2x1_accumulate), 128, 128, 2, 0, 0, 0};

// Of the same times: a tile of depth more, and their loops are the same but for it.
constexpr Candidate kWithOutliers[] = {
    {QUANTRAIN_CANDIDATE(pingpong_128x128_2x1_outliers), 128, 128, 2, 2.58, 0.87, 3.9},
    {QUANTRAIN_CANDIDATE(pingpong_64x128_2x1_outliers), 64, 128, 2, 1.70, 0.55, 3.2},
};

// ---- Hopper: outlier columns as the kernels load them ---------------------------------------------------------------

constexpr int kSideChunks = sm90::kInt8SideBytes / kChunk;

// A thread for each 16 bytes of `side`: two of hi, two of lo, one with the shift, whose thread also writes s1.
__global__ void __launch_bounds__(kThreads) side_kernel(const Int8MmOutliers o, int64_t m,
                                                        uint4* __restrict__ side,     // [m, kSideChunks]
                                                        float* __restrict__ a_scale)  // [m]
{
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = index / kSideChunks;
  if (row >= m) return;
  const auto chunk = static_cast<int>(index - row * kSideChunks);
  alignas(kChunk) int8_t bytes[kChunk] = {};
  if (chunk == kSideChunks - 1) {
    const float s1 = o.scale[row * 2], s2 = o.scale[row * 2 + 1];
    *reinterpret_cast<int*>(bytes) = int8_outlier_shift(s1, s2, o.count);
    a_scale[row] = s1;
  } else {
    const int first = chunk % 2 * kChunk;
    const int8_t* __restrict__ plane = o.planes + (row * 2 + chunk / 2) * o.count;
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (first + i < o.count) bytes[i] = plane[first + i];
  }
  side[index] = *reinterpret_cast<const uint4*>(bytes);
}

// In the workspace before the kernel's own: side, then s1.
int64_t side_bytes(int64_t m) { return ceil_div(m * sm90::kInt8SideBytes, 256) * 256; }
int64_t side_and_scale_bytes(int64_t m) { return side_bytes(m) + ceil_div(m * int64_t{sizeof(float)}, 256) * 256; }

int prepare_outliers(Int8MmArgs& a, cudaStream_t stream) {
  auto* const workspace = static_cast<int8_t*>(a.workspace);
  auto* const a_scale = reinterpret_cast<float*>(workspace + side_bytes(a.m));
  side_kernel<<<grid_for(a.m * kSideChunks, kThreads), kThreads, 0, stream>>>(
      a.outliers, a.m, reinterpret_cast<uint4*>(workspace), a_scale);
  a.outliers.side = workspace;
  a.a_scale = a_scale;
  a.a_scale_stride = 1;
  a.workspace = workspace + side_and_scale_bytes(a.m);
  return cudaGetLastError();
}

// ---- Hopper: the choice ---------------------------------------------------------------------------------------------

struct Choice {
  const Candidate* kernel = nullptr;
  sm90::Tuning tuning;
};

int64_t tiles_of(const Candidate& c, const Int8MmArgs& a) {
  return ceil_div(ceil_div(a.m, c.tile_rows), c.cluster_rows) * c.cluster_rows * ceil_div(a.n, c.tile_columns);
}

double expected_time(const Candidate& c, const Int8MmArgs& a, int64_t multiprocessors) {
  const auto waves = static_cast<double>(ceil_div(tiles_of(c, a), multiprocessors));
  return waves * (c.by_depth * static_cast<double>(a.k) / 1000.0 + c.by_wave) + c.fixed;
}

// Sums are shared, so that a wave may be a fraction.
double expected_stream_k_time(const Candidate& c, const Int8MmArgs& a, int64_t multiprocessors) {
  const double waves = static_cast<double>(tiles_of(c, a)) / static_cast<double>(multiprocessors);
  return waves * c.by_depth * static_cast<double>(a.k) / 1000.0 + c.fixed;
}

Choice choose(const Int8MmArgs& a, const Int8MmKernel& asked) {
  constexpr int64_t kMaxSize = int64_t{1} << 31;
  const bool narrow = a.dtype != DType::kFloat32;
  if (compute_capability() / 10 != 9 || a.n % (narrow ? 8 : 4) != 0 || a.m >= kMaxSize || a.n >= kMaxSize) return {};
  for (const void* pointer :
       {static_cast<const void*>(a.a), static_cast<const void*>(a.b), static_cast<const void*>(a.d),
        static_cast<const void*>(a.b_scale), static_cast<const void*>(a.bias)})
    if (!is_aligned(pointer)) return {};
  Choice choice;
  const int multiprocessors = choice.tuning.multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  if (a.outliers.count > 0) {
    constexpr int64_t kMost = sm90::kInt8SideColumns;
    if (!narrow || a.outliers.count > kMost || a.outliers.count % kChunk != 0 || !is_aligned(a.outliers.codes))
      return {};
    const auto time = [&](const Candidate& c) { return expected_time(c, a, multiprocessors); };
    choice.kernel = &kWithOutliers[time(kWithOutliers[1]) < time(kWithOutliers[0]) ? 1 : 0];
    return choice;
  }
  if (a.accumulate) {
    if (!narrow) choice.kernel = &kAccumulate;
    return choice;
  }
  if (!asked.name.empty()) {
    choice.tuning.swizzle = asked.swizzle;
    choice.tuning.splits = asked.splits;
    for (const auto* candidates : {&kNarrow[0], &kNarrow[1], &kNarrow[2], &kNarrow[3], &kNarrowStreamK})
      if (narrow && asked.name == candidates->name) choice.kernel = candidates;
    for (const auto* candidates : {&kWide[0], &kWideStreamK})
      if (!narrow && asked.name == candidates->name) choice.kernel = candidates;
    return choice;
  }
  double least = INFINITY;
  const auto consider = [&](const Candidate& candidate, double time) {
    if (time >= least) return;
    least = time;
    choice.kernel = &candidate;
  };
  for (const Candidate& candidate : kNarrow)
    if (narrow) consider(candidate, expected_time(candidate, a, multiprocessors));
  for (const Candidate& candidate : kWide)
    if (!narrow) consider(candidate, expected_time(candidate, a, multiprocessors));
  const Candidate& stream_k = narrow ? kNarrowStreamK : kWideStreamK;
  const int64_t tiles = tiles_of(stream_k, a);
  if (tiles <= 2 * multiprocessors && a.k >= 4096)  // where its model was fitted
    consider(stream_k, expected_stream_k_time(stream_k, a, multiprocessors));
  if (choice.kernel == &stream_k && tiles * 2 <= multiprocessors)
    choice.tuning.splits = static_cast<int>(multiprocessors / tiles);
  // Two tiles wide where d is narrow and there are waves enough; no width is better for all (sweep as above).
  if (a.n <= 3072 && tiles >= 2 * multiprocessors) choice.tuning.swizzle = 2;
  return choice;
}
#endif

}  // namespace

int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor);
}

size_t int8_mm_workspace([[maybe_unused]] const Int8MmArgs& a, [[maybe_unused]] const Int8MmKernel& asked) {
#if defined(QUANTRAIN_WITH_SM90)
  if (const Choice choice = choose(a, asked); choice.kernel)
    return choice.kernel->workspace(a, choice.tuning) +
           (a.outliers.count > 0 ? static_cast<size_t>(side_and_scale_bytes(a.m)) : 0);
#endif
  return 0;
}

int int8_mm(const Int8MmArgs& a, void* stream, const Int8MmKernel& asked) {
#if defined(QUANTRAIN_WITH_SM90)
  if (const Choice choice = choose(a, asked); choice.kernel) {
    Int8MmArgs args = a;
    if (a.outliers.count > 0) {
      if (const int error = prepare_outliers(args, static_cast<cudaStream_t>(stream))) return error;
    }
    return choice.kernel->run(args, choice.tuning, stream);
  }
#endif
  if (!asked.name.empty() && asked.name != "mma_128x128") return cudaErrorInvalidValue;
  int error = cudaSuccess;
  dispatch_float(a.dtype, [&](auto* type) {
    using Out = std::remove_pointer_t<decltype(type)>;
    dispatch_bool(a.outliers.count > 0, [&](auto outliers) {
      error = launch_sm80<Out, outliers.value>(a, static_cast<cudaStream_t>(stream));
    });
  });
  return error;
}

}  // namespace quantrain::cuda
