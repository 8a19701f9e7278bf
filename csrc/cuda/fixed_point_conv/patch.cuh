// Convolution of one, three or four channels (a network's first layer) on tensor cores. The part of the image that a
// tile's windows meet lies in shared memory, four bytes per pixel, and operands are read from there: four neighbouring
// pixels are 16 products of the sum.
#pragma once

#include "csrc/cuda/fixed_point_conv/mma.cuh"

namespace quantrain::cuda::conv {

// 8 rows of 16 pixels; a warp has two rows and all of the tile's channels.
using PatchShape = TileShape<128, 64, 4, 1>;
constexpr int kPatchRows = 8, kPatchColumns = 16, kPatchMaxWindow = 8;
constexpr int kPixelChannels = 4;

struct PatchParams {
  FixedPointConvArgs g;
  FastDivisor image, row;  // of tiles: an image's, and a row's of an image
  FastDivisor patch;       // of a patch's quads of pixels: a row's
  int tiles;
  int rows, pitch;     // of the patch; pitch: pixels of a row, a multiple of four
  int steps;           // of 32 products
  int weight_pitch;    // bytes: 32 steps, and 16 so that eight rows meet no bank twice
  int weights, rules;  // where they lie in shared memory
  int vector;
};

// kSegments: groups of four taps that a row of the window takes. With one, an instruction has two rows; a last row
// without a partner has weights of 0 there, and the patch a row more.
inline int lay_out_patch(PatchParams& p, int segments) {
  const FixedPointConvArgs& g = p.g;
  p.steps = static_cast<int>(ceil_div(g.kh * segments, 2));
  p.weight_pitch = p.steps * 32 + kChunk;
  p.rows = static_cast<int>((kPatchRows - 1) * g.stride_h) + p.steps * 2 / segments;
  p.pitch = static_cast<int>(ceil_div((kPatchColumns - 1) * g.stride_w + segments * 4, 4) * 4);
  p.patch = FastDivisor(static_cast<uint32_t>(p.pitch / 4));
  p.weights = static_cast<int>(ceil_div(p.rows * p.pitch * kPixelChannels, 128) * 128);
  p.rules = p.weights + PatchShape::kTileN * p.weight_pitch;
  return p.rules + PatchShape::kRuleBytes;
}

inline PatchParams patch_params(const FixedPointConvArgs& a) {
  PatchParams p;
  p.g = a;
  const int64_t tile_rows = ceil_div(a.oh, kPatchRows), tile_columns = ceil_div(a.ow, kPatchColumns);
  p.image = FastDivisor(static_cast<uint32_t>(tile_rows * tile_columns));
  p.row = FastDivisor(static_cast<uint32_t>(tile_columns));
  p.tiles = static_cast<int>(a.n * tile_rows * tile_columns);
  p.vector = vector_of(a);
  return p;
}

// Four neighbouring pixels of a row, of which the first is x from its start; words: the row's first byte is `skew`
// bytes from there. Words without a byte of the row are not read.
template <int kC>
struct Quad {
  uint32_t words[kC + 1];
  int bits;

  __device__ __forceinline__ void load(const uint32_t* __restrict__ from, int skew, int x, int w) {
    const int at = skew + x * kC, first = at >> 2, last = (skew + w * kC - 1) >> 2;
    bits = (at & 3) * 8;
#pragma unroll
    for (int i = 0; i <= kC; ++i) words[i] = from[min(max(first + i, 0), last)];
  }

  // Zeros outside the row.
  __device__ __forceinline__ int4 pixels(int x, int w) const {
    uint32_t bytes[kC + 1], pixel[4];
#pragma unroll
    for (int i = 0; i < kC; ++i) bytes[i] = __funnelshift_r(words[i], words[i + 1], bits);
    bytes[kC] = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      constexpr uint32_t kMask = kC == 4 ? ~0u : (1u << kC * 8 % 32) - 1;
      const uint32_t channels = __funnelshift_r(bytes[k * kC / 4], bytes[k * kC / 4 + 1], k * kC % 4 * 8) & kMask;
      pixel[k] = static_cast<uint32_t>(x + k) < static_cast<uint32_t>(w) ? channels : 0u;
    }
    return make_int4(pixel[0], pixel[1], pixel[2], pixel[3]);
  }
};

