#include <algorithm>
#include <atomic>

#include "csrc/cuda/common.cuh"
#include "csrc/cuda/device.h"
#include "csrc/cuda/four_bit.h"
#include "csrc/cuda/four_bit/few_rows.h"
#include "csrc/cuda/four_bit/wgmma.h"

// Which kernel makes a product with a packed weight, and whether one pays.

namespace quantrain::cuda {
namespace {

// Of 64 << shift; -1 of another block.
int shift_of(int64_t block) {
  for (int shift = 0; shift < 20; ++shift)
    if (block == int64_t{kChunk} << shift) return shift;
  return -1;
}

// ---- times ----------------------------------------------------------------------------------------------------------

// In microseconds, measured on H100 and H200 (benchmarks/results/four-bit-kernels-h200-2026-11-28.txt): of a chunk of
// 64 of a tile's contraction, by the tile's columns and groups.
struct TileTime {
  int columns, groups;
  double forward, transposed;  // 0: there is none
};
constexpr TileTime kTileTimes[] = {
    {32, 2, 0.31, 0.38}, {32, 4, 0.50, 0.0},   {64, 2, 0.38, 0.50},
    {64, 4, 0.63, 0.0},  {128, 2, 0.47, 0.60}, {256, 2, 0.82, 0.92},
};
constexpr double kLaunch = 6.5;                                  // a launch, the table, the first copies, the last sums
constexpr double kTile = 1.0;                                    // each tile more of a thread block
constexpr double kProductRate = 740e6;                           // of cuBLAS, operations a microsecond
constexpr double kDequantizeLaunch = 1.0, kProductLaunch = 4.0;  // the second where reading the weight takes longest
constexpr double kReadShare = 0.85, kDequantizeShare = 0.7;      // of the memory's rate
constexpr int64_t kFewRows = 8;                                  // that the kernel for few rows serves on Hopper too

// Of the device's memory, bytes a microsecond. Asked once per device: the driver reads the clock from the board, which
// takes half a millisecond.
double memory_rate() {
  static std::atomic<double> known[64];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= 64) device = 0;
  if (const double rate = known[device].load(std::memory_order_relaxed); rate > 0.0) return rate;
  const double kilohertz = device_attribute(cudaDevAttrMemoryClockRate);
  const double bits = device_attribute(cudaDevAttrGlobalMemoryBusWidth);
  const double rate = std::max(kilohertz * bits * 2 / 8 / 1e3, 1e5);
  known[device].store(rate, std::memory_order_relaxed);
  return rate;
}

// Decoding the weight, and a product by cuBLAS.
double dequantized_time(const FourBitLinearArgs& a) {
  const double weights = static_cast<double>(a.n) * static_cast<double>(a.k), rate = memory_rate();
  return kDequantizeLaunch + 2.5625 * weights / (kDequantizeShare * rate) +
         std::max(2.0 * static_cast<double>(a.m) * weights / kProductRate,
                  kProductLaunch + 2.0 * weights / (kReadShare * rate));
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------

bool wgmma_suits([[maybe_unused]] const FourBitLinearArgs& a, [[maybe_unused]] bool transposed) {
#if defined(QUANTRAIN_WITH_SM90)
  return suits(a) && device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         (!transposed || (a.n % 8 == 0 && !a.bias)) && a.m < (int64_t{1} << 30);
#else
  return false;
#endif
}

// The tile, and the number of thread blocks that share its sum, that are done first.
sm90::WgmmaPlan plan_of(const FourBitLinearArgs& a, bool transposed) {
  const int processors = std::max(multiprocessors(), 1);
  const int64_t outputs = transposed ? a.k : a.n, chunks = ceil_div(transposed ? a.n : a.k, kChunk);
  sm90::WgmmaPlan best{0, 0, 0, 1e30};
  for (const TileTime& tile : kTileTimes) {
    const double of_chunk = transposed ? tile.transposed : tile.forward;
    if (of_chunk == 0.0) continue;
    const int64_t tiles = ceil_div(a.m, tile.columns) * ceil_div(outputs, tile.groups * 64);
    for (int split = 1; split <= (tile.columns <= 128 ? 4 : 1); ++split) {
      if (tile.columns == 128 && split > 2) continue;  // what is received does not fit
      // Clusters lie within groups of 16 or 18 multiprocessors.
      const int64_t resident = std::max(split <= 2 ? processors / split : (processors - 12) / split, 1);
      const int64_t rounds = ceil_div(tiles, resident), share = ceil_div(ceil_div(chunks, split), 4) * 4;
      const double once = static_cast<double>(share) * of_chunk,
                   launches = split > 1 ? static_cast<double>(rounds) : 1.0;
      const double time = launches * kLaunch + static_cast<double>(rounds) * once +
                          (static_cast<double>(rounds) - launches) * kTile + (split > 1 ? 1.0 : 0.0);
      if (time < best.microseconds) best = {tile.columns, tile.groups, split, time};
    }
  }
  return best;
}

int wgmma([[maybe_unused]] const FourBitLinearArgs& a, [[maybe_unused]] bool transposed,
          [[maybe_unused]] void* stream) {
#if defined(QUANTRAIN_WITH_SM90)
  const sm90::WgmmaPlan plan = plan_of(a, transposed);
  const int64_t outputs = transposed ? a.k : a.n, contraction = transposed ? a.n : a.k;
  const int64_t share = ceil_div(ceil_div(contraction, kChunk), plan.split);
  const sm90::WgmmaParams params{a,
                                 layout_of(a),
                                 contraction,
                                 static_cast<int>(ceil_div(a.m, plan.columns)),
                                 static_cast<int>(ceil_div(outputs, plan.groups * 64)),
                                 plan.split,
                                 static_cast<int>(ceil_div(share, 4) * 4),
                                 is_aligned(a.y)};
  return a.dtype == DType::kBFloat16 ? sm90::wgmma_bfloat16(params, transposed, plan, stream)
                                     : sm90::wgmma_float16(params, transposed, plan, stream);
#else
  return cudaErrorNotSupported;
#endif
}

bool by_wgmma(const FourBitLinearArgs& a) { return a.m > kFewRows && wgmma_suits(a, /*transposed=*/false); }

}  // namespace

bool suits(const FourBitLinearArgs& a) {
  const bool half = a.dtype == DType::kFloat16 || a.dtype == DType::kBFloat16;
  return half && a.m >= 1 && a.n > 0 && a.n < (1 << 30) && a.k % kChunk == 0 && a.k > 0 && a.k < (1 << 30) &&
         shift_of(a.block) >= 0 && a.k % a.block == 0 && !a.scales.float_zero_point &&
         (a.scales.scale || !a.scales.zero_point) && is_aligned(a.x) && is_aligned(a.codes);
}

ScaleLayout layout_of(const FourBitLinearArgs& a) {
  const auto aligned = [](const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; };
  const int64_t blocks_per_row = a.k / a.block;
  return {a.scales, blocks_per_row, shift_of(a.block),
          a.block == kChunk && blocks_per_row % kGroup == 0 && aligned(a.scales.scale, 4 * kGroup) &&
              aligned(a.scales.zero_point, 4 * kGroup) && aligned(a.scales.scale_codes, kGroup)};
}

bool four_bit_linear_suits(const FourBitLinearArgs& a) { return by_wgmma(a) || few_rows_suit(a); }

bool four_bit_linear_pays(const FourBitLinearArgs& a) {
  return !by_wgmma(a) || plan_of(a, /*transposed=*/false).microseconds < dequantized_time(a);
}

size_t four_bit_linear_workspace(const FourBitLinearArgs& a) { return by_wgmma(a) ? 0 : few_rows_workspace(a); }

int four_bit_linear(const FourBitLinearArgs& a, void* stream) {
  return by_wgmma(a) ? wgmma(a, /*transposed=*/false, stream) : few_rows_linear(a, stream);
}

bool four_bit_grad_input_suits(const FourBitLinearArgs& a) { return wgmma_suits(a, /*transposed=*/true); }

bool four_bit_grad_input_pays(const FourBitLinearArgs& a) {
  return plan_of(a, /*transposed=*/true).microseconds < dequantized_time(a);
}

int four_bit_grad_input(const FourBitLinearArgs& a, void* stream) { return wgmma(a, /*transposed=*/true, stream); }

}  // namespace quantrain::cuda
