#include "csrc/cuda/fixed_point_conv/mma.cuh"

#include <string_view>

#include "csrc/cuda/device.h"
#include "csrc/cuda/fixed_point_conv/conv.h"

namespace quantrain::cuda::conv {
namespace {

struct Device {
  int multiprocessors = 0, shared = 0, major = 0;  // shared: bytes of a multiprocessor
};

constexpr int kReservedShared = 1024;  // of a block, by CUDA

constexpr Candidate kCandidates[] = {
    candidate<MmaEngine, MmaTile<TileShape<128, 256, 2, 4>, 64, 4, 1>>("128x256x64", 0.41),
    candidate<MmaEngine, MmaTile<TileShape<128, 128, 2, 4>, 128, 3, 2>>("128x128x128", 0.40),
    candidate<MmaEngine, MmaTile<TileShape<128, 128, 2, 4>, 64, 4, 2>>("128x128x64", 0.38),
    candidate<MmaEngine, MmaTile<TileShape<128, 64, 2, 2>, 128, 3, 3>>("128x64x128", 0.38),
    candidate<MmaEngine, MmaTile<TileShape<128, 64, 2, 2>, 64, 4, 4>>("128x64x64", 0.34),
    candidate<MmaEngine, MmaTile<TileShape<64, 64, 2, 2>, 128, 3, 4>>("64x64x128", 0.34),
    candidate<MmaEngine, MmaTile<TileShape<64, 64, 2, 2>, 64, 4, 5>>("64x64x64", 0.28),
};

// What depends on the tile; gives the bytes of shared memory. Weights stay where `blocks` blocks still fit on a
// multiprocessor with all of them.
int fit(MmaParams& p, const Candidate& c, const Device& d) {
  const int64_t depth = p.g.kh * p.g.kw * p.g.c;
  const int pixel_bytes = c.tile_m * c.depth, weight_bytes = c.tile_n * c.depth;
  p.steps = static_cast<int>(ceil_div(depth, c.depth));
  p.row_tiles = static_cast<int>(ceil_div(p.pixels, c.tile_m));
  p.column_tiles = static_cast<int>(ceil_div(p.g.o, c.tile_n));
  p.stages = c.stages;
  const int64_t resident_bytes =
      static_cast<int64_t>(p.steps) * weight_bytes + p.stages * pixel_bytes + c.rule_bytes + kReservedShared;
  p.resident = resident_bytes * c.blocks <= d.shared;
  return lay_out(p, pixel_bytes, weight_bytes, c.rule_bytes);
}

// Blocks of a multiprocessor, and each block's tiles.
struct Schedule {
  int shared, blocks, grid, tiles;
};

Schedule schedule(MmaParams& p, const Candidate& c, const Device& d) {
  Schedule s;
  s.shared = fit(p, c, d);
  const int by_shared = d.shared / (s.shared + kReservedShared);
  s.blocks = by_shared < c.blocks ? by_shared : c.blocks;
  const int64_t slots = static_cast<int64_t>(d.multiprocessors) * s.blocks / p.column_tiles;
  const int64_t most = slots < 1 ? 1 : slots < p.row_tiles ? slots : p.row_tiles;
  s.tiles = most > 0 ? static_cast<int>(ceil_div(p.row_tiles, most)) : 0;
  p.row_step = s.tiles > 0 ? static_cast<int>(ceil_div(p.row_tiles, s.tiles)) : 1;
  s.grid = p.row_step * p.column_tiles;
  return s;
}

// Cycles that the busiest multiprocessor takes. The numbers here and the tiles' rates are fitted to the times of
// ResNet-50's layers by benchmarks/fits/fixed_point_tiles.py.
double estimate(const Candidate& c, const MmaParams& p, const Schedule& s, const Device& d) {
  constexpr double kPeak = 4096.0;       // products per cycle
  constexpr double kCopiedBytes = 77.0;  // per cycle
  constexpr double kWrittenCodes = 9.9;  // per cycle
  constexpr double kStepLatency = 185.0, kTileLatency = 363.0;
  if (s.blocks < 1) return 1e300;
  const double area = static_cast<double>(c.tile_m) * c.tile_n, steps = p.steps;
  const double products = area * steps * c.depth / (kPeak * c.rate);
  const double copies = static_cast<double>(p.stage_bytes) * steps / kCopiedBytes, end = area / kWrittenCodes;
  const double blocks = static_cast<double>(ceil_div(s.grid, d.multiprocessors));
  const double rounds = static_cast<double>(ceil_div(s.grid, static_cast<int64_t>(d.multiprocessors) * s.blocks));
  return s.tiles *
         (blocks * ((products > copies ? products : copies) + end) + rounds * (kStepLatency * steps + kTileLatency));
}

}  // namespace

bool suits_mma(const FixedPointConvArgs& a) {
  constexpr int64_t kMaxSide = 30000,
                    kMax = (int64_t{1} << 31) - 1;  // coordinates have 16 bits, offsets in a tile's images 31
  const int64_t depth = a.kh * a.kw * a.c, area = a.oh * a.ow;
  if (a.groups != 1 || a.c == 0 || a.c % kChunk != 0 || !is_aligned(a.input) || !is_aligned(a.weight)) return false;
  if (a.h + a.padding_h + a.kh > kMaxSide || a.w + a.padding_w + a.kw > kMaxSide) return false;
  if (a.n * area >= kMax - 512 || a.o > (1 << 20) || a.c > (1 << 20) || depth * 256 > kMax) return false;
  const int64_t images = 128 / area + 2;
  return images * (a.h + 2 * a.padding_h + a.kh) * (a.w + 2 * a.padding_w + a.kw) * a.c <= kMax;
}

int launch_mma(const FixedPointConvArgs& a, const char* tile, void* stream) {
  const Device device{multiprocessors(), device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                      device_attribute(cudaDevAttrComputeCapabilityMajor)};
  if (device.multiprocessors == 0) return cudaErrorInvalidDevice;
  MmaParams p = mma_params(a);
  const Candidate* best = nullptr;
  double least = 1e299;
  const std::string_view asked = tile;
  const auto consider = [&](const Candidate& c) {
    if (!asked.empty() && asked != c.name) return;
    const Schedule s = schedule(p, c, device);
    const double time = estimate(c, p, s, device);
    if (time >= least) return;
    least = time;
    best = &c;
  };
  for (const Candidate& c : kCandidates) consider(c);
#if defined(QUANTRAIN_WITH_SM90)
  const Candidates hopper = wgmma_candidates();
  for (int i = 0; device.major == 9 && i < hopper.count; ++i) consider(hopper.first[i]);
#endif
  if (!best) return cudaErrorInvalidValue;
  const Schedule s = schedule(p, *best, device);
  return (a.input_signed ? best->run_signed : best->run_unsigned)(p, s.grid, s.shared,
                                                                  static_cast<cudaStream_t>(stream));
}

}  // namespace quantrain::cuda::conv