template <int kC, int kSegments, bool kInputSigned>
__global__ void __launch_bounds__(PatchShape::kThreads, 4)
    fixed_point_conv_patch_kernel(const __grid_constant__ PatchParams p) {
  using Shape = PatchShape;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  const FixedPointConvArgs& g = p.g;
  auto* const patch = reinterpret_cast<uint32_t*>(shared_bytes);
  uint8_t* const weight = shared_bytes + p.weights;
  const auto rules = TileRules::at<Shape>(shared_bytes + p.rules);
  const TilePlace at{static_cast<int>(blockIdx.y) * Shape::kTileN, static_cast<int>(g.o), p.vector};
  const int kh = static_cast<int>(g.kh), kw = static_cast<int>(g.kw);
  const int h = static_cast<int>(g.h), w = static_cast<int>(g.w);
  const int oh = static_cast<int>(g.oh), ow = static_cast<int>(g.ow);

  // A row of the window takes kSegments times 16 bytes: four taps of four channels each.
#pragma unroll 4
  for (int i = threadIdx.x; i < Shape::kTileN * p.steps * 8; i += Shape::kThreads) {
    const int row = i / (p.steps * 8), tap = i - row * (p.steps * 8);
    const int r = tap / (kSegments * 4), s = tap - r * (kSegments * 4);
    const int channel = at.first_channel + Shape::row_channel(row);
    uint32_t word = 0;
    if (channel < at.channels && r < kh && s < kw) {
      const int8_t* const from = g.weight + ((static_cast<int64_t>(channel) * kh + r) * kw + s) * kC;
#pragma unroll
      for (int k = 0; k < kC; ++k) word |= static_cast<uint32_t>(static_cast<uint8_t>(from[k])) << k * 8;
    }
    *reinterpret_cast<uint32_t*>(weight + row * p.weight_pitch + tap * 4) = word;
  }
  const Ending ending = load_rules<Shape>(rules, g, at, g.kh * g.kw * kC);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int stride_w = static_cast<int>(g.stride_w), row_words = static_cast<int>(g.stride_h) * p.pitch;
  const uint32_t* const a_first = patch + warp * 2 * row_words + lane / 4 * stride_w + lane % 4;
  const SharedAddress b_row =
      ptx::shared_address(weight) + (lane % 8 + lane / 16 * 8) * p.weight_pitch + lane / 8 % 2 * kChunk;
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const uint32_t image = p.image.divide(static_cast<uint32_t>(tile));
    const uint32_t in_image = static_cast<uint32_t>(tile) - image * p.image.divisor;
    const uint32_t tile_row = p.row.divide(in_image);
    const int oy0 = static_cast<int>(tile_row) * kPatchRows;
    const int ox0 = static_cast<int>(in_image - tile_row * p.row.divisor) * kPatchColumns;
    const int y0 = oy0 * static_cast<int>(g.stride_h) - static_cast<int>(g.padding_h);
    const int x0 = ox0 * stride_w - static_cast<int>(g.padding_w);
    const int64_t image_at = static_cast<int64_t>(image) * h * w * kC;
    __syncthreads();            // the tile before is done with the patch
    constexpr int kAtOnce = 2;  // loads are on their way before the first is used
    const int quads = p.rows * (p.pitch / 4);
    for (int start = static_cast<int>(threadIdx.x); start < quads; start += kAtOnce * Shape::kThreads) {
      Quad<kC> quad[kAtOnce];
      int x[kAtOnce], width[kAtOnce];  // width 0: a row outside the image
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int place = start + i * Shape::kThreads, row = static_cast<int>(p.patch.divide(place)), y = y0 + row;
        x[i] = x0 + (place - row * (p.pitch / 4)) * 4;
        width[i] = static_cast<uint32_t>(y) < static_cast<uint32_t>(h) ? w : 0;
        const int64_t row_at = image_at + static_cast<int64_t>(width[i] > 0 ? y : 0) * (w * kC);
        quad[i].load(static_cast<const uint32_t*>(g.input) + (row_at >> 2), static_cast<int>(row_at & 3), x[i], w);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (start + i * Shape::kThreads < quads)
          reinterpret_cast<int4*>(patch)[start + i * Shape::kThreads] = quad[i].pixels(x[i], width[i]);
    }
    typename Shape::Sums sums;
    MmaEngine::begin<Shape>(sums);
    __syncthreads();
    const uint32_t* a_row = a_first;
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step, a_row += kSegments == 1 ? 2 * p.pitch : p.pitch) {
      const int second = kSegments == 1 ? p.pitch : 4;  // words from an instruction's first 16 products to its others
      uint32_t a[Shape::kTilesM][4], b[Shape::kTilesN / 2][4];
#pragma unroll
      for (int i = 0; i < Shape::kTilesM; ++i) {
        const uint32_t* const from = a_row + i * row_words;
        a[i][0] = from[0];
        a[i][1] = from[8 * stride_w];
        a[i][2] = from[second];
        a[i][3] = from[8 * stride_w + second];
      }
#pragma unroll
      for (int j = 0; j < Shape::kTilesN / 2; ++j) ptx::ldmatrix_x4(b[j], b_row + j * 16 * p.weight_pitch + step * 32);
#pragma unroll
      for (int i = 0; i < Shape::kTilesM; ++i)
#pragma unroll
        for (int j = 0; j < Shape::kTilesN; ++j)
          ptx::mma_m16n8k32<kInputSigned>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
    write_tile<Shape>(sums, rules, ending, g, at, [&](int row) {
      const int oy = oy0 + row / kPatchColumns, ox = ox0 + row % kPatchColumns;
      return oy < oh && ox < ow ? (static_cast<int64_t>(image) * oh + oy) * ow + ox : int64_t{-1};
    });
  }
}

}  // namespace quantrain::cuda::conv
