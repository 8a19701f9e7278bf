// Convolution of few or odd channels (a network's first layer) as a matrix product: each pixel's window is gathered in
// shared memory.
#pragma once

#include "csrc/cuda/fixed_point_conv/mma.cuh"

namespace quantrain::cuda::conv {

using GatherShape = TileShape<128, 64, 2, 2>;
static_assert(GatherShape::kTileM == GatherShape::kThreads);  // a thread gathers one pixel's window

constexpr int kGatherMaxDepth = 512;

// A row of the window is `segment` bytes in shared memory: kw * c, then what makes whole words, whose weights are 0.
struct GatherParams {
  FixedPointConvArgs g;
  FastDivisor image, row;  // of pixels: oh * ow and ow
  int pixels;
  int row_tiles;
  int segment, depth;  // depth: kh * segment made a multiple of 32
  int pitch;           // depth + 16: eight rows meet no bank twice
  int vector;
};

inline int64_t segment_bytes(const FixedPointConvArgs& a) { return ceil_div(a.kw * a.c, 4) * 4; }

inline GatherParams gather_params(const FixedPointConvArgs& a) {
  GatherParams p;
  p.g = a;
  p.image = FastDivisor(static_cast<uint32_t>(a.oh * a.ow));
  p.row = FastDivisor(static_cast<uint32_t>(a.ow));
  p.pixels = static_cast<int>(a.n * a.oh * a.ow);
  p.row_tiles = static_cast<int>(ceil_div(p.pixels, GatherShape::kTileM));
  p.segment = static_cast<int>(segment_bytes(a));
  p.depth = static_cast<int>(ceil_div(a.kh * p.segment, 32) * 32);
  p.pitch = p.depth + kChunk;
  p.vector = vector_of(a);
  return p;
}

constexpr int gather_shared_bytes(int pitch) {
  return (GatherShape::kTileM + GatherShape::kTileN) * pitch + GatherShape::kRuleBytes;
}

// Bytes low to high of a word, others 0.
__device__ __forceinline__ uint32_t byte_mask(int low, int high) {
  const uint32_t below = high >= 4 ? ~0u : high <= 0 ? 0u : (1u << high * 8) - 1;
  const uint32_t above = low <= 0 ? ~0u : low >= 4 ? 0u : ~0u << low * 8;
  return below & above;
}

// The word at `at` of a tensor of `bytes`, which is on a word's boundary; only the tensor's last one can be cut.
__device__ __forceinline__ uint32_t load_word(const uint8_t* __restrict__ x, int64_t at, int64_t bytes) {
  if (at + 4 <= bytes) return *reinterpret_cast<const uint32_t*>(x + at);
  uint32_t word = 0;
#pragma unroll 1
  for (int i = 0; at + i < bytes; ++i) word |= static_cast<uint32_t>(x[at + i]) << i * 8;
  return word;
}

// kWords: of a segment; 0: as the arguments say.
template <int kWords>
__device__ __forceinline__ void gather_window(uint8_t* to, const GatherParams& p, int64_t pixel) {
  const FixedPointConvArgs& g = p.g;
  const auto* x = static_cast<const uint8_t*>(g.input);
  const int64_t bytes = g.n * g.h * g.w * g.c;
  const uint32_t image = p.image.divide(static_cast<uint32_t>(pixel));
  const uint32_t in_image = static_cast<uint32_t>(pixel) - image * p.image.divisor;
  const uint32_t oy = p.row.divide(in_image), ox = in_image - oy * p.row.divisor;
  const int h = static_cast<int>(g.h), w = static_cast<int>(g.w), c = static_cast<int>(g.c);
  const int y0 = static_cast<int>(oy * g.stride_h - g.padding_h), x0 = static_cast<int>(ox * g.stride_w - g.padding_w);
  // The part of a segment that lies in the image.
  const int low = max(-x0, 0) * c, high = min(static_cast<int>(g.kw), w - x0) * c;
  const bool whole = low == 0 && high == static_cast<int>(g.kw) * c;
  const int words = kWords > 0 ? kWords : p.segment / 4;
  for (int r = 0; r < static_cast<int>(g.kh); ++r) {
    auto* const segment = reinterpret_cast<uint32_t*>(to + r * p.segment);
    const int y = y0 + r;
    if (y < 0 || y >= h || low >= high) {
#pragma unroll
      for (int j = 0; j < words; ++j) segment[j] = 0;
      continue;
    }
    const int64_t start = ((static_cast<int64_t>(image) * h + y) * w + x0) * c;
    const int skew = static_cast<int>(start & 3);
    const auto word_at = [&](int q) {  // bytes from 4 q - skew of the segment; not read where none is in the image
      const int first = q * 4 - skew;
      return first < high && first + 4 > low ? load_word(x, start + first, bytes) : 0u;
    };
    uint32_t previous = word_at(0);
#pragma unroll
    for (int j = 0; j < words; ++j) {
      const uint32_t next = word_at(j + 1);
      uint32_t word = __funnelshift_r(previous, next, skew * 8);
      if (!whole) word &= byte_mask(low - j * 4, high - j * 4);
      segment[j] = word;
      previous = next;
    }
  }
}

// Rows [channels, kh, kw * c] of this block's channels as [kTileN, pitch], rows as the shape has them, with zeros for
// all that is not there.
__device__ __forceinline__ void gather_weight(uint8_t* to, const GatherParams& p, int first_channel) {
  const FixedPointConvArgs& g = p.g;
  const int row_bytes = static_cast<int>(g.kw * g.c), kh = static_cast<int>(g.kh);
  for (int i = threadIdx.x; i < GatherShape::kTileN * p.depth; i += GatherShape::kThreads) {
    const int row = i / p.depth, k = i - row * p.depth, r = k / p.segment, byte = k - r * p.segment;
    const int channel = first_channel + GatherShape::row_channel(row);
    const bool inside = channel < g.o && r < kh && byte < row_bytes;
    to[row * p.pitch + k] =
        inside ? static_cast<uint8_t>(g.weight[(static_cast<int64_t>(channel) * kh + r) * row_bytes + byte])
               : uint8_t{0};
  }
}

template <int kWords, bool kInputSigned>
__global__ void __launch_bounds__(GatherShape::kThreads, 4)
    fixed_point_conv_gather_kernel(const __grid_constant__ GatherParams p) {
  using Shape = GatherShape;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  uint8_t* const weight = shared_bytes + Shape::kTileM * p.pitch;
  const auto rules = TileRules::at<Shape>(weight + Shape::kTileN * p.pitch);
  const TilePlace at{static_cast<int>(blockIdx.y) * Shape::kTileN, static_cast<int>(p.g.o), p.vector};
  gather_weight(weight, p, at.first_channel);
  const Ending ending = load_rules<Shape>(rules, p.g, at, p.g.kh * p.g.kw * p.g.c);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const SharedAddress a_row = ptx::shared_address(shared_bytes) +
                              (warp / Shape::kWarpsN * Shape::kWarpM + lane % 16) * p.pitch + lane / 16 * kChunk;
  const SharedAddress b_row = ptx::shared_address(weight) +
                              (warp % Shape::kWarpsN * Shape::kWarpN + lane % 8 + lane / 16 * 8) * p.pitch +
                              lane / 8 % 2 * kChunk;
  for (int tile = blockIdx.x; tile < p.row_tiles; tile += gridDim.x) {
    const int first_pixel = tile * Shape::kTileM;
    __syncthreads();  // the tile before is done with shared memory
    if (first_pixel + static_cast<int>(threadIdx.x) < p.pixels)
      gather_window<kWords>(shared_bytes + threadIdx.x * p.pitch, p, first_pixel + static_cast<int>(threadIdx.x));
    typename Shape::Sums sums;
    MmaEngine::begin<Shape>(sums);
    __syncthreads();
#pragma unroll 1
    for (int k = 0; k < p.depth; k += 32) {
      uint32_t a[Shape::kTilesM][4], b[Shape::kTilesN / 2][4];
#pragma unroll
      for (int i = 0; i < Shape::kTilesM; ++i) ptx::ldmatrix_x4(a[i], a_row + i * 16 * p.pitch + k);
#pragma unroll
      for (int j = 0; j < Shape::kTilesN / 2; ++j) ptx::ldmatrix_x4(b[j], b_row + j * 16 * p.pitch + k);
#pragma unroll
      for (int i = 0; i < Shape::kTilesM; ++i)
#pragma unroll
        for (int j = 0; j < Shape::kTilesN; ++j)
          ptx::mma_m16n8k32<kInputSigned>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
    write_tile<Shape>(sums, rules, ending, p.g, at, [&](int row) {
      return first_pixel + row < p.pixels ? static_cast<int64_t>(first_pixel + row) : int64_t{-1};
    });
  }
}

}  // namespace quantrain::cuda::conv
