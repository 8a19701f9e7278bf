#include "csrc/cuda/fixed_point_conv_mma.cuh"

#include <string_view>

#include "csrc/cuda/fixed_point_conv.h"

namespace quantrain::cuda::conv {
namespace {

struct Device {
  int multiprocessors = 0, shared = 0, major = 0;  // shared: bytes of a multiprocessor
};

int query(Device& d) {
  int device = 0;
  if (const auto error = cudaGetDevice(&device)) return error;
  if (const auto error = cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, device))
    return error;
  if (const auto error = cudaDeviceGetAttribute(&d.major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  return cudaDeviceGetAttribute(&d.shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
}

constexpr Candidate kCandidates[] = {
    candidate<MmaEngine, MmaTile<TileShape<128, 256, 2, 4>, 64, 4, 1>>("128x256x64", 1.0),
    candidate<MmaEngine, MmaTile<TileShape<128, 128, 2, 4>, 128, 3, 2>>("128x128x128", 0.85),
    candidate<MmaEngine, MmaTile<TileShape<128, 128, 2, 4>, 64, 4, 2>>("128x128x64", 0.8),
    candidate<MmaEngine, MmaTile<TileShape<128, 64, 2, 2>, 128, 3, 3>>("128x64x128", 0.8),
    candidate<MmaEngine, MmaTile<TileShape<128, 64, 2, 2>, 64, 4, 4>>("128x64x64", 0.75),
    candidate<MmaEngine, MmaTile<TileShape<64, 64, 2, 2>, 128, 3, 4>>("64x64x128", 0.6),
    candidate<MmaEngine, MmaTile<TileShape<64, 64, 2, 2>, 64, 4, 5>>("64x64x64", 0.55),
};

// What depends on the tile; gives the bytes of shared memory.
int fit(MmaParams& p, const Candidate& c, int64_t depth) {
  p.steps = static_cast<int>(ceil_div(depth, c.depth));
  p.stages = p.steps < c.stages ? p.steps : c.stages;
  p.column_tiles = static_cast<int>(ceil_div(p.g.o, c.tile_n));
  return lay_out(p, c.stage_bytes, c.staging_bytes, c.rule_bytes);
}

// Relative time: of waves of tiles, each as long as its sums and its end take.
double estimate(const Candidate& c, MmaParams& p, const Device& d) {
  const FixedPointConvArgs& a = p.g;
  const int64_t depth = a.kh * a.kw * a.c, pixels = a.n * a.oh * a.ow;
  const int64_t tiles = ceil_div(pixels, c.tile_m) * ceil_div(a.o, c.tile_n);
  const int by_shared = d.shared / (fit(p, c, depth) + 1024);
  const int blocks = by_shared < c.blocks ? by_shared : c.blocks;
  if (blocks < 1) return 1e300;
  const double waves = static_cast<double>(ceil_div(tiles, static_cast<int64_t>(d.multiprocessors) * blocks));
  const double padded = static_cast<double>(ceil_div(depth, c.depth) * c.depth);
  const double area = static_cast<double>(c.tile_m) * c.tile_n;
  return waves * blocks * (area * (padded / c.rate + 256.0) + 64.0 * (c.tile_m + c.tile_n) * 16.0);
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
  Device device;
  if (const int error = query(device)) return error;
  const int64_t depth = a.kh * a.kw * a.c;
  MmaParams p;
  p.g = a;
  p.image = FastDivisor(static_cast<uint32_t>(a.oh * a.ow));
  p.row = FastDivisor(static_cast<uint32_t>(a.ow));
  p.pixels = static_cast<int>(a.n * a.oh * a.ow);
  p.residual = residual_kind(a);
  p.wide = a.o % kChunk == 0 && is_aligned(a.output) && is_aligned(a.residual);
  const Candidate* best = nullptr;
  double least = 1e299;
  const std::string_view asked = tile;
  const auto consider = [&](const Candidate& c) {
    if (!asked.empty() && asked != c.name) return;
    const double time = estimate(c, p, device);
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
  const int shared = fit(p, *best, depth);
  const int64_t blocks = ceil_div(p.pixels, best->tile_m) * p.column_tiles;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return (a.input_signed ? best->run_signed : best->run_unsigned)(p, static_cast<int>(blocks), shared,
                                                                  static_cast<cudaStream_t>(stream));
}

}  // namespace quantrain::cuda::conv
